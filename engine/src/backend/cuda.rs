//! NVIDIA GPUs: activations and weights in bf16, or in f16 where the model wants that, sums in f32, KV in the type that the pool asks for.
//!
//! Kernels are our own (`engine/kernels`), compiled for the card that is found; large products are cuBLASLt's. All work of a
//! step is put on one stream and nothing waits until its result is read: metadata goes up in one copy before the first kernel, and
//! activations never visit the host, unless ranks sum them there. Decode steps of one shape are recorded once and replayed.
//! An operation that fails is remembered, those after it do nothing, and the step says so. Must match `backend/cpu` within
//! the tolerances of the conformance suite; rows are not bit-equal across batches, because the library's algorithm depends on the shape.
//!
//! Weights in 8 bits (e4m3, a scale a row) stay so on Hopper: products of one or two rows read them beside activations in 16 bits, larger
//! ones have the activations in 8 bits too, with a scale a row, rounded where they are computed if it is known by then that nothing
//! else reads them; elsewhere they get 16 bits when they are loaded.
//!
//! Several ranks, each with a GPU of its own, compute a model together through NCCL and each other's memory (`ranks.rs`).
//!
//! Absent: several devices in one process. Peers of a hand-off reach the pool of pages and nothing else (`handoff.rs`).

mod calls;
mod compiler;
mod driver;
mod error;
mod event;
mod flights;
mod graphs;
mod handoff;
mod kernels;
mod linear;
mod loading;
mod memory;
mod nccl;
mod one_shot;
mod ops;
mod pages;
mod peer;
mod ranks;
mod reading;
mod step;
mod tables;
mod tensor;
mod upload;
mod watch;
mod weight;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

pub use error::CudaError;
pub(crate) use handoff::{Move, Mover, READS_AT_ONCE, cuda_arena, keep_device};
pub use handoff::{device_count, device_pages, peer_copies};
pub(crate) use peer::HANDLE_BYTES;
pub use tensor::CudaTensor;
pub use weight::CudaWeight;

use self::calls::{are_one, rounds};
use self::driver::{DevicePtr, Gpu, PinnedMemory};
use self::flights::Flights;
use self::graphs::Graphs;
use self::linear::{Linear, Product, ProductShape};
use self::memory::{Buffer, Pool};
use self::ops::{AttentionCall, Ops, Parts, Rotation};
use self::pages::Pages;
use self::ranks::Ranks;
use self::tables::Tables;
use self::tensor::Rounded;
use self::upload::{OnDevice, Staging};
use self::weight::{WeightStore, repeated, takes_8_bits};
use super::{
    ActivationDtype, Arrived, AttentionSpec, Backend, BackendCapability, BackendError, BlockId,
    FileSource, PatternSource, PrefillRows, RankGroup, RopePairing, RopeTable, StepBatch,
    StepOutput, StepPass, StepWish, TokenId, WeightDtype, WeightSource,
};
use crate::page::{KvScale, Page, PageShape};

/// Up to so many tokens our own product is used: it reads the weights as fast as the memory gives them.
const FEW_TOKENS_MAX: usize = 2;
/// The same where weights are in 8 bits: beyond, it pays to round the activations too.
const FEW_TOKENS_MAX_8_BIT: usize = 2;
/// Columns of a row that the kernels round as they compute it, at most; `VECTORS_MAX` in `rms_norm.cu`, `HELD_MAX` in `elementwise.cu`.
const ROUNDED_COLS_MAX: usize = 4 * 8 * 1024;
/// A step of fewer rows leaves multiprocessors idle; beside decoding, 2,048 rows take some 50 ms of an 8B model.
const PREFILL_ROWS: PrefillRows = PrefillRows {
    alone: 8192,
    beside_decode: 2048,
};
/// Rows of a step that have logits, at most: a step has no more sequences, and prompts' rows are read in smaller ones.
const ROWS_MAX: usize = 1 << 16;
/// The token of a row with NaN or infinity in it; `NOT_FINITE` in `choose.cu`.
const NOT_FINITE: u32 = u32::MAX;
/// Parts that a sequence's KV is divided into for decoding, at most.
const SPLITS_MAX: usize = 32;
/// Blocks of a decode kernel per multiprocessor, at most, where KV is divided: more of them hide no more of the memory's latency,
/// and parts have to be put together again.
const DECODE_BLOCKS_PER_PROCESSOR: usize = 2;

/// One GPU as a device.
#[derive(Debug)]
pub struct CudaBackend {
    /// What failed first.
    failure: RefCell<Option<BackendError>>,
    graphs: Graphs,
    /// The other ranks' GPUs, where they have joined. Behind the recordings: these are dropped first.
    ranks: Option<Ranks>,
    activations: ActivationDtype,
    ops: RefCell<Ops>,
    linear: RefCell<Linear>,
    store: WeightStore,
    pages: Option<Pages>,
    /// Inverse frequencies of the last table.
    frequencies: RefCell<Option<(RopeTable, Arc<Buffer>)>>,
    staging: Staging,
    /// Steps whose results have not been read.
    flights: Flights,
    /// Tokens of a step's rows.
    tokens: Buffer,
    /// What sequences hold whose logits are changed before a choice.
    tables: Tables,
    /// What wide tensors lie in: there is one at a time, a step's result.
    wide: RefCell<Option<Arc<Buffer>>>,
    /// Where results land.
    landing: RefCell<Option<PinnedMemory>>,
    pool: Arc<Pool>,
    gpu: Arc<Gpu>,
}

impl Backend for CudaBackend {
    type Weight = CudaWeight;
    type Tensor = CudaTensor;

    fn capability(&self) -> BackendCapability {
        let ranks = self.ranks.as_ref().map(Ranks::description);
        let ranks = ranks.map_or_else(String::new, |ranks| format!("; {ranks}"));
        BackendCapability {
            description: format!(
                "cuda ({}, {}{ranks})",
                self.gpu.name,
                self.activations.name()
            ),
            host_pages: false,
            batch_invariant: false,
            runs_by_itself: true,
            activations: self.activations,
            prefill_rows: PREFILL_ROWS,
        }
    }

    fn check(&self) -> Result<(), BackendError> {
        self.failure.take().map_or(Ok(()), Err)
    }

    fn free_bytes(&self) -> Option<u64> {
        self.gpu.memory().ok().map(|(free, _)| free as u64)
    }

    fn page_device(&self) -> Option<usize> {
        Some(self.gpu.ordinal())
    }

    fn compute_in(&mut self, activations: ActivationDtype) -> Result<(), BackendError> {
        if activations == self.activations || activations == ActivationDtype::F32 {
            return Ok(());
        }
        let failed = |error: CudaError| error.of(format!("computing in {}", activations.name()));
        self.ops = RefCell::new(Ops::new(&self.gpu, activations).map_err(failed)?);
        self.linear = RefCell::new(Linear::open(&self.gpu, activations).map_err(failed)?);
        self.store = WeightStore::new(activations);
        self.activations = activations;
        Ok(())
    }

    fn expect_ranks(&mut self) -> Result<(), BackendError> {
        let opened = nccl::Nccl::open();
        opened
            .map(drop)
            .map_err(|error| error.of("several ranks on gpus"))
    }

    fn join_ranks(&mut self, group: RankGroup<'_>) -> Result<bool, BackendError> {
        self.ranks = Ranks::meet((&self.gpu, self.activations), group)?;
        Ok(self.ranks.is_some())
    }

    fn sum_over_ranks(&self, x: &mut CudaTensor) {
        self.sum_of_ranks(x);
    }

    fn send_rows(&self, x: &CudaTensor, to: usize) {
        self.send_to_rank(x, to);
    }

    fn receive_rows(&self, x: &mut CudaTensor, from: usize) {
        self.receive_from_rank(x, from);
    }

    fn linear_over_ranks(
        &self,
        x: &CudaTensor,
        weight: &CudaWeight,
        columns: Range<usize>,
        out: &mut CudaTensor,
    ) {
        self.product_of_ranks(x, weight, columns, out);
    }

    fn expect_weights(&mut self, elements: usize) -> Result<(), BackendError> {
        let made = self.store.expect(&self.gpu, elements);
        made.map_err(|error| error.of("the model's weights"))
    }

    fn load_pattern(&mut self, source: &PatternSource) -> Result<Option<CudaWeight>, BackendError> {
        let in_8_bits = source.dtype == WeightDtype::F8E4m3 && takes_8_bits(&self.gpu, source.cols);
        let bytes = repeated(source, self.activations, in_8_bits);
        let mut made = || {
            let shape = (source.rows, source.cols);
            let weight = if in_8_bits {
                let scale = [source.scale];
                self.store.place_8_bit(&self.gpu, shape, &scale)?
            } else {
                self.store.place(&self.gpu, source.rows, source.cols)?
            };
            let pattern = self.pool.take(bytes.len())?;
            self.gpu.upload(pattern.memory(), 0, &bytes)?;
            let place = (source.first, source.stride);
            let pattern = (pattern.address(), source.values.len());
            self.ops.get_mut().pattern(pattern, &weight, place)?;
            Ok(Some(weight))
        };
        made().map_err(|error: CudaError| error.of(format!("weight `{}`", source.name)))
    }

    fn load_file(
        &mut self,
        source: &Arc<FileSource>,
        arrived: Arrived<'_>,
    ) -> Result<Option<CudaWeight>, BackendError> {
        self.store.read(&self.gpu, source, arrived)
    }

    fn end_loading(&mut self, arrived: Arrived<'_>) -> Result<(), BackendError> {
        self.store.end_reading(arrived)
    }

    fn load_weight(&mut self, source: WeightSource) -> Result<CudaWeight, BackendError> {
        self.store.load(&self.gpu, source)
    }

    fn tensor(&self, rows: usize, cols: usize) -> CudaTensor {
        self.new_tensor((rows, cols, false), |bytes| {
            Ok(Arc::new(self.pool.take(bytes)?))
        })
    }

    fn tensors<const N: usize>(&self, rows: usize, cols: [usize; N]) -> [CudaTensor; N] {
        if cols.iter().any(|cols| !cols.is_multiple_of(8)) {
            return cols.map(|cols| self.tensor(rows, cols));
        }
        let whole = self.tensor(rows, cols.iter().sum());
        let mut offset = 0;
        cols.map(|cols| {
            let part = CudaTensor {
                rows,
                cols,
                ld: whole.ld,
                wide: false,
                offset,
                buffer: whole.buffer.clone(),
                rounded: None,
            };
            offset += cols;
            part
        })
    }

    fn wide_tensor(&self, rows: usize, cols: usize) -> CudaTensor {
        self.new_tensor((rows, cols, true), |bytes| self.wide_buffer(bytes))
    }

    fn step(
        &mut self,
        batch: &StepBatch,
        wish: StepWish<'_>,
        pass: StepPass<'_, Self, CudaTensor>,
    ) -> Result<StepOutput, BackendError> {
        assert!(self.flights.is_empty(), "steps end in their order");
        self.begin_step(batch, wish, pass)?;
        self.finish_step()
    }

    fn begin_step(
        &mut self,
        batch: &StepBatch,
        wish: StepWish<'_>,
        pass: StepPass<'_, Self, CudaTensor>,
    ) -> Result<Option<StepOutput>, BackendError> {
        self.step_goes_on();
        let step = self.flights.next();
        if let Some(pages) = &mut self.pages {
            pages.note_writing(batch, step);
        }
        let begun = graphs::run(self, batch, wish, pass).and_then(|out| {
            // What failed meanwhile comes first.
            self.check()?;
            let begun = self.take_off(out, batch.logit_rows.len(), wish.rows);
            begun.map_err(|error| error.of("beginning a step"))
        });
        self.unless_lost(begun.map(|()| None))
    }

    fn finish_step(&mut self) -> Result<StepOutput, BackendError> {
        let landed = self.land_step();
        self.step_ended();
        self.unless_lost(landed.map_err(|error| error.of("reading results")))
    }

    fn warm_up(
        &mut self,
        sequences_max: usize,
        pass: StepPass<'_, Self, CudaTensor>,
    ) -> Result<(), BackendError> {
        self.step_goes_on();
        let warm = graphs::warm_up(self, sequences_max, pass);
        self.step_ended();
        self.unless_lost(warm)
    }

    fn embed(&self, table: &CudaWeight, tokens: &[TokenId], out: &mut CudaTensor) {
        assert_eq!(
            (out.rows, out.cols),
            (tokens.len(), table.cols),
            "shape of out"
        );
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= table.rows) {
            panic!("token {token} is outside the table of {}", table.rows);
        }
        self.attempt("embed", || {
            let tokens = self.staging.of_words(&self.pool, tokens)?;
            self.ops.borrow_mut().embed((table, 0), tokens.address, out)
        });
    }

    fn embed_part(
        &self,
        (table, held): (&CudaWeight, Range<usize>),
        tokens: &[TokenId],
        out: &mut CudaTensor,
    ) {
        assert_eq!(
            (out.rows, out.cols),
            (tokens.len(), table.cols),
            "shape of out"
        );
        assert_eq!(held.len(), table.rows, "rows of the table");
        self.attempt("embed", || {
            let first = TokenId::try_from(held.start).expect("the vocabulary is bounded");
            let tokens = self.staging.of_words(&self.pool, tokens)?;
            let mut ops = self.ops.borrow_mut();
            ops.embed((table, first), tokens.address, out)
        });
    }

    fn dedicate(&self, x: &mut CudaTensor, weights: &[&CudaWeight]) {
        if !rounds(x, weights) {
            x.rounded = None;
        } else if x.rounded.is_none() {
            self.attempt("rounded activations", || {
                x.rounded = Some(Arc::new(self.rounded(x)?));
                Ok(())
            });
        }
    }

    fn rms_norm(&self, x: &CudaTensor, weight: &CudaWeight, epsilon: f32, out: &mut CudaTensor) {
        self.attempt("rms_norm", || {
            let mut ops = self.ops.borrow_mut();
            match &out.rounded {
                Some(to) => ops.norm_rounding((x, None), weight, epsilon, to),
                None => ops.rms_norm(x, weight, epsilon, out),
            }
        });
    }

    fn add_rms_norm(
        &self,
        (x, y): (&mut CudaTensor, &CudaTensor),
        weight: &CudaWeight,
        epsilon: f32,
        out: &mut CudaTensor,
    ) {
        self.attempt("add_rms_norm", || {
            let mut ops = self.ops.borrow_mut();
            match &out.rounded {
                Some(to) => ops.norm_rounding((x, Some(y)), weight, epsilon, to),
                None => ops.add_rms_norm((x, y), weight, epsilon, out),
            }
        });
    }

    fn head_norm(&self, x: &mut CudaTensor, weight: &CudaWeight, epsilon: f32) {
        self.attempt("head_norm", || {
            self.ops.borrow_mut().head_norm(x, weight, epsilon)
        });
    }

    fn linear(
        &self,
        x: &CudaTensor,
        weight: &CudaWeight,
        bias: Option<&CudaWeight>,
        out: &mut CudaTensor,
    ) {
        assert_eq!((out.rows, out.cols), (x.rows, weight.rows), "shape of out");
        let bias_len = bias.map_or(weight.rows, |bias| bias.cols);
        assert_eq!(bias_len, weight.rows, "length of bias");
        out.rounded = None;
        self.attempt("linear", || {
            self.product(x, (weight, bias), (out, weight.rows))
        });
    }

    fn linears<const N: usize>(
        &self,
        x: &CudaTensor,
        weights: [(&CudaWeight, Option<&CudaWeight>); N],
        outs: [&mut CudaTensor; N],
    ) {
        if are_one(&weights, &outs) {
            let rows = weights.iter().map(|(weight, _)| weight.rows).sum();
            let cols: usize = outs.iter().map(|out| out.cols).sum();
            assert_eq!(rows, cols, "shapes of outs");
            self.attempt("linear", || self.product(x, weights[0], (outs[0], rows)));
            for out in outs {
                out.rounded = None;
            }
            return;
        }
        for ((weight, bias), out) in weights.into_iter().zip(outs) {
            self.linear(x, weight, bias, out);
        }
    }

    fn add(&self, x: &mut CudaTensor, y: &CudaTensor) {
        self.attempt("add", || self.ops.borrow_mut().elementwise("add", x, y));
    }

    fn silu_mul(&self, gate: &mut CudaTensor, up: &CudaTensor) {
        self.attempt("silu_mul", || {
            let mut ops = self.ops.borrow_mut();
            match &gate.rounded {
                Some(to) => ops.silu_mul_rounding(gate, up, to),
                None => ops.elementwise("silu_mul", gate, up),
            }
        });
    }

    fn rope(&self, x: &mut CudaTensor, positions: &[u32], table: &RopeTable) {
        assert_eq!(x.rows, positions.len(), "a position a row");
        self.attempt("rope", || {
            let positions = self.staging.of_words(&self.pool, positions)?;
            let rotation = self.rotation(table)?;
            self.ops.borrow_mut().rope(x, positions.address, &rotation)
        });
    }

    fn write_kv(&mut self, layer: usize, batch: &StepBatch, k: &CudaTensor, v: &CudaTensor) {
        assert_eq!(k.rows, batch.tokens.len(), "rows of k");
        self.pages().check_writable(batch);
        self.attempt("write_kv", || {
            let step = self.on_device(batch)?;
            let mut ops = self.ops.borrow_mut();
            ops.write_kv((self.pages(), layer), &step.addresses, (k, v))
        });
    }

    fn rope_write_kv(
        &mut self,
        layer: usize,
        batch: &StepBatch,
        table: &RopeTable,
        (q, k, v): (&mut CudaTensor, &mut CudaTensor, &CudaTensor),
    ) {
        assert_eq!(k.rows, batch.tokens.len(), "rows of k");
        self.pages().check_writable(batch);
        self.attempt("rope_write_kv", || {
            let step = self.on_device(batch)?;
            let rotation = self.rotation(table)?;
            let mut ops = self.ops.borrow_mut();
            let place = (self.pages(), layer);
            ops.rope_write_kv(place, &step.addresses, (q, k, v), &rotation)
        });
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        batch: &StepBatch,
        q: &CudaTensor,
        out: &mut CudaTensor,
    ) {
        assert_eq!(q.rows, batch.tokens.len(), "rows of q");
        self.attempt("attention", || {
            let step = self.on_device(batch)?;
            let call = AttentionCall {
                q,
                out,
                pages: self.pages(),
                step: &step.addresses,
                layer: spec.layer,
                heads: spec.heads,
                scale: spec.scale,
                window: spec.window,
            };
            self.attend(&call, &step)
        });
    }

    fn select_rows(&self, x: &CudaTensor, rows: &[usize], out: &mut CudaTensor) {
        assert_eq!((out.rows, out.cols), (rows.len(), x.cols), "shape of out");
        assert!(rows.iter().all(|&row| row < x.rows), "rows of x");
        self.attempt("select_rows", || {
            let rows = self.staging.of_rows(&self.pool, rows)?;
            self.ops.borrow_mut().select_rows(x, rows.address, out)
        });
    }

    fn to_host(&self, x: &CudaTensor) -> Vec<f32> {
        let mut values = vec![0.0; x.rows * x.cols];
        self.attempt("to_host", || {
            self.land(x, 0..x.rows, |landed| values.copy_from_slice(landed))
        });
        values
    }

    fn on_host(&self, x: &mut CudaTensor, edit: &mut dyn FnMut(&mut [f32])) {
        let mut values = self.to_host(x);
        // Other ranks wait for this one's part whether something failed here or not.
        edit(&mut values);
        self.attempt("on_host", || {
            let bytes = bytemuck::cast_slice(&values);
            let buffer = self.pool.take(bytes.len())?;
            self.gpu.upload(buffer.memory(), 0, bytes)?;
            self.ops.borrow_mut().narrow(buffer.address(), x)
        });
    }

    fn allocate_pages(&mut self, shape: PageShape, block_count: usize) -> Result<(), BackendError> {
        self.pages = None;
        self.graphs = Graphs::default();
        let what = format!("a pool of {block_count} kv pages");
        let pages = Pages::new(&self.gpu, shape, block_count).map_err(|error| error.of(what))?;
        self.pages = Some(pages);
        Ok(())
    }

    fn scale_pages(&mut self, scales: &[KvScale]) {
        self.graphs = Graphs::default();
        self.pages_mut().set_scales(scales);
    }

    fn share_page(&self, block: BlockId) -> Arc<Page> {
        let mut shared = None;
        self.attempt("share_page", || {
            let landed = (!self.flights.is_empty()).then(|| self.flights.landed());
            shared = Some(self.pages().share(block, landed)?);
            Ok(())
        });
        shared.unwrap_or_else(|| Arc::new(Page::zeroed(*self.pages().shape())))
    }

    fn page_is_unshared(&self, block: BlockId) -> bool {
        self.pages().is_unshared(block)
    }

    fn lend_page(&mut self, block: BlockId) -> Page {
        match self.pages_mut().lend(block) {
            Ok(page) => page,
            Err(error) => {
                // What can't be ordered behind the stream must not be written; the step says what failed.
                self.attempt("lend_page", || Err(error));
                Page::zeroed(*self.pages().shape())
            }
        }
    }

    fn return_page(&mut self, block: BlockId, page: Page) {
        if self.failure.borrow().is_none() {
            self.pages_mut().give_back(block, page);
        }
    }
}

#[cfg(test)]
mod tests;

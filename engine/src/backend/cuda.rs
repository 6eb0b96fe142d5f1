//! NVIDIA GPUs: bf16 activations and weights, sums in f32, KV in the type that the pool asks for.
//!
//! Kernels are our own (`engine/kernels`), compiled for the card that is found; large products are cuBLASLt's. All work of a
//! step is put on one stream and nothing waits until its result is read: metadata goes up in one copy before the first kernel, and
//! activations never visit the host, unless ranks sum them there. Decode steps of one shape are recorded once and replayed.
//! An operation that fails is remembered, those after it do nothing, and the step says so. Must match `backend/cpu` within
//! the tolerances of the conformance suite; rows are not bit-equal across batches, because the library's algorithm depends on the shape.
//!
//! Absent: several devices in one process, peers that reach into device memory, weights in 8 bits.

mod compiler;
mod driver;
mod error;
mod graphs;
mod kernels;
mod linear;
mod memory;
mod ops;
mod pages;
mod step;
mod tensor;
mod upload;
mod weight;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

pub use error::CudaError;
pub use tensor::CudaTensor;
pub use weight::CudaWeight;

use self::driver::{Gpu, PinnedMemory};
use self::graphs::Graphs;
use self::linear::{Linear, Product, ProductShape};
use self::memory::{Buffer, Pool};
use self::ops::{AttentionCall, Ops, Parts, Rotation};
use self::pages::Pages;
use self::upload::{OnDevice, Staging};
use self::weight::WeightStore;
use super::{
    ActivationDtype, AttentionSpec, Backend, BackendCapability, BackendError, BlockId,
    PatternSource, PrefillRows, RopePairing, RopeTable, RowWish, StepBatch, StepOutput, StepWish,
    TokenId, WeightSource,
};
use crate::page::{Page, PageShape};

/// Up to so many tokens our own product is used: it reads the weights as fast as the memory gives them.
const FEW_TOKENS_MAX: usize = 2;
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
/// Blocks of a decode kernel per multiprocessor that are enough to hide the memory's latency.
const DECODE_BLOCKS_PER_PROCESSOR: usize = 3;

/// One GPU as a device.
#[derive(Debug)]
pub struct CudaBackend {
    /// What failed first.
    failure: RefCell<Option<BackendError>>,
    graphs: Graphs,
    ops: RefCell<Ops>,
    linear: RefCell<Linear>,
    store: WeightStore,
    pages: Option<Pages>,
    /// Inverse frequencies of the last table.
    frequencies: RefCell<Option<(RopeTable, Arc<Buffer>)>>,
    staging: Staging,
    /// Tokens of a step's rows.
    tokens: Buffer,
    /// What wide tensors lie in: there is one at a time, a step's result.
    wide: RefCell<Option<Arc<Buffer>>>,
    /// Where results land.
    landing: RefCell<Option<PinnedMemory>>,
    pool: Arc<Pool>,
    gpu: Arc<Gpu>,
}

impl CudaBackend {
    /// Opens the first device that this process may see, and the libraries.
    ///
    /// # Errors
    /// When there is none, it is too old, or a library is missing; each says what to do.
    pub fn open() -> Result<Self, CudaError> {
        let gpu = Gpu::open()?;
        let pool = Pool::new(&gpu);
        Ok(Self {
            failure: RefCell::default(),
            graphs: Graphs::default(),
            ops: RefCell::new(Ops::new(&gpu)?),
            linear: RefCell::new(Linear::open(&gpu)?),
            store: WeightStore::default(),
            pages: None,
            frequencies: RefCell::default(),
            staging: Staging::new(&gpu)?,
            tokens: pool.take(ROWS_MAX * 4)?,
            wide: RefCell::default(),
            landing: RefCell::default(),
            pool,
            gpu,
        })
    }

    /// Does something unless something has failed before, and remembers if it fails.
    fn attempt(&self, what: &'static str, act: impl FnOnce() -> Result<(), CudaError>) {
        if self.failure.borrow().is_some() {
            return;
        }
        if let Err(error) = act() {
            self.failure.replace(Some(error.of(what)));
        }
    }

    /// A dense tensor in what `take` gives.
    fn new_tensor(
        &self,
        (rows, cols, wide): (usize, usize, bool),
        take: impl FnOnce(usize) -> Result<Arc<Buffer>, CudaError>,
    ) -> CudaTensor {
        let mut tensor = CudaTensor {
            rows,
            cols,
            ld: cols,
            wide,
            offset: 0,
            buffer: None,
        };
        self.attempt("activations", || {
            tensor.buffer = Some(take(rows * cols * tensor.element_bytes())?);
            Ok(())
        });
        tensor
    }

    /// The buffer of wide tensors, made larger where it is too small. Recordings keep the one that they were made with.
    fn wide_buffer(&self, bytes: usize) -> Result<Arc<Buffer>, CudaError> {
        let mut wide = self.wide.borrow_mut();
        let fitting = wide.as_ref().filter(|held| held.memory().bytes() >= bytes);
        let buffer = match fitting {
            Some(held) => Arc::clone(held),
            None => Arc::new(self.pool.take(bytes.next_power_of_two())?),
        };
        *wide = Some(Arc::clone(&buffer));
        Ok(buffer)
    }

    const fn pages(&self) -> &Pages {
        self.pages
            .as_ref()
            .expect("pages are allocated before the first step")
    }

    const fn pages_mut(&mut self) -> &mut Pages {
        self.pages
            .as_mut()
            .expect("pages are allocated before the first step")
    }

    /// A step's lists on the device: those of the step that is under way, or uploaded for this call.
    fn on_device(&self, batch: &StepBatch) -> Result<OnDevice, CudaError> {
        let per_block = self.pages().shape().tokens_per_block;
        self.staging.of_batch(&self.pool, batch, per_block)
    }

    fn rotation(&self, table: &RopeTable) -> Result<Rotation, CudaError> {
        let mut last = self.frequencies.borrow_mut();
        let same = last.as_ref().filter(|(held, _)| held == table);
        let buffer = match same {
            Some((_, buffer)) => Arc::clone(buffer),
            None => {
                let bytes = bytemuck::cast_slice(&table.inverse_frequencies);
                let buffer = Arc::new(self.pool.take(bytes.len())?);
                self.gpu.upload(buffer.memory(), 0, bytes)?;
                *last = Some((table.clone(), Arc::clone(&buffer)));
                buffer
            }
        };
        Ok(Rotation {
            inverse: buffer.address(),
            half: table.inverse_frequencies.len(),
            magnitude: table.magnitude,
            adjacent: table.pairing == RopePairing::Adjacent,
        })
    }

    /// `out = x · weightᵀ + bias`, where `rows` features of `out` follow each other from `out`'s first column on.
    fn product(
        &self,
        x: &CudaTensor,
        (weight, bias): (&CudaWeight, Option<&CudaWeight>),
        (out, rows): (&CudaTensor, usize),
    ) -> Result<(), CudaError> {
        assert_eq!(x.cols, weight.cols, "columns of x and weight");
        assert_eq!(x.rows, out.rows, "rows of x and out");
        assert!(!x.wide, "x has the activations' type");
        if x.rows == 0 || rows == 0 {
            return Ok(());
        }
        let product = Product {
            x: x.address(),
            weight: weight.address(),
            bias: bias.map(CudaWeight::address),
            out: out.address(),
            shape: ProductShape {
                tokens: x.rows,
                cols: x.cols,
                rows,
                ld_x: x.ld,
                ld_out: out.ld,
                wide: out.wide,
            },
        };
        let few = x.rows <= FEW_TOKENS_MAX;
        if !few && self.linear.borrow_mut().run(&product)? {
            return Ok(());
        }
        self.ops.borrow_mut().linear(&product)
    }

    /// What is wanted of a step's wide result, of whose rows the tokens have been chosen.
    fn results(
        &self,
        out: &CudaTensor,
        rows: usize,
        wishes: &[RowWish],
    ) -> Result<StepOutput, CudaError> {
        let mut output = StepOutput::default();
        let mut tokens = Vec::new();
        if wishes.iter().any(|wish| *wish != RowWish::Logits) {
            tokens.resize(rows, 0_u32);
            let bytes = bytemuck::cast_slice_mut(&mut tokens);
            self.gpu.download(self.tokens.memory(), 0, bytes)?;
            let chosen = tokens.iter().zip(wishes).map(|(&token, wish)| {
                (*wish != RowWish::Logits && token != NOT_FINITE).then_some(token)
            });
            output.chosen = chosen.collect();
        }
        let missing = |row: usize| output.chosen.get(row).is_none_or(Option::is_none);
        let mut row = 0;
        while row < rows {
            let count = (row..rows).take_while(|&row| missing(row)).count();
            if count > 0 {
                self.land(out, row..row + count, |landed| {
                    output.values.extend_from_slice(landed);
                })?;
            }
            row += count.max(1);
        }
        Ok(output)
    }

    /// Chooses a token for each row of a step's result, as its wishes were uploaded.
    fn choose(&self, out: &CudaTensor) {
        self.attempt("choosing tokens", || {
            let bytes = self.tokens.memory().bytes();
            assert!(out.rows * 4 <= bytes, "rows of a step");
            let draws = self.staging.draws();
            let mut ops = self.ops.borrow_mut();
            ops.choose(out, draws, self.tokens.address())
        });
    }

    /// Some rows of a tensor, as f32, in pinned memory; calls `read` with them.
    fn land(
        &self,
        x: &CudaTensor,
        rows: Range<usize>,
        read: impl FnOnce(&[f32]),
    ) -> Result<(), CudaError> {
        let count = rows.len() * x.cols;
        if count == 0 {
            read(&[]);
            return Ok(());
        }
        let buffer = match &x.buffer {
            Some(buffer) if x.wide => Arc::clone(buffer),
            _ => {
                let converted = self.pool.take(x.rows * x.cols * 4)?;
                self.ops.borrow_mut().widen(x, converted.address())?;
                Arc::new(converted)
            }
        };
        let mut landing = self.landing.borrow_mut();
        if landing
            .as_mut()
            .is_none_or(|held| held.as_slice().len() < count * 4)
        {
            *landing = Some(PinnedMemory::new(
                &self.gpu,
                (count * 4).next_power_of_two(),
            )?);
        }
        let landing = landing.as_mut().expect("it was just made");
        let bytes = &mut landing.as_mut_slice()[..count * 4];
        self.gpu
            .download(buffer.memory(), rows.start * x.cols * 4, bytes)?;
        read(bytemuck::cast_slice(bytes));
        Ok(())
    }

    /// Attention of the step's sequences by the kernels that take them.
    fn attend(&self, call: &AttentionCall<'_>, on_device: &OnDevice) -> Result<(), CudaError> {
        let (layout, mut ops) = (&on_device.layout, self.ops.borrow_mut());
        if !call.is_fast() {
            return ops.attention_any(call, layout.sequence_count, layout.rows_max);
        }
        ops.attention_prefill(call, layout.tile_count)?;
        let sequences = layout.decode_count;
        if sequences == 0 {
            return Ok(());
        }
        let shape = self.pages().shape();
        let wanted = self.gpu.processors * DECODE_BLOCKS_PER_PROCESSOR;
        let splits = wanted
            .div_ceil(sequences * shape.kv_heads)
            .clamp(1, SPLITS_MAX);
        let parts_count = if splits == 1 {
            0
        } else {
            sequences * call.heads * splits
        };
        let sums = self.pool.take(parts_count * shape.head_dim * 4)?;
        let stats = self.pool.take(parts_count * 2 * 4)?;
        let parts = Parts {
            sums: sums.address(),
            stats: stats.address(),
            sequences: call.step.decodes,
        };
        ops.attention_decode(call, parts, (sequences, splits))
    }
}

/// Whether weights with their biases, each the next one's neighbour, are one weight.
fn are_one<const N: usize>(
    weights: &[(&CudaWeight, Option<&CudaWeight>); N],
    outs: &[&mut CudaTensor; N],
) -> bool {
    let biased = weights[0].1.is_some();
    let weights_adjoin = weights.windows(2).all(|pair| {
        let [(weight, bias), (next, next_bias)] = [pair[0], pair[1]];
        let biases_adjoin = match (bias, next_bias) {
            (None, None) => true,
            (Some(bias), Some(next)) => bias.is_before(next),
            _ => false,
        };
        weight.cols == next.cols && weight.is_before(next) && biases_adjoin
    });
    weights_adjoin
        && weights.iter().all(|(_, bias)| bias.is_some() == biased)
        && outs.windows(2).all(|pair| pair[0].is_left_of(pair[1]))
}

impl Backend for CudaBackend {
    type Weight = CudaWeight;
    type Tensor = CudaTensor;

    fn capability(&self) -> BackendCapability {
        BackendCapability {
            description: format!("cuda ({}, bfloat16)", self.gpu.name),
            host_pages: false,
            batch_invariant: false,
            activations: ActivationDtype::Bf16,
            prefill_rows: PREFILL_ROWS,
        }
    }

    fn check(&self) -> Result<(), BackendError> {
        self.failure.take().map_or(Ok(()), Err)
    }

    fn free_bytes(&self) -> Option<u64> {
        self.gpu.memory().ok().map(|(free, _)| free as u64)
    }

    fn expect_weights(&mut self, elements: usize) -> Result<(), BackendError> {
        let made = self.store.expect(&self.gpu, elements);
        made.map_err(|error| error.of("the model's weights"))
    }

    fn load_pattern(&mut self, source: &PatternSource) -> Result<Option<CudaWeight>, BackendError> {
        let values: Vec<half::bf16> = source
            .values
            .iter()
            .map(|&value| half::bf16::from_f32(value))
            .collect();
        let mut made = || {
            let weight = self.store.place(&self.gpu, source.rows, source.cols)?;
            let bytes = bytemuck::cast_slice(&values);
            let pattern = self.pool.take(bytes.len())?;
            self.gpu.upload(pattern.memory(), 0, bytes)?;
            let place = (source.first, source.stride);
            let pattern = (pattern.address(), values.len());
            self.ops.get_mut().pattern(pattern, &weight, place)?;
            Ok(Some(weight))
        };
        made().map_err(|error: CudaError| error.of(format!("weight `{}`", source.name)))
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
        pass: &mut dyn FnMut(&mut Self, &StepBatch) -> Result<Option<CudaTensor>, BackendError>,
    ) -> Result<StepOutput, BackendError> {
        let out = graphs::run(self, batch, wish, pass)?;
        let mut output = StepOutput::default();
        if let Some(out) = &out {
            self.attempt("reading results", || {
                output = self.results(out, batch.logit_rows.len(), wish.rows)?;
                self.staging.passed();
                Ok(())
            });
        }
        self.check()?;
        Ok(output)
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
            self.ops.borrow_mut().embed(table, tokens.address, out)
        });
    }

    fn rms_norm(&self, x: &CudaTensor, weight: &CudaWeight, epsilon: f32, out: &mut CudaTensor) {
        self.attempt("rms_norm", || {
            self.ops.borrow_mut().rms_norm(x, weight, epsilon, out)
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
            ops.add_rms_norm((x, y), weight, epsilon, out)
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
            return;
        }
        for ((weight, bias), out) in weights.into_iter().zip(outs) {
            self.linear(x, weight, bias, out);
        }
    }

    fn add(&self, x: &mut CudaTensor, y: &CudaTensor) {
        self.attempt("add", || {
            self.ops.borrow_mut().elementwise("add_bf16", x, y)
        });
    }

    fn silu_mul(&self, gate: &mut CudaTensor, up: &CudaTensor) {
        self.attempt("silu_mul", || {
            self.ops.borrow_mut().elementwise("silu_mul_bf16", gate, up)
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

    fn share_page(&self, block: BlockId) -> Arc<Page> {
        let mut shared = None;
        self.attempt("share_page", || {
            shared = Some(self.pages().share(block)?);
            Ok(())
        });
        shared.unwrap_or_else(|| Arc::new(Page::zeroed(*self.pages().shape())))
    }

    fn page_is_unshared(&self, block: BlockId) -> bool {
        self.pages().is_unshared(block)
    }

    fn lend_page(&mut self, block: BlockId) -> Page {
        self.pages_mut().lend(block)
    }

    fn return_page(&mut self, block: BlockId, page: Page) {
        let given = self.pages_mut().give_back(block, &page);
        self.attempt("return_page", || given);
    }
}

#[cfg(test)]
mod tests;

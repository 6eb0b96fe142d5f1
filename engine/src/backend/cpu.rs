//! The specification backend: plain `f32` arithmetic on exactly decoded weights, on all cores, as fast as that goes.
//!
//! Activations are never quantised. Every sum has a fixed order (see `cpu/linear.rs` and `cpu/attention.rs`), so results do
//! not depend on batch, chunking or thread count, and AVX-512, AVX2 and NEON agree to the last bit. Processors
//! without a fused multiply-add differ in last bits. Other backends must match this one within their tolerances.
//!
//! What is deliberately absent: 8-bit activations, repacked copies of weights (they are read where the file is
//! mapped), and any knowledge of models.

mod attention;
mod linear;
mod math;
mod pages;
mod quant;
mod rows;
mod simd;
mod team;
mod tensor;
mod weight;

use std::num::NonZero;
use std::sync::Arc;

pub use tensor::CpuTensor;
pub use weight::CpuWeight;

use self::linear::Operands;
use self::pages::Pages;
use self::quant::PART;
use self::rows::RopeCache;
use self::simd::Isa;
use self::team::Team;
use self::tensor::Buffers;
use super::{
    ActivationDtype, AttentionSpec, Backend, BackendCapability, BackendError, BlockId, PrefillRows,
    RopeTable, StepBatch, TokenId, WeightSource,
};
use crate::page::{KvScale, Page, PageShape};

/// The instructions that the CPU backend computes with on this processor, for people.
#[must_use]
pub fn instructions() -> &'static str {
    Isa::detected()[0].name()
}

/// The processor as a device.
#[derive(Debug)]
pub struct CpuBackend {
    isa: Isa,
    team: Team,
    buffers: Arc<Buffers>,
    rope_cache: RopeCache,
    pages: Option<Pages>,
}

impl CpuBackend {
    /// A backend that computes on `threads` threads, the caller's among them; `None` takes all that the process may
    /// use.
    #[must_use]
    pub fn new(threads: Option<usize>) -> Self {
        let available = || std::thread::available_parallelism().map_or(1, NonZero::get);
        let isa = Isa::detected()[0];
        Self::with_isa(threads.unwrap_or_else(available).max(1), isa)
    }

    fn with_isa(threads: usize, isa: Isa) -> Self {
        Self {
            isa,
            team: Team::new(threads),
            buffers: Arc::default(),
            rope_cache: RopeCache::default(),
            pages: None,
        }
    }

    const fn means(&self) -> (Isa, &Team) {
        (self.isa, &self.team)
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
}

impl Backend for CpuBackend {
    type Weight = CpuWeight;
    type Tensor = CpuTensor;

    fn capability(&self) -> BackendCapability {
        let threads = self.team.threads();
        let noun = if threads == 1 { "thread" } else { "threads" };
        BackendCapability {
            description: format!("cpu ({}, {threads} {noun})", self.isa.name()),
            host_pages: true,
            batch_invariant: true,
            runs_by_itself: false,
            activations: ActivationDtype::F32,
            prefill_rows: PrefillRows::default(),
        }
    }

    fn load_weight(&mut self, source: WeightSource) -> Result<CpuWeight, BackendError> {
        CpuWeight::new(source, self.isa)
    }

    fn tensor(&self, rows: usize, cols: usize) -> CpuTensor {
        self.buffers.tensor(rows, cols)
    }

    fn embed(&self, table: &CpuWeight, tokens: &[TokenId], out: &mut CpuTensor) {
        assert_eq!(
            (out.rows(), out.cols()),
            (tokens.len(), table.cols),
            "shape of out"
        );
        if table.cols == 0 {
            return;
        }
        let mut padded = vec![0.0; table.cols.next_multiple_of(PART)];
        for (token, out) in tokens
            .iter()
            .zip(out.values_mut().chunks_exact_mut(table.cols))
        {
            let row = *token as usize;
            assert!(
                row < table.rows,
                "token {token} is outside the table of {}",
                table.rows
            );
            table.decode_row(self.isa, row, &mut padded);
            out.copy_from_slice(&padded[..out.len()]);
        }
    }

    fn rms_norm(&self, x: &CpuTensor, weight: &CpuWeight, epsilon: f32, out: &mut CpuTensor) {
        let weight = weight.vector();
        assert_eq!(x.cols(), weight.len(), "columns of x and weight");
        assert_eq!(
            (out.rows(), out.cols()),
            (x.rows(), x.cols()),
            "shape of out"
        );
        rows::rms_norm(self.means(), x.values(), weight, epsilon, out.values_mut());
    }

    fn head_norm(&self, x: &mut CpuTensor, weight: &CpuWeight, epsilon: f32) {
        let weight = weight.vector();
        assert_eq!(x.cols() % weight.len(), 0, "columns of x in heads");
        rows::rms_norm_in_place(self.means(), x.values_mut(), weight, epsilon);
    }

    fn linear(
        &self,
        x: &CpuTensor,
        weight: &CpuWeight,
        bias: Option<&CpuWeight>,
        out: &mut CpuTensor,
    ) {
        let operands = Operands { x, weight, bias };
        linear::linear(self.isa, &self.team, &self.buffers, operands, out);
    }

    fn add(&self, x: &mut CpuTensor, y: &CpuTensor) {
        assert_eq!(
            (x.rows(), x.cols()),
            (y.rows(), y.cols()),
            "shapes of x and y"
        );
        let cols = x.cols();
        rows::add(self.means(), x.values_mut(), y.values(), cols);
    }

    fn silu_mul(&self, gate: &mut CpuTensor, up: &CpuTensor) {
        assert_eq!(
            (gate.rows(), gate.cols()),
            (up.rows(), up.cols()),
            "shapes of gate and up"
        );
        let cols = gate.cols();
        rows::silu_mul(self.means(), gate.values_mut(), up.values(), cols);
    }

    fn rope(&self, x: &mut CpuTensor, positions: &[u32], table: &RopeTable) {
        let cols = x.cols();
        assert_eq!(x.rows(), positions.len(), "a position a row");
        assert_eq!(
            cols % (2 * table.inverse_frequencies.len()),
            0,
            "columns of x in heads"
        );
        let x = (x.values_mut(), cols);
        rows::rope(self.means(), &self.rope_cache, x, positions, table);
    }

    fn write_kv(&mut self, layer: usize, batch: &StepBatch, k: &CpuTensor, v: &CpuTensor) {
        self.pages_mut().write(layer, batch, k, v);
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        batch: &StepBatch,
        q: &CpuTensor,
        out: &mut CpuTensor,
    ) {
        let means = (self.isa, &self.team, self.pages());
        attention::attention(means, spec, batch, q, out);
    }

    fn select_rows(&self, x: &CpuTensor, rows: &[usize], out: &mut CpuTensor) {
        let cols = x.cols();
        assert_eq!((out.rows(), out.cols()), (rows.len(), cols), "shape of out");
        for (index, row) in rows.iter().enumerate() {
            let from = &x.values()[row * cols..(row + 1) * cols];
            out.values_mut()[index * cols..(index + 1) * cols].copy_from_slice(from);
        }
    }

    fn to_host(&self, x: &CpuTensor) -> Vec<f32> {
        x.values().to_vec()
    }

    fn on_host(&self, x: &mut CpuTensor, edit: &mut dyn FnMut(&mut [f32])) {
        edit(x.values_mut());
    }

    fn allocate_pages(&mut self, shape: PageShape, block_count: usize) -> Result<(), BackendError> {
        self.pages = Some(Pages::new(shape, block_count)?);
        Ok(())
    }

    fn scale_pages(&mut self, scales: &[KvScale]) {
        self.pages_mut().set_scales(scales);
    }

    fn share_page(&self, block: BlockId) -> Arc<Page> {
        self.pages().share(block)
    }

    fn page_is_unshared(&self, block: BlockId) -> bool {
        self.pages().is_unshared(block)
    }

    fn lend_page(&mut self, block: BlockId) -> Page {
        self.pages_mut().lend(block)
    }

    fn return_page(&mut self, block: BlockId, page: Page) {
        self.pages_mut().give_back(block, page);
    }
}

#[cfg(test)]
mod tests;

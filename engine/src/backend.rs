//! The dozen operations a device must offer, with named shapes. `backend/cpu` is their specification.
//!
//! Dimension letters, used everywhere, in kernels too: `T` tokens in the batch, `S` sequences, `H` query
//! heads, `K` KV heads, `D` head size, `E` model width, `F` feed-forward width, `V` vocabulary, `N` blocks,
//! `P` tokens per block, `L` layers. All activations are row-major, one row a token.
//!
//! Invariant: every output row depends only on its own input row (and its own sequence's KV). On a backend that says so
//! ([`BackendCapability::batch_invariant`]) it is computed in an order that the number of rows, their order and the chunking
//! of the prompt do not change, so greedy output is bit-equal alone, batched, chunked, and from run to run.

#[cfg(test)]
pub(crate) mod conformance;
pub mod cpu;
pub mod cuda;
pub(crate) mod e4m3;
mod stored;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::collective::{Collective, CollectiveError, tell_all};
use crate::page::{Page, PageShape};
pub use stored::{ActivationDtype, WeightBytes, WeightDtype, WeightSource};

/// A token of the vocabulary.
pub type TokenId = u32;

/// Index of a block in the pool, `0..N`.
pub type BlockId = u32;

/// One sequence's part of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceSpan {
    /// Rows of the batch that belong to this sequence, consecutive positions.
    pub rows: Range<usize>,
    /// Tokens whose KV is already in the pool: the position of the first row.
    pub past_len: usize,
    /// The sequence's blocks in order; enough for `past_len + rows.len()` tokens.
    pub blocks: Vec<BlockId>,
}

/// Everything one forward pass needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepBatch {
    /// Token ids `[T]`.
    pub tokens: Vec<TokenId>,
    /// Positions `[T]`, 0-based within each sequence.
    pub positions: Vec<u32>,
    /// The sequences; their `rows` partition `0..T` in order.
    pub sequences: Vec<SequenceSpan>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<usize>,
}

/// Rotary embedding tables, computed once a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    /// Inverse frequencies `[D / 2]`, scaling already applied.
    pub inverse_frequencies: Vec<f32>,
    /// Which elements form a pair.
    pub pairing: RopePairing,
    /// Multiplies sine and cosine (YaRN); 1 otherwise.
    pub magnitude: f32,
}

/// Which elements of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// `(i, i + D/2)`: Hugging Face's layout; GGUF's qwen family.
    Halves,
    /// `(2i, 2i + 1)`: GGUF's llama family, whose q and k rows are permuted in the file.
    Adjacent,
}

/// What attention needs besides the batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Layer index within this rank's pages.
    pub layer: usize,
    /// Query heads (`H`); a multiple of the page's KV heads.
    pub heads: usize,
    /// Multiplies the scores; usually `1/sqrt(D)`.
    pub scale: f32,
    /// Sliding window in tokens: position `i` sees `(i - window, i]`.
    pub window: Option<usize>,
}

/// What a backend can do; callers select on it, never on a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendCapability {
    /// For people: `cpu (avx512, 2 threads)`.
    pub description: String,
    /// Whether pages live in host memory, so that any host transport can move them without a copy.
    pub host_pages: bool,
    /// Whether a row's bits do not depend on the rows that are computed with it.
    pub batch_invariant: bool,
    /// Whether a step that was begun goes on by itself, so that something is gained by beginning the next one meanwhile.
    pub runs_by_itself: bool,
    /// Type of the activations, and of weights where they are converted.
    pub activations: ActivationDtype,
    /// Prompt rows that a step should have.
    pub prefill_rows: PrefillRows,
}

/// How many prompt rows a step should have: more cost others time, fewer cost the prompt time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefillRows {
    /// When nothing is decoded.
    pub alone: usize,
    /// When others wait for their next token.
    pub beside_decode: usize,
}

impl Default for PrefillRows {
    /// For a processor.
    fn default() -> Self {
        Self {
            alone: 2048,
            beside_decode: 512,
        }
    }
}

/// How a step may be run, and what is wanted of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepWish<'a> {
    /// Whether passes over batches of the same shape make the same calls, so that one may be recorded and replayed.
    pub repeatable: bool,
    /// What is wanted of each of the `logit_rows`; empty when it is the logits of all.
    pub rows: &'a [RowWish],
    /// Rows whose token is not known yet, because the step that was begun before chooses it.
    pub carried: &'a [Carried],
}

/// A row that computes a token which the step begun before chooses. Where that chose none, because its logits are not finite,
/// it is any token of the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carried {
    /// Row of this batch.
    pub row: usize,
    /// Which of the `logit_rows` of the step before, counted from 0.
    pub from: usize,
}

/// What is wanted of a row. A device that cannot choose gives logits in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum RowWish {
    /// Its logits.
    #[default]
    Logits,
    /// The lowest of its best tokens.
    Best,
    /// A token that is drawn.
    Draw(Draw),
}

/// How to draw a token: with probability `exp(logit / temperature)` among those that top-k leaves, of these those that top-p
/// leaves, of these those that min-p leaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Above 0.
    pub temperature: f32,
    /// So many of the best; 0 for all.
    pub top_k: u32,
    /// As few of the best as have this share of the weight.
    pub top_p: f32,
    /// Those with this share of the best one's weight.
    pub min_p: f32,
    /// In `[0, 1)`: which one.
    pub uniform: f64,
}

/// What a step gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// Values of the rows that have no token in [`StepOutput::chosen`], in order. Of a row for which a token was wished and that
    /// was not finite they may be any that are not finite.
    pub values: Vec<f32>,
    /// For each of the `logit_rows` its token, where the device chose one; empty for none.
    pub chosen: Vec<Option<TokenId>>,
}

/// A weight that repeats a few values: `load_format: dummy`.
#[derive(Debug, Clone)]
pub struct PatternSource {
    /// Name in a file that would hold it.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Type of the values.
    pub dtype: WeightDtype,
    /// The values that are repeated; element `(r, c)` is number `first + r * stride + c` of their repetition.
    pub values: Arc<[f32]>,
    /// Of the first element.
    pub first: usize,
    /// From a row to the next.
    pub stride: usize,
    /// That of 8-bit elements, whose values it is meant for; 1 for other types.
    pub scale: f32,
}

/// Why a backend refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// A weight's bytes do not fit its shape.
    #[error("weight `{name}`: {reason}")]
    Weight {
        /// Name in the file.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// Memory for the KV pool or for activations is not there.
    #[error("out of memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// What was to be allocated.
        what: String,
        /// Its size.
        bytes: usize,
    },
    /// The device failed.
    #[error("{what}: {reason}")]
    Device {
        /// What was being done.
        what: String,
        /// What the device or its library says.
        reason: String,
    },
    /// Another rank of the instance is lost, or silent.
    #[error(transparent)]
    Peer(#[from] CollectiveError),
    /// Another rank of the instance refused.
    #[error("{rank}: {reason}")]
    Rank {
        /// `rank 3 (node2)`.
        rank: String,
        /// What it says.
        reason: String,
    },
}

/// The ranks that compute one model together; each is `stage * tensor + its number within the stage`.
#[derive(Debug)]
pub struct RankGroup<'a> {
    /// The way to the others.
    pub collective: &'a mut dyn Collective,
    /// Ranks of a stage.
    pub tensor: usize,
}

/// The operations of one step; what it gives is its logits, unless nobody wants any.
pub(crate) type StepPass<'a, B, T> =
    &'a mut dyn FnMut(&mut B, &StepBatch) -> Result<Option<T>, BackendError>;

/// A device's operations. `out` always comes last and has its final shape when the call is made.
pub trait Backend: Debug + Send + 'static {
    /// A weight in the form the backend keeps it.
    type Weight: Debug + Send + Sync;
    /// Activations `[rows, cols]`, row-major.
    type Tensor: Debug + Send;

    /// What this backend can do.
    fn capability(&self) -> BackendCapability;

    /// What failed since the last time that this was asked. Operations themselves say nothing: once one has failed, those
    /// after it do nothing, and what they give is unspecified.
    ///
    /// # Errors
    /// The first failure.
    fn check(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Bytes of the device's own memory that are free; `None` where it computes in the host's.
    fn free_bytes(&self) -> Option<u64> {
        None
    }

    /// Number of the device whose memory the pages lie in, among those that this process sees; `None` where they are in the
    /// host's.
    fn page_device(&self) -> Option<usize> {
        None
    }

    /// Says which type the model's activations had best have, before the first of its weights is loaded. A device that computes in
    /// another stays with that, as its capability says.
    ///
    /// # Errors
    /// When the device cannot be made ready for it.
    fn compute_in(&mut self, activations: ActivationDtype) -> Result<(), BackendError> {
        let _ = activations;
        Ok(())
    }

    /// Says that this device will be one of several that compute one model, before it is loaded.
    ///
    /// # Errors
    /// When what it takes is missing.
    fn expect_ranks(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Joins the devices of all ranks, which call it at the same time, so that sums and rows go from one to the other by
    /// themselves. False where they do not: then it is for the hosts to do, and [`Backend::sum_over_ranks`] and its kin are not called.
    ///
    /// # Errors
    /// When a rank is lost, or has a device that cannot be joined.
    fn join_ranks(&mut self, group: RankGroup<'_>) -> Result<bool, BackendError> {
        // The others may ask for its device.
        tell_all(group.collective, &[])?;
        Ok(false)
    }

    /// Says how many elements the matrices have that will be loaded, before the first of them. Two of 8 bits count as one.
    ///
    /// # Errors
    /// When memory is short.
    fn expect_weights(&mut self, elements: usize) -> Result<(), BackendError> {
        let _ = elements;
        Ok(())
    }

    /// Makes a weight of repeated values, if the backend can do so by itself; else it is made on the host and loaded.
    ///
    /// # Errors
    /// When memory is short.
    fn load_pattern(
        &mut self,
        source: &PatternSource,
    ) -> Result<Option<Self::Weight>, BackendError> {
        let _ = source;
        Ok(None)
    }

    /// Takes a weight over.
    ///
    /// # Errors
    /// When the bytes do not fit the shape, or memory is short.
    fn load_weight(&mut self, source: WeightSource) -> Result<Self::Weight, BackendError>;

    /// Activations of the given shape; their content is unspecified until written.
    fn tensor(&self, rows: usize, cols: usize) -> Self::Tensor;

    /// Several of them with the same rows, which may lie side by side: then [`Backend::linears`] may be one product.
    fn tensors<const N: usize>(&self, rows: usize, cols: [usize; N]) -> [Self::Tensor; N] {
        cols.map(|cols| self.tensor(rows, cols))
    }

    /// A tensor whose elements are not rounded to the activations' type; only [`Backend::linear`] writes it, and only
    /// [`Backend::to_host`] reads it.
    fn wide_tensor(&self, rows: usize, cols: usize) -> Self::Tensor {
        self.tensor(rows, cols)
    }

    /// Runs one pass over a batch that is not empty, and gives what is wanted of the tensor that it returns, of which there is
    /// a row for each of the batch's `logit_rows`. `pass` may be called with a batch that has more rows than this one, or not at
    /// all where an earlier call with such a batch was recorded.
    ///
    /// # Errors
    /// Those of `pass`, and what failed on the device.
    fn step(
        &mut self,
        batch: &StepBatch,
        wish: StepWish<'_>,
        pass: StepPass<'_, Self, Self::Tensor>,
    ) -> Result<StepOutput, BackendError>
    where
        Self: Sized,
    {
        let _ = wish;
        let out = pass(self, batch)?;
        Ok(StepOutput {
            values: out.map_or_else(Vec::new, |out| self.to_host(&out)),
            chosen: Vec::new(),
        })
    }

    /// Makes ready what steps of up to so many sequences with a row each need, so that no step has to; called once there are pages.
    ///
    /// # Errors
    /// As [`Backend::step`].
    fn warm_up(
        &mut self,
        sequences_max: usize,
        pass: StepPass<'_, Self, Self::Tensor>,
    ) -> Result<(), BackendError>
    where
        Self: Sized,
    {
        let _ = (sequences_max, pass);
        Ok(())
    }

    /// Begins a step as [`Backend::step`] makes it. `None` when it goes on by itself: then [`Backend::finish_step`] gives what it
    /// gave. Two steps may be under way; those whose wishes are all for tokens may be overtaken by the beginning of the next.
    /// A backend that is done at once is never given [`StepWish::carried`]: its tokens are known.
    ///
    /// # Errors
    /// As [`Backend::step`].
    fn begin_step(
        &mut self,
        batch: &StepBatch,
        wish: StepWish<'_>,
        pass: StepPass<'_, Self, Self::Tensor>,
    ) -> Result<Option<StepOutput>, BackendError>
    where
        Self: Sized,
    {
        self.step(batch, wish, pass).map(Some)
    }

    /// Waits for the oldest step that is under way.
    ///
    /// # Errors
    /// What failed on the device, or that there is none.
    fn finish_step(&mut self) -> Result<StepOutput, BackendError> {
        Err(BackendError::Device {
            what: "reading a step".to_owned(),
            reason: "none is under way".to_owned(),
        })
    }

    /// `out[t] = table[tokens[t]]`; table `[V, E]`, out `[T, E]`. Panics on a token outside the table.
    fn embed(&self, table: &Self::Weight, tokens: &[TokenId], out: &mut Self::Tensor);

    /// The same where the table has some rows of a vocabulary: zeros for the tokens of the others.
    fn embed_part(
        &self,
        (table, held): (&Self::Weight, Range<usize>),
        tokens: &[TokenId],
        out: &mut Self::Tensor,
    ) {
        let own = |token: TokenId| held.contains(&(token as usize));
        let first = TokenId::try_from(held.start).expect("the vocabulary is bounded");
        let local: Vec<TokenId> = tokens
            .iter()
            .map(|&token| if own(token) { token - first } else { 0 })
            .collect();
        self.embed(table, &local, out);
        self.on_host(out, &mut |values| {
            let cols = values.len() / tokens.len();
            let rows = values.chunks_exact_mut(cols).zip(tokens);
            rows.filter(|&(_, &token)| !own(token))
                .for_each(|(row, _)| row.fill(0.0));
        });
    }

    /// Sums over the ranks of the stage, all of which get the same bits; x `[T, E]`. Only where the devices have joined, as the next
    /// three.
    fn sum_over_ranks(&self, x: &mut Self::Tensor) {
        unreachable!("no devices have joined that could sum {x:?}");
    }

    /// Gives x `[T, E]` to another rank.
    fn send_rows(&self, x: &Self::Tensor, to: usize) {
        unreachable!("no devices have joined that could send {x:?} to rank {to}");
    }

    /// Takes x `[T, E]` from another rank.
    fn receive_rows(&self, x: &mut Self::Tensor, from: usize) {
        unreachable!("no devices have joined that could receive {x:?} from rank {from}");
    }

    /// `out = x · weightᵀ` of a weight whose rows are divided over the ranks of the stage; out `[T, V]` is wide, and `columns` of it
    /// are this rank's.
    fn linear_over_ranks(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        columns: Range<usize>,
        out: &mut Self::Tensor,
    ) {
        unreachable!("no devices have joined for {x:?} · {weight:?} in {columns:?} of {out:?}");
    }

    /// Says that what a norm or [`Backend::silu_mul`] writes to x from now on is for products with these weights, and nothing else
    /// reads it. A backend whose products with them round x may have it rounded there.
    fn dedicate(&self, x: &mut Self::Tensor, weights: &[&Self::Weight]) {
        let _ = (x, weights);
    }

    /// `out = x / rms(x) * weight` per row; x and out `[T, E]`, weight `[E]`.
    fn rms_norm(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        epsilon: f32,
        out: &mut Self::Tensor,
    );

    /// `x += y`, then `out = x / rms(x) * weight`; all `[T, E]`, weight `[E]`.
    fn add_rms_norm(
        &self,
        (x, y): (&mut Self::Tensor, &Self::Tensor),
        weight: &Self::Weight,
        epsilon: f32,
        out: &mut Self::Tensor,
    ) {
        self.add(x, y);
        self.rms_norm(x, weight, epsilon, out);
    }

    /// RMS norm of each head in place; x `[T, heads * D]`, weight `[D]`.
    fn head_norm(&self, x: &mut Self::Tensor, weight: &Self::Weight, epsilon: f32);

    /// `out = x · weightᵀ + bias`; x `[T, in]`, weight `[out, in]`, bias `[out]`, out `[T, out]`.
    fn linear(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        bias: Option<&Self::Weight>,
        out: &mut Self::Tensor,
    );

    /// Several products of the same x: weights with their biases, and as many results.
    fn linears<const N: usize>(
        &self,
        x: &Self::Tensor,
        weights: [(&Self::Weight, Option<&Self::Weight>); N],
        outs: [&mut Self::Tensor; N],
    ) {
        for ((weight, bias), out) in weights.into_iter().zip(outs) {
            self.linear(x, weight, bias, out);
        }
    }

    /// `x += y`; both `[T, E]`.
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor);

    /// `gate = silu(gate) * up`; both `[T, F]`.
    fn silu_mul(&self, gate: &mut Self::Tensor, up: &Self::Tensor);

    /// Rotates each head in place; x `[T, heads * D]` with `D = 2 * inverse_frequencies.len()`, positions `[T]`.
    fn rope(&self, x: &mut Self::Tensor, positions: &[u32], table: &RopeTable);

    /// Writes k and v `[T, K * D]` of one layer into the pages of the batch's sequences.
    ///
    /// Panics when a page it must write is shared: the scheduler never schedules that.
    fn write_kv(&mut self, layer: usize, batch: &StepBatch, k: &Self::Tensor, v: &Self::Tensor);

    /// Rotates q and k `[T, heads * D]` by the batch's positions, and writes k and v to the pages. What k holds afterwards
    /// is unspecified. Panics as [`Backend::write_kv`].
    fn rope_write_kv(
        &mut self,
        layer: usize,
        batch: &StepBatch,
        table: &RopeTable,
        (q, k, v): (&mut Self::Tensor, &mut Self::Tensor, &Self::Tensor),
    ) {
        self.rope(q, &batch.positions, table);
        self.rope(k, &batch.positions, table);
        self.write_kv(layer, batch, k, v);
    }

    /// Causal attention over the pages; q and out `[T, H * D]`.
    fn attention(
        &self,
        spec: &AttentionSpec,
        batch: &StepBatch,
        q: &Self::Tensor,
        out: &mut Self::Tensor,
    );

    /// `out[i] = x[rows[i]]`; out `[rows.len(), E]`.
    fn select_rows(&self, x: &Self::Tensor, rows: &[usize], out: &mut Self::Tensor);

    /// Copies activations to the host, row-major.
    fn to_host(&self, x: &Self::Tensor) -> Vec<f32>;

    /// Works on activations in host memory, row-major: sums over ranks, and what comes from another rank.
    fn on_host(&self, x: &mut Self::Tensor, edit: &mut dyn FnMut(&mut [f32]));

    /// Makes the pool of `block_count` zeroed pages; called once, before the first step.
    ///
    /// # Errors
    /// When memory is short.
    fn allocate_pages(&mut self, shape: PageShape, block_count: usize) -> Result<(), BackendError>;

    /// Another reader of a block's page, for a hand-off. The page must not be written while readers exist.
    fn share_page(&self, block: BlockId) -> Arc<Page>;

    /// Whether a block's page has no reader but the pool, so that it may be written.
    fn page_is_unshared(&self, block: BlockId) -> bool;

    /// Takes a block's page out of the pool, to be written by a transport. Panics when it is shared or lent.
    fn lend_page(&mut self, block: BlockId) -> Page;

    /// Puts a lent page back. Panics when the block has one.
    fn return_page(&mut self, block: BlockId, page: Page);
}

//! What the engine thread needs to know of a model: its shape, one forward pass, and its pages.

mod checkpoint;
mod config;
mod decoder;
mod dummy;
mod error;
mod gguf;
pub mod load;
mod mmap;
mod safetensors;
mod source;
mod special_tokens;
mod weights;

#[cfg(test)]
pub(crate) mod tests;

use std::fmt::Debug;
use std::sync::Arc;

use crate::backend::{BackendError, BlockId, StepBatch};
pub use crate::model::error::{ModelError, ModelErrorKind};
pub use crate::model::special_tokens::{GenerationDefaults, SpecialTokens};
use crate::page::{Page, PageShape};

/// A model's outside dimensions.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// `llama`, `qwen2`, `qwen3`, `mistral`.
    pub architecture: String,
    /// Layers (`L`).
    pub layers: usize,
    /// Query heads (`H`).
    pub heads: usize,
    /// KV heads (`K`).
    pub kv_heads: usize,
    /// Head size (`D`).
    pub head_dim: usize,
    /// Width (`E`).
    pub width: usize,
    /// Vocabulary (`V`): rows of the output projection.
    pub vocab: usize,
    /// Longest sequence the model was made for.
    pub max_seq_len: usize,
    /// Equal on two instances exactly when KV of one can be used by the other: architecture, dimensions, rotary
    /// parameters, norms' epsilon, windows. Not the weights' precision, which may differ between roles.
    pub fingerprint: u64,
}

/// Logits of the wanted rows, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Logits {
    /// `[R, V]`, in the order of [`StepBatch::logit_rows`].
    pub values: Vec<f32>,
    /// `V`.
    pub vocab: usize,
}

impl Logits {
    /// One row `[V]`.
    #[must_use]
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.vocab..(index + 1) * self.vocab]
    }
}

/// A loaded model on its backend.
pub trait Model: Debug + Send {
    /// Its dimensions.
    fn shape(&self) -> &ModelShape;

    /// What it runs on, for people.
    fn backend_description(&self) -> String;

    /// Bytes of weights as held.
    fn weight_bytes(&self) -> usize;

    /// Makes the KV pool; called once, before the first step.
    ///
    /// # Errors
    /// When memory is short.
    fn allocate_pages(&mut self, shape: PageShape, block_count: usize) -> Result<(), BackendError>;

    /// Runs one step: writes the rows' KV and returns the wanted logits.
    ///
    /// # Errors
    /// When the device fails.
    fn forward(&mut self, batch: &StepBatch) -> Result<Logits, BackendError>;

    /// See [`crate::backend::Backend::share_page`].
    fn share_page(&self, block: BlockId) -> Arc<Page>;

    /// See [`crate::backend::Backend::page_is_unshared`].
    fn page_is_unshared(&self, block: BlockId) -> bool;

    /// See [`crate::backend::Backend::lend_page`].
    fn lend_page(&mut self, block: BlockId) -> Page;

    /// See [`crate::backend::Backend::return_page`].
    fn return_page(&mut self, block: BlockId, page: Page);
}

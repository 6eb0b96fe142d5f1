//! What the engine thread needs to know of a model: its shape, one forward pass, and its pages.

pub(crate) mod checkpoint;
mod config;
mod cut;
pub(crate) mod decoder;
mod dummy;
mod embedding;
mod error;
mod gguf;
pub mod load;
mod micro;
mod mmap;
pub(crate) mod peers;
mod quantization;
mod safetensors;
pub(crate) mod shard;
mod source;
mod special_tokens;
mod taking;
mod weights;

#[cfg(test)]
pub(crate) mod tests;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::{BackendError, BlockId, Carried, PrefillRows, RowWish, StepBatch, TokenId};
use crate::handoff::RankOrder;
pub use crate::model::error::{ModelError, ModelErrorKind};
pub use crate::model::special_tokens::{GenerationDefaults, SpecialTokens};
use crate::page::{Page, PageShape};
use crate::request::TokenLogprobs;

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
    /// parameters, norms' epsilon, windows, scales of 8-bit KV. Not the weights' precision, which may differ between roles.
    pub fingerprint: u64,
}

/// Logits of the wanted rows, on the host, or the tokens that the device chose by them.
#[derive(Debug, Clone, PartialEq)]
pub struct Logits {
    /// `[R, V]`, in the order of [`StepBatch::logit_rows`], without the rows whose token was chosen.
    pub values: Vec<f32>,
    /// `V`.
    pub vocab: usize,
    /// The token of each row that has one; empty when none has.
    pub chosen: Vec<Option<TokenId>>,
    /// What is told of each of these tokens, where that was wished; empty when nothing is.
    pub logprobs: Vec<Option<TokenLogprobs>>,
}

/// What is known of one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome<'a> {
    /// The token that was chosen as wished, and what was to be told of it.
    Chosen(TokenId, Option<&'a TokenLogprobs>),
    /// `[V]`.
    Values(&'a [f32]),
}

impl Logits {
    /// Rows in all.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.values.len() / self.vocab + self.chosen.iter().flatten().count()
    }

    /// One row `[V]` of a step for which no token was chosen.
    #[must_use]
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.vocab..(index + 1) * self.vocab]
    }

    /// What is known of each row, in order.
    pub fn outcomes(&self) -> impl Iterator<Item = Outcome<'_>> {
        let mut values = self.values.chunks_exact(self.vocab);
        (0..self.rows()).map(move |index| match self.chosen.get(index) {
            Some(&Some(token)) => {
                let told = self.logprobs.get(index).and_then(Option::as_ref);
                Outcome::Chosen(token, told)
            }
            _ => Outcome::Values(values.next().expect("a row without a token has values")),
        })
    }
}

/// A loaded model on its backend.
pub trait Model: Debug + Send {
    /// Its dimensions.
    fn shape(&self) -> &ModelShape;

    /// What it runs on, for people.
    fn backend_description(&self) -> String;

    /// Prompt rows that a step should have.
    fn prefill_rows(&self) -> PrefillRows {
        PrefillRows::default()
    }

    /// The device whose memory the pages lie in that are shared and lent; see [`crate::backend::Backend::page_device`].
    fn page_device(&self) -> Option<usize> {
        None
    }

    /// Bytes of weights as held.
    fn weight_bytes(&self) -> usize;

    /// Makes the KV pool; called once, before the first step.
    ///
    /// # Errors
    /// When memory is short.
    fn allocate_pages(&mut self, shape: PageShape, block_count: usize) -> Result<(), BackendError>;

    /// Makes ready what steps of up to so many sequences need; see [`crate::backend::Backend::warm_up`].
    ///
    /// # Errors
    /// As [`Model::forward`].
    fn warm_up(&mut self, sequences_max: usize) -> Result<(), BackendError> {
        let _ = sequences_max;
        Ok(())
    }

    /// Runs one step: writes the rows' KV and returns the wanted logits.
    ///
    /// # Errors
    /// When the device fails.
    fn forward(&mut self, batch: &StepBatch) -> Result<Logits, BackendError>;

    /// The same; `wishes` says of each wanted row what is asked for, so a model whose device can choose tokens need not give
    /// their logits.
    ///
    /// # Errors
    /// As [`Model::forward`].
    fn forward_choosing(
        &mut self,
        batch: &StepBatch,
        wishes: &[RowWish],
    ) -> Result<Logits, BackendError> {
        let _ = wishes;
        self.forward(batch)
    }

    /// Whether a step that was begun goes on by itself; see [`crate::backend::BackendCapability::runs_by_itself`].
    fn runs_by_itself(&self) -> bool {
        false
    }

    /// Begins a step as [`Model::forward_choosing`] makes it. `None` when it goes on by itself: then [`Model::finish`] gives what
    /// it gave. See [`crate::backend::Backend::begin_step`].
    ///
    /// # Errors
    /// As [`Model::forward`].
    fn begin(
        &mut self,
        batch: &StepBatch,
        wishes: &[RowWish],
        carried: &[Carried],
    ) -> Result<Option<Logits>, BackendError> {
        assert!(carried.is_empty(), "what is done at once has its tokens");
        self.forward_choosing(batch, wishes).map(Some)
    }

    /// Waits for the oldest step that is under way.
    ///
    /// # Errors
    /// As [`Model::forward`], or that there is none.
    fn finish(&mut self) -> Result<Logits, BackendError> {
        Err(BackendError::Device {
            what: "reading a step".to_owned(),
            reason: "none is under way".to_owned(),
        })
    }

    /// Another reader of this rank's page of each block, for a hand-off; see [`crate::backend::Backend::share_page`].
    ///
    /// # Errors
    /// When the device fails.
    fn share_pages(&mut self, blocks: &[BlockId]) -> Result<Vec<Arc<Page>>, BackendError>;

    /// See [`crate::backend::Backend::page_is_unshared`].
    fn page_is_unshared(&self, block: BlockId) -> bool;

    /// See [`crate::backend::Backend::lend_page`].
    fn lend_page(&mut self, block: BlockId) -> Page;

    /// See [`crate::backend::Backend::return_page`].
    ///
    /// # Errors
    /// When a page is divided over several ranks, and one of them is lost.
    fn return_pages(&mut self, pages: Vec<(BlockId, Page)>) -> Result<(), BackendError>;

    /// Has the ranks that follow start their transceivers, for the whole model's page and on the leading one's terms.
    /// Returns how each is reached, in their order; nothing where there is one rank.
    ///
    /// # Errors
    /// When one of them cannot, or is lost.
    fn join_handoff(
        &mut self,
        _page: PageShape,
        _terms: &[u8],
    ) -> Result<Vec<Vec<u8>>, BackendError> {
        Ok(Vec::new())
    }

    /// Tells the ranks that follow of a hand-off; each does its part.
    ///
    /// # Errors
    /// When one of them is lost.
    fn hand_off(&mut self, _order: &RankOrder) -> Result<(), BackendError> {
        Ok(())
    }

    /// How long from now the model may be left alone before [`Model::keep_alive`] is due; `None` for ever.
    fn keep_alive_due(&self) -> Option<Duration> {
        None
    }

    /// Keeps in touch with the other ranks while there is nothing to compute.
    ///
    /// # Errors
    /// When one of them is lost.
    fn keep_alive(&mut self) -> Result<(), BackendError> {
        Ok(())
    }
}

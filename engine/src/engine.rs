//! The engine: one OS thread that owns the model and the scheduler and runs schedule → run → sample → publish.
//!
//! The HTTP side submits through an [`EngineHandle`] and reads a [`RequestStream`]; the transceiver reports through
//! [`Inbox::handoff_sink`]. Both end in one channel, which the thread empties between steps and sleeps on when there
//! is nothing to do. Text, sockets and tasks are somebody else's. Invariant: every request that was taken gets
//! exactly one last event, whatever happens to the thread, and every block it held is freed once.

mod clients;
mod core;
mod door;
mod early;
mod flight;
mod handle;
mod handoffs;
mod inbox;
mod leases;
mod step;
mod thread;

use std::sync::Arc;

use crate::backend::{BackendError, TokenId};
use crate::handoff::Handoff;
use crate::model::Model;
use crate::page::{KvDtype, PageShape};

pub use crate::prefix::{KvEvent, KvEventData, StoredBlock, StoredToken};
pub use handle::{EngineHandle, EngineLimits, RequestStream};
pub use inbox::Inbox;
pub use thread::EngineThread;

use self::core::Core;
use handle::Shared;

/// What the engine is told once.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Most sequences in one step.
    pub max_batch_size: usize,
    /// Most tokens in one step.
    pub max_num_tokens: usize,
    /// Most tokens of a prompt and its answer together. The pool's size bounds it as well.
    pub max_seq_len: usize,
    /// Split a prompt to fill a step up. One that is longer than a step is split in any case.
    pub enable_chunked_prefill: bool,
    /// Most prompt tokens in a step in which nobody writes: bounds how long a cancel or a newcomer waits.
    pub prefill_tokens_alone: usize,
    /// Most prompt tokens in a step in which somebody writes: bounds the time between two of their tokens.
    pub prefill_tokens_beside_decode: usize,
    /// Tokens per block.
    pub tokens_per_block: usize,
    /// Blocks in the pool.
    pub block_count: usize,
    /// Element type of the pool.
    pub kv_dtype: KvDtype,
    /// Begin a step before the results of the one before are read, where they are not needed for it. Gains something only with
    /// a model that runs by itself.
    pub overlap: bool,
    /// Reuse KV of equal prefixes.
    pub enable_block_reuse: bool,
    /// The model's end-of-sequence tokens.
    pub eos_token_ids: Vec<TokenId>,
    /// KV cache events kept for [`EngineHandle::take_kv_events`]; 0 keeps none.
    pub event_buffer_max_size: usize,
    /// Iterations kept for [`EngineHandle::take_iterations`]; 0 keeps none.
    pub iteration_stats_max: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch_size: 2048,
            max_num_tokens: 8192,
            max_seq_len: 2048,
            enable_chunked_prefill: false,
            prefill_tokens_alone: 2048,
            prefill_tokens_beside_decode: 512,
            tokens_per_block: 32,
            block_count: 256,
            kv_dtype: KvDtype::F16,
            overlap: false,
            enable_block_reuse: true,
            eos_token_ids: Vec::new(),
            event_buffer_max_size: 0,
            iteration_stats_max: 1000,
        }
    }
}

impl EngineConfig {
    fn check(&self) -> Result<(), EngineError> {
        let at_least_one = [
            ("max_batch_size", self.max_batch_size),
            ("max_num_tokens", self.max_num_tokens),
            ("prefill_tokens_alone", self.prefill_tokens_alone),
            (
                "prefill_tokens_beside_decode",
                self.prefill_tokens_beside_decode,
            ),
            ("tokens_per_block", self.tokens_per_block),
            ("block_count", self.block_count),
        ];
        for (field, value) in at_least_one {
            if value == 0 {
                return Err(EngineError::Config {
                    field,
                    reason: "0, must be at least 1".to_owned(),
                });
            }
        }
        if self.max_seq_len < 2 {
            return Err(EngineError::Config {
                field: "max_seq_len",
                reason: format!("{}, must be at least 2", self.max_seq_len),
            });
        }
        if u32::try_from(self.block_count).is_err() {
            return Err(EngineError::Config {
                field: "block_count",
                reason: format!("{}, must fit 32 bits", self.block_count),
            });
        }
        Ok(())
    }
}

/// Why the engine did not start, or how its thread ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A value that no engine can work with.
    #[error("engine option `{field}` is {reason}")]
    Config {
        /// Field of [`EngineConfig`].
        field: &'static str,
        /// The value, and what is expected.
        reason: String,
    },
    /// There is no memory for the KV pool.
    #[error("cannot make the kv pool: {0}")]
    Pool(#[source] BackendError),
    /// The operating system gave no thread.
    #[error("cannot start the engine thread: {0}")]
    Spawn(#[source] std::io::Error),
    /// The device failed.
    #[error("the engine's device failed: {0}")]
    Device(#[source] BackendError),
    /// Another rank of the instance is lost, or failed.
    #[error("the instance cannot go on: {0}")]
    Rank(#[source] BackendError),
    /// A bug: the thread panicked with this message.
    #[error("the engine thread panicked: {0}")]
    Panicked(String),
    /// The thread did not end in time; it still runs.
    #[error("the engine thread did not end within {waited_ms} ms")]
    JoinTimedOut {
        /// How long it was waited for.
        waited_ms: u128,
    },
}

/// Starts engines.
#[derive(Debug)]
pub struct Engine;

impl Engine {
    /// Makes the KV pool and starts the thread.
    ///
    /// # Errors
    /// When the configuration makes no sense, or memory or the thread cannot be had.
    pub fn start(
        mut model: Box<dyn Model>,
        handoff: Option<Box<dyn Handoff>>,
        config: EngineConfig,
        inbox: Inbox,
    ) -> Result<(EngineHandle, EngineThread), EngineError> {
        config.check()?;
        let shape = page_shape(model.as_ref(), &config);
        model
            .allocate_pages(shape, config.block_count)
            .map_err(EngineError::Pool)?;
        let warm = model.warm_up(config.max_batch_size);
        warm.map_err(EngineError::Device)?;
        let limits = EngineLimits::new(&config, model.shape().vocab, handoff.is_some());
        if limits.max_seq_len < config.max_seq_len {
            tracing::warn!(
                max_seq_len = config.max_seq_len,
                pool_tokens = limits.max_seq_len,
                "the kv pool is smaller than the longest sequence, so it bounds prompts and answers"
            );
        }
        let (shared, commands) = Shared::new(inbox, limits, &config);
        let shared = Arc::new(shared);
        let core = Core::new(model, handoff, config, Arc::clone(&shared));
        let thread = thread::spawn(core, commands, &shared)?;
        Ok((EngineHandle::new(shared), thread))
    }
}

fn page_shape(model: &dyn Model, config: &EngineConfig) -> PageShape {
    let shape = model.shape();
    PageShape {
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        tokens_per_block: config.tokens_per_block,
        head_dim: shape.head_dim,
        dtype: config.kv_dtype,
    }
}

#[cfg(test)]
mod tests;

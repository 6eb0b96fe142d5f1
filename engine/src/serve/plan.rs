//! What follows from options, model and memory: the engine's configuration, the KV layout, and what is told of both.

use baton_configs::llm::LlmOptions;

use super::ServeError;
use super::memory::{self, PoolDemand};
use crate::backend::TokenId;
use crate::engine::EngineConfig;
use crate::handoff::KvLayout;
use crate::model::load::{LoadedModel, kv_dtype, page_shape};
use crate::model::{Model, ModelShape};
use crate::page::PageShape;
use crate::parallel::Room;
use crate::server::service::{Facts, KvLayoutFacts, LimitFacts, TransportFacts};
use crate::server::unix_seconds;

/// What follows from options, model and memory.
#[derive(Debug)]
pub(super) struct Plan {
    /// For the engine.
    pub(super) engine: EngineConfig,
    /// For the transceiver.
    pub(super) layout: KvLayout,
    page: PageShape,
}

impl Plan {
    /// Sizes the pool and settles the rest.
    pub(super) fn new(
        llm: &LlmOptions,
        model: &dyn Model,
        eos_token_ids: Vec<TokenId>,
        rooms: &[Room],
    ) -> Result<Self, ServeError> {
        let shape = model.shape();
        let max_seq_len = longest_sequence(llm, shape);
        let page = page_shape(shape, llm);
        let prefill = model.prefill_rows();
        let demand = PoolDemand {
            max_batch_size: llm.max_batch_size,
            max_seq_len,
        };
        let blocks = memory::block_count(&llm.kv_cache, demand, rooms);
        let block_count = usize::try_from(blocks).unwrap_or(usize::MAX);
        if block_count == 0 {
            let tight = memory::tightest(&llm.kv_cache, rooms);
            return Err(ServeError::NoPool {
                needed_bytes: tight.map_or(page.bytes() as u64, |room| room.page_bytes),
                tokens_per_block: llm.kv_cache.tokens_per_block,
                granted_bytes: tight.map_or(0, |room| memory::granted_bytes(&llm.kv_cache, room)),
            });
        }
        tracing::info!(
            blocks = block_count,
            tokens = block_count.saturating_mul(page.tokens_per_block),
            bytes = block_count.saturating_mul(page.bytes()),
            dtype = page.dtype.name(),
            "kv pool"
        );
        Ok(Self {
            engine: EngineConfig {
                max_batch_size: llm.max_batch_size as usize,
                max_num_tokens: llm.max_num_tokens as usize,
                max_seq_len: max_seq_len as usize,
                enable_chunked_prefill: llm.enable_chunked_prefill,
                prefill_tokens_alone: prefill.alone,
                prefill_tokens_beside_decode: prefill.beside_decode,
                tokens_per_block: page.tokens_per_block,
                block_count,
                kv_dtype: kv_dtype(llm),
                enable_block_reuse: llm.kv_cache.enable_block_reuse,
                eos_token_ids,
                event_buffer_max_size: llm.kv_cache.event_buffer_max_size as usize,
                ..EngineConfig::default()
            },
            layout: KvLayout {
                model_fingerprint: shape.fingerprint,
                page,
                tensor_parallel: llm.tensor_parallel_size,
                pipeline_parallel: llm.pipeline_parallel_size,
            },
            page,
        })
    }

    /// What others are told of it.
    pub(super) fn facts(
        &self,
        loaded: &LoadedModel,
        llm: &LlmOptions,
        transport: Option<TransportFacts>,
    ) -> Facts {
        let page = &self.page;
        Facts {
            model: loaded.name.clone(),
            created: unix_seconds(),
            architecture: loaded.model.shape().architecture.clone(),
            backend: loaded.model.backend_description(),
            kv_layout: KvLayoutFacts {
                model_fingerprint: format!("{:016x}", self.layout.model_fingerprint),
                layers: page.layers,
                kv_heads: page.kv_heads,
                head_dim: page.head_dim,
                dtype: page.dtype.name(),
                tokens_per_block: page.tokens_per_block,
                page_bytes: page.bytes(),
                tensor_parallel: llm.tensor_parallel_size,
                pipeline_parallel: llm.pipeline_parallel_size,
            },
            transport,
            limits: LimitFacts {
                max_batch_size: llm.max_batch_size,
                max_num_tokens: llm.max_num_tokens,
                max_seq_len: u32::try_from(self.engine.max_seq_len).unwrap_or(u32::MAX),
                kv_blocks: self.engine.block_count,
                vocab_size: loaded.model.shape().vocab,
            },
        }
    }
}

/// What was asked for, as far as the model goes.
fn longest_sequence(llm: &LlmOptions, shape: &ModelShape) -> u32 {
    let of_model = u32::try_from(shape.max_seq_len).unwrap_or(u32::MAX);
    match llm.max_seq_len {
        Some(asked) if asked > of_model => {
            tracing::warn!(
                max_seq_len = asked,
                of_model,
                "max_seq_len is longer than the model was made for; the model's is used"
            );
            of_model
        }
        Some(asked) => asked,
        None => of_model,
    }
}

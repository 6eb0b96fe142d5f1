//! KV cache events as `POST /kv_cache_events` reports them (COMPAT.md §11), for routers that follow a server's cache.

use serde::Serialize;

use crate::backend::TokenId;

/// One change of the prefix cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KvEvent {
    /// Rises by one from event to event; a gap means that the reader came too late.
    pub event_id: u64,
    /// Present in `created`: how block hashes are made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash_algo: Option<&'static str>,
    /// What changed.
    pub data: KvEventData,
}

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum KvEventData {
    /// The pool was made.
    Created {
        /// Blocks in each memory level; this engine has one.
        num_blocks_per_cache_level: Vec<usize>,
    },
    /// Blocks can be found by their prefix from now on.
    Stored {
        /// Hash of the block before the first of `blocks`; `None` for the start of a prompt.
        parent_hash: Option<u64>,
        /// The blocks, each the parent of the next.
        blocks: Vec<StoredBlock>,
    },
    /// Blocks can no longer be found.
    Removed {
        /// Their hashes.
        block_hashes: Vec<u64>,
    },
}

/// A block that can be found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoredBlock {
    /// Its `v1_block_key`.
    pub block_hash: u64,
    /// Its tokens.
    pub tokens: Vec<StoredToken>,
    /// Memory level; 0 is the pool.
    pub cache_level: u32,
}

/// A token of a stored block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct StoredToken {
    /// The token.
    pub token_id: TokenId,
    /// Distinguishes multimodal content; always 0 here.
    pub token_extra_id: u64,
}

/// Numbers events and keeps them until the engine publishes them; keeps none when nobody asked for events.
#[derive(Debug)]
pub(crate) struct EventLog {
    enabled: bool,
    next_id: u64,
    pending: Vec<KvEvent>,
}

impl EventLog {
    pub(crate) fn new(enabled: bool, block_count: usize) -> Self {
        let mut log = Self {
            enabled,
            next_id: 0,
            pending: Vec::new(),
        };
        log.push(Some("v1_block_key"), || KvEventData::Created {
            num_blocks_per_cache_level: vec![block_count],
        });
        log
    }

    pub(crate) fn stored(&mut self, parent_hash: Option<u64>, block_hash: u64, tokens: &[TokenId]) {
        self.push(None, || KvEventData::Stored {
            parent_hash,
            blocks: vec![StoredBlock {
                block_hash,
                tokens: tokens
                    .iter()
                    .map(|&token_id| StoredToken {
                        token_id,
                        token_extra_id: 0,
                    })
                    .collect(),
                cache_level: 0,
            }],
        });
    }

    pub(crate) fn removed(&mut self, block_hash: u64) {
        self.push(None, || KvEventData::Removed {
            block_hashes: vec![block_hash],
        });
    }

    pub(crate) fn take(&mut self) -> Vec<KvEvent> {
        std::mem::take(&mut self.pending)
    }

    fn push(&mut self, hash_algo: Option<&'static str>, data: impl FnOnce() -> KvEventData) {
        if !self.enabled {
            return;
        }
        self.pending.push(KvEvent {
            event_id: self.next_id,
            hash_algo,
            data: data(),
        });
        self.next_id += 1;
    }
}

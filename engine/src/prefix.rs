//! Which full block holds which tokens after which prefix, so that equal prefixes are computed once.
//!
//! A node is a full block; its parent is the block before it. A hit is a comparison of the tokens, of the parent
//! block itself and, at the root, of the tenant's salt; the hash only finds candidates. Because a block with
//! cached children is never evicted, a parent's number cannot come to mean another block.

mod events;
mod key;

use std::collections::HashMap;
use std::sync::Arc;

use crate::backend::{BlockId, TokenId};

pub(crate) use events::EventLog;
pub use events::{KvEvent, KvEventData, StoredBlock, StoredToken};
use key::{salt_id, v1_block_key};

/// Where in the tree a block hangs: under another block, or at the root of a tenant.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Parent<'a> {
    Root(Option<&'a Arc<str>>),
    Block(BlockId),
}

#[derive(Debug)]
enum Origin {
    Root(Option<Arc<str>>),
    Block(BlockId),
}

impl Origin {
    fn is(&self, parent: Parent<'_>) -> bool {
        match (self, parent) {
            (Self::Root(own), Parent::Root(other)) => own.as_ref() == other,
            (Self::Block(own), Parent::Block(other)) => *own == other,
            (Self::Root(_), Parent::Block(_)) | (Self::Block(_), Parent::Root(_)) => false,
        }
    }
}

#[derive(Debug)]
struct Node {
    origin: Origin,
    hash: u64,
    tokens: Box<[TokenId]>,
    children: u32,
}

/// The tree of cached blocks. Knows nothing of reference counts.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    nodes: HashMap<BlockId, Node>,
    by_hash: HashMap<u64, Vec<BlockId>>,
    events: EventLog,
}

impl PrefixCache {
    pub(crate) fn new(events: EventLog) -> Self {
        Self {
            nodes: HashMap::new(),
            by_hash: HashMap::new(),
            events,
        }
    }

    /// The block that holds exactly `tokens` right after `parent`.
    pub(crate) fn find(&self, parent: Parent<'_>, tokens: &[TokenId]) -> Option<BlockId> {
        let hash = self.hash(parent, tokens);
        self.by_hash.get(&hash)?.iter().copied().find(|block| {
            let node = &self.nodes[block];
            node.origin.is(parent) && *node.tokens == *tokens
        })
    }

    /// Makes a block findable. The caller has looked that no equal one is there, and that the parent is.
    pub(crate) fn insert(&mut self, parent: Parent<'_>, tokens: &[TokenId], block: BlockId) {
        let hash = self.hash(parent, tokens);
        let (origin, parent_hash) = match parent {
            Parent::Root(salt) => (Origin::Root(salt.cloned()), None),
            Parent::Block(id) => {
                let node = self
                    .nodes
                    .get_mut(&id)
                    .expect("a cached block's parent is cached");
                node.children += 1;
                (Origin::Block(id), Some(node.hash))
            }
        };
        let node = Node {
            origin,
            hash,
            tokens: tokens.into(),
            children: 0,
        };
        let before = self.nodes.insert(block, node);
        assert!(before.is_none(), "block {block} is cached twice");
        self.by_hash.entry(hash).or_default().push(block);
        self.events.stored(parent_hash, hash, tokens);
    }

    /// Whether nothing hangs under a cached block, so that it may be evicted.
    pub(crate) fn is_leaf(&self, block: BlockId) -> bool {
        self.nodes.get(&block).is_none_or(|node| node.children == 0)
    }

    /// Forgets a cached leaf.
    pub(crate) fn remove(&mut self, block: BlockId) {
        let Some(node) = self.nodes.remove(&block) else {
            return;
        };
        assert_eq!(node.children, 0, "block {block} still has children");
        if let Origin::Block(parent) = node.origin {
            let parent = self
                .nodes
                .get_mut(&parent)
                .expect("a cached block's parent is cached");
            parent.children -= 1;
        }
        if let Some(bucket) = self.by_hash.get_mut(&node.hash) {
            bucket.retain(|&other| other != block);
            if bucket.is_empty() {
                self.by_hash.remove(&node.hash);
            }
        }
        self.events.removed(node.hash);
    }

    pub(crate) fn take_events(&mut self) -> Vec<KvEvent> {
        self.events.take()
    }

    fn hash(&self, parent: Parent<'_>, tokens: &[TokenId]) -> u64 {
        match parent {
            Parent::Root(salt) => v1_block_key(0, tokens, salt.map(|salt| salt_id(salt))),
            Parent::Block(id) => {
                let parent = self.nodes.get(&id).map_or(0, |node| node.hash);
                v1_block_key(parent, tokens, None)
            }
        }
    }
}

#[cfg(test)]
mod tests;

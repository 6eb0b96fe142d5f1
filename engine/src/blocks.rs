//! The KV pool's books: who refers to which block, and which block may be written next.
//!
//! A block is *used* (referred to by sequences or leases), *cached* (full, findable by its prefix, nobody refers to
//! it), *quarantined* (given up while a transport may still write its page) or *free*. This module moves no
//! bytes; whether a page still has a reader is asked of the caller. Invariant: a block is handed out for
//! writing only when it was free or cached, its page is here, and the page has no other reader. What is given up while a
//! step is under way, which may write it, stays used until that step has ended.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::backend::{BlockId, TokenId};
use crate::prefix::{EventLog, KvEvent, Parent, PrefixCache};

/// Answers whether a block's page has no reader but the pool.
pub(crate) type Writable<'a> = &'a dyn Fn(BlockId) -> bool;

#[derive(Debug, Clone, Default)]
struct Slot {
    /// Sequences and leases that refer to the block.
    refs: u32,
    /// Of these, leases.
    pins: u32,
    /// Whether the prefix cache can find it.
    cached: bool,
    /// Whether a transport has its page.
    lent: bool,
    /// Key in `idle`, while it is there.
    idle_since: u64,
}

/// How many blocks are in which state. `total = free + used + cached + quarantined`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct BlockCounts {
    pub(crate) total: usize,
    pub(crate) free: usize,
    pub(crate) used: usize,
    pub(crate) cached: usize,
    /// Used blocks that a lease holds.
    pub(crate) pinned: usize,
    /// Used blocks whose page a transport has.
    pub(crate) lent: usize,
    pub(crate) quarantined: usize,
}

/// Sums since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct BlockTotals {
    /// Blocks given to sequences, reused ones included.
    pub(crate) allocated: u64,
    /// Of these, handed out for writing.
    pub(crate) fresh: u64,
    /// Of these, found in the prefix cache.
    pub(crate) reused: u64,
    /// Full prompt blocks that were looked for and not found.
    pub(crate) missed: u64,
}

/// The pool's books.
#[derive(Debug)]
pub(crate) struct BlockPool {
    tokens_per_block: usize,
    slots: Vec<Slot>,
    free: VecDeque<BlockId>,
    /// Cached blocks that nobody refers to, longest unused first.
    idle: BTreeMap<u64, BlockId>,
    prefix: Option<PrefixCache>,
    clock: u64,
    counts: BlockCounts,
    totals: BlockTotals,
    skipped_shared: bool,
    /// Steps begun and ended so far.
    steps: (u64, u64),
    /// References given up during steps, with the number of the last one begun by then.
    given_up: VecDeque<(u64, BlockId)>,
}

impl BlockPool {
    /// Books of `block_count` free blocks. Without `reuse` nothing is ever found again.
    pub(crate) fn new(
        block_count: usize,
        tokens_per_block: usize,
        reuse: bool,
        events: bool,
    ) -> Self {
        let last = BlockId::try_from(block_count).expect("block numbers fit 32 bits");
        Self {
            tokens_per_block,
            slots: vec![Slot::default(); block_count],
            free: (0..last).collect(),
            idle: BTreeMap::new(),
            prefix: reuse.then(|| PrefixCache::new(EventLog::new(events, block_count))),
            clock: 0,
            counts: BlockCounts {
                total: block_count,
                free: block_count,
                ..BlockCounts::default()
            },
            totals: BlockTotals::default(),
            skipped_shared: false,
            steps: (0, 0),
            given_up: VecDeque::new(),
        }
    }

    pub(crate) fn tokens_per_block(&self) -> usize {
        self.tokens_per_block
    }

    /// Blocks that hold `tokens` tokens.
    pub(crate) fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.tokens_per_block)
    }

    /// Blocks that could be handed out now, if no page had a late reader.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    pub(crate) fn counts(&self) -> BlockCounts {
        self.counts
    }

    pub(crate) fn totals(&self) -> BlockTotals {
        self.totals
    }

    /// Whether, since the last call, a block was passed over because its page still had a reader. Nothing
    /// announces the end of such a reader, so whoever waits for blocks has to look again.
    pub(crate) fn take_skipped_shared(&mut self) -> bool {
        std::mem::take(&mut self.skipped_shared)
    }

    pub(crate) fn take_events(&mut self) -> Vec<KvEvent> {
        self.prefix
            .as_mut()
            .map(PrefixCache::take_events)
            .unwrap_or_default()
    }

    /// Refers to the cached blocks that `tokens` start with, leaving at least one token to compute.
    pub(crate) fn match_prefix(
        &mut self,
        salt: Option<&Arc<str>>,
        tokens: &[TokenId],
    ) -> Vec<BlockId> {
        let mut found = Vec::new();
        let Some(prefix) = &self.prefix else {
            return found;
        };
        let mut parent = Parent::Root(salt);
        let reusable = &tokens[..tokens.len().saturating_sub(1)];
        for chunk in reusable.chunks_exact(self.tokens_per_block) {
            let Some(block) = prefix.find(parent, chunk) else {
                break;
            };
            found.push(block);
            parent = Parent::Block(block);
        }
        for &block in &found {
            self.refer(block);
        }
        found
    }

    /// Notes that a prompt with `wanted` full blocks found `reused` of them. Apart from [`Self::match_prefix`],
    /// so that an admission that is tried again counts once.
    pub(crate) fn count_reuse(&mut self, wanted: usize, reused: usize) {
        if self.prefix.is_some() {
            self.totals.allocated += reused as u64;
            self.totals.reused += reused as u64;
            self.totals.missed += wanted.saturating_sub(reused) as u64;
        }
    }

    /// Hands out `count` blocks for writing, or none.
    pub(crate) fn allocate(
        &mut self,
        count: usize,
        writable: Writable<'_>,
    ) -> Option<Vec<BlockId>> {
        if self.available() < count {
            return None;
        }
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            match self.take_free(writable).or_else(|| self.evict(writable)) {
                Some(block) => taken.push(block),
                None => break,
            }
        }
        if taken.len() < count {
            for &block in taken.iter().rev() {
                self.free.push_front(block);
            }
            return None;
        }
        for &block in &taken {
            self.slots[block as usize].refs = 1;
        }
        self.counts.free -= count;
        self.counts.used += count;
        self.totals.allocated += count as u64;
        self.totals.fresh += count as u64;
        Some(taken)
    }

    /// Makes a full block findable and returns the block to go on with: the same, or, when an equal one is
    /// cached already, that one; then the caller's reference has moved to it.
    pub(crate) fn cache(
        &mut self,
        parent: Parent<'_>,
        tokens: &[TokenId],
        block: BlockId,
    ) -> BlockId {
        debug_assert_eq!(tokens.len(), self.tokens_per_block);
        let Some(prefix) = &mut self.prefix else {
            return block;
        };
        if let Some(known) = prefix.find(parent, tokens) {
            if known != block {
                self.refer(known);
                self.release(&[block]);
            }
            return known;
        }
        prefix.insert(parent, tokens, block);
        self.slots[block as usize].cached = true;
        block
    }

    /// A step that uses blocks has begun.
    pub(crate) fn begin_step(&mut self) {
        self.steps.0 += 1;
    }

    /// The oldest step that was under way has ended: what was given up before a later one began is really free.
    pub(crate) fn end_step(&mut self) {
        self.steps.1 += 1;
        assert!(self.steps.1 <= self.steps.0, "a step ends once");
        while let Some((_, block)) = self
            .given_up
            .pop_front_if(|&mut (step, _)| step <= self.steps.1)
        {
            self.drop_reference(block);
        }
    }

    /// Whether steps are under way.
    pub(crate) fn has_step_under_way(&self) -> bool {
        self.steps.0 > self.steps.1
    }

    /// Gives up one reference to each block. The last block goes first, so that a prefix outlives what follows it.
    pub(crate) fn release(&mut self, blocks: &[BlockId]) {
        let waits = self.has_step_under_way();
        for &block in blocks.iter().rev() {
            if waits {
                self.given_up.push_back((self.steps.0, block));
            } else {
                self.drop_reference(block);
            }
        }
    }

    fn drop_reference(&mut self, block: BlockId) {
        let slot = &mut self.slots[block as usize];
        assert!(slot.refs > slot.pins, "block {block} is released twice");
        slot.refs -= 1;
        if slot.refs == 0 {
            self.retire(block);
        }
    }

    /// Gives a lease a hold of its own on blocks that somebody refers to.
    pub(crate) fn share(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            self.refer(block);
        }
        self.pin(blocks);
    }

    /// Turns one reference to each block into a lease's.
    pub(crate) fn pin(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            let slot = &mut self.slots[block as usize];
            assert!(
                slot.refs > slot.pins,
                "block {block} has no reference to pin"
            );
            slot.pins += 1;
            if slot.pins == 1 {
                self.counts.pinned += 1;
            }
        }
    }

    /// Ends a lease's hold on its blocks and gives up its reference.
    pub(crate) fn unpin(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            let slot = &mut self.slots[block as usize];
            slot.pins = slot
                .pins
                .checked_sub(1)
                .expect("a lease's blocks stay pinned until it ends");
            if slot.pins == 0 {
                self.counts.pinned -= 1;
            }
        }
        self.release(blocks);
    }

    /// Notes that a transport has the pages of these used blocks.
    pub(crate) fn lend(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            let slot = &mut self.slots[block as usize];
            assert!(
                slot.refs == 1 && !slot.lent && !slot.cached,
                "block {block} cannot be lent"
            );
            slot.lent = true;
            self.counts.lent += 1;
        }
    }

    /// Notes that a page is back; a quarantined block becomes free.
    pub(crate) fn page_back(&mut self, block: BlockId) {
        let slot = &mut self.slots[block as usize];
        assert!(slot.lent, "the page of block {block} was not lent");
        slot.lent = false;
        if slot.refs > 0 {
            self.counts.lent -= 1;
        } else {
            self.counts.quarantined -= 1;
            self.counts.free += 1;
            self.free.push_back(block);
        }
    }

    /// Whether a transport has the page of a block.
    pub(crate) fn is_lent(&self, block: BlockId) -> bool {
        self.slots.get(block as usize).is_some_and(|slot| slot.lent)
    }

    fn refer(&mut self, block: BlockId) {
        let slot = &mut self.slots[block as usize];
        if slot.refs == 0 {
            let was_idle = self.idle.remove(&slot.idle_since).is_some();
            assert!(was_idle, "block {block} holds nothing to refer to");
            self.counts.cached -= 1;
            self.counts.used += 1;
        }
        slot.refs += 1;
    }

    /// Files a block that has lost its last reference.
    fn retire(&mut self, block: BlockId) {
        let slot = &mut self.slots[block as usize];
        self.counts.used -= 1;
        if slot.lent {
            self.counts.lent -= 1;
            self.counts.quarantined += 1;
        } else if slot.cached {
            self.clock += 1;
            slot.idle_since = self.clock;
            self.idle.insert(self.clock, block);
            self.counts.cached += 1;
        } else {
            self.free.push_back(block);
            self.counts.free += 1;
        }
    }

    fn take_free(&mut self, writable: Writable<'_>) -> Option<BlockId> {
        let index = self.free.iter().position(|&block| writable(block));
        self.skipped_shared |= index != Some(0) && !self.free.is_empty();
        self.free.remove(index?)
    }

    /// Takes the longest unused cached block that nothing hangs under; it is free afterwards.
    fn evict(&mut self, writable: Writable<'_>) -> Option<BlockId> {
        let prefix = self.prefix.as_mut()?;
        let mut victim = None;
        for (&since, &block) in &self.idle {
            if !prefix.is_leaf(block) {
                continue;
            }
            if writable(block) {
                victim = Some((since, block));
                break;
            }
            self.skipped_shared = true;
        }
        let (since, block) = victim?;
        prefix.remove(block);
        self.idle.remove(&since);
        self.slots[block as usize].cached = false;
        self.counts.cached -= 1;
        self.counts.free += 1;
        Some(block)
    }
}

#[cfg(test)]
mod tests;

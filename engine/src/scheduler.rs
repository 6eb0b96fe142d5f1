//! Which sequences run next, with how many tokens each: first one token for everybody who writes, then prompts.
//!
//! First come, first served: a request's number is its age. When blocks run out, the youngest gives its own up
//! and is computed again later, so the oldest always gets on. A sequence whose KV is being fetched holds
//! blocks but no place in the batch. No device, no clock, no waiting: everything is passed in.

mod admission;

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use crate::backend::BlockId;
use crate::blocks::{BlockPool, Writable};
use crate::prefix::Parent;
use crate::request::RequestId;
use crate::sequence::Sequence;

/// Bounds of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Sequences in a step.
    pub(crate) batch_size: usize,
    /// Tokens in a step.
    pub(crate) tokens: usize,
    /// Prompt tokens in a step in which nobody writes.
    pub(crate) prefill_alone: usize,
    /// Prompt tokens in a step in which somebody does.
    pub(crate) prefill_beside_decode: usize,
    /// Whether a prompt may be split to fill a step up. One that is longer than a step is split in any case.
    pub(crate) chunked_prefill: bool,
}

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PlannedSpan {
    /// Index in the running batch.
    pub(crate) index: usize,
    /// Tokens to compute.
    pub(crate) rows: usize,
    /// Whether it is one token of a begun answer.
    pub(crate) decode: bool,
}

/// What to do next.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Parts of the step.
    pub(crate) spans: Vec<PlannedSpan>,
    /// Requests whose KV is to be fetched; they hold the blocks for it.
    pub(crate) fetches: Vec<RequestId>,
    /// Requests that left the queue for the first time.
    pub(crate) started: Vec<RequestId>,
    /// Prompt tokens of these that were found in the cache.
    pub(crate) cached_tokens: usize,
    /// Sequences that lost their blocks.
    pub(crate) preempted: usize,
    /// Whether somebody was left out for want of a block that a step under way may still use: nobody is pre-empted meanwhile.
    pub(crate) is_short: bool,
}

impl Plan {
    fn decode_rows(&self) -> usize {
        self.spans.iter().filter(|span| span.decode).count()
    }

    fn prefill_rows(&self) -> usize {
        let prefill = self.spans.iter().filter(|span| !span.decode);
        prefill.map(|span| span.rows).sum()
    }
}

/// All sequences and the pool's books.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    pub(crate) pool: BlockPool,
    /// Without blocks, by age.
    waiting: VecDeque<Sequence>,
    /// With fetched KV but without a place in the batch, by age.
    ready: VecDeque<Sequence>,
    /// In the batch, by age.
    running: Vec<Sequence>,
    /// With blocks that a transport is filling.
    fetching: BTreeMap<RequestId, Sequence>,
}

impl Scheduler {
    pub(crate) fn new(limits: Limits, pool: BlockPool) -> Self {
        let limits = Limits {
            // Everybody who writes needs a row.
            batch_size: limits.batch_size.min(limits.tokens),
            ..limits
        };
        Self {
            limits,
            pool,
            waiting: VecDeque::new(),
            ready: VecDeque::new(),
            running: Vec::new(),
            fetching: BTreeMap::new(),
        }
    }

    pub(crate) fn batch_size_max(&self) -> usize {
        self.limits.batch_size
    }

    pub(crate) fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn running_count(&self) -> usize {
        self.running.len()
    }

    /// Sequences whose KV is on its way, or there and waiting for a place.
    pub(crate) fn fetching_count(&self) -> usize {
        self.fetching.len() + self.ready.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.fetching_count() == 0
    }

    /// A member of the batch.
    pub(crate) fn running(&self, index: usize) -> &Sequence {
        &self.running[index]
    }

    /// A member of the batch.
    pub(crate) fn running_mut(&mut self, index: usize) -> &mut Sequence {
        &mut self.running[index]
    }

    pub(crate) fn fetching_mut(&mut self, id: RequestId) -> Option<&mut Sequence> {
        self.fetching.get_mut(&id)
    }

    /// The request that a fetch is for.
    pub(crate) fn fetched_for(&self, fetch: RequestId) -> Option<RequestId> {
        let mut fetching = self.fetching.values();
        fetching
            .find(|sequence| sequence.fetch == fetch)
            .map(|sequence| sequence.id)
    }

    /// The prefetch of what a request wants, if there is one.
    pub(crate) fn prefetch_for(&self, wanted: &Sequence) -> Option<RequestId> {
        let mut all = self.fetching.values().chain(&self.waiting);
        all.find(|sequence| sequence.is_prefetch_for(wanted))
            .map(|sequence| sequence.id)
    }

    /// Has a request go on with what a prefetch has fetched, or is fetching. It comes back when that has not begun.
    pub(crate) fn take_over(
        &mut self,
        prefetch: RequestId,
        mut sequence: Sequence,
        now: Instant,
    ) -> Option<Sequence> {
        let Some(prefetch) = self.fetching.remove(&prefetch) else {
            return Some(sequence);
        };
        sequence.take_over(prefetch, now);
        self.fetching.insert(sequence.id, sequence);
        None
    }

    /// Requests in any state, oldest first within each.
    pub(crate) fn ids(&self) -> Vec<RequestId> {
        let ordered = self.running.iter().chain(&self.ready).chain(&self.waiting);
        ordered
            .map(|sequence| sequence.id)
            .chain(self.fetching.keys().copied())
            .collect()
    }

    /// Queues a sequence by its age.
    pub(crate) fn enqueue(&mut self, sequence: Sequence) {
        insert_by_age(&mut self.waiting, sequence);
    }

    /// Takes a fetched sequence over: all its pages are back.
    pub(crate) fn fetched(&mut self, id: RequestId) {
        if let Some(sequence) = self.fetching.remove(&id) {
            insert_by_age(&mut self.ready, sequence);
        }
    }

    /// Puts a sequence whose fetch failed back into the queue. Blocks whose pages are still away are quarantined.
    pub(crate) fn fetch_failed(&mut self, id: RequestId) {
        if let Some(mut sequence) = self.fetching.remove(&id) {
            self.pool.release(&sequence.blocks);
            sequence.restart();
            self.enqueue(sequence);
        }
    }

    /// Takes a sequence out, wherever it is, and frees what it held. Says whether it was being fetched.
    pub(crate) fn remove(&mut self, id: RequestId) -> Option<(Sequence, bool)> {
        let was_fetching = self.fetching.contains_key(&id);
        let mut sequence = self.take(id)?;
        self.pool.release(&sequence.blocks);
        sequence.restart();
        Some((sequence, was_fetching))
    }

    /// Takes a sequence out with its blocks, for a lease.
    pub(crate) fn take(&mut self, id: RequestId) -> Option<Sequence> {
        if let Some(sequence) = self.fetching.remove(&id) {
            return Some(sequence);
        }
        if let Some(index) = self.running.iter().position(|running| running.id == id) {
            return Some(self.running.remove(index));
        }
        for queue in [&mut self.ready, &mut self.waiting] {
            if let Some(index) = queue.iter().position(|queued| queued.id == id) {
                return queue.remove(index);
            }
        }
        None
    }

    /// Decides what to do next.
    pub(crate) fn schedule(&mut self, writable: Writable<'_>, now: Instant) -> Plan {
        let mut plan = Plan::default();
        self.plan_running(&mut plan, true, writable);
        self.plan_running(&mut plan, false, writable);
        if plan.preempted == 0 {
            self.admit(&mut plan, writable, now);
        }
        plan
    }

    /// Notes that a span is being computed. `row` is that of the step's logits by which the next token is chosen.
    pub(crate) fn begun(&mut self, span: PlannedSpan, row: Option<usize>) {
        let sequence = &mut self.running[span.index];
        sequence.computed += span.rows;
        if let Some(row) = row {
            sequence.ahead += 1;
            sequence.ahead_row = row;
        }
    }

    /// Notes that a sequence is computed up to a position, and makes the blocks that are full by then findable.
    pub(crate) fn computed(&mut self, index: usize, up_to: usize) {
        cache_full_blocks(&mut self.pool, &mut self.running[index], up_to);
    }

    /// Where in the batch a request is, if it is.
    pub(crate) fn index_of(&self, id: RequestId) -> Option<usize> {
        let by_age = self
            .running
            .binary_search_by_key(&id, |sequence| sequence.id);
        by_age.ok()
    }

    /// Makes the full blocks of fetched KV findable.
    pub(crate) fn cache_fetched(&mut self, id: RequestId) {
        if let Some(sequence) = self.fetching.get_mut(&id) {
            let up_to = sequence.computed;
            cache_full_blocks(&mut self.pool, sequence, up_to);
        }
    }

    /// Plans those in the batch who write, or those who read their prompt.
    fn plan_running(&mut self, plan: &mut Plan, decode: bool, writable: Writable<'_>) {
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &self.running[index];
            if sequence.is_decoding() == decode && !sequence.awaits_results() {
                let rows = if decode {
                    1
                } else {
                    self.prefill_rows(plan, index)
                };
                if rows == 0 {
                    // Those behind it wait as well: first come, first served.
                    return;
                }
                match self.grow(index, rows, plan, writable) {
                    Growth::Done => plan.spans.push(PlannedSpan {
                        index,
                        rows,
                        decode,
                    }),
                    Growth::Gone => continue,
                    Growth::Stalled => {}
                }
            }
            index += 1;
        }
    }

    /// Rows that a prompt gets of this step: 0 when it must wait for the next.
    fn prefill_rows(&self, plan: &Plan, index: usize) -> usize {
        self.prefill_rows_of(plan, self.running[index].rows_max())
    }

    fn prefill_rows_of(&self, plan: &Plan, wanted: usize) -> usize {
        let decode = plan.decode_rows();
        let prefill = plan.prefill_rows();
        let bound = if decode == 0 {
            self.limits.prefill_alone
        } else {
            self.limits.prefill_beside_decode
        };
        let left = bound
            .min(self.limits.tokens.saturating_sub(decode))
            .saturating_sub(prefill);
        if wanted <= left || self.limits.chunked_prefill || prefill == 0 {
            wanted.min(left)
        } else {
            0
        }
    }

    /// Gets a member of the batch the blocks for its next rows, at the cost of the youngest if need be.
    fn grow(
        &mut self,
        index: usize,
        rows: usize,
        plan: &mut Plan,
        writable: Writable<'_>,
    ) -> Growth {
        loop {
            let sequence = &mut self.running[index];
            let needed = self.pool.blocks_for(sequence.computed + rows);
            let missing = needed.saturating_sub(sequence.blocks.len());
            if missing == 0 {
                return Growth::Done;
            }
            if let Some(blocks) = self.pool.allocate(missing, writable) {
                sequence.blocks_allocated += blocks.len();
                sequence.blocks.extend(blocks);
                return Growth::Done;
            }
            if self.pool.has_step_under_way() {
                plan.is_short = true;
                return Growth::Stalled;
            }
            if self.running.len() == 1 && self.ready.is_empty() {
                // Only leases, fetches and quarantine hold the rest; they end by themselves.
                return Growth::Stalled;
            }
            if self.preempt_youngest(plan) == Some(index) {
                return Growth::Gone;
            }
        }
    }

    /// Takes the blocks of the youngest sequence that has computed anything here. Returns its index in the batch.
    fn preempt_youngest(&mut self, plan: &mut Plan) -> Option<usize> {
        let running = self.running.last().map(|sequence| sequence.id);
        let ready = self.ready.back().map(|sequence| sequence.id);
        plan.preempted += 1;
        let (victim, index) = if ready > running {
            (self.ready.pop_back(), None)
        } else {
            let index = self.running.len() - 1;
            plan.spans.retain(|span| span.index != index);
            (self.running.pop(), Some(index))
        };
        if let Some(mut victim) = victim {
            self.pool.release(&victim.blocks);
            victim.restart();
            self.enqueue(victim);
        }
        index
    }
}

enum Growth {
    /// The blocks are there.
    Done,
    /// The sequence itself was the youngest and is back in the queue.
    Gone,
    /// It keeps what it has and waits for blocks that others than sequences hold.
    Stalled,
}

fn cache_full_blocks(pool: &mut BlockPool, sequence: &mut Sequence, up_to: usize) {
    let size = pool.tokens_per_block();
    let full = up_to / size;
    while sequence.cached_blocks < full {
        let index = sequence.cached_blocks;
        let parent = match index {
            0 => Parent::Root(sequence.salt.as_ref()),
            _ => Parent::Block(sequence.blocks[index - 1]),
        };
        let tokens = &sequence.tokens[index * size..(index + 1) * size];
        let block: BlockId = pool.cache(parent, tokens, sequence.blocks[index]);
        sequence.blocks[index] = block;
        sequence.cached_blocks += 1;
    }
}

fn insert_by_age(queue: &mut VecDeque<Sequence>, sequence: Sequence) {
    let index = queue.partition_point(|other| other.id < sequence.id);
    queue.insert(index, sequence);
}

#[cfg(test)]
mod tests;

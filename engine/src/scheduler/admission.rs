//! Who enters: into the batch when there is a place and blocks, into a fetch when there are blocks.
//!
//! A newcomer gets the blocks of all its tokens at once and leaves one for each who is there to grow by, so that
//! prompts never run out half-way and newcomers do not cause pre-emptions at once. Alone it needs no more than
//! itself, and it was refused at the door if the pool is too small for that: so somebody can always enter.

use std::time::Instant;

use crate::blocks::Writable;
use crate::request::RequestId;
use crate::sequence::Sequence;

use super::{Plan, PlannedSpan, Scheduler};

/// What became of a waiting sequence.
enum Entry {
    /// It left the queue.
    Entered,
    /// There is no place for it; there may be for others of another kind.
    NoPlace,
    /// There are too few blocks. What is free belongs to it, so nobody behind it enters.
    NoMemory,
}

impl Scheduler {
    /// Lets sequences enter by age.
    pub(super) fn admit(&mut self, plan: &mut Plan, writable: Writable<'_>, now: Instant) {
        let mut index = 0;
        while let Some(id) = self.waiting.get(index).map(|sequence| sequence.id) {
            self.join_ready(plan, writable, Some(id));
            let entry = if self.waiting[index].needs_fetch() {
                self.start_fetch(index, plan, writable, now)
            } else {
                self.enter(index, plan, writable, now)
            };
            match entry {
                Entry::Entered => {}
                Entry::NoPlace => index += 1,
                Entry::NoMemory => break,
            }
        }
        self.join_ready(plan, writable, None);
    }

    /// Gives places to sequences whose KV has come, those that are older than `than`.
    fn join_ready(&mut self, plan: &mut Plan, writable: Writable<'_>, than: Option<RequestId>) {
        while self.running.len() < self.limits.batch_size
            && self
                .ready
                .front()
                .is_some_and(|ready| than.is_none_or(|than| ready.id < than))
        {
            if let Some(sequence) = self.ready.pop_front() {
                self.join(sequence, plan, writable);
            }
        }
    }

    /// Moves a waiting sequence into the batch.
    fn enter(
        &mut self,
        index: usize,
        plan: &mut Plan,
        writable: Writable<'_>,
        now: Instant,
    ) -> Entry {
        if self.running.len() >= self.limits.batch_size || self.prefill_rows_of(plan, 1) == 0 {
            return Entry::NoPlace;
        }
        let reserve = self.growth_reserve();
        let sequence = &self.waiting[index];
        let total = self.pool.blocks_for(sequence.tokens.len());
        let room = self.pool.blocks_for(sequence.tokens.len() + 1) + reserve;
        let reused = if sequence.wants_prompt_logits() {
            Vec::new()
        } else {
            self.pool
                .match_prefix(sequence.salt.as_ref(), &sequence.tokens)
        };
        let fits = room <= reused.len() + self.pool.available();
        let fresh = total - reused.len();
        let Some(fresh) = fits.then(|| self.pool.allocate(fresh, writable)).flatten() else {
            self.pool.release(&reused);
            return Entry::NoMemory;
        };
        let Some(mut sequence) = self.waiting.remove(index) else {
            return Entry::NoPlace;
        };
        let size = self.pool.tokens_per_block();
        self.pool
            .count_reuse((sequence.tokens.len() - 1) / size, reused.len());
        sequence.computed = reused.len() * size;
        sequence.cached_blocks = reused.len();
        sequence.blocks_reused += reused.len();
        sequence.blocks_allocated += total;
        if sequence.times.scheduled.is_none() {
            sequence.cached_tokens = sequence.computed;
            plan.cached_tokens += sequence.computed;
            sequence.times.scheduled = Some(now);
            plan.started.push(sequence.id);
        }
        sequence.blocks = reused;
        sequence.blocks.extend(fresh);
        self.join(sequence, plan, writable);
        Entry::Entered
    }

    /// Gives a sequence that has blocks its place in the batch, by age, and its part of this step.
    fn join(&mut self, sequence: Sequence, plan: &mut Plan, writable: Writable<'_>) {
        let index = self.running.partition_point(|other| other.id < sequence.id);
        self.running.insert(index, sequence);
        for span in &mut plan.spans {
            span.index += usize::from(span.index >= index);
        }
        let rows = self.prefill_rows(plan, index);
        let sequence = &self.running[index];
        let held = sequence.blocks.len() * self.pool.tokens_per_block();
        // Fetched KV has no block for the first token yet; if there is none, the next step sees to it.
        let has_room = sequence.computed + rows <= held || self.grow_freely(index, rows, writable);
        if rows > 0 && has_room {
            plan.spans.push(PlannedSpan {
                index,
                rows,
                decode: self.running[index].is_decoding(),
            });
        }
    }

    /// Gets blocks for the next rows without taking anybody's.
    fn grow_freely(&mut self, index: usize, rows: usize, writable: Writable<'_>) -> bool {
        let sequence = &mut self.running[index];
        let needed = self.pool.blocks_for(sequence.computed + rows);
        let missing = needed.saturating_sub(sequence.blocks.len());
        let Some(blocks) = self.pool.allocate(missing, writable) else {
            return false;
        };
        sequence.blocks_allocated += blocks.len();
        sequence.blocks.extend(blocks);
        true
    }

    /// Takes blocks for a waiting sequence's KV and plans its fetch.
    fn start_fetch(
        &mut self,
        index: usize,
        plan: &mut Plan,
        writable: Writable<'_>,
        now: Instant,
    ) -> Entry {
        if self.fetching_count() >= self.limits.batch_size {
            return Entry::NoPlace;
        }
        let reserve = self.growth_reserve();
        let sequence = &self.waiting[index];
        let grown = sequence.prompt_len + sequence.forced.len() + 1;
        let room = self.pool.blocks_for(grown) + reserve;
        // What is here already is not fetched. Where the prompt is computed once more, all of it is written.
        let reused = if sequence.prompt_logprobs.is_some() {
            Vec::new()
        } else {
            self.pool
                .match_prefix(sequence.salt.as_ref(), sequence.prompt())
        };
        let total = self.pool.blocks_for(sequence.prompt_len);
        let fits = room <= reused.len() + self.pool.available();
        let fresh = total - reused.len();
        let Some(fresh) = fits.then(|| self.pool.allocate(fresh, writable)).flatten() else {
            self.pool.release(&reused);
            return Entry::NoMemory;
        };
        let Some(mut sequence) = self.waiting.remove(index) else {
            return Entry::NoPlace;
        };
        self.pool.lend(&fresh);
        self.pool.count_reuse(
            sequence.prompt_len.saturating_sub(1) / self.pool.tokens_per_block(),
            reused.len(),
        );
        sequence.computed = reused.len() * self.pool.tokens_per_block();
        sequence.cached_blocks = reused.len();
        sequence.cached_tokens = sequence.computed;
        plan.cached_tokens += sequence.computed;
        sequence.blocks_reused += reused.len();
        sequence.blocks_allocated += total;
        sequence.blocks = reused;
        sequence.blocks.extend(fresh);
        sequence.times.scheduled = Some(now);
        plan.started.push(sequence.id);
        plan.fetches.push(sequence.id);
        self.fetching.insert(sequence.id, sequence);
        Entry::Entered
    }

    /// Blocks to leave for those who are there.
    fn growth_reserve(&self) -> usize {
        self.running.len() + self.fetching_count()
    }
}

//! Hand-off while the prompt is still being read: leases that grow with it, and fetches for requests that are still to come.
//!
//! Context side: after each step the blocks that are full go under the request's lease, whose ticket its client hears of with
//! the first of them. Generation side: a prefetch takes blocks and fetches as any request does; the generation-only request
//! that comes with the same ticket takes it over. Both save time and nothing depends on either: a lease that has
//! ended meanwhile is replaced at the prompt's end, and a prefetch that fails leaves the fetch to its request.

use std::time::Instant;

use crate::backend::BlockId;
use crate::handoff::RankOrder;
use crate::request::{Event, FinishReason, RequestCosts};
use crate::sequence::{Role, Sequence};

use super::core::Core;

impl Core {
    /// Puts what is read of a prompt under its lease, as far as its blocks are full.
    pub(super) fn offer_progress(&mut self, index: usize, up_to: usize) {
        let full = up_to / self.scheduler.pool.tokens_per_block();
        let sequence = self.scheduler.running_mut(index);
        let Role::Context { early, .. } = &mut sequence.role else {
            return;
        };
        // One ticket goes out; if its lease ends before the prompt does, the next is the last.
        let may_open = full > 0 && std::mem::replace(early, *early && full == 0);
        let (id, token_count) = (sequence.id, sequence.prompt_len);
        let blocks = sequence.blocks[..full].to_vec();
        if let Some(open) = self.leases.of(id) {
            self.extend_lease(open, &blocks);
        } else if may_open {
            match self.open_lease(id, token_count, blocks) {
                Ok(opened) => self.announce(index, opened),
                Err(error) => {
                    tracing::debug!(request_id = id.0, %error, "kv is not offered before the prompt's end");
                }
            }
        }
    }

    /// Tells the client of a lease that grows. One who reads no more is found out with the next token.
    fn announce(&mut self, index: usize, ctx_request_id: u64) {
        self.stats.handoffs_opened_early_total += 1;
        let sequence = self.scheduler.running(index);
        let ticket = self.ticket(ctx_request_id, sequence, None);
        if let Some(client) = self.clients.get(&sequence.id) {
            client.send(Event::LeaseOpened(ticket));
        }
    }

    /// Adds those of a prompt's blocks to its lease that it lacks. False when it has others, because the prompt was
    /// pre-empted and read again: then it is given up.
    pub(super) fn extend_lease(&mut self, ctx_request_id: u64, blocks: &[BlockId]) -> bool {
        let lease = self.leases.get(ctx_request_id);
        let Some(more) = lease.and_then(|lease| blocks.strip_prefix(&lease.blocks[..])) else {
            self.withdraw(ctx_request_id);
            return false;
        };
        if more.is_empty() {
            return true;
        }
        let blocks = more.to_vec();
        let pages = self.shared_pages(&blocks);
        let (Some(handoff), Ok(pages)) = (&mut self.handoff, pages) else {
            self.withdraw(ctx_request_id);
            return false;
        };
        handoff.extend(ctx_request_id, pages);
        self.scheduler.pool.share(&blocks);
        if let Some(lease) = self.leases.get_mut(ctx_request_id) {
            lease.blocks.extend_from_slice(&blocks);
        }
        self.tell_ranks(&RankOrder::Extend {
            ctx_request_id,
            blocks,
        });
        true
    }

    /// Has a request take over what is being fetched for it already. It comes back when nothing is.
    pub(super) fn take_over(&mut self, sequence: Sequence) -> Option<Sequence> {
        let Some(prefetch) = self.scheduler.prefetch_for(&sequence) else {
            return Some(sequence);
        };
        let (id, now) = (sequence.id, Instant::now());
        let left = self.scheduler.take_over(prefetch, sequence, now);
        if left.is_some() {
            // It waits for blocks, as this one will.
            self.scheduler.remove(prefetch);
        } else if let Some(client) = self.clients.get_mut(&id) {
            client.place = None;
        }
        if let Some(client) = self.clients.remove(&prefetch) {
            client.send(Event::Finished {
                reason: FinishReason::NotFinished,
                costs: RequestCosts::default(),
                ticket: None,
            });
        }
        let taken = self.scheduler.fetching_mut(id);
        if let Some(stats) = taken.and_then(|sequence| sequence.handoff.take()) {
            self.fetched(id, stats);
        }
        left
    }
}

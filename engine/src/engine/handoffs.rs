//! The engine's half of the hand-off: pinning and offering, lending and fetching, and what follows when either ends.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

use crate::backend::{BackendError, BlockId};
use crate::handoff::{
    BlockPages, Fetch, HandoffError, HandoffEvent, HandoffStats, HandoffTicket, LeaseEnd, Offer,
    RankOrder, RanksEvent,
};
use crate::page::Page;
use crate::request::{FinishReason, RequestFailure, RequestId, TokenLogprobs};
use crate::sequence::{Role, Sequence};

use super::clients::Publisher;
use super::core::Core;
use super::leases::Lease;

impl Core {
    /// What the transceiver reports.
    pub(super) fn handoff_event(&mut self, event: HandoffEvent) {
        match event {
            HandoffEvent::LeaseEnded {
                ctx_request_id,
                end,
            } => self.lease_ended(ctx_request_id, end),
            HandoffEvent::FetchEnded { request, outcome } => {
                let Some(id) = self.scheduler.fetched_for(request) else {
                    return;
                };
                match outcome {
                    Ok(stats) => self.fetched(id, stats),
                    Err(error) => self.fetch_failed(id, &error),
                }
            }
            HandoffEvent::PagesReturned { pages } => self.pages_returned(pages),
            HandoffEvent::Ranks(event) => self.ranks_event(event),
        }
    }

    /// What the ranks have to do together.
    fn ranks_event(&mut self, event: RanksEvent) {
        match event {
            RanksEvent::LeaseUnwanted { ctx_request_id } => self.withdraw(ctx_request_id),
            RanksEvent::FetchDoomed { request } => self.cancel_fetch(request),
            RanksEvent::Lost { rank, reason } => {
                let rank = format!("kv transceiver of rank {rank}");
                self.broken
                    .get_or_insert(BackendError::Rank { rank, reason });
            }
        }
    }

    /// Tells the ranks that follow. If that fails, there will be no other step.
    pub(super) fn tell_ranks(&mut self, order: &RankOrder) {
        if let Err(error) = self.model.hand_off(order) {
            self.broken.get_or_insert(error);
        }
    }

    /// Gives a fetch up, by its own number, on every rank; `FetchEnded` comes later.
    pub(super) fn cancel_fetch(&mut self, fetch: RequestId) {
        if let Some(handoff) = &mut self.handoff {
            handoff.cancel_fetch(fetch);
            self.tell_ranks(&RankOrder::CancelFetch(fetch));
        }
    }

    /// Has every rank connect to a context instance.
    pub(super) fn meet(&mut self, state: Vec<u8>, met: oneshot::Sender<Result<(), HandoffError>>) {
        let fits = match &mut self.handoff {
            Some(handoff) => handoff.meet(&state),
            None => Err(HandoffError::Refused("there is no transceiver".to_owned())),
        };
        if fits.is_ok() {
            self.tell_ranks(&RankOrder::Meet(state));
        }
        // Whoever asked may have gone.
        drop(met.send(fits));
    }

    /// Whether a request's ticket fits this instance and this prompt, where there is one.
    pub(super) fn check_ticket(&self, sequence: &Sequence) -> Result<(), RequestFailure> {
        let (Some(ticket), Some(handoff)) = (sequence.ticket(), &self.handoff) else {
            return Ok(());
        };
        let held = handoff.check(ticket).map_err(|error| refusal(&error))?;
        if held != sequence.prompt_len {
            return Err(RequestFailure::Unservable(format!(
                "the hand-off holds kv of {held} tokens, but the prompt has {}",
                sequence.prompt_len
            )));
        }
        Ok(())
    }

    /// Gives a lease up before its time; `LeaseEnded` comes later and frees it.
    pub(super) fn withdraw(&mut self, ctx_request_id: u64) {
        if let Some(handoff) = &mut self.handoff {
            handoff.withdraw(ctx_request_id);
            self.tell_ranks(&RankOrder::Withdraw(ctx_request_id));
        }
    }

    /// Ends the lease that a request's prompt is under, if there is one.
    pub(super) fn withdraw_of(&mut self, request: RequestId) {
        if let Some(ctx_request_id) = self.leases.of(request) {
            self.withdraw(ctx_request_id);
        }
    }

    /// Puts the first blocks of a request's prompt of so many tokens under a lease.
    pub(super) fn open_lease(
        &mut self,
        request: RequestId,
        token_count: usize,
        blocks: Vec<BlockId>,
    ) -> Result<u64, HandoffError> {
        let pages = self.shared_pages(&blocks)?;
        let Some(handoff) = &mut self.handoff else {
            return Err(HandoffError::Refused("there is no transceiver".to_owned()));
        };
        let ctx_request_id = self.leases.next_id();
        let opaque_state = handoff.offer(Offer {
            ctx_request_id,
            token_count,
            pages,
        })?;
        let order = RankOrder::Offer {
            ctx_request_id,
            token_count,
            blocks: blocks.clone(),
            state: opaque_state.clone(),
        };
        let told = self.model.hand_off(&order);
        told.map_err(|error| self.ends_here(error))?;
        self.scheduler.pool.share(&blocks);
        self.stats.handoffs_offered_total += 1;
        let lease = Lease {
            request,
            blocks,
            opaque_state,
        };
        self.leases.insert(ctx_request_id, lease);
        Ok(ctx_request_id)
    }

    /// The pages of blocks, for others to read.
    pub(super) fn shared_pages(
        &mut self,
        blocks: &[BlockId],
    ) -> Result<Vec<Arc<Page>>, HandoffError> {
        let pages = self.model.share_pages(blocks);
        pages.map_err(|error| self.ends_here(error))
    }

    /// Notes a failure of the device or of a rank: there will be no other step.
    fn ends_here(&mut self, error: BackendError) -> HandoffError {
        let reason = HandoffError::Transport(error.to_string());
        self.broken.get_or_insert(error);
        reason
    }

    /// The ticket of a lease, with what the context phase has chosen.
    pub(super) fn ticket(
        &self,
        ctx_request_id: u64,
        sequence: &Sequence,
        logprobs: Option<TokenLogprobs>,
    ) -> HandoffTicket {
        let lease = self.leases.get(ctx_request_id);
        HandoffTicket {
            ctx_request_id,
            disagg_request_id: match sequence.role {
                Role::Context {
                    disagg_request_id, ..
                } => disagg_request_id,
                Role::Aggregated | Role::Generation { .. } | Role::Prefetch { .. } => None,
            },
            opaque_state: lease.map_or_else(Vec::new, |lease| lease.opaque_state.clone()),
            first_tokens: sequence.answer().to_vec(),
            first_logprobs: logprobs
                .map(|logprobs| [vec![logprobs.chosen], logprobs.top].concat())
                .into_iter()
                .collect(),
        }
    }

    /// Ends a context-only request: its blocks go under a lease.
    pub(super) fn offer(&mut self, id: RequestId, logprobs: Option<TokenLogprobs>) {
        let Some(sequence) = self.scheduler.take(id) else {
            return;
        };
        let leased = match self.leases.of(id) {
            Some(open) if self.extend_lease(open, &sequence.blocks) => Ok(open),
            _ => self.open_lease(id, sequence.prompt_len, sequence.blocks.clone()),
        };
        // The lease holds them by itself.
        self.scheduler.pool.release(&sequence.blocks);
        let ctx_request_id = match leased {
            Ok(ctx_request_id) => ctx_request_id,
            Err(error) => {
                self.stats.handoffs_failed_total += 1;
                self.fail(id, RequestFailure::Handoff(error.to_string()));
                return;
            }
        };
        let ticket = self.ticket(ctx_request_id, &sequence, logprobs);
        self.finish(&sequence, FinishReason::NotFinished, Some(ticket));
    }

    /// Lends a sequence's pages to the transceiver, to be filled.
    pub(super) fn begin_fetch(&mut self, id: RequestId) {
        let (Some(sequence), Some(handoff)) = (self.scheduler.fetching_mut(id), &mut self.handoff)
        else {
            return;
        };
        let Some(ticket) = sequence.take_ticket() else {
            return;
        };
        // The leading blocks were found in the prefix cache.
        let missing = sequence.blocks[sequence.cached_blocks..].to_vec();
        let (token_count, first_token) = (sequence.prompt_len, sequence.computed);
        let order = RankOrder::Fetch {
            request: id,
            ctx_request_id: ticket.ctx_request_id,
            state: ticket.opaque_state.clone(),
            token_count,
            first_token,
            blocks: missing.clone(),
        };
        let pages = missing.into_iter();
        handoff.fetch(Fetch {
            request: id,
            ticket,
            token_count,
            first_token,
            pages: pages
                .map(|block| (block, self.model.lend_page(block)))
                .collect(),
        });
        self.tell_ranks(&order);
    }

    fn lease_ended(&mut self, ctx_request_id: u64, end: LeaseEnd) {
        let Some(lease) = self.leases.remove(ctx_request_id) else {
            tracing::warn!(ctx_request_id, "a lease that is not held has ended");
            return;
        };
        self.scheduler.pool.unpin(&lease.blocks);
        match end {
            LeaseEnd::Delivered => self.stats.handoffs_delivered_total += 1,
            LeaseEnd::Expired => self.stats.handoffs_expired_total += 1,
            LeaseEnd::Cancelled => self.stats.handoffs_cancelled_total += 1,
        }
    }

    fn pages_returned(&mut self, pages: BlockPages) {
        let lent = pages.into_iter().filter(|&(block, _)| {
            let lent = self.scheduler.pool.is_lent(block);
            if !lent {
                tracing::error!(block, "a page came back that was not lent");
            }
            lent
        });
        let pages: Vec<_> = lent.collect();
        let blocks: Vec<BlockId> = pages.iter().map(|&(block, _)| block).collect();
        if let Err(error) = self.model.return_pages(pages) {
            // The engine ends before it uses any of them.
            self.broken.get_or_insert(error);
        }
        for block in blocks {
            self.scheduler.pool.page_back(block);
        }
    }

    /// The KV is here: the prompt counts as computed.
    pub(super) fn fetched(&mut self, id: RequestId, stats: HandoffStats) {
        let Some(sequence) = self.scheduler.fetching_mut(id) else {
            return;
        };
        let blocks = sequence.blocks.clone();
        if blocks
            .iter()
            .any(|&block| self.scheduler.pool.is_lent(block))
        {
            let error = HandoffError::Transport("the fetch ended before its pages".to_owned());
            self.fetch_failed(id, &error);
            return;
        }
        let Some(sequence) = self.scheduler.fetching_mut(id) else {
            return;
        };
        let bytes = stats.bytes;
        sequence.handoff = Some(stats);
        if sequence.is_prefetch() {
            // It waits for the request that it was for.
            return;
        }
        let prefetched = sequence.fetch != sequence.id;
        self.stats.handoffs_fetched_total += 1;
        self.stats.handoffs_prefetched_total += u64::from(prefetched);
        self.stats.handoffs_fetched_bytes_total += bytes;
        if sequence.prompt_logprobs.is_none() {
            sequence.computed = sequence.prompt_len;
            self.scheduler.cache_fetched(id);
            if !self.publish_forced(id) {
                return;
            }
        }
        // Else the prompt is computed once more over the same blocks, because its logits do not travel.
        self.scheduler.fetched(id);
    }

    /// The KV will not come: the prompt is read again, with the tokens that the context server chose.
    fn fetch_failed(&mut self, id: RequestId, error: &HandoffError) {
        let Some(sequence) = self.scheduler.fetching_mut(id) else {
            return;
        };
        if sequence.is_prefetch() {
            tracing::debug!(request_id = id.0, %error, "kv that is still being written could not be fetched");
            self.fail(id, refusal(error));
            return;
        }
        self.stats.handoffs_failed_total += 1;
        match error {
            HandoffError::Layout(_) | HandoffError::State(_) | HandoffError::Cancelled => {
                self.fail(id, refusal(error));
                return;
            }
            HandoffError::Refused(_)
            | HandoffError::Checksum(_)
            | HandoffError::Transport(_)
            | HandoffError::TimedOut(_) => {}
        }
        tracing::warn!(request_id = id.0, %error, "kv hand-off failed, reading the prompt again");
        sequence.prefilled_again = true;
        let publish_now = sequence.prompt_logprobs.is_none();
        self.stats.handoffs_prefilled_again_total += 1;
        if !publish_now || self.publish_forced(id) {
            self.scheduler.fetch_failed(id);
        }
    }

    /// Publishes the context server's tokens. False when the request ended with them.
    fn publish_forced(&mut self, id: RequestId) -> bool {
        let (Some(sequence), Some(client)) =
            (self.scheduler.fetching_mut(id), self.clients.get(&id))
        else {
            return false;
        };
        let mut publisher = Publisher {
            client,
            stats: &mut self.stats,
            eos: &self.config.eos_token_ids,
            now: Instant::now(),
        };
        match publisher.forced(sequence) {
            Some(end) => {
                self.end(id, end);
                false
            }
            None => true,
        }
    }
}

/// A hand-off error that reading the prompt again does not mend.
fn refusal(error: &HandoffError) -> RequestFailure {
    match error {
        HandoffError::Layout(_) | HandoffError::State(_) => {
            RequestFailure::Unservable(error.to_string())
        }
        HandoffError::Refused(_)
        | HandoffError::Checksum(_)
        | HandoffError::Transport(_)
        | HandoffError::TimedOut(_)
        | HandoffError::Cancelled => RequestFailure::Handoff(error.to_string()),
    }
}

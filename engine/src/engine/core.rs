//! The engine's state and what commands do to it. No thread and no waiting, so that tests drive it step by step.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crate::backend::BackendError;
use crate::blocks::BlockPool;
use crate::handoff::{Handoff, HandoffTicket};
use crate::metrics::EngineStats;
use crate::model::Model;
use crate::request::{Event, FinishReason, RequestFailure, RequestId, RequestKind};
use crate::sampler::Sampler;
use crate::scheduler::{Limits, Scheduler};
use crate::sequence::Sequence;
use crate::wishes::Wishes;

use super::EngineConfig;
use super::clients::{Client, End, Publisher};
use super::flight::Flight;
use super::handle::Shared;
use super::inbox::Submission;
use super::leases::Leases;

/// Everything the engine thread owns.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) model: Box<dyn Model>,
    pub(super) handoff: Option<Box<dyn Handoff>>,
    pub(super) config: EngineConfig,
    pub(super) scheduler: Scheduler,
    pub(super) sampler: Sampler,
    pub(super) wishes: Wishes,
    pub(super) clients: HashMap<RequestId, Client>,
    pub(super) leases: Leases,
    pub(super) stats: EngineStats,
    pub(super) shared: Arc<Shared>,
    /// The step whose results have not been taken over.
    pub(super) flight: Option<Flight>,
    /// When the last one's were.
    pub(super) landed: Instant,
    /// What failed between two steps, so that there will be no other.
    pub(super) broken: Option<BackendError>,
    /// Longest prompt and answer together.
    pub(super) max_len: usize,
}

impl Core {
    pub(super) fn new(
        model: Box<dyn Model>,
        handoff: Option<Box<dyn Handoff>>,
        config: EngineConfig,
        shared: Arc<Shared>,
    ) -> Self {
        let limits = Limits {
            batch_size: config.max_batch_size,
            tokens: config.max_num_tokens,
            prefill_alone: config.prefill_tokens_alone,
            prefill_beside_decode: config.prefill_tokens_beside_decode,
            chunked_prefill: config.enable_chunked_prefill,
        };
        let pool = BlockPool::new(
            config.block_count,
            config.tokens_per_block,
            config.enable_block_reuse,
            config.event_buffer_max_size > 0,
        );
        let wishes = Wishes::new(
            model.runs_by_itself(),
            model.shape().vocab,
            &config.eos_token_ids,
            config.max_batch_size,
        );
        let mut core = Self {
            wishes,
            model,
            handoff,
            config,
            scheduler: Scheduler::new(limits, pool),
            sampler: Sampler::default(),
            clients: HashMap::new(),
            leases: Leases::new(),
            stats: EngineStats::default(),
            flight: None,
            landed: Instant::now(),
            broken: None,
            max_len: shared.limits().max_seq_len,
            shared,
        };
        core.publish_stats();
        core
    }

    /// Whether nothing is held for anybody.
    pub(super) fn is_idle(&self) -> bool {
        self.scheduler.is_empty() && self.leases.len() == 0 && self.flight.is_none()
    }

    /// Takes a request over.
    pub(super) fn submit(&mut self, submission: Submission) {
        let Submission {
            id,
            request,
            events,
            place,
            submitted,
        } = submission;
        let is_prefetch = matches!(request.kind, RequestKind::Prefetch(_));
        if !is_prefetch {
            self.stats.requests_total += 1;
            self.stats.prompt_tokens_total += request.prompt.len() as u64;
        }
        let client = Client {
            events,
            place: Some(place),
            is_prefetch,
        };
        self.clients.insert(id, client);
        let mut sequence = Sequence::new(id, request, self.max_len, submitted);
        if sequence.needs_fetch() && sequence.forced_complete(&self.config.eos_token_ids) {
            // The context server wrote the whole answer; at most the prompt's log-probabilities are to be computed.
            sequence.skip_fetch();
            if sequence.prompt_logprobs.is_none() {
                self.answer_at_once(sequence);
                return;
            }
        }
        if let Err(failure) = self.check_ticket(&sequence) {
            self.stats.handoffs_failed_total += u64::from(!is_prefetch);
            self.fail(id, failure);
            return;
        }
        if let Some(sequence) = self.take_over(sequence) {
            self.scheduler.enqueue(sequence);
        }
    }

    /// Gives a request up, in whatever state it is.
    pub(super) fn cancel(&mut self, id: RequestId) {
        if let Some((sequence, was_fetching)) = self.scheduler.remove(id) {
            if was_fetching {
                self.cancel_fetch(sequence.fetch);
            }
            self.finish(&sequence, FinishReason::Cancelled, None);
        }
        self.withdraw_of(id);
    }

    /// Fails those who have not begun; the others may finish.
    pub(super) fn begin_drain(&mut self) {
        self.shared.stop_accepting();
        let queued: Vec<RequestId> = self
            .clients
            .iter()
            .filter(|(_, client)| client.place.is_some() || client.is_prefetch)
            .map(|(&id, _)| id)
            .collect();
        for id in queued {
            self.fail(id, RequestFailure::ShuttingDown);
        }
    }

    /// Fails everybody and gives up every lease.
    pub(super) fn abort(&mut self, failure: &RequestFailure) {
        self.give_up_flight();
        for id in self.scheduler.ids() {
            self.fail(id, failure.clone());
        }
        for id in self.clients.keys().copied().collect::<Vec<_>>() {
            self.fail(id, failure.clone());
        }
        for ctx_request_id in self.leases.ids() {
            self.withdraw(ctx_request_id);
        }
    }

    /// Fails everybody without touching model, pool or transceiver: after a panic their state is not known.
    pub(super) fn fail_clients(&mut self, failure: &RequestFailure) {
        self.stats.requests_failed_total += self.clients.len() as u64;
        self.shared.set_stats(&self.stats);
        for (_, client) in self.clients.drain() {
            client.send(Event::Failed(failure.clone()));
        }
    }

    /// Ends a request as a step decided.
    pub(super) fn end(&mut self, id: RequestId, end: End) {
        match end {
            End::Finished(reason) => {
                if let Some((sequence, _)) = self.scheduler.remove(id) {
                    self.finish(&sequence, reason, None);
                }
                self.withdraw_of(id);
            }
            End::HandOff(logprobs) => self.offer(id, logprobs),
            End::Failed(failure) => self.fail(id, failure),
            End::Gone => self.cancel(id),
        }
    }

    /// Tells the client that the answer is complete. What the request held has been given back.
    pub(super) fn finish(
        &mut self,
        sequence: &Sequence,
        reason: FinishReason,
        ticket: Option<HandoffTicket>,
    ) {
        match reason {
            _ if sequence.is_prefetch() => {}
            FinishReason::Cancelled => self.stats.requests_cancelled_total += 1,
            FinishReason::Eos
            | FinishReason::StopToken(_)
            | FinishReason::Length
            | FinishReason::NotFinished => self.stats.requests_finished_total += 1,
        }
        self.wishes.forget(sequence.id);
        self.publish_stats();
        let Some(client) = self.clients.remove(&sequence.id) else {
            return;
        };
        let leased = ticket.as_ref().map(|ticket| ticket.ctx_request_id);
        let costs = sequence.costs();
        let heard = client.send(Event::Finished {
            reason,
            costs,
            ticket,
        });
        if let Some(ctx_request_id) = leased.filter(|_| !heard) {
            self.withdraw(ctx_request_id);
        }
    }

    /// Frees what a request held and tells the client why.
    pub(super) fn fail(&mut self, id: RequestId, failure: RequestFailure) {
        if let Some((sequence, true)) = self.scheduler.remove(id) {
            self.cancel_fetch(sequence.fetch);
        }
        self.withdraw_of(id);
        self.wishes.forget(id);
        let client = self.clients.remove(&id);
        let is_request = client.as_ref().is_none_or(|client| !client.is_prefetch);
        self.stats.requests_failed_total += u64::from(is_request);
        self.publish_stats();
        if let Some(client) = client {
            client.send(Event::Failed(failure));
        }
    }

    /// Brings the snapshot up to date.
    pub(super) fn publish_stats(&mut self) {
        let counts = self.scheduler.pool.counts();
        let stats = &mut self.stats;
        stats.requests_waiting = self.scheduler.waiting_count();
        stats.requests_running = self.scheduler.running_count();
        stats.requests_fetching = self.scheduler.fetching_count();
        stats.blocks_total = counts.total;
        stats.blocks_free = counts.free;
        stats.blocks_used = counts.used;
        stats.blocks_cached = counts.cached;
        stats.blocks_pinned = counts.pinned;
        stats.blocks_lent = counts.lent;
        stats.blocks_quarantined = counts.quarantined;
        stats.leases = self.leases.len();
        self.shared.set_stats(stats);
        self.shared
            .push_kv_events(self.scheduler.pool.take_events());
    }

    /// When nothing runs, every used block must be under a lease; anything else is a leak of ours.
    pub(super) fn check_books(&self) {
        let counts = self.scheduler.pool.counts();
        let filed = counts.free + counts.used + counts.cached + counts.quarantined;
        let balanced = counts.total == filed
            && (!self.scheduler.is_empty() || counts.used == counts.pinned && counts.lent == 0);
        if !balanced {
            tracing::error!(?counts, "kv blocks leaked");
        }
        assert!(balanced || !cfg!(test), "kv blocks leaked: {counts:?}");
    }

    /// Publishes an answer that came whole.
    fn answer_at_once(&mut self, mut sequence: Sequence) {
        let Some(client) = self.clients.get(&sequence.id) else {
            return;
        };
        let now = Instant::now();
        sequence.times.scheduled = Some(now);
        let mut publisher = Publisher {
            client,
            stats: &mut self.stats,
            eos: &self.config.eos_token_ids,
            now,
        };
        let reason = match publisher.forced(&mut sequence) {
            Some(End::Finished(reason)) => reason,
            _ => FinishReason::Cancelled,
        };
        self.finish(&sequence, reason, None);
    }
}

//! One turn of the loop: schedule → run → sample → publish; where steps overlap, the next one is scheduled and begun before
//! this one's results are read.

use std::time::{Duration, Instant};

use crate::backend::BackendError;
use crate::metrics::{InflightBatchingStats, IterationStats, KvCacheStats};
use crate::model::{Logits, Outcome};
use crate::request::{RequestFailure, RequestId};
use crate::sampler::{SampleError, SampleInput, Sampled, prompt_logprobs};
use crate::scheduler::Plan;
use crate::sequence::Sequence;

use super::clients::{End, Publisher};
use super::core::Core;
use super::flight::{Flight, Part};

impl Core {
    /// Does what there is to do. False when nothing could be done: then only a command changes that.
    pub(super) fn step(&mut self) -> Result<bool, BackendError> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        let overtaken = self.flight.as_ref().is_none_or(Flight::may_be_overtaken);
        let mut progress = !overtaken && self.land()?;
        let (flight, planned) = self.take_off()?;
        progress |= self.land()?;
        self.flight = flight;
        if !self.config.overlap {
            self.land()?;
        }
        Ok(progress || planned)
    }

    /// Takes the step's results over. Returns how many requests ended.
    pub(super) fn settle_all(&mut self, parts: &[Part], logits: &Logits) -> usize {
        let mut ends = Vec::new();
        let mut outcomes = logits.outcomes();
        for part in parts {
            if let Some(end) = self.settle(part, &mut outcomes) {
                ends.push((part.id, end));
            }
        }
        let count = ends.len();
        for (id, end) in ends {
            self.end(id, end);
        }
        count
    }

    /// Takes one sequence's results over, which come next.
    fn settle<'a>(
        &mut self,
        part: &Part,
        outcomes: &mut impl Iterator<Item = Outcome<'a>>,
    ) -> Option<End> {
        let Some(index) = self.scheduler.index_of(part.id) else {
            // It ended meanwhile.
            outcomes.take(part.positions.count()).for_each(drop);
            return None;
        };
        self.scheduler.computed(index, part.end);
        let sequence = self.scheduler.running_mut(index);
        let mut next = || outcomes.next().expect("the model gives every row");
        let mut broken = None;
        for position in part.positions.prompt.clone() {
            if let Err(error) = collect_prompt_logprobs(sequence, position, next()) {
                broken = Some(error);
            }
        }
        let last = part.positions.last.map(|_| next());
        sequence.ahead -= usize::from(last.is_some());
        if let Some(error) = broken {
            return Some(failed(sequence.id, &error));
        }
        if !part.completes {
            self.offer_progress(index, part.end);
            return None;
        }
        let client = self.clients.get(&sequence.id)?;
        let mut publisher = Publisher {
            client,
            stats: &mut self.stats,
            eos: &self.config.eos_token_ids,
            now: Instant::now(),
        };
        let values = match last {
            None => return publisher.forced(sequence),
            Some(Outcome::Chosen(token, told)) => {
                return publisher.token(sequence, token, told.cloned());
            }
            Some(Outcome::Values(values)) => values,
        };
        let sampled = self.sampler.sample(&SampleInput {
            params: &sequence.sampling,
            eos: &self.config.eos_token_ids,
            prompt: sequence.prompt(),
            answer: sequence.answer(),
            logits: values,
        });
        match sampled {
            Ok(Sampled { token, logprobs }) => publisher.token(sequence, token, logprobs),
            Err(error) => Some(failed(sequence.id, &error)),
        }
    }

    pub(super) fn record(&mut self, plan: &Plan, took: Duration, ended: usize) {
        self.stats.iterations_total += 1;
        let counts = self.scheduler.pool.counts();
        let totals = self.scheduler.pool.totals();
        let looked_for = totals.reused + totals.missed;
        let writing = plan.spans.iter().filter(|span| span.decode).count();
        let reading = plan.spans.len() - writing;
        let prompt_rows = plan.spans.iter().filter(|span| !span.decode);
        let available = self.scheduler.pool.available();
        self.shared.push_iteration(IterationStats {
            iter: self.stats.iterations_total,
            iter_latency_ms: took.as_secs_f64() * 1e3,
            num_active_requests: self.scheduler.running_count() + self.scheduler.fetching_count(),
            num_queued_requests: self.scheduler.waiting_count(),
            num_new_active_requests: plan.started.len(),
            num_completed_requests: ended,
            max_num_active_requests: self.scheduler.batch_size_max(),
            kv_cache_stats: KvCacheStats {
                max_num_blocks: counts.total,
                free_num_blocks: available,
                used_num_blocks: counts.total - available,
                tokens_per_block: self.scheduler.pool.tokens_per_block(),
                alloc_total_blocks: totals.allocated,
                alloc_new_blocks: totals.fresh,
                reused_blocks: totals.reused,
                missed_blocks: totals.missed,
                cache_hit_rate: share(totals.reused, looked_for),
            },
            inflight_batching_stats: InflightBatchingStats {
                num_scheduled_requests: plan.spans.len(),
                num_context_requests: reading,
                num_gen_requests: writing,
                num_paused_requests: plan.preempted,
                num_ctx_tokens: prompt_rows.map(|span| span.rows).sum(),
                micro_batch_id: 0,
                avg_num_decoded_tokens_per_iter: if writing > 0 { 1.0 } else { 0.0 },
            },
        });
    }
}

fn collect_prompt_logprobs(
    sequence: &mut Sequence,
    position: usize,
    outcome: Outcome<'_>,
) -> Result<(), SampleError> {
    let token = sequence.tokens[position + 1];
    if let Some(wanted) = &mut sequence.prompt_logprobs {
        wanted.collected.push(match outcome {
            Outcome::Chosen(_, told) => told.expect("it was wished").clone(),
            Outcome::Values(values) => prompt_logprobs(values, token, wanted.top)?,
        });
        wanted.count += 1;
    }
    Ok(())
}

fn failed(id: RequestId, error: &SampleError) -> End {
    tracing::error!(request_id = id.0, %error, "no token can be chosen");
    End::Failed(RequestFailure::Engine(error.to_string()))
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a ratio for people needs no more than 53 bits"
)]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

//! One turn of the loop: schedule → run → sample → publish.

use std::time::Instant;

use crate::backend::{BackendError, RowWish, SequenceSpan, StepBatch};
use crate::metrics::{InflightBatchingStats, IterationStats, KvCacheStats};
use crate::model::{Logits, Outcome};
use crate::request::{RequestFailure, RequestId};
use crate::sampler::{SampleError, SampleInput, Sampled, prompt_logprobs, wish};
use crate::scheduler::{Plan, PlannedSpan};
use crate::sequence::Sequence;

use super::clients::{End, Publisher};
use super::core::Core;

impl Core {
    /// Does what there is to do. False when nothing could be done: then only a command changes that.
    pub(super) fn step(&mut self) -> Result<bool, BackendError> {
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        let started = Instant::now();
        let model = &self.model;
        let writable = |block| model.page_is_unshared(block);
        let plan = self.scheduler.schedule(&writable, started);
        self.stats.preemptions_total += plan.preempted as u64;
        self.stats.prompt_tokens_cached_total += plan.cached_tokens as u64;
        for id in &plan.started {
            if let Some(client) = self.clients.get_mut(id) {
                client.place = None;
            }
        }
        for &id in &plan.fetches {
            self.begin_fetch(id);
        }
        if plan.spans.is_empty() {
            return Ok(!plan.fetches.is_empty() || plan.preempted > 0);
        }
        let (batch, wishes) = self.batch(&plan);
        let logits = self.model.forward_choosing(&batch, &wishes)?;
        assert_eq!(
            logits.rows(),
            batch.logit_rows.len(),
            "the model gives the rows it was asked for"
        );
        let ended = self.settle_all(&plan, &logits);
        self.record(&plan, started, ended);
        self.publish_stats();
        Ok(true)
    }

    /// What the model is to compute, and what is wanted of each row of the logits.
    fn batch(&self, plan: &Plan) -> (StepBatch, Vec<RowWish>) {
        let (mut batch, mut wishes) = (StepBatch::default(), Vec::new());
        for span in &plan.spans {
            let sequence = self.scheduler.running(span.index);
            let first = batch.tokens.len();
            let end = sequence.computed + span.rows;
            batch
                .tokens
                .extend_from_slice(&sequence.tokens[sequence.computed..end]);
            batch
                .positions
                .extend((sequence.computed..end).map(position));
            for at in sequence.logit_positions(span.rows) {
                batch.logit_rows.push(first + at - sequence.computed);
                wishes.push(if at + 1 == sequence.tokens.len() {
                    wish(&sequence.sampling, sequence.answer().len())
                } else {
                    RowWish::Logits
                });
            }
            batch.sequences.push(SequenceSpan {
                rows: first..first + span.rows,
                past_len: sequence.computed,
                blocks: sequence.blocks.clone(),
            });
        }
        (batch, wishes)
    }

    /// Takes the step's results over. Returns how many requests ended.
    fn settle_all(&mut self, plan: &Plan, logits: &Logits) -> usize {
        let mut ends = Vec::new();
        let mut outcomes = logits.outcomes();
        for &span in &plan.spans {
            if let Some(end) = self.settle(span, &mut outcomes) {
                ends.push((self.scheduler.running(span.index).id, end));
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
        span: PlannedSpan,
        outcomes: &mut impl Iterator<Item = Outcome<'a>>,
    ) -> Option<End> {
        let positions = self
            .scheduler
            .running(span.index)
            .logit_positions(span.rows);
        self.scheduler.computed(span);
        let sequence = self.scheduler.running_mut(span.index);
        let mut last = None;
        let mut broken = None;
        for position in positions {
            let outcome = outcomes.next().expect("the model gives every row");
            if position + 1 == sequence.tokens.len() {
                last = Some(outcome);
            } else if let Outcome::Values(values) = outcome
                && let Err(error) = collect_prompt_logprobs(sequence, position, values)
            {
                broken = Some(error);
            }
        }
        if let Some(error) = broken {
            return Some(failed(sequence.id, &error));
        }
        if sequence.remaining() > 0 {
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
            Some(Outcome::Chosen(token)) => return publisher.token(sequence, token, None),
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

    fn record(&mut self, plan: &Plan, started: Instant, ended: usize) {
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
            iter_latency_ms: started.elapsed().as_secs_f64() * 1e3,
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
    values: &[f32],
) -> Result<(), SampleError> {
    let token = sequence.tokens[position + 1];
    if let Some(wanted) = &mut sequence.prompt_logprobs {
        let logprobs = prompt_logprobs(values, token, wanted.top)?;
        wanted.collected.push(logprobs);
        wanted.count += 1;
    }
    Ok(())
}

fn failed(id: RequestId, error: &SampleError) -> End {
    tracing::error!(request_id = id.0, %error, "no token can be chosen");
    End::Failed(RequestFailure::Engine(error.to_string()))
}

fn position(index: usize) -> u32 {
    u32::try_from(index).expect("sequences are shorter than 2^32 tokens")
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

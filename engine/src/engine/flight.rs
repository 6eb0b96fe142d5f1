//! A step on its way: what was asked of the model, and what to do with what it gives.
//!
//! A model that runs by itself is given the next step before the results of this one are read. Tokens that it chooses stay on
//! the device and are named by their row (`carried`); whatever ends an answer shows one step later, and what the next step
//! computed for it is dropped. With a model that is done at once the same happens in the same order, so that tokens are
//! the same; then the host chooses early what it would choose anyway. No step is overtaken whose results the host needs
//! to go on: logits that the device cannot choose by (`wishes.rs`), or blocks of which there are too few.

use std::time::Instant;

use crate::backend::{BackendError, Carried, RowWish, SequenceSpan, StepBatch, TokenId};
use crate::model::{Logits, Outcome};
use crate::request::RequestId;
use crate::sampler::choose;
use crate::scheduler::Plan;
use crate::sequence::LogitPositions;

use super::core::Core;

/// A step that has begun and whose results have not been taken over.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) plan: Plan,
    /// For each of the plan's spans.
    pub(super) parts: Vec<Part>,
    pub(super) wishes: Vec<RowWish>,
    pub(super) started: Instant,
    /// What it gave, where the model was done at once.
    pub(super) done: Option<Logits>,
}

/// One sequence's part of it.
#[derive(Debug)]
pub(super) struct Part {
    /// The batch may have other indices by the time that the step ends.
    pub(super) id: RequestId,
    pub(super) positions: LogitPositions,
    /// Position behind its last row.
    pub(super) end: usize,
    /// Whether that is all there was to compute.
    pub(super) completes: bool,
}

impl Flight {
    /// Whether the next step can be planned without this one's results.
    pub(super) fn may_be_overtaken(&self) -> bool {
        !self.plan.is_short && self.wishes.iter().all(|wish| *wish != RowWish::Logits)
    }

    /// The token of one of its rows of logits, where those are here.
    fn tokens(&self) -> Option<Vec<TokenId>> {
        let logits = self.done.as_ref()?;
        let chosen = logits.outcomes().zip(&self.wishes);
        let token = |(outcome, wish): (Outcome<'_>, &RowWish)| match outcome {
            Outcome::Chosen(token, _) => token,
            // What is not finite fails its request when the results are taken over.
            Outcome::Values(values) => choose(values, wish).unwrap_or(0),
        };
        Some(chosen.map(token).collect())
    }
}

/// What the model is to compute.
#[derive(Debug, Default)]
pub(super) struct Task {
    pub(super) batch: StepBatch,
    /// For each row of the logits.
    pub(super) wishes: Vec<RowWish>,
    pub(super) carried: Vec<Carried>,
    pub(super) parts: Vec<Part>,
}

impl Core {
    /// Plans a step and has the model begin it. The second says whether anything was done.
    pub(super) fn take_off(&mut self) -> Result<(Option<Flight>, bool), BackendError> {
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
            return Ok((None, !plan.fetches.is_empty() || plan.preempted > 0));
        }
        let mut task = self.task(&plan);
        if let Some(tokens) = self.flight.as_ref().and_then(Flight::tokens) {
            for Carried { row, from } in task.carried.drain(..) {
                task.batch.tokens[row] = tokens[from];
            }
        }
        let done = self.model.begin(&task.batch, &task.wishes, &task.carried)?;
        self.scheduler.pool.begin_step();
        let mut row = 0;
        for (&span, part) in plan.spans.iter().zip(&task.parts) {
            row += part.positions.count();
            self.scheduler
                .begun(span, part.positions.last.map(|_| row - 1));
        }
        let flight = Flight {
            plan,
            parts: task.parts,
            wishes: task.wishes,
            started,
            done,
        };
        Ok((Some(flight), true))
    }

    /// Takes the results of the step that is under way over. False when there is none.
    pub(super) fn land(&mut self) -> Result<bool, BackendError> {
        let Some(mut flight) = self.flight.take() else {
            return Ok(false);
        };
        let logits = match flight.done.take() {
            Some(logits) => logits,
            None => self.model.finish()?,
        };
        assert_eq!(
            logits.rows(),
            flight.wishes.len(),
            "the model gives the rows it was asked for"
        );
        self.scheduler.pool.end_step();
        let ended = self.settle_all(&flight.parts, &logits);
        // It may have waited for the one before.
        let started = flight.started.max(self.landed);
        self.landed = Instant::now();
        self.record(&flight.plan, self.landed - started, ended);
        self.publish_stats();
        Ok(true)
    }

    /// Waits for the step that is under way, and drops what it gives: nobody is left who wants it.
    pub(super) fn give_up_flight(&mut self) {
        let Some(flight) = self.flight.take() else {
            return;
        };
        if flight.done.is_none()
            && let Err(error) = self.model.finish()
        {
            tracing::debug!(%error, "a step that nobody waits for failed");
        }
        self.scheduler.pool.end_step();
    }

    /// What the model is to compute, and what is wanted of it.
    fn task(&mut self, plan: &Plan) -> Task {
        let mut task = Task::default();
        self.wishes.next_step();
        for span in &plan.spans {
            let sequence = self.scheduler.running(span.index);
            let batch = &mut task.batch;
            let first = batch.tokens.len();
            let (start, end) = (sequence.computed, sequence.computed + span.rows);
            let known = end.min(sequence.tokens.len());
            batch
                .tokens
                .extend_from_slice(&sequence.tokens[start.min(known)..known]);
            batch.positions.extend((start..end).map(position));
            if known < end {
                // At most one token is ahead when a step is planned, and it is the last one.
                task.carried.push(Carried {
                    row: batch.tokens.len(),
                    from: sequence.ahead_row,
                });
                batch.tokens.push(0);
            }
            let positions = sequence.logit_positions(span.rows);
            for at in positions.prompt.clone() {
                batch.logit_rows.push(first + at - start);
                task.wishes.push(self.wishes.prompt_token(sequence, at));
            }
            if let Some(at) = positions.last {
                batch.logit_rows.push(first + at - start);
                task.wishes.push(self.wishes.next_token(sequence));
            }
            batch.sequences.push(SequenceSpan {
                rows: first..first + span.rows,
                past_len: start,
                blocks: sequence.blocks.clone(),
            });
            task.parts.push(Part {
                id: sequence.id,
                positions,
                end,
                completes: end == sequence.len_ahead(),
            });
        }
        task
    }
}

fn position(index: usize) -> u32 {
    u32::try_from(index).expect("sequences are shorter than 2^32 tokens")
}

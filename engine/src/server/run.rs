//! The running answers of one HTTP request: submits them, follows their events, adds up what they used.

use std::future::poll_fn;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use baton_configs::wire::{PromptTokensDetails, RequestTimeline, Usage};

use crate::backend::TokenId;
use crate::request::{
    Event, FinishReason, GenerateRequest, RequestCosts, RequestFailure, SamplingParams,
    TokenLogprobs,
};
use crate::server::answer::{EndTokens, Piece, Pushed, Writer};
use crate::server::disagg::Phase;
use crate::server::error::ApiError;
use crate::server::port::{EnginePort, EventSource};
use crate::server::sampling::Common;
use crate::server::text::TextTools;

/// Everything needed to start the answers of one HTTP request.
#[derive(Debug)]
pub(super) struct Order<'a> {
    pub(super) engine: &'a dyn EnginePort,
    pub(super) tools: &'a TextTools,
    pub(super) common: &'a Common,
    pub(super) prompts: &'a [Vec<TokenId>],
    pub(super) prompt_logprobs: bool,
    pub(super) max_seq_len: u32,
    pub(super) arrived: Instant,
}

/// A piece of one of the answers.
#[derive(Debug)]
pub(super) struct Part {
    /// Which answer: `prompt × best_of + candidate`.
    pub(super) run: usize,
    pub(super) piece: Piece,
}

/// The running answers. Dropping it cancels what still runs.
#[derive(Debug)]
pub(super) struct Runs {
    runs: Vec<Run>,
    /// Where the next look begins, so that no answer waits behind a busier one.
    first: usize,
    runs_per_prompt: usize,
    prompt_tokens: u32,
    ctx_usage: Option<Usage>,
    arrived: Instant,
    first_token: Option<Duration>,
}

#[derive(Debug)]
struct Run {
    /// `None` once the answer has ended.
    events: Option<Box<dyn EventSource>>,
    writer: Writer,
    /// A stop string is complete; only the engine's account of the costs is still to come.
    stopped: bool,
    context_only: bool,
    costs: RequestCosts,
    finished: bool,
}

impl Runs {
    /// Submits every answer. When one is refused, those before it are cancelled.
    pub(super) fn start(order: &Order<'_>) -> Result<Self, ApiError> {
        let common = order.common;
        let mut runs = Vec::new();
        for prompt in order.prompts {
            for candidate in 0..common.best_of {
                runs.push(Run::start(order, prompt, candidate)?);
            }
        }
        let prompt_tokens = order.prompts.iter().map(|prompt| length(prompt)).sum();
        let ctx_usage = match &common.phase {
            Phase::Generation { ctx_usage, .. } => ctx_usage.clone(),
            Phase::Whole | Phase::Context { .. } => None,
        };
        Ok(Self {
            runs,
            first: 0,
            runs_per_prompt: common.best_of as usize,
            prompt_tokens,
            ctx_usage,
            arrived: order.arrived,
            first_token: None,
        })
    }

    /// How many answers there are.
    pub(super) fn len(&self) -> usize {
        self.runs.len()
    }

    /// The next piece of any answer; `None` when all have ended. A failure of one ends all.
    pub(super) async fn next(&mut self) -> Option<Result<Part, RequestFailure>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Part, RequestFailure>>> {
        let count = self.runs.len();
        let mut all_ended = true;
        for step in 0..count {
            let index = (self.first + step) % count;
            let run = &mut self.runs[index];
            if run.finished {
                continue;
            }
            all_ended = false;
            let polled = run.poll_next(cx);
            if self.first_token.is_none() && run.writer.token_count() > 0 {
                self.first_token = Some(self.arrived.elapsed());
            }
            if let Poll::Ready(result) = polled {
                self.first = index + 1;
                return Poll::Ready(Some(result.map(|piece| Part { run: index, piece })));
            }
        }
        if all_ended {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    }

    /// What has been used so far. A generation server reports the prompt as the context server counted it.
    pub(super) fn usage(&self) -> Usage {
        let completion_tokens = self.runs.iter().map(|run| run.writer.token_count()).sum();
        let (prompt_tokens, details) = match &self.ctx_usage {
            Some(usage) => (usage.prompt_tokens, usage.prompt_tokens_details.clone()),
            None => (self.prompt_tokens, self.cached_tokens()),
        };
        Usage {
            prompt_tokens,
            total_tokens: prompt_tokens.saturating_add(completion_tokens),
            completion_tokens,
            prompt_tokens_details: details,
        }
    }

    /// Each prompt counts once, as its first answer found it; known at the end only.
    fn cached_tokens(&self) -> Option<PromptTokensDetails> {
        let firsts = || self.runs.iter().step_by(self.runs_per_prompt);
        firsts()
            .all(|run| run.finished)
            .then(|| PromptTokensDetails {
                cached_tokens: firsts().map(|run| run.costs.cached_tokens).sum(),
            })
    }

    /// Costs of the first answer.
    pub(super) fn costs(&self) -> RequestCosts {
        self.runs
            .first()
            .map(|run| run.costs.clone())
            .unwrap_or_default()
    }

    /// From arrival to the first token.
    pub(super) fn first_token(&self) -> Option<Duration> {
        self.first_token
    }

    /// Where the first answer's time went.
    pub(super) fn timeline(&self) -> RequestTimeline {
        let costs = self.costs();
        let tokens = self.runs.first().map_or(0, |run| run.writer.token_count());
        RequestTimeline {
            queue_us: micros(costs.queue),
            prefill_us: micros(costs.prefill),
            handoff_us: costs.handoff.as_ref().map(|stats| micros(stats.elapsed)),
            handoff_bytes: costs.handoff.as_ref().map(|stats| stats.bytes),
            handoff_transport: costs.handoff.map(|stats| stats.transport()),
            first_token_us: self.first_token.map_or(0, micros),
            decode_us: micros(costs.decode),
            decode_tokens: tokens.saturating_sub(1),
        }
    }
}

impl Run {
    fn start(order: &Order<'_>, prompt: &[TokenId], candidate: u32) -> Result<Self, ApiError> {
        let common = order.common;
        let room = order.max_seq_len.saturating_sub(length(prompt));
        let sampling = SamplingParams {
            seed: common.sampling.seed.wrapping_add(u64::from(candidate)),
            max_tokens: common.max_tokens.unwrap_or(room).min(room),
            logprobs: if common.best_of > common.n {
                common.sampling.logprobs.or(Some(0))
            } else {
                common.sampling.logprobs
            },
            prompt_logprobs: order
                .prompt_logprobs
                .then(|| common.sampling.logprobs.unwrap_or(0)),
            ..common.sampling.clone()
        };
        let ends = EndTokens::new(order.tools.eos_tokens(), &sampling);
        let writer = Writer::new(order.tools, &common.text, ends, prompt);
        let events = order.engine.submit(GenerateRequest {
            prompt: prompt.to_vec(),
            sampling,
            kind: common.phase.request_kind(),
            cache_salt: common.cache_salt.clone(),
        })?;
        Ok(Self {
            events: Some(events),
            writer,
            stopped: false,
            context_only: matches!(common.phase, Phase::Context { .. }),
            costs: RequestCosts::default(),
            finished: false,
        })
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, RequestFailure>> {
        loop {
            if let Some(piece) = self.writer.take_due() {
                self.finished = piece.end.is_some();
                return Poll::Ready(Ok(piece));
            }
            let Some(events) = &mut self.events else {
                return Poll::Pending;
            };
            let Poll::Ready(event) = events.poll_next(cx) else {
                return Poll::Pending;
            };
            if let Err(failure) = self.take(event) {
                self.finished = true;
                self.events = None;
                return Poll::Ready(Err(failure));
            }
        }
    }

    fn take(&mut self, event: Option<Event>) -> Result<(), RequestFailure> {
        match event {
            Some(Event::LeaseOpened(ticket)) => self.writer.push_lease(ticket),
            Some(Event::PromptLogprobs(logprobs)) => self.writer.push_prompt_logprobs(logprobs),
            Some(Event::Token { token, logprobs }) => self.push(token, logprobs),
            Some(Event::Finished {
                reason,
                costs,
                ticket,
            }) => {
                self.costs = costs.clone();
                self.writer.finish(reason, costs, ticket);
                self.withdraw_moot_lease();
                self.events = None;
            }
            // A stop string has decided the answer: what the engine meets after it is no part of it.
            Some(Event::Failed(_)) | None if self.stopped => {
                self.writer
                    .finish(FinishReason::Cancelled, RequestCosts::default(), None);
                self.events = None;
            }
            Some(Event::Failed(failure)) => return Err(failure),
            None => {
                return Err(RequestFailure::Engine(
                    "the engine ended before the answer did".to_owned(),
                ));
            }
        }
        Ok(())
    }

    /// A context-only answer that a stop string has completed needs no generation server, hence no lease.
    fn withdraw_moot_lease(&mut self) {
        if self.writer.take_moot_ticket().is_some()
            && let Some(events) = &mut self.events
        {
            events.cancel();
        }
    }

    fn push(&mut self, token: TokenId, logprobs: Option<TokenLogprobs>) {
        if self.stopped {
            return;
        }
        if self.writer.push(token, logprobs) == Pushed::Stopped {
            self.stopped = true;
            // A context-only request ends by itself.
            if !self.context_only
                && let Some(events) = &mut self.events
            {
                events.cancel();
            }
        }
    }
}

fn length(prompt: &[TokenId]) -> u32 {
    u32::try_from(prompt.len()).unwrap_or(u32::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

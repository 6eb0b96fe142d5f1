//! Those who wait for answers, and how tokens get to them. Publishing never waits: each channel holds a whole answer.

use std::time::Instant;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::backend::TokenId;
use crate::metrics::EngineStats;
use crate::request::{Event, FinishReason, RequestFailure, TokenLogprobs};
use crate::sequence::{Role, Sequence};

use super::handle::QueuePlace;

/// One who waits for an answer.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) events: mpsc::Sender<Event>,
    /// Present until the request's first step.
    pub(super) place: Option<QueuePlace>,
    /// Who fetches for a request that is still to come is none itself, and is not counted.
    pub(super) is_prefetch: bool,
}

impl Client {
    /// False when nobody reads any more.
    pub(super) fn send(&self, event: Event) -> bool {
        match self.events.try_send(event) {
            Ok(()) => true,
            Err(TrySendError::Closed(_)) => false,
            Err(TrySendError::Full(_)) => {
                // The capacity covers a whole answer, so this is a bug; giving the request up beats waiting.
                tracing::error!("a request's event channel is full");
                false
            }
        }
    }
}

/// What a step did to a request beyond one more token.
#[derive(Debug)]
pub(super) enum End {
    Finished(FinishReason),
    /// Context-only, and more is to come: with the first token's log-probabilities.
    HandOff(Option<TokenLogprobs>),
    Failed(RequestFailure),
    /// The client reads no more.
    Gone,
}

/// Puts tokens into a sequence and before its client.
#[derive(Debug)]
pub(super) struct Publisher<'a> {
    pub(super) client: &'a Client,
    pub(super) stats: &'a mut EngineStats,
    pub(super) eos: &'a [TokenId],
    pub(super) now: Instant,
}

impl Publisher<'_> {
    /// One more token of the answer.
    pub(super) fn token(
        &mut self,
        sequence: &mut Sequence,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
    ) -> Option<End> {
        if !self.prompt_logprobs(sequence) {
            return Some(End::Gone);
        }
        let reason = sequence.accept(token, self.eos, self.now);
        self.stats.generated_tokens_total += 1;
        let hands_off = reason.is_none() && matches!(sequence.role, Role::Context { .. });
        let kept = if hands_off { logprobs.clone() } else { None };
        if !self.client.send(Event::Token { token, logprobs }) {
            return Some(End::Gone);
        }
        match reason {
            Some(reason) => Some(End::Finished(reason)),
            None if hands_off => Some(End::HandOff(kept)),
            None => None,
        }
    }

    /// All tokens that another server chose, as far as the answer goes.
    pub(super) fn forced(&mut self, sequence: &mut Sequence) -> Option<End> {
        while let Some((token, logprobs)) = sequence.forced.pop_front() {
            let logprobs = logprobs.filter(|_| sequence.sampling.logprobs.is_some());
            if let Some(end) = self.token(sequence, token, logprobs) {
                return Some(end);
            }
        }
        None
    }

    /// The prompt's log-probabilities, once, before the first token. False when nobody reads any more.
    fn prompt_logprobs(&self, sequence: &mut Sequence) -> bool {
        match &mut sequence.prompt_logprobs {
            Some(wanted) if !wanted.published => {
                wanted.published = true;
                self.client
                    .send(Event::PromptLogprobs(std::mem::take(&mut wanted.collected)))
            }
            _ => true,
        }
    }
}

//! One answer as it grows: tokens in, text out, and the decision where it ends.
//!
//! Deterministic and without waiting: the same tokens give the same text through one server and through two,
//! because a generation server pushes the context server's tokens through the same writer first.

use crate::backend::TokenId;
use crate::handoff::HandoffTicket;
use crate::request::{FinishReason, RequestCosts, SamplingParams, TokenLogprobs};
use crate::server::sampling::TextOptions;
use crate::server::text::{TextTools, TextWriter};

/// Why an answer ended, in the API's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    /// End-of-sequence, stop token or stop string.
    Stop,
    /// `max_tokens` or the longest sequence.
    Length,
    /// Context-only: the generation server goes on.
    NotFinished,
    /// Given up.
    Cancelled,
}

impl Finish {
    /// As `finish_reason` says it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::NotFinished => "not_finished",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What stopped the answer.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub(super) enum StopReason {
    /// One of the request's stop tokens.
    Token(TokenId),
    /// One of its stop strings.
    Text(String),
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct End {
    pub(super) finish: Finish,
    pub(super) stop_reason: Option<StopReason>,
    pub(super) costs: RequestCosts,
    pub(super) ticket: Option<HandoffTicket>,
}

/// What is new of an answer since the last piece.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) tokens: Vec<TokenId>,
    /// One a token when asked for, else empty.
    pub(super) logprobs: Vec<TokenLogprobs>,
    /// The ticket of a lease that grows with the prompt; before anything else.
    pub(super) lease: Option<HandoffTicket>,
    /// Of prompt positions `1..`, with the first piece.
    pub(super) prompt_logprobs: Option<Vec<TokenLogprobs>>,
    pub(super) end: Option<End>,
}

/// What a token did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pushed {
    /// The answer goes on, if the engine agrees.
    GoesOn,
    /// A stop string is complete: whatever the engine still writes is not part of the answer.
    Stopped,
}

/// Which tokens end an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EndTokens {
    eos: Vec<TokenId>,
    stop: Vec<TokenId>,
}

impl EndTokens {
    /// The model's own, unless ignored, and the request's.
    pub(super) fn new(eos: &[TokenId], sampling: &SamplingParams) -> Self {
        Self {
            eos: if sampling.ignore_eos {
                Vec::new()
            } else {
                eos.to_vec()
            },
            stop: sampling.stop_token_ids.clone(),
        }
    }

    fn contain(&self, token: TokenId) -> bool {
        self.eos.contains(&token) || self.stop.contains(&token)
    }
}

/// Writes one answer.
#[derive(Debug)]
pub(super) struct Writer {
    text: Option<TextWriter>,
    options: TextOptions,
    ends: EndTokens,
    token_count: u32,
    stopped: Option<StopReason>,
    pending: Piece,
}

impl Writer {
    /// An empty answer to a prompt.
    pub(super) fn new(
        tools: &TextTools,
        options: &TextOptions,
        ends: EndTokens,
        prompt: &[TokenId],
    ) -> Self {
        Self {
            text: options.detokenize.then(|| tools.writer(options, prompt)),
            options: options.clone(),
            ends,
            token_count: 0,
            stopped: None,
            pending: Piece::default(),
        }
    }

    /// Tokens taken so far.
    pub(super) fn token_count(&self) -> u32 {
        self.token_count
    }

    /// Takes the ticket of a lease that grows with the prompt.
    pub(super) fn push_lease(&mut self, ticket: HandoffTicket) {
        self.pending.lease = Some(ticket);
    }

    /// Takes the prompt's log-probabilities.
    pub(super) fn push_prompt_logprobs(&mut self, logprobs: Vec<TokenLogprobs>) {
        self.pending.prompt_logprobs = Some(logprobs);
    }

    /// Takes a token. After [`Pushed::Stopped`] nothing more may be pushed.
    pub(super) fn push(&mut self, token: TokenId, logprobs: Option<TokenLogprobs>) -> Pushed {
        self.token_count += 1;
        self.pending.tokens.push(token);
        self.pending.logprobs.extend(logprobs);
        let Some(text) = &mut self.text else {
            return Pushed::GoesOn;
        };
        // The token that ends an answer is reported, but is text only for those who ask for it.
        if self.ends.contain(token) && !self.options.include_stop {
            return Pushed::GoesOn;
        }
        let match_stops = self.token_count >= self.options.min_tokens;
        let (new, stop) = text.push(token, match_stops);
        self.pending.text.push_str(&new);
        match stop {
            None => Pushed::GoesOn,
            Some(stop) => {
                self.stopped = Some(StopReason::Text(stop));
                self.text = None;
                Pushed::Stopped
            }
        }
    }

    /// Ends the answer: releases withheld text and says why it ended.
    pub(super) fn finish(
        &mut self,
        reason: FinishReason,
        costs: RequestCosts,
        ticket: Option<HandoffTicket>,
    ) {
        if let Some(text) = self.text.take() {
            let (rest, stop) = text.finish(self.token_count >= self.options.min_tokens);
            self.pending.text.push_str(&rest);
            self.stopped = stop.map(StopReason::Text);
        }
        let (finish, stop_reason) = match (self.stopped.take(), reason) {
            (Some(stop), _) => (Finish::Stop, Some(stop)),
            (None, FinishReason::Eos) => (Finish::Stop, None),
            (None, FinishReason::StopToken(token)) => {
                (Finish::Stop, Some(StopReason::Token(token)))
            }
            (None, FinishReason::Length) => (Finish::Length, None),
            (None, FinishReason::NotFinished) => (Finish::NotFinished, None),
            (None, FinishReason::Cancelled) => (Finish::Cancelled, None),
        };
        self.pending.end = Some(End {
            finish,
            stop_reason,
            costs,
            ticket,
        });
    }

    /// The ticket of an answer that is complete here, so that nobody will use it.
    pub(super) fn take_moot_ticket(&mut self) -> Option<HandoffTicket> {
        let end = self.pending.end.as_mut()?;
        (end.finish != Finish::NotFinished)
            .then(|| end.ticket.take())
            .flatten()
    }

    /// What is new, if it is worth a message: a lease, text, the end, or tokens where no text is made of them.
    ///
    /// Tokens whose text is still withheld wait for it, so that each message's log-probabilities are those of its text.
    pub(super) fn take_due(&mut self) -> Option<Piece> {
        let due = !self.pending.text.is_empty()
            || self.pending.end.is_some()
            || self.pending.lease.is_some()
            || (!self.options.detokenize && !self.pending.tokens.is_empty());
        due.then(|| std::mem::take(&mut self.pending))
    }
}

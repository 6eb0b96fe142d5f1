//! What crosses between the HTTP side and the engine thread: requests in, events out. Tokens only, no text.

use std::time::Duration;

use crate::backend::TokenId;
use crate::handoff::{HandoffStats, HandoffTicket};

/// Identifies a request within one engine process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// How the next token is chosen. All penalties and filters act on raw logits in the order of vLLM's and
/// TensorRT-LLM's samplers: bias, penalties, min-tokens mask, temperature, top-k, top-p, min-p.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the smallest set whose mass reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep the k best; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this likely relative to the best; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted per occurrence in the answer.
    pub frequency_penalty: f32,
    /// Subtracted once for tokens in the answer.
    pub presence_penalty: f32,
    /// Leading prompt tokens that `repetition_penalty` does not count.
    pub prompt_ignore_length: u32,
    /// Added to logits, by token, -100 to 100.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Seed; the same seed gives the same answer on any server and through any hand-off.
    pub seed: u64,
    /// Tokens to write at most, at least 1.
    pub max_tokens: u32,
    /// Tokens before which neither eos nor a stop token may be chosen.
    pub min_tokens: u32,
    /// Do not stop at the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Further tokens that end the answer.
    pub stop_token_ids: Vec<TokenId>,
    /// Alternatives to report with each token: `None` reports no log-probabilities, `Some(0)` the chosen one's.
    pub logprobs: Option<u32>,
    /// The same for the prompt's tokens.
    pub prompt_logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            prompt_ignore_length: 0,
            logit_bias: Vec::new(),
            seed: 0,
            max_tokens: 16,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// A token with its log-probability under the raw distribution (before temperature and filters) and 1-based rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Logprob {
    /// The token.
    pub token: TokenId,
    /// Natural logarithm.
    pub logprob: f32,
    /// 1 is the most likely.
    pub rank: u32,
}

/// Log-probabilities at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token that stands there.
    pub chosen: Logprob,
    /// The most likely ones, best first.
    pub top: Vec<Logprob>,
}

/// What is to be done with a request.
#[derive(Debug, Clone, PartialEq)]
pub enum RequestKind {
    /// Prefill and decode here.
    Aggregated,
    /// Prefill, one token, keep the KV under a lease.
    ContextOnly {
        /// The proxy's id, where there is one.
        disagg_request_id: Option<u64>,
        /// Whether a prompt that takes several steps is offered as it is read: [`Event::LeaseOpened`].
        early: bool,
    },
    /// Fetch the KV, then decode.
    GenerationOnly(HandoffTicket),
    /// Fetch the KV of a prompt that the context server still reads, for the generation-only request that is to come with
    /// the same state. Ends with [`FinishReason::NotFinished`] when that one has taken it over.
    Prefetch(HandoffTicket),
}

/// A request as the engine takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateRequest {
    /// Prompt tokens, at least one.
    pub prompt: Vec<TokenId>,
    /// How to choose tokens and when to stop.
    pub sampling: SamplingParams,
    /// What is to be done.
    pub kind: RequestKind,
    /// Keeps prefixes of different tenants apart (`cache_salt`); `None` shares.
    pub cache_salt: Option<String>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token.
    Eos,
    /// One of the request's stop tokens.
    StopToken(TokenId),
    /// `max_tokens` or the longest sequence was reached.
    Length,
    /// Context-only: the first token was written and more is to come. Of a prefetch: another request has it now.
    NotFinished,
    /// The client went away or asked for it.
    Cancelled,
}

/// What a finished request cost.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RequestCosts {
    /// Prompt tokens found in the cache.
    pub cached_tokens: u32,
    /// From submission to the first scheduled step.
    pub queue: Duration,
    /// From the first scheduled step to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// The hand-off that fed this request (generation-only).
    pub handoff: Option<HandoffStats>,
    /// Whether the prompt was read again because the hand-off failed.
    pub prefilled_again: bool,
    /// Blocks held in all.
    pub blocks_allocated: u32,
    /// Of these, taken from the prefix cache.
    pub blocks_reused: u32,
}

/// What the engine tells the submitter. The channel's capacity covers the whole answer, so publishing never waits.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Context-only: a part of the prompt is read and under a lease that grows with the rest. The ticket has no tokens yet.
    LeaseOpened(HandoffTicket),
    /// Log-probabilities of prompt positions `1..`, once, before the first token.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// One more token.
    Token {
        /// The token; an end-of-sequence or stop token is reported too, and ends the answer.
        token: TokenId,
        /// Present when asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The end; nothing follows.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it cost.
        costs: RequestCosts,
        /// Context-only: how the generation server gets the KV; `None` when the answer is complete.
        ticket: Option<HandoffTicket>,
    },
    /// The request failed; nothing follows.
    Failed(RequestFailure),
}

/// Why a request failed. The HTTP side decides the status.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestFailure {
    /// The request can never be served here: too long, layouts that do not fit.
    #[error("{0}")]
    Unservable(String),
    /// The hand-off failed and reading the prompt again was not possible.
    #[error("kv hand-off failed: {0}")]
    Handoff(String),
    /// The device failed.
    #[error("engine failure: {0}")]
    Engine(String),
    /// The engine is shutting down.
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The queue is full; try again later.
    #[error("the request queue is full ({queued} waiting)")]
    Busy {
        /// How many wait.
        queued: usize,
    },
    /// The request can never be served here.
    #[error("{0}")]
    Unservable(String),
    /// The engine thread is gone.
    #[error("the engine is not running")]
    Stopped,
}

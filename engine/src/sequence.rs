//! One request on its way through the engine: its tokens, its blocks, and how much of it is computed.
//!
//! There is no "prefill" or "decode" state: tokens that are not computed yet are computed next, and when none is
//! left the next token is chosen. So a long prompt, a pre-empted answer and a handed-off prompt are the same thing.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::{BlockId, TokenId};
use crate::handoff::{HandoffStats, HandoffTicket};
use crate::request::{
    FinishReason, GenerateRequest, RequestCosts, RequestId, RequestKind, SamplingParams,
    TokenLogprobs,
};

/// Most prompt rows per step whose logits are asked for: they are `V` wide and live on the host.
const PROMPT_LOGPROB_ROWS: usize = 64;

/// What is done with the first token, and where the KV comes from.
#[derive(Debug)]
pub(crate) enum Role {
    Aggregated,
    /// Hands off after the first token.
    Context {
        disagg_request_id: Option<u64>,
        /// Offers what is read of its prompt after every step.
        early: bool,
    },
    /// Fetches its prompt's KV with this ticket; `None` once it need not or must not be fetched (any more).
    Generation {
        ticket: Option<Box<HandoffTicket>>,
    },
    /// As that, for a request that is still to come, with a ticket of the same state.
    Prefetch {
        ticket: Option<Box<HandoffTicket>>,
        state: Vec<u8>,
    },
}

/// Log-probabilities of the prompt, collected chunk by chunk.
#[derive(Debug)]
pub(crate) struct PromptLogprobs {
    pub(crate) top: u32,
    /// For positions `1..`, so far; empty again once published.
    pub(crate) collected: Vec<TokenLogprobs>,
    /// How many have been collected: outlives pre-emption and publication.
    pub(crate) count: usize,
    pub(crate) published: bool,
}

/// Positions whose logits are wanted, ascending.
#[derive(Debug, Clone)]
pub(crate) struct LogitPositions {
    /// For the prompt's log-probabilities.
    pub(crate) prompt: Range<usize>,
    /// For the next token.
    pub(crate) last: Option<usize>,
}

impl LogitPositions {
    pub(crate) fn count(&self) -> usize {
        self.prompt.len() + usize::from(self.last.is_some())
    }
}

/// When things happened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    pub(crate) submitted: Instant,
    pub(crate) scheduled: Option<Instant>,
    pub(crate) first_token: Option<Instant>,
    pub(crate) last_token: Option<Instant>,
}

/// A request on its way.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Rises with submission, so it is the age as well.
    pub(crate) id: RequestId,
    /// Prompt and answer so far.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) prompt_len: usize,
    pub(crate) sampling: SamplingParams,
    pub(crate) salt: Option<Arc<str>>,
    pub(crate) role: Role,
    /// Blocks held, in order.
    pub(crate) blocks: Vec<BlockId>,
    /// Tokens whose KV is in `blocks`, or will be once the steps that are under way are done.
    pub(crate) computed: usize,
    /// Tokens that steps under way choose; not in `tokens` yet.
    pub(crate) ahead: usize,
    /// Which of its step's rows of logits the last of them comes from.
    pub(crate) ahead_row: usize,
    /// Leading blocks that the prefix cache knows.
    pub(crate) cached_blocks: usize,
    /// Tokens that another server chose and that are not in `tokens` yet.
    pub(crate) forced: VecDeque<(TokenId, Option<TokenLogprobs>)>,
    pub(crate) prompt_logprobs: Option<PromptLogprobs>,
    pub(crate) times: Times,
    /// The number that its fetch goes by: its own, or that of the prefetch that it has taken over.
    pub(crate) fetch: RequestId,
    /// What its fetch moved, once that has succeeded.
    pub(crate) handoff: Option<HandoffStats>,
    pub(crate) prefilled_again: bool,
    pub(crate) cached_tokens: usize,
    pub(crate) blocks_allocated: usize,
    pub(crate) blocks_reused: usize,
    /// Tokens that prompt and answer may have together.
    token_limit: usize,
}

impl Sequence {
    /// A request that nothing has been done for. `max_len` bounds prompt and answer together.
    pub(crate) fn new(
        id: RequestId,
        request: GenerateRequest,
        max_len: usize,
        submitted: Instant,
    ) -> Self {
        let mut forced = VecDeque::new();
        let role = match request.kind {
            RequestKind::Aggregated => Role::Aggregated,
            RequestKind::ContextOnly {
                disagg_request_id,
                early,
            } => Role::Context {
                disagg_request_id,
                early,
            },
            RequestKind::Prefetch(ticket) => Role::Prefetch {
                state: ticket.opaque_state.clone(),
                ticket: Some(Box::new(ticket)),
            },
            RequestKind::GenerationOnly(ticket) => {
                forced = forced_tokens(&ticket);
                Role::Generation {
                    ticket: Some(Box::new(ticket)),
                }
            }
        };
        let prompt_len = request.prompt.len();
        let max_tokens = request.sampling.max_tokens as usize;
        Self {
            id,
            tokens: request.prompt,
            prompt_len,
            salt: request.cache_salt.map(Into::into),
            role,
            blocks: Vec::new(),
            computed: 0,
            ahead: 0,
            ahead_row: 0,
            cached_blocks: 0,
            forced,
            prompt_logprobs: request.sampling.prompt_logprobs.map(|top| PromptLogprobs {
                top,
                collected: Vec::new(),
                count: 0,
                published: false,
            }),
            times: Times {
                submitted,
                scheduled: None,
                first_token: None,
                last_token: None,
            },
            fetch: id,
            handoff: None,
            prefilled_again: false,
            cached_tokens: 0,
            blocks_allocated: 0,
            blocks_reused: 0,
            token_limit: max_len.min(prompt_len.saturating_add(max_tokens)),
            sampling: request.sampling,
        }
    }

    pub(crate) fn prompt(&self) -> &[TokenId] {
        &self.tokens[..self.prompt_len]
    }

    pub(crate) fn answer(&self) -> &[TokenId] {
        &self.tokens[self.prompt_len..]
    }

    /// Tokens of prompt and answer, those included that are not known yet.
    pub(crate) fn len_ahead(&self) -> usize {
        self.tokens.len() + self.ahead
    }

    /// Tokens to compute before the next one can be chosen.
    pub(crate) fn remaining(&self) -> usize {
        self.len_ahead() - self.computed
    }

    /// Whether the next step computes one token of a begun answer.
    pub(crate) fn is_decoding(&self) -> bool {
        self.remaining() == 1 && self.len_ahead() > self.prompt_len
    }

    /// Whether there is nothing to compute until the steps that are under way are done: they compute all there is, or end the
    /// answer, whatever token they choose.
    pub(crate) fn awaits_results(&self) -> bool {
        let ends =
            || self.len_ahead() >= self.token_limit || matches!(self.role, Role::Context { .. });
        self.remaining() == 0 || (self.ahead > 0 && ends())
    }

    pub(crate) fn needs_fetch(&self) -> bool {
        self.ticket().is_some()
    }

    /// The ticket that is still to be fetched with.
    pub(crate) fn ticket(&self) -> Option<&HandoffTicket> {
        match &self.role {
            Role::Generation { ticket } | Role::Prefetch { ticket, .. } => ticket.as_deref(),
            Role::Aggregated | Role::Context { .. } => None,
        }
    }

    /// Whether it fetches for a request that is still to come.
    pub(crate) fn is_prefetch(&self) -> bool {
        matches!(self.role, Role::Prefetch { .. })
    }

    /// Whether what it fetches is what another request wants: the same lease's KV, as that request would file it.
    pub(crate) fn is_prefetch_for(&self, other: &Self) -> bool {
        match (&self.role, other.ticket()) {
            (Role::Prefetch { state, .. }, Some(ticket)) => {
                *state == ticket.opaque_state
                    && self.tokens == other.tokens
                    && self.salt == other.salt
                    && other.prompt_logprobs.is_none()
            }
            _ => false,
        }
    }

    /// Goes on with what a prefetch has got, or is getting.
    pub(crate) fn take_over(&mut self, prefetch: Self, now: Instant) {
        self.skip_fetch();
        self.blocks = prefetch.blocks;
        self.computed = prefetch.computed;
        self.cached_blocks = prefetch.cached_blocks;
        self.cached_tokens = prefetch.cached_tokens;
        self.blocks_allocated = prefetch.blocks_allocated;
        self.blocks_reused = prefetch.blocks_reused;
        self.fetch = prefetch.fetch;
        self.handoff = prefetch.handoff;
        self.times.scheduled = Some(now);
    }

    /// From now on the prompt is computed here.
    pub(crate) fn skip_fetch(&mut self) {
        self.take_ticket();
    }

    /// Takes the ticket to fetch with; there is one fetch at most.
    pub(crate) fn take_ticket(&mut self) -> Option<HandoffTicket> {
        match &mut self.role {
            Role::Generation { ticket } | Role::Prefetch { ticket, .. } => {
                ticket.take().map(|ticket| *ticket)
            }
            Role::Aggregated | Role::Context { .. } => None,
        }
    }

    /// Whether log-probabilities of the prompt are still to be collected: then no prompt token may be skipped.
    pub(crate) fn wants_prompt_logits(&self) -> bool {
        self.prompt_logprobs
            .as_ref()
            .is_some_and(|wanted| wanted.count + 1 < self.prompt_len)
    }

    /// Most rows of this sequence in one step.
    pub(crate) fn rows_max(&self) -> usize {
        if self.wants_prompt_logits() {
            self.remaining().min(PROMPT_LOGPROB_ROWS)
        } else {
            self.remaining()
        }
    }

    /// Positions among the next `rows` whose logits are wanted.
    pub(crate) fn logit_positions(&self, rows: usize) -> LogitPositions {
        let end = self.computed + rows;
        let prompt = match &self.prompt_logprobs {
            Some(wanted) => wanted.count.max(self.computed)..(self.prompt_len - 1).min(end),
            None => 0..0,
        };
        let last = (end == self.len_ahead() && self.forced.is_empty()).then(|| end - 1);
        LogitPositions { prompt, last }
    }

    /// Appends a token to the answer. Returns why the answer ends with it, if it does.
    pub(crate) fn accept(
        &mut self,
        token: TokenId,
        eos: &[TokenId],
        now: Instant,
    ) -> Option<FinishReason> {
        self.tokens.push(token);
        self.times.first_token.get_or_insert(now);
        self.times.last_token = Some(now);
        if let Some(reason) = self.end_by(token, eos) {
            Some(reason)
        } else if self.tokens.len() >= self.token_limit {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// Whether the tokens chosen elsewhere end the answer, so that no KV is needed.
    pub(crate) fn forced_complete(&self, eos: &[TokenId]) -> bool {
        let length = self.tokens.len() + self.forced.len();
        !self.forced.is_empty()
            && (length >= self.token_limit
                || self
                    .forced
                    .iter()
                    .any(|&(token, _)| self.end_by(token, eos).is_some()))
    }

    /// Forgets everything computed; the caller has given the blocks back.
    pub(crate) fn restart(&mut self) {
        self.blocks.clear();
        self.computed = 0;
        self.ahead = 0;
        self.cached_blocks = 0;
    }

    pub(crate) fn costs(&self) -> RequestCosts {
        let times = &self.times;
        let between = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from),
            _ => Duration::ZERO,
        };
        RequestCosts {
            cached_tokens: saturate(self.cached_tokens),
            queue: between(Some(times.submitted), times.scheduled),
            prefill: between(times.scheduled, times.first_token),
            decode: between(times.first_token, times.last_token),
            handoff: self.handoff.clone(),
            prefilled_again: self.prefilled_again,
            blocks_allocated: saturate(self.blocks_allocated),
            blocks_reused: saturate(self.blocks_reused),
        }
    }

    fn end_by(&self, token: TokenId, eos: &[TokenId]) -> Option<FinishReason> {
        if !self.sampling.ignore_eos && eos.contains(&token) {
            Some(FinishReason::Eos)
        } else if self.sampling.stop_token_ids.contains(&token) {
            Some(FinishReason::StopToken(token))
        } else {
            None
        }
    }
}

fn forced_tokens(ticket: &HandoffTicket) -> VecDeque<(TokenId, Option<TokenLogprobs>)> {
    let logprobs = ticket.first_logprobs.iter().map(|list| {
        list.split_first().map(|(&chosen, top)| TokenLogprobs {
            chosen,
            top: top.to_vec(),
        })
    });
    ticket
        .first_tokens
        .iter()
        .copied()
        .zip(logprobs.chain(std::iter::repeat(None)))
        .collect()
}

fn saturate(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

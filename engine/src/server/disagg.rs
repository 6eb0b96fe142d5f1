//! `disaggregated_params` on the wire and the hand-off ticket inside, both ways (COMPAT.md §10.1).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use baton_configs::wire::{DisaggregatedParams, RequestType, Usage, WireLogprob};

use crate::backend::TokenId;
use crate::handoff::HandoffTicket;
use crate::request::{Logprob, RequestKind};
use crate::server::error::ApiError;
use crate::server::fields::{Fields, Kind, kind, wrong_type};
use crate::server::sampling::{LOGPROBS_MAX, Limits, check_vocab};

const NAME: &str = "disaggregated_params";

/// Most tokens that a context server may have sampled.
const FIRST_TOKENS_MAX: usize = 16;

/// Which part of the work a request asks for.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Phase {
    /// Prefill and decode here.
    Whole,
    /// Prefill and the first token.
    Context {
        /// The proxy's id.
        disagg_request_id: Option<u64>,
        /// The proxy wants to hear of the KV before the answer is there.
        early: bool,
    },
    /// The rest, from a ticket.
    Generation {
        /// What the context server gave.
        ticket: HandoffTicket,
        /// What the context phase used.
        ctx_usage: Option<Usage>,
    },
}

impl Phase {
    /// Whether another server does the other part.
    pub(super) fn is_split(&self) -> bool {
        !matches!(self, Self::Whole)
    }

    /// What the engine is to do.
    pub(super) fn request_kind(&self) -> RequestKind {
        match self {
            Self::Whole => RequestKind::Aggregated,
            Self::Context {
                disagg_request_id,
                early,
            } => RequestKind::ContextOnly {
                disagg_request_id: *disagg_request_id,
                early: *early,
            },
            Self::Generation { ticket, .. } => RequestKind::GenerationOnly(ticket.clone()),
        }
    }
}

/// Reads the field.
pub(super) fn read_phase(fields: &mut Fields<'_>, limits: &Limits) -> Result<Phase, ApiError> {
    let Some(raw) = fields.raw(NAME) else {
        return Ok(Phase::Whole);
    };
    if kind(raw) != Kind::Object {
        return Err(wrong_type(NAME, raw, "an object"));
    }
    // serde's own text names the field of the inner object; its position would be one within it.
    let params: DisaggregatedParams = serde_json::from_str(raw.get()).map_err(|error| {
        let text = error.to_string();
        let text = text
            .rsplit_once(" at line ")
            .map_or(text.as_str(), |(what, _)| what);
        ApiError::field(NAME, text)
    })?;
    match params.request_type {
        RequestType::ContextAndGeneration => Ok(Phase::Whole),
        RequestType::ContextOnly => Ok(Phase::Context {
            disagg_request_id: params.disagg_request_id,
            early: false,
        }),
        RequestType::GenerationOnly => generation(params, limits),
    }
}

fn generation(params: DisaggregatedParams, limits: &Limits) -> Result<Phase, ApiError> {
    if params.draft_tokens.is_some_and(|draft| !draft.is_empty()) {
        return Err(ApiError::field(
            "disaggregated_params.draft_tokens",
            "speculative drafts are not served by this engine",
        ));
    }
    if params.schedule_style == Some(1) && params.encoded_opaque_state.is_none() {
        return Err(ApiError::field(
            "disaggregated_params.schedule_style",
            "generation_first is not served by this engine",
        ));
    }
    let first_tokens = params.first_gen_tokens.unwrap_or_default();
    if first_tokens.is_empty() || first_tokens.len() > FIRST_TOKENS_MAX {
        return Err(ApiError::field(
            "disaggregated_params.first_gen_tokens",
            format!(
                "a generation_only request needs 1 to {FIRST_TOKENS_MAX} tokens, got {}",
                first_tokens.len()
            ),
        ));
    }
    check_vocab(
        "disaggregated_params.first_gen_tokens",
        &first_tokens,
        limits.vocab,
    )?;
    let ctx_request_id = needed(params.ctx_request_id)?;
    let first_logprobs = read_logprobs(
        params.first_gen_log_probs.unwrap_or_default(),
        &first_tokens,
        limits.vocab,
    )?;
    let opaque_state = opaque_state(params.encoded_opaque_state)?;
    Ok(Phase::Generation {
        ticket: HandoffTicket {
            ctx_request_id,
            disagg_request_id: params.disagg_request_id,
            opaque_state,
            first_tokens,
            first_logprobs,
        },
        ctx_usage: params.ctx_usage,
    })
}

/// The ticket of a prompt that is still being read: nothing is chosen yet.
pub(super) fn prefetch_ticket(params: DisaggregatedParams) -> Result<HandoffTicket, ApiError> {
    Ok(HandoffTicket {
        ctx_request_id: needed(params.ctx_request_id)?,
        disagg_request_id: params.disagg_request_id,
        opaque_state: opaque_state(params.encoded_opaque_state)?,
        first_tokens: Vec::new(),
        first_logprobs: Vec::new(),
    })
}

fn needed(ctx_request_id: Option<u64>) -> Result<u64, ApiError> {
    ctx_request_id.ok_or_else(|| {
        ApiError::field(
            "disaggregated_params.ctx_request_id",
            "a generation_only request needs it",
        )
    })
}

fn opaque_state(text: Option<String>) -> Result<Vec<u8>, ApiError> {
    STANDARD.decode(text.unwrap_or_default()).map_err(|error| {
        ApiError::field(
            "disaggregated_params.encoded_opaque_state",
            format!("not base64: {error}"),
        )
    })
}

fn read_logprobs(
    wire: Vec<Vec<WireLogprob>>,
    tokens: &[TokenId],
    vocab: u32,
) -> Result<Vec<Vec<Logprob>>, ApiError> {
    let name = "disaggregated_params.first_gen_log_probs";
    if wire.is_empty() {
        return Ok(Vec::new());
    }
    let fits = wire.len() == tokens.len()
        && wire.iter().zip(tokens).all(|(list, token)| {
            list.first().is_some_and(|chosen| chosen.token_id == *token)
                && list.len() <= LOGPROBS_MAX as usize + 1
                && list.iter().all(|entry| entry.token_id < vocab)
        });
    if !fits {
        return Err(ApiError::field(
            name,
            format!(
                "expected one list for each of the {} first tokens, the token itself first, then at most {LOGPROBS_MAX} others",
                tokens.len()
            ),
        ));
    }
    let from_wire = |entry: WireLogprob| Logprob {
        token: entry.token_id,
        logprob: entry.logprob,
        rank: entry.rank.unwrap_or(0),
    };
    Ok(wire
        .into_iter()
        .map(|list| list.into_iter().map(from_wire).collect())
        .collect())
}

/// What a context-only answer carries. Without a ticket the answer is complete and there is nothing to fetch.
pub(super) fn context_answer(
    ticket: Option<HandoffTicket>,
    disagg_request_id: Option<u64>,
    tokens: &[TokenId],
) -> DisaggregatedParams {
    let mut params = DisaggregatedParams::new(RequestType::ContextOnly);
    params.disagg_request_id = disagg_request_id;
    params.first_gen_tokens = Some(tokens.to_vec());
    if let Some(ticket) = ticket {
        params.disagg_request_id = ticket.disagg_request_id.or(disagg_request_id);
        params.ctx_request_id = Some(ticket.ctx_request_id);
        params.encoded_opaque_state = Some(STANDARD.encode(&ticket.opaque_state));
        params.first_gen_log_probs =
            (!ticket.first_logprobs.is_empty()).then(|| to_wire(&ticket.first_logprobs));
        params.first_gen_tokens = Some(ticket.first_tokens);
    }
    params
}

fn to_wire(logprobs: &[Vec<Logprob>]) -> Vec<Vec<WireLogprob>> {
    let entry = |logprob: &Logprob| WireLogprob {
        token_id: logprob.token,
        logprob: logprob.logprob,
        rank: (logprob.rank > 0).then_some(logprob.rank),
    };
    logprobs
        .iter()
        .map(|list| list.iter().map(entry).collect())
        .collect()
}

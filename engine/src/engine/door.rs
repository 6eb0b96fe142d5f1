//! The check at the door: what can never be served is refused before it is queued, with the numbers that show why.

use crate::backend::TokenId;
use crate::request::{GenerateRequest, RequestKind, SamplingParams};

use super::handle::EngineLimits;

/// Refuses requests that no amount of waiting makes servable.
pub(super) fn check(request: &GenerateRequest, limits: &EngineLimits) -> Result<(), String> {
    check_length(request.prompt.len(), limits)?;
    check_tokens("prompt", &request.prompt, limits.vocab)?;
    check_sampling(&request.sampling, limits.vocab)?;
    check_kind(&request.kind, limits)
}

/// Events that a request can cause at most.
pub(super) fn events_max(request: &GenerateRequest, limits: &EngineLimits) -> usize {
    let room = limits.max_seq_len.saturating_sub(request.prompt.len());
    let tokens = room.min(request.sampling.max_tokens as usize);
    // A lease and the prompt's log-probabilities before, the end after, and a first token from elsewhere in any case.
    tokens + 4
}

fn check_length(prompt: usize, limits: &EngineLimits) -> Result<(), String> {
    let limit = limits.max_seq_len;
    if prompt == 0 {
        return Err("the prompt has no token".to_owned());
    }
    if prompt < limit {
        return Ok(());
    }
    Err(if limits.bounded_by_pool {
        format!(
            "the prompt has {prompt} tokens and needs room for one more, but the kv cache holds {limit} ({} blocks of {})",
            limits.block_count, limits.tokens_per_block
        )
    } else {
        format!(
            "the prompt has {prompt} tokens and needs room for one more, but max_seq_len is {limit}"
        )
    })
}

fn check_tokens(what: &str, tokens: &[TokenId], vocab: usize) -> Result<(), String> {
    match tokens.iter().find(|&&token| token as usize >= vocab) {
        Some(token) => Err(format!(
            "{what} token {token} is outside the vocabulary of {vocab}"
        )),
        None => Ok(()),
    }
}

fn check_sampling(params: &SamplingParams, vocab: usize) -> Result<(), String> {
    if params.max_tokens == 0 {
        return Err("max_tokens is 0, must be at least 1".to_owned());
    }
    let in_range = [
        ("temperature", params.temperature, 0.0..=f32::MAX),
        ("top_p", params.top_p, 0.0..=1.0),
        ("min_p", params.min_p, 0.0..=1.0),
        (
            "repetition_penalty",
            params.repetition_penalty,
            f32::MIN_POSITIVE..=f32::MAX,
        ),
        (
            "frequency_penalty",
            params.frequency_penalty,
            f32::MIN..=f32::MAX,
        ),
        (
            "presence_penalty",
            params.presence_penalty,
            f32::MIN..=f32::MAX,
        ),
    ];
    for (name, value, range) in in_range {
        if !range.contains(&value) {
            return Err(format!("{name} is {value}, which is out of range"));
        }
    }
    for &(token, bias) in &params.logit_bias {
        check_tokens("logit_bias", &[token], vocab)?;
        if !bias.is_finite() {
            return Err(format!("logit_bias of token {token} is {bias}"));
        }
    }
    Ok(())
}

fn check_kind(kind: &RequestKind, limits: &EngineLimits) -> Result<(), String> {
    if !matches!(kind, RequestKind::Aggregated) && !limits.has_handoff {
        return Err(
            "this server hands no kv off: it has no cache_transceiver_config with a backend"
                .to_owned(),
        );
    }
    let RequestKind::GenerationOnly(ticket) = kind else {
        return Ok(());
    };
    if ticket.first_tokens.is_empty() {
        return Err("the hand-off has no first token".to_owned());
    }
    check_tokens("first", &ticket.first_tokens, limits.vocab)
}

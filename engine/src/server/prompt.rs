//! Prompts: what a request may send as one, and the check that it fits.

use crate::backend::TokenId;
use crate::server::error::ApiError;
use crate::server::fields::{Fields, Kind, kind, parse, wrong_type};
use crate::server::sampling::{Common, Limits, check_vocab};
use crate::server::service::Service;

/// Most prompts of one request.
const PROMPTS_MAX: usize = 256;

/// Most answers of one request, over all prompts.
const ANSWERS_MAX: usize = 1024;

const PROMPT_EXPECTED: &str =
    "a string, a list of strings, a list of token ids, or a list of such lists";

/// One prompt as it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PromptInput {
    Text(String),
    Tokens(Vec<TokenId>),
}

/// Reads the field of a completion request.
pub(super) fn read_prompts(fields: &mut Fields<'_>) -> Result<Vec<PromptInput>, ApiError> {
    let name = "prompt";
    let Some(raw) = fields.raw(name) else {
        return Err(ApiError::field(
            name,
            format!("missing; expected {PROMPT_EXPECTED}"),
        ));
    };
    let prompts = match kind(raw) {
        Kind::Text => vec![PromptInput::Text(parse(name, raw, PROMPT_EXPECTED)?)],
        Kind::List => match first_of_list(raw.get()) {
            Some(b'"') => {
                let texts: Vec<String> = parse(name, raw, PROMPT_EXPECTED)?;
                texts.into_iter().map(PromptInput::Text).collect()
            }
            Some(b'[') => {
                let lists: Vec<Vec<TokenId>> = parse(name, raw, PROMPT_EXPECTED)?;
                lists.into_iter().map(PromptInput::Tokens).collect()
            }
            _ => vec![PromptInput::Tokens(parse(name, raw, PROMPT_EXPECTED)?)],
        },
        Kind::Null | Kind::Bool | Kind::Number | Kind::Object => {
            return Err(wrong_type(name, raw, PROMPT_EXPECTED));
        }
    };
    if prompts.len() > PROMPTS_MAX {
        return Err(ApiError::field(
            name,
            format!(
                "expected at most {PROMPTS_MAX} prompts, got {}",
                prompts.len()
            ),
        ));
    }
    Ok(prompts)
}

fn first_of_list(raw: &str) -> Option<u8> {
    raw.bytes().skip(1).find(|byte| !byte.is_ascii_whitespace())
}

/// Prompts as the engine takes them: tokens, cut as asked for, that fit.
pub(super) fn to_tokens(
    service: &Service,
    common: &Common,
    add_special_tokens: bool,
    inputs: Vec<PromptInput>,
    field: &'static str,
) -> Result<Vec<Vec<TokenId>>, ApiError> {
    if common.phase.is_split() && inputs.len() != 1 {
        return Err(ApiError::field(
            field,
            format!(
                "a request that is handed off has exactly one prompt, got {}",
                inputs.len()
            ),
        ));
    }
    if inputs.len() * common.best_of as usize > ANSWERS_MAX {
        return Err(ApiError::field(
            "n",
            format!(
                "expected at most {ANSWERS_MAX} answers over all prompts, got {} × {}",
                inputs.len(),
                common.best_of
            ),
        ));
    }
    let mut prompts = Vec::with_capacity(inputs.len());
    for input in inputs {
        let mut tokens = match input {
            PromptInput::Tokens(tokens) => {
                check_vocab(field, &tokens, service.limits.vocab)?;
                tokens
            }
            PromptInput::Text(text) => service.tools.encode(field, &text, add_special_tokens)?,
        };
        if let Some(keep) = common.truncate_prompt_tokens {
            tokens.drain(..tokens.len().saturating_sub(keep as usize));
        }
        check_length(field, tokens.len(), &service.limits)?;
        prompts.push(tokens);
    }
    Ok(prompts)
}

fn check_length(field: &str, tokens: usize, limits: &Limits) -> Result<(), ApiError> {
    if tokens == 0 {
        return Err(ApiError::field(field, "the prompt has no tokens"));
    }
    if tokens >= limits.max_seq_len as usize {
        return Err(ApiError::field(
            field,
            format!(
                "the prompt has {tokens} tokens, but prompt and answer together may have {} on this server",
                limits.max_seq_len
            ),
        ));
    }
    Ok(())
}

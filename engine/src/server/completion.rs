//! `POST /v1/completions`: the request's own fields (COMPAT.md §10.5).

use crate::server::error::ApiError;
use crate::server::fields::Fields;
use crate::server::prompt::{PromptInput, read_prompts};
use crate::server::sampling::{Common, LOGPROBS_MAX, Limits, read_common};

/// A completion request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct CompletionRequest {
    pub(super) prompts: Vec<PromptInput>,
    pub(super) add_special_tokens: bool,
    pub(super) common: Common,
}

/// Reads a body.
pub(super) fn read(body: &[u8], limits: &Limits) -> Result<CompletionRequest, ApiError> {
    let mut fields = Fields::read(body)?;
    read_model(&mut fields)?;
    let prompts = read_prompts(&mut fields)?;
    fields.neutral("suffix", &[], "is not served by this engine")?;
    let max_tokens = fields.count("max_tokens", 1, u32::MAX)?;
    let logprobs = fields.count("logprobs", 0, LOGPROBS_MAX)?;
    let common = read_common(&mut fields, limits, max_tokens, logprobs)?;
    let add_special_tokens = fields.bool("add_special_tokens", true)?;
    fields.finish()?;
    check_echo(&common)?;
    Ok(CompletionRequest {
        prompts,
        add_special_tokens,
        common,
    })
}

/// The model's name must be there, as the protocol says; a worker serves one model, so that any name means it.
pub(super) fn read_model(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    match fields.text("model")? {
        Some(_) => Ok(()),
        None => Err(ApiError::field("model", "missing; expected a string")),
    }
}

/// The prompt's log-probabilities exist where the prompt is read, so they cannot come from the other server.
fn check_echo(common: &Common) -> Result<(), ApiError> {
    if common.echo && common.sampling.logprobs.is_some() && common.phase.is_split() {
        return Err(ApiError::field(
            "echo",
            "log-probabilities of the prompt are not handed off; leave out echo or logprobs",
        ));
    }
    if common.echo && !common.text.detokenize {
        return Err(ApiError::field(
            "echo",
            "echo needs text, but `detokenize` is false",
        ));
    }
    Ok(())
}

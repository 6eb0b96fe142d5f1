//! `POST /v1/chat/completions`: the request's own fields (COMPAT.md §10.6) and its prompt.

use serde_json::{Map, Value};

use crate::backend::TokenId;
use crate::server::completion::read_model;
use crate::server::error::ApiError;
use crate::server::fields::{Fields, Kind, kind, parse, wrong_type};
use crate::server::sampling::{Common, LOGPROBS_MAX, Limits, read_common};

/// Most messages of one conversation.
const MESSAGES_MAX: usize = 65_536;

/// A chat request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ChatRequest {
    pub(super) conversation: Conversation,
    /// The prompt itself, in place of the rendered conversation.
    pub(super) prompt_token_ids: Option<Vec<TokenId>>,
    pub(super) add_special_tokens: bool,
    pub(super) common: Common,
}

/// What the chat template is given.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Conversation {
    pub(super) messages: Vec<Value>,
    pub(super) tools: Option<Value>,
    pub(super) documents: Option<Value>,
    pub(super) add_generation_prompt: bool,
    /// The request's own template.
    pub(super) template: Option<String>,
    pub(super) arguments: Map<String, Value>,
}

/// Reads a body.
pub(super) fn read(body: &[u8], limits: &Limits) -> Result<ChatRequest, ApiError> {
    let mut fields = Fields::read(body)?;
    read_model(&mut fields)?;
    let prompt_token_ids = fields.take("prompt_token_ids", "a list of token ids")?;
    let conversation = Conversation {
        messages: read_messages(&mut fields)?,
        tools: read_objects(&mut fields, "tools")?,
        documents: read_objects(&mut fields, "documents")?,
        add_generation_prompt: fields.bool("add_generation_prompt", true)?,
        template: fields.text("chat_template")?,
        arguments: fields
            .take("chat_template_kwargs", "an object")?
            .unwrap_or_default(),
    };
    read_refused(&mut fields)?;
    let max_tokens = read_max_tokens(&mut fields)?;
    let logprobs = read_logprobs(&mut fields)?;
    let request = ChatRequest {
        conversation,
        prompt_token_ids,
        add_special_tokens: fields.bool("add_special_tokens", false)?,
        common: read_common(&mut fields, limits, max_tokens, logprobs)?,
    };
    fields.finish()?;
    Ok(request)
}

/// A list of objects; an empty one counts as absent, so that templates do not announce tools that are none.
fn read_objects(fields: &mut Fields<'_>, name: &'static str) -> Result<Option<Value>, ApiError> {
    let list: Option<Vec<Map<String, Value>>> = fields.take(name, "a list of objects")?;
    Ok(list
        .filter(|list| !list.is_empty())
        .map(|list| list.into_iter().map(Value::Object).collect()))
}

fn read_refused(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    const NOT_SERVED: &str = "is not served by this engine";
    fields.neutral(
        "tool_choice",
        &["\"none\""],
        "only \"none\" is served: tools reach the chat template, calls are not parsed from the answer",
    )?;
    // Without tool calls there is nothing that could be parallel.
    fields.bool("parallel_tool_calls", true)?;
    fields.neutral("reasoning_effort", &["\"low\""], NOT_SERVED)?;
    fields.neutral("mm_processor_kwargs", &["{}"], NOT_SERVED)?;
    fields.neutral("media_io_kwargs", &["{}"], NOT_SERVED)?;
    fields.neutral("thinking", &["false", r#"{"type":"disabled"}"#], NOT_SERVED)?;
    fields.neutral("prompt_token_ids_b64", &[], NOT_SERVED)?;
    fields.neutral("modalities", &["[\"text\"]"], NOT_SERVED)
}

/// Both names mean the same; two different values are a mistake.
fn read_max_tokens(fields: &mut Fields<'_>) -> Result<Option<u32>, ApiError> {
    let new = fields.count("max_completion_tokens", 1, u32::MAX)?;
    let old = fields.count("max_tokens", 1, u32::MAX)?;
    match (new, old) {
        (Some(new), Some(old)) if new != old => Err(ApiError::field(
            "max_tokens",
            format!("{old} contradicts max_completion_tokens, {new}"),
        )),
        _ => Ok(new.or(old)),
    }
}

fn read_logprobs(fields: &mut Fields<'_>) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool("logprobs", false)?;
    let top = fields.count("top_logprobs", 0, LOGPROBS_MAX)?;
    match (wanted, top) {
        (false, Some(top)) if top > 0 => Err(ApiError::field(
            "top_logprobs",
            format!("{top} alternatives need `logprobs` to be true"),
        )),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

fn read_messages(fields: &mut Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let name = "messages";
    let Some(raw) = fields.raw(name) else {
        return Err(ApiError::field(
            name,
            "missing; expected a list of messages",
        ));
    };
    if kind(raw) != Kind::List {
        return Err(wrong_type(name, raw, "a list of messages"));
    }
    let messages: Vec<Map<String, Value>> = parse(name, raw, "a list of messages")?;
    if messages.is_empty() || messages.len() > MESSAGES_MAX {
        return Err(ApiError::field(
            name,
            format!(
                "expected 1 to {MESSAGES_MAX} messages, got {}",
                messages.len()
            ),
        ));
    }
    Ok(messages.into_iter().map(Value::Object).collect())
}

impl Conversation {
    /// Who answers.
    pub(super) fn role(&self) -> &str {
        if self.add_generation_prompt {
            return "assistant";
        }
        self.last("role").unwrap_or("assistant")
    }

    /// What `echo` puts before the answer: the last message, when the answer goes on with it.
    pub(super) fn continued(&self) -> Option<&str> {
        if self.last("role") == Some(self.role()) {
            return self.last("content");
        }
        None
    }

    fn last(&self, key: &str) -> Option<&str> {
        self.messages.last()?.get(key)?.as_str()
    }
}

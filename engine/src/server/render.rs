//! Answers as JSON (COMPAT.md §10.7): the objects of completions and of chat, whole and in chunks. Nulls are written.

use std::time::{SystemTime, UNIX_EPOCH};

use baton_configs::wire::{DisaggregatedParams, Usage};
use serde::Serialize;
use uuid::Uuid;

use crate::backend::TokenId;
use crate::server::answer::{Finish, StopReason};
use crate::server::logprobs::Logprobs;

/// Which of the two objects an answer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Shape {
    /// `text_completion`.
    Completion,
    /// `chat.completion`, answered by this role, usually `assistant`.
    Chat { role: String },
}

/// What every object of one answer repeats.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) shape: Shape,
    id: String,
    created: u64,
    model: String,
}

impl Header {
    /// A new answer's.
    pub(super) fn new(shape: Shape, model: &str) -> Self {
        let prefix = match shape {
            Shape::Completion => "cmpl",
            Shape::Chat { .. } => "chatcmpl",
        };
        Self {
            id: format!("{prefix}-{}", Uuid::new_v4().simple()),
            shape,
            created: unix_seconds(),
            model: model.to_owned(),
        }
    }
}

impl Header {
    /// Whether the answer is a chat's.
    pub(super) fn is_chat(&self) -> bool {
        matches!(self.shape, Shape::Chat { .. })
    }
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}

/// One answer or a part of one.
#[derive(Debug, Default)]
pub(super) struct Choice {
    pub(super) index: usize,
    pub(super) text: String,
    pub(super) token_ids: Vec<TokenId>,
    pub(super) logprobs: Option<Logprobs>,
    pub(super) finish: Option<Finish>,
    pub(super) stop_reason: Option<StopReason>,
    pub(super) disaggregated_params: Option<DisaggregatedParams>,
}

#[derive(Serialize)]
struct Object<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<C>,
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Option<&'a [TokenId]>>,
}

#[derive(Serialize)]
struct CompletionChoice {
    index: usize,
    text: String,
    token_ids: Vec<TokenId>,
    logprobs: Option<Logprobs>,
    context_logits: Option<()>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disaggregated_params: Option<Option<DisaggregatedParams>>,
    avg_decoded_tokens_per_iter: Option<f32>,
}

#[derive(Serialize)]
struct ChatChoice {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Message>,
    token_ids: Vec<TokenId>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disaggregated_params: Option<Option<DisaggregatedParams>>,
    avg_decoded_tokens_per_iter: Option<f32>,
}

#[derive(Serialize)]
struct Message {
    role: Option<String>,
    content: Option<String>,
    reasoning_content: Option<String>,
    reasoning: Option<String>,
    tool_calls: Vec<()>,
}

impl Message {
    fn new(role: Option<String>, content: String) -> Self {
        Self {
            role,
            content: Some(content),
            reasoning_content: None,
            reasoning: None,
            tool_calls: Vec::new(),
        }
    }
}

impl Choice {
    fn completion(self, whole: bool) -> CompletionChoice {
        CompletionChoice {
            index: self.index,
            text: self.text,
            token_ids: self.token_ids,
            logprobs: self.logprobs,
            context_logits: None,
            finish_reason: self.finish.map(Finish::name),
            stop_reason: self.stop_reason,
            disaggregated_params: whole.then_some(self.disaggregated_params),
            avg_decoded_tokens_per_iter: None,
        }
    }

    fn chat(self, role: Option<&str>, whole: bool) -> ChatChoice {
        let message = Message::new(role.map(str::to_owned), self.text);
        let (message, delta) = if whole {
            (Some(message), None)
        } else {
            (None, Some(message))
        };
        ChatChoice {
            index: self.index,
            message,
            delta,
            token_ids: self.token_ids,
            logprobs: self.logprobs,
            finish_reason: self.finish.map(Finish::name),
            stop_reason: self.stop_reason,
            disaggregated_params: whole.then_some(self.disaggregated_params),
            avg_decoded_tokens_per_iter: None,
        }
    }
}

impl Header {
    fn object<'a, C>(
        &'a self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Usage>,
    ) -> Object<'a, C> {
        Object {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            choices,
            usage,
            prompt_token_ids: None,
        }
    }

    /// The answer as one object.
    pub(super) fn whole(
        &self,
        choices: Vec<Choice>,
        usage: Usage,
        prompt_token_ids: Option<&[TokenId]>,
    ) -> Result<String, serde_json::Error> {
        match &self.shape {
            Shape::Completion => {
                let choices = choices.into_iter().map(|choice| choice.completion(true));
                let mut object = self.object("text_completion", choices.collect(), Some(usage));
                object.prompt_token_ids = Some(prompt_token_ids);
                serde_json::to_string(&object)
            }
            Shape::Chat { role } => {
                let choices = choices
                    .into_iter()
                    .map(|choice| choice.chat(Some(role), true));
                let mut object = self.object("chat.completion", choices.collect(), Some(usage));
                object.prompt_token_ids = Some(prompt_token_ids);
                serde_json::to_string(&object)
            }
        }
    }

    /// Appends a part of the answer as a server-sent event. Without a choice it is the usage chunk.
    pub(super) fn chunk(
        &self,
        out: &mut String,
        choice: Option<Choice>,
        usage: Option<Usage>,
    ) -> Result<(), serde_json::Error> {
        let json = match &self.shape {
            Shape::Completion => {
                let choices = choice.into_iter().map(|choice| choice.completion(false));
                serde_json::to_string(&self.object("text_completion", choices.collect(), usage))
            }
            Shape::Chat { .. } => {
                let choices = choice.into_iter().map(|choice| choice.chat(None, false));
                self.chat_chunk(choices.collect(), usage)
            }
        }?;
        append_event(out, &json);
        Ok(())
    }

    /// Appends the chunk that begins a chat answer: who speaks, and what is echoed.
    pub(super) fn opening_chunk(
        &self,
        out: &mut String,
        index: usize,
        echo: String,
        usage: Option<Usage>,
    ) -> Result<(), serde_json::Error> {
        let Shape::Chat { role } = &self.shape else {
            return Ok(());
        };
        let choice = Choice {
            index,
            text: echo,
            ..Choice::default()
        };
        let json = self.chat_chunk(vec![choice.chat(Some(role), false)], usage)?;
        append_event(out, &json);
        Ok(())
    }

    fn chat_chunk(
        &self,
        choices: Vec<ChatChoice>,
        usage: Option<Usage>,
    ) -> Result<String, serde_json::Error> {
        serde_json::to_string(&self.object("chat.completion.chunk", choices, usage))
    }
}

/// Appends one server-sent event.
pub(super) fn append_event(out: &mut String, data: &str) {
    out.push_str("data: ");
    out.push_str(data);
    out.push_str("\n\n");
}

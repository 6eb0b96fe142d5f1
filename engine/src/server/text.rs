//! The model's tokenizer and chat template as this server uses them.

use std::sync::Arc;

use crate::backend::TokenId;
use crate::server::chat::Conversation;
use crate::server::error::ApiError;
use crate::server::sampling::TextOptions;
use crate::tokenizer::{
    ChatError, ChatRequest, ChatTemplate, DetokenizeOptions, Detokenizer, StopMatcher, TokenText,
    Tokenizer,
};

/// Text in and out of one model.
#[derive(Debug)]
pub(crate) struct TextTools {
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    eos_tokens: Vec<TokenId>,
    /// What `add_special_tokens` puts before every text.
    prefix: Vec<TokenId>,
}

impl TextTools {
    /// The tools of one model.
    pub(crate) fn new(
        tokenizer: Arc<Tokenizer>,
        template: Option<ChatTemplate>,
        eos_tokens: Vec<TokenId>,
    ) -> Self {
        let prefix = tokenizer.encode("", true).unwrap_or_default();
        Self {
            tokenizer,
            template,
            eos_tokens,
            prefix,
        }
    }

    /// The model's end-of-sequence tokens.
    pub(crate) fn eos_tokens(&self) -> &[TokenId] {
        &self.eos_tokens
    }

    /// Text to tokens.
    pub(super) fn encode(
        &self,
        field: &'static str,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Vec<TokenId>, ApiError> {
        self.tokenizer
            .encode(text, add_special_tokens)
            .map_err(|error| ApiError::field(field, error))
    }

    /// A conversation to the text that the model continues.
    pub(super) fn render(&self, conversation: &Conversation) -> Result<String, ApiError> {
        let request = ChatRequest {
            messages: &conversation.messages,
            tools: conversation.tools.as_ref(),
            documents: conversation.documents.as_ref(),
            add_generation_prompt: conversation.add_generation_prompt,
            arguments: Some(&conversation.arguments),
        };
        let rendered = match (&conversation.template, &self.template) {
            (Some(own), _) => ChatTemplate::inline(&self.tokenizer, own)
                .and_then(|template| template.render(&request)),
            (None, Some(template)) => template.render(&request),
            (None, None) => Err(ChatError::NoTemplate),
        };
        rendered.map_err(|error| {
            let message = error.to_string().replace('\n', "; ");
            ApiError::field(blamed_field(&error), message)
        })
    }

    /// A prompt's text for `echo`: all of it but what `add_special_tokens` put before it.
    ///
    /// A generation server gets tokens where an aggregated server gets text, and both must echo the same.
    pub(super) fn echo(&self, prompt: &[TokenId]) -> String {
        let own = prompt.strip_prefix(&self.prefix[..]).unwrap_or(prompt);
        self.tokenizer.decode(own, false)
    }

    /// A token by itself, as log-probabilities name it.
    pub(super) fn token_text(&self, token: TokenId) -> TokenText<'_> {
        self.tokenizer.token_text(token)
    }

    /// A writer of the text that follows a prompt.
    pub(super) fn writer(&self, options: &TextOptions, prompt: &[TokenId]) -> TextWriter {
        let detokenize = DetokenizeOptions {
            skip_special_tokens: options.skip_special_tokens,
            spaces_between_special_tokens: options.spaces_between_special_tokens,
        };
        TextWriter {
            detokenizer: Detokenizer::after_prompt(Arc::clone(&self.tokenizer), detokenize, prompt),
            stops: options.stop.clone(),
            matcher: StopMatcher::new(&options.stop, options.include_stop),
        }
    }
}

fn blamed_field(error: &ChatError) -> &'static str {
    match error {
        ChatError::Syntax { .. } | ChatError::OutOfFuel => "chat_template",
        ChatError::ReservedArgument { .. } => "chat_template_kwargs",
        _ => "messages",
    }
}

/// Tokens to text, up to a stop string.
#[derive(Debug)]
pub(super) struct TextWriter {
    detokenizer: Detokenizer,
    stops: Vec<String>,
    matcher: StopMatcher,
}

impl TextWriter {
    /// Takes a token; gives the text that is certain now, and the stop string that it ended with.
    pub(super) fn push(&mut self, token: TokenId, match_stops: bool) -> (String, Option<String>) {
        let text = self.detokenizer.push(token);
        self.matched(text, match_stops)
    }

    /// Ends the text; gives what was held back.
    pub(super) fn finish(mut self, match_stops: bool) -> (String, Option<String>) {
        let tail = self.detokenizer.finish();
        let (mut text, stop) = self.matched(tail, match_stops);
        if stop.is_none() {
            text.push_str(&self.matcher.finish());
        }
        (text, stop)
    }

    fn matched(&mut self, text: String, match_stops: bool) -> (String, Option<String>) {
        if !match_stops {
            return (text, None);
        }
        let step = self.matcher.push(&text);
        (
            step.text,
            step.stopped.map(|index| self.stops[index].clone()),
        )
    }
}

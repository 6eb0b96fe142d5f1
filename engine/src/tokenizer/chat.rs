//! Chat templates: messages to the text that the model was trained on, as transformers renders it.
//!
//! A template is trusted as the weights are: it comes with the model or from the operator. Fuel bounds its
//! loops, so a faulty one ends with an error instead of hanging a request.

mod functions;
mod json;
mod messages;

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior, Value as JinjaValue};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::{Map, Value};

use self::functions::Raised;
use super::error::one_line;
use super::{NamedTemplate, Tokenizer};

/// Template instructions per rendering. A long chat with tools takes tens of thousands.
const FUEL: u64 = 4_000_000;

/// Names that a template is given; `chat_template_kwargs` may not take their place.
const RESERVED: &[&str] = &["messages", "tools", "documents", "add_generation_prompt"];

/// Why a chat could not be rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The model has no chat template.
    #[error(
        "the model has no chat template\nhint: give one with --chat_template (a file, or the template itself)"
    )]
    NoTemplate,
    /// The model has several templates, none of them for this request.
    #[error("the model has no chat template named `{wanted}` (it has: {names})")]
    NoSuchTemplate {
        /// The one looked for.
        wanted: String,
        /// Those that are there.
        names: String,
    },
    /// The file given as a template cannot be read.
    #[error("cannot read chat template {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The template is not valid Jinja.
    #[error("chat template `{name}` is not valid: {reason}")]
    Syntax {
        /// Its name.
        name: String,
        /// What is wrong with it, and where.
        reason: String,
    },
    /// The template itself refused the messages (`raise_exception`).
    #[error("the chat template refused the messages: {message}")]
    Refused {
        /// Its words.
        message: String,
    },
    /// The template used more steps than any real chat needs.
    #[error("the chat template did not end within {FUEL} steps")]
    OutOfFuel,
    /// The template failed on these messages.
    #[error("cannot render the chat template: {reason}")]
    Render {
        /// What failed, and where.
        reason: String,
    },
    /// A message is not shaped as one.
    #[error("messages[{index}]: {reason}")]
    Message {
        /// Its place.
        index: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A message holds something else than text.
    #[error("messages[{index}]: content of type `{kind}` is not supported; only text is")]
    NotText {
        /// Its place.
        index: usize,
        /// The part's type.
        kind: String,
    },
    /// `chat_template_kwargs` names what the request has a field of its own for.
    #[error("chat_template_kwargs: `{name}` is set by the request itself")]
    ReservedArgument {
        /// The name.
        name: String,
    },
}

/// What a template is given.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChatRequest<'a> {
    /// The messages as the API gives them.
    pub messages: &'a [Value],
    /// Tool declarations.
    pub tools: Option<&'a Value>,
    /// Documents to answer from.
    pub documents: Option<&'a Value>,
    /// End with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Further variables (`chat_template_kwargs`).
    pub arguments: Option<&'a Map<String, Value>>,
}

/// A model's chat template, or several by name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    names: Vec<String>,
    special_tokens: BTreeMap<&'static str, String>,
}

impl ChatTemplate {
    /// The template that came with the model.
    ///
    /// # Errors
    /// When there is none, or it is not valid Jinja.
    pub fn of_model(tokenizer: &Tokenizer) -> Result<Self, ChatError> {
        if tokenizer.chat_templates().is_empty() {
            return Err(ChatError::NoTemplate);
        }
        Self::new(tokenizer, tokenizer.chat_templates(), SystemTime::now)
    }

    /// A template in place of the model's: the path of a file, or the template itself.
    ///
    /// # Errors
    /// When it is a path that cannot be read, or not valid Jinja.
    pub fn from_option(tokenizer: &Tokenizer, option: &str) -> Result<Self, ChatError> {
        let path = Path::new(option);
        let inline = option.contains("{{") || option.contains("{%");
        if inline && !path.is_file() {
            return Self::inline(tokenizer, option);
        }
        let text = fs::read_to_string(path).map_err(|source| ChatError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::inline(tokenizer, &text)
    }

    /// A template in place of the model's.
    ///
    /// # Errors
    /// When it is not valid Jinja.
    pub fn inline(tokenizer: &Tokenizer, text: &str) -> Result<Self, ChatError> {
        let template = NamedTemplate {
            name: "default".to_owned(),
            text: text.to_owned(),
        };
        Self::new(tokenizer, &[template], SystemTime::now)
    }

    fn new(
        tokenizer: &Tokenizer,
        templates: &[NamedTemplate],
        clock: fn() -> SystemTime,
    ) -> Result<Self, ChatError> {
        let mut environment = environment(clock);
        let mut names = Vec::new();
        for NamedTemplate { name, text } in templates {
            environment
                .add_template_owned(name.clone(), functions::without_generation_tags(text))
                .map_err(|error| ChatError::Syntax {
                    name: one_line(name),
                    reason: one_line(&error.to_string()),
                })?;
            names.push(name.clone());
        }
        let control = &tokenizer.control;
        let special_tokens = [
            ("bos_token", control.bos),
            ("eos_token", control.eos),
            ("pad_token", control.pad),
            ("unk_token", control.unknown),
        ]
        .into_iter()
        .filter_map(|(name, id)| Some((name, tokenizer.token_source(id)?)))
        .collect();
        Ok(Self {
            environment,
            names,
            special_tokens,
        })
    }

    /// Renders a chat. The text holds its special tokens already, so it is encoded without adding any.
    ///
    /// # Errors
    /// When a message is not text, the template refuses it, or fails.
    pub fn render(&self, request: &ChatRequest<'_>) -> Result<String, ChatError> {
        let context = self.context(request)?;
        let template = self
            .environment
            .get_template(self.template_name(request.tools.is_some())?)
            .map_err(|error| render_error(&error))?;
        template
            .render(context)
            .map_err(|error| render_error(&error))
    }

    /// Transformers' rule: `tool_use` for requests with tools where there is one, else `default`.
    fn template_name(&self, with_tools: bool) -> Result<&str, ChatError> {
        let has = |wanted: &str| self.names.iter().any(|name| name == wanted);
        if with_tools && has("tool_use") {
            return Ok("tool_use");
        }
        if has("default") {
            return Ok("default");
        }
        Err(ChatError::NoSuchTemplate {
            wanted: "default".to_owned(),
            names: self.names.join(", "),
        })
    }

    fn context(&self, request: &ChatRequest<'_>) -> Result<JinjaValue, ChatError> {
        let mut context: BTreeMap<&str, JinjaValue> = BTreeMap::new();
        for (name, token) in &self.special_tokens {
            context.insert(name, JinjaValue::from(token.as_str()));
        }
        for (name, value) in request.arguments.into_iter().flatten() {
            if RESERVED.contains(&name.as_str()) {
                let name = name.clone();
                return Err(ChatError::ReservedArgument { name });
            }
            context.insert(name, JinjaValue::from_serialize(value));
        }
        let messages = messages::normalised(request.messages)?;
        context.insert("messages", JinjaValue::from_serialize(&messages));
        context.insert("tools", JinjaValue::from_serialize(request.tools));
        context.insert("documents", JinjaValue::from_serialize(request.documents));
        context.insert(
            "add_generation_prompt",
            JinjaValue::from(request.add_generation_prompt),
        );
        Ok(context.into_iter().collect())
    }
}

/// Jinja as transformers sets it up.
fn environment(clock: fn() -> SystemTime) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_debug(false);
    environment.set_fuel(Some(FUEL));
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.set_formatter(functions::format_as_python);
    environment.add_filter("tojson", json::tojson);
    environment.add_function("raise_exception", functions::raise_exception);
    environment.add_function("strftime_now", move |format: &str| {
        functions::strftime(format, clock())
    });
    environment
}

fn render_error(error: &minijinja::Error) -> ChatError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(inner) = cause {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return ChatError::Refused {
                message: one_line(message),
            };
        }
        cause = inner.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => ChatError::OutOfFuel,
        _ => ChatError::Render {
            reason: one_line(&error.to_string()),
        },
    }
}

#[cfg(test)]
mod tests;

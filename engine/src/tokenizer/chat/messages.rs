//! Messages as templates expect them: content is one text, arguments of tool calls are objects.

use serde_json::{Map, Value};

use super::ChatError;
use crate::tokenizer::error::one_line;

/// The messages in the shape that templates are written for.
pub(super) fn normalised(messages: &[Value]) -> Result<Vec<Value>, ChatError> {
    messages
        .iter()
        .enumerate()
        .map(|(index, message)| normalised_one(message, index).map(Value::Object))
        .collect()
}

fn normalised_one(message: &Value, index: usize) -> Result<Map<String, Value>, ChatError> {
    let wrong = |reason: &str| ChatError::Message {
        index,
        reason: reason.to_owned(),
    };
    let mut message = message
        .as_object()
        .ok_or_else(|| wrong("expected an object"))?
        .clone();
    if !message.get("role").is_some_and(Value::is_string) {
        return Err(wrong("`role` must be text"));
    }
    let content = text_of(message.get("content").unwrap_or(&Value::Null), index)?;
    message.insert("content".to_owned(), Value::String(content));
    match message.get_mut("tool_calls") {
        None | Some(Value::Null) => {}
        Some(Value::Array(calls)) => {
            for call in calls {
                parse_arguments(call).map_err(|reason| wrong(&reason))?;
            }
        }
        Some(_) => return Err(wrong("`tool_calls` must be a list")),
    }
    Ok(message)
}

/// Text parts make one text, a line each.
fn text_of(content: &Value, index: usize) -> Result<String, ChatError> {
    let parts = match content {
        Value::Null => return Ok(String::new()),
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
            return Err(ChatError::Message {
                index,
                reason: "`content` must be text or a list of parts".to_owned(),
            });
        }
    };
    let texts = parts
        .iter()
        .map(|part| part_text(part, index))
        .collect::<Result<Vec<&str>, ChatError>>()?;
    let texts: Vec<&str> = texts.into_iter().filter(|text| !text.is_empty()).collect();
    Ok(texts.join("\n"))
}

fn part_text(part: &Value, index: usize) -> Result<&str, ChatError> {
    if let Some(text) = part.as_str() {
        return Ok(text);
    }
    let wrong = |reason: &str| ChatError::Message {
        index,
        reason: reason.to_owned(),
    };
    match part["type"].as_str() {
        Some("text") => part["text"]
            .as_str()
            .ok_or_else(|| wrong("a part of type `text` must have a `text`")),
        Some(other) => Err(ChatError::NotText {
            index,
            kind: one_line(other),
        }),
        None => Err(wrong("a part of the content has no `type`")),
    }
}

/// The API carries arguments as JSON text; templates print them as objects.
fn parse_arguments(call: &mut Value) -> Result<(), String> {
    let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else {
        return Ok(());
    };
    let parsed = match function.get("arguments") {
        None | Some(Value::Null) => Value::Object(Map::new()),
        Some(Value::Object(_)) => return Ok(()),
        Some(Value::String(text)) => match serde_json::from_str(text) {
            Ok(parsed) => parsed,
            // Templates that print such text verbatim get it verbatim.
            Err(_) => return Ok(()),
        },
        Some(other) => other.clone(),
    };
    if !parsed.is_object() {
        return Err("`arguments` of a tool call must be an object".to_owned());
    }
    function.insert("arguments".to_owned(), parsed);
    Ok(())
}

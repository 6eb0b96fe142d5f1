//! What a context server answered: a ticket for a generation server, or an answer that is complete already.
//!
//! A complete one (the first token ended it) is given to the client as its own request would have been answered:
//! whole, or as the event stream that a generation server would have written, text included.

use std::borrow::Cow;

use baton_configs::wire::Usage;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::object::RawObject;
use crate::request_body::Api;

/// What a generation server needs to go on.
#[derive(Debug, Clone)]
pub(crate) struct Ticket {
    /// Its `disaggregated_params`, as JSON text.
    pub(crate) params: String,
    /// The tokenised prompt, as JSON text.
    pub(crate) prompt_token_ids: Option<String>,
    /// What the context phase used.
    pub(crate) usage: Option<Usage>,
    /// Id under which the context server holds the KV.
    pub(crate) ctx_request_id: u64,
}

/// A context server's answer.
#[derive(Debug)]
pub(crate) enum ContextAnswer {
    /// More is to come.
    Ticket(Ticket),
    /// That was all.
    Complete,
}

#[derive(Deserialize)]
struct RawAnswer<'a> {
    #[serde(borrow)]
    choices: Vec<RawChoice<'a>>,
    #[serde(borrow, default)]
    prompt_token_ids: Option<&'a RawValue>,
    #[serde(borrow, default)]
    usage: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RawChoice<'a> {
    #[serde(borrow, default)]
    finish_reason: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    disaggregated_params: Option<RawObject<'a>>,
}

/// Checks an answer (COMPAT.md §8.1, steps 6 to 8). The error says what is missing.
pub(crate) fn read(body: &[u8], conversation_id: Option<&str>) -> Result<ContextAnswer, String> {
    let answer: RawAnswer<'_> =
        serde_json::from_slice(body).map_err(|error| format!("not a completion: {error}"))?;
    let choice_count = answer.choices.len();
    let Ok([choice]) = <[RawChoice<'_>; 1]>::try_from(answer.choices) else {
        return Err(format!("{choice_count} choices, expected 1"));
    };
    match choice.finish_reason.as_deref() {
        Some("length") if offers_nothing(choice.disaggregated_params.as_ref()) => {
            return Ok(ContextAnswer::Complete);
        }
        Some("length" | "not_finished") => {}
        Some(_) => return Ok(ContextAnswer::Complete),
        None => return Err("finish_reason is null".to_owned()),
    }
    let mut params = choice
        .disaggregated_params
        .ok_or("disaggregated_params is missing")?;
    let ctx_request_id = id(&params, "ctx_request_id")?;
    id(&params, "disagg_request_id")?;
    let usage: Option<Usage> = answer
        .usage
        .and_then(|raw| serde_json::from_str(raw.get()).ok());
    params.set("request_type", "\"generation_only\"");
    params.set("schedule_style", "0");
    if let Some(usage) = &usage {
        params.set("ctx_usage", to_text(usage));
    }
    if let Some(conversation_id) = conversation_id {
        params.set("conversation_id", to_text(&conversation_id));
    }
    Ok(ContextAnswer::Ticket(Ticket {
        params: params.to_text(),
        prompt_token_ids: answer.prompt_token_ids.map(|raw| raw.get().to_owned()),
        usage,
        ctx_request_id,
    }))
}

/// Whether a context server says in so many words that it holds no KV: with `max_tokens: 1` its one token is the whole
/// answer. A field that is merely missing is a mistake, not an answer.
fn offers_nothing(params: Option<&RawObject<'_>>) -> bool {
    let is_null = |name| params.is_some_and(|params| params.get(name) == Some("null"));
    is_null("ctx_request_id") && is_null("encoded_opaque_state")
}

fn id(params: &RawObject<'_>, name: &str) -> Result<u64, String> {
    let raw = params
        .get_set(name)
        .ok_or_else(|| format!("disaggregated_params.{name} is missing"))?;
    raw.parse()
        .map_err(|_| format!("disaggregated_params.{name} is {raw}, expected an integer"))
}

fn to_text<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data has string keys and finite numbers")
}

/// A complete answer as the client may see it: without what only servers say to each other.
pub(crate) fn complete_whole(body: &[u8]) -> Result<Bytes, String> {
    let mut answer = complete_value(body)?;
    if let Some(choices) = answer.get_mut("choices").and_then(Value::as_array_mut) {
        for choice in choices.iter_mut().filter_map(Value::as_object_mut) {
            choice.shift_remove("disaggregated_params");
        }
    }
    answer.shift_remove("prompt_token_ids");
    Ok(to_text(&Value::Object(answer)).into())
}

/// A complete answer as an event stream.
pub(crate) fn complete_stream(api: Api, body: &[u8], include_usage: bool) -> Result<Bytes, String> {
    let mut answer = complete_value(body)?;
    let usage = answer.shift_remove("usage").unwrap_or(Value::Null);
    let choice = match answer.shift_remove("choices") {
        Some(Value::Array(mut choices)) if choices.len() == 1 => choices.remove(0),
        _ => return Err("expected one choice".to_owned()),
    };
    let Value::Object(mut choice) = choice else {
        return Err("the choice is not an object".to_owned());
    };
    choice.shift_remove("disaggregated_params");
    answer.shift_remove("prompt_token_ids");
    let mut choices: Vec<Vec<Value>> = match api {
        Api::Completions => vec![vec![Value::Object(choice)]],
        Api::Chat => chat_deltas(choice)
            .into_iter()
            .map(|choice| vec![choice])
            .collect(),
    };
    if api == Api::Chat {
        answer.insert("object".to_owned(), json!("chat.completion.chunk"));
    }
    let mut usages = vec![Value::Null; choices.len()];
    if include_usage {
        choices.push(Vec::new());
        usages.push(usage);
    }
    let mut stream = String::new();
    for (choices, usage) in choices.into_iter().zip(usages) {
        let mut chunk = answer.clone();
        chunk.insert("choices".to_owned(), Value::Array(choices));
        if include_usage {
            chunk.insert("usage".to_owned(), usage);
        }
        stream.push_str("data: ");
        stream.push_str(&to_text(&Value::Object(chunk)));
        stream.push_str("\n\n");
    }
    stream.push_str("data: [DONE]\n\n");
    Ok(stream.into())
}

fn complete_value(body: &[u8]) -> Result<Map<String, Value>, String> {
    serde_json::from_slice(body).map_err(|error| format!("not a completion: {error}"))
}

/// The choices of a chat stream: the role, then the message, then why it ended.
fn chat_deltas(mut choice: Map<String, Value>) -> Vec<Value> {
    let mut message = match choice.shift_remove("message") {
        Some(Value::Object(message)) => message,
        _ => Map::new(),
    };
    let index = choice.get("index").cloned().unwrap_or(json!(0));
    let role = message.shift_remove("role").unwrap_or(json!("assistant"));
    let logprobs = choice.shift_remove("logprobs").unwrap_or(Value::Null);
    message.retain(|_, value| !value.is_null() && *value != json!("") && *value != json!([]));
    if let Some(Value::Array(calls)) = message.get_mut("tool_calls") {
        for (index, call) in calls
            .iter_mut()
            .filter_map(Value::as_object_mut)
            .enumerate()
        {
            call.insert("index".to_owned(), json!(index));
        }
    }
    let mut deltas = vec![json!({
        "index": index, "delta": {"role": role, "content": ""}, "logprobs": null, "finish_reason": null,
    })];
    if !message.is_empty() {
        deltas.push(json!({
            "index": index, "delta": message, "logprobs": logprobs, "finish_reason": null,
        }));
    }
    choice.insert("delta".to_owned(), json!({}));
    deltas.push(Value::Object(choice));
    deltas
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICKET: &str = r#"{"id":"cmpl-1","choices":[{"index":0,"text":" a","finish_reason":"length",
        "disaggregated_params":{"request_type":"context_only","first_gen_tokens":[7],"ctx_request_id":11,
        "disagg_request_id":12,"encoded_opaque_state":"QUJD","ctx_usage":null,"future_field":{"x":[1]}}}],
        "usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":2}},
        "prompt_token_ids":[5, 6,7]}"#;

    fn ticket(body: &str) -> Ticket {
        match read(body.as_bytes(), None).unwrap() {
            ContextAnswer::Ticket(ticket) => ticket,
            ContextAnswer::Complete => panic!("expected a ticket"),
        }
    }

    #[test]
    fn ticket_keeps_all_that_the_context_server_said() {
        let ticket = ticket(TICKET);
        assert_eq!(ticket.ctx_request_id, 11);
        assert_eq!(ticket.prompt_token_ids.as_deref(), Some("[5, 6,7]"));
        let params: Value = serde_json::from_str(&ticket.params).unwrap();
        assert_eq!(
            params,
            json!({"request_type": "generation_only", "first_gen_tokens": [7], "ctx_request_id": 11,
                "disagg_request_id": 12, "encoded_opaque_state": "QUJD", "future_field": {"x": [1]},
                "schedule_style": 0,
                "ctx_usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1,
                    "prompt_tokens_details": {"cached_tokens": 2}}})
        );
    }

    #[test]
    fn one_token_that_was_all_is_complete() {
        let body = TICKET
            .replace("\"ctx_request_id\":11", "\"ctx_request_id\":null")
            .replace("\"QUJD\"", "null");
        assert!(matches!(
            read(body.as_bytes(), None),
            Ok(ContextAnswer::Complete)
        ));
        let more = body.replace("\"length\"", "\"not_finished\"");
        assert!(read(more.as_bytes(), None).is_err());
    }

    #[test]
    fn incomplete_tickets_are_named() {
        for (from, to, expected) in [
            (
                "\"ctx_request_id\":11",
                "\"ctx_request_id\":null",
                "ctx_request_id is missing",
            ),
            (
                "\"disagg_request_id\":12",
                "\"x\":1",
                "disagg_request_id is missing",
            ),
            (
                "\"ctx_request_id\":11",
                "\"ctx_request_id\":\"a\"",
                "expected an integer",
            ),
            (
                "\"disaggregated_params\"",
                "\"params\"",
                "disaggregated_params is missing",
            ),
            ("\"length\"", "null", "finish_reason is null"),
            ("[{\"index\":0", "[{\"index\":1},{\"index\":0", "2 choices"),
            ("\"choices\"", "\"none\"", "missing field `choices`"),
        ] {
            let body = TICKET.replacen(from, to, 1);
            let error = read(body.as_bytes(), None).unwrap_err();
            assert!(error.contains(expected), "{to}: {error}");
        }
        assert!(read(b"<html>", None).is_err());
    }

    fn events(stream: &Bytes) -> Vec<Value> {
        let text = std::str::from_utf8(stream).unwrap();
        let body = text.strip_suffix("data: [DONE]\n\n").unwrap();
        body.split_terminator("\n\n")
            .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
            .collect()
    }

    #[test]
    fn complete_completion_streams_its_text() {
        let body = TICKET.replace("\"length\"", "\"stop\"");
        assert!(matches!(
            read(body.as_bytes(), None),
            Ok(ContextAnswer::Complete)
        ));
        let stream = complete_stream(Api::Completions, body.as_bytes(), true).unwrap();
        assert_eq!(
            events(&stream),
            [
                json!({"id": "cmpl-1", "usage": null,
                    "choices": [{"index": 0, "text": " a", "finish_reason": "stop"}]}),
                json!({"id": "cmpl-1", "choices": [],
                    "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1,
                        "prompt_tokens_details": {"cached_tokens": 2}}}),
            ]
        );
        let whole: Value =
            serde_json::from_slice(&complete_whole(body.as_bytes()).unwrap()).unwrap();
        assert_eq!(
            whole["choices"],
            json!([{"index": 0, "text": " a", "finish_reason": "stop"}])
        );
        assert_eq!(whole.get("prompt_token_ids"), None);
    }

    #[test]
    fn complete_chat_streams_role_text_and_end() {
        let body = r#"{"id":"chatcmpl-1","object":"chat.completion","choices":[{"index":0,
            "message":{"role":"assistant","content":"Hi","reasoning_content":null,"tool_calls":[]},
            "logprobs":{"content":[]},"finish_reason":"stop","stop_reason":2,"disaggregated_params":{}}],"usage":{}}"#;
        let stream = complete_stream(Api::Chat, body.as_bytes(), false).unwrap();
        let chunk = |choice: Value| json!({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]});
        assert_eq!(
            events(&stream),
            [
                chunk(
                    json!({"index": 0, "delta": {"role": "assistant", "content": ""},
                    "logprobs": null, "finish_reason": null})
                ),
                chunk(json!({"index": 0, "delta": {"content": "Hi"},
                    "logprobs": {"content": []}, "finish_reason": null})),
                chunk(json!({"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": 2})),
            ]
        );
    }
}

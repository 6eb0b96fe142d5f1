//! A client's request in light form, and the bodies that workers get in its place.
//!
//! Only what decides the route is understood: streaming, the shape of the prompt, and options that a hand-off
//! cannot carry. Everything else passes unread to the worker, whose 400 names what it does not like.

use std::borrow::Cow;

use baton_configs::wire::{DisaggregatedParams, RequestType};
use bytes::Bytes;

use crate::context_answer::Ticket;
use crate::error::Failure;
use crate::object::RawObject;
use crate::prompt::{self, PromptShape};

/// Which of OpenAI's two calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Api {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Api {
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }

    /// The field in which a worker takes a prompt of token ids.
    fn token_field(self) -> &'static str {
        match self {
            Self::Completions => "prompt",
            Self::Chat => "prompt_token_ids",
        }
    }
}

/// A client's request.
#[derive(Debug)]
pub(crate) struct ClientRequest<'a> {
    api: Api,
    members: RawObject<'a>,
    /// The answer is to be a stream.
    pub(crate) stream: bool,
    /// The stream is to end with a usage chunk.
    pub(crate) include_usage: bool,
    /// Conversation that it belongs to, where the client says so.
    conversation_id: Option<String>,
    /// Why one generation server has to do all of it.
    pub(crate) whole_because: Option<&'static str>,
}

impl<'a> ClientRequest<'a> {
    /// Reads a body. `conversation_header` is what a header said about the conversation.
    pub(crate) fn parse(
        api: Api,
        body: &'a [u8],
        conversation_header: Option<&str>,
    ) -> Result<Self, Failure> {
        let mut members = RawObject::parse(body).map_err(|error| {
            Failure::bad_request(format!("body is not a JSON object: {error}"), None)
        })?;
        let stream = flag(&members, "stream")?;
        let include_usage = include_usage(&members, stream)?;
        let whole_because = whole_because(&members);
        let conversation_id =
            conversation_id(&members)?.or_else(|| conversation_header.map(str::to_owned));
        members.remove("disaggregated_params");
        if api == Api::Completions {
            unwrap_prompt(&mut members)?;
        }
        Ok(Self {
            api,
            members,
            stream,
            include_usage,
            conversation_id,
            whole_because,
        })
    }

    /// Whether the request brings a chat template of its own.
    pub(crate) fn has_chat_template(&self) -> bool {
        self.api == Api::Chat && self.members.get_set("chat_template").is_some()
    }

    /// What a context server gets: the same, but no stream, and no more than the prompt's work.
    pub(crate) fn context_body(&self, disagg_request_id: u64) -> Bytes {
        let mut params = DisaggregatedParams::new(RequestType::ContextOnly);
        params.disagg_request_id = Some(disagg_request_id);
        params.schedule_style = Some(0);
        params.conversation_id.clone_from(&self.conversation_id);
        let params = serde_json::to_string(&params)
            .expect("hand-off parameters have string keys and finite numbers");
        self.members
            .write(
                &["stream", "stream_options"],
                &[("stream", "false"), ("disaggregated_params", &params)],
            )
            .into()
    }

    /// What a generation server gets: the same, with the prompt as token ids and the ticket.
    pub(crate) fn generation_body(&self, ticket: &Ticket) -> Bytes {
        let params = ("disaggregated_params", ticket.params.as_str());
        let body = match &ticket.prompt_token_ids {
            Some(ids) => {
                let field = self.api.token_field();
                self.members.write(&[field], &[(field, ids), params])
            }
            None => self.members.write(&[], &[params]),
        };
        body.into()
    }

    /// What a generation server gets that has to do all of it.
    pub(crate) fn whole_body(&self) -> Bytes {
        self.members.write(&[], &[]).into()
    }

    /// The conversation for the generation server's parameters.
    pub(crate) fn conversation_id(&self) -> Option<&str> {
        self.conversation_id.as_deref()
    }
}

fn flag(members: &RawObject<'_>, name: &'static str) -> Result<bool, Failure> {
    match members.get_set(name) {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => Err(Failure::bad_request(
            format!(
                "{name} is {}, expected true or false",
                prompt::excerpt(other)
            ),
            Some(name),
        )),
    }
}

/// Refused here because the worker that would refuse it is the second one: the first would have worked in vain.
fn include_usage(members: &RawObject<'_>, stream: bool) -> Result<bool, Failure> {
    const FIELD: &str = "stream_options";
    let Some(options) = members.get_set(FIELD) else {
        return Ok(false);
    };
    if !stream {
        let text = "stream_options is only allowed when stream is true";
        return Err(Failure::bad_request(text, Some(FIELD)));
    }
    let options = RawObject::parse(options.as_bytes()).map_err(|_| {
        let text = format!(
            "stream_options is {}, expected an object",
            prompt::excerpt(options)
        );
        Failure::bad_request(text, Some(FIELD))
    })?;
    // True unless said otherwise (COMPAT.md §10.5).
    Ok(options.get_set("include_usage") != Some("false"))
}

/// A ticket carries one sequence and its first token; these ask for more than that.
fn whole_because(members: &RawObject<'_>) -> Option<&'static str> {
    let above_one = |name: &str| {
        members
            .get_set(name)
            .and_then(|raw| raw.parse::<f64>().ok())
            .is_some_and(|value| value > 1.0)
    };
    let is_true = |name: &str| members.get(name) == Some("true");
    if above_one("n") {
        Some("n > 1")
    } else if above_one("best_of") {
        Some("best_of > 1")
    } else if is_true("use_beam_search") {
        Some("use_beam_search")
    } else if is_true("echo") {
        Some("echo")
    } else if is_true("return_context_logits") {
        Some("return_context_logits")
    } else {
        None
    }
}

/// The one member of a client's own hand-off parameters that counts (COMPAT.md §9.4).
fn conversation_id(members: &RawObject<'_>) -> Result<Option<String>, Failure> {
    const FIELD: &str = "disaggregated_params";
    let Some(params) = members.get_set(FIELD) else {
        return Ok(None);
    };
    let params = RawObject::parse(params.as_bytes()).map_err(|_| {
        let text = format!("{FIELD} is {}, expected an object", prompt::excerpt(params));
        Failure::bad_request(text, Some(FIELD))
    })?;
    Ok(params
        .get_set("conversation_id")
        .and_then(|raw| serde_json::from_str::<String>(raw).ok()))
}

fn unwrap_prompt(members: &mut RawObject<'_>) -> Result<(), Failure> {
    const FIELD: &str = "prompt";
    let refuse = |text: String| Failure::bad_request(text, Some(FIELD));
    let raw = members
        .get(FIELD)
        .ok_or_else(|| refuse("prompt is missing".to_owned()))?;
    if let PromptShape::Unwrapped(one) = prompt::shape(raw).map_err(refuse)? {
        let one = Cow::Owned(one.to_owned());
        members.set(FIELD, one);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parse(api: Api, body: &str) -> Result<ClientRequest<'_>, Failure> {
        ClientRequest::parse(api, body.as_bytes(), None)
    }

    fn value(body: &Bytes) -> Value {
        serde_json::from_slice(body).unwrap()
    }

    #[test]
    fn context_body_is_the_clients_without_streaming() {
        let body = r#"{"model":"m","zzz":[1.0],"prompt":["hi"],"stream":true,"stream_options":{"include_usage":true},"max_tokens":7}"#;
        let request = parse(Api::Completions, body).unwrap();
        assert!(request.stream && request.include_usage);
        assert_eq!(
            String::from_utf8(request.context_body(1 << 41).to_vec()).unwrap(),
            r#"{"model":"m","zzz":[1.0],"prompt":"hi","max_tokens":7,"stream":false,"disaggregated_params":{"request_type":"context_only","first_gen_tokens":null,"first_gen_log_probs":null,"ctx_request_id":null,"encoded_opaque_state":null,"draft_tokens":null,"disagg_request_id":2199023255552,"ctx_dp_rank":null,"ctx_info_endpoint":null,"schedule_style":0,"ctx_usage":null,"conversation_id":null}}"#
        );
    }

    #[test]
    fn generation_body_has_ids_and_ticket() {
        let ticket = Ticket {
            params: r#"{"request_type":"generation_only"}"#.to_owned(),
            prompt_token_ids: Some("[1,2]".to_owned()),
            usage: None,
            ctx_request_id: 5,
        };
        let chat =
            r#"{"messages":[{"role":"user","content":"x"}],"stream":true,"stream_options":{}}"#;
        let request = parse(Api::Chat, chat).unwrap();
        assert_eq!(
            value(&request.generation_body(&ticket)),
            json!({"messages": [{"role": "user", "content": "x"}], "stream": true, "stream_options": {},
                   "prompt_token_ids": [1, 2], "disaggregated_params": {"request_type": "generation_only"}})
        );
        let completion = r#"{"prompt":"x","disaggregated_params":{"request_type":"context_only"}}"#;
        let request = parse(Api::Completions, completion).unwrap();
        assert_eq!(
            value(&request.generation_body(&ticket)),
            json!({"prompt": [1, 2], "disaggregated_params": {"request_type": "generation_only"}})
        );
        assert_eq!(value(&request.whole_body()), json!({"prompt": "x"}));
    }

    #[test]
    fn what_a_ticket_cannot_carry_goes_whole() {
        for (body, expected) in [
            (r#"{"n":2}"#, Some("n > 1")),
            (r#"{"n":1}"#, None),
            (r#"{"n":null,"best_of":3}"#, Some("best_of > 1")),
            (r#"{"echo":true,"logprobs":1}"#, Some("echo")),
            (r#"{"use_beam_search":true}"#, Some("use_beam_search")),
            (r#"{"echo":false,"n":"2x"}"#, None),
        ] {
            assert_eq!(
                parse(Api::Chat, body).unwrap().whole_because,
                expected,
                "{body}"
            );
        }
    }

    #[test]
    fn routing_fields_of_the_wrong_type_are_refused_before_any_work() {
        for (body, param) in [
            (r#"{"prompt":"a","stream":"yes"}"#, "stream"),
            (r#"{"prompt":"a","stream_options":{}}"#, "stream_options"),
            (
                r#"{"prompt":"a","stream":true,"stream_options":3}"#,
                "stream_options",
            ),
            (
                r#"{"prompt":"a","disaggregated_params":[]}"#,
                "disaggregated_params",
            ),
            (r#"{"stream":true}"#, "prompt"),
            (r#"{"prompt":["a","b"]}"#, "prompt"),
        ] {
            match parse(Api::Completions, body) {
                Err(Failure::Request {
                    status,
                    param: named,
                    ..
                }) => {
                    assert_eq!((status.as_u16(), named), (400, Some(param)), "{body}");
                }
                other => panic!("{body}: {other:?}"),
            }
        }
    }

    #[test]
    fn conversation_comes_from_the_body_or_else_the_header() {
        let body = br#"{"disaggregated_params":{"conversation_id":"b"}}"#;
        let request = ClientRequest::parse(Api::Chat, body, Some("h")).unwrap();
        assert_eq!(request.conversation_id(), Some("b"));
        let request = ClientRequest::parse(Api::Chat, b"{}", Some("h")).unwrap();
        assert_eq!(request.conversation_id(), Some("h"));
    }
}

//! One request over OpenAI's API, and what its stream says. Times are taken when bytes come, before they are read.

use std::time::Duration;

use anyhow::{Context, anyhow};
use http_body_util::{BodyExt, Limited};
use hyper::Response;
use hyper::body::Incoming;
use hyper_util::client::legacy;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, timeout_at};

use super::prompts::{Item, Prompt};
use super::record::{Answer, Arrival, Failure, FailureKind};
use super::sse::{Event, Part, Reader};
use crate::cli::EndpointArg;
use crate::exit::{Outcome, WithOutcome};
use crate::http::HttpClient;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Of an answer that is an error.
const ERROR_BYTES_MAX: usize = 64 << 10;

/// What every request has in common.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asking {
    pub(super) endpoint: EndpointArg,
    /// How tokens are chosen, as fields of the body.
    pub(super) sampling: Map<String, Value>,
    pub(super) ignore_eos: bool,
    pub(super) extra: Map<String, Value>,
    pub(super) timeout: Duration,
}

/// A server or a proxy.
#[derive(Debug)]
pub(super) struct HttpTarget {
    http: HttpClient,
    url: String,
    /// The fields that all bodies begin with, and no end.
    head: String,
    asking: Asking,
}

/// What a server says about itself, as far as it does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct ServerFacts {
    pub(super) version: Option<String>,
    pub(super) backend: Option<String>,
    pub(super) vocab_size: Option<u32>,
}

/// Finds out whether somebody is there, and what it calls its model.
///
/// # Errors
/// When nobody is there in time, or no model is named.
pub(super) async fn find(
    base: &str,
    model: Option<String>,
    wait: Duration,
) -> anyhow::Result<(HttpClient, String, ServerFacts)> {
    let http = HttpClient::new(CONNECT_TIMEOUT);
    if !wait.is_zero() {
        http.wait_for_health(base, wait)
            .await
            .outcome(Outcome::TimedOut)?;
    }
    let model = match model {
        Some(model) => model,
        None => http.first_model(base).await?,
    };
    let facts = facts(&http, base).await;
    Ok((http, model, facts))
}

/// Servers that are not ours know some of it or nothing.
async fn facts(http: &HttpClient, base: &str) -> ServerFacts {
    let version = http.ask(&format!("{base}/version")).await;
    let info = http.ask(&format!("{base}/server_info")).await;
    let vocab_size = info["limits"]["vocab_size"].as_u64();
    ServerFacts {
        version: version["version"].as_str().map(str::to_owned),
        backend: info["backend"].as_str().map(str::to_owned),
        vocab_size: vocab_size.and_then(|size| u32::try_from(size).ok()),
    }
}

/// Further fields of each request.
///
/// # Errors
/// When the text is no object, or says what has a flag of its own.
pub(super) fn extra_fields(text: Option<&str>) -> anyhow::Result<Map<String, Value>> {
    const OWN: [&str; 7] = [
        "model",
        "prompt",
        "messages",
        "prompt_token_ids",
        "max_tokens",
        "stream",
        "stream_options",
    ];
    let Some(text) = text else {
        return Ok(Map::new());
    };
    let fields: Map<String, Value> =
        serde_json::from_str(text).context("--extra-body is not a JSON object")?;
    match OWN.iter().find(|name| fields.contains_key(**name)) {
        Some(name) => Err(anyhow!(
            "--extra-body has `{name}`, which the benchmark sets"
        )),
        None => Ok(fields),
    }
}

impl HttpTarget {
    /// A way to ask this server.
    pub(super) fn new(http: HttpClient, base: &str, model: &str, asking: Asking) -> Self {
        let path = match asking.endpoint {
            EndpointArg::Completions => "/v1/completions",
            EndpointArg::Chat => "/v1/chat/completions",
        };
        let mut fields = json!({
            "model": model,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if asking.ignore_eos {
            fields["ignore_eos"] = json!(true);
        }
        for (name, value) in asking.sampling.iter().chain(&asking.extra) {
            fields[name] = value.clone();
        }
        let mut head = fields.to_string();
        head.pop();
        Self {
            http,
            url: format!("{base}{path}"),
            head,
            asking,
        }
    }

    fn body(&self, item: &Item) -> String {
        let json =
            |value: Result<String, serde_json::Error>| value.expect("numbers and texts are JSON");
        let prompt = match (self.asking.endpoint, &item.prompt) {
            (EndpointArg::Completions, Prompt::Ids(ids)) => {
                format!("\"prompt\":{}", json(serde_json::to_string(ids)))
            }
            (EndpointArg::Completions, Prompt::Text(text)) => {
                format!("\"prompt\":{}", json(serde_json::to_string(text)))
            }
            // The ids are the prompt; the field of the protocol has to be there.
            (EndpointArg::Chat, Prompt::Ids(ids)) => format!(
                "\"messages\":[{{\"role\":\"user\",\"content\":\"\"}}],\"prompt_token_ids\":{}",
                json(serde_json::to_string(ids))
            ),
            (EndpointArg::Chat, Prompt::Text(text)) => format!(
                "\"messages\":[{{\"role\":\"user\",\"content\":{}}}]",
                json(serde_json::to_string(text))
            ),
        };
        format!("{},{prompt},\"max_tokens\":{}}}", self.head, item.output)
    }

    /// Sends a request and follows its answer to the end; tells when it went.
    pub(super) async fn ask(&self, item: &Item) -> (Instant, Answer) {
        let body = self.body(item);
        let mut answer = Answer::default();
        let sent = Instant::now();
        let exchange = self.exchange(body, sent, &mut answer);
        let ended = timeout_at(sent + self.asking.timeout, exchange).await;
        answer.failure = match ended {
            Ok(Ok(())) => None,
            Ok(Err(failure)) => Some(failure),
            Err(_) => Some(Failure::new(
                FailureKind::Timeout,
                &format!(
                    "{}: no complete answer within {} s",
                    self.url,
                    self.asking.timeout.as_secs()
                ),
            )),
        };
        (sent, answer)
    }

    async fn exchange(
        &self,
        body: String,
        sent: Instant,
        answer: &mut Answer,
    ) -> Result<(), Failure> {
        let posted = self.http.post_json(&self.url, &[], body).await;
        let response = posted.map_err(|error| unsent(&error))?;
        let status = response.status();
        if !status.is_success() {
            let text = words(response).await;
            let text = format!("{}: status {}: {text}", self.url, status.as_u16());
            return Err(Failure::new(FailureKind::Status(status.as_u16()), &text));
        }
        let mut stream = Stream::default();
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            let at_us = u32::try_from(sent.elapsed().as_micros()).unwrap_or(u32::MAX);
            let frame = frame.map_err(|error| cut(answer, &error.to_string()))?;
            if let Ok(bytes) = frame.into_data() {
                stream.take(&bytes, at_us, answer)?;
            }
        }
        stream.end(answer)
    }
}

/// An answer's stream so far.
#[derive(Debug, Default)]
struct Stream {
    reader: Reader,
    events: usize,
    done: bool,
}

impl Stream {
    fn take(&mut self, bytes: &[u8], at_us: u32, answer: &mut Answer) -> Result<(), Failure> {
        let mut failure = None;
        let read = self.reader.push(bytes, |event| {
            self.events += 1;
            match event {
                Event::Part(part) => note(answer, part, at_us),
                Event::Done => self.done = true,
                Event::Error(text) => failure = Some(Failure::new(FailureKind::ErrorEvent, &text)),
            }
        });
        read.map_err(|error| Failure::new(FailureKind::NotUnderstood, &error.to_string()))?;
        failure.map_or(Ok(()), Err)
    }

    fn end(&self, answer: &Answer) -> Result<(), Failure> {
        if self.done {
            return Ok(());
        }
        if self.events == 0 {
            let text = "the answer is no stream of events";
            return Err(Failure::new(FailureKind::NotUnderstood, text));
        }
        Err(cut(answer, "it ended before [DONE]"))
    }
}

fn note(answer: &mut Answer, part: Part, at_us: u32) {
    if part.tokens > 0 {
        answer.arrivals.push(Arrival {
            at_us,
            tokens: part.tokens,
        });
    }
    if let Some(usage) = part.usage {
        answer.prompt_tokens = usage.prompt_tokens.or(answer.prompt_tokens);
        answer.counted_tokens = usage.completion_tokens.or(answer.counted_tokens);
        answer.cached_tokens = usage.cached_tokens().or(answer.cached_tokens);
    }
}

fn cut(answer: &Answer, why: &str) -> Failure {
    let tokens: u32 = answer.arrivals.iter().map(|arrival| arrival.tokens).sum();
    let text = format!("the stream broke off after {tokens} tokens: {why}");
    Failure::new(FailureKind::Cut, &text)
}

fn unsent(error: &anyhow::Error) -> Failure {
    let is_connect = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<legacy::Error>())
        .any(legacy::Error::is_connect);
    let kind = if is_connect {
        FailureKind::Connect
    } else {
        FailureKind::Cut
    };
    Failure::new(kind, &format!("{error:#}"))
}

/// What an error's body says, bounded: the message, where it is an error of the API.
async fn words(response: Response<Incoming>) -> String {
    let body = Limited::new(response.into_body(), ERROR_BYTES_MAX);
    match body.collect().await {
        Ok(body) => message(&body.to_bytes()),
        Err(error) => format!("(its body cannot be read: {error})"),
    }
}

fn message(body: &[u8]) -> String {
    let object: Value = serde_json::from_slice(body).unwrap_or_default();
    let message = object["error"]["message"]
        .as_str()
        .or_else(|| object["message"].as_str());
    message.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(endpoint: EndpointArg, extra: &str) -> HttpTarget {
        let asking = Asking {
            endpoint,
            sampling: Map::from_iter([("temperature".to_owned(), json!(0.0))]),
            ignore_eos: true,
            extra: extra_fields(Some(extra)).unwrap(),
            timeout: Duration::from_secs(1),
        };
        HttpTarget::new(HttpClient::new(CONNECT_TIMEOUT), "http://h:1", "m", asking)
    }

    fn item(prompt: Prompt) -> Item {
        Item {
            index: 0,
            due: Duration::ZERO,
            prompt,
            output: 5,
        }
    }

    #[test]
    fn bodies_say_what_the_endpoints_take() {
        let completions = target(
            EndpointArg::Completions,
            r#"{"detokenize": false, "temperature": 0.5}"#,
        );
        assert_eq!(completions.url, "http://h:1/v1/completions");
        let body: Value =
            serde_json::from_str(&completions.body(&item(Prompt::Ids(vec![3, 4])))).unwrap();
        assert_eq!(
            body,
            json!({"model": "m", "temperature": 0.5, "stream": true, "stream_options": {"include_usage": true},
                "ignore_eos": true, "detokenize": false, "prompt": [3, 4], "max_tokens": 5})
        );
        let chat = target(EndpointArg::Chat, "{}");
        assert_eq!(chat.url, "http://h:1/v1/chat/completions");
        let body: Value =
            serde_json::from_str(&chat.body(&item(Prompt::Text("a \"b\"".to_owned())))).unwrap();
        assert_eq!(body["messages"][0]["content"], "a \"b\"");
        let body: Value = serde_json::from_str(&chat.body(&item(Prompt::Ids(vec![3])))).unwrap();
        assert_eq!(body["prompt_token_ids"], json!([3]));
    }

    #[test]
    fn extra_fields_are_an_object_and_no_flags() {
        assert!(extra_fields(None).unwrap().is_empty());
        for (text, reason) in [
            ("[1]", "not a JSON object"),
            (r#"{"stream": false}"#, "`stream`"),
        ] {
            let error = format!("{:#}", extra_fields(Some(text)).unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_stream_fills_an_answer() {
        let mut answer = Answer::default();
        let mut stream = Stream::default();
        let data = b"data: {\"choices\":[{\"text\":\"a\",\"token_ids\":[1,2]}]}\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\n";
        stream.take(data, 40, &mut answer).unwrap();
        assert_eq!(stream.end(&answer).unwrap_err().kind, FailureKind::Cut);
        stream.take(b"data: [DONE]\n\n", 50, &mut answer).unwrap();
        stream.end(&answer).unwrap();
        assert_eq!(
            answer.arrivals,
            [Arrival {
                at_us: 40,
                tokens: 2
            }]
        );
        assert_eq!(
            (answer.prompt_tokens, answer.counted_tokens),
            (Some(7), Some(2))
        );
    }

    #[test]
    fn an_errors_message_is_found_where_servers_put_it() {
        assert_eq!(message(br#"{"error":{"message":"a"},"message":"b"}"#), "a");
        assert_eq!(message(br#"{"object":"error","message":"b"}"#), "b");
        assert_eq!(message(b"<html>"), "<html>");
    }

    #[test]
    fn what_is_no_stream_is_told_from_one_that_is_cut() {
        let (mut stream, mut answer) = (Stream::default(), Answer::default());
        stream
            .take(b"{\"object\": \"text_completion\"}", 1, &mut answer)
            .unwrap();
        assert_eq!(
            stream.end(&answer).unwrap_err().kind,
            FailureKind::NotUnderstood
        );
        let failure = stream
            .take(
                b"\n\ndata: {\"error\":{\"message\":\"lost\"}}\n\n",
                1,
                &mut answer,
            )
            .unwrap_err();
        assert_eq!(
            (failure.kind, failure.text.as_str()),
            (FailureKind::ErrorEvent, "lost")
        );
    }
}

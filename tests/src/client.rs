//! A small HTTP client: whole answers, event streams, and clients that go away.

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::golden::Item;

/// No answer takes longer in any test.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Body.
    pub body: String,
}

impl Answer {
    /// The body as JSON; null when it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }
}

/// One request on a connection of its own. The connection ends when the response is dropped.
///
/// # Errors
/// When the connection breaks.
pub async fn send(
    address: &str,
    method: Method,
    path: &str,
    body: impl Into<Bytes>,
) -> anyhow::Result<Response<Incoming>> {
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("connect to {address}"))?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the response or its drop; there is nothing to report.
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", address)
        .header("content-type", "application/json")
        .body(Full::new(body.into()))?;
    Ok(sender.send_request(request).await?)
}

async fn whole(response: Response<Incoming>) -> anyhow::Result<Answer> {
    let status = response.status().as_u16();
    let body = response.into_body().collect().await?.to_bytes();
    Ok(Answer {
        status,
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

/// GET with a whole answer within 10 s.
///
/// # Errors
/// When the connection breaks or it takes longer.
pub async fn get(address: &str, path: &str) -> anyhow::Result<Answer> {
    let answer = async { whole(send(address, Method::GET, path, Bytes::new()).await?).await };
    tokio::time::timeout(Duration::from_secs(10), answer)
        .await
        .with_context(|| format!("GET {path}"))?
}

/// POST with a whole answer within [`ANSWER_TIMEOUT`].
///
/// # Errors
/// When the connection breaks or it takes longer.
pub async fn post(address: &str, path: &str, body: &Value) -> anyhow::Result<Answer> {
    post_bytes(address, path, body.to_string().into_bytes()).await
}

/// POST of any bytes.
///
/// # Errors
/// When the connection breaks or it takes longer than [`ANSWER_TIMEOUT`].
pub async fn post_bytes(address: &str, path: &str, body: Vec<u8>) -> anyhow::Result<Answer> {
    let answer = async { whole(send(address, Method::POST, path, body).await?).await };
    tokio::time::timeout(ANSWER_TIMEOUT, answer)
        .await
        .with_context(|| format!("POST {path}"))?
}

/// POST of a streaming request; every event's data until `[DONE]`.
///
/// # Errors
/// When the status is not 200, an error event comes, or the stream ends without `[DONE]`.
pub async fn stream(address: &str, path: &str, body: &Value) -> anyhow::Result<Vec<Value>> {
    let events = async {
        let response = send(address, Method::POST, path, body.to_string()).await?;
        if response.status() != 200 {
            bail!(
                "status {}: {}",
                response.status(),
                whole(response).await?.body
            );
        }
        let text = whole(response).await?.body;
        let mut events = Vec::new();
        for line in text.lines() {
            match line.strip_prefix("data: ") {
                Some("[DONE]") => return Ok(events),
                Some(data) => {
                    events.push(serde_json::from_str(data).with_context(|| format!("`{data}`"))?)
                }
                None => {}
            }
            if let Some(error) = events.last().and_then(|event: &Value| event.get("error")) {
                bail!("error event: {error}");
            }
        }
        bail!("the stream ended without [DONE]: {text}")
    };
    tokio::time::timeout(ANSWER_TIMEOUT, events)
        .await
        .with_context(|| format!("stream {path}"))?
}

/// The ids that a server writes after an item's prompt, the first `count`.
///
/// # Panics
/// When it does not write them.
pub async fn ids(address: &str, item: &Item, count: usize) -> Vec<u32> {
    let body = json!({
        "model": "m", "prompt": item.prompt_token_ids, "max_tokens": count, "temperature": 0, "detokenize": false,
    });
    let answer = post(address, "/v1/completions", &body).await;
    let answer = answer.expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.body);
    serde_json::from_value(answer.json()["choices"][0]["token_ids"].clone()).expect("token ids")
}

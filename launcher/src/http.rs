//! The launcher's own HTTP calls: health checks, the sample client and the load of `baton bench serve`.

use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// Longest time for a question about a server itself.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);
const HEALTH_PERIOD: Duration = Duration::from_millis(500);
/// Of an answer that is not understood.
const SHOWN_CHARS_MAX: usize = 300;

/// A client with a pool of kept connections.
#[derive(Debug, Clone)]
pub(crate) struct HttpClient {
    inner: Client<HttpConnector, Full<Bytes>>,
}

impl HttpClient {
    /// A client whose connection attempts end after `connect_timeout`.
    pub(crate) fn new(connect_timeout: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(connect_timeout));
        connector.set_nodelay(true);
        Self {
            inner: Client::builder(TokioExecutor::new()).build(connector),
        }
    }

    /// GET; the body is read whole.
    pub(crate) async fn get(&self, url: &str, timeout: Duration) -> anyhow::Result<(u16, String)> {
        let request = Request::builder()
            .method(Method::GET)
            .uri(parse(url)?)
            .body(Full::default())?;
        let answer = async {
            let response = self.inner.request(request).await?;
            let status = response.status().as_u16();
            let body = response.into_body().collect().await?.to_bytes();
            anyhow::Ok((status, String::from_utf8_lossy(&body).into_owned()))
        };
        tokio::time::timeout(timeout, answer)
            .await
            .map_err(|_| anyhow!("GET {url}: no answer within {timeout:?}"))?
    }

    /// POST of a JSON body; returns when the headers are there.
    pub(crate) async fn post_json(
        &self,
        url: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(parse(url)?)
            .header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body)))?;
        self.inner
            .request(request)
            .await
            .with_context(|| format!("POST {url}"))
    }

    /// Waits until a server's `/health` is 200.
    ///
    /// # Errors
    /// When it is not in time; with what was seen last.
    pub(crate) async fn wait_for_health(&self, base: &str, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let seen = match self.get(&format!("{base}/health"), QUESTION_TIMEOUT).await {
                Ok((200, _)) => return Ok(()),
                Ok((status, body)) => format!("status {status} {body}"),
                Err(error) => format!("{error:#}"),
            };
            if Instant::now() + HEALTH_PERIOD > deadline {
                bail!("{base}/health is not 200 after {limit:?}: {seen}");
            }
            tokio::time::sleep(HEALTH_PERIOD).await;
        }
    }

    /// The first model that a server lists.
    ///
    /// # Errors
    /// When no server answers, or what answers lists none.
    pub(crate) async fn first_model(&self, base: &str) -> anyhow::Result<String> {
        let url = format!("{base}/v1/models");
        let (status, body) = self
            .get(&url, QUESTION_TIMEOUT)
            .await
            .with_context(|| format!("no server answers at {base}"))?;
        let object: Value = serde_json::from_str(&body).unwrap_or_default();
        match object["data"][0]["id"].as_str() {
            Some(id) => Ok(id.to_owned()),
            None => {
                let words = object["message"].as_str().unwrap_or(&body);
                let shown: String = words.chars().take(SHOWN_CHARS_MAX).collect();
                bail!("{url} names no model (status {status}): {}", shown.trim())
            }
        }
    }

    /// What a server says in JSON at this address; null when it says nothing.
    pub(crate) async fn ask(&self, url: &str) -> Value {
        let answer = self.get(url, QUESTION_TIMEOUT).await.ok();
        let body = answer.filter(|(status, _)| *status == 200);
        body.and_then(|(_, body)| serde_json::from_str(&body).ok())
            .unwrap_or_default()
    }
}

fn parse(url: &str) -> anyhow::Result<Uri> {
    let uri: Uri = url
        .parse()
        .with_context(|| format!("`{url}` is not a URL"))?;
    if uri.scheme_str() != Some("http") {
        bail!("`{url}` is not an http:// URL");
    }
    Ok(uri)
}

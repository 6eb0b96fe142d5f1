//! The launcher's own HTTP calls: health checks and the sample client.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

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

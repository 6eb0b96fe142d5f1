//! A client of the proxy's store: one short call on a connection of its own, with one deadline for all of it.

use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use baton_configs::cluster::JOB_SECRET_VARIABLE;
use baton_configs::disagg::Endpoint;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// For one call, from connecting to the last byte (COMPAT.md §6.2).
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of an answer.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Why a call came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum CallError {
    #[error("{0}")]
    Unreachable(String),
    #[error("the proxy refuses: {0}")]
    Refused(String),
}

/// The two ends of the way to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Route {
    /// This machine's address on it.
    pub(super) local: IpAddr,
    /// The proxy's.
    pub(super) peer: IpAddr,
}

/// Asks one store.
pub(super) struct StoreClient {
    store: Endpoint,
    /// Shown with every call; never logged.
    token: Option<String>,
}

impl std::fmt::Debug for StoreClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreClient")
            .field("store", &self.store)
            .field("has_token", &self.token.is_some())
            .finish()
    }
}

impl StoreClient {
    pub(super) fn new(store: Endpoint, token: Option<String>) -> Self {
        Self { store, token }
    }

    /// Which way the store is reached.
    pub(super) async fn route(&self) -> Result<Route, CallError> {
        let route = async {
            let stream = self.connect().await?;
            Ok(Route {
                local: stream.local_addr()?.ip().to_canonical(),
                peer: stream.peer_addr()?.ip().to_canonical(),
            })
        };
        self.in_time(route).await
    }

    /// One call and its `result`.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, CallError> {
        let exchange = async {
            let stream = self.connect().await?;
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
                .await
                .map_err(io::Error::other)?;
            let request = self.request(method, path, body).map_err(io::Error::other)?;
            let answer = async {
                let answer = sender
                    .send_request(request)
                    .await
                    .map_err(io::Error::other)?;
                let (head, body) = answer.into_parts();
                let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
                Ok((head.status, body.map_err(io::Error::other)?.to_bytes()))
            };
            // The connection is driven here, and ends with this call. When it ends well, the answer has been read.
            tokio::select! {
                answer = answer => answer,
                Err(error) = connection => Err(io::Error::other(error)),
            }
        };
        let (status, body) = self.in_time(exchange).await?;
        self.judge(status, &body)
    }

    async fn connect(&self) -> io::Result<TcpStream> {
        TcpStream::connect((self.store.host.as_str(), self.store.port)).await
    }

    async fn in_time<T>(&self, work: impl Future<Output = io::Result<T>>) -> Result<T, CallError> {
        match timeout(CALL_TIMEOUT, work).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(CallError::Unreachable(error.to_string())),
            Err(_) => Err(CallError::Unreachable(format!(
                "no answer within {} s",
                CALL_TIMEOUT.as_secs()
            ))),
        }
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Request<Full<Bytes>>, hyper::http::Error> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, self.store.to_string())
            .header(CONNECTION, HeaderValue::from_static("close"));
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        if body.is_some() {
            request = request.header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        request.body(Full::new(body.into()))
    }

    fn judge(&self, status: StatusCode, body: &[u8]) -> Result<Value, CallError> {
        let refused = |text: &str| Err(CallError::Refused(text.to_owned()));
        match status {
            StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED if self.token.is_none() => {
                return refused(&format!(
                    "its job has a secret; set {JOB_SECRET_VARIABLE} to the same here"
                ));
            }
            StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => {
                return refused(&format!(
                    "{JOB_SECRET_VARIABLE} is not the same here as there"
                ));
            }
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
                return refused("it keeps no list of workers; its config needs `disagg_cluster`");
            }
            _ => {}
        }
        let answer: Value = serde_json::from_slice(body).unwrap_or_default();
        if let Some(reason) = answer["error"].as_str() {
            return refused(reason);
        }
        match answer.get("result") {
            Some(result) => Ok(result.clone()),
            None => refused(&format!("status {} without a result", status.as_u16())),
        }
    }
}

/// A text as part of a query.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

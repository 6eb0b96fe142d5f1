//! A generation request's life, phase by phase: read, admit, context and generation (`flow`), relay (`stream`).
//!
//! The client is not answered before a generation server has written something: until then a failure costs a retry
//! on another server, or reaches the client with its true status. What was started is ended by dropping it.

use std::time::Duration;

use baton_configs::wire::TIMELINE_REQUEST_HEADER;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HeaderMap, HeaderName, HeaderValue,
};
use hyper::{Request, Response, StatusCode};
use tokio::time::timeout;

use crate::admission::Place;
use crate::book::RequestBook;
use crate::error::Failure;
use crate::flow::{Flow, Outcome};
use crate::proxy::Proxy;
use crate::reply::{Reply, ReplyBody};
use crate::request_body::{Api, ClientRequest};
use crate::retry::Retries;
use crate::stream::{Relay, RelayParts};
use crate::timeline;

/// Client headers that workers get too.
const FORWARDED: [HeaderName; 5] = [
    AUTHORIZATION,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    HeaderName::from_static("x-request-id"),
    HeaderName::from_static(TIMELINE_REQUEST_HEADER),
];
/// Headers that say which conversation a request belongs to, the first one wins (COMPAT.md §9.4).
const CONVERSATION_HEADERS: [&str; 4] = [
    "x-session-id",
    "x-correlation-id",
    "x-session-affinity",
    "x-multi-turn-session-id",
];

/// Bytes that are set aside for a body on the word of its `content-length` alone.
const TRUSTED_LENGTH_MAX: usize = 1 << 20;

/// Serves one request to the point where its answer can be handed to the client's connection.
pub(crate) async fn serve(proxy: &Proxy, api: Api, request: Request<Incoming>) -> Reply {
    let mut book = RequestBook::open(proxy.metrics.clone());
    match answer(proxy, api, request, &mut book).await {
        Ok((Outcome::Whole(reply), _)) => {
            book.answered();
            reply
        }
        Ok((Outcome::Stream { head, first, rest }, place)) => {
            let relay = Relay::new(RelayParts {
                first,
                rest,
                idle: proxy.timeouts.stream_idle,
                book,
                place,
            });
            Response::from_parts(head, ReplyBody::Relay(Box::new(relay)))
        }
        Err(failure) => {
            let elapsed_ms = book.elapsed_ms();
            let status = failure.status().as_u16();
            // Why a request is refused is the client's to know, or was logged when the workers' condition changed.
            if status < 500 || !matches!(failure, Failure::Upstream(_)) {
                tracing::debug!(status, elapsed_ms, "request refused: {failure}");
            } else {
                tracing::warn!(status, elapsed_ms, "request failed: {failure}");
            }
            book.failed(&failure);
            failure.into_reply()
        }
    }
}

async fn answer(
    proxy: &Proxy,
    api: Api,
    request: Request<Incoming>,
    book: &mut RequestBook,
) -> Result<(Outcome, Place), Failure> {
    let (head, body) = request.into_parts();
    let body = read_body(
        &head.headers,
        body,
        proxy.limits.max_body_bytes,
        proxy.timeouts.client_body,
    )
    .await?;
    let conversation = CONVERSATION_HEADERS
        .iter()
        .filter_map(|name| head.headers.get(*name)?.to_str().ok())
        .map(str::trim)
        .find(|value| !value.is_empty());
    let request = ClientRequest::parse(api, &body, conversation)?;
    let count = if request.stream {
        &proxy.metrics.stream_requests
    } else {
        &proxy.metrics.nonstream_requests
    };
    count.inc();
    if request.has_chat_template() && !proxy.allow_request_chat_template {
        let text = "chat_template is not allowed in requests to this deployment";
        return Err(Failure::bad_request(text, Some("chat_template")));
    }
    proxy.ensure_ready()?;
    let place = proxy.admission.enter().await?;
    proxy
        .metrics
        .queue_latency
        .observe(book.elapsed().as_secs_f64());
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    for name in FORWARDED {
        if let Some(value) = head.headers.get(&name) {
            headers.insert(name, value.clone());
        }
    }
    let flow = Flow {
        proxy,
        api,
        request: &request,
        want_timeline: timeline::is_wanted(&head.headers),
        headers,
        retries: Retries::new(proxy.max_retries),
        book,
    };
    Ok((Box::pin(flow.run()).await?, place))
}

/// The whole body, or why not. What is too long is still read for a while, so that a client that writes first and
/// reads later gets the 413 instead of a broken pipe.
pub(crate) async fn read_body(
    headers: &HeaderMap,
    mut body: Incoming,
    limit: usize,
    patience: Duration,
) -> Result<Bytes, Failure> {
    let too_long = || Failure::Request {
        status: StatusCode::PAYLOAD_TOO_LARGE,
        message: format!("body is longer than {limit} bytes"),
        param: None,
    };
    let announced = headers
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limit) && headers.contains_key(EXPECT) {
        return Err(too_long());
    }
    let read = async {
        let mut whole =
            BytesMut::with_capacity(announced.unwrap_or(0).min(limit).min(TRUSTED_LENGTH_MAX));
        let mut length = 0_usize;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                Failure::bad_request(format!("body could not be read: {error}"), None)
            })?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            length += data.len();
            if length <= limit {
                whole.extend_from_slice(&data);
            } else if length > limit.saturating_mul(8) {
                break;
            }
        }
        if length > limit {
            return Err(too_long());
        }
        Ok(whole.freeze())
    };
    timeout(patience, read).await.unwrap_or_else(|_| {
        Err(Failure::Request {
            status: StatusCode::REQUEST_TIMEOUT,
            message: format!("body did not arrive within {:.1} s", patience.as_secs_f64()),
            param: None,
        })
    })
}

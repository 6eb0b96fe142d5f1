//! Answers to clients: the one body type of the front, and the few shapes of answer that the proxy writes itself.

use std::pin::Pin;
use std::task::{Context, Poll};

use baton_configs::wire::ErrorBody;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, SizeHint};
use hyper::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};

use crate::stream::{Relay, StreamCut};

/// A body that is either known whole or relayed.
#[derive(Debug)]
pub(crate) enum ReplyBody {
    /// Known whole.
    Whole(Full<Bytes>),
    /// Relayed from a generation server.
    Relay(Box<Relay>),
}

/// An answer to a client.
pub(crate) type Reply = Response<ReplyBody>;

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = StreamCut;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamCut>>> {
        match self.get_mut() {
            Self::Whole(body) => Pin::new(body)
                .poll_frame(cx)
                .map_err(|never| match never {}),
            Self::Relay(relay) => relay.poll_relay(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(body) => body.is_end_stream(),
            Self::Relay(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(body) => body.size_hint(),
            Self::Relay(_) => SizeHint::default(),
        }
    }
}

/// An answer with a body of the given type.
pub(crate) fn with_type(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Reply {
    let mut reply = empty(status);
    *reply.body_mut() = ReplyBody::Whole(Full::new(body.into()));
    reply
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
}

/// A JSON answer.
pub(crate) fn json(status: StatusCode, body: impl Into<Bytes>) -> Reply {
    with_type(status, "application/json", body)
}

/// A plain text answer.
pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Reply {
    with_type(status, "text/plain; charset=utf-8", body)
}

/// An answer without a body.
pub(crate) fn empty(status: StatusCode) -> Reply {
    let mut reply = Response::new(ReplyBody::Whole(Full::default()));
    *reply.status_mut() = status;
    reply
}

/// An error object with its status; 503 says when to come again.
pub(crate) fn error(status: StatusCode, message: &str, param: Option<&str>) -> Reply {
    let mut reply = json(status, error_json(status, message, param));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        reply
            .headers_mut()
            .insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    reply
}

/// The error object itself, for answers and for the last event of a broken stream.
pub(crate) fn error_json(status: StatusCode, message: &str, param: Option<&str>) -> Vec<u8> {
    let body = ErrorBody::new(status.as_u16(), kind(status), message, param);
    serde_json::to_vec(&body).expect("an error object has string keys and finite numbers")
}

fn kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        404 => "NotFoundError",
        405 => "MethodNotAllowedError",
        408 => "RequestTimeoutError",
        413 => "RequestTooLargeError",
        400..=499 => "BadRequestError",
        502 => "BadGatewayError",
        503 => "ServiceUnavailableError",
        504 => "GatewayTimeoutError",
        _ => "InternalServerError",
    }
}

//! Answers: JSON, text, and the body of a stream.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;

use crate::server::error::ApiError;

/// The body of every answer.
pub(crate) type ReplyBody = UnsyncBoxBody<Bytes, StreamCut>;

/// A stream ended in a failure that it has reported; the connection is cut so that nobody takes it for complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream ended in a failure that was reported in it")]
pub(crate) struct StreamCut;

/// Any answer that is complete.
pub(crate) fn full(
    status: StatusCode,
    content_type: &'static str,
    body: Bytes,
) -> Response<ReplyBody> {
    let body = Full::new(body)
        .map_err(|never| match never {})
        .boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// 200 with JSON.
pub(crate) fn json<T: Serialize>(value: &T) -> Response<ReplyBody> {
    match serde_json::to_vec(value) {
        Ok(body) => full(StatusCode::OK, "application/json", body.into()),
        Err(error) => {
            ApiError::internal(format!("the answer could not be written as json: {error}"))
                .response()
        }
    }
}

/// 200 with JSON that is written already.
pub(crate) fn json_text(body: String) -> Response<ReplyBody> {
    full(StatusCode::OK, "application/json", Bytes::from(body))
}

/// Plain text.
pub(crate) fn text(status: StatusCode, text: impl Into<String>) -> Response<ReplyBody> {
    full(
        status,
        "text/plain; charset=utf-8",
        Bytes::from(text.into()),
    )
}

/// 200 without content.
pub(crate) fn empty() -> Response<ReplyBody> {
    Response::new(
        Full::new(Bytes::new())
            .map_err(|never| match never {})
            .boxed_unsync(),
    )
}

/// 200 with OpenMetrics text.
pub(crate) fn open_metrics(text: String) -> Response<ReplyBody> {
    full(
        StatusCode::OK,
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
        Bytes::from(text),
    )
}

/// 200 with server-sent events.
pub(crate) fn event_stream<S: 'static>(state: S, step: Step<S>) -> Response<ReplyBody> {
    stream("text/event-stream; charset=utf-8", state, step)
}

/// 200 with lines, as they come.
pub(crate) fn lines<S: 'static>(state: S, step: Step<S>) -> Response<ReplyBody> {
    stream("application/x-ndjson", state, step)
}

fn stream<S: 'static>(content_type: &'static str, state: S, step: Step<S>) -> Response<ReplyBody> {
    let mut response = Response::new(StreamBody::new(state, step).boxed_unsync());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// What a stream does next.
#[derive(Debug)]
pub(crate) enum Next<S> {
    /// Send these bytes, then go on.
    Send(Bytes, S),
    /// Send these bytes, then end well.
    Last(Bytes),
    /// Send these bytes, then cut the connection.
    Cut(Bytes),
}

type StepFuture<S> = Pin<Box<dyn Future<Output = Next<S>> + Send>>;

/// Makes the next step of a stream from its state.
pub(crate) type Step<S> = fn(S) -> StepFuture<S>;

enum Stage<S> {
    Waiting(StepFuture<S>),
    /// The last bytes are on their way; the cut follows after the connection had a chance to flush them.
    Cutting {
        flushed: bool,
    },
    Ended,
}

/// A body that is written as its state goes on. It is only polled when the client can take more, and dropping
/// it drops the state: that is how a client that goes away cancels its requests.
struct StreamBody<S> {
    stage: Stage<S>,
    step: Step<S>,
}

impl<S> StreamBody<S> {
    fn new(state: S, step: Step<S>) -> Self {
        Self {
            stage: Stage::Waiting(step(state)),
            step,
        }
    }
}

impl<S> Unpin for StreamBody<S> {}

impl<S> Body for StreamBody<S> {
    type Data = Bytes;
    type Error = StreamCut;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamCut>>> {
        let next = match &mut self.stage {
            Stage::Waiting(future) => match future.as_mut().poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(next) => next,
            },
            Stage::Cutting { flushed: false } => {
                self.stage = Stage::Cutting { flushed: true };
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Stage::Cutting { flushed: true } => {
                self.stage = Stage::Ended;
                return Poll::Ready(Some(Err(StreamCut)));
            }
            Stage::Ended => return Poll::Ready(None),
        };
        let bytes = match next {
            Next::Send(bytes, state) => {
                self.stage = Stage::Waiting((self.step)(state));
                bytes
            }
            Next::Last(bytes) => {
                self.stage = Stage::Ended;
                bytes
            }
            Next::Cut(bytes) => {
                self.stage = Stage::Cutting { flushed: false };
                bytes
            }
        };
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.stage, Stage::Ended)
    }
}

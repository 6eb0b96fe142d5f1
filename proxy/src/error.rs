//! What can go wrong with a request, in eight classes that say what failed and on whom.
//!
//! Which status a class becomes, whether it is tried again and what it says about a worker's health is decided by
//! its readers ([`Failure::into_reply`], `retry`, `workers`), not by the code that fails.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use serde_json::Value;

use crate::reply::{self, Reply};
use crate::workers::Worker;

/// Names the worker whose error an answer carries.
pub(crate) const FAILED_WORKER_HEADER: HeaderName =
    HeaderName::from_static("x-baton-failed-worker");

/// Characters of a worker's error that are repeated to the client.
const MESSAGE_CHARS_MAX: usize = 2048;

/// Why a request is not served.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The client's request cannot be understood or is not allowed.
    Request {
        /// 4xx.
        status: StatusCode,
        /// One line for the client.
        message: String,
        /// The offending field.
        param: Option<&'static str>,
    },
    /// Not now: workers are missing, the proxy is stopping, or it holds as many requests as it may.
    Unavailable(String),
    /// A worker failed.
    Upstream(UpstreamFailure),
}

/// A worker's failure.
#[derive(Debug)]
pub(crate) struct UpstreamFailure {
    /// Who answered, or did not.
    pub(crate) worker: Arc<Worker>,
    /// How.
    pub(crate) fault: Fault,
}

/// How a worker failed.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// No connection was made, so the worker knows nothing of the request.
    Unreachable(String),
    /// This process may open no further connection, which says nothing about the worker.
    Exhausted(String),
    /// The connection broke before the answer was whole.
    Lost(String),
    /// It took too long.
    TimedOut {
        /// What was waited for.
        waited_for: &'static str,
        /// How long.
        after: Duration,
    },
    /// It answered with an error of its own.
    Status(Box<WorkerError>),
    /// Its answer is not what was agreed.
    BadAnswer(String),
}

/// A worker's own error answer.
#[derive(Debug, Clone)]
pub(crate) struct WorkerError {
    /// 4xx or 5xx.
    pub(crate) status: StatusCode,
    /// As it came.
    pub(crate) content_type: Option<HeaderValue>,
    /// As it came.
    pub(crate) retry_after: Option<HeaderValue>,
    /// As it came.
    pub(crate) body: Bytes,
}

impl Failure {
    /// A 400 about `param`.
    pub(crate) fn bad_request(message: impl Into<String>, param: Option<&'static str>) -> Self {
        Self::Request {
            status: StatusCode::BAD_REQUEST,
            message: message.into(),
            param,
        }
    }

    /// The status that the client sees.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Request { status, .. } => *status,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Upstream(failure) => failure.status(),
        }
    }

    /// The answer to the client.
    pub(crate) fn into_reply(self) -> Reply {
        match self {
            Self::Request {
                status,
                message,
                param,
            } => reply::error(status, &message, param),
            Self::Unavailable(message) => {
                reply::error(StatusCode::SERVICE_UNAVAILABLE, &message, None)
            }
            Self::Upstream(failure) => failure.into_reply(),
        }
    }
}

impl From<UpstreamFailure> for Failure {
    fn from(failure: UpstreamFailure) -> Self {
        Self::Upstream(failure)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Request { message, .. } | Self::Unavailable(message) => f.write_str(message),
            Self::Upstream(failure) => failure.fmt(f),
        }
    }
}

impl UpstreamFailure {
    /// The status that the client sees: the worker's own where it has one.
    pub(crate) fn status(&self) -> StatusCode {
        match &self.fault {
            Fault::Unreachable(_) | Fault::Lost(_) | Fault::BadAnswer(_) => StatusCode::BAD_GATEWAY,
            Fault::Exhausted(_) => StatusCode::SERVICE_UNAVAILABLE,
            Fault::TimedOut { .. } => StatusCode::GATEWAY_TIMEOUT,
            Fault::Status(error) => error.status,
        }
    }

    /// Whether another server might do better.
    pub(crate) fn is_retryable(&self) -> bool {
        match &self.fault {
            Fault::Unreachable(_) | Fault::Lost(_) | Fault::BadAnswer(_) => true,
            // The deadline of the call is used up, and the client has waited long enough; or it would be no different
            // with another server.
            Fault::TimedOut { .. } | Fault::Exhausted(_) => false,
            Fault::Status(error) => error.status.is_server_error(),
        }
    }

    fn into_reply(self) -> Reply {
        let status = self.status();
        let mut reply = match &self.fault {
            // The client's own mistake, as the worker sees it: its words, unchanged.
            Fault::Status(error) if status.is_client_error() => {
                let mut reply = reply::json(status, error.body.clone());
                if let Some(content_type) = &error.content_type {
                    reply
                        .headers_mut()
                        .insert(CONTENT_TYPE, content_type.clone());
                }
                reply
            }
            _ => reply::error(status, &self.to_string(), None),
        };
        let headers = reply.headers_mut();
        if let Fault::Status(error) = &self.fault
            && let Some(retry_after) = &error.retry_after
        {
            headers.insert(RETRY_AFTER, retry_after.clone());
        }
        if !matches!(self.fault, Fault::Exhausted(_)) {
            headers.insert(FAILED_WORKER_HEADER, self.worker.header_name());
        }
        reply
    }
}

impl fmt::Display for UpstreamFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.worker.name(), self.fault)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(reason) => write!(f, "cannot be reached: {reason}"),
            Self::Exhausted(reason) => write!(f, "no connection can be opened: {reason}"),
            Self::Lost(reason) => write!(f, "connection lost: {reason}"),
            Self::TimedOut { waited_for, after } => {
                write!(f, "no {waited_for} within {:.1} s", after.as_secs_f64())
            }
            Self::Status(error) => {
                write!(
                    f,
                    "answered {}: {}",
                    error.status.as_u16(),
                    message_of(&error.body)
                )
            }
            Self::BadAnswer(reason) => write!(f, "answered what was not agreed: {reason}"),
        }
    }
}

/// What a worker's error body says, in one bounded line: the message of any of the known error objects, else the text.
pub(crate) fn message_of(body: &[u8]) -> String {
    let from_json = serde_json::from_slice::<Value>(body)
        .ok()
        .and_then(|value| {
            let error = value.get("error");
            [
                value.get("message"),
                error.and_then(|error| error.get("message")),
                error,
                value.get("detail"),
            ]
            .into_iter()
            .flatten()
            .find_map(|text| text.as_str().map(str::to_owned))
        });
    let text = from_json.unwrap_or_else(|| {
        let end = body.len().min(4 * MESSAGE_CHARS_MAX);
        String::from_utf8_lossy(&body[..end]).into_owned()
    });
    let line: String = text
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MESSAGE_CHARS_MAX)
        .collect();
    if line.is_empty() {
        "(no text)".to_owned()
    } else {
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_is_found_in_every_error_shape() {
        for (body, expected) in [
            (r#"{"object":"error","message":"a b"}"#, "a b"),
            (r#"{"error":{"message":"nested"}}"#, "nested"),
            (r#"{"error":"plain"}"#, "plain"),
            (r#"{"detail":"fast"}"#, "fast"),
            ("two\nlines ", "two lines"),
            ("", "(no text)"),
            (r#"{"other":1}"#, r#"{"other":1}"#),
        ] {
            assert_eq!(message_of(body.as_bytes()), expected);
        }
        assert_eq!(
            message_of("é".repeat(9000).as_bytes()).chars().count(),
            MESSAGE_CHARS_MAX
        );
    }
}

//! The one place where a failure becomes a status, an error class and a body.
//!
//! | what failed | status | why |
//! |---|---|---|
//! | the request itself: fields, ranges, too long, never servable here | 400 | trying again cannot help |
//! | unknown path, wrong method, slow body, large body, MessagePack | 404, 405, 408, 413, 415 | HTTP's own words |
//! | queue full, loading, shutting down, engine gone | 503 + `Retry-After` | another server, or later |
//! | the KV hand-off failed and the prompt could not be read again | 502 | the peer behind us failed; a retry elsewhere is safe |
//! | the device or this code failed | 500 | the log has more |

use baton_configs::wire::ErrorBody;
use hyper::header::{ALLOW, CONNECTION, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};

use crate::request::{RequestFailure, SubmitError};
use crate::server::reply::{self, ReplyBody};

/// Seconds after which a client that was turned away may come again.
const RETRY_AFTER_SECONDS: u32 = 1;

/// A failure as the client will see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
    allow: Option<&'static str>,
    /// Whether the connection cannot be used for another request, because this one's body was not read.
    close: bool,
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            allow: None,
            close: false,
        }
    }

    /// 400 without a field to blame.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 400 that names the field.
    pub(crate) fn field(name: &str, problem: impl std::fmt::Display) -> Self {
        Self {
            param: Some(name.to_owned()),
            ..Self::bad_request(format!("`{name}`: {problem}"))
        }
    }

    /// 404.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// 405 with the methods that would do.
    pub(crate) fn method(path: &str, allow: &'static str) -> Self {
        Self {
            allow: Some(allow),
            ..Self::new(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("{path} answers {allow} only"),
            )
        }
    }

    /// 408: the body did not come in time.
    pub(crate) fn slow_body(seconds: u64) -> Self {
        Self {
            close: true,
            ..Self::new(
                StatusCode::REQUEST_TIMEOUT,
                format!("the request body was not complete after {seconds} s"),
            )
        }
    }

    /// 413: the body is over the limit.
    pub(crate) fn large_body(limit: usize) -> Self {
        Self {
            close: true,
            ..Self::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the request body is larger than {limit} bytes"),
            )
        }
    }

    /// 415.
    pub(crate) fn media_type(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message)
    }

    /// 500.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// 503 with `Retry-After`.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    fn class(&self) -> &'static str {
        match self.status.as_u16() {
            400 => "BadRequestError",
            404 => "NotFoundError",
            405 => "MethodNotAllowedError",
            408 => "RequestTimeoutError",
            413 => "PayloadTooLargeError",
            415 => "UnsupportedMediaTypeError",
            502 => "BadGatewayError",
            503 => "ServiceUnavailableError",
            _ => "InternalServerError",
        }
    }

    /// The JSON object.
    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody::new(
            self.status.as_u16(),
            self.class(),
            &self.message,
            self.param.as_deref(),
        )
    }

    /// The JSON text.
    pub(crate) fn json(&self) -> String {
        serde_json::to_string(&self.body()).expect("an error body holds only strings and numbers")
    }

    /// The whole answer.
    pub(crate) fn response(&self) -> Response<ReplyBody> {
        self.with_headers(reply::full(
            self.status,
            "application/json",
            self.json().into(),
        ))
    }

    /// The whole answer for those who read text: health checks.
    pub(crate) fn as_text(&self) -> Response<ReplyBody> {
        self.with_headers(reply::text(self.status, self.message.clone()))
    }

    fn with_headers(&self, mut response: Response<ReplyBody>) -> Response<ReplyBody> {
        let headers = response.headers_mut();
        if let Some(allow) = self.allow {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
        }
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::Busy { .. } | SubmitError::Stopped => Self::unavailable(message),
            SubmitError::Unservable(_) => Self::bad_request(message),
        }
    }
}

impl From<RequestFailure> for ApiError {
    fn from(failure: RequestFailure) -> Self {
        let message = failure.to_string();
        match failure {
            RequestFailure::Unservable(_) => Self::bad_request(message),
            RequestFailure::Handoff(_) => Self::new(StatusCode::BAD_GATEWAY, message),
            RequestFailure::Engine(_) => Self::internal(message),
            RequestFailure::ShuttingDown => Self::unavailable(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_has_its_status() {
        let status = |failure: RequestFailure| ApiError::from(failure).status.as_u16();
        assert_eq!(status(RequestFailure::Unservable("x".to_owned())), 400);
        assert_eq!(status(RequestFailure::Handoff("x".to_owned())), 502);
        assert_eq!(status(RequestFailure::Engine("x".to_owned())), 500);
        assert_eq!(status(RequestFailure::ShuttingDown), 503);
        let busy = ApiError::from(SubmitError::Busy { queued: 7 }).response();
        assert_eq!(busy.status(), 503);
        assert_eq!(busy.headers()["retry-after"], "1");
        assert_eq!(ApiError::from(SubmitError::Stopped).status, 503);
        let never = ApiError::from(SubmitError::Unservable("too long".to_owned()));
        assert_eq!(
            (never.status.as_u16(), never.message.as_str()),
            (400, "too long")
        );
    }

    #[test]
    fn a_field_error_names_the_field_twice() {
        let error = ApiError::field("top_p", "expected more than 0 and at most 1, got 2");
        let body = error.body();
        assert_eq!(body.param.as_deref(), Some("top_p"));
        assert_eq!(
            body.error.message,
            "`top_p`: expected more than 0 and at most 1, got 2"
        );
        assert_eq!((body.code, body.kind.as_str()), (400, "BadRequestError"));
    }
}

//! The store's five calls on the proxy's port (COMPAT.md §6.2): JSON in, `{"result": …}` out.
//!
//! Anyone who reaches the port could add a worker here and so receive prompts. Where the job has a secret, calls that
//! change something must show the token that follows from it. Without a secret they are open, as the original's are.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::header::{ALLOW, AUTHORIZATION, HeaderMap, HeaderValue};
use hyper::{Method, Request, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Store, StoreError};
use crate::clock;
use crate::reply::{self, Reply};
use crate::request::read_body;

/// Bytes of a `/set` body: a value whose every byte is escaped, and a key.
const BODY_BYTES_MAX: usize = 512 << 10;
/// Longest life that can be asked for; more is as good as for ever.
const TTL_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// A call of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoreCall {
    Set,
    Get,
    Delete,
    Expire,
    GetPrefix,
}

impl StoreCall {
    /// The call on a path.
    pub(crate) fn of_path(path: &str) -> Option<Self> {
        match path {
            "/set" => Some(Self::Set),
            "/get" => Some(Self::Get),
            "/delete" => Some(Self::Delete),
            "/expire" => Some(Self::Expire),
            "/get_prefix" => Some(Self::GetPrefix),
            _ => None,
        }
    }

    fn method(self) -> Method {
        match self {
            Self::Set => Method::POST,
            Self::Delete => Method::DELETE,
            Self::Get | Self::Expire | Self::GetPrefix => Method::GET,
        }
    }

    /// Whether it needs the token. `/expire` changes something although it is a `GET`.
    fn is_guarded(self) -> bool {
        match self {
            Self::Set | Self::Delete | Self::Expire => true,
            Self::Get | Self::GetPrefix => false,
        }
    }
}

#[derive(Debug, Deserialize)]
struct SetBody {
    key: String,
    #[serde(default)]
    value: String,
    #[serde(default = "never")]
    expire_time: f64,
    #[serde(default = "never")]
    ttl: f64,
    #[serde(default)]
    overwrite_if_exists: bool,
}

fn never() -> f64 {
    -1.0
}

/// Answers one call.
pub(crate) async fn handle(
    store: &Store,
    call: StoreCall,
    request: Request<Incoming>,
    patience: Duration,
) -> Reply {
    let (head, body) = request.into_parts();
    if head.method != call.method() {
        let text = format!("{} is not allowed here, use {}", head.method, call.method());
        let mut reply = reply::error(StatusCode::METHOD_NOT_ALLOWED, &text, None);
        if let Ok(allowed) = HeaderValue::from_str(call.method().as_str()) {
            reply.headers_mut().insert(ALLOW, allowed);
        }
        return reply;
    }
    if call.is_guarded() && !is_allowed(store, &head.headers) {
        let text = "this job has a secret, and the call does not prove it";
        return refused(StatusCode::FORBIDDEN, text);
    }
    let query = Query::parse(head.uri.query().unwrap_or_default());
    let outcome = match call {
        StoreCall::Set => match read_body(&head.headers, body, BODY_BYTES_MAX, patience).await {
            Ok(body) => set(store, &body),
            Err(failure) => return failure.into_reply(),
        },
        StoreCall::Get => query.text("key").map(|key| json!(store.get(key))),
        StoreCall::Delete => query.text("key").map(|key| json!(store.delete(key))),
        StoreCall::Expire => expire(store, &query),
        StoreCall::GetPrefix => get_prefix(store, &query),
    };
    match outcome {
        // Only these two are failures; an empty text or map is an answer.
        Ok(result @ (Value::Null | Value::Bool(false))) => answer(StatusCode::BAD_REQUEST, &result),
        Ok(result) => answer(StatusCode::OK, &result),
        Err(reason) => refused(StatusCode::BAD_REQUEST, &reason),
    }
}

fn is_allowed(store: &Store, headers: &HeaderMap) -> bool {
    let Some(token) = &store.token else {
        return true;
    };
    let shown = headers
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '));
    shown.is_some_and(|(scheme, shown)| {
        scheme.eq_ignore_ascii_case("bearer") && token.is(shown.trim())
    })
}

fn answer(status: StatusCode, result: &Value) -> Reply {
    reply::json(status, json!({"result": result}).to_string())
}

fn refused(status: StatusCode, reason: &str) -> Reply {
    reply::json(
        status,
        json!({"result": false, "error": reason}).to_string(),
    )
}

fn set(store: &Store, body: &[u8]) -> Result<Value, String> {
    let body: SetBody =
        serde_json::from_slice(body).map_err(|error| format!("body is no entry: {error}"))?;
    let expires = if body.expire_time >= 0.0 {
        // A time of the monotonic clock, which all processes of this machine share.
        Some(Instant::now() + seconds(body.expire_time - clock::monotonic_s()))
    } else if body.ttl > 0.0 {
        Some(Instant::now() + seconds(body.ttl))
    } else {
        None
    };
    let stored = store.set(&body.key, body.value, expires, body.overwrite_if_exists);
    stored
        .map(|stored| json!(stored))
        .map_err(|error: StoreError| error.to_string())
}

fn expire(store: &Store, query: &Query) -> Result<Value, String> {
    let (key, text) = (query.text("key")?, query.text("ttl")?);
    let ttl: f64 = text
        .parse()
        .map_err(|_| format!("ttl is {text:?}, expected a number of seconds"))?;
    Ok(json!(store.expire(key, seconds(ttl))))
}

fn get_prefix(store: &Store, query: &Query) -> Result<Value, String> {
    let keys_only = match query.0.get("keys_only").map_or("0", String::as_str) {
        "0" | "false" | "False" => false,
        "1" | "true" | "True" => true,
        other => return Err(format!("keys_only is {other:?}, expected 0 or 1")),
    };
    let mut found = store.with_prefix(query.text("key_prefix")?);
    if keys_only {
        found.values_mut().for_each(String::clear);
    }
    Ok(json!(found))
}

/// A number of seconds as a duration: not below zero, not above what is as good as for ever.
fn seconds(number: f64) -> Duration {
    Duration::try_from_secs_f64(number.max(0.0))
        .unwrap_or(TTL_MAX)
        .min(TTL_MAX)
}

/// The parameters of a query.
#[derive(Debug, PartialEq, Eq)]
struct Query(HashMap<String, String>);

impl Query {
    fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                .map(|(name, value)| (decoded(name), decoded(value)))
                .collect(),
        )
    }

    fn text(&self, name: &str) -> Result<&str, String> {
        let value = self.0.get(name).map(String::as_str);
        value.ok_or_else(|| format!("parameter {name} is missing"))
    }
}

/// A name or value without its escapes; an escape that is none stays as it is.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let escaped = (*first == b'%')
            .then(|| after.split_at_checked(2))
            .flatten()
            .and_then(|(digits, after)| Some((hex_byte(digits)?, after)));
        let byte = if *first == b'+' { b' ' } else { *first };
        let (byte, after) = escaped.unwrap_or((byte, after));
        bytes.push(byte);
        rest = after;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hex_byte(digits: &[u8]) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let [high, low] = digits else {
        return None;
    };
    u8::try_from(digit(*high)? * 16 + digit(*low)?).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn queries_are_read_as_forms() {
        let query = Query::parse("key=%2Fa%2fb+c&ttl=5&flag&x=%zz%4");
        assert_eq!(query.text("key"), Ok("/a/b c"));
        assert_eq!(query.text("ttl"), Ok("5"));
        assert_eq!(query.text("flag"), Ok(""));
        assert_eq!(query.text("x"), Ok("%zz%4"));
        assert!(query.text("none").unwrap_err().contains("none is missing"));
    }

    #[test]
    fn seconds_are_bounded() {
        assert_eq!(seconds(1.5), Duration::from_millis(1500));
        assert_eq!(seconds(-3.0), Duration::ZERO);
        for endless in [f64::INFINITY, 1e300] {
            assert_eq!(seconds(endless), TTL_MAX);
        }
        assert!(seconds(f64::NAN) <= TTL_MAX);
    }

    proptest! {
        #[test]
        fn what_is_escaped_comes_back(text in any::<String>()) {
            let escaped: String = text.bytes().map(|byte| format!("%{byte:02x}")).collect();
            prop_assert_eq!(decoded(&escaped), text);
        }
    }
}

//! KV that moves while its prompt is still being read (`baton_configs::wire::KV_PREFETCH_HEADER`).
//!
//! A context server that reads a prompt in several steps says so with the first one, in a line that the proxy passes to a
//! generation server as it is. That one fetches what there is; the generation phase goes to the same server and finds it
//! there. Nothing depends on it: whatever fails here, the generation phase fetches by itself.

use std::sync::Arc;

use baton_configs::wire::{AnswerHead, KV_PREFETCH_PATH};
use bytes::{Bytes, BytesMut};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, StatusCode, http};
use tokio::task::JoinHandle;

use crate::error::Fault;
use crate::options::Timeouts;
use crate::upstream::{self, AnswerBody, Call};
use crate::workers::Worker;

/// Bytes of a generation server's answer, of which nothing is used but for the log.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// A fetch that a generation server has been asked for. Dropping it ends the fetch, unless its request has come.
#[derive(Debug)]
pub(crate) struct Prefetch {
    worker: Arc<Worker>,
    call: JoinHandle<()>,
}

impl Prefetch {
    /// Asks a generation server, with a context server's line.
    pub(crate) fn begin(
        worker: Arc<Worker>,
        headers: HeaderMap,
        line: Bytes,
        timeouts: &Timeouts,
    ) -> Self {
        let call = Call {
            method: Method::POST,
            path: KV_PREFETCH_PATH,
            headers,
            body: line,
            connect: timeouts.connect,
            total: timeouts.request,
            fresh: false,
        };
        let asked = Arc::clone(&worker);
        let call = tokio::spawn(async move {
            match upstream::ask(&asked, &call, ANSWER_BYTES_MAX).await {
                Ok((StatusCode::OK, _)) => {}
                Ok((status, body)) => {
                    let (name, body) = (asked.name(), String::from_utf8_lossy(&body));
                    tracing::debug!(
                        status = status.as_u16(),
                        "{name} fetches no kv early: {body}"
                    );
                }
                Err(fault) => tracing::debug!("{} fetches no kv early: {fault}", asked.name()),
            }
        });
        Self { worker, call }
    }

    /// Who fetches.
    pub(crate) fn worker(&self) -> &Arc<Worker> {
        &self.worker
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.call.abort();
    }
}

/// The body of an answer that comes in lines.
#[derive(Debug)]
pub(crate) struct Lines {
    body: AnswerBody,
    /// What has come and was not taken.
    ahead: BytesMut,
    /// Bytes that are held at most.
    limit: usize,
}

impl Lines {
    pub(crate) fn new(body: AnswerBody, limit: usize) -> Self {
        Self {
            body,
            ahead: BytesMut::new(),
            limit,
        }
    }

    /// The next line, without its end.
    pub(crate) async fn next(&mut self, waited_for: &'static str) -> Result<Bytes, Fault> {
        let mut looked_at = 0;
        loop {
            let new = &self.ahead[looked_at..];
            if let Some(at) = new.iter().position(|byte| *byte == b'\n') {
                let mut line = self.ahead.split_to(looked_at + at + 1);
                line.truncate(line.len() - 1);
                return Ok(line.freeze());
            }
            looked_at = self.ahead.len();
            if looked_at > self.limit {
                let text = format!("a line of more than {} bytes", self.limit);
                return Err(Fault::BadAnswer(text));
            }
            match self.body.next(waited_for).await? {
                Some(bytes) => self.ahead.extend_from_slice(&bytes),
                None => return Err(Fault::Lost(format!("it ended before the {waited_for}"))),
            }
        }
    }

    /// All that is left.
    pub(crate) async fn rest(mut self) -> Result<Bytes, Fault> {
        let rest = self.body.collect(self.limit).await?;
        if self.ahead.is_empty() {
            return Ok(rest);
        }
        self.ahead.extend_from_slice(&rest);
        Ok(self.ahead.freeze())
    }
}

/// The head that an answer would have had, had nothing come before it.
pub(crate) fn read_head(line: &[u8]) -> Result<http::response::Parts, Fault> {
    let bad = |what: String| Fault::BadAnswer(format!("the answer's head: {what}"));
    let head: AnswerHead = serde_json::from_slice(line).map_err(|error| bad(error.to_string()))?;
    let status = StatusCode::from_u16(head.status).map_err(|error| bad(error.to_string()))?;
    let (mut parts, ()) = http::Response::new(()).into_parts();
    parts.status = status;
    for (name, value) in head.headers {
        let name = HeaderName::try_from(name).map_err(|error| bad(error.to_string()))?;
        let value = HeaderValue::try_from(value).map_err(|error| bad(error.to_string()))?;
        parts.headers.append(name, value);
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_in_a_line_is_a_head() {
        let line = br#"{"status":503,"headers":{"retry-after":"1","content-type":"text/plain"}}"#;
        let head = read_head(line).unwrap();
        assert_eq!(head.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(head.headers["retry-after"], "1");
        for bad in [
            &b"{}"[..],
            br#"{"status":42,"headers":{}}"#,
            br#"{"status":200,"headers":{"a b":"c"}}"#,
            br#"{"status":200,"headers":{"a":"\n"}}"#,
        ] {
            let Err(Fault::BadAnswer(text)) = read_head(bad) else {
                panic!("{} is a head", String::from_utf8_lossy(bad));
            };
            assert!(text.starts_with("the answer's head: "), "{text}");
        }
    }
}

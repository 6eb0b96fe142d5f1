//! The relay of a generation server's event stream: bytes out as they come in, none looked at, none changed.
//!
//! Three things can end it: the worker (the bytes end), the client (the relay is dropped, and with it the
//! connection to the worker), or a deadline. When the worker fails in the middle, the client gets one more
//! event that says so, and then a cut connection, so that nobody takes half an answer for a whole one.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Frame;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::admission::Place;
use crate::book::RequestBook;
use crate::error::{Fault, UpstreamFailure};
use crate::reply;
use crate::upstream::AnswerBody;

/// Ends a client's connection before its body is complete.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamCut;

impl fmt::Display for StreamCut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stream cut: its worker failed")
    }
}

impl std::error::Error for StreamCut {}

/// What a relay needs besides the worker's answer.
#[derive(Debug)]
pub(crate) struct RelayParts {
    /// The first piece, which was waited for before the client was answered.
    pub(crate) first: Bytes,
    /// The rest.
    pub(crate) rest: AnswerBody,
    /// Longest silence between two pieces.
    pub(crate) idle: Duration,
    /// Counts the request's end, whichever it is.
    pub(crate) book: RequestBook,
    /// Held until the end.
    pub(crate) place: Place,
}

enum Phase {
    First(Bytes),
    Relaying,
    /// The failure event is handed out; it must reach the socket before the cut.
    Flushing,
    Cutting,
}

/// A stream on its way from a generation server to a client.
pub(crate) struct Relay {
    phase: Phase,
    rest: AnswerBody,
    idle: Duration,
    last_piece: Instant,
    /// Whether the bytes so far end where an event ends.
    at_event_end: bool,
    timer: Pin<Box<Sleep>>,
    book: RequestBook,
    _place: Place,
}

impl Relay {
    pub(crate) fn new(parts: RelayParts) -> Self {
        let now = Instant::now();
        let deadline = parts.rest.deadline();
        Self {
            phase: Phase::First(parts.first),
            rest: parts.rest,
            idle: parts.idle,
            last_piece: now,
            at_event_end: true,
            timer: Box::pin(sleep_until(deadline.min(now + parts.idle))),
            book: parts.book,
            _place: parts.place,
        }
    }

    /// The next piece for the client.
    pub(crate) fn poll_relay(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamCut>>> {
        match std::mem::replace(&mut self.phase, Phase::Relaying) {
            Phase::First(bytes) => return self.pass(bytes),
            Phase::Relaying => {}
            Phase::Flushing => {
                // Giving way once makes the server write out what it holds.
                self.phase = Phase::Cutting;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Phase::Cutting => {
                self.phase = Phase::Cutting;
                return Poll::Ready(Some(Err(StreamCut)));
            }
        }
        match self.rest.poll_data(cx) {
            Poll::Ready(Some(Ok(bytes))) => self.pass(bytes),
            Poll::Ready(Some(Err(fault))) => self.fail(fault),
            Poll::Ready(None) => {
                self.book.complete_stream();
                Poll::Ready(None)
            }
            Poll::Pending => self.poll_deadline(cx),
        }
    }

    fn pass(&mut self, bytes: Bytes) -> Poll<Option<Result<Frame<Bytes>, StreamCut>>> {
        self.last_piece = Instant::now();
        self.at_event_end = bytes.ends_with(b"\n\n") || bytes.ends_with(b"\r\n\r\n");
        self.book.piece(self.last_piece);
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }

    /// The timer is moved only when it fires, not with every piece.
    fn poll_deadline(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StreamCut>>> {
        while self.timer.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            if now >= self.rest.deadline() {
                return self.fail(Fault::TimedOut {
                    waited_for: "end of the stream",
                    after: self.book.elapsed(),
                });
            }
            if now >= self.last_piece + self.idle {
                return self.fail(Fault::TimedOut {
                    waited_for: "next piece of the stream",
                    after: now - self.last_piece,
                });
            }
            let due = self.rest.deadline().min(self.last_piece + self.idle);
            self.timer.as_mut().reset(due);
        }
        Poll::Pending
    }

    fn fail(&mut self, fault: Fault) -> Poll<Option<Result<Frame<Bytes>, StreamCut>>> {
        let worker = self.rest.worker().clone();
        worker.suspect();
        let failure = UpstreamFailure { worker, fault };
        tracing::warn!(
            elapsed_ms = self.book.elapsed_ms(),
            "stream failed: {failure}"
        );
        self.book.fail_stream(&failure);
        self.phase = Phase::Flushing;
        let lead = if self.at_event_end { "" } else { "\n\n" };
        let body = reply::error_json(failure.status(), &failure.to_string(), None);
        let mut event = Vec::with_capacity(body.len() + 16);
        event.extend_from_slice(lead.as_bytes());
        event.extend_from_slice(b"data: ");
        event.extend_from_slice(&body);
        event.extend_from_slice(b"\n\n");
        Poll::Ready(Some(Ok(Frame::data(event.into()))))
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay")
            .field("rest", &self.rest)
            .finish_non_exhaustive()
    }
}

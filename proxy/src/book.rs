//! One request's accounts, closed exactly once: answered, failed, or, when they are dropped, left by its client.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Failure, UpstreamFailure};
use crate::metrics::Metrics;
use crate::workers::Role;

/// Closes a request's accounts exactly once: answered, failed, or, when it is dropped, left by its client.
#[derive(Debug)]
pub(crate) struct RequestBook {
    metrics: Arc<Metrics>,
    arrived: Instant,
    closed: bool,
    /// When the generation call was sent, its first and its last piece came, and how many came.
    sent: Instant,
    first_piece: Option<Instant>,
    last_piece: Option<Instant>,
    piece_count: u32,
}

impl RequestBook {
    pub(crate) fn open(metrics: Arc<Metrics>) -> Self {
        metrics.total_requests.inc();
        let now = Instant::now();
        Self {
            metrics,
            arrived: now,
            closed: false,
            sent: now,
            first_piece: None,
            last_piece: None,
            piece_count: 0,
        }
    }

    pub(crate) fn arrived(&self) -> Instant {
        self.arrived
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.arrived.elapsed()
    }

    pub(crate) fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The generation call goes out.
    pub(crate) fn sent(&mut self) {
        self.sent = Instant::now();
    }

    /// When it went out.
    pub(crate) fn sent_at(&self) -> Instant {
        self.sent
    }

    /// A piece of the stream came.
    pub(crate) fn piece(&mut self, now: Instant) {
        if self.first_piece.is_none() {
            self.first_piece = Some(now);
        }
        self.last_piece = Some(now);
        self.piece_count += 1;
    }

    /// The stream ended as its worker meant it to.
    pub(crate) fn complete_stream(&mut self) {
        let generation = self.metrics.role(Role::Generation);
        let first = self.first_piece.map(|first| first - self.sent);
        generation.completed(first, self.sent.elapsed());
        if let (Some(first), Some(last)) = (self.first_piece, self.last_piece)
            && self.piece_count > 1
        {
            let mean = (last - first).as_secs_f64() / f64::from(self.piece_count - 1);
            generation.per_token_latency.observe(mean);
        }
        self.answered();
    }

    /// The stream ended early through its worker.
    pub(crate) fn fail_stream(&mut self, failure: &UpstreamFailure) {
        self.metrics
            .role(failure.worker.role())
            .error_requests
            .inc();
        self.metrics.http_exceptions.inc();
        self.closed = true;
    }

    /// The request was answered to the end.
    pub(crate) fn answered(&mut self) {
        self.metrics.total_responses.inc();
        self.closed = true;
    }

    /// The request was answered with an error.
    pub(crate) fn failed(&mut self, failure: &Failure) {
        self.metrics.failed(failure);
        self.closed = true;
    }
}

impl Drop for RequestBook {
    fn drop(&mut self) {
        if !self.closed {
            self.metrics.client_disconnects.inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_book_is_a_client_that_left() {
        let metrics = Arc::new(Metrics::new());
        drop(RequestBook::open(metrics.clone()));
        RequestBook::open(metrics.clone()).answered();
        assert_eq!(metrics.client_disconnects.get(), 1);
        assert_eq!(metrics.total_responses.get(), 1);
        assert_eq!(metrics.total_requests.get(), 2);
    }
}

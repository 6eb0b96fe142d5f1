//! Tells a worker how far its clock is from the proxy's, so that `/perf_metrics` joins times of one clock (COMPAT.md §7.3).
//!
//! Done whenever a worker comes up and records are kept. A worker without such a clock keeps its own times.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde::Deserialize;

use crate::clock;
use crate::error::Fault;
use crate::upstream::{self, Call};
use crate::workers::Worker;

const PATH: &str = "/steady_clock_offset";
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// When a worker got the question and when it answered, in seconds of its own clock.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Stamps {
    receive_ts: f64,
    transmit_ts: f64,
}

/// Asks for the worker's clock and tells it the difference.
pub(crate) async fn synchronise(worker: &Arc<Worker>, patience: Duration) {
    match exchange(worker, patience).await {
        Ok(offset_s) => tracing::debug!(offset_s, "told {} its clock offset", worker.name()),
        Err(fault) => tracing::debug!("no clock offset for {}: {fault}", worker.name()),
    }
}

async fn exchange(worker: &Arc<Worker>, patience: Duration) -> Result<f64, Fault> {
    let question = Call::probe(PATH, patience);
    let sent = clock::monotonic_s();
    let answer = ask(worker, &question).await?;
    let received = clock::monotonic_s();
    let stamps: Stamps =
        serde_json::from_slice(&answer).map_err(|error| Fault::BadAnswer(error.to_string()))?;
    let offset_s = -ahead_s(sent, stamps, received);
    let mut order = Call::probe(PATH, patience);
    order.method = Method::POST;
    order.body = Bytes::from(serde_json::json!({"offset": offset_s}).to_string());
    ask(worker, &order).await?;
    Ok(offset_s)
}

/// How far the worker's clock is ahead of ours, if the question took as long as the answer.
fn ahead_s(sent: f64, stamps: Stamps, received: f64) -> f64 {
    f64::midpoint(stamps.receive_ts - sent, stamps.transmit_ts - received)
}

async fn ask(worker: &Arc<Worker>, call: &Call) -> Result<Bytes, Fault> {
    match upstream::ask(worker, call, ANSWER_BYTES_MAX).await? {
        (StatusCode::OK, body) => Ok(body),
        (status, _) => Err(Fault::BadAnswer(format!(
            "status {} for {PATH}",
            status.as_u16()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn difference_leaves_out_the_way_and_the_work() {
        // 100 s ahead, 1 s each way, 3 s of work between.
        let stamps = Stamps {
            receive_ts: 111.0,
            transmit_ts: 114.0,
        };
        assert!((ahead_s(10.0, stamps, 15.0) - 100.0).abs() < 1e-9);
    }
}

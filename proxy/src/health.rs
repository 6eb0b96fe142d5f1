//! The health checks: one task per worker that asks `GET /health` for as long as the proxy runs.
//!
//! A refused connection or a 503 is the worker's own word and counts at once; silence, which a busy machine can
//! cause too, counts when it repeats.

use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use tokio::time::{sleep, timeout};

use crate::clock_sync;
use crate::error::{Fault, message_of};
use crate::options::Timeouts;
use crate::upstream::{self, Call};
use crate::workers::{Condition, Worker};

/// Between two checks of a worker that is not up: at first, and at most.
const DOWN_INTERVAL_MIN: Duration = Duration::from_millis(250);
const DOWN_INTERVAL_MAX: Duration = Duration::from_secs(3);
/// Between any two checks, however many failed requests ask for one.
const PROBE_GAP_MIN: Duration = Duration::from_millis(100);
/// Silent checks in a row after which a worker that was up is down.
const SILENT_COUNT_MAX: u32 = 2;
/// Bytes of a `/health` answer.
const TEXT_BYTES_MAX: usize = 64 << 10;

/// How workers are watched.
#[derive(Debug, Clone)]
pub(crate) struct Watching {
    pub(crate) timeouts: Timeouts,
    /// Tell a worker its clock offset when it comes up.
    pub(crate) sets_clock: bool,
}

/// Checks `worker` until it is retired.
pub(crate) async fn watch(worker: Arc<Worker>, watching: Watching) {
    let Watching {
        timeouts,
        sets_clock,
    } = watching;
    let mut silent_count = 0;
    let mut down_interval = DOWN_INTERVAL_MIN;
    while !worker.is_retired() {
        let seen = probe(&worker, timeouts.probe).await;
        silent_count = match &seen {
            Condition::Silent(_) => silent_count + 1,
            Condition::Unknown
            | Condition::Unreachable(_)
            | Condition::NotReady(_)
            | Condition::Up => 0,
        };
        let is_doubtful = worker.is_up() && silent_count > 0 && silent_count < SILENT_COUNT_MAX;
        let changed = !is_doubtful && worker.report(seen);
        if changed && worker.is_up() && sets_clock {
            clock_sync::synchronise(&worker, timeouts.probe).await;
        }
        let interval = if worker.is_up() {
            down_interval = DOWN_INTERVAL_MIN;
            timeouts.health_interval
        } else {
            if changed {
                down_interval = DOWN_INTERVAL_MIN;
            }
            let interval = down_interval;
            down_interval = (down_interval * 3 / 2).min(DOWN_INTERVAL_MAX);
            interval
        };
        worker.pool.prune();
        sleep(PROBE_GAP_MIN).await;
        // Either it is time, or a request has a reason to ask earlier.
        let _ = timeout(
            interval.saturating_sub(PROBE_GAP_MIN),
            worker.probe_wanted.notified(),
        )
        .await;
    }
}

async fn probe(worker: &Arc<Worker>, patience: Duration) -> Condition {
    let call = Call::probe("/health", patience);
    match upstream::ask(worker, &call, TEXT_BYTES_MAX).await {
        Ok((StatusCode::OK, _)) => Condition::Up,
        Ok((StatusCode::SERVICE_UNAVAILABLE, body)) if !body.is_empty() => {
            Condition::NotReady(message_of(&body).chars().take(200).collect())
        }
        Ok((status, _)) => Condition::NotReady(format!("answers {} to /health", status.as_u16())),
        Err(fault @ Fault::TimedOut { .. }) => Condition::Silent(fault.to_string()),
        Err(Fault::Unreachable(reason)) => Condition::Unreachable(reason),
        // Nothing new is known.
        Err(Fault::Exhausted(_)) => worker.condition(),
        Err(fault) => Condition::Unreachable(fault.to_string()),
    }
}

//! The wait for all configured workers after the start, and what it says while it lasts.
//!
//! Workers that register by themselves have no deadline: a batch system may start them hours later. The same lines
//! say that they are waited for.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::cluster::{Cluster, Missing};
use crate::server::ProxyError;

/// Between two lines per worker that is waited for.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// The same in the end for workers that register, which may take hours.
const LINE_INTERVAL_MAX: Duration = Duration::from_secs(300);

/// Returns when every worker is up at once, or with the names of those that were not in time.
pub(crate) async fn wait_for_all(cluster: &Cluster, patience: Duration) -> Result<(), ProxyError> {
    let started = Instant::now();
    let deadline = started + patience;
    let mut changes = cluster.changes();
    let mut lines = interval_at(started + LINE_INTERVAL, LINE_INTERVAL);
    lines.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        if cluster.missing().is_empty() {
            cluster.set_started();
            let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            if cluster.discovers() {
                wait_for_registrations(cluster).await;
            } else {
                tracing::info!(
                    elapsed_ms,
                    "ready: every context and generation server is up"
                );
            }
            return Ok(());
        }
        tokio::select! {
            // The cluster outlives this wait and holds the sender.
            _ = changes.changed() => {}
            _ = lines.tick() => {
                for missing in cluster.missing() {
                    tracing::info!("{}", line(&missing, started.elapsed(), patience));
                }
            }
            () = tokio::time::sleep_until(deadline) => {
                let missing = cluster
                    .missing()
                    .iter()
                    .map(|missing| format!("{}: {}", missing.name, missing.condition))
                    .collect();
                return Err(ProxyError::StartTimeout { patience, missing });
            }
        }
    }
}

/// Says who is missing until enough are there for the first time; more and more seldom.
async fn wait_for_registrations(cluster: &Cluster) {
    let mut changes = cluster.changes();
    let mut pause = LINE_INTERVAL;
    let mut next = Instant::now() + pause;
    while let Err(reason) = cluster.readiness() {
        tokio::select! {
            _ = changes.changed() => {}
            () = tokio::time::sleep_until(next) => {
                tracing::info!("waiting for servers to register: {reason}");
                pause = (pause * 2).min(LINE_INTERVAL_MAX);
                next = Instant::now() + pause;
            }
        }
    }
}

/// `waiting for context server 127.0.0.1:8001: loading 43 % (12 s, 168 s left)`.
fn line(missing: &Missing, waited: Duration, patience: Duration) -> String {
    let left = patience.saturating_sub(waited);
    format!(
        "waiting for {}: {} ({} s, {} s left)",
        missing.name,
        missing.condition,
        waited.as_secs(),
        left.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_says_on_whom_what_and_how_long() {
        let missing = Missing {
            name: "context server 127.0.0.1:8001".to_owned(),
            condition: "loading 43 %".to_owned(),
        };
        assert_eq!(
            line(&missing, Duration::from_secs(12), Duration::from_secs(180)),
            "waiting for context server 127.0.0.1:8001: loading 43 % (12 s, 168 s left)"
        );
    }
}

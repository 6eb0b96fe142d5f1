//! The wait for all static workers after the start, and what it says while it lasts.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::server::ProxyError;
use crate::workers::{Cluster, Worker};

/// Between two lines per worker that is waited for.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

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
            tracing::info!(
                elapsed_ms,
                "ready: every context and generation server is up"
            );
            return Ok(());
        }
        tokio::select! {
            // The cluster outlives this wait and holds the sender.
            _ = changes.changed() => {}
            _ = lines.tick() => {
                for worker in cluster.missing() {
                    tracing::info!("{}", line(worker, started.elapsed(), patience));
                }
            }
            () = tokio::time::sleep_until(deadline) => {
                let missing = cluster
                    .missing()
                    .iter()
                    .map(|worker| format!("{}: {}", worker.name(), worker.condition()))
                    .collect();
                return Err(ProxyError::StartTimeout { patience, missing });
            }
        }
    }
}

/// `waiting for context server 127.0.0.1:8001: loading 43 % (12 s, 168 s left)`.
fn line(worker: &Worker, waited: Duration, patience: Duration) -> String {
    let left = patience.saturating_sub(waited);
    format!(
        "waiting for {}: {} ({} s, {} s left)",
        worker.name(),
        worker.condition(),
        waited.as_secs(),
        left.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use baton_configs::disagg::{Endpoint, ServerGroup};

    use super::*;
    use crate::workers::Condition;

    #[test]
    fn line_says_on_whom_what_and_how_long() {
        let group = ServerGroup {
            servers: vec![Endpoint {
                host: "127.0.0.1".to_owned(),
                port: 8001,
            }],
            ..ServerGroup::default()
        };
        let cluster = Cluster::new(&group, &ServerGroup::default());
        let worker = cluster.workers().next().unwrap();
        worker.report(Condition::NotReady("loading 43 %".to_owned()));
        assert_eq!(
            line(worker, Duration::from_secs(12), Duration::from_secs(180)),
            "waiting for context server 127.0.0.1:8001: loading 43 % (12 s, 168 s left)"
        );
    }
}

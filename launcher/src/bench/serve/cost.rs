//! What measuring costs the measuring side, and how late it was: a client that cannot keep up measures itself.
//!
//! A thread wakes a task of the same runtime again and again, just as a socket wakes the task of a request; how long that
//! takes is how late a token's time may be. Invariant: the thread ends with its [`Watch`].

use std::num::NonZero;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task;

use super::stats::Distribution;

/// Between two wakings.
const PERIOD: Duration = Duration::from_millis(5);
/// Wakings on their way.
const WAKINGS_MAX: usize = 16;
/// Most that are kept: an hour and more.
const SAMPLES_MAX: usize = 1 << 20;

/// What a run cost the side that measured it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct ClientCost {
    /// Processor time; `null` where the engine is in the same process.
    pub(super) cpu_s: Option<f64>,
    /// Of the cores that it may use.
    pub(super) cpu_share: Option<f64>,
    /// Of each token that came.
    pub(super) cpu_us_per_token: Option<f64>,
    pub(super) cores: usize,
    /// From waking a task to its running.
    pub(super) wake_ms: Option<Distribution>,
}

/// A look at this process while it measures.
#[derive(Debug)]
pub(super) struct Watch {
    stop: SyncSender<()>,
    waker: JoinHandle<()>,
    woken: task::JoinHandle<Vec<f64>>,
    begun: Instant,
    cpu_us: Option<i64>,
}

impl Watch {
    /// Begins to look. Must be called within the runtime that measures.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub(super) fn start() -> anyhow::Result<Self> {
        let (stop, stopped) = sync_channel::<()>(1);
        let (wakings, mut woken) = mpsc::channel::<Instant>(WAKINGS_MAX);
        let waker = std::thread::Builder::new()
            .name("bench-watch".to_owned())
            .spawn(move || {
                while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                    // A full queue means that the oldest in it is late enough to tell.
                    if let Err(mpsc::error::TrySendError::Closed(_)) =
                        wakings.try_send(Instant::now())
                    {
                        return;
                    }
                }
            })
            .context("cannot start a thread")?;
        let woken = tokio::spawn(async move {
            let mut late_ms = Vec::new();
            while let Some(sent) = woken.recv().await {
                if late_ms.len() < SAMPLES_MAX {
                    late_ms.push(sent.elapsed().as_secs_f64() * 1e3);
                }
            }
            late_ms
        });
        Ok(Self {
            stop,
            waker,
            woken,
            begun: Instant::now(),
            cpu_us: cpu_us(),
        })
    }

    /// Ends the look. `tokens` have come since its start; `is_alone` says that nothing else runs in this process.
    ///
    /// # Errors
    /// When the thread or the task panicked.
    pub(super) async fn finish(self, tokens: u64, is_alone: bool) -> anyhow::Result<ClientCost> {
        let elapsed_s = self.begun.elapsed().as_secs_f64();
        let spent_us = cpu_us().zip(self.cpu_us).filter(|_| is_alone);
        // It is gone already when its task has ended.
        let _ = self.stop.send(());
        self.waker
            .join()
            .map_err(|_| anyhow!("the thread that watches the client panicked"))?;
        let late_ms = self.woken.await.context("the watch of the client")?;
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        #[expect(
            clippy::cast_precision_loss,
            reason = "microseconds and tokens of a run are far below 2^52"
        )]
        let cpu_s = spent_us.map(|(now, before)| (now - before) as f64 / 1e6);
        #[expect(clippy::cast_precision_loss, reason = "as above")]
        let per = |number: f64| cpu_s.filter(|_| number > 0.0).map(|cpu_s| cpu_s / number);
        #[expect(clippy::cast_precision_loss, reason = "as above")]
        let tokens = tokens as f64;
        #[expect(clippy::cast_precision_loss, reason = "as above")]
        let core_seconds = elapsed_s * cores as f64;
        Ok(ClientCost {
            cpu_s,
            cpu_share: per(core_seconds),
            cpu_us_per_token: per(tokens / 1e6),
            cores,
            wake_ms: Distribution::of(late_ms),
        })
    }
}

/// What this process has cost so far.
fn cpu_us() -> Option<i64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    Some(usage.user_time().num_microseconds() + usage.system_time().num_microseconds())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_watch_sees_wakings_and_ends() {
        let watch = Watch::start().unwrap();
        tokio::time::sleep(PERIOD * 4).await;
        let cost = watch.finish(10, true).await.unwrap();
        assert!(
            cost.wake_ms.is_some_and(|wake| wake.samples > 0),
            "{cost:?}"
        );
        assert!(cost.cpu_s.is_some() && cost.cores > 0);
        let watch = Watch::start().unwrap();
        let cost = watch.finish(10, false).await.unwrap();
        assert_eq!((cost.cpu_s, cost.cpu_us_per_token), (None, None));
    }
}

//! Sends the requests of a run, each at its time or as soon as there is a place for it, and keeps what became of them.
//!
//! Invariant: every request has a deadline of its own, from its sending, and every record that is begun is kept; so a run
//! ends, whatever its target does.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::engine::EngineTarget;
use super::http::HttpTarget;
use super::prompts::{Item, Requests};
use super::record::{Answer, Record};

/// What answers.
#[derive(Debug, Clone)]
pub(super) enum Target {
    /// A server or a proxy.
    Http(Arc<HttpTarget>),
    /// The engine in this process.
    Engine(Arc<EngineTarget>),
}

impl Target {
    /// Sends one request and follows its answer; tells when it went.
    async fn ask(&self, item: &Item) -> (Instant, Answer) {
        match self {
            Self::Http(target) => target.ask(item).await,
            Self::Engine(target) => target.ask(item).await,
        }
    }
}

/// How far a run is.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress(Arc<AtomicUsize>);

impl Progress {
    /// Requests that have ended.
    pub(super) fn ended(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Sends all requests; the records are in their order.
///
/// # Errors
/// When a task panicked.
pub(super) async fn run(
    target: &Target,
    requests: &Arc<Requests>,
    progress: &Progress,
) -> anyhow::Result<Vec<Record>> {
    let bound = requests.case().concurrency.unwrap_or(usize::MAX);
    let places = Arc::new(Semaphore::new(bound.min(Semaphore::MAX_PERMITS)));
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for (index, due) in requests.times().into_iter().enumerate() {
        if !due.is_zero() {
            tokio::time::sleep_until(begun + due).await;
        }
        // Whoever holds a place has a deadline.
        let place = Arc::clone(&places).acquire_owned().await?;
        let (target, requests) = (target.clone(), Arc::clone(requests));
        let progress = progress.clone();
        tasks.spawn(async move {
            let record = measure(&target, &requests, (index, due), begun).await;
            drop(place);
            progress.add();
            record
        });
    }
    let mut records = Vec::with_capacity(requests.count());
    while let Some(done) = tasks.join_next().await {
        records.push(done.context("the task of a request ended early")?);
    }
    records.sort_by_key(|record| record.index);
    Ok(records)
}

async fn measure(
    target: &Target,
    requests: &Requests,
    (index, due): (usize, Duration),
    begun: Instant,
) -> Record {
    let item = requests.item(index, due);
    let (sent, answer) = target.ask(&item).await;
    let sent_us = micros(sent - begun);
    let ended = answer.failure.is_some().then(|| micros(begun.elapsed()));
    let last = answer.last_us().map_or(0, u64::from);
    Record {
        index,
        // What waits for a place is not late.
        due_us: if requests.case().is_closed_loop() {
            sent_us
        } else {
            micros(due)
        },
        sent_us,
        end_us: ended.unwrap_or(sent_us + last),
        input_tokens: item.input_tokens(),
        output_asked: item.output,
        answer,
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

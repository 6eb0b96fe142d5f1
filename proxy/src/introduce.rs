//! Has generation servers connect to context servers as soon as both are up, so that the first request finds the
//! connection there, and servers whose KV does not fit are named before a request fails on them.
//!
//! A help and nothing more: servers that know nothing of it connect with the first request.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use baton_configs::wire::{KV_ENDPOINT_PATH, KV_PEERS_PATH};
use bytes::Bytes;
use hyper::{Method, StatusCode};
use tokio::task::JoinSet;

use crate::cluster::Cluster;
use crate::error::message_of;
use crate::upstream::{self, Call};
use crate::workers::{Role, Worker};

/// Calls at once.
const CALLS_MAX: usize = 16;
/// Bytes of an answer: endpoints of every rank of an instance.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// A worker since it last came up.
type Life = (String, u64);

/// Whom it has introduced.
#[derive(Debug, Default)]
struct Introduced {
    /// How context servers are reached; `None` of those that do not say.
    endpoints: HashMap<Life, Option<Bytes>>,
    pairs: HashSet<(Life, Life)>,
}

/// Introduces servers to each other for as long as the proxy runs.
pub(crate) async fn follow(cluster: Arc<Cluster>, patience: Duration) {
    let mut changes = cluster.changes();
    let mut introduced = Introduced::default();
    loop {
        changes.mark_unchanged();
        introduced.all(&cluster, patience).await;
        if changes.changed().await.is_err() {
            return;
        }
    }
}

fn life(worker: &Worker) -> Life {
    (worker.name().to_owned(), worker.ups())
}

fn up(cluster: &Cluster, role: Role) -> Vec<Arc<Worker>> {
    let servers = cluster.group(role).servers();
    servers
        .iter()
        .filter(|worker| worker.is_up())
        .cloned()
        .collect()
}

impl Introduced {
    /// Everybody who is up and has not met.
    async fn all(&mut self, cluster: &Cluster, patience: Duration) {
        let (context, generation) = (up(cluster, Role::Context), up(cluster, Role::Generation));
        let lives = |workers: &[Arc<Worker>]| -> HashSet<Life> {
            workers.iter().map(|worker| life(worker)).collect()
        };
        let (givers, takers) = (lives(&context), lives(&generation));
        self.endpoints.retain(|giver, _| givers.contains(giver));
        self.pairs
            .retain(|(giver, taker)| givers.contains(giver) && takers.contains(taker));
        let unknown = context
            .iter()
            .filter(|worker| !self.endpoints.contains_key(&life(worker)));
        let asked = unknown.cloned().map(|worker| async move {
            let endpoint = endpoint_of(&worker, patience).await;
            (life(&worker), endpoint)
        });
        let answers = at_once(asked.collect()).await;
        self.endpoints.extend(answers);
        let mut calls = Vec::new();
        for giver in &context {
            let Some(Some(endpoint)) = self.endpoints.get(&life(giver)) else {
                continue;
            };
            for taker in &generation {
                let is_itself = giver.endpoint() == taker.endpoint();
                if is_itself || !self.pairs.insert((life(giver), life(taker))) {
                    continue;
                }
                let (giver, taker) = (giver.clone(), taker.clone());
                let endpoint = endpoint.clone();
                calls.push(async move { introduce(&giver, &taker, endpoint, patience).await });
            }
        }
        at_once(calls).await;
    }
}

/// Runs calls, a few at a time.
async fn at_once<F>(calls: Vec<F>) -> Vec<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    let mut running = JoinSet::new();
    let mut outputs = Vec::with_capacity(calls.len());
    for call in calls {
        if running.len() >= CALLS_MAX
            && let Some(Ok(output)) = running.join_next().await
        {
            outputs.push(output);
        }
        running.spawn(call);
    }
    while let Some(joined) = running.join_next().await {
        outputs.extend(joined);
    }
    outputs
}

async fn endpoint_of(worker: &Arc<Worker>, patience: Duration) -> Option<Bytes> {
    let call = Call::probe(KV_ENDPOINT_PATH, patience);
    match upstream::ask(worker, &call, ANSWER_BYTES_MAX).await {
        Ok((StatusCode::OK, endpoint)) => Some(endpoint),
        Ok((status, _)) => {
            let status = status.as_u16();
            tracing::debug!(
                status,
                "{} does not say how its kv is reached",
                worker.name()
            );
            None
        }
        Err(fault) => {
            tracing::debug!(
                "{} does not say how its kv is reached: {fault}",
                worker.name()
            );
            None
        }
    }
}

/// Tells a generation server of a context server.
async fn introduce(giver: &Worker, taker: &Arc<Worker>, endpoint: Bytes, patience: Duration) {
    let mut call = Call::probe(KV_PEERS_PATH, patience);
    call.method = Method::POST;
    call.body = endpoint;
    let (giver, name) = (giver.name(), taker.name());
    match upstream::ask(taker, &call, ANSWER_BYTES_MAX).await {
        Ok((StatusCode::OK, _)) => tracing::debug!("{name} connects to {giver}"),
        Ok((StatusCode::BAD_REQUEST, body)) => {
            tracing::warn!("{name} cannot take kv of {giver}: {}", message_of(&body));
        }
        Ok((status, _)) => {
            let status = status.as_u16();
            tracing::debug!(status, "{name} was not told of {giver}");
        }
        Err(fault) => tracing::debug!("{name} was not told of {giver}: {fault}"),
    }
}

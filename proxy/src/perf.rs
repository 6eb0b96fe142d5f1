//! `/perf_metrics` (COMPAT.md §7.4): what the proxy saw of a request, joined with what its two servers measured.
//!
//! Workers hand out each of their records once, so what has come and cannot be joined yet is kept for the next call;
//! everything is bounded by `perf_metrics_max_requests`.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::clock;
use crate::proxy::Proxy;
use crate::upstream::{self, Call};
use crate::workers::{Role, Worker};

/// Bytes of one worker's `/perf_metrics` answer.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// What the proxy knows when a request's first token is on its way to the client.
#[derive(Debug)]
pub(crate) struct Hop<'a> {
    pub(crate) ctx_server: &'a Worker,
    pub(crate) gen_server: &'a Worker,
    pub(crate) ctx_request_id: u64,
    pub(crate) since_arrival: Duration,
}

#[derive(Debug)]
struct Record {
    ctx_server: String,
    gen_server: String,
    ctx_request_id: u64,
    arrival_s: f64,
    first_token_s: f64,
}

#[derive(Debug, Default)]
struct Held {
    records: VecDeque<Record>,
    /// Workers' records by server and `ctx_request_id`.
    measured: HashMap<(String, u64), Value>,
}

/// Records of the last requests; of size 0 it keeps nothing.
#[derive(Debug)]
pub(crate) struct PerfRing {
    size: usize,
    held: Mutex<Held>,
}

impl PerfRing {
    pub(crate) fn new(size: u32) -> Self {
        Self {
            size: usize::try_from(size).unwrap_or(usize::MAX),
            held: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a request, in the place of the oldest one if need be.
    pub(crate) fn record(&self, hop: &Hop<'_>) {
        if self.size == 0 {
            return;
        }
        let now_s = clock::monotonic_s();
        let record = Record {
            ctx_server: hop.ctx_server.endpoint().to_string(),
            gen_server: hop.gen_server.endpoint().to_string(),
            ctx_request_id: hop.ctx_request_id,
            arrival_s: now_s - hop.since_arrival.as_secs_f64(),
            first_token_s: now_s,
        };
        let mut held = self.lock();
        while held.records.len() >= self.size {
            held.records.pop_front();
        }
        held.records.push_back(record);
    }

    /// Takes in what a worker measured.
    fn add(&self, server: &str, records: Vec<Value>) {
        let mut held = self.lock();
        for record in records {
            let id = record
                .get("ctx_request_id")
                .and_then(Value::as_u64)
                .or_else(|| record.get("request_id")?.as_u64());
            if let Some(id) = id {
                held.measured.insert((server.to_owned(), id), record);
            }
        }
    }

    /// Requests whose generation part is there; forgets what no kept request can be joined with.
    fn take_joined(&self) -> Vec<Value> {
        let mut held = self.lock();
        let Held { records, measured } = &mut *held;
        let mut joined = Vec::new();
        records.retain(|record| {
            let id = record.ctx_request_id;
            let Some(generation) = measured.remove(&(record.gen_server.clone(), id)) else {
                return true;
            };
            let context = measured.remove(&(record.ctx_server.clone(), id));
            joined.push(json!({
                "ctx_server": record.ctx_server,
                "gen_server": record.gen_server,
                "disagg_server_arrival_time": record.arrival_s,
                "disagg_server_first_token_time": record.first_token_s,
                "ctx_perf_metrics": context,
                "gen_perf_metrics": generation,
            }));
            false
        });
        measured.retain(|(_, id), _| records.iter().any(|record| record.ctx_request_id == *id));
        joined
    }
}

/// Asks every live worker and answers with what can be joined.
pub(crate) async fn drain(proxy: &Proxy) -> Bytes {
    let mut questions = JoinSet::new();
    if proxy.perf.size > 0 {
        for role in [Role::Context, Role::Generation] {
            for worker in proxy.cluster.group(role).servers().iter() {
                if worker.is_up() {
                    questions.spawn(ask(worker.clone(), proxy.timeouts.probe));
                }
            }
        }
    }
    while let Some(answer) = questions.join_next().await {
        if let Ok(Some((server, records))) = answer {
            proxy.perf.add(&server, records);
        }
    }
    Value::Array(proxy.perf.take_joined()).to_string().into()
}

async fn ask(worker: Arc<Worker>, patience: Duration) -> Option<(String, Vec<Value>)> {
    let call = Call::probe("/perf_metrics", patience);
    match upstream::ask(&worker, &call, ANSWER_BYTES_MAX).await {
        Ok((StatusCode::OK, body)) => {
            let records = serde_json::from_slice(&body).ok()?;
            Some((worker.endpoint().to_string(), records))
        }
        Ok(_) => None,
        Err(fault) => {
            tracing::debug!("no perf metrics from {}: {fault}", worker.name());
            None
        }
    }
}

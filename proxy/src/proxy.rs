//! What every request of a running proxy shares.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::admission::Admission;
use crate::cluster::Cluster;
use crate::error::Failure;
use crate::ids::IdSource;
use crate::metrics::Metrics;
use crate::options::{Limits, ProxyOptions, Timeouts};
use crate::perf::PerfRing;
use crate::store::Store;

/// The shared state.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) cluster: Arc<Cluster>,
    /// Where workers register, with service discovery.
    pub(crate) store: Option<Arc<Store>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) ids: IdSource,
    pub(crate) admission: Admission,
    pub(crate) perf: PerfRing,
    pub(crate) timeouts: Timeouts,
    pub(crate) limits: Limits,
    /// Retries of one request, after the environment had its say.
    pub(crate) max_retries: u32,
    pub(crate) allow_request_chat_template: bool,
    /// Whether KV moves while its prompt is read.
    pub(crate) prefetches_kv: bool,
    /// The last `/v1/models` answer and when it was fetched.
    pub(crate) models: Mutex<Option<(Instant, Bytes)>>,
    stopping: AtomicBool,
}

impl Proxy {
    pub(crate) fn new(options: &ProxyOptions) -> Self {
        let config = &options.config;
        let limits = options.limits.clone();
        let mut timeouts = options.timeouts.clone();
        timeouts.stream_idle = timeouts.stream_idle.min(timeouts.request);
        timeouts.connect = timeouts.connect.min(timeouts.request);
        Self {
            cluster: Arc::new(Cluster::new(config)),
            store: config
                .cluster
                .is_some()
                .then(|| Arc::new(Store::new(options.environment.store_token.clone()))),
            metrics: Arc::new(Metrics::new()),
            ids: IdSource::new(config.node_id, options.environment.process_id),
            admission: Admission::new(limits.max_active, limits.max_queued, timeouts.request),
            perf: PerfRing::new(config.perf_metrics_max_requests),
            max_retries: if options.environment.no_retry {
                0
            } else {
                config.max_retries
            },
            allow_request_chat_template: config.allow_request_chat_template,
            prefetches_kv: !options.environment.no_kv_prefetch,
            models: Mutex::new(None),
            stopping: AtomicBool::new(false),
            timeouts,
            limits,
        }
    }

    /// No new requests from now on.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Whether requests can be served now; else the one line that says why not.
    pub(crate) fn readiness(&self) -> Result<(), String> {
        if self.stopping.load(Ordering::Acquire) {
            return Err("stopping".to_owned());
        }
        self.cluster.readiness()
    }

    /// As [`Proxy::readiness`], as a failure of a request.
    pub(crate) fn ensure_ready(&self) -> Result<(), Failure> {
        self.readiness()
            .map_err(|reason| Failure::Unavailable(format!("not ready: {reason}")))
    }

    /// How long a `/v1/models` answer is good for.
    pub(crate) const MODELS_AGE_MAX: Duration = Duration::from_secs(5);
}

//! What every handler of a loaded model shares.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::request::RequestCosts;
use crate::server::metrics::Metrics;
use crate::server::perf::{PerfRing, RequestPerf};
use crate::server::port::EnginePort;
use crate::server::pulse::Pulse;
use crate::server::sampling::Limits;
use crate::server::text::TextTools;
use crate::transceiver::TransceiverInfo;

/// A loaded model with everything that answers for it.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) facts: Facts,
    pub(crate) limits: Limits,
    pub(crate) tools: TextTools,
    pub(crate) engine: Arc<dyn EnginePort>,
    pub(crate) metrics: Metrics,
    /// `None` when nothing is handed off.
    pub(crate) transceiver: Option<TransceiverInfo>,
    pub(crate) perf: PerfRing,
    pub(crate) pulse: Pulse,
}

/// What `/server_info` tells about this instance besides its limits.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Facts {
    /// Name that `/v1/models` and every answer report.
    pub(crate) model: String,
    /// When the model was ready, in seconds since 1970.
    pub(crate) created: u64,
    /// `llama`, `qwen2` …
    pub(crate) architecture: String,
    /// What it runs on.
    pub(crate) backend: String,
    /// What its KV looks like.
    pub(crate) kv_layout: KvLayoutFacts,
    /// How KV leaves and enters; `None` when nothing is handed off.
    pub(crate) transport: Option<TransportFacts>,
    /// The scheduler's bounds.
    pub(crate) limits: LimitFacts,
}

/// See [`crate::handoff::KvLayout`].
#[derive(Debug, Clone, Serialize)]
pub(crate) struct KvLayoutFacts {
    /// In hexadecimal, because JSON readers lose bits of 64-bit numbers.
    pub(crate) model_fingerprint: String,
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: &'static str,
    pub(crate) tokens_per_block: usize,
    pub(crate) page_bytes: usize,
    pub(crate) tensor_parallel: u32,
    pub(crate) pipeline_parallel: u32,
}

/// The transport that is taken first.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct TransportFacts {
    pub(crate) name: String,
    /// Why this one.
    pub(crate) reason: String,
    /// Where a generation server reaches it.
    pub(crate) endpoint: String,
}

/// The scheduler's bounds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LimitFacts {
    pub(crate) max_batch_size: u32,
    pub(crate) max_num_tokens: u32,
    pub(crate) max_seq_len: u32,
    pub(crate) kv_blocks: usize,
    /// Tokens of the model's vocabulary.
    pub(crate) vocab_size: usize,
}

/// One generation request from arrival to its end, whichever end that is.
#[derive(Debug)]
pub(super) struct Record {
    service: Arc<Service>,
    arrived: Instant,
    endpoint: &'static str,
    open: bool,
}

impl Record {
    /// Counts a request in.
    pub(super) fn open(service: &Arc<Service>, endpoint: &'static str, arrived: Instant) -> Self {
        service.metrics.request_started(endpoint);
        Self {
            service: Arc::clone(service),
            arrived,
            endpoint,
            open: true,
        }
    }

    /// Ends well.
    pub(super) fn finished(
        &mut self,
        costs: &RequestCosts,
        first_token: Option<Duration>,
        ctx_request_id: Option<u64>,
    ) {
        self.open = false;
        let elapsed = self.arrived.elapsed();
        self.service
            .metrics
            .request_finished(self.endpoint, costs, first_token, elapsed);
        tracing::debug!(
            endpoint = self.endpoint,
            elapsed_ms = elapsed.as_millis(),
            cached_tokens = costs.cached_tokens,
            prefilled_again = costs.prefilled_again,
            "request finished"
        );
        self.service.perf.push(RequestPerf {
            arrived: self.arrived,
            costs: costs.clone(),
            first_token,
            elapsed,
            ctx_request_id,
        });
    }

    /// Ends in an error that the client was told.
    pub(super) fn failed(&mut self) {
        self.open = false;
        self.service.metrics.request_failed(self.endpoint);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.open {
            self.service.metrics.request_cancelled(self.endpoint);
            tracing::debug!(
                endpoint = self.endpoint,
                elapsed_ms = self.arrived.elapsed().as_millis(),
                "the client went away"
            );
        }
    }
}

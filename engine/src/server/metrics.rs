//! `/prometheus/metrics`: every name that a worker exports is declared here.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::metrics::EngineStats;
use crate::request::RequestCosts;
use crate::server::port::EnginePort;
use crate::transceiver::{TransceiverInfo, TransceiverStats, WireStats};

/// From a millisecond to ten minutes.
const LATENCY_SECONDS: [f64; 20] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
    160.0, 320.0, 600.0, 1200.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndpointLabel {
    endpoint: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    endpoint: &'static str,
    outcome: &'static str,
}

/// The worker's registry.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    started: Family<EndpointLabel, Counter>,
    ended: Family<OutcomeLabel, Counter>,
    first_token: Histogram,
    total: Histogram,
    queue: Histogram,
    handoff: Histogram,
}

impl Metrics {
    /// All metrics at zero; the engine's and the transceiver's are read when asked for.
    pub(crate) fn new(engine: Arc<dyn EnginePort>, transceiver: Option<TransceiverInfo>) -> Self {
        let mut registry = Registry::with_prefix("baton");
        let started = Family::default();
        let ended = Family::default();
        registry.register(
            "http_requests",
            "Generation requests by endpoint",
            started.clone(),
        );
        registry.register(
            "http_requests_ended",
            "Generation requests by how they ended",
            ended.clone(),
        );
        let mut seconds = |name: &str, help: &str| {
            let histogram = Histogram::new(LATENCY_SECONDS);
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
            histogram
        };
        let first_token = seconds("first_token", "From arrival to the first token");
        let total = seconds("request", "From arrival to the end of the answer");
        let queue = seconds("queue", "From submission to the first scheduled step");
        let handoff = seconds(
            "handoff",
            "From asking for the KV to the last verified byte",
        );
        registry.register_collector(Box::new(EngineCollector {
            engine,
            transceiver,
        }));
        Self {
            registry,
            started,
            ended,
            first_token,
            total,
            queue,
            handoff,
        }
    }

    /// A request came.
    pub(super) fn request_started(&self, endpoint: &'static str) {
        self.started
            .get_or_create(&EndpointLabel { endpoint })
            .inc();
    }

    /// A request was answered.
    pub(super) fn request_finished(
        &self,
        endpoint: &'static str,
        costs: &RequestCosts,
        first_token: Option<Duration>,
        elapsed: Duration,
    ) {
        self.ended(endpoint, "completed");
        if let Some(first_token) = first_token {
            self.first_token.observe(first_token.as_secs_f64());
        }
        self.total.observe(elapsed.as_secs_f64());
        self.queue.observe(costs.queue.as_secs_f64());
        if let Some(handoff) = &costs.handoff {
            self.handoff.observe(handoff.elapsed.as_secs_f64());
        }
    }

    /// A request was answered with an error.
    pub(super) fn request_failed(&self, endpoint: &'static str) {
        self.ended(endpoint, "failed");
    }

    /// The client went away.
    pub(super) fn request_cancelled(&self, endpoint: &'static str) {
        self.ended(endpoint, "cancelled");
    }

    fn ended(&self, endpoint: &'static str, outcome: &'static str) {
        self.ended
            .get_or_create(&OutcomeLabel { endpoint, outcome })
            .inc();
    }

    /// The text to be scraped.
    pub(super) fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Reads the engine's counters at the moment of the scrape, so that no number is ever stale.
#[derive(Debug)]
struct EngineCollector {
    engine: Arc<dyn EnginePort>,
    transceiver: Option<TransceiverInfo>,
}

impl Collector for EngineCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let stats = self.engine.stats();
        encode_all(&mut encoder, &gauges(&stats), &counters(&stats))?;
        encode_all(&mut encoder, &[], &handoff_counters(&stats))?;
        match &self.transceiver {
            None => Ok(()),
            Some(transceiver) => {
                let stats = transceiver.stats();
                encode_all(
                    &mut encoder,
                    &transceiver_gauges(&stats),
                    &transceiver_counters(&stats),
                )?;
                encode_wires(&mut encoder, &transceiver.wires())
            }
        }
    }
}

/// What each transport has done.
fn encode_wires(
    encoder: &mut DescriptorEncoder<'_>,
    wires: &[WireStats],
) -> Result<(), std::fmt::Error> {
    /// Name, help and value.
    type Reading = (&'static str, &'static str, fn(&WireStats) -> u64);
    let readings: [Reading; 3] = [
        (
            "kv_transport_sent_bytes",
            "Payload bytes handed to each transport",
            |wire| wire.bytes_sent,
        ),
        (
            "kv_transport_received_bytes",
            "Payload bytes that came over each transport and matched their checksum",
            |wire| wire.bytes_received,
        ),
        (
            "kv_transport_fetches",
            "Fetches that succeeded over each transport",
            |wire| wire.fetches,
        ),
    ];
    for (name, help, value) in readings {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for wire in wires {
            let labels = [("transport", wire.transport)];
            let counter = ConstCounter::new(value(wire));
            counter.encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn encode_all(
    encoder: &mut DescriptorEncoder<'_>,
    gauges: &[Reading<usize>],
    counters: &[Reading<u64>],
) -> Result<(), std::fmt::Error> {
    for (name, help, value) in gauges {
        let metric = ConstGauge::new(i64::try_from(*value).unwrap_or(i64::MAX));
        let encoder = encoder.encode_descriptor(name, help, None, metric.metric_type())?;
        metric.encode(encoder)?;
    }
    for (name, help, value) in counters {
        let metric = ConstCounter::new(*value);
        let encoder = encoder.encode_descriptor(name, help, None, metric.metric_type())?;
        metric.encode(encoder)?;
    }
    Ok(())
}

type Reading<V> = (&'static str, &'static str, V);

fn gauges(stats: &EngineStats) -> [Reading<usize>; 11] {
    [
        (
            "requests_waiting",
            "Requests that wait for a place in the batch",
            stats.requests_waiting,
        ),
        (
            "requests_running",
            "Requests in the batch",
            stats.requests_running,
        ),
        (
            "requests_fetching",
            "Requests whose KV is on its way",
            stats.requests_fetching,
        ),
        ("kv_blocks_total", "Blocks in the pool", stats.blocks_total),
        (
            "kv_blocks_free",
            "Blocks that hold nothing",
            stats.blocks_free,
        ),
        (
            "kv_blocks_used",
            "Blocks that requests or leases hold",
            stats.blocks_used,
        ),
        (
            "kv_blocks_cached",
            "Blocks that only the prefix cache holds",
            stats.blocks_cached,
        ),
        (
            "kv_blocks_pinned",
            "Blocks under a lease",
            stats.blocks_pinned,
        ),
        (
            "kv_blocks_lent",
            "Blocks that a transport is writing",
            stats.blocks_lent,
        ),
        (
            "kv_blocks_quarantined",
            "Blocks given up while a transport may still write them",
            stats.blocks_quarantined,
        ),
        (
            "kv_leases",
            "Leases held for generation servers",
            stats.leases,
        ),
    ]
}

fn counters(stats: &EngineStats) -> [Reading<u64>; 9] {
    [
        (
            "requests",
            "Requests taken by the engine",
            stats.requests_total,
        ),
        (
            "requests_finished",
            "Requests that ended well",
            stats.requests_finished_total,
        ),
        (
            "requests_failed",
            "Requests that failed",
            stats.requests_failed_total,
        ),
        (
            "requests_cancelled",
            "Requests given up by the client",
            stats.requests_cancelled_total,
        ),
        (
            "prompt_tokens",
            "Prompt tokens of taken requests",
            stats.prompt_tokens_total,
        ),
        (
            "prompt_tokens_cached",
            "Prompt tokens found in the cache",
            stats.prompt_tokens_cached_total,
        ),
        (
            "generated_tokens",
            "Tokens written",
            stats.generated_tokens_total,
        ),
        ("iterations", "Steps run", stats.iterations_total),
        (
            "preemptions",
            "Requests that lost their blocks and were computed again",
            stats.preemptions_total,
        ),
    ]
}

fn handoff_counters(stats: &EngineStats) -> [Reading<u64>; 10] {
    [
        (
            "handoffs_offered",
            "Leases given",
            stats.handoffs_offered_total,
        ),
        (
            "handoffs_opened_early",
            "Leases opened while the prompt was still being read",
            stats.handoffs_opened_early_total,
        ),
        (
            "handoffs_delivered",
            "Leases that ended with verified KV",
            stats.handoffs_delivered_total,
        ),
        (
            "handoffs_expired",
            "Leases that ran out",
            stats.handoffs_expired_total,
        ),
        (
            "handoffs_cancelled",
            "Leases given up",
            stats.handoffs_cancelled_total,
        ),
        (
            "handoffs_fetched",
            "Fetches that brought verified KV",
            stats.handoffs_fetched_total,
        ),
        (
            "handoffs_prefetched",
            "Fetches that began before the context server had read the prompt to its end",
            stats.handoffs_prefetched_total,
        ),
        (
            "handoffs_failed",
            "Fetches that failed, refused offers and tickets",
            stats.handoffs_failed_total,
        ),
        (
            "handoffs_prefilled_again",
            "Requests whose prompt was read again after a failed fetch",
            stats.handoffs_prefilled_again_total,
        ),
        (
            "handoff_bytes",
            "KV bytes fetched",
            stats.handoffs_fetched_bytes_total,
        ),
    ]
}

fn transceiver_gauges(stats: &TransceiverStats) -> [Reading<usize>; 3] {
    [
        (
            "kv_connections",
            "Connections to other transceivers",
            stats.connections,
        ),
        (
            "kv_leases_serving",
            "Leases whose KV is on its way to a generation server",
            stats.leases_serving,
        ),
        (
            "kv_fetches",
            "Fetches queued or under way",
            stats.fetches_held,
        ),
    ]
}

fn transceiver_counters(stats: &TransceiverStats) -> [Reading<u64>; 3] {
    [
        (
            "kv_sent_bytes",
            "Payload bytes handed to the transport",
            stats.bytes_sent,
        ),
        (
            "kv_received_bytes",
            "Payload bytes that matched their checksum",
            stats.bytes_received,
        ),
        (
            "kv_checksum_mismatches",
            "Pieces that did not match their checksum",
            stats.checksum_mismatches,
        ),
    ]
}

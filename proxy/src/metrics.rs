//! Every metric of the proxy: names and buckets that dashboards of TensorRT-LLM's orchestrator already graph
//! (COMPAT.md §7.5), and our own gauges under `baton_`.
//!
//! Streams are not parsed, so `per_token_latency_seconds` gets one observation a stream: the mean time between the
//! pieces that the generation server sent, which is one token each as long as the proxy keeps up.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::cluster::Cluster;
use crate::error::Failure;
use crate::workers::Role;

const SHORT_BUCKETS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const LONG_BUCKETS: [f64; 21] = [
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0,
];

/// Counters and histograms of calls to one role's servers.
#[derive(Debug)]
pub(crate) struct RoleMetrics {
    pub(crate) total_requests: Counter,
    pub(crate) error_requests: Counter,
    pub(crate) retry_requests: Counter,
    pub(crate) completed_requests: Counter,
    pub(crate) first_token_latency: Histogram,
    pub(crate) complete_latency: Histogram,
    pub(crate) per_token_latency: Histogram,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServerLabels {
    role: &'static str,
    server: String,
}

/// All metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) total_requests: Counter,
    pub(crate) stream_requests: Counter,
    pub(crate) nonstream_requests: Counter,
    pub(crate) validation_exceptions: Counter,
    pub(crate) http_exceptions: Counter,
    pub(crate) internal_errors: Counter,
    pub(crate) total_responses: Counter,
    pub(crate) queue_latency: Histogram,
    pub(crate) kv_prefetches: Counter,
    pub(crate) client_disconnects: Counter,
    pub(crate) connections: Gauge,
    context: RoleMetrics,
    generation: RoleMetrics,
    active_requests: Gauge,
    queued_requests: Gauge,
    ready: Gauge,
    worker_up: Family<ServerLabels, Gauge>,
}

fn short_histogram() -> Histogram {
    Histogram::new(SHORT_BUCKETS)
}

fn counter(registry: &mut Registry, name: &str, help: &str) -> Counter {
    let counter = Counter::<u64, AtomicU64>::default();
    registry.register(name, help, counter.clone());
    counter
}

fn gauge(registry: &mut Registry, name: &str, help: &str) -> Gauge {
    let gauge = Gauge::default();
    registry.register(name, help, gauge.clone());
    gauge
}

impl RoleMetrics {
    fn register(registry: &mut Registry, prefix: &str, role: &str) -> Self {
        let mut of = |name: &str, what: &str| {
            counter(
                registry,
                &format!("{prefix}_{name}"),
                &format!("{what} {role} servers"),
            )
        };
        let total_requests = of("total_requests", "Calls sent to");
        let error_requests = of("error_requests", "Calls that failed at");
        let retry_requests = of("retry_requests", "Calls tried again on other");
        let completed_requests = of("completed_requests", "Calls completed by");
        let first_token_latency = short_histogram();
        let complete_latency = Histogram::new(LONG_BUCKETS);
        let per_token_latency = short_histogram();
        for (name, what, histogram) in [
            (
                "first_token_latency_seconds",
                "First bytes from",
                &first_token_latency,
            ),
            (
                "complete_latency_seconds",
                "Whole calls to",
                &complete_latency,
            ),
            (
                "per_token_latency_seconds",
                "Mean time between pieces of streams from",
                &per_token_latency,
            ),
        ] {
            registry.register(
                format!("{prefix}_{name}"),
                format!("{what} {role} servers"),
                histogram.clone(),
            );
        }
        Self {
            total_requests,
            error_requests,
            retry_requests,
            completed_requests,
            first_token_latency,
            complete_latency,
            per_token_latency,
        }
    }

    /// A call that ended well; its first bytes came after `first`, its last after `whole`.
    pub(crate) fn completed(&self, first: Option<Duration>, whole: Duration) {
        self.completed_requests.inc();
        self.complete_latency.observe(whole.as_secs_f64());
        if let Some(first) = first {
            self.first_token_latency.observe(first.as_secs_f64());
        }
    }
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::default();
        let r = &mut registry;
        let queue_latency = short_histogram();
        r.register(
            "queue_latency_seconds",
            "From a request's arrival to its first upstream call",
            queue_latency.clone(),
        );
        let worker_up = Family::<ServerLabels, Gauge>::default();
        r.register(
            "baton_worker_up",
            "Whether a worker can serve (1) or not (0)",
            worker_up.clone(),
        );
        Self {
            total_requests: counter(r, "total_requests", "Generation requests received"),
            stream_requests: counter(r, "stream_requests", "Requests for a stream"),
            nonstream_requests: counter(r, "nonstream_requests", "Requests for a whole answer"),
            validation_exceptions: counter(
                r,
                "validation_exceptions",
                "Requests refused as malformed",
            ),
            http_exceptions: counter(r, "http_exceptions", "Requests that failed at a worker"),
            internal_errors: counter(
                r,
                "internal_errors",
                "Requests that the proxy could not serve",
            ),
            total_responses: counter(r, "total_responses", "Requests answered to the end"),
            queue_latency,
            client_disconnects: counter(
                r,
                "baton_client_disconnects",
                "Requests whose client left before the end",
            ),
            kv_prefetches: counter(
                r,
                "baton_kv_prefetches",
                "Requests whose KV began to move before their prompt was read to the end",
            ),
            connections: gauge(r, "baton_client_connections", "Open client connections"),
            context: RoleMetrics::register(r, "ctx", Role::Context.name()),
            generation: RoleMetrics::register(r, "gen", Role::Generation.name()),
            active_requests: gauge(r, "baton_active_requests", "Requests that are worked on"),
            queued_requests: gauge(r, "baton_queued_requests", "Requests that wait for a place"),
            ready: gauge(r, "baton_ready", "Whether requests can be served now"),
            worker_up,
            registry,
        }
    }

    pub(crate) fn role(&self, role: Role) -> &RoleMetrics {
        match role {
            Role::Context => &self.context,
            Role::Generation => &self.generation,
        }
    }

    /// Counts a request that ended with an error before anything was relayed.
    pub(crate) fn failed(&self, failure: &Failure) {
        match failure {
            Failure::Request { .. } => self.validation_exceptions.inc(),
            Failure::Unavailable(_) => self.internal_errors.inc(),
            Failure::Upstream(_) => self.http_exceptions.inc(),
        };
    }

    /// The exposition text, with gauges as of now.
    pub(crate) fn render(&self, cluster: &Cluster, active: i64, queued: i64) -> String {
        self.active_requests.set(active);
        self.queued_requests.set(queued);
        self.ready.set(i64::from(cluster.readiness().is_ok()));
        // Workers come and go; a label of one that left would stay for ever.
        self.worker_up.clear();
        for worker in cluster.workers() {
            let labels = ServerLabels {
                role: worker.role().name(),
                server: worker.endpoint().to_string(),
            };
            self.worker_up
                .get_or_create(&labels)
                .set(i64::from(worker.is_up()));
        }
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string does not fail");
        text
    }

    /// One line for `--metrics-log-interval`.
    pub(crate) fn summary(&self) -> String {
        let role = |name: &str, role: &RoleMetrics| {
            format!(
                "{name} {} sent, {} completed, {} failed, {} retried",
                role.total_requests.get(),
                role.completed_requests.get(),
                role.error_requests.get(),
                role.retry_requests.get()
            )
        };
        format!(
            "{} requests, {} answered, {} left by their clients; {}; {}",
            self.total_requests.get(),
            self.total_responses.get(),
            self.client_disconnects.get(),
            role("context", &self.context),
            role("generation", &self.generation)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_buckets_are_the_known_ones() {
        let cluster = Cluster::new(&Default::default());
        let text = Metrics::new().render(&cluster, 3, 2);
        for counter in [
            "total_requests",
            "stream_requests",
            "nonstream_requests",
            "validation_exceptions",
            "http_exceptions",
            "internal_errors",
            "total_responses",
        ] {
            assert!(
                text.contains(&format!("\n{counter}_total 0\n")),
                "{counter}: {text}"
            );
        }
        for prefix in ["ctx", "gen"] {
            for counter in [
                "total_requests",
                "error_requests",
                "retry_requests",
                "completed_requests",
            ] {
                assert!(
                    text.contains(&format!("\n{prefix}_{counter}_total 0\n")),
                    "{prefix}_{counter}"
                );
            }
            assert_eq!(
                buckets(&text, &format!("{prefix}_first_token_latency_seconds")),
                "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0 +Inf"
            );
            assert_eq!(
                buckets(&text, &format!("{prefix}_complete_latency_seconds")),
                "0.1 0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 960.0 1920.0 +Inf"
            );
            assert!(text.contains(&format!("{prefix}_per_token_latency_seconds_bucket")));
        }
        assert!(text.contains("\nqueue_latency_seconds_bucket{le=\"0.001\"} 0\n"));
        assert!(text.contains("\nbaton_active_requests 3\n"));
        assert!(text.contains("\nbaton_queued_requests 2\n"));
    }

    fn buckets(text: &str, name: &str) -> String {
        let prefix = format!("{name}_bucket{{le=\"");
        text.lines()
            .filter_map(|line| line.strip_prefix(&prefix)?.split('"').next())
            .collect::<Vec<_>>()
            .join(" ")
    }
}

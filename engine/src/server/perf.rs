//! `/perf_metrics`: a bounded ring of finished requests, and the steady clock whose seconds they are told in.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::request::RequestCosts;

/// A clock that only moves forward, told in seconds since this process began, shifted as the proxy asks.
#[derive(Debug)]
pub(crate) struct SteadyClock {
    origin: Instant,
    offset_seconds: Mutex<f64>,
}

impl SteadyClock {
    /// A clock that begins now.
    pub(crate) fn new() -> Self {
        Self {
            origin: Instant::now(),
            offset_seconds: Mutex::new(0.0),
        }
    }

    /// This process's own seconds, without the offset.
    pub(crate) fn raw_seconds(&self, at: Instant) -> f64 {
        at.saturating_duration_since(self.origin).as_secs_f64()
    }

    /// Seconds on the proxy's clock.
    pub(crate) fn shared_seconds(&self, at: Instant) -> f64 {
        self.raw_seconds(at) + *lock(&self.offset_seconds)
    }

    /// Sets what is to be added to this process's seconds.
    pub(crate) fn set_offset(&self, seconds: f64) {
        *lock(&self.offset_seconds) = seconds;
    }
}

/// What a finished request leaves behind.
#[derive(Debug, Clone)]
pub(crate) struct RequestPerf {
    pub(crate) arrived: Instant,
    pub(crate) costs: RequestCosts,
    pub(crate) first_token: Option<Duration>,
    pub(crate) elapsed: Duration,
    pub(crate) ctx_request_id: Option<u64>,
}

/// The most recent requests, oldest first; the oldest fall out.
#[derive(Debug)]
pub(crate) struct PerfRing {
    capacity: usize,
    ring: Mutex<Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    next_id: u64,
    entries: VecDeque<(u64, RequestPerf)>,
}

impl PerfRing {
    /// A ring of at most `capacity` requests; 0 keeps none.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            ring: Mutex::new(Ring::default()),
        }
    }

    /// Keeps a request.
    pub(crate) fn push(&self, perf: RequestPerf) {
        if self.capacity == 0 {
            return;
        }
        let mut ring = lock(&self.ring);
        if ring.entries.len() == self.capacity {
            ring.entries.pop_front();
        }
        ring.next_id += 1;
        let id = ring.next_id;
        ring.entries.push_back((id, perf));
    }

    /// Takes them out.
    pub(crate) fn drain(&self, clock: &SteadyClock) -> Vec<PerfElement> {
        let entries = std::mem::take(&mut lock(&self.ring).entries);
        entries
            .into_iter()
            .map(|(id, perf)| PerfElement::new(id, &perf, clock))
            .collect()
    }
}

/// One element of `/perf_metrics`.
#[derive(Debug, Serialize)]
pub(crate) struct PerfElement {
    request_id: u64,
    perf_metrics: PerfMetrics,
    #[serde(skip_serializing_if = "Option::is_none")]
    ctx_request_id: Option<u64>,
}

#[derive(Debug, Serialize)]
struct PerfMetrics {
    timing_metrics: Timing,
    kv_cache_metrics: KvCache,
}

#[derive(Debug, Serialize)]
struct Timing {
    server_arrival_time: f64,
    arrival_time: f64,
    first_scheduled_time: f64,
    first_token_time: f64,
    server_first_token_time: f64,
    last_token_time: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_cache_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_cache_transfer_start: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_cache_transfer_end: Option<f64>,
}

#[derive(Debug, Serialize)]
struct KvCache {
    num_total_allocated_blocks: u32,
    num_new_allocated_blocks: u32,
    num_reused_blocks: u32,
    num_missed_blocks: u32,
}

impl PerfElement {
    fn new(request_id: u64, perf: &RequestPerf, clock: &SteadyClock) -> Self {
        let costs = &perf.costs;
        let arrived = clock.shared_seconds(perf.arrived);
        let first_token = arrived + perf.first_token.unwrap_or(perf.elapsed).as_secs_f64();
        let first_scheduled = (first_token - costs.prefill.as_secs_f64()).max(arrived);
        let submitted = (first_scheduled - costs.queue.as_secs_f64()).max(arrived);
        let handoff = costs.handoff.as_ref();
        let missed = costs.blocks_allocated.saturating_sub(costs.blocks_reused);
        Self {
            request_id,
            ctx_request_id: perf.ctx_request_id,
            perf_metrics: PerfMetrics {
                timing_metrics: Timing {
                    server_arrival_time: arrived,
                    arrival_time: submitted,
                    first_scheduled_time: first_scheduled,
                    first_token_time: first_token,
                    server_first_token_time: first_token,
                    last_token_time: first_token + costs.decode.as_secs_f64(),
                    kv_cache_size: handoff.map(|stats| stats.bytes),
                    kv_cache_transfer_start: handoff.map(|_| submitted),
                    kv_cache_transfer_end: handoff
                        .map(|stats| submitted + stats.elapsed.as_secs_f64()),
                },
                kv_cache_metrics: KvCache {
                    num_total_allocated_blocks: costs.blocks_allocated,
                    num_new_allocated_blocks: missed,
                    num_reused_blocks: costs.blocks_reused,
                    num_missed_blocks: missed,
                },
            },
        }
    }
}

/// No code panics while it holds one of these locks, and what they guard is valid at every moment.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn perf() -> RequestPerf {
        RequestPerf {
            arrived: Instant::now(),
            costs: RequestCosts {
                queue: Duration::from_millis(10),
                prefill: Duration::from_millis(20),
                decode: Duration::from_millis(100),
                ..RequestCosts::default()
            },
            first_token: Some(Duration::from_millis(40)),
            elapsed: Duration::from_millis(150),
            ctx_request_id: Some(7),
        }
    }

    #[test]
    fn the_ring_keeps_the_newest_and_is_drained() {
        let clock = SteadyClock::new();
        let ring = PerfRing::new(2);
        for _ in 0..3 {
            ring.push(perf());
        }
        let ids: Vec<u64> = ring
            .drain(&clock)
            .iter()
            .map(|element| element.request_id)
            .collect();
        assert_eq!(ids, [2, 3]);
        assert!(ring.drain(&clock).is_empty());
        let none = PerfRing::new(0);
        none.push(perf());
        assert!(none.drain(&clock).is_empty());
    }

    #[test]
    fn times_are_in_order_and_on_the_shared_clock() {
        let clock = SteadyClock::new();
        clock.set_offset(1000.0);
        let element = PerfElement::new(1, &perf(), &clock);
        let timing = element.perf_metrics.timing_metrics;
        assert!(timing.server_arrival_time >= 1000.0);
        let order = [
            timing.server_arrival_time,
            timing.arrival_time,
            timing.first_scheduled_time,
            timing.first_token_time,
            timing.last_token_time,
        ];
        assert!(order.is_sorted(), "{order:?}");
        assert!((timing.first_token_time - timing.first_scheduled_time - 0.02).abs() < 1e-6);
    }
}

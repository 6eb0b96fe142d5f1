//! The two clocks: wall time for ids, monotonic seconds for metrics that are joined with the workers' own.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// Milliseconds since the epoch.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Seconds of the machine's monotonic clock, the clock of the workers' timing metrics.
pub(crate) fn monotonic_s() -> f64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(|time| std::time::Duration::from(time).as_secs_f64())
        .unwrap_or_default()
}

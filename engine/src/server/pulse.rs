//! Whether the engine still steps. A device that hangs leaves its thread alive, so that being alive proves nothing.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::server::port::EnginePort;

/// How long a step may take before the engine counts as stuck: a long prompt on a large model without a GPU
/// takes minutes.
const STUCK_AFTER: Duration = Duration::from_secs(300);

/// Remembers when the engine last moved. Looked at with every health check.
#[derive(Debug)]
pub(crate) struct Pulse {
    last: Mutex<Beat>,
}

#[derive(Debug, Clone, Copy)]
struct Beat {
    steps: u64,
    seen: Instant,
}

impl Pulse {
    /// The engine has just started.
    pub(crate) fn new() -> Self {
        let beat = Beat {
            steps: 0,
            seen: Instant::now(),
        };
        Self {
            last: Mutex::new(beat),
        }
    }

    /// How long the engine has had work and made no step, when that is too long.
    pub(crate) fn stuck(&self, engine: &dyn EnginePort) -> Option<Duration> {
        let stats = engine.stats();
        let busy = engine.queued() + stats.requests_waiting + stats.requests_running > 0;
        self.still_for(stats.iterations_total, busy, Instant::now())
            .filter(|still| *still >= STUCK_AFTER)
    }

    fn still_for(&self, steps: u64, busy: bool, now: Instant) -> Option<Duration> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if !busy || steps != last.steps {
            *last = Beat { steps, seen: now };
            return None;
        }
        Some(now.saturating_duration_since(last.seen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_work_without_steps_counts() {
        let pulse = Pulse::new();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        // Idle for as long as it likes.
        assert_eq!(pulse.still_for(5, false, at(0)), None);
        assert_eq!(pulse.still_for(5, false, at(1000)), None);
        // Work came, and steps are made.
        assert_eq!(pulse.still_for(6, true, at(1001)), None);
        assert_eq!(pulse.still_for(7, true, at(1400)), None);
        // Work, but no step.
        let still = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(pulse.still_for(7, true, at(1401)), still(1));
        assert_eq!(pulse.still_for(7, true, at(1701)), still(301));
        // It moves again.
        assert_eq!(pulse.still_for(8, true, at(1702)), None);
    }
}

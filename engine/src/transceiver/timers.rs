//! Deadlines of leases and fetches, driven by the clock alone.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::transport::TransferId;

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    Lease(u64),
    Fetch(TransferId),
    /// Reports to the leading rank, for which its line had no room.
    Reports,
    /// Shutting down has been patient for long enough.
    Patience,
}

/// Names a timer, to cancel it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TimerKey(Instant, u64);

/// The timers that run.
#[derive(Debug, Default)]
pub(super) struct Timers {
    running: BTreeMap<TimerKey, Due>,
    next: u64,
}

impl Timers {
    pub(super) fn set(&mut self, deadline: Instant, due: Due) -> TimerKey {
        let key = TimerKey(deadline, self.next);
        self.next += 1;
        self.running.insert(key, due);
        key
    }

    pub(super) fn cancel(&mut self, key: TimerKey) {
        self.running.remove(&key);
    }

    /// When the next one is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.running.keys().next().map(|key| key.0)
    }

    /// Takes one that is due.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<Due> {
        let entry = self.running.first_entry()?;
        (entry.key().0 <= now).then(|| entry.remove())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn timers_fire_in_order_and_not_when_cancelled() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut timers = Timers::default();
        timers.set(at(2), Due::Lease(2));
        timers.set(at(1), Due::Lease(1));
        let cancelled = timers.set(at(1), Due::Patience);
        timers.set(at(2), Due::Fetch(TransferId(3)));
        timers.cancel(cancelled);
        assert_eq!(timers.next_deadline(), Some(at(1)));
        assert_eq!(timers.take_due(start), None);
        assert_eq!(timers.take_due(at(2)), Some(Due::Lease(1)));
        assert_eq!(timers.take_due(at(2)), Some(Due::Lease(2)));
        assert_eq!(timers.take_due(at(2)), Some(Due::Fetch(TransferId(3))));
        assert_eq!(timers.take_due(at(9)), None);
        assert_eq!(timers.next_deadline(), None);
    }
}

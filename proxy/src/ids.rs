//! `disagg_request_id` (COMPAT.md §8.4): positive, 63 bits, unique among the proxies of a deployment.
//!
//! The timestamp is wall-clock milliseconds, so that a restarted proxy does not repeat ids that a worker may
//! still hold KV under. Within one process uniqueness does not rest on the clock at all: see [`IdSource::next`].

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock;

const TIMESTAMP_BITS: u32 = 39;
const NODE_BITS: u32 = 8;
const PROCESS_BITS: u32 = 6;
const COUNTER_BITS: u32 = 10;
/// Ids below this are a worker's own.
const FIRST_ID: u64 = 1 << 40;

/// The id of one (timestamp, node, process, counter).
fn compose(timestamp_ms: u64, node: u8, process: u8, counter: u64) -> u64 {
    let timestamp = timestamp_ms & ((1 << TIMESTAMP_BITS) - 1);
    let process = u64::from(process) & ((1 << PROCESS_BITS) - 1);
    let counter = counter & ((1 << COUNTER_BITS) - 1);
    let raw = timestamp << (NODE_BITS + PROCESS_BITS + COUNTER_BITS)
        | u64::from(node) << (PROCESS_BITS + COUNTER_BITS)
        | process << COUNTER_BITS
        | counter;
    raw % ((1 << 63) - 1 - FIRST_ID) + FIRST_ID
}

/// Gives out ids.
#[derive(Debug)]
pub(crate) struct IdSource {
    node: u8,
    process: u8,
    /// Timestamp and counter of the next id at the earliest, as one number.
    next: AtomicU64,
}

impl IdSource {
    pub(crate) fn new(node: u8, process: u8) -> Self {
        Self {
            node,
            process,
            next: AtomicU64::new(0),
        }
    }

    /// A new id. More than 1,024 in a millisecond borrow from the next one, and a clock that goes back is waited
    /// for in the same way, so that no two ids of a process are equal.
    pub(crate) fn next(&self) -> u64 {
        let now = clock::unix_ms() << COUNTER_BITS;
        let ticket = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                Some(next.max(now) + 1)
            })
            .unwrap_or_default()
            .max(now);
        compose(
            ticket >> COUNTER_BITS,
            self.node,
            self.process,
            ticket & ((1 << COUNTER_BITS) - 1),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn matches_the_published_vectors() {
        assert_eq!(compose(0, 0, 0, 0), 1_099_511_627_776);
        assert_eq!(compose(1, 0, 0, 0), 1_099_528_404_992);
        assert_eq!(compose(123_456_789, 5, 3, 7), 2_072_360_727_677_959);
    }

    #[test]
    fn stays_in_range_at_the_ends() {
        for id in [
            compose(0, 0, 0, 0),
            compose(u64::MAX, 255, 63, 1023),
            compose((1 << 39) - 1, 255, 63, 1023),
        ] {
            assert!((FIRST_ID..1 << 63).contains(&id), "{id}");
        }
    }

    #[test]
    fn never_repeats_even_in_one_millisecond() {
        let source = IdSource::new(1, 2);
        let ids: HashSet<u64> = (0..50_000).map(|_| source.next()).collect();
        assert_eq!(ids.len(), 50_000);
    }

    #[test]
    fn nodes_and_processes_do_not_collide() {
        let mut ids = HashSet::new();
        for node in 0..=255 {
            for process in 0..64 {
                assert!(ids.insert(compose(77, node, process, 3)));
            }
        }
    }
}

//! What a peer asks this side to read, between the thread that hears of it and the one that reads.
//!
//! Bounded: a peer may have as many descriptors open as it may have writes, and no more arenas than that; one that
//! sends more is broken.

use std::collections::VecDeque;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::connection::WRITES_OPEN_MAX;
use super::frame::Descriptor;
use crate::transport::{Runs, TransferId};

/// Pulls of one batch at most: while it is read, the peer describes more.
const PULLS_AT_ONCE_MAX: usize = WRITES_OPEN_MAX / 2;

/// One piece to read.
#[derive(Debug)]
pub(super) struct Pull {
    pub(super) transfer: TransferId,
    pub(super) region: u64,
    pub(super) key: u64,
    pub(super) note: Vec<u8>,
    pub(super) runs: Runs,
    pub(super) descriptor: Descriptor,
}

/// What the puller does next.
#[derive(Debug)]
pub(super) enum Order {
    /// Descriptors will name this arena.
    Arena { number: u64, key: Vec<u8> },
    /// Read it.
    Pull(Pull),
}

/// A batch for the puller.
#[derive(Debug)]
pub(super) enum Batch {
    Arena {
        number: u64,
        key: Vec<u8>,
    },
    /// At least one.
    Pulls(Vec<Pull>),
}

#[derive(Debug, Default)]
struct State {
    orders: VecDeque<Order>,
    closed: bool,
}

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Pulls {
    state: Mutex<State>,
    filled: Condvar,
}

impl Pulls {
    /// Hands orders over; false when there are more than an honest peer sends.
    pub(super) fn push(&self, orders: Vec<Order>) -> bool {
        let mut state = self.lock();
        // As many arenas as descriptors at the utmost: each order may come with one new arena.
        if state.orders.len() + orders.len() > 2 * WRITES_OPEN_MAX {
            return false;
        }
        state.orders.extend(orders);
        drop(state);
        self.filled.notify_one();
        true
    }

    /// Puts pulls back that could not be read yet, in front.
    pub(super) fn put_back(&self, pulls: Vec<Pull>) {
        let mut state = self.lock();
        for pull in pulls.into_iter().rev() {
            state.orders.push_front(Order::Pull(pull));
        }
    }

    /// Waits for the next orders: an arena, or pulls of up to `bytes` together. `None` after the end.
    pub(super) fn next(&self, bytes: usize) -> Option<Batch> {
        let mut state = self.lock();
        self.filled
            .wait_while(&mut state, |state| !state.closed && state.orders.is_empty());
        Self::batch(state, bytes)
    }

    /// The same without waiting: `None` too when there are none at the moment.
    pub(super) fn try_next(&self, bytes: usize) -> Option<Batch> {
        Self::batch(self.lock(), bytes)
    }

    fn batch(mut state: MutexGuard<'_, State>, bytes: usize) -> Option<Batch> {
        if state.closed || state.orders.is_empty() {
            return None;
        }
        let mut pulls: Vec<Pull> = Vec::new();
        let mut total = 0_usize;
        while let Some(order) = state.orders.pop_front() {
            match order {
                Order::Arena { number, key } if pulls.is_empty() => {
                    return Some(Batch::Arena { number, key });
                }
                Order::Pull(pull)
                    if pulls.is_empty()
                        || pulls.len() < PULLS_AT_ONCE_MAX
                            && total.saturating_add(pull.runs.total_bytes()) <= bytes =>
                {
                    total = total.saturating_add(pull.runs.total_bytes());
                    pulls.push(pull);
                }
                later => {
                    state.orders.push_front(later);
                    break;
                }
            }
        }
        Some(Batch::Pulls(pulls))
    }

    /// Ends the puller's waiting; what was asked for is forgotten.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.orders.clear();
        drop(state);
        self.filled.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pull(sequence: u64, bytes: usize) -> Pull {
        Pull {
            transfer: TransferId(1),
            region: 1,
            key: 1,
            note: Vec::new(),
            runs: Runs::whole(bytes),
            descriptor: Descriptor {
                sequence,
                arena: 1,
                offset: 0,
                gathered: false,
            },
        }
    }

    fn sequences(batch: Option<Batch>) -> Vec<u64> {
        match batch {
            Some(Batch::Pulls(pulls)) => pulls.iter().map(|p| p.descriptor.sequence).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn batches_are_bounded_in_bytes_and_end_at_an_arena() {
        let pulls = Pulls::default();
        for (sequence, bytes) in [(1, 60), (2, 40), (3, 1), (4, 500)] {
            assert!(pulls.push(vec![Order::Pull(pull(sequence, bytes))]));
        }
        let key = vec![7];
        let arena = Order::Arena { number: 9, key };
        assert!(pulls.push(vec![arena, Order::Pull(pull(5, 1))]));
        assert_eq!(sequences(pulls.next(100)), [1, 2]);
        assert_eq!(sequences(pulls.next(100)), [3]);
        assert_eq!(sequences(pulls.next(100)), [4]);
        assert!(matches!(
            pulls.next(100),
            Some(Batch::Arena { number: 9, .. })
        ));
        pulls.put_back(vec![pull(6, 1), pull(7, 1)]);
        assert_eq!(sequences(pulls.next(100)), [6, 7, 5]);
    }

    #[test]
    fn too_many_are_refused_and_the_end_is_the_end() {
        let pulls = Pulls::default();
        let accepted = (0..10_000).take_while(|n| pulls.push(vec![Order::Pull(pull(*n, 1))]));
        assert_eq!(accepted.count(), 2 * WRITES_OPEN_MAX);
        pulls.close();
        assert!(pulls.next(100).is_none());
    }
}

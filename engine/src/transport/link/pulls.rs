//! What a peer asks this side to read, between the thread that hears of it and the one that reads.
//!
//! Bounded: a peer may have as many descriptors open as it may have writes, and no more arenas than that; one that
//! sends more is broken.

use std::collections::VecDeque;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::connection::WRITES_OPEN_MAX;
use super::frame::Descriptor;
use super::regions::Row;
use crate::transport::vigil::{Bell, Vigil};
use crate::transport::{Note, Runs, TransferId};

/// Pulls of one batch at most: while it is read, the peer describes more.
const PULLS_AT_ONCE_MAX: usize = WRITES_OPEN_MAX / 2;

/// Pieces of one batch at most, if it has more than one pull.
pub(in crate::transport) const PIECES_AT_ONCE_MAX: usize = 2048;

/// How much of what waits a batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    /// Even if that is more than half of what waits.
    pub(super) bytes_min: usize,
    /// If it is more than one pull; no less than the above.
    pub(super) bytes_max: usize,
}

impl Share {
    /// Half of what waits, within bounds: so there are few batches, and the last is short.
    fn of(self, waiting_bytes: usize) -> usize {
        (waiting_bytes / 2).clamp(self.bytes_min, self.bytes_max)
    }
}

/// A row of pieces to read.
#[derive(Debug)]
pub(super) struct Pull {
    pub(super) transfer: TransferId,
    /// Of the first one.
    pub(super) region: u64,
    pub(super) key: u64,
    pub(super) note: Note,
    pub(super) runs: Runs,
    pub(super) descriptor: Descriptor,
}

impl Pull {
    /// Where they go.
    pub(super) fn row(&self) -> Row {
        Row {
            first: self.region,
            count: self.count(),
        }
    }

    /// How many pieces.
    pub(super) fn count(&self) -> usize {
        self.descriptor.offsets.len()
    }

    /// Of all of them.
    pub(super) fn total_bytes(&self) -> usize {
        self.count().saturating_mul(self.runs.total_bytes())
    }
}

/// What the puller does next.
#[derive(Debug)]
pub(super) enum Order {
    /// Descriptors will name this arena.
    Arena { number: u64, key: Vec<u8> },
    /// Read it.
    Pull(Pull),
}

impl Order {
    fn bytes(&self) -> usize {
        match self {
            Self::Arena { .. } => 0,
            Self::Pull(pull) => pull.total_bytes(),
        }
    }
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
    /// Nothing yet, but soon.
    Rouse,
}

#[derive(Debug, Default)]
struct State {
    orders: VecDeque<Order>,
    /// Of all that shall be read.
    bytes: usize,
    /// Orders are expected, and the puller has not heard so.
    roused: bool,
    closed: bool,
}

impl State {
    fn add(&mut self, order: Order, put: impl FnOnce(&mut VecDeque<Order>, Order)) {
        self.bytes = self.bytes.saturating_add(order.bytes());
        put(&mut self.orders, order);
    }

    fn take(&mut self) -> Option<Order> {
        let order = self.orders.pop_front()?;
        self.bytes = self.bytes.saturating_sub(order.bytes());
        Some(order)
    }
}

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Pulls {
    state: Mutex<State>,
    filled: Condvar,
    vigil: Vigil,
    bell: Bell,
}

impl Pulls {
    pub(super) fn new(vigil: Vigil) -> Self {
        Self {
            vigil,
            ..Self::default()
        }
    }

    /// Has the puller wake up, if it has nothing to do: something comes soon.
    pub(super) fn rouse(&self) {
        self.lock().roused = true;
        self.bell.ring();
        self.filled.notify_one();
    }

    /// Hands orders over; false when there are more than an honest peer sends.
    pub(super) fn push(&self, orders: Vec<Order>) -> bool {
        let mut state = self.lock();
        // As many arenas as descriptors at the utmost: each order may come with one new arena.
        if state.orders.len() + orders.len() > 2 * WRITES_OPEN_MAX {
            return false;
        }
        for order in orders {
            state.add(order, VecDeque::push_back);
        }
        drop(state);
        self.bell.ring();
        self.filled.notify_one();
        true
    }

    /// Puts pulls back that could not be read yet, in front.
    pub(super) fn put_back(&self, pulls: Vec<Pull>) {
        let mut state = self.lock();
        for pull in pulls.into_iter().rev() {
            state.add(Order::Pull(pull), VecDeque::push_front);
        }
    }

    /// Waits for the next orders: an arena, or pulls of up to their share of bytes together; or to be roused. `None` after the end.
    pub(super) fn next(&self, share: Share) -> Option<Batch> {
        let mut state = self.lock();
        let is_there = |state: &mut State| state.closed || state.roused || !state.orders.is_empty();
        self.vigil.watch(&mut state, &self.bell, is_there);
        self.filled.wait_while(&mut state, |state| !is_there(state));
        let roused = std::mem::take(&mut state.roused) && !state.closed;
        if roused && state.orders.is_empty() {
            return Some(Batch::Rouse);
        }
        Self::batch(state, share)
    }

    /// The same without waiting: `None` too when there are none at the moment. Who asks so is awake.
    pub(super) fn try_next(&self, share: Share) -> Option<Batch> {
        let mut state = self.lock();
        state.roused = false;
        Self::batch(state, share)
    }

    fn batch(mut state: MutexGuard<'_, State>, share: Share) -> Option<Batch> {
        if state.closed || state.orders.is_empty() {
            return None;
        }
        let bytes = share.of(state.bytes);
        let mut pulls: Vec<Pull> = Vec::new();
        let (mut total, mut pieces) = (0_usize, 0);
        while let Some(order) = state.take() {
            match order {
                Order::Arena { number, key } if pulls.is_empty() => {
                    return Some(Batch::Arena { number, key });
                }
                Order::Pull(pull)
                    if pulls.is_empty()
                        || pulls.len() < PULLS_AT_ONCE_MAX
                            && pieces + pull.count() <= PIECES_AT_ONCE_MAX
                            && total.saturating_add(pull.total_bytes()) <= bytes =>
                {
                    total = total.saturating_add(pull.total_bytes());
                    pieces += pull.count();
                    pulls.push(pull);
                }
                later => {
                    state.add(later, VecDeque::push_front);
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
        state.bytes = 0;
        drop(state);
        self.bell.ring();
        self.filled.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

#[cfg(test)]
mod tests {
    use smallvec::smallvec;

    use super::*;

    const UP_TO_100: Share = Share {
        bytes_min: 100,
        bytes_max: 100,
    };

    fn pull(sequence: u64, bytes: usize) -> Pull {
        Pull {
            transfer: TransferId(1),
            region: 1,
            key: 1,
            note: Note::new(),
            runs: Runs::whole(bytes),
            descriptor: Descriptor {
                sequence,
                arena: 1,
                offsets: smallvec![0],
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
        assert_eq!(sequences(pulls.next(UP_TO_100)), [1, 2]);
        assert_eq!(sequences(pulls.next(UP_TO_100)), [3]);
        assert_eq!(sequences(pulls.next(UP_TO_100)), [4]);
        assert!(matches!(
            pulls.next(UP_TO_100),
            Some(Batch::Arena { number: 9, .. })
        ));
        pulls.put_back(vec![pull(6, 1), pull(7, 1)]);
        assert_eq!(sequences(pulls.next(UP_TO_100)), [6, 7, 5]);
    }

    #[test]
    fn batches_that_taper_are_half_of_what_waits_within_bounds() {
        let share = Share {
            bytes_min: 10,
            bytes_max: 80,
        };
        let pulls = Pulls::default();
        let orders = (0..20).map(|number| Order::Pull(pull(number, 10)));
        assert!(pulls.push(orders.collect()));
        let mut lengths = Vec::new();
        while let Some(Batch::Pulls(batch)) = pulls.try_next(share) {
            lengths.push(batch.len());
            if lengths.len() == 2 {
                // What cannot be read yet counts again.
                pulls.put_back(batch);
            }
        }
        assert_eq!(lengths, [8, 6, 6, 3, 1, 1, 1]);
    }

    #[test]
    fn who_has_nothing_to_do_is_roused_once_and_nobody_else() {
        let pulls = Pulls::default();
        pulls.rouse();
        assert!(matches!(pulls.next(UP_TO_100), Some(Batch::Rouse)));
        pulls.rouse();
        assert!(pulls.push(vec![Order::Pull(pull(1, 1))]));
        assert_eq!(sequences(pulls.next(UP_TO_100)), [1]);
        pulls.rouse();
        assert!(pulls.try_next(UP_TO_100).is_none());
        assert!(pulls.push(vec![Order::Pull(pull(2, 1))]));
        assert_eq!(sequences(pulls.next(UP_TO_100)), [2]);
        pulls.rouse();
        pulls.close();
        assert!(pulls.next(UP_TO_100).is_none());
    }

    #[test]
    fn too_many_are_refused_and_the_end_is_the_end() {
        let pulls = Pulls::default();
        let accepted = (0..10_000).take_while(|n| pulls.push(vec![Order::Pull(pull(*n, 1))]));
        assert_eq!(accepted.count(), 2 * WRITES_OPEN_MAX);
        pulls.close();
        assert!(pulls.next(UP_TO_100).is_none());
    }
}

//! Staying awake for a moment: a thread that has just had something to do looks whether there is more before it sleeps.
//!
//! A hand-off passes through half a dozen threads of each side, and waking a thread that sleeps takes some 50 µs or more where a
//! processor has to be woken with it; KV of a whole prompt goes from one GPU to another in 3 ms. Where that counts a thread
//! watches instead, for a bounded time, and never more of them at once than a share of the machine's processors: who finds no seat
//! sleeps, and so does everybody on a small machine. What is absent: watching where nothing has happened.
//!
//! Invariant: whatever is watched for is said under the lock that guards it before the bell rings, so nothing is missed; and who
//! watches holds no lock meanwhile.

use std::hint::spin_loop;
use std::num::NonZero;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::yield_now;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;

/// Of so many processors one may be watching.
const PROCESSORS_PER_SEAT: usize = 4;

/// Machines with fewer processors have something better to do.
const PROCESSORS_MIN: usize = 8;

/// Looks before the processor is offered to others, and at the clock: less than a microsecond.
const LOOKS: usize = 16;

/// Threads of this process that watch.
static SEATED: AtomicUsize = AtomicUsize::new(0);

/// How many may.
fn seats() -> usize {
    static SEATS: OnceLock<usize> = OnceLock::new();
    *SEATS.get_or_init(|| seats_of(std::thread::available_parallelism().map_or(1, NonZero::get)))
}

const fn seats_of(processors: usize) -> usize {
    if processors < PROCESSORS_MIN {
        return 0;
    }
    processors / PROCESSORS_PER_SEAT
}

/// Rings when something was said to whoever watches.
#[derive(Debug, Default)]
pub(crate) struct Bell(AtomicUsize);

impl Bell {
    /// Something was said.
    pub(crate) fn ring(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }

    fn count(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }
}

/// A place among those that watch, given back when dropped.
#[derive(Debug)]
struct Seat;

impl Seat {
    fn take(seats: usize) -> Option<Self> {
        let room = |seated: usize| (seated < seats).then_some(seated + 1);
        SEATED
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, room)
            .ok()
            .map(|_| Self)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        SEATED.fetch_sub(1, Ordering::AcqRel);
    }
}

/// How long a thread watches before it sleeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Vigil(Duration);

impl Vigil {
    /// For so long; not at all where it is zero, or the machine is small.
    pub(crate) const fn of(longest: Duration) -> Self {
        Self(longest)
    }

    /// Whether anybody watches.
    pub(crate) fn is_held(self) -> bool {
        !self.0.is_zero() && seats() > 0
    }

    /// Watches until what a lock guards is as it should be, or the time is over.
    pub(crate) fn watch<T>(
        self,
        guard: &mut MutexGuard<'_, T>,
        bell: &Bell,
        mut is_there: impl FnMut(&mut T) -> bool,
    ) {
        if !self.is_held() || is_there(guard) {
            return;
        }
        let Some(_seat) = Seat::take(seats()) else {
            return;
        };
        let until = Instant::now() + self.0;
        loop {
            let heard = bell.count();
            let rang = MutexGuard::unlocked(guard, || spin(until, || bell.count() != heard));
            if !rang || is_there(guard) {
                return;
            }
        }
    }

    /// Watches until something is there, or the time is over.
    pub(crate) fn look(self, is_there: impl FnMut() -> bool) {
        if !self.is_held() {
            return;
        }
        if let Some(_seat) = Seat::take(seats()) {
            spin(Instant::now() + self.0, is_there);
        }
    }
}

/// Whether it came before the time was over.
fn spin(until: Instant, mut is_there: impl FnMut() -> bool) -> bool {
    loop {
        for _ in 0..LOOKS {
            if is_there() {
                return true;
            }
            spin_loop();
        }
        // Whoever was woken on this very processor shall not wait for the end of a time slice.
        yield_now();
        if Instant::now() >= until {
            return is_there();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    #[test]
    fn small_machines_have_no_seats_and_large_ones_a_few() {
        assert_eq!([1, 4, 7].map(seats_of), [0; 3]);
        assert_eq!([8, 16, 32, 128].map(seats_of), [2, 4, 8, 32]);
    }

    #[test]
    fn a_seat_is_one_of_few_and_comes_back() {
        // Others may sit here at the same time, but none of them beyond their machine's share.
        let all = seats() + 1;
        let seat = Seat::take(all).unwrap();
        assert!(Seat::take(1).is_none());
        drop(seat);
        assert!(Seat::take(0).is_none());
        assert!(Seat::take(all).is_some());
    }

    #[test]
    fn what_is_said_meanwhile_is_noticed_and_nothing_said_ends_in_time() {
        let bell = Bell::default();
        let heard = bell.count();
        let long = Instant::now() + Duration::from_secs(30);
        std::thread::scope(|scope| {
            scope.spawn(|| bell.ring());
            assert!(spin(long, || bell.count() != heard));
        });
        let heard = bell.count();
        assert!(!spin(Instant::now(), || bell.count() != heard));
    }

    #[test]
    fn what_is_there_already_needs_no_watching() {
        let said = Arc::new(Mutex::new(true));
        let mut guard = said.lock();
        let mut looks = 0;
        let vigil = Vigil::of(Duration::from_secs(30));
        vigil.watch(&mut guard, &Bell::default(), |said| {
            looks += 1;
            *said
        });
        assert!(looks <= 1);
    }
}

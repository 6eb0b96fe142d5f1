//! When an arena's memory becomes huge pages: a stretch of it at a time, as its first piece is about to be written.
//!
//! Not all of it at the start: a pool is as large as an administrator allows, and what is never used shall not become
//! resident. Making huge pages of memory that nobody has touched is cheaper than touching its small pages one by one
//! (measured: 0.2 s instead of 1.3 s for 1 GiB), so who writes first pays less than before, not more. Memory that was
//! touched in small pages is left as it is: to move it would take longer than it saves.
//!
//! Invariant: every stretch is the business of one thread, once; after one that is too slow or refused, or several that others kept
//! busy, no further one is tried.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::mapped::HUGE_BYTES;

/// Made at once: some milliseconds' work. One call for a single huge page takes as long as one for this many.
const STRETCH_BYTES: usize = 16 << 20;

/// A stretch that takes longer is the last: memory is so fragmented that huge pages are not worth their price.
const PATIENCE: Duration = Duration::from_millis(250);

/// Attempts at a stretch that others are touching at the same time.
const ATTEMPTS: usize = 3;

/// So many stretches in a row that were busy all the time are the last.
const BUSY_MAX: usize = 4;

/// What has become of an arena's memory.
#[derive(Debug)]
pub(super) struct HugeStretches {
    /// Of whole huge pages; what is left over at the end stays in small ones.
    bytes: usize,
    tried: Box<[AtomicBool]>,
    made_bytes: AtomicUsize,
    busy: AtomicUsize,
    given_up: AtomicBool,
}

impl HugeStretches {
    /// For an arena of so many bytes.
    pub(super) fn new(bytes: usize) -> Self {
        let bytes = bytes - bytes % HUGE_BYTES;
        let count = bytes.div_ceil(STRETCH_BYTES);
        Self {
            bytes,
            tried: (0..count).map(|_| AtomicBool::new(false)).collect(),
            made_bytes: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            given_up: AtomicBool::new(false),
        }
    }

    /// Bytes that are known to be in huge pages.
    pub(super) fn made_bytes(&self) -> usize {
        self.made_bytes.load(Ordering::Relaxed)
    }

    /// Has `make` make huge pages of the stretches that the range touches, unless that was tried before.
    pub(super) fn prepare(
        &self,
        range: Range<usize>,
        make: impl Fn(Range<usize>) -> io::Result<()>,
    ) {
        let stretches = range.start / STRETCH_BYTES..range.end.div_ceil(STRETCH_BYTES);
        for index in stretches {
            let tried = self.tried.get(index);
            if tried.is_none_or(|tried| tried.swap(true, Ordering::Relaxed)) {
                continue;
            }
            if self.given_up.load(Ordering::Relaxed) {
                return;
            }
            let start = index * STRETCH_BYTES;
            let stretch = start..self.bytes.min(start + STRETCH_BYTES);
            let began = Instant::now();
            let mut made = make(stretch.clone());
            for _ in 1..ATTEMPTS {
                if is_busy(&made) && began.elapsed() < PATIENCE {
                    made = make(stretch.clone());
                }
            }
            self.note(stretch.len(), made, began.elapsed());
        }
    }

    fn note(&self, bytes: usize, made: io::Result<()>, elapsed: Duration) {
        let mut is_first = false;
        let mut is_over = elapsed > PATIENCE;
        if made.is_ok() {
            is_first = self.made_bytes.fetch_add(bytes, Ordering::Relaxed) == 0;
            self.busy.store(0, Ordering::Relaxed);
        } else {
            let in_a_row = self.busy.fetch_add(1, Ordering::Relaxed) + 1;
            is_over |= !is_busy(&made) || in_a_row >= BUSY_MAX;
        }
        if is_over && !self.given_up.swap(true, Ordering::Relaxed) {
            tracing::info!(
                pool_bytes = self.bytes,
                huge_bytes = self.made_bytes(),
                elapsed_ms = elapsed.as_millis(),
                reason = made.map_or_else(|error| error.to_string(), |()| "too slow".to_owned()),
                "kv memory is in small pages but for what is in huge ones"
            );
        } else if is_first {
            tracing::info!(
                pool_bytes = self.bytes,
                elapsed_ms = elapsed.as_millis(),
                "kv memory comes in huge pages as it is used"
            );
        }
    }
}

/// Whether the kernel would have it tried again: somebody touches the memory at this moment.
fn is_busy(made: &io::Result<()>) -> bool {
    made.as_ref()
        .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// What `make` was asked for.
    fn asked(stretches: &HugeStretches, range: Range<usize>) -> Vec<Range<usize>> {
        let asked: RefCell<Vec<_>> = RefCell::default();
        stretches.prepare(range, |stretch| {
            asked.borrow_mut().push(stretch);
            Ok(())
        });
        asked.into_inner()
    }

    #[test]
    fn a_stretch_is_made_once_and_what_is_left_over_never() {
        let bytes = 2 * STRETCH_BYTES + HUGE_BYTES + 100;
        let stretches = HugeStretches::new(bytes);
        let begun = 0..STRETCH_BYTES;
        assert_eq!(asked(&stretches, 10..20), std::slice::from_ref(&begun));
        assert!(asked(&stretches, 30..STRETCH_BYTES).is_empty());
        let rest = asked(&stretches, 0..bytes);
        let (first, second) = (STRETCH_BYTES, 2 * STRETCH_BYTES);
        assert_eq!(rest, [first..second, second..second + HUGE_BYTES]);
        assert_eq!(stretches.made_bytes(), second + HUGE_BYTES);
        assert!(asked(&stretches, 0..bytes).is_empty());
        assert!(asked(&stretches, bytes..bytes).is_empty());
    }

    #[test]
    fn small_arenas_have_none() {
        let stretches = HugeStretches::new(HUGE_BYTES - 1);
        assert!(asked(&stretches, 0..HUGE_BYTES - 1).is_empty());
        assert_eq!(stretches.made_bytes(), 0);
        assert!(asked(&HugeStretches::new(0), 0..0).is_empty());
    }

    #[test]
    fn a_refusal_is_the_last_question() {
        let stretches = HugeStretches::new(4 * STRETCH_BYTES);
        let old_kernel = || io::Error::from(io::ErrorKind::InvalidInput);
        stretches.prepare(0..1, |_| Err(old_kernel()));
        assert!(asked(&stretches, 0..4 * STRETCH_BYTES).is_empty());
        assert_eq!(stretches.made_bytes(), 0);
    }

    #[test]
    fn busy_memory_is_tried_again_and_left_alone_after_some_stretches() {
        let busy = || io::Error::from(io::ErrorKind::WouldBlock);
        let calls = RefCell::new(0);
        let stretches = HugeStretches::new(6 * STRETCH_BYTES);
        stretches.prepare(0..1, |_| {
            *calls.borrow_mut() += 1;
            if *calls.borrow() < ATTEMPTS {
                Err(busy())
            } else {
                Ok(())
            }
        });
        assert_eq!(
            (*calls.borrow(), stretches.made_bytes()),
            (ATTEMPTS, STRETCH_BYTES)
        );
        *calls.borrow_mut() = 0;
        stretches.prepare(0..6 * STRETCH_BYTES, |_| {
            *calls.borrow_mut() += 1;
            Err(busy())
        });
        assert_eq!(
            *calls.borrow(),
            BUSY_MAX * ATTEMPTS,
            "the sixth is not tried"
        );
        assert_eq!(stretches.made_bytes(), STRETCH_BYTES);
    }
}

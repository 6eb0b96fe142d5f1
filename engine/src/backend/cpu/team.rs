//! The threads of a backend: the caller and its helpers, who share a list of tasks.
//!
//! The caller works too, and waits for its helpers by spinning for a short while before it blocks: a decode step
//! has two hundred regions of some microseconds, in which a sleep and a wake-up each would cost more than the work.
//! Which thread runs a task never changes its result.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Spins before the caller blocks; about 50 µs.
const SPIN_COUNT_MAX: u32 = 20_000;

/// A fixed number of threads.
#[derive(Debug)]
pub(super) struct Team {
    helpers: Option<ThreadPool>,
    threads: usize,
}

impl Team {
    /// `threads` counts the caller. Should the system refuse threads, the caller works alone.
    pub(super) fn new(threads: usize) -> Self {
        let helpers = (threads > 1)
            .then(|| {
                ThreadPoolBuilder::new()
                    .num_threads(threads - 1)
                    .thread_name(|index| format!("cpu-{}", index + 1))
                    .build()
            })
            .transpose()
            .unwrap_or_else(|error| {
                tracing::warn!(%error, threads, "can't start helper threads, computing on one");
                None
            });
        let threads = helpers
            .as_ref()
            .map_or(1, |pool| pool.current_num_threads() + 1);
        Self { helpers, threads }
    }

    /// Threads that work, the caller included.
    pub(super) const fn threads(&self) -> usize {
        self.threads
    }

    /// Does every task, in any order, and returns when all are done.
    pub(super) fn run<T: Send>(&self, tasks: Vec<T>, work: impl Fn(T) + Sync) {
        let helper_count = (self.threads - 1).min(tasks.len().saturating_sub(1));
        let Some(pool) = self.helpers.as_ref().filter(|_| helper_count > 0) else {
            tasks.into_iter().for_each(work);
            return;
        };
        let queue = Mutex::new(tasks.into_iter());
        let take = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let drain = || {
            while let Some(task) = take() {
                work(task);
            }
        };
        let busy = AtomicUsize::new(helper_count);
        pool.in_place_scope(|scope| {
            for _ in 0..helper_count {
                scope.spawn(|_| {
                    drain();
                    busy.fetch_sub(1, Ordering::Release);
                });
            }
            drain();
            let mut spins = 0;
            while busy.load(Ordering::Acquire) > 0 && spins < SPIN_COUNT_MAX {
                std::hint::spin_loop();
                spins += 1;
            }
        });
    }
}

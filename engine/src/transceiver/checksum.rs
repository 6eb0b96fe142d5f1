//! XXH3-64 over pieces of pages, on threads of its own, so that neither the desk nor the wire waits for it.
//!
//! Landed pages whose transport did not sum them go first: a request waits for them. Offered pages are summed as soon as they are offered, most
//! often before anyone asks; that takes the sender's checksum off the path to the first token.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::inbox::{Checked, Happening, Inbox, Mismatch, SumsOf};
use crate::page::Page;
use crate::transport::checksum::sum_of;
use crate::transport::{RegionId, Runs, TransferId};

/// A piece in a page, whose transport did not sum it.
#[derive(Debug)]
pub(super) struct Unsummed {
    /// Index among the page's pieces, in the order in which they landed.
    pub(super) part: usize,
    pub(super) runs: Runs,
    /// The checksum that it shall have.
    pub(super) expected: u64,
}

/// A page whose pieces have all landed.
#[derive(Debug)]
pub(super) struct Landed {
    pub(super) transfer: TransferId,
    pub(super) region: RegionId,
    /// Index among the fetch's pages.
    pub(super) index: usize,
    pub(super) page: Page,
    pub(super) parts: Vec<Unsummed>,
}

/// Pieces to be sent; their pages are let go when the job is over or given up.
#[derive(Debug)]
pub(super) struct Summing {
    pub(super) of: SumsOf,
    pub(super) parts: VecDeque<(Arc<Page>, Runs)>,
    pub(super) given_up: Arc<AtomicBool>,
}

/// Of the stretches of a page that a piece is read from, in their order.
pub(super) fn source_sum(page: &Page, runs: &Runs) -> u64 {
    sum_of(page.as_bytes(), runs.stretches().map(|(source, _)| source))
}

/// Of the stretches of a page that a piece was written to, in their order.
fn target_sum(page: &Page, runs: &Runs) -> u64 {
    sum_of(page.as_bytes(), runs.stretches().map(|(_, target)| target))
}

impl Landed {
    fn mismatch(&self) -> Option<Mismatch> {
        let parts = self.parts.iter();
        parts
            .map(|part| Mismatch {
                part: part.part,
                expected: part.expected,
                found: target_sum(&self.page, &part.runs),
            })
            .find(|part| part.found != part.expected)
    }
}

#[derive(Debug, Default)]
struct Jobs {
    landed: VecDeque<Landed>,
    offered: VecDeque<Summing>,
    stopped: bool,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: Mutex<Jobs>,
    wake: Condvar,
}

/// The threads. Queues are bounded by the pages that leases and fetches may hold.
#[derive(Debug)]
pub(super) struct ChecksumThreads {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl ChecksumThreads {
    /// Starts `count` threads that report to the inbox.
    pub(super) fn start(count: usize, inbox: &Arc<Inbox>) -> std::io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let mut started = Self {
            queue,
            threads: Vec::new(),
        };
        for index in 0..count.max(1) {
            let queue = Arc::clone(&started.queue);
            let inbox = Arc::clone(inbox);
            let thread = std::thread::Builder::new()
                .name(format!("kv-checksum-{index}"))
                .spawn(move || queue.work(&inbox))?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    pub(super) fn check(&self, landed: Landed) {
        self.queue.lock().landed.push_back(landed);
        self.queue.wake.notify_one();
    }

    pub(super) fn sum(&self, offered: Summing) {
        self.queue.lock().offered.push_back(offered);
        self.queue.wake.notify_one();
    }
}

impl Drop for ChecksumThreads {
    fn drop(&mut self) {
        self.queue.lock().stopped = true;
        self.queue.wake.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a kv checksum thread panicked");
            }
        }
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock()
    }

    fn work(&self, inbox: &Inbox) {
        loop {
            let mut jobs = self.lock();
            self.wake.wait_while(&mut jobs, |jobs| {
                !jobs.stopped && jobs.landed.is_empty() && jobs.offered.is_empty()
            });
            if jobs.stopped {
                return;
            }
            if let Some(landed) = jobs.landed.pop_front() {
                drop(jobs);
                let mismatch = landed.mismatch();
                inbox.happened(Happening::Checked(Checked {
                    transfer: landed.transfer,
                    region: landed.region,
                    index: landed.index,
                    page: landed.page,
                    mismatch,
                }));
            } else if let Some(offered) = jobs.offered.pop_front() {
                drop(jobs);
                self.sum_one(offered, inbox);
            }
        }
    }

    /// Sums one piece and puts the job back in front, so that a long sequence holds up no landed page.
    fn sum_one(&self, mut offered: Summing, inbox: &Inbox) {
        let of = offered.of;
        let given_up = offered.given_up.load(Ordering::Acquire);
        match offered.parts.pop_front() {
            Some((page, runs)) if !given_up => {
                let checksum = source_sum(&page, &runs);
                drop(page);
                inbox.happened(Happening::Hashed { of, checksum });
                self.lock().offered.push_front(offered);
                self.wake.notify_one();
            }
            last => {
                drop(last);
                drop(offered);
                inbox.happened(Happening::HashingEnded { of });
            }
        }
    }
}

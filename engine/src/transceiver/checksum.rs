//! XXH3-64 over whole pages, on threads of its own, so that neither the desk nor the wire waits for it.
//!
//! Landed pages go first: a request waits for them. Offered pages are summed as soon as they are offered, most
//! often before anyone asks; that takes the sender's checksum off the path to the first token.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use xxhash_rust::xxh3::xxh3_64;

use super::inbox::{Checked, Happening, Inbox};
use crate::page::Page;
use crate::transport::{RegionId, TransferId};

/// A page that landed.
#[derive(Debug)]
pub(super) struct Landed {
    pub(super) transfer: TransferId,
    pub(super) region: RegionId,
    pub(super) piece: usize,
    pub(super) page: Page,
    pub(super) expected: u64,
}

/// An offered sequence; its pages are let go when the job is over or given up.
#[derive(Debug)]
pub(super) struct Offered {
    pub(super) ctx_request_id: u64,
    pub(super) pages: VecDeque<Arc<Page>>,
    pub(super) given_up: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct Jobs {
    landed: VecDeque<Landed>,
    offered: VecDeque<Offered>,
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

    pub(super) fn sum(&self, offered: Offered) {
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
        self.jobs.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn work(&self, inbox: &Inbox) {
        loop {
            let waited = self.wake.wait_while(self.lock(), |jobs| {
                !jobs.stopped && jobs.landed.is_empty() && jobs.offered.is_empty()
            });
            let mut jobs = waited.unwrap_or_else(|e| e.into_inner());
            if jobs.stopped {
                return;
            }
            if let Some(landed) = jobs.landed.pop_front() {
                drop(jobs);
                let found = xxh3_64(landed.page.as_bytes());
                inbox.happened(Happening::Checked(Checked {
                    transfer: landed.transfer,
                    region: landed.region,
                    piece: landed.piece,
                    page: landed.page,
                    expected: landed.expected,
                    found,
                }));
            } else if let Some(offered) = jobs.offered.pop_front() {
                drop(jobs);
                self.sum_one(offered, inbox);
            }
        }
    }

    /// Sums one page and puts the job back in front, so that a long sequence holds up no landed page.
    fn sum_one(&self, mut offered: Offered, inbox: &Inbox) {
        let ctx_request_id = offered.ctx_request_id;
        let given_up = offered.given_up.load(Ordering::Acquire);
        match offered.pages.pop_front() {
            Some(page) if !given_up => {
                let checksum = xxh3_64(page.as_bytes());
                drop(page);
                inbox.happened(Happening::Hashed {
                    ctx_request_id,
                    checksum,
                });
                self.lock().offered.push_front(offered);
                self.wake.notify_one();
            }
            last => {
                drop(last);
                drop(offered);
                inbox.happened(Happening::HashingEnded { ctx_request_id });
            }
        }
    }
}

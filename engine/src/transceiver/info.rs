//! What others may know of a transceiver: which transport it chose and why, and its counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::select::Choice;

/// A cheap handle on the choice and the counters; read by logs, `/server_info` and metrics.
#[derive(Debug, Clone)]
pub struct TransceiverInfo {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    choice: Choice,
    endpoint: String,
    epoch: u64,
    leases_held: AtomicUsize,
    leases_serving: AtomicUsize,
    fetches_held: AtomicUsize,
    pages_quarantined: AtomicUsize,
    leases_delivered: AtomicU64,
    leases_expired: AtomicU64,
    leases_cancelled: AtomicU64,
    fetches_succeeded: AtomicU64,
    fetches_failed: AtomicU64,
    checksum_mismatches: AtomicU64,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
    last_rate: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TransceiverStats {
    /// Leases held now.
    pub leases_held: usize,
    /// Of these, leases whose KV is on its way to a generation server.
    pub leases_serving: usize,
    /// Fetches queued or under way now.
    pub fetches_held: usize,
    /// Pages that a transport may still write though their fetch is over.
    pub pages_quarantined: usize,
    /// Leases whose KV was acknowledged.
    pub leases_delivered: u64,
    /// Leases that nobody finished in time.
    pub leases_expired: u64,
    /// Leases given up.
    pub leases_cancelled: u64,
    /// Fetches with all pages verified.
    pub fetches_succeeded: u64,
    /// Fetches that failed or were cancelled.
    pub fetches_failed: u64,
    /// Pieces that did not match their checksum.
    pub checksum_mismatches: u64,
    /// Payload bytes handed to the transport.
    pub bytes_sent: u64,
    /// Payload bytes verified.
    pub bytes_received: u64,
    /// Rate of the last successful fetch, bytes a second; 0 before the first.
    pub last_bytes_per_second: u64,
}

/// A count of things held that has a bound; see [`TransceiverInfo`].
#[derive(Debug, Clone, Copy)]
pub(super) enum Held {
    Leases,
    Fetches,
}

/// What a counter counts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Count {
    LeasesDelivered,
    LeasesExpired,
    LeasesCancelled,
    FetchesFailed,
    ChecksumMismatches,
    BytesSent,
}

impl TransceiverInfo {
    pub(super) fn new(choice: Choice, endpoint: String, epoch: u64) -> Self {
        let shared = Shared {
            choice,
            endpoint,
            epoch,
            leases_held: AtomicUsize::new(0),
            leases_serving: AtomicUsize::new(0),
            fetches_held: AtomicUsize::new(0),
            pages_quarantined: AtomicUsize::new(0),
            leases_delivered: AtomicU64::new(0),
            leases_expired: AtomicU64::new(0),
            leases_cancelled: AtomicU64::new(0),
            fetches_succeeded: AtomicU64::new(0),
            fetches_failed: AtomicU64::new(0),
            checksum_mismatches: AtomicU64::new(0),
            bytes_sent: AtomicU64::new(0),
            bytes_received: AtomicU64::new(0),
            last_rate: AtomicU64::new(0),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Name of the transport in use.
    #[must_use]
    pub fn transport(&self) -> &'static str {
        self.shared.choice.transport
    }

    /// Why it is the one, in a sentence.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.shared.choice.reason
    }

    /// Where peers connect to.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.shared.endpoint
    }

    /// Tells this process from its predecessors.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.shared.epoch
    }

    /// The counters now.
    #[must_use]
    pub fn stats(&self) -> TransceiverStats {
        let shared = &*self.shared;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let held = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        TransceiverStats {
            leases_held: held(&shared.leases_held),
            leases_serving: held(&shared.leases_serving),
            fetches_held: held(&shared.fetches_held),
            pages_quarantined: held(&shared.pages_quarantined),
            leases_delivered: count(&shared.leases_delivered),
            leases_expired: count(&shared.leases_expired),
            leases_cancelled: count(&shared.leases_cancelled),
            fetches_succeeded: count(&shared.fetches_succeeded),
            fetches_failed: count(&shared.fetches_failed),
            checksum_mismatches: count(&shared.checksum_mismatches),
            bytes_sent: count(&shared.bytes_sent),
            bytes_received: count(&shared.bytes_received),
            last_bytes_per_second: count(&shared.last_rate),
        }
    }

    /// Takes a permit; the number held when there is none left.
    pub(super) fn hold(&self, what: Held, limit: usize) -> Result<(), usize> {
        let more = |count: usize| (count < limit).then_some(count + 1);
        self.held(what)
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, more)
            .map(|_| ())
    }

    pub(super) fn release(&self, what: Held) {
        self.held(what).fetch_sub(1, Ordering::SeqCst);
    }

    pub(super) fn set_quarantined(&self, pages: usize) {
        self.shared
            .pages_quarantined
            .store(pages, Ordering::Relaxed);
    }

    pub(super) fn set_serving(&self, leases: usize) {
        self.shared.leases_serving.store(leases, Ordering::Relaxed);
    }

    pub(super) fn add(&self, what: Count, amount: u64) {
        let shared = &*self.shared;
        let counter = match what {
            Count::LeasesDelivered => &shared.leases_delivered,
            Count::LeasesExpired => &shared.leases_expired,
            Count::LeasesCancelled => &shared.leases_cancelled,
            Count::FetchesFailed => &shared.fetches_failed,
            Count::ChecksumMismatches => &shared.checksum_mismatches,
            Count::BytesSent => &shared.bytes_sent,
        };
        counter.fetch_add(amount, Ordering::Relaxed);
    }

    pub(super) fn fetched(&self, bytes: u64, elapsed: Duration) {
        let shared = &*self.shared;
        shared.fetches_succeeded.fetch_add(1, Ordering::Relaxed);
        shared.bytes_received.fetch_add(bytes, Ordering::Relaxed);
        let nanoseconds = elapsed.as_nanos().max(1);
        let rate = u128::from(bytes) * 1_000_000_000 / nanoseconds;
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        shared.last_rate.store(rate, Ordering::Relaxed);
    }

    fn held(&self, what: Held) -> &AtomicUsize {
        match what {
            Held::Leases => &self.shared.leases_held,
            Held::Fetches => &self.shared.fetches_held,
        }
    }
}

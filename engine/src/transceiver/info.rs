//! What others may know of a transceiver: which transport it chose and why, and its counters.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::select::{Choice, Tried};
use super::state::OpaqueState;
use crate::handoff::HandoffStats;
use crate::transport::EndpointRecord;

/// Peers whose transport is remembered; more are not.
const PEERS_MAX: usize = 1024;

/// Pairs of ranks whose KV is counted; more are not.
const PAIRS_MAX: usize = 4096;

/// A cheap handle on the choice and the counters; read by logs, `/server_info` and metrics.
#[derive(Debug, Clone)]
pub struct TransceiverInfo {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    choice: Choice,
    wires: Vec<WireCounters>,
    missing: Vec<(&'static str, String)>,
    /// Over what KV went last, by the other instance's name.
    peers: Mutex<BTreeMap<String, &'static str>>,
    /// KV that came, by the other instance's name, its rank and ours.
    pairs: Mutex<BTreeMap<(String, u32, u32), Came>>,
    /// What the ranks that follow have counted; empty but on the rank that leads.
    others: Mutex<BTreeMap<usize, RankTotals>>,
    epoch: u64,
    /// What others are told so that they connect, once all ranks are there.
    card: OnceLock<Vec<u8>>,
    connections: AtomicUsize,
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
    last_rate: AtomicU64,
}

/// A transport that is there.
#[derive(Debug)]
struct WireCounters {
    name: &'static str,
    address: String,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
    fetches: AtomicU64,
}

/// KV that came over a pair of ranks.
#[derive(Debug, Default)]
struct Came {
    transport: String,
    bytes: u64,
}

/// KV that one of our ranks took from one rank of another instance so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RankPair {
    /// The other instance.
    pub peer: String,
    /// Its rank.
    pub peer_rank: u32,
    /// Ours.
    pub rank: u32,
    /// What the last of it came over.
    pub transport: String,
    /// Payload bytes, verified.
    pub bytes_received: u64,
}

/// What a rank that follows has counted so far, for the rank that leads.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RankTotals {
    wires: Vec<WireTotals>,
    checksum_mismatches: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct WireTotals {
    transport: String,
    bytes_sent: u64,
    bytes_received: u64,
}

/// What one transport has done so far, on all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireStats {
    /// Its name.
    pub transport: &'static str,
    /// Where peers connect to.
    pub endpoint: String,
    /// Payload bytes handed to it.
    pub bytes_sent: u64,
    /// Payload bytes that came over it and were verified.
    pub bytes_received: u64,
    /// Fetches that succeeded over it, on this rank.
    pub fetches: u64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TransceiverStats {
    /// Connections to other instances' transceivers, and between the ranks of this one.
    pub connections: usize,
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
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TransceiverInfo {
    /// `endpoints` are those of the transports that are there, best first.
    pub(super) fn new(
        choice: Choice,
        endpoints: Vec<EndpointRecord>,
        tried: Vec<Tried>,
        epoch: u64,
    ) -> Self {
        let there = tried.iter().filter(|(_, missing)| missing.is_none());
        let wires = there
            .zip(endpoints)
            .map(|((name, _), endpoint)| WireCounters {
                name,
                address: endpoint.address,
                bytes_sent: AtomicU64::new(0),
                bytes_received: AtomicU64::new(0),
                fetches: AtomicU64::new(0),
            });
        let shared = Shared {
            choice,
            wires: wires.collect(),
            missing: tried
                .into_iter()
                .filter_map(|(name, missing)| Some((name, missing?)))
                .collect(),
            peers: Mutex::default(),
            pairs: Mutex::default(),
            others: Mutex::default(),
            epoch,
            card: OnceLock::new(),
            connections: AtomicUsize::new(0),
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
            last_rate: AtomicU64::new(0),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// The state by which others connect before there is a lease; `None` while ranks are missing.
    #[must_use]
    pub fn card(&self) -> Option<&[u8]> {
        self.shared.card.get().map(Vec::as_slice)
    }

    pub(super) fn set_card(&self, state: &OpaqueState) {
        let set = state.encode().map(|card| self.shared.card.set(card));
        if !matches!(set, Ok(Ok(()))) {
            tracing::error!("this transceiver's address cannot be told before there is a ticket");
        }
    }

    pub(super) fn set_connections(&self, count: usize) {
        self.shared.connections.store(count, Ordering::Relaxed);
    }

    /// Name of the best transport that is there.
    #[must_use]
    pub fn transport(&self) -> &'static str {
        self.shared.choice.transport
    }

    /// Why it is the one, in a sentence.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.shared.choice.reason
    }

    /// Where peers connect to, over the best transport.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        let best = self.shared.wires.first();
        best.map_or("", |wire| &wire.address)
    }

    /// The transports that are there, best first.
    #[must_use]
    pub fn wires(&self) -> Vec<WireStats> {
        let mut wires = self.own_wires();
        let others = lock(&self.shared.others);
        for there in others.values().flat_map(|totals| &totals.wires) {
            let mut here = wires.iter_mut();
            if let Some(wire) = here.find(|wire| wire.transport == there.transport) {
                wire.bytes_sent += there.bytes_sent;
                wire.bytes_received += there.bytes_received;
            }
        }
        wires
    }

    fn own_wires(&self) -> Vec<WireStats> {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let wires = self.shared.wires.iter();
        wires
            .map(|wire| WireStats {
                transport: wire.name,
                endpoint: wire.address.clone(),
                bytes_sent: count(&wire.bytes_sent),
                bytes_received: count(&wire.bytes_received),
                fetches: count(&wire.fetches),
            })
            .collect()
    }

    /// What this rank has counted so far.
    pub(super) fn totals(&self) -> RankTotals {
        let wires = self.own_wires().into_iter().map(|wire| WireTotals {
            transport: wire.transport.to_owned(),
            bytes_sent: wire.bytes_sent,
            bytes_received: wire.bytes_received,
        });
        RankTotals {
            wires: wires.collect(),
            checksum_mismatches: self.shared.checksum_mismatches.load(Ordering::Relaxed),
        }
    }

    /// Takes over what a rank that follows has counted so far.
    pub(super) fn set_totals(&self, rank: usize, totals: RankTotals) {
        lock(&self.shared.others).insert(rank, totals);
    }

    /// KV that came so far, by pairs of ranks.
    #[must_use]
    pub fn pairs(&self) -> Vec<RankPair> {
        let pairs = lock(&self.shared.pairs);
        let pairs = pairs
            .iter()
            .map(|((peer, peer_rank, rank), came)| RankPair {
                peer: peer.clone(),
                peer_rank: *peer_rank,
                rank: *rank,
                transport: came.transport.clone(),
                bytes_received: came.bytes,
            });
        pairs.collect()
    }

    /// Notes what a fetch moved, on all ranks.
    pub(super) fn note_moves(&self, stats: &HandoffStats) {
        let mut pairs = lock(&self.shared.pairs);
        for moved in &stats.moves {
            let pair = (moved.peer.clone(), moved.peer_rank, moved.rank);
            if pairs.len() >= PAIRS_MAX && !pairs.contains_key(&pair) {
                continue;
            }
            let came = pairs.entry(pair).or_default();
            came.bytes += moved.bytes;
            came.transport.clone_from(&moved.transport);
        }
    }

    /// Transports that were tried and are not there, with why.
    #[must_use]
    pub fn missing(&self) -> &[(&'static str, String)] {
        &self.shared.missing
    }

    /// Over which transport KV went last, for each instance that it went to or came from.
    #[must_use]
    pub fn peers(&self) -> BTreeMap<String, &'static str> {
        lock(&self.shared.peers).clone()
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
        let others: Vec<_> = lock(&shared.others).values().cloned().collect();
        let wires = || others.iter().flat_map(|totals| &totals.wires);
        let sent: u64 = shared.wires.iter().map(|w| count(&w.bytes_sent)).sum();
        let received: u64 = shared.wires.iter().map(|w| count(&w.bytes_received)).sum();
        let mismatches: u64 = others.iter().map(|totals| totals.checksum_mismatches).sum();
        TransceiverStats {
            connections: shared.connections.load(Ordering::Relaxed),
            leases_held: held(&shared.leases_held),
            leases_serving: held(&shared.leases_serving),
            fetches_held: held(&shared.fetches_held),
            pages_quarantined: held(&shared.pages_quarantined),
            leases_delivered: count(&shared.leases_delivered),
            leases_expired: count(&shared.leases_expired),
            leases_cancelled: count(&shared.leases_cancelled),
            fetches_succeeded: count(&shared.fetches_succeeded),
            fetches_failed: count(&shared.fetches_failed),
            checksum_mismatches: count(&shared.checksum_mismatches) + mismatches,
            bytes_sent: sent + wires().map(|wire| wire.bytes_sent).sum::<u64>(),
            bytes_received: received + wires().map(|wire| wire.bytes_received).sum::<u64>(),
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
        };
        counter.fetch_add(amount, Ordering::Relaxed);
    }

    /// Notes payload bytes handed to a transport.
    pub(super) fn sent(&self, wire: Option<usize>, bytes: u64) {
        if let Some(wire) = wire.and_then(|wire| self.shared.wires.get(wire)) {
            wire.bytes_sent.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Notes over what KV goes to or comes from an instance; says so when that is news.
    pub(super) fn goes_to(&self, instance: &str, transport: &'static str) {
        let mut peers = lock(&self.shared.peers);
        if peers.get(instance) == Some(&transport)
            || (peers.len() >= PEERS_MAX && !peers.contains_key(instance))
        {
            return;
        }
        peers.insert(instance.to_owned(), transport);
        tracing::info!(peer = instance, transport, "kv goes over this transport");
    }

    pub(super) fn fetched(&self, wire: usize, bytes: u64, elapsed: Duration) {
        let shared = &*self.shared;
        shared.fetches_succeeded.fetch_add(1, Ordering::Relaxed);
        if let Some(wire) = shared.wires.get(wire) {
            wire.bytes_received.fetch_add(bytes, Ordering::Relaxed);
            wire.fetches.fetch_add(1, Ordering::Relaxed);
        }
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

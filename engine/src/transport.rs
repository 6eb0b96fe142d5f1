//! What moves bytes between instances: one trait that fits a two-sided stream and a one-sided fabric alike.
//!
//! The life cycle is that of one-sided libraries (register, connect, write, notify, complete, deregister); a
//! stream plays it by naming the remote region in each frame. A transport knows nothing of leases or requests: those
//! belong to [`crate::transceiver`]. It may sum what it copies, and leaves it to the transceiver to compare. It moves
//! pages that it owns and never copies them.
//!
//! Invariant: a page that a peer may still write is inside the transport and nowhere else.

use std::fmt::{self, Debug, Display};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::page::Page;
use crate::page::arena::ForeignAllocator;
pub use fabric::FabricError;
pub use runs::{Run, Runs, RunsError};
pub use sources::{SharedPages, Sources};

pub mod checksum;
pub mod cuda_ipc;
pub(crate) mod fabric;
pub mod fault;
pub mod link;
pub mod mpi;
pub mod nixl;
pub(crate) mod numbered;
pub mod runs;
pub mod shm;
mod sources;
pub mod staging;
pub mod tcp;
pub mod ucx;
pub(crate) mod vigil;
pub mod windowed;

#[cfg(test)]
pub(crate) mod conformance;
#[cfg(test)]
pub(crate) mod memory;
#[cfg(test)]
mod processes;

/// Where pages may live for a transport to move them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// Ordinary memory of the process.
    Host,
    /// Memory of an accelerator.
    Device,
}

/// Who takes part in a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sides {
    /// The fabric writes remote memory; the remote process only hears of it.
    One,
    /// The remote process reads a stream into the region.
    Two,
}

/// Which peers a transport reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Peers of the same host only.
    SameHost,
    /// Any host that the network reaches.
    AnyHost,
}

/// What a transport can do. Selection and tests look at this, never at a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    /// Name in configs, logs and metrics.
    pub name: &'static str,
    /// Memory that it moves without a detour.
    pub memory: &'static [MemoryKind],
    /// Who takes part in a write.
    pub sides: Sides,
    /// Which peers it reaches.
    pub reach: Reach,
    /// What one peer may expect, in bytes a second; ranks the candidates, promises nothing.
    pub bandwidth_estimate: u64,
    /// Longest message that [`Transport::notify`] takes.
    pub message_bytes_max: usize,
    /// Longest note that a [`Write`] may carry.
    pub note_bytes_max: usize,
}

/// How a peer is reached over one transport; travels inside the hand-off's ticket.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointRecord {
    /// [`Capability::name`] of the transport that can use it.
    pub transport: String,
    /// For people and for stream transports: `host:port`.
    pub address: String,
    /// What else the transport needs (agent metadata, worker addresses), hexadecimal; empty for streams.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub metadata: String,
}

/// A connection to a peer, unique within this process's life, whichever transports it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(pub u64);

/// A registered page, unique within this process's life, whichever transports it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub u64);

/// Groups the writes of one hand-off, so that they can be cancelled together. Chosen by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TransferId(pub u64);

/// One counter for all kinds of ids, so that a number in a log means one thing.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl PeerId {
    /// One that nobody had before.
    pub(crate) fn fresh() -> Self {
        Self(NEXT_ID.fetch_add(1, Ordering::Relaxed))
    }
}

impl RegionId {
    /// The first of so many in a row that nobody had before; of none, one that nobody has.
    pub(crate) fn fresh_row(count: usize) -> Self {
        Self(NEXT_ID.fetch_add(count.max(1) as u64, Ordering::Relaxed))
    }
}

impl Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "peer {}", self.0)
    }
}

impl Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What a peer must know to write a region; meaningless to anyone but the transport that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteRegion {
    /// The region's size.
    pub bytes: u64,
    /// Its number: one more than that of the region registered with it before.
    pub id: u64,
    /// Nobody can guess it. Regions that were registered together have the same: who is told of one of them is told of all.
    pub key: u64,
}

/// A registration.
#[derive(Debug)]
pub struct Region {
    /// Names it in later calls and events.
    pub id: RegionId,
    /// For the peer that shall write it.
    pub remote: RemoteRegion,
}

impl Region {
    /// The one with this number.
    pub(crate) const fn numbered(id: u64, key: u64, bytes: u64) -> Self {
        Self {
            id: RegionId(id),
            remote: RemoteRegion { bytes, id, key },
        }
    }
}

/// Regions that were registered together: of one size, with one key, and numbers in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registration {
    /// The first one's. Of none at all, its number is nobody's.
    pub first: RemoteRegion,
    /// How many there are.
    pub count: usize,
}

impl Registration {
    /// Each of them, in order.
    pub fn regions(self) -> impl Iterator<Item = Region> {
        let RemoteRegion { bytes, id, key } = self.first;
        (id..)
            .take(self.count)
            .map(move |id| Region::numbered(id, key, bytes))
    }

    /// The number of the one with this index.
    #[must_use]
    pub const fn id(&self, index: usize) -> RegionId {
        RegionId(self.first.id + index as u64)
    }
}

/// Pages that could not be registered, given back.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct RegisterRefused {
    /// The pages, untouched.
    pub pages: Vec<Page>,
    /// What stood against it.
    pub reason: String,
}

/// What became of a page whose region was given up.
#[derive(Debug)]
pub enum Deregistered {
    /// Nothing can write it any more.
    Now(Page),
    /// A write may be under way. The page comes with [`TransportEvent::PageReleased`] when the transport is sure.
    Later,
    /// There is no such region: never registered, or given up before.
    Unknown,
}

/// What a writer tells with a row of pieces. A short one, as there are thousands a second, takes no memory of its own.
pub type Note = SmallVec<[u8; NOTE_BYTES_SHORT]>;

/// Of a [`Note`] that takes no memory of its own.
const NOTE_BYTES_SHORT: usize = 40;

/// Pages of one [`Write`] at most.
pub const ROW_PAGES_MAX: usize = 64;

/// A row of pieces on its way: the same stretches of each of some shared pages, to those of as many remote regions whose numbers
/// follow each other. Mostly a row of one; but pieces of some kilobytes are so many that each for itself would cost more than its bytes.
#[derive(Debug, Clone)]
pub struct Write {
    /// To whom.
    pub peer: PeerId,
    /// Part of which transfer.
    pub transfer: TransferId,
    /// Read until [`TransportEvent::WriteDone`]; the references are dropped before that event. One, or where the runs carry something up
    /// to [`ROW_PAGES_MAX`], and all in the host's memory or all on a device.
    pub sources: Sources,
    /// Where the first one goes.
    pub target: RemoteRegion,
    /// Which bytes of a source go where in its target.
    pub runs: Runs,
    /// Given to the peer with [`TransportEvent::Landed`], once the bytes are in place.
    pub note: Note,
    /// Where in the note the transport puts the pieces' [`checksum`]s, of eight bytes each, little-endian; only for pages in the host's
    /// memory, and where [`Transport::sums_writes`].
    pub sum_at: Option<usize>,
}

impl Write {
    /// Bytes of all of its pieces.
    pub(crate) fn total_bytes(&self) -> usize {
        self.sources.len().saturating_mul(self.runs.total_bytes())
    }

    /// Whether its pages are on a device.
    pub(crate) fn is_on_device(&self) -> bool {
        self.sources.is_on_device()
    }

    /// Whether it has as many pages as it may, of one kind of memory, and their stretches lie within them.
    pub(crate) fn is_sound(&self) -> bool {
        let pages_max = if self.runs.total_bytes() > 0 {
            ROW_PAGES_MAX
        } else {
            1
        };
        (1..=pages_max).contains(&self.sources.len()) && self.sources.are_sound(&self.runs)
    }

    /// Every stretch of its sources, in order.
    pub(crate) fn stretches(&self) -> impl Iterator<Item = (&Arc<Page>, Range<usize>)> {
        let ranges = |page| self.runs.stretches().map(move |(range, _)| (page, range));
        self.sources.iter().flat_map(ranges)
    }
}

/// What was found of each piece of a row, mostly of one; empty where nothing was of any.
pub type Found = SmallVec<[Option<u64>; 1]>;

/// Whether a transport took something over. Back-pressure is a status, not an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Submission {
    /// It will be carried out, or completed with a failure.
    Accepted,
    /// The peer's queue is full. Nothing was kept; for a write, a [`TransportEvent::WriteDone`] of this peer will come.
    Busy,
    /// The peer is not connected. Nothing was kept; its [`TransportEvent::PeerLost`] comes or came.
    Gone,
    /// The caller broke the contract (no page or too many, runs outside of one, note too long). Nothing was kept.
    Invalid,
}

/// How a write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteOutcome {
    /// The source is no longer needed. Whether the bytes landed is for the peer to say.
    Sent,
    /// [`Transport::cancel`] came first.
    Cancelled,
    /// The peer was lost first.
    Lost,
}

/// What a transport reports. Per peer, in the order in which it happened.
#[derive(Debug)]
pub enum TransportEvent {
    /// A message came. The peer may be one that connected to us; it can be answered.
    Message {
        /// From whom.
        peer: PeerId,
        /// What.
        message: Vec<u8>,
    },
    /// A peer's write is in place; the transport no longer touches those bytes.
    Landed {
        /// Whose write.
        peer: PeerId,
        /// Into which region; further pieces into those whose numbers follow.
        region: RegionId,
        /// How many pieces it is.
        count: usize,
        /// Which bytes of each of the writer's pages came to lie where.
        runs: Runs,
        /// The writer's transfer.
        transfer: TransferId,
        /// The writer's note.
        note: Note,
        /// For each piece, [`checksum`] as it lies here, its stretches in the order of the runs, where the transport has made it
        /// with the bytes at hand; otherwise it is still to be made.
        checksums: Found,
        /// For each piece, [`crate::page::fold`] as it lies on its device, where that has made it with the bytes at hand.
        folds: Found,
    },
    /// A write of ours is over and its source is not referenced any more.
    WriteDone {
        /// To whom.
        peer: PeerId,
        /// Its transfer.
        transfer: TransferId,
        /// How.
        outcome: WriteOutcome,
    },
    /// A page given up earlier is free: the end of its quarantine.
    PageReleased {
        /// The region that it was.
        region: RegionId,
        /// The page; its content is in doubt.
        page: Page,
    },
    /// A peer is gone: all its writes are done, none of its writes is under way, no event of it follows.
    PeerLost {
        /// Which.
        peer: PeerId,
        /// What was observed.
        reason: String,
    },
}

impl TransportEvent {
    /// Whether it is the end of a write of this transfer.
    pub(crate) fn is_done_of(&self, to: PeerId, of: TransferId) -> bool {
        matches!(self, Self::WriteDone { peer, transfer, .. } if (*peer, *transfer) == (to, of))
    }
}

/// Where events go, in order, and together those that came together: called from the transport's threads, never from
/// within a call of [`Transport`].
pub type TransportSink = Arc<dyn Fn(Vec<TransportEvent>) + Send + Sync>;

/// Why an endpoint cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The record is for another transport or not well-formed.
    #[error("endpoint `{0}` is not one of this transport")]
    Record(String),
    /// As many peers as are allowed are connected.
    #[error("already connected to {0} peers")]
    TooMany(usize),
    /// The transport was closed.
    #[error("the transport is closed")]
    Closed,
    /// The system gives no more threads.
    #[error("cannot start a thread: {0}")]
    Thread(String),
}

/// Moves pages between processes.
///
/// The contract, which `conformance` holds every implementation to:
///
/// - *No call waits on a peer.* What takes time ends in an event. Every wait inside has a deadline.
/// - *Pages.* [`register`](Self::register) takes pages in. Each comes out exactly once: at
///   [`deregister`](Self::deregister) when no write of it is under way, otherwise in
///   [`TransportEvent::PageReleased`], at the latest when the writing peer is lost. A writer whose region is
///   gone writes nowhere, of a row none of it is told to have landed; it is not told. Writes to one region are carried out one
///   after the other.
/// - *Peers.* [`connect`](Self::connect) starts; what is submitted meanwhile waits, bounded. It fails as it
///   ends: with exactly one `PeerLost`. A peer that connects to us shows itself by its first event, and its
///   [`PeerId`] can be written to and notified: the connecting side brings what the transport needs for that.
///   A peer that stops taking or sending bytes is lost after a bounded silence, not only when the system says so.
/// - *Writes.* Each accepted write gets exactly one `WriteDone`, after the source was let go. Writes of a peer
///   are carried out in order. Messages may overtake writes, so nobody infers from a message that bytes landed.
/// - *Trust.* Nothing that a peer sends panics, allocates more than it sent plus a small constant, or reaches
///   memory outside the regions whose key it holds.
pub trait Transport: Debug + Send + Sync {
    /// What it can do.
    fn capability(&self) -> &Capability;

    /// What the bytes of the peer connected last go over, in the library's own words; `None` until it is known, and where
    /// that is plain from the endpoint.
    fn wire(&self) -> Option<String> {
        None
    }

    /// Whether it makes the checksum of what it writes, if it is asked to: it reads the bytes anyway, and then has them in a
    /// core's cache.
    fn sums_writes(&self) -> bool {
        false
    }

    /// Allocates memory that peers read faster than any other; none where all memory is alike.
    fn allocator(&self) -> Option<ForeignAllocator> {
        None
    }

    /// How peers reach this process.
    fn endpoint(&self) -> EndpointRecord;

    /// Whether a process with this endpoint can probably be reached from here, judged without asking it: the same
    /// host, where that matters, and the same kind of transport. For choosing among endpoints, before connecting.
    fn reaches(&self, endpoint: &EndpointRecord) -> bool;

    /// Starts connecting; gives up at the deadline.
    ///
    /// # Errors
    /// When the record is not usable at all; what the network says comes as `PeerLost`.
    fn connect(&self, endpoint: &EndpointRecord, deadline: Instant)
    -> Result<PeerId, ConnectError>;

    /// Ends a connection now, whatever is under way. `PeerLost` follows.
    fn disconnect(&self, peer: PeerId);

    /// Takes pages in, to be written by the peers that learn their key. They are of one size, which is that of the
    /// first one: a shorter one takes no more than it has room for. Their regions come in the same order.
    ///
    /// # Errors
    /// With all of the pages, when they cannot be registered.
    fn register(&self, pages: Vec<Page>) -> Result<Registration, RegisterRefused>;

    /// Gives a region up.
    fn deregister(&self, region: RegionId) -> Deregistered;

    /// Has nobody write these regions any more, from the first one on, as if they were given up; their pages stay with the transport. False,
    /// and nothing has changed, when one of them is being written at this moment, or is none.
    fn seal(&self, first: RegionId, count: usize) -> bool;

    /// Gives all regions up that were registered together, of which this is the first one. Their pages in order; nothing, and nothing
    /// has changed, when one of them was given up before, or a write of it may be under way.
    fn reclaim(&self, first: RegionId) -> Option<Vec<Page>>;

    /// Submits a row of pieces.
    fn write(&self, write: Write) -> Submission;

    /// Submits rows of pieces to one peer, in order, until one is not accepted. Returns how many were, and what became of the last one
    /// that was tried.
    fn write_all(&self, _peer: PeerId, writes: Vec<Write>) -> (usize, Submission) {
        let mut accepted = 0;
        for write in writes {
            match self.write(write) {
                Submission::Accepted => accepted += 1,
                refused => return (accepted, refused),
            }
        }
        (accepted, Submission::Accepted)
    }

    /// Submits a message.
    fn notify(&self, peer: PeerId, message: Vec<u8>) -> Submission;

    /// Something is about to be asked of a peer: who will have to do with it, here and there, may wake up meanwhile. Nothing depends
    /// on it.
    fn rouse(&self, peer: PeerId) {
        let _ = peer;
    }

    /// Drops a transfer's writes that have not started; one that has is finished. Each still gets its `WriteDone`.
    fn cancel(&self, peer: PeerId, transfer: TransferId);

    /// Ends every connection and stops listening, without waiting. Messages submitted before still go out, to peers
    /// that take them; writes that have not started do not. All pages that are being written and all `WriteDone`
    /// and `PeerLost` follow; idle regions stay until given up.
    fn close(&self);
}

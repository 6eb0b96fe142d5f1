//! Reading a peer's memory: what a one-sided library, or the kernel of a shared host, has to offer to the control
//! plane of [`super::link`].
//!
//! Only pulling: the side that owns the target asks for the bytes, so nobody remote ever writes our memory, and the
//! end of a quarantine is local knowledge. What protects the source is the lease at its owner; a source that was let
//! go and changed meanwhile is found out by the checksum that was made when it was offered.
//!
//! A fabric knows arenas, addresses and bytes. Connections, greetings, silence, queues, regions, transfers and
//! acknowledgements are the control plane's; a fabric never calls back.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::Capability;
use super::runs::Runs;
use super::staging::Staging;
use crate::page::Page;
use crate::page::arena::{Arena, ForeignAllocator};

/// What makes an exported arena readable for a peer, in the fabric's own form; opaque to everyone else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ArenaKey(pub(crate) Vec<u8>);

/// Longest [`Fabric::address`] that is carried.
pub(crate) const ADDRESS_BYTES_MAX: usize = 64 << 10;

/// Longest [`ArenaKey`] that is carried.
pub(crate) const KEY_BYTES_MAX: usize = 64 << 10;

/// What suits a fabric. The control plane arranges its jobs accordingly where it can, and says so where it cannot:
/// a read that does not follow these terms is slow, not wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FabricTerms {
    /// Stretches shorter than this on average are gathered by the writer, and scattered by the reader, through staging
    /// memory. 0 where the fabric copies short stretches as well as anyone.
    pub(crate) stretch_bytes_min: usize,
    /// Whether targets that are in no arena go through staging memory, which is in one.
    pub(crate) target_in_arena: bool,
    /// Bytes that one call of [`FabricPeer::read`] is given at most, if it has more than one job.
    pub(crate) batch_bytes_max: usize,
    /// Whether a batch is shorter than it could be towards the end of what waits, so that little is left to be done behind the last one.
    pub(crate) tapers: bool,
    /// Whether a read may be begun while the one before it is under way. Else [`FabricPeer::begin`] reads, and waits.
    pub(crate) reads_ahead: bool,
}

/// An imported arena: what [`FabricPeer::import`] gave, for [`ReadJob::from`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RemoteArena {
    /// The fabric's own number for it; unique per [`FabricPeer`].
    pub(crate) handle: u64,
    /// Its length. The control plane lets no job begin whose source ends beyond it.
    pub(crate) bytes: u64,
    /// Whether it is memory of a device.
    pub(crate) on_device: bool,
}

/// One piece to read.
#[derive(Debug)]
pub(crate) struct ReadJob<'a> {
    /// Where from.
    pub(crate) from: RemoteArena,
    /// Where its source begins within the remote arena. So the pieces of a row share their runs.
    pub(crate) offset: usize,
    /// Source offsets count from there, target offsets are within the page; both were checked.
    pub(crate) runs: &'a Runs,
    /// Where to. It may be in an arena of ours ([`Page::arena`]), exported or not, or in none.
    pub(crate) page: &'a mut Page,
    /// Whether a checksum is wanted.
    pub(crate) sum: bool,
    /// [`TransportEvent::Landed`](super::TransportEvent::Landed)'s checksum, where the fabric makes it as it reads.
    pub(crate) checksum: Option<u64>,
}

impl<'a> ReadJob<'a> {
    /// A job to be carried out, whose source begins where the remote arena does.
    pub(crate) const fn new(from: RemoteArena, runs: &'a Runs, page: &'a mut Page) -> Self {
        Self {
            from,
            offset: 0,
            runs,
            page,
            sum: true,
            checksum: None,
        }
    }

    /// The same of a source that begins here.
    pub(crate) const fn at(self, offset: usize) -> Self {
        Self { offset, ..self }
    }

    /// Every stretch as its range in the remote arena and its range in the page, in order. What ends beyond all that can be
    /// counted ends at the last number, which is in no arena.
    pub(crate) fn stretches(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + use<'a> {
        let offset = self.offset;
        self.runs.stretches().map(move |(source, target)| {
            let (start, end) = (source.start, source.end);
            let source = offset.saturating_add(start)..offset.saturating_add(end);
            (source, target)
        })
    }

    /// Whether every stretch lies within an arena and a page of these lengths.
    pub(crate) fn fits(&self, arena_bytes: usize, page_bytes: usize) -> bool {
        let left = arena_bytes.checked_sub(self.offset);
        left.is_some_and(|left| self.runs.fits(left, page_bytes))
    }
}

/// What went wrong. Every one of them ends the connection for which it happened, with this text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FabricError {
    /// The peer's address or key is not of this fabric, or damaged.
    #[error("{fabric}: {what} not understood: {detail}")]
    Malformed {
        /// Its name.
        fabric: &'static str,
        /// `address` or `arena key`.
        what: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// The peer cannot be reached this way: another host, another user, no route.
    #[error("{fabric}: cannot reach the peer's memory: {detail}")]
    Unreachable {
        /// Its name.
        fabric: &'static str,
        /// What was observed.
        detail: String,
    },
    /// Memory of ours could not be registered or mapped.
    #[error("{fabric}: cannot register memory: {detail}")]
    Memory {
        /// Its name.
        fabric: &'static str,
        /// What was observed.
        detail: String,
    },
    /// The library or the system failed a read.
    #[error("{fabric}: read failed: {detail}")]
    Read {
        /// Its name.
        fabric: &'static str,
        /// What was observed.
        detail: String,
    },
    /// The deadline came first.
    #[error("{fabric}: read not done in time")]
    TimedOut {
        /// Its name.
        fabric: &'static str,
    },
    /// The caller's flag came first, or the fabric was closed.
    #[error("{fabric}: read given up")]
    Cancelled {
        /// Its name.
        fabric: &'static str,
    },
}

/// A way to read the memory of other processes.
///
/// The contract:
///
/// - *Threads.* Every method may be called from any thread, several at once. What the library wants done on one thread
///   (progress) the implementation does on a thread of its own, which it joins when dropped.
/// - *Waiting.* Only [`open`](Self::open), [`FabricPeer::import`] and [`FabricPeer::read`] may wait on a peer: the first
///   and the last until their deadline, `import` for as long as `open` may.
/// - *Trust.* Addresses and keys come from peers. Whatever they hold ends in a handle or in an error; it makes nobody
///   panic, allocate more than it is long plus a small constant, or read or write memory outside of what the peer
///   exported and the page that was given.
pub(crate) trait Fabric: Debug + Send + Sync {
    /// What it can do; its name is the transport's.
    fn capability(&self) -> &Capability;

    /// What suits it.
    fn terms(&self) -> FabricTerms;

    /// What the bytes of the peer opened last go over, in the library's own words; `None` until it is known, and where the
    /// fabric's name says all.
    fn wire(&self) -> Option<String> {
        None
    }

    /// Where pages of a device are gathered before peers read them, for those that have a [`Fabric::window_of`]; none where
    /// they are read where they lie, or not at all.
    fn windows(&self) -> Option<&Arc<Staging>> {
        None
    }

    /// How much a process with this address reads of a window at once; none when it reads no windows.
    fn window_of(&self, address: &[u8]) -> Option<usize> {
        let _ = address;
        None
    }

    /// Allocates memory that peers read faster than any other; none where all memory is alike.
    fn allocator(&self) -> Option<ForeignAllocator> {
        None
    }

    /// For the peer's [`open`](Self::open): at most [`ADDRESS_BYTES_MAX`]. It does not change while the fabric lives.
    fn address(&self) -> Vec<u8>;

    /// Whether a process with this address can probably be read from here, judged without asking it. A false yes costs
    /// a connection that fails; a false no costs the better wire.
    fn reaches(&self, address: &[u8]) -> bool;

    /// Makes an arena readable for every peer; at most [`KEY_BYTES_MAX`]. Idempotent. The fabric keeps the arena until
    /// it is closed.
    ///
    /// # Errors
    /// When it cannot be registered; the control plane then sends that arena's bytes through its stream.
    fn export(&self, arena: &Arc<Arena>) -> Result<ArenaKey, FabricError>;

    /// Prepares reading from the process that has this address.
    ///
    /// # Errors
    /// When it cannot be reached before the deadline, or the address makes no sense.
    fn open(&self, address: &[u8], deadline: Instant) -> Result<Box<dyn FabricPeer>, FabricError>;

    /// Gives up every read that is under way, soon; later ones fail. Does not wait.
    fn close(&self);
}

/// One peer whose memory can be read. Dropping it forgets the peer and what was imported.
pub(crate) trait FabricPeer: Debug + Send {
    /// Makes an arena that the peer exported known here.
    ///
    /// # Errors
    /// When the key makes no sense or the memory cannot be attached.
    fn import(&mut self, key: &[u8]) -> Result<RemoteArena, FabricError>;

    /// Reads all jobs. When it returns, whatever the result, nothing writes any of the pages any more; after an
    /// error their contents are in doubt. `cancelled` is looked at often enough to return within a fraction of a second.
    /// The pages are distinct; the jobs may be carried out in any order, but all are done when it returns `Ok`.
    ///
    /// # Errors
    /// The first thing that went wrong, with any of them.
    fn read(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError>;

    /// Begins to read all jobs, as [`FabricPeer::read`] does; what was begun before may still be under way. Whoever calls keeps
    /// the pages to himself until as many calls of [`FabricPeer::finish`] have returned. After an error nothing of these jobs is
    /// under way, and no such call is due.
    ///
    /// # Errors
    /// As [`FabricPeer::read`].
    fn begin(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        self.read(jobs, deadline, cancelled)
    }

    /// Waits for the first of the reads that were begun: nothing writes its pages any more when it returns. Adds to `folds`, for
    /// each of its jobs, the checksum ([`crate::page::fold`]) of what lies on a device, where that made it as it copied; or nothing
    /// at all.
    /// `cancelled` is looked at as in [`FabricPeer::read`].
    ///
    /// # Errors
    /// The first thing that went wrong with it.
    fn finish(
        &mut self,
        cancelled: &AtomicBool,
        folds: &mut Vec<Option<u64>>,
    ) -> Result<(), FabricError> {
        let _ = (cancelled, folds);
        Ok(())
    }

    /// Reads come within a millisecond, and none is under way: whatever has fallen asleep between there and here may wake up. It
    /// touches no page and no arena; what it begins is waited for with the next read, or with the end.
    ///
    /// # Errors
    /// When the wire is found broken.
    fn rouse(&mut self) -> Result<(), FabricError> {
        Ok(())
    }
}

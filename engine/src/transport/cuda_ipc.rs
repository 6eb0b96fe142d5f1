//! CUDA IPC: the fabric between the memories of GPUs of one host. A peer maps our arena, and reads it over NVLink or PCIe.
//!
//! One kernel gathers all pieces of a batch out of the peer's memory straight into our pages; nothing is staged. An arena is
//! one allocation, hence one handle, mapped once by each peer. Whether that works between two processes is found out, not
//! guessed: an address carries the handle of a small allocation with a random content, and opening a peer reads that.
//! The host's memory is not this fabric's; the control plane takes such pages through its stream.
//!
//! Peers of this very process share its address space, so no handle is opened for them (the driver would refuse).
//!
//! What is absent: calling a read off. A kernel ends within milliseconds, or the driver ends it; so batches are short, and the
//! deadline and the flag are looked at between them. A peer that dies while it is read leaves its memory to the driver, which keeps
//! what is mapped. Invariant: a job reaches no byte outside the mapping, whose length the driver told, and its page.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Instant;

use super::fabric::{ArenaKey, Fabric, FabricError, FabricPeer, FabricTerms, ReadJob, RemoteArena};
use super::link::{self, LinkParams, LinkStartError, LinkTransport};
use super::staging::{StagingSize, plain_shape};
use super::{Capability, MemoryKind, Reach, Runs, Sides, TransportSink};
use crate::backend::cuda::{
    CudaError, HANDLE_BYTES, Move, Mover, READS_AT_ONCE, cuda_arena, device_count, device_pages,
};
use crate::page::Page;
use crate::page::arena::Arena;

/// What CUDA IPC can do. The estimate is that of two GPUs on NVLink.
pub const CAPABILITY: Capability = Capability {
    name: "cuda_ipc",
    memory: &[MemoryKind::Device],
    sides: Sides::One,
    reach: Reach::SameHost,
    bandwidth_estimate: 300_000_000_000,
    message_bytes_max: link::MESSAGE_BYTES_MAX,
    note_bytes_max: link::NOTE_BYTES_MAX,
};

/// Bytes of one read, a third of a millisecond between two H100: a gigabyte in batches of 16 MiB is copied and summed at 332 GB/s, of
/// 64 MiB at 359, of 128 MiB at 364, in one at 372.
const BATCH_BYTES_MAX: usize = 128 << 20;

/// Of the boot id and of the probe's content.
const SECRET_BYTES: usize = 16;

/// Bytes of a probe: so many that each of the links between two GPUs carries some. The content is one link's.
const PROBE_BYTES: usize = 1 << 20;

/// Bytes of an address: boot id, secret, process, and the probe's key.
const ADDRESS_BYTES: usize = 3 * SECRET_BYTES + KEY_BYTES;

/// Bytes of a key: handle, arena number, length.
const KEY_BYTES: usize = HANDLE_BYTES + 2 * 8;

/// Whether this machine has what it takes.
///
/// # Errors
/// When there is no GPU, or no driver.
pub fn probe() -> Result<(), CudaError> {
    device_count().map(drop)
}

/// Starts the transport, for pages on this device.
///
/// # Errors
/// When the device cannot be used, or the address cannot be bound.
pub fn start(
    ordinal: usize,
    params: LinkParams,
    sink: TransportSink,
) -> Result<LinkTransport, LinkStartError> {
    let fabric = Arc::new(CudaFabric::new(ordinal)?);
    // Pages of the host take the stream, so there is nothing to stage.
    let staging = StagingSize {
        slots: 0,
        ..params.staging
    };
    LinkTransport::over(fabric, LinkParams { staging, ..params }, sink)
}

/// Arenas of this process that peers in it may read, by number.
static OWN: Mutex<Option<HashMap<u64, Weak<Arena>>>> = Mutex::new(None);

/// Tells this process from all others.
fn process() -> [u8; SECRET_BYTES] {
    static PROCESS: OnceLock<[u8; SECRET_BYTES]> = OnceLock::new();
    *PROCESS.get_or_init(|| uuid::Uuid::new_v4().into_bytes())
}

fn boot_id() -> io::Result<[u8; SECRET_BYTES]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let id = uuid::Uuid::try_parse(text.trim()).map_err(io::Error::other)?;
    Ok(id.into_bytes())
}

/// What an arena is to its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    handle: [u8; HANDLE_BYTES],
    /// In the process that has it.
    number: u64,
    bytes: u64,
}

impl Key {
    fn of(arena: &Arc<Arena>) -> Result<Self, FabricError> {
        let memory = |detail: String| FabricError::Memory {
            fabric: CAPABILITY.name,
            detail,
        };
        let on_device = cuda_arena(arena).ok_or_else(|| memory("it is in no GPU".to_owned()))?;
        let handle = on_device.handle();
        let key = Self {
            handle: handle.map_err(|error| memory(error.to_string()))?,
            number: arena.id(),
            bytes: arena.bytes() as u64,
        };
        let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
        let own = own.get_or_insert_default();
        own.retain(|_, arena| arena.strong_count() > 0);
        own.insert(key.number, Arc::downgrade(arena));
        Ok(key)
    }

    fn encode(&self) -> Vec<u8> {
        let words = [self.number, self.bytes].map(u64::to_le_bytes);
        [&self.handle[..], words.as_flattened()].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; KEY_BYTES] = bytes.try_into().ok()?;
        let (&handle, rest) = bytes.split_first_chunk()?;
        let (words, []) = rest.as_chunks::<8>() else {
            return None;
        };
        Some(Self {
            handle,
            number: u64::from_le_bytes(words[0]),
            bytes: u64::from_le_bytes(words[1]),
        })
    }

    /// The arena itself, where it is one of this process that was exported.
    fn own(&self) -> Option<Arc<Arena>> {
        let own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
        own.as_ref()?.get(&self.number)?.upgrade()
    }
}

/// An address, read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Address {
    /// Of the kernel's start: another one is another host.
    boot: [u8; SECRET_BYTES],
    secret: [u8; SECRET_BYTES],
    process: [u8; SECRET_BYTES],
    probe: Key,
}

impl Address {
    fn encode(&self) -> Vec<u8> {
        let probe = self.probe.encode();
        [&self.boot[..], &self.secret, &self.process, &probe].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; ADDRESS_BYTES] = bytes.try_into().ok()?;
        let (&boot, rest) = bytes.split_first_chunk()?;
        let (&secret, rest) = rest.split_first_chunk()?;
        let (&process, rest) = rest.split_first_chunk()?;
        Some(Self {
            boot,
            secret,
            process,
            probe: Key::decode(rest)?,
        })
    }
}

fn malformed(what: &'static str) -> FabricError {
    FabricError::Malformed {
        fabric: CAPABILITY.name,
        what,
        detail: "not of this version".to_owned(),
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the shape that map_err wants"
)]
fn unreachable(detail: impl ToString) -> FabricError {
    FabricError::Unreachable {
        fabric: CAPABILITY.name,
        detail: detail.to_string(),
    }
}

/// The fabric.
#[derive(Debug)]
struct CudaFabric {
    ordinal: usize,
    address: Address,
    /// Keeps the probe's memory.
    _probe: Page,
    /// Keeps the arenas that peers were told of.
    exported: Mutex<HashMap<u64, Arc<Arena>>>,
    closed: Arc<AtomicBool>,
}

impl CudaFabric {
    fn new(ordinal: usize) -> Result<Self, FabricError> {
        let memory = |error: io::Error| FabricError::Memory {
            fabric: CAPABILITY.name,
            detail: error.to_string(),
        };
        let secret = uuid::Uuid::new_v4().into_bytes();
        let mut probe = probe_page(ordinal).map_err(memory)?;
        probe.write(0, &secret).map_err(memory)?;
        let (arena, _) = probe.arena().ok_or_else(|| malformed("arena"))?;
        let address = Address {
            boot: boot_id().map_err(memory)?,
            secret,
            process: process(),
            probe: Key::of(arena)?,
        };
        Ok(Self {
            ordinal,
            address,
            _probe: probe,
            exported: Mutex::default(),
            closed: Arc::new(AtomicBool::new(false)),
        })
    }
}

/// A page for a probe, on a device: the secret, and zeros.
fn probe_page(ordinal: usize) -> io::Result<Page> {
    let mut pages = device_pages(ordinal, plain_shape(PROBE_BYTES), 1)?;
    pages.pop().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

impl Fabric for CudaFabric {
    fn capability(&self) -> &Capability {
        &CAPABILITY
    }

    fn terms(&self) -> FabricTerms {
        FabricTerms {
            stretch_bytes_min: 0,
            target_in_arena: false,
            batch_bytes_max: BATCH_BYTES_MAX,
            tapers: true,
            reads_ahead: true,
        }
    }

    fn wire(&self) -> Option<String> {
        Some("this host's GPUs".to_owned())
    }

    fn address(&self) -> Vec<u8> {
        self.address.encode()
    }

    fn reaches(&self, address: &[u8]) -> bool {
        Address::decode(address).is_some_and(|address| address.boot == self.address.boot)
    }

    fn export(&self, arena: &Arc<Arena>) -> Result<ArenaKey, FabricError> {
        let key = Key::of(arena)?;
        let mut exported = self.exported.lock().unwrap_or_else(PoisonError::into_inner);
        exported.insert(arena.id(), Arc::clone(arena));
        Ok(ArenaKey(key.encode()))
    }

    fn open(&self, address: &[u8], _: Instant) -> Result<Box<dyn FabricPeer>, FabricError> {
        let address = Address::decode(address).ok_or_else(|| malformed("address"))?;
        if address.boot != self.address.boot {
            return Err(unreachable("it is on another host"));
        }
        let mut peer = CudaPeer {
            is_own: address.process == process(),
            mover: Mover::open(self.ordinal).map_err(unreachable)?,
            probe: (0, 0),
            found: probe_page(self.ordinal).map_err(unreachable)?,
            rousing: false,
            closed: Arc::clone(&self.closed),
        };
        peer.probe = peer.map(&address.probe)?;
        peer.read_probe().map_err(unreachable)?;
        let mut content = [0; SECRET_BYTES];
        peer.found.read(0, &mut content).map_err(unreachable)?;
        if content == address.secret {
            Ok(Box::new(peer))
        } else {
            Err(unreachable("another process has its handle"))
        }
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

/// A process whose arenas can be mapped.
#[derive(Debug)]
struct CudaPeer {
    /// It is this one.
    is_own: bool,
    mover: Mover,
    /// The mover's number for the peer's probe, and how long that is at most.
    probe: (usize, usize),
    /// What was read of that.
    found: Page,
    /// It is being read once more, to wake the links.
    rousing: bool,
    closed: Arc<AtomicBool>,
}

impl CudaPeer {
    /// Maps an arena: its number for the mover, and how long it is at most.
    fn map(&mut self, key: &Key) -> Result<(usize, usize), FabricError> {
        if self.is_own {
            let arena = key.own().ok_or_else(|| unreachable("no such arena"))?;
            return Ok(self.mover.import_own(arena));
        }
        self.mover.import(key.handle).map_err(unreachable)
    }

    /// Reads the probe, as often as reads may be under way: then nothing of the mover has not been used.
    fn read_probe(&mut self) -> Result<(), CudaError> {
        let mut read = Ok(());
        for _ in 0..READS_AT_ONCE {
            read = read.and_then(|()| self.begin_probe());
        }
        // Whatever was begun is over before anything else begins.
        for _ in 0..READS_AT_ONCE {
            read = read.and(self.mover.finish(&mut Vec::new()));
        }
        read
    }

    fn begin_probe(&mut self) -> Result<(), CudaError> {
        let (from, bytes) = self.probe;
        let runs = Runs::whole(bytes.min(PROBE_BYTES));
        let probe = Move {
            from,
            offset: 0,
            runs: &runs,
            page: &mut self.found,
        };
        self.mover.begin(std::iter::once(probe), true)
    }

    /// Waits for the read that wakes the links, if it is under way.
    fn end_rousing(&mut self) -> Result<(), CudaError> {
        match std::mem::take(&mut self.rousing) {
            true => self.mover.finish(&mut Vec::new()),
            false => Ok(()),
        }
    }
}

impl Drop for CudaPeer {
    fn drop(&mut self) {
        if let Err(error) = self.end_rousing() {
            tracing::debug!(%error, "a gpu was not read to the end");
        }
    }
}

impl FabricPeer for CudaPeer {
    fn import(&mut self, key: &[u8]) -> Result<RemoteArena, FabricError> {
        let key = Key::decode(key).ok_or_else(|| malformed("arena key"))?;
        let (handle, bytes) = self.map(&key)?;
        if key.bytes > bytes as u64 {
            return Err(unreachable("it is shorter than it is said to be"));
        }
        Ok(RemoteArena {
            handle: handle as u64,
            bytes: key.bytes,
            on_device: true,
        })
    }

    fn read(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        self.begin(jobs, deadline, cancelled)?;
        self.finish(cancelled, &mut Vec::new())
    }

    fn begin(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        let fabric = CAPABILITY.name;
        if cancelled.load(Ordering::Acquire) || self.closed.load(Ordering::Acquire) {
            return Err(FabricError::Cancelled { fabric });
        }
        if Instant::now() >= deadline {
            return Err(FabricError::TimedOut { fabric });
        }
        let summed = jobs.iter().any(|job| job.sum);
        let moves = jobs.iter_mut().map(|job| Move {
            // A number that is beyond what can be counted is no arena's.
            from: usize::try_from(job.from.handle).unwrap_or(usize::MAX),
            offset: job.offset,
            runs: job.runs,
            page: &mut *job.page,
        });
        let begun = self.mover.begin(moves, summed);
        // What follows is queued behind it already.
        let roused = self.end_rousing();
        if begun.is_ok() && roused.is_err() {
            // Nothing is under way when this fails. What that says is said already.
            drop(self.mover.finish(&mut Vec::new()));
        }
        begun.and(roused).map_err(failed)
    }

    fn finish(&mut self, _: &AtomicBool, folds: &mut Vec<Option<u64>>) -> Result<(), FabricError> {
        self.mover.finish(folds).map_err(failed)
    }

    /// Links that have carried nothing for 50 ms sleep, and the first read of all of them takes a sixth of a millisecond longer.
    /// That read is this one, while the peer is still being asked; so is the first use of the driver's code, which no cache holds any more.
    /// It is waited for with the next one.
    fn rouse(&mut self) -> Result<(), FabricError> {
        let before = self.end_rousing();
        let begun = before.and_then(|()| self.begin_probe());
        self.rousing = begun.is_ok();
        begun.map_err(failed)
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the shape that map_err wants"
)]
fn failed(error: CudaError) -> FabricError {
    FabricError::Read {
        fabric: CAPABILITY.name,
        detail: error.to_string(),
    }
}

#[cfg(test)]
mod tests;

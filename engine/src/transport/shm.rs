//! Shared memory: the fabric between processes of one host. A peer opens our arena through `/proc` and maps it to read.
//!
//! Who may is for the kernel to say: it lets in those who may inspect this process, mostly the same user. Both must
//! see each other's process numbers, which containers may prevent; so an address carries a probe, a small sealed memory
//! file with a random content, and whoever can read that can read the arenas too. Nothing here waits on the peer: one
//! that is stopped can still be read, and what was mapped stays when it dies.
//!
//! Invariant: a mapping is of a memory file whose size is sealed, was checked, and is never exceeded; so no peer can make
//! a read of ours fault.
#![expect(
    unsafe_code,
    reason = "the bytes of a mapping that another process may write can't be borrowed, only copied"
)]

use std::collections::HashMap;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::checksum::{Summing, announce};
use super::fabric::{ArenaKey, Fabric, FabricError, FabricPeer, FabricTerms, ReadJob, RemoteArena};
use super::link::{self, LinkParams, LinkStartError, LinkTransport};
use super::{Capability, MemoryKind, Reach, Runs, Sides, TransportSink};
use crate::page::arena::Arena;
use crate::page::mapped::{Access, Mapped};

/// What shared memory can do. The estimate is a modest core's copying.
pub const CAPABILITY: Capability = Capability {
    name: "shm",
    memory: &[MemoryKind::Host],
    sides: Sides::One,
    reach: Reach::SameHost,
    bandwidth_estimate: 8_000_000_000,
    message_bytes_max: link::MESSAGE_BYTES_MAX,
    note_bytes_max: link::NOTE_BYTES_MAX,
};

/// Copied between two looks at deadline and cancellation.
const CHUNK_BYTES: usize = 1 << 20;

/// A read of less is not worth a second thread.
const PARALLEL_BYTES_MIN: usize = 8 << 20;

/// Threads that copy for one read at most: few saturate a memory bus.
const COPY_THREADS_MAX: usize = 4;

/// Of the probe's content.
const SECRET_BYTES: usize = 16;

/// Bytes of an address: boot id, secret, then pid, descriptor, device and inode of the probe.
const ADDRESS_BYTES: usize = 2 * SECRET_BYTES + 4 * 8;

/// Bytes of a key: descriptor, device, inode and size.
const KEY_BYTES: usize = 4 * 8;

/// Starts the transport.
///
/// # Errors
/// When the system has no memory files, or the address cannot be bound.
pub fn start(params: LinkParams, sink: TransportSink) -> Result<LinkTransport, LinkStartError> {
    let fabric = Arc::new(ShmFabric::new()?);
    LinkTransport::over(fabric, params, sink)
}

/// A memory file of some process, as others find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    descriptor: u64,
    device: u64,
    inode: u64,
}

impl Place {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            descriptor: u64::try_from(file.as_raw_fd()).map_err(io::Error::other)?,
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    fn is(&self, metadata: &Metadata) -> bool {
        metadata.is_file() && (metadata.dev(), metadata.ino()) == (self.device, self.inode)
    }

    /// Opens it in another process. It is looked at before it is opened, since opening some things has effects.
    fn open(&self, pid: u64) -> io::Result<File> {
        let path = format!("/proc/{pid}/fd/{}", self.descriptor);
        let gone = || io::Error::new(io::ErrorKind::NotFound, "another file has its place");
        if !self.is(&std::fs::metadata(&path)?) {
            return Err(gone());
        }
        let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits())
            .open(path)?;
        // The place may have changed in between.
        if self.is(&file.metadata()?) {
            Ok(file)
        } else {
            Err(gone())
        }
    }
}

/// An address, read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Address {
    /// Of the kernel's start: another one is another host.
    boot: [u8; SECRET_BYTES],
    secret: [u8; SECRET_BYTES],
    pid: u64,
    probe: Place,
}

impl Address {
    fn encode(&self) -> Vec<u8> {
        let Place {
            descriptor,
            device,
            inode,
        } = self.probe;
        let words = [self.pid, descriptor, device, inode].map(u64::to_le_bytes);
        [&self.boot[..], &self.secret, words.as_flattened()].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; ADDRESS_BYTES] = bytes.try_into().ok()?;
        let (&boot, rest) = bytes.split_first_chunk()?;
        let (&secret, rest) = rest.split_first_chunk()?;
        let [pid, descriptor, device, inode] = words(rest)?;
        Some(Self {
            boot,
            secret,
            pid,
            probe: Place {
                descriptor,
                device,
                inode,
            },
        })
    }

    /// Reads the probe: the proof that this process may read that one's files, and that it is that one.
    fn probe(&self) -> io::Result<()> {
        if self.boot != boot_id()? {
            return Err(io::Error::other("it is on another host"));
        }
        let mut found = [0; SECRET_BYTES];
        self.probe.open(self.pid)?.read_exact_at(&mut found, 0)?;
        if found == self.secret {
            Ok(())
        } else {
            Err(io::Error::other("another process has its number"))
        }
    }
}

fn words<const N: usize>(bytes: &[u8]) -> Option<[u64; N]> {
    let (words, []) = bytes.as_chunks::<8>() else {
        return None;
    };
    let words: [[u8; 8]; N] = words.try_into().ok()?;
    Some(words.map(u64::from_le_bytes))
}

fn boot_id() -> io::Result<[u8; SECRET_BYTES]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let id = uuid::Uuid::try_parse(text.trim()).map_err(io::Error::other)?;
    Ok(id.into_bytes())
}

fn malformed(what: &'static str) -> FabricError {
    FabricError::Malformed {
        fabric: CAPABILITY.name,
        what,
        detail: "not of this version".to_owned(),
    }
}

/// The fabric.
#[derive(Debug)]
struct ShmFabric {
    address: Address,
    /// Keeps the probe's place.
    _probe: File,
    /// Keeps the places of the arenas that peers were told.
    exported: Mutex<HashMap<u64, Arc<Arena>>>,
    copy_threads: usize,
    closed: Arc<AtomicBool>,
}

impl ShmFabric {
    fn new() -> Result<Self, FabricError> {
        let memory = |error: io::Error| FabricError::Memory {
            fabric: CAPABILITY.name,
            detail: error.to_string(),
        };
        let secret = uuid::Uuid::new_v4().into_bytes();
        let probe = make_probe(&secret).map_err(memory)?;
        let address = Address {
            boot: boot_id().map_err(memory)?,
            secret,
            pid: u64::from(std::process::id()),
            probe: Place::of(&probe).map_err(memory)?,
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            address,
            _probe: probe,
            exported: Mutex::default(),
            copy_threads: (cores / 2).clamp(1, COPY_THREADS_MAX),
            closed: Arc::new(AtomicBool::new(false)),
        })
    }
}

fn make_probe(secret: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"baton-kv-probe", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(secret)?;
    Ok(file)
}

impl Fabric for ShmFabric {
    fn capability(&self) -> &Capability {
        &CAPABILITY
    }

    fn terms(&self) -> FabricTerms {
        FabricTerms {
            stretch_bytes_min: 0,
            target_in_arena: false,
            // Few for each thread: the peer describes more while they are copied.
            batch_bytes_max: self.copy_threads * PARALLEL_BYTES_MIN,
            tapers: false,
            reads_ahead: false,
        }
    }

    fn wire(&self) -> Option<String> {
        Some("this host's memory".to_owned())
    }

    fn address(&self) -> Vec<u8> {
        self.address.encode()
    }

    fn reaches(&self, address: &[u8]) -> bool {
        Address::decode(address).is_some_and(|address| address.probe().is_ok())
    }

    fn export(&self, arena: &Arc<Arena>) -> Result<ArenaKey, FabricError> {
        let mut exported = self.exported.lock().unwrap_or_else(|e| e.into_inner());
        exported.insert(arena.id(), Arc::clone(arena));
        let file = arena.file().ok_or_else(|| FabricError::Memory {
            fabric: CAPABILITY.name,
            detail: "a library allocated it, so it is in no file".to_owned(),
        })?;
        let place = Place::of(file).map_err(|error| FabricError::Memory {
            fabric: CAPABILITY.name,
            detail: error.to_string(),
        })?;
        let words = [
            place.descriptor,
            place.device,
            place.inode,
            arena.bytes() as u64,
        ];
        Ok(ArenaKey(
            words.map(u64::to_le_bytes).as_flattened().to_vec(),
        ))
    }

    fn open(&self, address: &[u8], _: Instant) -> Result<Box<dyn FabricPeer>, FabricError> {
        let address = Address::decode(address).ok_or_else(|| malformed("address"))?;
        address.probe().map_err(|error| FabricError::Unreachable {
            fabric: CAPABILITY.name,
            detail: error.to_string(),
        })?;
        Ok(Box::new(ShmPeer {
            pid: address.pid,
            arenas: Vec::new(),
            copy_threads: self.copy_threads,
            closed: Arc::clone(&self.closed),
        }))
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

/// A mapping of a peer's arena.
#[derive(Debug)]
struct Mapping(Mapped);

impl Mapping {
    /// Maps a memory file whose size can't change.
    fn new(file: &File, bytes: usize) -> io::Result<Self> {
        let seals = SealFlag::from_bits_retain(fcntl(file, FcntlArg::F_GET_SEALS)?);
        if !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return Err(io::Error::other("its size is not sealed"));
        }
        if file.metadata()?.len() != bytes as u64 {
            return Err(io::Error::other("it has another size"));
        }
        // Where the peer's memory is in huge pages, it is for this mapping too.
        Ok(Self(Mapped::shared(file, bytes, Access::Read)?))
    }

    /// Copies from `offset` on, and sums what it copies. Panics when that is not within the mapping: the jobs were checked.
    fn copy(&self, offset: usize, to: &mut [u8], summing: &mut Summing) {
        let end = offset.checked_add(to.len());
        assert!(
            end.is_some_and(|end| end <= self.0.bytes()),
            "a checked job"
        );
        let from = self.0.start().as_ptr().wrapping_add(offset);
        // SAFETY: the range was just checked against the mapping, whose file is sealed at this size, and which lives as
        // long as `self`; `to` is exclusively ours and of another mapping or of the heap, so they don't overlap. The
        // peer may write what is read, against the protocol; then the bytes are in doubt, which the checksum finds.
        unsafe { summing.copy(from, to) };
    }
}

/// A process whose arenas can be mapped.
#[derive(Debug)]
struct ShmPeer {
    pid: u64,
    /// By handle.
    arenas: Vec<Mapping>,
    copy_threads: usize,
    closed: Arc<AtomicBool>,
}

/// A job that one thread does.
struct Share<'a> {
    from: &'a Mapping,
    /// Where in there the runs' source begins.
    offset: usize,
    runs: &'a Runs,
    page: &'a mut [u8],
    sum: bool,
    checksum: &'a mut Option<u64>,
}

impl Share<'_> {
    /// Has its beginning fetched while another one is copied.
    fn announce(&self) {
        if let Some((source, _)) = self.runs.stretches().next() {
            let at = self.offset.saturating_add(source.start);
            let start = self.from.0.start().as_ptr().wrapping_add(at);
            announce(start, source.len());
        }
    }

    /// Copies, and sums what was copied while it is at hand. Looks whether to go on each time that so many bytes were copied
    /// `since_look`, in this share and those before it.
    fn carry_out(
        self,
        go_on: &(impl Fn() -> Result<(), FabricError> + Sync),
        since_look: &mut usize,
    ) -> Result<(), FabricError> {
        let mut summing = Summing::wanted(self.sum);
        for (source, target) in self.runs.stretches() {
            let mut offset = self.offset.saturating_add(source.start);
            for part in self.page[target].chunks_mut(CHUNK_BYTES) {
                self.from.copy(offset, part, &mut summing);
                offset += part.len();
                *since_look += part.len();
                if *since_look >= CHUNK_BYTES {
                    go_on()?;
                    *since_look = 0;
                }
            }
        }
        *self.checksum = summing.made();
        Ok(())
    }
}

impl ShmPeer {
    fn shares<'a>(&'a self, jobs: &'a mut [ReadJob<'_>]) -> Result<Vec<Share<'a>>, FabricError> {
        let shares = jobs.iter_mut().map(|job| {
            let handle = usize::try_from(job.from.handle).unwrap_or(usize::MAX);
            let from = self.arenas.get(handle);
            Ok(Share {
                from: from.ok_or_else(|| malformed("arena handle"))?,
                offset: job.offset,
                runs: job.runs,
                page: job.page.as_bytes_mut(),
                sum: job.sum,
                checksum: &mut job.checksum,
            })
        });
        shares.collect()
    }
}

impl FabricPeer for ShmPeer {
    fn import(&mut self, key: &[u8]) -> Result<RemoteArena, FabricError> {
        let key: &[u8; KEY_BYTES] = key.try_into().map_err(|_| malformed("arena key"))?;
        let [descriptor, device, inode, bytes] =
            words(key).ok_or_else(|| malformed("arena key"))?;
        let place = Place {
            descriptor,
            device,
            inode,
        };
        let size = usize::try_from(bytes).map_err(|_| malformed("arena key"))?;
        let mapping = place
            .open(self.pid)
            .and_then(|file| Mapping::new(&file, size))
            .map_err(|error| FabricError::Unreachable {
                fabric: CAPABILITY.name,
                detail: error.to_string(),
            })?;
        self.arenas.push(mapping);
        Ok(RemoteArena {
            handle: self.arenas.len() as u64 - 1,
            bytes,
            on_device: false,
        })
    }

    fn read(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        let fabric = CAPABILITY.name;
        let go_on = || {
            if cancelled.load(Ordering::Acquire) || self.closed.load(Ordering::Acquire) {
                return Err(FabricError::Cancelled { fabric });
            }
            if Instant::now() >= deadline {
                return Err(FabricError::TimedOut { fabric });
            }
            Ok(())
        };
        let total: usize = jobs.iter().map(|job| job.runs.total_bytes()).sum();
        let shares = self.shares(jobs)?;
        go_on()?;
        if total < PARALLEL_BYTES_MIN || self.copy_threads < 2 {
            let mut shares = shares.into_iter().peekable();
            let mut since_look = 0;
            while let Some(share) = shares.next() {
                if let Some(next) = shares.peek() {
                    next.announce();
                }
                share.carry_out(&go_on, &mut since_look)?;
            }
            return Ok(());
        }
        copy_together(shares, self.copy_threads, &go_on)
    }
}

/// Lets threads take shares until none is left; the first error is all threads' end.
fn copy_together(
    shares: Vec<Share<'_>>,
    threads: usize,
    go_on: &(impl Fn() -> Result<(), FabricError> + Sync),
) -> Result<(), FabricError> {
    let helpers = threads.min(shares.len()).saturating_sub(1);
    let queue = Mutex::new(shares.into_iter());
    let failed = Mutex::new(None);
    let next = || queue.lock().unwrap_or_else(|e| e.into_inner()).next();
    let work = || {
        let mut since_look = 0;
        while let Some(share) = next() {
            if let Err(error) = share.carry_out(go_on, &mut since_look) {
                // Nobody goes on with the rest.
                queue
                    .lock()
                    .unwrap_or_else(|e| e.into_inner())
                    .by_ref()
                    .for_each(drop);
                let mut failed = failed.lock().unwrap_or_else(|e| e.into_inner());
                failed.get_or_insert(error);
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        for index in 0..helpers {
            let builder = std::thread::Builder::new().name(format!("kv-shm-copy-{index}"));
            // Without it the others do its share.
            if builder.spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    let failed = failed.into_inner().unwrap_or_else(|e| e.into_inner());
    failed.map_or(Ok(()), Err)
}

#[cfg(test)]
pub(crate) fn start_for_tests(sink: TransportSink) -> Arc<dyn super::Transport> {
    Arc::new(start(link::on_loopback(), sink).expect("memory files and a free port"))
}

#[cfg(test)]
mod tests;

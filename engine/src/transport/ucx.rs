//! The UCX fabric: reads a peer's memory by whatever wire UCX has to it, InfiniBand, RoCE, TCP or shared memory.
//!
//! libucp is opened at run time. Three files are the door to it: `context` (one a process, and registered memory),
//! `worker` (what drives transfers) and `connection` (one peer's memory). Each peer that is read has a worker of its own,
//! driven by whoever reads, so no lock is shared between peers and ending a worker ends all that it could still write. One
//! more worker, on a thread of its own, answers the peers that read from us: some wires need our help for that.
//!
//! Memory of GPUs is read in windows only ([`super::windowed`]), where UCX has its modules for CUDA.
//!
//! UCX chooses the wire; its `UCX_…` variables apply. Memory that UCX has allocated itself is mapped by peers of the same
//! host and read by copying. Invariant: an exported arena stays registered until the fabric is dropped.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::io::{self, PipeWriter};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use baton_ucx_sys::Library;

use self::connection::{Connection, ConnectionError, Limits};
use self::context::{CallError, Context, Memory, StartError, version_text};
use self::record::{AddressRecord, KeyRecord, PROBE_BYTES};
use self::worker::Worker;
use super::fabric::{ArenaKey, Fabric, FabricError, FabricPeer, FabricTerms, ReadJob, RemoteArena};
use super::link::{self, LinkParams, LinkStartError, LinkTransport};
use super::staging::plain_shape;
use super::windowed::{Windowed, WindowsOnce};
use super::{Capability, MemoryKind, Reach, Runs, Sides, TransportSink};
use crate::page::Page;
use crate::page::arena::{Arena, ForeignAllocator, ForeignMemory};

mod connection;
mod context;
mod log;
mod mapped;
mod record;
mod text;
mod wire;
mod worker;

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::start_for_tests;

/// Name in errors.
const UCX: &str = "ucx";

/// What UCX can do. The estimate is that of a host's memory, the least of its wires but for plain TCP.
pub const CAPABILITY: Capability = Capability {
    name: UCX,
    memory: &[MemoryKind::Host],
    sides: Sides::One,
    reach: Reach::AnyHost,
    bandwidth_estimate: 10_000_000_000,
    message_bytes_max: link::MESSAGE_BYTES_MAX,
    note_bytes_max: link::NOTE_BYTES_MAX,
};

const TERMS: FabricTerms = FabricTerms {
    // A get costs a few microseconds by itself.
    stretch_bytes_min: 8 << 10,
    // UCX registers what it reads into, and remembers.
    target_in_arena: false,
    batch_bytes_max: 64 << 20,
    tapers: false,
    reads_ahead: false,
};

/// Longest sleep of the thread that answers readers; it wakes when there is something to answer.
const ANSWER_WAIT: Duration = Duration::from_secs(1);

/// Reads peers' memory through UCX. See the module.
#[derive(Debug)]
pub(crate) struct Ucx {
    context: &'static Context,
    address: Vec<u8>,
    version: (u16, u16),
    exports: Mutex<HashMap<u64, Export>>,
    /// To the peer that was opened last.
    /// Of the peer opened last.
    wire: Arc<Mutex<Option<String>>>,
    closed: Arc<AtomicBool>,
    answering: Option<Answering>,
}

#[derive(Debug)]
struct Export {
    _registered: Registered,
    key: ArenaKey,
}

/// What keeps exported memory readable.
#[derive(Debug)]
#[expect(dead_code, reason = "held, not read")]
enum Registered {
    /// Our registration of it.
    Memory(Memory),
    /// The arena, which UCX allocated.
    Arena(Arc<Arena>),
}

/// The thread that answers readers, until its pipe is closed.
#[derive(Debug)]
struct Answering {
    stop: PipeWriter,
    thread: JoinHandle<()>,
}

/// Why there is no such transport.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UcxStartError {
    /// No UCX here.
    #[error(transparent)]
    Start(#[from] StartError),
    /// UCX is there and cannot be used.
    #[error("UCX {version}: {reason}")]
    Unusable {
        /// Its version.
        version: String,
        /// What failed.
        reason: String,
    },
    /// The control plane could not be started.
    #[error(transparent)]
    Link(#[from] LinkStartError),
}

/// Starts the transport; pages of a GPU go through these windows of its memory, where UCX takes it.
///
/// # Errors
/// When UCX is not to be had, or the address cannot be bound.
pub fn start(
    windows: &WindowsOnce,
    params: LinkParams,
    sink: TransportSink,
) -> Result<LinkTransport, UcxStartError> {
    // No memory of a GPU is taken for a library that is not there.
    Library::open().map_err(StartError::from)?;
    let windows = windows.get();
    let fabric = Windowed::over(Arc::new(Ucx::start()?), windows);
    Ok(LinkTransport::over(Arc::new(fabric), params, sink)?)
}

/// The version of the UCX that is found here. Opens the library and starts nothing.
///
/// # Errors
/// When there is none, with how to get it.
pub fn probe() -> Result<String, UcxStartError> {
    let library = Library::open().map_err(StartError::from)?;
    Ok(version_text(library))
}

impl Ucx {
    /// Starts UCX and the thread that answers readers.
    pub(crate) fn start() -> Result<Self, UcxStartError> {
        let context = Context::shared()?;
        let unusable = |reason: String| UcxStartError::Unusable {
            version: context.version(),
            reason,
        };
        let unusable_call = |error: CallError| unusable(error.to_string());
        let worker = Worker::new(context).map_err(unusable_call)?;
        let worker_address = worker.address().map_err(unusable_call)?;
        let (major, minor, _) = context.library.version;
        let short = |number| u16::try_from(number).unwrap_or(u16::MAX);
        let version = (short(major), short(minor));
        let (probe, arena) =
            made_probe().map_err(|error| unusable(format!("no memory: {error}")))?;
        let exported = exported(context, &arena).map_err(unusable_call)?;
        let record = AddressRecord {
            version,
            probe,
            probe_key: exported.key.0.clone(),
            worker: worker_address,
        };
        let answering = Answering::start(worker);
        let answering = answering.map_err(|error| unusable(format!("no thread: {error}")))?;
        Ok(Self {
            context,
            address: record.encode(),
            version,
            exports: Mutex::new(HashMap::from([(arena.id(), exported)])),
            wire: Arc::default(),
            closed: Arc::default(),
            answering: Some(answering),
        })
    }

    /// Connects, and reads the peer's probe: a whole way there and back, after which nothing of UCX's own is left to say.
    fn connected(
        &self,
        record: &AddressRecord,
        limits: Limits<'_>,
    ) -> Result<Connection, ConnectionError> {
        let mut connection = Connection::open(self.context, &record.worker, limits)?;
        let key = KeyRecord::decode(&record.probe_key).map_err(|_| ConnectionError::Stranger)?;
        let number = connection.add((key.base, PROBE_BYTES), false, &key.key)?;
        let mut page = Page::zeroed(plain_shape(PROBE_BYTES));
        let whole = Runs::whole(PROBE_BYTES);
        let job = ReadJob::new(
            RemoteArena {
                handle: number as u64,
                bytes: PROBE_BYTES as u64,
                on_device: false,
            },
            &whole,
            &mut page,
        );
        connection.read(&mut [job], limits)?;
        if page.as_bytes() == record.probe {
            return Ok(connection);
        }
        Err(ConnectionError::Stranger)
    }
}

/// Why a peer is left to another transport; see `PREFERRED` in `context.rs`.
const TCP_ALONE: &str = "UCX has only TCP to the peer (UCX_TLS?), where it ends the process whose reader leaves meanwhile; \
    backend TCP carries KV over the same network without that";

/// Memory with a random content, by which peers know that they read from the right process. Not UCX's own, so that it is
/// read by a get, which the process has to answer on some wires.
fn made_probe() -> io::Result<([u8; PROBE_BYTES], Arc<Arena>)> {
    let mut probe = [0; PROBE_BYTES];
    getrandom::fill(&mut probe).map_err(io::Error::other)?;
    let mut pages = Page::pool_of(None, plain_shape(PROBE_BYTES), 1)?;
    let none = || io::Error::from(io::ErrorKind::OutOfMemory);
    let mut page = pages.pop().ok_or_else(none)?;
    page.as_bytes_mut().copy_from_slice(&probe);
    let (arena, _) = page.arena().ok_or_else(none)?;
    Ok((probe, Arc::clone(arena)))
}

/// Makes an arena readable.
fn exported(context: &'static Context, arena: &Arc<Arena>) -> Result<Export, CallError> {
    let export = |memory: &Memory| {
        let record = KeyRecord {
            base: memory.address(),
            bytes: arena.bytes() as u64,
            on_gpu: arena.device().is_some(),
            key: memory.key()?,
        };
        Ok(ArenaKey(record.encode()))
    };
    if let Some(memory) = arena.foreign::<Memory>() {
        return Ok(Export {
            key: export(memory)?,
            _registered: Registered::Arena(Arc::clone(arena)),
        });
    }
    let memory = context.register(arena)?;
    Ok(Export {
        key: export(&memory)?,
        _registered: Registered::Memory(memory),
    })
}

/// Memory of UCX's own for an arena.
fn allocate(bytes: usize) -> io::Result<Box<dyn ForeignMemory>> {
    let context = Context::shared().map_err(io::Error::other)?;
    let memory = context.allocate(bytes).map_err(io::Error::other)?;
    Ok(Box::new(memory))
}

impl Fabric for Ucx {
    fn capability(&self) -> &Capability {
        &CAPABILITY
    }

    fn terms(&self) -> FabricTerms {
        TERMS
    }

    fn wire(&self) -> Option<String> {
        self.wire.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn allocator(&self) -> Option<ForeignAllocator> {
        Some(allocate)
    }

    fn address(&self) -> Vec<u8> {
        self.address.clone()
    }

    fn reaches(&self, address: &[u8]) -> bool {
        // UCX promises to understand itself over the wire, not every other version.
        AddressRecord::decode(address).is_ok_and(|record| record.version == self.version)
    }

    fn export(&self, arena: &Arc<Arena>) -> Result<ArenaKey, FabricError> {
        if let Some(device) = arena.device() {
            let memory = |detail: String| FabricError::Memory {
                fabric: UCX,
                detail,
            };
            if !self.context.takes_gpus() {
                let version = self.context.version();
                return Err(memory(format!(
                    "UCX {version} here has no support for GPUs (its modules cuda_copy and cuda_ipc)"
                )));
            }
            device.enter().map_err(|error| memory(error.to_string()))?;
        }
        let mut exports = self.exports.lock().unwrap_or_else(|e| e.into_inner());
        let export = match exports.entry(arena.id()) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(place) => {
                let exported =
                    exported(self.context, arena).map_err(|error| FabricError::Memory {
                        fabric: UCX,
                        detail: error.to_string(),
                    })?;
                place.insert(exported)
            }
        };
        Ok(export.key.clone())
    }

    fn open(&self, address: &[u8], deadline: Instant) -> Result<Box<dyn FabricPeer>, FabricError> {
        let record = AddressRecord::decode(address).map_err(|error| FabricError::Malformed {
            fabric: UCX,
            what: "address",
            detail: error.to_string(),
        })?;
        if record.version != self.version {
            let ((major, minor), ours) = (record.version, self.context.version());
            return Err(FabricError::Unreachable {
                fabric: UCX,
                detail: format!("the peer has UCX {major}.{minor}, we have {ours}"),
            });
        }
        let limits = Limits {
            deadline,
            cancelled: &self.closed,
            closed: &self.closed,
        };
        let connection = self.connected(&record, limits);
        let connection = connection.map_err(|error| match error {
            ConnectionError::TimedOut => FabricError::TimedOut { fabric: UCX },
            ConnectionError::Cancelled => FabricError::Cancelled { fabric: UCX },
            other => FabricError::Unreachable {
                fabric: UCX,
                detail: other.to_string(),
            },
        })?;
        let description = connection.description();
        if wire::is_tcp_alone(description.as_deref()) {
            return Err(FabricError::Unreachable {
                fabric: UCX,
                detail: TCP_ALONE.to_owned(),
            });
        }
        let wire = wire::described(description.as_deref());
        tracing::debug!(version = self.context.version(), wire, "UCX reaches a peer");
        *self.wire.lock().unwrap_or_else(|e| e.into_inner()) = Some(wire.clone());
        Ok(Box::new(UcxPeer {
            connection,
            begun: VecDeque::new(),
            wire,
            told: Arc::clone(&self.wire),
            closed: Arc::clone(&self.closed),
        }))
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

impl Drop for Ucx {
    fn drop(&mut self) {
        self.close();
        if let Some(answering) = self.answering.take() {
            answering.stop();
        }
    }
}

impl Answering {
    fn start(mut worker: Worker) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let answer = move || {
            // Nothing is ever written to the pipe: it can be read when its other end is closed.
            while !worker.wait(Some(stopped.as_fd()), ANSWER_WAIT) {
                while worker.progress() {}
            }
        };
        let thread = std::thread::Builder::new()
            .name("baton-ucx".to_owned())
            .spawn(answer)?;
        Ok(Self { stop, thread })
    }

    fn stop(self) {
        drop(self.stop);
        if self.thread.join().is_err() {
            tracing::error!("the thread that answers UCX readers panicked");
        }
    }
}

/// One peer.
#[derive(Debug)]
struct UcxPeer {
    connection: Connection,
    /// Batches that were begun, in order; those into the host's memory are over.
    begun: VecDeque<Option<(u64, Instant)>>,
    /// Its lanes, as UCX has them.
    wire: String,
    /// Where the fabric keeps that, and how its memory is read, for those who ask.
    told: Arc<Mutex<Option<String>>>,
    closed: Arc<AtomicBool>,
}

impl FabricPeer for UcxPeer {
    fn import(&mut self, key: &[u8]) -> Result<RemoteArena, FabricError> {
        let malformed = |detail: String| FabricError::Malformed {
            fabric: UCX,
            what: "arena key",
            detail,
        };
        let record = KeyRecord::decode(key).map_err(|error| malformed(error.to_string()))?;
        let bytes = usize::try_from(record.bytes).map_err(|error| malformed(error.to_string()))?;
        let range = (record.base, bytes);
        let number = self.connection.add(range, record.on_gpu, &record.key);
        let number = number.map_err(|error| FabricError::Unreachable {
            fabric: UCX,
            detail: error.to_string(),
        })?;
        let how = if self.connection.is_mapped(number) {
            "mapped"
        } else {
            "by gets"
        };
        let wire = format!("{}, {how}", self.wire);
        tracing::debug!(bytes, wire, "UCX reads a peer's arena");
        *self.told.lock().unwrap_or_else(|e| e.into_inner()) = Some(wire);
        Ok(RemoteArena {
            handle: number as u64,
            bytes: record.bytes,
            on_device: record.on_gpu,
        })
    }

    fn read(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        let limits = Limits {
            deadline,
            cancelled,
            closed: &self.closed,
        };
        let read = self.connection.read(jobs, limits);
        read.map_err(|error| self.failed(error))
    }

    fn begin(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        if !jobs.iter().any(|job| job.page.is_on_device()) {
            self.read(jobs, deadline, cancelled)?;
            self.begun.push_back(None);
            return Ok(());
        }
        let limits = Limits {
            deadline,
            cancelled,
            closed: &self.closed,
        };
        let begun = self.connection.begin(jobs, limits);
        let batch = begun.map_err(|error| self.failed(error))?;
        self.begun.push_back(Some((batch, deadline)));
        Ok(())
    }

    fn finish(
        &mut self,
        cancelled: &AtomicBool,
        _: &mut Vec<Option<u64>>,
    ) -> Result<(), FabricError> {
        let Some(Some((batch, deadline))) = self.begun.pop_front() else {
            return Ok(());
        };
        let limits = Limits {
            deadline,
            cancelled,
            closed: &self.closed,
        };
        let finished = self.connection.finish(batch, limits);
        finished.map_err(|error| self.failed(error))
    }
}

impl UcxPeer {
    fn failed(&self, error: ConnectionError) -> FabricError {
        match error {
            ConnectionError::TimedOut => FabricError::TimedOut { fabric: UCX },
            ConnectionError::Cancelled => FabricError::Cancelled { fabric: UCX },
            other => FabricError::Read {
                fabric: UCX,
                detail: format!("{other} (over {})", self.wire),
            },
        }
    }
}

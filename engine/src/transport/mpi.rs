//! Reading a peer's memory over MPI, for instances of one world: what the site's MPI has tuned, without any other library.
//!
//! MPI's own one-sided calls are not used: where there is no hardware for them they need the target to call MPI, and
//! Open MPI refuses them to programs of many threads. So each process answers requests for ranges of its exported
//! arenas with messages, on one thread. Invariant: a message is received into memory of its own and copied into the page
//! by the reader, so a read that was given up never writes a page, whatever MPI still does.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use super::fabric::{ArenaKey, Fabric, FabricError, FabricPeer, FabricTerms};
use super::link::{LinkParams, LinkStartError, LinkTransport};
use super::{Capability, MemoryKind, Reach, Sides, TransportSink, tcp};
use crate::collective::mpi::{FIRST_TAG, LAST_TAG, Mail, mail};
use crate::page::arena::Arena;
use read::MpiPeer;
use serve::Drain;

mod read;
mod serve;
#[cfg(test)]
pub(crate) mod tests;
mod wire;

/// What MPI can do. The estimate stands between streams and the libraries that read memory themselves.
pub const CAPABILITY: Capability = Capability {
    name: "mpi",
    memory: &[MemoryKind::Host],
    sides: Sides::Two,
    reach: Reach::AnyHost,
    bandwidth_estimate: 3_000_000_000,
    ..tcp::CAPABILITY
};

/// Longest message; a longer answer comes in several.
const CHUNK_BYTES: usize = 4 << 20;

/// Messages of one answer on their way at once, so that copying and sending overlap.
const CHUNKS_AHEAD: usize = 3;

/// What one batch of reads carries.
const BATCH_BYTES_MAX: usize = 64 << 20;

/// The tag of requests; all others are the readers' choice.
const REQUEST: i32 = FIRST_TAG;

/// Why there is no KV transport over MPI.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MpiMissing {
    /// MPI is not on.
    #[error(
        "this process is no rank of an MPI world\nhint: start all instances in one world with srun or mpirun, `baton launch --fabric mpi`; ucx, nixl and tcp need no MPI"
    )]
    NoWorld,
    /// No thread for it.
    #[error("kv transport over MPI: cannot start a thread: {0}")]
    Thread(String),
}

/// Why the transport did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MpiStartError {
    /// MPI is not to be had.
    #[error(transparent)]
    Missing(#[from] MpiMissing),
    /// The control plane did not start.
    #[error(transparent)]
    Link(#[from] LinkStartError),
}

/// Starts the transport.
///
/// # Errors
/// When this process is no rank of an MPI world, or the address cannot be bound.
pub fn start(params: LinkParams, sink: TransportSink) -> Result<LinkTransport, MpiStartError> {
    let fabric = Arc::new(MpiFabric::start()?);
    Ok(LinkTransport::over(fabric, params, sink)?)
}

/// Whether [`start`] would find a world.
///
/// # Errors
/// When it would not.
pub fn probe() -> Result<(), MpiMissing> {
    mail().map(drop).ok_or(MpiMissing::NoWorld)
}

/// A failed read; all errors of MPI end the world anyway.
fn failed(detail: String) -> FabricError {
    FabricError::Read {
        fabric: CAPABILITY.name,
        detail,
    }
}

/// What the fabric, its thread and its peers share.
#[derive(Debug)]
struct Shared {
    mail: Arc<Mail>,
    /// Every arena that peers may read; the index is its key.
    exported: Mutex<Vec<Arc<Arena>>>,
    /// Tags of answers that are not over.
    tags: Mutex<Tags>,
    /// Answers that nobody wants any more.
    drains: Mutex<Vec<Drain>>,
    closed: AtomicBool,
}

#[derive(Debug)]
struct Tags {
    next: i32,
    used: HashSet<i32>,
}

impl Shared {
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn exported(&self) -> MutexGuard<'_, Vec<Arc<Arena>>> {
        self.exported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drains(&self) -> MutexGuard<'_, Vec<Drain>> {
        self.drains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tags(&self) -> MutexGuard<'_, Tags> {
        self.tags.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A tag that no answer to this process uses; none when all are in use.
    fn take_tag(&self) -> Option<i32> {
        let mut tags = self.tags();
        for _ in REQUEST + 1..=LAST_TAG {
            let tag = tags.next;
            tags.next = if tag == LAST_TAG {
                REQUEST + 1
            } else {
                tag + 1
            };
            if tags.used.insert(tag) {
                return Some(tag);
            }
        }
        None
    }

    fn give_tag_back(&self, tag: i32) {
        self.tags().used.remove(&tag);
    }
}

/// The thread that answers; one a process, for requests have one tag. It ends with its last fabric.
#[derive(Debug)]
struct Server {
    shared: Arc<Shared>,
    serving: Option<JoinHandle<()>>,
}

static SERVER: Mutex<Weak<Server>> = Mutex::new(Weak::new());

impl Server {
    /// The one that runs, or a new one.
    fn get() -> Result<Arc<Self>, MpiMissing> {
        let mut running = SERVER.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = running.upgrade() {
            return Ok(server);
        }
        let server = Arc::new(Self::start()?);
        *running = Arc::downgrade(&server);
        Ok(server)
    }

    fn start() -> Result<Self, MpiMissing> {
        let shared = Arc::new(Shared {
            mail: mail().ok_or(MpiMissing::NoWorld)?,
            exported: Mutex::default(),
            tags: Mutex::new(Tags {
                next: REQUEST + 1,
                used: HashSet::new(),
            }),
            drains: Mutex::default(),
            closed: AtomicBool::new(false),
        });
        let serving = std::thread::Builder::new()
            .name("kv-mpi".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || serve::run(&shared)
            })
            .map_err(|error| MpiMissing::Thread(error.to_string()))?;
        Ok(Self {
            shared,
            serving: Some(serving),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        if let Some(serving) = self.serving.take()
            && serving.join().is_err()
        {
            tracing::error!("the kv transport's MPI thread panicked");
        }
    }
}

/// The fabric.
#[derive(Debug)]
pub(crate) struct MpiFabric {
    server: Arc<Server>,
    /// Its own end; others of this process go on.
    closed: Arc<AtomicBool>,
}

impl MpiFabric {
    /// Starts answering, where this process is a rank of an MPI world.
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn start() -> Result<Self, MpiMissing> {
        Ok(Self {
            server: Server::get()?,
            closed: Arc::default(),
        })
    }
}

impl Fabric for MpiFabric {
    fn capability(&self) -> &Capability {
        &CAPABILITY
    }

    fn terms(&self) -> FabricTerms {
        FabricTerms {
            stretch_bytes_min: 0,
            target_in_arena: false,
            batch_bytes_max: BATCH_BYTES_MAX,
            tapers: false,
            reads_ahead: false,
        }
    }

    fn address(&self) -> Vec<u8> {
        let mail = &self.server.shared.mail;
        wire::address(mail.world(), mail.rank())
    }

    fn reaches(&self, address: &[u8]) -> bool {
        let mail = &self.server.shared.mail;
        wire::read_address(address)
            .is_some_and(|(world, rank)| world == *mail.world() && rank < mail.size())
    }

    fn export(&self, arena: &Arc<Arena>) -> Result<ArenaKey, FabricError> {
        let mut exported = self.server.shared.exported();
        let known = exported.iter().position(|other| other.id() == arena.id());
        let index = known.unwrap_or_else(|| {
            exported.push(Arc::clone(arena));
            exported.len() - 1
        });
        Ok(ArenaKey(wire::key(index, arena.bytes())))
    }

    fn open(&self, address: &[u8], _deadline: Instant) -> Result<Box<dyn FabricPeer>, FabricError> {
        let (world, rank) = wire::read_address(address).ok_or_else(|| FabricError::Malformed {
            fabric: CAPABILITY.name,
            what: "address",
            detail: format!("{} bytes", address.len()),
        })?;
        let mail = &self.server.shared.mail;
        if world != *mail.world() || rank >= mail.size() {
            return Err(FabricError::Unreachable {
                fabric: CAPABILITY.name,
                detail: "it is no rank of this MPI world".to_owned(),
            });
        }
        let (shared, closed) = (Arc::clone(&self.server.shared), Arc::clone(&self.closed));
        Ok(Box::new(MpiPeer::new(shared, closed, rank)))
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

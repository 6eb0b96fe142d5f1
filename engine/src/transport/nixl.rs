//! NIXL: reads of a peer's memory through NVIDIA's transfer library, which brings UCX or libfabric along.
//!
//! A process has one agent that is read, with a progress thread of NIXL's; and one agent or several for each peer that it
//! reads (see [`peer`]). An agent's name is never used twice, so a peer that restarts is another peer.
//! `TRTLLM_NIXL_KVCACHE_BACKEND` = `UCX` (default) or `LIBFABRIC` chooses NIXL's plug-in; one that can't be had is replaced
//! by UCX, with one warning.
//!
//! From a process of this host a request reads a few whole pieces, which its lane then sums, as most of them are in the caches
//! still.
//!
//! It does not use NIXL's notifications, its metadata exchange or its writes: those are the control plane's work.
//!
//! Memory of GPUs is read in windows only ([`super::windowed`]): one request of the first lane a window, begun before the one before has
//! ended. Given 64 KiB pieces one by one, NIXL reaches 10.5 GB/s over NVLink, and 390 with all in one piece.
//!
//! Within a host, UCX has the kernel copy from process to process, on the thread that asks. Measured on 16 cores, 1 GiB
//! in scattered 64 KiB pieces, as shares of NIXL in one piece (4.1 GB/s; a plain copy 9.4): one by one 0.76, in windows of
//! 256 0.85, in 2, 4, 8 lanes 1.45, 2.2, 3.0. Over TCP, which UCX does in software, everything is several times slower than
//! our own stream; and a reader that goes away while the process that it reads stands still makes UCX abort the latter when
//! it goes on. So a host without an RDMA adapter is read by NIXL only from itself ([`address::Host`]).

use std::collections::BTreeMap;
use std::num::NonZero;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::fabric::{ArenaKey, Fabric, FabricError, FabricPeer, FabricTerms};
use super::link::{self, LinkParams, LinkStartError, LinkTransport};
use super::windowed::{Windowed, WindowsOnce};
use super::{Capability, MemoryKind, Reach, Sides, TransportSink};
use crate::page::arena::Arena;
use crate::page::device::DeviceArena;
use address::{Address, Host, Key};
use find::Plugin;
use library::{Agent, Library, Place, Progress};
use peer::{NixlPeer, Source};

mod address;
mod find;
mod library;
mod peer;
mod windows;

#[cfg(test)]
pub(crate) use tests::start_for_tests;

#[cfg(test)]
mod tests;

/// Its name in configs, logs and metrics.
const NAME: &str = "nixl";

/// Wakes NIXL's progress thread this often when nothing else does. UCX's events do; this is for those that it misses.
const PROGRESS_DELAY: Duration = Duration::from_millis(10);

/// Shorter stretches cost more than copying them together first.
const STRETCH_BYTES_MIN: usize = 32 << 10;

/// Jobs of one call: a few windows, so that they overlap, and giving up drops little.
const BATCH_BYTES_MAX: usize = 256 << 20;

/// Why NIXL cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NixlMissing {
    /// The library is not there.
    #[error(
        "NIXL ({tried}) is not there: {reason}; it reads KV from a peer's memory over RDMA, NVLink or within a host\nhint: name NIXL's {name} in {variable}, as from the Python package nixl-cu13 (scripts/fetch-nixl fetches it); without it, ucx, shm and tcp carry the KV",
        name = find::NAME,
        variable = find::LIBRARY_VARIABLE
    )]
    Library {
        /// The path or name.
        tried: String,
        /// What the system said.
        reason: String,
    },
    /// The library is there and is not one that can be used.
    #[error(
        "NIXL ({path}) cannot be used: {reason}\nhint: versions 1.5.1 and later are known to work"
    )]
    Unusable {
        /// Where it is.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// None of its plug-ins starts.
    #[error(
        "NIXL ({path}) does not start with its plug-in {plugin}: {reason}\nhint: NIXL looks for plug-ins in NIXL_PLUGIN_DIR, or in the folder `plugins` beside its library"
    )]
    Plugin {
        /// The library.
        path: String,
        /// The last plug-in tried.
        plugin: &'static str,
        /// What NIXL said.
        reason: String,
    },
}

/// Why the transport did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NixlStartError {
    /// NIXL is not to be had.
    #[error(transparent)]
    Missing(#[from] NixlMissing),
    /// The control plane did not start.
    #[error(transparent)]
    Link(#[from] LinkStartError),
}

/// Starts the transport; pages of a GPU go through these windows of its memory, where NIXL takes it.
///
/// # Errors
/// When NIXL is not to be had, or the address cannot be bound.
pub fn start(
    windows: &WindowsOnce,
    params: LinkParams,
    sink: TransportSink,
) -> Result<LinkTransport, NixlStartError> {
    // No memory of a GPU is taken for a library that is not there.
    Library::get()?;
    let windows = windows.get();
    let fabric = Windowed::over(Arc::new(NixlFabric::start()?), windows);
    Ok(LinkTransport::over(Arc::new(fabric), params, sink)?)
}

/// What NIXL is on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NixlFound {
    /// The library.
    pub library: String,
    /// The plug-in that will move the bytes.
    pub plugin: &'static str,
    /// Why it is not the one that the environment asks for.
    pub instead: Option<String>,
    /// What it can do here.
    pub capability: Capability,
}

/// Opens the library, and looks for the plug-in, without starting anything.
///
/// # Errors
/// When there is no NIXL, or none that can be used.
pub fn probe() -> Result<NixlFound, NixlMissing> {
    let library = Library::get()?;
    let (plugin, instead) = choose(Plugin::asked_for(), library.path());
    Ok(NixlFound {
        library: library.path().display().to_string(),
        plugin: plugin.name(),
        instead,
        capability: capability_of(&Host::here()),
    })
}

/// The plug-in to start with, and why it is not what was asked for.
fn choose(asked: Result<Plugin, String>, library: &Path) -> (Plugin, Option<String>) {
    match asked {
        Ok(Plugin::Ucx) => (Plugin::Ucx, None),
        Ok(plugin) => {
            let file = plugin.file(library);
            // With a library that the system found there is no folder to look into; NIXL itself will tell.
            let refused = file.is_file().then(|| library::refusal(&file)).flatten();
            match refused {
                None => (plugin, None),
                Some(reason) => (Plugin::Ucx, Some(reason)),
            }
        }
        Err(reason) => (Plugin::Ucx, Some(reason)),
    }
}

/// What can be done from and to a host. The estimates are a modest adapter's, and two cores' copying.
const fn capability_of(host: &Host) -> Capability {
    let (reach, bandwidth_estimate) = if host.far {
        (Reach::AnyHost, 20_000_000_000)
    } else {
        (Reach::SameHost, 6_000_000_000)
    };
    Capability {
        name: NAME,
        memory: &[MemoryKind::Host],
        sides: Sides::One,
        reach,
        bandwidth_estimate,
        message_bytes_max: link::MESSAGE_BYTES_MAX,
        note_bytes_max: link::NOTE_BYTES_MAX,
    }
}

/// The agent of this process that others read. Fields are dropped in this order: the memory outlives the agent.
#[derive(Debug)]
struct Exports {
    agent: Agent,
    keys: BTreeMap<u64, ArenaKey>,
    kept: Vec<Arc<Arena>>,
}

/// NIXL as a fabric. See the module.
#[derive(Debug)]
pub(crate) struct NixlFabric {
    library: &'static Library,
    plugin: Plugin,
    host: Host,
    capability: Capability,
    address: Vec<u8>,
    exports: Mutex<Exports>,
    /// Lanes to a peer of the same host.
    near_lanes_max: usize,
    closed: Arc<AtomicBool>,
}

impl NixlFabric {
    /// Starts the agent of this process.
    ///
    /// # Errors
    /// When there is no NIXL, or none of its plug-ins starts.
    pub(crate) fn start() -> Result<Self, NixlMissing> {
        Self::start_with(Library::get()?, Plugin::asked_for())
    }

    fn start_with(
        library: &'static Library,
        asked: Result<Plugin, String>,
    ) -> Result<Self, NixlMissing> {
        let name = fresh_name();
        let progress = Progress::Thread(PROGRESS_DELAY);
        let agent_of = |plugin: Plugin| Agent::start(library, &name, plugin.c_name(), progress);
        let (mut plugin, mut instead) = choose(asked.clone(), library.path());
        let mut started = agent_of(plugin);
        if let (Err(reason), Plugin::Libfabric) = (&started, plugin) {
            instead = Some(reason.clone());
            plugin = Plugin::Ucx;
            started = agent_of(plugin);
        }
        let missing = |reason: String| NixlMissing::Plugin {
            path: library.path().display().to_string(),
            plugin: plugin.name(),
            reason,
        };
        let agent = started.map_err(missing)?;
        if let Some(reason) = &instead {
            let asked = asked.map_or("unknown", Plugin::name);
            tracing::warn!(
                asked,
                plugin = plugin.name(),
                reason,
                "nixl uses another plug-in than was asked for"
            );
        }
        let host = Host::here();
        let address = Address {
            plugin,
            host: host.clone(),
            agent: agent.connection().map_err(missing)?,
        };
        Ok(Self {
            library,
            plugin,
            capability: capability_of(&host),
            host,
            address: address.encode(),
            exports: Mutex::new(Exports {
                agent,
                keys: BTreeMap::new(),
                kept: Vec::new(),
            }),
            near_lanes_max: near_lanes_max(),
            closed: Arc::new(AtomicBool::new(false)),
        })
    }

    fn decode(&self, address: &[u8]) -> Result<Address, FabricError> {
        Address::decode(address).map_err(|detail| FabricError::Malformed {
            fabric: NAME,
            what: "address",
            detail,
        })
    }

    /// Why a process cannot be read from here.
    fn obstacle(&self, address: &Address) -> Option<String> {
        if address.plugin != self.plugin {
            let (ours, theirs) = (self.plugin.name(), address.plugin.name());
            return Some(format!("it uses the plug-in {theirs}, this process {ours}"));
        }
        let reached = self.host.reaches(&address.host);
        (!reached).then(|| "it is on another host, and not both have an RDMA adapter".to_owned())
    }
}

impl Fabric for NixlFabric {
    fn capability(&self) -> &Capability {
        &self.capability
    }

    fn terms(&self) -> FabricTerms {
        FabricTerms {
            stretch_bytes_min: STRETCH_BYTES_MIN,
            target_in_arena: true,
            batch_bytes_max: BATCH_BYTES_MAX,
            tapers: false,
            reads_ahead: false,
        }
    }

    fn wire(&self) -> Option<String> {
        Some(format!("NIXL's plug-in {}", self.plugin.name()))
    }

    fn address(&self) -> Vec<u8> {
        self.address.clone()
    }

    fn reaches(&self, address: &[u8]) -> bool {
        self.decode(address)
            .is_ok_and(|address| self.obstacle(&address).is_none())
    }

    fn export(&self, arena: &Arc<Arena>) -> Result<ArenaKey, FabricError> {
        let memory = |detail| FabricError::Memory {
            fabric: NAME,
            detail,
        };
        let mut exports = self.exports.lock().unwrap_or_else(PoisonError::into_inner);
        let Exports { agent, keys, kept } = &mut *exports;
        if let Some(key) = keys.get(&arena.id()) {
            return Ok(key.clone());
        }
        let (start, bytes) = (arena.base().expose_provenance(), arena.bytes());
        let place = Place::of(arena);
        enter(arena).map_err(memory)?;
        agent.register((start, bytes), place).map_err(memory)?;
        // Whatever comes now, the agent knows the memory.
        kept.push(Arc::clone(arena));
        let key = Key {
            start,
            bytes,
            gpu: arena.device().map(|device| device.ordinal() as u64),
            memory: agent.description((start, bytes), place).map_err(memory)?,
        };
        let key = ArenaKey(key.encode());
        keys.insert(arena.id(), key.clone());
        Ok(key)
    }

    fn open(&self, address: &[u8], _deadline: Instant) -> Result<Box<dyn FabricPeer>, FabricError> {
        let unreachable = |detail| FabricError::Unreachable {
            fabric: NAME,
            detail,
        };
        if self.closed.load(Ordering::Acquire) {
            return Err(FabricError::Cancelled { fabric: NAME });
        }
        let address = self.decode(address)?;
        if let Some(obstacle) = self.obstacle(&address) {
            return Err(unreachable(obstacle));
        }
        let near = self.host.kernel == address.host.kernel;
        let source = Source {
            library: self.library,
            plugin: self.plugin,
            agent: address.agent,
            lanes_max: if near { self.near_lanes_max } else { 1 },
            near,
        };
        // Nothing here waits on the peer: an endpoint is made, and connects with the first read.
        let peer = NixlPeer::open(source, Arc::clone(&self.closed)).map_err(unreachable)?;
        Ok(Box::new(peer))
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

/// Lanes to a peer of the same host, where each keeps a core busy: half of the cores, but a batch is not worth more
/// than a few.
fn near_lanes_max() -> usize {
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    (cores / 2).clamp(2, 8)
}

/// Before an arena is registered: makes its GPU the one that NIXL's plug-ins use on this thread. Of the host's memory they
/// touch all that they register, and may pin it; so its huge pages come first.
fn enter(arena: &Arena) -> Result<(), String> {
    arena.prepare(0..arena.bytes());
    let entered = arena.device().map_or(Ok(()), DeviceArena::enter);
    entered.map_err(|error| error.to_string())
}

/// Of an agent: nobody has had it, on any host.
fn fresh_name() -> String {
    format!("baton-{}", Uuid::new_v4().simple())
}

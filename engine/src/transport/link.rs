//! The control plane of every transport between processes: framed TCP connections with greetings, signs of life,
//! deadlines, bounded queues and cancellation. What it carries of a write differs: the bytes themselves (`tcp`), or a
//! description of where the peer finds them, which it then reads through a [`Fabric`] and acknowledges.
//!
//! One connection per peer pair, used in both directions, so a generation server behind a firewall needs no open
//! port. Each has threads with blocking calls: the reader owns the connection and reports its end, the writer drains
//! its queue, and the puller reads the peer's memory, where there is a fabric. Both ends ping when idle; silence and
//! stalls end a connection, as do malformed frames and failed reads, with one debug line. It does not encrypt: the
//! hand-off's keys and nonces are as private as the network.
//!
//! Nobody remote writes our memory: bytes of a stream are read by us, and so are those of a fabric. So the end of
//! a quarantine is local knowledge, whatever became of the peer.
//!
//! One stream a pair and the kernel's own buffer sizes: fixed buffers of 1 and 4 MB were not faster on loopback,
//! and a fixed size switches the kernel's tuning off, which a long fat network needs.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::fabric::{Fabric, FabricError};
use super::fault::FaultPlan;
use super::staging::{Staging, StagingSize};
use super::{
    Capability, ConnectError, Deregistered, EndpointRecord, PeerId, RegionId, RegisterRefused,
    Registration, Submission, TransferId, Transport, TransportEvent, TransportSink, Write,
};
use crate::page::Page;
use crate::page::arena::ForeignAllocator;
use connection::Rousing;
use lender::Lender;
use puller::PullerParts;
pub(in crate::transport) use pulls::PIECES_AT_ONCE_MAX;
use shared::{Pulling, Shared, join};

mod connection;
mod frame;
mod gather;
mod lender;
mod outlet;
mod puller;
mod pulls;
mod reader;
mod regions;
mod shared;
mod socket;
mod writer;

#[cfg(test)]
pub(crate) mod tests;

/// [`Capability::message_bytes_max`] of every transport with this control plane.
pub const MESSAGE_BYTES_MAX: usize = frame::MESSAGE_BYTES_MAX;

/// [`Capability::note_bytes_max`] of every transport with this control plane.
pub const NOTE_BYTES_MAX: usize = frame::NOTE_BYTES_MAX;

/// Deadlines and bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkTuning {
    /// A connection that has not greeted by then is closed.
    pub handshake_timeout: Duration,
    /// A frame that makes no progress for so long ends its connection.
    pub stall_timeout: Duration,
    /// A fabric's read of a batch that takes longer fails.
    pub pull_timeout: Duration,
    /// A peer that says nothing at all for so long is lost; pings go out three times as often.
    pub silence_limit: Duration,
    /// Connections at most, in both directions together.
    pub peers_max: usize,
    /// How long a thread that has nothing to do any more watches for what comes next before it sleeps, where the machine has
    /// processors to spare; zero is not at all.
    pub vigil: Duration,
}

impl Default for LinkTuning {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(5),
            pull_timeout: Duration::from_secs(20),
            silence_limit: Duration::from_secs(10),
            peers_max: 512,
            vigil: Duration::ZERO,
        }
    }
}

impl LinkTuning {
    /// How often a blocked call looks at its deadline.
    fn tick(&self) -> Duration {
        let shortest = self
            .handshake_timeout
            .min(self.stall_timeout)
            .min(self.silence_limit);
        (shortest / 4).clamp(Duration::from_millis(1), Duration::from_millis(250))
    }

    fn ping_interval(&self) -> Duration {
        (self.silence_limit / 3).max(Duration::from_millis(1))
    }
}

/// Where and how to listen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkParams {
    /// Address to bind; `0.0.0.0` and `::` are all interfaces.
    pub bind_host: String,
    /// Port to bind; 0 lets the kernel choose.
    pub bind_port: u16,
    /// Name or address that peers connect to; never a wildcard.
    pub advertise_host: String,
    /// Deadlines and bounds.
    pub tuning: LinkTuning,
    /// Memory for bytes that do not lie as a fabric likes them.
    pub staging: StagingSize,
    /// Whether bytes are only moved, and no checksum is made of them on the way.
    pub leave_out_sums: bool,
    /// What shall go wrong, in tests.
    pub faults: FaultPlan,
}

/// Params of tests.
#[cfg(test)]
pub(crate) fn on_loopback() -> LinkParams {
    LinkParams {
        bind_host: "127.0.0.1".to_owned(),
        advertise_host: "127.0.0.1".to_owned(),
        ..LinkParams::default()
    }
}

/// Why the transport did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkStartError {
    /// The advertised host is empty or a wildcard.
    #[error(
        "kv transport: `{0}` cannot be advertised to other hosts\nhint: give the address of the interface that peers reach"
    )]
    Advertise(String),
    /// The listener could not be bound.
    #[error("kv transport: cannot listen on {address}: {source}")]
    Bind {
        /// Host and port.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// What the bytes should travel through is not there.
    #[error("kv transport: {0}")]
    Fabric(#[from] FabricError),
    /// A thread could not be started.
    #[error("kv transport: cannot start a thread: {0}")]
    Thread(io::Error),
}

/// A transport between processes; see the module.
#[derive(Debug)]
pub struct LinkTransport {
    capability: Capability,
    fabric: Option<Arc<dyn Fabric>>,
    /// What follows in the stream is read by its writer, so that is who sums it best.
    sums_writes: bool,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl LinkTransport {
    /// A transport whose bytes follow in the stream. Binds and starts listening.
    ///
    /// # Errors
    /// When the address cannot be bound or must not be advertised.
    pub(crate) fn inline(
        capability: Capability,
        params: LinkParams,
        sink: TransportSink,
    ) -> Result<Self, LinkStartError> {
        Self::start(capability, None, params, sink)
    }

    /// A transport whose bytes are pulled through a fabric. Binds and starts listening.
    ///
    /// # Errors
    /// When the address cannot be bound or must not be advertised.
    pub(crate) fn over(
        fabric: Arc<dyn Fabric>,
        params: LinkParams,
        sink: TransportSink,
    ) -> Result<Self, LinkStartError> {
        let capability = fabric.capability().clone();
        Self::start(capability, Some(fabric), params, sink)
    }

    fn start(
        capability: Capability,
        fabric: Option<Arc<dyn Fabric>>,
        params: LinkParams,
        sink: TransportSink,
    ) -> Result<Self, LinkStartError> {
        let advertise = params.advertise_host.trim();
        let bare = advertise.trim_start_matches('[').trim_end_matches(']');
        let ip = bare.parse::<IpAddr>();
        if advertise.is_empty() || ip.as_ref().is_ok_and(IpAddr::is_unspecified) {
            return Err(LinkStartError::Advertise(params.advertise_host));
        }
        let bind = |source| LinkStartError::Bind {
            address: format!("{}:{}", params.bind_host, params.bind_port),
            source,
        };
        let listener =
            TcpListener::bind((params.bind_host.as_str(), params.bind_port)).map_err(bind)?;
        let listening = listener.local_addr().map_err(bind)?;
        let port = listening.port();
        let advertised = match ip {
            Ok(ip) => SocketAddr::new(ip, port).to_string(),
            Err(_) => format!("{advertise}:{port}"),
        };
        let sums = !params.leave_out_sums;
        let pulling = fabric.as_ref().map(|fabric| Pulling {
            address: fabric.address(),
            lender: Lender::new(Arc::clone(fabric), params.staging),
            parts: PullerParts {
                fabric: Arc::clone(fabric),
                staging: Staging::new(params.staging, None),
                sum: sums,
            },
        });
        let shared = Arc::new(Shared::new(
            (capability.name, pulling),
            (params.tuning, params.faults, sums),
            (advertised, listening),
            sink,
        ));
        let accepting = std::thread::Builder::new()
            .name("kv-link-accept".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.accept(&listener)
            })
            .map_err(LinkStartError::Thread)?;
        Ok(Self {
            capability,
            sums_writes: fabric.is_none() && sums,
            fabric,
            shared,
            accepting: Some(accepting),
        })
    }

    /// Whether what a write asks for can be done: nothing, or sums of bytes that pass through this process, with room for them.
    fn can_sum(&self, write: &Write) -> bool {
        let sums = self.sums_writes && !write.is_on_device();
        let sums_bytes = 8 * write.sources.len();
        let has_room = |at: usize| at.saturating_add(sums_bytes) <= write.note.len();
        write.sum_at.is_none_or(|at| sums && has_room(at))
    }
}

impl Transport for LinkTransport {
    fn capability(&self) -> &Capability {
        &self.capability
    }

    fn wire(&self) -> Option<String> {
        self.fabric.as_ref()?.wire()
    }

    fn sums_writes(&self) -> bool {
        self.sums_writes
    }

    fn allocator(&self) -> Option<ForeignAllocator> {
        self.fabric.as_ref()?.allocator()
    }

    fn endpoint(&self) -> EndpointRecord {
        let pulling = self.shared.pulling.as_ref();
        EndpointRecord {
            transport: self.capability.name.to_owned(),
            address: self.shared.advertised.clone(),
            metadata: pulling.map_or_else(String::new, |p| hexadecimal(&p.address)),
        }
    }

    fn reaches(&self, endpoint: &EndpointRecord) -> bool {
        let named = endpoint.transport == self.capability.name && endpoint.address.contains(':');
        let fabric = match &self.fabric {
            None => true,
            Some(fabric) => {
                from_hexadecimal(&endpoint.metadata).is_some_and(|address| fabric.reaches(&address))
            }
        };
        named && fabric
    }

    fn connect(
        &self,
        endpoint: &EndpointRecord,
        deadline: Instant,
    ) -> Result<PeerId, ConnectError> {
        if endpoint.transport != self.capability.name || !endpoint.address.contains(':') {
            return Err(ConnectError::Record(format!(
                "{} {}",
                endpoint.transport, endpoint.address
            )));
        }
        let shared = &self.shared;
        let connection = shared.admit(endpoint.address.clone())?;
        let id = connection.id;
        shared.know(&connection);
        shared.spawn(connection, move |shared, connection| {
            shared.run_outgoing(connection, deadline);
        })?;
        Ok(id)
    }

    fn disconnect(&self, peer: PeerId) {
        if let Some(connection) = self.shared.peer(peer) {
            connection.close("disconnected by this side");
        }
    }

    fn register(&self, pages: Vec<Page>) -> Result<Registration, RegisterRefused> {
        if self.shared.is_closed() {
            return Err(RegisterRefused {
                pages,
                reason: "the transport is closed".to_owned(),
            });
        }
        Ok(self.shared.regions.register(pages))
    }

    fn deregister(&self, region: RegionId) -> Deregistered {
        self.shared.regions.deregister(region)
    }

    fn seal(&self, first: RegionId, count: usize) -> bool {
        self.shared.regions.seal(first, count)
    }

    fn reclaim(&self, first: RegionId) -> Option<Vec<Page>> {
        self.shared.regions.reclaim(first)
    }

    fn write(&self, write: Write) -> Submission {
        self.write_all(write.peer, vec![write]).1
    }

    fn write_all(&self, peer: PeerId, mut writes: Vec<Write>) -> (usize, Submission) {
        let Some(connection) = self.shared.peer(peer) else {
            return (0, Submission::Gone);
        };
        let invalid = writes.iter().position(|write| !self.can_sum(write));
        writes.truncate(invalid.unwrap_or(writes.len()));
        match connection.submit_writes(writes) {
            (accepted, Submission::Accepted) if invalid.is_some() => {
                (accepted, Submission::Invalid)
            }
            submitted => submitted,
        }
    }

    fn notify(&self, peer: PeerId, message: Vec<u8>) -> Submission {
        match self.shared.peer(peer) {
            Some(connection) => connection.submit_message(message),
            None => Submission::Gone,
        }
    }

    fn rouse(&self, peer: PeerId) {
        if self.shared.vigil().is_held()
            && let Some(connection) = self.shared.peer(peer)
        {
            connection.rouse(Rousing::There);
        }
    }

    fn cancel(&self, peer: PeerId, transfer: TransferId) {
        if let Some(connection) = self.shared.peer(peer) {
            connection.cancel(transfer);
        }
    }

    fn close(&self) {
        self.shared.close();
    }
}

impl Drop for LinkTransport {
    fn drop(&mut self) {
        self.shared.close();
        if let Some(accepting) = self.accepting.take() {
            join(accepting);
        }
        // After the acceptor has ended nothing adds threads: `connect` needs `self`.
        self.shared.take_threads().into_iter().for_each(join);
        if let Some(fabric) = &self.fabric {
            fabric.close();
        }
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hexadecimal(text: &str) -> Option<Vec<u8>> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
        return None;
    };
    let byte = |pair: &[u8; 2]| {
        let digit = |at: u8| char::from(at).to_digit(16);
        u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()
    };
    pairs.iter().map(byte).collect()
}

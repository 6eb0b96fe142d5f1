//! The transport that is always there: framed TCP streams, bytes from shared pages straight into registered ones.
//!
//! One connection per peer pair, used in both directions, so a generation server behind a firewall needs no open
//! port. Each has two threads with blocking calls: the reader owns the connection and reports its end, the
//! writer drains its queue. Both ends ping when idle; silence and stalls end a connection, as do malformed
//! frames, with one debug line. It does not encrypt: the hand-off's tokens and nonces are as private as the network.
//!
//! One stream a pair and the kernel's own buffer sizes: fixed buffers of 1 and 4 MB were not faster on loopback,
//! and a fixed size switches the kernel's tuning off, which a long fat network needs.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::fault::FaultPlan;
use super::{
    Capability, ConnectError, Deregistered, EndpointRecord, MemoryKind, PeerId, Reach, Region,
    RegionId, RegisterRefused, Sides, Submission, TransferId, Transport, TransportEvent,
    TransportSink, Write,
};
use crate::page::Page;
use shared::{Shared, join};

mod connection;
mod frame;
mod reader;
mod regions;
mod shared;
mod writer;

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::start_for_tests;

/// What TCP can do. The estimate is one stream's on a common 25 Gbit/s network.
pub const CAPABILITY: Capability = Capability {
    name: "tcp",
    memory: &[MemoryKind::Host],
    sides: Sides::Two,
    reach: Reach::AnyHost,
    bandwidth_estimate: 2_500_000_000,
    message_bytes_max: frame::MESSAGE_BYTES_MAX,
    note_bytes_max: frame::NOTE_BYTES_MAX,
};

/// Deadlines and bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpTuning {
    /// A connection that has not greeted by then is closed.
    pub handshake_timeout: Duration,
    /// A frame that makes no progress for so long ends its connection.
    pub stall_timeout: Duration,
    /// A peer that says nothing at all for so long is lost; pings go out three times as often.
    pub silence_limit: Duration,
    /// Connections at most, in both directions together.
    pub peers_max: usize,
}

impl Default for TcpTuning {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(5),
            silence_limit: Duration::from_secs(10),
            peers_max: 512,
        }
    }
}

impl TcpTuning {
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
pub struct TcpParams {
    /// Address to bind; `0.0.0.0` and `::` are all interfaces.
    pub bind_host: String,
    /// Port to bind; 0 lets the kernel choose.
    pub bind_port: u16,
    /// Name or address that peers connect to; never a wildcard.
    pub advertise_host: String,
    /// Deadlines and bounds.
    pub tuning: TcpTuning,
    /// What shall go wrong, in tests.
    pub faults: FaultPlan,
}

/// Why the transport did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TcpStartError {
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
    /// A thread could not be started.
    #[error("kv transport: cannot start a thread: {0}")]
    Thread(io::Error),
}

/// The TCP transport.
#[derive(Debug)]
pub struct TcpTransport {
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl TcpTransport {
    /// Binds and starts listening.
    ///
    /// # Errors
    /// When the address cannot be bound or must not be advertised.
    pub fn start(params: TcpParams, sink: TransportSink) -> Result<Self, TcpStartError> {
        let advertise = params.advertise_host.trim();
        let bare = advertise.trim_start_matches('[').trim_end_matches(']');
        let ip = bare.parse::<IpAddr>();
        if advertise.is_empty() || ip.as_ref().is_ok_and(IpAddr::is_unspecified) {
            return Err(TcpStartError::Advertise(params.advertise_host));
        }
        let bind = |source| TcpStartError::Bind {
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
        let shared = Arc::new(Shared::new(
            params.tuning,
            params.faults,
            advertised,
            listening,
            sink,
        ));
        let accepting = std::thread::Builder::new()
            .name("kv-tcp-accept".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.accept(&listener)
            })
            .map_err(TcpStartError::Thread)?;
        Ok(Self {
            shared,
            accepting: Some(accepting),
        })
    }
}

impl Transport for TcpTransport {
    fn capability(&self) -> &Capability {
        &CAPABILITY
    }

    fn endpoint(&self) -> EndpointRecord {
        EndpointRecord {
            transport: CAPABILITY.name.to_owned(),
            address: self.shared.advertised.clone(),
            metadata: String::new(),
        }
    }

    fn connect(
        &self,
        endpoint: &EndpointRecord,
        deadline: Instant,
    ) -> Result<PeerId, ConnectError> {
        if endpoint.transport != CAPABILITY.name || !endpoint.address.contains(':') {
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

    fn register(&self, page: Page) -> Result<Region, RegisterRefused> {
        if self.shared.is_closed() {
            return Err(RegisterRefused {
                page,
                reason: "the transport is closed".to_owned(),
            });
        }
        Ok(self.shared.regions.register(page))
    }

    fn deregister(&self, region: RegionId) -> Deregistered {
        self.shared.regions.deregister(region)
    }

    fn write(&self, write: Write) -> Submission {
        match self.shared.peer(write.peer) {
            Some(connection) => connection.submit_write(write),
            None => Submission::Gone,
        }
    }

    fn notify(&self, peer: PeerId, message: Vec<u8>) -> Submission {
        match self.shared.peer(peer) {
            Some(connection) => connection.submit_message(message),
            None => Submission::Gone,
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

impl Drop for TcpTransport {
    fn drop(&mut self) {
        self.shared.close();
        if let Some(accepting) = self.accepting.take() {
            join(accepting);
        }
        // After the acceptor has ended nothing adds threads: `connect` needs `self`.
        self.shared.take_threads().into_iter().for_each(join);
    }
}

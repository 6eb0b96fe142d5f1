//! The transports of this process, in order of preference, and which peer is connected over which of them.
//!
//! Adding a transport is one entry of [`KINDS`].

use std::fmt::Display;
use std::sync::Arc;
use std::time::Instant;

use super::TransceiverParams;
use super::inbox::{Happening, Inbox};
use super::select::{Preference, Tried};
use super::ways::{Ground, Opened};
use crate::transport::link::{LinkParams, LinkTransport};
use crate::transport::numbered::NumberedMap;
use crate::transport::staging::StagingSize;
use crate::transport::{
    Capability, ConnectError, EndpointRecord, PeerId, Submission, TransferId, Transport,
    TransportSink, Write, cuda_ipc, mpi, nixl, shm, tcp, ucx,
};

/// A transport that this build has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    /// The name that configs, logs and metrics have for it.
    pub(super) name: &'static str,
    /// What it can do on this machine; otherwise what is missing. Starts nothing.
    pub(super) probe: fn() -> Result<Capability, String>,
    pub(super) start: Start,
    /// Whether it moves pages of a device through windows of its memory.
    pub(super) windows: bool,
}

/// Starts a transport; otherwise says why it is not there.
pub(super) type Start = fn(&TransceiverParams, TransportSink) -> Result<Arc<dyn Transport>, String>;

/// All of them.
pub(super) const KINDS: &[Kind] = &[
    Kind {
        name: "cuda_ipc",
        probe: || match cuda_ipc::probe() {
            Ok(()) => Ok(cuda_ipc::CAPABILITY),
            Err(missing) => Err(missing.to_string()),
        },
        start: |params, events| match params.device {
            Some(device) => link(cuda_ipc::start(device, link_params(params, 0), events)),
            None => Err("this instance's kv is in the host's memory".to_owned()),
        },
        windows: false,
    },
    Kind {
        name: "nixl",
        probe: || match nixl::probe() {
            Ok(found) => Ok(found.capability),
            Err(missing) => Err(missing.to_string()),
        },
        start: |params, events| link(nixl::start(&params.windows, link_params(params, 0), events)),
        windows: true,
    },
    Kind {
        name: "ucx",
        probe: || match ucx::probe() {
            Ok(_) => Ok(ucx::CAPABILITY),
            Err(missing) => Err(missing.to_string()),
        },
        start: |params, events| link(ucx::start(&params.windows, link_params(params, 0), events)),
        windows: true,
    },
    Kind {
        name: "mpi",
        probe: || match mpi::probe() {
            Ok(()) => Ok(mpi::CAPABILITY),
            Err(missing) => Err(missing.to_string()),
        },
        start: |params, events| link(mpi::start(link_params(params, 0), events)),
        windows: false,
    },
    Kind {
        name: "shm",
        probe: || Ok(shm::CAPABILITY),
        start: |params, events| link(shm::start(link_params(params, 0), events)),
        windows: false,
    },
    Kind {
        name: "tcp",
        probe: || Ok(tcp::CAPABILITY),
        start: |params, events| link(tcp::start(link_params(params, params.bind_port), events)),
        windows: false,
    },
];

/// A link of these params, on this port: a fixed one is for one transport only.
pub(super) fn link_params(params: &TransceiverParams, bind_port: u16) -> LinkParams {
    LinkParams {
        bind_host: params.bind_host.clone(),
        bind_port,
        advertise_host: params.advertise_host.clone(),
        tuning: params.link.clone(),
        staging: StagingSize::default(),
        leave_out_sums: params.leave_out_checksums,
        faults: params.faults.clone(),
    }
}

fn link<E: Display>(started: Result<LinkTransport, E>) -> Result<Arc<dyn Transport>, String> {
    match started {
        Ok(transport) => Ok(Arc::new(transport)),
        Err(error) => Err(error.to_string()),
    }
}

/// Starts all transports of a preference that there are. Returns them with what became of each.
pub(super) fn start_all(
    preference: &Preference,
    kinds: &[Kind],
    params: &TransceiverParams,
    inbox: &Arc<Inbox>,
) -> (Vec<Arc<dyn Transport>>, Vec<Tried>) {
    let mut started = Vec::new();
    let mut tried = Vec::new();
    for &name in &preference.order {
        let Some(kind) = kinds.iter().find(|kind| kind.name == name) else {
            tried.push((name, Some("this build does not have it".to_owned())));
            continue;
        };
        let wire = started.len();
        let inbox = Arc::clone(inbox);
        let events: TransportSink =
            Arc::new(move |events| inbox.happened(Happening::Transport { wire, events }));
        match (kind.start)(params, events) {
            Ok(transport) => {
                started.push(transport);
                tried.push((name, None));
            }
            Err(reason) => tried.push((name, Some(reason))),
        }
    }
    (started, tried)
}

/// See the module.
#[derive(Debug)]
pub(super) struct Wires {
    transports: Vec<Arc<dyn Transport>>,
    opened: Arc<Opened>,
    /// Every connection that we know of, with its transport's index.
    known: NumberedMap<PeerId, usize>,
}

impl Wires {
    pub(super) fn new(transports: Vec<Arc<dyn Transport>>) -> Self {
        Self {
            transports,
            opened: Arc::default(),
            known: NumberedMap::default(),
        }
    }

    /// What ways there may be over them.
    pub(super) fn ground(&self) -> Ground<'_> {
        Ground {
            transports: &self.transports,
            opened: &self.opened,
        }
    }

    pub(super) fn all(&self) -> &[Arc<dyn Transport>] {
        &self.transports
    }

    /// The connections that were opened, now and later.
    pub(super) fn opened(&self) -> Arc<Opened> {
        Arc::clone(&self.opened)
    }

    /// Connections that we know of.
    pub(super) fn count(&self) -> usize {
        self.known.len()
    }

    pub(super) fn name(&self, wire: usize) -> &'static str {
        self.transports[wire].capability().name
    }

    /// Which transport a peer is connected over.
    pub(super) fn wire_of(&self, peer: PeerId) -> Option<usize> {
        self.known.get(&peer).copied()
    }

    /// Whether what is written to a peer is summed by its transport, where that is asked for.
    pub(super) fn sums_writes(&self, peer: PeerId) -> bool {
        let transport = self.transport_of(peer);
        transport.is_some_and(|transport| transport.sums_writes())
    }

    /// Whether that is so for every peer, however it is connected.
    pub(super) fn all_sum_writes(&self) -> bool {
        self.transports.iter().all(|wire| wire.sums_writes())
    }

    /// Notes that a peer has shown itself.
    pub(super) fn met(&mut self, peer: PeerId, wire: usize) {
        self.known.insert(peer, wire);
    }

    /// Forgets a peer that is lost.
    pub(super) fn lost(&mut self, peer: PeerId) {
        self.known.remove(&peer);
        self.opened.remove_peer(peer);
    }

    /// A connection to an endpoint, and whether it was there before.
    pub(super) fn connect(
        &mut self,
        wire: usize,
        endpoint: &EndpointRecord,
        deadline: Instant,
    ) -> Result<(PeerId, bool), ConnectError> {
        if let Some(peer) = self.opened.get(endpoint) {
            return Ok((peer, true));
        }
        let peer = self.transports[wire].connect(endpoint, deadline)?;
        self.opened.insert(endpoint.clone(), peer);
        self.known.insert(peer, wire);
        Ok((peer, false))
    }

    /// Makes the next [`Wires::connect`] open a new connection.
    pub(super) fn forget(&mut self, endpoint: &EndpointRecord) {
        self.opened.remove(endpoint);
    }

    pub(super) fn notify(&self, peer: PeerId, message: Vec<u8>) -> Submission {
        match self.transport_of(peer) {
            Some(transport) => transport.notify(peer, message),
            None => Submission::Gone,
        }
    }

    /// Submits pieces to a peer, as [`Transport::write_all`].
    pub(super) fn write_all(&self, peer: PeerId, writes: Vec<Write>) -> (usize, Submission) {
        match self.transport_of(peer) {
            Some(transport) => transport.write_all(peer, writes),
            None => (0, Submission::Gone),
        }
    }

    pub(super) fn cancel(&self, peer: PeerId, transfer: TransferId) {
        if let Some(transport) = self.transport_of(peer) {
            transport.cancel(peer, transfer);
        }
    }

    pub(super) fn disconnect(&self, peer: PeerId) {
        if let Some(transport) = self.transport_of(peer) {
            transport.disconnect(peer);
        }
    }

    /// Ends every connection now.
    pub(super) fn cut(&mut self) {
        for (&peer, &wire) in &self.known {
            self.transports[wire].disconnect(peer);
        }
        self.known.clear();
    }

    /// Begins to end everything, as [`Transport::close`].
    pub(super) fn close(&self) {
        for transport in &self.transports {
            transport.close();
        }
    }

    fn transport_of(&self, peer: PeerId) -> Option<&Arc<dyn Transport>> {
        Some(&self.transports[self.wire_of(peer)?])
    }
}

//! The KV transceiver: takes pages of a context instance to a generation instance (DESIGN.md §7).
//!
//! [`Transceiver`] is the engine thread's handle: its calls only queue. One desk thread owns the protocol, over
//! whatever [`Transport`] was chosen; checksum threads sum pages; results go to the engine's sink. Re-sharding is
//! not done here: instances whose layouts differ are refused before anything is allocated.
//!
//! Invariant: however a lease or a fetch ends, it ends once, and every page comes back exactly once.

use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;

use baton_configs::transceiver::TransceiverConfig;

use crate::handoff::{
    Fetch, Handoff, HandoffError, HandoffEvent, HandoffSink, HandoffTicket, KvLayout, Offer,
};
use crate::request::RequestId;
use crate::transport::fault::FaultPlan;
use crate::transport::link::{LinkParams, LinkStartError, LinkTuning};
use crate::transport::staging::StagingSize;
use crate::transport::tcp;
use crate::transport::{Capability, Transport, TransportSink};
pub use available::{TransportState, default_transport, transports};
use checksum::ChecksumThreads;
use desk::{Desk, Surroundings, Terms};
use inbox::{Command, Happening, Inbox};
use info::Held;
pub use info::{TransceiverInfo, TransceiverStats};
use state::{LayoutRecord, Nonce, OpaqueState, PROTOCOL_VERSION, RankRecord};

mod available;
mod checksum;
mod desk;
mod inbox;
mod info;
mod message;
mod select;
mod state;
mod timers;

#[cfg(test)]
mod tests;

/// What a transceiver is made of.
#[derive(Debug, Clone)]
pub struct TransceiverParams {
    /// `cache_transceiver_config`, resolved.
    pub config: TransceiverConfig,
    /// This instance's KV.
    pub layout: KvLayout,
    /// This instance, for messages on both sides.
    pub instance: String,
    /// This rank within its instance.
    pub rank: u32,
    /// Address to listen on; `0.0.0.0` is all interfaces.
    pub bind_host: String,
    /// Port to listen on; 0 lets the kernel choose.
    pub bind_port: u16,
    /// Name or address that other instances connect to; never a wildcard.
    pub advertise_host: String,
    /// Bounds.
    pub limits: TransceiverLimits,
    /// Deadlines of connections.
    pub link: LinkTuning,
    /// What shall go wrong, in tests; see [`FaultPlan::from_environment`].
    pub faults: FaultPlan,
}

/// What a transceiver holds at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransceiverLimits {
    /// Leases.
    pub leases: usize,
    /// Fetches, queued ones included.
    pub fetches: usize,
    /// Fetches under way; more wait their turn.
    pub fetches_running: usize,
    /// Threads that sum checksums.
    pub checksum_threads: usize,
}

impl Default for TransceiverLimits {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            leases: 8192,
            fetches: 8192,
            fetches_running: 64,
            checksum_threads: (cores / 4).clamp(1, 4),
        }
    }
}

impl TransceiverParams {
    /// Params with default bounds and deadlines, listening on one interface and advertising it.
    #[must_use]
    pub fn new(config: TransceiverConfig, layout: KvLayout, host: &str) -> Self {
        Self {
            config,
            layout,
            instance: String::new(),
            rank: 0,
            bind_host: host.to_owned(),
            bind_port: 0,
            advertise_host: host.to_owned(),
            limits: TransceiverLimits::default(),
            link: LinkTuning::default(),
            faults: FaultPlan::default(),
        }
    }
}

/// Why a transceiver did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransceiverStartError {
    /// A transport did not start to listen.
    #[error(transparent)]
    Link(#[from] LinkStartError),
    /// No transport is there.
    #[error("no kv transport is available")]
    NoTransport,
    /// A thread could not be started.
    #[error("kv transceiver: cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// The engine thread's handle on the transceiver. Dropping it ends every lease and fetch, with their events.
pub struct Transceiver {
    inbox: Arc<Inbox>,
    sink: HandoffSink,
    info: TransceiverInfo,
    limits: TransceiverLimits,
    layout: LayoutRecord,
    transport: &'static str,
    rank: u32,
    /// The ticket's state, but for nonce and token count.
    template: OpaqueState,
    desk: Option<JoinHandle<()>>,
}

impl fmt::Debug for Transceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transceiver")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

impl Transceiver {
    /// Chooses a transport, starts it and the transceiver's threads.
    ///
    /// # Errors
    /// When the transport cannot listen or threads cannot be started.
    pub fn start(
        params: TransceiverParams,
        sink: HandoffSink,
    ) -> Result<Self, TransceiverStartError> {
        let tcp = LinkParams {
            bind_host: params.bind_host.clone(),
            bind_port: params.bind_port,
            advertise_host: params.advertise_host.clone(),
            tuning: params.link.clone(),
            staging: StagingSize::default(),
            faults: params.faults.clone(),
        };
        Self::start_over(params, sink, &[tcp::CAPABILITY], |_, events| {
            Ok(Arc::new(tcp::start(tcp, events)?))
        })
    }

    /// As [`Transceiver::start`], with the transports that there are and a way to start the chosen one.
    fn start_over(
        params: TransceiverParams,
        sink: HandoffSink,
        available: &[Capability],
        start: impl FnOnce(&str, TransportSink) -> Result<Arc<dyn Transport>, TransceiverStartError>,
    ) -> Result<Self, TransceiverStartError> {
        let choice = select::choose(params.config.backend, available)
            .ok_or(TransceiverStartError::NoTransport)?;
        let inbox = Arc::new(Inbox::default());
        let events: TransportSink = {
            let inbox = Arc::clone(&inbox);
            Arc::new(move |event| inbox.happened(Happening::Transport(event)))
        };
        let transport = start(choice.transport, events)?;
        let endpoint = transport.endpoint();
        if choice.fell_back {
            tracing::warn!(transport = choice.transport, "{}", choice.reason);
        }
        tracing::info!(
            transport = choice.transport,
            reason = %choice.reason,
            address = %endpoint.address,
            "kv transceiver ready"
        );
        let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
        let epoch = high.rotate_left(32) ^ low;
        let name = choice.transport;
        let info = TransceiverInfo::new(choice, endpoint.address.clone(), epoch);
        let layout = LayoutRecord::new(&params.layout);
        let checksums = ChecksumThreads::start(params.limits.checksum_threads, &inbox)
            .map_err(TransceiverStartError::Thread)?;
        let desk = Desk::new(
            terms(&params, epoch),
            Surroundings {
                inbox: Arc::clone(&inbox),
                sink: Arc::clone(&sink),
                transport,
                checksums,
                info: info.clone(),
            },
        );
        let closing = Arc::clone(&inbox).closing();
        let desk = std::thread::Builder::new()
            .name("kv-desk".to_owned())
            .spawn(move || {
                desk.run();
                drop(closing);
            })
            .map_err(TransceiverStartError::Thread)?;
        Ok(Self {
            inbox,
            sink,
            info,
            limits: params.limits,
            transport: name,
            rank: params.rank,
            template: OpaqueState {
                version: PROTOCOL_VERSION,
                instance: params.instance,
                epoch,
                layout: layout.clone(),
                ranks: vec![RankRecord {
                    rank: params.rank,
                    endpoints: vec![endpoint],
                }],
                nonce: Nonce::random(),
                token_count: 0,
            },
            layout,
            desk: Some(desk),
        })
    }

    /// The choice of transport and the counters; stays usable after the transceiver is gone.
    #[must_use]
    pub fn info(&self) -> TransceiverInfo {
        self.info.clone()
    }
}

fn terms(params: &TransceiverParams, epoch: u64) -> Terms {
    let page = &params.layout.page;
    let tokens_per_block = page.tokens_per_block.max(1);
    let window = params
        .config
        .max_tokens_in_buffer
        .map_or(usize::MAX, |tokens| {
            usize::try_from(tokens).map_or(usize::MAX, |t| t.div_ceil(tokens_per_block).max(1))
        });
    Terms {
        layout: LayoutRecord::new(&params.layout),
        page_bytes: page.bytes() as u64,
        tokens_per_block: tokens_per_block as u64,
        rank: params.rank,
        epoch,
        transfer_timeout: params.config.kv_transfer_timeout,
        settle_timeout: params.config.sender_future_timeout,
        window,
        fetches_running_max: params.limits.fetches_running.max(1),
        stale_epoch: params.faults.stale_epoch,
        forged_nonce: params.faults.forged_nonce,
    }
}

impl Handoff for Transceiver {
    fn offer(&mut self, offer: Offer) -> Result<Vec<u8>, HandoffError> {
        let nonce = Nonce::random();
        let state = OpaqueState {
            nonce,
            token_count: offer.token_count as u64,
            ..self.template.clone()
        };
        let state = state.encode()?;
        self.info
            .hold(Held::Leases, self.limits.leases)
            .map_err(|held| HandoffError::Refused(format!("{held} leases are held already")))?;
        let command = Command::Offer { offer, nonce };
        self.inbox.command(command).map_err(|_| {
            self.info.release(Held::Leases);
            HandoffError::Transport("the kv transceiver is not running".to_owned())
        })?;
        Ok(state)
    }

    fn withdraw(&mut self, ctx_request_id: u64) {
        // A transceiver that is gone has ended its leases.
        drop(self.inbox.command(Command::Withdraw(ctx_request_id)));
    }

    fn check(&self, ticket: &HandoffTicket) -> Result<usize, HandoffError> {
        let state = OpaqueState::decode(&ticket.opaque_state)?;
        self.layout.check(&state.layout)?;
        state.endpoint(self.rank, self.transport)?;
        usize::try_from(state.token_count)
            .map_err(|_| HandoffError::State(format!("kv of {} tokens", state.token_count)))
    }

    fn fetch(&mut self, fetch: Fetch) {
        let refuse = |fetch: Fetch, error: String| {
            let request = fetch.request;
            let pages = fetch.pages;
            (self.sink)(HandoffEvent::PagesReturned { pages });
            (self.sink)(HandoffEvent::FetchEnded {
                request,
                outcome: Err(HandoffError::Transport(error)),
            });
        };
        if let Err(held) = self.info.hold(Held::Fetches, self.limits.fetches) {
            refuse(fetch, format!("{held} kv fetches are held already"));
            return;
        }
        if let Err(refused) = self.inbox.command(Command::Fetch(fetch))
            && let Command::Fetch(fetch) = *refused
        {
            self.info.release(Held::Fetches);
            refuse(fetch, "the kv transceiver is not running".to_owned());
        }
    }

    fn cancel_fetch(&mut self, request: RequestId) {
        // A transceiver that is gone has decided its fetches.
        drop(self.inbox.command(Command::CancelFetch(request)));
    }
}

impl Drop for Transceiver {
    fn drop(&mut self) {
        drop(self.inbox.command(Command::Stop));
        if let Some(desk) = self.desk.take()
            && desk.join().is_err()
        {
            tracing::error!("the kv transceiver panicked");
        }
    }
}

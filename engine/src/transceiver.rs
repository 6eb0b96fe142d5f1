//! The KV transceiver: takes pages of a context instance to a generation instance (DESIGN.md §7).
//!
//! [`Transceiver`] is the engine thread's handle: its calls only queue. One desk thread owns the protocol, over
//! whatever [`Transport`]s there are; checksum threads sum pieces; results go to the engine's sink. Sides that divide one
//! model differently are served piece by piece (`reshard.rs`); those whose KV cannot be converted are refused before
//! anything is allocated.
//!
//! Invariant: however a lease or a fetch ends, it ends once, and every page comes back exactly once.

use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use baton_configs::transceiver::TransceiverConfig;

use crate::backend::BackendError;
use crate::handoff::{
    Fetch, Handoff, HandoffError, HandoffEvent, HandoffSink, HandoffTicket, KvLayout, Offer,
    RanksEvent,
};
use crate::page::{Page, PageShape};
use crate::request::RequestId;
use crate::transport::fault::FaultPlan;
use crate::transport::link::LinkTuning;
use crate::transport::vigil::Vigil;
use crate::transport::windowed::{DeviceWindows, WindowsOnce};
use crate::transport::{EndpointRecord, Transport};
pub use available::{TransportState, default_transport, transports};
use checksum::ChecksumThreads;
use desk::{Desk, Surroundings, Terms};
use inbox::{Command, Inbox};
use info::Held;
pub use info::{RankPair, TransceiverInfo, TransceiverStats, WireStats};
use select::Preference;
use state::{Nonce, OpaqueState, OwnLayout, PROTOCOL_VERSION, RankRecord, printable};
use ways::{Ground, Opened, Ways};
use wires::{KINDS, Kind, Wires};

mod available;
mod checksum;
mod desk;
mod group;
mod inbox;
mod info;
mod message;
mod plan;
mod regions;
mod reshard;
mod rows;
mod select;
mod state;
mod timers;
mod ways;
mod wires;

#[cfg(test)]
mod tests;

/// What there is to say when the desk has ended.
const NOT_RUNNING: &str = "the kv transceiver is not running";

/// How long threads stay awake where KV lies on a device. A gigabyte between two GPUs comes in batches of a third of a millisecond.
const VIGIL: Duration = Duration::from_micros(500);

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
    /// What the instance's leading rank has as its epoch; `None` for that rank itself, which makes one.
    pub epoch: Option<u64>,
    /// Address to listen on; `0.0.0.0` is all interfaces.
    pub bind_host: String,
    /// Port to listen on; 0 lets the kernel choose.
    pub bind_port: u16,
    /// Name or address that other instances connect to; never a wildcard.
    pub advertise_host: String,
    /// The device whose memory this rank's pages lie in, by its number; `None` where they are in the host's.
    pub device: Option<usize>,
    /// Memory of that device for transports that move it in long pieces only; made of the above.
    windows: WindowsOnce,
    /// Bounds.
    pub limits: TransceiverLimits,
    /// Whether pieces are sent and taken without checksums: for measuring what these cost, never for serving.
    pub leave_out_checksums: bool,
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
            epoch: None,
            bind_host: host.to_owned(),
            bind_port: 0,
            advertise_host: host.to_owned(),
            device: None,
            windows: WindowsOnce::default(),
            limits: TransceiverLimits::default(),
            leave_out_checksums: false,
            link: LinkTuning::default(),
            faults: FaultPlan::default(),
        }
    }
}

/// Why a transceiver did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransceiverStartError {
    /// No transport is there.
    #[error("no kv transport is available: {0}")]
    NoTransport(String),
    /// The layout makes no sense.
    #[error("kv layout: {0}")]
    Layout(String),
    /// The other ranks' did not start.
    #[error("kv transceivers of the other ranks: {0}")]
    Ranks(BackendError),
    /// Not every rank says how it is reached.
    #[error("kv transceivers of {there} of {ranks} ranks have started")]
    Missing {
        /// Ranks that do.
        there: usize,
        /// All.
        ranks: usize,
    },
    /// What the ranks of this instance tell each other is not understood: another version, or a bug.
    #[error("kv transceivers of one instance do not understand each other: {0}")]
    Terms(serde_json::Error),
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
    layout: OwnLayout,
    transports: Vec<Arc<dyn Transport>>,
    opened: Arc<Opened>,
    rank: usize,
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
    /// Starts every transport that the config allows and that is there, and the transceiver's threads.
    ///
    /// # Errors
    /// When no transport can be started, or no thread.
    pub fn start(
        params: TransceiverParams,
        sink: HandoffSink,
    ) -> Result<Self, TransceiverStartError> {
        let window_bytes = window_bytes(&params.config, &params.layout.page);
        let windows = params
            .device
            .map(|device| WindowsOnce::of(device, window_bytes));
        let params = TransceiverParams {
            windows: windows.unwrap_or_default(),
            link: LinkTuning {
                vigil: params.device.map_or(params.link.vigil, |_| VIGIL),
                ..params.link.clone()
            },
            ..params
        };
        let variable = |name: &str| std::env::var_os(name);
        let preference = Preference::new(params.config.backend, params.device, variable);
        Self::start_over(params, sink, &preference, KINDS)
    }

    /// As [`Transceiver::start`], with the transports that there may be.
    fn start_over(
        params: TransceiverParams,
        sink: HandoffSink,
        preference: &Preference,
        kinds: &[Kind],
    ) -> Result<Self, TransceiverStartError> {
        let layout = OwnLayout::new(&params.layout).map_err(TransceiverStartError::Layout)?;
        let inbox = Arc::new(Inbox::new(Vigil::of(params.link.vigil)));
        let (transports, tried) = wires::start_all(preference, kinds, &params, &inbox);
        let choice = preference.choose(&tried).ok_or_else(|| {
            let missing = tried.iter().filter_map(|(name, missing)| {
                let missing = missing.as_ref()?;
                Some(format!("{name}: {missing}"))
            });
            TransceiverStartError::NoTransport(missing.collect::<Vec<_>>().join("; "))
        })?;
        match choice.fell_back {
            true => tracing::warn!(transport = choice.transport, "{}", choice.reason),
            false => tracing::info!(transport = choice.transport, "{}", choice.reason),
        }
        // The pool is made after this, and is best read over the transport that comes first.
        let first = transports.first();
        crate::page::arena::allocate_with(first.and_then(|transport| transport.allocator()));
        let endpoints: Vec<_> = transports.iter().map(|t| t.endpoint()).collect();
        endpoints.iter().for_each(say_ready);
        let epoch = params.epoch.unwrap_or_else(fresh_epoch);
        let info = TransceiverInfo::new(choice, endpoints.clone(), tried, epoch);
        let sums = !params.leave_out_checksums;
        let checksums = ChecksumThreads::start(params.limits.checksum_threads, sums, &inbox)
            .map_err(TransceiverStartError::Thread)?;
        let wires = Wires::new(transports.clone());
        let opened = wires.opened();
        let desk = Desk::new(
            terms(&params, &layout, epoch),
            Surroundings {
                inbox: Arc::clone(&inbox),
                sink: Arc::clone(&sink),
                wires,
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
        let rank = RankRecord {
            rank: params.rank,
            endpoints,
        };
        Ok(Self {
            inbox,
            sink,
            info,
            limits: params.limits,
            transports,
            opened,
            rank: params.rank as usize,
            template: OpaqueState {
                version: PROTOCOL_VERSION,
                instance: params.instance,
                epoch,
                layout: layout.record.clone(),
                ranks: vec![rank],
                nonce: Nonce::random(),
                token_count: 0,
            },
            layout,
            desk: Some(desk),
        })
    }

    /// Starts this rank's part of a lease that the leading rank has given out. When it cannot, the lease ends.
    pub(crate) fn join_offer(&mut self, offer: Offer, state: &[u8]) {
        let id = offer.ctx_request_id;
        let joined = OpaqueState::decode(state).and_then(|state| self.hold(offer, state.nonce));
        if let Err(error) = joined {
            tracing::debug!(ctx_request_id = id, %error, "a lease was not joined");
            if self.inbox.command(Command::Unoffered(id)).is_err() {
                self.is_gone();
            }
        }
    }

    /// Says that the desk has ended: ranks that cannot tell each other what ends cannot go on.
    fn is_gone(&self) {
        if self.layout.side.ranks() > 1 {
            let (rank, reason) = (self.rank, NOT_RUNNING.to_owned());
            (self.sink)(HandoffEvent::Ranks(RanksEvent::Lost { rank, reason }));
        }
    }

    fn hold(&mut self, offer: Offer, nonce: Nonce) -> Result<(), HandoffError> {
        self.info
            .hold(Held::Leases, self.limits.leases)
            .map_err(|held| HandoffError::Refused(format!("{held} leases are held already")))?;
        let command = Command::Offer { offer, nonce };
        self.inbox.command(command).map_err(|_| {
            self.info.release(Held::Leases);
            HandoffError::Transport(NOT_RUNNING.to_owned())
        })
    }

    /// Whether the KV of a state can be taken here.
    fn usable(&self, state: &OpaqueState) -> Result<(), HandoffError> {
        let there = self.layout.convertible(&state.layout)?;
        let senders = reshard::senders(&self.layout.side, self.rank, &there);
        let mut ways = Ways::to(&state.ranks, &senders)?;
        ways.expect(self.ground()).map(drop)
    }

    fn ground(&self) -> Ground<'_> {
        Ground {
            transports: &self.transports,
            opened: &self.opened,
        }
    }

    /// What the bytes of a transport go over, in its own words; `None` where it has none, or is not there.
    #[must_use]
    pub fn wire(&self, transport: &str) -> Option<String> {
        let mut transports = self.transports.iter();
        transports
            .find(|there| there.capability().name == transport)?
            .wire()
    }

    /// The choice of transport and the counters; stays usable after the transceiver is gone.
    #[must_use]
    pub fn info(&self) -> TransceiverInfo {
        self.info.clone()
    }
}

fn say_ready(endpoint: &EndpointRecord) {
    tracing::info!(
        transport = endpoint.transport,
        address = %endpoint.address,
        "kv transceiver ready"
    );
}

/// Random, so that no process has one that another had.
fn fresh_epoch() -> u64 {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    high.rotate_left(32) ^ low
}

/// Blocks that may be on their way at once, where the config says so.
fn buffer_blocks(config: &TransceiverConfig, page: &PageShape) -> Option<usize> {
    let tokens = usize::try_from(config.max_tokens_in_buffer?).ok()?;
    Some(tokens.div_ceil(page.tokens_per_block.max(1)).max(1))
}

/// Bytes of a window of a device's memory, for pages of this shape.
fn window_bytes(config: &TransceiverConfig, page: &PageShape) -> usize {
    let buffer_bytes = buffer_blocks(config, page).map(|blocks| blocks * page.bytes());
    DeviceWindows::window_bytes(page.bytes(), buffer_bytes)
}

/// What a transceiver of this config takes of the memory of the device that its pages lie in, which have this shape.
pub(crate) fn device_bytes(config: Option<&TransceiverConfig>, page: &PageShape) -> u64 {
    let Some(config) = config else {
        return 0;
    };
    let variable = |name: &str| std::env::var_os(name);
    let order = Preference::new(config.backend, Some(0), variable).order;
    let takes_some = KINDS
        .iter()
        .any(|kind| kind.windows && order.contains(&kind.name) && (kind.probe)().is_ok());
    match takes_some {
        true => DeviceWindows::bytes(window_bytes(config, page)) as u64,
        false => 0,
    }
}

fn terms(params: &TransceiverParams, layout: &OwnLayout, epoch: u64) -> Terms {
    Terms {
        layout: layout.clone(),
        instance: params.instance.clone(),
        rank: params.rank as usize,
        epoch,
        transfer_timeout: params.config.kv_transfer_timeout,
        settle_timeout: params.config.sender_future_timeout,
        window: buffer_blocks(&params.config, &params.layout.page).unwrap_or(usize::MAX),
        fetches_running_max: params.limits.fetches_running.max(1),
        leave_out_checksums: params.leave_out_checksums,
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
        self.hold(offer, nonce)?;
        Ok(state)
    }

    fn extend(&mut self, ctx_request_id: u64, pages: Vec<Arc<Page>>) {
        // A transceiver that is gone has ended its leases.
        drop(self.inbox.command(Command::Extend {
            ctx_request_id,
            pages,
        }));
    }

    fn withdraw(&mut self, ctx_request_id: u64) {
        // A transceiver that is gone has ended its leases.
        drop(self.inbox.command(Command::Withdraw(ctx_request_id)));
    }

    fn check(&self, ticket: &HandoffTicket) -> Result<usize, HandoffError> {
        let state = OpaqueState::decode(&ticket.opaque_state)?;
        if let Err(error) = self.usable(&state) {
            let reject = Command::Reject {
                ctx_request_id: ticket.ctx_request_id,
                state: Box::new(state),
                reason: error.to_string(),
            };
            // So that the other side says it too. A transceiver that is gone has nobody to tell.
            drop(self.inbox.command(reject));
            return Err(error);
        }
        usize::try_from(state.token_count)
            .map_err(|_| HandoffError::State(format!("kv of {} tokens", state.token_count)))
    }

    fn fetch(&mut self, fetch: Fetch) {
        let (mut wire, mut sleepers) = (0, Vec::new());
        let command = match self.info.hold(Held::Fetches, self.limits.fetches) {
            Ok(()) => {
                let state = OpaqueState::decode(&fetch.ticket.opaque_state);
                let plan = state.and_then(|state| self.plan(&fetch, state));
                if let Ok(plan) = &plan {
                    (wire, sleepers) = (plan.way.wire, self.opened.towards(&plan.way));
                }
                Command::Fetch {
                    fetch,
                    plan: plan.map(Box::new),
                }
            }
            Err(held) => Command::Unfetched {
                fetch,
                error: HandoffError::Transport(format!("{held} kv fetches are held already")),
            },
        };
        let Err(refused) = self.inbox.command(command) else {
            // Those that have to do with it wake up together with the desk, if they are not awake.
            for peer in sleepers {
                self.transports[wire].rouse(peer);
            }
            return;
        };
        if let Command::Fetch { fetch, .. } | Command::Unfetched { fetch, .. } = *refused {
            let Fetch { request, pages, .. } = fetch;
            (self.sink)(HandoffEvent::PagesReturned { pages });
            let outcome = Err(HandoffError::Transport(NOT_RUNNING.to_owned()));
            (self.sink)(HandoffEvent::FetchEnded { request, outcome });
            self.is_gone();
        }
    }

    fn meet(&mut self, state: &[u8]) -> Result<(), HandoffError> {
        let state = OpaqueState::decode(state)?;
        let usable = self.usable(&state);
        if let Err(error) = &usable {
            let context = printable(&state.instance);
            tracing::warn!(context, %error, "kv of a context server cannot be taken");
        }
        // A transceiver that is gone meets nobody.
        drop(self.inbox.command(Command::Meet(Box::new(state))));
        usable
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

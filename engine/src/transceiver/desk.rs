//! The desk: one thread, one loop, one closed set of inputs; it owns every lease, fetch and timer.
//!
//! It never waits on a peer: transports and checksum threads report into its inbox, and the clock wakes it for
//! what is due. [`lending`] is the context side, [`fetching`] the generation side. Each way out of either ends in
//! one place that gives back what was held.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::iter::Peekable;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::checksum::ChecksumThreads;
use super::inbox::{Command, Happening, Inbox, Input};
use super::info::TransceiverInfo;
use super::message::Message;
use super::state::OwnLayout;
use super::timers::{Due, Timers};
use super::wires::Wires;
use crate::backend::BlockId;
use crate::handoff::{HandoffError, HandoffEvent, HandoffSink, LeaseEnd};
use crate::request::RequestId;
use crate::transport::numbered::NumberedMap;
use crate::transport::{PeerId, RegionId, Submission, TransferId, TransportEvent};
use lease::Lease;
use ranks::{Leader, Reporter, Role};
use task::{FetchTask, Landing};

mod fetching;
mod lease;
mod lending;
mod lent;
mod moving;
mod pumping;
mod ranks;
mod stock;
mod summing;
mod sums;
mod task;

pub(super) use ranks::RankEvent;

/// How long shutting down waits after it has cut every connection.
const LAST_PATIENCE: Duration = Duration::from_secs(5);

/// What does not change while the desk works.
#[derive(Debug)]
pub(super) struct Terms {
    pub(super) layout: OwnLayout,
    /// This instance, for the other side's messages.
    pub(super) instance: String,
    /// This rank within its instance.
    pub(super) rank: usize,
    pub(super) epoch: u64,
    /// `kv_transfer_timeout_ms`.
    pub(super) transfer_timeout: Duration,
    /// How long shutting down waits for senders before it cuts connections.
    pub(super) settle_timeout: Duration,
    /// Pieces of one transfer that a transport may hold at once.
    pub(super) window: usize,
    /// Fetches that may be under way at once; more wait their turn.
    pub(super) fetches_running_max: usize,
    /// Pieces without checksums are taken.
    pub(super) leave_out_checksums: bool,
    /// A test's fault: pieces carry another epoch.
    pub(super) stale_epoch: bool,
    /// A test's fault: requests carry another nonce.
    pub(super) forged_nonce: bool,
}

/// Whom the desk works with.
pub(super) struct Surroundings {
    pub(super) inbox: Arc<Inbox>,
    pub(super) sink: HandoffSink,
    pub(super) wires: Wires,
    pub(super) checksums: ChecksumThreads,
    pub(super) info: TransceiverInfo,
}

/// See the module.
pub(super) struct Desk {
    terms: Terms,
    around: Surroundings,
    timers: Timers,
    leases: HashMap<u64, Lease>,
    /// Whose lease a running transfer sends.
    sending: HashMap<(PeerId, TransferId), u64>,
    /// Per peer, the transfers with pieces left, in turn.
    turns: NumberedMap<PeerId, VecDeque<TransferId>>,
    /// Peers that may take more pieces, or whose next pieces are summed.
    ready: BTreeSet<PeerId>,
    fetches: NumberedMap<TransferId, FetchTask>,
    by_request: HashMap<RequestId, TransferId>,
    /// Fetches that wait until others end.
    waiting: VecDeque<TransferId>,
    running: usize,
    /// Pages of ended fetches that are not back yet.
    quarantine: NumberedMap<RegionId, BlockId>,
    /// Pages that a fetch waits for before it goes another way: of which fetch, and which of its pages.
    leaving: NumberedMap<RegionId, (TransferId, usize)>,
    /// What this rank is to the others of its instance.
    role: Role,
    /// Requests whose layout was refused, on either side.
    refused: Refused,
    stopping: bool,
    /// Shutting down has cut every connection.
    cut: bool,
    out_of_patience: bool,
}

/// The last requests whose layout was refused. A prompt of several steps is refused when it is announced and again at its end, and
/// said once.
#[derive(Debug, Default)]
struct Refused(VecDeque<u64>);

impl Refused {
    const REMEMBERED: usize = 64;

    /// Whether it was not refused before, as far as that is remembered.
    fn is_new(&mut self, ctx_request_id: u64) -> bool {
        if self.0.contains(&ctx_request_id) {
            return false;
        }
        self.0.truncate(Self::REMEMBERED - 1);
        self.0.push_front(ctx_request_id);
        true
    }
}

impl Desk {
    pub(super) fn new(terms: Terms, around: Surroundings) -> Self {
        Self {
            terms,
            around,
            timers: Timers::default(),
            leases: HashMap::new(),
            sending: HashMap::new(),
            turns: NumberedMap::default(),
            ready: BTreeSet::new(),
            fetches: NumberedMap::default(),
            by_request: HashMap::new(),
            waiting: VecDeque::new(),
            running: 0,
            quarantine: NumberedMap::default(),
            leaving: NumberedMap::default(),
            role: Role::Alone,
            refused: Refused::default(),
            stopping: false,
            cut: false,
            out_of_patience: false,
        }
    }

    /// Works until stopped and settled.
    pub(super) fn run(mut self) {
        while !self.is_settled() {
            match self.around.inbox.next(self.timers.next_deadline()) {
                Some(Input::Command(command)) => {
                    self.on_command(command);
                    self.pump_ready();
                }
                Some(Input::Happenings(happenings)) => {
                    for happening in happenings {
                        self.on_happening(happening);
                        self.start_waiting();
                    }
                    self.pump_ready();
                }
                None => {}
            }
            while let Some(due) = self.timers.take_due(Instant::now()) {
                self.on_due(due);
            }
            self.start_waiting();
            self.send_reports();
            self.around.info.set_serving(self.sending.len());
            self.around.info.set_connections(self.around.wires.count());
        }
        if self.out_of_patience {
            tracing::error!(
                leases = self.leases.len(),
                pages = self.quarantine.len(),
                "the kv transceiver stopped before its transport let go of everything"
            );
        }
        // First the inbox, so that no thread of the transport or the checksums waits for room while it is joined.
        for command in self.around.inbox.close() {
            self.on_command(command);
        }
    }

    fn is_settled(&self) -> bool {
        self.stopping
            && (self.out_of_patience
                || (self.leases.is_empty()
                    && self.fetches.is_empty()
                    && self.quarantine.is_empty()))
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Offer { offer, nonce } => self.on_offer(offer, nonce),
            Command::Extend {
                ctx_request_id,
                pages,
            } => self.on_extend(ctx_request_id, pages),
            Command::Withdraw(lease) => self.withdraw(lease, "withdrawn by the context server"),
            Command::Fetch { fetch, plan } => self.on_fetch(fetch, plan),
            Command::CancelFetch(request) => self.on_cancel_fetch(request),
            Command::Unfetched { fetch, error } => self.on_unfetched(fetch, error),
            Command::Lead { ranks, secret } => self.role = Role::Leads(Leader::new(ranks, secret)),
            Command::Follow { leader, secret } => {
                self.role = Role::Follows(Reporter::new(leader, secret));
            }
            Command::Unoffered(lease) => self.lease_ended(lease, LeaseEnd::Cancelled),
            Command::Reject {
                ctx_request_id,
                state,
                reason,
            } => self.on_reject(ctx_request_id, &state, reason),
            Command::Meet(state) => self.on_meet(&state),
            Command::Stop => self.on_stop(),
        }
    }

    fn on_happening(&mut self, happening: Happening) {
        match happening {
            Happening::Transport { wire, events } => {
                let mut events = events.into_iter().peekable();
                while let Some(event) = events.next() {
                    self.on_transport_event(wire, event, &mut events);
                }
            }
            Happening::Hashed { of, checksums } => self.on_hashed(of, &checksums),
            Happening::HashingEnded { of } => self.on_hashing_ended(of),
            Happening::Checked(pages) => {
                for checked in pages {
                    self.on_checked(checked);
                }
            }
        }
    }

    /// Writes that have ended one after the other are taken together, out of what follows.
    fn on_transport_event(
        &mut self,
        wire: usize,
        event: TransportEvent,
        later: &mut Peekable<std::vec::IntoIter<TransportEvent>>,
    ) {
        match event {
            TransportEvent::Message { peer, message } => {
                self.around.wires.met(peer, wire);
                self.on_message(peer, &message);
            }
            TransportEvent::Landed {
                peer,
                region,
                count,
                runs,
                transfer,
                note,
                checksums,
                folds,
            } => {
                self.around.wires.met(peer, wire);
                let landing = Landing {
                    region,
                    count,
                    runs: &runs,
                    note: &note,
                    checksums: &checksums,
                    folds: &folds,
                };
                self.on_landed((peer, transfer), landing);
            }
            TransportEvent::WriteDone {
                peer,
                transfer,
                mut outcome,
            } => {
                let mut count = 1;
                while let Some(TransportEvent::WriteDone { outcome: next, .. }) =
                    later.next_if(|next| next.is_done_of(peer, transfer))
                {
                    outcome = next;
                    count += 1;
                }
                self.on_writes_done((peer, transfer), count, outcome);
            }
            TransportEvent::PageReleased { region, page } => self.on_page_released(region, page),
            TransportEvent::PeerLost { peer, reason } => {
                self.around.wires.lost(peer);
                self.lending_peer_lost(peer);
                self.fetching_peer_lost(peer, &reason);
                self.rank_lost(peer, &reason);
            }
        }
    }

    fn on_message(&mut self, peer: PeerId, bytes: &[u8]) {
        let message = match Message::decode(bytes) {
            Ok(message) => message,
            Err(error) => {
                tracing::debug!(%peer, %error, "a peer's message was not understood; disconnecting");
                self.around.wires.disconnect(peer);
                return;
            }
        };
        match message {
            Message::Request(request) => self.on_request(peer, request),
            Message::Hello { instance, layout } => self.on_hello(peer, &instance, &layout),
            Message::Extended { transfer } => self.on_extended(peer, transfer),
            Message::Acknowledge { transfer } => self.on_acknowledge(peer, transfer),
            Message::Release { transfer } => self.on_release(peer, transfer),
            Message::Cancel {
                claim,
                taker,
                reason,
                ..
            } => self.on_cancel(peer, &claim, taker, reason.as_deref()),
            Message::Refused { transfer, reason } | Message::Aborted { transfer, reason } => {
                self.on_refused(peer, transfer, &reason);
            }
            Message::Rank {
                secret,
                rank,
                events,
                totals,
            } => self.on_report(peer, (secret, rank), events, totals),
            Message::Done {
                transfer,
                bytes,
                pieces,
            } => self.on_done(peer, transfer, (bytes, pieces)),
        }
    }

    fn on_due(&mut self, due: Due) {
        match due {
            Due::Lease(lease) => self.on_lease_due(lease),
            Due::Fetch(transfer) => self.on_fetch_due(transfer),
            Due::Reports => self.on_reports_due(),
            Due::Patience => self.on_patience_due(),
        }
    }

    /// Sends a control message. A peer that does not even take those is given up.
    fn tell(&mut self, peer: PeerId, message: &Message) -> Submission {
        self.tell_bytes(peer, message.encode())
    }

    /// The same, of one that is encoded already.
    fn tell_bytes(&mut self, peer: PeerId, message: Vec<u8>) -> Submission {
        let submission = self.around.wires.notify(peer, message);
        if submission == Submission::Busy {
            tracing::debug!(%peer, "a peer takes no messages; disconnecting");
            self.around.wires.disconnect(peer);
        }
        submission
    }

    /// Sends what helps the other side but decides nothing here.
    fn tell_in_passing(&mut self, peer: PeerId, message: &Message) {
        let submission = self.tell(peer, message);
        if submission != Submission::Accepted {
            tracing::debug!(%peer, ?submission, "a message in passing did not go out");
        }
    }

    fn on_stop(&mut self) {
        if std::mem::replace(&mut self.stopping, true) {
            return;
        }
        let transfers: Vec<_> = self.fetches.keys().copied().collect();
        for transfer in transfers {
            self.fail(transfer, HandoffError::Cancelled);
        }
        let leases: Vec<_> = self.leases.keys().copied().collect();
        for lease in leases {
            self.withdraw(lease, "the context server shuts down");
        }
        self.around.wires.close();
        let patience = Instant::now() + self.terms.settle_timeout;
        self.timers.set(patience, Due::Patience);
    }

    fn on_patience_due(&mut self) {
        if std::mem::replace(&mut self.cut, true) {
            self.out_of_patience = true;
            return;
        }
        self.around.wires.cut();
        self.timers
            .set(Instant::now() + LAST_PATIENCE, Due::Patience);
    }

    fn lease_ended(&mut self, ctx_request_id: u64, end: LeaseEnd) {
        tracing::debug!(ctx_request_id, ?end, "kv lease ended");
        self.emit(HandoffEvent::LeaseEnded {
            ctx_request_id,
            end,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::Refused;

    #[test]
    fn a_refusal_is_said_once_and_few_are_remembered() {
        let mut refused = Refused::default();
        assert!(refused.is_new(7));
        assert!(!refused.is_new(7));
        for id in 100..100 + Refused::REMEMBERED as u64 {
            assert!(refused.is_new(id));
            assert!(!refused.is_new(id));
        }
        assert_eq!(refused.0.len(), Refused::REMEMBERED);
        assert!(refused.is_new(7), "it was long ago");
    }
}

//! The context side: leases, who may claim them, and the pieces on their way out.
//!
//! A lease is open, being served to one peer, or ending; it is over when no transport and no checksum thread
//! holds its pages. A peer lost on the way opens it again until its own deadline, so that another generation
//! server can have it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::Desk;
use crate::handoff::{LeaseEnd, Offer};
use crate::page::Page;
use crate::transceiver::checksum::Offered;
use crate::transceiver::info::{Count, Held};
use crate::transceiver::message::{Claim, Message, PieceNote, Request};
use crate::transceiver::state::{Nonce, PROTOCOL_VERSION};
use crate::transceiver::timers::{Due, TimerKey};
use crate::transport::{PeerId, RemoteRegion, Runs, Submission, TransferId, Write, WriteOutcome};

/// Pages kept for a generation server.
#[derive(Debug)]
pub(super) struct Lease {
    pages: Vec<Arc<Page>>,
    token_count: u64,
    nonce: Nonce,
    /// When the lease ends if nobody is being served.
    deadline: Instant,
    timer: TimerKey,
    /// Of the first pages, as far as they are summed.
    checksums: Vec<u64>,
    /// Whether checksum threads hold pages.
    hashing: bool,
    given_up: Arc<AtomicBool>,
    /// Writes that the transport holds.
    in_flight: usize,
    /// Its entry among the running transfers.
    route: Option<(PeerId, TransferId)>,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    Open,
    Serving(Serving),
    Ending(LeaseEnd),
}

#[derive(Debug)]
struct Serving {
    peer: PeerId,
    transfer: TransferId,
    regions: Vec<RemoteRegion>,
    /// The next piece to submit.
    next: usize,
}

/// What a lease did with its turn.
enum Turn {
    Submitted,
    /// It cannot go on now: checksums or its window are missing.
    Waits,
    Finished,
    PeerBusy,
}

impl Desk {
    pub(super) fn on_offer(&mut self, offer: Offer, nonce: Nonce) {
        let id = offer.ctx_request_id;
        if self.leases.contains_key(&id) {
            tracing::error!(ctx_request_id = id, "a lease id was used twice");
            self.around.info.release(Held::Leases);
            return;
        }
        if self.stopping {
            drop(offer);
            self.close_books(id, LeaseEnd::Cancelled);
            return;
        }
        let deadline = Instant::now() + self.terms.transfer_timeout;
        let given_up = Arc::new(AtomicBool::new(false));
        let lease = Lease {
            token_count: offer.token_count as u64,
            nonce,
            deadline,
            timer: self.timers.set(deadline, Due::Lease(id)),
            checksums: Vec::with_capacity(offer.pages.len()),
            hashing: true,
            given_up: Arc::clone(&given_up),
            in_flight: 0,
            route: None,
            phase: Phase::Open,
            pages: offer.pages,
        };
        self.around.checksums.sum(Offered {
            ctx_request_id: id,
            pages: lease.pages.iter().cloned().collect(),
            given_up,
        });
        self.leases.insert(id, lease);
    }

    pub(super) fn withdraw(&mut self, id: u64, reason: &str) {
        self.end_lease(id, LeaseEnd::Cancelled, reason);
    }

    pub(super) fn on_lease_due(&mut self, id: u64) {
        let after = self.terms.transfer_timeout;
        let reason = format!("the lease ended after {after:?}");
        self.end_lease(id, LeaseEnd::Expired, &reason);
    }

    pub(super) fn on_request(&mut self, peer: PeerId, request: Request) {
        let transfer = request.transfer;
        let id = request.claim.ctx_request_id;
        if let Err(reason) = self.admit(peer, &request) {
            tracing::debug!(%peer, ctx_request_id = id, reason, "kv request refused");
            self.tell_in_passing(peer, &Message::Refused { transfer, reason });
            return;
        }
        let timeout = self.terms.transfer_timeout;
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        lease.phase = Phase::Serving(Serving {
            peer,
            transfer,
            regions: request.regions,
            next: 0,
        });
        lease.route = Some((peer, transfer));
        self.timers.cancel(lease.timer);
        lease.timer = self.timers.set(Instant::now() + timeout, Due::Lease(id));
        self.sending.insert((peer, transfer), id);
        self.turns.entry(peer).or_default().push_back(id);
        self.pump(peer);
    }

    /// Whether a request may have what it asks for; otherwise why not.
    fn admit(&self, peer: PeerId, request: &Request) -> Result<(), String> {
        let claim = &request.claim;
        if request.version != PROTOCOL_VERSION {
            return Err(format!(
                "hand-off protocol {} asked for, {PROTOCOL_VERSION} here",
                request.version
            ));
        }
        let lease = self.claimed(claim)?;
        match &lease.phase {
            Phase::Open => {}
            Phase::Serving(_) => {
                return Err(format!(
                    "the kv of request {} is already being fetched",
                    claim.ctx_request_id
                ));
            }
            Phase::Ending(end) => {
                return Err(format!(
                    "the lease of request {} is over: {end:?}",
                    claim.ctx_request_id
                ));
            }
        }
        self.terms
            .layout
            .check(&request.layout)
            .map_err(|e| e.to_string())?;
        if request.token_count != lease.token_count {
            return Err(format!(
                "kv of {} tokens asked for, {} held",
                request.token_count, lease.token_count
            ));
        }
        if request.regions.len() != lease.pages.len() {
            return Err(format!(
                "{} pages asked for, {} held",
                request.regions.len(),
                lease.pages.len()
            ));
        }
        let page_bytes = self.terms.page_bytes;
        if let Some(region) = request.regions.iter().find(|r| r.bytes != page_bytes) {
            return Err(format!(
                "a region of {} bytes offered for a page of {page_bytes}",
                region.bytes
            ));
        }
        if self.sending.contains_key(&(peer, request.transfer)) {
            return Err(format!("transfer {} is in use", request.transfer));
        }
        Ok(())
    }

    /// The lease of a claim, if it is one's own.
    fn claimed(&self, claim: &Claim) -> Result<&Lease, String> {
        if claim.epoch != self.terms.epoch {
            return Err(format!(
                "the kv is of epoch {:016x}; this instance was started again since (epoch {:016x})",
                claim.epoch, self.terms.epoch
            ));
        }
        let id = claim.ctx_request_id;
        let lease = self
            .leases
            .get(&id)
            .ok_or_else(|| format!("no lease of request {id}: ended or never held"))?;
        if lease.nonce != claim.nonce {
            return Err(format!("wrong nonce for request {id}"));
        }
        Ok(lease)
    }

    pub(super) fn on_acknowledge(&mut self, peer: PeerId, transfer: TransferId) {
        let Some(&id) = self.sending.get(&(peer, transfer)) else {
            return;
        };
        let complete = self.leases.get(&id).is_some_and(
            |lease| matches!(&lease.phase, Phase::Serving(s) if s.next == lease.pages.len()),
        );
        if complete {
            self.end_lease(id, LeaseEnd::Delivered, "delivered");
        } else {
            tracing::debug!(%peer, ctx_request_id = id, "kv acknowledged before it was sent");
        }
    }

    pub(super) fn on_cancel(&mut self, peer: PeerId, transfer: TransferId, claim: &Claim) {
        let others = self.claimed(claim).map(|lease| {
            matches!(&lease.phase, Phase::Serving(s) if (s.peer, s.transfer) != (peer, transfer))
        });
        match others {
            // The peer knows already; only the lease is to be ended.
            Ok(false) => self.end_lease_quietly(claim.ctx_request_id, LeaseEnd::Cancelled),
            Ok(true) => tracing::debug!(%peer, "a cancel of a transfer that is another peer's"),
            Err(reason) => tracing::debug!(%peer, reason, "a cancel was ignored"),
        }
    }

    pub(super) fn on_hashed(&mut self, id: u64, checksum: u64) {
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        lease.checksums.push(checksum);
        if let Phase::Serving(serving) = &lease.phase {
            let peer = serving.peer;
            self.pump(peer);
        }
    }

    pub(super) fn on_hashing_ended(&mut self, id: u64) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.hashing = false;
        }
        self.finish_lease(id);
    }

    pub(super) fn on_write_done(
        &mut self,
        peer: PeerId,
        transfer: TransferId,
        outcome: WriteOutcome,
    ) {
        let Some(&id) = self.sending.get(&(peer, transfer)) else {
            tracing::error!(%peer, %transfer, "a write ended that no lease knows");
            return;
        };
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.in_flight -= 1;
        }
        if outcome == WriteOutcome::Sent {
            self.around
                .info
                .add(Count::BytesSent, self.terms.page_bytes);
        }
        self.finish_lease(id);
        self.pump(peer);
    }

    /// Opens the leases again that were being served to a peer.
    pub(super) fn lending_peer_lost(&mut self, peer: PeerId) {
        self.turns.remove(&peer);
        let lost: Vec<_> = self
            .sending
            .iter()
            .filter(|((of, _), _)| *of == peer)
            .map(|(key, id)| (*key, *id))
            .collect();
        for (key, id) in lost {
            self.sending.remove(&key);
            let Some(lease) = self.leases.get_mut(&id) else {
                continue;
            };
            if matches!(lease.phase, Phase::Serving(_)) {
                lease.phase = Phase::Open;
                lease.route = None;
                self.timers.cancel(lease.timer);
                lease.timer = self.timers.set(lease.deadline, Due::Lease(id));
                tracing::debug!(%peer, ctx_request_id = id, "peer lost while fetching kv; its lease stays open");
            }
        }
    }

    /// Submits pieces to a peer, its leases in turn, until it takes no more.
    fn pump(&mut self, peer: PeerId) {
        let Some(mut turns) = self.turns.remove(&peer) else {
            return;
        };
        let mut waits = VecDeque::new();
        while let Some(id) = turns.pop_front() {
            match self.take_turn(id, peer) {
                Turn::Submitted => turns.push_back(id),
                Turn::Waits => waits.push_back(id),
                Turn::Finished => {}
                Turn::PeerBusy => {
                    turns.push_front(id);
                    break;
                }
            }
        }
        turns.append(&mut waits);
        if !turns.is_empty() {
            self.turns.insert(peer, turns);
        }
    }

    fn take_turn(&mut self, id: u64, peer: PeerId) -> Turn {
        let Some(lease) = self.leases.get_mut(&id) else {
            return Turn::Finished;
        };
        let Phase::Serving(serving) = &mut lease.phase else {
            return Turn::Finished;
        };
        if serving.peer != peer {
            return Turn::Finished;
        }
        let piece = serving.next;
        if piece == lease.pages.len() {
            let done = Message::Done {
                transfer: serving.transfer,
                bytes: lease.pages.len() as u64 * self.terms.page_bytes,
                pieces: lease.pages.len() as u64,
            };
            self.tell_in_passing(peer, &done);
            return Turn::Finished;
        }
        let Some(&checksum) = lease.checksums.get(piece) else {
            return Turn::Waits;
        };
        if lease.in_flight >= self.terms.window {
            return Turn::Waits;
        }
        let note = PieceNote {
            ctx_request_id: id,
            epoch: self.terms.epoch ^ u64::from(self.terms.stale_epoch),
            piece: u32::try_from(piece).unwrap_or(u32::MAX),
            checksum,
        };
        let source = Arc::clone(&lease.pages[piece]);
        let submission = self.around.transport.write(Write {
            peer,
            transfer: serving.transfer,
            runs: Runs::whole(source.as_bytes().len()),
            source,
            target: serving.regions[piece].clone(),
            note: note.encode(),
        });
        match submission {
            Submission::Accepted => {
                serving.next += 1;
                lease.in_flight += 1;
                Turn::Submitted
            }
            // Gone: the loss of the peer is on its way and opens the lease again.
            Submission::Busy | Submission::Gone => Turn::PeerBusy,
            Submission::Invalid => {
                self.end_lease(id, LeaseEnd::Cancelled, "the transport refused a piece");
                Turn::Finished
            }
        }
    }

    /// Ends a lease and tells the peer that it is being served to.
    fn end_lease(&mut self, id: u64, end: LeaseEnd, reason: &str) {
        let served = match self.leases.get(&id).map(|lease| &lease.phase) {
            Some(Phase::Serving(serving)) if end != LeaseEnd::Delivered => {
                Some((serving.peer, serving.transfer))
            }
            _ => None,
        };
        self.end_lease_quietly(id, end);
        if let Some((peer, transfer)) = served {
            let reason = reason.to_owned();
            self.tell_in_passing(peer, &Message::Aborted { transfer, reason });
        }
    }

    fn end_lease_quietly(&mut self, id: u64, end: LeaseEnd) {
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        match &lease.phase {
            Phase::Ending(_) => return,
            Phase::Open => {}
            Phase::Serving(serving) => {
                self.around.transport.cancel(serving.peer, serving.transfer);
            }
        }
        lease.given_up.store(true, Ordering::Release);
        lease.phase = Phase::Ending(end);
        self.timers.cancel(lease.timer);
        self.finish_lease(id);
    }

    /// Closes a lease's books once nobody holds its pages any more.
    fn finish_lease(&mut self, id: u64) {
        let Some(lease) = self.leases.get(&id) else {
            return;
        };
        let Phase::Ending(end) = lease.phase else {
            return;
        };
        if lease.hashing || lease.in_flight > 0 {
            return;
        }
        if let Some(route) = lease.route {
            self.sending.remove(&route);
        }
        self.leases.remove(&id);
        self.close_books(id, end);
    }

    fn close_books(&self, id: u64, end: LeaseEnd) {
        let count = match end {
            LeaseEnd::Delivered => Count::LeasesDelivered,
            LeaseEnd::Expired => Count::LeasesExpired,
            LeaseEnd::Cancelled => Count::LeasesCancelled,
        };
        self.around.info.add(count, 1);
        self.around.info.release(Held::Leases);
        self.lease_ended(id, end);
    }
}

//! The context side: leases, who may claim them, and the pieces on their way out.
//!
//! A lease is open, taken by one generation instance, or ending; it is over when no transport and no checksum thread
//! holds its pages. A peer lost on the way opens it again until its own deadline, so that another generation
//! instance can have it. It is delivered when every rank of the taker that needs something of this rank said so.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::Desk;
use super::lease::{InFlight, Lease, Serving, Taking, Unsummed};
use super::lent::LentPages;
use super::sums::Sums;
use crate::handoff::{LeaseEnd, Offer};
use crate::page::Page;
use crate::transceiver::checksum::Checksums;
use crate::transceiver::info::{Count, Held};
use crate::transceiver::message::{Claim, Message, Request, Taker};
use crate::transceiver::reshard::{self, Side};
use crate::transceiver::state::{Nonce, PROTOCOL_VERSION, printable};
use crate::transceiver::timers::Due;
use crate::transport::{PeerId, TransferId, WriteOutcome};

/// What a request may have.
struct Admitted {
    side: Side,
    first_token: usize,
    receivers: Vec<usize>,
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
        let own = (&self.terms.layout.side, self.terms.rank);
        let held = reshard::pieces(own, own, 0..offer.token_count);
        let lease = Lease {
            token_count: offer.token_count,
            nonce,
            deadline,
            timer: self.timers.set(deadline, Due::Lease(id)),
            checksums: Checksums::with_room(held.len()),
            unsummed: Unsummed::default(),
            held,
            hashing: 0,
            given_up,
            taking: None,
            servings: Vec::new(),
            end: None,
            pages: LentPages::of(offer.pages),
        };
        self.leases.insert(id, lease);
        self.sum(id);
    }

    /// Adds pages to an open lease. Whoever takes it hears that it goes on.
    pub(super) fn on_extend(&mut self, id: u64, pages: Vec<Arc<Page>>) {
        let lease = self.leases.get_mut(&id);
        let Some(lease) = lease.filter(|lease| lease.end.is_none() && lease.is_open()) else {
            tracing::debug!(
                ctx_request_id = id,
                "a lease that is over, or whole, is not extended"
            );
            return;
        };
        lease.pages.extend(pages);
        let deadline = Instant::now() + self.terms.transfer_timeout;
        self.timers.cancel(lease.timer);
        lease.deadline = deadline;
        lease.timer = self.timers.set(deadline, Due::Lease(id));
        let servings = lease.servings.iter().filter(|serving| !serving.released);
        let takers: Vec<_> = servings.map(|s| (s.peer, s.transfer)).collect();
        self.sum(id);
        for (peer, transfer) in takers {
            self.tell_in_passing(peer, &Message::Extended { transfer });
        }
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
        let instance = printable(&request.instance);
        let admitted = match self.admit(peer, &request) {
            Ok(admitted) => admitted,
            Err(reason) => {
                tracing::debug!(%peer, instance, ctx_request_id = id, reason, "kv request refused");
                self.tell_in_passing(peer, &Message::Refused { transfer, reason });
                return;
            }
        };
        if let Some(wire) = self.around.wires.wire_of(peer) {
            let transport = self.around.wires.name(wire);
            self.around.info.goes_to(&instance, transport);
        }
        self.note_taken(id, &admitted.side);
        self.serve(peer, request, admitted);
        self.sending.insert((peer, transfer), id);
        self.turns.entry(peer).or_default().push_back(transfer);
        self.pump(peer);
    }

    /// Starts a transfer: plans its pieces and has the missing checksums made.
    fn serve(&mut self, peer: PeerId, request: Request, admitted: Admitted) {
        let (id, transfer) = (request.claim.ctx_request_id, request.transfer);
        let own = (&self.terms.layout.side, self.terms.rank);
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        let rank = request.rank as usize;
        let tokens = admitted.first_token..lease.token_count;
        let pieces = reshard::pieces(own, (&admitted.side, rank), tokens);
        let sums = Sums::of(&pieces, &lease.held);
        lease.servings.push(Serving {
            peer,
            transfer,
            rank,
            pieces,
            regions: request.regions,
            first_page: admitted.first_token / admitted.side.tokens_per_block(),
            sums,
            own_sums: Checksums::default(),
            unsummed: Unsummed::default(),
            given_up: Arc::new(AtomicBool::new(false)),
            next: 0,
            in_flight: InFlight::default(),
            released: false,
        });
        lease.taking.get_or_insert_with(|| Taking {
            taker: request.taker,
            layout: request.layout,
            first_token: admitted.first_token,
            receivers: admitted.receivers,
            delivered: BTreeSet::new(),
        });
        self.timers.cancel(lease.timer);
        let deadline = Instant::now() + self.terms.transfer_timeout;
        lease.timer = self.timers.set(deadline, Due::Lease(id));
        self.sum(id);
    }

    /// Whether a request may have what it asks for; otherwise why not.
    fn admit(&self, peer: PeerId, request: &Request) -> Result<Admitted, String> {
        let claim = &request.claim;
        if request.version != PROTOCOL_VERSION {
            return Err(format!(
                "hand-off protocol {} asked for, {PROTOCOL_VERSION} here",
                request.version
            ));
        }
        let lease = self.claimed(claim)?;
        if let Some(end) = lease.end {
            return Err(format!(
                "the lease of request {} is over: {end:?}",
                claim.ctx_request_id
            ));
        }
        let there = self.terms.layout.convertible(&request.layout);
        let side = there.map_err(|error| error.to_string())?;
        let own = &self.terms.layout.side;
        let rank = request.rank as usize;
        if rank >= side.ranks() {
            return Err(format!("rank {rank} asks, of {}", side.ranks()));
        }
        let receivers = reshard::receivers(own, self.terms.rank, &side);
        if !receivers.contains(&rank) {
            return Err(format!(
                "rank {rank} has nothing to take from rank {}",
                self.terms.rank
            ));
        }
        let first_token = fitting(lease, request, (&side, rank))?;
        if let Some(taking) = &lease.taking {
            let same = (taking.taker, taking.first_token, &taking.layout)
                == (request.taker, first_token, &request.layout);
            let served = taking.delivered.contains(&rank)
                || lease.servings.iter().any(|s| s.rank == rank && !s.released);
            if !same || served {
                return Err(format!(
                    "the kv of request {} is already being fetched",
                    claim.ctx_request_id
                ));
            }
        }
        if self.sending.contains_key(&(peer, request.transfer)) {
            return Err(format!("transfer {} is in use", request.transfer));
        }
        Ok(Admitted {
            side,
            first_token,
            receivers,
        })
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
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        let sent = lease
            .serving(peer, transfer)
            .filter(|serving| serving.next == serving.pieces.len() && !serving.released);
        let (Some(serving), Some(taking), None) = (sent, &lease.taking, lease.end) else {
            tracing::debug!(%peer, ctx_request_id = id, "kv acknowledged before it was sent");
            return;
        };
        let rank = serving.rank;
        let mut delivered = taking.delivered.clone();
        delivered.insert(rank);
        if let Some(taking) = &mut lease.taking {
            taking.delivered = delivered;
        }
        if lease.taking.as_ref().is_some_and(Taking::is_complete) {
            self.end_lease(id, LeaseEnd::Delivered, "delivered");
        }
    }

    pub(super) fn on_release(&mut self, peer: PeerId, transfer: TransferId) {
        let Some(&id) = self.sending.get(&(peer, transfer)) else {
            return;
        };
        if let Some(lease) = self.leases.get_mut(&id)
            && let Some(serving) = lease.serving_mut(peer, transfer)
        {
            serving.released = true;
            serving.given_up.store(true, Ordering::Release);
        }
        self.around.wires.cancel(peer, transfer);
        self.finish_transfer(id, peer, transfer);
    }

    pub(super) fn on_cancel(
        &mut self,
        peer: PeerId,
        claim: &Claim,
        taker: Taker,
        reason: Option<&str>,
    ) {
        let id = claim.ctx_request_id;
        let others = self.claimed(claim).map(|lease| {
            let taking = lease.taking.as_ref();
            taking.is_some_and(|taking| taking.taker != taker)
        });
        match others {
            // The taker knows already; only the lease is to be ended.
            Ok(false) => {
                if let Some(reason) = reason.filter(|_| self.refused.is_new(id)) {
                    let reason = printable(reason);
                    tracing::warn!(%peer, ctx_request_id = id, reason, "a generation server cannot take kv");
                }
                self.end_lease_quietly(id, LeaseEnd::Cancelled);
            }
            Ok(true) => tracing::debug!(%peer, "a cancel of a transfer that is another peer's"),
            Err(reason) => tracing::debug!(%peer, reason, "a cancel was ignored"),
        }
    }

    /// So many writes of a transfer have ended, the last of them so.
    pub(super) fn on_writes_done(
        &mut self,
        (peer, transfer): (PeerId, TransferId),
        count: usize,
        outcome: WriteOutcome,
    ) {
        let Some(&id) = self.sending.get(&(peer, transfer)) else {
            tracing::error!(%peer, %transfer, ?outcome, "a write ended that no lease knows");
            return;
        };
        let lease = self.leases.get_mut(&id);
        if let Some(serving) = lease.and_then(|lease| lease.serving_mut(peer, transfer)) {
            serving.in_flight.end(count);
        }
        self.finish_transfer(id, peer, transfer);
        self.finish_lease(id);
        // What has come free may be what another peer waits for, where peers share a transport's queue or staging.
        self.ready.extend(self.turns.keys());
    }

    /// Takes the transfers to a lost peer out. A lease that nobody else takes is open again.
    pub(super) fn lending_peer_lost(&mut self, peer: PeerId) {
        self.turns.remove(&peer);
        let lost: Vec<_> = self
            .sending
            .iter()
            .filter(|((of, _), _)| *of == peer)
            .map(|(key, id)| (key.1, *id))
            .collect();
        for (transfer, id) in lost {
            tracing::debug!(%peer, ctx_request_id = id, "peer lost while fetching kv");
            self.drop_transfer(id, peer, transfer);
            self.finish_lease(id);
        }
    }

    /// Takes a released transfer out once the transport has let go of it.
    fn finish_transfer(&mut self, id: u64, peer: PeerId, transfer: TransferId) {
        let lease = self.leases.get(&id);
        let serving = lease.and_then(|lease| lease.serving(peer, transfer));
        if serving.is_some_and(|serving| serving.released && serving.in_flight.is_empty()) {
            self.drop_transfer(id, peer, transfer);
        }
    }

    fn drop_transfer(&mut self, id: u64, peer: PeerId, transfer: TransferId) {
        self.sending.remove(&(peer, transfer));
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        if let Some(serving) = lease.serving(peer, transfer) {
            serving.given_up.store(true, Ordering::Release);
        }
        if lease.remove(peer, transfer) && lease.end.is_none() {
            self.timers.cancel(lease.timer);
            lease.timer = self.timers.set(lease.deadline, Due::Lease(id));
        }
    }

    /// Ends a lease and tells the peers that it is being served to.
    pub(super) fn end_lease(&mut self, id: u64, end: LeaseEnd, reason: &str) {
        let Some(lease) = self.leases.get(&id) else {
            return;
        };
        let mut served: Vec<_> = lease
            .servings
            .iter()
            .filter(|serving| !serving.released)
            .map(|serving| (serving.peer, serving.transfer))
            .collect();
        if end == LeaseEnd::Delivered || lease.end.is_some() {
            served.clear();
        }
        self.end_lease_quietly(id, end);
        for (peer, transfer) in served {
            let reason = reason.to_owned();
            self.tell_in_passing(peer, &Message::Aborted { transfer, reason });
        }
    }

    fn end_lease_quietly(&mut self, id: u64, end: LeaseEnd) {
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        if lease.end.is_some() {
            return;
        }
        for serving in &lease.servings {
            self.around.wires.cancel(serving.peer, serving.transfer);
            serving.given_up.store(true, Ordering::Release);
        }
        lease.given_up.store(true, Ordering::Release);
        lease.end = Some(end);
        self.timers.cancel(lease.timer);
        self.finish_lease(id);
    }

    /// Closes a lease's books once nobody holds its pages any more.
    pub(super) fn finish_lease(&mut self, id: u64) {
        let Some(lease) = self.leases.get(&id) else {
            return;
        };
        let Some(end) = lease.end.filter(|_| !lease.is_held()) else {
            return;
        };
        for serving in &lease.servings {
            self.sending.remove(&(serving.peer, serving.transfer));
        }
        self.leases.remove(&id);
        self.close_books(id, end);
    }

    fn close_books(&mut self, id: u64, end: LeaseEnd) {
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

/// Whether a request's tokens and regions fit a lease, and the rank's pages. Returns the first token that it wants.
fn fitting(
    lease: &Lease,
    request: &Request,
    (side, rank): (&Side, usize),
) -> Result<usize, String> {
    let held = lease.token_count;
    if request.token_count != held as u64 {
        return Err(format!(
            "kv of {} tokens asked for, {held} held",
            request.token_count
        ));
    }
    let first_token = usize::try_from(request.first_token).unwrap_or(usize::MAX);
    let block = side.tokens_per_block();
    if first_token > held || !first_token.is_multiple_of(block) {
        return Err(format!(
            "kv asked for from token {first_token} of {held} on, in blocks of {block}"
        ));
    }
    let needed = side.pages_for(held) - first_token / block;
    if request.regions.len() != needed {
        return Err(format!(
            "{} pages offered, {needed} needed",
            request.regions.len()
        ));
    }
    let page_bytes = side.page(rank).bytes() as u64;
    match request.regions.other_than(page_bytes) {
        None => Ok(first_token),
        Some(bytes) => Err(format!(
            "a region of {bytes} bytes offered for a page of {page_bytes}"
        )),
    }
}

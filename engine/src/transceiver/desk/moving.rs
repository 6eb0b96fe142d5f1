//! The ways of a fetch: over which transport it asks its sources, and how it goes on over the next one when that cannot
//! connect.
//!
//! A page is registered only once its way is chosen, and comes back before the next one is tried. Every way is tried
//! once, so it ends.

use std::time::Instant;

use super::Desk;
use super::task::Phase;
use crate::handoff::HandoffError;
use crate::page::Page;
use crate::transceiver::message::{Claim, Message, Request, Taker};
use crate::transceiver::reshard;
use crate::transceiver::state::{LayoutRecord, OpaqueState, PROTOCOL_VERSION, printable};
use crate::transceiver::ways::Ways;
use crate::transport::{EndpointRecord, PeerId, Submission, TransferId};

impl Desk {
    /// Goes the next way that is left; when there is none, the last failure is the fetch's.
    pub(super) fn go(&mut self, transfer: TransferId, mut failed: Option<HandoffError>) {
        loop {
            let Some(task) = self.fetches.get_mut(&transfer) else {
                return;
            };
            let Some(way) = task.ways.next(self.around.wires.ground()) else {
                let none = || HandoffError::Transport("there is no way to go".to_owned());
                self.fail(transfer, failed.unwrap_or_else(none));
                return;
            };
            task.way = way;
            task.phase = Phase::Running;
            let Err(error) = self.begin(transfer) else {
                return;
            };
            if !self.retreat(transfer, &error) {
                return;
            }
            failed = Some(error);
        }
    }

    /// Registers a fetch's pages and asks every source.
    fn begin(&mut self, transfer: TransferId) -> Result<(), HandoffError> {
        let Some(task) = self.fetches.get_mut(&transfer) else {
            return Ok(());
        };
        // All are here: a way is gone only then.
        let transport = &*self.around.wires.all()[task.way.wire];
        let registration = task.stock.register(transport);
        task.remotes = registration.map_err(HandoffError::Transport)?.into();
        (0..task.sources.len()).try_for_each(|source| self.ask(transfer, source))
    }

    /// Sends a source the request, over the connection that is there or over a new one.
    fn ask(&mut self, transfer: TransferId, source: usize) -> Result<(), HandoffError> {
        let Some(task) = self.fetches.get_mut(&transfer) else {
            return Ok(());
        };
        let request = Message::Request(Request {
            version: PROTOCOL_VERSION,
            claim: task.claim,
            taker: task.taker,
            instance: self.terms.instance.clone(),
            rank: u32::try_from(self.terms.rank).unwrap_or(u32::MAX),
            transfer,
            layout: self.terms.layout.record.clone(),
            first_token: task.first_token as u64,
            token_count: task.token_count as u64,
            regions: task.remotes.clone(),
        });
        let bytes = request.encode();
        let server = task.server(source);
        let (wire, endpoint) = (task.way.wire, task.endpoint(source).clone());
        let (mut peer, mut cached) = self.connect(wire, &endpoint)?;
        let again = cached.then(|| bytes.clone());
        let mut submission = self.tell_bytes(peer, bytes);
        if submission == Submission::Gone
            && let Some(bytes) = again
        {
            self.around.wires.forget(&endpoint);
            (peer, cached) = self.connect(wire, &endpoint)?;
            submission = self.tell_bytes(peer, bytes);
        }
        let failure = match submission {
            // Gone so soon: the loss of the new connection is on its way, and says why.
            Submission::Accepted | Submission::Gone => {
                if let Some(task) = self.fetches.get_mut(&transfer) {
                    let source = &mut task.sources[source];
                    (source.peer, source.cached) = (Some(peer), cached);
                }
                return Ok(());
            }
            Submission::Busy => "takes no more messages",
            Submission::Invalid => "cannot be sent so long a request",
        };
        Err(HandoffError::Transport(format!("{server} {failure}")))
    }

    fn connect(
        &mut self,
        wire: usize,
        endpoint: &EndpointRecord,
    ) -> Result<(PeerId, bool), HandoffError> {
        let deadline = Instant::now() + self.terms.transfer_timeout;
        let connected = self.around.wires.connect(wire, endpoint, deadline);
        connected.map_err(|error| HandoffError::Transport(error.to_string()))
    }

    /// Sends something to whoever is at an endpoint, if that goes.
    pub(super) fn tell_endpoint(
        &mut self,
        wire: usize,
        endpoint: &EndpointRecord,
        message: &Message,
    ) {
        if let Ok((peer, _)) = self.connect(wire, endpoint) {
            self.tell_in_passing(peer, message);
        }
    }

    /// Leaves a way that has failed. True when all pages are here, so that the next one may be gone at once.
    fn retreat(&mut self, transfer: TransferId, error: &HandoffError) -> bool {
        let Some(task) = self.fetches.get_mut(&transfer) else {
            return false;
        };
        let transport = &self.around.wires.all()[task.way.wire];
        let next = task.ways.peek(self.around.wires.ground());
        if let Some(next) = next.map(|way| self.around.wires.name(way.wire)) {
            tracing::warn!(
                request_id = task.request.0,
                transport = transport.capability().name,
                next,
                %error,
                "kv goes another way"
            );
        }
        let asked = task.sources.iter().filter_map(|source| source.peer);
        let asked: Vec<_> = asked.collect();
        task.reset();
        let away = task.stock.recall(&**transport);
        for index in &away {
            if let Some(region) = task.stock.region(*index) {
                self.leaving.insert(region, (transfer, *index));
            }
        }
        let all_here = away.is_empty();
        if !all_here {
            task.phase = Phase::Moving(error.clone());
        }
        for peer in asked {
            self.tell_in_passing(peer, &Message::Release { transfer });
        }
        all_here
    }

    /// Takes a page back that a fetch waited for; with the last one it goes on.
    pub(super) fn came_back(&mut self, transfer: TransferId, index: usize, page: Page) {
        let Some(task) = self.fetches.get_mut(&transfer) else {
            return;
        };
        task.stock.put(index, page);
        if task.stock.waits() {
            return;
        }
        if let Phase::Moving(error) = task.phase.clone() {
            self.go(transfer, Some(error));
        }
    }

    /// What becomes of the fetches of a lost peer. One that found a dead connection tries a new one, once; one that was
    /// not heard tries the next way.
    pub(super) fn fetching_peer_lost(&mut self, peer: PeerId, reason: &str) {
        let lost: Vec<_> = self
            .fetches
            .iter()
            .filter(|(_, task)| task.phase == Phase::Running)
            .filter_map(|(transfer, task)| Some((*transfer, task.source_of(peer)?)))
            .collect();
        for (transfer, index) in lost {
            let Some(task) = self.fetches.get_mut(&transfer) else {
                continue;
            };
            let text = format!("lost {}: {}", task.server(index), printable(reason));
            let mut error = HandoffError::Transport(text);
            let source = &mut task.sources[index];
            source.peer = None;
            let (cached, heard) = (source.cached, source.heard);
            if cached && !heard && !self.stopping {
                match self.ask(transfer, index) {
                    Ok(()) => continue,
                    Err(again) => error = again,
                }
            }
            if heard || self.stopping {
                self.fail(transfer, error);
            } else if self.retreat(transfer, &error) {
                self.go(transfer, Some(error));
            }
        }
    }

    /// Connects to a context instance, the way that its first fetch will go.
    pub(super) fn on_meet(&mut self, state: &OpaqueState) {
        let there = self.terms.layout.convertible(&state.layout);
        // Who cannot take anything has the leading rank say so.
        let senders = there.map_or_else(
            |_| vec![0],
            |there| reshard::senders(&self.terms.layout.side, self.terms.rank, &there),
        );
        let ways = Ways::to(&state.ranks, &senders);
        let ground = self.around.wires.ground();
        let Some(way) = ways.ok().and_then(|mut ways| ways.next(ground)) else {
            return;
        };
        let hello = Message::Hello {
            instance: self.terms.instance.clone(),
            layout: self.terms.layout.record.clone(),
        };
        for endpoint in &way.endpoints {
            self.tell_endpoint(way.wire, endpoint, &hello);
        }
    }

    /// A generation instance has connected. Whether it can take KV of here is said now, not with the first request.
    pub(super) fn on_hello(&mut self, peer: PeerId, instance: &str, layout: &LayoutRecord) {
        let instance = printable(instance);
        match self.terms.layout.convertible(layout) {
            Ok(_) => tracing::debug!(%peer, instance, "a generation server has connected"),
            Err(error) => {
                tracing::warn!(%peer, instance, %error, "a generation server cannot take kv of this one");
            }
        }
    }

    /// Tells a context instance that its KV cannot be used here; both sides say it in one line.
    pub(super) fn on_reject(&mut self, ctx_request_id: u64, state: &OpaqueState, reason: String) {
        let context = printable(&state.instance);
        if self.refused.is_new(ctx_request_id) {
            tracing::warn!(
                context,
                ctx_request_id,
                reason,
                "kv of a context server cannot be taken"
            );
        }
        // The leading rank alone: it says it once, and has the others give the lease up. The last way is the one that needs
        // least in common.
        let ground = self.around.wires.ground();
        let ways = Ways::to(&state.ranks, &[0]);
        let Some(way) = ways.ok().and_then(|ways| ways.last(ground)) else {
            return;
        };
        let cancel = Message::Cancel {
            transfer: TransferId(0),
            claim: Claim {
                ctx_request_id,
                epoch: state.epoch,
                nonce: state.nonce,
            },
            taker: Taker {
                epoch: self.terms.epoch,
                request: 0,
            },
            reason: Some(reason),
        };
        for endpoint in &way.endpoints {
            self.tell_endpoint(way.wire, endpoint, &cancel);
        }
    }
}

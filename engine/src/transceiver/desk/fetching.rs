//! The generation side: fetches, their pages, and the pages of ended fetches that are not back yet.
//!
//! Every page of a fetch is in exactly one place: held here, registered with the transport, or with a checksum
//! thread. When a fetch ends, what is here goes back at once; the rest is in quarantine until it shows up.

use std::time::Instant;

use super::Desk;
use crate::backend::BlockId;
use crate::handoff::{Fetch, HandoffError, HandoffEvent, HandoffStats};
use crate::page::Page;
use crate::request::RequestId;
use crate::transceiver::checksum::Landed;
use crate::transceiver::inbox::Checked;
use crate::transceiver::info::{Count, Held};
use crate::transceiver::message::{Claim, Message, PieceNote, Request};
use crate::transceiver::state::{OpaqueState, PROTOCOL_VERSION, printable};
use crate::transceiver::timers::{Due, TimerKey};
use crate::transport::{
    Deregistered, EndpointRecord, PeerId, RegionId, RemoteRegion, Runs, Submission, TransferId,
};

/// A fetch from the engine's call to its decision.
#[derive(Debug)]
pub(super) struct FetchTask {
    request: RequestId,
    claim: Claim,
    /// The context instance, for messages.
    instance: String,
    endpoint: EndpointRecord,
    token_count: u64,
    began: Instant,
    timer: TimerKey,
    blocks: Vec<BlockId>,
    pieces: Vec<Piece>,
    remotes: Vec<RemoteRegion>,
    verified: usize,
    done: bool,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Others run.
    Queued,
    Running {
        peer: PeerId,
        /// Whether the connection was there before; such a one may turn out to be dead.
        cached: bool,
        /// Whether the context server has answered.
        heard: bool,
    },
}

/// Where a page of a fetch is.
#[derive(Debug)]
enum Piece {
    Held(Page),
    Registered(RegionId),
    Checking(RegionId),
    Verified(Page),
    /// Gone back.
    Gone,
}

impl FetchTask {
    fn peer(&self) -> Option<PeerId> {
        match self.phase {
            Phase::Queued => None,
            Phase::Running { peer, .. } => Some(peer),
        }
    }

    fn context_server(&self) -> String {
        format!(
            "context server {} at {}",
            printable(&self.instance),
            printable(&self.endpoint.address)
        )
    }

    /// What it waits for, on whom and since when.
    fn describe_wait(&self) -> String {
        let what = match self.phase {
            Phase::Queued => "its turn among other transfers".to_owned(),
            Phase::Running { heard: false, .. } => "an answer".to_owned(),
            Phase::Running { .. } => {
                format!("{} of {} pages", self.verified, self.pieces.len())
            }
        };
        let waited = self.began.elapsed().as_secs_f64();
        match self.phase {
            Phase::Running { heard: true, .. } => {
                format!(
                    "{what} came from {} in {waited:.1} s",
                    self.context_server()
                )
            }
            _ => format!(
                "no kv from {}: waited {waited:.1} s for {what}",
                self.context_server()
            ),
        }
    }
}

impl Desk {
    pub(super) fn on_fetch(&mut self, fetch: Fetch) {
        let planned = self.plan(&fetch);
        let began = Instant::now();
        let (state, endpoint) = match planned {
            Ok(planned) => planned,
            Err(error) => {
                self.give_back(fetch.pages);
                self.decide(fetch.request, Err(error));
                return;
            }
        };
        let transfer = self.fresh_transfer();
        let (blocks, pieces) = fetch
            .pages
            .into_iter()
            .map(|(block, page)| (block, Piece::Held(page)))
            .unzip();
        let mut nonce = state.nonce;
        if self.terms.forged_nonce {
            nonce = nonce.forged();
        }
        let deadline = began + self.terms.transfer_timeout;
        let task = FetchTask {
            request: fetch.request,
            claim: Claim {
                ctx_request_id: fetch.ticket.ctx_request_id,
                epoch: state.epoch,
                nonce,
            },
            instance: state.instance,
            endpoint,
            token_count: state.token_count,
            began,
            timer: self.timers.set(deadline, Due::Fetch(transfer)),
            blocks,
            pieces,
            remotes: Vec::new(),
            verified: 0,
            done: false,
            phase: Phase::Queued,
        };
        self.by_request.insert(fetch.request, transfer);
        self.fetches.insert(transfer, task);
        self.waiting.push_back(transfer);
    }

    /// Checks a fetch against its ticket; nothing has happened yet.
    fn plan(&self, fetch: &Fetch) -> Result<(OpaqueState, EndpointRecord), HandoffError> {
        if self.stopping {
            return Err(HandoffError::Cancelled);
        }
        if self.by_request.contains_key(&fetch.request) {
            let text = format!("request {} is being fetched already", fetch.request.0);
            return Err(HandoffError::Transport(text));
        }
        let state = OpaqueState::decode(&fetch.ticket.opaque_state)?;
        self.terms.layout.check(&state.layout)?;
        if state.token_count != fetch.token_count as u64 {
            return Err(HandoffError::State(format!(
                "kv of {} tokens there, {} expected",
                state.token_count, fetch.token_count
            )));
        }
        let needed = state.token_count.div_ceil(self.terms.tokens_per_block);
        if needed != fetch.pages.len() as u64 {
            return Err(HandoffError::State(format!(
                "{} tokens need {needed} pages, {} given",
                state.token_count,
                fetch.pages.len()
            )));
        }
        let page_bytes = self.terms.page_bytes;
        if let Some((block, page)) = fetch
            .pages
            .iter()
            .find(|(_, page)| page.as_bytes().len() as u64 != page_bytes)
        {
            return Err(HandoffError::Layout(format!(
                "page of block {block} has {} bytes, {page_bytes} expected",
                page.as_bytes().len()
            )));
        }
        let name = self.around.transport.capability().name;
        let endpoint = state.endpoint(self.terms.rank, name)?.clone();
        Ok((state, endpoint))
    }

    fn fresh_transfer(&self) -> TransferId {
        loop {
            let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
            let transfer = TransferId(high ^ low);
            if !self.fetches.contains_key(&transfer) {
                return transfer;
            }
        }
    }

    /// Starts fetches while there is room.
    pub(super) fn start_waiting(&mut self) {
        while self.running < self.terms.fetches_running_max {
            let Some(transfer) = self.waiting.pop_front() else {
                return;
            };
            if self.fetches.contains_key(&transfer)
                && let Err(error) = self.start(transfer)
            {
                self.fail(transfer, error);
            }
        }
    }

    fn start(&mut self, transfer: TransferId) -> Result<(), HandoffError> {
        let Some(task) = self.fetches.get_mut(&transfer) else {
            return Ok(());
        };
        for piece in &mut task.pieces {
            let Piece::Held(page) = std::mem::replace(piece, Piece::Gone) else {
                continue;
            };
            match self.around.transport.register(page) {
                Ok(region) => {
                    *piece = Piece::Registered(region.id);
                    task.remotes.push(region.remote);
                }
                Err(refused) => {
                    *piece = Piece::Held(refused.page);
                    return Err(HandoffError::Transport(refused.reason));
                }
            }
        }
        self.ask(transfer)
    }

    /// Sends the request, over the connection that is there or over a new one.
    fn ask(&mut self, transfer: TransferId) -> Result<(), HandoffError> {
        let Some(task) = self.fetches.get(&transfer) else {
            return Ok(());
        };
        let request = Message::Request(Request {
            version: PROTOCOL_VERSION,
            claim: task.claim,
            transfer,
            layout: self.terms.layout.clone(),
            token_count: task.token_count,
            regions: task.remotes.clone(),
        });
        let server = task.context_server();
        let endpoint = task.endpoint.clone();
        let (mut peer, mut cached) = self.connect(&endpoint)?;
        let mut submission = self.tell(peer, &request);
        if submission == Submission::Gone && cached {
            self.peers.remove(&endpoint);
            (peer, cached) = self.connect(&endpoint)?;
            submission = self.tell(peer, &request);
        }
        let failure = match submission {
            // Gone so soon: the loss of the new connection is on its way, and says why.
            Submission::Accepted | Submission::Gone => {
                self.set_running(transfer, peer, cached);
                return Ok(());
            }
            Submission::Busy => "takes no more messages",
            Submission::Invalid => "cannot be sent so long a request",
        };
        Err(HandoffError::Transport(format!("{server} {failure}")))
    }

    fn set_running(&mut self, transfer: TransferId, peer: PeerId, cached: bool) {
        let Some(task) = self.fetches.get_mut(&transfer) else {
            return;
        };
        if task.phase == Phase::Queued {
            self.running += 1;
        }
        task.phase = Phase::Running {
            peer,
            cached,
            heard: false,
        };
    }

    /// A connection to an endpoint, and whether it was there before.
    fn connect(&mut self, endpoint: &EndpointRecord) -> Result<(PeerId, bool), HandoffError> {
        if let Some(&peer) = self.peers.get(endpoint) {
            return Ok((peer, true));
        }
        let deadline = Instant::now() + self.terms.transfer_timeout;
        let peer = self
            .around
            .transport
            .connect(endpoint, deadline)
            .map_err(|e| HandoffError::Transport(e.to_string()))?;
        self.peers.insert(endpoint.clone(), peer);
        self.known.insert(peer);
        Ok((peer, false))
    }

    /// The task of a peer's message, if it is that peer's.
    fn heard(&mut self, from: PeerId, transfer: TransferId) -> Option<&mut FetchTask> {
        let task = self.fetches.get_mut(&transfer)?;
        match &mut task.phase {
            Phase::Running { peer, heard, .. } if *peer == from => *heard = true,
            _ => return None,
        }
        Some(task)
    }

    pub(super) fn on_refused(&mut self, peer: PeerId, transfer: TransferId, reason: &str) {
        if self.heard(peer, transfer).is_some() {
            self.fail(transfer, HandoffError::Refused(printable(reason)));
        }
    }

    pub(super) fn on_done(&mut self, peer: PeerId, transfer: TransferId, sent: (u64, u64)) {
        let page_bytes = self.terms.page_bytes;
        let Some(task) = self.heard(peer, transfer) else {
            return;
        };
        let pieces = task.pieces.len() as u64;
        let expected = (pieces * page_bytes, pieces);
        if sent != expected {
            let text = format!(
                "{} sent {} bytes in {} pieces, {} in {} expected",
                task.context_server(),
                sent.0,
                sent.1,
                expected.0,
                expected.1
            );
            self.fail(transfer, HandoffError::Transport(text));
            return;
        }
        task.done = true;
        self.complete_if_all_came(transfer);
    }

    pub(super) fn on_landed(
        &mut self,
        peer: PeerId,
        region: RegionId,
        transfer: TransferId,
        runs: &Runs,
        note: &[u8],
    ) {
        let bytes = runs.total_bytes();
        let whole = bytes as u64 == self.terms.page_bytes && *runs == Runs::whole(bytes);
        let Some(task) = self.heard(peer, transfer) else {
            return;
        };
        let server = task.context_server();
        let (piece, expected) = match task.place(region, whole, note) {
            Ok(place) => place,
            Err(what) => {
                let text = format!("{server} sent {what}");
                self.fail(transfer, HandoffError::Transport(text));
                return;
            }
        };
        task.pieces[piece] = Piece::Checking(region);
        match self.around.transport.deregister(region) {
            Deregistered::Now(page) => self.around.checksums.check(Landed {
                transfer,
                region,
                piece,
                page,
                expected,
            }),
            Deregistered::Later | Deregistered::Unknown => {
                let text = format!("{server} sent piece {piece} twice");
                self.fail(transfer, HandoffError::Transport(text));
            }
        }
    }

    pub(super) fn on_checked(&mut self, checked: Checked) {
        if let Some(block) = self.release(checked.region) {
            self.give_back(vec![(block, checked.page)]);
            return;
        }
        let Some(task) = self.fetches.get_mut(&checked.transfer) else {
            tracing::error!(region = checked.region.0, "a checked page has no fetch");
            return;
        };
        if checked.found == checked.expected {
            task.pieces[checked.piece] = Piece::Verified(checked.page);
            task.verified += 1;
            self.complete_if_all_came(checked.transfer);
            return;
        }
        task.pieces[checked.piece] = Piece::Held(checked.page);
        let text = format!(
            "piece {} of {} of request {} from {}: {:016x} sent, {:016x} arrived",
            checked.piece,
            task.pieces.len(),
            task.claim.ctx_request_id,
            task.context_server(),
            checked.expected,
            checked.found
        );
        self.around.info.add(Count::ChecksumMismatches, 1);
        self.fail(checked.transfer, HandoffError::Checksum(text));
    }

    pub(super) fn on_page_released(&mut self, region: RegionId, page: Page) {
        match self.release(region) {
            Some(block) => self.give_back(vec![(block, page)]),
            None => tracing::error!(region = region.0, "a released page belongs to no fetch"),
        }
    }

    pub(super) fn on_fetch_due(&mut self, transfer: TransferId) {
        if let Some(task) = self.fetches.get(&transfer) {
            let error = HandoffError::TimedOut(task.describe_wait());
            self.fail(transfer, error);
        }
    }

    pub(super) fn on_cancel_fetch(&mut self, request: RequestId) {
        let Some(&transfer) = self.by_request.get(&request) else {
            return;
        };
        // A fetch that never asked tells the context server all the same, so that its lease need not run out.
        if let Some(task) = self.fetches.get(&transfer)
            && task.phase == Phase::Queued
        {
            let cancel = Message::Cancel {
                transfer,
                claim: task.claim,
            };
            let endpoint = task.endpoint.clone();
            if let Ok((peer, _)) = self.connect(&endpoint) {
                self.tell_in_passing(peer, &cancel);
            }
        }
        self.fail(transfer, HandoffError::Cancelled);
    }

    /// Fails the fetches of a lost peer; one that found a dead connection tries a new one, once.
    pub(super) fn fetching_peer_lost(&mut self, peer: PeerId, reason: &str) {
        let lost: Vec<_> = self
            .fetches
            .iter()
            .filter(|(_, task)| task.peer() == Some(peer))
            .map(|(transfer, task)| (*transfer, task.phase, task.context_server()))
            .collect();
        for (transfer, phase, server) in lost {
            let may_try_again = matches!(
                phase,
                Phase::Running {
                    cached: true,
                    heard: false,
                    ..
                }
            ) && !self.stopping;
            let outcome = if may_try_again {
                self.ask(transfer)
            } else {
                let instance = format!("lost {server}: {}", printable(reason));
                Err(HandoffError::Transport(instance))
            };
            if let Err(error) = outcome {
                self.fail(transfer, error);
            }
        }
    }

    fn complete_if_all_came(&mut self, transfer: TransferId) {
        let complete = |task: &FetchTask| task.done && task.verified == task.pieces.len();
        if !self.fetches.get(&transfer).is_some_and(complete) {
            return;
        }
        let Some((task, pages)) = self.take_apart(transfer) else {
            return;
        };
        if let Some(peer) = task.peer() {
            self.tell_in_passing(peer, &Message::Acknowledge { transfer });
        }
        let elapsed = task.began.elapsed();
        let bytes = pages.len() as u64 * self.terms.page_bytes;
        self.around.info.fetched(bytes, elapsed);
        self.give_back(pages);
        let stats = HandoffStats {
            transport: self.around.transport.capability().name.to_owned(),
            bytes,
            elapsed,
        };
        self.decide(task.request, Ok(stats));
    }

    /// Ends a fetch without its KV; the only such way.
    pub(super) fn fail(&mut self, transfer: TransferId, error: HandoffError) {
        let Some((task, pages)) = self.take_apart(transfer) else {
            return;
        };
        let context_knows = matches!(error, HandoffError::Refused(_));
        if let Some(peer) = task.peer().filter(|_| !context_knows) {
            let claim = task.claim;
            self.tell_in_passing(peer, &Message::Cancel { transfer, claim });
        }
        self.give_back(pages);
        self.decide(task.request, Err(error));
    }

    /// Takes a fetch out of the books: the pages that are here, the others into quarantine.
    fn take_apart(&mut self, transfer: TransferId) -> Option<(FetchTask, Vec<(BlockId, Page)>)> {
        let mut task = self.fetches.remove(&transfer)?;
        self.timers.cancel(task.timer);
        self.by_request.remove(&task.request);
        match task.phase {
            Phase::Queued => self.waiting.retain(|waiting| *waiting != transfer),
            Phase::Running { .. } => self.running -= 1,
        }
        let mut pages = Vec::with_capacity(task.pieces.len());
        for (block, piece) in task.blocks.iter().zip(task.pieces.drain(..)) {
            match piece {
                Piece::Held(page) | Piece::Verified(page) => pages.push((*block, page)),
                Piece::Gone => {}
                Piece::Checking(region) => {
                    self.quarantine.insert(region, *block);
                }
                Piece::Registered(region) => match self.around.transport.deregister(region) {
                    Deregistered::Now(page) => pages.push((*block, page)),
                    Deregistered::Later | Deregistered::Unknown => {
                        self.quarantine.insert(region, *block);
                    }
                },
            }
        }
        self.around.info.set_quarantined(self.quarantine.len());
        Some((task, pages))
    }

    /// Ends a page's quarantine.
    fn release(&mut self, region: RegionId) -> Option<BlockId> {
        let block = self.quarantine.remove(&region)?;
        self.around.info.set_quarantined(self.quarantine.len());
        Some(block)
    }

    fn give_back(&self, pages: Vec<(BlockId, Page)>) {
        if !pages.is_empty() {
            self.emit(HandoffEvent::PagesReturned { pages });
        }
    }

    fn decide(&self, request: RequestId, outcome: Result<HandoffStats, HandoffError>) {
        match &outcome {
            Ok(stats) => tracing::debug!(
                request_id = request.0,
                kv_bytes = stats.bytes,
                elapsed_us = stats.elapsed.as_micros(),
                bytes_per_second = self.around.info.stats().last_bytes_per_second,
                transport = stats.transport,
                "kv fetched"
            ),
            Err(error) => {
                self.around.info.add(Count::FetchesFailed, 1);
                tracing::debug!(request_id = request.0, %error, "kv fetch failed");
            }
        }
        self.around.info.release(Held::Fetches);
        self.emit(HandoffEvent::FetchEnded { request, outcome });
    }
}

impl FetchTask {
    /// Which piece a landed region is, with the checksum that it shall have; otherwise what is wrong with it.
    fn place(&self, region: RegionId, whole: bool, note: &[u8]) -> Result<(usize, u64), String> {
        let note = PieceNote::decode(note).ok_or("a piece without a proper note")?;
        if note.epoch != self.claim.epoch {
            return Err(format!(
                "a piece of epoch {:016x} instead of {:016x}",
                note.epoch, self.claim.epoch
            ));
        }
        if note.ctx_request_id != self.claim.ctx_request_id {
            return Err(format!(
                "a piece of request {} instead of {}",
                note.ctx_request_id, self.claim.ctx_request_id
            ));
        }
        let index = usize::try_from(note.piece).unwrap_or(usize::MAX);
        match self.pieces.get(index) {
            Some(Piece::Registered(expected)) if *expected == region && whole => {
                Ok((index, note.checksum))
            }
            _ => Err(format!("piece {} where it does not belong", note.piece)),
        }
    }
}

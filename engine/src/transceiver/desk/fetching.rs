//! The generation side: fetches, their pages, and the pages of ended fetches that are not back yet.
//!
//! Every page of a fetch is in exactly one place: held here, registered with the transport, or with a checksum
//! thread. It is complete when each piece that its sources owe it has landed, and then verified piece by piece. When a
//! fetch ends, what is here goes back at once; the rest is in quarantine until it shows up.

use std::collections::BTreeMap;
use std::time::Instant;

use super::Desk;
use super::stock::Stock;
use super::task::{FetchTask, Landing, Phase, Source, Unfit};
use crate::handoff::{BlockPages, Fetch, HandoffError, HandoffEvent, HandoffStats, RankMove};
use crate::page::Page;
use crate::request::RequestId;
use crate::transceiver::checksum::Landed;
use crate::transceiver::inbox::{Checked, Mismatch};
use crate::transceiver::info::{Count, Held};
use crate::transceiver::message::{Claim, Message, Taker};
use crate::transceiver::plan::Plan;
use crate::transceiver::regions::RemoteRegions;
use crate::transceiver::state::printable;
use crate::transceiver::timers::Due;
use crate::transport::{PeerId, RegionId, TransferId};

impl Desk {
    pub(super) fn on_fetch(&mut self, fetch: Fetch, plan: Result<Box<Plan>, HandoffError>) {
        let began = Instant::now();
        let plan = match self.may_begin(fetch.request).and(plan) {
            Ok(plan) => *plan,
            Err(error) => {
                self.give_back(fetch.pages);
                self.decide(fetch.request, Err(error));
                return;
            }
        };
        let transfer = self.fresh_transfer();
        let state = plan.state;
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
            taker: Taker {
                epoch: self.terms.epoch,
                request: fetch.request.0,
            },
            instance: state.instance,
            there: plan.there,
            first_token: fetch.first_token,
            token_count: fetch.token_count,
            first_page: 0,
            began,
            timer: self.timers.set(deadline, Due::Fetch(transfer)),
            stock: Stock::new(fetch.pages),
            missing: Vec::new(),
            unsummed: BTreeMap::new(),
            sources: plan.senders.into_iter().map(Source::of).collect(),
            way: plan.way,
            ways: plan.ways,
            remotes: RemoteRegions::default(),
            leave_out_checksums: self.terms.leave_out_checksums,
            phase: Phase::Queued,
        };
        self.by_request.insert(fetch.request, transfer);
        self.fetches.insert(transfer, task);
        self.waiting.push_back(transfer);
    }

    /// Gives a fetch back that there is no room for.
    pub(super) fn on_unfetched(&mut self, fetch: Fetch, error: HandoffError) {
        let request = fetch.request;
        self.give_back(fetch.pages);
        let outcome = Err(error);
        self.emit(HandoffEvent::FetchEnded { request, outcome });
    }

    /// Whether it may begin.
    fn may_begin(&self, request: RequestId) -> Result<(), HandoffError> {
        if self.stopping {
            return Err(HandoffError::Cancelled);
        }
        if self.by_request.contains_key(&request) {
            let text = format!("request {} is being fetched already", request.0);
            return Err(HandoffError::Transport(text));
        }
        Ok(())
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
            if let Some(task) = self.fetches.get_mut(&transfer) {
                task.phase = Phase::Running;
                self.running += 1;
                self.go(transfer, None);
                self.expect(transfer);
            }
        }
    }

    /// Works out what was asked for, while those who were asked do what they have to. Before this nothing that they say is heard.
    fn expect(&mut self, transfer: TransferId) {
        let own = (&self.terms.layout.side, self.terms.rank);
        if let Some(task) = self.fetches.get_mut(&transfer) {
            task.expect(own);
        }
    }

    /// The task and the source of a peer's message, if it is that peer's.
    pub(super) fn heard(
        &mut self,
        from: PeerId,
        transfer: TransferId,
    ) -> Option<(&mut FetchTask, usize)> {
        let task = self.fetches.get_mut(&transfer)?;
        if task.phase != Phase::Running {
            return None;
        }
        let source = task.source_of(from)?;
        task.sources[source].heard = true;
        Some((task, source))
    }

    pub(super) fn on_refused(&mut self, peer: PeerId, transfer: TransferId, reason: &str) {
        if self.heard(peer, transfer).is_some() {
            self.fail(transfer, HandoffError::Refused(printable(reason)));
        }
    }

    pub(super) fn on_done(&mut self, peer: PeerId, transfer: TransferId, sent: (u64, u64)) {
        let Some((task, source)) = self.heard(peer, transfer) else {
            return;
        };
        let expected = task.sources[source].total();
        if sent != expected {
            let text = format!(
                "{} sent {} bytes in {} pieces, {} in {} expected",
                task.server(source),
                sent.0,
                sent.1,
                expected.0,
                expected.1
            );
            self.fail(transfer, HandoffError::Transport(text));
            return;
        }
        task.sources[source].done = true;
        self.complete_if_all_came(transfer);
    }

    pub(super) fn on_landed(
        &mut self,
        (peer, transfer): (PeerId, TransferId),
        landing: Landing<'_>,
    ) {
        let Some((_, source)) = self.heard(peer, transfer) else {
            return;
        };
        match self.land_row(transfer, source, &landing) {
            Ok(()) => self.complete_if_all_came(transfer),
            Err(Unfit::Mismatch(wrong)) => self.mismatched(transfer, wrong),
            Err(Unfit::Sent(what)) => {
                let server = self.fetches.get(&transfer).map(|task| task.server(source));
                let text = format!("{} sent {what}", server.unwrap_or_default());
                self.fail(transfer, HandoffError::Transport(text));
            }
        }
    }

    /// Takes note of the pieces of a row, and of the pages that are whole with them.
    fn land_row(
        &mut self,
        transfer: TransferId,
        source: usize,
        landing: &Landing<'_>,
    ) -> Result<(), Unfit> {
        let Some(task) = self.fetches.get_mut(&transfer) else {
            return Ok(());
        };
        let transport = &*self.around.wires.all()[task.way.wire];
        let note = task.row(source, landing)?;
        let whole = task.land(source, (landing, &note))?;
        let twice = |page: usize| Unfit::Sent(format!("a piece of page {page} twice"));
        for pages in whole.right {
            let first = pages.start;
            if !task.stock.seal(pages, transport) {
                return Err(twice(first));
            }
        }
        for index in whole.unsummed {
            let parts = task.unsummed.remove(&index).unwrap_or_default();
            let back = task.stock.check(index, transport);
            let (region, page) = back.ok_or_else(|| twice(index))?;
            self.around.checksums.check(Landed {
                transfer,
                region,
                index,
                page,
                parts,
            });
        }
        Ok(())
    }

    pub(super) fn on_checked(&mut self, checked: Checked) {
        let region = checked.region;
        let Some(page) = self.settle_page(region, checked.page) else {
            return;
        };
        let Some(task) = self.fetches.get_mut(&checked.transfer) else {
            tracing::error!(region = region.0, "a checked page has no fetch");
            return;
        };
        match checked.mismatch {
            None => {
                task.stock.put_verified(checked.index, page);
                self.complete_if_all_came(checked.transfer);
            }
            Some(wrong) => {
                task.stock.put(checked.index, page);
                self.mismatched(checked.transfer, wrong);
            }
        }
    }

    /// Fails a fetch for a piece that is not what was sent.
    fn mismatched(&mut self, transfer: TransferId, wrong: Mismatch) {
        let Some(task) = self.fetches.get(&transfer) else {
            return;
        };
        let text = format!(
            "piece {} of {} of request {} from {}: {:016x} sent, {:016x} arrived",
            wrong.piece,
            task.sources[wrong.source].expected.len(),
            task.claim.ctx_request_id,
            task.server(wrong.source),
            wrong.expected,
            wrong.found
        );
        self.around.info.add(Count::ChecksumMismatches, 1);
        self.fail(transfer, HandoffError::Checksum(text));
    }

    pub(super) fn on_page_released(&mut self, region: RegionId, page: Page) {
        if self.settle_page(region, page).is_some() {
            tracing::error!(region = region.0, "a released page belongs to no fetch");
        }
    }

    /// Takes a page that nobody writes any more out of quarantine, or to the fetch that waits for it. Comes back when it
    /// is neither.
    fn settle_page(&mut self, region: RegionId, page: Page) -> Option<Page> {
        if let Some(block) = self.quarantine.remove(&region) {
            self.around.info.set_quarantined(self.quarantine.len());
            self.give_back(BlockPages::from_iter([(block, page)]));
            return None;
        }
        let Some((transfer, index)) = self.leaving.remove(&region) else {
            return Some(page);
        };
        self.came_back(transfer, index, page);
        None
    }

    /// The context server goes on reading the prompt: the time allowed starts anew.
    pub(super) fn on_extended(&mut self, peer: PeerId, transfer: TransferId) {
        let deadline = Instant::now() + self.terms.transfer_timeout;
        let Some((task, _)) = self.heard(peer, transfer) else {
            return;
        };
        let timer = task.timer;
        self.timers.cancel(timer);
        let timer = self.timers.set(deadline, Due::Fetch(transfer));
        if let Some(task) = self.fetches.get_mut(&transfer) {
            task.timer = timer;
        }
    }

    pub(super) fn on_fetch_due(&mut self, transfer: TransferId) {
        if let Some(task) = self.fetches.get(&transfer) {
            let error = HandoffError::TimedOut(task.describe_wait());
            self.fail(transfer, error);
        }
    }

    pub(super) fn on_cancel_fetch(&mut self, request: RequestId) {
        if let Some(&transfer) = self.by_request.get(&request) {
            self.fail(transfer, HandoffError::Cancelled);
        }
    }

    fn complete_if_all_came(&mut self, transfer: TransferId) {
        if !self
            .fetches
            .get(&transfer)
            .is_some_and(FetchTask::is_complete)
        {
            return;
        }
        let Some((task, pages)) = self.take_apart(transfer) else {
            return;
        };
        let (elapsed, bytes) = (task.began.elapsed(), task.bytes());
        let transport = self.around.wires.name(task.way.wire);
        let info = &self.around.info;
        info.fetched(task.way.wire, bytes, elapsed);
        info.goes_to(&printable(&task.instance), transport);
        self.give_back(pages);
        let stats = HandoffStats {
            bytes,
            elapsed,
            moves: self.moves(&task),
        };
        self.decide(task.request, Ok(stats));
        // The request waits for none of these.
        for peer in task.sources.iter().filter_map(|source| source.peer) {
            self.tell_in_passing(peer, &Message::Acknowledge { transfer });
        }
    }

    /// What this rank took from each of a fetch's sources.
    fn moves(&self, task: &FetchTask) -> Vec<RankMove> {
        let number = |rank: usize| u32::try_from(rank).unwrap_or(u32::MAX);
        let sources = task.sources.iter().map(|source| RankMove {
            rank: number(self.terms.rank),
            peer: printable(&task.instance),
            peer_rank: number(source.rank),
            transport: self.around.wires.name(task.way.wire).to_owned(),
            bytes: source.total().0,
        });
        sources.collect()
    }

    /// Ends a fetch without its KV; the only such way.
    pub(super) fn fail(&mut self, transfer: TransferId, error: HandoffError) {
        let Some((task, pages)) = self.take_apart(transfer) else {
            return;
        };
        self.tell_sources(transfer, &task, &error);
        self.give_back(pages);
        self.decide(task.request, Err(error));
    }

    /// Tells every rank that owes something of a fetch's end, those that were never asked too, so that their leases need
    /// not run out.
    fn tell_sources(&mut self, transfer: TransferId, task: &FetchTask, error: &HandoffError) {
        let refused = matches!(error, HandoffError::Refused(_));
        let cancel = Message::Cancel {
            transfer,
            claim: task.claim,
            taker: task.taker,
            reason: None,
        };
        for (index, source) in task.sources.iter().enumerate() {
            match source.peer {
                // Whoever is alone in refusing knows.
                Some(_) if refused && task.sources.len() == 1 => {}
                Some(peer) => self.tell_in_passing(peer, &cancel),
                None if task.phase != Phase::Running && !self.stopping => {
                    let endpoint = task.endpoint(index);
                    self.tell_endpoint(task.way.wire, endpoint, &cancel);
                }
                None => {}
            }
        }
    }

    /// Takes a fetch out of the books: the pages that are here, the others into quarantine.
    fn take_apart(&mut self, transfer: TransferId) -> Option<(FetchTask, BlockPages)> {
        let mut task = self.fetches.remove(&transfer)?;
        self.timers.cancel(task.timer);
        self.by_request.remove(&task.request);
        match task.phase {
            Phase::Queued => self.waiting.retain(|waiting| *waiting != transfer),
            Phase::Running | Phase::Moving(_) => self.running -= 1,
        }
        let transport = &*self.around.wires.all()[task.way.wire];
        for index in task.stock.recall(transport) {
            if let Some(region) = task.stock.region(index) {
                self.leaving.remove(&region);
                self.quarantine.insert(region, task.stock.block(index));
            }
        }
        self.around.info.set_quarantined(self.quarantine.len());
        let pages = std::mem::take(&mut task.stock).into_pages();
        Some((task, pages))
    }

    fn give_back(&mut self, pages: BlockPages) {
        if !pages.is_empty() {
            self.emit(HandoffEvent::PagesReturned { pages });
        }
    }

    fn decide(&mut self, request: RequestId, outcome: Result<HandoffStats, HandoffError>) {
        match &outcome {
            Ok(stats) => tracing::debug!(
                request_id = request.0,
                kv_bytes = stats.bytes,
                elapsed_us = stats.elapsed.as_micros(),
                bytes_per_second = self.around.info.stats().last_bytes_per_second,
                transport = stats.transport(),
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

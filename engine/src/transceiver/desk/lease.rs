//! What the context side keeps of a lease: its pages, who takes them, and the pieces on their way to each of these.
//!
//! A taker is a generation instance; several of its ranks may take from one lease, each its own pieces. Pure books: no
//! transport is called here.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::lent::LentPages;
use super::sums::{Sum, Sums};
use crate::handoff::LeaseEnd;
use crate::transceiver::checksum::{Algorithm, Checksums, PageRow};
use crate::transceiver::message::Taker;
use crate::transceiver::regions::RemoteRegions;
use crate::transceiver::reshard::{Piece, Pieces};
use crate::transceiver::state::{LayoutRecord, Nonce};
use crate::transceiver::timers::TimerKey;
use crate::transport::{PeerId, ROW_PAGES_MAX, RemoteRegion, Runs, Sources, TransferId};

/// Bytes of a row, if it has more than one piece: so many that what a row costs is little beside them, and so few that a cancel,
/// which reaches whole rows, comes soon.
const ROW_BYTES_MAX: usize = 4 << 20;

/// Pages kept for a generation instance.
#[derive(Debug)]
pub(super) struct Lease {
    /// Those of the tokens that are read; an open lease gets more.
    pub(super) pages: LentPages,
    pub(super) token_count: usize,
    pub(super) nonce: Nonce,
    /// When the lease ends if nobody is being served.
    pub(super) deadline: Instant,
    pub(super) timer: TimerKey,
    /// What is held of each page, as this rank would send it to its like.
    pub(super) held: Pieces,
    /// Of what is held of the first pages, as far as they are summed.
    pub(super) checksums: Checksums,
    pub(super) unsummed: Unsummed,
    /// Jobs of the checksum threads that hold pages.
    pub(super) hashing: usize,
    pub(super) given_up: Arc<AtomicBool>,
    pub(super) taking: Option<Taking>,
    pub(super) servings: Vec<Serving>,
    /// Set once it is ending.
    pub(super) end: Option<LeaseEnd>,
}

/// The generation instance that takes a lease.
#[derive(Debug)]
pub(super) struct Taking {
    pub(super) taker: Taker,
    pub(super) layout: LayoutRecord,
    pub(super) first_token: usize,
    /// Its ranks that need something of this one.
    pub(super) receivers: Vec<usize>,
    /// Of these, those that have acknowledged.
    pub(super) delivered: BTreeSet<usize>,
}

impl Taking {
    pub(super) fn is_complete(&self) -> bool {
        self.delivered.len() == self.receivers.len()
    }
}

/// Pieces on their way to one rank.
#[derive(Debug)]
pub(super) struct Serving {
    pub(super) peer: PeerId,
    pub(super) transfer: TransferId,
    /// The receiver's rank.
    pub(super) rank: usize,
    pub(super) pieces: Pieces,
    pub(super) regions: RemoteRegions,
    /// The receiver's page that the first region is.
    pub(super) first_page: usize,
    /// For each piece, where its checksum is.
    pub(super) sums: Sums,
    /// Checksums of pieces that are not all that is held of a page, as far as they are made.
    pub(super) own_sums: Checksums,
    pub(super) unsummed: Unsummed,
    pub(super) given_up: Arc<AtomicBool>,
    /// The next piece to submit.
    pub(super) next: usize,
    pub(super) in_flight: InFlight,
    /// Not wanted over this wire any more.
    pub(super) released: bool,
}

/// The rows that the transport holds, by how many pieces they have, in the order in which they end.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    rows: VecDeque<usize>,
    pieces: usize,
}

impl InFlight {
    /// The transport has taken a row.
    pub(super) fn add(&mut self, pieces: usize) {
        self.rows.push_back(pieces);
        self.pieces += pieces;
    }

    /// It has let go of so many.
    pub(super) fn end(&mut self, rows: usize) {
        for pieces in self.rows.drain(..rows) {
            self.pieces -= pieces;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Of all rows.
    pub(super) const fn pieces(&self) -> usize {
        self.pieces
    }
}

/// Pieces that are submitted together, as one write.
#[derive(Debug)]
pub(super) struct Row<'a> {
    pub(super) sources: Sources,
    /// Of the first one.
    pub(super) target: RemoteRegion,
    /// Of each.
    pub(super) runs: &'a Runs,
    pub(super) algorithm: Algorithm,
    /// One for each piece.
    pub(super) sums: &'a [u64],
    /// Whether the transport makes the sums.
    pub(super) summed_on_the_way: bool,
}

/// The sums of a row, before the transport has made them.
static UNMADE: [u64; ROW_PAGES_MAX] = [0; ROW_PAGES_MAX];

/// There is no place for a piece.
#[derive(Debug)]
pub(super) struct NoTarget;

/// How many pieces like this one may go together.
fn together(runs: &Runs) -> usize {
    match runs.as_slice() {
        [_] => (ROW_BYTES_MAX / runs.total_bytes()).clamp(1, ROW_PAGES_MAX),
        _ => 1,
    }
}

impl Serving {
    /// Where a piece goes, and for how many from it on the places of the next ones follow. There is such a place: as many regions
    /// were asked for as the receiver needs pages.
    fn target(&self, piece: Piece<'_>) -> Result<(RemoteRegion, usize), NoTarget> {
        let index = piece.receiver_page.checked_sub(self.first_page);
        let target = index.and_then(|index| self.regions.alike(index));
        target.ok_or(NoTarget)
    }
}

/// What is to be summed, in order: one job of the checksum threads at a time, so that sums come in that order.
#[derive(Debug, Default)]
pub(super) struct Unsummed {
    /// Pages, or pieces, that were looked at.
    seen: usize,
    parts: VecDeque<PageRow>,
    /// A job is under way.
    running: bool,
}

impl Unsummed {
    /// The next job's parts, if there are any and none is under way.
    pub(super) fn start(&mut self) -> Option<VecDeque<PageRow>> {
        if self.running || self.parts.is_empty() {
            return None;
        }
        self.running = true;
        Some(std::mem::take(&mut self.parts))
    }

    /// The job is over.
    pub(super) fn ended(&mut self) {
        self.running = false;
    }

    /// Looks at the next pieces, as far as their pages have come, and notes those that are to be summed: of each, `wanted` says whether
    /// it is, and for how many from it on that is so.
    fn note(
        &mut self,
        pieces: &Pieces,
        pages: &LentPages,
        wanted: impl Fn(usize) -> Option<(bool, usize)>,
    ) {
        while let Some((piece, alike)) = pieces.alike(self.seen)
            && let Some((is_wanted, as_much)) = wanted(self.seen)
            && let Some(sources) = pages.row(piece.sender_page, alike.min(as_much))
        {
            self.seen += sources.len();
            if is_wanted {
                self.parts.push_back((sources, piece.runs.clone()));
            }
        }
    }
}

impl Lease {
    pub(super) fn serving(&self, peer: PeerId, transfer: TransferId) -> Option<&Serving> {
        let mut servings = self.servings.iter();
        servings.find(|serving| (serving.peer, serving.transfer) == (peer, transfer))
    }

    pub(super) fn serving_mut(
        &mut self,
        peer: PeerId,
        transfer: TransferId,
    ) -> Option<&mut Serving> {
        let mut servings = self.servings.iter_mut();
        servings.find(|serving| (serving.peer, serving.transfer) == (peer, transfer))
    }

    /// Takes a transfer out. True when nobody is left who has the lease or a part of it.
    pub(super) fn remove(&mut self, peer: PeerId, transfer: TransferId) -> bool {
        self.servings
            .retain(|serving| (serving.peer, serving.transfer) != (peer, transfer));
        let untouched = |taking: &Taking| taking.delivered.is_empty();
        if self.servings.is_empty() && self.taking.as_ref().is_some_and(untouched) {
            self.taking = None;
        }
        self.servings.is_empty()
    }

    /// Whether somebody still holds its pages.
    pub(super) fn is_held(&self) -> bool {
        self.hashing > 0
            || self
                .servings
                .iter()
                .any(|serving| !serving.in_flight.is_empty())
    }

    /// Whether pages are still to come.
    pub(super) fn is_open(&self) -> bool {
        self.pages.len() < self.held.len()
    }

    /// Notes what is to be summed of pages that have come: all that is held of them, and what transfers have of them to
    /// themselves. Pieces come in the order of these pages.
    pub(super) fn note_unsummed(&mut self) {
        let all = |_| Some((true, usize::MAX));
        self.unsummed.note(&self.held, &self.pages, all);
        for serving in &mut self.servings {
            let sums = &serving.sums;
            let own = |piece| {
                let (sum, alike) = sums.alike(piece)?;
                Some((matches!(sum, Sum::Own(_)), alike))
            };
            serving.unsummed.note(&serving.pieces, &self.pages, own);
        }
    }

    /// The row that begins with this piece, of up to so many, at least one; nothing while its page or checksum is missing.
    pub(super) fn row<'a>(
        &'a self,
        serving: &'a Serving,
        (first, pieces_max): (usize, usize),
        by_transport: bool,
    ) -> Result<Option<Row<'a>>, NoTarget> {
        let (piece, alike) = serving.pieces.alike(first).ok_or(NoTarget)?;
        let (sum, as_summed) = serving.sums.alike(first).ok_or(NoTarget)?;
        let (target, following) = serving.target(piece)?;
        let limits = [as_summed, following, together(piece.runs), pieces_max];
        let count = limits.into_iter().fold(alike, usize::min);
        let Some(mut sources) = self.pages.row(piece.sender_page, count) else {
            return Ok(None);
        };
        let count = sources.len();
        let made = match sum {
            Sum::Page(page) => self.checksums.alike(page, count),
            Sum::Own(own) => serving.own_sums.alike(own, count),
        };
        let on_device = sources.is_on_device();
        let (algorithm, sums) = match made {
            Some(made) => made,
            // Sums are made in order: those of the others are not made either.
            None if by_transport && !on_device => {
                (Algorithm::in_memory(on_device), &UNMADE[..count])
            }
            None => return Ok(None),
        };
        sources.truncate(sums.len());
        Ok(Some(Row {
            sources,
            target,
            runs: piece.runs,
            algorithm,
            sums,
            summed_on_the_way: made.is_none(),
        }))
    }
}

#[cfg(test)]
mod tests;

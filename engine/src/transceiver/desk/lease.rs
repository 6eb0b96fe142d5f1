//! What the context side keeps of a lease: its pages, who takes them, and the pieces on their way to each of these.
//!
//! A taker is a generation instance; several of its ranks may take from one lease, each its own pieces. Pure books: no
//! transport is called here.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use smallvec::{SmallVec, smallvec};

use crate::handoff::LeaseEnd;
use crate::page::Page;
use crate::transceiver::checksum::{Algorithm, Checksum};
use crate::transceiver::message::Taker;
use crate::transceiver::regions::RemoteRegions;
use crate::transceiver::reshard::{Piece, Pieces};
use crate::transceiver::state::{LayoutRecord, Nonce};
use crate::transceiver::timers::TimerKey;
use crate::transport::{PeerId, ROW_PAGES_MAX, RemoteRegion, Runs, TransferId};

/// Bytes of a row, if it has more than one piece: so many that what a row costs is little beside them, and so few that a cancel,
/// which reaches whole rows, comes soon.
const ROW_BYTES_MAX: usize = 1 << 20;

/// Pages kept for a generation instance.
#[derive(Debug)]
pub(super) struct Lease {
    /// Those of the tokens that are read; an open lease gets more.
    pub(super) pages: Vec<Arc<Page>>,
    pub(super) token_count: usize,
    pub(super) nonce: Nonce,
    /// When the lease ends if nobody is being served.
    pub(super) deadline: Instant,
    pub(super) timer: TimerKey,
    /// What is held of each page, as this rank would send it to its like.
    pub(super) held: Pieces,
    /// Of what is held of the first pages, as far as they are summed.
    pub(super) checksums: Vec<Checksum>,
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
    pub(super) sums: Vec<Sum>,
    /// Checksums of pieces that are not all that is held of a page, as far as they are made.
    pub(super) own_sums: Vec<Checksum>,
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
pub(super) struct Row {
    pub(super) sources: Vec<Arc<Page>>,
    /// Of the first one.
    pub(super) target: RemoteRegion,
    pub(super) algorithm: Algorithm,
    pub(super) sums: SmallVec<[u64; 1]>,
    /// Whether the transport makes the sums.
    pub(super) summed_on_the_way: bool,
}

impl Row {
    fn of(part: &Part<'_>) -> Self {
        Self {
            sources: vec![Arc::clone(part.source)],
            target: part.target,
            algorithm: part.checksum.algorithm,
            sums: smallvec![part.checksum.value],
            summed_on_the_way: part.summed_on_the_way,
        }
    }

    /// Takes one more in; false when it does not follow.
    fn take(&mut self, part: &Part<'_>) -> bool {
        let next = RemoteRegion {
            id: self.target.id.wrapping_add(self.sources.len() as u64),
            ..self.target
        };
        let arena = |page: &Arc<Page>| page.arena().map(|(arena, _)| arena.id());
        let follows = part.target == next
            && part.checksum.algorithm == self.algorithm
            && part.summed_on_the_way == self.summed_on_the_way
            && arena(part.source) == arena(&self.sources[0]);
        if follows {
            self.sources.push(Arc::clone(part.source));
            self.sums.push(part.checksum.value);
        }
        follows
    }
}

/// One piece of a row.
#[derive(Debug)]
struct Part<'a> {
    source: &'a Arc<Page>,
    target: RemoteRegion,
    checksum: Checksum,
    summed_on_the_way: bool,
}

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
    /// Where a piece goes. There is such a place: as many regions were asked for as the receiver needs pages.
    pub(super) fn target(&self, piece: Piece<'_>) -> Option<RemoteRegion> {
        self.regions
            .get(piece.receiver_page.checked_sub(self.first_page)?)
    }
}

/// What is to be summed, in order: one job of the checksum threads at a time, so that sums come in that order.
#[derive(Debug, Default)]
pub(super) struct Unsummed {
    /// Pages, or pieces, that were looked at.
    seen: usize,
    parts: VecDeque<(Arc<Page>, Runs)>,
    /// A job is under way.
    running: bool,
}

impl Unsummed {
    /// The next job's parts, if there are any and none is under way.
    pub(super) fn start(&mut self) -> Option<VecDeque<(Arc<Page>, Runs)>> {
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
}

/// Where a piece's checksum is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sum {
    /// It is a page's, made when it was offered.
    Page(usize),
    /// It is made for this transfer.
    Own(usize),
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

    /// For each of some pieces, where its checksum is or will be.
    pub(super) fn sums(&self, pieces: &Pieces) -> Vec<Sum> {
        let mut own = 0..;
        let sums = pieces.iter().map(|piece| {
            let page = piece.sender_page;
            let held = self.held.get(page);
            if held.is_some_and(|held| same_source(held.runs, piece.runs)) {
                return Sum::Page(page);
            }
            Sum::Own(own.next().unwrap_or(usize::MAX))
        });
        sums.collect()
    }

    /// Whether pages are still to come.
    pub(super) fn is_open(&self) -> bool {
        self.pages.len() < self.held.len()
    }

    /// Notes what is to be summed of pages that have come: all that is held of them, and what transfers have of them to
    /// themselves. Pieces come in the order of these pages.
    pub(super) fn note_unsummed(&mut self) {
        let Self {
            pages,
            held,
            unsummed,
            servings,
            ..
        } = self;
        let new = pages.iter().zip(held.iter()).skip(unsummed.seen);
        let new = new.map(|(page, held)| (Arc::clone(page), held.runs.clone()));
        unsummed.parts.extend(new);
        unsummed.seen = pages.len();
        for serving in servings {
            let unsummed = &mut serving.unsummed;
            let pieces = serving.pieces.iter().zip(&serving.sums);
            for (piece, sum) in pieces.skip(unsummed.seen) {
                let Some(page) = pages.get(piece.sender_page) else {
                    break;
                };
                unsummed.seen += 1;
                if matches!(sum, Sum::Own(_)) {
                    let part = (Arc::clone(page), piece.runs.clone());
                    unsummed.parts.push_back(part);
                }
            }
        }
    }

    /// The row that begins with this piece, of up to so many; nothing while its page or checksum is missing.
    pub(super) fn row(
        &self,
        serving: &Serving,
        (first, pieces_max): (usize, usize),
        by_transport: bool,
    ) -> Result<Option<Row>, NoTarget> {
        let Some(part) = self.part(serving, first, by_transport)? else {
            return Ok(None);
        };
        let mut row = Row::of(&part);
        let Some((piece, alike)) = serving.pieces.alike(first) else {
            return Ok(Some(row));
        };
        let count = alike.min(together(piece.runs)).min(pieces_max);
        for index in first + 1..first + count {
            match self.part(serving, index, by_transport)? {
                Some(part) if row.take(&part) => {}
                Some(_) | None => break,
            }
        }
        Ok(Some(row))
    }

    /// A piece, once its page is there, and its checksum made, unless that is left to the transport.
    fn part(
        &self,
        serving: &Serving,
        index: usize,
        by_transport: bool,
    ) -> Result<Option<Part<'_>>, NoTarget> {
        let piece = serving.pieces.get(index).ok_or(NoTarget)?;
        let Some(source) = self.pages.get(piece.sender_page) else {
            return Ok(None);
        };
        let made = match serving.sums[index] {
            Sum::Page(page) => self.checksums.get(page),
            Sum::Own(index) => serving.own_sums.get(index),
        };
        let makes = by_transport && !source.is_on_device();
        let (checksum, summed_on_the_way) = match made {
            Some(made) => (*made, false),
            None if makes => (Checksum::to_be_made(source), true),
            None => return Ok(None),
        };
        let target = serving.target(piece).ok_or(NoTarget)?;
        Ok(Some(Part {
            source,
            target,
            checksum,
            summed_on_the_way,
        }))
    }
}

/// Whether two say to read the same bytes in the same order, wherever these go.
fn same_source(a: &Runs, b: &Runs) -> bool {
    a.total_bytes() == b.total_bytes() && sources(a).eq(sources(b))
}

/// The stretches of the source, neighbours joined.
fn sources(runs: &Runs) -> impl Iterator<Item = Range<usize>> + '_ {
    let mut stretches = runs.stretches().map(|(source, _)| source).peekable();
    std::iter::from_fn(move || {
        let mut joined = stretches.next()?;
        while let Some(next) = stretches.next_if(|next| next.start == joined.end) {
            joined.end = next.end;
        }
        Some(joined)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::Run;

    #[test]
    fn what_is_read_counts_and_not_where_it_goes() {
        let whole = Runs::whole(12);
        let spread = |source_stride| Run {
            source: 0,
            target: 5,
            bytes: 4,
            count: 3,
            source_stride,
            target_stride: 9,
        };
        let of = |run| Runs::new([run]).unwrap();
        assert!(same_source(&whole, &of(spread(4))));
        assert!(!same_source(&whole, &of(spread(8))));
        assert!(!same_source(&whole, &Runs::whole(11)));
        let turned = Runs::new([Run::once(6, 0, 6), Run::once(0, 6, 6)]).unwrap();
        assert!(!same_source(&whole, &turned));
    }
}

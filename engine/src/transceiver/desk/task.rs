//! What the generation side keeps of a fetch: its pages, the ranks that it takes from, and what is expected of each. Pure
//! books: no transport is called here.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use smallvec::SmallVec;

use super::stock::Stock;
use crate::handoff::HandoffError;
use crate::request::RequestId;
use crate::transceiver::checksum::{Algorithm, Checksum, Unsummed};
use crate::transceiver::inbox::Mismatch;
use crate::transceiver::message::{Claim, RowNote, Taker};
use crate::transceiver::regions::RemoteRegions;
use crate::transceiver::reshard::{self, Pieces, Side};
use crate::transceiver::state::printable;
use crate::transceiver::timers::TimerKey;
use crate::transceiver::ways::{Way, Ways};
use crate::transport::{EndpointRecord, PeerId, RegionId, Runs};

/// A fetch from the engine's call to its decision.
#[derive(Debug)]
pub(super) struct FetchTask {
    pub(super) request: RequestId,
    pub(super) claim: Claim,
    pub(super) taker: Taker,
    /// The context instance, for messages.
    pub(super) instance: String,
    /// It, as far as pages go.
    pub(super) there: Side,
    pub(super) first_token: usize,
    pub(super) token_count: usize,
    /// The receiver's page that the first one is, once that is known.
    pub(super) first_page: usize,
    pub(super) began: Instant,
    pub(super) timer: TimerKey,
    pub(super) stock: Stock,
    /// For each page, the pieces that are still to land in it, once that is known.
    pub(super) missing: Vec<u32>,
    /// By page, the pieces that have landed in it and that nobody has summed.
    pub(super) unsummed: BTreeMap<usize, Vec<Unsummed>>,
    pub(super) sources: Vec<Source>,
    /// In use, or the last that was.
    pub(super) way: Way,
    /// Ways that are left, best first.
    pub(super) ways: Ways,
    /// Where the pages go, in their order.
    pub(super) remotes: RemoteRegions,
    /// Whether pieces may come without checksums.
    pub(super) leave_out_checksums: bool,
    pub(super) phase: Phase,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// Others run.
    Queued,
    Running,
    /// One way has failed, with this; pages have to come back before the next one.
    Moving(HandoffError),
}

/// A row of pieces as the transport reports it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Landing<'a> {
    /// Of the first one.
    pub(super) region: RegionId,
    pub(super) count: usize,
    pub(super) runs: &'a Runs,
    pub(super) note: &'a [u8],
    /// For each piece, [`crate::transport::checksum`], where the transport has made it; nothing where it has made none.
    pub(super) checksums: &'a [Option<u64>],
    /// For each piece, [`crate::page::fold`], where the page's device has made it; likewise.
    pub(super) folds: &'a [Option<u64>],
}

/// The pages that are whole with a row that landed, by their indexes.
#[derive(Debug, Default)]
pub(super) struct Whole {
    /// Those that are what was sent.
    pub(super) right: SmallVec<[Range<usize>; 1]>,
    /// Those of which something is still to be summed.
    pub(super) unsummed: SmallVec<[usize; 1]>,
}

impl Whole {
    fn add_right(&mut self, page: usize) {
        match self.right.last_mut() {
            Some(last) if last.end == page => last.end += 1,
            _ => self.right.push(page..page + 1),
        }
    }
}

/// Why a row that landed fails its fetch.
#[derive(Debug)]
pub(super) enum Unfit {
    /// What the server sent.
    Sent(String),
    /// A piece is not what was sent.
    Mismatch(Mismatch),
}

impl From<String> for Unfit {
    fn from(what: String) -> Self {
        Self::Sent(what)
    }
}

/// A rank of the context instance that the fetch takes from.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) rank: usize,
    /// Nothing until [`FetchTask::expect`].
    pub(super) expected: Pieces,
    /// For each of these, whether it has landed.
    landed: Vec<bool>,
    pub(super) peer: Option<PeerId>,
    /// Whether the connection was there before; such a one may turn out to be dead.
    pub(super) cached: bool,
    /// Whether it has answered.
    pub(super) heard: bool,
    pub(super) done: bool,
}

impl Source {
    pub(super) fn of(rank: usize) -> Self {
        Self {
            rank,
            expected: Pieces::default(),
            landed: Vec::new(),
            peer: None,
            cached: false,
            heard: false,
            done: false,
        }
    }

    /// Its bytes and pieces.
    pub(super) fn total(&self) -> (u64, u64) {
        (self.expected.total_bytes(), self.expected.len() as u64)
    }

    /// Back to before it was asked.
    pub(super) fn reset(&mut self) {
        self.peer = None;
        (self.cached, self.heard, self.done) = (false, false, false);
        self.landed.fill(false);
    }
}

impl FetchTask {
    /// Works out which pieces each source owes this rank. Nobody who is asked needs to know; so they are asked before.
    pub(super) fn expect(&mut self, (own, rank): (&Side, usize)) {
        self.first_page = self.first_token / own.tokens_per_block();
        for source in &mut self.sources {
            let tokens = self.first_token..self.token_count;
            source.expected = reshard::pieces((&self.there, source.rank), (own, rank), tokens);
            source.landed = vec![false; source.expected.len()];
        }
        self.count_missing();
    }

    /// Back to before anybody was asked.
    pub(super) fn reset(&mut self) {
        self.sources.iter_mut().for_each(Source::reset);
        self.unsummed.clear();
        self.count_missing();
    }

    fn count_missing(&mut self) {
        self.missing.clear();
        self.missing.resize(self.stock.len(), 0);
        for (_, piece, count) in self
            .sources
            .iter()
            .flat_map(|source| source.expected.rows())
        {
            let pages = self.missing[piece.receiver_page - self.first_page..].iter_mut();
            pages.take(count).for_each(|pieces| *pieces += 1);
        }
    }

    /// The source that a peer is.
    pub(super) fn source_of(&self, peer: PeerId) -> Option<usize> {
        let mut sources = self.sources.iter();
        sources.position(|source| source.peer == Some(peer))
    }

    pub(super) fn endpoint(&self, source: usize) -> &EndpointRecord {
        &self.way.endpoints[source]
    }

    pub(super) fn bytes(&self) -> u64 {
        self.sources.iter().map(|source| source.total().0).sum()
    }

    pub(super) fn is_complete(&self) -> bool {
        self.stock.verified() == self.stock.len() && self.sources.iter().all(|source| source.done)
    }

    /// A rank of the context instance, for messages.
    pub(super) fn server(&self, source: usize) -> String {
        let address = self.way.endpoints.get(source).map_or("", |e| &e.address);
        let rank = match self.sources.len() {
            1 => String::new(),
            _ => format!(" rank {}", self.sources[source].rank),
        };
        let instance = printable(&self.instance);
        format!("context server {instance}{rank} at {}", printable(address))
    }

    /// What it waits for, on whom and since when.
    pub(super) fn describe_wait(&self) -> String {
        let waited = self.began.elapsed().as_secs_f64();
        let silent = self.sources.iter().position(|source| !source.heard);
        let late = self.sources.iter().position(|source| !source.done);
        let running = self.phase == Phase::Running;
        let (server, what) = match (silent, late) {
            (Some(source), _) if running => (self.server(source), "an answer"),
            (None, late) if running => {
                return format!(
                    "{} of {} pages came from {} in {waited:.1} s",
                    self.stock.verified(),
                    self.stock.len(),
                    self.server(late.unwrap_or(0))
                );
            }
            (..) => (self.server(0), "its turn among other transfers"),
        };
        format!("no kv from {server}: waited {waited:.1} s for {what}")
    }

    /// What a row that landed says of itself; an error says why it cannot be one of this source's.
    pub(super) fn row(&self, source: usize, landing: &Landing<'_>) -> Result<RowNote, String> {
        let note = RowNote::decode(landing.note).ok_or("a piece without a proper note")?;
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
        if note.algorithm == Algorithm::Absent && !self.leave_out_checksums {
            return Err("a piece without a checksum".to_owned());
        }
        if note.rank as usize != self.sources[source].rank {
            return Err(format!("a piece of rank {}", note.rank));
        }
        let (pieces, sums) = (landing.count, note.sums.len());
        if pieces != sums {
            return Err(format!("{pieces} pieces with {sums} checksums"));
        }
        Ok(note)
    }

    /// Takes note of a row that landed; an error says why it cannot be one.
    pub(super) fn land(
        &mut self,
        source: usize,
        (landing, note): (&Landing<'_>, &RowNote),
    ) -> Result<Whole, Unfit> {
        let first = usize::try_from(note.piece).unwrap_or(usize::MAX);
        let (mut whole, mut at) = (Whole::default(), 0);
        while at < note.sums.len() {
            let index = first.saturating_add(at);
            let misplaced = || format!("piece {index} where it does not belong");
            let from = &mut self.sources[source];
            let (piece, alike) = from.expected.alike(index).ok_or_else(misplaced)?;
            let count = alike.min(note.sums.len() - at);
            let page = piece.receiver_page - self.first_page;
            let region = self.stock.region(page);
            let landed = &mut from.landed[index..index + count];
            if region.is_none_or(|region| region.0 != landing.region.0 + at as u64)
                || !self.stock.are_registered(page..page + count)
                || piece.runs != landing.runs
                || landed.contains(&true)
            {
                return Err(misplaced().into());
            }
            landed.fill(true);
            for in_row in at..at + count {
                let page = page + in_row - at;
                self.land_piece((source, first + in_row), (landing, note), in_row, page)?;
                self.missing[page] -= 1;
                match (self.missing[page], self.unsummed.contains_key(&page)) {
                    (0, true) => whole.unsummed.push(page),
                    (0, false) => whole.add_right(page),
                    _ => {}
                }
            }
            at += count;
        }
        Ok(whole)
    }

    /// Compares a piece with what was sent, or keeps what is needed for that.
    fn land_piece(
        &mut self,
        (source, piece): (usize, usize),
        (landing, note): (&Landing<'_>, &RowNote),
        in_row: usize,
        page: usize,
    ) -> Result<(), Unfit> {
        let expected = note.sums[in_row];
        let found = match note.algorithm {
            // What a transport has summed as it came, if it is that.
            Algorithm::Stripes => landing.checksums.get(in_row).copied().flatten(),
            Algorithm::Fold => landing.folds.get(in_row).copied().flatten(),
            Algorithm::Absent => Some(expected),
        };
        match found {
            Some(found) if found == expected => Ok(()),
            Some(found) => Err(Unfit::Mismatch(Mismatch {
                source,
                piece,
                expected,
                found,
            })),
            None => {
                let algorithm = note.algorithm;
                self.unsummed.entry(page).or_default().push(Unsummed {
                    source,
                    piece,
                    runs: landing.runs.clone(),
                    expected: Checksum {
                        algorithm,
                        value: expected,
                    },
                });
                Ok(())
            }
        }
    }
}

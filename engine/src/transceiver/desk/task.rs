//! What the generation side keeps of a fetch: its pages, the ranks that it takes from, and what is expected of each. Pure
//! books: no transport is called here.

use std::collections::VecDeque;
use std::time::Instant;

use smallvec::SmallVec;

use crate::backend::BlockId;
use crate::handoff::HandoffError;
use crate::page::Page;
use crate::request::RequestId;
use crate::transceiver::checksum::{Algorithm, Checksum, Unsummed};
use crate::transceiver::inbox::Mismatch;
use crate::transceiver::message::{Claim, RowNote, Taker};
use crate::transceiver::regions::RemoteRegions;
use crate::transceiver::reshard::{self, Side};
use crate::transceiver::state::printable;
use crate::transceiver::timers::TimerKey;
use crate::transceiver::wires::Way;
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
    pub(super) began: Instant,
    pub(super) timer: TimerKey,
    pub(super) pages: Vec<Slot>,
    pub(super) sources: Vec<Source>,
    /// In use, or the last that was.
    pub(super) way: Way,
    /// Ways that are left, best first.
    pub(super) ways: VecDeque<Way>,
    /// Where the pages go, in their order.
    pub(super) remotes: RemoteRegions,
    pub(super) verified: usize,
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

/// A page of a fetch.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) block: BlockId,
    pub(super) place: Place,
    /// Pieces that go into it, once that is known.
    pub(super) pieces: usize,
    /// Those that have landed: mostly one, of thousands of pages.
    pub(super) landed: SmallVec<[Part; 1]>,
}

/// A piece that has landed.
#[derive(Debug, Clone)]
pub(super) struct Part {
    /// Index among the sources.
    pub(super) source: usize,
    /// Index among the source's pieces.
    pub(super) piece: usize,
    pub(super) checksum: Checksum,
    /// What the transport has found, if it has looked.
    pub(super) found: Option<u64>,
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

/// What a piece that landed means for its page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Landed {
    /// Index among the fetch's pages.
    pub(super) page: usize,
    pub(super) region: RegionId,
    /// It was the last one of it.
    pub(super) is_last: bool,
    pub(super) mismatch: Option<Mismatch>,
}

/// Where a page of a fetch is.
#[derive(Debug)]
pub(super) enum Place {
    Held(Page),
    Registered(RegionId),
    Checking(RegionId),
    Verified(Page),
    /// On its way back from a transport or a checksum thread, for another way.
    Leaving(RegionId),
    /// Gone back.
    Gone,
}

/// A rank of the context instance that the fetch takes from.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) rank: usize,
    /// Nothing until [`FetchTask::expect`].
    pub(super) expected: Vec<Expected>,
    pub(super) peer: Option<PeerId>,
    /// Whether the connection was there before; such a one may turn out to be dead.
    pub(super) cached: bool,
    /// Whether it has answered.
    pub(super) heard: bool,
    pub(super) done: bool,
}

/// A piece that shall come.
#[derive(Debug)]
pub(super) struct Expected {
    /// Index among the fetch's pages.
    pub(super) page: usize,
    pub(super) runs: Runs,
    pub(super) landed: bool,
}

impl Source {
    pub(super) const fn of(rank: usize) -> Self {
        Self {
            rank,
            expected: Vec::new(),
            peer: None,
            cached: false,
            heard: false,
            done: false,
        }
    }

    /// Its bytes and pieces.
    pub(super) fn total(&self) -> (u64, u64) {
        let bytes = self.expected.iter().map(|e| e.runs.total_bytes() as u64);
        (bytes.sum(), self.expected.len() as u64)
    }

    /// Back to before it was asked.
    pub(super) fn reset(&mut self) {
        self.peer = None;
        (self.cached, self.heard, self.done) = (false, false, false);
        for expected in &mut self.expected {
            expected.landed = false;
        }
    }
}

impl FetchTask {
    /// Works out which pieces each source owes this rank. Nobody who is asked needs to know; so they are asked before.
    pub(super) fn expect(&mut self, (own, rank): (&Side, usize)) {
        let first_page = self.first_token / own.tokens_per_block();
        for source in &mut self.sources {
            let tokens = self.first_token..self.token_count;
            let owed = reshard::pieces((&self.there, source.rank), (own, rank), tokens);
            let expected = owed.into_iter().map(|piece| {
                let page = piece.receiver_page - first_page;
                self.pages[page].pieces += 1;
                Expected {
                    page,
                    runs: piece.runs,
                    landed: false,
                }
            });
            source.expected = expected.collect();
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
        self.verified == self.pages.len() && self.sources.iter().all(|source| source.done)
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
                    self.verified,
                    self.pages.len(),
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

    /// Takes note of one piece of a row that landed; an error says why it cannot be one.
    pub(super) fn land(
        &mut self,
        source: usize,
        (landing, note): (&Landing<'_>, &RowNote),
        in_row: usize,
    ) -> Result<Landed, String> {
        let sent = note.sums[in_row];
        let found = match note.algorithm {
            // What a transport has summed as it came, if it is that.
            Algorithm::Stripes => landing.checksums.get(in_row).copied().flatten(),
            Algorithm::Fold => landing.folds.get(in_row).copied().flatten(),
            Algorithm::Absent => Some(sent),
        };
        let first = usize::try_from(note.piece).unwrap_or(usize::MAX);
        let index = first.saturating_add(in_row);
        let misplaced = || format!("piece {index} where it does not belong");
        let from = &mut self.sources[source];
        let expected = from.expected.get_mut(index).ok_or_else(misplaced)?;
        let slot = &mut self.pages[expected.page];
        let region = match slot.place {
            Place::Registered(known) if known.0 == landing.region.0 + in_row as u64 => known,
            _ => return Err(misplaced()),
        };
        if expected.landed || expected.runs != *landing.runs {
            return Err(misplaced());
        }
        expected.landed = true;
        slot.landed.reserve_exact(slot.pieces - slot.landed.len());
        slot.landed.push(Part {
            source,
            piece: index,
            checksum: Checksum {
                algorithm: note.algorithm,
                value: sent,
            },
            found,
        });
        let differs = found.filter(|found| *found != sent);
        Ok(Landed {
            page: expected.page,
            region,
            is_last: slot.landed.len() == slot.pieces,
            mismatch: differs.map(|found| Mismatch {
                part: slot.landed.len() - 1,
                expected: sent,
                found,
            }),
        })
    }

    /// The pieces of a page that nobody has summed yet.
    pub(super) fn unsummed(&self, page: usize) -> Vec<Unsummed> {
        let landed = self.pages[page].landed.iter().enumerate();
        landed
            .filter(|(_, piece)| piece.found.is_none())
            .map(|(part, piece)| Unsummed {
                part,
                runs: self.sources[piece.source].expected[piece.piece]
                    .runs
                    .clone(),
                expected: piece.checksum,
            })
            .collect()
    }
}

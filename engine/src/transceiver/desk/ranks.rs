//! The ranks of one instance: each has a desk over its own pages, and the leading one's tells the engine what is true of
//! all of them (`ranks/books.rs`).
//!
//! A rank that follows reports over a transport to the leading one, like a peer, and proves that it belongs to the
//! instance. What the others have to be told goes to the engine, whose orders keep their order. Invariant: a report is
//! delivered, in its order, or both ends hear that the line between them is lost, and the instance ends.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Desk;
use crate::backend::BlockId;
use crate::handoff::{BlockPages, HandoffError, HandoffEvent, HandoffStats, LeaseEnd, RanksEvent};
use crate::transceiver::info::RankTotals;
use crate::transceiver::message::Message;
use crate::transceiver::reshard::Side;
use crate::transceiver::state::{Nonce, RankRecord, printable};
use crate::transceiver::timers::Due;
use crate::transceiver::ways::{Way, Ways};
use crate::transport::{PeerId, Submission};
use books::Books;

mod books;

/// Events of one report at most, so that it fits a message.
const REPORT_EVENTS_MAX: usize = 256;

/// How long to wait before a line that takes no more messages is tried again.
const REPORT_PAUSE: Duration = Duration::from_millis(5);

/// What this rank is to the others of its instance.
#[derive(Debug)]
pub(super) enum Role {
    /// There are none.
    Alone,
    Leads(Leader),
    Follows(Reporter),
}

/// What the leading rank has of the others.
#[derive(Debug)]
pub(super) struct Leader {
    secret: Nonce,
    /// Connections of ranks that follow.
    lines: HashMap<PeerId, usize>,
    books: Books,
}

impl Leader {
    /// Of so many ranks, itself included.
    pub(super) fn new(ranks: usize, secret: Nonce) -> Self {
        Self {
            secret,
            lines: HashMap::new(),
            books: Books::new(ranks),
        }
    }
}

/// What a rank that follows has of the leading one.
#[derive(Debug)]
pub(super) struct Reporter {
    leader: RankRecord,
    secret: Nonce,
    line: Option<PeerId>,
    /// Not yet reported, in order. Bounded by what this rank holds.
    waiting: Vec<RankEvent>,
    /// The line takes nothing at the moment; a timer is set.
    paused: bool,
    lost: bool,
}

impl Reporter {
    pub(super) fn new(leader: RankRecord, secret: Nonce) -> Self {
        Self {
            leader,
            secret,
            line: None,
            waiting: vec![RankEvent::Joined],
            paused: false,
            lost: false,
        }
    }
}

/// What a rank that follows reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::transceiver) enum RankEvent {
    /// Here I am.
    Joined,
    LeaseEnded {
        ctx_request_id: u64,
        end: LeaseEnd,
    },
    FetchEnded {
        request: u64,
        outcome: Result<HandoffStats, HandoffError>,
    },
    PagesReturned {
        blocks: Vec<BlockId>,
    },
}

impl RankEvent {
    /// What is to be booked of an event, and the pages that it brings; otherwise it is no rank's own.
    fn of(event: HandoffEvent) -> Result<(Self, BlockPages), RanksEvent> {
        Ok(match event {
            HandoffEvent::LeaseEnded {
                ctx_request_id,
                end,
            } => {
                let ended = Self::LeaseEnded {
                    ctx_request_id,
                    end,
                };
                (ended, BlockPages::default())
            }
            HandoffEvent::FetchEnded { request, outcome } => {
                let request = request.0;
                (Self::FetchEnded { request, outcome }, BlockPages::default())
            }
            HandoffEvent::PagesReturned { pages } => {
                let blocks = pages.blocks.clone();
                (Self::PagesReturned { blocks }, pages)
            }
            HandoffEvent::Ranks(event) => return Err(event),
        })
    }
}

impl Desk {
    /// Tells what happened on this rank: the engine of an only rank, the books of the leading one, or the leading rank.
    pub(super) fn emit(&mut self, event: HandoffEvent) {
        match &mut self.role {
            Role::Alone => self.tell_engine(event),
            Role::Leads(leader) => {
                if let Some(event) = leader.books.book_own(event) {
                    self.tell_engine(event);
                }
            }
            Role::Follows(reporter) => match RankEvent::of(event) {
                Ok((event, pages)) => {
                    if !pages.is_empty() {
                        // First the pages: the leading rank asks for them when it has heard of them.
                        (self.around.sink)(HandoffEvent::PagesReturned { pages });
                    }
                    reporter.waiting.push(event);
                }
                Err(event) => (self.around.sink)(HandoffEvent::Ranks(event)),
            },
        }
    }

    fn tell_engine(&self, event: HandoffEvent) {
        if let HandoffEvent::FetchEnded {
            outcome: Ok(stats), ..
        } = &event
        {
            self.around.info.note_moves(stats);
        }
        (self.around.sink)(event);
    }

    /// Reports what waits, as far as the line takes it.
    pub(super) fn send_reports(&mut self) {
        loop {
            let Role::Follows(reporter) = &self.role else {
                return;
            };
            if reporter.waiting.is_empty() || reporter.paused || reporter.lost {
                return;
            }
            let Some(line) = reporter.line.or_else(|| self.open_line()) else {
                return;
            };
            let Role::Follows(reporter) = &mut self.role else {
                return;
            };
            let count = reporter.waiting.len().min(REPORT_EVENTS_MAX);
            let report = Message::Rank {
                secret: reporter.secret,
                rank: u32::try_from(self.terms.rank).unwrap_or(u32::MAX),
                events: reporter.waiting[..count].to_vec(),
                totals: self.around.info.totals(),
            };
            match self.around.wires.notify(line, report.encode()) {
                Submission::Accepted => drop(reporter.waiting.drain(..count)),
                Submission::Busy => {
                    reporter.paused = true;
                    let again = Instant::now() + REPORT_PAUSE;
                    self.timers.set(again, Due::Reports);
                }
                // The loss of the line comes, and is dealt with there.
                Submission::Gone => return,
                Submission::Invalid => self.lose_line("a report is too long for its line"),
            }
        }
    }

    pub(super) fn on_reports_due(&mut self) {
        if let Role::Follows(reporter) = &mut self.role {
            reporter.paused = false;
        }
    }

    /// Connects to the leading rank, over the transport that needs least.
    fn open_line(&mut self) -> Option<PeerId> {
        let Role::Follows(reporter) = &self.role else {
            return None;
        };
        let leader = std::slice::from_ref(&reporter.leader);
        let ranks = [reporter.leader.rank as usize];
        let opened = Ways::to(leader, &ranks).and_then(|ways| {
            let way = ways.last(self.around.wires.ground());
            let Some(Way { wire, endpoints }) = way else {
                return Err(HandoffError::Transport("there is no way".to_owned()));
            };
            let deadline = Instant::now() + self.terms.transfer_timeout;
            let connected = self.around.wires.connect(wire, &endpoints[0], deadline);
            connected.map_err(|error| HandoffError::Transport(error.to_string()))
        });
        match opened {
            Ok((peer, _)) => {
                if let Role::Follows(reporter) = &mut self.role {
                    reporter.line = Some(peer);
                }
                Some(peer)
            }
            Err(error) => {
                self.lose_line(&error.to_string());
                None
            }
        }
    }

    /// Nothing can be reported any more: this rank is no part of its instance.
    fn lose_line(&mut self, reason: &str) {
        let stopping = self.stopping;
        if let Role::Follows(reporter) = &mut self.role
            && !std::mem::replace(&mut reporter.lost, true)
            && !stopping
        {
            let (rank, reason) = (reporter.leader.rank as usize, printable(reason));
            (self.around.sink)(HandoffEvent::Ranks(RanksEvent::Lost { rank, reason }));
        }
    }

    /// A rank's report: `claimed` is its secret and its number.
    pub(super) fn on_report(
        &mut self,
        peer: PeerId,
        claimed: (Nonce, u32),
        events: Vec<RankEvent>,
        totals: RankTotals,
    ) {
        let (secret, rank) = (claimed.0, claimed.1 as usize);
        let told = match &mut self.role {
            Role::Leads(leader)
                if leader.secret == secret && (1..leader.books.ranks()).contains(&rank) =>
            {
                leader.lines.insert(peer, rank);
                let booked = events.into_iter();
                booked
                    .filter_map(|event| leader.books.book(rank, event))
                    .collect::<Vec<_>>()
            }
            Role::Leads(_) | Role::Alone | Role::Follows(_) => {
                tracing::warn!(%peer, rank, "a report of a rank that is none of this instance; disconnecting");
                self.around.wires.disconnect(peer);
                return;
            }
        };
        self.around.info.set_totals(rank, totals);
        for event in told {
            self.tell_engine(event);
        }
    }

    /// A rank that cannot report any more ends the instance, whichever side notices.
    pub(super) fn rank_lost(&mut self, peer: PeerId, reason: &str) {
        match &mut self.role {
            Role::Alone => {}
            Role::Leads(leader) => {
                let lost = leader.lines.remove(&peer);
                if let Some(rank) = lost.filter(|_| !self.stopping) {
                    let reason = printable(reason);
                    self.tell_engine(HandoffEvent::Ranks(RanksEvent::Lost { rank, reason }));
                }
            }
            Role::Follows(reporter) => {
                if reporter.line == Some(peer) {
                    self.lose_line(reason);
                }
            }
        }
    }

    /// Notes who takes a lease, where that matters to other ranks.
    pub(super) fn note_taken(&mut self, ctx_request_id: u64, taker: &Side) {
        if let Role::Leads(leader) = &mut self.role {
            let own = &self.terms.layout.side;
            leader.books.taken(ctx_request_id, own, taker);
        }
    }
}

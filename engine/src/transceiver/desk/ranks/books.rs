//! What the leading rank knows of all ranks' leases, fetches and pages. Pure books: nothing is told to anybody here.
//!
//! A lease is over when it is over on every rank; a fetch is decided when it is on every rank, and has succeeded when it
//! has on all; a page is back when every rank's is. What ends on one rank only is news once, so that the others give it up
//! too. Invariant: every rank reports each end once, so each entry goes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::RankEvent;
use crate::backend::BlockId;
use crate::handoff::{BlockPages, HandoffError, HandoffEvent, HandoffStats, LeaseEnd, RanksEvent};
use crate::page::Page;
use crate::request::RequestId;
use crate::transceiver::reshard::{self, Side};

/// See the module.
#[derive(Debug)]
pub(super) struct Books {
    ranks: usize,
    leases: HashMap<u64, LeaseBook>,
    fetches: HashMap<RequestId, FetchBook>,
    pages: HashMap<BlockId, PageBook>,
}

#[derive(Debug, Default)]
struct LeaseBook {
    ends: BTreeMap<usize, LeaseEnd>,
    /// The ranks that the taker takes from, once there is one.
    needed: Option<BTreeSet<usize>>,
    /// The others have been told to give it up.
    unwanted: bool,
}

#[derive(Debug, Default)]
struct FetchBook {
    outcomes: BTreeMap<usize, Result<HandoffStats, HandoffError>>,
    /// The others have been told to give it up.
    doomed: bool,
}

#[derive(Debug, Default)]
struct PageBook {
    /// This rank's page, once it is back.
    own: Option<Page>,
    back: BTreeSet<usize>,
}

impl Books {
    pub(super) fn new(ranks: usize) -> Self {
        Self {
            ranks,
            leases: HashMap::new(),
            fetches: HashMap::new(),
            pages: HashMap::new(),
        }
    }

    /// Ranks, the leading one included.
    pub(super) fn ranks(&self) -> usize {
        self.ranks
    }

    /// Notes that somebody takes a lease: the ranks that it takes something from have to deliver.
    pub(super) fn taken(&mut self, ctx_request_id: u64, own: &Side, taker: &Side) {
        let takes_from = |rank: &usize| !reshard::receivers(own, *rank, taker).is_empty();
        let needed = (0..self.ranks).filter(takes_from).collect();
        self.leases.entry(ctx_request_id).or_default().needed = Some(needed);
    }

    /// Books what happened on a rank. Returns what the engine is to be told.
    pub(super) fn book(&mut self, rank: usize, event: RankEvent) -> Option<HandoffEvent> {
        match event {
            RankEvent::Joined => None,
            RankEvent::LeaseEnded {
                ctx_request_id,
                end,
            } => self.lease_ended(rank, ctx_request_id, end),
            RankEvent::FetchEnded { request, outcome } => {
                self.fetch_ended(rank, RequestId(request), outcome)
            }
            RankEvent::PagesReturned { blocks } => self.pages_back(rank, &blocks),
        }
    }

    /// Books this rank's own event.
    pub(super) fn book_own(&mut self, event: HandoffEvent) -> Option<HandoffEvent> {
        match RankEvent::of(event) {
            Ok((event, pages)) => {
                for (block, page) in pages {
                    self.pages.entry(block).or_default().own = Some(page);
                }
                self.book(0, event)
            }
            Err(event) => Some(HandoffEvent::Ranks(event)),
        }
    }

    fn lease_ended(
        &mut self,
        rank: usize,
        ctx_request_id: u64,
        end: LeaseEnd,
    ) -> Option<HandoffEvent> {
        let book = self.leases.entry(ctx_request_id).or_default();
        book.ends.insert(rank, end);
        if book.ends.len() == self.ranks {
            let end = book.failure().unwrap_or(LeaseEnd::Delivered);
            self.leases.remove(&ctx_request_id);
            return Some(HandoffEvent::LeaseEnded {
                ctx_request_id,
                end,
            });
        }
        let unwanted = book.failure().is_some() || book.is_delivered();
        let news = unwanted && !book.unwanted;
        book.unwanted |= unwanted;
        news.then_some(HandoffEvent::Ranks(RanksEvent::LeaseUnwanted {
            ctx_request_id,
        }))
    }

    fn fetch_ended(
        &mut self,
        rank: usize,
        request: RequestId,
        outcome: Result<HandoffStats, HandoffError>,
    ) -> Option<HandoffEvent> {
        let book = self.fetches.entry(request).or_default();
        let failed = outcome.is_err();
        book.outcomes.insert(rank, outcome);
        if book.outcomes.len() == self.ranks {
            let outcomes = self.fetches.remove(&request)?.outcomes;
            let outcome = together(outcomes.into_values());
            return Some(HandoffEvent::FetchEnded { request, outcome });
        }
        let news = failed && !book.doomed;
        book.doomed |= failed;
        news.then_some(HandoffEvent::Ranks(RanksEvent::FetchDoomed { request }))
    }

    fn pages_back(&mut self, rank: usize, blocks: &[BlockId]) -> Option<HandoffEvent> {
        let mut pages = BlockPages::default();
        for &block in blocks {
            let book = self.pages.entry(block).or_default();
            book.back.insert(rank);
            if book.back.len() == self.ranks
                && let Some(page) = self.pages.remove(&block).and_then(|book| book.own)
            {
                pages.extend([(block, page)]);
            }
        }
        (!pages.is_empty()).then_some(HandoffEvent::PagesReturned { pages })
    }
}

impl LeaseBook {
    fn is_needed(&self, rank: usize) -> bool {
        let needed = self.needed.as_ref();
        needed.is_none_or(|needed| needed.contains(&rank))
    }

    /// The first end of a rank that has to deliver and did not.
    fn failure(&self) -> Option<LeaseEnd> {
        let ends = self.ends.iter().filter(|(rank, _)| self.is_needed(**rank));
        ends.map(|(_, end)| *end)
            .find(|end| *end != LeaseEnd::Delivered)
    }

    /// Whether all that have to deliver have come to an end.
    fn is_delivered(&self) -> bool {
        let needed = self.needed.as_ref();
        needed.is_some_and(|needed| needed.iter().all(|rank| self.ends.contains_key(rank)))
    }
}

/// One outcome of all ranks' outcomes: the first failure that is not only another's consequence, or the sum.
fn together(
    outcomes: impl Iterator<Item = Result<HandoffStats, HandoffError>>,
) -> Result<HandoffStats, HandoffError> {
    let mut sum: Option<HandoffStats> = None;
    let mut failure = None;
    for outcome in outcomes {
        match outcome {
            Ok(stats) => match &mut sum {
                None => sum = Some(stats),
                Some(sum) => sum.add(stats),
            },
            Err(error) if matches!(failure, None | Some(HandoffError::Cancelled)) => {
                failure = Some(error);
            }
            Err(_) => {}
        }
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(sum.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handoff::RankMove;
    use crate::page::{KvDtype, PageShape};

    fn ended(end: LeaseEnd) -> RankEvent {
        RankEvent::LeaseEnded {
            ctx_request_id: 1,
            end,
        }
    }

    fn over(event: Option<HandoffEvent>) -> LeaseEnd {
        match event {
            Some(HandoffEvent::LeaseEnded {
                ctx_request_id: 1,
                end,
            }) => end,
            other => panic!("{other:?}"),
        }
    }

    fn is_unwanted(event: Option<HandoffEvent>) -> bool {
        let unwanted = RanksEvent::LeaseUnwanted { ctx_request_id: 1 };
        matches!(event, Some(HandoffEvent::Ranks(event)) if event == unwanted)
    }

    #[test]
    fn a_lease_is_over_when_it_is_on_all_ranks() {
        let mut books = Books::new(2);
        assert!(books.book(1, ended(LeaseEnd::Delivered)).is_none());
        assert_eq!(
            over(books.book(0, ended(LeaseEnd::Delivered))),
            LeaseEnd::Delivered
        );
        // An end that is no delivery ends it everywhere; the others are told once.
        let mut books = Books::new(3);
        assert!(is_unwanted(books.book(0, ended(LeaseEnd::Expired))));
        assert!(books.book(2, ended(LeaseEnd::Cancelled)).is_none());
        assert_eq!(
            over(books.book(1, ended(LeaseEnd::Delivered))),
            LeaseEnd::Expired
        );
        assert!(books.leases.is_empty());
    }

    #[test]
    fn a_rank_that_nobody_takes_from_is_told_and_does_not_spoil_the_delivery() {
        let mut books = Books::new(2);
        books.leases.entry(1).or_default().needed = Some(BTreeSet::from([0]));
        assert!(is_unwanted(books.book(0, ended(LeaseEnd::Delivered))));
        assert_eq!(
            over(books.book(1, ended(LeaseEnd::Cancelled))),
            LeaseEnd::Delivered
        );
        // Its own clock changes nothing for those who are being served.
        books.leases.entry(1).or_default().needed = Some(BTreeSet::from([0]));
        assert!(books.book(1, ended(LeaseEnd::Expired)).is_none());
        assert_eq!(
            over(books.book(0, ended(LeaseEnd::Delivered))),
            LeaseEnd::Delivered
        );
    }

    #[test]
    fn a_fetch_succeeds_on_all_ranks_or_fails_with_the_first_cause() {
        let ended = |outcome| RankEvent::FetchEnded {
            request: 9,
            outcome,
        };
        let moved = |rank: u32, transport: &str, bytes| RankMove {
            rank,
            peer: "ctx-0".to_owned(),
            peer_rank: 0,
            transport: transport.to_owned(),
            bytes,
        };
        let stats = |moved: RankMove| {
            Ok(HandoffStats {
                bytes: moved.bytes,
                moves: vec![moved],
                ..HandoffStats::default()
            })
        };
        let decided = |event: Option<HandoffEvent>| match event {
            Some(HandoffEvent::FetchEnded {
                request: RequestId(9),
                outcome,
            }) => outcome,
            other => panic!("{other:?}"),
        };
        let mut books = Books::new(2);
        let moves = [moved(0, "shm", 5), moved(1, "tcp", 6)];
        assert!(books.book(0, ended(stats(moves[0].clone()))).is_none());
        let outcome = decided(books.book(1, ended(stats(moves[1].clone())))).unwrap();
        assert_eq!(
            (outcome.bytes, outcome.transport().as_str()),
            (11, "shm+tcp")
        );
        assert_eq!(outcome.moves, moves);
        let cause = HandoffError::Checksum("spoilt".to_owned());
        let doomed = RanksEvent::FetchDoomed {
            request: RequestId(9),
        };
        let told = books.book(1, ended(Err(cause.clone())));
        assert!(matches!(told, Some(HandoffEvent::Ranks(event)) if event == doomed));
        let outcome = decided(books.book(0, ended(Err(HandoffError::Cancelled))));
        assert_eq!(outcome, Err(cause));
        assert!(books.fetches.is_empty());
    }

    #[test]
    fn what_one_rank_has_already_does_not_make_up_for_another_that_failed() {
        let mut books = Books::new(2);
        let ended = |outcome| RankEvent::FetchEnded {
            request: 9,
            outcome,
        };
        assert!(books.book(0, ended(Ok(HandoffStats::default()))).is_none());
        let late = HandoffError::TimedOut("late".to_owned());
        match books.book(1, ended(Err(late.clone()))) {
            Some(HandoffEvent::FetchEnded { outcome, .. }) => assert_eq!(outcome, Err(late)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_page_is_back_when_every_ranks_is() {
        let shape = PageShape {
            layers: 1,
            kv_heads: 1,
            tokens_per_block: 1,
            head_dim: 1,
            dtype: KvDtype::F32,
        };
        let mut books = Books::new(2);
        let pages = [7, 8].map(|block| (block, Page::zeroed(shape)));
        let pages = BlockPages::from_iter(pages);
        let blocks = vec![7];
        assert!(books.book(1, RankEvent::PagesReturned { blocks }).is_none());
        match books.book_own(HandoffEvent::PagesReturned { pages }) {
            Some(HandoffEvent::PagesReturned { pages }) => {
                assert_eq!(pages.blocks, [7]);
            }
            other => panic!("{other:?}"),
        }
        let blocks = vec![8];
        assert!(books.book(1, RankEvent::PagesReturned { blocks }).is_some());
        assert!(books.pages.is_empty());
    }
}

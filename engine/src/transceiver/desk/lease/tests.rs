//! Rows against what each piece would get for itself, of leases whose pages, sums and places come in every way.

use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::model::shard::Grid;
use crate::page::device::fake;
use crate::page::{KvDtype, Page, PageShape};
use crate::transceiver::checksum::Checksum;
use crate::transceiver::reshard::{Side, pieces};
use crate::transceiver::timers::{Due, Timers};

/// What one piece is sent as: its page, where it goes, its sum, and whether the transport makes that.
type Part = (*const Page, RemoteRegion, Checksum, bool);

fn side(tokens_per_block: usize) -> Side {
    let whole = PageShape {
        layers: 1,
        kv_heads: 2,
        tokens_per_block,
        head_dim: 2,
        dtype: KvDtype::F32,
    };
    let grid = Grid {
        tensor: 1,
        pipeline: 1,
    };
    Side::new(whole, grid).unwrap()
}

/// Without pages, taken from a token on.
fn lease((own, receiver): (&Side, &Side), tokens: Range<usize>) -> Lease {
    let own = (own, 0);
    let held = pieces(own, own, 0..tokens.end);
    let deadline = Instant::now();
    let pieces = pieces(own, (receiver, 0), tokens.clone());
    let place = |index| RemoteRegion {
        bytes: receiver.page(0).bytes() as u64,
        // They were registered in two calls.
        id: if index < 5 { index } else { 100 + index },
        key: 3,
    };
    let serving = Serving {
        peer: PeerId(1),
        transfer: TransferId(2),
        rank: 0,
        regions: (0..receiver.pages_for(tokens.end) as u64)
            .map(place)
            .collect(),
        first_page: tokens.start / receiver.tokens_per_block(),
        sums: Sums::of(&pieces, &held),
        pieces,
        own_sums: Checksums::default(),
        unsummed: Unsummed::default(),
        given_up: Arc::default(),
        next: 0,
        in_flight: InFlight::default(),
        released: false,
    };
    Lease {
        pages: LentPages::default(),
        token_count: tokens.end,
        nonce: Nonce::random(),
        deadline,
        timer: Timers::default().set(deadline, Due::Lease(0)),
        held,
        checksums: Checksums::default(),
        unsummed: Unsummed::default(),
        hashing: 0,
        given_up: Arc::default(),
        taking: None,
        servings: vec![serving],
        end: None,
    }
}

/// Sums that nobody else has; of two algorithms, as pages may lie anywhere.
fn made(first: u64) -> impl Fn(usize) -> Checksum {
    move |index| Checksum {
        algorithm: match index / 7 % 2 {
            0 => Algorithm::Fold,
            _ => Algorithm::Stripes,
        },
        value: first + index as u64,
    }
}

#[derive(Debug, Clone)]
struct Case {
    blocks: (usize, usize),
    tokens: (usize, usize),
    /// Pages that come at once, each time.
    chunks: Vec<usize>,
    on_device: bool,
    /// How many sums are made, of pages and of the transfer's own.
    summed: (usize, usize),
    by_transport: bool,
    pieces_max: usize,
}

fn any_case() -> impl Strategy<Value = Case> {
    let block = || prop::sample::select(vec![2_usize, 4, 4, 4]);
    (
        (block(), block()),
        (0..12_usize, 1..150_usize),
        prop::collection::vec(1..30_usize, 1..4),
        (any::<bool>(), any::<bool>()),
        (0..60_usize, 0..60_usize),
        1..20_usize,
    )
        .prop_map(|(blocks, tokens, chunks, ways, summed, pieces_max)| Case {
            blocks,
            tokens,
            chunks,
            on_device: ways.0,
            summed,
            by_transport: ways.1,
            pieces_max,
        })
}

impl Case {
    fn lease(&self) -> (Lease, Side) {
        let (own, receiver) = (side(self.blocks.0), side(self.blocks.1));
        let end = self.tokens.0 + self.tokens.1;
        let first = self.tokens.0 / self.blocks.1 * self.blocks.1;
        (lease((&own, &receiver), first..end), own)
    }

    /// The next pages, no more than the lease is for.
    fn pages(&self, count: usize, shape: PageShape) -> Vec<Arc<Page>> {
        let pages = match self.on_device {
            true => fake::pool(shape, count),
            false => Page::pool(shape, count).unwrap(),
        };
        pages.into_iter().map(Arc::new).collect()
    }

    /// A piece for itself, once it may be sent.
    fn part(&self, lease: &Lease, pages: &[Arc<Page>], index: usize) -> Option<Part> {
        let serving = &lease.servings[0];
        let piece = serving.pieces.get(index)?;
        let page = pages.get(piece.sender_page)?;
        let (sum, _) = serving.sums.alike(index)?;
        let made = match sum {
            Sum::Page(page) => (page < self.summed.0).then(|| made(1000)(page)),
            Sum::Own(own) => (own < self.summed.1).then(|| made(2000)(own)),
        };
        let on_the_way = Checksum {
            algorithm: Algorithm::Stripes,
            value: 0,
        };
        let makes = self.by_transport && !self.on_device;
        let sum = made.or(makes.then_some(on_the_way))?;
        let index = piece.receiver_page - serving.first_page;
        let target = serving.regions.get(index).unwrap();
        Some((Arc::as_ptr(page), target, sum, made.is_none()))
    }
}

fn parts(row: &Row<'_>) -> Vec<Part> {
    let all = row.sources.iter().zip(row.sums).enumerate();
    all.map(|(index, (page, value))| {
        let target = RemoteRegion {
            id: row.target.id + index as u64,
            ..row.target
        };
        let sum = Checksum {
            algorithm: row.algorithm,
            value: *value,
        };
        (Arc::as_ptr(page), target, sum, row.summed_on_the_way)
    })
    .collect()
}

/// Whether the second one may be of the first one's row.
fn follows(one: &Part, next: &Part) -> bool {
    let target = RemoteRegion {
        id: one.1.id + 1,
        ..one.1
    };
    (next.1, next.2.algorithm, next.3) == (target, one.2.algorithm, one.3)
}

proptest! {
    #[test]
    fn a_row_has_what_each_of_its_pieces_would_have(case in any_case()) {
        let (mut lease, own) = case.lease();
        let (mut pages, mut ends) = (Vec::new(), Vec::new());
        for count in &case.chunks {
            let more = case.pages(*(count.min(&(lease.held.len() - pages.len()))), own.page(0));
            pages.extend(more.iter().cloned());
            ends.push(pages.len());
            lease.pages.extend(more);
        }
        lease.checksums = (0..case.summed.0).map(made(1000)).collect();
        lease.servings[0].own_sums = (0..case.summed.1).map(made(2000)).collect();
        let serving = &lease.servings[0];
        for first in 0..serving.pieces.len() {
            let terms = (first, case.pieces_max);
            let row = lease.row(serving, terms, case.by_transport).unwrap();
            let expected = |index| case.part(&lease, &pages, index);
            let Some(row) = row else {
                prop_assert_eq!(expected(first), None);
                continue;
            };
            let parts = parts(&row);
            let end = first + parts.len();
            prop_assert_eq!(row.sums.len(), row.sources.len());
            prop_assert!((1..=case.pieces_max.min(ROW_PAGES_MAX)).contains(&parts.len()));
            let each: Vec<_> = (first..end).filter_map(expected).collect();
            prop_assert_eq!(&each, &parts);
            let (piece, alike) = serving.pieces.alike(first).unwrap();
            prop_assert_eq!(row.runs, piece.runs);
            prop_assert!(parts.len() <= alike);
            // It ends where it must.
            let full = parts.len() == case.pieces_max.min(alike).min(together(piece.runs));
            let next = expected(end).filter(|next| follows(&parts[parts.len() - 1], next));
            let of_chunk = ends.contains(&(piece.sender_page + parts.len()));
            let as_summed = serving.sums.alike(first).unwrap().1;
            prop_assert!(full || next.is_none() || of_chunk || parts.len() == as_summed);
        }
        prop_assert!(lease.row(serving, (serving.pieces.len(), 1), true).is_err());
    }

    #[test]
    fn what_is_to_be_summed_is_noted_once_when_its_page_comes(case in any_case()) {
        let (mut lease, own) = case.lease();
        let mut pages = Vec::new();
        for count in &case.chunks {
            let more = case.pages(*(count.min(&(lease.held.len() - pages.len()))), own.page(0));
            pages.extend(more.iter().cloned());
            lease.pages.extend(more);
            lease.note_unsummed();
            lease.note_unsummed();
            let noted = |unsummed: &Unsummed| {
                let rows = unsummed.parts.iter();
                let each = rows.flat_map(|(some, runs)| {
                    some.iter().map(move |page| (Arc::as_ptr(page), runs.clone()))
                });
                each.collect::<Vec<_>>()
            };
            let held = pages.iter().zip(lease.held.iter());
            let held: Vec<_> = held.map(|(page, held)| (Arc::as_ptr(page), held.runs.clone())).collect();
            prop_assert_eq!(noted(&lease.unsummed), held);
            let serving = &lease.servings[0];
            let there = serving.pieces.iter().enumerate().map_while(|(index, piece)| {
                let page = pages.get(piece.sender_page)?;
                Some((serving.sums.alike(index)?.0, Arc::as_ptr(page), piece.runs.clone()))
            });
            let own = there.filter(|(sum, ..)| matches!(sum, Sum::Own(_)));
            let own: Vec<_> = own.map(|(_, page, runs)| (page, runs)).collect();
            prop_assert_eq!(noted(&serving.unsummed), own);
        }
    }
}

//! Where the checksums of a transfer's pieces are, in few words: mostly they are its pages', one after the other.
//!
//! Pure books. Invariant: no row is empty.

use std::ops::Range;

use crate::transceiver::reshard::Pieces;
use crate::transceiver::rows::Rows;
use crate::transport::Runs;

/// Where a piece's checksum is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sum {
    /// It is a page's, made when it was offered.
    Page(usize),
    /// It is made for this transfer.
    Own(usize),
}

impl Sum {
    /// The one so many places on.
    const fn plus(self, count: usize) -> Self {
        match self {
            Self::Page(first) => Self::Page(first + count),
            Self::Own(first) => Self::Own(first + count),
        }
    }
}

/// See the module. In the order of the pieces; of each row, where the first one's is: those of the others follow.
#[derive(Debug, Default)]
pub(super) struct Sums(Rows<Sum>);

impl Sums {
    /// Of these pieces, where so much is held of each page.
    pub(super) fn of(pieces: &Pieces, held: &Pieces) -> Self {
        let mut sums = Self::default();
        let mut own = 0;
        for (_, piece, count) in pieces.rows() {
            let mut page = piece.sender_page;
            let end = page + count;
            while page < end {
                // What is held has a piece for each page.
                let (is_pages, alike) = match held.alike(page) {
                    Some((held, alike)) => (same_source(held.runs, piece.runs), alike),
                    None => (false, end - page),
                };
                let count = alike.min(end - page);
                let (first, made) = match is_pages {
                    true => (Sum::Page(page), 0),
                    false => (Sum::Own(own), count),
                };
                sums.0
                    .join(first, count, |last, len, next| last.plus(len) == *next);
                own += made;
                page += count;
            }
        }
        sums
    }

    /// Where this piece's is, and for how many from it on the next ones follow there.
    pub(super) fn alike(&self, index: usize) -> Option<(Sum, usize)> {
        let found = self.0.find(index)?;
        Some((found.row.plus(found.before), found.alike))
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
    use crate::model::shard::Grid;
    use crate::page::{KvDtype, PageShape};
    use crate::transceiver::reshard::{Side, pieces, receivers};
    use crate::transport::Run;
    use proptest::prelude::*;

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

    fn side((tensor, pipeline): (usize, usize), tokens_per_block: usize) -> Side {
        let whole = PageShape {
            layers: 4,
            kv_heads: 4,
            tokens_per_block,
            head_dim: 2,
            dtype: KvDtype::F32,
        };
        Side::new(whole, Grid { tensor, pipeline }).unwrap()
    }

    /// Each piece's for itself.
    fn one_by_one(pieces: &Pieces, held: &Pieces) -> Vec<Sum> {
        let mut own = 0..;
        let sums = pieces.iter().map(|piece| {
            let page = piece.sender_page;
            let held = held.iter().find(|held| held.sender_page == page);
            if held.is_some_and(|held| same_source(held.runs, piece.runs)) {
                return Sum::Page(page);
            }
            Sum::Own(own.next().unwrap())
        });
        sums.collect()
    }

    fn any_side() -> impl Strategy<Value = Side> {
        let grid = (prop::sample::select(vec![1, 2, 4]), 1..3_usize);
        (grid, prop::sample::select(vec![2, 4, 6, 8])).prop_map(|(grid, block)| side(grid, block))
    }

    proptest! {
        #[test]
        fn rows_say_what_each_piece_for_itself_would(
            sender in any_side(),
            receiver in any_side(),
            own_blocks in any::<bool>(),
            tokens in (0..40_usize, 1..60_usize),
        ) {
            // Mostly the blocks are alike.
            let receiver = if own_blocks { receiver } else { sender };
            let tokens_end = tokens.0 + tokens.1;
            let first = tokens.0.next_multiple_of(receiver.tokens_per_block()).min(tokens_end);
            for from in 0..sender.ranks() {
                let held = pieces((&sender, from), (&sender, from), 0..tokens_end);
                for to in receivers(&sender, from, &receiver) {
                    let pieces = pieces((&sender, from), (&receiver, to), first..tokens_end);
                    let sums = Sums::of(&pieces, &held);
                    let expected = one_by_one(&pieces, &held);
                    let found = (0..).map_while(|index| sums.alike(index).map(|(sum, _)| sum));
                    prop_assert_eq!(&found.collect::<Vec<_>>(), &expected);
                    for (index, sum) in expected.iter().enumerate() {
                        let (_, alike) = sums.alike(index).unwrap();
                        let row = (0..alike).map(|more| sum.plus(more));
                        prop_assert!(row.eq(expected[index..][..alike].iter().copied()));
                        // As many as there are.
                        prop_assert_ne!(expected.get(index + alike), Some(&sum.plus(alike)));
                    }
                }
            }
        }
    }
}

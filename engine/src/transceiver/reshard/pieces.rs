//! The pieces of a transfer in few words: a long request has thousands, and mostly they are whole pages, one after the other on
//! both sides.
//!
//! Pure books. Invariant: no row is empty, and the pieces of a row are those of pages that follow each other on both sides.

use crate::transceiver::rows::Rows;
use crate::transport::runs::Runs;

/// What goes from one page of a sender to one page of a receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::transceiver) struct Piece<'a> {
    /// Index of the sender's page, counted from token 0.
    pub(in crate::transceiver) sender_page: usize,
    /// Index of the receiver's page, counted from token 0.
    pub(in crate::transceiver) receiver_page: usize,
    /// Which bytes.
    pub(in crate::transceiver) runs: &'a Runs,
}

/// The same bytes of each of some pages, to as many pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PieceRow {
    /// Of the first one.
    pub(super) sender_page: usize,
    /// Of the first one.
    pub(super) receiver_page: usize,
    /// Of each.
    pub(super) runs: Runs,
}

impl PieceRow {
    /// The one so many places on.
    const fn plus(&self, count: usize) -> Piece<'_> {
        Piece {
            sender_page: self.sender_page + count,
            receiver_page: self.receiver_page + count,
            runs: &self.runs,
        }
    }
}

/// See the module. In order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::transceiver) struct Pieces {
    rows: Rows<PieceRow>,
    total_bytes: u64,
}

impl Pieces {
    /// Adds what follows.
    pub(super) fn push(&mut self, row: PieceRow, count: usize) {
        self.total_bytes += (count * row.runs.total_bytes()) as u64;
        self.rows
            .join(row, count, |last, len, next| last.plus(len) == next.plus(0));
    }

    /// How many there are.
    pub(in crate::transceiver) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Bytes of all of them.
    pub(in crate::transceiver) const fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// The one with this index.
    #[cfg(test)]
    pub(in crate::transceiver) fn get(&self, index: usize) -> Option<Piece<'_>> {
        self.alike(index).map(|(piece, _)| piece)
    }

    /// The one with this index, and how many there are from it on of pages that follow each other, with the same runs.
    pub(in crate::transceiver) fn alike(&self, index: usize) -> Option<(Piece<'_>, usize)> {
        let found = self.rows.find(index)?;
        Some((found.row.plus(found.before), found.alike))
    }

    /// All of them.
    #[cfg(test)]
    pub(in crate::transceiver) fn iter(&self) -> impl Iterator<Item = Piece<'_>> {
        let rows = self.rows.iter();
        rows.flat_map(|(_, row, count)| (0..count).map(|index| row.plus(index)))
    }

    /// The first of each row of alike ones, with its index, and how many there are in the row.
    pub(in crate::transceiver) fn rows(&self) -> impl Iterator<Item = (usize, Piece<'_>, usize)> {
        let rows = self.rows.iter();
        rows.map(|(first, row, count)| (first, row.plus(0), count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row((sender_page, receiver_page): (usize, usize), bytes: usize) -> PieceRow {
        PieceRow {
            sender_page,
            receiver_page,
            runs: Runs::whole(bytes),
        }
    }

    #[test]
    fn what_follows_joins_and_is_found_again() {
        let mut pieces = Pieces::default();
        assert_eq!((pieces.len(), pieces.get(0)), (0, None));
        for (some, count) in [
            (row((3, 0), 8), 2),
            (row((5, 2), 8), 1),
            (row((6, 3), 8), 0),
            (row((6, 3), 4), 1),
            (row((9, 4), 4), 3),
        ] {
            pieces.push(some, count);
        }
        let heads = pieces
            .rows()
            .map(|(first, piece, count)| (first, piece.sender_page, piece.receiver_page, count));
        let heads: Vec<_> = heads.collect();
        assert_eq!(heads, [(0, 3, 0, 3), (3, 6, 3, 1), (4, 9, 4, 3)]);
        assert_eq!((pieces.len(), pieces.total_bytes()), (7, 3 * 8 + 4 * 4));
        let all: Vec<_> = pieces.iter().collect();
        let got: Vec<_> = (0..7).filter_map(|index| pieces.get(index)).collect();
        assert_eq!(all, got);
        let alike = (0..8).map(|index| pieces.alike(index).map(|(_, count)| count));
        let alike: Vec<_> = alike.collect();
        let expected = [3, 2, 1, 1, 3, 2, 1].map(Some);
        assert_eq!(alike[..7], expected);
        assert_eq!(alike[7], None);
    }
}

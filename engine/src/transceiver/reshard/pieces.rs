//! The pieces of a transfer in few words: a long request has thousands, and mostly they are whole pages, one after the other on
//! both sides.
//!
//! Pure books. Invariant: no row is empty, and the pieces of a row are those of pages that follow each other on both sides.

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
    pub(super) count: usize,
    /// Of each.
    pub(super) runs: Runs,
}

/// See the module. In order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::transceiver) struct Pieces {
    rows: Vec<PieceRow>,
    /// For each row, how many pieces there are up to its end.
    ends: Vec<usize>,
    total_bytes: u64,
}

impl Pieces {
    /// Adds what follows.
    pub(super) fn push(&mut self, row: PieceRow) {
        if row.count == 0 {
            return;
        }
        self.total_bytes += (row.count * row.runs.total_bytes()) as u64;
        let end = self.len() + row.count;
        match (self.rows.last_mut(), self.ends.last_mut()) {
            (Some(last), Some(last_end))
                if last.sender_page + last.count == row.sender_page
                    && last.receiver_page + last.count == row.receiver_page
                    && last.runs == row.runs =>
            {
                last.count += row.count;
                *last_end = end;
            }
            _ => {
                self.rows.push(row);
                self.ends.push(end);
            }
        }
    }

    /// How many there are.
    pub(in crate::transceiver) fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
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
        let at = self.ends.partition_point(|end| *end <= index);
        let (row, end) = (self.rows.get(at)?, self.ends[at]);
        let before = index - (end - row.count);
        let piece = Piece {
            sender_page: row.sender_page + before,
            receiver_page: row.receiver_page + before,
            runs: &row.runs,
        };
        Some((piece, end - index))
    }

    /// All of them.
    #[cfg(test)]
    pub(in crate::transceiver) fn iter(&self) -> impl Iterator<Item = Piece<'_>> {
        self.rows.iter().flat_map(|row| {
            (0..row.count).map(move |index| Piece {
                sender_page: row.sender_page + index,
                receiver_page: row.receiver_page + index,
                runs: &row.runs,
            })
        })
    }

    /// The first of each row of alike ones, with its index, and how many there are in the row.
    pub(in crate::transceiver) fn rows(&self) -> impl Iterator<Item = (usize, Piece<'_>, usize)> {
        self.rows.iter().zip(&self.ends).map(|(row, end)| {
            let piece = Piece {
                sender_page: row.sender_page,
                receiver_page: row.receiver_page,
                runs: &row.runs,
            };
            (end - row.count, piece, row.count)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row((sender_page, receiver_page, count): (usize, usize, usize), bytes: usize) -> PieceRow {
        PieceRow {
            sender_page,
            receiver_page,
            count,
            runs: Runs::whole(bytes),
        }
    }

    #[test]
    fn what_follows_joins_and_is_found_again() {
        let mut pieces = Pieces::default();
        assert_eq!((pieces.len(), pieces.get(0)), (0, None));
        for some in [
            row((3, 0, 2), 8),
            row((5, 2, 1), 8),
            row((6, 3, 0), 8),
            row((6, 3, 1), 4),
            row((9, 4, 3), 4),
        ] {
            pieces.push(some);
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

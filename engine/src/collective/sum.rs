//! How a sum over ranks is taken, whatever moves the values: whole or in parts, always in the order of the ranks.
//!
//! Of few values everyone gets everyone's and sums them; of many, each rank sums one part and gives it to all. Either
//! way each element is one chain of additions from the lowest rank to the highest, so the bits are the same.

use std::ops::Range;

/// From so many values on, three and more ranks sum in parts. Over loopback, 4 ranks are equally fast both ways up to
/// 32 KiB, and in parts from 64 KiB on: 1.0 instead of 3.1 ms at 1 MiB.
pub(super) const PARTS_FROM_VALUES: usize = 16 << 10;

/// What a rank sums at once; more is cut, so that it stays in the cache and needs bounded memory. 8 MiB over 2 ranks
/// take 3.5 ms in pieces of 256 KiB, 10 ms in pieces of 1 MiB.
const PIECE_VALUES_MAX: usize = 64 << 10;

/// The ranks of one sum, seen by one of them.
#[derive(Debug, Clone)]
pub(super) struct Members {
    rank: usize,
    range: Range<usize>,
}

impl Members {
    /// `None` where the rank is alone and has nothing to do. Panics where it is no member, or a member no rank.
    pub(super) fn new(rank: usize, size: usize, range: Range<usize>) -> Option<Self> {
        assert!(
            range.contains(&rank) && range.end <= size,
            "rank {rank} of {size} cannot sum over {range:?}"
        );
        (range.len() > 1).then_some(Self { rank, range })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.range.len()
    }

    /// This rank's place among them.
    pub(super) fn index(&self) -> usize {
        self.rank - self.range.start
    }

    /// All of them, in order.
    pub(super) fn all(&self) -> Range<usize> {
        self.range.clone()
    }

    /// All but this rank, in order.
    pub(super) fn others(&self) -> Vec<usize> {
        self.all().filter(|rank| *rank != self.rank).collect()
    }

    /// Which of so many values a member sums when they are summed in parts.
    pub(super) fn part(&self, member: usize, count: usize) -> Range<usize> {
        let index = member - self.range.start;
        count * index / self.count()..count * (index + 1) / self.count()
    }

    /// This rank's part.
    pub(super) fn own_part(&self, count: usize) -> Range<usize> {
        self.part(self.rank, count)
    }

    /// Whether so many values are summed in parts.
    pub(super) fn in_parts(&self, count: usize) -> bool {
        self.count() > 2 && count >= PARTS_FROM_VALUES
    }

    /// How many of so many values are summed at once.
    pub(super) fn piece(&self, count: usize) -> usize {
        match self.in_parts(count) {
            true => PIECE_VALUES_MAX * self.count(),
            false => PIECE_VALUES_MAX,
        }
    }
}

/// Adds up everyone's values in the order of the ranks: `theirs` holds the others' one after another, and is spoilt;
/// `index` is this rank's place among them.
pub(super) fn sum_in_order(index: usize, values: &mut [f32], theirs: &mut [f32]) {
    let (before, after) = theirs.split_at_mut(index * values.len());
    let mut before = before.chunks_exact_mut(values.len());
    if let Some(sum) = before.next() {
        for part in before {
            add(sum, part);
        }
        for (value, sum) in values.iter_mut().zip(sum) {
            *value += *sum;
        }
    }
    for part in after.chunks_exact(values.len()) {
        add(values, part);
    }
}

fn add(sum: &mut [f32], part: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(part) {
        *sum += value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_cover_all_values_once(count in 0_usize..100_000, ranks in 2_usize..65, start in 0_usize..9) {
            let members = Members::new(start, start + ranks, start..start + ranks).unwrap();
            let mut end = 0;
            for rank in members.all() {
                let part = members.part(rank, count);
                prop_assert_eq!(part.start, end);
                end = part.end;
            }
            prop_assert_eq!(end, count);
        }

        #[test]
        fn a_sum_is_the_chain_from_the_lowest_rank(
            rows in proptest::collection::vec(proptest::array::uniform3(-1e9_f32..1e9), 2..9),
            index in 0_usize..8,
        ) {
            let index = index % rows.len();
            let chain: Vec<u32> = (0..3)
                .map(|at| rows[1..].iter().fold(rows[0][at], |sum, row| sum + row[at]).to_bits())
                .collect();
            let mut values = rows[index];
            let mut theirs: Vec<f32> = rows
                .iter()
                .enumerate()
                .filter(|(rank, _)| *rank != index)
                .flat_map(|(_, row)| *row)
                .collect();
            sum_in_order(index, &mut values, &mut theirs);
            prop_assert_eq!(values.map(f32::to_bits).to_vec(), chain);
        }
    }
}

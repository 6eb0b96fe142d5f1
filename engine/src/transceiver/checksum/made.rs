//! Checksums that were made, of many pieces: mostly all of one algorithm, which is said once.

use super::Algorithm;
#[cfg(test)]
use super::Checksum;
use crate::transceiver::rows::Rows;

/// See the module. In order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::transceiver) struct Checksums {
    values: Vec<u64>,
    algorithms: Rows<Algorithm>,
}

impl Checksums {
    /// None yet, with room for so many.
    pub(in crate::transceiver) fn with_room(count: usize) -> Self {
        Self {
            values: Vec::with_capacity(count),
            algorithms: Rows::default(),
        }
    }

    /// Of rows of one algorithm each, with how many it has.
    pub(in crate::transceiver) fn of_rows(
        rows: impl IntoIterator<Item = (Algorithm, usize)>,
        values: Vec<u64>,
    ) -> Self {
        let mut algorithms = Rows::default();
        for (algorithm, count) in rows {
            algorithms.join(algorithm, count, |last, _, next| last == next);
        }
        debug_assert_eq!(algorithms.len(), values.len(), "a checksum for each piece");
        Self { values, algorithms }
    }

    /// Adds what follows.
    pub(in crate::transceiver) fn append(&mut self, later: &Self) {
        for (first, algorithm, count) in later.algorithms.iter() {
            self.extend_row(*algorithm, &later.values[first..first + count]);
        }
    }

    fn extend_row(&mut self, algorithm: Algorithm, values: &[u64]) {
        self.values.extend_from_slice(values);
        self.algorithms
            .join(algorithm, values.len(), |last, _, next| last == next);
    }

    /// Those from this one on that have its algorithm, so many at most; none when it is not made yet.
    pub(in crate::transceiver) fn alike(
        &self,
        first: usize,
        count_max: usize,
    ) -> Option<(Algorithm, &[u64])> {
        let found = self.algorithms.find(first)?;
        let count = count_max.min(found.alike);
        Some((*found.row, &self.values[first..first + count]))
    }
}

#[cfg(test)]
impl FromIterator<Checksum> for Checksums {
    fn from_iter<I: IntoIterator<Item = Checksum>>(checksums: I) -> Self {
        let mut made = Self::default();
        for Checksum { algorithm, value } in checksums {
            made.extend_row(algorithm, &[value]);
        }
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_found_in_rows_of_one_algorithm() {
        let of = |algorithm| move |value| Checksum { algorithm, value };
        let all: Vec<_> = (0..3)
            .map(of(Algorithm::Fold))
            .chain((3..4).map(of(Algorithm::Stripes)))
            .chain((4..7).map(of(Algorithm::Fold)))
            .collect();
        for cut in 0..=all.len() {
            let (before, after) = all.split_at(cut);
            let mut made = Checksums::with_room(all.len());
            made.append(&before.iter().copied().collect());
            made.append(&after.iter().copied().collect());
            assert_eq!(made, all.iter().copied().collect());
            let one_by_one = all.iter().map(|one| (one.algorithm, 1));
            let values = all.iter().map(|one| one.value).collect();
            assert_eq!(made, Checksums::of_rows(one_by_one, values));
            let ends = [3, 3, 3, 4, 7, 7, 7];
            for (first, end) in ends.into_iter().enumerate() {
                for count_max in 1..5 {
                    let (algorithm, values) = made.alike(first, count_max).unwrap();
                    assert_eq!(values.len(), count_max.min(end - first));
                    let found = values.iter().map(|value| of(algorithm)(*value));
                    assert!(found.eq(all[first..][..values.len()].iter().copied()));
                }
            }
            assert_eq!(made.alike(all.len(), 1), None);
        }
    }
}

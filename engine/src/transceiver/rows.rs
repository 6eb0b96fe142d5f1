//! Many things in few rows: a long request has thousands of pages, pieces, regions and checksums, and mostly one is told by the one
//! before it. What they have in common is kept once for each row, with where the row ends; an index is found by halving.
//!
//! Pure books; what a row says of each in it, and what follows what, its owner knows. Invariant: ends never fall, so an index is in
//! one row at most, and in none that is empty.

/// See the module. In order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rows<T> {
    /// Each with how many there are up to its end.
    rows: Vec<(T, usize)>,
}

/// Where one of many is.
#[derive(Debug)]
pub(super) struct Found<'a, T> {
    /// The row that it is in.
    pub(super) row: &'a T,
    /// How many of the row are before it.
    pub(super) before: usize,
    /// How many of the row there are from it on.
    pub(super) alike: usize,
}

impl<T> Default for Rows<T> {
    fn default() -> Self {
        Self { rows: Vec::new() }
    }
}

impl<T> Rows<T> {
    /// Adds a row as it is, even an empty one: a peer may send it. Of what is beyond counting there is nothing.
    pub(super) fn push(&mut self, row: T, count: usize) {
        self.rows.push((row, self.len().saturating_add(count)));
    }

    /// Adds some, if any: to the last row where the next one follows it, which is told the last row, its count, and the next one.
    pub(super) fn join<F>(&mut self, next: T, count: usize, follows: F)
    where
        F: FnOnce(&T, usize, &T) -> bool,
    {
        let last = self.iter().next_back();
        let joins = last.is_some_and(|(_, last, len)| follows(last, len, &next));
        if let Some((_, end)) = self.rows.last_mut().filter(|_| joins) {
            *end = end.saturating_add(count);
        } else if count > 0 {
            self.push(next, count);
        }
    }

    /// How many there are in all rows, as far as that can be counted.
    pub(super) fn len(&self) -> usize {
        self.start(self.rows.len())
    }

    /// How many there are before a row.
    fn start(&self, row: usize) -> usize {
        row.checked_sub(1).map_or(0, |before| self.rows[before].1)
    }

    /// Where the one with this index is.
    pub(super) fn find(&self, index: usize) -> Option<Found<'_, T>> {
        let at = self.rows.partition_point(|(_, end)| *end <= index);
        let (row, end) = self.rows.get(at)?;
        let (before, alike) = (index - self.start(at), end - index);
        Some(Found { row, before, alike })
    }

    /// Each row with the index of the first one in it, and how many it has.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = (usize, &T, usize)> {
        let rows = self.rows.iter().enumerate();
        rows.map(|(at, (row, end))| (self.start(at), row, end - self.start(at)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Of numbers in rows, each told by its first.
        #[test]
        fn they_say_what_each_for_itself_would(
            some in prop::collection::vec((0..6_usize, 0..4_usize), 0..12),
        ) {
            let (mut rows, mut all) = (Rows::default(), Vec::new());
            for (first, count) in some {
                rows.join(first, count, |last, so_far, next| last + so_far == *next);
                all.extend(first..first + count);
            }
            prop_assert_eq!(rows.len(), all.len());
            for (index, number) in all.iter().enumerate() {
                let Found { row, before, alike } = rows.find(index).unwrap();
                prop_assert_eq!(row + before, *number);
                // As many as there are, and no more.
                let follow = (*number..).zip(&all[index..]).take_while(|(next, one)| next == *one);
                prop_assert_eq!(alike, follow.count());
            }
            prop_assert!(rows.find(all.len()).is_none());
            let mut end = 0;
            for (first, row, count) in rows.iter() {
                prop_assert_eq!((first, *row), (end, all[first]));
                prop_assert_eq!(rows.find(first).map(|found| found.alike), Some(count));
                end += count;
            }
            prop_assert_eq!(end, all.len());
        }
    }

    #[test]
    fn what_is_empty_or_beyond_counting_is_not_found() {
        let mut rows = Rows::default();
        for (row, count) in [('a', 0), ('b', 2), ('c', 0), ('d', usize::MAX), ('e', 1)] {
            rows.push(row, count);
        }
        let found = |index| rows.find(index).map(|found| (*found.row, found.alike));
        assert_eq!([0, 1].map(found), [Some(('b', 2)), Some(('b', 1))]);
        assert_eq!(found(2), Some(('d', usize::MAX - 2)));
        assert_eq!((rows.len(), found(usize::MAX)), (usize::MAX, None));
        assert_eq!(rows.iter().last(), Some((usize::MAX, &'e', 0)));
    }
}

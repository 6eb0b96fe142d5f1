//! The pages of a lease, as they came: a chunk of shared pages for each time, or more where they lie in several arenas.
//!
//! Pure books. Invariant: no chunk is empty, and the pages of a chunk are of one kind of memory, and of one arena where they are of any.

use std::sync::Arc;

use crate::page::Page;
use crate::transceiver::rows::Rows;
use crate::transport::{SharedPages, Sources};

/// See the module. In order.
#[derive(Debug, Default)]
pub(super) struct LentPages(Rows<Arc<SharedPages>>);

impl LentPages {
    pub(super) fn of(pages: Vec<Arc<Page>>) -> Self {
        let mut all = Self::default();
        all.extend(pages);
        all
    }

    /// Adds what follows.
    pub(super) fn extend(&mut self, pages: Vec<Arc<Page>>) {
        let chunks = SharedPages::cut(pages).into_iter();
        for chunk in chunks.filter(|chunk| !chunk.is_empty()) {
            let count = chunk.len();
            self.0.push(Arc::new(chunk), count);
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none of them lies on a device.
    pub(super) fn are_in_host(&self) -> bool {
        let mut chunks = self.0.iter();
        chunks.all(|(_, chunk, _)| !chunk.is_on_device())
    }

    /// Those that follow each other in a chunk from this one on, so many at most; none when it is not there yet.
    pub(super) fn row(&self, first: usize, count_max: usize) -> Option<Sources> {
        let found = self.0.find(first)?;
        let (start, count) = (found.before, count_max.min(found.alike));
        Some(Sources::new(found.row, start..start + count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::device::fake;
    use crate::transport::staging::plain_shape;

    fn shared(pages: Vec<Page>) -> Vec<Arc<Page>> {
        pages.into_iter().map(Arc::new).collect()
    }

    #[test]
    fn rows_end_where_chunks_and_arenas_do() {
        let shape = plain_shape(64);
        let pool = |count| shared(Page::pool(shape, count).unwrap());
        let alone = shared(vec![Page::zeroed(shape), Page::zeroed(shape)]);
        let times = [
            pool(5),
            vec![],
            [pool(2), pool(1), alone].concat(),
            shared(fake::pool(shape, 3)),
        ];
        let all = times.concat();
        let mut lent = LentPages::default();
        assert!(lent.row(0, 1).is_none());
        for (index, pages) in times.into_iter().enumerate() {
            assert_eq!(lent.are_in_host(), index < 4);
            lent.extend(pages);
        }
        assert!(!lent.are_in_host());
        assert_eq!(lent.len(), all.len());
        let ends = [5, 7, 8, 10, 13];
        for (first, page) in all.iter().enumerate() {
            let end = ends.into_iter().find(|end| *end > first).unwrap();
            for count_max in 1..9 {
                let row = lent.row(first, count_max).unwrap();
                assert_eq!(row.len(), count_max.min(end - first), "from {first} on");
                let expected = all[first..].iter();
                assert!(row.iter().zip(expected).all(|(a, b)| Arc::ptr_eq(a, b)));
                let arena = row.place().map(|(arena, _)| arena.id());
                assert_eq!(arena, page.arena().map(|(arena, _)| arena.id()));
            }
        }
        assert!(lent.row(all.len(), 1).is_none());
    }
}

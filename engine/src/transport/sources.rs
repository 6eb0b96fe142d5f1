//! The pages of writes: what is known of many is found out once, when they are shared, and a row of them is one reference.
//!
//! A long request has thousands of pages, each with a record of its own somewhere in memory: who looks at every record, or counts
//! its references, waits for memory each time. So rows look at flat arrays, and at no page whose bytes they need not read.
//!
//! Invariant: what is said of shared pages is true of each of them; where it cannot be said, each is looked at.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::Runs;
use crate::page::Page;
use crate::page::arena::Arena;

/// Pages that are shared together: those of a request, or of a chunk of it.
#[derive(Debug)]
pub struct SharedPages {
    pages: Vec<Arc<Page>>,
    alike: Option<Alike>,
    place: Option<Place>,
}

/// What all pages have in common, if they do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Alike {
    on_device: bool,
    /// Of a page.
    bytes: usize,
}

impl Alike {
    fn of(page: &Page) -> Self {
        Self {
            on_device: page.is_on_device(),
            bytes: page.shape().bytes(),
        }
    }
}

/// The arena that all pages lie in, if they do.
#[derive(Debug)]
struct Place {
    arena: Arc<Arena>,
    /// Where in it each begins, in bytes.
    offsets: Vec<u64>,
}

impl Place {
    fn of(pages: &[Arc<Page>]) -> Option<Self> {
        let (arena, _) = pages.first()?.arena()?;
        let mut offsets = Vec::with_capacity(pages.len());
        for page in pages {
            let (_, offset) = page.arena().filter(|(of, _)| Arc::ptr_eq(of, arena))?;
            offsets.push(offset as u64);
        }
        Some(Self {
            arena: Arc::clone(arena),
            offsets,
        })
    }
}

impl SharedPages {
    /// Looks at each of them.
    #[must_use]
    pub fn new(pages: Vec<Arc<Page>>) -> Self {
        let first = pages.first().map(|page| Alike::of(page));
        let same = |page: &Arc<Page>| Some(Alike::of(page)) == first;
        Self {
            alike: first.filter(|_| pages.iter().all(same)),
            place: Place::of(&pages),
            pages,
        }
    }

    /// The same pages, cut where one does not lie in the arena of the one before it, or is not like it.
    pub(crate) fn cut(pages: Vec<Arc<Page>>) -> Vec<Self> {
        let all = Self::new(pages);
        if all.pages.is_empty() || (all.place.is_some() && all.alike.is_some()) {
            return vec![all];
        }
        let arena = |page: &Page| page.arena().map(|(arena, _)| arena.id());
        let together = |one: &Arc<Page>, next: &Arc<Page>| {
            arena(one) == arena(next) && Alike::of(one) == Alike::of(next)
        };
        let parts = all.pages.chunk_by(together);
        parts.map(|part| Self::new(part.to_vec())).collect()
    }

    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Whether one of them lies on a device.
    pub(crate) fn is_on_device(&self) -> bool {
        match self.alike {
            Some(alike) => alike.on_device,
            None => self.pages.iter().any(|page| page.is_on_device()),
        }
    }
}

/// The pages of a [`super::Write`]: some of shared ones that follow each other. All of the shared ones are kept by it.
#[derive(Clone)]
pub struct Sources {
    of: Arc<SharedPages>,
    range: Range<usize>,
}

impl Sources {
    /// Those of a range. Panics where there are no such pages: that is a bug of the caller.
    #[must_use]
    pub fn new(of: &Arc<SharedPages>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= of.len());
        Self {
            of: Arc::clone(of),
            range,
        }
    }

    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.range.end - self.range.start
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them.
    pub fn iter(&self) -> std::slice::Iter<'_, Arc<Page>> {
        self.of.pages[self.range.clone()].iter()
    }

    /// The first one.
    #[must_use]
    pub fn first(&self) -> Option<&Arc<Page>> {
        self.get(0)
    }

    /// The one with this index.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<&Arc<Page>> {
        self.of.pages[self.range.clone()].get(index)
    }

    /// Keeps the first ones, so many at most.
    pub(crate) fn truncate(&mut self, count: usize) {
        self.range.end = self.range.end.min(self.range.start + count);
    }

    /// Takes the first ones out, so many at most.
    pub(crate) fn take_first(&mut self, count: usize) -> Self {
        let mut taken = self.clone();
        taken.truncate(count);
        self.range.start = taken.range.end;
        taken
    }

    /// Whether one of them lies on a device.
    pub(crate) fn is_on_device(&self) -> bool {
        match self.of.alike {
            Some(alike) => alike.on_device,
            None => self.iter().any(|page| page.is_on_device()),
        }
    }

    /// Whether they are of one kind of memory, and these stretches lie within each.
    pub(crate) fn are_sound(&self, runs: &Runs) -> bool {
        // How long the target is, the peer says.
        let fits = |alike: Alike| runs.fits(alike.bytes, usize::MAX);
        let Some(alike) = self.of.alike else {
            let on_device = self.is_on_device();
            let mut each = self.iter().map(|page| Alike::of(page));
            return each.all(|page| page.on_device == on_device && fits(page));
        };
        fits(alike)
    }

    /// The arena that they lie in, and where each begins in it, in bytes; none when there is no such arena.
    pub(crate) fn place(&self) -> Option<(&Arc<Arena>, &[u64])> {
        let place = self.of.place.as_ref()?;
        Some((&place.arena, &place.offsets[self.range.clone()]))
    }

    /// For each of them, the arena that it lies in, and where it begins there, in bytes; none where its memory is its own.
    pub(crate) fn places(&self) -> impl Iterator<Item = Option<(&Arc<Arena>, usize)>> {
        let place = self.of.place.as_ref();
        self.range.clone().map(move |index| match place {
            Some(place) => {
                let offset = usize::try_from(place.offsets[index]).ok()?;
                Some((&place.arena, offset))
            }
            None => self.of.pages[index].arena(),
        })
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self).finish()
    }
}

impl<'a> IntoIterator for &'a Sources {
    type Item = &'a Arc<Page>;
    type IntoIter = std::slice::Iter<'a, Arc<Page>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl From<Vec<Arc<Page>>> for Sources {
    fn from(pages: Vec<Arc<Page>>) -> Self {
        let range = 0..pages.len();
        Self {
            of: Arc::new(SharedPages::new(pages)),
            range,
        }
    }
}

impl From<&[Arc<Page>]> for Sources {
    fn from(pages: &[Arc<Page>]) -> Self {
        pages.to_vec().into()
    }
}

impl From<Arc<Page>> for Sources {
    fn from(page: Arc<Page>) -> Self {
        vec![page].into()
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

    fn pool(bytes: usize, count: usize) -> Vec<Arc<Page>> {
        shared(Page::pool(plain_shape(bytes), count).unwrap())
    }

    fn on_device(bytes: usize, count: usize) -> Vec<Arc<Page>> {
        shared(fake::pool(plain_shape(bytes), count))
    }

    fn alone(bytes: usize) -> Vec<Arc<Page>> {
        shared(vec![Page::zeroed(plain_shape(bytes))])
    }

    /// What each page says for itself.
    fn check(sources: &Sources, pages: &[Arc<Page>]) {
        assert_eq!(sources.len(), pages.len());
        assert_eq!(sources.is_empty(), pages.is_empty());
        assert!(sources.iter().zip(pages).all(|(a, b)| Arc::ptr_eq(a, b)));
        let same =
            |a: Option<&Arc<Page>>, b: Option<&Arc<Page>>| a.map(Arc::as_ptr) == b.map(Arc::as_ptr);
        assert!(same(sources.first(), pages.first()));
        for index in 0..pages.len() + 3 {
            assert!(same(sources.get(index), pages.get(index)), "{index}");
        }
        let any_on_device = pages.iter().any(|page| page.is_on_device());
        assert_eq!(sources.is_on_device(), any_on_device);
        let places = pages.iter().map(|page| page.arena());
        let place = |place: Option<(&Arc<Arena>, usize)>| place.map(|(arena, at)| (arena.id(), at));
        assert!(places.clone().map(place).eq(sources.places().map(place)));
        if let Some((arena, offsets)) = sources.place() {
            let offsets = offsets.iter().map(|at| usize::try_from(*at).unwrap());
            assert!(
                places
                    .map(place)
                    .eq(offsets.map(|at| Some((arena.id(), at))))
            );
        }
        for bytes in [64, 128, 192] {
            let runs = Runs::whole(bytes);
            let sound = |page: &Arc<Page>| {
                page.is_on_device() == any_on_device && page.shape().bytes() >= bytes
            };
            assert_eq!(sources.are_sound(&runs), pages.iter().all(sound));
        }
    }

    #[test]
    fn a_row_says_what_each_of_its_pages_would() {
        let of_two_sizes = [pool(64, 2), pool(128, 3)].concat();
        let of_both_kinds = [pool(128, 3), on_device(128, 2)].concat();
        let partly_alone = [pool(128, 2), alone(128), pool(128, 1), alone(128)].concat();
        let of_two_devices = [on_device(128, 2), on_device(128, 2)].concat();
        for (pages, in_one_arena) in [
            (pool(128, 5), true),
            (on_device(128, 4), true),
            (of_two_sizes, false),
            (of_both_kinds, false),
            (partly_alone, false),
            (of_two_devices, false),
            (alone(192), false),
        ] {
            let of = Arc::new(SharedPages::new(pages.clone()));
            for start in 0..pages.len() {
                for end in start + 1..=pages.len() {
                    let sources = Sources::new(&of, start..end);
                    check(&sources, &pages[start..end]);
                    assert_eq!(sources.place().is_some(), in_one_arena);
                }
            }
        }
    }

    #[test]
    fn a_row_is_shortened_and_taken_apart() {
        let pages = pool(64, 7);
        let mut sources = Sources::from(&pages[..]);
        let taken = sources.take_first(3);
        check(&taken, &pages[..3]);
        check(&sources, &pages[3..]);
        sources.truncate(2);
        check(&sources, &pages[3..5]);
        check(&sources.take_first(9), &pages[3..5]);
        assert!(sources.is_empty() && sources.first().is_none());
        drop((taken, sources));
        assert!(pages.iter().all(|page| Arc::strong_count(page) == 1));
    }

    #[test]
    fn pages_are_cut_where_their_memory_changes() {
        let together = |pages: &[Vec<Arc<Page>>]| {
            let parts = SharedPages::cut(pages.concat());
            let lens: Vec<_> = parts.iter().map(SharedPages::len).collect();
            let kept = parts.iter().flat_map(|part| &part.pages);
            assert!(
                kept.map(Arc::as_ptr)
                    .eq(pages.concat().iter().map(Arc::as_ptr))
            );
            let one_kind = |part: &SharedPages| part.alike.is_some() || part.is_empty();
            assert!(parts.iter().all(one_kind));
            lens
        };
        assert_eq!(together(&[]), [0]);
        assert_eq!(together(&[pool(64, 9)]), [9]);
        assert_eq!(together(&[on_device(64, 9)]), [9]);
        assert_eq!(
            together(&[pool(64, 2), pool(64, 3), alone(64), alone(64)]),
            [2, 3, 2]
        );
        assert_eq!(
            together(&[on_device(64, 1), pool(64, 1), on_device(64, 2)]),
            [1, 1, 2]
        );
        assert_eq!(together(&[alone(64), alone(128)]), [1, 1]);
    }
}

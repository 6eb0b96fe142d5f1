//! Memory of a device: pages lie in it that this process can neither read nor write through a reference.
//!
//! An arena of such memory is a value with few calls, so that nothing outside a backend knows whose device it is. Pages in
//! it are moved by transports that take device memory, and by all others through copies in the host's. Absent: streams,
//! kernels, the ways in which peers are let in; those are the backend's and its transport's.

use std::any::Any;
use std::fmt::Debug;
use std::io;
use std::ops::Range;

use smallvec::SmallVec;

/// Which way bytes go between an arena and another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// Out of the other arena.
    Gather,
    /// Into the other arena.
    Scatter,
}

/// Bytes that lie in one arena and belong into another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Where in the arena that is asked.
    pub here: usize,
    /// Where in the other one.
    pub there: usize,
    /// How many.
    pub bytes: usize,
}

impl Span {
    /// Stretches of a page that begins at `there` of the other arena, one behind the other from `here` on.
    pub(crate) fn packed(
        mut here: usize,
        there: usize,
        stretches: impl Iterator<Item = Range<usize>>,
    ) -> Spans {
        let spans = stretches.map(|stretch| {
            let span = Self {
                here,
                there: there + stretch.start,
                bytes: stretch.len(),
            };
            here += span.bytes;
            span
        });
        spans.collect()
    }
}

/// The spans of a piece: mostly one, which takes no memory of its own.
pub type Spans = SmallVec<[Span; 1]>;

/// Spans that are summed together, one after the other.
#[derive(Debug, Clone)]
pub struct Exchange<'a> {
    /// The other arena: of the same device.
    pub other: &'a dyn DeviceArena,
    /// What goes where.
    pub spans: Spans,
}

/// Pieces that are alike, each somewhere else in an arena, to be summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FoldRow<'a> {
    /// Where each begins, in bytes.
    pub at: &'a [u64],
    /// What it is made of, from there, in order.
    pub stretches: &'a [Range<usize>],
}

impl FoldRow<'_> {
    /// Of each.
    #[must_use]
    pub fn piece_bytes(&self) -> usize {
        self.stretches.iter().map(Range::len).sum()
    }

    /// For each, where it begins.
    pub(crate) fn places(&self) -> impl Iterator<Item = usize> {
        // What lies beyond all memory is within no arena.
        let places = self.at.iter();
        places.map(|at| usize::try_from(*at).unwrap_or(usize::MAX))
    }
}

/// One allocation on a device.
///
/// Each call sees what the backend had put on its streams before the page in question was shared or lent, and is done when it
/// returns. Ranges are in bytes within [`DeviceArena::bytes`]; whoever calls holds the pages that they are of.
pub trait DeviceArena: Any + Debug + Send + Sync {
    /// Where it begins, in the device's addresses; a multiple of 64.
    fn address(&self) -> u64;

    /// Its length.
    fn bytes(&self) -> usize;

    /// Copies to the host.
    ///
    /// # Errors
    /// When the device fails.
    fn read(&self, at: usize, to: &mut [u8]) -> io::Result<()>;

    /// Copies from the host.
    ///
    /// # Errors
    /// When the device fails.
    fn write(&self, at: usize, from: &[u8]) -> io::Result<()>;

    /// For each piece of each row, the checksum ([`super::fold`]) of its stretches one after the other.
    ///
    /// # Errors
    /// When the device fails.
    fn fold(&self, rows: &[FoldRow<'_>]) -> io::Result<Vec<u64>>;

    /// Copies between this memory and others of the same device. For each exchange, the checksum ([`super::fold`]) of its spans one
    /// after the other, made of what was copied; none where they do not lie as the device sums them in passing. Nothing at all, or
    /// none of any, for [`Course::Gather`].
    ///
    /// # Errors
    /// When another arena is not of this device, or the device fails.
    fn exchange(&self, course: Course, exchanges: &[Exchange<'_>]) -> io::Result<Vec<Option<u64>>>;

    /// The device's number among those that this process sees, as libraries name it.
    fn ordinal(&self) -> usize;

    /// Makes the device the one that libraries use on this thread.
    ///
    /// # Errors
    /// When the device fails.
    fn enter(&self) -> io::Result<()>;

    /// Waits until nothing that anybody has put on the device is under way.
    ///
    /// # Errors
    /// When the device fails.
    fn settle(&self) -> io::Result<()>;

    /// More memory of the same device, zeroed.
    ///
    /// # Errors
    /// When there is none.
    fn another(&self, bytes: usize) -> io::Result<Box<dyn DeviceArena>>;
}

#[cfg(test)]
pub(crate) mod fake {
    //! A device that is none, for what can be tested of device memory without one.

    use std::any::Any;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::{Course, DeviceArena, Exchange, FoldRow, io};
    use crate::page::fold::Fold;
    use crate::page::{Page, PageShape};

    /// No address of this process: who follows it is found out at once.
    const ADDRESS: u64 = 0x40;

    /// Memory that only its calls reach.
    #[derive(Debug)]
    pub(crate) struct FakeArena(Mutex<Vec<u8>>);

    impl FakeArena {
        fn new(bytes: usize) -> Box<Self> {
            Box::new(Self(Mutex::new(vec![0; bytes])))
        }

        fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl DeviceArena for FakeArena {
        fn address(&self) -> u64 {
            ADDRESS
        }

        fn bytes(&self) -> usize {
            self.lock().len()
        }

        fn read(&self, at: usize, to: &mut [u8]) -> io::Result<()> {
            to.copy_from_slice(&self.lock()[at..at + to.len()]);
            Ok(())
        }

        fn write(&self, at: usize, from: &[u8]) -> io::Result<()> {
            self.lock()[at..at + from.len()].copy_from_slice(from);
            Ok(())
        }

        fn fold(&self, rows: &[FoldRow<'_>]) -> io::Result<Vec<u64>> {
            let memory = self.lock();
            let sum = |row: &FoldRow<'_>, at: usize| {
                let mut fold = Fold::default();
                row.stretches
                    .iter()
                    .for_each(|range| fold.update(&memory[at..][range.clone()]));
                fold.digest()
            };
            let sums = rows
                .iter()
                .flat_map(|row| row.places().map(move |at| (row, at)));
            Ok(sums.map(|(row, at)| sum(row, at)).collect())
        }

        fn exchange(
            &self,
            course: Course,
            exchanges: &[Exchange<'_>],
        ) -> io::Result<Vec<Option<u64>>> {
            let one = |exchange: &Exchange<'_>| {
                let other = (exchange.other as &dyn Any).downcast_ref::<Self>();
                let other = other.ok_or_else(|| io::Error::other("of another device"))?;
                let mut fold = Fold::default();
                for span in &exchange.spans {
                    let mut bytes = vec![0; span.bytes];
                    let (from, to) = match course {
                        Course::Gather => ((other, span.there), (self, span.here)),
                        Course::Scatter => ((self, span.here), (other, span.there)),
                    };
                    from.0.read(from.1, &mut bytes)?;
                    to.0.write(to.1, &bytes)?;
                    fold.update(&bytes);
                }
                Ok((course == Course::Scatter).then(|| fold.digest()))
            };
            exchanges.iter().map(one).collect()
        }

        fn ordinal(&self) -> usize {
            0
        }

        fn enter(&self) -> io::Result<()> {
            Ok(())
        }

        fn settle(&self) -> io::Result<()> {
            Ok(())
        }

        fn another(&self, bytes: usize) -> io::Result<Box<dyn DeviceArena>> {
            Ok(Self::new(bytes))
        }
    }

    /// Zeroed pages on the device that is none.
    pub(crate) fn pool(shape: PageShape, count: usize) -> Vec<Page> {
        let bytes = Page::arena_bytes(shape, count).expect("a small pool");
        Page::pool_on(FakeArena::new(bytes), shape, count).expect("it is large enough")
    }
}

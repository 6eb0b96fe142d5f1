//! The bytes that are moved: a pattern that differs with run, request, page and offset, and a poison that is none of it.
//!
//! Invariant: a target that was poisoned and then compares equal was written in full by this very transfer, for what a
//! request's pages hold changes from round to round.

use std::io;
use std::num::NonZero;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, anyhow};
use baton_engine::backend::cuda;
use baton_engine::machine::available_bytes;
use baton_engine::page::{Page, PageShape};
use serde::{Deserialize, Serialize};

use crate::exit::{Outcome, WithOutcome};

/// What targets hold before a transfer.
const POISON: u8 = 0xA5;

/// Odd constants whose multiples differ in all bits (the golden ratio's and its square's fractions).
const STRIDE: u64 = 0x9E37_79B9_7F4A_7C15;
const SCATTER: u64 = 0xBF58_476D_1CE4_E5B9;

/// The words of one source page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pattern(u64);

impl Pattern {
    /// The pattern of a page, `0..` over all requests, in a run.
    pub(super) fn new(run: u64, page: usize) -> Self {
        Self(mixed(run ^ mixed((page as u64).wrapping_add(1))))
    }

    fn word(self, index: usize) -> u64 {
        let word = (index as u64).wrapping_mul(STRIDE) ^ self.0;
        word ^ (word >> 29)
    }

    fn fill(self, bytes: &mut [u8]) {
        for (index, chunk) in bytes.chunks_mut(8).enumerate() {
            chunk.copy_from_slice(&self.word(index).to_le_bytes()[..chunk.len()]);
        }
    }

    /// Offset of the first byte that is another one.
    fn first_difference(self, bytes: &[u8]) -> Option<usize> {
        let differs = |(index, chunk): (usize, &[u8])| {
            let word = self.word(index).to_le_bytes();
            let at = chunk.iter().zip(word).position(|(a, b)| *a != b);
            at.map(|at| index * 8 + at)
        };
        let equal = |(index, chunk): &(usize, &[u8])| {
            let word: Option<[u8; 8]> = (*chunk).try_into().ok();
            word.is_some_and(|word| u64::from_le_bytes(word) == self.word(*index))
        };
        let mut unequal = bytes.chunks(8).enumerate().filter(|chunk| !equal(chunk));
        unequal.find_map(differs)
    }
}

fn mixed(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(SCATTER);
    word ^ (word >> 31)
}

/// Which source page a request's page `index` is in a round: all requests together share the sources, and each round
/// turns them by one.
pub(super) const fn source_of(index: usize, round: usize, count: usize) -> usize {
    (index + round) % count
}

/// Where the KV lies, on both sides alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Device {
    /// In ordinary memory.
    Cpu,
    /// In a GPU's.
    Cuda,
}

/// Which side of the hand-off pages are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Holding,
    Fetching,
}

impl Device {
    /// The GPU of a side, by its number; `None` in ordinary memory. Two processes that see the same GPUs take the first and the
    /// last of them.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn ordinal(self, side: Side) -> anyhow::Result<Option<usize>> {
        match (self, side) {
            (Self::Cpu, _) => Ok(None),
            (Self::Cuda, _) => {
                let count = cuda::device_count()
                    .context("kv in gpu memory")
                    .outcome(Outcome::Unavailable)?;
                Ok(Some(match side {
                    Side::Holding => 0,
                    Side::Fetching => count - 1,
                }))
            }
        }
    }
}

/// Pages of one shape in ordinary memory or on the GPU of this number, in the order of a pool whose free list has long been
/// stirred: neighbours of a request are no neighbours in memory.
///
/// # Errors
/// When the machine or the GPU has too little memory left.
pub(super) fn allocate(
    ordinal: Option<usize>,
    shape: PageShape,
    count: usize,
    stir: u64,
) -> anyhow::Result<Vec<Page>> {
    let mut pages = match ordinal {
        None => allocate_here(shape, count)?,
        Some(ordinal) => cuda::device_pages(ordinal, shape, count)
            .with_context(|| format!("{count} pages on gpu {ordinal}"))
            .outcome(Outcome::Unavailable)?,
    };
    let mut state = stir;
    for last in (1..count).rev() {
        state = mixed(state.wrapping_add(STRIDE));
        let other = usize::try_from(state % (last as u64 + 1)).unwrap_or(last);
        pages.swap(last, other);
    }
    Ok(pages)
}

fn allocate_here(shape: PageShape, count: usize) -> anyhow::Result<Vec<Page>> {
    let needed = (shape.bytes() as u64).saturating_mul(count as u64);
    let free = available_bytes();
    // An eighth stays for everybody else.
    if needed > free - free / 8 {
        return Err(anyhow!(
            "the kv takes {} on this side, and {} are free\nhint: fewer --tokens or a lower --concurrency",
            mebibytes(needed),
            mebibytes(free)
        ))
        .outcome(Outcome::Unavailable);
    }
    Page::pool(shape, count)
        .with_context(|| format!("no memory to share of {}", mebibytes(needed)))
        .outcome(Outcome::Unavailable)
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// Writes each page's pattern.
///
/// # Errors
/// When the device fails that they lie on.
pub(super) fn fill(pages: &mut [Page], run: u64) -> io::Result<()> {
    over(pages, |index, page| {
        write(page, |bytes| Pattern::new(run, index).fill(bytes))
    })
}

/// Makes the targets hold what no source holds.
///
/// # Errors
/// When the device fails that they lie on.
pub(super) fn poison(pages: &mut [Page]) -> io::Result<()> {
    over(pages, |_, page| write(page, |bytes| bytes.fill(POISON)))
}

/// Writes a whole page, wherever it lies.
fn write(page: &mut Page, work: impl FnOnce(&mut [u8])) -> io::Result<()> {
    if !page.is_on_device() {
        work(page.as_bytes_mut());
        return Ok(());
    }
    let mut bytes = vec![0; page.shape().bytes()];
    work(&mut bytes);
    page.write(0, &bytes)
}

/// The first byte that is not what the round's source had, if any: page and offset.
///
/// # Errors
/// When the device fails that they lie on.
pub(super) fn first_difference(
    pages: &mut [Page],
    run: u64,
    round: usize,
) -> io::Result<Option<(usize, usize)>> {
    let count = pages.len();
    let found = Mutex::new(None::<(usize, usize)>);
    over(pages, |index, page| {
        let pattern = Pattern::new(run, source_of(index, round, count));
        if let Some(offset) = pattern.first_difference(&page.to_host()?) {
            let mut first = found.lock().unwrap_or_else(PoisonError::into_inner);
            let here = (index, offset);
            *first = Some(first.map_or(here, |there| there.min(here)));
        }
        Ok(())
    })?;
    Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Does something with each page, on all processors; the first error of any of them.
fn over(
    pages: &mut [Page],
    work: impl Fn(usize, &mut Page) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let share = pages.len().div_ceil(threads).max(1);
    let failed = Mutex::new(Ok(()));
    std::thread::scope(|scope| {
        for (part, pages) in pages.chunks_mut(share).enumerate() {
            let (work, failed) = (&work, &failed);
            scope.spawn(move || {
                let mut each = pages.iter_mut().enumerate();
                if let Err(error) =
                    each.try_for_each(|(index, page)| work(part * share + index, page))
                {
                    *failed.lock().unwrap_or_else(PoisonError::into_inner) = Err(error);
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_engine::page::KvDtype;

    const SHAPE: PageShape = PageShape {
        layers: 1,
        kv_heads: 1,
        tokens_per_block: 3,
        head_dim: 3,
        dtype: KvDtype::Bf16,
    };
    const RUN: u64 = 7;
    const COUNT: usize = 5;

    fn turned(round: usize) -> Vec<Page> {
        let mut pages = allocate(None, SHAPE, COUNT, 1).unwrap();
        for (index, page) in pages.iter_mut().enumerate() {
            Pattern::new(RUN, source_of(index, round, COUNT)).fill(page.as_bytes_mut());
        }
        pages
    }

    #[test]
    fn what_was_written_compares_equal_in_its_round_only() {
        let mut pages = allocate(None, SHAPE, COUNT, 1).unwrap();
        assert_eq!(pages[0].as_bytes().len(), 36);
        fill(&mut pages, RUN).unwrap();
        assert_eq!(first_difference(&mut pages, RUN, 0).unwrap(), None);
        assert_eq!(first_difference(&mut turned(3), RUN, 3).unwrap(), None);
        assert_eq!(
            first_difference(&mut turned(3), RUN, 4).unwrap(),
            Some((0, 0))
        );
        assert_eq!(
            first_difference(&mut pages, RUN + 1, 0).unwrap(),
            Some((0, 0))
        );
    }

    #[test]
    fn one_bit_in_any_byte_is_found() {
        for page in 0..COUNT {
            for offset in [0, 1, 8, 31, 32, 35] {
                let mut pages = turned(2);
                pages[page].as_bytes_mut()[offset] ^= 0x10;
                assert_eq!(
                    first_difference(&mut pages, RUN, 2).unwrap(),
                    Some((page, offset))
                );
            }
        }
    }

    #[test]
    fn poison_is_no_pattern() {
        let mut pages = turned(0);
        poison(&mut pages).unwrap();
        assert!(
            pages
                .iter()
                .all(|page| page.as_bytes().iter().all(|b| *b == POISON))
        );
        assert_eq!(first_difference(&mut pages, RUN, 0).unwrap(), Some((0, 0)));
    }

    #[test]
    fn more_than_the_memory_is_refused() {
        let error = allocate(None, SHAPE, usize::MAX / 64, 0)
            .unwrap_err()
            .to_string();
        assert!(error.contains("are free"), "{error}");
        assert!(error.contains("hint: fewer --tokens"), "{error}");
    }
}

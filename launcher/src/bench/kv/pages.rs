//! The bytes that are moved: a pattern that differs with run, request, page and offset, and a poison that is none of it.
//!
//! Invariant: a target that was poisoned and then compares equal was written in full by this very transfer, for what a
//! request's pages hold changes from round to round.

use std::num::NonZero;

use anyhow::{Context, anyhow};
use baton_engine::machine::available_bytes;
use baton_engine::page::{Page, PageShape};

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

/// Pages of one shape, in the order of a pool whose free list has long been stirred: neighbours of a request are no
/// neighbours in memory.
///
/// # Errors
/// When the machine has too little memory left.
pub(super) fn allocate(shape: PageShape, count: usize, stir: u64) -> anyhow::Result<Vec<Page>> {
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
    let mut pages = Page::pool(shape, count)
        .with_context(|| format!("no memory to share of {}", mebibytes(needed)))
        .outcome(Outcome::Unavailable)?;
    let mut state = stir;
    for last in (1..count).rev() {
        state = mixed(state.wrapping_add(STRIDE));
        let other = usize::try_from(state % (last as u64 + 1)).unwrap_or(last);
        pages.swap(last, other);
    }
    Ok(pages)
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// Writes each page's pattern.
pub(super) fn fill(pages: &mut [Page], run: u64) {
    over(pages, |index, page| {
        Pattern::new(run, index).fill(page.as_bytes_mut());
    });
}

/// Makes the targets hold what no source holds.
pub(super) fn poison(pages: &mut [Page]) {
    over(pages, |_, page| page.as_bytes_mut().fill(POISON));
}

/// The first byte that is not what the round's source had, if any: page and offset.
pub(super) fn first_difference(
    pages: &mut [Page],
    run: u64,
    round: usize,
) -> Option<(usize, usize)> {
    let count = pages.len();
    let found = std::sync::Mutex::new(None::<(usize, usize)>);
    over(pages, |index, page| {
        let pattern = Pattern::new(run, source_of(index, round, count));
        if let Some(offset) = pattern.first_difference(page.as_bytes()) {
            let mut first = found
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let here = (index, offset);
            *first = Some(first.map_or(here, |there| there.min(here)));
        }
    });
    found
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Does something with each page, on all processors.
fn over(pages: &mut [Page], work: impl Fn(usize, &mut Page) + Sync) {
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let share = pages.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (part, pages) in pages.chunks_mut(share).enumerate() {
            let work = &work;
            scope.spawn(move || {
                for (index, page) in pages.iter_mut().enumerate() {
                    work(part * share + index, page);
                }
            });
        }
    });
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
        let mut pages = allocate(SHAPE, COUNT, 1).unwrap();
        for (index, page) in pages.iter_mut().enumerate() {
            Pattern::new(RUN, source_of(index, round, COUNT)).fill(page.as_bytes_mut());
        }
        pages
    }

    #[test]
    fn what_was_written_compares_equal_in_its_round_only() {
        let mut pages = allocate(SHAPE, COUNT, 1).unwrap();
        assert_eq!(pages[0].as_bytes().len(), 36);
        fill(&mut pages, RUN);
        assert_eq!(first_difference(&mut pages, RUN, 0), None);
        assert_eq!(first_difference(&mut turned(3), RUN, 3), None);
        assert_eq!(first_difference(&mut turned(3), RUN, 4), Some((0, 0)));
        assert_eq!(first_difference(&mut pages, RUN + 1, 0), Some((0, 0)));
    }

    #[test]
    fn one_bit_in_any_byte_is_found() {
        for page in 0..COUNT {
            for offset in [0, 1, 8, 31, 32, 35] {
                let mut pages = turned(2);
                pages[page].as_bytes_mut()[offset] ^= 0x10;
                assert_eq!(first_difference(&mut pages, RUN, 2), Some((page, offset)));
            }
        }
    }

    #[test]
    fn poison_is_no_pattern() {
        let mut pages = turned(0);
        poison(&mut pages);
        assert!(
            pages
                .iter()
                .all(|page| page.as_bytes().iter().all(|b| *b == POISON))
        );
        assert_eq!(first_difference(&mut pages, RUN, 0), Some((0, 0)));
    }

    #[test]
    fn more_than_the_memory_is_refused() {
        let error = allocate(SHAPE, usize::MAX / 64, 0).unwrap_err().to_string();
        assert!(error.contains("are free"), "{error}");
        assert!(error.contains("hint: fewer --tokens"), "{error}");
    }
}

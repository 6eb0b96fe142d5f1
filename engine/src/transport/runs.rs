//! Which bytes of one page go where in another: stretches at equal distances, so that a slice of a strided layout is
//! one short record however many heads and layers it crosses.
//!
//! Pure: it moves nothing. Invariant: what a [`Runs`] holds cannot overflow. Every end, and the total, fits in
//! `usize`; there are at most [`RUNS_MAX`] of them; and the stretches of one run do not overlap in the target, so a
//! short record of a hostile peer makes no more work than the target is long, times the number of runs.

use std::ops::Range;
use std::sync::Arc;

/// Runs of one write at most.
pub const RUNS_MAX: usize = 4096;

/// Bytes of one encoded run.
pub(super) const RUN_BYTES: usize = 48;

/// `count` stretches of `bytes` each. Offsets and distances are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    /// Where the first stretch begins in the source.
    pub source: usize,
    /// Where the first stretch begins in the target.
    pub target: usize,
    /// Length of each stretch.
    pub bytes: usize,
    /// How many stretches there are.
    pub count: usize,
    /// From the beginning of one stretch to that of the next, in the source.
    pub source_stride: usize,
    /// From the beginning of one stretch to that of the next, in the target; at least `bytes`.
    pub target_stride: usize,
}

impl Run {
    /// One stretch.
    #[must_use]
    pub const fn once(source: usize, target: usize, bytes: usize) -> Self {
        Self {
            source,
            target,
            bytes,
            count: 1,
            source_stride: 0,
            target_stride: 0,
        }
    }

    /// Total, end in the source and end in the target; `None` when one of them overflows.
    fn extent(&self) -> Option<(usize, usize, usize)> {
        let last = self.count.checked_sub(1)?;
        let end = |start: usize, stride: usize| {
            let last_start = last.checked_mul(stride)?.checked_add(start)?;
            last_start.checked_add(self.bytes)
        };
        Some((
            self.bytes.checked_mul(self.count)?,
            end(self.source, self.source_stride)?,
            end(self.target, self.target_stride)?,
        ))
    }

    /// The same stretches in the fewest words.
    const fn plain(self) -> Self {
        if self.count == 1 {
            return Self::once(self.source, self.target, self.bytes);
        }
        if self.source_stride == self.bytes && self.target_stride == self.bytes {
            return Self::once(self.source, self.target, self.bytes * self.count);
        }
        self
    }

    /// One stretch made of this one and of `next`, where that follows at once on both sides.
    const fn joined(&self, next: &Self) -> Option<Self> {
        let both_single = self.count == 1 && next.count == 1;
        let follows =
            self.source + self.bytes == next.source && self.target + self.bytes == next.target;
        if both_single && follows {
            return Some(Self::once(
                self.source,
                self.target,
                self.bytes + next.bytes,
            ));
        }
        None
    }
}

/// Why runs are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RunsError {
    /// More than [`RUNS_MAX`].
    #[error("{0} runs, at most {RUNS_MAX} allowed")]
    TooMany(usize),
    /// An end or the total is beyond what can be counted.
    #[error("a run of {count} times {bytes} bytes ends nowhere")]
    Overflow {
        /// Its stretches.
        count: usize,
        /// Bytes of each.
        bytes: usize,
    },
    /// Stretches of one run lie over each other in the target.
    #[error("stretches of {bytes} bytes every {stride} bytes overlap")]
    Overlap {
        /// Bytes of each stretch.
        bytes: usize,
        /// Their distance in the target.
        stride: usize,
    },
    /// The bytes are not those of encoded runs.
    #[error("{0} bytes of runs, {RUN_BYTES} each expected")]
    Length(usize),
}

/// The runs of one write, in the order in which a stream carries them. Cheap to clone.
///
/// Kept in a plain form: nothing empty, no run that a shorter one says as well. So two that say the same in the same
/// order are mostly equal, and always those of [`Runs::whole`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Runs {
    runs: Few,
    total_bytes: usize,
    source_end: usize,
    target_end: usize,
}

/// Some runs. Mostly there is one, and thousands of such are made, read and dropped a second: it takes no memory of its own.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Few {
    None,
    One(Run),
    /// At least two.
    Several(Arc<[Run]>),
}

impl Few {
    fn as_slice(&self) -> &[Run] {
        match self {
            Self::None => &[],
            Self::One(run) => std::slice::from_ref(run),
            Self::Several(runs) => runs,
        }
    }
}

impl Runs {
    /// Takes runs; those that carry nothing are dropped.
    ///
    /// # Errors
    /// When there are too many, one ends beyond what can be counted, or one overlaps itself in the target.
    pub fn new(runs: impl IntoIterator<Item = Run>) -> Result<Self, RunsError> {
        let mut kept: Vec<Run> = Vec::new();
        let mut last: Option<Run> = None;
        let (mut total_bytes, mut source_end, mut target_end) = (0_usize, 0, 0);
        for run in runs {
            let Run { count, bytes, .. } = run;
            if count == 0 || bytes == 0 {
                continue;
            }
            let overflow = RunsError::Overflow { count, bytes };
            let (run_bytes, run_source, run_target) = run.extent().ok_or(overflow)?;
            if count > 1 && run.target_stride < bytes {
                let stride = run.target_stride;
                return Err(RunsError::Overlap { bytes, stride });
            }
            total_bytes = total_bytes.checked_add(run_bytes).ok_or(overflow)?;
            source_end = source_end.max(run_source);
            target_end = target_end.max(run_target);
            let run = run.plain();
            last = match last {
                None => Some(run),
                Some(before) => match before.joined(&run) {
                    Some(joined) => Some(joined),
                    None => {
                        kept.push(before);
                        Some(run)
                    }
                },
            };
        }
        if kept.len() >= RUNS_MAX {
            return Err(RunsError::TooMany(kept.len() + 1));
        }
        let runs = match last {
            None => Few::None,
            Some(run) if kept.is_empty() => Few::One(run),
            Some(run) => {
                kept.push(run);
                Few::Several(kept.into())
            }
        };
        Ok(Self {
            runs,
            total_bytes,
            source_end,
            target_end,
        })
    }

    /// The first `bytes` of the source, to the beginning of the target.
    #[must_use]
    pub fn whole(bytes: usize) -> Self {
        let run = (bytes > 0).then(|| Run::once(0, 0, bytes));
        Self {
            runs: run.map_or(Few::None, Few::One),
            total_bytes: bytes,
            source_end: bytes,
            target_end: bytes,
        }
    }

    /// Bytes of all stretches together.
    #[must_use]
    pub const fn total_bytes(&self) -> usize {
        self.total_bytes
    }

    /// Number of stretches.
    #[must_use]
    pub fn stretch_count(&self) -> usize {
        self.as_slice()
            .iter()
            .fold(0, |sum, run| sum.saturating_add(run.count))
    }

    /// Whether a stretch has at least `bytes` on average, so that moving each by itself is worth its cost.
    #[must_use]
    pub fn is_coarse(&self, bytes: usize) -> bool {
        self.total_bytes >= self.stretch_count().saturating_mul(bytes)
    }

    /// Whether every stretch lies within a source and a target of these lengths.
    #[must_use]
    pub const fn fits(&self, source_bytes: usize, target_bytes: usize) -> bool {
        self.source_end <= source_bytes && self.target_end <= target_bytes
    }

    /// The end of the last stretch in the target: how long it must be at least.
    #[must_use]
    pub const fn target_end(&self) -> usize {
        self.target_end
    }

    /// The end of the last stretch in the source: how long it must be at least.
    #[must_use]
    pub const fn source_end(&self) -> usize {
        self.source_end
    }

    /// The same where the source begins `offset` later.
    ///
    /// # Errors
    /// When it then ends beyond what can be counted.
    pub fn source_end_from(&self, offset: usize) -> Result<usize, RunsError> {
        self.source_end.checked_add(offset).ok_or_else(|| {
            let end = |run: &&Run| run.extent().map(|(_, end, _)| end);
            let last = self.as_slice().iter().max_by_key(end);
            let (count, bytes) = last.map_or((0, 0), |run| (run.count, run.bytes));
            RunsError::Overflow { count, bytes }
        })
    }

    /// Every stretch as its range in the source and its range in the target, in order.
    pub fn stretches(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + '_ {
        self.as_slice().iter().flat_map(|run| {
            (0..run.count).map(move |index| {
                let source = run.source + index * run.source_stride;
                let target = run.target + index * run.target_stride;
                (source..source + run.bytes, target..target + run.bytes)
            })
        })
    }

    /// The runs themselves.
    #[must_use]
    pub fn as_slice(&self) -> &[Run] {
        self.runs.as_slice()
    }

    /// The same targets, read from a source in which the stretches lie one after the other.
    #[must_use]
    pub fn gathered(&self) -> Self {
        let mut at = 0;
        let runs = self.as_slice().iter().map(|run| {
            let source = at;
            at += run.bytes * run.count;
            Run {
                source,
                source_stride: run.bytes,
                ..*run
            }
        });
        Self::new(runs).expect("offsets up to the total, which was counted")
    }

    /// The same stretches, into a target in which they lie one after the other from `target` on; the sources begin `source` later.
    /// What then ends beyond what can be counted is refused by [`Runs::new`].
    pub fn packed_at(&self, source: usize, target: usize) -> impl Iterator<Item = Run> + '_ {
        let mut at = target;
        self.as_slice().iter().map(move |run| {
            let target = at;
            at = at.saturating_add(run.bytes * run.count);
            Run {
                source: run.source.saturating_add(source),
                target,
                target_stride: run.bytes,
                ..*run
            }
        })
    }

    /// For the wire: 48 bytes a run, little-endian.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.encoded_bytes());
        self.encode_to(&mut out);
        out
    }

    /// How long [`Runs::encode`]'s bytes are.
    #[must_use]
    pub fn encoded_bytes(&self) -> usize {
        self.as_slice().len() * RUN_BYTES
    }

    /// As [`Runs::encode`], behind what is there.
    pub fn encode_to(&self, out: &mut Vec<u8>) {
        for run in self.as_slice().iter() {
            let words = [
                run.source,
                run.target,
                run.bytes,
                run.count,
                run.source_stride,
                run.target_stride,
            ];
            for word in words {
                out.extend_from_slice(&(word as u64).to_le_bytes());
            }
        }
    }

    /// Reads what [`Runs::encode`] wrote; whatever the bytes, it ends in runs or in an error.
    ///
    /// # Errors
    /// As [`Runs::new`], and when the length is not a multiple of a run's.
    pub fn decode(bytes: &[u8]) -> Result<Self, RunsError> {
        let (records, []) = bytes.as_chunks::<RUN_BYTES>() else {
            return Err(RunsError::Length(bytes.len()));
        };
        if records.len() > RUNS_MAX {
            return Err(RunsError::TooMany(records.len()));
        }
        let mut read = 0;
        let runs = records.iter().map_while(|record| {
            let run = decode_run(record)?;
            read += 1;
            Some(run)
        });
        let decoded = Self::new(runs);
        if read < records.len() {
            return Err(RunsError::Overflow {
                count: usize::MAX,
                bytes: usize::MAX,
            });
        }
        decoded
    }
}

/// Longest encoded form.
pub const ENCODED_BYTES_MAX: usize = RUNS_MAX * RUN_BYTES;

/// `None` where a word is beyond this machine's `usize`.
fn decode_run(record: &[u8; RUN_BYTES]) -> Option<Run> {
    let (words, _) = record.as_chunks::<8>();
    let word = |index: usize| usize::try_from(u64::from_le_bytes(words[index])).ok();
    Some(Run {
        source: word(0)?,
        target: word(1)?,
        bytes: word(2)?,
        count: word(3)?,
        source_stride: word(4)?,
        target_stride: word(5)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn strided(count: usize, bytes: usize, source_stride: usize, target_stride: usize) -> Run {
        Run {
            source: 10,
            target: 20,
            bytes,
            count,
            source_stride,
            target_stride,
        }
    }

    #[test]
    fn the_whole_is_one_stretch_and_nothing_is_none() {
        let whole = Runs::whole(77);
        assert_eq!(whole.stretches().collect::<Vec<_>>(), [(0..77, 0..77)]);
        assert_eq!((whole.total_bytes(), whole.stretch_count()), (77, 1));
        assert!(whole.fits(77, 77));
        assert!(!whole.fits(76, 77) && !whole.fits(77, 76));
        let nothing = Runs::whole(0);
        assert_eq!(nothing.stretches().count(), 0);
        assert!(nothing.fits(0, 0));
        assert_eq!(
            Runs::new([strided(0, 5, 0, 0), strided(5, 0, 0, 0)]),
            Ok(nothing)
        );
    }

    #[test]
    fn stretches_stand_at_their_distances() {
        let runs = Runs::new([strided(3, 4, 100, 8)]).unwrap();
        let expected = [(10..14, 20..24), (110..114, 28..32), (210..214, 36..40)];
        assert_eq!(runs.stretches().collect::<Vec<_>>(), expected);
        assert_eq!((runs.source_end(), runs.target_end()), (214, 40));
        assert!(runs.is_coarse(4) && !runs.is_coarse(5));
    }

    #[test]
    fn what_says_the_same_is_equal() {
        let whole = Runs::whole(12);
        let in_pieces = Runs::new([Run::once(0, 0, 4), Run::once(4, 4, 8)]);
        assert_eq!(in_pieces, Ok(whole.clone()));
        let strided = Run {
            source: 0,
            target: 0,
            ..strided(3, 4, 4, 4)
        };
        assert_eq!(Runs::new([strided]), Ok(whole));
    }

    #[test]
    fn what_cannot_be_counted_or_overlaps_is_refused() {
        let overflowing = [
            strided(usize::MAX, 2, 0, 2),
            strided(2, 1, usize::MAX, 1),
            strided(3, 1, 1, usize::MAX / 2),
            Run::once(usize::MAX, 0, 1),
        ];
        for run in overflowing {
            let refused = Runs::new([run]);
            assert!(
                matches!(refused, Err(RunsError::Overflow { .. })),
                "{run:?}"
            );
        }
        let (bytes, stride) = (4, 3);
        let refused = Runs::new([strided(2, bytes, 0, stride)]);
        assert_eq!(refused, Err(RunsError::Overlap { bytes, stride }));
        let large = Run::once(0, 0, usize::MAX);
        assert!(Runs::new([large, large]).is_err());
        let many = (0..=RUNS_MAX).map(|index| Run::once(index * 2, index * 2, 1));
        assert_eq!(Runs::new(many), Err(RunsError::TooMany(RUNS_MAX + 1)));
    }

    #[test]
    fn a_gathered_source_has_the_stretches_one_after_the_other() {
        let runs = Runs::new([strided(2, 4, 100, 8), Run::once(3, 50, 5)]).unwrap();
        let expected = [(0..4, 20..24), (4..8, 28..32), (8..13, 50..55)];
        assert_eq!(runs.gathered().stretches().collect::<Vec<_>>(), expected);
        assert_eq!(runs.gathered().source_end(), 13);
        assert_eq!(runs.source_end_from(1000), Ok(1114));
        let (count, bytes) = (2, 4);
        let beyond = runs.source_end_from(usize::MAX - 100);
        assert_eq!(beyond, Err(RunsError::Overflow { count, bytes }));
        let expected = [(10..14, 0..4), (110..114, 4..8), (3..8, 8..13)];
        let packed = Runs::new(runs.packed_at(0, 0)).unwrap();
        assert_eq!(packed.stretches().collect::<Vec<_>>(), expected);
        let gathered = runs.gathered();
        assert_eq!(Runs::new(gathered.packed_at(0, 0)), Ok(Runs::whole(13)));
        let expected = [
            (1010..1014, 7..11),
            (1110..1114, 11..15),
            (1003..1008, 15..20),
        ];
        let moved = Runs::new(runs.packed_at(1000, 7)).unwrap();
        assert_eq!(moved.stretches().collect::<Vec<_>>(), expected);
        assert!(Runs::new(runs.packed_at(usize::MAX, 0)).is_err());
        assert!(Runs::new(runs.packed_at(0, usize::MAX)).is_err());
    }

    fn any_run() -> impl Strategy<Value = Run> {
        let small = 0_usize..200;
        (
            small.clone(),
            small.clone(),
            0_usize..40,
            0_usize..6,
            small.clone(),
            small,
        )
            .prop_map(|(source, target, bytes, count, source_stride, gap)| Run {
                source,
                target,
                bytes,
                count,
                source_stride,
                target_stride: bytes + gap,
            })
    }

    proptest! {
        #[test]
        fn runs_survive_the_wire_and_keep_every_stretch(runs in prop::collection::vec(any_run(), 0..8)) {
            let made = Runs::new(runs.iter().copied()).unwrap();
            prop_assert_eq!(Runs::decode(&made.encode()), Ok(made.clone()));
            prop_assert_eq!(made.gathered().total_bytes(), made.total_bytes());
            // Byte by byte the same as the runs that it was made of.
            let bytes_of = |run: &Run| -> Vec<(usize, usize)> {
                (0..run.count)
                    .flat_map(|index| (0..run.bytes).map(move |byte| (index, byte)))
                    .map(|(index, byte)| (
                        run.source + index * run.source_stride + byte,
                        run.target + index * run.target_stride + byte,
                    ))
                    .collect()
            };
            let expected: Vec<_> = runs.iter().flat_map(bytes_of).collect();
            let found: Vec<_> = made
                .stretches()
                .flat_map(|(source, target)| source.zip(target))
                .collect();
            prop_assert_eq!(found.len(), made.total_bytes());
            let ends = |of: fn(&(usize, usize)) -> usize| expected.iter().map(of).max().map_or(0, |last| last + 1);
            prop_assert_eq!((ends(|b| b.0), ends(|b| b.1)), (made.source_end(), made.target_end()));
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn any_bytes_decode_or_fail(bytes in prop::collection::vec(any::<u8>(), 0..200), zeros in any::<bool>()) {
            let mut bytes = bytes;
            if zeros {
                // Mostly small numbers, so that some of it is accepted.
                for word in bytes.chunks_mut(8) {
                    word.iter_mut().skip(1).for_each(|byte| *byte = 0);
                }
                bytes.truncate(bytes.len() / RUN_BYTES * RUN_BYTES);
            }
            if let Ok(runs) = Runs::decode(&bytes) {
                let inside = runs.stretches().all(|(source, target)| {
                    source.end <= runs.source_end() && target.end <= runs.target_end()
                });
                prop_assert!(inside);
                prop_assert_eq!(Runs::decode(&runs.encode()), Ok(runs));
            }
        }
    }
}

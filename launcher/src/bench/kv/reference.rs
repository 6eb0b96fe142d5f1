//! What this machine's memory can do at most, measured in the same run: copies between two buffers, and checksums; or
//! copies between two GPUs.
//!
//! Ratios within one run say more than figures of different days. Nothing of the transceiver is in here.

use std::fmt::{self, Display};
use std::hint::black_box;
use std::num::NonZero;
use std::time::{Duration, Instant};

use anyhow::Context;
use baton_engine::backend::cuda;
use baton_engine::transport::checksum::sum;
use serde::Serialize;

use crate::exit::{Outcome, WithOutcome};

/// Beyond the caches of most machines, and quick.
const BYTES_MAX: usize = 512 << 20;
const ROUNDS: usize = 5;

/// One figure to compare with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Reference {
    /// `memcpy` (bytes copied once, so read and written once), `checksum` (bytes read once) or `gpu_copy`.
    pub(crate) name: &'static str,
    /// Threads that share the bytes.
    pub(crate) threads: usize,
    /// Bytes of one round.
    pub(crate) bytes: usize,
    /// Gigabytes (10⁹ bytes) a second, the median of the rounds.
    pub(crate) gb_per_s: f64,
}

impl Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.name {
            "memcpy" => "copying between two buffers",
            "gpu_copy" => {
                let (mib, rate) = (self.bytes >> 20, self.gb_per_s);
                let what = "copying from the first GPU's memory to the last one's";
                return write!(
                    f,
                    "{:<9} {rate:.2} GB/s: {what}, {mib} MiB by the driver",
                    self.name
                );
            }
            _ => "summing a buffer",
        };
        let s = if self.threads == 1 { "" } else { "s" };
        write!(
            f,
            "{:<9} {:.2} GB/s: {what} of {} MiB, {} thread{s}",
            self.name,
            self.gb_per_s,
            self.bytes >> 20,
            self.threads
        )
    }
}

/// Measures all references with buffers of about this size.
pub(super) fn measure(bytes: usize) -> Vec<Reference> {
    let bytes = bytes.clamp(1 << 20, BYTES_MAX);
    let source = vec![0x3C_u8; bytes];
    let mut target = vec![0x55_u8; bytes];
    let all = std::thread::available_parallelism().map_or(1, NonZero::get);
    let mut counts = vec![1, all];
    counts.dedup();
    let mut references: Vec<Reference> = counts
        .into_iter()
        .map(|threads| Reference {
            name: "memcpy",
            threads,
            bytes,
            gb_per_s: rate(bytes, || copy(&source, &mut target, threads)),
        })
        .collect();
    references.push(Reference {
        name: "checksum",
        threads: 1,
        bytes,
        gb_per_s: rate(bytes, || {
            black_box(sum(black_box(&source)));
        }),
    });
    references
}

/// Measures the driver's own copy between the GPUs of the two sides, in one process.
///
/// # Errors
/// When there is no GPU, or its memory is full.
pub(super) fn measure_gpus() -> anyhow::Result<Vec<Reference>> {
    let mut times = cuda::peer_copies(BYTES_MAX, ROUNDS)
        .context("copying between the gpus")
        .outcome(Outcome::Unavailable)?;
    Ok(vec![Reference {
        name: "gpu_copy",
        threads: 1,
        bytes: BYTES_MAX,
        gb_per_s: gigabytes_per_second(BYTES_MAX as u64, median(&mut times)),
    }])
}

fn copy(source: &[u8], target: &mut [u8], threads: usize) {
    let share = source.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (from, to) in source.chunks(share).zip(target.chunks_mut(share)) {
            scope.spawn(move || to.copy_from_slice(black_box(from)));
        }
    });
    black_box(target);
}

fn rate(bytes: usize, mut work: impl FnMut()) -> f64 {
    work();
    let times = (0..ROUNDS).map(|_| {
        let began = Instant::now();
        work();
        began.elapsed()
    });
    let mut times: Vec<Duration> = times.collect();
    gigabytes_per_second(bytes as u64, median(&mut times))
}

/// The middle one, or the upper of the middle two. Sorts.
///
/// # Panics
/// Without values: that is a bug of the caller.
pub(super) fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// 10⁹ bytes a second.
#[expect(
    clippy::cast_precision_loss,
    reason = "a rate does not need more than 52 bits"
)]
pub(super) fn gigabytes_per_second(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64().max(1e-9) / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_whole_whatever_the_threads() {
        let source: Vec<u8> = (0..1000_u32).map(|i| i.to_le_bytes()[0]).collect();
        for threads in [1, 2, 3, 7, 1000, 5000] {
            let mut target = vec![0; source.len()];
            copy(&source, &mut target, threads);
            assert_eq!(target, source, "{threads}");
        }
    }

    #[test]
    fn figures_are_in_their_units() {
        let rate = gigabytes_per_second(2_000_000_000, Duration::from_secs(4));
        assert!((rate - 0.5).abs() < 1e-12);
        let mut times = [3, 1, 2].map(Duration::from_secs);
        assert_eq!(median(&mut times), Duration::from_secs(2));
        let shown = Reference {
            name: "memcpy",
            threads: 2,
            bytes: 512 << 20,
            gb_per_s: 9.876,
        };
        assert_eq!(
            shown.to_string(),
            "memcpy    9.88 GB/s: copying between two buffers of 512 MiB, 2 threads"
        );
    }
}

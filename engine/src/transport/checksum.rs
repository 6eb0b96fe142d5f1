//! XXH3-64 of a piece: its stretches one after the other, as the writer read them and as they came to lie at the reader.
//!
//! A transport that has the bytes in a core's cache anyway sums them there; another pass over memory costs about
//! as much as the transfer itself. Nothing is compared here.

use std::ops::Range;

use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

/// How many bytes may be between being written and being summed: they stay in a core's second cache.
pub(super) const WARM_BYTES: usize = 128 << 10;

/// The sum of a piece that comes in parts.
#[derive(Clone, Default)]
pub(super) struct Summing(Xxh3Default);

impl std::fmt::Debug for Summing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Summing")
    }
}

impl Summing {
    /// Takes the next part in.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Of all parts.
    pub(super) fn finish(&self) -> u64 {
        self.0.digest()
    }
}

/// Of some stretches of these bytes, in the order in which they are given.
pub(crate) fn sum_of(bytes: &[u8], mut stretches: impl Iterator<Item = Range<usize>>) -> u64 {
    let first = &bytes[stretches.next().unwrap_or(0..0)];
    let Some(second) = stretches.next() else {
        // Most often a whole page; in one go it is faster.
        return xxh3_64(first);
    };
    let mut summing = Summing::default();
    summing.update(first);
    summing.update(&bytes[second]);
    stretches.for_each(|stretch| summing.update(&bytes[stretch]));
    summing.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_stretches_sum_to_what_the_whole_does() {
        let bytes: Vec<u8> = (0..5000_u32).map(|i| i.to_le_bytes()[0] ^ 0x5A).collect();
        let whole = xxh3_64(&bytes);
        assert_eq!(sum_of(&bytes, [0..5000].into_iter()), whole);
        assert_eq!(
            sum_of(&bytes, [0..7, 7..1024, 1024..5000].into_iter()),
            whole
        );
        assert_eq!(sum_of(&bytes, std::iter::empty()), xxh3_64(&[]));
        let mut summing = Summing::default();
        bytes.chunks(333).for_each(|part| summing.update(part));
        assert_eq!(summing.finish(), whole);
        assert_ne!(sum_of(&bytes, [7..5000, 0..7].into_iter()), whole);
    }
}

//! The checksum of a piece in the host's memory: its stretches one after the other, as the writer read them and as they came
//! to lie at the reader.
//!
//! The bytes are cut into stripes of eight little-endian words; the last one is filled up with zeros. Word `w` of lane
//! `l` in stripe `s` is masked: `d = w xor (KEYS[l] + s · STEP)`. Lane `l` gets the product of the two halves of `d`, lane
//! `l xor 1` gets `w` itself, all modulo 2⁶⁴; [`Summing::finish`] mixes the lanes and the length. So a changed, missing,
//! moved, doubled or swapped word changes the sum, save one time in 2⁶⁴ or nearly so; it protects from accidents, not from
//! an enemy. A word takes one vector multiplication of 32 bits (XXH3's idea), and as the stripes may be added up in any order,
//! memory can be read in several places at once, which is what one core needs to read it quickly.
//!
//! A transport that has the bytes in a core's cache anyway sums them there; another pass over memory costs about
//! as much as the transfer itself. Nothing is compared here.
//!
//! Invariant: the sum depends on the bytes in their order, not on where they lie, how they were divided, or the processor.
#![expect(
    unsafe_code,
    reason = "bytes that another process may write can't be borrowed, only copied"
)]

use std::ops::Range;

use self::stripes::Stripes;

mod stripes;

/// How many bytes may be between being written and being summed: they stay in a core's second cache.
pub(super) const WARM_BYTES: usize = 128 << 10;

/// Bytes of a stripe.
const STRIPE_BYTES: usize = 64;

/// Shorter copies go through the caches: what is that short is most often read again soon.
const PAST_CACHES_BYTES_MIN: usize = 4 << 10;

/// The sum of a piece that comes in parts.
#[derive(Debug, Clone, Default)]
pub(super) struct Summing {
    /// Whether nobody wants it.
    is_off: bool,
    stripes: Stripes,
    bytes: u64,
    /// The beginning of a stripe that is not whole yet; as long as `bytes` says.
    begun: Begun,
}

/// See [`Summing::begun`].
#[derive(Debug, Clone)]
struct Begun([u8; STRIPE_BYTES]);

impl Default for Begun {
    fn default() -> Self {
        Self([0; STRIPE_BYTES])
    }
}

impl Summing {
    /// One that nothing is taken into where it is not wanted.
    pub(super) fn wanted(wanted: bool) -> Self {
        Self {
            is_off: !wanted,
            ..Self::default()
        }
    }

    /// Takes the next part in.
    pub(super) fn update(&mut self, mut bytes: &[u8]) {
        if self.is_off {
            return;
        }
        let held = self.held();
        self.bytes += bytes.len() as u64;
        if held > 0 {
            let (now, later) = bytes.split_at(bytes.len().min(STRIPE_BYTES - held));
            let end = held + now.len();
            self.begun.0[held..end].copy_from_slice(now);
            bytes = later;
            if end < STRIPE_BYTES {
                return;
            }
            self.stripes.take(&[self.begun.0]);
        }
        let (whole, rest) = bytes.as_chunks::<STRIPE_BYTES>();
        self.stripes.take(whole);
        self.begun.0[..rest.len()].copy_from_slice(rest);
    }

    /// Copies the next part from elsewhere, and takes in what was copied; long parts pass by the caches.
    ///
    /// # Safety
    /// So many bytes can be read from `from` on, and none of them is the target's. Others may write them meanwhile: then
    /// what is copied is in doubt, and the sum is that of what was copied.
    pub(super) unsafe fn copy(&mut self, from: *const u8, to: &mut [u8]) {
        let mut done = 0;
        if self.held() == 0 && to.len() >= PAST_CACHES_BYTES_MIN {
            let (whole, _) = to.as_chunks_mut::<STRIPE_BYTES>();
            // SAFETY: the stripes are within the target, and the caller's promise holds for all of it.
            if unsafe { self.stripes.copy(from, whole, !self.is_off) } {
                done = whole.len() * STRIPE_BYTES;
                self.bytes += done as u64;
            }
        }
        for part in to[done..].chunks_mut(WARM_BYTES) {
            let from = from.wrapping_add(done);
            // SAFETY: the caller's promise, for a part of it.
            unsafe { std::ptr::copy_nonoverlapping(from, part.as_mut_ptr(), part.len()) };
            self.update(part);
            done += part.len();
        }
    }

    /// Of all parts, if it is wanted.
    pub(super) fn made(&self) -> Option<u64> {
        (!self.is_off).then(|| self.finish())
    }

    /// Of all parts.
    pub(super) fn finish(&self) -> u64 {
        let held = self.held();
        if held == 0 {
            return self.stripes.finish(self.bytes);
        }
        let mut last = [0; STRIPE_BYTES];
        last[..held].copy_from_slice(&self.begun.0[..held]);
        let mut stripes = self.stripes.clone();
        stripes.take(&[last]);
        stripes.finish(self.bytes)
    }

    const fn held(&self) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "less than a stripe")]
        let held = (self.bytes % STRIPE_BYTES as u64) as usize;
        held
    }
}

/// Says that so many bytes from here on are summed or copied next: what is far from the last ones is then on its way. Nothing is
/// read, so the place need not even exist.
pub(crate) fn announce(from: *const u8, bytes: usize) {
    stripes::announce(from, bytes);
}

/// Of some stretches of these bytes, in the order in which they are given.
pub(crate) fn sum_of(bytes: &[u8], stretches: impl Iterator<Item = Range<usize>>) -> u64 {
    let mut summing = Summing::default();
    stretches.for_each(|stretch| summing.update(&bytes[stretch]));
    summing.finish()
}

/// The checksum of some bytes, as it is made of pieces in the host's memory; for measuring what it costs.
#[must_use]
pub fn sum(bytes: &[u8]) -> u64 {
    sum_of(bytes, std::iter::once(0..bytes.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::fold::tests::sample;
    use proptest::prelude::*;

    /// The definition, word by word, in numbers that cannot overflow.
    fn by_definition(bytes: &[u8]) -> u64 {
        let modulus = 1_u128 << 64;
        let mut lanes = [0_u128; 8];
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().div_ceil(64) * 64, 0);
        for (index, word) in padded.chunks(8).enumerate() {
            let (stripe, lane) = (index as u128 / 8, index % 8);
            let word = u128::from(u64::from_le_bytes(word.try_into().unwrap()));
            let key = (u128::from(stripes::KEYS[lane])
                + stripe * u128::from(stripes::STEP) % modulus)
                % modulus;
            let masked = word ^ key;
            lanes[lane] = (lanes[lane] + (masked >> 32) * (masked % (1 << 32))) % modulus;
            lanes[lane ^ 1] = (lanes[lane ^ 1] + word) % modulus;
        }
        stripes::finish(
            lanes.map(|lane| u64::try_from(lane).unwrap()),
            bytes.len() as u64,
        )
    }

    #[test]
    fn it_is_what_both_sides_have_agreed_on() {
        for len in [0, 1, 7, 8, 63, 64, 65, 127, 128, 1000, 5000, 70_000] {
            let bytes = sample(len);
            assert_eq!(sum(&bytes), by_definition(&bytes), "{len}");
        }
    }

    #[test]
    fn one_bit_anywhere_is_seen() {
        let bytes = sample(200);
        let right = sum(&bytes);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut wrong = bytes.clone();
                wrong[at] ^= 1 << bit;
                assert_ne!(sum(&wrong), right, "{at}.{bit}");
            }
        }
    }

    #[test]
    fn zeros_moved_parts_and_lengths_are_seen() {
        let bytes = sample(1024);
        let right = sum(&bytes);
        for word in [8, 64, 256] {
            for at in (0..1024 - word).step_by(word) {
                let mut swapped = bytes.clone();
                let (a, b) = swapped.split_at_mut(at + word);
                a[at..].swap_with_slice(&mut b[..word]);
                assert_ne!(sum(&swapped), right, "{word} at {at}");
                let mut missing = bytes.clone();
                missing[at..at + word].fill(0);
                assert_ne!(sum(&missing), right, "{word} at {at}");
                let mut doubled = bytes.clone();
                doubled.copy_within(at..at + word, at + word);
                assert_ne!(sum(&doubled), right, "{word} at {at}");
            }
        }
        // What KV holds most of when something went wrong: nothing, or one number all over.
        for fill in [0, 0xFF, 0x3F] {
            let bytes = vec![fill; 300];
            let sums: std::collections::HashSet<_> =
                (0..=300).map(|len| sum(&bytes[..len])).collect();
            assert_eq!(sums.len(), 301, "{fill}");
        }
    }

    #[test]
    fn stretches_are_summed_in_their_order() {
        let bytes = sample(5000);
        let whole = sum(&bytes);
        let stretches = [0..7, 7..1024, 1024..5000];
        assert_eq!(sum_of(&bytes, stretches.into_iter()), whole);
        assert_ne!(sum_of(&bytes, [7..5000, 0..7].into_iter()), whole);
        assert_eq!(sum_of(&bytes, std::iter::empty()), sum(&[]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn how_the_bytes_were_divided_and_copied_does_not_count(
            len in 0_usize..300_000,
            cuts in prop::collection::vec((0_usize..70_000, any::<bool>()), 0..12),
            offsets in (0_usize..70, 0_usize..70),
        ) {
            let bytes = sample(len);
            let mut source = vec![0; offsets.0];
            source.extend_from_slice(&bytes);
            let mut target = vec![0; offsets.1 + len];
            let mut parts = Summing::default();
            let mut at = 0;
            for (cut, copied) in cuts.into_iter().chain([(len, true)]) {
                let end = (at + cut).min(len);
                let from = &source[offsets.0 + at..offsets.0 + end];
                let to = &mut target[offsets.1 + at..offsets.1 + end];
                if copied {
                    // SAFETY: both are slices of this length, of different vectors.
                    unsafe { parts.copy(from.as_ptr(), to) };
                } else {
                    to.copy_from_slice(from);
                    parts.update(from);
                }
                at = end;
            }
            prop_assert_eq!(parts.finish(), sum(&bytes));
            prop_assert_eq!(parts.finish(), by_definition(&bytes));
            prop_assert!(target[offsets.1..] == bytes);
        }
    }
}

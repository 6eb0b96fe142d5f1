//! Whole stripes of the checksum: with AVX2 where the processor has it, else in plain Rust. The only place that knows of
//! instructions; what is computed says [`super`].
//!
//! A core reads memory faster in two places at once than in one: its prefetchers work page by page. So stripes are taken from
//! both halves of a part in turn. Copies are stored past the caches: a store that goes through them first reads what it
//! overwrites. Measured on one core of an EPYC 7003, 64 KiB pieces far apart, copying and summing: 8.6 GB/s so, 6.7 in
//! one place, 4.4 with `memcpy` and XXH3; `memcpy` of 512 MiB in one piece 8.3, summing alone 10 (XXH3 5.5).
//!
//! Invariant: both ways give the same sums; stores past the caches are in order before this module returns.
#![cfg_attr(
    target_arch = "x86_64",
    expect(
        unsafe_code,
        reason = "instructions chosen at run time, and memory that another process may write, can't be had from safe code"
    )
)]

use super::STRIPE_BYTES;

/// What masks the lanes of the first stripe: of the golden ratio and its powers, so that no two lanes meet soon.
pub(super) const KEYS: [u64; LANES] = [
    0x9E37_79B9_7F4A_7C15,
    0xBF58_476D_1CE4_E5B9,
    0x94D0_49BB_1331_11EB,
    0xC2B2_AE3D_27D4_EB4F,
    0x1656_67B1_9E37_79F9,
    0x85EB_CA77_C2B2_AE63,
    0x27D4_EB2F_1656_67C5,
    0xD6E8_FEB8_6659_FD93,
];

/// How much the masks move from stripe to stripe. Odd, so that none returns; both halves of it change a lot.
pub(super) const STEP: u64 = 0xA076_1D64_78BD_642F;

/// Of the last mixing.
const MIX: u64 = 0xFF51_AFD7_ED55_8CCD;

const LANES: usize = 8;

/// The sum of the stripes so far.
#[derive(Debug, Clone)]
pub(super) struct Stripes {
    sums: [u64; LANES],
    /// What masks the next stripe.
    keys: [u64; LANES],
}

impl Default for Stripes {
    fn default() -> Self {
        Self {
            sums: [0; LANES],
            keys: KEYS,
        }
    }
}

/// Asks for the memory where the first stripes are read, in both halves of their first part.
pub(super) fn announce(from: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has the instructions.
        unsafe { avx2::announce(from, bytes.div_ceil(STRIPE_BYTES)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (from, bytes);
}

/// Mixes the lanes and the length; no two values of one lane give the same.
pub(super) fn finish(sums: [u64; LANES], bytes: u64) -> u64 {
    let mixed = sums.iter().fold(bytes, |mixed, sum| {
        let mixed = (mixed ^ sum).wrapping_mul(MIX);
        mixed ^ (mixed >> 29)
    });
    let mixed = mixed.wrapping_mul(STEP);
    mixed ^ (mixed >> 32)
}

impl Stripes {
    /// Of these stripes and so many bytes.
    pub(super) fn finish(&self, bytes: u64) -> u64 {
        finish(self.sums, bytes)
    }

    /// Takes the next stripes in.
    pub(super) fn take(&mut self, stripes: &[[u8; STRIPE_BYTES]]) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            for part in stripes.chunks(avx2::PART_STRIPES) {
                // SAFETY: the processor has the instructions.
                unsafe { avx2::take(self, part) };
            }
            return;
        }
        self.take_plainly(stripes);
    }

    fn take_plainly(&mut self, stripes: &[[u8; STRIPE_BYTES]]) {
        for stripe in stripes {
            let (words, _) = stripe.as_chunks::<8>();
            for (lane, word) in words.iter().enumerate() {
                let word = u64::from_le_bytes(*word);
                let masked = word ^ self.keys[lane];
                let product = (masked & 0xFFFF_FFFF) * (masked >> 32);
                self.sums[lane] = self.sums[lane].wrapping_add(product);
                self.sums[lane ^ 1] = self.sums[lane ^ 1].wrapping_add(word);
            }
            self.pass(1);
        }
    }

    /// Moves the masks on by so many stripes.
    fn pass(&mut self, stripes: u64) {
        let step = STEP.wrapping_mul(stripes);
        self.keys = self.keys.map(|key| key.wrapping_add(step));
    }

    /// Copies the next stripes past the caches, and takes them in if so `wanted`. False, and nothing is done, where the processor cannot, or
    /// the target does not lie as it must.
    ///
    /// # Safety
    /// The bytes of so many stripes can be read from `from` on, and none of them is the target's.
    #[cfg_attr(not(target_arch = "x86_64"), expect(unsafe_code, reason = "as above"))]
    pub(super) unsafe fn copy(
        &mut self,
        from: *const u8,
        to: &mut [[u8; STRIPE_BYTES]],
        wanted: bool,
    ) -> bool {
        #[cfg(target_arch = "x86_64")]
        let copy = if wanted {
            avx2::copy::<true>
        } else {
            avx2::copy::<false>
        };
        #[cfg(target_arch = "x86_64")]
        if to.as_ptr().addr().is_multiple_of(avx2::VECTOR_BYTES) && is_x86_feature_detected!("avx2")
        {
            for (index, part) in to.chunks_mut(avx2::PART_STRIPES).enumerate() {
                let from = from.wrapping_add(index * avx2::PART_STRIPES * STRIPE_BYTES);
                // SAFETY: the processor has the instructions; the target is aligned, as parts of it are; the caller
                // promises the rest.
                unsafe { copy(self, from, part) };
            }
            return true;
        }
        let _ = (from, to, wanted);
        false
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _MM_HINT_T0, _mm_prefetch, _mm_sfence, _mm256_add_epi64, _mm256_extract_epi64,
        _mm256_loadu_si256, _mm256_mul_epu32, _mm256_set_epi64x, _mm256_set1_epi64x,
        _mm256_shuffle_epi32, _mm256_srli_epi64, _mm256_stream_si256, _mm256_xor_si256,
    };

    use super::{LANES, STEP, STRIPE_BYTES, Stripes};

    pub(super) const VECTOR_BYTES: usize = 32;

    /// Stripes of which both halves are read at once: 64 KiB.
    pub(super) const PART_STRIPES: usize = 1024;

    /// How far ahead of the loads memory is asked for.
    const AHEAD_BYTES: usize = 512;

    /// Swaps the words of each pair.
    const SWAPPED: i32 = 0b01_00_11_10;

    /// Four lanes.
    #[derive(Clone, Copy)]
    struct Quarter {
        sums: __m256i,
        keys: __m256i,
    }

    /// The lanes, on their way through the stripes of one half.
    struct Half([Quarter; 2]);

    #[target_feature(enable = "avx2")]
    #[inline]
    fn vector(words: [u64; 4]) -> __m256i {
        let [a, b, c, d] = words.map(u64::cast_signed);
        _mm256_set_epi64x(d, c, b, a)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn words(vector: __m256i) -> [u64; 4] {
        [
            _mm256_extract_epi64::<0>(vector),
            _mm256_extract_epi64::<1>(vector),
            _mm256_extract_epi64::<2>(vector),
            _mm256_extract_epi64::<3>(vector),
        ]
        .map(i64::cast_unsigned)
    }

    impl Half {
        /// With nothing summed yet, from this stripe on.
        #[target_feature(enable = "avx2")]
        #[inline]
        fn from(keys: [u64; LANES], stripe: usize) -> Self {
            let step = STEP.wrapping_mul(stripe as u64);
            let [a, b, c, d, e, f, g, h] = keys.map(|key| key.wrapping_add(step));
            let quarter = |keys| Quarter {
                sums: vector([0; 4]),
                keys: vector(keys),
            };
            Self([quarter([a, b, c, d]), quarter([e, f, g, h])])
        }

        #[target_feature(enable = "avx2")]
        #[inline]
        fn take(&mut self, stripe: [__m256i; 2]) {
            let step = _mm256_set1_epi64x(STEP.cast_signed());
            for (quarter, vector) in self.0.iter_mut().zip(stripe) {
                let masked = _mm256_xor_si256(vector, quarter.keys);
                let product = _mm256_mul_epu32(masked, _mm256_srli_epi64::<32>(masked));
                let term = _mm256_add_epi64(product, _mm256_shuffle_epi32::<SWAPPED>(vector));
                quarter.sums = _mm256_add_epi64(quarter.sums, term);
                quarter.keys = _mm256_add_epi64(quarter.keys, step);
            }
        }

        #[target_feature(enable = "avx2")]
        #[inline]
        fn add_to(&self, sums: &mut [u64; LANES]) {
            let (quarters, _) = sums.as_chunks_mut::<4>();
            for (sums, quarter) in quarters.iter_mut().zip(self.0) {
                for (sum, more) in sums.iter_mut().zip(words(quarter.sums)) {
                    *sum = sum.wrapping_add(more);
                }
            }
        }
    }

    /// See [`super::announce`].
    #[target_feature(enable = "avx2")]
    pub(super) fn announce(from: *const u8, stripes: usize) {
        let second = stripes.min(PART_STRIPES).div_ceil(2) * STRIPE_BYTES;
        for line in (0..AHEAD_BYTES).step_by(STRIPE_BYTES) {
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line).cast());
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(second + line).cast());
        }
    }

    /// The stripe at this place, and a hint that those some way behind it will be wanted.
    ///
    /// # Safety
    /// It can be read.
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load(at: *const u8) -> [__m256i; 2] {
        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD_BYTES).cast());
        // SAFETY: the caller's promise; no alignment is asked for.
        let first = unsafe { _mm256_loadu_si256(at.cast()) };
        // SAFETY: the same, for the second half of it.
        let second = unsafe { _mm256_loadu_si256(at.wrapping_add(VECTOR_BYTES).cast()) };
        [first, second]
    }

    /// Stores a stripe past the caches.
    ///
    /// # Safety
    /// The target is aligned for vectors.
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn store(to: &mut [u8; STRIPE_BYTES], stripe: [__m256i; 2]) {
        let (to, _) = to.as_chunks_mut::<VECTOR_BYTES>();
        for (to, vector) in to.iter_mut().zip(stripe) {
            // SAFETY: the target is ours, of this length, and aligned, as the caller promises.
            unsafe { _mm256_stream_si256(to.as_mut_ptr().cast(), vector) };
        }
    }

    /// Takes stripes in, from both halves in turn.
    #[target_feature(enable = "avx2")]
    pub(super) fn take(to: &mut Stripes, stripes: &[[u8; STRIPE_BYTES]]) {
        let (first, second) = stripes.split_at(stripes.len().div_ceil(2));
        let mut one = Half::from(to.keys, 0);
        let mut other = Half::from(to.keys, first.len());
        for (a, b) in first.iter().zip(second) {
            // SAFETY: a stripe of ours.
            one.take(unsafe { load(a.as_ptr()) });
            // SAFETY: the same.
            other.take(unsafe { load(b.as_ptr()) });
        }
        // The odd one.
        for stripe in &first[second.len()..] {
            // SAFETY: a stripe of ours.
            one.take(unsafe { load(stripe.as_ptr()) });
        }
        one.add_to(&mut to.sums);
        other.add_to(&mut to.sums);
        to.pass(stripes.len() as u64);
    }

    /// Copies stripes, and takes them in where `SUM` says so, from both halves in turn.
    ///
    /// # Safety
    /// So many stripes can be read from `from` on, none of which is the target's; the target is aligned for vectors.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn copy<const SUM: bool>(
        to: &mut Stripes,
        from: *const u8,
        target: &mut [[u8; STRIPE_BYTES]],
    ) {
        let count = target.len();
        let (first, second) = target.split_at_mut(count.div_ceil(2));
        let mut one = Half::from(to.keys, 0);
        let mut other = Half::from(to.keys, first.len());
        let middle = from.wrapping_add(first.len() * STRIPE_BYTES);
        for (index, (a, b)) in first.iter_mut().zip(&mut *second).enumerate() {
            let offset = index * STRIPE_BYTES;
            // SAFETY: within what the caller promises.
            let stripe = unsafe { load(from.wrapping_add(offset)) };
            // SAFETY: the target is aligned, by the caller's promise, and so is each of its stripes.
            unsafe { store(a, stripe) };
            if SUM {
                one.take(stripe);
            }
            // SAFETY: within what the caller promises.
            let stripe = unsafe { load(middle.wrapping_add(offset)) };
            // SAFETY: as above.
            unsafe { store(b, stripe) };
            if SUM {
                other.take(stripe);
            }
        }
        // The odd one.
        for (index, a) in first.iter_mut().enumerate().skip(second.len()) {
            // SAFETY: within what the caller promises.
            let stripe = unsafe { load(from.wrapping_add(index * STRIPE_BYTES)) };
            // SAFETY: as above.
            unsafe { store(a, stripe) };
            if SUM {
                one.take(stripe);
            }
        }
        // Whatever is stored after this is seen after what was stored past the caches.
        _mm_sfence();
        one.add_to(&mut to.sums);
        other.add_to(&mut to.sums);
        to.pass(count as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_processor_sums_the_same() {
        for count in [0, 1, 2, 3, 1023, 1024, 1025, 3000] {
            let stripes: Vec<[u8; STRIPE_BYTES]> = (0..count)
                .map(|index: usize| {
                    std::array::from_fn(|byte| (index * 31 + byte * 7).to_le_bytes()[0])
                })
                .collect();
            let mut plain = Stripes::default();
            plain.take_plainly(&stripes);
            let mut best = Stripes::default();
            best.take(&stripes);
            assert_eq!((best.sums, best.keys), (plain.sums, plain.keys), "{count}");
        }
    }
}

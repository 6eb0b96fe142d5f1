//! A checksum that thousands of threads compute together, and a processor as well: the one for pages of a device.
//!
//! The bytes are cut into vectors of 16; the last one is filled up with zeros. Vector `i`, as two little-endian words
//! `a` and `b`, gives `fold((a + (i + 1) · A) · (b + (i + 1) · B))`, where a product has 128 bits and `fold` is its low half
//! xor its high one. The terms are added up, in any order; [`finish`] mixes in the length. So a changed, missing, moved,
//! doubled or swapped vector changes the sum, save one time in 2⁶⁴; it protects from accidents, not from an enemy.
//!
//! `engine/kernels/handoff.cu` computes the same terms. Invariant: the sum depends on the bytes in their order, not on
//! where they lie or how they were divided.

/// Bytes of a vector.
pub const VECTOR_BYTES: usize = 16;

/// What the words of a vector are moved by, times its number: `A` and `B` in `handoff.cu`.
const STEP_A: u64 = 0x9E37_79B9_7F4A_7C15;
const STEP_B: u64 = 0xC2B2_AE3D_27D4_EB4F;

/// Of the last mixing.
const MIX: u64 = 0xFF51_AFD7_ED55_8CCD;

/// The term of vector `index`.
fn term(index: u64, vector: [u8; VECTOR_BYTES]) -> u64 {
    let word = u128::from_le_bytes(vector);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the halves are what is wanted"
    )]
    let (a, b) = (word as u64, (word >> 64) as u64);
    let number = index.wrapping_add(1);
    let x = a.wrapping_add(number.wrapping_mul(STEP_A));
    let y = b.wrapping_add(number.wrapping_mul(STEP_B));
    let product = u128::from(x) * u128::from(y);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the halves are what is wanted"
    )]
    let folded = product as u64 ^ (product >> 64) as u64;
    folded
}

/// The checksum of `bytes` bytes whose terms have this sum.
#[must_use]
pub fn finish(sum: u64, bytes: u64) -> u64 {
    let mixed = sum ^ bytes.wrapping_mul(STEP_A);
    let mixed = (mixed ^ (mixed >> 33)).wrapping_mul(MIX);
    mixed ^ (mixed >> 29)
}

/// Takes bytes in as many calls as they come in.
#[derive(Debug, Clone, Default)]
pub struct Fold {
    sum: u64,
    bytes: u64,
    /// The beginning of a vector that is not whole yet; as long as `bytes` says.
    begun: [u8; VECTOR_BYTES],
}

impl Fold {
    /// The next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        let held = self.held();
        if held > 0 {
            let (now, later) = bytes.split_at(bytes.len().min(VECTOR_BYTES - held));
            self.begun[held..held + now.len()].copy_from_slice(now);
            self.bytes += now.len() as u64;
            bytes = later;
            if held + now.len() < VECTOR_BYTES {
                return;
            }
            let index = self.bytes / VECTOR_BYTES as u64 - 1;
            self.sum = self.sum.wrapping_add(term(index, self.begun));
        }
        let (vectors, rest) = bytes.as_chunks::<VECTOR_BYTES>();
        let first = self.bytes / VECTOR_BYTES as u64;
        let terms = (first..)
            .zip(vectors)
            .map(|(index, vector)| term(index, *vector));
        self.sum = terms.fold(self.sum, u64::wrapping_add);
        self.begun[..rest.len()].copy_from_slice(rest);
        self.bytes += bytes.len() as u64;
    }

    /// The checksum of all bytes so far.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let held = self.held();
        if held == 0 {
            return finish(self.sum, self.bytes);
        }
        let mut last = [0; VECTOR_BYTES];
        last[..held].copy_from_slice(&self.begun[..held]);
        let index = self.bytes / VECTOR_BYTES as u64;
        finish(self.sum.wrapping_add(term(index, last)), self.bytes)
    }

    const fn held(&self) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "less than a vector")]
        let held = (self.bytes % VECTOR_BYTES as u64) as usize;
        held
    }
}

/// The checksum of bytes that lie together.
#[must_use]
pub fn fold(bytes: &[u8]) -> u64 {
    let mut fold = Fold::default();
    fold.update(bytes);
    fold.digest()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes without a pattern.
    pub(crate) fn sample(len: usize) -> Vec<u8> {
        let mut state = 1_u64;
        (0..len)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                state.to_le_bytes()[7]
            })
            .collect()
    }

    #[test]
    fn it_is_what_both_sides_have_agreed_on() {
        // Computed once with big integers, from the definition above.
        assert_eq!(fold(b""), 0);
        assert_eq!(fold(&[0; 16]), 0x6480_1DDC_86A0_72C9);
        let counted: Vec<u8> = (0..100).collect();
        assert_eq!(fold(&counted), 0x0FDA_3313_A27B_5667);
    }

    #[test]
    fn one_bit_anywhere_is_seen() {
        let bytes = sample(100);
        let right = fold(&bytes);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut wrong = bytes.clone();
                wrong[at] ^= 1 << bit;
                assert_ne!(fold(&wrong), right, "{at}.{bit}");
            }
        }
    }

    #[test]
    fn zeros_moved_parts_and_lengths_are_seen() {
        let bytes = sample(256);
        let right = fold(&bytes);
        for at in (0..240).step_by(16) {
            let mut swapped = bytes.clone();
            let (a, b) = swapped.split_at_mut(at + 16);
            a[at..].swap_with_slice(&mut b[..16]);
            assert_ne!(fold(&swapped), right, "{at}");
            let mut missing = bytes.clone();
            missing[at..at + 16].fill(0);
            assert_ne!(fold(&missing), right, "{at}");
        }
        let zeros = [0; 64];
        let lengths: std::collections::HashSet<_> =
            (0..=64).map(|len| fold(&zeros[..len])).collect();
        assert_eq!(lengths.len(), 65);
    }

    proptest! {
        #[test]
        fn how_the_bytes_were_divided_does_not_count(
            len in 0_usize..200,
            cuts in prop::collection::vec(0_usize..40, 0..20),
        ) {
            let bytes = sample(len);
            let mut parts = Fold::default();
            let mut rest = &bytes[..];
            for cut in cuts {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                parts.update(now);
                rest = later;
            }
            parts.update(rest);
            prop_assert_eq!(parts.digest(), fold(&bytes));
        }
    }
}

//! [`Lanes`] in plain Rust, for processors without the instructions above.
//!
//! Where the target always has a fused multiply-add (aarch64), results are bit-equal to the AVX paths; elsewhere
//! `fma` rounds twice, because an emulated one is a hundred times slower, and last bits may differ.

use std::array::from_fn;

use half::{bf16, f16};

use super::Lanes;

/// No instructions are needed, so anyone may have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Portable;

impl Portable {
    #[inline(always)]
    fn fold4(v: [f32; 16]) -> [f32; 4] {
        let eight: [f32; 8] = from_fn(|i| v[i] + v[i + 8]);
        from_fn(|i| eight[i] + eight[i + 4])
    }
}

impl Lanes for Portable {
    type V = [f32; 16];
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; 16]
    }

    #[inline(always)]
    fn load(self, values: &[f32; 16]) -> Self::V {
        *values
    }

    #[inline(always)]
    fn array(self, v: Self::V) -> [f32; 16] {
        v
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            from_fn(|i| a[i].mul_add(b[i], c[i]))
        } else {
            from_fn(|i| a[i] * b[i] + c[i])
        }
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        from_fn(|i| a[i].round_ties_even())
    }

    #[inline(always)]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "n is integral and n + 127 is in 1..=254; NaN becomes 127, and meets a NaN again in the product"
    )]
    fn pow2(self, n: Self::V) -> Self::V {
        from_fn(|i| f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    fn zero_below(self, v: Self::V, x: Self::V, bound: Self::V) -> Self::V {
        from_fn(|i| if x[i] < bound[i] { 0.0 } else { v[i] })
    }

    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let four = Self::fold4(v);
        (four[0] + four[2]) + (four[1] + four[3])
    }

    #[inline(always)]
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4] {
        v.map(|v| self.sum(v))
    }

    #[inline(always)]
    fn max_lane(self, v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn u8s(self, bytes: [u8; 16]) -> Self::V {
        bytes.map(f32::from)
    }

    #[inline(always)]
    fn bits(self, bytes: [u8; 16], shift: u8, mask: u8) -> Self::V {
        bytes.map(|byte| f32::from((byte >> shift) & mask))
    }

    #[inline(always)]
    fn i8s(self, bytes: [i8; 16]) -> Self::V {
        bytes.map(f32::from)
    }

    #[inline(always)]
    fn f16s(self, bytes: [u8; 32]) -> Self::V {
        from_fn(|i| f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32())
    }

    #[inline(always)]
    fn bf16s(self, bytes: [u8; 32]) -> Self::V {
        from_fn(|i| bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32())
    }

    #[inline(always)]
    fn f16_splat(self, bytes: [u8; 2]) -> Self::V {
        [f16::from_le_bytes(bytes).to_f32(); 16]
    }

    #[inline(always)]
    fn lookup_low(self, bytes: [u8; 16], table: Self::V) -> Self::V {
        bytes.map(|byte| table[usize::from(byte & 15)])
    }

    #[inline(always)]
    fn lookup_high(self, bytes: [u8; 16], table: Self::V) -> Self::V {
        bytes.map(|byte| table[usize::from(byte >> 4)])
    }
}

//! [`Lanes`](super::Lanes) on AVX-512: one register a vector. Safe functions; the door proves the features.

use std::arch::x86_64::*;

use super::{from_m512, to_m512};

pub(super) type V = __m512;

macro_rules! functions {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) -> $out:ty $body:block)*) => {
        $(
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            pub(super) fn $name($($arg: $ty),*) -> $out $body
        )*
    };
}

functions! {
    fn splat(value: f32) -> V { _mm512_set1_ps(value) }
    fn load(values: &[f32; 16]) -> V { to_m512(*values) }
    fn array(v: V) -> [f32; 16] { from_m512(v) }
    fn add(a: V, b: V) -> V { _mm512_add_ps(a, b) }
    fn sub(a: V, b: V) -> V { _mm512_sub_ps(a, b) }
    fn mul(a: V, b: V) -> V { _mm512_mul_ps(a, b) }
    fn div(a: V, b: V) -> V { _mm512_div_ps(a, b) }
    fn fma(a: V, b: V, c: V) -> V { _mm512_fmadd_ps(a, b, c) }
    fn max(a: V, b: V) -> V { _mm512_max_ps(a, b) }
    fn min(a: V, b: V) -> V { _mm512_min_ps(a, b) }
    fn round(a: V) -> V { _mm512_roundscale_ps::<_MM_FROUND_NO_EXC>(a) }
    fn pow2(n: V) -> V {
        let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
        _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
    }
    fn zero_below(v: V, x: V, bound: V) -> V {
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, bound), v)
    }
    fn fold4(v: V) -> __m128 {
        let eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight))
    }
    fn sum(v: V) -> f32 {
        let four = fold4(v);
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
    fn sum4(v: [V; 4]) -> [f32; 4] {
        let [a, b, c, d] = v;
        let (a, b, c, d) = (fold4(a), fold4(b), fold4(c), fold4(d));
        let ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
        let cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
        let sums = _mm_add_ps(
            _mm_shuffle_ps::<0b10_00_10_00>(ab, cd),
            _mm_shuffle_ps::<0b11_01_11_01>(ab, cd),
        );
        bytemuck::cast(sums)
    }
    fn max_lane(v: V) -> f32 { _mm512_reduce_max_ps(v) }
    fn u8s(bytes: [u8; 16]) -> V {
        _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytemuck::cast(bytes)))
    }
    fn bits(bytes: [u8; 16], shift: u8, mask: u8) -> V {
        let wide = _mm512_cvtepu8_epi32(bytemuck::cast(bytes));
        let shifted = _mm512_srl_epi32(wide, _mm_cvtsi32_si128(i32::from(shift)));
        _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(i32::from(mask))))
    }
    fn i8s(bytes: [i8; 16]) -> V {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytemuck::cast(bytes)))
    }
    fn f16s(bytes: [u8; 32]) -> V { _mm512_cvtph_ps(bytemuck::cast(bytes)) }
    fn bf16s(bytes: [u8; 32]) -> V {
        let wide = _mm512_cvtepu16_epi32(bytemuck::cast(bytes));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
    }
    fn f16_splat(bytes: [u8; 2]) -> V {
        _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes(bytes)))
    }
    fn lookup_low(bytes: [u8; 16], table: V) -> V {
        // The permutation reads only the low four bits of an index, so the nibble needs no mask.
        _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(bytemuck::cast(bytes)), table)
    }
    fn lookup_high(bytes: [u8; 16], table: V) -> V {
        let index = _mm512_srli_epi32::<4>(_mm512_cvtepu8_epi32(bytemuck::cast(bytes)));
        _mm512_permutexvar_ps(index, table)
    }
}

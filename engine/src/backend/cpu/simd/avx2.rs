//! [`Lanes`](super::Lanes) on AVX2: a vector is lanes 0..8 and lanes 8..16. Safe functions; the door proves the features.

use std::arch::x86_64::*;

pub(super) type V = [__m256; 2];

macro_rules! functions {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) -> $out:ty $body:block)*) => {
        $(
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            pub(super) fn $name($($arg: $ty),*) -> $out $body
        )*
    };
}

functions! {
    fn splat(value: f32) -> V { [_mm256_set1_ps(value); 2] }
    fn load(values: &[f32; 16]) -> V { bytemuck::cast(*values) }
    fn array(v: V) -> [f32; 16] { bytemuck::cast(v) }
    fn add(a: V, b: V) -> V { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    fn sub(a: V, b: V) -> V { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    fn mul(a: V, b: V) -> V { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    fn div(a: V, b: V) -> V { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    fn fma(a: V, b: V, c: V) -> V {
        [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
    }
    fn max(a: V, b: V) -> V { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    fn min(a: V, b: V) -> V { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    fn round(a: V) -> V {
        [_mm256_round_ps::<_MM_FROUND_NO_EXC>(a[0]), _mm256_round_ps::<_MM_FROUND_NO_EXC>(a[1])]
    }
    fn pow2_half(n: __m256) -> __m256 {
        let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
    }
    fn pow2(n: V) -> V { [pow2_half(n[0]), pow2_half(n[1])] }
    fn zero_below(v: V, x: V, bound: V) -> V {
        [
            _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x[0], bound[0]), v[0]),
            _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x[1], bound[1]), v[1]),
        ]
    }
    fn fold4(v: V) -> __m128 {
        let eight = _mm256_add_ps(v[0], v[1]);
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
    fn max_lane(v: V) -> f32 {
        let eight = _mm256_max_ps(v[0], v[1]);
        let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
    fn u8_indices(bytes: [u8; 16]) -> [__m256i; 2] {
        let bytes = bytemuck::cast(bytes);
        [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))]
    }
    fn u8s(bytes: [u8; 16]) -> V {
        let [low, high] = u8_indices(bytes);
        [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
    }
    fn bits_half(wide: __m256i, shift: u8, mask: u8) -> __m256 {
        let shifted = _mm256_srl_epi32(wide, _mm_cvtsi32_si128(i32::from(shift)));
        _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(i32::from(mask))))
    }
    fn bits(bytes: [u8; 16], shift: u8, mask: u8) -> V {
        let [low, high] = u8_indices(bytes);
        [bits_half(low, shift, mask), bits_half(high, shift, mask)]
    }
    fn i8s(bytes: [i8; 16]) -> V {
        let bytes = bytemuck::cast(bytes);
        let high = _mm_srli_si128::<8>(bytes);
        [
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
        ]
    }
    fn f16s(bytes: [u8; 32]) -> V {
        let [low, high]: [__m128i; 2] = bytemuck::cast(bytes);
        [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
    }
    fn bf16_half(bytes: __m128i) -> __m256 {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bytes)))
    }
    fn bf16s(bytes: [u8; 32]) -> V {
        let [low, high]: [__m128i; 2] = bytemuck::cast(bytes);
        [bf16_half(low), bf16_half(high)]
    }
    fn f16_splat(bytes: [u8; 2]) -> V {
        [_mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes(bytes))); 2]
    }
    fn lookup(index: __m256i, table: V) -> __m256 {
        // A permutation reads three bits of the index; the fourth, moved to the sign, picks the table's half.
        let low = _mm256_permutevar8x32_ps(table[0], index);
        let high = _mm256_permutevar8x32_ps(table[1], index);
        _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
    }
    fn lookup_low(bytes: [u8; 16], table: V) -> V {
        let [low, high] = u8_indices(bytes);
        [lookup(low, table), lookup(high, table)]
    }
    fn lookup_high(bytes: [u8; 16], table: V) -> V {
        let [low, high] = u8_indices(bytes);
        [
            lookup(_mm256_srli_epi32::<4>(low), table),
            lookup(_mm256_srli_epi32::<4>(high), table),
        ]
    }
}

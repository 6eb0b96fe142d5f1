//! Formats of 32 weights a block: a half-precision scale, for `_1` a minimum too, then the integers.
//!
//! Nibble formats put weights 0..16 in the low and 16..32 in the high nibbles of the same sixteen bytes. There are
//! only sixteen values a block, so they are computed once and looked up.

use super::{Format, bytes16};
use crate::backend::cpu::simd::Lanes;

pub(in super::super) struct Q4_0;
pub(in super::super) struct Q4_1;
pub(in super::super) struct Q5_0;
pub(in super::super) struct Q5_1;
pub(in super::super) struct Q8_0;

/// The values of a nibble.
pub(super) const NIBBLES: [f32; 16] = [
    0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.,
];
const NIBBLES_MINUS_8: [f32; 16] = [
    -8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.,
];

impl Format<18> for Q4_0 {
    const PARTS: usize = 1;

    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 18], _part: usize) -> [L::V; 2] {
        let scale = lanes.f16_splat([block[0], block[1]]);
        let table = lanes.mul(lanes.load(&NIBBLES_MINUS_8), scale);
        let nibbles = bytes16(block, 2);
        [
            lanes.lookup_low(nibbles, table),
            lanes.lookup_high(nibbles, table),
        ]
    }
}

impl Format<20> for Q4_1 {
    const PARTS: usize = 1;

    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 20], _part: usize) -> [L::V; 2] {
        let scale = lanes.f16_splat([block[0], block[1]]);
        let minimum = lanes.f16_splat([block[2], block[3]]);
        let table = lanes.add(lanes.mul(lanes.load(&NIBBLES), scale), minimum);
        let nibbles = bytes16(block, 4);
        [
            lanes.lookup_low(nibbles, table),
            lanes.lookup_high(nibbles, table),
        ]
    }
}

/// The five-bit integers of a block: four bits from the nibbles, the fifth from a bit field.
#[inline(always)]
fn five_bits(fifth: [u8; 4], nibbles: [u8; 16]) -> [[u8; 16]; 2] {
    let fifth = u32::from_le_bytes(fifth);
    let bit = |index: usize| ((fifth >> index) & 1 != 0) as u8 * 16;
    [
        std::array::from_fn(|i| (nibbles[i] & 15) | bit(i)),
        std::array::from_fn(|i| (nibbles[i] >> 4) | bit(i + 16)),
    ]
}

impl Format<22> for Q5_0 {
    const PARTS: usize = 1;

    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 22], _part: usize) -> [L::V; 2] {
        let scale = lanes.f16_splat([block[0], block[1]]);
        let fifth = [block[2], block[3], block[4], block[5]];
        let [low, high] = five_bits(fifth, bytes16(block, 6));
        let centre = lanes.splat(16.0);
        [
            lanes.mul(lanes.sub(lanes.u8s(low), centre), scale),
            lanes.mul(lanes.sub(lanes.u8s(high), centre), scale),
        ]
    }
}

impl Format<24> for Q5_1 {
    const PARTS: usize = 1;

    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 24], _part: usize) -> [L::V; 2] {
        let scale = lanes.f16_splat([block[0], block[1]]);
        let minimum = lanes.f16_splat([block[2], block[3]]);
        let fifth = [block[4], block[5], block[6], block[7]];
        let [low, high] = five_bits(fifth, bytes16(block, 8));
        [
            lanes.add(lanes.mul(lanes.u8s(low), scale), minimum),
            lanes.add(lanes.mul(lanes.u8s(high), scale), minimum),
        ]
    }
}

impl Format<34> for Q8_0 {
    const PARTS: usize = 1;

    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 34], _part: usize) -> [L::V; 2] {
        let scale = lanes.f16_splat([block[0], block[1]]);
        let (low, high) = (bytes16(block, 2), bytes16(block, 18));
        [
            lanes.mul(lanes.i8s(bytemuck::cast(low)), scale),
            lanes.mul(lanes.i8s(bytemuck::cast(high)), scale),
        ]
    }
}

//! K-quants: 256 weights a block, with integer scales for groups of 16 or 32 under one half-precision scale.
//!
//! A group's scale is `d * s`, rounded, as in GGML; a value is that times the integer, rounded, minus the minimum.

use super::legacy::NIBBLES;
use super::{Format, bytes16};
use crate::backend::cpu::simd::Lanes;

pub(in super::super) struct Q2K;
pub(in super::super) struct Q3K;
pub(in super::super) struct Q4K;
pub(in super::super) struct Q5K;
pub(in super::super) struct Q6K;

/// `d * integer` in all lanes, for `d` stored at `at`.
#[inline(always)]
fn scaled<L: Lanes>(lanes: L, block: &[u8], at: usize, integer: f32) -> L::V {
    let d = lanes.f16_splat([block[at], block[at + 1]]);
    lanes.mul(d, lanes.splat(integer))
}

/// `low + 2^n * high`: an integer in two pieces, exact.
#[inline(always)]
fn joined<L: Lanes>(lanes: L, low: L::V, high: L::V, weight: f32) -> L::V {
    lanes.add(lanes.mul(high, lanes.splat(weight)), low)
}

/// A shift of `step` bits a group.
#[inline(always)]
fn shift(index: usize, step: u8) -> u8 {
    index.to_le_bytes()[0] * step
}

/// The six-bit scale and minimum of 32-weight group `part`, of eight packed in twelve bytes (Q4_K, Q5_K).
#[inline(always)]
fn scale_and_minimum(packed: &[u8], part: usize) -> (f32, f32) {
    let (scale, minimum) = if part < 4 {
        (packed[part] & 63, packed[part + 4] & 63)
    } else {
        (
            (packed[part + 4] & 15) | ((packed[part - 4] >> 6) << 4),
            (packed[part + 4] >> 4) | ((packed[part] >> 6) << 4),
        )
    };
    (f32::from(scale), f32::from(minimum))
}

impl Format<84> for Q2K {
    const PARTS: usize = 8;

    // Bytes: 16 of scales (low nibble) and minima (high nibble), 64 of two-bit integers, d, dmin.
    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 84], part: usize) -> [L::V; 2] {
        [
            Self::sixteen(lanes, block, part, 0),
            Self::sixteen(lanes, block, part, 1),
        ]
    }
}

impl Q2K {
    /// Half `i` of group `part`.
    #[inline(always)]
    fn sixteen<L: Lanes>(lanes: L, block: &[u8; 84], part: usize, i: usize) -> L::V {
        let packed = block[2 * part + i];
        let scale = scaled(lanes, block, 80, f32::from(packed & 15));
        let minimum = scaled(lanes, block, 82, f32::from(packed >> 4));
        let bytes = bytes16(block, 16 + part / 4 * 32 + 16 * i);
        let integers = lanes.bits(bytes, shift(part % 4, 2), 3);
        lanes.sub(lanes.mul(scale, integers), minimum)
    }
}

impl Format<110> for Q3K {
    const PARTS: usize = 8;

    // Bytes: 32 of third bits, 64 of two-bit integers, 12 of packed six-bit scales, d.
    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 110], part: usize) -> [L::V; 2] {
        [
            Self::sixteen(lanes, block, part, 0),
            Self::sixteen(lanes, block, part, 1),
        ]
    }
}

impl Q3K {
    /// Half `i` of group `part`.
    #[inline(always)]
    fn sixteen<L: Lanes>(lanes: L, block: &[u8; 110], part: usize, i: usize) -> L::V {
        let group = 2 * part + i;
        let low = block[96 + group % 8] >> (group / 8 * 4) & 15;
        let high = block[104 + group % 4] >> (group / 4 * 2) & 3;
        let scale = scaled(lanes, block, 108, f32::from(low | (high << 4)) - 32.0);
        let two = lanes.bits(
            bytes16(block, 32 + part / 4 * 32 + 16 * i),
            shift(part % 4, 2),
            3,
        );
        let third = lanes.bits(bytes16(block, 16 * i), shift(part, 1), 1);
        let integers = joined(lanes, two, third, 4.0);
        lanes.mul(scale, lanes.sub(integers, lanes.splat(4.0)))
    }
}

impl Format<144> for Q4K {
    const PARTS: usize = 8;

    // Bytes: d, dmin, 12 of packed scales and minima, 128 of nibbles.
    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 144], part: usize) -> [L::V; 2] {
        let (scale, minimum) = scale_and_minimum(&block[4..16], part);
        let scale = scaled(lanes, block, 0, scale);
        let minimum = scaled(lanes, block, 2, minimum);
        let table = lanes.sub(lanes.mul(scale, lanes.load(&NIBBLES)), minimum);
        let at = 16 + part / 2 * 32;
        let (low, high) = (bytes16(block, at), bytes16(block, at + 16));
        if part.is_multiple_of(2) {
            [lanes.lookup_low(low, table), lanes.lookup_low(high, table)]
        } else {
            [
                lanes.lookup_high(low, table),
                lanes.lookup_high(high, table),
            ]
        }
    }
}

impl Format<176> for Q5K {
    const PARTS: usize = 8;

    // Bytes: d, dmin, 12 of packed scales and minima, 32 of fifth bits, 128 of nibbles.
    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 176], part: usize) -> [L::V; 2] {
        [
            Self::sixteen(lanes, block, part, 0),
            Self::sixteen(lanes, block, part, 1),
        ]
    }
}

impl Q5K {
    /// Half `i` of group `part`.
    #[inline(always)]
    fn sixteen<L: Lanes>(lanes: L, block: &[u8; 176], part: usize, i: usize) -> L::V {
        let (scale, minimum) = scale_and_minimum(&block[4..16], part);
        let scale = scaled(lanes, block, 0, scale);
        let minimum = scaled(lanes, block, 2, minimum);
        let nibbles = bytes16(block, 48 + part / 2 * 32 + 16 * i);
        let four = lanes.bits(nibbles, shift(part % 2, 4), 15);
        let fifth = lanes.bits(bytes16(block, 16 + 16 * i), shift(part, 1), 1);
        let integers = joined(lanes, four, fifth, 16.0);
        lanes.sub(lanes.mul(scale, integers), minimum)
    }
}

impl Format<210> for Q6K {
    const PARTS: usize = 8;

    // Bytes: 128 of nibbles, 64 of fifth and sixth bits, 16 signed scales, d.
    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 210], part: usize) -> [L::V; 2] {
        [
            Self::sixteen(lanes, block, part, 0),
            Self::sixteen(lanes, block, part, 1),
        ]
    }
}

impl Q6K {
    /// Half `i` of group `part`.
    #[inline(always)]
    fn sixteen<L: Lanes>(lanes: L, block: &[u8; 210], part: usize, i: usize) -> L::V {
        let (half, quarter) = (part / 4, part % 4);
        let scale = i8::from_le_bytes([block[192 + 2 * part + i]]);
        let scale = scaled(lanes, block, 208, f32::from(scale));
        let nibbles = bytes16(block, 64 * half + quarter % 2 * 32 + 16 * i);
        let four = lanes.bits(nibbles, shift(quarter / 2, 4), 15);
        let two = lanes.bits(
            bytes16(block, 128 + 32 * half + 16 * i),
            shift(quarter, 2),
            3,
        );
        let integers = joined(lanes, four, two, 16.0);
        lanes.mul(scale, lanes.sub(integers, lanes.splat(32.0)))
    }
}

//! Plain floats; a "block" is 32 of them.

use super::Format;
use crate::backend::cpu::simd::Lanes;

pub(in super::super) struct F32;
pub(in super::super) struct F16;
pub(in super::super) struct Bf16;

impl Format<128> for F32 {
    const PARTS: usize = 1;

    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 128], _part: usize) -> [L::V; 2] {
        let [low, high]: [[f32; 16]; 2] = bytemuck::cast(*block);
        [lanes.load(&low), lanes.load(&high)]
    }
}

impl Format<64> for F16 {
    const PARTS: usize = 1;

    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 64], _part: usize) -> [L::V; 2] {
        let [low, high]: [[u8; 32]; 2] = bytemuck::cast(*block);
        [lanes.f16s(low), lanes.f16s(high)]
    }
}

impl Format<64> for Bf16 {
    const PARTS: usize = 1;

    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, block: &[u8; 64], _part: usize) -> [L::V; 2] {
        let [low, high]: [[u8; 32]; 2] = bytemuck::cast(*block);
        [lanes.bf16s(low), lanes.bf16s(high)]
    }
}

//! GGML's storage formats, decoded to exactly the `f32` values that GGML's own dequantiser gives.
//!
//! Every format is decoded 32 weights (two vectors) at a time, so that a dot product can consume them in registers
//! and a scratch buffer can be filled by the same code. Values are rounded as in GGML: `d * q` first, then `+ m`.

mod k;
mod legacy;
mod plain;

pub(super) use k::{Q2K, Q3K, Q4K, Q5K, Q6K};
pub(super) use legacy::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
pub(super) use plain::{Bf16, F16, F32};

use super::simd::{Kernel, Lanes};
use crate::backend::WeightDtype;

/// Weights decoded together, and the multiple to which rows are padded.
pub(super) const PART: usize = 32;

/// A storage format whose block takes `BYTES` bytes and holds `PARTS * 32` weights.
pub(super) trait Format<const BYTES: usize> {
    /// Groups of 32 weights in a block.
    const PARTS: usize;

    /// The 32 weights of group `part`.
    fn decode<L: Lanes>(lanes: L, block: &[u8; BYTES], part: usize) -> [L::V; 2];
}

/// Evaluates an expression with the type that decodes `$dtype` bound to a name.
macro_rules! with_format {
    ($dtype:expr, $format:ident => $body:expr) => {{
        use $crate::backend::WeightDtype as Dtype;
        use $crate::backend::cpu::quant;
        match $dtype {
            Dtype::F32 => with_format!(@ $format = quant::F32 => $body),
            Dtype::F16 => with_format!(@ $format = quant::F16 => $body),
            Dtype::Bf16 => with_format!(@ $format = quant::Bf16 => $body),
            Dtype::F8E4m3 => unreachable!("8-bit weights are decoded when they are loaded"),
            Dtype::Q4_0 => with_format!(@ $format = quant::Q4_0 => $body),
            Dtype::Q4_1 => with_format!(@ $format = quant::Q4_1 => $body),
            Dtype::Q5_0 => with_format!(@ $format = quant::Q5_0 => $body),
            Dtype::Q5_1 => with_format!(@ $format = quant::Q5_1 => $body),
            Dtype::Q8_0 => with_format!(@ $format = quant::Q8_0 => $body),
            Dtype::Q2_K => with_format!(@ $format = quant::Q2K => $body),
            Dtype::Q3_K => with_format!(@ $format = quant::Q3K => $body),
            Dtype::Q4_K => with_format!(@ $format = quant::Q4K => $body),
            Dtype::Q5_K => with_format!(@ $format = quant::Q5K => $body),
            Dtype::Q6_K => with_format!(@ $format = quant::Q6K => $body),
        }
    }};
    (@ $format:ident = $type:ty => $body:expr) => {{
        type $format = $type;
        $body
    }};
}
pub(super) use with_format;

/// Decodes one row into `out`, whose length is the row's rounded up to [`PART`]; the padding becomes zero.
pub(super) struct DecodeRow<'a> {
    pub(super) dtype: WeightDtype,
    pub(super) row: &'a [u8],
    pub(super) out: &'a mut [f32],
}

impl Kernel for DecodeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        decode_row(lanes, self.dtype, self.row, self.out);
    }
}

/// See [`DecodeRow`].
#[inline(always)]
pub(super) fn decode_row<L: Lanes>(lanes: L, dtype: WeightDtype, row: &[u8], out: &mut [f32]) {
    with_format!(dtype, F => decode_blocks::<F, _, L>(lanes, row, out));
}

/// See [`DecodeRow`].
#[inline(always)]
pub(super) fn decode_blocks<F: Format<N>, const N: usize, L: Lanes>(
    lanes: L,
    row: &[u8],
    out: &mut [f32],
) {
    let (blocks, rest) = row.as_chunks::<N>();
    let (parts, _) = out.as_chunks_mut::<PART>();
    for (block, parts) in blocks.iter().zip(parts.chunks_exact_mut(F::PARTS)) {
        for (part, out) in parts.iter_mut().enumerate() {
            store(lanes, F::decode(lanes, block, part), out);
        }
    }
    if !rest.is_empty() {
        let mut block = [0; N];
        block[..rest.len()].copy_from_slice(rest);
        store(lanes, F::decode(lanes, &block, 0), &mut parts[blocks.len()]);
    }
}

#[inline(always)]
fn store<L: Lanes>(lanes: L, [low, high]: [L::V; 2], out: &mut [f32; PART]) {
    let (halves, _) = out.as_chunks_mut::<16>();
    halves[0] = lanes.array(low);
    halves[1] = lanes.array(high);
}

/// Sixteen bytes from `at` on.
#[inline(always)]
fn bytes16(bytes: &[u8], at: usize) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&bytes[at..at + 16]);
    out
}

#[cfg(test)]
mod tests;

//! Few tokens: weights are decoded in registers and used at once, several rows abreast to hide latency. The bound is
//! memory for one token, the multiply-add units for eight; decoding runs beside them.

use super::super::quant::{Format, PART};
use super::super::simd::{Lanes, prefetch};
use super::{PREFETCH_BYTES, Product, write_sums};

/// Whether so many tokens are few: as many as leave registers for the weights.
pub(super) const fn pays<L: Lanes>(tokens: usize) -> bool {
    tokens == 1 || L::WIDE && tokens <= 8
}

/// All sums of a product.
#[inline(always)]
pub(super) fn product<F: Format<N>, const N: usize, L: Lanes>(lanes: L, product: &mut Product<'_>) {
    match product.out.len() {
        1 => rows::<F, N, 4, 1, L>(lanes, product),
        2 => rows::<F, N, 4, 2, L>(lanes, product),
        3 | 4 => rows::<F, N, 4, 4, L>(lanes, product),
        5 | 6 => rows::<F, N, 2, 6, L>(lanes, product),
        _ => rows::<F, N, 2, 8, L>(lanes, product),
    }
}

/// `R` rows at a time with all tokens, of which there are at most `C`.
#[inline(always)]
fn rows<F: Format<N>, const N: usize, const R: usize, const C: usize, L: Lanes>(
    lanes: L,
    product: &mut Product<'_>,
) {
    let (tokens, cols) = (product.out.len(), product.cols);
    // Where tokens are missing, the last one is computed again.
    let x: [&[f32]; C] = std::array::from_fn(|c| &product.x[c.min(tokens - 1) * cols..][..cols]);
    let row_count = product.out[0].len();
    let bytes = product.weight.rows_from(product.first_row, row_count);
    let groups = bytes.chunks_exact(R * product.weight.row_bytes());
    let rest = groups.remainder();
    for (group, bytes) in groups.enumerate() {
        let sums = dot::<F, N, R, C, L>(lanes, bytes, x);
        for (sums, out) in sums.into_iter().zip(&mut product.out) {
            write_sums(lanes, sums, &mut out[group * R..][..R]);
        }
    }
    let first = row_count / R * R;
    let rest = rest.chunks_exact(product.weight.row_bytes());
    for (row, bytes) in (first..).zip(rest) {
        for (x, out) in x.into_iter().zip(&mut product.out) {
            let [sums] = dot::<F, N, 1, 1, L>(lanes, bytes, [x]);
            write_sums(lanes, sums, &mut out[row..=row]);
        }
    }
}

/// Accumulators of `R` stored rows with `C` tokens.
#[inline(always)]
fn dot<F: Format<N>, const N: usize, const R: usize, const C: usize, L: Lanes>(
    lanes: L,
    bytes: &[u8],
    x: [&[f32]; C],
) -> [[L::V; R]; C] {
    let (blocks, _) = bytes.as_chunks::<N>();
    let count = blocks.len() / R;
    let rows: [&[[u8; N]]; R] = std::array::from_fn(|r| &blocks[r * count..(r + 1) * count]);
    let x: [&[[f32; PART]]; C] = std::array::from_fn(|c| &x[c].as_chunks().0[..count * F::PARTS]);
    let mut sums = [[lanes.splat(0.0); R]; C];
    for index in 0..count {
        for line in (0..R * N).step_by(64) {
            prefetch(bytes, PREFETCH_BYTES + index * R * N + line);
        }
        for part in 0..F::PARTS {
            let mut low = [lanes.splat(0.0); R];
            let mut high = [lanes.splat(0.0); R];
            for r in 0..R {
                [low[r], high[r]] = F::decode(lanes, &rows[r][index], part);
            }
            for c in 0..C {
                let (halves, _) = x[c][index * F::PARTS + part].as_chunks::<16>();
                let (x_low, x_high) = (lanes.load(&halves[0]), lanes.load(&halves[1]));
                for r in 0..R {
                    sums[c][r] = lanes.fma(low[r], x_low, sums[c][r]);
                    sums[c][r] = lanes.fma(high[r], x_high, sums[c][r]);
                }
            }
        }
    }
    sums
}

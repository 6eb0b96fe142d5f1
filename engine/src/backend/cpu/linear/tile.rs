//! Many tokens: four rows are decoded to a buffer that stays in L1 and multiplied with tiles of tokens, in blocks of
//! tokens that stay in L2. The bound is the multiply-add units.

use super::super::quant::decode_row;
use super::super::simd::{Lanes, prefetch};
use super::{PREFETCH_BYTES, Product, ROWS, write_sums};

/// Bytes of activations that a block of tokens may take, so that they stay in half of a 1 MiB L2.
const BLOCK_BYTES: usize = 384 << 10;
#[inline(always)]
pub(super) fn product<L: Lanes>(lanes: L, product: &mut Product<'_>, scratch: &mut Vec<f32>) {
    scratch.resize(ROWS * product.cols, 0.0);
    let tokens_per_block = (BLOCK_BYTES / 4 / product.cols).max(16);
    let blocks = product.x.chunks(tokens_per_block * product.cols);
    for (x, out) in blocks.zip(product.out.chunks_mut(tokens_per_block)) {
        let rows = out[0].len();
        for row in (0..rows).step_by(ROWS) {
            let count = ROWS.min(rows - row);
            let weights = scratch.chunks_exact_mut(product.cols).take(count);
            for (index, weights) in weights.enumerate() {
                let bytes = product.weight.rows_from(product.first_row + row + index, 1);
                decode_row(lanes, product.weight.dtype, bytes, weights);
            }
            let ahead = product.weight.rows_from(product.first_row + row, count);
            let tile = Tile {
                x,
                cols: product.cols,
                weights: &scratch[..count * product.cols],
                row,
                ahead,
            };
            tile.run(lanes, out);
        }
    }
}

/// Up to four decoded rows with a block of tokens.
#[derive(Clone, Copy)]
struct Tile<'a> {
    /// `[tokens, cols]`.
    x: &'a [f32],
    cols: usize,
    /// `[1..=4, cols]`.
    weights: &'a [f32],
    /// Where the rows' outputs go, in each token's.
    row: usize,
    /// The rows' stored bytes; those of later rows are fetched meanwhile.
    ahead: &'a [u8],
}

impl Tile<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L, out: &mut [&mut [f32]]) {
        if self.weights.len() < ROWS * self.cols {
            for row in 0..self.weights.len() / self.cols {
                self.rows::<L, 1, 6>(lanes, row, out);
            }
        } else if L::WIDE {
            self.rows::<L, ROWS, 6>(lanes, 0, out);
        } else {
            // Sixteen registers of half a vector: two rows by three tokens.
            self.rows::<L, 2, 3>(lanes, 0, out);
            self.rows::<L, 2, 3>(lanes, 2, out);
        }
    }

    /// `R` rows from `from` on by `C` tokens at a time, then by the tokens that are left.
    #[inline(always)]
    fn rows<L: Lanes, const R: usize, const C: usize>(
        self,
        lanes: L,
        from: usize,
        out: &mut [&mut [f32]],
    ) {
        let whole = out.len() / C * C;
        let (out, rest_out) = out.split_at_mut(whole);
        let (x, rest_x) = self.x.split_at(whole * self.cols);
        Self { x, ..self }.tokens::<L, R, C>(lanes, from, out);
        let ahead = if whole == 0 { self.ahead } else { &[] };
        let rest = Self {
            x: rest_x,
            ahead,
            ..self
        };
        match rest_out.len() {
            0 => {}
            1 => rest.tokens::<L, R, 1>(lanes, from, rest_out),
            2 => rest.tokens::<L, R, 2>(lanes, from, rest_out),
            3 => rest.tokens::<L, R, 3>(lanes, from, rest_out),
            4 => rest.tokens::<L, R, 4>(lanes, from, rest_out),
            _ => rest.tokens::<L, R, 5>(lanes, from, rest_out),
        }
    }

    #[inline(always)]
    fn tokens<L: Lanes, const R: usize, const C: usize>(
        self,
        lanes: L,
        from: usize,
        out: &mut [&mut [f32]],
    ) {
        let weights: [&[f32]; R] = split_rows(&self.weights[from * self.cols..], self.cols);
        let row = self.row + from;
        let tokens = self.x.chunks_exact(C * self.cols);
        let mut ahead = self.ahead;
        for (x, out) in tokens.zip(out.chunks_exact_mut(C)) {
            let sums = dot_tile(lanes, weights, split_rows::<C>(x, self.cols), ahead);
            ahead = &[];
            for c in 0..C {
                write_sums(lanes, sums[c], &mut out[c][row..row + R]);
            }
        }
    }
}

#[inline(always)]
fn split_rows<const R: usize>(rows: &[f32], cols: usize) -> [&[f32]; R] {
    std::array::from_fn(|index| &rows[index * cols..(index + 1) * cols])
}

/// Accumulators of `R` decoded rows with `C` tokens; all slices have the same length, a multiple of 16.
/// As the tile proceeds, so does fetching of what is [`PREFETCH_BYTES`] after the bytes `ahead`.
#[inline(always)]
pub(in super::super) fn dot_tile<L: Lanes, const R: usize, const C: usize>(
    lanes: L,
    rows: [&[f32]; R],
    tokens: [&[f32]; C],
    ahead: &[u8],
) -> [[L::V; R]; C] {
    let count = rows[0].len() / 16;
    let stride = ahead.len().div_ceil(count.max(1));
    let rows = rows.map(|row| &row.as_chunks::<16>().0[..count]);
    let tokens = tokens.map(|token| &token.as_chunks::<16>().0[..count]);
    let mut sums = [[lanes.splat(0.0); R]; C];
    for index in 0..count {
        for line in (0..stride).step_by(64) {
            prefetch(ahead, PREFETCH_BYTES + index * stride + line);
        }
        let mut loaded = [lanes.splat(0.0); R];
        for r in 0..R {
            loaded[r] = lanes.load(&rows[r][index]);
        }
        for c in 0..C {
            let token = lanes.load(&tokens[c][index]);
            for r in 0..R {
                sums[c][r] = lanes.fma(loaded[r], token, sums[c][r]);
            }
        }
    }
    sums
}

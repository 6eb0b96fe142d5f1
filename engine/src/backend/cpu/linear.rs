//! `out = x · weightᵀ + bias` on exactly decoded weights, in `f32`.
//!
//! One result is one sum: lane `j` of sixteen adds the products of the columns `≡ j mod 16` in ascending order with
//! fused multiply-adds, then the lanes are added by halving ([`Lanes::sum`]). Missing columns of the last vectors
//! are zeros. Neither the number of rows or tokens, nor tiling, nor threads, nor the ISA change that order, so a
//! token's row is bit-equal alone, batched and chunked.
//!
//! One token: weights are decoded in registers and used at once, four rows abreast to hide latency; the bound is
//! memory. More tokens: four rows are decoded to a scratch buffer that stays in L1 and multiplied with tiles of
//! tokens, in blocks of tokens that stay in L2; the bound is the multiply-add units.

use std::cell::RefCell;
use std::sync::Arc;

use super::quant::{Format, PART, decode_row, with_format};
use super::simd::{Isa, Kernel, Lanes, prefetch};
use super::team::Team;
use super::tensor::{Buffers, CpuTensor};
use super::weight::CpuWeight;

/// Weight rows handled together.
const ROWS: usize = 4;
/// Bytes of activations that a block of tokens may take, so that they stay in half of a 1 MiB L2.
const BLOCK_BYTES: usize = 384 << 10;
/// Multiply-adds below which a task costs more to hand out than to do.
const TASK_WORK_MIN: usize = 32 << 10;
/// Tasks per thread: more even out unequal threads, fewer cost less.
const TASKS_PER_THREAD: usize = 4;

/// How far ahead of use weights are fetched: rows are short and read four at a time, which hides the stream from
/// the hardware's prefetcher. One token takes 2.4 times as long without.
const PREFETCH_BYTES: usize = 4096;
/// Tokens from which a row of weights is used long enough for the hardware to fetch the next.
const PREFETCH_TOKENS_MAX: usize = 32;

thread_local! {
    /// Decoded weight rows.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Operands of one product.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub(super) x: &'a CpuTensor,
    pub(super) weight: &'a CpuWeight,
    pub(super) bias: Option<&'a CpuWeight>,
}

/// See the module.
pub(super) fn linear(
    isa: Isa,
    team: &Team,
    buffers: &Arc<Buffers>,
    operands: Operands<'_>,
    out: &mut CpuTensor,
) {
    let Operands { x, weight, bias } = operands;
    let (tokens, rows) = (x.rows(), weight.rows);
    assert_eq!(x.cols(), weight.cols, "columns of x and weight");
    assert_eq!((out.rows(), out.cols()), (tokens, rows), "shape of out");
    let bias = bias.map(CpuWeight::vector);
    assert!(bias.is_none_or(|bias| bias.len() == rows), "length of bias");
    if tokens == 0 || rows == 0 {
        return;
    }
    let padded = (x.cols() % PART != 0).then(|| pad(x, buffers));
    let x = padded.as_ref().unwrap_or(x);
    let rows_per_task = rows_per_task(rows, x.cols() * tokens, team.threads());
    let tasks = split(out, rows_per_task, |first_row, out| Product {
        x: x.values(),
        cols: x.cols(),
        weight,
        bias: bias.map(|bias| &bias[first_row..]),
        first_row,
        out,
    });
    team.run(tasks, |product| {
        SCRATCH.with_borrow_mut(|scratch| isa.run(Work { product, scratch }));
    });
}

/// Rows with zeros up to a multiple of [`PART`] columns.
fn pad(x: &CpuTensor, buffers: &Arc<Buffers>) -> CpuTensor {
    let cols = x.cols();
    let mut padded = buffers.tensor(x.rows(), cols.next_multiple_of(PART));
    let padded_cols = padded.cols();
    if cols > 0 {
        let rows = padded.values_mut().chunks_exact_mut(padded_cols);
        for (to, from) in rows.zip(x.values().chunks_exact(cols)) {
            to[..cols].copy_from_slice(from);
            to[cols..].fill(0.0);
        }
    }
    padded
}

fn rows_per_task(rows: usize, row_work: usize, threads: usize) -> usize {
    let worthwhile = rows.saturating_mul(row_work) / TASK_WORK_MIN;
    let tasks = worthwhile.clamp(1, threads * TASKS_PER_THREAD);
    rows.div_ceil(tasks).next_multiple_of(ROWS)
}

/// Tasks that own the columns `first_row..` of every row of `out`.
fn split<'a, T>(
    out: &'a mut CpuTensor,
    rows_per_task: usize,
    mut task: impl FnMut(usize, Vec<&'a mut [f32]>) -> T,
) -> Vec<T> {
    let (tokens, rows) = (out.rows(), out.cols());
    let mut columns: Vec<Vec<&mut [f32]>> = (0..rows.div_ceil(rows_per_task))
        .map(|_| Vec::with_capacity(tokens))
        .collect();
    for token in out.values_mut().chunks_exact_mut(rows) {
        for (part, column) in token.chunks_mut(rows_per_task).zip(&mut columns) {
            column.push(part);
        }
    }
    (0..)
        .step_by(rows_per_task)
        .zip(columns)
        .map(|(first_row, out)| task(first_row, out))
        .collect()
}

/// Some output rows for all tokens.
struct Product<'a> {
    /// `[tokens, cols]`, `cols` a multiple of [`PART`].
    x: &'a [f32],
    cols: usize,
    weight: &'a CpuWeight,
    /// From `first_row` on.
    bias: Option<&'a [f32]>,
    first_row: usize,
    /// For each token, the outputs from `first_row` on.
    out: Vec<&'a mut [f32]>,
}

/// A product and its thread's buffer.
struct Work<'a, 'b> {
    product: Product<'a>,
    /// Decoded weight rows.
    scratch: &'b mut Vec<f32>,
}

impl Kernel for Work<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self {
            mut product,
            scratch,
        } = self;
        if product.cols == 0 {
            product.out.iter_mut().for_each(|out| out.fill(0.0));
        } else if product.out.len() == 1 && product.cols == product.weight.cols {
            with_format!(product.weight.dtype, F => product.one_token::<F, _, L>(lanes));
        } else {
            product.many_tokens(lanes, scratch);
        }
        if let Some(bias) = product.bias {
            for out in &mut product.out {
                out.iter_mut()
                    .zip(bias)
                    .for_each(|(out, bias)| *out += bias);
            }
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn one_token<F: Format<N>, const N: usize, L: Lanes>(&mut self, lanes: L) {
        let out = &mut *self.out[0];
        let row_bytes = self.weight.row_bytes();
        let bytes = self.weight.rows_from(self.first_row, out.len());
        let mut quads = out.chunks_exact_mut(ROWS);
        let mut quad_bytes = bytes.chunks_exact(ROWS * row_bytes);
        for (out, bytes) in (&mut quads).zip(&mut quad_bytes) {
            let sums = dot_rows::<F, N, ROWS, L>(lanes, bytes, self.x);
            out.copy_from_slice(&lanes.sum4(sums));
        }
        let rest = quads.into_remainder().iter_mut();
        for (out, bytes) in rest.zip(quad_bytes.remainder().chunks_exact(row_bytes)) {
            let [sum] = dot_rows::<F, N, 1, L>(lanes, bytes, self.x);
            *out = lanes.sum(sum);
        }
    }

    #[inline(always)]
    fn many_tokens<L: Lanes>(&mut self, lanes: L, scratch: &mut Vec<f32>) {
        scratch.resize(ROWS * self.cols, 0.0);
        let tokens_per_block = (BLOCK_BYTES / 4 / self.cols).max(16);
        let blocks = self.x.chunks(tokens_per_block * self.cols);
        for (x, out) in blocks.zip(self.out.chunks_mut(tokens_per_block)) {
            let rows = out[0].len();
            for row in (0..rows).step_by(ROWS) {
                let count = ROWS.min(rows - row);
                let weights = scratch.chunks_exact_mut(self.cols).take(count);
                for (index, weights) in weights.enumerate() {
                    let bytes = self.weight.rows_from(self.first_row + row + index, 1);
                    decode_row(lanes, self.weight.dtype, bytes, weights);
                }
                let ahead = self.weight.rows_from(self.first_row + row, count);
                let tile = Tile {
                    x,
                    cols: self.cols,
                    weights: &scratch[..count * self.cols],
                    row,
                    ahead: (out.len() <= PREFETCH_TOKENS_MAX).then_some(ahead),
                };
                tile.run(lanes, out);
            }
        }
    }
}

/// Accumulators of `R` rows with one token, decoding in registers.
#[inline(always)]
fn dot_rows<F: Format<N>, const N: usize, const R: usize, L: Lanes>(
    lanes: L,
    bytes: &[u8],
    x: &[f32],
) -> [L::V; R] {
    let (blocks, _) = bytes.as_chunks::<N>();
    let per_row = blocks.len() / R;
    let rows: [&[[u8; N]]; R] =
        std::array::from_fn(|row| &blocks[row * per_row..(row + 1) * per_row]);
    let mut sums = [lanes.splat(0.0); R];
    let (x, _) = x.as_chunks::<PART>();
    for (index, x) in x.chunks_exact(F::PARTS).take(per_row).enumerate() {
        for line in (0..R * N).step_by(64) {
            prefetch(bytes, PREFETCH_BYTES + index * R * N + line);
        }
        for (part, x) in x.iter().enumerate() {
            let (x, _) = x.as_chunks::<16>();
            let (x_low, x_high) = (lanes.load(&x[0]), lanes.load(&x[1]));
            for r in 0..R {
                let [low, high] = F::decode(lanes, &rows[r][index], part);
                sums[r] = lanes.fma(low, x_low, sums[r]);
                sums[r] = lanes.fma(high, x_high, sums[r]);
            }
        }
    }
    sums
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
    /// The rows' stored bytes, if those of the next rows are to be fetched meanwhile.
    ahead: Option<&'a [u8]>,
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
        let ahead = if whole == 0 { self.ahead } else { None };
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
        for (x, out) in tokens.zip(out.chunks_exact_mut(C)) {
            let sums = dot_tile(lanes, weights, split_rows::<C>(x, self.cols), self.ahead);
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

#[inline(always)]
fn write_sums<L: Lanes, const R: usize>(lanes: L, sums: [L::V; R], out: &mut [f32]) {
    for (sums, out) in sums.chunks(ROWS).zip(out.chunks_mut(ROWS)) {
        if let Some(sums) = sums.first_chunk::<ROWS>() {
            out.copy_from_slice(&lanes.sum4(*sums));
        } else {
            for r in 0..sums.len() {
                out[r] = lanes.sum(sums[r]);
            }
        }
    }
}

/// Accumulators of `R` decoded rows with `C` tokens; all slices have the same length, a multiple of 16.
/// As the tile proceeds, so does fetching of what is [`PREFETCH_BYTES`] after the bytes `ahead`.
#[inline(always)]
pub(super) fn dot_tile<L: Lanes, const R: usize, const C: usize>(
    lanes: L,
    rows: [&[f32]; R],
    tokens: [&[f32]; C],
    ahead: Option<&[u8]>,
) -> [[L::V; R]; C] {
    let count = rows[0].len() / 16;
    let (ahead, stride) = ahead.map_or((&[][..], 0), |ahead| (ahead, ahead.len() / count));
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

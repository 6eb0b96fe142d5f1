//! `out = x · weightᵀ + bias` on exactly decoded weights, in `f32`.
//!
//! One result is one sum: lane `j` of sixteen adds the products of the columns `≡ j mod 16` in ascending order with
//! fused multiply-adds, then the lanes are added by halving ([`Lanes::sum`]). Missing columns of the last vectors
//! are zeros. Neither the number of rows or tokens, nor tiling, nor threads, nor the ISA change that order, so a
//! token's row is bit-equal alone, batched and chunked.
//!
//! Few tokens: weights are decoded in registers and used at once ([`few`]). More tokens: weights are decoded to a
//! buffer that stays in L1 ([`tile`]).

mod few;
mod tile;

pub(super) use tile::dot_tile;

use std::cell::RefCell;
use std::sync::Arc;

use super::quant::{PART, with_format};
use super::simd::{Isa, Kernel, Lanes};
use super::team::Team;
use super::tensor::{Buffers, CpuTensor};
use super::weight::CpuWeight;

/// Weight rows handled together.
const ROWS: usize = 4;
/// Multiply-adds below which a task costs more to hand out than to do.
const TASK_WORK_MIN: usize = 32 << 10;
/// Tasks per thread: more even out unequal threads, fewer cost less.
const TASKS_PER_THREAD: usize = 4;

/// How far ahead of use weights are fetched: rows are short and read four at a time, which hides the stream from
/// the hardware's prefetcher. One token takes 2.4 times as long without.
const PREFETCH_BYTES: usize = 4096;
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
        } else if few::pays::<L>(product.out.len()) && product.cols == product.weight.cols {
            with_format!(product.weight.dtype, F => few::product::<F, _, L>(lanes, &mut product));
        } else {
            tile::product(lanes, &mut product, scratch);
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

/// Hands out `R` sums of one token.
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

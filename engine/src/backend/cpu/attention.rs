//! Causal attention over paged KV, with grouped query heads and an optional sliding window.
//!
//! Keys are visited in granules of 32, aligned to the sequence's start, with an online softmax; a granule's keys and
//! values are decoded to `f32` once and used by all query rows of the task. What a query computes depends only on
//! its own position and its sequence's KV: granules are aligned to position 0, keys that it must not see are never
//! multiplied in (not even by zero), and the tokens per block do not matter. So output is bit-equal however a prompt
//! is chunked and whatever else is in the batch.

use std::cell::RefCell;
use std::ops::Range;

use super::linear::dot_tile;
use super::math::exp;
use super::pages::Pages;
use super::quant::PART;
use super::simd::{Isa, Kernel, Lanes};
use super::team::Team;
use super::tensor::CpuTensor;
use crate::backend::{AttentionSpec, SequenceSpan, StepBatch};

/// Keys handled between two corrections of the running maximum: two vectors.
const GRANULE: usize = 32;
/// Query rows (tokens × heads) of a task: enough to pay for decoding the keys, few enough to stay in L1.
const QUERY_ROWS: usize = 32;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// See the module.
pub(super) fn attention(
    (isa, team, pages): (Isa, &Team, &Pages),
    spec: &AttentionSpec,
    batch: &StepBatch,
    q: &CpuTensor,
    out: &mut CpuTensor,
) {
    let shape = pages.shape();
    let width = spec.heads * shape.head_dim;
    assert_eq!(spec.heads % shape.kv_heads, 0, "query heads per KV head");
    assert_eq!((q.rows(), q.cols()), (batch.tokens.len(), width), "q");
    assert_eq!((out.rows(), out.cols()), (q.rows(), width), "shape of out");
    let group = spec.heads / shape.kv_heads;
    let tokens_per_task = (QUERY_ROWS / group).max(1);
    let tiles: usize = batch
        .sequences
        .iter()
        .map(|span| span.rows.len().div_ceil(tokens_per_task))
        .sum();
    // The heads of a group share decoded KV. They go apart only where threads would idle.
    let apart = tiles * shape.kv_heads < team.threads();
    let heads_per_task = if apart { 1 } else { group };
    let mut tasks = Vec::with_capacity(tiles * spec.heads / heads_per_task);
    let mut rest = out.values_mut();
    for span in &batch.sequences {
        for first in (0..span.rows.len()).step_by(tokens_per_task) {
            let count = tokens_per_task.min(span.rows.len() - first);
            let (tile, after) = rest.split_at_mut(count * width);
            rest = after;
            let first_task = tasks.len();
            tasks.extend((0..spec.heads).step_by(heads_per_task).map(|head| Task {
                pages,
                spec,
                span,
                first,
                heads: head..head + heads_per_task,
                q: q.values(),
                out: Vec::with_capacity(count),
            }));
            for token in tile.chunks_exact_mut(width) {
                let heads = token.chunks_exact_mut(heads_per_task * shape.head_dim);
                for (task, out) in tasks[first_task..].iter_mut().zip(heads) {
                    task.out.push(out);
                }
            }
        }
    }
    // The last tokens of a prompt see the most keys, so they go first.
    tasks.reverse();
    team.run(tasks, |task| {
        SCRATCH.with_borrow_mut(|scratch| isa.run(Work { task, scratch }));
    });
}

/// Some heads, sharing a KV head, of some consecutive tokens of a sequence.
struct Task<'a> {
    pages: &'a Pages,
    spec: &'a AttentionSpec,
    span: &'a SequenceSpan,
    /// First token, counted from the span's first row.
    first: usize,
    heads: Range<usize>,
    /// `[T, H, D]`.
    q: &'a [f32],
    /// For each token, `[heads, D]`.
    out: Vec<&'a mut [f32]>,
}

/// Buffers of a task, kept by its thread. `D` is padded with zeros to whole vectors.
#[derive(Debug, Default)]
struct Scratch {
    /// `[rows, D]`.
    queries: Vec<f32>,
    /// `[rows, D]`, not yet divided.
    sums: Vec<f32>,
    /// `[GRANULE, D]`.
    keys: Vec<f32>,
    /// `[GRANULE, D]`.
    values: Vec<f32>,
    rows: Vec<Row>,
}

/// The online softmax of a query row.
#[derive(Debug, Clone)]
struct Row {
    position: usize,
    maximum: f32,
    /// Lanes of the denominator.
    total: [f32; 16],
}

/// A task and its thread's buffers.
struct Work<'a, 'b> {
    task: Task<'a>,
    scratch: &'b mut Scratch,
}

impl Kernel for Work<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { mut task, scratch } = self;
        task.prepare(scratch);
        let padded = task.padded();
        let keys = task.visible(task.first).start / GRANULE * GRANULE
            ..task.visible(task.first + task.out.len() - 1).end;
        for base in keys.clone().step_by(GRANULE) {
            let granule = base..keys.end.min(base + GRANULE);
            task.decode(lanes, 0, granule.clone(), &mut scratch.keys);
            task.decode(lanes, 1, granule, &mut scratch.values);
            let mut first = 0;
            while first + 4 <= scratch.rows.len() {
                task.advance::<L, 4>(lanes, base, first, scratch);
                first += 4;
            }
            match scratch.rows.len() - first {
                0 => {}
                1 => task.advance::<L, 1>(lanes, base, first, scratch),
                2 => task.advance::<L, 2>(lanes, base, first, scratch),
                _ => task.advance::<L, 3>(lanes, base, first, scratch),
            }
        }
        let dim = task.pages.shape().head_dim;
        let value_scale = task.pages.scale(task.spec.layer).value;
        let outs = task
            .out
            .iter_mut()
            .flat_map(|out| out.chunks_exact_mut(dim));
        let rows = scratch.rows.iter().zip(scratch.sums.chunks_exact(padded));
        for (out, (row, sums)) in outs.zip(rows) {
            let total = lanes.sum(lanes.load(&row.total));
            out.iter_mut()
                .zip(sums)
                .for_each(|(out, sum)| *out = sum * value_scale / total);
        }
    }
}

impl Task<'_> {
    fn padded(&self) -> usize {
        self.pages.shape().head_dim.next_multiple_of(PART)
    }

    /// Positions that the span's token `index` may see.
    fn visible(&self, index: usize) -> Range<usize> {
        let end = self.span.past_len + index + 1;
        let start = self
            .spec
            .window
            .map_or(0, |window| end.saturating_sub(window));
        start..end
    }

    fn prepare(&self, scratch: &mut Scratch) {
        let (dim, padded) = (self.pages.shape().head_dim, self.padded());
        let width = self.spec.heads * dim;
        let row_count = self.out.len() * self.heads.len();
        for (buffer, rows) in [
            (&mut scratch.queries, row_count),
            (&mut scratch.sums, row_count),
            (&mut scratch.keys, GRANULE),
            (&mut scratch.values, GRANULE),
        ] {
            buffer.clear();
            buffer.resize(rows * padded, 0.0);
        }
        scratch.rows.clear();
        let mut queries = scratch.queries.chunks_exact_mut(padded);
        for index in 0..self.out.len() {
            let token = &self.q[(self.span.rows.start + self.first + index) * width..][..width];
            let heads = token[self.heads.start * dim..self.heads.end * dim].chunks_exact(dim);
            for (query, to) in heads.zip(&mut queries) {
                to[..dim].copy_from_slice(query);
                scratch.rows.push(Row {
                    position: self.span.past_len + self.first + index,
                    maximum: f32::NEG_INFINITY,
                    total: [0.0; 16],
                });
            }
        }
    }

    /// Decodes keys (`side` 0) or values (1) of the positions to rows of `out`; what is after them is left alone.
    #[inline(always)]
    fn decode<L: Lanes>(&self, lanes: L, side: usize, positions: Range<usize>, out: &mut [f32]) {
        let group = self.spec.heads / self.pages.shape().kv_heads;
        let plane = (self.spec.layer, side, self.heads.start / group);
        let padded = self.padded();
        let mut out = out;
        let mut position = positions.start;
        while position < positions.end {
            let (run, tokens) = self.pages.run(&self.span.blocks, plane, position);
            let count = tokens.min(positions.end - position);
            let (rows, rest) = out.split_at_mut(count * padded);
            self.pages.decode(lanes, run, rows, padded);
            out = rest;
            position += count;
        }
    }

    /// Takes `R` query rows over one granule.
    #[inline(always)]
    fn advance<L: Lanes, const R: usize>(
        &self,
        lanes: L,
        base: usize,
        first: usize,
        scratch: &mut Scratch,
    ) {
        let padded = self.padded();
        let ranges: [Range<usize>; R] = std::array::from_fn(|row| {
            let position = scratch.rows[first + row].position;
            let visible = self.visible(position - self.span.past_len);
            visible.start.saturating_sub(base).min(GRANULE)
                ..visible.end.saturating_sub(base).min(GRANULE)
        });
        if ranges.iter().all(Range::is_empty) {
            return;
        }
        let queries: [&[f32]; R] =
            std::array::from_fn(|row| &scratch.queries[(first + row) * padded..][..padded]);
        let mut scores = scores(lanes, queries, &scratch.keys);
        let scale = self.spec.scale * self.pages.scale(self.spec.layer).key;
        let mut corrections = [1.0; R];
        for (index, range) in ranges.iter().enumerate() {
            if !range.is_empty() {
                let row = &mut scratch.rows[first + index];
                corrections[index] = soften(lanes, row, &mut scores[index], range, scale);
            }
        }
        let sums = &mut scratch.sums[first * padded..(first + R) * padded];
        if ranges.iter().all(|range| *range == (0..GRANULE)) {
            let weighted = Weighted {
                weights: &scores,
                corrections,
                values: &scratch.values,
            };
            weighted.add_to(lanes, sums, padded);
            return;
        }
        for (index, range) in ranges.into_iter().enumerate() {
            if !range.is_empty() {
                let weighted = Weighted {
                    weights: &[&scores[index][range.clone()]],
                    corrections: [corrections[index]],
                    values: &scratch.values[range.start * padded..range.end * padded],
                };
                weighted.add_to(
                    lanes,
                    &mut sums[index * padded..(index + 1) * padded],
                    padded,
                );
            }
        }
    }
}

/// Dot products of `R` queries with a granule's keys.
#[inline(always)]
fn scores<L: Lanes, const R: usize>(
    lanes: L,
    queries: [&[f32]; R],
    keys: &[f32],
) -> [[f32; GRANULE]; R] {
    let padded = keys.len() / GRANULE;
    let mut scores = [[0.0; GRANULE]; R];
    for (index, keys) in keys.chunks_exact(4 * padded).enumerate() {
        let keys: [&[f32]; 4] = std::array::from_fn(|key| &keys[key * padded..(key + 1) * padded]);
        let sums = dot_tile(lanes, keys, queries, &[]);
        for (scores, sums) in scores.iter_mut().zip(sums) {
            scores[4 * index..4 * index + 4].copy_from_slice(&lanes.sum4(sums));
        }
    }
    scores
}

/// Turns scores into weights relative to the row's new maximum; returns the factor for what was summed before.
#[inline(always)]
fn soften<L: Lanes>(
    lanes: L,
    row: &mut Row,
    scores: &mut [f32; GRANULE],
    visible: &Range<usize>,
    scale: f32,
) -> f32 {
    scores[..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
    let (halves, _) = scores.as_chunks_mut::<16>();
    let scale = lanes.splat(scale);
    let low = lanes.mul(lanes.load(&halves[0]), scale);
    let high = lanes.mul(lanes.load(&halves[1]), scale);
    let maximum = row.maximum.max(lanes.max_lane(lanes.max(low, high)));
    let (previous, splat) = (lanes.splat(row.maximum), lanes.splat(maximum));
    let correction = exp(lanes, lanes.sub(previous, splat));
    let low = exp(lanes, lanes.sub(low, splat));
    let high = exp(lanes, lanes.sub(high, splat));
    let total = lanes.fma(lanes.load(&row.total), correction, lanes.add(low, high));
    row.total = lanes.array(total);
    row.maximum = maximum;
    halves[0] = lanes.array(low);
    halves[1] = lanes.array(high);
    lanes.array(correction)[0]
}

/// A sum of values, and the factor for what was summed before, for `R` rows.
struct Weighted<'a, W, const R: usize> {
    /// `[R, keys]`.
    weights: &'a [W; R],
    corrections: [f32; R],
    /// `[keys, D]`.
    values: &'a [f32],
}

impl<W: AsRef<[f32]>, const R: usize> Weighted<'_, W, R> {
    /// `sums = sums * correction + weights · values`, keys in ascending order; sums `[R, D]`.
    #[inline(always)]
    fn add_to<L: Lanes>(&self, lanes: L, sums: &mut [f32], padded: usize) {
        let mut at = 0;
        while at + 64 <= padded {
            self.add_columns::<L, 4>(lanes, sums, padded, at);
            at += 64;
        }
        while at < padded {
            self.add_columns::<L, 1>(lanes, sums, padded, at);
            at += 16;
        }
    }

    /// The `C` vectors of columns from `at` on.
    #[inline(always)]
    fn add_columns<L: Lanes, const C: usize>(
        &self,
        lanes: L,
        sums: &mut [f32],
        padded: usize,
        at: usize,
    ) {
        let mut totals = [[lanes.splat(0.0); C]; R];
        for r in 0..R {
            let correction = lanes.splat(self.corrections[r]);
            let (sums, _) = sums[r * padded + at..][..16 * C].as_chunks::<16>();
            for c in 0..C {
                totals[r][c] = lanes.mul(lanes.load(&sums[c]), correction);
            }
        }
        let count = self.values.len() / padded;
        let weights: [&[f32]; R] = std::array::from_fn(|row| &self.weights[row].as_ref()[..count]);
        for (key, values) in self.values.chunks_exact(padded).enumerate() {
            let (values, _) = values[at..at + 16 * C].as_chunks::<16>();
            let mut loaded = [lanes.splat(0.0); C];
            for c in 0..C {
                loaded[c] = lanes.load(&values[c]);
            }
            for r in 0..R {
                let weight = lanes.splat(weights[r][key]);
                for c in 0..C {
                    totals[r][c] = lanes.fma(weight, loaded[c], totals[r][c]);
                }
            }
        }
        for r in 0..R {
            let (sums, _) = sums[r * padded + at..][..16 * C].as_chunks_mut::<16>();
            for c in 0..C {
                sums[c] = lanes.array(totals[r][c]);
            }
        }
    }
}

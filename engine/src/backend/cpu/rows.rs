//! Operations that treat each row by itself: norms, activation, sum, rotation.
//!
//! Large batches are split over threads by rows; a row's arithmetic is the same either way.

use std::sync::{Arc, Mutex, PoisonError};

use super::math::silu;
use super::simd::{Isa, Kernel, Lanes};
use super::team::Team;
use crate::backend::{RopePairing, RopeTable};

/// Elements below which one thread is faster.
const TASK_ELEMENTS_MIN: usize = 16 << 10;

/// Runs `work` on groups of whole rows of `x`; it gets the index of the first.
fn by_rows(team: &Team, x: &mut [f32], cols: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if x.is_empty() {
        return;
    }
    let rows = x.len() / cols;
    let task_count = (x.len() / TASK_ELEMENTS_MIN).clamp(1, 2 * team.threads());
    let rows_per_task = rows.div_ceil(task_count);
    let tasks = x.chunks_mut(rows_per_task * cols).enumerate().collect();
    team.run(tasks, |(index, rows)| work(index * rows_per_task, rows));
}

/// `out = x / rms(x) * weight` per row of `weight.len()`.
pub(super) fn rms_norm(
    (isa, team): (Isa, &Team),
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    out: &mut [f32],
) {
    let cols = weight.len();
    by_rows(team, out, cols, |first, out| {
        out.copy_from_slice(&x[first * cols..][..out.len()]);
        isa.run(NormRows {
            x: out,
            weight,
            epsilon,
        });
    });
}

/// The same in place.
pub(super) fn rms_norm_in_place(
    (isa, team): (Isa, &Team),
    x: &mut [f32],
    weight: &[f32],
    epsilon: f32,
) {
    by_rows(team, x, weight.len(), |_, x| {
        isa.run(NormRows { x, weight, epsilon });
    });
}

struct NormRows<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    epsilon: f32,
}

impl Kernel for NormRows<'_> {
    type Output = ();

    #[inline(always)]
    #[expect(
        clippy::cast_precision_loss,
        reason = "a row's length is far below 2^24"
    )]
    fn run<L: Lanes>(self, lanes: L) {
        let count = self.weight.len() as f32;
        for row in self.x.chunks_exact_mut(self.weight.len()) {
            let mut sum = lanes.splat(0.0);
            let (whole, rest) = row.as_chunks::<16>();
            for x in whole {
                let x = lanes.load(x);
                sum = lanes.fma(x, x, sum);
            }
            let mut last = [0.0; 16];
            last[..rest.len()].copy_from_slice(rest);
            let last = lanes.load(&last);
            sum = lanes.fma(last, last, sum);
            let scale = 1.0 / (lanes.sum(sum) / count + self.epsilon).sqrt();
            for (x, weight) in row.iter_mut().zip(self.weight) {
                *x = *x * scale * weight;
            }
        }
    }
}

/// `x += y`.
pub(super) fn add((isa, team): (Isa, &Team), x: &mut [f32], y: &[f32], cols: usize) {
    by_rows(team, x, cols, |first, x| {
        let y = &y[first * cols..][..x.len()];
        isa.run(AddRows { x, y });
    });
}

struct AddRows<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
}

impl Kernel for AddRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _lanes: L) {
        self.x.iter_mut().zip(self.y).for_each(|(x, y)| *x += y);
    }
}

/// `gate = silu(gate) * up`.
pub(super) fn silu_mul((isa, team): (Isa, &Team), gate: &mut [f32], up: &[f32], cols: usize) {
    by_rows(team, gate, cols, |first, gate| {
        let up = &up[first * cols..][..gate.len()];
        isa.run(SiluRows { gate, up });
    });
}

struct SiluRows<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Kernel for SiluRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let (gates, gate_rest) = self.gate.as_chunks_mut::<16>();
        let (ups, up_rest) = self.up.as_chunks::<16>();
        for (gate, up) in gates.iter_mut().zip(ups) {
            activate(lanes, gate, up);
        }
        let (mut gate, mut up) = ([0.0; 16], [0.0; 16]);
        gate[..gate_rest.len()].copy_from_slice(gate_rest);
        up[..up_rest.len()].copy_from_slice(up_rest);
        activate(lanes, &mut gate, &up);
        gate_rest.copy_from_slice(&gate[..gate_rest.len()]);
    }
}

#[inline(always)]
fn activate<L: Lanes>(lanes: L, gate: &mut [f32; 16], up: &[f32; 16]) {
    let activated = silu(lanes, lanes.load(gate));
    *gate = lanes.array(lanes.mul(activated, lanes.load(up)));
}

/// Cosines and sines of the last batch: every layer's queries and keys rotate by the same angles.
#[derive(Debug, Default)]
pub(super) struct RopeCache {
    last: Mutex<Option<Arc<Angles>>>,
}

#[derive(Debug)]
struct Angles {
    positions: Vec<u32>,
    table: RopeTable,
    /// `[T, D / 2]` each, times the table's magnitude.
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl RopeCache {
    fn angles(&self, positions: &[u32], table: &RopeTable) -> Arc<Angles> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(angles) = &*last
            && angles.positions == positions
            && angles.table == *table
        {
            return Arc::clone(angles);
        }
        let angles = Arc::new(Angles::new(positions, table));
        *last = Some(Arc::clone(&angles));
        angles
    }
}

impl Angles {
    /// The angle is a product of two `f32`, as in the reference; its sine and cosine are exact to the last bit
    /// even at position 131072, which an `f32` sine of a large argument is not.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        reason = "positions are below 2^24, and sines are rounded to f32 on purpose"
    )]
    fn new(positions: &[u32], table: &RopeTable) -> Self {
        let len = positions.len() * table.inverse_frequencies.len();
        let (mut cosines, mut sines) = (Vec::with_capacity(len), Vec::with_capacity(len));
        for position in positions {
            for frequency in &table.inverse_frequencies {
                let (sine, cosine) = f64::from(*position as f32 * frequency).sin_cos();
                cosines.push(cosine as f32 * table.magnitude);
                sines.push(sine as f32 * table.magnitude);
            }
        }
        Self {
            positions: positions.to_vec(),
            table: table.clone(),
            cosines,
            sines,
        }
    }
}

/// Rotates each head of each row.
pub(super) fn rope(
    (isa, team): (Isa, &Team),
    cache: &RopeCache,
    (x, cols): (&mut [f32], usize),
    positions: &[u32],
    table: &RopeTable,
) {
    let angles = cache.angles(positions, table);
    by_rows(team, x, cols, |first, rows| {
        let angles = &*angles;
        isa.run(RotateRows {
            rows,
            cols,
            first,
            angles,
        });
    });
}

struct RotateRows<'a> {
    rows: &'a mut [f32],
    cols: usize,
    first: usize,
    angles: &'a Angles,
}

impl Kernel for RotateRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _lanes: L) {
        let half = self.angles.table.inverse_frequencies.len();
        for (index, row) in self.rows.chunks_exact_mut(self.cols).enumerate() {
            let at = (self.first + index) * half;
            let cosines = &self.angles.cosines[at..at + half];
            let sines = &self.angles.sines[at..at + half];
            for head in row.chunks_exact_mut(2 * half) {
                match self.angles.table.pairing {
                    RopePairing::Halves => rotate_halves(head, cosines, sines),
                    RopePairing::Adjacent => rotate_adjacent(head, cosines, sines),
                }
            }
        }
    }
}

#[inline(always)]
fn rotate_halves(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let (low, high) = head.split_at_mut(cosines.len());
    let angles = cosines.iter().zip(sines);
    for ((a, b), (cosine, sine)) in low.iter_mut().zip(high).zip(angles) {
        (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
    }
}

#[inline(always)]
fn rotate_adjacent(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let (pairs, _) = head.as_chunks_mut::<2>();
    let angles = cosines.iter().zip(sines);
    for ([a, b], (cosine, sine)) in pairs.iter_mut().zip(angles) {
        (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
    }
}

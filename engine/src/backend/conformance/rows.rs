//! Operations that treat each row by itself.

use super::*;
use crate::backend::{RopePairing, RopeTable};

const TOLERANCE: f64 = 1e-6;
const ROWS: [usize; 4] = [0, 1, 3, 40];
const EPSILON: f32 = 1e-5;

fn norm(x: &[f32], weight: &[f32]) -> Vec<f64> {
    let mut out = Vec::new();
    for row in x.chunks_exact(weight.len()) {
        let squares: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
        let scale = (squares / weight.len() as f64 + f64::from(EPSILON)).sqrt();
        let values = row.iter().zip(weight);
        out.extend(values.map(|(x, weight)| f64::from(*x) / scale * f64::from(*weight)));
    }
    out
}

pub(crate) fn rms_norm_matches_the_reference<B: Backend>(backend: &mut B) {
    for cols in SIZES.into_iter().chain([576, 2049]) {
        let weight_values = noise_of(backend, 1, cols);
        let weight = plain(backend, cols, &weight_values);
        for rows in ROWS {
            let values = noise_of(backend, 2, rows * cols);
            let x = upload(backend, cols, &values);
            let mut out = backend.tensor(rows, cols);
            backend.rms_norm(&x, &weight, EPSILON, &mut out);
            let expected = norm(&values, &weight_values);
            assert_close(
                &backend.to_host(&out),
                &expected,
                tolerance(backend, TOLERANCE),
                &format!("{cols}"),
            );
        }
    }
}

pub(crate) fn head_norm_matches_the_reference<B: Backend>(backend: &mut B) {
    for dim in [8, 64, 80] {
        let weight_values = noise_of(backend, 1, dim);
        let weight = plain(backend, dim, &weight_values);
        for rows in ROWS {
            let values = noise_of(backend, 2, rows * 3 * dim);
            let mut x = upload(backend, 3 * dim, &values);
            backend.head_norm(&mut x, &weight, EPSILON);
            let expected = norm(&values, &weight_values);
            assert_close(
                &backend.to_host(&x),
                &expected,
                tolerance(backend, TOLERANCE),
                &format!("{dim}"),
            );
        }
    }
}

pub(crate) fn add_and_silu_mul_match_the_reference<B: Backend>(backend: &mut B) {
    for cols in SIZES.into_iter().chain([1536]) {
        for rows in ROWS {
            let y_values = noise_of(backend, 2, rows * cols);
            // Arguments up to 100: the exponential must neither overflow nor lose its tail.
            let x_values: Vec<f32> = noise(1, rows * cols)
                .iter()
                .map(|x| x.powi(3) * 100.0)
                .collect();
            let x_values = held(backend, x_values);
            let (mut x, y) = (
                upload(backend, cols, &x_values),
                upload(backend, cols, &y_values),
            );
            let pairs = || {
                x_values
                    .iter()
                    .zip(&y_values)
                    .map(|(x, y)| (f64::from(*x), f64::from(*y)))
            };
            backend.add(&mut x, &y);
            let sums: Vec<f64> = pairs().map(|(x, y)| x + y).collect();
            assert_close(
                &backend.to_host(&x),
                &sums,
                tolerance(backend, TOLERANCE),
                "add",
            );
            let mut gate = upload(backend, cols, &x_values);
            backend.silu_mul(&mut gate, &y);
            for (found, (x, y)) in backend.to_host(&gate).into_iter().zip(pairs()) {
                let expected = x / (1.0 + (-x).exp()) * y;
                let error = (f64::from(found) - expected).abs();
                let allowed = tolerance(backend, TOLERANCE) * expected.abs() + vanishing(backend);
                assert!(
                    error <= allowed,
                    "silu({x}) * {y} is {expected}, not {found}"
                );
            }
        }
    }
}

/// Tensors that may lie side by side, products that may be one, a sum and a norm that may be one.
pub(crate) fn fused_operations_match_their_parts<B: Backend>(backend: &mut B) {
    for (cols, widths) in [(64, [128, 32, 32]), (16, [24, 8, 8]), (7, [5, 3, 1])] {
        backend.expect_weights(1 << 20).expect("little memory");
        let weights = [0, 1, 2].map(|index| {
            let values = noise_of(backend, 3 + index as u64, widths[index] * cols);
            plain(backend, cols, &values)
        });
        let biases = [0, 1, 2].map(|index| {
            let values = noise_of(backend, 6 + index as u64, widths[index]);
            plain(backend, widths[index], &values)
        });
        for biased in [false, true] {
            for rows in [0, 1, 5, 40] {
                let x = noise_of(backend, 1, rows * cols);
                let x = upload(backend, cols, &x);
                let bias = |index: usize| biased.then_some(&biases[index]);
                let pairs = [0, 1, 2].map(|index| (&weights[index], bias(index)));
                let mut outs = backend.tensors(rows, widths);
                let [a, b, c] = &mut outs;
                backend.linears(&x, pairs, [a, b, c]);
                for (index, out) in outs.iter().enumerate() {
                    let mut expected = backend.tensor(rows, widths[index]);
                    backend.linear(&x, &weights[index], bias(index), &mut expected);
                    let (found, expected) = (backend.to_host(out), backend.to_host(&expected));
                    assert_agree(backend, &found, &expected, &format!("{cols}, part {index}"));
                }
            }
        }
        let norm = noise_of(backend, 2, cols);
        let norm = plain(backend, cols, &norm);
        let (x, y) = (
            noise_of(backend, 8, 9 * cols),
            noise_of(backend, 9, 9 * cols),
        );
        let (mut fused, y) = (upload(backend, cols, &x), upload(backend, cols, &y));
        let mut parts = upload(backend, cols, &x);
        let (mut found, mut expected) = (backend.tensor(9, cols), backend.tensor(9, cols));
        backend.add_rms_norm((&mut fused, &y), &norm, EPSILON, &mut found);
        backend.add(&mut parts, &y);
        backend.rms_norm(&parts, &norm, EPSILON, &mut expected);
        assert_same_bits(&backend.to_host(&fused), &backend.to_host(&parts), "sum");
        let (found, expected) = (backend.to_host(&found), backend.to_host(&expected));
        assert_agree(backend, &found, &expected, "norm of the sum");
    }
}

pub(crate) fn rope_matches_the_reference<B: Backend>(backend: &mut B) {
    for half in [4, 10, 32] {
        let dim = 2 * half;
        let cols = 3 * dim;
        for (pairing, magnitude) in [(RopePairing::Halves, 1.0), (RopePairing::Adjacent, 1.25)] {
            let exponents = (0..half).map(|i| -(i as f32) / half as f32);
            let table = RopeTable {
                inverse_frequencies: exponents
                    .map(|exponent| 10_000_f32.powf(exponent))
                    .collect(),
                pairing,
                magnitude,
            };
            // Twice, with other positions: a cache of the first angles must not serve the second.
            for positions in [
                &[0, 1, 2, 17, 4095, 131_071][..],
                &[5, 1, 9, 2, 77, 100_000],
                &[],
            ] {
                let values = noise_of(backend, 1, positions.len() * cols);
                let mut x = upload(backend, cols, &values);
                backend.rope(&mut x, positions, &table);
                let mut expected: Vec<f64> = values.iter().map(|x| f64::from(*x)).collect();
                for (row, position) in expected.chunks_exact_mut(cols).zip(positions) {
                    let heads = row.chunks_exact_mut(dim);
                    heads.for_each(|head| rotate(head, *position, &table));
                }
                assert_close(
                    &backend.to_host(&x),
                    &expected,
                    tolerance(backend, TOLERANCE),
                    &format!("{pairing:?}"),
                );
            }
        }
    }
}

/// The angle is an `f32` product, as in the models' reference; all else is `f64`.
fn rotate(head: &mut [f64], position: u32, table: &RopeTable) {
    let half = head.len() / 2;
    for (i, frequency) in table.inverse_frequencies.iter().enumerate() {
        let (a, b) = match table.pairing {
            RopePairing::Halves => (i, i + half),
            RopePairing::Adjacent => (2 * i, 2 * i + 1),
        };
        let (sine, cosine) = f64::from(position as f32 * frequency).sin_cos();
        let magnitude = f64::from(table.magnitude);
        let (x, y) = (head[a] * magnitude, head[b] * magnitude);
        head[a] = x * cosine - y * sine;
        head[b] = y * cosine + x * sine;
    }
}

pub(crate) fn rows_are_selected_and_copied<B: Backend>(backend: &mut B) {
    let values = noise_of(backend, 1, 5 * 7);
    let x = upload(backend, 7, &values);
    assert_same_bits(&backend.to_host(&x), &values, "a copy");
    let mut out = backend.tensor(3, 7);
    backend.select_rows(&x, &[0, 3, 4], &mut out);
    let expected = [&values[..7], &values[21..28], &values[28..]].concat();
    assert_same_bits(&backend.to_host(&out), &expected, "rows 0, 3, 4");
    let mut none = backend.tensor(0, 7);
    backend.select_rows(&x, &[], &mut none);
    assert!(backend.to_host(&none).is_empty());
}

pub(crate) fn rows_are_edited_on_the_host<B: Backend>(backend: &mut B) {
    let values = noise_of(backend, 1, 5 * 7);
    let mut x = upload(backend, 7, &values);
    let mut seen = Vec::new();
    backend.on_host(&mut x, &mut |x| {
        seen = x.to_vec();
        x[7..14].fill(0.5);
    });
    assert_same_bits(&seen, &values, "what the host sees");
    let half = [0.5; 7];
    let expected = [&values[..7], &half, &values[14..]].concat();
    assert_same_bits(&backend.to_host(&x), &expected, "an edited row");
    // The device goes on with what the host wrote.
    let mut out = backend.tensor(2, 7);
    backend.select_rows(&x, &[1, 4], &mut out);
    let expected = [&half, &values[28..]].concat();
    assert_same_bits(&backend.to_host(&out), &expected, "rows 1, 4");
}

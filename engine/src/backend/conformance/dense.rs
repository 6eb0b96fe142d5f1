//! Weights and products with them.

use super::*;
use crate::backend::{ActivationDtype, BackendError, e4m3};

/// `f32` sums of some hundred products of numbers below 1, relative to the largest result.
const TOLERANCE: f64 = 2e-5;

pub(crate) fn embed_decodes_every_dtype_exactly<B: Backend>(backend: &mut B) {
    for dtype in DTYPES {
        let cols = 3 * columns(dtype);
        let (source, expected) = stored(dtype, 5, cols, 1);
        let table = backend.load_weight(source).expect("sizes fit");
        let tokens = [4, 0, 3, 3];
        let mut out = backend.tensor(tokens.len(), cols);
        backend.embed(&table, &tokens, &mut out);
        let expected: Vec<f32> = tokens
            .iter()
            .flat_map(|token| expected[*token as usize * cols..][..cols].to_vec())
            .collect();
        let expected = held(backend, expected);
        assert_same_bits(&backend.to_host(&out), &expected, &format!("{dtype:?}"));
        let mut nothing = backend.tensor(0, cols);
        backend.embed(&table, &[], &mut nothing);
        assert!(backend.to_host(&nothing).is_empty());
    }
}

/// `x · weightᵀ + bias` by definition.
fn product(x: &[f32], weight: &[f32], bias: Option<&[f32]>, cols: usize) -> Vec<f64> {
    let rows = weight.len() / cols;
    let mut out = Vec::new();
    for x in x.chunks_exact(cols) {
        for (row, weight) in weight.chunks_exact(cols).enumerate() {
            let sum: f64 = x
                .iter()
                .zip(weight)
                .map(|(x, w)| f64::from(*x) * f64::from(*w))
                .sum();
            out.push(sum + bias.map_or(0.0, |bias| f64::from(bias[row % rows])));
        }
    }
    out
}

/// Runs the operation on some rows of x.
fn run<B: Backend>(
    backend: &mut B,
    (x, cols): (&[f32], usize),
    weight: &B::Weight,
    bias: Option<&B::Weight>,
    rows: usize,
) -> Vec<f32> {
    let x = upload(backend, cols, x);
    let mut out = backend.tensor(backend.to_host(&x).len() / cols, rows);
    backend.linear(&x, weight, bias, &mut out);
    backend.to_host(&out)
}

pub(crate) fn linear_matches_the_reference<B: Backend>(backend: &mut B) {
    let shapes = SIZES
        .into_iter()
        .flat_map(|rows| SIZES.into_iter().map(move |cols| (rows, cols)))
        .chain([(130, 577), (301, 1536)]);
    for (rows, cols) in shapes {
        let values = noise_of(backend, 2, rows * cols);
        let bias_values = noise_of(backend, 3, rows);
        let allowed = tolerance(backend, TOLERANCE);
        let weight = plain(backend, cols, &values);
        let bias = plain(backend, rows, &bias_values);
        // Long rows and many tokens: more than a cache's worth, so blocked if a backend blocks.
        let many = if cols > 1000 { 150 } else { 33 };
        for tokens in [0, 1, 2, 5, 6, 16, 17, many] {
            let x = noise_of(backend, tokens as u64, tokens * cols);
            let what = format!("[{rows}, {cols}] with {tokens} tokens");
            let found = run(backend, (&x, cols), &weight, None, rows);
            assert_close(&found, &product(&x, &values, None, cols), allowed, &what);
            let found = run(backend, (&x, cols), &weight, Some(&bias), rows);
            let expected = product(&x, &values, Some(&bias_values), cols);
            assert_close(&found, &expected, allowed, &what);
        }
    }
}

pub(crate) fn linear_of_stored_formats_matches_the_reference<B: Backend>(backend: &mut B) {
    for dtype in DTYPES {
        for (rows, blocks) in [(1, 1), (5, 3), (70, 2)] {
            let cols = blocks * columns(dtype);
            let (source, values) = stored(dtype, rows, cols, 4);
            let values = held(backend, values);
            let weight = backend.load_weight(source).expect("sizes fit");
            for tokens in [1, 2, 9] {
                let x = noise_of(backend, 5, tokens * cols);
                let found = run(backend, (&x, cols), &weight, None, rows);
                let expected = product(&x, &values, None, cols);
                let what = format!("{dtype:?} [{rows}, {cols}] with {tokens} tokens");
                assert_close(&found, &expected, tolerance(backend, TOLERANCE), &what);
            }
        }
    }
}

/// A backend with narrow activations may round them to 8 bits for such weights: each element by 1/32 at most, some 2 % of a
/// sum, and that is relative to the largest.
const TOLERANCE_8_BIT: f64 = 0.06;

/// Noise in 8 bits, with one scale or one for each row, and its values.
fn stored_in_8_bits(rows: usize, cols: usize, each_row: bool) -> (WeightSource, Vec<f32>) {
    let scales: Vec<f32> = (0..if each_row { rows } else { 1 })
        .map(|row| 0.01 + 0.001 * (row % 7) as f32)
        .collect();
    let bytes: Vec<u8> = noise(9, rows * cols)
        .iter()
        .map(|value| e4m3::encode(value * 400.0))
        .collect();
    let values = e4m3::decode_rows(&bytes, rows, &scales);
    let source = WeightSource {
        name: "narrow".to_owned(),
        rows,
        cols,
        dtype: WeightDtype::F8E4m3,
        bytes: WeightBytes::Owned(bytes.into()),
        scales: Some(scales.into()),
    };
    (source, values)
}

pub(crate) fn linear_of_8_bit_weights_matches_the_reference<B: Backend>(backend: &mut B) {
    let exact = backend.capability().activations == ActivationDtype::F32;
    let allowed = if exact { TOLERANCE } else { TOLERANCE_8_BIT };
    backend.expect_weights(1 << 22).expect("little memory");
    for (rows, cols) in [(2, 16), (33, 48), (96, 512), (64, 4096), (4608, 256)] {
        for each_row in [false, true] {
            let (source, values) = stored_in_8_bits(rows, cols, each_row);
            let weight = backend.load_weight(source).expect("sizes fit");
            let bias_values = noise_of(backend, 3, rows);
            let bias = plain(backend, rows, &bias_values);
            for tokens in [1, 2, 3, 8, 9, 16, 17, 32, 33, 66] {
                let x = noise_of(backend, tokens as u64, tokens * cols);
                let what = format!("[{rows}, {cols}] with {tokens} tokens");
                let found = run(backend, (&x, cols), &weight, None, rows);
                assert_close(&found, &product(&x, &values, None, cols), allowed, &what);
                let found = run(backend, (&x, cols), &weight, Some(&bias), rows);
                let expected = product(&x, &values, Some(&bias_values), cols);
                assert_close(&found, &expected, allowed, &what);
            }
        }
    }
}

/// What is computed for products alone gives the same products, to the last bit, though it may be rounded earlier.
pub(crate) fn dedicated_rows_give_the_same_products<B: Backend>(backend: &mut B) {
    backend.expect_weights(1 << 22).expect("little memory");
    for (rows, cols) in [(33, 48), (96, 512), (64, 4096), (16, 14_336)] {
        let (source, _) = stored_in_8_bits(rows, cols, true);
        let weight = backend.load_weight(source).expect("sizes fit");
        let values = noise_of(backend, 1, cols);
        let norm = plain(backend, cols, &values);
        for tokens in [0, 1, 3, 17, 70] {
            let [x, y] = [2, 3].map(|seed| noise_of(backend, seed, tokens * cols));
            let products = |backend: &mut B, dedicated: bool| {
                let weights: &[&B::Weight] = if dedicated { &[&weight] } else { &[] };
                let mut out = backend.tensor(tokens, rows);
                let mut found = Vec::new();
                let mut normed = backend.tensor(tokens, cols);
                let (mut x, y) = (upload(backend, cols, &x), upload(backend, cols, &y));
                backend.dedicate(&mut normed, weights);
                backend.rms_norm(&x, &norm, 1e-5, &mut normed);
                backend.linear(&normed, &weight, None, &mut out);
                found.extend(backend.to_host(&out));
                backend.add_rms_norm((&mut x, &y), &norm, 1e-5, &mut normed);
                backend.linear(&normed, &weight, None, &mut out);
                found.extend(backend.to_host(&out));
                found.extend(backend.to_host(&x));
                backend.dedicate(&mut x, weights);
                backend.silu_mul(&mut x, &y);
                backend.linear(&x, &weight, None, &mut out);
                found.extend(backend.to_host(&out));
                found
            };
            let (found, expected) = (products(backend, true), products(backend, false));
            let what = format!("[{rows}, {cols}] with {tokens} tokens");
            assert_same_bits(&found, &expected, &what);
        }
    }
}

pub(crate) fn eight_bit_weights_of_the_wrong_size_are_refused<B: Backend>(backend: &mut B) {
    for (count, scales) in [(31, vec![1.0]), (32, vec![1.0; 3]), (32, vec![])] {
        let source = WeightSource {
            name: "narrow".to_owned(),
            rows: 2,
            cols: 16,
            dtype: WeightDtype::F8E4m3,
            bytes: WeightBytes::Owned(vec![0; count].into()),
            scales: Some(scales.into()),
        };
        let refused = backend.load_weight(source).expect_err("it does not fit");
        assert!(matches!(refused, BackendError::Weight { .. }), "{refused}");
    }
}

pub(crate) fn linear_rows_are_bit_equal_in_any_batch<B: Backend>(backend: &mut B) {
    for dtype in DTYPES {
        let (rows, tokens) = (13, 150);
        let cols = 1536 / columns(dtype) * columns(dtype);
        let (source, _) = stored(dtype, rows, cols, 6);
        let weight = backend.load_weight(source).expect("sizes fit");
        let x = noise(7, tokens * cols);
        let all = run(backend, (&x, cols), &weight, None, rows);
        for count in [1, 2, 3, 4, 5, 7, 64] {
            let start = tokens / 2 - count / 2;
            let some = &x[start * cols..(start + count) * cols];
            let found = run(backend, (some, cols), &weight, None, rows);
            let expected = &all[start * rows..(start + count) * rows];
            assert_agree(
                backend,
                &found,
                expected,
                &format!("{dtype:?}, {count} of {tokens}"),
            );
        }
    }
}

pub(crate) fn weights_of_the_wrong_size_are_refused<B: Backend>(backend: &mut B) {
    for dtype in DTYPES {
        let (source, _) = stored(dtype, 2, columns(dtype), 8);
        for (rows, cols) in [
            (3, source.cols),
            (1, source.cols),
            (2, source.cols + 1),
            (usize::MAX, source.cols),
            (2, usize::MAX / 256 * 256),
        ] {
            let wrong = WeightSource {
                rows,
                cols,
                ..source.clone()
            };
            let refused = backend.load_weight(wrong).expect_err("sizes do not fit");
            let BackendError::Weight { name, .. } = refused else {
                panic!("{refused} is another error");
            };
            assert_eq!(name, format!("{dtype:?}"));
        }
    }
}

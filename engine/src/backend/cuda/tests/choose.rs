//! Drawn tokens are those that the filters leave, where the running sum of weights passes.

use super::*;
use crate::backend::conformance::noise;
use crate::backend::{Carried, Draw, RowWish, SequenceSpan};

/// Weights are cut to units of 2^-40 and exponentials are off by some 1e-6.
const SHARE_TOLERANCE: f64 = 1e-4;

/// Runs a step whose logits are the product of `logits [R, V]` with a unit matrix, so that they come out as given.
fn chosen(
    backend: &mut CudaBackend,
    logits: &[f32],
    vocab: usize,
    wishes: &[RowWish],
) -> StepOutput {
    let tokens = vec![0; wishes.len()];
    begin(backend, logits, vocab, (wishes, &tokens), &[]);
    backend.finish_step().unwrap()
}

/// Begins such a step, whose rows compute these tokens.
pub(super) fn begin(
    backend: &mut CudaBackend,
    logits: &[f32],
    vocab: usize,
    (wishes, tokens): (&[RowWish], &[TokenId]),
    carried: &[Carried],
) {
    let rows = wishes.len();
    let batch = StepBatch {
        tokens: tokens.to_vec(),
        positions: vec![0; rows],
        sequences: (0..rows)
            .map(|row| SequenceSpan {
                rows: row..row + 1,
                past_len: 0,
                blocks: vec![0],
            })
            .collect(),
        logit_rows: (0..rows).collect(),
    };
    let wish = StepWish {
        repeatable: false,
        rows: wishes,
        carried,
    };
    let step = backend.begin_step(&batch, wish, &mut |backend, _| {
        let out = backend.wide_tensor(rows, vocab);
        let buffer = out.buffer.as_ref().unwrap();
        backend
            .gpu
            .upload(buffer.memory(), 0, bytemuck::cast_slice(logits))
            .unwrap();
        Ok(Some(out))
    });
    assert_eq!(step.unwrap(), None);
}

/// A device with a page, which its steps never touch.
pub(super) fn with_a_page() -> Option<CudaBackend> {
    let mut backend = gpu()?;
    let shape = PageShape {
        layers: 1,
        kv_heads: 1,
        tokens_per_block: 16,
        head_dim: 64,
        dtype: crate::page::KvDtype::F16,
    };
    backend.allocate_pages(shape, 1).unwrap();
    Some(backend)
}

/// Whether a token may be what a draw gives: weights in `f64`, kept as the host's sampler keeps them.
pub(super) fn check(logits: &[f32], draw: &Draw, token: TokenId) {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |token: usize| {
        ((f64::from(logits[token]) - f64::from(best)) / f64::from(draw.temperature)).exp()
    };
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if draw.top_k > 0 {
        order.truncate(draw.top_k as usize);
    }
    let total: f64 = order.iter().map(|&token| weight(token)).sum();
    // A token at the edge of top-p or min-p may be in or out.
    let (mut mass, mut surely, mut maybe) = (0.0, Vec::new(), Vec::new());
    for &token in &order {
        let before = mass / total - f64::from(draw.top_p);
        let above = weight(token) - f64::from(draw.min_p);
        if before < SHARE_TOLERANCE && above > -SHARE_TOLERANCE {
            maybe.push(token);
        }
        if before < -SHARE_TOLERANCE && above > SHARE_TOLERANCE {
            surely.push(token);
        }
        mass += weight(token);
    }
    let token = token as usize;
    assert!(
        maybe.contains(&token),
        "{draw:?} gave {token}, which is not left"
    );
    let kept: f64 = surely.iter().map(|&token| weight(token)).sum();
    let slack: f64 = maybe.iter().map(|&token| weight(token)).sum::<f64>() - kept;
    let before: f64 = maybe
        .iter()
        .filter(|&&other| other < token)
        .map(|&other| weight(other))
        .sum();
    let allowed = slack + SHARE_TOLERANCE * (kept + slack);
    let at = draw.uniform * kept;
    assert!(
        at >= before - slack - allowed && at <= before + weight(token) + allowed,
        "{draw:?} gave {token}: {at} is not within {before} and {}",
        before + weight(token)
    );
}

#[test]
fn draws_are_those_of_the_definition() {
    let Some(mut backend) = with_a_page() else {
        return;
    };
    for vocab in [1, 2, 31, 1000, 1025, 32_000, 128_256] {
        let filters = [
            (0, 1.0, 0.0),
            (1, 1.0, 0.0),
            (7, 1.0, 0.0),
            (0, 0.9, 0.0),
            (0, 0.1, 0.0),
            (40, 0.5, 0.0),
            (0, 1.0, 0.3),
            (40, 0.95, 0.05),
        ];
        let mut draws = Vec::new();
        for (index, uniform) in [0.0, 0.25, 0.5, 0.999_999].into_iter().enumerate() {
            for (top_k, top_p, min_p) in filters {
                let temperature = [0.3, 0.8, 1.0, 2.0][index];
                draws.push(Draw {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    uniform,
                });
            }
        }
        for steps in [1.0, 40.0] {
            // Coarse ones have many equal logits.
            let logits: Vec<f32> = noise(vocab as u64, draws.len() * vocab)
                .iter()
                .map(|value| {
                    if steps > 1.0 {
                        (value * steps).round() / 8.0
                    } else {
                        value * 6.0
                    }
                })
                .collect();
            let wishes: Vec<RowWish> = draws.iter().map(|&draw| RowWish::draw(draw)).collect();
            let output = chosen(&mut backend, &logits, vocab, &wishes);
            assert!(output.values.is_empty());
            for ((draw, row), token) in draws
                .iter()
                .zip(logits.chunks_exact(vocab))
                .zip(output.chosen)
            {
                check(row, draw, token.unwrap());
            }
        }
    }
}

#[test]
fn rows_that_are_not_finite_go_to_the_host() {
    let Some(mut backend) = with_a_page() else {
        return;
    };
    let vocab = 100;
    let mut logits = noise(1, 4 * vocab);
    logits[vocab + 7] = f32::NAN;
    logits[2 * vocab + 99] = f32::NEG_INFINITY;
    let output = chosen(&mut backend, &logits, vocab, &[const { RowWish::BEST }; 4]);
    let known: Vec<bool> = output.chosen.iter().map(Option::is_some).collect();
    assert_eq!(known, [true, false, false, true]);
    assert_eq!(output.values.len(), 2 * vocab);
    assert!(output.values[7].is_nan());
    assert_eq!(output.values[vocab..], logits[2 * vocab..3 * vocab]);
}

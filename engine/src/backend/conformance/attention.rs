//! Attention over paged KV, and what is written to the pages.

use half::{bf16, f16};

use super::*;
use crate::backend::{AttentionSpec, SequenceSpan, StepBatch, e4m3};
use crate::page::{KvDtype, PageShape};

/// Softmax and sums of at most some hundred values below 1 in `f32`.
const TOLERANCE: f64 = 2e-6;

/// One sequence's inputs for all its positions, `[T, heads * D]` each.
struct Sequence {
    len: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Shapes of one case.
#[derive(Debug, Clone, Copy)]
struct Case {
    heads: usize,
    shape: PageShape,
    window: Option<usize>,
}

impl Case {
    fn new(group: usize, kv_heads: usize, head_dim: usize, tokens_per_block: usize) -> Self {
        let shape = PageShape {
            layers: 2,
            kv_heads,
            tokens_per_block,
            head_dim,
            dtype: KvDtype::F32,
        };
        Self {
            heads: group * kv_heads,
            shape,
            window: None,
        }
    }

    fn with(self, dtype: KvDtype, window: Option<usize>) -> Self {
        let shape = PageShape {
            dtype,
            ..self.shape
        };
        Self {
            shape,
            window,
            ..self
        }
    }

    fn spec(&self) -> AttentionSpec {
        AttentionSpec {
            layer: 1,
            heads: self.heads,
            scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
            window: self.window,
        }
    }

    fn sequence<B: Backend>(&self, backend: &B, seed: u64, len: usize) -> Sequence {
        let (wide, narrow) = (self.heads, self.shape.kv_heads);
        let of = |seed, heads| noise_of(backend, seed, len * heads * self.shape.head_dim);
        // Scores of some size, so that the softmax is not flat and the maximum moves.
        let q = of(seed, wide).iter().map(|q| q * 8.0).collect();
        Sequence {
            len,
            q,
            k: of(seed + 1, narrow),
            v: of(seed + 2, narrow),
        }
    }

    /// A value as the page's dtype keeps it.
    fn kept(&self, value: f32) -> f64 {
        f64::from(match self.shape.dtype {
            KvDtype::F32 => value,
            KvDtype::F16 => f16::from_f32(value).to_f32(),
            KvDtype::Bf16 => bf16::from_f32(value).to_f32(),
            KvDtype::Fp8 => e4m3::decode(e4m3::encode(value)),
        })
    }

    fn reference(&self, sequence: &Sequence) -> Vec<f64> {
        let dim = self.shape.head_dim;
        let narrow = self.shape.kv_heads * dim;
        let mut out = Vec::new();
        for position in 0..sequence.len {
            let start = self
                .window
                .map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..self.heads {
                let q = &sequence.q[(position * self.heads + head) * dim..][..dim];
                let kv_at = head / (self.heads / self.shape.kv_heads) * dim;
                let scores: Vec<f64> = (start..=position)
                    .map(|key| &sequence.k[key * narrow + kv_at..][..dim])
                    .map(|k| {
                        q.iter()
                            .zip(k)
                            .map(|(q, k)| f64::from(*q) * self.kept(*k))
                            .sum()
                    })
                    .map(|sum: f64| sum * f64::from(self.spec().scale))
                    .collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> =
                    scores.iter().map(|score| (score - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..dim).map(|i| {
                    let value = |key: usize| self.kept(sequence.v[key * narrow + kv_at + i]);
                    let pairs = weights.iter().zip(start..);
                    pairs.map(|(weight, key)| weight * value(key)).sum::<f64>() / total
                }));
            }
        }
        out
    }
}

/// A part of a sequence in a step: which sequence, from which position, how many.
type Part = (usize, usize, usize);

fn index32(index: usize) -> u32 {
    u32::try_from(index).expect("a test's indices are small")
}

/// Feeds the parts step by step; returns each sequence's output. Blocks of the sequences are interleaved.
fn run<B: Backend>(
    backend: &mut B,
    case: &Case,
    sequences: &[Sequence],
    steps: &[Vec<Part>],
) -> Vec<Vec<f32>> {
    let blocks = blocks_each(case, sequences) * sequences.len();
    backend
        .allocate_pages(case.shape, blocks)
        .expect("a small pool");
    feed(backend, case, sequences, steps)
}

/// The same on pages full of NaN.
fn run_on_stale<B: Backend>(
    backend: &mut B,
    case: &Case,
    sequences: &[Sequence],
    steps: &[Vec<Part>],
) -> Vec<Vec<f32>> {
    let blocks = blocks_each(case, sequences) * sequences.len();
    backend
        .allocate_pages(case.shape, blocks)
        .expect("a small pool");
    for block in (0..).take(blocks) {
        let mut page = backend.lend_page(block);
        // All ones are NaN in every type.
        let all_ones = vec![0xff; case.shape.bytes()];
        page.write(0, &all_ones).expect("a page of this device");
        backend.return_page(block, page);
    }
    feed(backend, case, sequences, steps)
}

fn blocks_each(case: &Case, sequences: &[Sequence]) -> usize {
    let longest = sequences.iter().map(|sequence| sequence.len).max();
    longest.unwrap_or(0).div_ceil(case.shape.tokens_per_block)
}

fn feed<B: Backend>(
    backend: &mut B,
    case: &Case,
    sequences: &[Sequence],
    steps: &[Vec<Part>],
) -> Vec<Vec<f32>> {
    let dim = case.shape.head_dim;
    let (wide, narrow) = (case.heads * dim, case.shape.kv_heads * dim);
    let per_sequence = blocks_each(case, sequences);
    let mut outs = vec![Vec::new(); sequences.len()];
    for parts in steps {
        let mut batch = StepBatch::default();
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        for &(index, past_len, count) in parts {
            let first = batch.tokens.len();
            let blocks = (0..per_sequence).map(|block| block * sequences.len() + index);
            batch.tokens.resize(first + count, 0);
            batch
                .positions
                .extend((past_len..past_len + count).map(index32));
            batch.sequences.push(SequenceSpan {
                rows: first..first + count,
                past_len,
                blocks: blocks.map(index32).collect(),
            });
            let sequence = &sequences[index];
            q.extend(&sequence.q[past_len * wide..(past_len + count) * wide]);
            k.extend(&sequence.k[past_len * narrow..(past_len + count) * narrow]);
            v.extend(&sequence.v[past_len * narrow..(past_len + count) * narrow]);
        }
        let (q, k, v) = (
            upload(backend, wide, &q),
            upload(backend, narrow, &k),
            upload(backend, narrow, &v),
        );
        backend.write_kv(1, &batch, &k, &v);
        let mut out = backend.tensor(batch.tokens.len(), wide);
        backend.attention(&case.spec(), &batch, &q, &mut out);
        let out = backend.to_host(&out);
        for (&(index, ..), span) in parts.iter().zip(&batch.sequences) {
            outs[index].extend(&out[span.rows.start * wide..span.rows.end * wide]);
        }
    }
    outs
}

pub(crate) fn attention_matches_the_reference<B: Backend>(backend: &mut B) {
    let cases = [
        (Case::new(1, 1, 8, 1), 9),
        (Case::new(3, 3, 64, 32), 70),
        (Case::new(4, 2, 80, 16), 67),
        (Case::new(2, 1, 128, 5), 34),
        (Case::new(7, 2, 24, 64), 130),
    ];
    for (case, len) in cases {
        for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Fp8] {
            for window in [None, Some(1), Some(33), Some(1000)] {
                let case = case.with(dtype, window);
                let sequences = [1, len].map(|len| case.sequence(backend, len as u64, len));
                let step = vec![(0, 0, 1), (1, 0, len)];
                let found = run(backend, &case, &sequences, &[step]);
                for (found, sequence) in found.iter().zip(&sequences) {
                    let what = format!("{case:?}, {}", sequence.len);
                    let allowed = attention_tolerance(backend, dtype, TOLERANCE);
                    assert_close(found, &case.reference(sequence), allowed, &what);
                }
            }
        }
    }
}

pub(crate) fn attention_is_bit_equal_alone_batched_and_chunked<B: Backend>(backend: &mut B) {
    for (dtype, window) in [
        (KvDtype::F32, None),
        (KvDtype::F16, Some(40)),
        (KvDtype::Bf16, None),
        (KvDtype::Fp8, None),
    ] {
        let case = Case::new(3, 2, 64, 16).with(dtype, window);
        let allowed = attention_tolerance(backend, dtype, 0.0);
        let lens = [100, 37, 64];
        let sequences =
            [0, 1, 2].map(|index| case.sequence(backend, 10 * index as u64, lens[index]));
        let alone: Vec<Vec<f32>> = sequences
            .iter()
            .map(|sequence| {
                let one = std::slice::from_ref(sequence);
                run(backend, &case, one, &[vec![(0, 0, sequence.len)]]).remove(0)
            })
            .collect();
        let together = vec![vec![(0, 0, 100), (1, 0, 37), (2, 0, 64)]];
        let chunked = vec![
            vec![(0, 0, 33), (2, 0, 1)],
            vec![(2, 1, 31), (1, 0, 5), (0, 33, 32)],
            vec![(0, 65, 35), (1, 5, 32), (2, 32, 32)],
        ];
        let decoded = (0..100)
            .map(|position| {
                let alive = (0..3).filter(|index| position < lens[*index]);
                alive.map(|index| (index, position, 1)).collect()
            })
            .collect();
        for steps in [together, chunked, decoded] {
            let found = run(backend, &case, &sequences, &steps);
            for (found, alone) in found.iter().zip(&alone) {
                let what = format!("{dtype:?} in {} steps", steps.len());
                assert_agree_within(backend, allowed, (found, alone), &what);
            }
        }
        let other = Case {
            shape: PageShape {
                tokens_per_block: 7,
                ..case.shape
            },
            ..case
        };
        let found = run(backend, &other, &sequences[..1], &[vec![(0, 0, 100)]]);
        let pair = (found[0].as_slice(), alone[0].as_slice());
        assert_agree_within(backend, allowed, pair, "with other blocks");
    }
}

/// Head sizes, groups and lengths of real models, where several tiles, splits and blocks meet.
pub(crate) fn large_heads_match_the_reference<B: Backend>(backend: &mut B) {
    let cases = [
        (Case::new(4, 2, 128, 32), 300),
        (Case::new(8, 1, 64, 16), 260),
        (Case::new(20, 1, 128, 32), 150),
        (Case::new(1, 2, 128, 64), 129),
        (Case::new(2, 1, 128, 256), 300),
        (Case::new(2, 1, 128, 20), 270),
    ];
    for (case, len) in cases {
        for dtype in [KvDtype::F16, KvDtype::Bf16, KvDtype::Fp8] {
            for window in [None, Some(100)] {
                let case = case.with(dtype, window);
                let sequences = [len, 40].map(|len| case.sequence(backend, len as u64, len));
                // A prompt in two chunks, the second beside another's first, then single tokens.
                let mut steps = vec![vec![(0, 0, 130.min(len - 9))]];
                steps.push(vec![
                    (1, 0, 33),
                    (0, 130.min(len - 9), len - 9 - 130.min(len - 9)),
                ]);
                steps[1].retain(|&(_, _, count)| count > 0);
                steps.extend((0..7).map(|step| vec![(0, len - 9 + step, 1), (1, 33 + step, 1)]));
                steps.push(vec![(0, len - 2, 2)]);
                let found = run(backend, &case, &sequences, &steps);
                for (found, sequence) in found.iter().zip(&sequences) {
                    let what = format!("{case:?}, {}", sequence.len);
                    let allowed = attention_tolerance(backend, dtype, TOLERANCE);
                    assert_close(found, &case.reference(sequence), allowed, &what);
                }
            }
        }
    }
}

/// Blocks are used again: whatever they hold beyond a sequence's end, NaN included, must not be seen.
pub(crate) fn attention_ignores_what_pages_held_before<B: Backend>(backend: &mut B) {
    for (case, dtype) in [
        (Case::new(2, 1, 16, 16), KvDtype::F32),
        (Case::new(4, 2, 64, 16), KvDtype::F16),
        (Case::new(4, 1, 128, 32), KvDtype::Bf16),
        (Case::new(4, 1, 128, 32), KvDtype::Fp8),
        (Case::new(4, 1, 64, 32), KvDtype::Fp8),
    ] {
        let case = case.with(dtype, None);
        let sequence = [case.sequence(backend, 1, 60)];
        let mut steps = vec![vec![(0, 0, 20)], vec![(0, 20, 30)]];
        steps.extend((50..60).map(|position| vec![(0, position, 1)]));
        let expected = run(backend, &case, &sequence, &steps).remove(0);
        let found = run_on_stale(backend, &case, &sequence, &steps).remove(0);
        assert_same_bits(&found, &expected, &format!("{case:?}"));
    }
}

/// A backend that computes rows in tiles lets a NaN through to earlier rows of the same step, whose request is lost anyway.
pub(crate) fn attention_ignores_what_it_must_not_see<B: Backend>(backend: &mut B) {
    if !backend.capability().batch_invariant {
        eprintln!("skipped: rows of a step are computed together");
        return;
    }
    let case = Case::new(2, 1, 16, 16);
    let clean = case.sequence(backend, 1, 60);
    let mut poisoned = case.sequence(backend, 1, 60);
    for values in [&mut poisoned.k, &mut poisoned.v] {
        values[50 * 16..].fill(f32::NAN);
    }
    let steps = [vec![(0, 0, 60)]];
    let expected = run(backend, &case, &[clean], &steps).remove(0);
    let found = run(backend, &case, &[poisoned], &steps).remove(0);
    assert_same_bits(
        &found[..50 * 32],
        &expected[..50 * 32],
        "positions before the first NaN",
    );
    assert!(
        found[50 * 32..].iter().all(|value| value.is_nan()),
        "a NaN that is seen shows"
    );
}

pub(crate) fn written_kv_is_rounded_to_nearest_even<B: Backend>(backend: &mut B) {
    // Half-way cases of both formats, a number past f16's largest, subnormals.
    let values = [
        1.0 + 1.0 / 2048.0,
        1.0 + 3.0 / 2048.0,
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        70_000.0,
        6e-8,
        -0.0,
        1e-40,
    ];
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16, KvDtype::Fp8] {
        let case = Case::new(1, 2, 4, 2).with(dtype, None);
        backend.allocate_pages(case.shape, 2).expect("a small pool");
        let (k, v) = (upload(backend, 8, &values), upload(backend, 8, &[2.0; 8]));
        let batch = StepBatch {
            tokens: vec![0],
            positions: vec![3],
            sequences: vec![SequenceSpan {
                rows: 0..1,
                past_len: 3,
                blocks: vec![1, 0],
            }],
            logit_rows: Vec::new(),
        };
        backend.write_kv(1, &batch, &k, &v);
        let page = backend
            .share_page(0)
            .copied()
            .expect("a page of this device");
        let found: Vec<f64> = match dtype {
            KvDtype::F32 => page.as_f32().iter().map(|x| f64::from(*x)).collect(),
            KvDtype::F16 => page
                .as_f16()
                .iter()
                .map(|x| f64::from(x.to_f32()))
                .collect(),
            KvDtype::Bf16 => page
                .as_bf16()
                .iter()
                .map(|x| f64::from(x.to_f32()))
                .collect(),
            KvDtype::Fp8 => page
                .as_bytes()
                .iter()
                .map(|&bits| f64::from(e4m3::decode(bits)))
                .collect(),
        };
        let mut expected = vec![0.0; case.shape.len()];
        let values = held(backend, values.to_vec());
        for (index, value) in values.into_iter().enumerate() {
            // `[L, 2, K, P, D]`: layer 1, slot 1 of 2.
            let at = |side: usize| (((2 + side) * 2 + index / 4) * 2 + 1) * 4 + index % 4;
            expected[at(0)] = case.kept(value);
            expected[at(1)] = 2.0;
        }
        assert_eq!(found, expected, "{dtype:?}");
        let other = backend
            .share_page(1)
            .copied()
            .expect("a page of this device");
        assert!(other.as_bytes().iter().all(|byte| *byte == 0));
    }
}

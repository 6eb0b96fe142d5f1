//! Each hot operation of the CPU backend on the shapes of a 135-million-parameter model: 576 wide, nine heads over
//! three KV heads of 64, 1536 feed-forward, 49152 tokens.
//!
//! A case is verified before it is timed. Throughput is in elements: multiply-adds for products and attention (twice
//! that is FLOP), numbers for the rest; the weight's bytes a call are in the case's name. Weights rotate through more
//! memory than the caches hold, as they do in a model.
#![expect(missing_docs, reason = "criterion's macro makes a public function")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use baton_engine::backend::cpu::{CpuBackend, CpuTensor, CpuWeight};
use baton_engine::backend::{
    AttentionSpec, Backend, RopePairing, RopeTable, SequenceSpan, StepBatch, WeightBytes,
    WeightDtype, WeightSource,
};
use baton_engine::page::{KvDtype, PageShape};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const WIDTH: usize = 576;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const FFN: usize = 1536;
const VOCAB: usize = 49_152;
/// Weights are copied until they take this much.
const COLD_BYTES: usize = 64 << 20;

fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn tensor(backend: &CpuBackend, rows: usize, cols: usize) -> CpuTensor {
    let mut tensor = backend.tensor(rows, cols);
    tensor.values_mut().copy_from_slice(&noise(1, rows * cols));
    tensor
}

/// Weights and bytes of a block, and where its half-precision numbers are.
fn layout(dtype: WeightDtype) -> (usize, usize, &'static [usize]) {
    match dtype {
        WeightDtype::F32 => (1, 4, &[]),
        WeightDtype::F16 => (1, 2, &[0]),
        WeightDtype::Bf16 => (1, 2, &[]),
        WeightDtype::F8E4m3 => (1, 1, &[]),
        WeightDtype::Q4_0 => (32, 18, &[0]),
        WeightDtype::Q4_1 => (32, 20, &[0, 2]),
        WeightDtype::Q5_0 => (32, 22, &[0]),
        WeightDtype::Q5_1 => (32, 24, &[0, 2]),
        WeightDtype::Q8_0 => (32, 34, &[0]),
        WeightDtype::Q2_K => (256, 84, &[80, 82]),
        WeightDtype::Q3_K => (256, 110, &[108]),
        WeightDtype::Q4_K => (256, 144, &[0, 2]),
        WeightDtype::Q5_K => (256, 176, &[0, 2]),
        WeightDtype::Q6_K => (256, 210, &[208]),
    }
}

/// A weight of arbitrary integers under a scale of about 0.01.
fn weight(backend: &mut CpuBackend, rows: usize, cols: usize, dtype: WeightDtype) -> CpuWeight {
    let (block, size, halves) = layout(dtype);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut bytes = vec![0_u8; rows * cols / block * size];
    match dtype {
        WeightDtype::F32 => {
            let values = noise(2, rows * cols);
            bytes.copy_from_slice(bytemuck::cast_slice(&values));
        }
        WeightDtype::Bf16 => {
            for (bytes, value) in bytes.chunks_exact_mut(2).zip(noise(2, rows * cols)) {
                bytes.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
            }
        }
        _ => {
            rng.fill(&mut bytes[..]);
            for block in bytes.chunks_exact_mut(size) {
                for at in halves {
                    let scale = f16::from_f32(rng.random_range(0.005..0.015));
                    block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
                }
            }
        }
    }
    let source = WeightSource {
        name: "bench".to_owned(),
        rows,
        cols,
        dtype,
        scales: (dtype == WeightDtype::F8E4m3).then(|| Arc::from([0.01])),
        bytes: WeightBytes::Owned(Arc::from(bytes)),
    };
    backend.load_weight(source).expect("sizes fit")
}

/// Compares some results with sums in `f64` over the decoded rows.
fn verify_linear(backend: &CpuBackend, x: &CpuTensor, weight: &CpuWeight, out: &CpuTensor) {
    let cols = x.cols();
    for row in [0, out.cols() / 2 + 1, out.cols() - 1] {
        let mut decoded = backend.tensor(1, cols);
        let index = u32::try_from(row).expect("rows are few");
        backend.embed(weight, &[index], &mut decoded);
        for token in [0, x.rows() - 1] {
            let x = &x.values()[token * cols..(token + 1) * cols];
            let pairs = x.iter().zip(decoded.values());
            let products = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w));
            let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
            let found = f64::from(out.values()[token * out.cols() + row]);
            let error = (found - sum).abs();
            assert!(
                error <= 1e-6 * size,
                "row {row} of token {token} is {found}, not {sum}"
            );
        }
    }
}

fn linear(criterion: &mut Criterion) {
    let mut backend = CpuBackend::new(None);
    let legacy = [
        WeightDtype::Q4_1,
        WeightDtype::Q4_0,
        WeightDtype::Q8_0,
        WeightDtype::F16,
    ];
    let others = [
        WeightDtype::Bf16,
        WeightDtype::F32,
        WeightDtype::Q5_0,
        WeightDtype::Q5_1,
    ];
    let k_quants = [
        WeightDtype::Q4_K,
        WeightDtype::Q6_K,
        WeightDtype::Q2_K,
        WeightDtype::Q3_K,
        WeightDtype::Q5_K,
    ];
    let cases = legacy
        .into_iter()
        .flat_map(|dtype| {
            [
                (dtype, WIDTH, WIDTH),
                (dtype, FFN, WIDTH),
                (dtype, WIDTH, FFN),
            ]
        })
        .chain(others.map(|dtype| (dtype, FFN, WIDTH)))
        .chain(k_quants.map(|dtype| (dtype, WIDTH, FFN)))
        .chain([(WeightDtype::Q8_0, VOCAB, WIDTH)]);
    for (dtype, rows, cols) in cases {
        let (block, size, _) = layout(dtype);
        let weight_bytes = rows * cols / block * size;
        let copies = COLD_BYTES.div_ceil(weight_bytes);
        let weights: Vec<CpuWeight> = (0..copies)
            .map(|_| weight(&mut backend, rows, cols, dtype))
            .collect();
        let name = format!(
            "linear/{dtype:?}/{rows}x{cols} of {} KB",
            weight_bytes / 1000
        );
        let mut group = criterion.benchmark_group(name);
        for tokens in [1, 8, 512] {
            if tokens == 512 && rows == VOCAB {
                continue;
            }
            let x = tensor(&backend, tokens, cols);
            let mut out = backend.tensor(tokens, rows);
            backend.linear(&x, &weights[0], None, &mut out);
            verify_linear(&backend, &x, &weights[0], &out);
            group.throughput(Throughput::Elements((rows * cols * tokens) as u64));
            let mut turn = 0;
            group.bench_function(
                BenchmarkId::from_parameter(format!("T={tokens}")),
                |bencher| {
                    bencher.iter(|| {
                        turn = (turn + 1) % copies;
                        backend.linear(&x, &weights[turn], None, &mut out);
                        black_box(&out);
                    });
                },
            );
        }
    }
}

/// Sequences of `past + count` tokens each, in blocks of their own.
fn batch(sequences: usize, past_len: usize, count: usize, per_block: usize) -> StepBatch {
    let index32 = |index: usize| u32::try_from(index).expect("indices are small");
    let mut batch = StepBatch::default();
    let blocks = (past_len + count).div_ceil(per_block);
    for sequence in 0..sequences {
        let first = batch.tokens.len();
        batch.tokens.resize(first + count, 0);
        batch
            .positions
            .extend((past_len..past_len + count).map(index32));
        batch.sequences.push(SequenceSpan {
            rows: first..first + count,
            past_len,
            blocks: (sequence * blocks..(sequence + 1) * blocks)
                .map(index32)
                .collect(),
        });
    }
    batch
}

fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
        for (sequences, past_len, count) in [
            (1_usize, 511_usize, 1),
            (8, 511, 1),
            (1, 0, 512),
            (1, 4095, 1),
        ] {
            let mut backend = CpuBackend::new(None);
            let shape = PageShape {
                layers: 1,
                kv_heads: KV_HEADS,
                tokens_per_block: 32,
                head_dim: HEAD_DIM,
                dtype,
            };
            let pool = sequences * (past_len + count).div_ceil(32);
            backend.allocate_pages(shape, pool).expect("a small pool");
            let fill = batch(sequences, 0, past_len + count, 32);
            let values = tensor(&backend, fill.tokens.len(), KV_HEADS * HEAD_DIM);
            backend.write_kv(0, &fill, &values, &values);
            let step = batch(sequences, past_len, count, 32);
            let q = tensor(&backend, step.tokens.len(), HEADS * HEAD_DIM);
            let mut out = backend.tensor(step.tokens.len(), HEADS * HEAD_DIM);
            let spec = AttentionSpec {
                layer: 0,
                heads: HEADS,
                scale: 0.125,
                window: None,
            };
            backend.attention(&spec, &step, &q, &mut out);
            verify_attention(&step, &q, &values, &out);
            let keys: usize = (0..count).map(|index| past_len + index + 1).sum();
            let multiply_adds = 2 * keys * sequences * HEADS * HEAD_DIM;
            group.throughput(Throughput::Elements(multiply_adds as u64));
            let name = format!("{}/S={sequences} past={past_len} T={count}", dtype.name());
            group.bench_function(name, |bencher| {
                bencher.iter(|| {
                    backend.attention(&spec, &step, &q, &mut out);
                    black_box(&out);
                });
            });
        }
    }
}

/// Compares the last row's last head with the definition; keys and values are the same numbers.
fn verify_attention(step: &StepBatch, q: &CpuTensor, kv: &CpuTensor, out: &CpuTensor) {
    let (last, head, width) = (step.tokens.len() - 1, HEADS - 1, HEADS * HEAD_DIM);
    let len = kv.rows() / step.sequences.len();
    let q = &q.values()[last * width + head * HEAD_DIM..][..HEAD_DIM];
    let rows = kv
        .values()
        .chunks_exact(KV_HEADS * HEAD_DIM)
        .skip(kv.rows() - len);
    let rows: Vec<&[f32]> = rows.map(|row| &row[(KV_HEADS - 1) * HEAD_DIM..]).collect();
    let score = |row: &&[f32]| q.iter().zip(*row).map(|(q, k)| q * k).sum::<f32>() * 0.125;
    let weights: Vec<f32> = rows.iter().map(score).map(f32::exp).collect();
    let total: f32 = weights.iter().sum();
    let first: f32 = weights
        .iter()
        .zip(&rows)
        .map(|(w, row)| w * row[0])
        .sum::<f32>()
        / total;
    let found = out.values()[last * width + head * HEAD_DIM];
    assert!(
        (found - first).abs() < 2e-3,
        "attention gives {found}, not {first}"
    );
}

fn rows(criterion: &mut Criterion) {
    let mut backend = CpuBackend::new(None);
    let shape = PageShape {
        layers: 1,
        kv_heads: KV_HEADS,
        tokens_per_block: 32,
        head_dim: HEAD_DIM,
        dtype: KvDtype::F16,
    };
    backend.allocate_pages(shape, 16).expect("a small pool");
    let norm = weight(&mut backend, 1, WIDTH, WeightDtype::F32);
    let table = RopeTable {
        inverse_frequencies: noise(3, HEAD_DIM / 2),
        pairing: RopePairing::Adjacent,
        magnitude: 1.0,
    };
    for tokens in [1, 512] {
        let step = batch(1, 0, tokens, 32);
        let x = tensor(&backend, tokens, WIDTH);
        let mut out = backend.tensor(tokens, WIDTH);
        let mut gate = tensor(&backend, tokens, FFN);
        let up = tensor(&backend, tokens, FFN);
        let kv = tensor(&backend, tokens, KV_HEADS * HEAD_DIM);
        let mut group = criterion.benchmark_group(format!("rows/T={tokens}"));
        group.throughput(Throughput::Elements((tokens * WIDTH) as u64));
        backend.rms_norm(&x, &norm, 1e-5, &mut out);
        let squares: f32 = x.values()[..WIDTH].iter().map(|x| x * x).sum();
        let expected = x.values()[0] / (squares / WIDTH as f32 + 1e-5).sqrt() * noise(2, 1)[0];
        assert!(
            (out.values()[0] - expected).abs() < 1e-5,
            "rms_norm gives {}",
            out.values()[0]
        );
        group.bench_function("rms_norm", |bencher| {
            bencher.iter(|| backend.rms_norm(&x, &norm, 1e-5, &mut out));
        });
        let before: f32 = out.values()[..2].iter().map(|x| x * x).sum();
        backend.rope(&mut out, &step.positions, &table);
        let after: f32 = out.values()[..2].iter().map(|x| x * x).sum();
        assert!((before - after).abs() < 1e-5, "a rotation keeps lengths");
        group.bench_function("rope", |bencher| {
            bencher.iter(|| backend.rope(&mut out, &step.positions, &table));
        });
        group.throughput(Throughput::Elements((tokens * FFN) as u64));
        let (g, u) = (gate.values()[5], up.values()[5]);
        backend.silu_mul(&mut gate, &up);
        let expected = g / (1.0 + (-g).exp()) * u;
        assert!(
            (gate.values()[5] - expected).abs() < 1e-6,
            "silu gives {}",
            gate.values()[5]
        );
        group.bench_function("silu_mul", |bencher| {
            bencher.iter(|| backend.silu_mul(&mut gate, &up));
        });
        group.throughput(Throughput::Elements(
            (2 * tokens * KV_HEADS * HEAD_DIM) as u64,
        ));
        backend.write_kv(0, &step, &kv, &kv);
        let written = backend.share_page(0).as_f16()[0];
        assert_eq!(written, f16::from_f32(kv.values()[0]));
        group.bench_function("write_kv", |bencher| {
            bencher.iter(|| backend.write_kv(0, &step, &kv, &kv));
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = linear, attention, rows
}
criterion_main!(benches);

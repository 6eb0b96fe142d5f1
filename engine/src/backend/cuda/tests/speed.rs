//! How fast kernels and a model of Llama-3.1-8B's shape are: run by `scripts/gpu/suite`, never as a part of the tests.
//!
//! Each kernel has been compared with its reference by the suite before; here the clock runs over replays of a recording, and
//! what is printed beside the time is the share of the bound that the kernel's header states.

mod answers;

use std::fs;
use std::path::Path;
use std::time::Instant;

use baton_configs::llm::{LlmOptions, LoadFormat};

use self::answers::{answer, with_engine};
use super::*;
use crate::backend::conformance::noise;
use crate::backend::{Draw, RowWish, SequenceSpan, WeightBytes, WeightDtype};
use crate::model::Model;
use crate::model::load::load;
use crate::page::KvDtype;
use crate::request::SamplingParams;

/// Datasheet of the H100 SXM: what bounds are shares of.
const BYTES_PER_US: f64 = 3.35e6;
const FLOP_PER_US: f64 = 989e6;

/// Microseconds of one of `act`'s calls, as part of a recording of 20.
fn micros(backend: &mut CudaBackend, mut act: impl FnMut(&mut CudaBackend, usize)) -> f64 {
    for index in 0..4 {
        act(backend, index);
    }
    backend.gpu.synchronize().unwrap();
    backend.gpu.begin_capture().unwrap();
    for index in 0..20 {
        act(backend, index);
    }
    let graph = backend.gpu.end_capture().unwrap();
    backend.check().unwrap();
    let mut times = Vec::new();
    for _ in 0..7 {
        let started = Instant::now();
        graph.launch().unwrap();
        backend.gpu.synchronize().unwrap();
        times.push(started.elapsed().as_secs_f64() * 1e6 / 20.0);
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn random_weight(backend: &mut CudaBackend, rows: usize, cols: usize) -> CudaWeight {
    let source = PatternSource {
        name: "w".to_owned(),
        rows,
        cols,
        dtype: WeightDtype::Bf16,
        values: noise(rows as u64, 65_521).into(),
        first: 0,
        stride: cols,
        scale: 1.0,
    };
    backend.load_pattern(&source).unwrap().unwrap()
}

fn random(backend: &mut CudaBackend, rows: usize, cols: usize) -> CudaTensor {
    let table = random_weight(backend, 64, cols);
    let tokens: Vec<u32> = (0..).take(rows).map(|row: u32| row % 64).collect();
    let mut out = backend.tensor(rows, cols);
    backend.embed(&table, &tokens, &mut out);
    out
}

#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn products() {
    let Some(mut backend) = gpu() else { return };
    for (rows, cols) in [
        (6144, 4096),
        (4096, 4096),
        (28672, 4096),
        (4096, 14336),
        (128_256, 4096),
    ] {
        // More copies than the cache holds.
        let copies = (256_usize << 20).div_ceil(rows * cols * 2).clamp(1, 8);
        let weights: Vec<_> = (0..copies)
            .map(|_| random_weight(&mut backend, rows, cols))
            .collect();
        for tokens in [1, 2, 3, 4, 5, 8, 16, 32, 64, 128, 256, 2048, 8192] {
            if tokens > 256 && rows > 100_000 {
                continue;
            }
            let x = random(&mut backend, tokens, cols);
            let out = backend.tensor(tokens, rows);
            let product = |weight: &CudaWeight| Product {
                x: x.address(),
                weight: weight.address(),
                bias: None,
                out: out.address(),
                scales: None,
                shape: ProductShape {
                    tokens,
                    cols,
                    rows,
                    ld_x: cols,
                    ld_out: rows,
                    wide: false,
                },
            };
            let library = micros(&mut backend, |backend, index| {
                let product = product(&weights[index % copies]);
                assert!(backend.linear.borrow_mut().run(&product).unwrap());
            });
            let own = if tokens > 8 {
                f64::NAN
            } else {
                micros(&mut backend, |backend, index| {
                    let product = product(&weights[index % copies]);
                    backend.ops.borrow_mut().linear(&product, None).unwrap();
                })
            };
            let bytes = (rows * cols + tokens * (rows + cols)) as f64 * 2.0;
            let bound = (bytes / BYTES_PER_US).max((2 * rows * cols * tokens) as f64 / FLOP_PER_US);
            eprintln!(
                "product [{rows}, {cols}] x {tokens}: library {library:.1} us ({:.0}% of bound), own {own:.1} us ({:.0}%)",
                100.0 * bound / library,
                100.0 * bound / own
            );
        }
    }
}

#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn products_8_bit() {
    let Some(mut backend) = gpu() else { return };
    for (rows, cols) in [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)] {
        // More copies than the cache holds.
        let copies = (256_usize << 20).div_ceil(rows * cols).clamp(1, 16);
        let mut weight = || {
            let source = PatternSource {
                name: "w".to_owned(),
                rows,
                cols,
                dtype: WeightDtype::F8E4m3,
                values: noise(rows as u64, 65_521).into(),
                first: 0,
                stride: cols,
                scale: 1.0 / 448.0,
            };
            backend.load_pattern(&source).unwrap().unwrap()
        };
        let weights: Vec<_> = (0..copies).map(|_| weight()).collect();
        for tokens in [1, 2, 3, 4, 5, 8, 16, 32, 64, 256, 2048, 8192] {
            let x = random(&mut backend, tokens, cols);
            let mut out = backend.tensor(tokens, rows);
            let all = micros(&mut backend, |backend, index| {
                backend.linear(&x, &weights[index % copies], None, &mut out);
            });
            let rounded = backend.rounded(&x).unwrap();
            let rounding = micros(&mut backend, |backend, _| {
                backend.ops.borrow_mut().quantize(&x, &rounded).unwrap();
            });
            let bytes = (rows * cols + 2 * tokens * (rows + cols)) as f64;
            let flops = (2 * rows * cols * tokens) as f64;
            let bound = (bytes / BYTES_PER_US).max(flops / (2.0 * FLOP_PER_US));
            eprintln!(
                "8-bit product [{rows}, {cols}] x {tokens}: {all:.1} us ({:.0}% of bound), of which rounding x {rounding:.1} us",
                100.0 * bound / all
            );
        }
    }
}

const PAGE: PageShape = PageShape {
    layers: 1,
    kv_heads: 8,
    tokens_per_block: 32,
    head_dim: 128,
    dtype: KvDtype::F16,
};

fn spans(sequences: usize, past_len: usize, rows: usize) -> StepBatch {
    let per_sequence = (past_len + rows).div_ceil(32);
    let mut batch = StepBatch::default();
    for index in 0..sequences {
        let first = batch.tokens.len();
        let blocks = index * per_sequence..(index + 1) * per_sequence;
        batch.tokens.resize(first + rows, 1);
        batch.positions.extend((small(past_len)..).take(rows));
        batch.sequences.push(SequenceSpan {
            rows: first..first + rows,
            past_len,
            blocks: blocks.map(small).collect(),
        });
        batch.logit_rows.push(first + rows - 1);
    }
    batch
}

#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn attention() {
    let Some(mut backend) = gpu() else { return };
    let (heads, dim) = (32, 128);
    for (sequences, past_len, rows) in [
        (1, 128, 1),
        (1, 1000, 1),
        (1, 8000, 1),
        (16, 1000, 1),
        (64, 1000, 1),
        (256, 192, 1),
        (256, 1000, 1),
        (1, 0, 128),
        (1, 0, 2048),
        (1, 0, 8192),
        (1, 8192, 2048),
        (4, 0, 2048),
    ] {
        let batch = spans(sequences, past_len, rows);
        let blocks = (past_len + rows).div_ceil(32) * sequences;
        backend.allocate_pages(PAGE, blocks).unwrap();
        let tokens = batch.tokens.len();
        let mut q = random(&mut backend, tokens, heads * dim);
        let mut k = random(&mut backend, tokens, 8 * dim);
        let v = random(&mut backend, tokens, 8 * dim);
        let mut out = backend.tensor(tokens, heads * dim);
        backend
            .staging
            .begin(&batch, Default::default(), 32)
            .unwrap();
        let table = RopeTable {
            inverse_frequencies: noise(1, 64),
            pairing: RopePairing::Halves,
            magnitude: 1.0,
        };
        let rope = micros(&mut backend, |backend, _| {
            backend.rope_write_kv(0, &batch, &table, (&mut q, &mut k, &v));
        });
        let spec = AttentionSpec {
            layer: 0,
            heads,
            scale: 0.09,
            window: None,
        };
        let time = micros(&mut backend, |backend, _| {
            backend.attention(&spec, &batch, &q, &mut out)
        });
        backend.staging.end();
        let seen: usize = (past_len + 1..=past_len + rows).sum::<usize>() * sequences;
        let bytes = (sequences * (past_len + rows) * 8 * dim * 4 + tokens * heads * dim * 4) as f64;
        let bound = (bytes / BYTES_PER_US).max((4 * dim * heads * seen) as f64 / FLOP_PER_US);
        eprintln!(
            "attention of {sequences} x {rows} rows behind {past_len}: {time:.1} us ({:.0}% of bound), rope and kv {rope:.1} us",
            100.0 * bound / time
        );
    }
}

#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn rows() {
    let Some(mut backend) = gpu() else { return };
    for tokens in [1, 16, 256, 2048, 8192] {
        let mut x = random(&mut backend, tokens, 4096);
        let y = random(&mut backend, tokens, 4096);
        let norm = random_weight(&mut backend, 1, 4096);
        let mut out = backend.tensor(tokens, 4096);
        let time = micros(&mut backend, |backend, _| {
            backend.add_rms_norm((&mut x, &y), &norm, 1e-5, &mut out);
        });
        let [mut gate, up] = backend.tensors(tokens, [14_336; 2]);
        let silu = micros(&mut backend, |backend, _| backend.silu_mul(&mut gate, &up));
        let bound = (tokens * 4096 * 8) as f64 / BYTES_PER_US;
        let silu_bound = (tokens * 14_336 * 6) as f64 / BYTES_PER_US;
        eprintln!(
            "{tokens} rows: sum and norm {time:.1} us ({:.0}% of bound), silu_mul {silu:.1} us ({:.0}%)",
            100.0 * bound / time,
            100.0 * silu_bound / silu
        );
    }
}

const LLAMA_8B: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":4096,"intermediate_size":14336,
"num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,"vocab_size":128256,
"max_position_embeddings":131072,"rms_norm_eps":1e-5,"rope_theta":500000.0,"hidden_act":"silu",
"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#;

/// What stands beside a checkpoint whose projections are in 8 bits.
const IN_8_BITS: &str = r#"{"quantization":{"quant_algo":"FP8"}}"#;

fn llama_8b(folder: &Path, backend: CudaBackend, in_8_bits: bool) -> Box<dyn Model> {
    fs::write(folder.join("config.json"), LLAMA_8B).unwrap();
    if in_8_bits {
        fs::write(folder.join("hf_quant_config.json"), IN_8_BITS).unwrap();
    }
    let options = LlmOptions {
        load_format: LoadFormat::Dummy,
        ..LlmOptions::default()
    };
    let spec = folder.to_str().unwrap();
    load(spec, &options, None, backend, &|_| {}).unwrap().model
}

fn median_ms(
    model: &mut dyn Model,
    wish: &RowWish,
    repeats: usize,
    mut step: impl FnMut(usize) -> StepBatch,
) -> f64 {
    let mut times = Vec::new();
    for index in 0..repeats + 3 {
        let batch = step(index);
        let started = Instant::now();
        let wishes = vec![wish.clone(); batch.logit_rows.len()];
        model.forward_choosing(&batch, &wishes).unwrap();
        // The first ones compile, choose and record.
        if index >= 3 {
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn model() {
    steps(false);
}

#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn model_8_bit() {
    steps(true);
}

fn steps(in_8_bits: bool) {
    let begun = Instant::now();
    let Some(backend) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut model = llama_8b(folder.path(), backend, in_8_bits);
    let page = PageShape { layers: 32, ..PAGE };
    model.allocate_pages(page, 10_000).unwrap();
    model.forward(&spans(1, 0, 128)).unwrap();
    eprintln!("first token after {:.2} s", begun.elapsed().as_secs_f64());
    let model = model.as_mut();
    for (sequences, rows, repeats) in [(1, 128, 20), (1, 2048, 10), (1, 8192, 5), (4, 2048, 5)] {
        let time = median_ms(model, &RowWish::BEST, repeats, |_| {
            spans(sequences, 0, rows)
        });
        let tokens = (sequences * rows) as f64;
        eprintln!(
            "prefill {sequences} x {rows}: {time:.2} ms, {:.0} tok/s",
            tokens / time * 1e3
        );
    }
    for sequences in [1, 2, 4, 8, 16, 64, 128, 256] {
        let time = median_ms(model, &RowWish::BEST, 30, |index| {
            spans(sequences, 128 + index, 1)
        });
        eprintln!(
            "decode {sequences} behind 128: {time:.3} ms, {:.0} tok/s",
            sequences as f64 / time * 1e3
        );
    }
    for sequences in [1, 64, 256] {
        let time = median_ms(model, &RowWish::BEST, 20, |index| {
            spans(sequences, 1000 + index, 1)
        });
        eprintln!(
            "decode {sequences} behind 1000: {time:.3} ms, {:.0} tok/s",
            sequences as f64 / time * 1e3
        );
    }
}

#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn choices() {
    let Some(backend) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut model = llama_8b(folder.path(), backend, false);
    let page = PageShape { layers: 32, ..PAGE };
    model.allocate_pages(page, 10_000).unwrap();
    let draw = |top_k, top_p| {
        RowWish::draw(Draw {
            temperature: 0.8,
            top_k,
            top_p,
            min_p: 0.0,
            uniform: 0.3,
        })
    };
    for (what, wish) in [
        ("best", RowWish::BEST),
        ("temperature", draw(0, 1.0)),
        ("top-k", draw(50, 1.0)),
        ("top-p", draw(0, 0.9)),
        ("both", draw(50, 0.9)),
    ] {
        let time = median_ms(model.as_mut(), &wish, 10, |index| {
            spans(256, 128 + index, 1)
        });
        eprintln!("decode 256 behind 128, {what}: {time:.3} ms");
    }
}

/// So that a weight of a file can be timed on its way to the device.
#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn uploads() {
    let Some(mut backend) = gpu() else { return };
    for dtype in [WeightDtype::Bf16, WeightDtype::F32] {
        let (rows, cols) = (16_384, 8192);
        let (_, bytes) = dtype.block();
        let bytes = rows * cols * bytes;
        let source = WeightSource {
            name: "w".to_owned(),
            rows,
            cols,
            dtype,
            bytes: WeightBytes::Owned(vec![0; bytes].into()),
            scales: None,
        };
        let started = Instant::now();
        let weight = backend.load_weight(source).unwrap();
        backend.gpu.synchronize().unwrap();
        let rate = bytes as f64 / started.elapsed().as_secs_f64() / 1e9;
        eprintln!("{dtype:?}: {rate:.1} GB/s of {weight:?}");
    }
}

/// Whole answers through the engine: requests in, answers out, in tokens a second.
#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn engine() {
    answers(true, (false, KvDtype::F16), &CASES);
}

#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn engine_8_bit() {
    answers(true, (true, KvDtype::F16), &CASES);
}

#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn engine_8_bit_kv() {
    answers(true, (true, KvDtype::Fp8), &CASES);
}

/// Requests, tokens of each prompt, tokens of each answer. The first two make what is made once.
const CASES: [(u32, u32, u32); 11] = [
    (1, 128, 16),
    (32, 2048, 1),
    (1, 128, 128),
    (1, 2048, 2),
    (1, 8192, 2),
    (32, 2048, 1),
    (16, 128, 256),
    (64, 128, 256),
    (256, 128, 256),
    (64, 2048, 128),
    (256, 1000, 1000),
];

/// The same with each step's results read before the next one begins.
#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn engine_in_turn() {
    answers(
        false,
        (false, KvDtype::F16),
        &[(16, 128, 4), (1, 128, 128), (64, 128, 256), (256, 128, 256)],
    );
}

fn answers(overlap: bool, (in_8_bits, kv_dtype): (bool, KvDtype), cases: &[(u32, u32, u32)]) {
    with_engine(overlap, (in_8_bits, kv_dtype), |engine| {
        for &case in cases {
            answer("", engine, case, &greedy());
        }
    });
}

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        ignore_eos: true,
        ..SamplingParams::default()
    }
}

/// What takes more than the best token: on the device, and, with more alternatives than that tells, on the host.
#[test]
#[ignore = "measures; see scripts/gpu/suite"]
fn engine_changed() {
    let penalised = SamplingParams {
        repetition_penalty: 1.1,
        frequency_penalty: 0.2,
        presence_penalty: 0.1,
        ..greedy()
    };
    let telling = |logprobs| SamplingParams {
        logprobs: Some(logprobs),
        ..penalised.clone()
    };
    with_engine(true, (false, KvDtype::F16), |engine| {
        answer("warm ", engine, (64, 128, 16), &telling(5));
        for (what, sampling) in [
            ("plain ", greedy()),
            ("penalties ", penalised.clone()),
            ("penalties and 5 log-probabilities ", telling(5)),
            ("the same on the host ", telling(21)),
        ] {
            answer(what, engine, (64, 128, 128), &sampling);
        }
    });
}

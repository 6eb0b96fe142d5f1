//! Small models of random weights on both backends.

use std::fs;
use std::io::Write;
use std::path::Path;

use baton_configs::llm::{ComputeDtype, LlmOptions, LoadFormat};

use super::*;
use crate::backend::cpu::CpuBackend;
use crate::backend::{Changes, Choice, Penalties, RowWish, Seen, SequenceSpan, TokenWish};
use crate::model::load::load;
use crate::model::{Logits, Model, Outcome};
use crate::page::KvDtype;
use crate::sampler::sample_for;

/// Activations are rounded to 8 bits some dozen times on the way through four layers; logits of random weights are all of
/// about the same size, so errors are measured against the largest.
const LOGITS_TOLERANCE: f32 = 0.04;
/// The same in half precision, which keeps eight times as much of each; the KV is in it on both sides.
const LOGITS_TOLERANCE_F16: f32 = 0.005;
const TOKENS_PER_BLOCK: usize = 16;

struct Kind {
    name: &'static str,
    architecture: &'static str,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    extra: &'static str,
}

const KINDS: [Kind; 4] = [
    Kind {
        name: "llama",
        architecture: "LlamaForCausalLM",
        heads: 8,
        kv_heads: 2,
        head_dim: 64,
        extra: "",
    },
    Kind {
        name: "qwen2",
        architecture: "Qwen2ForCausalLM",
        heads: 4,
        kv_heads: 2,
        head_dim: 128,
        extra: "",
    },
    Kind {
        name: "qwen3",
        architecture: "Qwen3ForCausalLM",
        heads: 4,
        kv_heads: 1,
        head_dim: 128,
        extra: "",
    },
    Kind {
        name: "mistral",
        architecture: "MistralForCausalLM",
        heads: 6,
        kv_heads: 2,
        head_dim: 80,
        extra: r#","sliding_window":24"#,
    },
];

fn write_config(kind: &Kind, folder: &Path) {
    let Kind {
        name,
        architecture,
        heads,
        kv_heads,
        head_dim,
        extra,
    } = kind;
    let text = format!(
        r#"{{"architectures":["{architecture}"],"model_type":"{name}","hidden_size":256,"intermediate_size":704,
        "num_hidden_layers":4,"num_attention_heads":{heads},"num_key_value_heads":{kv_heads},"head_dim":{head_dim},
        "vocab_size":1000,"max_position_embeddings":4096,"rms_norm_eps":1e-5,"rope_theta":10000.0,
        "hidden_act":"silu","tie_word_embeddings":false,"torch_dtype":"bfloat16"{extra}}}"#
    );
    fs::write(folder.join("config.json"), text).unwrap();
}

fn loaded<B: Backend>(folder: &Path, backend: B) -> Box<dyn Model> {
    loaded_as(ComputeDtype::Auto, folder, backend)
}

fn loaded_as<B: Backend>(dtype: ComputeDtype, folder: &Path, backend: B) -> Box<dyn Model> {
    let options = LlmOptions {
        dtype,
        load_format: LoadFormat::Dummy,
        ..LlmOptions::default()
    };
    with_pages(folder, &options, backend)
}

/// A model of a folder or file, with pages for [`steps`].
fn with_pages<B: Backend>(from: &Path, options: &LlmOptions, backend: B) -> Box<dyn Model> {
    let spec = from.to_str().unwrap();
    let mut model = load(spec, options, None, backend, &|_| {}).unwrap().model;
    let shape = model.shape();
    let page = PageShape {
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        tokens_per_block: TOKENS_PER_BLOCK,
        dtype: KvDtype::F16,
    };
    model.allocate_pages(page, 64).unwrap();
    model
}

/// Parts of sequences: which, from where, how many tokens, whether its last row's logits are wanted.
fn batch(parts: &[(u32, usize, usize, bool)]) -> StepBatch {
    let mut batch = StepBatch::default();
    for &(sequence, past_len, count, wanted) in parts {
        let first = batch.tokens.len();
        let positions = small(past_len)..small(past_len + count);
        let token = |position: u32| (sequence * 131 + position * 37) % 1000;
        batch.tokens.extend(positions.clone().map(token));
        batch.positions.extend(positions);
        batch.sequences.push(SequenceSpan {
            rows: first..first + count,
            past_len,
            blocks: (0..16).map(|block| block * 4 + sequence).collect(),
        });
        if wanted {
            batch.logit_rows.push(first + count - 1);
        }
    }
    batch
}

/// A prompt alone, chunks beside decoding, then decoding in sizes that come back, so that they are recorded and replayed.
fn steps() -> Vec<StepBatch> {
    let mut steps = vec![
        batch(&[(0, 0, 150, true)]),
        batch(&[(1, 0, 33, false), (0, 150, 1, true)]),
        batch(&[(0, 151, 1, true), (1, 33, 20, true), (2, 0, 5, true)]),
    ];
    for step in 0..6 {
        let parts = [(0, 152, 1, true), (1, 53, 1, true), (2, 5, 1, true)];
        let here =
            parts.map(|(sequence, past, count, wanted)| (sequence, past + step, count, wanted));
        steps.push(batch(&here));
    }
    steps.extend((0..4).map(|step| batch(&[(0, 158 + step, 1, true)])));
    steps.push(batch(&[
        (2, 11, 1, true),
        (0, 162, 1, true),
        (1, 59, 1, true),
    ]));
    steps
}

/// The device's tokens are those of its logits; rows that are not asked for keep their values.
fn check_choices(model: &mut dyn Model, step: &StepBatch, logits: &Logits) {
    let wanted = step.logit_rows.len();
    let mut wishes = vec![RowWish::BEST; wanted];
    if wanted > 1 {
        wishes[wanted / 2] = RowWish::Logits;
    }
    // One row's logits are changed and told of, by a table of its own.
    let seen = Seen {
        vocab: logits.vocab,
        prompt: (0..40).collect(),
        answer: vec![5, 6, 6],
        biases: vec![(50, 0.5)],
        bannable: vec![7],
    };
    let changes = Changes {
        table: 2,
        anew: Some(Arc::new(seen.clone())),
        counts_own: false,
        penalties: Penalties {
            repetition: 1.3,
            frequency: 0.1,
            presence: 0.2,
        },
        bans: true,
    };
    let changing = TokenWish {
        choice: Choice::Best,
        changes: Some(changes),
        logprobs: Some(3),
    };
    if wanted > 0 {
        wishes[0] = RowWish::Token(changing.clone());
    }
    let found = model.forward_choosing(step, &wishes).unwrap();
    assert_eq!(found.rows(), wanted);
    for (row, outcome) in found.outcomes().enumerate() {
        let values = logits.row(row);
        let greatest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        match outcome {
            Outcome::Chosen(token, told) if row == 0 => {
                let expected = sample_for(values, &changing, &seen).unwrap();
                assert_eq!(token, expected.token);
                changes::assert_told(told, expected.logprobs.as_ref());
            }
            Outcome::Chosen(token, _) => {
                let first = values.iter().position(|&value| value == greatest);
                assert_eq!(Some(token as usize), first);
                assert_eq!(wishes[row], RowWish::BEST);
            }
            Outcome::Values(found) => {
                assert_eq!(wishes[row], RowWish::Logits);
                assert_eq!(found, values);
            }
        }
    }
}

#[test]
fn models_give_the_cpu_backends_logits() {
    models_agree(ComputeDtype::Auto, LOGITS_TOLERANCE);
}

#[test]
fn models_in_half_precision_are_closer_still() {
    models_agree(ComputeDtype::Float16, LOGITS_TOLERANCE_F16);
}

fn models_agree(dtype: ComputeDtype, tolerance: f32) {
    for kind in &KINDS {
        let Some(gpu) = gpu() else { return };
        let folder = tempfile::tempdir().unwrap();
        write_config(kind, folder.path());
        let mut expected = loaded(folder.path(), CpuBackend::new(None));
        let mut found = loaded_as(dtype, folder.path(), gpu);
        agree(kind.name, expected.as_mut(), found.as_mut(), tolerance);
    }
}

/// Every step's logits of the device are near the expected ones, and its tokens are those of its logits.
fn agree(name: &str, expected: &mut dyn Model, model: &mut dyn Model, tolerance: f32) {
    for (index, step) in steps().iter().enumerate() {
        let expected = expected.forward(step).unwrap();
        let found = model.forward(step).unwrap();
        check_choices(model, step, &found);
        assert_eq!(found.values.len(), expected.values.len());
        let scale = expected
            .values
            .iter()
            .fold(0.0_f32, |most, value| most.max(value.abs()));
        let errors = found.values.iter().zip(&expected.values);
        let worst = errors.fold(0.0_f32, |worst, (a, b)| {
            // A NaN is the worst.
            if (a - b).abs() <= worst {
                worst
            } else {
                (a - b).abs()
            }
        });
        eprintln!(
            "{name} step {index}: off by {:.4} of {scale:.3}",
            worst / scale
        );
        assert!(worst <= tolerance * scale, "{name} step {index}");
    }
}

#[test]
fn a_gguf_file_gives_the_cpu_backends_logits_whatever_its_blocks() {
    for blocks in gguf::BLOCKS {
        let mut file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
        file.write_all(&gguf::of(blocks)).unwrap();
        let [expected, found] =
            [ComputeDtype::Float32, ComputeDtype::Auto].map(|dtype| LlmOptions {
                dtype,
                ..LlmOptions::default()
            });
        let mut expected = with_pages(file.path(), &expected, CpuBackend::new(None));
        let Some(gpu) = gpu() else { continue };
        let mut found = with_pages(file.path(), &found, gpu);
        let name = format!("{blocks:?}");
        agree(&name, expected.as_mut(), found.as_mut(), LOGITS_TOLERANCE);
    }
}

#[test]
fn pages_of_one_backend_serve_the_other() {
    let kind = &KINDS[0];
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    write_config(kind, folder.path());
    let mut cpu = loaded(folder.path(), CpuBackend::new(None));
    let mut gpu = loaded(folder.path(), gpu);
    let prompt = batch(&[(0, 0, 100, true)]);
    cpu.forward(&prompt).unwrap();
    let blocks = prompt.sequences[0].blocks[..7].to_vec();
    let mut pages = Vec::new();
    for (&block, page) in blocks.iter().zip(cpu.share_pages(&blocks).unwrap()) {
        let mut copy = gpu.lend_page(block);
        copy.write(0, page.as_bytes()).unwrap();
        pages.push((block, copy));
    }
    gpu.return_pages(pages).unwrap();
    let next = batch(&[(0, 100, 1, true)]);
    let expected = cpu.forward(&next).unwrap().values;
    let found = gpu.forward(&next).unwrap().values;
    let scale = expected
        .iter()
        .fold(0.0_f32, |most, value| most.max(value.abs()));
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() <= LOGITS_TOLERANCE * scale);
    }
}

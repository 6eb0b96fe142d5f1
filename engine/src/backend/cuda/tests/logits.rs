//! Logits of a checkpoint, for comparison with another implementation: `scripts/gpu/logits.py` makes checkpoints, runs this on
//! each, and judges.
//!
//! The folder that `BATON_TEST_CHECKPOINT` names has the checkpoint and `run.json`: `tokens`, how many of them are the `prompt`, how
//! many of its rows are a `chunk`, and what `kv` is kept as. Each token behind the prompt is a step of its own. `logits.f32` gets
//! the logits of all tokens, `[tokens, V]`.

use std::fs;
use std::path::PathBuf;

use baton_configs::llm::LlmOptions;
use serde_json::Value;

use super::*;
use crate::backend::SequenceSpan;
use crate::model::Model;
use crate::model::load::load;
use crate::page::KvDtype;

const TOKENS_PER_BLOCK: usize = 32;

/// A step of one sequence that wants the logits of all its rows.
fn part(tokens: &[u32], past_len: usize) -> StepBatch {
    let rows = tokens.len();
    let blocks = (past_len + rows).div_ceil(TOKENS_PER_BLOCK);
    StepBatch {
        tokens: tokens.to_vec(),
        positions: (small(past_len)..).take(rows).collect(),
        sequences: vec![SequenceSpan {
            rows: 0..rows,
            past_len,
            blocks: (0..small(blocks)).collect(),
        }],
        logit_rows: (0..rows).collect(),
    }
}

#[test]
#[ignore = "needs a checkpoint; see scripts/gpu/logits.py"]
fn logits_of_a_checkpoint() {
    let Some(backend) = gpu() else { return };
    let named = std::env::var_os("BATON_TEST_CHECKPOINT");
    let folder = PathBuf::from(named.expect("BATON_TEST_CHECKPOINT names a folder"));
    let run: Value = serde_json::from_slice(&fs::read(folder.join("run.json")).unwrap()).unwrap();
    let number = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
    let tokens = run["tokens"].as_array().unwrap();
    let tokens: Vec<u32> = tokens.iter().map(|token| small(number(token))).collect();
    let dtype = match run["kv"].as_str() {
        Some("f16") => KvDtype::F16,
        Some("bf16") => KvDtype::Bf16,
        Some("fp8") => KvDtype::Fp8,
        other => panic!("kv is {other:?}"),
    };
    let spec = folder.to_str().unwrap();
    let loaded = load(spec, &LlmOptions::default(), None, backend, &|_| {});
    let mut model: Box<dyn Model> = loaded.unwrap().model;
    let shape = model.shape();
    let page = PageShape {
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        tokens_per_block: TOKENS_PER_BLOCK,
        dtype,
    };
    let blocks = tokens.len().div_ceil(TOKENS_PER_BLOCK);
    model.allocate_pages(page, blocks).unwrap();
    let (prompt, chunk) = (number(&run["prompt"]), number(&run["chunk"]));
    let (mut out, mut past_len) = (Vec::new(), 0);
    while past_len < tokens.len() {
        let rows = if past_len < prompt {
            chunk.min(prompt - past_len)
        } else {
            1
        };
        let step = part(&tokens[past_len..past_len + rows], past_len);
        let logits = model.forward(&step).unwrap();
        let bytes = logits.values.iter().flat_map(|value| value.to_le_bytes());
        out.extend(bytes);
        past_len += rows;
    }
    fs::write(folder.join("logits.f32"), out).unwrap();
}

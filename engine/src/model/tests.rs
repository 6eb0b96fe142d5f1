//! The model half against independent implementations: golden log-probabilities, both file formats, hostile files.

mod eight_bits;
mod golden;
mod hostile_gguf;
mod hostile_safetensors;
mod loading;
pub(crate) mod reference_backend;
pub(crate) mod tiny_gguf;

use std::path::PathBuf;
use std::sync::OnceLock;

use baton_configs::llm::{ComputeDtype, LlmOptions};

use crate::backend::{BlockId, SequenceSpan, StepBatch, TokenId};
use crate::model::load::{LoadedModel, load, page_shape};
use crate::model::{Model, ModelError};
use reference_backend::ReferenceBackend;

/// Tokens that a test's pool holds.
const POOL_TOKENS: usize = 1088;

pub(crate) fn golden_path(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden")).join(name)
}

pub(crate) fn golden_json(name: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(golden_path(name)).expect("golden data is in the tree");
    serde_json::from_str(&text).expect("golden data is JSON")
}

/// The small real model; a test that needs it fails in one line when it is not there.
pub(crate) fn test_gguf() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let path = match std::env::var_os("BATON_TEST_GGUF") {
            Some(path) => PathBuf::from(path),
            None => {
                let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
                let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
                cache
                    .unwrap_or_else(|| home().join(".cache"))
                    .join("baton/models/SmolLM2-135M-Instruct.Q4_1.gguf")
            }
        };
        assert!(
            path.is_file(),
            "{} is not there; run scripts/test, which fetches it",
            path.display()
        );
        path
    })
    .clone()
}

pub(crate) fn float32() -> LlmOptions {
    LlmOptions {
        dtype: ComputeDtype::Float32,
        ..LlmOptions::default()
    }
}

pub(crate) fn try_load(spec: &str, options: &LlmOptions) -> Result<LoadedModel, ModelError> {
    load(spec, options, None, ReferenceBackend::default(), &|_| ())
}

/// A loaded model with one sequence: its tokens go in, its logits come out.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) model: Box<dyn Model>,
    blocks: Vec<BlockId>,
    past_len: usize,
}

impl Session {
    pub(crate) fn new(loaded: LoadedModel, options: &LlmOptions) -> Self {
        let mut model = loaded.model;
        let shape = page_shape(model.shape(), options);
        let block_count = POOL_TOKENS.div_ceil(shape.tokens_per_block);
        model
            .allocate_pages(shape, block_count)
            .expect("the pool is small");
        // Descending, so that a backend that mistakes indices for ids is found out.
        let blocks = (0..BlockId::try_from(block_count).expect("few blocks"))
            .rev()
            .collect();
        Self {
            model,
            blocks,
            past_len: 0,
        }
    }

    pub(crate) fn restart(&mut self) {
        self.past_len = 0;
    }

    /// Runs the next tokens; logits of the rows from `first_logit` on.
    pub(crate) fn feed(&mut self, tokens: &[TokenId], first_logit: usize) -> Vec<Vec<f32>> {
        let positions = self.past_len..self.past_len + tokens.len();
        let batch = StepBatch {
            tokens: tokens.to_vec(),
            positions: positions
                .map(|position| u32::try_from(position).expect("short"))
                .collect(),
            sequences: vec![SequenceSpan {
                rows: 0..tokens.len(),
                past_len: self.past_len,
                blocks: self.blocks.clone(),
            }],
            logit_rows: (first_logit..tokens.len()).collect(),
        };
        let logits = self
            .model
            .forward(&batch)
            .expect("the reference does not fail");
        self.past_len += tokens.len();
        let rows = logits.values.len() / logits.vocab;
        (0..rows).map(|row| logits.row(row).to_vec()).collect()
    }
}

/// Log-probabilities of one row.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|&logit| f64::from(logit - max).exp())
        .sum();
    logits
        .iter()
        .map(|&logit| f64::from(logit - max) - sum.ln())
        .collect()
}

/// The best token and how far its log-probability is above the second's.
pub(crate) fn best(log_probabilities: &[f64]) -> (TokenId, f64) {
    let mut order: Vec<usize> = (0..log_probabilities.len()).collect();
    order.sort_by(|&a, &b| {
        log_probabilities[b]
            .total_cmp(&log_probabilities[a])
            .then(a.cmp(&b))
    });
    let margin = log_probabilities[order[0]] - log_probabilities[order[1]];
    (
        TokenId::try_from(order[0]).expect("a vocabulary fits"),
        margin,
    )
}

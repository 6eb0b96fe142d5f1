//! A decoder's dimensions and variations, read from a GGUF header (`config/gguf.rs`) or from a Hugging Face
//! `config.json` (`config/hugging_face.rs`). What a model asks for and this engine does not do is refused by name.
//!
//! Invariant: a [`DecoderConfig`] that exists is consistent and bounded, so products of its dimensions do not
//! overflow; whether the file holds tensors of these shapes is checked when they are looked up.

mod gguf;
mod hugging_face;
mod rope;

pub(crate) use gguf::from_gguf;
pub(crate) use hugging_face::HuggingFaceConfig;
use xxhash_rust::xxh3::xxh3_64;

use crate::backend::RopeTable;
use crate::model::ModelShape;
use crate::model::error::ModelErrorKind;
use crate::page::KvScale;

// Far above any real model: they keep hostile headers from asking for absurd tables, and sizes from overflowing.
const VOCAB_MAX: usize = 1 << 24;
const WIDTH_MAX: usize = 1 << 20;
const HEAD_COUNT_MAX: usize = 1 << 16;
const LAYER_COUNT_MAX: usize = 4096;
const HEAD_DIM_MAX: usize = 4096;
const CONTEXT_LEN_MAX: usize = 1 << 31;

/// The families of decoder that are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Architecture {
    /// Llama 2 and 3, TinyLlama, SmolLM2; in GGUF files Mistral too.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Biases on q, k and v.
    Qwen2,
    /// RMS norms on the heads of q and k.
    Qwen3,
}

impl Architecture {
    /// The name in [`ModelShape::architecture`].
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// Everything that distinguishes one Llama-shaped decoder from another, but its weights.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DecoderConfig {
    pub(crate) architecture: Architecture,
    /// `H`.
    pub(crate) heads: usize,
    /// `K`.
    pub(crate) kv_heads: usize,
    /// `D`.
    pub(crate) head_dim: usize,
    /// `E`.
    pub(crate) width: usize,
    /// `F`.
    pub(crate) ffn_width: usize,
    /// `V`.
    pub(crate) vocab: usize,
    pub(crate) max_seq_len: usize,
    pub(crate) rms_epsilon: f32,
    pub(crate) rope: RopeTable,
    /// Sliding window of each layer; its length is the number of layers (`L`).
    pub(crate) windows: Vec<Option<usize>>,
    /// How each layer's KV is scaled in pages of 8-bit elements; empty where it is stored as it is.
    pub(crate) kv_scales: Vec<KvScale>,
    /// Biases on q, k and v.
    pub(crate) qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub(crate) output_bias: bool,
    /// Biases on gate, up and down.
    pub(crate) ffn_bias: bool,
    /// RMS norms on each head of q and k.
    pub(crate) head_norms: bool,
    /// The output projection is the embedding table.
    pub(crate) tied_embeddings: bool,
}

impl DecoderConfig {
    /// `L`.
    pub(crate) fn layers(&self) -> usize {
        self.windows.len()
    }

    /// The outside view, with the fingerprint.
    pub(crate) fn shape(&self) -> ModelShape {
        ModelShape {
            architecture: self.architecture.name().to_owned(),
            layers: self.layers(),
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            width: self.width,
            vocab: self.vocab,
            max_seq_len: self.max_seq_len,
            fingerprint: xxh3_64(self.canonical_text().as_bytes()),
        }
    }

    /// All that decides whether cached keys and values mean the same on two instances. Frequencies are rounded to
    /// five digits, because the two file formats and two machines' `pow` differ in the last ones.
    fn canonical_text(&self) -> String {
        let frequencies: Vec<_> = self
            .rope
            .inverse_frequencies
            .iter()
            .map(|frequency| format!("{frequency:.4e}"))
            .collect();
        // What is scaled otherwise means something else. Without scales the text is what it was before there were any.
        let scales: String = self
            .kv_scales
            .iter()
            .map(|scale| format!(" {:e}/{:e}", scale.key, scale.value))
            .collect();
        format!(
            "architecture={} layers={} heads={} kv_heads={} head_dim={} width={} ffn_width={} vocab={} \
             rms_epsilon={:e} qkv_bias={} output_bias={} ffn_bias={} head_norms={} windows={:?} pairing={:?} magnitude={:.4e} frequencies={}{scales}",
            self.architecture.name(),
            self.layers(),
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.width,
            self.ffn_width,
            self.vocab,
            self.rms_epsilon,
            self.qkv_bias,
            self.output_bias,
            self.ffn_bias,
            self.head_norms,
            self.windows,
            self.rope.pairing,
            self.rope.magnitude,
            frequencies.join(","),
        )
    }
}

/// The dimensions that both formats give, before anything is derived from them.
#[derive(Debug, Clone, Copy)]
struct Dimensions {
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    width: usize,
    ffn_width: usize,
    vocab: usize,
    max_seq_len: usize,
}

impl Dimensions {
    /// Holds them against each other and against the bounds.
    fn check(&self) -> Result<(), ModelErrorKind> {
        in_range("number of layers", self.layers, LAYER_COUNT_MAX)?;
        in_range("number of attention heads", self.heads, HEAD_COUNT_MAX)?;
        in_range("number of key/value heads", self.kv_heads, HEAD_COUNT_MAX)?;
        in_range("head size", self.head_dim, HEAD_DIM_MAX)?;
        in_range("hidden size", self.width, WIDTH_MAX)?;
        in_range("feed-forward size", self.ffn_width, WIDTH_MAX)?;
        in_range("vocabulary size", self.vocab, VOCAB_MAX)?;
        in_range("context length", self.max_seq_len, CONTEXT_LEN_MAX)?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ModelErrorKind::config(
                "number of attention heads",
                format!(
                    "is {}, not a multiple of {} key/value heads",
                    self.heads, self.kv_heads
                ),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelErrorKind::config(
                "head size",
                format!(
                    "is {}, but rotary embeddings need an even one",
                    self.head_dim
                ),
            ));
        }
        Ok(())
    }
}

fn in_range(key: &str, value: usize, max: usize) -> Result<(), ModelErrorKind> {
    if (1..=max).contains(&value) {
        Ok(())
    } else {
        Err(ModelErrorKind::config(
            key,
            format!("is {value}, not within 1 to {max}"),
        ))
    }
}

/// The norm's epsilon, which both formats give as a float of their own width.
fn epsilon(key: &str, value: f64) -> Result<f32, ModelErrorKind> {
    if value.is_finite() && (0.0..1.0).contains(&value) {
        Ok(rope::narrow(value))
    } else {
        Err(ModelErrorKind::config(
            key,
            format!("is {value}, not within 0 to 1"),
        ))
    }
}

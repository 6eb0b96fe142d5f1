//! Which weights a decoder has, with what shapes and under which names: the one place that knows both formats'
//! spellings. [`DecoderWeights`] is the same tree for a plan ([`Slot`]s) and for loaded weights.

use crate::model::config::DecoderConfig;

/// A tensor's place in the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Embedding,
    FinalNorm,
    LmHead,
    AttentionNorm,
    Query,
    Key,
    Value,
    Output,
    QueryNorm,
    KeyNorm,
    FfnNorm,
    Gate,
    Up,
    Down,
}

/// Vectors have one dimension in the file, matrices two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SlotShape {
    Vector(usize),
    Matrix { rows: usize, cols: usize },
}

impl SlotShape {
    pub(crate) fn rows(self) -> usize {
        match self {
            Self::Vector(_) => 1,
            Self::Matrix { rows, .. } => rows,
        }
    }

    pub(crate) fn cols(self) -> usize {
        match self {
            Self::Vector(cols) | Self::Matrix { cols, .. } => cols,
        }
    }

    /// The shape as a file gives it, rows first.
    pub(crate) fn dims(self) -> Vec<usize> {
        match self {
            Self::Vector(len) => vec![len],
            Self::Matrix { rows, cols } => vec![rows, cols],
        }
    }
}

/// One tensor that the decoder needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) part: Part,
    pub(crate) layer: Option<usize>,
    pub(crate) is_bias: bool,
    pub(crate) shape: SlotShape,
}

impl Slot {
    /// Its name in a GGUF file.
    pub(crate) fn gguf_name(&self) -> String {
        let stem = match self.part {
            Part::Embedding => "token_embd",
            Part::FinalNorm => "output_norm",
            Part::LmHead => "output",
            Part::AttentionNorm => "attn_norm",
            Part::Query => "attn_q",
            Part::Key => "attn_k",
            Part::Value => "attn_v",
            Part::Output => "attn_output",
            Part::QueryNorm => "attn_q_norm",
            Part::KeyNorm => "attn_k_norm",
            Part::FfnNorm => "ffn_norm",
            Part::Gate => "ffn_gate",
            Part::Up => "ffn_up",
            Part::Down => "ffn_down",
        };
        self.name("blk", stem)
    }

    /// Its name in a Hugging Face checkpoint.
    pub(crate) fn hugging_face_name(&self) -> String {
        let stem = match self.part {
            Part::Embedding => "model.embed_tokens",
            Part::FinalNorm => "model.norm",
            Part::LmHead => "lm_head",
            Part::AttentionNorm => "input_layernorm",
            Part::Query => "self_attn.q_proj",
            Part::Key => "self_attn.k_proj",
            Part::Value => "self_attn.v_proj",
            Part::Output => "self_attn.o_proj",
            Part::QueryNorm => "self_attn.q_norm",
            Part::KeyNorm => "self_attn.k_norm",
            Part::FfnNorm => "post_attention_layernorm",
            Part::Gate => "mlp.gate_proj",
            Part::Up => "mlp.up_proj",
            Part::Down => "mlp.down_proj",
        };
        self.name("model.layers", stem)
    }

    fn name(&self, layers: &str, stem: &str) -> String {
        let kind = if self.is_bias { "bias" } else { "weight" };
        match self.layer {
            Some(layer) => format!("{layers}.{layer}.{stem}.{kind}"),
            None => format!("{stem}.{kind}"),
        }
    }
}

/// A projection.
#[derive(Debug)]
pub(crate) struct Linear<W> {
    pub(crate) weight: W,
    pub(crate) bias: Option<W>,
}

/// One layer's weights.
#[derive(Debug)]
pub(crate) struct LayerWeights<W> {
    /// `[E]`.
    pub(crate) attention_norm: W,
    /// `[H * D, E]`.
    pub(crate) query: Linear<W>,
    /// `[K * D, E]`.
    pub(crate) key: Linear<W>,
    /// `[K * D, E]`.
    pub(crate) value: Linear<W>,
    /// `[E, H * D]`.
    pub(crate) output: Linear<W>,
    /// `[D]`.
    pub(crate) query_norm: Option<W>,
    /// `[D]`.
    pub(crate) key_norm: Option<W>,
    /// `[E]`.
    pub(crate) ffn_norm: W,
    /// `[F, E]`.
    pub(crate) gate: Linear<W>,
    /// `[F, E]`.
    pub(crate) up: Linear<W>,
    /// `[E, F]`.
    pub(crate) down: Linear<W>,
}

/// All weights of a decoder.
#[derive(Debug)]
pub(crate) struct DecoderWeights<W> {
    /// `[V, E]`.
    pub(crate) embedding: W,
    pub(crate) layers: Vec<LayerWeights<W>>,
    /// `[E]`.
    pub(crate) final_norm: W,
    /// `[V, E]`; `None` where the embedding table serves.
    pub(crate) lm_head: Option<W>,
}

impl DecoderWeights<Slot> {
    /// What a decoder of this configuration needs.
    pub(crate) fn plan(config: &DecoderConfig) -> Self {
        let table = SlotShape::Matrix {
            rows: config.vocab,
            cols: config.width,
        };
        let outside = |part, shape| Slot {
            part,
            layer: None,
            is_bias: false,
            shape,
        };
        Self {
            embedding: outside(Part::Embedding, table),
            layers: (0..config.layers())
                .map(|layer| LayerWeights::plan(config, layer))
                .collect(),
            final_norm: outside(Part::FinalNorm, SlotShape::Vector(config.width)),
            lm_head: (!config.tied_embeddings).then(|| outside(Part::LmHead, table)),
        }
    }
}

impl LayerWeights<Slot> {
    fn plan(config: &DecoderConfig, layer: usize) -> Self {
        let slot = |part, is_bias, shape| Slot {
            part,
            layer: Some(layer),
            is_bias,
            shape,
        };
        let vector = |part, len| slot(part, false, SlotShape::Vector(len));
        let linear = |part, rows, cols, biased: bool| Linear {
            weight: slot(part, false, SlotShape::Matrix { rows, cols }),
            bias: biased.then(|| slot(part, true, SlotShape::Vector(rows))),
        };
        let (width, ffn_width, head_dim) = (config.width, config.ffn_width, config.head_dim);
        let (q_width, kv_width) = (config.heads * head_dim, config.kv_heads * head_dim);
        Self {
            attention_norm: vector(Part::AttentionNorm, width),
            query: linear(Part::Query, q_width, width, config.qkv_bias),
            key: linear(Part::Key, kv_width, width, config.qkv_bias),
            value: linear(Part::Value, kv_width, width, config.qkv_bias),
            output: linear(Part::Output, width, q_width, config.output_bias),
            query_norm: config.head_norms.then(|| vector(Part::QueryNorm, head_dim)),
            key_norm: config.head_norms.then(|| vector(Part::KeyNorm, head_dim)),
            ffn_norm: vector(Part::FfnNorm, width),
            gate: linear(Part::Gate, ffn_width, width, config.ffn_bias),
            up: linear(Part::Up, ffn_width, width, config.ffn_bias),
            down: linear(Part::Down, width, ffn_width, config.ffn_bias),
        }
    }
}

// === map: the same tree with other leaves, in the order in which a forward pass meets them ===

impl<W> Linear<W> {
    fn try_map<V, X>(&self, f: &mut impl FnMut(&W) -> Result<V, X>) -> Result<Linear<V>, X> {
        Ok(Linear {
            weight: f(&self.weight)?,
            bias: self.bias.as_ref().map(f).transpose()?,
        })
    }
}

impl<W> LayerWeights<W> {
    fn try_map<V, X>(&self, f: &mut impl FnMut(&W) -> Result<V, X>) -> Result<LayerWeights<V>, X> {
        Ok(LayerWeights {
            attention_norm: f(&self.attention_norm)?,
            query: self.query.try_map(f)?,
            key: self.key.try_map(f)?,
            value: self.value.try_map(f)?,
            output: self.output.try_map(f)?,
            query_norm: self.query_norm.as_ref().map(&mut *f).transpose()?,
            key_norm: self.key_norm.as_ref().map(&mut *f).transpose()?,
            ffn_norm: f(&self.ffn_norm)?,
            gate: self.gate.try_map(f)?,
            up: self.up.try_map(f)?,
            down: self.down.try_map(f)?,
        })
    }
}

impl<W> DecoderWeights<W> {
    /// Applies a fallible function to each leaf.
    pub(crate) fn try_map<V, X>(
        &self,
        mut f: impl FnMut(&W) -> Result<V, X>,
    ) -> Result<DecoderWeights<V>, X> {
        Ok(DecoderWeights {
            embedding: f(&self.embedding)?,
            layers: self
                .layers
                .iter()
                .map(|layer| layer.try_map(&mut f))
                .collect::<Result<_, _>>()?,
            final_norm: f(&self.final_norm)?,
            lm_head: self.lm_head.as_ref().map(f).transpose()?,
        })
    }
}

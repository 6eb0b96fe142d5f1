//! Which weights a decoder has, with what shapes and under which names: the one place that knows both formats'
//! spellings, and which part of each tensor a shard needs. [`DecoderWeights`] is the same tree for a plan ([`Slot`]s) and
//! for loaded weights.

use std::ops::Range;

use crate::model::config::DecoderConfig;
use crate::model::shard::Shard;

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

/// Which part of a tensor a shard needs. A vector is cut by [`Cut::Rows`], each element being one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cut {
    /// All of it.
    Whole,
    /// Some output features.
    Rows(Range<usize>),
    /// Some input features.
    Cols(Range<usize>),
}

/// One tensor that the decoder needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) part: Part,
    /// Its number in the whole model.
    pub(crate) layer: Option<usize>,
    pub(crate) is_bias: bool,
    /// As the file has it.
    pub(crate) shape: SlotShape,
    pub(crate) cut: Cut,
}

impl Slot {
    /// The shape of the part that is needed.
    pub(crate) fn cut_shape(&self) -> SlotShape {
        match (self.shape, &self.cut) {
            (shape, Cut::Whole) => shape,
            (SlotShape::Vector(_), Cut::Rows(range) | Cut::Cols(range)) => {
                SlotShape::Vector(range.len())
            }
            (SlotShape::Matrix { cols, .. }, Cut::Rows(range)) => SlotShape::Matrix {
                rows: range.len(),
                cols,
            },
            (SlotShape::Matrix { rows, .. }, Cut::Cols(range)) => SlotShape::Matrix {
                rows,
                cols: range.len(),
            },
        }
    }

    /// Whether it is the matrix of a layer's projection: what checkpoints in 8 bits have in 8 bits.
    pub(crate) fn is_projection(&self) -> bool {
        self.layer.is_some() && matches!(self.shape, SlotShape::Matrix { .. })
    }

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

/// The weights of a decoder, or of a shard of one.
#[derive(Debug)]
pub(crate) struct DecoderWeights<W> {
    /// `[V, E]`; on the first stage.
    pub(crate) embedding: Option<W>,
    pub(crate) layers: Vec<LayerWeights<W>>,
    /// `[E]`; on the last stage.
    pub(crate) final_norm: Option<W>,
    /// `[V, E]`; on the last stage, unless the embedding table is there and serves.
    pub(crate) lm_head: Option<W>,
}

impl DecoderWeights<Slot> {
    /// What a shard of a decoder of this configuration needs.
    pub(crate) fn plan(config: &DecoderConfig, shard: &Shard) -> Self {
        let cuts = Cuts::new(config, shard);
        let place = shard.place;
        let outside = |part, shape, cut| Slot {
            part,
            layer: None,
            is_bias: false,
            shape,
            cut,
        };
        let table = |part| {
            let shape = SlotShape::Matrix {
                rows: config.vocab,
                cols: config.width,
            };
            outside(part, shape, cuts.vocab.clone())
        };
        let head = if !config.tied_embeddings {
            Some(Part::LmHead)
        } else if place.is_first_stage() {
            None
        } else {
            Some(Part::Embedding)
        };
        let norm = || outside(Part::FinalNorm, SlotShape::Vector(config.width), Cut::Whole);
        let last = place.is_last_stage();
        Self {
            embedding: place.is_first_stage().then(|| table(Part::Embedding)),
            layers: shard
                .layers
                .clone()
                .map(|layer| LayerWeights::plan(config, &cuts, layer))
                .collect(),
            final_norm: last.then(norm),
            lm_head: head.filter(|_| last).map(table),
        }
    }
}

/// A shard's parts, each as the cut of the tensors that it is to be found in.
#[derive(Debug)]
struct Cuts {
    query_rows: Cut,
    kv_rows: Cut,
    query_cols: Cut,
    ffn_rows: Cut,
    ffn_cols: Cut,
    vocab: Cut,
    /// Whether this rank adds the biases of the projections whose results are summed over the ranks.
    adds_bias: bool,
}

impl Cuts {
    fn new(config: &DecoderConfig, shard: &Shard) -> Self {
        let rows = |range: Range<usize>, len: usize| {
            if range.len() == len {
                Cut::Whole
            } else {
                Cut::Rows(range)
            }
        };
        let cols = |cut: &Cut| match cut {
            Cut::Rows(range) | Cut::Cols(range) => Cut::Cols(range.clone()),
            Cut::Whole => Cut::Whole,
        };
        let heads = |heads: &Range<usize>, count: usize| {
            let dim = config.head_dim;
            rows(heads.start * dim..heads.end * dim, count * dim)
        };
        let query_rows = heads(&shard.heads, config.heads);
        let ffn_rows = rows(shard.ffn.clone(), config.ffn_width);
        Self {
            kv_rows: heads(&shard.kv_heads, config.kv_heads),
            query_cols: cols(&query_rows),
            ffn_cols: cols(&ffn_rows),
            vocab: rows(shard.vocab.clone(), config.vocab),
            adds_bias: shard.place.tp == 0,
            query_rows,
            ffn_rows,
        }
    }
}

impl LayerWeights<Slot> {
    fn plan(config: &DecoderConfig, cuts: &Cuts, layer: usize) -> Self {
        let slot = |part, is_bias, shape, cut: &Cut| Slot {
            part,
            layer: Some(layer),
            is_bias,
            shape,
            cut: cut.clone(),
        };
        let vector = |part, len| slot(part, false, SlotShape::Vector(len), &Cut::Whole);
        let linear = |part, [rows, cols]: [usize; 2], biased: bool, cut: &Cut| Linear {
            weight: slot(part, false, SlotShape::Matrix { rows, cols }, cut),
            bias: match cut {
                Cut::Cols(_) => (biased && cuts.adds_bias)
                    .then(|| slot(part, true, SlotShape::Vector(rows), &Cut::Whole)),
                Cut::Rows(_) | Cut::Whole => {
                    biased.then(|| slot(part, true, SlotShape::Vector(rows), cut))
                }
            },
        };
        let (width, ffn_width, head_dim) = (config.width, config.ffn_width, config.head_dim);
        let (q_width, kv_width) = (config.heads * head_dim, config.kv_heads * head_dim);
        let (qkv_bias, ffn_bias) = (config.qkv_bias, config.ffn_bias);
        let kv = |part| linear(part, [kv_width, width], qkv_bias, &cuts.kv_rows);
        let widen = |part| linear(part, [ffn_width, width], ffn_bias, &cuts.ffn_rows);
        let query = [q_width, width];
        let output = [width, q_width];
        let down = [width, ffn_width];
        Self {
            attention_norm: vector(Part::AttentionNorm, width),
            query: linear(Part::Query, query, qkv_bias, &cuts.query_rows),
            key: kv(Part::Key),
            value: kv(Part::Value),
            output: linear(Part::Output, output, config.output_bias, &cuts.query_cols),
            query_norm: config.head_norms.then(|| vector(Part::QueryNorm, head_dim)),
            key_norm: config.head_norms.then(|| vector(Part::KeyNorm, head_dim)),
            ffn_norm: vector(Part::FfnNorm, width),
            gate: widen(Part::Gate),
            up: widen(Part::Up),
            down: linear(Part::Down, down, ffn_bias, &cuts.ffn_cols),
        }
    }
}

// === map: the same tree with other leaves, in the order in which a forward pass meets them ===

impl<W> Linear<W> {
    /// Weight and bias.
    pub(crate) const fn both(&self) -> (&W, Option<&W>) {
        (&self.weight, self.bias.as_ref())
    }

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
            embedding: self.embedding.as_ref().map(&mut f).transpose()?,
            layers: self
                .layers
                .iter()
                .map(|layer| layer.try_map(&mut f))
                .collect::<Result<_, _>>()?,
            final_norm: self.final_norm.as_ref().map(&mut f).transpose()?,
            lm_head: self.lm_head.as_ref().map(f).transpose()?,
        })
    }
}

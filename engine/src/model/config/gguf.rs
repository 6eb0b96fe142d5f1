//! The decoder's configuration from a GGUF header, with the key names of llama.cpp's converters.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;

use super::rope::{RopeParameters, RopeScaling, Yarn};
use super::{Architecture, DecoderConfig, Dimensions, epsilon};
use crate::backend::RopePairing;
use crate::model::error::ModelErrorKind;
use crate::model::gguf::{GgufFile, float, integer, text};

const SERVED: &[&str] = &["llama (Mistral too)", "qwen2", "qwen3"];

/// The configuration of a GGUF file; biases and a separate output projection are there when their tensors are.
pub(crate) fn from_gguf(file: &GgufFile) -> Result<DecoderConfig, ModelErrorKind> {
    let metadata = file.metadata();
    let found = text(metadata, "general.architecture")
        .ok_or_else(|| ModelErrorKind::config("general.architecture", "is missing"))?;
    let architecture = match found {
        "llama" => Architecture::Llama,
        "qwen2" => Architecture::Qwen2,
        "qwen3" => Architecture::Qwen3,
        _ => {
            return Err(ModelErrorKind::Architecture {
                found: found.to_owned(),
                served: SERVED,
            });
        }
    };
    let keys = Keys {
        metadata,
        prefix: found,
    };
    keys.refuse_variants()?;
    let dimensions = keys.dimensions(file)?;
    dimensions.check()?;
    let rope = keys.rope(architecture, &dimensions, file)?;
    let window = keys
        .optional("attention.sliding_window")?
        .filter(|&window| window > 0);
    let norm_key = "attention.layer_norm_rms_epsilon";
    Ok(DecoderConfig {
        architecture,
        heads: dimensions.heads,
        kv_heads: dimensions.kv_heads,
        head_dim: dimensions.head_dim,
        width: dimensions.width,
        ffn_width: dimensions.ffn_width,
        vocab: dimensions.vocab,
        max_seq_len: rope.reach(dimensions.max_seq_len),
        rms_epsilon: epsilon(&keys.name(norm_key), keys.required_float(norm_key)?)?,
        rope: rope.table()?,
        windows: vec![window; dimensions.layers],
        kv_scales: Vec::new(),
        qkv_bias: file.dims("blk.0.attn_q.bias").is_some(),
        output_bias: file.dims("blk.0.attn_output.bias").is_some(),
        ffn_bias: file.dims("blk.0.ffn_down.bias").is_some(),
        head_norms: architecture == Architecture::Qwen3,
        tied_embeddings: file.dims("output.weight").is_none(),
    })
}

/// Reads `<architecture>.<key>`.
struct Keys<'a> {
    metadata: &'a HashMap<String, Value>,
    prefix: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn optional(&self, key: &str) -> Result<Option<usize>, ModelErrorKind> {
        let name = self.name(key);
        let Some(value) = self.metadata.get(&name) else {
            return Ok(None);
        };
        match integer(value).and_then(|value| usize::try_from(value).ok()) {
            Some(value) => Ok(Some(value)),
            None => Err(ModelErrorKind::config(
                name,
                "is not one whole number for all layers",
            )),
        }
    }

    fn required(&self, key: &str) -> Result<usize, ModelErrorKind> {
        self.optional(key)?
            .ok_or_else(|| ModelErrorKind::config(self.name(key), "is missing"))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, ModelErrorKind> {
        let name = self.name(key);
        let Some(value) = self.metadata.get(&name) else {
            return Ok(None);
        };
        match float(value) {
            Some(value) => Ok(Some(value)),
            None => Err(ModelErrorKind::config(name, "is not a number")),
        }
    }

    fn required_float(&self, key: &str) -> Result<f64, ModelErrorKind> {
        self.float(key)?
            .ok_or_else(|| ModelErrorKind::config(self.name(key), "is missing"))
    }

    /// Refuses what llama.cpp's keys can say and this decoder does not do.
    fn refuse_variants(&self) -> Result<(), ModelErrorKind> {
        if self.optional("expert_count")?.unwrap_or(0) > 0 {
            return Err(ModelErrorKind::Unsupported {
                what: format!("a mixture of experts (`{}`)", self.name("expert_count")),
                hint: "serve a dense model",
            });
        }
        let shards = self
            .metadata
            .get("split.count")
            .and_then(integer)
            .unwrap_or(0);
        if shards > 1 {
            return Err(ModelErrorKind::Unsupported {
                what: format!("a GGUF model split into {shards} files"),
                hint: "join them with `llama-gguf-split --merge FIRST_FILE OUT_FILE`",
            });
        }
        Ok(())
    }

    fn dimensions(&self, file: &GgufFile) -> Result<Dimensions, ModelErrorKind> {
        let heads = self.required("attention.head_count")?;
        let width = self.required("embedding_length")?;
        let head_dim = match self.optional("attention.key_length")? {
            Some(head_dim) => head_dim,
            None => width.checked_div(heads).unwrap_or(0),
        };
        for key in ["attention.value_length", "rope.dimension_count"] {
            let other = self.optional(key)?.unwrap_or(head_dim);
            if other != head_dim {
                return Err(ModelErrorKind::config(
                    self.name(key),
                    format!("is {other}, but only the head size, {head_dim}, is served"),
                ));
            }
        }
        // The embedding table is what embeds; `vocab_size` is missing in older files.
        let table = file
            .dims("token_embd.weight")
            .ok_or_else(|| ModelErrorKind::MissingTensor("token_embd.weight".to_owned()))?;
        Ok(Dimensions {
            layers: self.required("block_count")?,
            heads,
            kv_heads: self.optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            width,
            ffn_width: self.required("feed_forward_length")?,
            vocab: table.first().copied().unwrap_or(0),
            max_seq_len: self.required("context_length")?,
        })
    }

    fn rope(
        &self,
        architecture: Architecture,
        dimensions: &Dimensions,
        file: &GgufFile,
    ) -> Result<RopeParameters, ModelErrorKind> {
        Ok(RopeParameters {
            theta: self.float("rope.freq_base")?.unwrap_or(10_000.0),
            head_dim: dimensions.head_dim,
            // llama.cpp's converter permutes the rows of q and k for the llama family only.
            pairing: match architecture {
                Architecture::Llama | Architecture::Mistral => RopePairing::Adjacent,
                Architecture::Qwen2 | Architecture::Qwen3 => RopePairing::Halves,
            },
            scaling: self.scaling(dimensions.max_seq_len)?,
            divisors: file.vector_f32("rope_freqs.weight", dimensions.head_dim / 2)?,
        })
    }

    fn scaling(&self, context_len: usize) -> Result<RopeScaling, ModelErrorKind> {
        let name = self.name("rope.scaling.type");
        let factor = self.float("rope.scaling.factor")?;
        let linear = self.float("rope.scale_linear")?;
        match text(self.metadata, &name) {
            None => Ok(match factor.or(linear) {
                Some(factor) if factor > 0.0 => RopeScaling::Linear { factor },
                _ => RopeScaling::None,
            }),
            Some("none") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear {
                factor: factor.or(linear).unwrap_or(1.0),
            }),
            Some("yarn") => self
                .yarn(factor.unwrap_or(1.0), context_len)
                .map(RopeScaling::Yarn),
            Some(other) => Err(ModelErrorKind::Unsupported {
                what: format!("`{name}` {other}"),
                hint: "served are none, linear and yarn",
            }),
        }
    }

    fn yarn(&self, factor: f64, context_len: usize) -> Result<Yarn, ModelErrorKind> {
        let original = self.optional("rope.scaling.original_context_length")?;
        let scale = match self.float("rope.scaling.yarn_attn_factor")? {
            Some(scale) => scale,
            None => self.float("rope.scaling.attn_factor")?.unwrap_or(1.0),
        };
        Ok(Yarn {
            factor,
            original_len: original.unwrap_or(context_len) as f64,
            magnitude: scale * Yarn::magnitude_of(factor, 1.0),
            beta_fast: self.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: self.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            truncate: true,
        })
    }
}

//! The decoder's configuration from a Hugging Face `config.json`, in the spellings of transformers 4 and 5.

use serde::Deserialize;
use serde_json::Value;

use super::rope::{Llama3, RopeParameters, RopeScaling, Yarn};
use super::{Architecture, DecoderConfig, Dimensions, epsilon};
use crate::backend::{RopePairing, WeightDtype};
use crate::model::error::ModelErrorKind;
use crate::model::quantization;

const SERVED: &[&str] = &[
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
];

/// The keys of `config.json` that decide what a decoder computes. Others concern training or other libraries.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct HuggingFaceConfig {
    architectures: Option<Vec<String>>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    original_max_position_embeddings: Option<f64>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    partial_rotary_factor: Option<f64>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
    torch_dtype: Option<String>,
    dtype: Option<String>,
}

/// `rope_scaling`, or transformers 5's `rope_parameters`, which holds the base too.
#[derive(Debug, Clone, Deserialize)]
struct RawRope {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    legacy_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    truncate: Option<bool>,
    partial_rotary_factor: Option<f64>,
}

impl HuggingFaceConfig {
    /// Reads the text of `config.json`.
    pub(crate) fn parse(text: &str) -> Result<Self, ModelErrorKind> {
        serde_json::from_str(text).map_err(|error| ModelErrorKind::Header {
            format: "config.json",
            reason: error.to_string(),
        })
    }

    /// The decoder that it describes.
    pub(crate) fn decoder(&self) -> Result<DecoderConfig, ModelErrorKind> {
        let architecture = self.architecture()?;
        self.refuse_variants()?;
        let dimensions = self.dimensions()?;
        dimensions.check()?;
        let rope = self.rope(&dimensions)?;
        let attention_bias = self.attention_bias.unwrap_or(false);
        let (qkv_bias, output_bias) = match architecture {
            Architecture::Qwen2 => (true, false),
            Architecture::Mistral => (false, false),
            Architecture::Llama | Architecture::Qwen3 => (attention_bias, attention_bias),
        };
        Ok(DecoderConfig {
            architecture,
            heads: dimensions.heads,
            kv_heads: dimensions.kv_heads,
            head_dim: dimensions.head_dim,
            width: dimensions.width,
            ffn_width: dimensions.ffn_width,
            vocab: dimensions.vocab,
            max_seq_len: rope.reach(dimensions.max_seq_len),
            rms_epsilon: epsilon("rms_norm_eps", self.rms_norm_eps.unwrap_or(1e-6))?,
            rope: rope.table()?,
            windows: self.windows(architecture, dimensions.layers)?,
            kv_scales: Vec::new(),
            qkv_bias,
            output_bias,
            ffn_bias: architecture == Architecture::Llama && self.mlp_bias.unwrap_or(false),
            head_norms: architecture == Architecture::Qwen3,
            tied_embeddings: self.tie_word_embeddings.unwrap_or(false),
        })
    }

    /// The element type that dummy weights take: the checkpoint's own.
    pub(crate) fn weight_dtype(&self) -> WeightDtype {
        match self.dtype.as_deref().or(self.torch_dtype.as_deref()) {
            Some("float32") => WeightDtype::F32,
            Some("float16") => WeightDtype::F16,
            _ => WeightDtype::Bf16,
        }
    }

    /// Whether projections are in 8 bits, by what a newer export says here too.
    pub(crate) fn in_8_bits(&self) -> Result<bool, ModelErrorKind> {
        let Some(quantization) = &self.quantization_config else {
            return Ok(false);
        };
        let text = |key| quantization.get(key).and_then(Value::as_str);
        if text("quant_method") == Some("modelopt") {
            return quantization::is_8_bit(text("quant_algo"));
        }
        Err(ModelErrorKind::Unsupported {
            what: format!(
                "`quantization_config` {}",
                text("quant_method").unwrap_or("of an unnamed method")
            ),
            hint: "served are ModelOpt's FP8 exports, unquantised safetensors, and GGUF files",
        })
    }

    fn architecture(&self) -> Result<Architecture, ModelErrorKind> {
        let found = self
            .architectures
            .as_ref()
            .and_then(|names| names.first())
            .ok_or_else(|| ModelErrorKind::config("architectures", "is missing"))?;
        match found.as_str() {
            "LlamaForCausalLM" => Ok(Architecture::Llama),
            "MistralForCausalLM" => Ok(Architecture::Mistral),
            "Qwen2ForCausalLM" => Ok(Architecture::Qwen2),
            "Qwen3ForCausalLM" => Ok(Architecture::Qwen3),
            _ => Err(ModelErrorKind::Architecture {
                found: found.clone(),
                served: SERVED,
            }),
        }
    }

    fn refuse_variants(&self) -> Result<(), ModelErrorKind> {
        self.in_8_bits()?;
        let activation = self.hidden_act.as_deref().unwrap_or("silu");
        if !matches!(activation, "silu" | "swish") {
            return Err(ModelErrorKind::Unsupported {
                what: format!("`hidden_act` {activation}"),
                hint: "served is silu",
            });
        }
        let rotary = self
            .rope_values()
            .and_then(|rope| rope.partial_rotary_factor);
        let rotary = rotary.or(self.partial_rotary_factor).unwrap_or(1.0);
        if rotary != 1.0 {
            return Err(ModelErrorKind::Unsupported {
                what: format!("`partial_rotary_factor` {rotary}"),
                hint: "served are models that rotate whole heads",
            });
        }
        Ok(())
    }

    fn dimensions(&self) -> Result<Dimensions, ModelErrorKind> {
        let width = required("hidden_size", self.hidden_size)?;
        let heads = required("num_attention_heads", self.num_attention_heads)?;
        Ok(Dimensions {
            layers: required("num_hidden_layers", self.num_hidden_layers)?,
            heads,
            kv_heads: self.num_key_value_heads.unwrap_or(heads),
            head_dim: match self.head_dim {
                Some(head_dim) => head_dim,
                None => width.checked_div(heads).unwrap_or(0),
            },
            width,
            ffn_width: required("intermediate_size", self.intermediate_size)?,
            vocab: required("vocab_size", self.vocab_size)?,
            max_seq_len: required("max_position_embeddings", self.max_position_embeddings)?,
        })
    }

    fn rope_values(&self) -> Option<&RawRope> {
        self.rope_parameters.as_ref().or(self.rope_scaling.as_ref())
    }

    fn rope(&self, dimensions: &Dimensions) -> Result<RopeParameters, ModelErrorKind> {
        let values = self.rope_values();
        let theta = values.and_then(|rope| rope.rope_theta).or(self.rope_theta);
        let scaling = match values {
            Some(rope) => self.scaling(rope, dimensions.max_seq_len)?,
            None => RopeScaling::None,
        };
        Ok(RopeParameters {
            theta: theta.unwrap_or(10_000.0),
            head_dim: dimensions.head_dim,
            pairing: RopePairing::Halves,
            scaling,
            divisors: None,
        })
    }

    fn scaling(&self, rope: &RawRope, context_len: usize) -> Result<RopeScaling, ModelErrorKind> {
        let original_len = rope
            .original_max_position_embeddings
            .or(self.original_max_position_embeddings);
        match rope.rope_type.as_deref().or(rope.legacy_type.as_deref()) {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear {
                factor: required("rope_scaling.factor", rope.factor)?,
            }),
            Some("llama3") => Ok(RopeScaling::Llama3(Llama3 {
                factor: required("rope_scaling.factor", rope.factor)?,
                low_freq_factor: required("rope_scaling.low_freq_factor", rope.low_freq_factor)?,
                high_freq_factor: required("rope_scaling.high_freq_factor", rope.high_freq_factor)?,
                original_len: required(
                    "rope_scaling.original_max_position_embeddings",
                    original_len,
                )?,
            })),
            Some("yarn") => {
                let original_len = original_len.unwrap_or(context_len as f64);
                rope.yarn(original_len).map(RopeScaling::Yarn)
            }
            Some(other) => Err(ModelErrorKind::Unsupported {
                what: format!("`rope_scaling` of type {other}"),
                hint: "served are default, linear, llama3 and yarn; remove the key to serve the unstretched context",
            }),
        }
    }

    fn windows(
        &self,
        architecture: Architecture,
        layers: usize,
    ) -> Result<Vec<Option<usize>>, ModelErrorKind> {
        let enabled = match architecture {
            Architecture::Llama => false,
            Architecture::Mistral => true,
            Architecture::Qwen2 | Architecture::Qwen3 => self.use_sliding_window.unwrap_or(false),
        };
        let Some(window) = self.sliding_window.filter(|&window| enabled && window > 0) else {
            return Ok(vec![None; layers]);
        };
        if let Some(types) = &self.layer_types {
            return windows_by_type(types, window, layers);
        }
        let first = match architecture {
            Architecture::Qwen2 | Architecture::Qwen3 => self.max_window_layers.unwrap_or(28),
            Architecture::Llama | Architecture::Mistral => 0,
        };
        Ok((0..layers)
            .map(|layer| (layer >= first).then_some(window))
            .collect())
    }
}

fn windows_by_type(
    types: &[String],
    window: usize,
    layers: usize,
) -> Result<Vec<Option<usize>>, ModelErrorKind> {
    if types.len() != layers {
        return Err(ModelErrorKind::config(
            "layer_types",
            format!("names {} layers of {layers}", types.len()),
        ));
    }
    types
        .iter()
        .map(|kind| match kind.as_str() {
            "full_attention" => Ok(None),
            "sliding_attention" => Ok(Some(window)),
            other => Err(ModelErrorKind::Unsupported {
                what: format!("`layer_types` {other}"),
                hint: "served are full_attention and sliding_attention",
            }),
        })
        .collect()
}

impl RawRope {
    fn yarn(&self, original_len: f64) -> Result<Yarn, ModelErrorKind> {
        let factor = required("rope_scaling.factor", self.factor)?;
        let magnitude = match (self.attention_factor, self.mscale, self.mscale_all_dim) {
            (Some(magnitude), _, _) => magnitude,
            (None, Some(scale), Some(all)) if scale != 0.0 && all != 0.0 => {
                Yarn::magnitude_of(factor, scale) / Yarn::magnitude_of(factor, all)
            }
            _ => Yarn::magnitude_of(factor, 1.0),
        };
        Ok(Yarn {
            factor,
            original_len,
            magnitude,
            beta_fast: self.beta_fast.unwrap_or(32.0),
            beta_slow: self.beta_slow.unwrap_or(1.0),
            truncate: self.truncate.unwrap_or(true),
        })
    }
}

fn required<T>(key: &str, value: Option<T>) -> Result<T, ModelErrorKind> {
    value.ok_or_else(|| ModelErrorKind::config(key, "is missing"))
}

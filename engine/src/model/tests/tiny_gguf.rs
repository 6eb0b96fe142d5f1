//! GGUF files made from the golden Hugging Face directories the way llama.cpp's converter does it: other names,
//! permuted rows of q and k for the llama family, Llama 3's scaling as a table of divisors.

use std::io::Cursor;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde_json::Value as Json;

use super::reference_backend::narrow;
use super::{golden_json, golden_path};

const HEADS: usize = 8;
const KV_HEADS: usize = 4;

/// The bytes of a GGUF file of `tests/golden/tiny-<name>`.
pub(super) fn tiny_gguf(name: &str) -> Vec<u8> {
    let directory = golden_path(&format!("tiny-{name}"));
    let bytes = std::fs::read(directory.join("model.safetensors")).expect("golden weights");
    let weights = SafeTensors::deserialize(&bytes).expect("golden weights are sound");
    let config = golden_json(&format!("tiny-{name}/config.json"));
    let permuted = matches!(name, "llama" | "mistral");
    let mut names = weights.names();
    names.sort_unstable();
    let mut tensors: Vec<(String, QTensor)> = names
        .into_iter()
        .map(|hf_name| {
            let view = weights.tensor(hf_name).expect("a listed tensor");
            let tensor =
                Tensor::from_raw_buffer(view.data(), DType::BF16, view.shape(), &Device::Cpu)
                    .and_then(|tensor| tensor.to_dtype(DType::F32))
                    .expect("a sound tensor");
            let tensor = match hf_name {
                _ if !permuted => tensor,
                _ if hf_name.contains("q_proj") => permute(&tensor, HEADS),
                _ if hf_name.contains("k_proj") => permute(&tensor, KV_HEADS),
                _ => tensor,
            };
            // The converter keeps vectors in full precision.
            let dtype = if view.shape().len() == 1 {
                GgmlDType::F32
            } else {
                GgmlDType::BF16
            };
            let tensor = QTensor::quantize(&tensor, dtype).expect("floats need no blocks");
            (gguf_name(hf_name), tensor)
        })
        .collect();
    if name == "llama" {
        tensors.push(("rope_freqs.weight".to_owned(), llama3_divisors(&config)));
    }
    write(&metadata(name, &config), &tensors)
}

/// A GGUF file of these metadata and tensors.
pub(crate) fn write(metadata: &[(String, Value)], tensors: &[(String, QTensor)]) -> Vec<u8> {
    let metadata: Vec<_> = metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &tensors).expect("memory takes it");
    file.into_inner()
}

/// Pairs `(i, i + D/2)` become neighbours.
fn permute(weight: &Tensor, heads: usize) -> Tensor {
    let (rows, cols) = weight.dims2().expect("a matrix");
    weight
        .reshape((heads, 2, rows / heads / 2, cols))
        .and_then(|split| split.transpose(1, 2))
        .and_then(|swapped| swapped.contiguous()?.reshape((rows, cols)))
        .expect("heads divide the rows")
}

fn llama3_divisors(config: &Json) -> QTensor {
    let scaling = &config["rope_scaling"];
    let number = |key: &str| scaling[key].as_f64().expect("a number");
    let theta = config["rope_theta"].as_f64().expect("a number");
    let divisors: Vec<f32> = (0..8)
        .map(|index| {
            let wavelength = 2.0 * std::f64::consts::PI * theta.powf(f64::from(index) / 8.0);
            let original = number("original_max_position_embeddings");
            let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
            if wavelength < original / high {
                1.0
            } else if wavelength > original / low {
                8.0
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                narrow(1.0 / ((1.0 - smooth) / number("factor") + smooth))
            }
        })
        .collect();
    let tensor = Tensor::new(divisors, &Device::Cpu).expect("a vector");
    QTensor::quantize(&tensor, GgmlDType::F32).expect("floats need no blocks")
}

fn gguf_name(name: &str) -> String {
    name.replace("model.layers.", "blk.")
        .replace("model.embed_tokens", "token_embd")
        .replace("model.norm", "output_norm")
        .replace("lm_head", "output")
        .replace("input_layernorm", "attn_norm")
        .replace("post_attention_layernorm", "ffn_norm")
        .replace("self_attn.o_proj", "attn_output")
        .replace("self_attn.", "attn_")
        .replace("mlp.", "ffn_")
        .replace("_proj", "")
}

fn metadata(name: &str, config: &Json) -> Vec<(String, Value)> {
    let arch = if name == "mistral" { "llama" } else { name };
    let number = |key: &str| u32::try_from(config[key].as_u64().expect("a number")).expect("small");
    let float = |key: &str| Value::F32(narrow(config[key].as_f64().expect("a number")));
    let ours = |key: &str, value: Value| (format!("{arch}.{key}"), value);
    vec![
        (
            "general.architecture".to_owned(),
            Value::String(arch.to_owned()),
        ),
        ours("block_count", Value::U32(number("num_hidden_layers"))),
        ours(
            "context_length",
            Value::U32(number("max_position_embeddings")),
        ),
        ours("embedding_length", Value::U32(number("hidden_size"))),
        ours(
            "feed_forward_length",
            Value::U32(number("intermediate_size")),
        ),
        ours(
            "attention.head_count",
            Value::U32(number("num_attention_heads")),
        ),
        ours(
            "attention.head_count_kv",
            Value::U32(number("num_key_value_heads")),
        ),
        ours("rope.freq_base", float("rope_theta")),
        ours("attention.layer_norm_rms_epsilon", float("rms_norm_eps")),
        (
            "tokenizer.ggml.eos_token_id".to_owned(),
            Value::U32(number("eos_token_id")),
        ),
        (
            "tokenizer.ggml.bos_token_id".to_owned(),
            Value::U32(number("bos_token_id")),
        ),
    ]
}

//! GGUF files of a small llama with random weights, in each of the common kinds of blocks.

use candle_core::quantized::GgmlDType;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::Value;
use candle_core::{Device, Tensor};

use crate::model::tests::tiny_gguf;

/// What files that people have are made of; the last two hold one number each, without blocks.
pub(super) const BLOCKS: [GgmlDType; 8] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q8_0,
    GgmlDType::Q4K,
    GgmlDType::Q6K,
    GgmlDType::F16,
    GgmlDType::BF16,
];

const LAYERS: u32 = 2;
const HEADS: u32 = 4;
const KV_HEADS: u32 = 2;
/// Rows of whole blocks of 256, the widest there are.
const WIDTH: usize = 256;
const KV_WIDTH: usize = 128;
const FFN_WIDTH: usize = 768;
const VOCAB: usize = 1000;

/// The bytes of a file whose matrices are in these blocks; vectors are in full precision, as converters leave them.
pub(super) fn of(blocks: GgmlDType) -> Vec<u8> {
    let mut seed = 1;
    let mut tensor = |name: &str, rows: usize, columns: usize| {
        let values: Vec<f32> = (0..rows * columns)
            .map(|_| between_ones(&mut seed) * 0.1)
            .collect();
        let tensor = Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap();
        let tensor = QTensor::quantize(&tensor, blocks).unwrap();
        (format!("{name}.weight"), tensor)
    };
    let mut tensors = vec![
        tensor("token_embd", VOCAB, WIDTH),
        tensor("output", VOCAB, WIDTH),
    ];
    for layer in 0..LAYERS {
        let matrices = [
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", KV_WIDTH, WIDTH),
            ("attn_v", KV_WIDTH, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", FFN_WIDTH, WIDTH),
            ("ffn_up", FFN_WIDTH, WIDTH),
            ("ffn_down", WIDTH, FFN_WIDTH),
        ];
        let named = |(name, rows, columns)| tensor(&format!("blk.{layer}.{name}"), rows, columns);
        tensors.extend(matrices.map(named));
        tensors.extend(["attn_norm", "ffn_norm"].map(|name| ones(&format!("blk.{layer}.{name}"))));
    }
    tensors.push(ones("output_norm"));
    tiny_gguf::write(&metadata(), &tensors)
}

fn ones(name: &str) -> (String, QTensor) {
    let tensor = Tensor::from_vec(vec![1.0_f32; WIDTH], WIDTH, &Device::Cpu).unwrap();
    let tensor = QTensor::quantize(&tensor, GgmlDType::F32).unwrap();
    (format!("{name}.weight"), tensor)
}

/// A number between -1 and 1; the same ones for the same seed.
fn between_ones(seed: &mut u64) -> f32 {
    *seed = seed
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    let bits = u16::try_from(*seed >> 48).unwrap();
    f32::from(bits) / 32_768.0 - 1.0
}

fn metadata() -> Vec<(String, Value)> {
    let size = |size: usize| Value::U32(u32::try_from(size).unwrap());
    let named = |(key, value): (&str, Value)| (key.to_owned(), value);
    [
        ("general.architecture", Value::String("llama".to_owned())),
        ("llama.block_count", Value::U32(LAYERS)),
        ("llama.context_length", Value::U32(4096)),
        ("llama.embedding_length", size(WIDTH)),
        ("llama.feed_forward_length", size(FFN_WIDTH)),
        ("llama.attention.head_count", Value::U32(HEADS)),
        ("llama.attention.head_count_kv", Value::U32(KV_HEADS)),
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
    ]
    .map(named)
    .into()
}

//! GGUF files that are truncated, lie or are random: always an error in one line (and a hint), never a panic, an abort
//! or a large allocation.

use std::fs;

use baton_configs::llm::{LlmOptions, LoadFormat};
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use proptest::prelude::*;
use tempfile::TempDir;

use super::tiny_gguf::write;
use super::{float32, try_load};

/// A whole model in a few kilobytes: one layer, width 32.
fn small_tensors() -> Vec<(String, QTensor)> {
    let shapes: [(&str, &[usize], GgmlDType); 12] = [
        ("token_embd.weight", &[16, 32], GgmlDType::Q8_0),
        ("output.weight", &[16, 32], GgmlDType::F16),
        ("output_norm.weight", &[32], GgmlDType::F32),
        ("blk.0.attn_norm.weight", &[32], GgmlDType::F32),
        ("blk.0.attn_q.weight", &[32, 32], GgmlDType::Q4_1),
        ("blk.0.attn_k.weight", &[16, 32], GgmlDType::Q4_0),
        ("blk.0.attn_v.weight", &[16, 32], GgmlDType::BF16),
        ("blk.0.attn_output.weight", &[32, 32], GgmlDType::Q5_1),
        ("blk.0.ffn_norm.weight", &[32], GgmlDType::F32),
        ("blk.0.ffn_gate.weight", &[64, 32], GgmlDType::Q5_0),
        ("blk.0.ffn_up.weight", &[64, 32], GgmlDType::F32),
        ("blk.0.ffn_down.weight", &[32, 64], GgmlDType::Q4_1),
    ];
    let mut tensors = Vec::new();
    for (name, shape, dtype) in shapes {
        let tensor = Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu).expect("a tensor");
        tensors.push((
            name.to_owned(),
            QTensor::quantize(&tensor, dtype).expect("whole blocks"),
        ));
    }
    tensors
}

fn small_metadata() -> Vec<(String, Value)> {
    let mut metadata = vec![
        (
            "general.architecture".to_owned(),
            Value::String("llama".to_owned()),
        ),
        ("general.alignment".to_owned(), Value::U32(32)),
        (
            "llama.attention.layer_norm_rms_epsilon".to_owned(),
            Value::F32(1e-5),
        ),
        ("tokenizer.ggml.eos_token_id".to_owned(), Value::U32(2)),
        (
            "tokenizer.ggml.tokens".to_owned(),
            Value::Array(vec![
                Value::String("<|im_end|>".to_owned()),
                Value::String("a".to_owned()),
            ]),
        ),
        (
            "tokenizer.ggml.token_type".to_owned(),
            Value::Array(vec![Value::I32(3), Value::I32(1)]),
        ),
    ];
    for (key, value) in [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ] {
        metadata.push((format!("llama.{key}"), Value::U32(value)));
    }
    metadata
}

/// The small model with one metadata value replaced, added, or (by `None`) removed.
fn small_with(key: &str, value: Option<Value>) -> Vec<u8> {
    let mut metadata = small_metadata();
    metadata.retain(|(found, _)| found != key);
    metadata.extend(value.map(|value| (key.to_owned(), value)));
    write(&metadata, &small_tensors())
}

fn small() -> Vec<u8> {
    write(&small_metadata(), &small_tensors())
}

/// Where the header of [`small`] ends and data begin, by the data's size.
fn header_len(file: &[u8]) -> usize {
    let data: usize = small_tensors()
        .iter()
        .map(|(_, tensor)| tensor.storage_size_in_bytes().next_multiple_of(32))
        .sum();
    file.len() - data
}

/// Loads bytes as a GGUF file; the error's text.
fn outcome(bytes: &[u8]) -> Result<(), String> {
    let file = tempfile::NamedTempFile::with_suffix(".gguf").expect("a temporary file");
    fs::write(file.path(), bytes).expect("it can be written");
    let spec = file.path().to_str().expect("UTF-8");
    match try_load(spec, &float32()) {
        Ok(_) => Ok(()),
        Err(error) => {
            let text = error.to_string();
            assert!(
                !text.contains('\n') || text.contains("\nhint: "),
                "one line: {text}"
            );
            assert!(text.starts_with(spec), "names the file: {text}");
            Err(text)
        }
    }
}

fn find_bytes(bytes: &[u8], needle: &[u8]) -> usize {
    bytes
        .windows(needle.len())
        .position(|window| window == needle)
        .expect("it is there")
}

#[test]
fn the_small_model_is_sound() {
    assert_eq!(outcome(&small()), Ok(()));
}

#[test]
fn truncated_anywhere_is_one_line() {
    let whole = small();
    let header = header_len(&whole);
    let last_needed = whole.len() - 31;
    for len in (0..header).chain((header..last_needed).step_by(61)) {
        let error = outcome(&whole[..len]).expect_err("something is missing");
        let expected = if len < header {
            ["header", "truncated"]
        } else {
            ["truncated", "bytes at offset"]
        };
        assert!(
            expected.iter().any(|word| error.contains(word)),
            "{len}: {error}"
        );
    }
}

#[test]
fn a_header_alone_is_enough_for_dummy_weights() {
    let whole = small();
    let file = tempfile::NamedTempFile::with_suffix(".gguf").expect("a temporary file");
    fs::write(file.path(), &whole[..header_len(&whole)]).expect("it can be written");
    let options = LlmOptions {
        load_format: LoadFormat::Dummy,
        ..float32()
    };
    let loaded = try_load(file.path().to_str().expect("UTF-8"), &options).expect("it loads");
    assert_eq!(loaded.tokens.eos_ids, [2, 0]);
}

#[test]
fn truncation_names_tensor_and_bytes() {
    let whole = small();
    let header = header_len(&whole);
    let error = outcome(&whole[..header + 100]).expect_err("the table is cut");
    let end = format!(
        "truncated: tensor `token_embd.weight` needs 544 bytes at offset {header}, 100 are there"
    );
    assert!(error.ends_with(&end), "{error}");
}

fn number(value: u32) -> Option<Value> {
    Some(Value::U32(value))
}

fn word(value: &str) -> Option<Value> {
    Some(Value::String(value.to_owned()))
}

/// Each case: a key, its lie (`None` leaves it out), and words of the error.
fn check_lies(cases: Vec<(&str, Option<Value>, &str)>) {
    for (key, value, words) in cases {
        let error = outcome(&small_with(key, value)).expect_err(key);
        assert!(error.contains(words), "{key}: {error}");
    }
}

#[test]
fn lying_structure_is_refused_by_key() {
    let alignment = "general.alignment";
    let zero = "`general.alignment` is 0";
    let mamba = "architecture `mamba` is not served; served are llama";
    let longrope = "`llama.rope.scaling.type` longrope is not served";
    check_lies(vec![
        (alignment, number(0), zero),
        (alignment, Some(Value::U8(0)), zero),
        ("general.alignment\0", Some(Value::U64(0)), zero),
        (
            "general.architecture",
            None,
            "`general.architecture` is missing",
        ),
        ("general.architecture", word("mamba"), mamba),
        ("llama.expert_count", number(8), "mixture of experts"),
        (
            "split.count",
            Some(Value::U16(3)),
            "split into 3 files is not served\nhint: join them",
        ),
        ("llama.rope.scaling.type", word("longrope"), longrope),
    ]);
}

#[test]
fn lying_dimensions_are_refused_by_key() {
    let array = Value::Array(vec![Value::U32(4), Value::U32(8)]);
    let layers = "llama.block_count";
    let heads = "llama.attention.head_count";
    let shape = "has shape [16, 32], the configuration says [16, 64]";
    check_lies(vec![
        (
            layers,
            Some(Value::U64(u64::MAX)),
            "`number of layers` is 18446744073709551615",
        ),
        (
            layers,
            number(2),
            "tensor `blk.1.attn_norm.weight` is missing",
        ),
        (
            layers,
            Some(Value::I32(-1)),
            "`llama.block_count` is not one whole number",
        ),
        (layers, None, "`llama.block_count` is missing"),
        ("llama.embedding_length", number(64), shape),
        ("llama.embedding_length", number(0), "`head size` is 0"),
        (
            "llama.feed_forward_length",
            number(u32::MAX),
            "`feed-forward size` is 4294967295",
        ),
        (heads, number(0), "`number of attention heads` is 0"),
        (heads, Some(array), "not one whole number for all layers"),
        (
            "llama.attention.head_count_kv",
            number(3),
            "not a multiple of 3",
        ),
        (
            "llama.attention.head_count_kv",
            number(0),
            "`number of key/value heads` is 0",
        ),
        (
            "llama.attention.key_length",
            number(7),
            "rotary embeddings need an even one",
        ),
        (
            "llama.attention.value_length",
            number(4),
            "`llama.attention.value_length` is 4",
        ),
        (
            "llama.rope.dimension_count",
            number(4),
            "`llama.rope.dimension_count` is 4",
        ),
    ]);
}

#[test]
fn lying_numbers_are_refused_by_key() {
    let theta = "llama.rope.freq_base";
    check_lies(vec![
        (theta, Some(Value::F32(f32::NAN)), "`rope theta` is NaN"),
        (theta, Some(Value::F32(-1.0)), "`rope theta` is -1"),
        (theta, word("x"), "`llama.rope.freq_base` is not a number"),
        (
            "llama.attention.layer_norm_rms_epsilon",
            None,
            "layer_norm_rms_epsilon` is missing",
        ),
    ]);
}

#[test]
fn lying_counts_and_lengths_are_refused() {
    let whole = small();
    for at in [8, 16] {
        // Counts of tensors and of metadata.
        for lie in [u64::MAX, 1 << 40, 1 << 29, 1000] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&lie.to_le_bytes());
            assert!(
                outcome(&bytes).expect_err("a lie").contains("header"),
                "{at} {lie}"
            );
        }
    }
    // The length of a string, and of an array, each 8 bytes before its content.
    for needle in [
        b"general.architecture".as_slice(),
        b"\x03\x00\x00\x00\x01\x00\x00\x00".as_slice(),
    ] {
        let at = find_bytes(&whole, needle) - 8;
        for lie in [u64::MAX, 1 << 62, 1 << 30, 100_000] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&lie.to_le_bytes());
            assert!(
                outcome(&bytes).expect_err("a lie").contains("header"),
                "{needle:?} {lie}"
            );
        }
    }
}

#[test]
fn lying_tensor_infos_are_refused() {
    let whole = small();
    let name = b"blk.0.ffn_up.weight";
    let after = find_bytes(&whole, name) + name.len();
    // Number of dimensions u32, dimensions u64 × 2, type u32, offset u64.
    let (dims, dtype, offset) = (after + 4, after + 20, after + 24);
    let with = |at: usize, lie: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + lie.len()].copy_from_slice(lie);
        outcome(&bytes).expect_err("a lie")
    };
    for lie in [u64::MAX, 1 << 62, 1 << 32, 33, 0] {
        let error = with(dims, &lie.to_le_bytes());
        assert!(error.contains("blk.0.ffn_up.weight"), "{lie}: {error}");
        let error = with(offset, &(lie | 1 << 20).to_le_bytes());
        assert!(
            error.contains("truncated: tensor `blk.0.ffn_up.weight` needs 8192 bytes"),
            "{lie}: {error}"
        );
    }
    assert!(with(after, &u32::MAX.to_le_bytes()).contains("header"));
    assert!(with(dtype, &23_u32.to_le_bytes()).contains("header"));
    let error = with(dtype, &15_u32.to_le_bytes());
    assert!(error.contains("blk.0.ffn_up.weight"), "{error}");
    let error = with(dtype, &9_u32.to_le_bytes());
    assert!(
        error.contains("has element type Q8_1; served are F32"),
        "{error}"
    );
}

#[test]
fn an_array_that_would_fill_memory_is_refused() {
    let array = Value::Array(vec![Value::U8(0); 9 << 20]);
    let error = outcome(&small_with("x", Some(array))).expect_err("too many values");
    assert!(error.contains("more than 8388608 values"), "{error}");
}

#[test]
fn what_is_no_file_is_refused() {
    let root = TempDir::new().expect("a directory");
    let path = root.path().join("m.gguf");
    let socket = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    let error = try_load(path.to_str().expect("UTF-8"), &float32()).expect_err("a socket");
    assert!(
        error
            .to_string()
            .ends_with("cannot be read: not a regular file"),
        "{error}"
    );
    drop(socket);
    assert!(outcome(b"").expect_err("empty").contains("after 0 bytes"));
    assert!(
        outcome(b"PK\x03\x04 not a model")
            .expect_err("a zip")
            .contains("unknown magic")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn flipped_header_bytes_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..6)) {
        let mut bytes = small();
        let header = header_len(&bytes);
        for (at, mask) in flips {
            bytes[at.index(header)] ^= mask;
        }
        // What still loads was a flip in a name or a value that nothing depends on.
        let _ = outcome(&bytes);
    }
}

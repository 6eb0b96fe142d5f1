//! Vocabularies made by hand, and the tests that use them.

mod detokenizing;
mod gguf_files;
mod golden;
mod hf_directories;

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use candle_core::quantized::gguf_file::Value;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::Tokenizer;
use super::byte_level::bytes_of;

/// Metadata keys without `tokenizer.ggml.` in front.
pub(super) fn metadata(entries: Vec<(&str, Value)>) -> HashMap<String, Value> {
    entries
        .into_iter()
        .map(|(key, value)| {
            let key = match key {
                "chat_template" => format!("tokenizer.{key}"),
                _ => format!("tokenizer.ggml.{key}"),
            };
            (key, value)
        })
        .collect()
}

pub(super) fn text(value: &str) -> Value {
    Value::String(value.to_owned())
}

pub(super) fn texts<S: AsRef<str>>(values: &[S]) -> Value {
    Value::Array(values.iter().map(|value| text(value.as_ref())).collect())
}

pub(super) fn numbers(values: &[i32]) -> Value {
    Value::Array(values.iter().map(|value| Value::I32(*value)).collect())
}

pub(super) const NORMAL: i32 = 1;
pub(super) const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const UNUSED: i32 = 5;
pub(super) const BYTE: i32 = 6;

/// A byte-level vocabulary: the 256 bytes in order, then `<s>` 256, `</s>` 257, `<tool>` 258 (user-defined),
/// `[PAD]` 259 (unused), then `he`, `ll`, `hell`, `hello`, `Ġhello` from 260.
pub(super) fn byte_level(pre: &str) -> HashMap<String, Value> {
    let mut letters: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    letters.sort_by_key(|letter| bytes_of(&letter.to_string()));
    let mut tokens: Vec<String> = letters.iter().map(char::to_string).collect();
    let mut types = vec![NORMAL; 256];
    for (token, kind) in [
        ("<s>", CONTROL),
        ("</s>", CONTROL),
        ("<tool>", USER_DEFINED),
        ("[PAD]", UNUSED),
        ("he", NORMAL),
        ("ll", NORMAL),
        ("hell", NORMAL),
        ("hello", NORMAL),
        ("Ġhello", NORMAL),
    ] {
        tokens.push(token.to_owned());
        types.push(kind);
    }
    metadata(vec![
        ("model", text("gpt2")),
        ("pre", text(pre)),
        ("tokens", texts(&tokens)),
        ("token_type", numbers(&types)),
        (
            "merges",
            texts(&["h e", "l l", "he ll", "hell o", "Ġ hello"]),
        ),
        ("bos_token_id", Value::U32(256)),
        ("eos_token_id", Value::U32(257)),
        ("padding_token_id", Value::U32(259)),
    ])
}

/// A SentencePiece-like vocabulary: `<unk>`, `<s>`, `</s>`, bytes from 3, then pieces from 259, `<tool>` last.
pub(super) fn sentence_piece() -> HashMap<String, Value> {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    let mut types = vec![UNKNOWN, CONTROL, CONTROL];
    let mut scores = vec![0.0; 3];
    for byte in 0..=255_u8 {
        tokens.push(format!("<0x{byte:02X}>"));
        types.push(BYTE);
        scores.push(0.0);
    }
    let pieces = [
        ("▁t", -1.0),
        ("he", -2.0),
        ("▁the", -3.0),
        ("▁a", -4.0),
        ("at", -5.0),
        ("cat", -6.0),
        ("▁cat", -7.0),
        ("▁", -20.0),
        ("t", -21.0),
        ("h", -22.0),
        ("e", -23.0),
        ("a", -24.0),
        ("c", -25.0),
    ];
    for (piece, score) in pieces {
        tokens.push(piece.to_owned());
        types.push(NORMAL);
        scores.push(score);
    }
    tokens.push("<tool>".to_owned());
    types.push(USER_DEFINED);
    scores.push(0.0);
    let scores = scores.into_iter().map(Value::F32).collect();
    metadata(vec![
        ("model", text("llama")),
        ("tokens", texts(&tokens)),
        ("token_type", numbers(&types)),
        ("scores", Value::Array(scores)),
        ("bos_token_id", Value::U32(1)),
        ("eos_token_id", Value::U32(2)),
        ("unknown_token_id", Value::U32(0)),
    ])
}

pub(super) fn built(metadata: &HashMap<String, Value>) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_gguf(metadata).expect("a sound vocabulary"))
}

/// Shared by tests that run many cases: building one compiles expressions.
pub(super) static BYTE_LEVEL: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| built(&byte_level("gpt-2")));
pub(super) static SENTENCE_PIECE: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| built(&sentence_piece()));

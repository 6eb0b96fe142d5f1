//! What a model's files say about ending and beginning a text, and about sampling. All of it is optional in the
//! files, so nothing here fails but a file that is not JSON.

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::gguf_file::Value;
use serde::Deserialize;

use crate::backend::TokenId;
use crate::model::error::{ModelError, ModelErrorKind};
use crate::model::gguf::{integer, text};

/// Tokens that end a turn but that many GGUF files do not name in a key of their own.
const TURN_ENDS: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
];
/// GGUF's token type of control tokens; a normal token that is spelt like one ends nothing.
const CONTROL_TYPE: u64 = 3;

/// The tokens that begin and end texts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Tokens that end an answer, the model's own first, without duplicates.
    pub eos_ids: Vec<TokenId>,
    /// The token that begins a text.
    pub bos_id: Option<TokenId>,
    /// Whether a text is to begin with it; `None` leaves that to `tokenizer.json`'s post-processor.
    pub add_bos: Option<bool>,
}

/// Sampling defaults from `generation_config.json`; a request's own values win.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct GenerationDefaults {
    /// Temperature.
    pub temperature: Option<f32>,
    /// Nucleus mass.
    pub top_p: Option<f32>,
    /// How many of the best tokens to keep.
    pub top_k: Option<u32>,
    /// Smallest likelihood relative to the best token.
    pub min_p: Option<f32>,
    /// Penalty on tokens seen before.
    pub repetition_penalty: Option<f32>,
}

#[derive(Debug, Default, Deserialize)]
struct TokenKeys {
    eos_token_id: Option<OneOrMany>,
    bos_token_id: Option<OneOrMany>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(TokenId),
    Many(Vec<TokenId>),
}

impl OneOrMany {
    fn ids(&self) -> &[TokenId] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

/// From `generation_config.json`, where there is one, and `config.json`.
pub(crate) fn from_directory(
    directory: &Path,
) -> Result<(SpecialTokens, GenerationDefaults), ModelError> {
    let generation_path = directory.join("generation_config.json");
    let generation: GenerationDefaults = read_json(&generation_path)?;
    let mut tokens = SpecialTokens::default();
    for path in [generation_path, directory.join("config.json")] {
        let keys: TokenKeys = read_json(&path)?;
        for &id in keys.eos_token_id.iter().flat_map(OneOrMany::ids) {
            push_new(&mut tokens.eos_ids, id);
        }
        let bos = keys.bos_token_id.as_ref().and_then(|ids| ids.ids().first());
        tokens.bos_id = tokens.bos_id.or(bos.copied());
    }
    Ok((tokens, generation))
}

/// A JSON file, or the default where there is none.
fn read_json<T: Default + for<'de> Deserialize<'de>>(path: &Path) -> Result<T, ModelError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(T::default()),
        Err(error) => return Err(ModelErrorKind::Io(error).at(path)),
    };
    serde_json::from_str(&text).map_err(|error| {
        let (format, reason) = ("JSON", error.to_string());
        ModelErrorKind::Header { format, reason }.at(path)
    })
}

/// From a GGUF file's `tokenizer.ggml.*` keys.
pub(crate) fn from_gguf(metadata: &HashMap<String, Value>) -> SpecialTokens {
    let id = |key: &str| {
        let value = metadata.get(&format!("tokenizer.ggml.{key}"))?;
        TokenId::try_from(integer(value)?).ok()
    };
    let mut eos_ids = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        if let Some(id) = id(key) {
            push_new(&mut eos_ids, id);
        }
    }
    for id in turn_ends(metadata) {
        push_new(&mut eos_ids, id);
    }
    let add_bos = match metadata.get("tokenizer.ggml.add_bos_token") {
        Some(Value::Bool(add_bos)) => *add_bos,
        _ => adds_bos_by_default(metadata),
    };
    SpecialTokens {
        eos_ids,
        bos_id: id("bos_token_id"),
        add_bos: Some(add_bos),
    }
}

/// llama.cpp's defaults where the file does not say: SentencePiece and Llama 3 vocabularies begin with one.
fn adds_bos_by_default(metadata: &HashMap<String, Value>) -> bool {
    let pre = text(metadata, "tokenizer.ggml.pre").unwrap_or_default();
    match text(metadata, "tokenizer.ggml.model") {
        Some("llama") => true,
        _ => matches!(pre, "llama3" | "llama-v3" | "llama-bpe"),
    }
}

fn turn_ends(metadata: &HashMap<String, Value>) -> Vec<TokenId> {
    let (Some(Value::Array(tokens)), Some(Value::Array(types))) = (
        metadata.get("tokenizer.ggml.tokens"),
        metadata.get("tokenizer.ggml.token_type"),
    ) else {
        return Vec::new();
    };
    let ends_turn = |token: &Value, kind: &Value| {
        let Value::String(token) = token else {
            return false;
        };
        integer(kind) == Some(CONTROL_TYPE) && TURN_ENDS.contains(&token.as_str())
    };
    (0..)
        .zip(tokens.iter().zip(types))
        .filter(|(_, (token, kind))| ends_turn(token, kind))
        .map(|(id, _)| id)
        .collect()
}

fn push_new(ids: &mut Vec<TokenId>, id: TokenId) {
    if !ids.contains(&id) {
        ids.push(id);
    }
}

//! Typed reading of GGUF metadata: the value of the expected type, nothing, or an error that names the key.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;

use crate::backend::TokenId;
use crate::tokenizer::error::TokenizerError;
use crate::tokenizer::table::TOKENS_MAX;

/// What GGUF files say of a token (`tokenizer.ggml.token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// The metadata of a GGUF file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Metadata<'a> {
    values: &'a HashMap<String, Value>,
}

impl<'a> Metadata<'a> {
    pub(super) fn new(values: &'a HashMap<String, Value>) -> Self {
        Self { values }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, TokenizerError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(key, "a string", other)),
        }
    }

    pub(super) fn required_text(&self, key: &str) -> Result<&'a str, TokenizerError> {
        self.text(key)?
            .ok_or_else(|| TokenizerError::metadata(key, "missing"))
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, TokenizerError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(wrong_type(key, "a boolean", other)),
        }
    }

    /// A token's id; all bits set means none.
    pub(super) fn token(
        &self,
        key: &str,
        vocab_size: usize,
    ) -> Result<Option<TokenId>, TokenizerError> {
        let Some(value) = self.values.get(key) else {
            return Ok(None);
        };
        let id = integer(value).ok_or_else(|| wrong_type(key, "a token id", value))?;
        if id == -1 || id == i128::from(u32::MAX) {
            return Ok(None);
        }
        match TokenId::try_from(id) {
            Ok(id) if (id as usize) < vocab_size => Ok(Some(id)),
            _ => Err(TokenizerError::metadata(
                key,
                format!("{id} is outside the vocabulary of {vocab_size} tokens"),
            )),
        }
    }

    pub(super) fn texts(&self, key: &str) -> Result<Vec<&'a str>, TokenizerError> {
        self.array(key)?
            .ok_or_else(|| TokenizerError::metadata(key, "missing"))?
            .iter()
            .enumerate()
            .map(|(index, value)| match value {
                Value::String(text) => Ok(text.as_str()),
                other => Err(wrong_element(key, index, "a string", other)),
            })
            .collect()
    }

    pub(super) fn scores(&self, vocab_size: usize) -> Result<Vec<f32>, TokenizerError> {
        const KEY: &str = "tokenizer.ggml.scores";
        let values = self
            .array(KEY)?
            .ok_or_else(|| TokenizerError::metadata(KEY, "missing"))?;
        check_length(KEY, values.len(), vocab_size)?;
        values
            .iter()
            .enumerate()
            .map(|(index, value)| match value {
                Value::F32(score) if !score.is_nan() => Ok(*score),
                other => Err(wrong_element(KEY, index, "a number (f32)", other)),
            })
            .collect()
    }

    pub(super) fn token_types(
        &self,
        vocab_size: usize,
    ) -> Result<Option<Vec<TokenType>>, TokenizerError> {
        const KEY: &str = "tokenizer.ggml.token_type";
        let Some(values) = self.array(KEY)? else {
            return Ok(None);
        };
        check_length(KEY, values.len(), vocab_size)?;
        let types = values
            .iter()
            .enumerate()
            .map(|(index, value)| match integer(value) {
                // 0 is "undefined", which readers take as ordinary text.
                Some(0 | 1) => Ok(TokenType::Normal),
                Some(2) => Ok(TokenType::Unknown),
                Some(3) => Ok(TokenType::Control),
                Some(4) => Ok(TokenType::UserDefined),
                Some(5) => Ok(TokenType::Unused),
                Some(6) => Ok(TokenType::Byte),
                _ => Err(wrong_element(KEY, index, "a type from 0 to 6", value)),
            })
            .collect::<Result<_, _>>()?;
        Ok(Some(types))
    }

    /// The keys `<key>.<name>` with their names, sorted.
    pub(super) fn keys_below(&self, key: &str) -> Vec<(&'a str, &'a str)> {
        let mut found: Vec<(&str, &str)> = self
            .values
            .keys()
            .filter_map(|full| {
                let name = full.strip_prefix(key)?.strip_prefix('.')?;
                Some((full.as_str(), name))
            })
            .collect();
        found.sort_unstable();
        found
    }

    fn array(&self, key: &str) -> Result<Option<&'a [Value]>, TokenizerError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) if values.len() > TOKENS_MAX => {
                let reason = format!("{} elements (at most {TOKENS_MAX})", values.len());
                Err(TokenizerError::metadata(key, reason))
            }
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(other) => Err(wrong_type(key, "an array", other)),
        }
    }
}

fn check_length(key: &str, length: usize, vocab_size: usize) -> Result<(), TokenizerError> {
    if length == vocab_size {
        return Ok(());
    }
    let reason = format!("{length} elements for {vocab_size} tokens");
    Err(TokenizerError::metadata(key, reason))
}

fn integer(value: &Value) -> Option<i128> {
    match value {
        Value::U8(value) => Some((*value).into()),
        Value::I8(value) => Some((*value).into()),
        Value::U16(value) => Some((*value).into()),
        Value::I16(value) => Some((*value).into()),
        Value::U32(value) => Some((*value).into()),
        Value::I32(value) => Some((*value).into()),
        Value::U64(value) => Some((*value).into()),
        Value::I64(value) => Some((*value).into()),
        Value::F32(_) | Value::F64(_) | Value::Bool(_) | Value::String(_) | Value::Array(_) => None,
    }
}

fn wrong_type(key: &str, expected: &str, found: &Value) -> TokenizerError {
    let found = described(found);
    TokenizerError::metadata(key, format!("expected {expected}, found {found}"))
}

fn wrong_element(key: &str, index: usize, expected: &str, found: &Value) -> TokenizerError {
    let found = described(found);
    TokenizerError::metadata(
        key,
        format!("element {index}: expected {expected}, found {found}"),
    )
}

fn described(value: &Value) -> String {
    match value {
        Value::String(_) => "a string".to_owned(),
        Value::Array(values) => format!("an array of {}", values.len()),
        Value::Bool(value) => value.to_string(),
        Value::F32(value) => value.to_string(),
        Value::F64(value) => value.to_string(),
        number => integer(number).map_or_else(|| "nothing".to_owned(), |value| value.to_string()),
    }
}

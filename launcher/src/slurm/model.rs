//! What a model's files say about its shape, read from their headers alone, before a job is submitted.
//!
//! This decides nothing about whether a model can be served; the engine does, when it loads it.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use serde_json::Value;

/// What parallel ranks divide among themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ModelFacts {
    /// Query heads.
    pub(super) heads: u64,
    /// Heads of keys and values.
    pub(super) kv_heads: u64,
    /// Values of each head, where the files say.
    pub(super) head_size: Option<u64>,
    /// Layers.
    pub(super) layers: u64,
}

/// Why a model's shape is not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum ModelReadError {
    /// Its file cannot be read.
    #[error("{} cannot be read: {cause}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// The system's word.
        cause: io::Error,
    },
    /// Its file is not what its name says.
    #[error("{} is damaged: {what}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// There is no model.
    #[error("{} holds neither a config.json nor one .gguf file", .0.display())]
    NoModel(PathBuf),
}

/// Reads the shape of the model at a path.
pub(super) fn read(path: &Path) -> Result<ModelFacts, ModelReadError> {
    if !path.is_dir() {
        return read_gguf(path);
    }
    let config = path.join("config.json");
    if config.exists() {
        return read_config(&config);
    }
    match gguf_files(path).as_slice() {
        [only] => read_gguf(only),
        _ => Err(ModelReadError::NoModel(path.to_owned())),
    }
}

fn gguf_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let is_gguf = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "gguf");
    entries.map(|entry| entry.path()).filter(is_gguf).collect()
}

fn read_config(file: &Path) -> Result<ModelFacts, ModelReadError> {
    let damaged = |what: String| ModelReadError::Damaged {
        file: file.to_owned(),
        what,
    };
    let text = std::fs::read(file).map_err(|cause| ModelReadError::Unreadable {
        file: file.to_owned(),
        cause,
    })?;
    let config: Value =
        serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
    // Models of several parts keep the language model's shape one level down.
    let shape = config.get("text_config").unwrap_or(&config);
    let number = |key: &str| {
        shape
            .get(key)
            .and_then(Value::as_u64)
            .filter(|number| *number > 0)
    };
    let needed = |key: &str| number(key).ok_or_else(|| damaged(format!("no number `{key}`")));
    let heads = needed("num_attention_heads")?;
    Ok(ModelFacts {
        heads,
        kv_heads: number("num_key_value_heads").unwrap_or(heads),
        head_size: number("head_dim").or_else(|| number("hidden_size").map(|size| size / heads)),
        layers: needed("num_hidden_layers")?,
    })
}

/// A GGUF header, as far as it is needed.
struct Header<R> {
    input: BufReader<R>,
    file: PathBuf,
    /// Bytes that may still be read: a damaged length must not keep this busy.
    left: u64,
}

/// More than any header holds, tokenizers included.
const HEADER_BYTES_MAX: u64 = 512 * 1024 * 1024;
const KEY_BYTES_MAX: u64 = 64 * 1024;

fn read_gguf(file: &Path) -> Result<ModelFacts, ModelReadError> {
    let input = File::open(file).map_err(|cause| ModelReadError::Unreadable {
        file: file.to_owned(),
        cause,
    })?;
    Header {
        input: BufReader::new(input),
        file: file.to_owned(),
        left: HEADER_BYTES_MAX,
    }
    .facts()
}

impl<R: Read + Seek> Header<R> {
    fn damaged(&self, what: impl Into<String>) -> ModelReadError {
        ModelReadError::Damaged {
            file: self.file.clone(),
            what: what.into(),
        }
    }

    fn facts(mut self) -> Result<ModelFacts, ModelReadError> {
        const KEYS: [&str; 4] = [
            "attention.head_count",
            "attention.head_count_kv",
            "block_count",
            "attention.key_length",
        ];
        if &self.bytes::<4>()? != b"GGUF" {
            return Err(self.damaged("it does not start with `GGUF`"));
        }
        let version = u32::from_le_bytes(self.bytes()?);
        if !(2..=3).contains(&version) {
            return Err(self.damaged(format!("GGUF version {version} is not known")));
        }
        let _tensors = self.word()?;
        let entries = self.word()?;
        let mut found = [None; KEYS.len()];
        for _ in 0..entries {
            let key = self.key()?;
            let kind = u32::from_le_bytes(self.bytes()?);
            let wanted = KEYS.iter().position(|name| {
                key.strip_suffix(name)
                    .is_some_and(|family| family.len() > 1 && family.ends_with('.'))
            });
            match wanted {
                Some(at) => found[at] = self.number(kind)?,
                None => self.skip(kind, 0)?,
            }
            // Vocabularies follow, and are long.
            if found[..3].iter().all(Option::is_some) && key.starts_with("tokenizer.") {
                break;
            }
        }
        let needed = |at: usize| found[at].filter(|number| *number > 0);
        let (Some(heads), Some(layers)) = (needed(0), needed(2)) else {
            return Err(self.damaged("its header does not say how many heads and layers it has"));
        };
        Ok(ModelFacts {
            heads,
            kv_heads: needed(1).unwrap_or(heads),
            head_size: needed(3),
            layers,
        })
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], ModelReadError> {
        let mut bytes = [0; N];
        self.take(N as u64)?;
        self.input
            .read_exact(&mut bytes)
            .map_err(|error| self.damaged(format!("its header ends early: {error}")))?;
        Ok(bytes)
    }

    fn word(&mut self) -> Result<u64, ModelReadError> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn take(&mut self, bytes: u64) -> Result<(), ModelReadError> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| {
            self.damaged(format!("its header has more than {HEADER_BYTES_MAX} bytes"))
        })?;
        Ok(())
    }

    fn key(&mut self) -> Result<String, ModelReadError> {
        let length = self.word()?;
        if length > KEY_BYTES_MAX {
            return Err(self.damaged(format!("a key of {length} bytes")));
        }
        self.take(length)?;
        let mut bytes = Vec::new();
        let read = (&mut self.input).take(length).read_to_end(&mut bytes);
        match read {
            Ok(count) if count as u64 == length => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            _ => Err(self.damaged("its header ends early")),
        }
    }

    /// A whole number; for a list of them, which some models have one a layer, the first.
    fn number(&mut self, kind: u32) -> Result<Option<u64>, ModelReadError> {
        Ok(match kind {
            4 => Some(u64::from(u32::from_le_bytes(self.bytes()?))),
            5 => u64::try_from(i32::from_le_bytes(self.bytes()?)).ok(),
            10 => Some(self.word()?),
            11 => u64::try_from(i64::from_le_bytes(self.bytes()?)).ok(),
            ARRAY => {
                let (inner, count) = (u32::from_le_bytes(self.bytes()?), self.word()?);
                if inner == ARRAY || count == 0 {
                    return Err(self.damaged("a count that is no number"));
                }
                let first = self.number(inner)?;
                self.skip_many(inner, count - 1, 1)?;
                first
            }
            other => {
                self.skip(other, 0)?;
                None
            }
        })
    }

    fn skip(&mut self, kind: u32, depth: u32) -> Result<(), ModelReadError> {
        match kind {
            STRING => {
                let length = self.word()?;
                self.forward(length)
            }
            ARRAY if depth < 4 => {
                let (inner, count) = (u32::from_le_bytes(self.bytes()?), self.word()?);
                self.skip_many(inner, count, depth + 1)
            }
            _ => match width(kind) {
                Some(width) => self.forward(width),
                None => Err(self.damaged(format!("a value of the unknown type {kind}"))),
            },
        }
    }

    fn skip_many(&mut self, kind: u32, count: u64, depth: u32) -> Result<(), ModelReadError> {
        match width(kind) {
            Some(width) => self.forward(width.saturating_mul(count)),
            None => (0..count).try_for_each(|_| self.skip(kind, depth)),
        }
    }

    fn forward(&mut self, bytes: u64) -> Result<(), ModelReadError> {
        self.take(bytes)?;
        let step = i64::try_from(bytes).unwrap_or(i64::MAX);
        // Within the buffer this costs nothing, and vocabularies are many short texts.
        let moved = self.input.seek_relative(step);
        moved
            .map(|_| ())
            .map_err(|error| self.damaged(error.to_string()))
    }
}

const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a value of fixed size.
fn width(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

#[cfg(test)]
mod tests;

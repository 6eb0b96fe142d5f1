//! Why a tokenizer could not be made, or a text not be read.

use std::io;
use std::path::{Path, PathBuf};

/// Why a tokenizer could not be made, or a text not be read. Each message is one line (and a `hint:` line).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A file of the model's directory cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The directory has no `tokenizer.json`.
    #[error(
        "no tokenizer.json in {}\nhint: only the fast tokenizer's file is read; transformers writes it with `save_pretrained`",
        directory.display()
    )]
    NoTokenizerFile {
        /// The model's directory.
        directory: PathBuf,
    },
    /// A file of the model's directory does not hold what it should.
    #[error("{}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A key of the GGUF file is missing or does not hold what it should.
    #[error("gguf metadata `{key}`: {reason}")]
    Metadata {
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The GGUF file names a kind of tokenizer that is not built in.
    #[error("gguf tokenizer model `{name}` is not supported (supported: gpt2, llama)")]
    UnknownModel {
        /// The value of `tokenizer.ggml.model`.
        name: String,
    },
    /// The GGUF file names a pre-tokenizer that is not built in.
    #[error("gguf pre-tokenizer `{name}` is not supported (supported: {supported})")]
    UnknownPreTokenizer {
        /// The value of `tokenizer.ggml.pre`.
        name: String,
        /// The names that are.
        supported: String,
    },
    /// `tokenizer.json` asks for a decoder whose text cannot be made token by token.
    #[error(
        "decoder `{name}` of tokenizer.json is not supported (supported: ByteLevel, ByteFallback, Metaspace, Replace, Strip, Fuse)"
    )]
    UnsupportedDecoder {
        /// The decoder's type, with what is special about it.
        name: String,
    },
    /// The vocabulary contradicts itself or is larger than any real one.
    #[error("vocabulary: {reason}")]
    Vocabulary {
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer refused a text.
    #[error("cannot tokenize: {reason}")]
    Encode {
        /// What it said.
        reason: String,
    },
}

impl TokenizerError {
    pub(super) fn metadata(key: &str, reason: impl Into<String>) -> Self {
        Self::Metadata {
            key: key.to_owned(),
            reason: reason.into(),
        }
    }

    pub(super) fn parse(path: &Path, reason: impl AsRef<str>) -> Self {
        Self::Parse {
            path: path.to_owned(),
            reason: one_line(reason.as_ref()),
        }
    }

    pub(super) fn vocabulary(reason: impl AsRef<str>) -> Self {
        Self::Vocabulary {
            reason: one_line(reason.as_ref()),
        }
    }
}

/// A message of somebody else's, on one line.
pub(super) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

//! Why a model could not be found or loaded: one line that names the file and the value, and a hint where there
//! is a remedy. Files are the world, so nothing here is ever a panic.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use crate::backend::{BackendError, ReadError};

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
#[error("{subject}: {kind}")]
pub struct ModelError {
    /// The file, directory or model id that is to blame.
    pub subject: String,
    /// What is wrong with it.
    pub kind: ModelErrorKind,
}

/// What is wrong with a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelErrorKind {
    /// Nothing by this name is on this machine.
    #[error("no such model on this machine; looked at {}\nhint: {hint}", paths(.looked))]
    NotFound {
        /// Every place that was looked at.
        looked: Vec<PathBuf>,
        /// How to get it.
        hint: String,
    },
    /// A directory does not say which model it means.
    #[error("{reason}\nhint: {hint}")]
    Ambiguous {
        /// What is there.
        reason: String,
        /// What to write instead.
        hint: &'static str,
    },
    /// The system refused.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// A stretch of it cannot be had.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The header is damaged, lies, or is of an unknown version.
    #[error("not a readable {format} header: {reason}")]
    Header {
        /// `GGUF` or `safetensors`.
        format: &'static str,
        /// What the reader says.
        reason: String,
    },
    /// A tensor's bytes are not in the file.
    #[error(
        "truncated: tensor `{tensor}` needs {needed} bytes at offset {offset}, {there} are there"
    )]
    Truncated {
        /// Its name.
        tensor: String,
        /// Where it starts in the file.
        offset: u64,
        /// Its size.
        needed: u64,
        /// Bytes of the file from `offset` on.
        there: u64,
    },
    /// A tensor that the architecture needs is not in the file.
    #[error("tensor `{0}` is missing")]
    MissingTensor(String),
    /// A tensor contradicts the configuration.
    #[error("tensor `{tensor}` has shape {found:?}, the configuration says {expected:?}")]
    Shape {
        /// Its name.
        tensor: String,
        /// The file's shape, rows first.
        found: Vec<usize>,
        /// The configuration's.
        expected: Vec<usize>,
    },
    /// A tensor's element type is not served.
    #[error("tensor `{tensor}` has element type {dtype}; served are {}", .served.join(", "))]
    Dtype {
        /// Its name.
        tensor: String,
        /// The file's type.
        dtype: String,
        /// Types that this file format may hold here.
        served: &'static [&'static str],
    },
    /// A model of another family.
    #[error("architecture `{found}` is not served; served are {}", .served.join(", "))]
    Architecture {
        /// What the file says.
        found: String,
        /// What is served, in the file format's own names.
        served: &'static [&'static str],
    },
    /// The file asks for something that this engine does not do.
    #[error("{what} is not served\nhint: {hint}")]
    Unsupported {
        /// The key and its value.
        what: String,
        /// What to do instead.
        hint: &'static str,
    },
    /// The model cannot be divided over so many ranks.
    #[error("{reason}\nhint: {hint}")]
    Parallelism {
        /// The size that does not go, and the number that it does not fit.
        reason: String,
        /// Sizes that go.
        hint: String,
    },
    /// A key of the configuration is missing or out of range.
    #[error("`{key}` {reason}")]
    Config {
        /// The key.
        key: String,
        /// What is wrong, with the value.
        reason: String,
    },
    /// Memory for dummy weights is not there.
    #[error("out of memory: tensor `{tensor}` needs {bytes} bytes")]
    OutOfMemory {
        /// Its name.
        tensor: String,
        /// Its size.
        bytes: usize,
    },
    /// The backend refused a weight.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl ModelErrorKind {
    /// A key that is missing or out of range.
    pub(crate) fn config(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config {
            key: key.into(),
            reason: reason.into(),
        }
    }

    /// Blames a file or directory.
    pub(crate) fn at(self, path: &Path) -> ModelError {
        self.of(path.display())
    }

    /// Blames whatever the user would call it.
    pub(crate) fn of(self, subject: impl Display) -> ModelError {
        ModelError {
            subject: subject.to_string(),
            kind: self,
        }
    }
}

fn paths(looked: &[PathBuf]) -> String {
    let looked: Vec<_> = looked
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    looked.join(", ")
}

//! The core of `baton config check`: which kind of document a file is, and everything that is wrong with it.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde_json::{Value as Json, json};

use crate::benchmark::RawBenchmark;
use crate::disagg::RawDisagg;
use crate::error::{ConfigError, ConfigErrorKind, ConfigErrors, Warning};
use crate::layout::RawLayout;
use crate::llm::{LlmOverrides, RawLlm};
use crate::metadata::RawMetadata;
use crate::section::{Section, SectionTable};
use crate::yaml::Document;
use crate::{benchmark, disagg, layout, llm, metadata};

/// The kinds of documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `disagg_config.yaml`.
    Disagg,
    /// Our layout file.
    Layout,
    /// The metadata-server file.
    Metadata,
    /// An engine's options.
    Llm,
    /// A benchmark `config.yaml`, which means a layout.
    Benchmark,
}

impl Kind {
    /// Every kind; of two that fit a document alike, the one in front is guessed.
    pub const ALL: [Self; 5] = [
        Self::Layout,
        Self::Llm,
        Self::Disagg,
        Self::Metadata,
        Self::Benchmark,
    ];

    /// The name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disagg => "disagg",
            Self::Layout => "layout",
            Self::Metadata => "metadata",
            Self::Llm => "llm",
            Self::Benchmark => "benchmark",
        }
    }

    pub(crate) fn table(self) -> &'static SectionTable {
        match self {
            Self::Disagg => RawDisagg::TABLE,
            Self::Layout => RawLayout::TABLE,
            Self::Metadata => RawMetadata::TABLE,
            Self::Llm => RawLlm::TABLE,
            Self::Benchmark => RawBenchmark::TABLE,
        }
    }

    /// Keys by which a document of this kind is known, though other kinds have some of them too.
    fn signs(self) -> &'static [&'static str] {
        match self {
            Self::Disagg => &["context_servers", "generation_servers"],
            Self::Layout => &["context", "generation", "engine", "proxy", "start"],
            Self::Metadata => &[
                "server_type",
                "refresh_interval",
                "refersh_interval",
                "health_check_timeout",
            ],
            Self::Llm => &[
                "kv_cache_config",
                "cache_transceiver_config",
                "max_batch_size",
            ],
            Self::Benchmark => &["worker_config", "hardware"],
        }
    }

    /// The kind whose keys a document has most of.
    #[must_use]
    pub fn guess(document: &Document) -> Self {
        const SIGN_WEIGHT: usize = 16;
        let score = |kind: Self| -> usize {
            let weigh = |key: &str| {
                let known = usize::from(kind.table().knows(key));
                known + SIGN_WEIGHT * usize::from(kind.signs().contains(&key))
            };
            document.top_level_keys().map(weigh).sum()
        };
        // Server sections decide: beside them, engine options are inherited ones.
        if document
            .top_level_keys()
            .any(|key| Self::Disagg.signs().contains(&key))
        {
            return Self::Disagg;
        }
        if benchmark::is_benchmark(document) {
            return Self::Benchmark;
        }
        let mut best = (0, Self::Llm);
        for kind in Self::ALL {
            let score = score(kind);
            if score > best.0 {
                best = (score, kind);
            }
        }
        best.1
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no kind of document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown kind of document \"{0}\", expected disagg, layout, metadata, llm or benchmark")]
pub struct UnknownKind(String);

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(name: &str) -> Result<Self, UnknownKind> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| UnknownKind(name.to_owned()))
    }
}

/// What `baton config check` says about one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckReport {
    /// The file as named.
    pub file: String,
    /// What it was taken for; `None` if it could not be read at all.
    pub kind: Option<Kind>,
    /// Everything that is wrong, or what is merely worth knowing.
    pub outcome: Result<Vec<Warning>, ConfigErrors>,
}

impl CheckReport {
    /// Whether the file can be used.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.outcome.is_ok()
    }

    /// The report for programs.
    #[must_use]
    pub fn to_json(&self) -> Json {
        let (errors, warnings): (&[ConfigError], &[Warning]) = match &self.outcome {
            Ok(warnings) => (&[], warnings),
            Err(errors) => (errors.errors(), &[]),
        };
        json!({
            "file": self.file,
            "kind": self.kind.map(Kind::name),
            "good": self.is_good(),
            "errors": errors.iter().map(error_json).collect::<Vec<_>>(),
            "warnings": warnings.iter().map(|warning| json!({
                "file": warning.file,
                "line": warning.place.map(|place| place.line),
                "column": warning.place.map(|place| place.column),
                "path": warning.path,
                "message": warning.text,
            })).collect::<Vec<_>>(),
        })
    }
}

fn error_json(error: &ConfigError) -> Json {
    let nearest = match &error.kind {
        ConfigErrorKind::UnknownKey { nearest, .. } => nearest.as_deref(),
        _ => None,
    };
    json!({
        "file": error.file,
        "line": error.place.map(|place| place.line),
        "column": error.place.map(|place| place.column),
        "path": error.path,
        "message": error.kind.to_string(),
        "nearest": nearest,
        "hint": error.hint,
    })
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.outcome, self.kind) {
            (Ok(warnings), kind) => {
                for warning in warnings {
                    writeln!(f, "{warning}")?;
                }
                write!(f, "{}: good ({})", self.file, kind.map_or("", Kind::name))
            }
            (Err(errors), kind) => {
                let count = errors.errors().len();
                let plural = if count == 1 { "" } else { "s" };
                writeln!(f, "{errors}")?;
                write!(f, "{}: {count} error{plural}", self.file)?;
                kind.map_or(Ok(()), |kind| write!(f, " (checked as {kind})"))
            }
        }
    }
}

/// Checks one file; without a kind, the kind is guessed from its keys.
#[must_use]
pub fn check_file(path: &Path, kind: Option<Kind>) -> CheckReport {
    match Document::read(path) {
        Ok(document) => check_document(&document, kind),
        Err(errors) => CheckReport {
            file: path.display().to_string(),
            kind,
            outcome: Err(errors),
        },
    }
}

/// Checks one document; without a kind, the kind is guessed from its keys.
#[must_use]
pub fn check_document(document: &Document, kind: Option<Kind>) -> CheckReport {
    let kind = kind.unwrap_or_else(|| Kind::guess(document));
    let outcome = match kind {
        Kind::Disagg => check_disagg(document),
        Kind::Layout => check_layout(document),
        Kind::Benchmark => check_benchmark(document),
        Kind::Metadata => metadata::resolve(document).map(|(_, warnings)| warnings),
        Kind::Llm => {
            llm::resolve(Some(document), &LlmOverrides::default()).map(|(_, warnings)| warnings)
        }
    };
    CheckReport {
        file: document.file().to_owned(),
        kind: Some(kind),
        outcome,
    }
}

fn check_disagg(document: &Document) -> Result<Vec<Warning>, ConfigErrors> {
    let (resolved, mut warnings) = disagg::resolve(document, 0)?;
    let groups = [
        (
            "context_servers",
            &resolved.context,
            &resolved.proxy.context_servers,
        ),
        (
            "generation_servers",
            &resolved.generation,
            &resolved.proxy.generation_servers,
        ),
    ];
    let registers = resolved.proxy.cluster.is_some();
    for (name, group, _) in groups
        .into_iter()
        .filter(|(_, _, known)| known.servers.is_empty() && !registers)
    {
        warnings.push(Warning {
            file: document.file().to_owned(),
            place: document.root().entry(name).and_then(|entry| entry.place),
            path: format!("{name}.urls"),
            text: format!(
                "not given: `baton disaggregated` needs them, `baton up` lets the kernel choose {} port(s)",
                group.num_instances
            ),
        });
    }
    Ok(warnings)
}

/// A layout may leave its model to the command line of `baton up`, so a missing one is only a warning.
fn check_layout(document: &Document) -> Result<Vec<Warning>, ConfigErrors> {
    let named = document
        .root()
        .entry("model")
        .is_some_and(|entry| !entry.node.is_null());
    let (_, mut warnings) = layout::resolve_layout(document, Some("any"))?;
    if !named {
        warnings.push(Warning {
            file: document.file().to_owned(),
            place: None,
            path: "model".to_owned(),
            text: "not given: `baton up` needs one on its command line".to_owned(),
        });
    }
    Ok(warnings)
}

/// A benchmark file may leave its model to the command line too.
fn check_benchmark(document: &Document) -> Result<Vec<Warning>, ConfigErrors> {
    benchmark::inspect(document, Some("any"))
        .finish(Vec::new())
        .map(|(_, warnings)| warnings)
}

#[cfg(test)]
mod tests;

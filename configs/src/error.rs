//! What is wrong with a document: every mistake at once, each with its place and what was expected.
//!
//! One mistake is one line, `FILE:LINE:COLUMN: PATH: what`, with an optional second line that starts with
//! `hint:`. Nothing is printed here, and nothing is decided: the caller prints, and chooses the exit code.

use std::fmt;

/// Where a value stands in its document; both count from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Line.
    pub line: u32,
    /// Column, in characters.
    pub column: u32,
}

/// What kind of mistake was made.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigErrorKind {
    /// The file could not be read.
    Unreadable {
        /// The operating system's reason.
        cause: String,
    },
    /// The text is not YAML.
    Syntax {
        /// The parser's reason.
        cause: String,
    },
    /// The document has no content.
    Empty {
        /// What the document should hold.
        expected: String,
    },
    /// The document is larger, deeper or more entangled than any configuration is.
    TooLarge {
        /// Which limit was passed.
        limit: String,
    },
    /// A key stands twice in one mapping.
    DuplicateKey {
        /// Where it stood first.
        first: Place,
    },
    /// A key that this document does not have.
    UnknownKey {
        /// The key as written.
        key: String,
        /// The known key that is written most like it.
        nearest: Option<String>,
    },
    /// A key that must be there is not.
    Missing {
        /// What should be there.
        expected: String,
    },
    /// A value of the wrong type or out of its range.
    WrongValue {
        /// The value as written.
        found: String,
        /// What is accepted.
        expected: String,
    },
    /// Two values that exclude each other.
    Conflict {
        /// Which ones, and how.
        what: String,
    },
    /// A known option with a value that this version does not serve.
    NotServed {
        /// The value as written.
        found: String,
        /// What is not served.
        what: String,
    },
}

impl fmt::Display for ConfigErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { cause } => write!(f, "cannot be read: {cause}"),
            Self::Syntax { cause } => write!(f, "not valid YAML: {cause}"),
            Self::Empty { expected } => write!(f, "document is empty, expected {expected}"),
            Self::TooLarge { limit } => write!(f, "document refused: {limit}"),
            Self::DuplicateKey { first } => {
                write!(f, "key stands twice, first on line {}", first.line)
            }
            Self::UnknownKey { key, .. } => write!(f, "unknown key `{}`", shown_key(key)),
            Self::Missing { expected } => write!(f, "missing, expected {expected}"),
            Self::WrongValue { found, expected } => write!(f, "found {found}, expected {expected}"),
            Self::Conflict { what } => f.write_str(what),
            Self::NotServed { found, what } => {
                write!(f, "{found} is not served by this version: {what}")
            }
        }
    }
}

/// One mistake in one document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The document, as the user named it; `command line` for an option typed there.
    pub file: String,
    /// Where, if it has a place.
    pub place: Option<Place>,
    /// The YAML path, such as `context_servers.urls[1]`; empty for the whole document.
    pub path: String,
    /// What is wrong.
    pub kind: ConfigErrorKind,
    /// What would mend it, if that is known.
    pub hint: Option<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_origin(f, &self.file, self.place, &self.path)?;
        write!(f, "{}", self.kind)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// Everything that is wrong with a document, in the order of the lines; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors {
    errors: Vec<ConfigError>,
}

impl ConfigErrors {
    /// The errors, sorted by file and place; `None` if there are none.
    pub(crate) fn from_found(mut errors: Vec<ConfigError>) -> Option<Self> {
        errors.sort_by(|a, b| (&a.file, a.place, &a.path).cmp(&(&b.file, b.place, &b.path)));
        errors.dedup();
        (!errors.is_empty()).then_some(Self { errors })
    }

    /// The errors, first line first.
    #[must_use]
    pub fn errors(&self) -> &[ConfigError] {
        &self.errors
    }
}

impl From<ConfigError> for ConfigErrors {
    fn from(error: ConfigError) -> Self {
        Self {
            errors: vec![error],
        }
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.errors.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Something in a document that works differently from what its writer may think.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// The document, as the user named it.
    pub file: String,
    /// Where, if it has one place.
    pub place: Option<Place>,
    /// The YAML path; empty for the whole document.
    pub path: String,
    /// What is different, in one line.
    pub text: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_origin(f, &self.file, self.place, &self.path)?;
        f.write_str(&self.text)
    }
}

fn write_origin(
    f: &mut fmt::Formatter<'_>,
    file: &str,
    place: Option<Place>,
    path: &str,
) -> fmt::Result {
    f.write_str(file)?;
    if let Some(place) = place {
        write!(f, ":{}:{}", place.line, place.column)?;
    }
    f.write_str(": ")?;
    if !path.is_empty() {
        write!(f, "{path}: ")?;
    }
    Ok(())
}

/// A key as it can stand in a line.
pub(crate) fn shown_key(key: &str) -> String {
    const KEY_CHARS_MAX: usize = 60;
    let escaped = key.escape_debug();
    if escaped.clone().count() <= KEY_CHARS_MAX {
        return escaped.to_string();
    }
    escaped.take(KEY_CHARS_MAX).chain(['…']).collect()
}

/// The known name that is written most like `name`, if any is near enough to be meant.
#[must_use]
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    const NEAR_ENOUGH: f64 = 0.75;
    let wanted = name.to_lowercase().replace('-', "_");
    known
        .into_iter()
        .map(|candidate| {
            (
                strsim::normalized_damerau_levenshtein(&wanted, candidate),
                candidate,
            )
        })
        .filter(|(likeness, _)| *likeness >= NEAR_ENOUGH)
        .max_by(|a, b| a.0.total_cmp(&b.0).then_with(|| b.1.cmp(a.1)))
        .map(|(_, candidate)| candidate)
}

//! A YAML document as a tree in which every key and value knows its place.
//!
//! The text is parsed once, here; all typing happens on the tree, so that one run finds every mistake.
//! Limits on size, depth and aliases keep a hostile or broken file from costing more than an error line.
//! Quoted scalars stay text; plain ones are null, boolean, number or text as YAML 1.1 users expect.

mod parse;
mod text;

use std::path::Path;

use crate::error::{ConfigError, ConfigErrorKind, ConfigErrors, Place};
use crate::yaml::parse::{drop_duplicates, empty, too_large, whole_document};
use crate::yaml::text::{SHOWN_CHARS_MAX, shorten, write_flow};

pub(crate) use text::{join, number_text, quoted};

/// Largest document that is read, in bytes. The largest in use are a few kilobytes.
pub const DOCUMENT_BYTES_MAX: usize = 1024 * 1024;

/// How an entry came to be in its mapping.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum Origin {
    /// It is written there.
    #[default]
    Written,
    /// It is written elsewhere in the document, at this path.
    Inherited(String),
    /// It was typed on the command line.
    CommandLine,
}

/// A value with its place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    pub(crate) value: Value,
    /// `None` for values that come from no document.
    pub(crate) place: Option<Place>,
}

/// The kinds of YAML values.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Whole(i128),
    Number(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key and its value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) place: Option<Place>,
    pub(crate) node: Node,
    pub(crate) origin: Origin,
}

/// A document that is YAML, not yet checked against any schema.
#[derive(Debug, Clone)]
pub struct Document {
    file: String,
    root: Node,
    defects: Vec<ConfigError>,
}

impl Document {
    /// Reads and parses a file.
    ///
    /// # Errors
    /// One error if the file cannot be read, is not UTF-8, is too large, is empty or is not YAML.
    pub fn read(path: &Path) -> Result<Self, ConfigErrors> {
        let file = path.display().to_string();
        let unreadable = |cause: String| {
            ConfigErrors::from(whole_document(&file, ConfigErrorKind::Unreadable { cause }))
        };
        let bytes = read_bounded(path).map_err(|error| unreadable(error.to_string()))?;
        if bytes.len() > DOCUMENT_BYTES_MAX {
            return Err(too_large(&file).into());
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            unreadable(format!(
                "byte {} is not UTF-8 text",
                error.utf8_error().valid_up_to()
            ))
        })?;
        Self::parse(&file, &text)
    }

    /// Parses a text; `file` is the name that errors give.
    ///
    /// # Errors
    /// One error if the text is too large, empty or not YAML.
    pub fn parse(file: &str, text: &str) -> Result<Self, ConfigErrors> {
        if text.len() > DOCUMENT_BYTES_MAX {
            return Err(too_large(file).into());
        }
        let mut root = parse::tree(file, text)?;
        if root.is_null() {
            return Err(empty(file).into());
        }
        let mut defects = Vec::new();
        drop_duplicates(&mut root, file, "", &mut defects);
        Ok(Self {
            file: file.to_owned(),
            root,
            defects,
        })
    }

    /// The document's name in errors.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.file
    }

    /// A document made of values that were read elsewhere.
    pub(crate) fn from_root(file: &str, root: Node) -> Self {
        Self {
            file: file.to_owned(),
            root,
            defects: Vec::new(),
        }
    }

    /// The same document with another top level.
    pub(crate) fn with_entries(&self, entries: Vec<Entry>) -> Self {
        let root = Node {
            value: Value::Map(entries),
            place: self.root.place,
        };
        Self {
            file: self.file.clone(),
            root,
            defects: self.defects.clone(),
        }
    }

    pub(crate) fn root(&self) -> &Node {
        &self.root
    }

    /// Mistakes that were found before any schema was applied: keys that stand twice.
    pub(crate) fn defects(&self) -> &[ConfigError] {
        &self.defects
    }

    /// The keys of the top level.
    pub(crate) fn top_level_keys(&self) -> impl Iterator<Item = &str> {
        self.root.entries().iter().map(|entry| entry.key.as_str())
    }
}

/// The bytes of a file, at most one more than a document may have.
pub(crate) fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let limit = u64::try_from(DOCUMENT_BYTES_MAX)
        .unwrap_or(u64::MAX)
        .saturating_add(1);
    std::fs::File::open(path)?
        .take(limit)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Node {
    /// A value that comes from no document.
    pub(crate) fn new(value: Value) -> Self {
        Self { value, place: None }
    }

    pub(crate) fn text(text: &str) -> Self {
        Self::new(Value::Text(text.to_owned()))
    }

    pub(crate) fn whole(number: impl Into<i128>) -> Self {
        Self::new(Value::Whole(number.into()))
    }

    pub(crate) fn is_null(&self) -> bool {
        self.value == Value::Null
    }

    /// The entries of a mapping; none for any other value.
    pub(crate) fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Map(entries) => entries,
            Value::Null
            | Value::Bool(_)
            | Value::Whole(_)
            | Value::Number(_)
            | Value::Text(_)
            | Value::List(_) => &[],
        }
    }

    pub(crate) fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries().iter().find(|entry| entry.key == key)
    }

    /// Equality of values without regard to places; whole and broken numbers compare by size.
    pub(crate) fn same_value(&self, other: &Self) -> bool {
        match (&self.value, &other.value) {
            (Value::List(a), Value::List(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.same_value(b))
            }
            (Value::Map(a), Value::Map(_)) => {
                a.len() == other.entries().len()
                    && a.iter().all(|entry| {
                        other
                            .entry(&entry.key)
                            .is_some_and(|b| entry.node.same_value(&b.node))
                    })
            }
            (Value::Whole(_) | Value::Number(_), Value::Whole(_) | Value::Number(_)) => {
                self.as_number() == other.as_number()
            }
            (a, b) => a == b,
        }
    }

    /// The value as a floating-point number, if it is any number.
    pub(crate) fn as_number(&self) -> Option<f64> {
        match self.value {
            #[expect(
                clippy::cast_precision_loss,
                reason = "sizes beyond 2^53 need no last digit"
            )]
            Value::Whole(number) => Some(number as f64),
            Value::Number(number) => Some(number),
            Value::Null | Value::Bool(_) | Value::Text(_) | Value::List(_) | Value::Map(_) => None,
        }
    }

    /// The value on one line, as YAML.
    pub(crate) fn flow(&self) -> String {
        let mut text = String::new();
        write_flow(&mut text, self, usize::MAX);
        text
    }

    /// The value on one line, as YAML, cut where it is long.
    pub(crate) fn shown(&self) -> String {
        let mut text = String::new();
        write_flow(&mut text, self, 8 * SHOWN_CHARS_MAX);
        shorten(&text, SHOWN_CHARS_MAX)
    }

    /// The kind of value and the value, for "found …".
    pub(crate) fn found(&self) -> String {
        match &self.value {
            Value::Null => "null".to_owned(),
            Value::Bool(_) | Value::Whole(_) | Value::Number(_) => self.shown(),
            Value::Text(_) => format!("text {}", self.shown()),
            Value::List(_) => format!("list {}", self.shown()),
            Value::Map(_) => format!("mapping {}", self.shown()),
        }
    }
}

#[cfg(test)]
mod tests;

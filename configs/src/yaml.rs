//! A YAML document as a tree in which every key and value knows its place.
//!
//! The text is parsed once, here; all typing happens on the tree, so that one run finds every mistake.
//! Limits on size, depth and aliases keep a hostile or broken file from costing more than an error line.
//! Quoted scalars stay text; plain ones are null, boolean, number or text as YAML 1.1 users expect.

use std::fmt;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};
use serde_saphyr::{Location, Spanned};

use crate::error::{ConfigError, ConfigErrorKind, ConfigErrors, Place};

/// Largest document that is read, in bytes. The largest in use are a few kilobytes.
pub const DOCUMENT_BYTES_MAX: usize = 1024 * 1024;
const DEPTH_MAX: usize = 32;
const NODES_MAX: usize = 50_000;
const ALIAS_EVENTS_MAX: usize = 50_000;
/// Longest rendering of an offending value in an error line.
const SHOWN_CHARS_MAX: usize = 60;

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
        let parsed: Spanned<Tree> = serde_saphyr::from_str_with_options(text, parser_options())
            .map_err(|error| ConfigErrors::from(syntax_error(file, text, &error)))?;
        let mut root = parsed.value.at(parsed.referenced);
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

fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
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

fn parser_options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: DEPTH_MAX,
            max_nodes: NODES_MAX,
            max_events: 4 * NODES_MAX,
            max_documents: 2,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: ALIAS_EVENTS_MAX,
        },
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        with_snippet: false,
    }
}

fn whole_document(file: &str, kind: ConfigErrorKind) -> ConfigError {
    ConfigError {
        file: file.to_owned(),
        place: None,
        path: String::new(),
        kind,
        hint: None,
    }
}

fn too_large(file: &str) -> ConfigError {
    let limit = format!("larger than {DOCUMENT_BYTES_MAX} bytes");
    whole_document(file, ConfigErrorKind::TooLarge { limit })
}

fn empty(file: &str) -> ConfigError {
    let expected = "a mapping of keys to values".to_owned();
    let mut error = whole_document(file, ConfigErrorKind::Empty { expected });
    error.hint = Some("write `{}` to take every default".to_owned());
    error
}

fn syntax_error(file: &str, text: &str, error: &serde_saphyr::Error) -> ConfigError {
    use serde_saphyr::Error as Cause;
    let place = error.location().and_then(place_of);
    let mut cause = error.without_snippet();
    while let Cause::AliasError { error, .. } = cause {
        cause = error.as_ref();
    }
    let kind = match cause {
        Cause::Budget { breach, .. } => ConfigErrorKind::TooLarge {
            limit: format!("{breach:?}"),
        },
        Cause::AliasReplayLimitExceeded { .. } | Cause::AliasReplayStackDepthExceeded { .. } => {
            let limit = format!("aliases expand to more than {ALIAS_EVENTS_MAX} values");
            ConfigErrorKind::TooLarge { limit }
        }
        Cause::Eof { .. } if text.trim().is_empty() || place.is_none() => return empty(file),
        Cause::MultipleDocuments { .. } => {
            let cause = "more than one document in the file".to_owned();
            ConfigErrorKind::Syntax { cause }
        }
        other => ConfigErrorKind::Syntax {
            cause: cause_text(&other.to_string()),
        },
    };
    ConfigError {
        file: file.to_owned(),
        place,
        path: String::new(),
        kind,
        hint: None,
    }
}

/// The parser's reason on one line, without the place, which stands in front of the line already.
fn cause_text(text: &str) -> String {
    let joined = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let reason = joined.split(" at line ").next().unwrap_or(&joined);
    shorten(reason, 4 * SHOWN_CHARS_MAX)
}

fn shorten(text: &str, chars_max: usize) -> String {
    if text.chars().count() <= chars_max {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(chars_max).collect();
    short.push('…');
    short
}

fn place_of(location: Location) -> Option<Place> {
    let line = u32::try_from(location.line())
        .ok()
        .filter(|line| *line > 0)?;
    let column = u32::try_from(location.column()).unwrap_or(u32::MAX).max(1);
    Some(Place { line, column })
}

/// Keeps the first of entries with the same key and reports the others.
fn drop_duplicates(node: &mut Node, file: &str, path: &str, defects: &mut Vec<ConfigError>) {
    match &mut node.value {
        Value::Map(entries) => {
            let mut kept: Vec<Entry> = Vec::with_capacity(entries.len());
            let mut seen = std::collections::HashMap::new();
            for entry in entries.drain(..) {
                let key_path = join(path, &entry.key);
                if let Some(first) = seen.get(&entry.key) {
                    defects.push(ConfigError {
                        file: file.to_owned(),
                        place: entry.place,
                        path: key_path,
                        kind: ConfigErrorKind::DuplicateKey { first: *first },
                        hint: None,
                    });
                    continue;
                }
                let place = entry.place.unwrap_or(Place { line: 1, column: 1 });
                seen.insert(entry.key.clone(), place);
                kept.push(entry);
            }
            for entry in &mut kept {
                let key_path = join(path, &entry.key);
                drop_duplicates(&mut entry.node, file, &key_path, defects);
            }
            *entries = kept;
        }
        Value::List(nodes) => {
            for (index, item) in nodes.iter_mut().enumerate() {
                drop_duplicates(item, file, &format!("{path}[{index}]"), defects);
            }
        }
        Value::Null | Value::Bool(_) | Value::Whole(_) | Value::Number(_) | Value::Text(_) => {}
    }
}

/// The path of `key` inside the mapping at `path`.
pub(crate) fn join(path: &str, key: &str) -> String {
    let key = shorten(&key.escape_debug().to_string(), SHOWN_CHARS_MAX);
    if path.is_empty() {
        key
    } else {
        format!("{path}.{key}")
    }
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

/// Writes until there is enough for the reader.
fn write_flow(out: &mut String, node: &Node, enough_bytes: usize) {
    if out.len() > enough_bytes {
        return;
    }
    match &node.value {
        Value::Null => out.push_str("null"),
        Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
        Value::Whole(number) => out.push_str(&number.to_string()),
        Value::Number(number) => out.push_str(&number_text(*number)),
        Value::Text(text) => out.push_str(&quoted(text)),
        Value::List(nodes) => {
            out.push('[');
            for (index, item) in nodes.iter().enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                write_flow(out, item, enough_bytes);
            }
            out.push(']');
        }
        Value::Map(entries) => {
            out.push('{');
            for (index, entry) in entries.iter().enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                out.push_str(&entry.key.escape_debug().to_string());
                out.push_str(": ");
                write_flow(out, &entry.node, enough_bytes);
            }
            out.push('}');
        }
    }
}

/// A text as a double-quoted YAML scalar, which holds every character on one line.
pub(crate) fn quoted(text: &str) -> String {
    use fmt::Write as _;
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}') => {
                let code = u32::from(c);
                // Writing to a String cannot fail.
                let _ = write!(out, "\\u{code:04X}");
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// A number as YAML that reads back as the same number and never as a whole one.
pub(crate) fn number_text(number: f64) -> String {
    if number.is_nan() {
        ".nan".to_owned()
    } else if number.is_infinite() {
        if number > 0.0 { ".inf" } else { "-.inf" }.to_owned()
    } else {
        format!("{number:?}")
    }
}

// === Parsing into the tree ===

/// A value whose own place is not yet known; its parent knows it.
struct Tree(Value);

impl Tree {
    fn at(self, location: Location) -> Node {
        Node {
            value: self.0,
            place: place_of(location),
        }
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TreeVisitor)
    }
}

struct TreeVisitor;

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Tree, E> {
        Ok(Tree(Value::Null))
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Tree, E> {
        Ok(Tree(Value::Bool(flag)))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Tree, E> {
        Ok(Tree(Value::Whole(number.into())))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Tree, E> {
        Ok(Tree(Value::Whole(number.into())))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Tree, E> {
        Ok(Tree(Value::Number(number)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Tree, E> {
        Ok(Tree(Value::Text(text.to_owned())))
    }

    fn visit_string<E>(self, text: String) -> Result<Tree, E> {
        Ok(Tree(Value::Text(text)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Tree, A::Error> {
        let mut nodes = Vec::new();
        while let Some(item) = items.next_element::<Spanned<Tree>>()? {
            nodes.push(item.value.at(item.referenced));
        }
        Ok(Tree(Value::List(nodes)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let value = map.next_value::<Spanned<Tree>>()?;
            entries.push(Entry {
                key: key.value,
                place: place_of(key.referenced),
                node: value.value.at(value.referenced),
                origin: Origin::Written,
            });
        }
        Ok(Tree(Value::Map(entries)))
    }
}

#[cfg(test)]
mod tests;

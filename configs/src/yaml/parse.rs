//! From text to tree, within limits that no configuration comes near.

use std::collections::HashMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};
use serde_saphyr::{Location, Spanned};

use crate::error::{ConfigError, ConfigErrorKind, ConfigErrors, Place};
use crate::yaml::text::{SHOWN_CHARS_MAX, join, shorten};
use crate::yaml::{DOCUMENT_BYTES_MAX, Entry, Node, Origin, Value};

const DEPTH_MAX: usize = 32;
const NODES_MAX: usize = 50_000;
const ALIAS_EVENTS_MAX: usize = 50_000;

/// Parses a text into its tree.
pub(super) fn tree(file: &str, text: &str) -> Result<Node, ConfigErrors> {
    let parsed: Spanned<Tree> = serde_saphyr::from_str_with_options(text, parser_options())
        .map_err(|error| ConfigErrors::from(syntax_error(file, text, &error)))?;
    Ok(parsed.value.at(parsed.referenced))
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

pub(super) fn whole_document(file: &str, kind: ConfigErrorKind) -> ConfigError {
    ConfigError {
        file: file.to_owned(),
        place: None,
        path: String::new(),
        kind,
        hint: None,
    }
}

pub(super) fn too_large(file: &str) -> ConfigError {
    let limit = format!("larger than {DOCUMENT_BYTES_MAX} bytes");
    whole_document(file, ConfigErrorKind::TooLarge { limit })
}

pub(super) fn empty(file: &str) -> ConfigError {
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

fn place_of(location: Location) -> Option<Place> {
    let line = u32::try_from(location.line())
        .ok()
        .filter(|line| *line > 0)?;
    let column = u32::try_from(location.column()).unwrap_or(u32::MAX).max(1);
    Some(Place { line, column })
}

/// Keeps the first of entries with the same key and reports the others.
pub(super) fn drop_duplicates(
    node: &mut Node,
    file: &str,
    path: &str,
    defects: &mut Vec<ConfigError>,
) {
    match &mut node.value {
        Value::Map(entries) => {
            let mut kept: Vec<Entry> = Vec::with_capacity(entries.len());
            let mut seen = HashMap::new();
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

//! The types that a key may have: what is accepted, what it becomes, and how both are worded.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::time::Duration;

use crate::error::{ConfigErrorKind, nearest};
use crate::section::read::{Findings, read_section};
use crate::section::{Section, Shape};
use crate::yaml::{Node, Value, join};

/// Longest duration that a key may state, in seconds: 30 days. Longer ones are a wrong unit.
const SECONDS_MAX: f64 = 30.0 * 24.0 * 3600.0;
/// The same in milliseconds.
const MILLIS_MAX: u64 = 30 * 24 * 3600 * 1000;

/// A type of values, known by a marker.
pub(crate) trait Kind {
    /// What a good value becomes.
    type Value;
    const SHAPE: Shape;
    /// Whether an explicit null is a mistake rather than "not given".
    const NULL_IS_WRONG: bool = false;

    /// The value, or `None` after the mistake has been recorded.
    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<Self::Value>;
}

/// `true` or `false`; null means not given.
#[derive(Debug)]
pub(crate) struct Flag;
/// `true` or `false` and nothing else, not even null.
#[derive(Debug)]
pub(crate) struct StrictFlag;
/// Text that is not empty.
#[derive(Debug)]
pub(crate) struct Text;
/// Text that may be empty.
#[derive(Debug)]
pub(crate) struct FreeText;
/// A whole number from `MIN` to `MAX`, held as `T`.
#[derive(Debug)]
pub(crate) struct Whole<T, const MIN: u64, const MAX: u64>(PhantomData<T>);
/// A number above 0 and at most 1.
#[derive(Debug)]
pub(crate) struct Share;
/// Seconds, whole or broken.
#[derive(Debug)]
pub(crate) struct Seconds;
/// Whole milliseconds.
#[derive(Debug)]
pub(crate) struct Millis;
/// One of the names of `E`.
#[derive(Debug)]
pub(crate) struct OneOf<E>(PhantomData<E>);
/// A list of `K`.
#[derive(Debug)]
pub(crate) struct List<K>(PhantomData<K>);
/// A nested section.
#[derive(Debug)]
pub(crate) struct Sub<S>(PhantomData<S>);
/// A nested section that is read later, when what it inherits is known.
#[derive(Debug)]
pub(crate) struct Later<S>(PhantomData<S>);
/// A mapping from names to scalars, all taken as text.
#[derive(Debug)]
pub(crate) struct TextMap;
/// Any value; someone else checks it.
#[derive(Debug)]
pub(crate) struct Anything;

/// A port that may be 0, which lets the kernel choose.
pub(crate) type Port = Whole<u16, 0, 65535>;
/// A count of at least one.
pub(crate) type Count = Whole<u32, 1, { u32::MAX as u64 }>;
/// A count or size that may be zero.
pub(crate) type Size = Whole<u32, 0, { u32::MAX as u64 }>;

/// What a name in an enumeration stands for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Choice<E> {
    /// This value.
    Is(E),
    /// Something that is known and not served; the text says what.
    NotServed(&'static str),
}

/// An enumeration whose values have names in documents; names are compared without case.
pub(crate) trait Choices: Copy + 'static {
    /// The names; the first name of a value is the canonical one.
    const TABLE: &'static [(&'static str, Choice<Self>)];

    fn served_names() -> Vec<&'static str> {
        Self::TABLE
            .iter()
            .filter(|(_, choice)| matches!(choice, Choice::Is(_)))
            .map(|(name, _)| *name)
            .collect()
    }
}

/// The canonical name of a value.
pub(crate) fn name_of<E: Choices + PartialEq>(value: E) -> &'static str {
    let named = |(name, choice): &(&'static str, Choice<E>)| match choice {
        Choice::Is(candidate) if *candidate == value => Some(*name),
        Choice::Is(_) | Choice::NotServed(_) => None,
    };
    E::TABLE
        .iter()
        .find_map(named)
        .expect("every value of an enumeration is in its table")
}

impl Shape {
    /// What is accepted, to follow "expected".
    pub(crate) fn expected(&self) -> String {
        match self {
            Self::Flag => "true or false".to_owned(),
            Self::Text => "text".to_owned(),
            Self::FreeText => "text, which may be empty".to_owned(),
            Self::Whole { min, max } if *max >= u64::from(u32::MAX) => {
                format!("a whole number from {min}")
            }
            Self::Whole { min, max } => format!("a whole number from {min} to {max}"),
            Self::Share => "a number above 0 and at most 1".to_owned(),
            Self::Seconds => "a number of seconds above 0 and at most 30 days".to_owned(),
            Self::Endpoint => "`host:port`".to_owned(),
            Self::OneOf(names) => format!("one of {}", listed(names())),
            Self::List(item) => format!("a list, each item {}", item.expected()),
            Self::Section(table) => format!("a mapping, `{}`", table.name),
            Self::TextMap => "a mapping of names to texts".to_owned(),
            Self::Anything => "any value".to_owned(),
        }
    }
}

/// Whether a value is good; what is wrong with it is recorded.
pub(crate) fn is_good<K: Kind>(node: &Node, path: &str, findings: &mut Findings) -> bool {
    K::read(node, path, findings).is_some()
}

/// Names as `a`, `b`, `c`.
pub(crate) fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names
        .into_iter()
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ")
}

fn wrong<K: Kind>(node: &Node, path: &str, findings: &mut Findings) {
    let hint = match (&K::SHAPE, &node.value) {
        (Shape::Text | Shape::FreeText, Value::Whole(_) | Value::Number(_) | Value::Bool(_)) => {
            Some(format!("put it in quotes: \"{}\"", node.shown()))
        }
        (Shape::Whole { .. } | Shape::Share | Shape::Seconds | Shape::Flag, Value::Text(text)) => {
            let plain = serde_saphyr::from_str::<f64>(text).is_ok()
                || matches!(text.to_ascii_lowercase().as_str(), "true" | "false");
            plain.then(|| "remove the quotes".to_owned())
        }
        _ => None,
    };
    findings.wrong(node, path, &K::SHAPE.expected(), hint);
}

/// `value`, after recording `node` as wrong if there is none.
fn or_wrong<K: Kind>(
    value: Option<K::Value>,
    node: &Node,
    path: &str,
    findings: &mut Findings,
) -> Option<K::Value> {
    if value.is_none() {
        wrong::<K>(node, path, findings);
    }
    value
}

/// The whole number, if it is one and within the limits.
fn whole(node: &Node, min: u64, max: u64) -> Option<u64> {
    match node.value {
        Value::Whole(number) => u64::try_from(number)
            .ok()
            .filter(|number| (min..=max).contains(number)),
        _ => None,
    }
}

fn number(node: &Node, max: f64) -> Option<f64> {
    node.as_number()
        .filter(|number| *number > 0.0 && *number <= max)
}

fn text(node: &Node) -> Option<&str> {
    match &node.value {
        Value::Text(text) => Some(text),
        _ => None,
    }
}

impl Kind for Flag {
    type Value = bool;
    const SHAPE: Shape = Shape::Flag;

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<bool> {
        let flag = match node.value {
            Value::Bool(flag) => Some(flag),
            _ => None,
        };
        or_wrong::<Self>(flag, node, path, findings)
    }
}

impl Kind for StrictFlag {
    type Value = bool;
    const SHAPE: Shape = Shape::Flag;
    const NULL_IS_WRONG: bool = true;

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<bool> {
        Flag::read(node, path, findings)
    }
}

impl Kind for Text {
    type Value = String;
    const SHAPE: Shape = Shape::Text;

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<String> {
        let value = text(node)
            .filter(|text| !text.is_empty())
            .map(str::to_owned);
        or_wrong::<Self>(value, node, path, findings)
    }
}

impl Kind for FreeText {
    type Value = String;
    const SHAPE: Shape = Shape::FreeText;

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<String> {
        or_wrong::<Self>(text(node).map(str::to_owned), node, path, findings)
    }
}

impl<T: TryFrom<u64>, const MIN: u64, const MAX: u64> Kind for Whole<T, MIN, MAX> {
    type Value = T;
    const SHAPE: Shape = Shape::Whole { min: MIN, max: MAX };

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<T> {
        let value = whole(node, MIN, MAX).and_then(|number| T::try_from(number).ok());
        or_wrong::<Self>(value, node, path, findings)
    }
}

impl Kind for Share {
    type Value = f64;
    const SHAPE: Shape = Shape::Share;

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<f64> {
        or_wrong::<Self>(number(node, 1.0), node, path, findings)
    }
}

impl Kind for Seconds {
    type Value = Duration;
    const SHAPE: Shape = Shape::Seconds;

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<Duration> {
        let duration =
            number(node, SECONDS_MAX).and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        or_wrong::<Self>(duration, node, path, findings)
    }
}

impl Kind for Millis {
    type Value = Duration;
    const SHAPE: Shape = Shape::Whole {
        min: 1,
        max: MILLIS_MAX,
    };

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<Duration> {
        let duration = whole(node, 1, MILLIS_MAX).map(Duration::from_millis);
        or_wrong::<Self>(duration, node, path, findings)
    }
}

impl<E: Choices> Kind for OneOf<E> {
    type Value = E;
    const SHAPE: Shape = Shape::OneOf(E::served_names);

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<E> {
        let Value::Text(text) = &node.value else {
            wrong::<Self>(node, path, findings);
            return None;
        };
        let chosen = E::TABLE
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(text));
        match chosen {
            Some((_, Choice::Is(value))) => Some(*value),
            Some((_, Choice::NotServed(what))) => {
                let kind = ConfigErrorKind::NotServed {
                    found: format!("`{text}`"),
                    what: (*what).to_owned(),
                };
                let hint = format!("served: {}", listed(E::served_names()));
                findings.error(node.place, path, kind, Some(hint));
                None
            }
            None => {
                let hint =
                    nearest(text, E::served_names()).map(|name| format!("did you mean `{name}`?"));
                findings.wrong(node, path, &Self::SHAPE.expected(), hint);
                None
            }
        }
    }
}

impl<K: Kind> Kind for List<K> {
    type Value = Vec<(K::Value, Node)>;
    const SHAPE: Shape = Shape::List(&K::SHAPE);

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<Self::Value> {
        let Value::List(items) = &node.value else {
            wrong::<Self>(node, path, findings);
            return None;
        };
        let read = |(index, item): (usize, &Node)| {
            let value = K::read(item, &format!("{path}[{index}]"), findings)?;
            Some((value, item.clone()))
        };
        // Every item is read, so that every mistake is found, before one of them decides.
        let values: Vec<Option<_>> = items.iter().enumerate().map(read).collect();
        values.into_iter().collect()
    }
}

impl<S: Section + 'static> Kind for Sub<S> {
    type Value = S;
    const SHAPE: Shape = Shape::Section(S::TABLE);

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<S> {
        read_section(node, path, findings)
    }
}

impl<S: Section + 'static> Kind for Later<S> {
    type Value = Node;
    const SHAPE: Shape = Shape::Section(S::TABLE);

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<Node> {
        let mapping = matches!(node.value, Value::Map(_)).then(|| node.clone());
        or_wrong::<Self>(mapping, node, path, findings)
    }
}

impl Kind for TextMap {
    type Value = BTreeMap<String, String>;
    const SHAPE: Shape = Shape::TextMap;

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<Self::Value> {
        if !matches!(node.value, Value::Map(_)) {
            wrong::<Self>(node, path, findings);
            return None;
        }
        let mut texts = BTreeMap::new();
        for entry in node.entries() {
            match scalar_text(&entry.node) {
                Some(text) => {
                    texts.insert(entry.key.clone(), text);
                }
                None => findings.wrong(&entry.node, &join(path, &entry.key), "text", None),
            }
        }
        Some(texts)
    }
}

impl Kind for Anything {
    type Value = Node;
    const SHAPE: Shape = Shape::Anything;

    fn read(node: &Node, _path: &str, _findings: &mut Findings) -> Option<Node> {
        Some(node.clone())
    }
}

/// A scalar as text; `None` for lists, mappings and null.
fn scalar_text(node: &Node) -> Option<String> {
    match &node.value {
        Value::Text(text) => Some(text.clone()),
        Value::Bool(_) | Value::Whole(_) | Value::Number(_) => Some(node.shown()),
        Value::Null | Value::List(_) | Value::Map(_) => None,
    }
}

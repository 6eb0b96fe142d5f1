//! Values as text: for error lines, and for the files that are written.

use std::fmt::Write as _;

use crate::error::shown_key;
use crate::yaml::{Node, Value};

/// Longest rendering of an offending value in an error line.
pub(super) const SHOWN_CHARS_MAX: usize = 60;

/// The text, cut where it is longer than that.
pub(super) fn shorten(text: &str, chars_max: usize) -> String {
    if text.chars().count() <= chars_max {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(chars_max).collect();
    short.push('…');
    short
}

/// The path of `key` inside the mapping at `path`.
pub(crate) fn join(path: &str, key: &str) -> String {
    let key = shown_key(key);
    if path.is_empty() {
        key
    } else {
        format!("{path}.{key}")
    }
}

/// Writes until there is enough for the reader.
pub(super) fn write_flow(out: &mut String, node: &Node, enough_bytes: usize) {
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

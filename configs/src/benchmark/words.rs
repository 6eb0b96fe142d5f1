//! Texts that hold several words: options and variables.

use crate::section::read::Findings;
use crate::yaml::{Entry, Node, Origin, Value};

/// The words of a text as a shell splits them: quotes and backslashes, nothing else. `None` if a quote is never closed.
pub(super) fn shell_words(text: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\'' | '"' => {
                let open = word.get_or_insert_default();
                loop {
                    match chars.next()? {
                        end if end == c => break,
                        '\\' if c == '"' => open.push(chars.next()?),
                        inner => open.push(inner),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(chars.next()?),
            c if c.is_whitespace() => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Some(words)
}

/// The variables that some keys of `environment` give; a later key covers an earlier one. `None` if there are none.
pub(super) fn variables(
    environment: Option<&Node>,
    keys: &[&str],
    findings: &mut Findings,
) -> Option<Node> {
    let mut entries: Vec<Entry> = Vec::new();
    for key in keys {
        let Some(given) = environment.and_then(|section| section.entry(key)) else {
            continue;
        };
        let Value::Text(text) = &given.node.value else {
            continue;
        };
        let path = format!("environment.{key}");
        for word in shell_words(text).unwrap_or_else(|| vec![text.clone()]) {
            let Some((name, value)) = word.split_once('=') else {
                let expected = "NAME=VALUE words with blanks between them";
                findings.wrong(&given.node, &path, expected, None);
                continue;
            };
            entries.retain(|entry| entry.key != name);
            entries.push(Entry {
                key: name.to_owned(),
                place: given.place,
                node: Node {
                    value: Value::Text(value.to_owned()),
                    place: given.node.place,
                },
                origin: Origin::Inherited(path.clone()),
            });
        }
    }
    (!entries.is_empty()).then(|| Node::new(Value::Map(entries)))
}

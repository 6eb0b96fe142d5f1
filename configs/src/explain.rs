//! The core of `baton config explain`: every value of a document with its source, and what one key means.

use std::fmt;

use serde_json::{Value as Json, json};

use crate::check::{Kind, check_document};
use crate::disagg::{self, RawGroup};
use crate::error::{ConfigErrors, Place, Warning, nearest};
use crate::layout;
use crate::llm::RawLlm;
use crate::section::read::default_node;
use crate::section::{FieldRow, Section, SectionTable, Shape, Treatment, paragraph};
use crate::yaml::{Document, Entry, Node, Origin, Value, join};

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// It is the default.
    Default,
    /// It follows from something else, which the text names.
    Derived(&'static str),
    /// It is written in the document.
    Written(Option<Place>),
    /// It is written in the document, at the path of another key.
    Inherited {
        /// That path.
        path: String,
        /// Where that is.
        place: Option<Place>,
    },
    /// It was typed on the command line.
    CommandLine,
}

/// One value with its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExplainedValue {
    /// The YAML path.
    pub path: String,
    /// The value, as YAML on one line.
    pub value: String,
    /// Where it comes from.
    pub source: Source,
    /// What becomes of it, if it does not simply work.
    pub note: Option<String>,
}

/// Every value of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// The document's name.
    pub file: String,
    /// What it was taken for.
    pub kind: Kind,
    /// The values, in the order of the tables.
    pub values: Vec<ExplainedValue>,
    /// What is worth knowing besides.
    pub warnings: Vec<Warning>,
}

impl Explanation {
    fn source_text(&self, source: &Source) -> String {
        let at = |place: Option<Place>| match place {
            Some(place) => format!("{}:{}", self.file, place.line),
            None => self.file.clone(),
        };
        match source {
            Source::Default => "default".to_owned(),
            Source::Derived(from) => format!("from {from}"),
            Source::Written(place) => at(*place),
            Source::Inherited { path, place } => {
                format!("inherited from `{path}`, {}", at(*place))
            }
            Source::CommandLine => "command line".to_owned(),
        }
    }

    /// The explanation for programs.
    #[must_use]
    pub fn to_json(&self) -> Json {
        let value = |value: &ExplainedValue| {
            json!({
                "path": value.path,
                "value": value.value,
                "source": self.source_text(&value.source),
                "note": value.note,
            })
        };
        json!({
            "file": self.file,
            "kind": self.kind.name(),
            "values": self.values.iter().map(value).collect::<Vec<_>>(),
            "warnings": self.warnings.iter().map(ToString::to_string).collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ALIGNED_MAX: usize = 64;
        let assignment = |value: &ExplainedValue| format!("{} = {}", value.path, value.value);
        let widths = self
            .values
            .iter()
            .map(|value| assignment(value).chars().count());
        let width = widths
            .filter(|width| *width <= ALIGNED_MAX)
            .max()
            .unwrap_or(0);
        for (index, value) in self.values.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            let source = self.source_text(&value.source);
            write!(f, "{:width$}  # {source}", assignment(value))?;
            if let Some(note) = &value.note {
                write!(f, "; {note}")?;
            }
        }
        Ok(())
    }
}

/// Every value of a document with its source; without a kind, the kind is guessed.
///
/// # Errors
/// Everything that is wrong with the document: only a good one is explained.
pub fn explain_document(
    document: &Document,
    kind: Option<Kind>,
) -> Result<Explanation, ConfigErrors> {
    let kind = kind.unwrap_or_else(|| Kind::guess(document));
    let warnings = check_document(document, Some(kind)).outcome?;
    let mut values = Vec::new();
    match kind {
        Kind::Disagg => explain_disagg(document.root(), &mut values),
        Kind::Layout => explain_layout(document.root(), &mut values),
        Kind::Metadata | Kind::Llm => {
            let mut walk = Walk {
                values: &mut values,
            };
            walk.table(kind.table(), document.root(), "", &Origin::Written);
        }
    }
    Ok(Explanation {
        file: document.file().to_owned(),
        kind,
        values,
        warnings,
    })
}

/// The engine options of both roles are shown where they work, in each role.
fn explain_layout(root: &Node, values: &mut Vec<ExplainedValue>) {
    let effective = layout::effective_root(root);
    let mut walk = Walk { values };
    for row in Kind::Layout
        .table()
        .rows()
        .filter(|row| row.name != "engine")
    {
        walk.row(row, &effective, "", &Origin::Written);
    }
}

/// The proxy uses no engine options, so only those that are given are listed.
fn explain_disagg(root: &Node, values: &mut Vec<ExplainedValue>) {
    let mut walk = Walk { values };
    for row in Kind::Disagg.table().rows() {
        match row.name {
            "context_servers" | "generation_servers" => {
                let (section, engine) = disagg::effective_section(root, row.name);
                walk.table(RawGroup::TABLE, &section, row.name, &Origin::Written);
                walk.given(RawLlm::TABLE, &engine, row.name, &Origin::Written);
            }
            _ => walk.row(row, root, "", &Origin::Written),
        }
    }
}

/// Goes through tables and mappings together; `within` is how the mapping came to be where it is.
struct Walk<'a> {
    values: &'a mut Vec<ExplainedValue>,
}

impl Walk<'_> {
    /// Every key of a table, given or not.
    fn table(&mut self, table: &'static SectionTable, node: &Node, path: &str, within: &Origin) {
        for row in table.rows() {
            self.row(row, node, path, within);
        }
        for entry in node.entries() {
            if let Some(group) = table.group(&entry.key) {
                self.push(entry, &join(path, &entry.key), group.treatment, within);
            }
        }
    }

    /// Only the keys that are given.
    fn given(&mut self, table: &'static SectionTable, node: &Node, path: &str, within: &Origin) {
        for entry in node.entries().iter().filter(|entry| !entry.node.is_null()) {
            let Some(row) = table.row(&entry.key) else {
                let treatment = table
                    .group(&entry.key)
                    .map_or(Treatment::Served, |g| g.treatment);
                self.push(entry, &join(path, &entry.key), treatment, within);
                continue;
            };
            let row_path = join(path, row.name);
            match row.shape {
                Shape::Section(inner) => {
                    self.given(inner, &entry.node, &row_path, &origin(entry, within));
                }
                _ => self.push(entry, &row_path, row.treatment, within),
            }
        }
    }

    fn row(&mut self, row: &'static FieldRow, node: &Node, path: &str, within: &Origin) {
        let entry = given_entry(row, node);
        let row_path = join(path, row.name);
        if let Shape::Section(table) = row.shape
            && (entry.is_some() || row.default == "{}")
        {
            let empty = Node::new(Value::Map(Vec::new()));
            let inner = entry.map_or(&empty, |entry| &entry.node);
            let inside = entry.map_or(Origin::Written, |entry| origin(entry, within));
            self.table(table, inner, &row_path, &inside);
            return;
        }
        match entry {
            Some(entry) => self.push(entry, &row_path, row.treatment, within),
            // What has no effect is shown only where someone wrote it.
            None if matches!(row.treatment, Treatment::Served) => {
                let (value, source) = derived(row, node, path)
                    .unwrap_or_else(|| (default_node(row).flow(), Source::Default));
                self.values.push(ExplainedValue {
                    path: row_path,
                    value,
                    source,
                    note: None,
                });
            }
            None => {}
        }
    }

    fn push(&mut self, entry: &Entry, path: &str, treatment: Treatment, within: &Origin) {
        let place = entry.node.place.or(entry.place);
        let source = match origin(entry, within) {
            Origin::Written => Source::Written(place),
            Origin::Inherited(path) => Source::Inherited { path, place },
            Origin::CommandLine => Source::CommandLine,
        };
        let note = match treatment {
            Treatment::Served | Treatment::Refused(_) => None,
            Treatment::Quiet(why) | Treatment::Ignored(why) => Some(format!("no effect: {why}")),
        };
        let value = entry.node.flow();
        self.values.push(ExplainedValue {
            path: path.to_owned(),
            value,
            source,
            note,
        });
    }
}

/// How an entry came to be where it is, inside a mapping that itself may be inherited.
fn origin(entry: &Entry, within: &Origin) -> Origin {
    match (&entry.origin, within) {
        (Origin::Written, Origin::Inherited(path)) => Origin::Inherited(join(path, &entry.key)),
        (own, _) => own.clone(),
    }
}

fn given_entry<'a>(row: &FieldRow, node: &'a Node) -> Option<&'a Entry> {
    let spelt = |entry: &&Entry| entry.key == row.name || row.also.contains(&entry.key.as_str());
    node.entries()
        .iter()
        .find(spelt)
        .filter(|entry| !entry.node.is_null())
}

/// Values that are not given and yet are no fixed default.
fn derived(row: &FieldRow, node: &Node, path: &str) -> Option<(String, Source)> {
    match (row.name, path) {
        ("num_instances", _) => {
            let urls = node.entry("urls").filter(|entry| !entry.node.is_null())?;
            let Value::List(items) = &urls.node.value else {
                return None;
            };
            Some((
                items.len().to_string(),
                Source::Derived("the number of `urls`"),
            ))
        }
        ("node_id", _) => Some((
            disagg::default_node_id().to_string(),
            Source::Derived("this machine's network address"),
        )),
        ("instances", "context") => Some((layout::CONTEXT_INSTANCES.to_string(), Source::Default)),
        ("instances", "generation") => {
            Some((layout::GENERATION_INSTANCES.to_string(), Source::Default))
        }
        _ => None,
    }
}

// === One key ===

/// A key that no document has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownKey {
    /// The key as asked for.
    pub key: String,
    /// The known path that is written most like it.
    pub nearest: Option<String>,
}

impl fmt::Display for UnknownKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no document has a key \"{}\"", self.key)?;
        match &self.nearest {
            Some(nearest) => write!(f, "\n  hint: did you mean `{nearest}`?"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for UnknownKey {}

/// One documented key.
struct Documented {
    kind: Kind,
    path: String,
    text: String,
}

/// What a key means, in every document that has it; a path may start at any level.
///
/// # Errors
/// If no document has it; the error names the nearest path.
pub fn explain_key(key: &str, kind: Option<Kind>) -> Result<String, UnknownKey> {
    let kinds = Kind::ALL
        .into_iter()
        .filter(|candidate| kind.is_none_or(|kind| kind == *candidate));
    let documented: Vec<Documented> = kinds.flat_map(documented_keys).collect();
    let ends_with_key = |path: &str| {
        path.strip_suffix(key)
            .is_some_and(|before| before.is_empty() || before.ends_with('.'))
    };
    let exact = documented
        .iter()
        .filter(|row| row.path == key)
        .collect::<Vec<_>>();
    let matches = if exact.is_empty() {
        documented
            .iter()
            .filter(|row| ends_with_key(&row.path))
            .collect::<Vec<_>>()
    } else {
        exact
    };
    if matches.is_empty() {
        let last = |path: &'_ str| path.rsplit('.').next().unwrap_or_default().to_owned();
        let paths = documented.iter().map(|row| row.path.as_str());
        let by_path = nearest(key, paths).map(str::to_owned);
        let names: Vec<String> = documented.iter().map(|row| last(&row.path)).collect();
        let by_name = || nearest(&last(key), names.iter().map(String::as_str)).map(str::to_owned);
        return Err(UnknownKey {
            key: key.to_owned(),
            nearest: by_path.or_else(by_name),
        });
    }
    let text = |row: &&Documented| format!("{} ({})\n{}", row.path, row.kind, row.text);
    Ok(matches.iter().map(text).collect::<Vec<_>>().join("\n\n"))
}

fn documented_keys(kind: Kind) -> Vec<Documented> {
    let mut found = Vec::new();
    collect(kind, kind.table(), "", &mut found);
    if kind == Kind::Disagg {
        // Routers have arguments by type; the section's table knows only the type.
        for table in disagg::router::TABLES.iter().skip(1) {
            for row in table.rows().filter(|row| row.name != "type") {
                let path = format!(
                    "router({}).{}",
                    table.name.replace("router, ", ""),
                    row.name
                );
                found.push(Documented {
                    kind,
                    path,
                    text: row_text(row),
                });
            }
        }
    }
    found
}

fn collect(kind: Kind, table: &'static SectionTable, path: &str, found: &mut Vec<Documented>) {
    for row in table.rows() {
        let row_path = join(path, row.name);
        found.push(Documented {
            kind,
            path: row_path.clone(),
            text: row_text(row),
        });
        for also in row.also {
            let text = row_text(row);
            found.push(Documented {
                kind,
                path: join(path, also),
                text,
            });
        }
        if let Shape::Section(inner) = row.shape {
            collect(kind, inner, &row_path, found);
        }
    }
    for group in table.groups {
        for name in group.names {
            let text = format!(
                "  An option of TensorRT-LLM.\n{}",
                treatment_text(group.treatment)
            );
            found.push(Documented {
                kind,
                path: join(path, name),
                text,
            });
        }
    }
    if table.name == RawGroup::TABLE.name {
        collect(kind, RawLlm::TABLE, path, found);
    }
}

fn row_text(row: &FieldRow) -> String {
    let mut lines = vec![format!("  {}", row.doc_text())];
    if let Shape::Section(table) = row.shape {
        lines.push(format!("  {}", paragraph(table.about)));
        let keys: Vec<&str> = table.rows().map(|row| row.name).collect();
        lines.push(format!("  keys: {}", keys.join(", ")));
    } else {
        lines.push(format!("  value: {}", row.shape.expected()));
    }
    lines.push(format!("  default: {}", row.default));
    if !row.also.is_empty() {
        lines.push(format!("  also written: {}", row.also.join(", ")));
    }
    if !matches!(row.treatment, Treatment::Served) {
        lines.push(treatment_text(row.treatment));
    }
    lines.join("\n")
}

pub(crate) fn treatment_text(treatment: Treatment) -> String {
    match treatment {
        Treatment::Served => "  served".to_owned(),
        Treatment::Quiet(why) => format!("  accepted without effect: {why}"),
        Treatment::Ignored(why) => {
            format!("  accepted without effect, listed in a warning: {why}")
        }
        Treatment::Refused(what) => format!("  not served by this version: {what}"),
    }
}

#[cfg(test)]
mod tests;

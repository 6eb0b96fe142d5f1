//! The core of `baton config explain`: every value of a document with its source, and what one key means.

mod key;

use std::fmt;

use serde_json::{Value as Json, json};

use crate::check::{Kind, check_document};
use crate::disagg::{self, RawGroup};
use crate::error::{ConfigErrors, Place, Warning};
use crate::layout;
use crate::llm::RawLlm;
use crate::section::read::default_node;
use crate::section::{FieldRow, Section, SectionTable, Shape, Treatment};
use crate::transceiver::TransportChoice;
use crate::yaml::{Document, Entry, Node, Origin, Value, join, quoted};

pub(crate) use key::treatment_text;
pub use key::{UnknownKey, explain_key};

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
        Kind::Metadata | Kind::Llm | Kind::Benchmark => {
            let mut walk = Walk {
                values: &mut values,
                role: None,
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
    let named = |key: &str| root.entry(key).filter(|entry| !entry.node.is_null());
    let mut walk = Walk {
        values,
        role: Some(RoleImplies {
            model: named("model").map(|entry| entry.node.flow()),
            served_model_name: named("served_model_name").map(|entry| entry.node.flow()),
        }),
    };
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
    let mut walk = Walk { values, role: None };
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
    /// What a layout says to the engines of its roles besides their own options.
    role: Option<RoleImplies>,
}

/// Top-level values of a layout, as YAML, that its roles' engines take.
struct RoleImplies {
    model: Option<String>,
    served_model_name: Option<String>,
}

impl Walk<'_> {
    /// Every key of a table, given or not.
    fn table(&mut self, table: &'static SectionTable, node: &Node, path: &str, within: &Origin) {
        let start = self.values.len();
        for row in table.rows() {
            self.row(row, node, path, within);
        }
        if table.name == RawLlm::TABLE.name {
            self.settle_engine(start, path);
        }
        for entry in node.entries() {
            if let Some(group) = table.group(&entry.key) {
                self.push(entry, &join(path, &entry.key), group.treatment, within);
            }
        }
    }

    /// Engine options that follow from others: short and older forms give way to what they mean.
    fn settle_engine(&mut self, start: usize, path: &str) {
        let at = |values: &[ExplainedValue], key: &str| {
            let wanted = join(path, key);
            values
                .iter()
                .skip(start)
                .position(|value| value.path == wanted)
                .map(|i| start + i)
        };
        let is_default = |value: &ExplainedValue| value.source == Source::Default;
        let short = at(self.values, "free_gpu_memory_fraction");
        if let (Some(short), Some(long)) = (
            short,
            at(self.values, "kv_cache_config.free_gpu_memory_fraction"),
        ) && is_default(&self.values[long])
            && !is_default(&self.values[short])
        {
            self.values[long].value = self.values[short].value.clone();
            self.values[long].source = Source::Derived("`free_gpu_memory_fraction`");
        }
        let enabled = [
            "enable_cache_transceiver",
            "cache_transceiver_config.enable_cache_transceiver",
        ]
        .into_iter()
        .filter_map(|key| at(self.values, key))
        .any(|index| self.values[index].value == "true");
        let transceiver = [
            "cache_transceiver_config",
            "cache_transceiver_config.backend",
        ]
        .into_iter()
        .find_map(|key| at(self.values, key));
        if let Some(index) = transceiver.filter(|_| enabled || self.role.is_some())
            && is_default(&self.values[index])
        {
            let why = if enabled {
                "`enable_cache_transceiver`"
            } else {
                "the layout's hand-off"
            };
            self.values[index].path = join(path, "cache_transceiver_config.backend");
            self.values[index].value = quoted(TransportChoice::Default.name());
            self.values[index].source = Source::Derived(why);
        }
        let Some(role) = &self.role else {
            return;
        };
        let implied = [
            ("model", &role.model),
            ("served_model_name", &role.served_model_name),
        ];
        for (key, value) in implied {
            if let (Some(index), Some(value)) = (at(self.values, key), value)
                && is_default(&self.values[index])
            {
                self.values[index].value.clone_from(value);
                self.values[index].source = Source::Derived("the layout's own key of that name");
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

#[cfg(test)]
mod tests;

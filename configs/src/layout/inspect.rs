//! A layout together with what is wrong with it so far, for those who look further before anything is decided:
//! the planner and the launcher find mistakes too, and all of them are to be reported at once, each where it stands.

use crate::benchmark;
use crate::disagg;
use crate::error::{ConfigError, ConfigErrorKind, ConfigErrors, Place, Warning};
use crate::layout::{self, Layout};
use crate::section::read::{Findings, entry_path};
use crate::yaml::{Document, Node, Value};

/// A mistake that was found outside of this crate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The layout's key, such as `context.engine.tensor_parallel_size`, whatever kind of file it was read from.
    pub key: String,
    /// What is wrong with its value.
    pub what: String,
    /// What would mend it.
    pub hint: Option<String>,
}

impl Fault {
    /// A mistake with its remedy.
    #[must_use]
    pub fn new(key: &str, what: String, hint: impl Into<String>) -> Self {
        Self {
            key: key.to_owned(),
            what,
            hint: Some(hint.into()),
        }
    }
}

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: String,
    /// The path of the key there.
    pub path: String,
    /// Line and column, if it has them.
    pub place: Option<Place>,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.place {
            Some(place) => write!(f, "{}:{} {}", self.file, place.line, self.path),
            None => write!(f, "{} {}", self.file, self.path),
        }
    }
}

/// A layout as far as it could be read.
#[derive(Debug, Clone)]
pub struct Inspection {
    file: String,
    root: Node,
    layout: Option<Layout>,
    errors: Vec<ConfigError>,
    warnings: Vec<Warning>,
}

/// Reads a layout, a `disagg_config.yaml` that names a model, or a benchmark `config.yaml`.
#[must_use]
pub fn inspect(document: &Document, model: Option<&str>) -> Inspection {
    if benchmark::is_benchmark(document) {
        return benchmark::inspect(document, model);
    }
    let document = layout::with_model(document, model);
    if !layout::is_disagg(&document) {
        return inspect_layout(&document, None);
    }
    let mut inspection = Inspection::new(&document, document.root().clone());
    match disagg::resolve(&document, disagg::default_node_id()) {
        Ok((resolved, warnings)) => {
            let mut findings = Findings::new(&document);
            inspection.layout = layout::from_disagg(resolved, document.root(), &mut findings);
            inspection.take(findings);
            inspection.warnings.splice(0..0, warnings);
        }
        Err(errors) => inspection.errors = errors.errors().to_vec(),
    }
    inspection
}

/// Reads a document that is a layout and nothing else.
pub(crate) fn inspect_layout(document: &Document, model: Option<&str>) -> Inspection {
    let document = layout::with_model(document, model);
    inspect_root(&document, document.root(), Findings::new(&document))
}

/// Reads `root` as the layout that `document` means.
pub(crate) fn inspect_root(document: &Document, root: &Node, mut findings: Findings) -> Inspection {
    let mut inspection = Inspection::new(document, root.clone());
    inspection.layout = layout::read(root, &mut findings);
    inspection.take(findings);
    inspection
}

impl Inspection {
    fn new(document: &Document, root: Node) -> Self {
        Self {
            file: document.file().to_owned(),
            root,
            layout: None,
            errors: Vec::new(),
            warnings: Vec::new(),
        }
    }

    fn take(&mut self, findings: Findings) {
        let (errors, warnings) = findings.into_parts();
        self.errors.extend(errors);
        self.warnings.extend(warnings);
    }

    /// The layout, with defaults in place of what could not be read.
    #[must_use]
    pub fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }

    /// Whether something is wrong with a key that ends like one of these, so that what follows from its value says nothing.
    #[must_use]
    pub fn spoils(&self, keys: &[&str]) -> bool {
        let is_one = |path: &str| {
            keys.iter().any(|key| {
                path.strip_suffix(key)
                    .is_some_and(|before| before.is_empty() || before.ends_with('.'))
            })
        };
        self.errors.iter().any(|error| is_one(&error.path))
    }

    /// Where the value of a layout's key was written; `None` for a default.
    #[must_use]
    pub fn origin_of(&self, key: &str) -> Option<Origin> {
        let (path, place) = self.find(key)?;
        Some(Origin {
            file: self.file.clone(),
            path,
            place,
        })
    }

    /// Path and place of a key, or of the key of both roles that stands for it.
    fn find(&self, key: &str) -> Option<(String, Option<Place>)> {
        walk(&self.root, key).or_else(|| {
            let (role, rest) = key.split_once('.')?;
            let shared = rest == "engine" || rest.starts_with("engine.");
            (shared && matches!(role, "context" | "generation"))
                .then(|| walk(&self.root, rest))
                .flatten()
        })
    }

    /// The layout and what is worth knowing; or everything that is wrong, these faults included.
    ///
    /// # Errors
    /// All mistakes, in the order of the lines.
    pub fn finish(mut self, faults: Vec<Fault>) -> Result<(Layout, Vec<Warning>), ConfigErrors> {
        for fault in faults {
            let origin = self.origin_of(&fault.key);
            self.errors.push(ConfigError {
                file: self.file.clone(),
                place: origin.as_ref().and_then(|origin| origin.place),
                path: origin.map_or(fault.key, |origin| origin.path),
                kind: ConfigErrorKind::Conflict { what: fault.what },
                hint: fault.hint,
            });
        }
        if let Some(errors) = ConfigErrors::from_found(self.errors) {
            return Err(errors);
        }
        let layout = self.layout.expect("a document without mistakes resolves");
        Ok((layout, self.warnings))
    }
}

/// The path at which the value of a key was written, and its place.
fn walk(root: &Node, key: &str) -> Option<(String, Option<Place>)> {
    let (mut node, mut place) = (root, None);
    let mut written = String::new();
    for name in key.split('.') {
        let (name, index) = match name.strip_suffix(']').and_then(|name| name.split_once('[')) {
            Some((name, index)) => (name, Some(index)),
            None => (name, None),
        };
        let entry = node.entry(name).filter(|entry| !entry.node.is_null())?;
        written = entry_path(entry, &written);
        node = &entry.node;
        place = entry.node.place.or(entry.place);
        if let (Some(index), Value::List(items)) = (index, &entry.node.value) {
            node = items.get(index.parse::<usize>().ok()?)?;
            place = node.place.or(place);
            written.push_str(&format!("[{index}]"));
        }
    }
    Some((written, place))
}

#[cfg(test)]
mod tests;

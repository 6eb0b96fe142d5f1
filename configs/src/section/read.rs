//! Reads mappings against their tables and collects everything that is wrong on the way.

use crate::error::{ConfigError, ConfigErrorKind, ConfigErrors, Place, Warning, nearest};
use crate::section::kind::{Kind, listed};
use crate::section::{FieldRow, Located, Section, SectionTable, Treatment};
use crate::yaml::{Document, Entry, Node, Origin, Value, join};

/// Name of the command line where an error gives its file.
pub(crate) const COMMAND_LINE: &str = "command line";

/// What was found while a document was read.
#[derive(Debug)]
pub(crate) struct Findings {
    file: String,
    errors: Vec<ConfigError>,
    warnings: Vec<Warning>,
    /// Paths of options that have no effect here.
    ignored: Vec<String>,
}

impl Findings {
    /// Starts with what was wrong before any schema was applied.
    pub(crate) fn new(document: &Document) -> Self {
        Self {
            file: document.file().to_owned(),
            errors: document.defects().to_vec(),
            warnings: Vec::new(),
            ignored: Vec::new(),
        }
    }

    pub(crate) fn error(
        &mut self,
        place: Option<Place>,
        path: &str,
        kind: ConfigErrorKind,
        hint: Option<String>,
    ) {
        let typed = place.is_none() && path.starts_with("--");
        let file = if typed { COMMAND_LINE } else { &self.file };
        let file = file.to_owned();
        self.errors.push(ConfigError {
            file,
            place,
            path: path.to_owned(),
            kind,
            hint,
        });
    }

    pub(crate) fn wrong(&mut self, node: &Node, path: &str, expected: &str, hint: Option<String>) {
        let expected = expected.to_owned();
        let kind = ConfigErrorKind::WrongValue {
            found: node.found(),
            expected,
        };
        self.error(node.place, path, kind, hint);
    }

    pub(crate) fn conflict(&mut self, place: Option<Place>, path: &str, what: String) {
        self.error(place, path, ConfigErrorKind::Conflict { what }, None);
    }

    pub(crate) fn missing(&mut self, place: Option<Place>, path: &str, expected: &str) {
        let kind = ConfigErrorKind::Missing {
            expected: expected.to_owned(),
        };
        self.error(place, path, kind, None);
    }

    pub(crate) fn not_served(&mut self, node: &Node, path: &str, what: &str) {
        let found = match node.value {
            // A section is named, because its content says nothing about why.
            Value::Map(_) | Value::List(_) => {
                format!("`{}`", path.rsplit('.').next().unwrap_or(path))
            }
            _ => node.shown(),
        };
        let what = what.to_owned();
        self.error(
            node.place,
            path,
            ConfigErrorKind::NotServed { found, what },
            None,
        );
    }

    pub(crate) fn warn(&mut self, place: Option<Place>, path: &str, text: String) {
        let (file, path) = (self.file.clone(), path.to_owned());
        self.warnings.push(Warning {
            file,
            place,
            path,
            text,
        });
    }

    fn ignore(&mut self, path: &str) {
        if !self.ignored.iter().any(|known| known == path) {
            self.ignored.push(path.to_owned());
        }
    }

    /// The warnings, the one about options without effect last; or every error.
    pub(crate) fn finish(self) -> Result<Vec<Warning>, ConfigErrors> {
        let (errors, warnings) = self.into_parts();
        ConfigErrors::from_found(errors).map_or(Ok(warnings), Err)
    }

    /// The errors and the warnings, for those who look further before they decide.
    pub(crate) fn into_parts(mut self) -> (Vec<ConfigError>, Vec<Warning>) {
        if !self.ignored.is_empty() {
            self.warnings.push(Warning {
                file: self.file,
                place: None,
                path: String::new(),
                text: format!(
                    "accepted without effect, this engine does it by itself or has no such part: {}",
                    self.ignored.join(", ")
                ),
            });
        }
        (self.errors, self.warnings)
    }
}

/// Reads a nested section; keys that it does not have are mistakes.
pub(crate) fn read_section<S: Section>(
    node: &Node,
    path: &str,
    findings: &mut Findings,
) -> Option<S> {
    let (section, rest) = read_open_section::<S>(node, path, findings)?;
    report_unknown(&rest, path, &S::TABLE.names().collect::<Vec<_>>(), findings);
    Some(section)
}

/// Reads a section and hands back the entries that it does not know.
pub(crate) fn read_open_section<S: Section>(
    node: &Node,
    path: &str,
    findings: &mut Findings,
) -> Option<(S, Vec<Entry>)> {
    if !matches!(node.value, Value::Map(_) | Value::Null) {
        let expected = format!("a mapping, `{}`", S::TABLE.name);
        findings.wrong(node, path, &expected, None);
        return None;
    }
    let entries = node.entries();
    let mut reader = MapReader {
        entries,
        taken: vec![false; entries.len()],
        path,
        findings,
    };
    let section = S::read(&mut reader);
    let taken = reader.taken;
    let rest = entries
        .iter()
        .zip(taken)
        .filter(|(_, taken)| !taken)
        .map(|(entry, _)| entry);
    Some((section, rest.cloned().collect()))
}

/// Reports keys that nobody knows, each with the known name that is nearest.
pub(crate) fn report_unknown(
    unknown: &[Entry],
    path: &str,
    known: &[&'static str],
    findings: &mut Findings,
) {
    const LISTED_MAX: usize = 16;
    for entry in unknown {
        let near = nearest(&entry.key, known.iter().copied());
        let hint = match near {
            Some(near) => Some(format!("did you mean `{near}`?")),
            None if known.len() <= LISTED_MAX => {
                Some(format!("known keys: {}", listed(known.iter().copied())))
            }
            None => None,
        };
        let kind = ConfigErrorKind::UnknownKey {
            key: entry.key.clone(),
            nearest: near.map(str::to_owned),
        };
        findings.error(entry.place, &entry_path(entry, path), kind, hint);
    }
}

/// The path of an entry where it was written, which may not be the mapping that it is read in.
pub(crate) fn entry_path(entry: &Entry, path: &str) -> String {
    match &entry.origin {
        Origin::Written => join(path, &entry.key),
        Origin::Inherited(written_path) => written_path.clone(),
        Origin::CommandLine => format!("--{}", entry.key),
    }
}

/// Hands out the entries of one mapping, each once.
#[derive(Debug)]
pub(crate) struct MapReader<'a> {
    entries: &'a [Entry],
    taken: Vec<bool>,
    path: &'a str,
    findings: &'a mut Findings,
}

impl<'a> MapReader<'a> {
    /// The value of a key of `table`, if it is given and good.
    pub(crate) fn field<K: Kind>(
        &mut self,
        table: &'static SectionTable,
        name: &str,
    ) -> Option<Located<K::Value>> {
        let row = table
            .row(name)
            .expect("a section reads only the keys of its own table");
        let entry = self.take(row)?;
        if entry.node.is_null() && !K::NULL_IS_WRONG {
            return None;
        }
        let path = entry_path(entry, self.path);
        let value = K::read(&entry.node, &path, self.findings)?;
        Some(Located {
            value,
            place: entry.node.place.or(entry.place),
            path,
        })
    }

    /// Takes the entry of a row under any of its spellings; two at once are a mistake.
    fn take(&mut self, row: &FieldRow) -> Option<&'a Entry> {
        let mut found: Option<&Entry> = None;
        for (entry, taken) in self.entries.iter().zip(&mut self.taken) {
            if entry.key != row.name && !row.also.contains(&entry.key.as_str()) {
                continue;
            }
            *taken = true;
            match found {
                None => found = Some(entry),
                Some(first) => self.findings.conflict(
                    entry.place,
                    &entry_path(entry, self.path),
                    format!("says the same as `{}`, give only one of them", first.key),
                ),
            }
        }
        found
    }

    /// Takes the keys that this version does not act on and treats each as its row or group says.
    pub(crate) fn judge_unserved(&mut self, table: &'static SectionTable) {
        for row in table.unserved {
            let Some(entry) = self.take(row) else {
                continue;
            };
            if !entry.node.is_null() {
                self.judge(entry, row);
            }
        }
        for (entry, taken) in self.entries.iter().zip(&mut self.taken) {
            let Some(group) = table.group(&entry.key).filter(|_| !*taken) else {
                continue;
            };
            *taken = true;
            // Off is what this version does anyway.
            if !matches!(entry.node.value, Value::Null | Value::Bool(false)) {
                treat(
                    entry,
                    &entry_path(entry, self.path),
                    group.treatment,
                    self.findings,
                );
            }
        }
    }

    fn judge(&mut self, entry: &Entry, row: &FieldRow) {
        let path = entry_path(entry, self.path);
        if (row.check)(&entry.node, &path, self.findings)
            && !entry.node.same_value(&default_node(row))
        {
            treat(entry, &path, row.treatment, self.findings);
        }
    }
}

fn treat(entry: &Entry, path: &str, treatment: Treatment, findings: &mut Findings) {
    match treatment {
        Treatment::Served | Treatment::Quiet(_) => {}
        Treatment::Ignored(_) => findings.ignore(path),
        Treatment::Refused(what) => findings.not_served(&entry.node, path, what),
    }
}

/// A row's default as a value.
pub(crate) fn default_node(row: &FieldRow) -> Node {
    // `null` alone is an empty document to the parser, so the default is read as a value of a key.
    Document::parse("default", &format!("default: {}\n", row.default))
        .ok()
        .and_then(|document| {
            document
                .root()
                .entry("default")
                .map(|entry| entry.node.clone())
        })
        .expect("defaults in tables are YAML; a test reads each")
}

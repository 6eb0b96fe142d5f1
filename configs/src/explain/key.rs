//! What one key means, in every document that has it.

use std::fmt;

use crate::check::Kind;
use crate::disagg::{self, RawGroup};
use crate::error::nearest;
use crate::llm::RawLlm;
use crate::section::{FieldRow, Section, SectionTable, Shape, Treatment, paragraph};
use crate::yaml::join;

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

//! JSON schemas of the documents, for editors; made from the tables that also read them.
//!
//! The committed files under `configs/schema` are these texts; a test fails when they differ, and rewrites
//! them when `BATON_REGENERATE=1` is set.

use serde_json::{Map, Value as Json, json};

use crate::check::Kind;
use crate::disagg::RawGroup;
use crate::explain::treatment_text;
use crate::llm::RawLlm;
use crate::section::read::default_node;
use crate::section::{FieldRow, OptionGroup, Section, SectionTable, Shape, Treatment, paragraph};
use crate::yaml::{Node, Value};

/// The schema of a kind of document, as indented JSON with a final newline.
#[must_use]
pub fn schema_text(kind: Kind) -> String {
    let mut schema = Map::new();
    schema.insert(
        "$schema".to_owned(),
        json!("https://json-schema.org/draft/2020-12/schema"),
    );
    schema.insert("title".to_owned(), json!(format!("baton {kind}")));
    let mut definitions = Map::new();
    schema.append(&mut section_schema(kind.table(), &mut definitions));
    if !definitions.is_empty() {
        schema.insert("$defs".to_owned(), Json::Object(definitions));
    }
    let text = serde_json::to_string_pretty(&Json::Object(schema));
    text.expect("a tree of strings and numbers can be written") + "\n"
}

/// A section's schema; those of the sections in it go into `definitions`, each once.
fn section_schema(
    table: &'static SectionTable,
    definitions: &mut Map<String, Json>,
) -> Map<String, Json> {
    let mut properties = Map::new();
    add_properties(table, &mut properties, definitions);
    // Server sections hold engine options, and the top level hands its own down to them.
    let holds_engine_options =
        table.name == RawGroup::TABLE.name || table.name == Kind::Disagg.table().name;
    if holds_engine_options {
        add_properties(RawLlm::TABLE, &mut properties, definitions);
    }
    let mut schema = Map::new();
    schema.insert("description".to_owned(), json!(paragraph(table.about)));
    schema.insert("type".to_owned(), json!(["object", "null"]));
    // A router's arguments depend on its type, which the reader checks.
    schema.insert(
        "additionalProperties".to_owned(),
        json!(table.name == "router"),
    );
    schema.insert("properties".to_owned(), Json::Object(properties));
    schema
}

fn add_properties(
    table: &'static SectionTable,
    properties: &mut Map<String, Json>,
    definitions: &mut Map<String, Json>,
) {
    for row in table.rows() {
        properties
            .entry(row.name)
            .or_insert_with(|| property(row, definitions));
        for also in row.also {
            let description = format!("Another spelling of `{}`.", row.name);
            let mut alias = value_schema(&row.shape, definitions);
            alias.insert("description".to_owned(), json!(description));
            properties.entry(*also).or_insert(Json::Object(alias));
        }
    }
    for group in table.groups {
        for name in group.names {
            properties
                .entry(*name)
                .or_insert_with(|| group_property(group));
        }
    }
}

fn property(row: &FieldRow, definitions: &mut Map<String, Json>) -> Json {
    let default = json_of(&default_node(row));
    let mut schema = match row.treatment {
        Treatment::Refused(_) if default.is_null() => object([("type", json!("null"))]),
        Treatment::Refused(_) => object([("enum", json!([default, null]))]),
        Treatment::Served | Treatment::Quiet(_) | Treatment::Ignored(_) => {
            value_schema(&row.shape, definitions)
        }
    };
    let mut description = row.doc_text();
    if !matches!(row.treatment, Treatment::Served) {
        let what = treatment_text(row.treatment);
        description = format!("{description} ({})", what.trim());
    }
    schema.insert("description".to_owned(), json!(description));
    if !default.is_null() && !matches!(row.shape, Shape::Section(_)) {
        schema.insert("default".to_owned(), default);
    }
    Json::Object(schema)
}

fn group_property(group: &OptionGroup) -> Json {
    let description = format!(
        "TensorRT-LLM option, {}",
        treatment_text(group.treatment).trim()
    );
    let mut schema = match group.treatment {
        Treatment::Refused(_) => object([("enum", json!([null, false]))]),
        Treatment::Served | Treatment::Quiet(_) | Treatment::Ignored(_) => Map::new(),
    };
    schema.insert("description".to_owned(), json!(description));
    Json::Object(schema)
}

fn object<const N: usize>(entries: [(&str, Json); N]) -> Map<String, Json> {
    entries
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

fn value_schema(shape: &Shape, definitions: &mut Map<String, Json>) -> Map<String, Json> {
    match shape {
        Shape::Flag => object([("type", json!(["boolean", "null"]))]),
        Shape::Text => object([("type", json!(["string", "null"])), ("minLength", json!(1))]),
        Shape::FreeText => object([("type", json!(["string", "null"]))]),
        Shape::Whole { min, max } => object([
            ("type", json!(["integer", "null"])),
            ("minimum", json!(min)),
            ("maximum", json!(max)),
        ]),
        Shape::Share => object([
            ("type", json!(["number", "null"])),
            ("exclusiveMinimum", json!(0)),
            ("maximum", json!(1)),
        ]),
        Shape::Seconds => object([
            ("type", json!(["number", "null"])),
            ("exclusiveMinimum", json!(0)),
        ]),
        Shape::Endpoint => object([
            ("type", json!("string")),
            (
                "pattern",
                json!(r"^(([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}|file:.+)$"),
            ),
        ]),
        Shape::OneOf(names) => object([("enum", spellings(&names()))]),
        Shape::List(item) => object([
            ("type", json!(["array", "null"])),
            ("items", Json::Object(value_schema(item, definitions))),
        ]),
        Shape::Section(table) => {
            let name = table.name.replace(' ', "_");
            if !definitions.contains_key(&name) {
                let section = section_schema(table, definitions);
                definitions.insert(name.clone(), Json::Object(section));
            }
            object([("$ref", json!(format!("#/$defs/{name}")))])
        }
        Shape::TextMap => object([
            ("type", json!(["object", "null"])),
            (
                "additionalProperties",
                json!({"type": ["string", "number", "boolean"]}),
            ),
        ]),
        Shape::Anything => Map::new(),
    }
}

/// The names as they are and in both cases, since case makes no difference; and null.
fn spellings(names: &[&str]) -> Json {
    let mut all: Vec<Json> = Vec::new();
    for name in names {
        for spelling in [(*name).to_owned(), name.to_lowercase(), name.to_uppercase()] {
            let spelling = json!(spelling);
            if !all.contains(&spelling) {
                all.push(spelling);
            }
        }
    }
    all.push(Json::Null);
    Json::Array(all)
}

fn json_of(node: &Node) -> Json {
    match &node.value {
        Value::Null => Json::Null,
        Value::Bool(flag) => json!(flag),
        Value::Whole(number) => json!(number),
        Value::Number(number) => json!(number),
        Value::Text(text) => json!(text),
        Value::List(items) => items.iter().map(json_of).collect(),
        Value::Map(entries) => entries
            .iter()
            .map(|entry| (entry.key.clone(), json_of(&entry.node)))
            .collect(),
    }
}

#[cfg(test)]
mod tests;

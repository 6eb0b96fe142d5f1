//! Tests that the committed schemas are the generated ones.

use std::path::PathBuf;

use super::*;

#[test]
fn committed_schemas_are_those_of_the_tables() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("schema");
    let regenerate = std::env::var_os("BATON_REGENERATE").is_some_and(|value| value == "1");
    for kind in Kind::ALL {
        let path = directory.join(format!("{kind}.json"));
        let text = schema_text(kind);
        if regenerate {
            std::fs::write(&path, &text).expect("written");
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == text,
            "{} differs from the tables; run the tests with BATON_REGENERATE=1 and commit it",
            path.display()
        );
    }
}

#[test]
fn every_key_of_every_table_is_in_its_schema() {
    for kind in Kind::ALL {
        let schema: Json = serde_json::from_str(&schema_text(kind)).expect("JSON");
        let properties = schema["properties"].as_object().expect("properties");
        for name in kind.table().names() {
            let property = properties
                .get(name)
                .unwrap_or_else(|| panic!("{kind}: {name}"));
            assert!(
                property["description"]
                    .as_str()
                    .is_some_and(|text| !text.is_empty())
            );
        }
        assert_eq!(schema["additionalProperties"], json!(false));
    }
}

#[test]
fn nested_sections_and_defaults_are_there() {
    let schema: Json = serde_json::from_str(&schema_text(Kind::Llm)).expect("JSON");
    let reference = &schema["properties"]["kv_cache_config"]["$ref"];
    assert_eq!(*reference, json!("#/$defs/kv_cache_config"));
    let block = &schema["$defs"]["kv_cache_config"]["properties"]["tokens_per_block"];
    assert_eq!(block["default"], json!(32));
    assert_eq!(block["maximum"], json!(1024));
    let disagg: Json = serde_json::from_str(&schema_text(Kind::Disagg)).expect("JSON");
    let section = &disagg["$defs"]["server_section"]["properties"];
    assert_eq!(section["max_batch_size"]["default"], json!(2048));
    assert_eq!(section["urls"]["items"]["type"], json!("string"));
}

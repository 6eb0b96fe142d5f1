//! Tests of explanations: every value with its source, every key with its text.

use super::*;
use crate::llm::{LlmOptions, LlmOverrides, resolve, to_yaml};

fn explained(text: &str, kind: Option<Kind>) -> String {
    let document = Document::parse("f.yaml", text).expect("valid YAML");
    explain_document(&document, kind)
        .unwrap_or_else(|error| panic!("{error}"))
        .to_string()
}

#[test]
fn every_value_has_its_source() {
    let text = explained(
        "# one\nmax_batch_size: 8\nbackend: pytorch\nkv_cache_config:\n  dtype: float32\ncache_transceiver_config: {backend: ucx}\nprint_iter_log: true\n",
        None,
    );
    assert_eq!(text, include_str!("tests/llm.txt").trim_end());
}

#[test]
fn inherited_values_name_where_they_were_written() {
    let text = explained(
        "node_id: 3\nmodel: m\nkv_cache_config: {tokens_per_block: 64}\ncontext_servers:\n  urls: [a:1, b:2]\n  max_batch_size: 2\n",
        None,
    );
    assert_eq!(text, include_str!("tests/disagg.txt").trim_end());
}

#[test]
fn layouts_show_each_roles_engine() {
    let text = explained(
        "model: m\nproxy: {node_id: 1}\nengine: {max_batch_size: 4}\ncontext: {engine: {max_num_tokens: 64}}\n",
        None,
    );
    let line = |start: &str| {
        text.lines()
            .find(|line| line.starts_with(start))
            .unwrap_or_default()
    };
    let source = |start: &str| {
        line(start)
            .split("  # ")
            .nth(1)
            .unwrap_or_default()
            .to_owned()
    };
    assert_eq!(source("context.engine.max_num_tokens = 64 "), "f.yaml:4");
    assert_eq!(
        source("context.engine.max_batch_size = 4 "),
        "inherited from `engine.max_batch_size`, f.yaml:3"
    );
    assert_eq!(
        source("generation.engine.max_num_tokens = 8192 "),
        "default"
    );
    assert_eq!(source("context.instances = 2 "), "default");
    assert_eq!(source("generation.instances = 1 "), "default");
    assert_eq!(source("model = \"m\" "), "f.yaml:1");
    assert_eq!(line("engine."), "");
}

/// What explain says and what resolve does, side by side.
fn agree(values: &[ExplainedValue], prefix: &str, options: &LlmOptions) {
    let rendered = Document::parse("r.yaml", &to_yaml(options)).expect("valid YAML");
    let mut compared = 0;
    for value in values {
        let Some(path) = value.path.strip_prefix(prefix) else {
            continue;
        };
        let mut node = Some(rendered.root());
        for key in path.split('.') {
            node = node
                .and_then(|node| node.entry(key))
                .map(|entry| &entry.node);
        }
        // Short and older forms are not in the rendered text.
        let Some(node) = node else { continue };
        compared += 1;
        assert!(
            value.value.eq_ignore_ascii_case(&node.flow()),
            "{value:?}: {}",
            node.flow()
        );
    }
    assert!(compared >= 20, "{compared}");
}

#[test]
fn explained_values_are_the_resolved_ones() {
    for text in [
        "{}",
        "free_gpu_memory_fraction: 0.5\nenable_cache_transceiver: true\nmodel: m\n",
        "cache_transceiver_config: {backend: nixl, max_num_tokens: 9}\nkv_cache_config: {free_gpu_memory_fraction: 0.25}\n",
        "cache_transceiver_config: {enable_cache_transceiver: true}\nmax_seq_len: 7\ndtype: float32\n",
    ] {
        let document = Document::parse("f.yaml", text).expect("valid YAML");
        let values = explain_document(&document, Some(Kind::Llm))
            .expect("good")
            .values;
        let (options, _) = resolve(Some(&document), &LlmOverrides::default()).expect("good");
        if text.contains("enable_cache_transceiver: true") {
            let backend = values
                .iter()
                .find(|v| v.path == "cache_transceiver_config.backend");
            assert_eq!(backend.expect("a backend").value, "\"DEFAULT\"");
        }
        agree(&values, "", &options);
        let layout_text = format!(
            "model: top\nserved_model_name: s\nengine: {{max_batch_size: 3}}\ncontext:\n  engine:\n    {}\n",
            text.replace('\n', "\n    ")
        );
        let document = Document::parse("f.yaml", &layout_text).expect("valid YAML");
        let values = explain_document(&document, Some(Kind::Layout))
            .expect("good")
            .values;
        let (layout, _) = layout::resolve(&document, None).expect("good");
        agree(&values, "context.engine.", &layout.context.options);
        agree(&values, "generation.engine.", &layout.generation.options);
    }
}

#[test]
fn a_bad_document_is_not_explained() {
    let document = Document::parse("f.yaml", "max_batch_size: 0").expect("valid YAML");
    assert!(explain_document(&document, Some(Kind::Llm)).is_err());
}

#[test]
fn one_key_is_documented_in_every_document_that_has_it() {
    let text = explain_key("kv_cache_config.tokens_per_block", Some(Kind::Llm)).expect("known");
    assert_eq!(
        text,
        "kv_cache_config.tokens_per_block (llm)\n  Tokens per block, a power of two.\n  \
         value: a whole number from 1 to 1024\n  default: 32"
    );
    let everywhere = explain_key("tokens_per_block", None).expect("known");
    assert!(everywhere.contains("context_servers.kv_cache_config.tokens_per_block (disagg)"));
    assert!(everywhere.contains("router(conversation).tokens_per_block (disagg)"));
    assert!(everywhere.contains("engine.kv_cache_config.tokens_per_block (layout)"));
    let quiet = explain_key("backend", Some(Kind::Llm)).expect("known");
    assert!(quiet.contains("accepted without effect"), "{quiet}");
    let refused = explain_key("speculative_config", None).expect("known");
    assert!(refused.contains("not served by this version"), "{refused}");
}

#[test]
fn an_unknown_key_has_its_nearest() {
    let error = explain_key("kv_cache_config.tokens_per_blok", None).expect_err("unknown");
    assert_eq!(
        error.to_string(),
        "no document has a key \"kv_cache_config.tokens_per_blok\"\n  hint: did you mean `kv_cache_config.tokens_per_block`?"
    );
    let error = explain_key("max_retires", None).expect_err("unknown");
    assert_eq!(error.nearest.as_deref(), Some("max_retries"));
}

#[test]
fn programs_read_it_too() {
    let document =
        Document::parse("f.yaml", "port: 1234\nserver_type: etcd\n").expect("valid YAML");
    let json = explain_document(&document, Some(Kind::Metadata))
        .expect("good")
        .to_json();
    assert_eq!(json["kind"], "metadata");
    assert_eq!(json["values"][2]["path"], "port");
    assert_eq!(json["values"][2]["source"], "f.yaml:1");
}

//! Tests of layouts and of the embedded quick start.

use super::*;
use crate::disagg::to_yaml as disagg_yaml;
use crate::llm::LlmOverrides;
use crate::section::{Section, SectionTable};
use crate::transceiver::{PreferredTransport, TransportChoice};

fn parse(text: &str) -> Document {
    Document::parse("layout.yaml", text).expect("valid YAML")
}

fn resolved(text: &str) -> Layout {
    resolve(&parse(text), None)
        .unwrap_or_else(|error| panic!("{error}"))
        .0
}

fn errors(text: &str) -> String {
    resolve(&parse(text), None)
        .expect_err("refused")
        .to_string()
}

#[test]
fn the_quickstart_layout_runs_two_and_one() {
    let (layout, warnings) = quickstart("/models/tiny.gguf").expect("good");
    assert_eq!(warnings, []);
    assert_eq!(layout.model, "/models/tiny.gguf");
    assert_eq!(
        (layout.context.instances, layout.generation.instances),
        (2, 1)
    );
    assert_eq!(layout.proxy.config.port, 0);
    for role in [&layout.context, &layout.generation] {
        assert_eq!(role.options.model.as_deref(), Some("/models/tiny.gguf"));
        assert_eq!(role.options.transceiver, Some(TransceiverConfig::default()));
        assert_eq!(role.endpoints, []);
    }
    let error = resolve(&parse(QUICKSTART), None)
        .expect_err("no model")
        .to_string();
    assert!(error.contains("model: missing"), "{error}");
}

#[test]
fn a_file_that_names_a_model_keeps_it() {
    let (layout, _) = resolve(&parse("model: mine"), Some("other")).expect("good");
    assert_eq!(layout.model, "mine");
}

#[test]
fn roles_cover_the_shared_engine_options_key_by_key() {
    let layout = resolved(
        "model: m\nserved_model_name: s\nengine:\n  max_batch_size: 4\n  kv_cache_config: {tokens_per_block: 16, max_tokens: 100}\n\
         context:\n  engine:\n    max_batch_size: 2\n    kv_cache_config: {max_tokens: 50}\n  environment: {A: 1, B: 'x y'}\n\
         generation: {instances: 3}\nproxy: {port: 8000, request_timeout: 5}\nlog_dir: logs\n",
    );
    let context = &layout.context.options;
    assert_eq!(
        (context.max_batch_size, context.kv_cache.max_tokens),
        (2, Some(50))
    );
    assert_eq!(context.kv_cache.tokens_per_block, 16);
    let generation = &layout.generation.options;
    assert_eq!(
        (generation.max_batch_size, generation.kv_cache.max_tokens),
        (4, Some(100))
    );
    assert_eq!(generation.served_model_name.as_deref(), Some("s"));
    assert_eq!(
        (layout.context.instances, layout.generation.instances),
        (2, 3)
    );
    let environment: Vec<(&str, &str)> = layout
        .context
        .environment
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    assert_eq!(environment, [("A", "1"), ("B", "x y")]);
    assert_eq!(layout.proxy.config.port, 8000);
    assert_eq!(layout.proxy.request_timeout, Duration::from_secs(5));
    assert_eq!(layout.log_dir, Some(PathBuf::from("logs")));
}

#[test]
fn mistakes_stand_where_they_were_written() {
    assert_eq!(
        errors(
            "engine:\n  max_batch_size: 0\n  kv_cache_config: {dtype: nvfp4}\ncontext: {instance: 2}\ngeneration: []\n"
        ),
        "\
layout.yaml: model: missing, expected a GGUF file, a Hugging Face directory or a model id
layout.yaml:2:19: engine.max_batch_size: found 0, expected a whole number from 1
layout.yaml:3:28: engine.kv_cache_config.dtype: `nvfp4` is not served by this version: KV in 4 bits
  hint: served: `auto`, `float32`, `float16`, `bfloat16`, `half`, `fp8`
layout.yaml:4:11: context.instance: unknown key `instance`
  hint: did you mean `instances`?
layout.yaml:5:13: generation: found list [], expected a mapping, `role`"
    );
}

#[test]
fn a_disagg_config_with_a_model_is_a_layout() {
    let layout = resolved(include_str!("../../samples/disagg_config_mpi.yaml"));
    assert_eq!(layout.model, "TinyLlama/TinyLlama-1.1B-Chat-v1.0");
    assert_eq!(layout.context.instances, 2);
    let ports: Vec<u16> = layout
        .context
        .endpoints
        .iter()
        .map(|endpoint| endpoint.port)
        .collect();
    assert_eq!(ports, [8001, 8002]);
    assert_eq!(layout.proxy.config.port, 8000);
    let wish = TransportChoice::Preferred(PreferredTransport::Ucx);
    let transceiver = layout.generation.options.transceiver.expect("one");
    assert_eq!(transceiver.backend, wish);
    assert_eq!(
        errors(include_str!("../../samples/disagg_config.yaml")),
        "layout.yaml: model: missing, expected a GGUF file, a Hugging Face directory or a model id"
    );
    let (named, _) = resolve(
        &parse(include_str!("../../samples/disagg_config.yaml")),
        Some("m"),
    )
    .expect("good");
    assert_eq!(named.context.options.model.as_deref(), Some("m"));
    assert!(named.generation.options.transceiver.is_some());
}

#[test]
fn a_role_without_a_model_is_named() {
    assert_eq!(
        errors("context_servers: {model: m}\ngeneration_servers: {num_instances: 1}\n"),
        "layout.yaml:2:1: generation_servers.model: missing, expected a GGUF file, a Hugging Face directory or a model id"
    );
}

#[test]
fn children_read_back_what_they_are_told() {
    let (layout, _) = quickstart("m").expect("good");
    let text = llm::to_yaml(&layout.context.options);
    let document = Document::parse("child.yaml", &text).expect("valid YAML");
    let (options, warnings) =
        llm::resolve(Some(&document), &LlmOverrides::default()).expect("good");
    assert_eq!(warnings, []);
    assert_eq!(options, layout.context.options);
    let address = |port| Endpoint {
        host: "127.0.0.1".to_owned(),
        port,
    };
    let config = layout.disagg_config(vec![address(1), address(2)], vec![address(3)]);
    let document = Document::parse("proxy.yaml", &disagg_yaml(&config)).expect("valid YAML");
    assert_eq!(disagg::resolve(&document, 0).expect("good").0.proxy, config);
}

#[test]
fn defaults_in_the_tables_are_those_of_the_types() {
    let lines = |table: &'static SectionTable, indent: &str| -> String {
        table
            .rows()
            .map(|row| format!("{indent}{}: {}\n", row.name, row.default))
            .collect()
    };
    let text = lines(RawLayout::TABLE, "")
        .replace("model: null\nserved", "model: m\nserved")
        .replace("gpus_per_node: null", "gpus_per_node: 2")
        .replace(
            "context: {}",
            &format!("context:\n{}", lines(RawRole::TABLE, "  ")),
        )
        .replace(
            "proxy: {}",
            &format!("proxy:\n{}", lines(RawProxy::TABLE, "  ")),
        )
        .replace(
            "slurm: {}",
            &format!("slurm:\n{}", lines(raw::RawSlurm::TABLE, "  ")),
        );
    let mut explicit = resolved(&text);
    // They differ in what was written, and in nothing else.
    explicit.job_keys = vec!["gpus_per_node"];
    let implied = resolved("model: m\ngpus_per_node: 2");
    assert_eq!(explicit, implied, "{text}");
}

//! Tests of engine options: order of sources, known and unknown keys, rendering.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::transceiver::{PreferredTransport, RawTransceiver, TransportChoice};

fn document(text: &str) -> Document {
    Document::parse("llm.yaml", text).expect("valid YAML")
}

fn resolved(text: &str) -> (LlmOptions, Vec<Warning>) {
    resolve(Some(&document(text)), &LlmOverrides::default())
        .unwrap_or_else(|error| panic!("{error}"))
}

fn errors(text: &str) -> String {
    resolve(Some(&document(text)), &LlmOverrides::default())
        .expect_err("refused")
        .to_string()
}

#[test]
fn defaults_in_the_tables_are_those_of_the_types() {
    let mut text = String::new();
    for row in RawLlm::TABLE.rows() {
        text.push_str(&format!("{}: {}\n", row.name, row.default));
    }
    let with_sections = text
        .replace(
            "kv_cache_config: {}\n",
            &section_text::<RawKvCache>("kv_cache_config"),
        )
        .replace(
            "cache_transceiver_config: null\n",
            &section_text::<RawTransceiver>("cache_transceiver_config")
                .replace("backend: null", "backend: DEFAULT"),
        );
    let (options, warnings) = resolved(&with_sections);
    let expected = LlmOptions {
        transceiver: Some(TransceiverConfig::default()),
        ..LlmOptions::default()
    };
    assert_eq!(options, expected);
    assert_eq!(warnings, []);
    assert_eq!(resolved(&text).0, LlmOptions::default());
}

fn section_text<S: Section>(name: &str) -> String {
    let lines = S::TABLE
        .rows()
        .map(|row| format!("  {}: {}\n", row.name, row.default));
    format!("{name}:\n{}", lines.collect::<String>())
}

#[test]
fn file_wins_over_command_line_and_command_line_over_default() {
    let cli = LlmOverrides {
        max_batch_size: Some(4),
        max_num_tokens: Some(512),
        free_gpu_memory_fraction: Some(0.5),
        ..LlmOverrides::default()
    };
    let file = document(
        "max_batch_size: 8\nmax_seq_len: 99\nkv_cache_config: {free_gpu_memory_fraction: 0.25}\n",
    );
    let (options, _) = resolve(Some(&file), &cli).expect("good");
    assert_eq!(options.max_batch_size, 8);
    assert_eq!(options.max_num_tokens, 512);
    assert_eq!(options.max_seq_len, Some(99));
    assert!((options.kv_cache.free_memory_fraction - 0.25).abs() < 1e-9);
    let (options, _) = resolve(None, &cli).expect("good");
    assert_eq!(options.max_batch_size, 4);
    assert!((options.kv_cache.free_memory_fraction - 0.5).abs() < 1e-9);
}

#[test]
fn device_and_load_format_may_be_typed() {
    let cli = LlmOverrides {
        device: Some(Device::Cuda),
        load_format: Some(LoadFormat::Dummy),
        ..LlmOverrides::default()
    };
    let (options, _) = resolve(None, &cli).expect("good");
    assert_eq!(options.device, Device::Cuda);
    assert_eq!(options.load_format, LoadFormat::Dummy);
    let file = document("device: cpu\n");
    let (options, _) = resolve(Some(&file), &cli).expect("good");
    assert_eq!(options.device, Device::Cpu);
    assert_eq!(options.load_format, LoadFormat::Dummy);
}

#[test]
fn command_line_values_are_checked_like_the_files() {
    let cli = LlmOverrides {
        max_batch_size: Some(0),
        max_beam_width: Some(4),
        others: vec![("reasoning_parser".to_owned(), "deepseek-r1".to_owned())],
        ..LlmOverrides::default()
    };
    let error = resolve(None, &cli).expect_err("refused").to_string();
    assert_eq!(
        error,
        "command line: --max_batch_size: found 0, expected a whole number from 1\n\
         command line: --max_beam_width: 4 is not served by this version: beam search\n\
         command line: --reasoning_parser: \"deepseek-r1\" is not served by this version: splitting answers into reasoning and tool calls"
    );
}

#[test]
fn a_transceiver_is_there_only_with_a_backend() {
    assert_eq!(resolved("{}").0.transceiver, None);
    assert_eq!(
        resolved("cache_transceiver_config: {max_tokens_in_buffer: 2048}")
            .0
            .transceiver,
        None
    );
    for (name, choice) in [
        ("DEFAULT", TransportChoice::Default),
        ("default", TransportChoice::Default),
        ("tcp", TransportChoice::Tcp),
        ("UCX", TransportChoice::Preferred(PreferredTransport::Ucx)),
        ("nixl", TransportChoice::Preferred(PreferredTransport::Nixl)),
        ("MPI", TransportChoice::Preferred(PreferredTransport::Mpi)),
        (
            "Mooncake",
            TransportChoice::Preferred(PreferredTransport::Mooncake),
        ),
    ] {
        let (options, warnings) = resolved(&format!(
            "cache_transceiver_config:\n  backend: {name}\n  kv_transfer_timeout_ms: 5000\n"
        ));
        let transceiver = options.transceiver.expect("a transceiver");
        assert_eq!(transceiver.backend, choice);
        assert_eq!(transceiver.backend.name(), name.to_uppercase());
        assert_eq!(transceiver.kv_transfer_timeout, Duration::from_secs(5));
        assert_eq!(warnings, []);
    }
}

#[test]
fn the_older_key_switches_the_transceiver() {
    let on = Some(TransceiverConfig::default());
    assert_eq!(
        resolved("cache_transceiver_config: {enable_cache_transceiver: true}")
            .0
            .transceiver,
        on
    );
    assert_eq!(resolved("enable_cache_transceiver: true").0.transceiver, on);
    assert_eq!(
        resolved("enable_cache_transceiver: false").0.transceiver,
        None
    );
    assert_eq!(
        errors("cache_transceiver_config:\n  backend: ucx\n  enable_cache_transceiver: false\n"),
        "llm.yaml:3:29: cache_transceiver_config.enable_cache_transceiver: is false, but `backend` is `UCX`"
    );
}

#[test]
fn every_mistake_is_reported_in_one_run() {
    let text = "\
max_batch_size: 0
max_num_tokens: '8192'
max_seq_len: many
enable_chunked_prefil: true
dtype: fp8
load_format: dumy
kv_cache_config:
  tokens_per_block: 48
  free_gpu_memory_fraction: 1.5
  tokens_per_blok: 32
cache_transceiver_config:
  backend: RDMA
  kv_transfer_timeout_ms: 0
max_beam_width: 4
speculative_config: {decoding_type: MTP}
served_model_name: 7
zzz: 1
";
    assert_eq!(
        errors(text),
        "\
llm.yaml:1:17: max_batch_size: found 0, expected a whole number from 1
llm.yaml:2:17: max_num_tokens: found text \"8192\", expected a whole number from 1
  hint: remove the quotes
llm.yaml:3:14: max_seq_len: found text \"many\", expected a whole number from 1
llm.yaml:4:1: enable_chunked_prefil: unknown key `enable_chunked_prefil`
  hint: did you mean `enable_chunked_prefill`?
llm.yaml:5:8: dtype: `fp8` is not served by this version: arithmetic in 8 bits beyond what the checkpoint has so
  hint: served: `auto`, `float32`, `float16`, `bfloat16`, `half`
llm.yaml:6:14: load_format: found text \"dumy\", expected one of `auto`, `dummy`
  hint: did you mean `dummy`?
llm.yaml:8:21: kv_cache_config.tokens_per_block: found 48, expected a power of two
  hint: 64 is the next one
llm.yaml:9:29: kv_cache_config.free_gpu_memory_fraction: found 1.5, expected a number above 0 and at most 1
llm.yaml:10:3: kv_cache_config.tokens_per_blok: unknown key `tokens_per_blok`
  hint: did you mean `tokens_per_block`?
llm.yaml:12:12: cache_transceiver_config.backend: found text \"RDMA\", expected one of `DEFAULT`, `TCP`, `UCX`, `NIXL`, `MPI`, `MOONCAKE`, `SHM`, `CUDA_IPC`
llm.yaml:13:27: cache_transceiver_config.kv_transfer_timeout_ms: found 0, expected a whole number from 1 to 2592000000
llm.yaml:14:17: max_beam_width: 4 is not served by this version: beam search
llm.yaml:15:21: speculative_config: `speculative_config` is not served by this version: speculative and guided decoding modes
llm.yaml:16:20: served_model_name: found 7, expected text
  hint: put it in quotes: \"7\"
llm.yaml:17:1: zzz: unknown key `zzz`"
    );
}

#[test]
fn tuning_options_of_existing_files_are_listed_once() {
    let (options, warnings) = resolved(
        "backend: pytorch\ndisable_overlap_scheduler: True\ncuda_graph_config: {enable_padding: true}\n\
         enable_attention_dp: true\nprint_iter_log: false\nmoe_config: {backend: CUTEDSL}\n\
         speculative_config: null\nenable_lora: false\nmax_batch_size: 3\nkv_cache_config: {use_uvm: true, onboard_blocks: true}\n",
    );
    assert_eq!(options.max_batch_size, 3);
    assert!(options.disable_overlap_scheduler);
    let texts: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "llm.yaml: accepted without effect, this engine does it by itself or has no such part: \
          kv_cache_config.use_uvm, cuda_graph_config, enable_attention_dp, moe_config"
        ]
    );
}

#[test]
fn names_are_listed_once() {
    let mut names: Vec<&str> = RawLlm::TABLE.names().collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[test]
fn chat_templates_are_inline_or_files() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("template.jinja");
    std::fs::write(&path, "{{ from the file }}").expect("written");
    let (options, _) = resolved(&format!("chat_template: {}\n", path.display()));
    assert_eq!(
        options.chat_template.as_deref(),
        Some("{{ from the file }}")
    );
    let (options, _) = resolved("chat_template: '{{ messages }}'\n");
    assert_eq!(options.chat_template.as_deref(), Some("{{ messages }}"));
    std::fs::write(&path, "plain").expect("written");
    assert!(
        errors(&format!("chat_template: {}\n", path.display())).contains("no `{{` or `{%` in it")
    );
    assert!(
        errors("chat_template: /no/such/file\n")
            .contains("a chat template, or a file that holds one")
    );
}

#[test]
fn fractions_that_disagree_are_a_conflict() {
    assert_eq!(
        errors(
            "free_gpu_memory_fraction: 0.5\nkv_cache_config:\n  free_gpu_memory_fraction: 0.9\n"
        ),
        "llm.yaml:1:27: free_gpu_memory_fraction: is 0.5, but `kv_cache_config.free_gpu_memory_fraction` is 0.9"
    );
}

fn choice<E: Choices>(index: usize) -> E {
    let served: Vec<E> = E::TABLE
        .iter()
        .filter_map(|(_, choice)| match choice {
            Choice::Is(value) => Some(*value),
            Choice::NotServed(_) => None,
        })
        .collect();
    served[index % served.len()]
}

proptest! {
    #[test]
    fn rendered_options_resolve_to_the_same(
        texts in proptest::collection::vec(proptest::option::of(".{1,20}"), 3),
        picks in proptest::collection::vec(0_usize..12, 4),
        counts in proptest::collection::vec(1_u32..4096, 6),
        long in proptest::option::of(1_u64..),
        share in 0.000_001..=1.0_f64,
        flags in proptest::collection::vec(any::<bool>(), 4),
    ) {
        let options = LlmOptions {
            model: texts[0].clone(),
            dtype: choice(picks[0]),
            load_format: choice(picks[1]),
            max_batch_size: counts[0],
            max_num_tokens: counts[1],
            max_seq_len: flags[0].then_some(counts[2]),
            enable_chunked_prefill: flags[1],
            tensor_parallel_size: counts[3],
            kv_cache: KvCacheConfig {
                enable_block_reuse: flags[2],
                max_tokens: long,
                free_memory_fraction: share,
                dtype: choice(picks[2]),
                tokens_per_block: 1 << (counts[4] % 11),
                event_buffer_max_size: counts[5],
            },
            transceiver: flags[3].then(|| TransceiverConfig {
                backend: choice(picks[3]),
                max_tokens_in_buffer: flags[0].then_some(counts[5]),
                kv_transfer_timeout: Duration::from_millis(counts[4].into()),
                ..TransceiverConfig::default()
            }),
            served_model_name: texts[1].clone(),
            chat_template: texts[2].as_ref().map(|text| format!("{text}{{{{ x }}}}")),
            ..LlmOptions::default()
        };
        let (read, warnings) = resolved(&to_yaml(&options));
        prop_assert_eq!(read, options);
        prop_assert_eq!(warnings, vec![]);
    }
}

#[test]
fn the_command_lines_uri_covers_the_files() {
    let cli = LlmOverrides {
        disagg_cluster_uri: Some("http://b:2".to_owned()),
        ..LlmOverrides::default()
    };
    let with = |file: Option<&str>| {
        let file = file.map(document);
        let (options, warnings) =
            resolve(file.as_ref(), &cli).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(warnings, []);
        let cluster = options.cluster.expect("a cluster");
        (cluster.store.to_string(), cluster.name)
    };
    let unnamed = ("b:2".to_owned(), String::new());
    let named = ("b:2".to_owned(), "c".to_owned());
    assert_eq!(with(None), unnamed);
    assert_eq!(with(Some("max_batch_size: 1")), unnamed);
    assert_eq!(with(Some("disagg_cluster:")), unnamed);
    assert_eq!(with(Some("disagg_cluster: {cluster_name: c}")), named);
    let other = "disagg_cluster: {cluster_name: c, cluster_uri: 'http://a:1'}";
    assert_eq!(with(Some(other)), named);
    let alone = resolved(other).0.cluster.expect("a cluster");
    assert_eq!(alone.store.to_string(), "a:1");
    let bad = LlmOverrides {
        disagg_cluster_uri: Some("b:2".to_owned()),
        ..LlmOverrides::default()
    };
    let error = resolve(None, &bad).expect_err("refused").to_string();
    assert!(error.contains("expected `http://host:port`"), "{error}");
}

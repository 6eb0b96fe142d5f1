//! What `load` reports besides the model: names, tokens, defaults, progress; dummy weights; configurations that are
//! refused by name; rotary tables against numbers from an independent implementation.

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use baton_configs::llm::{ComputeDtype, KvCacheConfig, KvCacheDtype, LlmOptions, LoadFormat};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::reference_backend::ReferenceBackend;
use super::tiny_gguf::tiny_gguf;
use super::{Session, float32, golden_json, golden_path, test_gguf, try_load};
use crate::backend::{ActivationDtype, RopePairing, SequenceSpan, StepBatch};
use crate::model::config::{DecoderConfig, HuggingFaceConfig};
use crate::model::load::{ModelHeader, TokenizerFiles, kv_dtype, load};
use crate::page::KvDtype;

fn dummy() -> LlmOptions {
    LlmOptions {
        load_format: LoadFormat::Dummy,
        ..float32()
    }
}

fn tiny(name: &str) -> String {
    golden_path(&format!("tiny-{name}"))
        .to_str()
        .expect("UTF-8")
        .to_owned()
}

/// `tiny-llama`'s configuration with keys replaced; `null` removes one.
fn config_with(changes: &Value) -> String {
    let mut config = golden_json("tiny-llama/config.json");
    for (key, value) in changes.as_object().expect("an object") {
        config[key] = value.clone();
    }
    config.to_string()
}

fn decoder(changes: &Value) -> Result<DecoderConfig, String> {
    HuggingFaceConfig::parse(&config_with(changes))
        .and_then(|raw| raw.decoder())
        .map_err(|kind| kind.to_string())
}

#[test]
fn a_directory_reports_what_a_server_needs() {
    let root = TempDir::new().expect("a directory");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(Path::new(&tiny("qwen2")).join(file), root.path().join(file)).expect("a copy");
    }
    let generation = json!({"eos_token_id": [5, 257], "bos_token_id": 256, "do_sample": true,
        "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05});
    fs::write(
        root.path().join("generation_config.json"),
        generation.to_string(),
    )
    .expect("a file");
    let spec = root.path().to_str().expect("UTF-8");
    let loaded = try_load(spec, &float32()).expect("it loads");
    assert_eq!(
        loaded.name,
        root.path().file_name().expect("a name").to_string_lossy()
    );
    assert_eq!(loaded.tokens.eos_ids, [5, 257]);
    assert_eq!(
        (loaded.tokens.bos_id, loaded.tokens.add_bos),
        (Some(256), None)
    );
    let generation = &loaded.generation;
    assert_eq!(
        (generation.temperature, generation.top_p),
        (Some(0.7), Some(0.8))
    );
    assert_eq!((generation.top_k, generation.min_p), (Some(20), None));
    assert_eq!(generation.repetition_penalty, Some(1.05));
    assert!(matches!(&loaded.files, TokenizerFiles::HuggingFace(path) if path == root.path()));
    let shape = loaded.model.shape();
    assert_eq!(
        (shape.architecture.as_str(), shape.layers, shape.vocab),
        ("qwen2", 8, 288)
    );
    let options = LlmOptions {
        served_model_name: Some("mine".to_owned()),
        ..float32()
    };
    assert_eq!(try_load(spec, &options).expect("it loads").name, "mine");
}

#[test]
fn a_gguf_file_reports_what_a_server_needs() {
    let path = test_gguf();
    let loaded = try_load(path.to_str().expect("UTF-8"), &dummy()).expect("it loads");
    assert_eq!(loaded.tokens.eos_ids, [2]);
    assert_eq!(
        (loaded.tokens.bos_id, loaded.tokens.add_bos),
        (Some(1), Some(false))
    );
    let TokenizerFiles::Gguf(metadata) = &loaded.files else {
        panic!("a GGUF file carries its tokenizer");
    };
    assert!(metadata.contains_key("tokenizer.ggml.merges"));
    let shape = loaded.model.shape();
    assert_eq!(
        (shape.layers, shape.heads, shape.kv_heads, shape.head_dim),
        (30, 9, 3, 64)
    );
    assert_eq!(
        (shape.width, shape.vocab, shape.max_seq_len),
        (576, 49152, 8192)
    );
}

#[test]
fn progress_counts_every_byte() {
    let seen = RefCell::new(Vec::new());
    let backend = ReferenceBackend::default();
    let note = |step: crate::model::load::LoadProgress<'_>| {
        seen.borrow_mut()
            .push((step.tensor.to_owned(), step.bytes_done, step.bytes_total));
    };
    let loaded = load(&tiny("qwen3"), &float32(), None, backend, &note).expect("it loads");
    let seen = seen.into_inner();
    // Embedding, final norm, head; per layer 4 + 3 projections and 2 + 2 norms.
    assert_eq!(seen.len(), 3 + 8 * 11);
    assert_eq!(seen[0].0, "model.embed_tokens.weight");
    assert!(
        seen.windows(2)
            .all(|pair| pair[0].1 < pair[1].1 && pair[0].2 == pair[1].2)
    );
    let (_, done, total) = seen.last().expect("steps");
    assert_eq!(done, total);
    assert_eq!(loaded.model.weight_bytes() as u64, *total);
}

#[test]
fn sharded_weights_are_found() {
    let root = TempDir::new().expect("a directory");
    let source = fs::read(Path::new(&tiny("qwen3")).join("model.safetensors")).expect("weights");
    let weights = safetensors::SafeTensors::deserialize(&source).expect("sound");
    let (first, second): (Vec<_>, Vec<_>) = weights
        .tensors()
        .into_iter()
        .partition(|(name, _)| name.contains("mlp"));
    let mut map = serde_json::Map::new();
    for (file, part) in [
        ("model-1.safetensors", first),
        ("model-2.safetensors", second),
    ] {
        for (name, _) in &part {
            map.insert(name.clone(), json!(file));
        }
        let bytes = safetensors::serialize(part, None).expect("serialises");
        fs::write(root.path().join(file), bytes).expect("a shard");
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    fs::write(root.path().join("model.safetensors.index.json"), index).expect("an index");
    fs::copy(
        Path::new(&tiny("qwen3")).join("config.json"),
        root.path().join("config.json"),
    )
    .expect("a copy");
    // A stray file that is not in the index must not matter.
    fs::write(root.path().join("consolidated.safetensors"), "junk").expect("a file");
    let mut sharded = Session::new(
        try_load(root.path().to_str().expect("UTF-8"), &float32()).expect("it loads"),
        &float32(),
    );
    let mut whole = Session::new(
        try_load(&tiny("qwen3"), &float32()).expect("it loads"),
        &float32(),
    );
    assert_eq!(sharded.feed(&[1, 2, 3], 0), whole.feed(&[1, 2, 3], 0));
}

#[test]
fn dummy_weights_need_only_the_config_and_are_repeatable() {
    let root = TempDir::new().expect("a directory");
    fs::write(root.path().join("config.json"), config_with(&json!({}))).expect("a file");
    let spec = root.path().to_str().expect("UTF-8");
    let error = try_load(spec, &float32()).expect_err("there are no weights");
    assert!(error.to_string().contains("load_format: dummy"), "{error}");
    let logits = || {
        let mut session = Session::new(try_load(spec, &dummy()).expect("it loads"), &dummy());
        session.feed(&[1, 2, 3], 0)
    };
    let rows = logits();
    assert_eq!(rows, logits());
    assert!(rows.iter().flatten().all(|logit| logit.is_finite()));
    assert_ne!(rows[0], rows[1]);
}

#[test]
fn empty_steps_and_steps_without_logits_work() {
    let mut session = Session::new(
        try_load(&tiny("llama"), &float32()).expect("it loads"),
        &float32(),
    );
    let empty = session
        .model
        .forward(&StepBatch::default())
        .expect("nothing fails");
    assert_eq!((empty.values.len(), empty.vocab), (0, 288));
    assert!(session.feed(&[1, 2, 3], 3).is_empty());
    let continued = session.feed(&[4], 0);
    session.restart();
    assert_eq!(session.feed(&[1, 2, 3, 4], 3), continued);
}

#[test]
fn sequences_in_one_batch_do_not_touch_each_other() {
    let mut session = Session::new(
        try_load(&tiny("qwen3"), &float32()).expect("it loads"),
        &float32(),
    );
    let alone: Vec<_> = [[5, 6, 7], [9, 8, 7]]
        .iter()
        .map(|tokens| {
            session.restart();
            session.feed(tokens, 2).remove(0)
        })
        .collect();
    let span = |rows, block| SequenceSpan {
        rows,
        past_len: 0,
        blocks: vec![block],
    };
    let batch = StepBatch {
        tokens: vec![5, 6, 7, 9, 8, 7],
        positions: vec![0, 1, 2, 0, 1, 2],
        sequences: vec![span(0..3, 3), span(3..6, 1)],
        logit_rows: vec![2, 5],
    };
    let together = session.model.forward(&batch).expect("nothing fails");
    assert_eq!(together.row(0), alone[0]);
    assert_eq!(together.row(1), alone[1]);
}

#[test]
fn a_sliding_window_hides_older_tokens() {
    let root = TempDir::new().expect("a directory");
    let mut config = golden_json("tiny-mistral/config.json");
    config["sliding_window"] = json!(2);
    // One layer, since each further one reaches a window further back.
    config["num_hidden_layers"] = json!(1);
    fs::write(root.path().join("config.json"), config.to_string()).expect("a file");
    let spec = root.path().to_str().expect("UTF-8");
    let mut session = Session::new(try_load(spec, &dummy()).expect("it loads"), &dummy());
    let mut last = |tokens: &[u32]| {
        session.restart();
        session.feed(tokens, tokens.len() - 1).remove(0)
    };
    assert_eq!(last(&[1, 2, 3, 4]), last(&[9, 9, 3, 4]));
    assert_ne!(last(&[1, 2, 3, 4]), last(&[1, 2, 9, 4]));
}

#[test]
fn windows_follow_each_architecture() {
    let windows = |changes: Value| decoder(&changes).expect("a decoder").windows;
    let of = |arch: &str, more: Value| {
        let mut changes =
            json!({"architectures": [arch], "sliding_window": 64, "num_hidden_layers": 3});
        for (key, value) in more.as_object().expect("an object") {
            changes[key] = value.clone();
        }
        windows(changes)
    };
    assert_eq!(of("LlamaForCausalLM", json!({})), [None; 3]);
    assert_eq!(of("MistralForCausalLM", json!({})), [Some(64); 3]);
    assert_eq!(
        of("Qwen2ForCausalLM", json!({"max_window_layers": 1})),
        [None; 3]
    );
    let on = json!({"use_sliding_window": true, "max_window_layers": 1});
    assert_eq!(of("Qwen2ForCausalLM", on), [None, Some(64), Some(64)]);
    let types = ["sliding_attention", "full_attention", "full_attention"];
    let typed = json!({"use_sliding_window": true, "layer_types": types});
    assert_eq!(of("Qwen3ForCausalLM", typed), [Some(64), None, None]);
}

#[test]
fn variants_are_refused_by_name() {
    for (changes, words) in [
        (
            json!({"architectures": ["GPT2LMHeadModel"]}),
            "architecture `GPT2LMHeadModel` is not served; served are LlamaForCausalLM, ",
        ),
        (json!({"architectures": []}), "`architectures` is missing"),
        (
            json!({"quantization_config": {"quant_method": "gptq"}}),
            "`quantization_config` gptq is not served\nhint: served are ModelOpt's FP8 exports",
        ),
        (
            json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
            "`rope_scaling` of type dynamic is not served\nhint: ",
        ),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
            "`rope_scaling.low_freq_factor` is missing",
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 0.0}}),
            "`rope scaling factor` is 0",
        ),
        (
            json!({"partial_rotary_factor": 0.5}),
            "`partial_rotary_factor` 0.5 is not served",
        ),
        (
            json!({"hidden_act": "gelu"}),
            "`hidden_act` gelu is not served",
        ),
        (json!({"hidden_size": null}), "`hidden_size` is missing"),
        (
            json!({"hidden_size": "many"}),
            "invalid type: string \"many\"",
        ),
        (json!({"num_key_value_heads": 3}), "not a multiple of 3"),
        (json!({"head_dim": 15}), "`head size` is 15"),
        (
            json!({"num_hidden_layers": 1_000_000}),
            "`number of layers` is 1000000",
        ),
        (json!({"rms_norm_eps": -1.0}), "`rms_norm_eps` is -1"),
    ] {
        let error = decoder(&changes).expect_err(words);
        assert!(error.contains(words), "{error}");
    }
    let options = LlmOptions {
        tensor_parallel_size: 2,
        ..float32()
    };
    let error = try_load(&tiny("llama"), &options).expect_err("one rank only");
    assert!(
        error
            .to_string()
            .contains("2 ranks are asked for, and this is one alone\nhint: "),
        "{error}"
    );
}

#[test]
fn biases_and_spellings_follow_the_config() {
    let biased = decoder(&json!({"attention_bias": true, "mlp_bias": true})).expect("a decoder");
    assert!(biased.qkv_bias && biased.output_bias && biased.ffn_bias);
    let qwen2 = decoder(&json!({"architectures": ["Qwen2ForCausalLM"]})).expect("a decoder");
    assert!(qwen2.qkv_bias && !qwen2.output_bias && !qwen2.ffn_bias && !qwen2.head_norms);
    // transformers 4 writes both `type` and `rope_type`, transformers 5 `rope_parameters`.
    let four =
        decoder(&json!({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}}));
    let five = decoder(&json!({"rope_scaling": null, "rope_theta": null,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 4.0}}));
    let (four, five) = (four.expect("a decoder"), five.expect("a decoder"));
    assert_eq!(four, five);
    assert_eq!(four.rope.pairing, RopePairing::Halves);
    assert!((four.rope.inverse_frequencies[0] - 0.25).abs() < 1e-7);
}

/// From a double-precision transcription of the YaRN paper's reference.
#[test]
fn yarn_matches_the_reference() {
    let yarn = json!({"rope_theta": 10_000.0, "max_position_embeddings": 4096,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}});
    let config = decoder(&yarn).expect("a decoder");
    let expected = [
        1.0,
        0.31622776601683794,
        0.1,
        0.02569350598886808,
        0.00625,
        0.0013834964763236657,
        0.00025,
        7.905694150420948e-05,
    ];
    assert_eq!(config.rope.inverse_frequencies.len(), expected.len());
    for (found, expected) in config.rope.inverse_frequencies.iter().zip(expected) {
        assert!(
            (f64::from(*found) / expected - 1.0).abs() < 1e-6,
            "{found} {expected}"
        );
    }
    assert!((config.rope.magnitude - 1.138_629_4).abs() < 1e-6);
    assert_eq!(config.max_seq_len, 8192);
    let explicit =
        json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5}});
    assert_eq!(decoder(&explicit).expect("a decoder").rope.magnitude, 0.5);
}

#[test]
fn fingerprints_tell_what_kv_depends_on() {
    let fingerprint = |changes: Value| decoder(&changes).expect("a decoder").shape().fingerprint;
    let base = fingerprint(json!({}));
    for same in [
        json!({"max_position_embeddings": 2048}),
        json!({"torch_dtype": "float32"}),
        json!({"tie_word_embeddings": true}),
    ] {
        assert_eq!(fingerprint(same.clone()), base, "{same}");
    }
    for other in [
        json!({"rope_theta": 10_000.0}),
        json!({"rope_scaling": null}),
        json!({"rms_norm_eps": 1e-6}),
        json!({"num_hidden_layers": 7}),
        json!({"num_key_value_heads": 2}),
        json!({"hidden_size": 256}),
        json!({"architectures": ["MistralForCausalLM"]}),
        json!({"architectures": ["Qwen3ForCausalLM"]}),
    ] {
        assert_ne!(fingerprint(other.clone()), base, "{other}");
    }
    // Neither pairing's keys are of use to the other.
    let file = tempfile::NamedTempFile::with_suffix(".gguf").expect("a file");
    fs::write(file.path(), tiny_gguf("llama")).expect("it can be written");
    let gguf = try_load(file.path().to_str().expect("UTF-8"), &float32()).expect("it loads");
    assert_ne!(gguf.model.shape().fingerprint, base);
    // Where both formats lay keys out alike, they fit each other.
    fs::write(file.path(), tiny_gguf("qwen3")).expect("it can be written");
    let gguf = try_load(file.path().to_str().expect("UTF-8"), &float32()).expect("it loads");
    let hf = try_load(&tiny("qwen3"), &float32()).expect("it loads");
    assert_eq!(gguf.model.shape(), hf.model.shape());
}

#[test]
fn kv_dtype_follows_the_options() {
    use ComputeDtype::{Auto, Bfloat16, Float16, Float32};
    for (dtype, kv, expected) in [
        (Auto, KvCacheDtype::Auto, KvDtype::F16),
        (Float32, KvCacheDtype::Auto, KvDtype::F32),
        (Bfloat16, KvCacheDtype::Auto, KvDtype::Bf16),
        (Float16, KvCacheDtype::Auto, KvDtype::F16),
        (Float32, KvCacheDtype::Float16, KvDtype::F16),
        (Auto, KvCacheDtype::Float32, KvDtype::F32),
        (Bfloat16, KvCacheDtype::Fp8, KvDtype::Fp8),
    ] {
        let options = LlmOptions {
            dtype,
            kv_cache: KvCacheConfig {
                dtype: kv,
                ..KvCacheConfig::default()
            },
            ..LlmOptions::default()
        };
        assert_eq!(kv_dtype(&options), expected, "{dtype:?} {kv:?}");
    }
}

#[test]
fn a_gpu_computes_in_what_the_options_or_the_checkpoint_say() {
    use ComputeDtype::{Auto, Bfloat16, Float16, Float32};
    let folder = tempfile::tempdir().expect("a folder");
    let gguf = tempfile::NamedTempFile::with_suffix(".gguf").expect("a file");
    fs::write(gguf.path(), tiny_gguf("llama")).expect("it can be written");
    for (asked, named, expected) in [
        (Auto, Some("float16"), ActivationDtype::F16),
        (Auto, Some("bfloat16"), ActivationDtype::Bf16),
        (Auto, Some("float32"), ActivationDtype::Bf16),
        (Auto, None, ActivationDtype::Bf16),
        (Float16, None, ActivationDtype::F16),
        (Float16, Some("bfloat16"), ActivationDtype::F16),
        (Bfloat16, Some("float16"), ActivationDtype::Bf16),
        (Float32, Some("float16"), ActivationDtype::F32),
    ] {
        let options = LlmOptions {
            dtype: asked,
            load_format: LoadFormat::Dummy,
            ..LlmOptions::default()
        };
        let path = match named {
            Some(named) => {
                let config = config_with(&json!({"dtype": null, "torch_dtype": named}));
                fs::write(folder.path().join("config.json"), config).expect("it can be written");
                folder.path()
            }
            None => gguf.path(),
        };
        let spec = path.to_str().expect("UTF-8");
        let header = ModelHeader::read(spec, &options, None).expect("a header");
        assert_eq!(header.activations(), expected, "{asked:?} {named:?}");
    }
}

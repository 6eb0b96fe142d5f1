//! The golden answers, through the real engine, on every grid.

use std::time::{Duration, Instant};

use super::*;
use crate::engine::{Engine, EngineConfig, Inbox};
use crate::model::Model;
use crate::model::tests::{golden_json, test_gguf};
use crate::page::KvDtype;
use crate::request::{Event, GenerateRequest, RequestKind, SamplingParams};

const TOLERANCE: f64 = 0.001;
const DEADLINE: Duration = Duration::from_secs(60);

fn request(item: &serde_json::Value) -> GenerateRequest {
    let ids =
        |key: &str| -> Vec<u32> { serde_json::from_value(item[key].clone()).expect("token ids") };
    GenerateRequest {
        prompt: ids("prompt_token_ids"),
        sampling: SamplingParams {
            temperature: 0.0,
            max_tokens: u32::try_from(ids("output_token_ids").len()).expect("short"),
            logprobs: Some(0),
            ..SamplingParams::default()
        },
        kind: RequestKind::Aggregated,
        cache_salt: None,
    }
}

/// Runs all items at the same time and holds each against the reference.
fn check_answers(model: Box<dyn Model>, items: &[&serde_json::Value], eos: u32) {
    let config = EngineConfig {
        max_batch_size: 4,
        max_seq_len: 1024,
        block_count: 128,
        // Prompts in pieces, next to others' answers.
        prefill_tokens_alone: 48,
        prefill_tokens_beside_decode: 40,
        kv_dtype: KvDtype::F32,
        eos_token_ids: vec![eos],
        ..EngineConfig::default()
    };
    let (engine, thread) = Engine::start(model, None, config, Inbox::new(64)).expect("it starts");
    let streams: Vec<_> = items
        .iter()
        .map(|item| engine.submit(request(item)).expect("room in the queue"))
        .collect();
    for (mut stream, item) in streams.into_iter().zip(items) {
        let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Token {
                    token,
                    logprobs: found,
                    ..
                } => {
                    tokens.push(token);
                    logprobs.push(f64::from(found.expect("asked for").chosen.logprob));
                }
                Event::Failed(failure) => panic!("{failure:?}"),
                _ => {}
            }
        }
        check(item, &tokens, &logprobs);
    }
    engine.shutdown(Instant::now() + DEADLINE);
    thread.join(Instant::now() + DEADLINE).expect("a clean end");
}

fn check(item: &serde_json::Value, tokens: &[u32], logprobs: &[f64]) {
    let expected: Vec<u32> =
        serde_json::from_value(item["output_token_ids"].clone()).expect("token ids");
    let wanted: Vec<f64> = serde_json::from_value(item["logprobs"].clone()).expect("numbers");
    // Where two tokens are as good as equal, ids may part; from there on there is nothing to compare.
    let close = item["min_margin"].as_f64().expect("a margin") <= TOLERANCE;
    let parted = (0..expected.len()).find(|&at| tokens.get(at) != expected.get(at));
    assert!(
        parted.is_none() || close,
        "{tokens:?} instead of {expected:?}"
    );
    let same = parted.unwrap_or(expected.len());
    assert!(parted.is_some() || tokens.len() == expected.len());
    for at in 0..same {
        assert!(
            (logprobs[at] - wanted[at]).abs() <= TOLERANCE,
            "token {at}: {} instead of {}",
            logprobs[at],
            wanted[at]
        );
    }
}

fn check_tiny(name: &str) {
    let golden = golden_json("tiny.json");
    let items: Vec<_> = golden["models"][name]
        .as_array()
        .expect("items")
        .iter()
        .collect();
    for (tensor, pipeline) in [
        (2, 1),
        (4, 1),
        (8, 1),
        (1, 2),
        (1, 4),
        (2, 2),
        (4, 2),
        (1, 8),
    ] {
        let (led, followers) = Instance::tiny(name, tensor, pipeline).start();
        let led = led.unwrap_or_else(|error| panic!("{tensor} x {pipeline}: {error}"));
        check_answers(led.loaded.model, &items, 257);
        followers.join_well();
    }
}

#[test]
fn tiny_llama_on_every_grid() {
    check_tiny("llama");
}

#[test]
fn tiny_mistral_on_every_grid() {
    check_tiny("mistral");
}

#[test]
fn tiny_qwen2_on_every_grid() {
    check_tiny("qwen2");
}

#[test]
fn tiny_qwen3_on_every_grid() {
    check_tiny("qwen3");
}

#[test]
fn smollm2_on_three_tensor_ranks_and_on_two_stages() {
    let golden = golden_json("smollm2.json");
    let items = golden["items"].as_array().expect("items");
    let items = [&items[0], &items[11], &items[14]];
    for (tensor, pipeline) in [(3, 1), (1, 2)] {
        let instance = Instance::new(&test_gguf(), options(tensor, pipeline));
        let (led, followers) = instance.start();
        check_answers(led.expect("it loads").loaded.model, &items, 2);
        followers.join_well();
    }
}

//! Log-probabilities of independent implementations, from both file formats, whole and in chunks.

use baton_configs::llm::LlmOptions;
use serde_json::Value;

use super::tiny_gguf::tiny_gguf;
use super::{Session, best, float32, golden_json, golden_path, log_softmax, test_gguf, try_load};
use crate::backend::TokenId;

/// What the golden files promise for float32.
const TOLERANCE: f64 = 0.001;
/// Longest continuation of `tiny.json`.
const TINY_STEPS: usize = 48;

fn tokens(item: &Value, key: &str) -> Vec<TokenId> {
    serde_json::from_value(item[key].clone()).expect("token ids")
}

fn logprobs(item: &Value) -> Vec<f64> {
    serde_json::from_value(item["logprobs"].clone()).expect("log-probabilities")
}

fn session(spec: &str, options: &LlmOptions) -> (Session, Vec<TokenId>) {
    let loaded = try_load(spec, options).expect("the golden model loads");
    let eos = loaded.tokens.eos_ids.clone();
    (Session::new(loaded, options), eos)
}

/// Greedy, token by token, up to and with eos; where the reference's margin is within the tolerance, ids may part.
fn check_greedy(session: &mut Session, item: &Value, eos: &[TokenId]) {
    let (expected, expected_logprobs) = (tokens(item, "output_token_ids"), logprobs(item));
    session.restart();
    let prompt = tokens(item, "prompt_token_ids");
    let mut row = session.feed(&prompt, prompt.len() - 1).remove(0);
    for (step, (&expected_token, &expected_logprob)) in
        expected.iter().zip(&expected_logprobs).enumerate()
    {
        let log_probabilities = log_softmax(&row);
        let (token, margin) = best(&log_probabilities);
        let found = log_probabilities[expected_token as usize];
        assert!(
            (found - expected_logprob).abs() <= TOLERANCE,
            "step {step}: log-probability {found}, expected {expected_logprob}"
        );
        if token != expected_token {
            assert!(
                margin <= TOLERANCE,
                "step {step}: token {token}, expected {expected_token}"
            );
            return;
        }
        if eos.contains(&token) {
            assert_eq!(step + 1, expected.len(), "eos ends the answer");
            return;
        }
        row = session.feed(&[token], 0).remove(0);
    }
    assert_eq!(expected.len(), TINY_STEPS, "only eos ends an answer early");
}

/// Teacher-forced: all positions at once.
fn check_forced(session: &mut Session, item: &Value) -> Vec<Vec<f32>> {
    let (expected, expected_logprobs) = (tokens(item, "output_token_ids"), logprobs(item));
    session.restart();
    let mut all = tokens(item, "prompt_token_ids");
    let first = all.len() - 1;
    all.extend(&expected[..expected.len() - 1]);
    let rows = session.feed(&all, first);
    assert_eq!(rows.len(), expected.len());
    for (step, row) in rows.iter().enumerate() {
        let found = log_softmax(row)[expected[step] as usize];
        let wanted = expected_logprobs[step];
        assert!(
            (found - wanted).abs() <= TOLERANCE,
            "step {step}: log-probability {found}, expected {wanted}"
        );
    }
    rows
}

/// The same tokens in pieces of `chunk` give the same bits.
fn check_chunked(session: &mut Session, item: &Value, whole: &[Vec<f32>], chunk: usize) {
    session.restart();
    let expected = tokens(item, "output_token_ids");
    let mut all = tokens(item, "prompt_token_ids");
    let first = all.len() - 1;
    all.extend(&expected[..expected.len() - 1]);
    let mut rows = Vec::new();
    for (index, piece) in all.chunks(chunk).enumerate() {
        let start = index * chunk;
        rows.extend(session.feed(piece, first.saturating_sub(start).min(piece.len())));
    }
    assert_eq!(rows, whole, "chunks of {chunk}");
}

fn check_tiny(name: &str) {
    let golden = golden_json("tiny.json");
    let items = golden["models"][name].as_array().expect("items");
    assert_eq!(items.len(), 6);
    let directory = golden_path(&format!("tiny-{name}"));
    let spec = directory.to_str().expect("a UTF-8 path");
    let (mut hf, eos) = session(spec, &float32());
    assert_eq!(eos, [257]);
    for item in items {
        check_greedy(&mut hf, item, &eos);
        let whole = check_forced(&mut hf, item);
        check_chunked(&mut hf, item, &whole, 7);
        check_chunked(&mut hf, item, &whole, 64);
    }
    let file = tempfile::NamedTempFile::with_suffix(".gguf").expect("a temporary file");
    std::fs::write(file.path(), tiny_gguf(name)).expect("it can be written");
    let (mut gguf, eos) = session(file.path().to_str().expect("a UTF-8 path"), &float32());
    assert_eq!(eos, [257]);
    for item in &items[..3] {
        check_forced(&mut gguf, item);
    }
}

#[test]
fn tiny_llama_with_llama3_scaling() {
    check_tiny("llama");
}

#[test]
fn tiny_mistral() {
    check_tiny("mistral");
}

#[test]
fn tiny_qwen2_with_biases_and_tied_embeddings() {
    check_tiny("qwen2");
}

#[test]
fn tiny_qwen3_with_head_norms() {
    check_tiny("qwen3");
}

#[test]
fn smollm2_from_q4_1() {
    let golden = golden_json("smollm2.json");
    let items = golden["items"].as_array().expect("items");
    let path = test_gguf();
    let (mut session, eos) = session(path.to_str().expect("a UTF-8 path"), &float32());
    assert_eq!(eos, [2]);
    // A short completion, one of a single prompt token, and a chat; the reference takes its time.
    for item in [&items[0], &items[11], &items[14]] {
        let ids = tokens(item, "output_token_ids");
        assert_eq!(item["finish_reason"] == "stop", ids.ends_with(&eos));
        check_forced(&mut session, item);
    }
}

#[test]
fn half_precision_pages_stay_close() {
    let golden = golden_json("tiny.json");
    let item = &golden["models"]["llama"][4];
    let directory = golden_path("tiny-llama");
    // `auto` keeps KV as IEEE halves; 11 bits of a key move a log-probability by some thousandths.
    let (mut session, _) = session(
        directory.to_str().expect("a UTF-8 path"),
        &LlmOptions::default(),
    );
    session.restart();
    let (prompt, expected) = (tokens(item, "prompt_token_ids"), logprobs(item));
    let row = session.feed(&prompt, prompt.len() - 1).remove(0);
    let found = log_softmax(&row)[tokens(item, "output_token_ids")[0] as usize];
    assert!(
        (found - expected[0]).abs() < 0.02,
        "{found} against {}",
        expected[0]
    );
}

//! Against the reference: SmolLM2's GGUF file, and the small Hugging Face directories.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use candle_core::quantized::gguf_file::Content;
use serde_json::Value as Json;

use super::*;
use crate::backend::TokenId;
use crate::tokenizer::{ChatRequest, ChatTemplate, DetokenizeOptions, Detokenizer};

const MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

fn golden(name: &str) -> Json {
    let text =
        std::fs::read_to_string(golden_dir().join(name)).expect("golden data is in the tree");
    serde_json::from_str(&text).expect("golden data is JSON")
}

fn model_path() -> PathBuf {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("BATON_TEST_GGUF").unwrap_or_else(|| {
        let cache = variable("XDG_CACHE_HOME")
            .or_else(|| variable("HOME").map(|home| home.join(".cache")))
            .expect("HOME is set");
        cache.join("baton/models").join(MODEL)
    })
}

static SMOLLM2: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let path = model_path();
    let file = File::open(&path).unwrap_or_else(|error| {
        panic!(
            "{}: {error}; run scripts/test, which fetches it",
            path.display()
        )
    });
    let content = Content::read(&mut BufReader::new(file)).expect("a GGUF file");
    Arc::new(Tokenizer::from_gguf(&content.metadata).expect("a sound tokenizer"))
});

fn ids(value: &Json) -> Vec<TokenId> {
    serde_json::from_value(value.clone()).expect("a list of ids")
}

fn items(golden: &Json) -> &[Json] {
    golden["items"].as_array().expect("a list of items")
}

#[test]
fn smollm2_prompts_become_the_reference_ids() {
    let golden = golden("smollm2.json");
    let mut checked = 0;
    for item in items(&golden) {
        let source = match item["kind"].as_str() {
            Some("completion") => &item["prompt"],
            _ => &item["rendered"],
        };
        let text = source.as_str().expect("text");
        for add_special_tokens in [false, true] {
            let encoded = SMOLLM2.encode(text, add_special_tokens).expect("encodes");
            assert_eq!(encoded, ids(&item["prompt_token_ids"]), "{text:?}");
        }
        assert_eq!(SMOLLM2.decode(&ids(&item["prompt_token_ids"]), false), text);
        checked += 1;
    }
    assert_eq!(checked, 15);
}

#[test]
fn smollm2_chats_render_as_the_reference() {
    let template = ChatTemplate::of_model(&SMOLLM2).expect("the file has one");
    let golden = golden("smollm2.json");
    let chats: Vec<&Json> = items(&golden)
        .iter()
        .filter(|item| item["kind"] == "chat")
        .collect();
    assert_eq!(chats.len(), 3);
    for item in chats {
        let request = ChatRequest {
            messages: item["messages"].as_array().expect("a list"),
            add_generation_prompt: true,
            ..ChatRequest::default()
        };
        let rendered = template.render(&request).expect("renders");
        assert_eq!(Some(rendered.as_str()), item["rendered"].as_str());
    }
}

#[test]
fn smollm2_outputs_become_the_reference_text() {
    let golden = golden("smollm2.json");
    for item in items(&golden) {
        let output = ids(&item["output_token_ids"]);
        let expected = item["text"].as_str().expect("text");
        assert_eq!(SMOLLM2.decode(&output, true), expected);
        let prompt = ids(&item["prompt_token_ids"]);
        let options = DetokenizeOptions::default();
        let mut detokenizer = Detokenizer::after_prompt(Arc::clone(&SMOLLM2), options, &prompt);
        let mut text: String = output.iter().map(|id| detokenizer.push(*id)).collect();
        text += &detokenizer.finish();
        assert_eq!(text, expected);
    }
}

#[test]
fn smollm2_control_tokens() {
    assert_eq!(SMOLLM2.vocab_size(), 49_152);
    assert_eq!(
        (SMOLLM2.bos(), SMOLLM2.eos(), SMOLLM2.pad()),
        (Some(1), Some(2), Some(2))
    );
    assert_eq!(SMOLLM2.end_tokens(), [0, 2]);
    let golden = golden("smollm2.json");
    for item in items(&golden) {
        let output = ids(&item["output_token_ids"]);
        let ended = output
            .iter()
            .position(|id| SMOLLM2.end_tokens().contains(id));
        assert!(
            ended.is_none_or(|at| at + 1 == output.len()),
            "an end token inside {output:?}"
        );
    }
    let text = "a<|im_end|> b <|im_start|>system";
    let encoded = SMOLLM2.encode(text, false).expect("encodes");
    assert_eq!(SMOLLM2.decode(&encoded, false), text);
    assert_eq!(SMOLLM2.decode(&encoded, true), "a b system");
}

#[test]
fn tiny_directories_match_transformers() {
    let golden = golden("tiny.json");
    let models = golden["models"].as_object().expect("models by name");
    assert_eq!(models.len(), 4);
    for (name, cases) in models {
        let directory = golden_dir().join(format!("tiny-{name}"));
        let tokenizer = Tokenizer::from_hf_dir(&directory).expect("loads");
        assert_eq!(
            (tokenizer.bos(), tokenizer.eos()),
            (Some(256), Some(257)),
            "{name}"
        );
        assert_eq!(tokenizer.end_tokens(), [257], "{name}");
        assert_eq!(tokenizer.vocab_size(), 260, "{name}");
        for case in cases.as_array().expect("a list") {
            let prompt = case["prompt"].as_str().expect("text");
            let encoded = tokenizer.encode(prompt, true).expect("encodes");
            assert_eq!(
                encoded,
                ids(&case["prompt_token_ids"]),
                "{name}: {prompt:?}"
            );
            if let Some(text) = case["text"].as_str() {
                assert_eq!(
                    tokenizer.decode(&ids(&case["output_token_ids"]), true),
                    text,
                    "{name}"
                );
            }
        }
        let template = ChatTemplate::of_model(&tokenizer).expect("has one");
        let messages = [serde_json::json!({"role": "user", "content": "hi"})];
        let request = ChatRequest {
            messages: &messages,
            add_generation_prompt: true,
            ..ChatRequest::default()
        };
        let rendered = template.render(&request).expect("renders");
        assert_eq!(
            rendered,
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(tokenizer.encode(&rendered, false).expect("encodes")[0], 258);
    }
}

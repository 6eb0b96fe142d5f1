//! Hugging Face directories: what stands beside `tokenizer.json`, and files that lie.

use std::fs;
use std::path::Path;

use serde_json::{Value as Json, json};
use tempfile::TempDir;

use super::*;

/// A Llama-2-like tokenizer: metaspace, byte fallback, BOS in front.
fn tokenizer_json() -> Json {
    let mut vocab = serde_json::Map::new();
    for (id, token) in ["<unk>", "<s>", "</s>"].iter().enumerate() {
        vocab.insert((*token).to_owned(), json!(id));
    }
    for byte in 0..=255_u8 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(usize::from(byte) + 3));
    }
    for (offset, token) in ["▁", "h", "i", "▁h", "▁hi"].iter().enumerate() {
        vocab.insert((*token).to_owned(), json!(259 + offset));
    }
    let special = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": [["▁", "h"], ["▁h", "i"]]}
    })
}

fn directory(files: &[(&str, String)]) -> TempDir {
    let directory = TempDir::new().expect("a temporary directory");
    for (name, content) in files {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().expect("below the directory")).expect("creates");
        fs::write(path, content).expect("writes");
    }
    directory
}

fn with_config(config: &Json) -> TempDir {
    directory(&[
        ("tokenizer.json", tokenizer_json().to_string()),
        ("tokenizer_config.json", config.to_string()),
    ])
}

fn load(directory: &TempDir) -> Tokenizer {
    Tokenizer::from_hf_dir(directory.path()).expect("a sound directory")
}

#[test]
fn the_post_processor_decides_unless_a_flag_does() {
    let tokenizer = load(&with_config(
        &json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}}),
    ));
    // Truncation to 2 and padding to 8 are training's settings, not ours.
    assert_eq!(
        tokenizer.encode("hi hi hi", true).expect("encodes"),
        [1, 263, 263, 263]
    );
    assert_eq!(tokenizer.encode("hi", false).expect("encodes"), [263]);
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos(), tokenizer.end_tokens()),
        (Some(1), Some(2), &[2][..])
    );

    let flags = json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": false, "add_eos_token": true});
    let tokenizer = load(&with_config(&flags));
    assert_eq!(tokenizer.encode("hi", true).expect("encodes"), [263, 2]);
}

#[test]
fn byte_fallback_and_the_leading_space() {
    let tokenizer = load(&with_config(&json!({})));
    let ids = tokenizer.encode("hi é", true).expect("encodes");
    assert_eq!(ids, [1, 263, 259, 0xc3 + 3, 0xa9 + 3]);
    assert_eq!(tokenizer.decode(&ids, true), "hi é");
    assert_eq!(tokenizer.decode(&ids, false), "<s> hi é");
    assert_eq!(tokenizer.token_text(263).text, " hi");
}

#[test]
fn special_tokens_come_from_all_files() {
    let files = directory(&[
        ("tokenizer.json", tokenizer_json().to_string()),
        (
            "special_tokens_map.json",
            json!({"bos_token": "<s>", "pad_token": "</s>"}).to_string(),
        ),
        (
            "tokenizer_config.json",
            json!({
            "eos_token": "</s>", "additional_special_tokens": ["<0x01>"],
            "added_tokens_decoder": {
                "264": {"content": "<think>", "special": false, "normalized": false},
                "265": {"content": "<|end|>", "special": true},
                "999": {"content": "<lost>", "special": true}}})
            .to_string(),
        ),
        (
            "generation_config.json",
            json!({"eos_token_id": [2, 265]}).to_string(),
        ),
        ("config.json", json!({"eos_token_id": 7}).to_string()),
    ]);
    let tokenizer = load(&files);
    assert_eq!((tokenizer.bos(), tokenizer.pad()), (Some(1), Some(2)));
    assert_eq!(tokenizer.end_tokens(), [2, 265]);
    assert_eq!(tokenizer.token_id("<think>"), Some(264));
    assert_eq!(tokenizer.token_id("<lost>"), None);
    assert_eq!(tokenizer.vocab_size(), 266);
    assert!(tokenizer.is_special(265) && !tokenizer.is_special(264) && tokenizer.is_special(4));
    let ids = tokenizer
        .encode("<think>hi<|end|>", false)
        .expect("encodes");
    assert_eq!(ids, [264, 263, 265]);
    assert_eq!(tokenizer.decode(&ids, true), "<think> hi");
}

#[test]
fn chat_templates_by_file_and_by_name() {
    let list = json!({"chat_template": [
        {"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]});
    let files = directory(&[
        ("tokenizer.json", tokenizer_json().to_string()),
        ("tokenizer_config.json", list.to_string()),
        ("chat_template.jinja", "three".to_owned()),
        ("additional_chat_templates/rag.jinja", "four".to_owned()),
    ]);
    let tokenizer = load(&files);
    let mut found: Vec<(&str, &str)> = tokenizer
        .chat_templates()
        .iter()
        .map(|one| (one.name.as_str(), one.text.as_str()))
        .collect();
    found.sort_unstable();
    assert_eq!(
        found,
        [("default", "three"), ("rag", "four"), ("tool_use", "two")]
    );
}

fn refusal(directory: &Path) -> String {
    Tokenizer::from_hf_dir(directory)
        .expect_err("an unsound directory")
        .to_string()
        .replace(&directory.display().to_string(), "DIR")
}

#[test]
fn unsound_directories_are_refused() {
    let empty = directory(&[]);
    let error = refusal(empty.path());
    assert!(
        error.starts_with("no tokenizer.json in DIR\nhint: "),
        "{error}"
    );

    let broken = directory(&[("tokenizer.json", "{\"version\": ".to_owned())]);
    let error = refusal(broken.path());
    assert!(
        error.starts_with("DIR/tokenizer.json: ") && !error.contains('\n'),
        "{error}"
    );

    for (config, expected) in [
        (
            json!([]),
            "DIR/tokenizer_config.json: expected a JSON object",
        ),
        (
            json!({"bos_token": 1}),
            "DIR/tokenizer_config.json: `bos_token`: expected a token (text, or an object with `content`)",
        ),
        (
            json!({"add_bos_token": "yes"}),
            "DIR/tokenizer_config.json: `add_bos_token`: expected true or false",
        ),
        (
            json!({"chat_template": 5}),
            "DIR/tokenizer_config.json: `chat_template`: expected text, or a list of {name, template}",
        ),
        (
            json!({"added_tokens_decoder": {"x": {"content": "a"}}}),
            "DIR/tokenizer_config.json: `added_tokens_decoder`: expected an object from ids to tokens",
        ),
    ] {
        assert_eq!(refusal(with_config(&config).path()), expected);
    }
}

#[test]
fn a_tokenizer_file_that_lies_is_refused() {
    let cases: [(&str, Json, &str); 4] = [
        (
            "/decoder",
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            "decoder `WordPiece`",
        ),
        ("/model/merges", json!([["x", "y"]]), "DIR/tokenizer.json: "),
        ("/model/vocab/h", json!(4_000_000_000_u32), "vocabulary: "),
        (
            "/model/continuing_subword_prefix",
            json!("######"),
            "DIR/tokenizer.json: ",
        ),
    ];
    for (pointer, value, expected) in cases {
        let mut json = tokenizer_json();
        *json.pointer_mut(pointer).expect("in the file") = value;
        let files = directory(&[("tokenizer.json", json.to_string())]);
        let error = refusal(files.path());
        assert!(
            error.starts_with(expected) && !error.contains('\n'),
            "{pointer}: {error}"
        );
    }
}

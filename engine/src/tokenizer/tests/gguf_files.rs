//! Vocabularies from GGUF metadata, sound and hostile.

use candle_core::quantized::gguf_file::Value;
use proptest::prelude::*;

use super::*;
use crate::backend::TokenId;
use crate::tokenizer::TokenizerError;

fn ids(tokenizer: &Tokenizer, text: &str, special: bool) -> Vec<TokenId> {
    tokenizer
        .encode(text, special)
        .expect("any text can be encoded")
}

#[test]
fn byte_level_merges_and_special_tokens() {
    let tokenizer = built(&byte_level("gpt-2"));
    assert_eq!(ids(&tokenizer, "hello hello", false), [263, 264]);
    assert_eq!(ids(&tokenizer, "hé", false), [104, 0xc3, 0xa9]);
    assert_eq!(
        ids(&tokenizer, "<s>he</s><tool>", false),
        [256, 260, 257, 258]
    );
    assert_eq!(tokenizer.vocab_size(), 265);
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos(), tokenizer.pad()),
        (Some(256), Some(257), Some(259))
    );
    assert_eq!(tokenizer.end_tokens(), [257]);
    assert!(tokenizer.is_special(256) && !tokenizer.is_special(258) && !tokenizer.is_special(9999));
    assert_eq!(tokenizer.token_text(264).text, " hello");
    assert_eq!(tokenizer.token_text(0xc3).bytes, [0xc3]);
    assert_eq!(tokenizer.token_text(0xc3).text, "\u{fffd}");
    assert_eq!(tokenizer.token_text(4_000_000_000).bytes, b"");
    assert_eq!(tokenizer.token_id("<tool>"), Some(258));
    let all = [256, 263, 259, 258, 264, 257, 70_000];
    assert_eq!(tokenizer.decode(&all, true), "hello<tool> hello");
    assert_eq!(tokenizer.decode(&all, false), "<s>hello<tool> hello</s>");
}

#[test]
fn bos_is_added_where_the_model_does() {
    assert_eq!(ids(&built(&byte_level("gpt-2")), "he", true), [260]);
    assert_eq!(
        ids(&built(&byte_level("llama-bpe")), "he", true),
        [256, 260]
    );
    let mut told = byte_level("llama-bpe");
    told.extend(metadata(vec![("add_bos_token", Value::Bool(false))]));
    assert_eq!(ids(&built(&told), "he", true), [260]);
    told.extend(metadata(vec![
        ("add_bos_token", Value::Bool(true)),
        ("add_eos_token", Value::Bool(true)),
    ]));
    assert_eq!(ids(&built(&told), "he", true), [256, 260, 257]);
    assert_eq!(ids(&built(&told), "he", false), [260]);
}

#[test]
fn a_whole_token_beats_the_merges_where_the_pre_tokenizer_says_so() {
    for (pre, expected) in [("llama-bpe", vec![261]), ("gpt-2", vec![108, 108])] {
        let mut vocabulary = byte_level(pre);
        vocabulary.extend(metadata(vec![("merges", texts(&["h e"]))]));
        assert_eq!(ids(&built(&vocabulary), "ll", false), expected, "{pre}");
    }
}

#[test]
fn sentence_piece_scores_and_spaces() {
    let tokenizer = built(&sentence_piece());
    let id = |piece: &str| tokenizer.token_id(piece).expect("in the vocabulary");
    assert_eq!(
        ids(&tokenizer, "the cat", true),
        [1, id("▁the"), id("▁cat")]
    );
    // `▁a` (-4) is better than `at` (-5), so it is joined first.
    assert_eq!(ids(&tokenizer, "at", false), [id("▁a"), id("t")]);
    assert_eq!(ids(&tokenizer, " t", false), [id("▁"), id("▁t")]);
    // What no piece covers becomes bytes.
    assert_eq!(
        ids(&tokenizer, "é", false),
        [id("▁"), id("<0xC3>"), id("<0xA9>")]
    );
    // A stretch of text after a special token gets its own leading space.
    assert_eq!(
        ids(&tokenizer, "<s>the<tool>", false),
        [1, id("▁the"), id("<tool>")]
    );
    assert_eq!(
        tokenizer.decode(&ids(&tokenizer, "the cat é", true), true),
        "the cat é"
    );
    assert_eq!(tokenizer.decode(&[id("▁"), id("▁t")], true), " t");

    let mut plain = sentence_piece();
    plain.extend(metadata(vec![("add_space_prefix", Value::Bool(false))]));
    let tokenizer = built(&plain);
    assert_eq!(ids(&tokenizer, "cat", false), [id("cat")]);
    assert_eq!(tokenizer.decode(&[id("▁cat")], true), " cat");
}

#[test]
fn sentence_piece_without_token_types_or_bytes() {
    let mut old = sentence_piece();
    old.remove("tokenizer.ggml.token_type");
    let tokenizer = built(&old);
    assert!(tokenizer.is_special(0) && tokenizer.is_special(1));
    assert_eq!(
        tokenizer.decode(&ids(&tokenizer, "é the", false), true),
        "é the"
    );

    let few = metadata(vec![
        ("model", text("llama")),
        ("tokens", texts(&["<unk>", "▁", "a"])),
        ("token_type", numbers(&[UNKNOWN, NORMAL, NORMAL])),
        ("scores", Value::Array(vec![Value::F32(0.0); 3])),
    ]);
    assert_eq!(ids(&built(&few), "aéü", true), [1, 2, 0]);
}

#[test]
fn end_tokens_are_found_by_name_too() {
    let mut vocabulary = byte_level("qwen2");
    let Some(Value::Array(tokens)) = vocabulary.get_mut("tokenizer.ggml.tokens") else {
        panic!("tokens are an array");
    };
    tokens.push(text("<|im_end|>"));
    let Some(Value::Array(types)) = vocabulary.get_mut("tokenizer.ggml.token_type") else {
        panic!("types are an array");
    };
    types.push(Value::I32(CONTROL));
    vocabulary.extend(metadata(vec![("eot_token_id", Value::I64(258))]));
    let tokenizer = built(&vocabulary);
    assert_eq!(tokenizer.end_tokens(), [257, 258, 265]);
    assert!(tokenizer.is_special(258));
}

#[test]
fn chat_templates_are_found() {
    let mut vocabulary = byte_level("gpt-2");
    assert!(built(&vocabulary).chat_templates().is_empty());
    vocabulary.insert("tokenizer.chat_template".to_owned(), text("one"));
    vocabulary.insert("tokenizer.chat_template.tool_use".to_owned(), text("two"));
    let tokenizer = built(&vocabulary);
    let found: Vec<(&str, &str)> = tokenizer
        .chat_templates()
        .iter()
        .map(|one| (one.name.as_str(), one.text.as_str()))
        .collect();
    assert_eq!(found, [("default", "one"), ("tool_use", "two")]);
}

fn refusal(base: HashMap<String, Value>, changes: Vec<(&str, Value)>) -> String {
    let mut changed = base;
    changed.extend(metadata(changes));
    Tokenizer::from_gguf(&changed)
        .expect_err("unsound metadata")
        .to_string()
}

#[track_caller]
fn refuses(cases: Vec<(&str, Value, &str)>) {
    for (key, value, expected) in cases {
        let error = refusal(byte_level("gpt-2"), vec![(key, value)]);
        assert_eq!(
            error.trim_start_matches("gguf metadata `tokenizer."),
            expected
        );
    }
}

#[test]
fn unsound_vocabularies_are_refused_in_one_line() {
    let long = texts(&["x".repeat(1 << 15)]);
    let one_boolean = Value::Array(vec![Value::Bool(true)]);
    refuses(vec![
        (
            "model",
            text("bert"),
            "gguf tokenizer model `bert` is not supported (supported: gpt2, llama)",
        ),
        (
            "model",
            Value::U32(1),
            "ggml.model`: expected a string, found 1",
        ),
        ("tokens", texts::<&str>(&[]), "ggml.tokens`: no tokens"),
        (
            "tokens",
            one_boolean,
            "ggml.tokens`: element 0: expected a string, found true",
        ),
        (
            "tokens",
            long,
            "ggml.tokens`: token 0 is longer than 16384 bytes",
        ),
        (
            "tokens",
            texts(&["a"]),
            "ggml.token_type`: 265 elements for 1 tokens",
        ),
        (
            "token_type",
            numbers(&[9; 265]),
            "ggml.token_type`: element 0: expected a type from 0 to 6, found 9",
        ),
        (
            "merges",
            texts(&["nothing"]),
            "ggml.merges`: merge 0 `nothing`: is not two parts",
        ),
        (
            "merges",
            texts(&["h e", "x yz"]),
            "ggml.merges`: merge 1 `x yz`: a part or the whole is not in the vocabulary",
        ),
        (
            "merges",
            text("h e"),
            "ggml.merges`: expected an array, found a string",
        ),
    ]);
}

#[test]
fn unsound_control_tokens_are_refused_in_one_line() {
    refuses(vec![
        (
            "bos_token_id",
            Value::U32(265),
            "ggml.bos_token_id`: 265 is outside the vocabulary of 265 tokens",
        ),
        (
            "eos_token_id",
            Value::I32(-2),
            "ggml.eos_token_id`: -2 is outside the vocabulary of 265 tokens",
        ),
        (
            "eot_token_id",
            Value::F32(1.5),
            "ggml.eot_token_id`: expected a token id, found 1.5",
        ),
        (
            "add_bos_token",
            text("yes"),
            "ggml.add_bos_token`: expected a boolean, found a string",
        ),
        (
            "chat_template",
            Value::Bool(true),
            "chat_template`: expected a string, found true",
        ),
    ]);
    let unnamed = vec![
        ("bos_token_id", Value::I32(-1)),
        ("add_bos_token", Value::Bool(true)),
    ];
    assert_eq!(
        refusal(byte_level("gpt-2"), unnamed),
        "gguf metadata `tokenizer.ggml.add_bos_token`: true, but the file names no such token"
    );
}

#[test]
fn unsound_sentence_piece_metadata_is_refused() {
    let error = refusal(
        sentence_piece(),
        vec![("scores", Value::Array(vec![Value::F32(0.0)]))],
    );
    assert!(error.ends_with("1 elements for 273 tokens"), "{error}");
    let error = refusal(
        sentence_piece(),
        vec![("scores", Value::Array(vec![Value::F32(f32::NAN); 273]))],
    );
    assert!(
        error.ends_with("element 0: expected a number (f32), found NaN"),
        "{error}"
    );
    let no_bytes = metadata(vec![
        ("model", text("llama")),
        ("tokens", texts(&["a"])),
        ("scores", Value::Array(vec![Value::F32(0.0)])),
    ]);
    let error = Tokenizer::from_gguf(&no_bytes).expect_err("nothing for unknown text");
    assert!(matches!(error, TokenizerError::Metadata { .. }), "{error}");
}

/// SentencePiece's algorithm as its paper has it: join the best-scored neighbours, leftmost first, until none are left.
fn joined_by_score(vocabulary: &HashMap<String, Value>, text: &str) -> Vec<TokenId> {
    let (Value::Array(tokens), Value::Array(scores)) = (
        &vocabulary["tokenizer.ggml.tokens"],
        &vocabulary["tokenizer.ggml.scores"],
    ) else {
        panic!("tokens and scores are arrays");
    };
    let found = |piece: &str| {
        let id = tokens
            .iter()
            .position(|token| matches!(token, Value::String(text) if text == piece))?;
        let score = scores[id].to_f32().expect("a score");
        Some((score, TokenId::try_from(id).expect("few tokens")))
    };
    let mut parts: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let best = (1..parts.len())
            .filter_map(|at| Some((at, found(&parts[at - 1..=at].concat())?.0)))
            .reduce(|best, next| if next.1 > best.1 { next } else { best });
        let Some((at, _)) = best else { break };
        let right = parts.remove(at);
        parts[at - 1] += &right;
    }
    parts
        .iter()
        .map(|part| found(part).expect("letters are pieces").1)
        .collect()
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i32>().prop_map(Value::I32),
        (0..300_u32).prop_map(Value::U32),
        any::<f32>().prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        prop_oneof![
            Just("gpt2"),
            Just("llama"),
            Just("default"),
            Just("a b"),
            Just("<0x0A>"),
            Just("")
        ]
        .prop_map(text),
        "\\PC{0,3}".prop_map(Value::String),
    ];
    leaf.prop_recursive(2, 24, 8, |inner| {
        prop::collection::vec(inner, 0..8).prop_map(Value::Array)
    })
}

proptest! {
    #[test]
    fn no_metadata_panics(
        keys in prop::collection::vec((0..12_usize, any_value()), 0..4),
        byte_level_base: bool,
        probe in "\\PC{0,8}",
    ) {
        const KEYS: [&str; 12] = [
            "model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id",
            "unknown_token_id", "add_bos_token", "add_space_prefix", "chat_template",
        ];
        let mut changed = if byte_level_base { byte_level("gpt-2") } else { sentence_piece() };
        changed.extend(metadata(keys.into_iter().map(|(key, value)| (KEYS[key], value)).collect()));
        match Tokenizer::from_gguf(&changed) {
            Err(error) => prop_assert!(!error.to_string().contains('\n'), "{}", error),
            Ok(tokenizer) => {
                let ids = tokenizer.encode(&probe, true);
                prop_assert!(ids.is_ok_and(|ids| ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size())));
            }
        }
    }

    #[test]
    fn merges_from_scores_join_as_sentence_piece_does(probe in "[the cat]{0,16}") {
        let expected = joined_by_score(&sentence_piece(), &format!(" {probe}").replace(' ', "▁"));
        let expected = if probe.is_empty() { Vec::new() } else { expected };
        prop_assert_eq!(ids(&SENTENCE_PIECE, &probe, false), expected);
    }

    #[test]
    fn text_survives_a_round_trip(probe in "\\PC{0,24}") {
        for tokenizer in [&*BYTE_LEVEL, &*SENTENCE_PIECE] {
            let ids = ids(tokenizer, &probe, true);
            prop_assert_eq!(tokenizer.decode(&ids, true), probe.as_str());
        }
    }
}

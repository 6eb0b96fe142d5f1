//! The pieces of a text, put together, are the text: whatever the ids, whatever the cut.

use proptest::prelude::*;

use super::*;
use crate::backend::TokenId;
use crate::tokenizer::{DetokenizeOptions, Detokenizer};

const SHOWN: DetokenizeOptions = DetokenizeOptions {
    skip_special_tokens: false,
    spaces_between_special_tokens: false,
};

fn pieces(mut detokenizer: Detokenizer, ids: &[TokenId]) -> Vec<String> {
    let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

/// The specification: all bytes in a row, read at once.
fn whole(tokenizer: &Tokenizer, ids: &[TokenId], skip_special: bool) -> String {
    let shown = ids
        .iter()
        .filter(|id| !(skip_special && tokenizer.is_special(**id)));
    let bytes: Vec<u8> = shown
        .flat_map(|id| tokenizer.token_text(*id).bytes.to_vec())
        .collect();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    match text.strip_prefix(' ') {
        Some(rest) if tokenizer.leading_strip().count == 1 => rest.to_owned(),
        _ => text,
    }
}

#[test]
fn a_character_comes_out_whole() {
    let tokenizer = built(&byte_level("gpt-2"));
    let family = "a👩‍👩‍👧é日";
    let ids = tokenizer.encode(family, false).expect("encodes");
    let options = DetokenizeOptions::default();
    let pieces = pieces(Detokenizer::new(Arc::clone(&tokenizer), options), &ids);
    let shown: Vec<&str> = pieces
        .iter()
        .map(String::as_str)
        .filter(|piece| !piece.is_empty())
        .collect();
    assert_eq!(
        shown,
        ["a", "👩", "\u{200d}", "👩", "\u{200d}", "👧", "é", "日"]
    );
}

#[test]
fn what_is_not_utf8_is_replaced_when_certain() {
    let tokenizer = built(&byte_level("gpt-2"));
    let mut detokenizer = Detokenizer::new(tokenizer, DetokenizeOptions::default());
    assert_eq!(detokenizer.push(0xf0), "");
    assert_eq!(detokenizer.push(0x9f), "");
    assert_eq!(detokenizer.push(0x41), "\u{fffd}A");
    assert_eq!(detokenizer.push(0xff), "\u{fffd}");
    assert_eq!(detokenizer.push(0xe6), "");
    assert_eq!(detokenizer.finish(), "\u{fffd}");
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn special_tokens_are_skipped_shown_or_spaced() {
    let tokenizer = built(&byte_level("gpt-2"));
    let ids = [256, 257, 260, 257, 256, 258];
    let text = |options| pieces(Detokenizer::new(Arc::clone(&tokenizer), options), &ids).concat();
    assert_eq!(text(DetokenizeOptions::default()), "he<tool>");
    assert_eq!(text(SHOWN), "<s></s>he</s><s><tool>");
    let spaced = DetokenizeOptions {
        spaces_between_special_tokens: true,
        ..SHOWN
    };
    assert_eq!(text(spaced), "<s> </s>he</s> <s><tool>");
}

#[test]
fn only_the_start_of_a_text_loses_its_space() {
    let tokenizer = built(&sentence_piece());
    let cat = tokenizer.token_id("▁cat").expect("in the vocabulary");
    let options = DetokenizeOptions::default();
    let fresh = Detokenizer::new(Arc::clone(&tokenizer), options);
    assert_eq!(pieces(fresh, &[1, cat, cat]).concat(), "cat cat");
    let prompt = tokenizer.encode("the", true).expect("encodes");
    let after = Detokenizer::after_prompt(Arc::clone(&tokenizer), options, &prompt);
    assert_eq!(pieces(after, &[cat]).concat(), " cat");
    let after_bos = Detokenizer::after_prompt(Arc::clone(&tokenizer), options, &[1]);
    assert_eq!(pieces(after_bos, &[cat]).concat(), "cat");
    let after_shown_bos = Detokenizer::after_prompt(tokenizer, SHOWN, &[1]);
    assert_eq!(pieces(after_shown_bos, &[cat]).concat(), " cat");
}

#[test]
fn a_character_that_the_prompt_began_is_completed() {
    let tokenizer = built(&byte_level("gpt-2"));
    let options = DetokenizeOptions::default();
    let mut after = Detokenizer::after_prompt(tokenizer, options, &[104, 0xe6, 0x97]);
    assert_eq!(after.push(0xa5), "日");
}

proptest! {
    #[test]
    fn pieces_make_the_whole(ids in prop::collection::vec(0..300_u32, 0..40), skip: bool) {
        for tokenizer in [&*BYTE_LEVEL, &*SENTENCE_PIECE] {
            let options = DetokenizeOptions { skip_special_tokens: skip, ..SHOWN };
            let text = pieces(Detokenizer::new(Arc::clone(tokenizer), options), &ids).concat();
            prop_assert_eq!(&text, &tokenizer.decode(&ids, skip));
            prop_assert_eq!(text, whole(tokenizer, &ids, skip));
        }
    }

    #[test]
    fn a_prompt_and_what_follows_make_the_whole(
        ids in prop::collection::vec(0..300_u32, 1..30),
        cut in any::<prop::sample::Index>(),
        skip: bool,
    ) {
        for tokenizer in [&*BYTE_LEVEL, &*SENTENCE_PIECE] {
            let options = DetokenizeOptions { skip_special_tokens: skip, ..SHOWN };
            let (prompt, rest) = ids.split_at(cut.index(ids.len()));
            let mut first = Detokenizer::new(Arc::clone(tokenizer), options);
            let before: String = prompt.iter().map(|id| first.push(*id)).collect();
            let after = Detokenizer::after_prompt(Arc::clone(tokenizer), options, prompt);
            let text = before + &pieces(after, rest).concat();
            prop_assert_eq!(text, tokenizer.decode(&ids, skip));
        }
    }
}

//! Ids to text as they come. A piece is handed out when nothing that follows can change it, so the pieces put
//! together are always the decoding of the whole.
//!
//! The rule of the whole: the bytes of all shown tokens in a row, read as UTF-8 with U+FFFD for what is not,
//! less the one leading space that SentencePiece-like tokenizers put before a text. Work per token depends on
//! the token alone. Transformers' `clean_up_tokenization_spaces` is not done: it changes text that is already out.

use std::sync::Arc;

use super::Tokenizer;
use super::table::{TokenKind, TokenTable};
use crate::backend::TokenId;

/// What is shown of special tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DetokenizeOptions {
    /// Leave special tokens out.
    pub skip_special_tokens: bool,
    /// Where they are shown, put a space between two that follow each other.
    ///
    /// Transformers' fast tokenizers never do, whatever they are told; so a request that does not ask for it
    /// expects `false`.
    pub spaces_between_special_tokens: bool,
}

impl Default for DetokenizeOptions {
    fn default() -> Self {
        Self {
            skip_special_tokens: true,
            spaces_between_special_tokens: false,
        }
    }
}

/// A prefix that is taken off the start of every text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct LeadingStrip {
    pub(super) character: char,
    pub(super) count: usize,
}

/// Everything that the next token's text depends on.
#[derive(Debug, Clone)]
pub(super) struct DecodeState {
    options: DetokenizeOptions,
    /// Characters that may still be taken off the start.
    strip: LeadingStrip,
    /// Bytes that are not yet a character, at most three between two calls.
    pending: Vec<u8>,
    after_special: bool,
}

impl DecodeState {
    pub(super) fn new(strip: LeadingStrip, options: DetokenizeOptions) -> Self {
        Self {
            options,
            strip,
            pending: Vec::new(),
            after_special: false,
        }
    }

    /// Takes a token and appends the text that it makes final.
    pub(super) fn push(&mut self, table: &TokenTable, token: TokenId, out: &mut String) {
        match table.kind(token) {
            TokenKind::Unused => return,
            TokenKind::Special => {
                if self.options.skip_special_tokens {
                    return;
                }
                if self.after_special && self.options.spaces_between_special_tokens {
                    self.pending.push(b' ');
                }
                self.after_special = true;
            }
            TokenKind::Text => self.after_special = false,
        }
        self.pending.extend_from_slice(table.bytes(token));
        let start = out.len();
        let decided = append_final(&self.pending, out);
        self.pending.drain(..decided);
        self.strip_from(out, start);
    }

    /// Appends what was still undecided.
    pub(super) fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            let start = out.len();
            out.push_str(&String::from_utf8_lossy(&self.pending));
            self.pending.clear();
            self.strip_from(out, start);
        }
    }

    fn strip_from(&mut self, out: &mut String, start: usize) {
        while self.strip.count > 0 && out.len() > start {
            if out[start..].starts_with(self.strip.character) {
                out.remove(start);
                self.strip.count -= 1;
            } else {
                self.strip.count = 0;
            }
        }
    }
}

/// Appends the text of `bytes` that no further byte can change; returns where the undecided tail begins.
fn append_final(bytes: &[u8], out: &mut String) -> usize {
    let mut start = 0;
    loop {
        let error = match std::str::from_utf8(&bytes[start..]) {
            Ok(text) => {
                out.push_str(text);
                return bytes.len();
            }
            Err(error) => error,
        };
        let valid_end = start + error.valid_up_to();
        let valid = std::str::from_utf8(&bytes[start..valid_end])
            .expect("from_utf8 reported these bytes as valid");
        out.push_str(valid);
        let Some(length) = error.error_len() else {
            return valid_end;
        };
        out.push(char::REPLACEMENT_CHARACTER);
        start = valid_end + length;
    }
}

/// Ids to text, one token at a time.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    state: DecodeState,
}

impl Detokenizer {
    /// For a text that starts with the first token.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, options: DetokenizeOptions) -> Self {
        let state = DecodeState::new(tokenizer.leading_strip(), options);
        Self { tokenizer, state }
    }

    /// For a text that goes on after `prompt`: what the pushed tokens add to the prompt's text.
    ///
    /// So an answer keeps the space before its first word, and a character that the prompt's ids left half
    /// written is completed.
    #[must_use]
    pub fn after_prompt(
        tokenizer: Arc<Tokenizer>,
        options: DetokenizeOptions,
        prompt: &[TokenId],
    ) -> Self {
        let mut this = Self::new(tokenizer, options);
        let mut seen = String::new();
        for &token in prompt {
            seen.clear();
            this.state.push(this.tokenizer.table(), token, &mut seen);
        }
        this
    }

    /// Takes the next token; returns the text that is final now, often none.
    #[must_use]
    pub fn push(&mut self, token: TokenId) -> String {
        let mut text = String::new();
        self.state.push(self.tokenizer.table(), token, &mut text);
        text
    }

    /// Ends the text; returns what was still undecided.
    #[must_use]
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.state.finish(&mut text);
        text
    }
}

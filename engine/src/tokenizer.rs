//! Text to ids and back: tokenizers from Hugging Face directories and from GGUF files, incremental
//! detokenisation, stop strings, chat templates.
//!
//! Encoding is the `tokenizers` crate's, however the vocabulary came. Decoding is ours: each token's bytes are
//! worked out once at load, so that one more token costs no more than its own bytes.

mod byte_level;
mod chat;
mod detokenizer;
mod error;
mod gguf;
mod hf;
mod hf_config;
mod hf_decoder;
mod pre_tokenizer;
mod sentence_piece;
mod stop;
mod table;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::gguf_file;

use crate::backend::TokenId;
use detokenizer::{DecodeState, LeadingStrip};
use table::{TokenKind, TokenTable};

pub use chat::{ChatError, ChatRequest, ChatTemplate};
pub use detokenizer::{DetokenizeOptions, Detokenizer};
pub use error::TokenizerError;
pub use stop::{StopMatcher, StopStep};

/// A chat template that came with a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedTemplate {
    /// `default` unless the model brings several.
    pub name: String,
    /// Jinja source.
    pub text: String,
}

/// What one token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenText<'a> {
    /// Its text, with U+FFFD where it is not UTF-8 by itself.
    pub text: Cow<'a, str>,
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// Tokens with a meaning of their own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct ControlTokens {
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    pad: Option<TokenId>,
    unknown: Option<TokenId>,
    /// All that end an answer, ascending.
    ends: Vec<TokenId>,
}

/// Ids that the model's own tokenizer puts around a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Affixes {
    prefix: Vec<TokenId>,
    suffix: Vec<TokenId>,
}

/// A model's tokenizer. Shared by all requests; nothing in it changes after it was made.
#[derive(Debug)]
pub struct Tokenizer {
    encoder: tokenizers::Tokenizer,
    table: TokenTable,
    leading_strip: LeadingStrip,
    affixes: Affixes,
    control: ControlTokens,
    chat_templates: Vec<NamedTemplate>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and what stands beside it: `tokenizer_config.json`, `special_tokens_map.json`,
    /// `generation_config.json`, `config.json`, `chat_template.jinja`.
    ///
    /// # Errors
    /// When a file cannot be read or does not hold what it should.
    pub fn from_hf_dir(directory: &Path) -> Result<Self, TokenizerError> {
        hf::load(directory)
    }

    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// When keys are missing, have other types, contradict each other, or name what is not built in.
    pub fn from_gguf(metadata: &HashMap<String, gguf_file::Value>) -> Result<Self, TokenizerError> {
        gguf::load(metadata)
    }

    /// Text to ids; special tokens written in the text become their ids. With `add_special_tokens` the ids
    /// that the model's own tokenizer puts around a text (often BOS, often none) are added.
    ///
    /// # Errors
    /// When the vocabulary has no token for a part of the text, not even an unknown one.
    pub fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Vec<TokenId>, TokenizerError> {
        let encoding =
            self.encoder
                .encode_fast(text, false)
                .map_err(|error| TokenizerError::Encode {
                    reason: error::one_line(&error.to_string()),
                })?;
        if !add_special_tokens {
            return Ok(encoding.get_ids().to_vec());
        }
        let Affixes { prefix, suffix } = &self.affixes;
        Ok([prefix, encoding.get_ids(), suffix].concat())
    }

    /// Ids to text, all at once. Ids outside the vocabulary stand for nothing.
    #[must_use]
    pub fn decode(&self, ids: &[TokenId], skip_special_tokens: bool) -> String {
        let options = DetokenizeOptions {
            skip_special_tokens,
            ..DetokenizeOptions::default()
        };
        let mut state = DecodeState::new(self.leading_strip, options);
        let mut text = String::new();
        for &id in ids {
            state.push(&self.table, id, &mut text);
        }
        state.finish(&mut text);
        text
    }

    /// One more than the highest id with a meaning. The model's output may be wider.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }

    /// One token by itself, special or not; nothing for an id outside the vocabulary.
    #[must_use]
    pub fn token_text(&self, id: TokenId) -> TokenText<'_> {
        let bytes = self.table.bytes(id);
        TokenText {
            text: String::from_utf8_lossy(bytes),
            bytes,
        }
    }

    /// The id of a token by its exact text in the vocabulary, such as `<|im_end|>`.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.encoder.token_to_id(token)
    }

    /// Whether a token is left out where special tokens are skipped.
    #[must_use]
    pub fn is_special(&self, id: TokenId) -> bool {
        self.table.kind(id) == TokenKind::Special
    }

    /// The token that begins a text.
    #[must_use]
    pub fn bos(&self) -> Option<TokenId> {
        self.control.bos
    }

    /// The token that ends a text.
    #[must_use]
    pub fn eos(&self) -> Option<TokenId> {
        self.control.eos
    }

    /// The token that fills up batches.
    #[must_use]
    pub fn pad(&self) -> Option<TokenId> {
        self.control.pad
    }

    /// All tokens that end an answer, ascending: end of text, of turn, of message.
    #[must_use]
    pub fn end_tokens(&self) -> &[TokenId] {
        &self.control.ends
    }

    /// The chat templates that came with the model.
    #[must_use]
    pub fn chat_templates(&self) -> &[NamedTemplate] {
        &self.chat_templates
    }

    fn table(&self) -> &TokenTable {
        &self.table
    }

    fn leading_strip(&self) -> LeadingStrip {
        self.leading_strip
    }

    fn token_source(&self, id: Option<TokenId>) -> Option<String> {
        id.and_then(|id| self.encoder.id_to_token(id))
    }
}

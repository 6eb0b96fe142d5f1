//! The tokenizer that a GGUF file describes in its metadata. The file is the outside world: every value is
//! checked before it is used.

mod metadata;

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Merges, Vocab};

use self::metadata::{Metadata, TokenType};
use super::byte_level::{bytes_of, fallback_byte};
use super::detokenizer::LeadingStrip;
use super::error::TokenizerError;
use super::pre_tokenizer::PreTokenizer;
use super::sentence_piece::{self, Piece};
use super::table::{TOKEN_BYTES_MAX, TokenKind, TokenTable};
use super::{Affixes, ControlTokens, NamedTemplate, Tokenizer};
use crate::backend::TokenId;

/// Texts of control tokens that end an answer, for files that name only one of them.
const END_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "<｜end▁of▁sentence｜>",
];

/// The two kinds of vocabulary.
#[derive(Debug, Clone, Copy)]
enum Kind {
    ByteLevel(&'static PreTokenizer),
    SentencePiece,
}

/// The vocabulary as the file gives it.
#[derive(Debug)]
struct Vocabulary<'a> {
    kind: Kind,
    texts: Vec<&'a str>,
    types: Vec<TokenType>,
}

pub(super) fn load(metadata: &HashMap<String, Value>) -> Result<Tokenizer, TokenizerError> {
    let metadata = Metadata::new(metadata);
    let refused = |error: tokenizers::Error| TokenizerError::vocabulary(error.to_string());
    let mut vocabulary = Vocabulary::read(&metadata)?;
    let control = vocabulary.control_tokens(&metadata)?;
    vocabulary.mark_control(&control);

    let mut encoder = tokenizers::Tokenizer::new(vocabulary.model(&metadata, &control)?);
    let mut leading_strip = LeadingStrip::default();
    match vocabulary.kind {
        Kind::ByteLevel(pre_tokenizer) => {
            encoder.with_pre_tokenizer(Some(pre_tokenizer.build()));
        }
        Kind::SentencePiece => {
            let add_space_prefix = metadata
                .boolean("tokenizer.ggml.add_space_prefix")?
                .unwrap_or(true);
            encoder
                .with_normalizer(Some(sentence_piece::normalizer(add_space_prefix)))
                .map_err(refused)?;
            leading_strip = LeadingStrip {
                character: ' ',
                count: usize::from(add_space_prefix),
            };
        }
    }
    encoder
        .add_tokens(vocabulary.added_tokens())
        .map_err(refused)?;

    Ok(Tokenizer {
        encoder,
        table: vocabulary.table()?,
        leading_strip,
        affixes: affixes(&metadata, vocabulary.kind, &control)?,
        control,
        chat_templates: chat_templates(&metadata)?,
    })
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &Metadata<'a>) -> Result<Self, TokenizerError> {
        let kind = match metadata.required_text("tokenizer.ggml.model")? {
            "gpt2" => Kind::ByteLevel(pre_tokenizer(metadata)?),
            "llama" => Kind::SentencePiece,
            other => {
                return Err(TokenizerError::UnknownModel {
                    name: super::error::one_line(other),
                });
            }
        };
        let texts = metadata.texts("tokenizer.ggml.tokens")?;
        if texts.is_empty() {
            return Err(TokenizerError::metadata(
                "tokenizer.ggml.tokens",
                "no tokens",
            ));
        }
        if let Some(id) = texts.iter().position(|text| text.len() > TOKEN_BYTES_MAX) {
            let reason = format!("token {id} is longer than {TOKEN_BYTES_MAX} bytes");
            return Err(TokenizerError::metadata("tokenizer.ggml.tokens", reason));
        }
        let types = match metadata.token_types(texts.len())? {
            Some(types) => types,
            None => guessed_types(kind, &texts),
        };
        Ok(Self { kind, texts, types })
    }

    fn control_tokens(&self, metadata: &Metadata<'_>) -> Result<ControlTokens, TokenizerError> {
        let token = |name: &str| {
            metadata.token(&format!("tokenizer.ggml.{name}_token_id"), self.texts.len())
        };
        let eos = token("eos")?;
        let mut ends: Vec<TokenId> = [eos, token("eot")?, token("eom")?]
            .into_iter()
            .flatten()
            .collect();
        for (id, (text, kind)) in (0..).zip(self.texts.iter().zip(&self.types)) {
            if *kind == TokenType::Control && END_TEXTS.contains(text) {
                ends.push(id);
            }
        }
        ends.sort_unstable();
        ends.dedup();
        Ok(ControlTokens {
            bos: token("bos")?,
            eos,
            pad: token("padding")?,
            unknown: token("unknown")?,
            ends,
        })
    }

    /// A token that begins or ends a text is a control token even where the file forgets to say so.
    fn mark_control(&mut self, control: &ControlTokens) {
        for id in control.bos.iter().chain(&control.ends) {
            self.types[*id as usize] = TokenType::Control;
        }
    }

    fn model(
        &self,
        metadata: &Metadata<'_>,
        control: &ControlTokens,
    ) -> Result<BPE, TokenizerError> {
        match self.kind {
            Kind::ByteLevel(pre_tokenizer) => {
                self.byte_level_model(metadata, pre_tokenizer.ignore_merges)
            }
            Kind::SentencePiece => self.sentence_piece_model(metadata, control),
        }
    }

    fn byte_level_model(
        &self,
        metadata: &Metadata<'_>,
        ignore_merges: bool,
    ) -> Result<BPE, TokenizerError> {
        const KEY: &str = "tokenizer.ggml.merges";
        let mut vocab = Vocab::default();
        for (id, text) in (0..).zip(&self.texts) {
            vocab.insert((*text).to_owned(), id);
        }
        let mut merges = Merges::new();
        for (index, line) in metadata.texts(KEY)?.into_iter().enumerate() {
            let bad = |reason: &str| {
                let line = super::error::one_line(line);
                TokenizerError::metadata(KEY, format!("merge {index} `{line}`: {reason}"))
            };
            // A merged part is never empty, so the separating space is not the first character.
            let mut parts = line.char_indices().skip(1);
            let space = parts.find(|(_, character)| *character == ' ');
            let (at, _) = space.ok_or_else(|| bad("is not two parts"))?;
            let (left, right) = (&line[..at], &line[at + 1..]);
            let known = |part: &str| vocab.contains_key(part);
            if !known(left) || !known(right) || !known(&[left, right].concat()) {
                return Err(bad("a part or the whole is not in the vocabulary"));
            }
            merges.push((left.to_owned(), right.to_owned()));
        }
        BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(ignore_merges)
            .build()
            .map_err(|error| TokenizerError::vocabulary(error.to_string()))
    }

    fn sentence_piece_model(
        &self,
        metadata: &Metadata<'_>,
        control: &ControlTokens,
    ) -> Result<BPE, TokenizerError> {
        let scores = metadata.scores(self.texts.len())?;
        let unknown = control
            .unknown
            .or_else(|| position(&self.types, TokenType::Unknown));
        if unknown.is_none() && !self.has_every_byte() {
            return Err(TokenizerError::metadata(
                "tokenizer.ggml.unknown_token_id",
                "missing, and the vocabulary has no token for each byte",
            ));
        }
        let pieces: Vec<Piece<'_>> = self
            .texts
            .iter()
            .zip(&self.types)
            .zip(scores)
            .map(|((text, kind), score)| Piece {
                text,
                score,
                mergeable: matches!(
                    kind,
                    TokenType::Normal | TokenType::UserDefined | TokenType::Unused
                ),
            })
            .collect();
        sentence_piece::model(&pieces, unknown.map(|id| self.texts[id as usize]))
    }

    fn has_every_byte(&self) -> bool {
        let mut seen = [false; 256];
        for text in &self.texts {
            if let Some(byte) = fallback_byte(text) {
                seen[usize::from(byte)] = true;
            }
        }
        seen.iter().all(|seen| *seen)
    }

    /// Tokens that are found in a text before anything else looks at it.
    fn added_tokens(&self) -> Vec<AddedToken> {
        self.texts
            .iter()
            .zip(&self.types)
            .filter_map(|(text, kind)| match kind {
                TokenType::Control | TokenType::Unknown => Some(AddedToken::from(*text, true)),
                TokenType::UserDefined => Some(AddedToken::from(*text, false).normalized(false)),
                TokenType::Normal | TokenType::Unused | TokenType::Byte => None,
            })
            .collect()
    }

    fn table(&self) -> Result<TokenTable, TokenizerError> {
        let mut table = TokenTable::default();
        for (text, kind) in self.texts.iter().zip(&self.types) {
            match kind {
                TokenType::Control | TokenType::Unknown => {
                    table.push(text.as_bytes(), TokenKind::Special)?;
                }
                TokenType::UserDefined => table.push(text.as_bytes(), TokenKind::Text)?,
                TokenType::Unused => table.push(&[], TokenKind::Unused)?,
                TokenType::Normal | TokenType::Byte => {
                    table.push(&self.normal_bytes(text, *kind), TokenKind::Text)?;
                }
            }
        }
        Ok(table)
    }

    fn normal_bytes(&self, text: &str, kind: TokenType) -> Vec<u8> {
        match (self.kind, kind) {
            (_, TokenType::Byte) => {
                fallback_byte(text).map_or_else(|| text.as_bytes().to_vec(), |byte| vec![byte])
            }
            (Kind::ByteLevel(_), _) => bytes_of(text),
            (Kind::SentencePiece, _) => text.replace(sentence_piece::SPACE, " ").into_bytes(),
        }
    }
}

fn pre_tokenizer(metadata: &Metadata<'_>) -> Result<&'static PreTokenizer, TokenizerError> {
    const KEY: &str = "tokenizer.ggml.pre";
    let name = metadata.text(KEY)?.unwrap_or_else(|| {
        tracing::warn!("gguf metadata has no `{KEY}`; the text is cut as by `default`");
        "default"
    });
    PreTokenizer::named(name)
}

/// Files from before token types: only what is plain from the text.
fn guessed_types(kind: Kind, texts: &[&str]) -> Vec<TokenType> {
    texts
        .iter()
        .map(|text| match kind {
            Kind::SentencePiece if fallback_byte(text).is_some() => TokenType::Byte,
            Kind::SentencePiece if *text == "<unk>" => TokenType::Unknown,
            Kind::SentencePiece | Kind::ByteLevel(_) => TokenType::Normal,
        })
        .collect()
}

fn position(types: &[TokenType], wanted: TokenType) -> Option<TokenId> {
    (0..)
        .zip(types)
        .find_map(|(id, kind)| (*kind == wanted).then_some(id))
}

fn affixes(
    metadata: &Metadata<'_>,
    kind: Kind,
    control: &ControlTokens,
) -> Result<Affixes, TokenizerError> {
    let add_by_default = match kind {
        Kind::ByteLevel(pre_tokenizer) => pre_tokenizer.add_bos,
        Kind::SentencePiece => true,
    };
    let affix = |key: &str, by_default: bool, token: Option<TokenId>| {
        let asked = metadata.boolean(key)?;
        match (asked, token) {
            (Some(true), None) => Err(TokenizerError::metadata(
                key,
                "true, but the file names no such token",
            )),
            (asked, token) => Ok(token.filter(|_| asked.unwrap_or(by_default))),
        }
    };
    let bos = affix("tokenizer.ggml.add_bos_token", add_by_default, control.bos)?;
    let eos = affix("tokenizer.ggml.add_eos_token", false, control.eos)?;
    Ok(Affixes {
        prefix: bos.into_iter().collect(),
        suffix: eos.into_iter().collect(),
    })
}

fn chat_templates(metadata: &Metadata<'_>) -> Result<Vec<NamedTemplate>, TokenizerError> {
    const KEY: &str = "tokenizer.chat_template";
    let mut templates = Vec::new();
    if let Some(text) = metadata.text(KEY)? {
        templates.push(NamedTemplate {
            name: "default".to_owned(),
            text: text.to_owned(),
        });
    }
    for (key, name) in metadata.keys_below(KEY) {
        if let Some(text) = metadata.text(key)? {
            templates.push(NamedTemplate {
                name: name.to_owned(),
                text: text.to_owned(),
            });
        }
    }
    Ok(templates)
}

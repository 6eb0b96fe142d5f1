//! Tokenizers from Hugging Face directories.

use std::fs;
use std::io::ErrorKind;
use std::panic;
use std::path::Path;

use tokenizers::AddedToken;

use super::error::TokenizerError;
use super::hf_config::HfConfig;
use super::hf_decoder::DecodeRule;
use super::table::{TOKENS_MAX, TokenKind, TokenTable};
use super::{Affixes, ControlTokens, Tokenizer};
use crate::backend::TokenId;

pub(super) fn load(directory: &Path) -> Result<Tokenizer, TokenizerError> {
    let path = directory.join("tokenizer.json");
    let bytes = fs::read(&path).map_err(|source| match source.kind() {
        ErrorKind::NotFound => TokenizerError::NoTokenizerFile {
            directory: directory.to_owned(),
        },
        _ => TokenizerError::Read {
            path: path.clone(),
            source,
        },
    })?;
    let config = HfConfig::read(directory)?;
    let mut encoder = parse(&path, &bytes)?;
    add_tokens(&mut encoder, &config)?;

    let rule = decode_rule(&encoder)?;
    let control = control_tokens(&encoder, &config);
    let affixes = affixes(&encoder, &config, &control)?;
    Ok(Tokenizer {
        table: table(&encoder, &rule)?,
        leading_strip: rule.leading_strip,
        affixes,
        control,
        chat_templates: config.templates,
        encoder,
    })
}

/// The file as a tokenizer that neither cuts nor pads: some files carry such settings from training.
fn parse(path: &Path, bytes: &[u8]) -> Result<tokenizers::Tokenizer, TokenizerError> {
    // The crate indexes by what the file says; a file that lies must not take the server down.
    let parsed = panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes));
    let mut encoder = match parsed {
        Ok(Ok(encoder)) => encoder,
        Ok(Err(error)) => return Err(TokenizerError::parse(path, error.to_string())),
        Err(_) => return Err(TokenizerError::parse(path, "contradicts itself")),
    };
    encoder
        .with_truncation(None)
        .map_err(|error| TokenizerError::parse(path, error.to_string()))?;
    encoder.with_padding(None);
    Ok(encoder)
}

/// Special tokens that only the files beside `tokenizer.json` know.
fn add_tokens(
    encoder: &mut tokenizers::Tokenizer,
    config: &HfConfig,
) -> Result<(), TokenizerError> {
    let refused = |error: tokenizers::Error| TokenizerError::vocabulary(error.to_string());
    let mut known = Vec::new();
    for (id, token) in &config.added {
        match encoder.token_to_id(&token.content) {
            Some(found) if found == *id => known.push(token.clone()),
            Some(_) => {}
            // The crate gives new tokens the next free id; another one would mean another row of the model.
            None if *id as usize == encoder.get_vocab_size(true) => {
                encoder.add_tokens([token.clone()]).map_err(refused)?;
            }
            None => tracing::warn!(
                "token `{}` is left out: tokenizer_config.json gives it id {id}, which tokenizer.json leaves no room for",
                token.content
            ),
        }
    }
    encoder.add_tokens(known).map_err(refused)?;

    let named = [&config.bos, &config.eos, &config.pad, &config.unknown];
    let special: Vec<AddedToken> = named
        .into_iter()
        .flatten()
        .chain(&config.additional)
        .filter(|content| encoder.token_to_id(content).is_some())
        .filter(|content| !encoder.get_added_vocabulary().is_special_token(content))
        .map(|content| AddedToken::from(content.clone(), true))
        .collect();
    encoder.add_special_tokens(special).map_err(refused)?;
    Ok(())
}

fn decode_rule(encoder: &tokenizers::Tokenizer) -> Result<DecodeRule, TokenizerError> {
    let decoder = serde_json::to_value(encoder.get_decoder())
        .map_err(|error| TokenizerError::vocabulary(error.to_string()))?;
    DecodeRule::read(&decoder)
}

fn table(encoder: &tokenizers::Tokenizer, rule: &DecodeRule) -> Result<TokenTable, TokenizerError> {
    let vocabulary = encoder.get_vocab(true);
    let highest = vocabulary.values().copied().max().unwrap_or(0) as usize;
    if vocabulary.is_empty() || highest >= TOKENS_MAX {
        let reason = format!(
            "{} tokens with ids up to {highest} (at most {TOKENS_MAX}, and not none)",
            vocabulary.len()
        );
        return Err(TokenizerError::vocabulary(reason));
    }
    let mut texts: Vec<Option<&str>> = vec![None; highest + 1];
    for (text, id) in &vocabulary {
        texts[*id as usize] = Some(text);
    }
    let added = encoder.get_added_tokens_decoder();
    let mut table = TokenTable::default();
    for (id, text) in (0..).zip(texts) {
        match (added.get(&id), text) {
            (Some(token), _) if token.special => {
                table.push(token.content.as_bytes(), TokenKind::Special)?;
            }
            (Some(token), _) => table.push(token.content.as_bytes(), TokenKind::Text)?,
            (None, Some(text)) => table.push(&rule.bytes(text), TokenKind::Text)?,
            (None, None) => table.push(&[], TokenKind::Unused)?,
        }
    }
    Ok(table)
}

fn control_tokens(encoder: &tokenizers::Tokenizer, config: &HfConfig) -> ControlTokens {
    let id = |content: &Option<String>| {
        content
            .as_deref()
            .and_then(|content| encoder.token_to_id(content))
    };
    let eos = id(&config.eos);
    let mut ends = config.end_ids.clone();
    ends.extend(eos);
    ends.sort_unstable();
    ends.dedup();
    ControlTokens {
        bos: id(&config.bos),
        eos: eos.or_else(|| config.end_ids.first().copied()),
        pad: id(&config.pad),
        unknown: id(&config.unknown),
        ends,
    }
}

/// What the file's post-processor puts around a text, with `add_bos_token` and `add_eos_token` on top.
fn affixes(
    encoder: &tokenizers::Tokenizer,
    config: &HfConfig,
    control: &ControlTokens,
) -> Result<Affixes, TokenizerError> {
    let encode = |special| {
        encoder
            .encode_fast("a", special)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| TokenizerError::vocabulary(error.to_string()))
    };
    let (bare, full) = (encode(false)?, encode(true)?);
    let at = (0..=full.len())
        .find(|&at| !bare.is_empty() && full[at..].starts_with(&bare))
        .unwrap_or(full.len());
    let mut affixes = Affixes {
        prefix: full[..at].to_vec(),
        suffix: full.get(at + bare.len()..).unwrap_or_default().to_vec(),
    };
    apply_flag(&mut affixes.prefix, control.bos, config.add_bos);
    apply_flag(&mut affixes.suffix, control.eos, config.add_eos);
    Ok(affixes)
}

fn apply_flag(ids: &mut Vec<TokenId>, token: Option<TokenId>, wanted: Option<bool>) {
    let (Some(token), Some(wanted)) = (token, wanted) else {
        return;
    };
    match (wanted, ids.contains(&token)) {
        (true, false) => ids.insert(0, token),
        (false, true) => ids.retain(|id| *id != token),
        (true, true) | (false, false) => {}
    }
}

//! What stands beside `tokenizer.json`: names of special tokens, flags, chat templates, end tokens.
//!
//! `tokenizer_config.json` wins over `special_tokens_map.json`, `generation_config.json` over `config.json`,
//! and `chat_template.jinja` over the template in `tokenizer_config.json`, as in transformers.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::NamedTemplate;
use super::error::TokenizerError;
use crate::backend::TokenId;

/// All of it.
#[derive(Debug, Default)]
pub(super) struct HfConfig {
    pub(super) bos: Option<String>,
    pub(super) eos: Option<String>,
    pub(super) pad: Option<String>,
    pub(super) unknown: Option<String>,
    /// Further special tokens.
    pub(super) additional: Vec<String>,
    pub(super) add_bos: Option<bool>,
    pub(super) add_eos: Option<bool>,
    /// Added tokens with the ids that they were trained under, ascending.
    pub(super) added: Vec<(TokenId, AddedToken)>,
    pub(super) end_ids: Vec<TokenId>,
    pub(super) templates: Vec<NamedTemplate>,
}

/// A JSON object with the path it came from.
#[derive(Debug)]
struct Document {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl HfConfig {
    pub(super) fn read(directory: &Path) -> Result<Self, TokenizerError> {
        let config = Document::read(directory.join("tokenizer_config.json"))?;
        let map = Document::read(directory.join("special_tokens_map.json"))?;
        let token = |key: &str| match config.token(key)? {
            Some(token) => Ok(Some(token)),
            None => map.token(key),
        };
        let mut additional = config.tokens("additional_special_tokens")?;
        additional.extend(config.tokens("extra_special_tokens")?);
        additional.extend(map.tokens("additional_special_tokens")?);
        Ok(Self {
            bos: token("bos_token")?,
            eos: token("eos_token")?,
            pad: token("pad_token")?,
            unknown: token("unk_token")?,
            additional,
            add_bos: config.boolean("add_bos_token")?,
            add_eos: config.boolean("add_eos_token")?,
            added: config.added_tokens()?,
            end_ids: end_ids(directory)?,
            templates: templates(directory, &config)?,
        })
    }
}

impl Document {
    /// The file's object; an empty one when there is no such file.
    fn read(path: PathBuf) -> Result<Self, TokenizerError> {
        let Some(text) = read_text(&path)? else {
            let fields = Map::new();
            return Ok(Self { path, fields });
        };
        match serde_json::from_str(&text) {
            Ok(Value::Object(fields)) => Ok(Self { path, fields }),
            Ok(_) => Err(TokenizerError::parse(&path, "expected a JSON object")),
            Err(error) => Err(TokenizerError::parse(&path, error.to_string())),
        }
    }

    fn wrong(&self, key: &str, expected: &str) -> TokenizerError {
        TokenizerError::parse(&self.path, format!("`{key}`: expected {expected}"))
    }

    /// The value of a key; `null` counts as absent.
    fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>, TokenizerError> {
        self.get(key)
            .map(|value| {
                value
                    .as_bool()
                    .ok_or_else(|| self.wrong(key, "true or false"))
            })
            .transpose()
    }

    fn token(&self, key: &str) -> Result<Option<String>, TokenizerError> {
        self.get(key)
            .map(|value| {
                content(value)
                    .ok_or_else(|| self.wrong(key, "a token (text, or an object with `content`)"))
            })
            .transpose()
    }

    fn tokens(&self, key: &str) -> Result<Vec<String>, TokenizerError> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let tokens = match value {
            Value::Array(list) => list.iter().map(content).collect(),
            Value::Object(named) => named.values().map(content).collect(),
            _ => None,
        };
        tokens.ok_or_else(|| self.wrong(key, "a list of tokens"))
    }

    fn added_tokens(&self) -> Result<Vec<(TokenId, AddedToken)>, TokenizerError> {
        const KEY: &str = "added_tokens_decoder";
        let Some(value) = self.get(KEY) else {
            return Ok(Vec::new());
        };
        let wrong = || self.wrong(KEY, "an object from ids to tokens");
        let mut added = Vec::new();
        for (id, token) in value.as_object().ok_or_else(wrong)? {
            let id: TokenId = id.parse().map_err(|_| wrong())?;
            let flag = |name: &str| token[name].as_bool().unwrap_or(false);
            let content = content(token).ok_or_else(wrong)?;
            let token = AddedToken::from(content, flag("special"))
                .single_word(flag("single_word"))
                .lstrip(flag("lstrip"))
                .rstrip(flag("rstrip"))
                .normalized(token["normalized"].as_bool().unwrap_or(!flag("special")));
            added.push((id, token));
        }
        added.sort_by_key(|(id, _)| *id);
        Ok(added)
    }

    fn ids(&self, key: &str) -> Result<Option<Vec<TokenId>>, TokenizerError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let one = |value: &Value| TokenId::try_from(value.as_u64()?).ok();
        let ids = match value {
            Value::Array(list) => list.iter().map(one).collect(),
            single => one(single).map(|id| vec![id]),
        };
        ids.map(Some)
            .ok_or_else(|| self.wrong(key, "a token id, or a list of them"))
    }
}

/// A token is written as its text or as an object around it.
fn content(value: &Value) -> Option<String> {
    value
        .as_str()
        .or_else(|| value["content"].as_str())
        .map(str::to_owned)
}

fn end_ids(directory: &Path) -> Result<Vec<TokenId>, TokenizerError> {
    for name in ["generation_config.json", "config.json"] {
        if let Some(ids) = Document::read(directory.join(name))?.ids("eos_token_id")? {
            return Ok(ids);
        }
    }
    Ok(Vec::new())
}

fn templates(directory: &Path, config: &Document) -> Result<Vec<NamedTemplate>, TokenizerError> {
    let mut templates = match config.get("chat_template") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![named("default", text)],
        Some(list) => list
            .as_array()
            .and_then(|list| {
                list.iter()
                    .map(|one| Some(named(one["name"].as_str()?, one["template"].as_str()?)))
                    .collect()
            })
            .ok_or_else(|| config.wrong("chat_template", "text, or a list of {name, template}"))?,
    };
    if let Some(text) = read_text(&directory.join("chat_template.jinja"))? {
        replace(&mut templates, named("default", &text));
    }
    let more = directory.join("additional_chat_templates");
    for path in jinja_files(&more)? {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if let Some(text) = read_text(&path)? {
            replace(&mut templates, named(&name, &text));
        }
    }
    Ok(templates)
}

fn named(name: &str, text: &str) -> NamedTemplate {
    NamedTemplate {
        name: name.to_owned(),
        text: text.to_owned(),
    }
}

fn replace(templates: &mut Vec<NamedTemplate>, template: NamedTemplate) {
    templates.retain(|other| other.name != template.name);
    templates.push(template);
}

fn jinja_files(directory: &Path) -> Result<Vec<PathBuf>, TokenizerError> {
    let failed = |source| TokenizerError::Read {
        path: directory.to_owned(),
        source,
    };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "jinja")
        {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// A file's text; nothing when there is no such file.
fn read_text(path: &Path) -> Result<Option<String>, TokenizerError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

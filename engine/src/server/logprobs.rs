//! Log-probabilities as the two APIs write them.

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use crate::backend::TokenId;
use crate::request::{Logprob, TokenLogprobs};
use crate::server::text::TextTools;

/// Stands for the logarithm of zero, which JSON cannot write.
const LOGPROB_MIN: f32 = -9999.0;

/// Log-probabilities in the shape of the answer.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Logprobs {
    Completion(CompletionLogprobs),
    Chat(ChatLogprobs),
}

/// Of completions: parallel lists.
#[derive(Debug, Default, Serialize)]
pub(super) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<TopLogprobs>>,
    text_offset: Vec<usize>,
}

/// The most likely tokens by their text; of two with the same text the likelier one.
#[derive(Debug)]
struct TopLogprobs(Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

impl CompletionLogprobs {
    /// Appends a token. `offset` counts the characters of the tokens so far and goes on with this one's.
    pub(super) fn push(&mut self, tools: &TextTools, entry: &TokenLogprobs, offset: &mut usize) {
        let mut top: Vec<(String, f32)> = Vec::with_capacity(entry.top.len() + 1);
        for logprob in entry.top.iter().chain(std::iter::once(&entry.chosen)) {
            let text = tools.token_text(logprob.token).text.into_owned();
            if top.iter().all(|(known, _)| *known != text) {
                top.push((text, finite(logprob.logprob)));
            }
        }
        self.token_logprobs.push(Some(finite(entry.chosen.logprob)));
        self.top_logprobs.push(Some(TopLogprobs(top)));
        self.push_token(tools, entry.chosen.token, offset);
    }

    /// Appends the prompt's first token, which nothing predicts.
    pub(super) fn push_first(&mut self, tools: &TextTools, token: TokenId, offset: &mut usize) {
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
        self.push_token(tools, token, offset);
    }

    fn push_token(&mut self, tools: &TextTools, token: TokenId, offset: &mut usize) {
        let text = tools.token_text(token).text.into_owned();
        self.text_offset.push(*offset);
        *offset += text.chars().count();
        self.tokens.push(text);
    }
}

/// Of chat: one object a token.
#[derive(Debug, Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatLogprob>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<NamedLogprob>,
}

#[derive(Debug, Serialize)]
struct NamedLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl NamedLogprob {
    fn new(tools: &TextTools, logprob: &Logprob) -> Self {
        let token = tools.token_text(logprob.token);
        Self {
            bytes: token.bytes.to_vec(),
            token: token.text.into_owned(),
            logprob: finite(logprob.logprob),
        }
    }
}

impl ChatLogprobs {
    /// Of some tokens.
    pub(super) fn new(tools: &TextTools, entries: &[TokenLogprobs]) -> Self {
        let content = entries
            .iter()
            .map(|entry| {
                let chosen = NamedLogprob::new(tools, &entry.chosen);
                let top = entry.top.iter();
                ChatLogprob {
                    token: chosen.token,
                    logprob: chosen.logprob,
                    bytes: chosen.bytes,
                    top_logprobs: top
                        .map(|logprob| NamedLogprob::new(tools, logprob))
                        .collect(),
                }
            })
            .collect();
        Self {
            content,
            refusal: None,
        }
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob.max(LOGPROB_MIN)
    } else {
        LOGPROB_MIN
    }
}

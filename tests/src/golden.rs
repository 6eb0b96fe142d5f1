//! The golden data under tests/golden: what independent implementations answered.

use serde::Deserialize;

/// One prompt with its greedy answer.
#[derive(Debug, Clone, Deserialize)]
pub struct Item {
    /// `completion` or `chat`; tiny models only complete.
    #[serde(default)]
    pub kind: String,
    /// Prompt of a completion.
    pub prompt: Option<String>,
    /// Messages of a chat.
    #[serde(default)]
    pub messages: Option<serde_json::Value>,
    /// The prompt's tokens.
    pub prompt_token_ids: Vec<u32>,
    /// The answer's tokens, up to and with the end token.
    pub output_token_ids: Vec<u32>,
    /// The answer's text without the end token; tiny models have none.
    #[serde(default)]
    pub text: String,
    /// Log-probabilities of the answer's tokens.
    pub logprobs: Vec<f32>,
    /// Smallest gap between best and second-best log-probability.
    pub min_margin: f32,
}

#[derive(Deserialize)]
struct SmolFile {
    items: Vec<Item>,
}

#[derive(Deserialize)]
struct TinyFile {
    models: std::collections::BTreeMap<String, Vec<Item>>,
}

fn read(name: &str) -> String {
    std::fs::read_to_string(crate::root().join("tests/golden").join(name))
        .expect("golden data is in the tree")
}

/// The small real model's items.
///
/// # Panics
/// When the file is damaged.
#[must_use]
pub fn smollm2() -> Vec<Item> {
    serde_json::from_str::<SmolFile>(&read("smollm2.json"))
        .expect("golden data parses")
        .items
}

/// The tiny models' items by family.
///
/// # Panics
/// When the file is damaged.
#[must_use]
pub fn tiny() -> std::collections::BTreeMap<String, Vec<Item>> {
    serde_json::from_str::<TinyFile>(&read("tiny.json"))
        .expect("golden data parses")
        .models
}

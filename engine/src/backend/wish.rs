//! What is wanted of a step's rows, and what a step gave: logits, or tokens that the device chooses by them.
//!
//! How logits are changed before a choice is `sampler.rs`' to say. A device that does so keeps tables, one for each
//! sequence that needs one, of what that holds. Which table is whose is the engine's knowledge (`wishes.rs`); the device does what the
//! wishes say, in the order of the steps, so a token that it has chosen itself is counted without the host.

use std::sync::Arc;

use super::TokenId;
use crate::request::TokenLogprobs;

/// Tables that a device keeps, at most. Each has 4 bytes for a token of the vocabulary, so all of them some 130 MB.
pub const TABLES_MAX: usize = 256;
/// Tokens with a bias in a table, at most.
pub const BIASES_MAX: usize = 1024;
/// Alternatives that a device tells of a row, at most.
pub const ALTERNATIVES_MAX: usize = 20;

/// How a step may be run, and what is wanted of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepWish<'a> {
    /// Whether passes over batches of the same shape make the same calls, so that one may be recorded and replayed.
    pub repeatable: bool,
    /// What is wanted of each of the `logit_rows`; empty when it is the logits of all.
    pub rows: &'a [RowWish],
    /// Rows whose token is not known yet, because the step that was begun before chooses it.
    pub carried: &'a [Carried],
}

/// A row that computes a token which the step begun before chooses. Where that chose none, because its logits are not finite,
/// it is any token of the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carried {
    /// Row of this batch.
    pub row: usize,
    /// Which of the `logit_rows` of the step before, counted from 0.
    pub from: usize,
}

/// What is wanted of a row. A device that cannot choose gives logits in any case; only one that runs by itself is asked for
/// more than a token by the logits as they are.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum RowWish {
    /// Its logits.
    #[default]
    Logits,
    /// A token.
    Token(TokenWish),
}

impl RowWish {
    /// The lowest of its best tokens.
    pub const BEST: Self = Self::Token(TokenWish {
        choice: Choice::Best,
        changes: None,
        logprobs: None,
    });

    /// A token that is drawn.
    #[must_use]
    pub const fn draw(draw: Draw) -> Self {
        Self::Token(TokenWish {
            choice: Choice::Draw(draw),
            changes: None,
            logprobs: None,
        })
    }

    /// How many alternatives are to be told with the token, where something is.
    #[must_use]
    pub const fn logprobs(&self) -> Option<u32> {
        match self {
            Self::Token(wish) => wish.logprobs,
            Self::Logits => None,
        }
    }
}

/// Which token, by which logits, and what is to be told of it.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenWish {
    /// Which.
    pub choice: Choice,
    /// What is done to the logits first.
    pub changes: Option<Changes>,
    /// So many of the best tokens are told with their log-probabilities, and the chosen one's; by the logits as they were.
    pub logprobs: Option<u32>,
}

/// Which token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// The lowest of the best.
    Best,
    /// One that is drawn.
    Draw(Draw),
    /// This one: the prompt's next, of which only the log-probability is to be told.
    Given(TokenId),
}

/// How to draw a token: with probability `exp(logit / temperature)` among those that top-k leaves, of these those that top-p
/// leaves, of these those that min-p leaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Above 0.
    pub temperature: f32,
    /// So many of the best; 0 for all.
    pub top_k: u32,
    /// As few of the best as have this share of the weight.
    pub top_p: f32,
    /// Those with this share of the best one's weight.
    pub min_p: f32,
    /// In `[0, 1)`: which one.
    pub uniform: f64,
}

/// What is done to a row's logits, by a table of what its sequence holds: biases, penalties, bans, in this order.
#[derive(Debug, Clone, PartialEq)]
pub struct Changes {
    /// The table, below [`TABLES_MAX`]. No two rows of a step have the same.
    pub table: u32,
    /// What the table holds from now on; `None` where it goes on with what it holds.
    pub anew: Option<Arc<Seen>>,
    /// The row's own token is one of the answer: it is counted before anything else.
    pub counts_own: bool,
    /// How tokens that the table knows are penalised.
    pub penalties: Penalties,
    /// None of [`Seen::bannable`] may be chosen.
    pub bans: bool,
}

/// Numbers of [`crate::request::SamplingParams`]; 1, 0 and 0 change nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Penalties {
    /// Divides or multiplies logits of tokens in prompt or answer.
    pub repetition: f32,
    /// Subtracted per occurrence in the answer.
    pub frequency: f32,
    /// Subtracted once for tokens in the answer.
    pub presence: f32,
}

/// What a sequence holds, and what its request says of single tokens. Tokens outside the vocabulary are left out of account.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Seen {
    /// `V`.
    pub vocab: usize,
    /// The prompt's tokens that count.
    pub prompt: Vec<TokenId>,
    /// The answer's, without the row's own.
    pub answer: Vec<TokenId>,
    /// Added to logits, in this order; at most [`BIASES_MAX`].
    pub biases: Vec<(TokenId, f32)>,
    /// Tokens that end an answer.
    pub bannable: Vec<TokenId>,
}

/// What a step gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// Values of the rows that have no token in [`StepOutput::chosen`], in order. Of a row for which a token was wished and that
    /// was not finite they may be any that are not finite.
    pub values: Vec<f32>,
    /// For each of the `logit_rows` its token, where the device chose one; empty for none.
    pub chosen: Vec<Option<TokenId>>,
    /// For each of those what is told of its token, where that was wished; empty for none.
    pub logprobs: Vec<Option<TokenLogprobs>>,
}

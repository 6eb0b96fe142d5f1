//! Log-probabilities of the raw distribution, with ranks and alternatives.

use crate::backend::TokenId;
use crate::request::{Logprob, TokenLogprobs};

use super::filter::best_tokens;

/// How likely `token` was, and the `top` most likely tokens.
pub(crate) fn token_logprobs(logits: &[f32], token: TokenId, top: u32) -> TokenLogprobs {
    let normalizer = log_sum_exp(logits);
    let mut order = Vec::new();
    if top > 0 {
        best_tokens(logits, top as usize, &mut order);
    }
    let of = |token: TokenId, rank: u32| Logprob {
        token,
        logprob: narrow(f64::from(logits[token as usize]) - normalizer),
        rank,
    };
    TokenLogprobs {
        chosen: of(token, rank(logits, token)),
        top: order
            .iter()
            .zip(1..)
            .map(|(&token, rank)| of(token, rank))
            .collect(),
    }
}

/// `ln Σ exp(logit)`, summed in 64 bits.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let best = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits
        .iter()
        .map(|&logit| (f64::from(logit) - best).exp())
        .sum();
    best + sum.ln()
}

/// 1 for the most likely; the lower id goes first among equals.
#[expect(clippy::float_cmp, reason = "equal logits are ties")]
fn rank(logits: &[f32], token: TokenId) -> u32 {
    let own = logits[token as usize];
    let before = (0..)
        .zip(logits)
        .filter(|&(id, &logit)| logit > own || (logit == own && id < token))
        .count();
    u32::try_from(before + 1).expect("token ids are 32 bits")
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a log-probability is computed wide and reported as f32"
)]
fn narrow(value: f64) -> f32 {
    value as f32
}

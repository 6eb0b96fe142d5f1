//! Chooses the next token from one row of logits, and says how likely tokens were.
//!
//! Order: bias, penalties, min-tokens mask, temperature, top-k, top-p, min-p. Log-probabilities are those of the
//! raw logits, before all of it. Randomness is a function of the seed and the token's index in the answer alone, so
//! an answer does not depend on batching, pre-emption or which server wrote which part. Ties go to the lower id.

mod filter;
mod logprobs;

use std::collections::{HashMap, HashSet};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::backend::{Choice, Draw, RowWish, TokenId, TokenWish};
use crate::request::{SamplingParams, TokenLogprobs};

use logprobs::token_logprobs;

/// What the choice depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SampleInput<'a> {
    pub(crate) params: &'a SamplingParams,
    /// The model's end-of-sequence tokens, masked until `min_tokens` are written.
    pub(crate) eos: &'a [TokenId],
    pub(crate) prompt: &'a [TokenId],
    /// Tokens written so far; their number is the index of the token to choose.
    pub(crate) answer: &'a [TokenId],
    /// `[V]`.
    pub(crate) logits: &'a [f32],
}

/// The choice.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sampled {
    pub(crate) token: TokenId,
    pub(crate) logprobs: Option<TokenLogprobs>,
}

/// Why no token could be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SampleError {
    #[error("logit of token {token} is {value}")]
    NotFinite { token: TokenId, value: String },
    #[error("every token of the vocabulary ({vocab}) is masked")]
    AllMasked { vocab: usize },
}

/// Buffers that are kept from token to token.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    logits: Vec<f32>,
    order: Vec<TokenId>,
    kept: Vec<(TokenId, f32)>,
}

impl Sampler {
    /// Chooses the next token.
    pub(crate) fn sample(&mut self, input: &SampleInput<'_>) -> Result<Sampled, SampleError> {
        check_finite(input.logits)?;
        let token = if is_plain_greedy(input.params, input.answer.len()) {
            argmax(input.logits)
        } else {
            self.choose(input)?
        };
        Ok(Sampled {
            token,
            logprobs: input
                .params
                .logprobs
                .map(|top| token_logprobs(input.logits, token, top)),
        })
    }

    fn choose(&mut self, input: &SampleInput<'_>) -> Result<TokenId, SampleError> {
        self.logits.clear();
        self.logits.extend_from_slice(input.logits);
        adjust(&mut self.logits, input);
        let best = argmax(&self.logits);
        let best_logit = self.logits[best as usize];
        if best_logit == f32::NEG_INFINITY {
            return Err(SampleError::AllMasked {
                vocab: self.logits.len(),
            });
        }
        if input.params.temperature <= 0.0 {
            return Ok(best);
        }
        let weights = filter::Weights {
            logits: &self.logits,
            best: best_logit,
            temperature: input.params.temperature,
        };
        let how = draw_of(input.params, input.answer.len());
        filter::keep(&weights, &how, &mut self.order, &mut self.kept);
        Ok(draw(&self.kept, how.uniform))
    }
}

/// The token that a row's wish is for, where its logits are not to be changed.
pub(crate) fn choose(logits: &[f32], wish: &RowWish) -> Result<TokenId, SampleError> {
    check_finite(logits)?;
    let best = argmax(logits);
    let RowWish::Token(TokenWish {
        choice: Choice::Draw(how),
        ..
    }) = wish
    else {
        return Ok(best);
    };
    let weights = filter::Weights {
        logits,
        best: logits[best as usize],
        temperature: how.temperature,
    };
    let (mut order, mut kept) = (Vec::new(), Vec::new());
    filter::keep(&weights, how, &mut order, &mut kept);
    Ok(draw(&kept, how.uniform))
}

/// How likely a prompt's token was after those before it.
pub(crate) fn prompt_logprobs(
    logits: &[f32],
    token: TokenId,
    top: u32,
) -> Result<TokenLogprobs, SampleError> {
    check_finite(logits)?;
    Ok(token_logprobs(logits, token, top))
}

/// A number in `[0, 1)` that depends on the seed and the index only.
fn uniform(seed: u64, index: usize) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index as u64);
    // 53 bits are what an f64 holds exactly.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    let bits = (rng.next_u64() >> 11) as f64;
    bits / 9_007_199_254_740_992.0
}

fn draw(kept: &[(TokenId, f32)], uniform: f64) -> TokenId {
    let total: f64 = kept.iter().map(|&(_, weight)| f64::from(weight)).sum();
    let mut left = uniform * total;
    for &(token, weight) in kept {
        left -= f64::from(weight);
        if left < 0.0 {
            return token;
        }
    }
    // Rounding may leave a remainder: the last token that has any weight takes it.
    kept.iter()
        .rev()
        .find(|&&(_, weight)| weight > 0.0)
        .map_or(0, |&(token, _)| token)
}

/// How the answer's next token is chosen, once logits are changed.
pub(crate) fn choice(params: &SamplingParams, answer_len: usize) -> Choice {
    if params.temperature <= 0.0 {
        Choice::Best
    } else {
        Choice::Draw(draw_of(params, answer_len))
    }
}

/// Whether logits are changed before.
pub(crate) fn changes_logits(params: &SamplingParams, answer_len: usize) -> bool {
    !params.logit_bias.is_empty() || has_penalty(params) || answer_len < params.min_tokens as usize
}

fn draw_of(params: &SamplingParams, answer_len: usize) -> Draw {
    Draw {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        uniform: uniform(params.seed, answer_len),
    }
}

fn is_plain_greedy(params: &SamplingParams, answer_len: usize) -> bool {
    params.temperature <= 0.0 && !changes_logits(params, answer_len)
}

#[expect(clippy::float_cmp, reason = "the neutral values are exact")]
fn has_penalty(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0
        || params.frequency_penalty != 0.0
        || params.presence_penalty != 0.0
}

fn is_below_min_tokens(input: &SampleInput<'_>) -> bool {
    input.answer.len() < input.params.min_tokens as usize
}

/// Bias, penalties and the min-tokens mask.
fn adjust(logits: &mut [f32], input: &SampleInput<'_>) {
    let params = input.params;
    for &(token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    if has_penalty(params) {
        penalise(logits, input);
    }
    if is_below_min_tokens(input) {
        for &token in input.eos.iter().chain(&params.stop_token_ids) {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

fn penalise(logits: &mut [f32], input: &SampleInput<'_>) {
    let params = input.params;
    let mut written: HashMap<TokenId, u16> = HashMap::new();
    for &token in input.answer {
        let count = written.entry(token).or_default();
        *count = count.saturating_add(1);
    }
    let ignored = (params.prompt_ignore_length as usize).min(input.prompt.len());
    let seen: HashSet<TokenId> = input.prompt[ignored..]
        .iter()
        .chain(input.answer)
        .copied()
        .collect();
    for token in seen {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = if *logit > 0.0 {
                *logit / params.repetition_penalty
            } else {
                *logit * params.repetition_penalty
            };
        }
    }
    for (token, count) in written {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit -= params.frequency_penalty * f32::from(count) + params.presence_penalty;
        }
    }
}

/// The lowest id among the greatest logits. The slice has no NaN.
fn argmax(logits: &[f32]) -> TokenId {
    // Sixteen running maxima, so that the compiler can use vector registers.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = logits.chunks_exact(16);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    let best = lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |best, &logit| best.max(logit));
    #[expect(clippy::float_cmp, reason = "the maximum is one of the values")]
    let index = logits.iter().position(|&logit| logit == best).unwrap_or(0);
    TokenId::try_from(index).expect("token ids are 32 bits")
}

/// Refuses NaN and infinities: they mean that the device or the weights are broken.
fn check_finite(logits: &[f32]) -> Result<(), SampleError> {
    const EXPONENT: u32 = 0x7f80_0000;
    let is_broken = |logit: &f32| logit.to_bits() & EXPONENT == EXPONENT;
    // Without an early exit the pass vectorises; broken rows are rare.
    let broken = logits
        .iter()
        .fold(false, |broken, logit| broken | is_broken(logit));
    if !broken {
        return Ok(());
    }
    let index = logits.iter().position(is_broken).unwrap_or(0);
    Err(SampleError::NotFinite {
        token: TokenId::try_from(index).expect("token ids are 32 bits"),
        value: logits[index].to_string(),
    })
}

#[cfg(test)]
mod device;
#[cfg(test)]
pub(crate) use device::{changed, sample_for};
#[cfg(test)]
mod tests;

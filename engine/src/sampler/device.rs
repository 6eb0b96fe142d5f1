//! What a device that chooses tokens must give, by the sampler itself: the specification of such devices' tests and doubles.

use super::*;
use crate::backend::{Changes, Seen};

/// The outcome of a wish. `seen` is what the wish's table holds, the row's own token included.
pub(crate) fn sample_for(
    logits: &[f32],
    wish: &TokenWish,
    seen: &Seen,
) -> Result<Sampled, SampleError> {
    if let Choice::Given(token) = wish.choice {
        let logprobs = wish.logprobs.map(|top| prompt_logprobs(logits, token, top));
        return Ok(Sampled {
            token,
            logprobs: logprobs.transpose()?,
        });
    }
    check_finite(logits)?;
    let changed = changed(logits, wish, seen);
    let best = argmax(&changed);
    let best_logit = changed[best as usize];
    if best_logit == f32::NEG_INFINITY {
        let vocab = logits.len();
        return Err(SampleError::AllMasked { vocab });
    }
    let token = match &wish.choice {
        Choice::Draw(how) => {
            let weights = filter::Weights {
                logits: &changed,
                best: best_logit,
                temperature: how.temperature,
            };
            let (mut order, mut kept) = (Vec::new(), Vec::new());
            filter::keep(&weights, how, &mut order, &mut kept);
            draw(&kept, how.uniform)
        }
        Choice::Best | Choice::Given(_) => best,
    };
    Ok(Sampled {
        token,
        logprobs: wish.logprobs.map(|top| token_logprobs(logits, token, top)),
    })
}

/// The logits that the choice is made by.
pub(crate) fn changed(logits: &[f32], wish: &TokenWish, seen: &Seen) -> Vec<f32> {
    let mut changed = logits.to_vec();
    if let Some(changes) = &wish.changes {
        adjust(&mut changed, &input(&params(changes, seen), seen, logits));
    }
    changed
}

/// A request whose logits are changed like that.
fn params(changes: &Changes, seen: &Seen) -> SamplingParams {
    SamplingParams {
        repetition_penalty: changes.penalties.repetition,
        frequency_penalty: changes.penalties.frequency,
        presence_penalty: changes.penalties.presence,
        logit_bias: seen.biases.clone(),
        min_tokens: if changes.bans { u32::MAX } else { 0 },
        ..SamplingParams::default()
    }
}

fn input<'a>(params: &'a SamplingParams, seen: &'a Seen, logits: &'a [f32]) -> SampleInput<'a> {
    SampleInput {
        params,
        eos: &seen.bannable,
        prompt: &seen.prompt,
        answer: &seen.answer,
        logits,
    }
}

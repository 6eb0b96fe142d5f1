//! The sampler against small closed forms.

use super::*;
use crate::request::Logprob;

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    }
}

fn sample(params: &SamplingParams, answer: &[TokenId], logits: &[f32]) -> Sampled {
    try_sample(params, &[], answer, logits).expect("a token")
}

fn try_sample(
    params: &SamplingParams,
    prompt: &[TokenId],
    answer: &[TokenId],
    logits: &[f32],
) -> Result<Sampled, SampleError> {
    Sampler::default().sample(&SampleInput {
        params,
        eos: &[0],
        prompt,
        answer,
        logits,
    })
}

/// How often each token is drawn over many seeds.
fn frequencies(params: &SamplingParams, logits: &[f32]) -> Vec<f64> {
    const DRAWS: u32 = 20_000;
    let mut counts = vec![0_u32; logits.len()];
    for seed in 0..u64::from(DRAWS) {
        let params = SamplingParams {
            seed,
            ..params.clone()
        };
        counts[sample(&params, &[], logits).token as usize] += 1;
    }
    counts
        .iter()
        .map(|&count| f64::from(count) / f64::from(DRAWS))
        .collect()
}

fn assert_close(actual: &[f64], expected: &[f64]) {
    for (a, e) in actual.iter().zip(expected) {
        // Four standard deviations of 20,000 draws.
        assert!((a - e).abs() < 0.015, "{actual:?} is not {expected:?}");
    }
}

#[test]
fn greedy_takes_the_lowest_id_of_the_best() {
    assert_eq!(sample(&greedy(), &[], &[1.0, 3.0, 3.0]).token, 1);
    let mut logits = vec![-5.0; 1000];
    logits[998] = -1.0;
    logits[37] = -1.0;
    assert_eq!(sample(&greedy(), &[], &logits).token, 37);
    logits[999] = 0.5;
    assert_eq!(sample(&greedy(), &[], &logits).token, 999);
}

#[test]
fn broken_logits_are_an_error() {
    for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = try_sample(&greedy(), &[], &[], &[0.0, broken, 1.0]).expect_err("broken");
        assert!(matches!(error, SampleError::NotFinite { token: 1, .. }));
    }
}

#[test]
fn drawing_follows_the_distribution() {
    let logits = [1.0_f32.ln(), 2.0_f32.ln(), 5.0_f32.ln()];
    let params = SamplingParams::default();
    assert_close(&frequencies(&params, &logits), &[0.125, 0.25, 0.625]);
    let cold = SamplingParams {
        temperature: 0.5,
        ..params
    };
    let squares = 30.0;
    assert_close(
        &frequencies(&cold, &logits),
        &[1.0 / squares, 4.0 / squares, 25.0 / squares],
    );
}

#[test]
fn filters_cut_where_they_should() {
    let logits = [1.0_f32.ln(), 2.0_f32.ln(), 5.0_f32.ln(), 2.0_f32.ln()];
    let top_k = SamplingParams {
        top_k: 2,
        ..SamplingParams::default()
    };
    let expected = [0.0, 2.0 / 7.0, 5.0 / 7.0, 0.0];
    assert_close(&frequencies(&top_k, &logits), &expected);
    let top_p = SamplingParams {
        top_p: 0.69,
        ..SamplingParams::default()
    };
    assert_close(&frequencies(&top_p, &logits), &expected);
    let min_p = SamplingParams {
        min_p: 0.39,
        ..SamplingParams::default()
    };
    let expected = [0.0, 2.0 / 9.0, 5.0 / 9.0, 2.0 / 9.0];
    assert_close(&frequencies(&min_p, &logits), &expected);
    let top_p_of_top_k = SamplingParams {
        top_k: 2,
        top_p: 0.7,
        ..SamplingParams::default()
    };
    assert_close(
        &frequencies(&top_p_of_top_k, &logits),
        &[0.0, 0.0, 1.0, 0.0],
    );
}

#[test]
fn a_flat_distribution_needs_more_tokens_than_the_first_look() {
    let logits = vec![0.0; 5000];
    let params = SamplingParams {
        top_p: 0.5,
        ..SamplingParams::default()
    };
    let mut seen_high = 0;
    for seed in 0..300 {
        let params = SamplingParams {
            seed,
            ..params.clone()
        };
        let token = sample(&params, &[], &logits).token;
        assert!(token < 2500, "{token} is outside the first half");
        seen_high += u32::from(token >= 1250);
    }
    assert!((100..200).contains(&seen_high), "{seen_high} of 300");
}

#[test]
fn a_draw_depends_on_seed_and_index_alone() {
    let logits: Vec<f32> = (0..50_u8).map(|i| f32::from(i % 7)).collect();
    let params = SamplingParams {
        seed: 42,
        ..SamplingParams::default()
    };
    let mut shared = Sampler::default();
    let mut varied = HashSet::new();
    for index in 0..20 {
        let answer = vec![0; index];
        let token = sample(&params, &answer, &logits).token;
        let input = SampleInput {
            params: &params,
            eos: &[],
            prompt: &[1, 2, 3],
            answer: &answer,
            logits: &logits,
        };
        assert_eq!(shared.sample(&input).expect("a token").token, token);
        varied.insert(token);
    }
    assert!(varied.len() > 5, "{varied:?}");
}

#[test]
fn bias_and_penalties_count_as_documented() {
    let biased = SamplingParams {
        logit_bias: vec![(2, 5.0), (99, 1.0)],
        ..greedy()
    };
    assert_eq!(sample(&biased, &[], &[0.0, 4.0, 0.0]).token, 2);

    let frequency = SamplingParams {
        frequency_penalty: 1.0,
        ..greedy()
    };
    assert_eq!(sample(&frequency, &[1], &[0.0, 1.5, 0.0]).token, 1);
    assert_eq!(sample(&frequency, &[1, 1], &[0.0, 1.5, 0.0]).token, 0);

    let presence = SamplingParams {
        presence_penalty: 1.0,
        ..greedy()
    };
    assert_eq!(sample(&presence, &[1, 1], &[0.0, 1.5, 0.0]).token, 1);
    let in_prompt = try_sample(&presence, &[1], &[], &[0.0, 0.5, 0.0]).expect("a token");
    assert_eq!(in_prompt.token, 1);

    let repetition = SamplingParams {
        repetition_penalty: 2.0,
        ..greedy()
    };
    let logits = [0.0, 3.0, 2.0];
    let token = |params: &SamplingParams, prompt: &[TokenId], logits: &[f32]| {
        try_sample(params, prompt, &[], logits)
            .expect("a token")
            .token
    };
    assert_eq!(token(&repetition, &[1, 1], &logits), 2);
    assert_eq!(token(&repetition, &[0], &[-1.0, -1.5, -3.0]), 1);
    let ignoring = SamplingParams {
        prompt_ignore_length: 1,
        ..repetition
    };
    assert_eq!(token(&ignoring, &[1], &logits), 1);
    assert_eq!(token(&ignoring, &[0, 1], &logits), 2);
}

#[test]
fn ends_are_masked_until_min_tokens() {
    let params = SamplingParams {
        min_tokens: 2,
        stop_token_ids: vec![1],
        ..greedy()
    };
    let logits = [3.0, 2.0, 1.0];
    assert_eq!(sample(&params, &[], &logits).token, 2);
    assert_eq!(sample(&params, &[2], &logits).token, 2);
    assert_eq!(sample(&params, &[2, 2], &logits).token, 0);
    let error = try_sample(&params, &[], &[], &logits[..2]).expect_err("nothing is left");
    assert_eq!(error, SampleError::AllMasked { vocab: 2 });
}

#[test]
fn a_very_low_temperature_is_greedy() {
    let params = SamplingParams {
        temperature: f32::MIN_POSITIVE,
        ..SamplingParams::default()
    };
    for seed in 0..50 {
        let params = SamplingParams {
            seed,
            ..params.clone()
        };
        assert_eq!(sample(&params, &[], &[1.0, 1.5, 1.2]).token, 1);
    }
}

#[test]
fn logprobs_are_of_the_raw_distribution_with_ranks() {
    let params = SamplingParams {
        logprobs: Some(2),
        logit_bias: vec![(0, 50.0)],
        ..greedy()
    };
    let logits = [1.0_f32.ln(), 2.0_f32.ln(), 5.0_f32.ln(), 2.0_f32.ln()];
    let sampled = sample(&params, &[], &logits);
    let logprobs = sampled.logprobs.expect("asked for");
    let close = |actual: &Logprob, token: TokenId, probability: f32, rank: u32| {
        assert_eq!((actual.token, actual.rank), (token, rank));
        assert!((actual.logprob - probability.ln()).abs() < 1e-6);
    };
    close(&logprobs.chosen, 0, 0.1, 4);
    assert_eq!(logprobs.top.len(), 2);
    close(&logprobs.top[0], 2, 0.5, 1);
    close(&logprobs.top[1], 1, 0.2, 2);
    let tied = token_logprobs(&logits, 3, 0);
    close(&tied.chosen, 3, 0.2, 3);
    assert!(tied.top.is_empty());
    assert_eq!(token_logprobs(&logits, 3, 99).top.len(), 4);
}

//! From typed flags to what is run: cases with their lengths, load and headline figures. Pure.

use serde::{Deserialize, Serialize};

use super::stats::Summary;
use crate::cli::{LoadArgs, PresetArg, PromptArgs};

/// Requests of a run of which nothing is said.
const REQUESTS_MIN: usize = 64;
/// Rounds of a closed loop of which nothing is said.
const ROUNDS: usize = 4;
/// Most requests of a warm-up of which nothing is said.
pub(super) const WARMUP_MAX: usize = 64;
/// Warm-up requests of an open loop of which nothing is said, and most of them at once.
pub(super) const WARMUP_AT_ONCE: usize = 16;
/// Tokens that warm a preset's batch up.
const PRESET_WARMUP_TOKENS: u32 = 8;

/// A number of tokens, or any between two, each as likely.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lengths {
    pub(super) min: u32,
    pub(super) max: u32,
}

impl Lengths {
    /// Always so many.
    pub(super) const fn fixed(tokens: u32) -> Self {
        Self {
            min: tokens,
            max: tokens,
        }
    }

    /// The range widened by a ratio on both sides; at least one token.
    fn widened((min, max): (u32, u32), ratio: f64) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "lengths are positive, and a cast of a float saturates"
        )]
        let scaled = |tokens: u32, by: f64| (f64::from(tokens) * by).round() as u32;
        Self {
            min: scaled(min, 1.0 - ratio).max(1),
            max: scaled(max, 1.0 + ratio),
        }
    }
}

/// A figure that stands for a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Figure {
    /// Median time to the first token.
    FirstToken,
    /// Median time between two events of a stream that carry tokens.
    InterToken,
    /// Tokens a second while all requests write.
    Decode,
    /// Tokens a second from the first token of all on.
    AfterFirst,
    /// Prompt tokens a second until the last first token.
    Prefill,
    /// Tokens a second over the whole run.
    Output,
}

impl Figure {
    /// In words, with its unit.
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::FirstToken => "TTFT (ms)",
            Self::InterToken => "ITL (ms)",
            Self::Decode => "decode, all writing (tok/s)",
            Self::AfterFirst => "decode, from the first token on (tok/s)",
            Self::Prefill => "prefill (tok/s)",
            Self::Output => "output (tok/s)",
        }
    }

    /// Its value in a run.
    pub(super) fn of(self, summary: &Summary) -> Option<f64> {
        match self {
            Self::FirstToken => summary.ttft_ms.as_ref().map(|times| times.p50),
            Self::InterToken => summary.itl_ms.as_ref().map(|times| times.p50),
            Self::Decode => summary.decode_tokens_per_s,
            Self::AfterFirst => summary.after_first_tokens_per_s,
            Self::Prefill => summary.prefill_tokens_per_s,
            Self::Output => summary.output_tokens_per_s,
        }
    }
}

/// One load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Case {
    /// For people.
    pub(super) name: String,
    /// Requests that are measured.
    pub(super) requests: usize,
    /// Tokens of a prompt; `null` where the dataset says.
    pub(super) input: Option<Lengths>,
    /// Tokens of an answer, where the dataset does not say.
    pub(super) output: Lengths,
    /// Most requests in flight; `null` is no bound.
    pub(super) concurrency: Option<usize>,
    /// Requests a second, at random times; `null` sends as places become free.
    pub(super) request_rate: Option<f64>,
    /// Requests before them.
    pub(super) warmup: usize,
    /// Most tokens of their answers, where they are shorter than the measured ones.
    pub(super) warmup_output: Option<u32>,
    /// What is said of it first.
    pub(super) figures: Vec<Figure>,
}

impl Case {
    /// Requests that can run at once.
    pub(super) fn at_once(&self) -> usize {
        self.concurrency.unwrap_or(self.requests).min(self.requests)
    }

    /// The load that comes before this one: as many at once, as far as an open loop goes, with shorter answers where the case
    /// says so.
    pub(super) fn warming(&self) -> Self {
        let places = match self.request_rate {
            None => self.concurrency,
            Some(_) => Some(self.at_once().min(WARMUP_AT_ONCE)),
        };
        Self {
            requests: self.warmup,
            concurrency: places,
            request_rate: None,
            output: match self.warmup_output {
                Some(most) => Lengths {
                    min: self.output.min.min(most),
                    max: self.output.max.min(most),
                },
                None => self.output,
            },
            ..self.clone()
        }
    }

    /// Whether requests wait for places rather than for their time.
    pub(super) fn is_closed_loop(&self) -> bool {
        self.request_rate.is_none()
    }
}

/// The cases that the flags ask for. `dataset` is the number of its prompts.
pub(super) fn cases(load: &LoadArgs, prompts: &PromptArgs, dataset: Option<usize>) -> Vec<Case> {
    match load.preset {
        Some(PresetArg::Standard) => preset(&STANDARD),
        Some(PresetArg::Smoke) => preset(&SMOKE),
        None => vec![custom(load, prompts, dataset)],
    }
}

fn custom(load: &LoadArgs, prompts: &PromptArgs, dataset: Option<usize>) -> Case {
    // All at once is no rate.
    let request_rate = load.request_rate.filter(|rate| rate.is_finite());
    let concurrency = match load.request_rate {
        None => Some(load.concurrency.unwrap_or(1)),
        Some(_) => load.concurrency,
    };
    let rounds = concurrency.unwrap_or(1).saturating_mul(ROUNDS);
    let requests = load
        .num_prompts
        .or(dataset)
        .unwrap_or(rounds.max(REQUESTS_MIN));
    let output = Lengths::widened(prompts.output_len, prompts.range_ratio);
    let input = dataset
        .is_none()
        .then(|| Lengths::widened(prompts.input_len, prompts.range_ratio));
    let mut case = Case {
        name: "load".to_owned(),
        requests,
        input,
        output,
        concurrency,
        request_rate,
        warmup: 0,
        warmup_output: None,
        figures: vec![Figure::FirstToken, Figure::InterToken, Figure::Output],
    };
    let enough = match request_rate {
        None => case.at_once().min(WARMUP_MAX),
        Some(_) => case.at_once().min(WARMUP_AT_ONCE),
    };
    case.warmup = load.warmup.unwrap_or(enough);
    case
}

/// A row of a preset: requests, tokens in and out, all at once.
type Row = (&'static str, usize, u32, u32, &'static [Figure]);

const DECODE: &[Figure] = &[Figure::Decode, Figure::AfterFirst];
const FIRST: &[Figure] = &[Figure::FirstToken];

/// What engines are compared by.
const STANDARD: [Row; 10] = [
    ("decode, 1 sequence", 1, 128, 128, &[Figure::Decode]),
    ("decode, 16 sequences", 16, 128, 256, DECODE),
    ("decode, 64 sequences", 64, 128, 256, DECODE),
    ("decode, 256 sequences", 256, 128, 256, DECODE),
    ("1 × 128", 1, 128, 2, FIRST),
    ("1 × 2,048", 1, 2048, 2, FIRST),
    ("1 × 8,192", 1, 8192, 2, FIRST),
    ("32 × 2,048", 32, 2048, 1, &[Figure::Prefill]),
    (
        "256 × 1,000 in, 1,000 out",
        256,
        1000,
        1000,
        &[Figure::Output],
    ),
    ("64 × 2,048 in, 128 out", 64, 2048, 128, &[Figure::Output]),
];

/// The same kinds of measures where minutes are too long.
const SMOKE: [Row; 5] = [
    ("decode, 1 sequence", 1, 16, 16, &[Figure::Decode]),
    ("decode, 4 sequences", 4, 16, 12, DECODE),
    ("1 × 64", 1, 64, 2, FIRST),
    ("2 × 64", 2, 64, 1, &[Figure::Prefill]),
    ("6 × 32 in, 8 out", 6, 32, 8, &[Figure::Output]),
];

fn preset(rows: &[Row]) -> Vec<Case> {
    let case = |(name, requests, input, output, figures): &Row| Case {
        name: (*name).to_owned(),
        requests: *requests,
        input: Some(Lengths::fixed(*input)),
        output: Lengths::fixed(*output),
        concurrency: None,
        request_rate: None,
        warmup: *requests,
        warmup_output: Some(PRESET_WARMUP_TOKENS.min(*output)),
        figures: figures.to_vec(),
    };
    rows.iter().map(case).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{BenchCommand, Cli, Command, normalise};

    fn planned(flags: &str, dataset: Option<usize>) -> Case {
        let line = format!("baton bench serve --url http://h:1 {flags}");
        let words = line.split_whitespace().map(Into::into);
        let cli = Cli::try_parse_from(normalise(words)).unwrap();
        let Command::Bench(BenchCommand::Serve(args)) = cli.command else {
            panic!("{line}")
        };
        let mut cases = cases(&args.load, &args.prompts, dataset);
        assert_eq!(cases.len(), 1);
        cases.remove(0)
    }

    #[test]
    fn one_request_at_a_time_is_the_default() {
        let case = planned("", None);
        assert_eq!(case.concurrency, Some(1));
        assert_eq!((case.requests, case.warmup), (64, 1));
        assert_eq!(case.input, Some(Lengths::fixed(1024)));
        assert_eq!(case.output, Lengths::fixed(128));
        assert!(case.is_closed_loop());
    }

    #[test]
    fn names_of_other_tools_mean_the_same() {
        for flags in [
            "--isl 100 --osl 20 --range-ratio 0.5 --concurrency 32 --warmup 3 --num-prompts 99",
            "--random-input-len 100 --random_output_len 20 --random-range-ratio 0.5 --max-concurrency 32 --num-warmups 3 --num-requests 99",
        ] {
            let case = planned(flags, None);
            assert_eq!(case.input, Some(Lengths { min: 50, max: 150 }));
            assert_eq!(case.output, Lengths { min: 10, max: 30 });
            assert_eq!(
                (case.concurrency, case.warmup, case.requests),
                (Some(32), 3, 99)
            );
        }
        let case = planned("--isl 5-9", None);
        assert_eq!(case.input, Some(Lengths { min: 5, max: 9 }));
    }

    #[test]
    fn a_rate_has_no_bound_of_its_own_and_inf_is_no_rate() {
        let case = planned("--request-rate 2.5", None);
        assert_eq!((case.request_rate, case.concurrency), (Some(2.5), None));
        assert_eq!(case.at_once(), 64);
        let case = planned("--request-rate inf --concurrency 8", None);
        assert_eq!((case.request_rate, case.concurrency), (None, Some(8)));
        assert!(case.is_closed_loop());
    }

    #[test]
    fn a_dataset_says_how_many_and_how_long() {
        let case = planned("--concurrency 4", Some(7));
        assert_eq!((case.requests, case.input), (7, None));
        let case = planned("--num-prompts 3", Some(7));
        assert_eq!(case.requests, 3);
    }

    #[test]
    fn a_preset_is_all_at_once_with_a_short_warm_up() {
        let cases = preset(&STANDARD);
        let large = &cases[8];
        assert_eq!(
            (large.requests, large.at_once(), large.warmup),
            (256, 256, 256)
        );
        assert_eq!(large.warmup_output, Some(8));
        assert_eq!(cases[7].warmup_output, Some(1));
        assert!(cases.iter().all(|case| !case.figures.is_empty()));
    }
}

//! The arguments of `baton bench serve`.
//!
//! Names are those that people know from vLLM's `bench serve` and TensorRT-LLM's `benchmark_serving`; theirs that differ
//! are aliases.

use std::path::PathBuf;

use clap::{Arg, ArgAction, Args, ValueEnum};

use super::{at_least_one, seconds};
use crate::cli::{EngineArgs, LogLevel};

#[derive(Debug, Args)]
pub(crate) struct BenchServeArgs {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) prompts: PromptArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    #[command(flatten)]
    pub(crate) result: ResultArgs,
    /// LLM options file (YAML) of the engine. Wins over the command line.
    #[arg(
        long,
        alias = "extra-llm-api-options",
        value_name = "FILE",
        requires = "offline",
        help_heading = ENGINE
    )]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// The side that runs the engine; `bench serve --offline` starts it.
    #[arg(long, hide = true, requires = "offline")]
    pub(crate) engine_side: bool,
    #[arg(
        short,
        long,
        value_enum,
        default_value = "warning",
        value_name = "LEVEL"
    )]
    #[arg(hide_possible_values = true, help_heading = "Result")]
    pub(crate) log_level: LogLevel,
}

/// Where the engine's options stand, as [`EngineArgs`] has it.
const ENGINE: &str = "Engine";

/// Options of the engine belong to `--offline`; a screen has no room for them.
pub(super) fn without_engine_options(arg: Arg) -> Arg {
    let hides = arg.get_help_heading() == Some(ENGINE) || arg.is_hide_short_help_set();
    arg.hide_short_help(hides)
}

/// What is measured.
#[derive(Debug, Args)]
#[command(next_help_heading = "Target")]
pub(crate) struct TargetArgs {
    /// A server or a proxy: http://HOST:PORT.
    #[arg(long, alias = "base-url", value_name = "URL")]
    #[arg(required_unless_present_any = ["disagg_config_file", "offline"])]
    pub(crate) url: Option<String>,
    /// The deployment of a disagg_config.yaml, in place of --url.
    #[arg(short = 'c', long, value_name = "FILE", conflicts_with = "url")]
    pub(crate) disagg_config_file: Option<PathBuf>,
    /// The engine alone: this model, in a process of its own, without HTTP.
    ///
    /// Takes the engine's options of `baton serve`, which `--help` lists.
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["url", "disagg_config_file"])]
    pub(crate) offline: Option<String>,
    /// Model name to ask for [default: the config's, else the server's first].
    #[arg(long, value_name = "NAME", conflicts_with = "offline")]
    pub(crate) model: Option<String>,
    /// completions or chat; their paths are understood too.
    #[arg(
        long,
        value_enum,
        default_value_t,
        hide_possible_values = true,
        value_name = "NAME"
    )]
    pub(crate) endpoint: EndpointArg,
    /// Wait so long for /health, or for the engine to load [default: 0, 1800].
    #[arg(long, alias = "ready-check-timeout-sec", value_name = "SECONDS", value_parser = seconds)]
    pub(crate) wait: Option<u64>,
}

/// How requests come.
#[derive(Debug, Args)]
#[command(next_help_heading = "Load")]
pub(crate) struct LoadArgs {
    /// Requests to measure [default: the dataset's, else 4 × concurrency, 64 or more].
    #[arg(long, alias = "num-requests", value_name = "N", value_parser = at_least_one)]
    pub(crate) num_prompts: Option<usize>,
    /// Keep so many in flight; with a rate, at most so many [default: 1; no bound].
    #[arg(long, alias = "max-concurrency", value_name = "N", value_parser = at_least_one)]
    pub(crate) concurrency: Option<usize>,
    /// Requests a second, at random times (Poisson); `inf` sends all at once.
    #[arg(long, value_name = "R", value_parser = request_rate)]
    pub(crate) request_rate: Option<f64>,
    /// Requests before them, not measured [default: one for each place, at most 64].
    ///
    /// With a rate, 16, all at once.
    #[arg(long, alias = "num-warmups", value_name = "N")]
    pub(crate) warmup: Option<usize>,
    /// Do all of it so often; medians are shown.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub(crate) repeat: usize,
    /// Prompts, lengths and times follow from it.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Longest time for one request.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = seconds)]
    pub(crate) request_timeout: u64,
    /// `standard` or `smoke`: a fixed set of measures, in place of lengths and load.
    ///
    /// `standard` is what engines are compared by: decode at 1, 16, 64 and 256 sequences; time to the first token of 128,
    /// 2,048 and 8,192; prefill of 32 × 2,048; output of 256 × 1,000/1,000 and 64 × 2,048/128 tokens. `smoke` has the same
    /// kinds of measures on a scale of seconds.
    #[arg(long, value_enum, hide_possible_values = true, value_name = "NAME", conflicts_with_all = [
        "num_prompts", "concurrency", "request_rate", "warmup", "input_len", "output_len", "range_ratio", "dataset",
    ])]
    pub(crate) preset: Option<PresetArg>,
}

/// What requests say.
#[derive(Debug, Args)]
#[command(next_help_heading = "Requests")]
pub(crate) struct PromptArgs {
    /// Tokens of a prompt: N, or MIN-MAX for any number between.
    #[arg(long, aliases = ["isl", "random-input-len"], value_name = "N", default_value = "1024", value_parser = length)]
    pub(crate) input_len: (u32, u32),
    /// Tokens of an answer, likewise.
    #[arg(long, aliases = ["osl", "random-output-len"], value_name = "N", default_value = "128", value_parser = length)]
    pub(crate) output_len: (u32, u32),
    /// Vary lengths from N × (1 - R) to N × (1 + R).
    #[arg(long, alias = "random-range-ratio", value_name = "R", default_value_t = 0.0, value_parser = ratio)]
    pub(crate) range_ratio: f64,
    /// Prompts of a file.
    ///
    /// A JSON array of texts, or lines of {"prompt": text or token ids, "output_len": N}.
    #[arg(long, alias = "dataset-path", value_name = "FILE", conflicts_with_all = ["input_len", "range_ratio"])]
    pub(crate) dataset: Option<PathBuf>,
    /// Random prompts as token `ids`, of exact length, or as `text`.
    #[arg(
        long,
        value_enum,
        default_value_t,
        conflicts_with = "dataset",
        hide_possible_values = true,
        value_name = "KIND"
    )]
    pub(crate) prompt_format: PromptFormatArg,
    /// Draw ids from the middle of N [default: the server's, else 32000].
    ///
    /// A sixteenth at both ends is left out: special tokens are there.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(16..))]
    pub(crate) vocab_size: Option<u32>,
    /// Write answers of exactly the asked length.
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    pub(crate) ignore_eos: bool,
    /// Further fields of each request: a JSON object.
    #[arg(long, value_name = "JSON", conflicts_with = "offline")]
    pub(crate) extra_body: Option<String>,
}

/// How tokens are chosen; what is not said is left to the server.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// 0 is greedy.
    #[arg(long, help_heading = "Requests", value_name = "T", default_value_t = 0.0, value_parser = number::<0, 2>)]
    pub(crate) temperature: f32,
    /// Keep the smallest set whose mass reaches P.
    #[arg(long, hide_short_help = true, value_name = "P", value_parser = part_of_one)]
    pub(crate) top_p: Option<f32>,
    /// Keep the K best; 0 keeps all.
    #[arg(long, hide_short_help = true, value_name = "K")]
    pub(crate) top_k: Option<u32>,
    /// Keep what is at least so likely relative to the best.
    #[arg(long, hide_short_help = true, value_name = "P", value_parser = number::<0, 1>)]
    pub(crate) min_p: Option<f32>,
    /// Divide logits of tokens seen in prompt or answer.
    #[arg(long, hide_short_help = true, value_name = "R", value_parser = above_zero)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Subtract for each occurrence in the answer.
    #[arg(long, hide_short_help = true, value_name = "F", allow_negative_numbers = true, value_parser = number::<-2, 2>)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Subtract once for tokens in the answer.
    #[arg(long, hide_short_help = true, value_name = "F", allow_negative_numbers = true, value_parser = number::<-2, 2>)]
    pub(crate) presence_penalty: Option<f32>,
    /// Ask for log-probabilities, with the N best of each place.
    #[arg(long, hide_short_help = true, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=20))]
    pub(crate) logprobs: Option<u32>,
}

/// What is made of it.
#[derive(Debug, Args)]
#[command(next_help_heading = "Result")]
pub(crate) struct ResultArgs {
    /// Write the report as JSON here; `-` prints it in place of the table.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Put every request's times into the JSON.
    #[arg(long, alias = "save-detailed", requires = "json")]
    pub(crate) save_requests: bool,
    /// Count requests within limits in ms: ttft:200 tpot:20 e2el:5000.
    #[arg(long, value_name = "WHAT:MS", num_args = 1.., value_parser = objective)]
    pub(crate) goodput: Vec<(ObjectiveArg, f64)>,
    /// What does not make the run invalid: length,saturated,warmup,short.
    ///
    /// length: answers or prompts that are not as long as asked for. saturated: the client itself was late. warmup: fewer
    /// warm-up requests than run at once. short: too little was measured for a steady load. Without it each of them ends the
    /// command with exit code 80; failed requests end it with 1 in any case.
    #[arg(
        long,
        value_enum,
        value_name = "FINDING",
        value_delimiter = ',',
        hide_possible_values = true
    )]
    pub(crate) accept: Vec<FindingArg>,
}

/// `--endpoint`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum EndpointArg {
    #[default]
    #[value(alias = "/v1/completions")]
    Completions,
    #[value(alias = "/v1/chat/completions")]
    Chat,
}

/// `--prompt-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum PromptFormatArg {
    #[default]
    Ids,
    Text,
}

/// `--preset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PresetArg {
    Standard,
    Smoke,
}

/// What `--goodput` limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ObjectiveArg {
    FirstToken,
    TokenTime,
    EndToEnd,
}

/// `--accept`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FindingArg {
    /// Answers or prompts that are not as long as asked for.
    Length,
    /// The client itself was late.
    Saturated,
    /// Fewer warm-up requests than run at once.
    Warmup,
    /// Too little was measured for a steady state.
    Short,
}

fn length(text: &str) -> Result<(u32, u32), String> {
    let number = |text: &str| text.trim().parse::<u32>().ok().filter(|number| *number > 0);
    let range = match text.split_once('-') {
        Some((min, max)) => number(min).zip(number(max)),
        None => number(text).map(|number| (number, number)),
    };
    range
        .filter(|(min, max)| min <= max)
        .ok_or_else(|| "expected a number of tokens, or MIN-MAX".to_owned())
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if (0.0..1.0).contains(&ratio) => Ok(ratio),
        Ok(_) | Err(_) => Err("expected a ratio from 0 to below 1".to_owned()),
    }
}

fn number<const MIN: i16, const MAX: i16>(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(number) if (f32::from(MIN)..=f32::from(MAX)).contains(&number) => Ok(number),
        Ok(_) | Err(_) => Err(format!("expected a number from {MIN} to {MAX}")),
    }
}

fn part_of_one(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(part) if part > 0.0 && part <= 1.0 => Ok(part),
        Ok(_) | Err(_) => Err("expected a number above 0, at most 1".to_owned()),
    }
}

fn above_zero(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number),
        Ok(_) | Err(_) => Err("expected a number above 0".to_owned()),
    }
}

fn request_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 => Ok(rate),
        Ok(_) | Err(_) => Err("expected requests a second, more than 0, or inf".to_owned()),
    }
}

fn objective(text: &str) -> Result<(ObjectiveArg, f64), String> {
    let expected = || "expected ttft:MS, tpot:MS or e2el:MS".to_owned();
    let (what, limit) = text.split_once(':').ok_or_else(expected)?;
    let what = match what {
        "ttft" => ObjectiveArg::FirstToken,
        "tpot" => ObjectiveArg::TokenTime,
        "e2el" => ObjectiveArg::EndToEnd,
        _ => return Err(expected()),
    };
    match limit.parse::<f64>() {
        Ok(limit) if limit.is_finite() && limit > 0.0 => Ok((what, limit)),
        Ok(_) | Err(_) => Err(expected()),
    }
}

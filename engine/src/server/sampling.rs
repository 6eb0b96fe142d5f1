//! The fields that completions and chat share: sampling, stopping, text, streaming (COMPAT.md §10.5).

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::backend::TokenId;
use crate::request::SamplingParams;
use crate::server::disagg::{self, Phase};
use crate::server::error::ApiError;
use crate::server::fields::{Fields, Kind, kind, parse, wrong_type};

/// Most answers to one prompt.
pub(super) const CHOICES_MAX: u32 = 128;

/// Most alternatives with each token.
pub(super) const LOGPROBS_MAX: u32 = 20;

/// Most stop strings.
const STOPS_MAX: usize = 64;

/// Longest stop string.
const STOP_BYTES_MAX: usize = 1024;

/// Most stop tokens.
const STOP_TOKENS_MAX: usize = 1024;

/// What this server can take and what a request gets that does not say.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Limits {
    /// Tokens are `0..vocab`.
    pub(crate) vocab: u32,
    /// Prompt and answer together.
    pub(crate) max_seq_len: u32,
    /// The model's own sampling defaults.
    pub(crate) defaults: SamplingParams,
}

/// How tokens become text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TextOptions {
    pub(super) stop: Vec<String>,
    pub(super) include_stop: bool,
    /// Tokens before which no stop string counts.
    pub(super) min_tokens: u32,
    pub(super) skip_special_tokens: bool,
    pub(super) spaces_between_special_tokens: bool,
    pub(super) detokenize: bool,
}

/// How a stream reports usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct StreamUsage {
    /// A last chunk with the usage.
    pub(super) at_end: bool,
    /// Usage in every chunk.
    pub(super) continuous: bool,
}

/// The shared fields of a request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Common {
    pub(super) n: u32,
    pub(super) best_of: u32,
    /// `None`: no streaming.
    pub(super) stream: Option<StreamUsage>,
    pub(super) echo: bool,
    /// Everything but `max_tokens`; `seed` is that of the first choice.
    pub(super) sampling: SamplingParams,
    /// As asked for; `None` goes on to the longest sequence.
    pub(super) max_tokens: Option<u32>,
    pub(super) text: TextOptions,
    pub(super) truncate_prompt_tokens: Option<u32>,
    pub(super) cache_salt: Option<String>,
    pub(super) phase: Phase,
}

/// Reads the shared fields; `logprobs` and the name of `max_tokens` are the caller's.
pub(super) fn read_common(
    fields: &mut Fields<'_>,
    limits: &Limits,
    max_tokens: Option<u32>,
    logprobs: Option<u32>,
) -> Result<Common, ApiError> {
    read_ignored(fields)?;
    read_refused(fields)?;
    let (n, best_of) = read_choices(fields)?;
    let stream = read_stream(fields)?;
    let mut sampling = read_sampling(fields, limits)?;
    sampling.logprobs = logprobs;
    let text = read_text(fields, sampling.min_tokens)?;
    let common = Common {
        n,
        best_of,
        stream,
        echo: fields.bool("echo", false)?,
        sampling,
        max_tokens,
        text,
        truncate_prompt_tokens: fields.count("truncate_prompt_tokens", 1, u32::MAX)?,
        cache_salt: fields.text("cache_salt")?,
        phase: disagg::read_phase(fields, limits)?,
    };
    check_together(&common)?;
    Ok(common)
}

fn check_together(common: &Common) -> Result<(), ApiError> {
    if let Some(max_tokens) = common.max_tokens
        && common.sampling.min_tokens > max_tokens
    {
        return Err(ApiError::field(
            "min_tokens",
            format!(
                "expected at most max_tokens, {max_tokens}, got {}",
                common.sampling.min_tokens
            ),
        ));
    }
    if common.stream.is_some() && common.best_of > common.n {
        return Err(ApiError::field(
            "best_of",
            "the best answers are known at the end only, so best_of must equal n when streaming",
        ));
    }
    if common.phase.is_split() && common.best_of > 1 {
        return Err(ApiError::field(
            "n",
            "a request that is handed off has exactly one answer",
        ));
    }
    if matches!(common.phase, Phase::Context { .. }) && common.stream.is_some() {
        return Err(ApiError::field(
            "stream",
            "a context_only request is not streamed",
        ));
    }
    Ok(())
}

/// Fields that change nothing about an answer of this server; only their types are checked.
fn read_ignored(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    fields.text("user")?;
    // Routing hints: the proxy has read them, and a worker has nothing to choose.
    for name in ["conversation_params", "agent_hierarchy"] {
        let expected = "an object";
        if let Some(raw) = fields.raw(name)
            && kind(raw) != Kind::Object
        {
            return Err(wrong_type(name, raw, expected));
        }
    }
    Ok(())
}

/// Fields of the protocol that this engine does not serve.
fn read_refused(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    const NOT_SERVED: &str = "is not served by this engine";
    const REFUSED: &[(&str, &[&str])] = &[
        ("use_beam_search", &["false"]),
        ("length_penalty", &["1.0", "1"]),
        ("early_stopping", &["false"]),
        ("top_p_min", &["0.0", "0"]),
        ("lora_request", &[]),
        ("return_context_logits", &["false"]),
        ("thinking_token_budget", &[]),
        ("priority", &[]),
        ("metadata", &["{}"]),
        ("store", &["false"]),
        ("service_tier", &["\"auto\"", "\"default\""]),
    ];
    for (name, neutral) in REFUSED {
        fields.neutral(name, neutral, NOT_SERVED)?;
    }
    fields.neutral(
        "response_format",
        &[r#"{"type":"text"}"#],
        "only plain text is served by this engine",
    )
}

fn read_choices(fields: &mut Fields<'_>) -> Result<(u32, u32), ApiError> {
    let n = fields.count("n", 1, CHOICES_MAX)?.unwrap_or(1);
    let best_of = fields.count("best_of", 1, CHOICES_MAX)?.unwrap_or(n);
    if best_of < n {
        return Err(ApiError::field(
            "best_of",
            format!("expected at least n, {n}, got {best_of}"),
        ));
    }
    Ok((n, best_of))
}

fn read_stream(fields: &mut Fields<'_>) -> Result<Option<StreamUsage>, ApiError> {
    let stream = fields.bool("stream", false)?;
    let Some(options) = fields.raw("stream_options") else {
        return Ok(stream.then(StreamUsage::default));
    };
    if !stream {
        return Err(ApiError::field(
            "stream_options",
            "allowed only when `stream` is true",
        ));
    }
    if kind(options) != Kind::Object {
        return Err(wrong_type("stream_options", options, "an object"));
    }
    let mut options = Fields::read(options.get().as_bytes())?;
    let usage = StreamUsage {
        at_end: options.bool("include_usage", true)?,
        continuous: options.bool("continuous_usage_stats", false)?,
    };
    options.neutral(
        "include_obfuscation",
        &["false"],
        "is not served by this engine",
    )?;
    options.finish()?;
    Ok(Some(usage))
}

fn read_sampling(fields: &mut Fields<'_>, limits: &Limits) -> Result<SamplingParams, ApiError> {
    let defaults = &limits.defaults;
    let penalty = |value: f64| (-2.0..=2.0).contains(&value);
    Ok(SamplingParams {
        temperature: fields
            .number("temperature", "a number of at least 0", |value| {
                value >= 0.0
            })?
            .unwrap_or(defaults.temperature),
        top_p: fields
            .number("top_p", "a number above 0 and at most 1", |value| {
                value > 0.0 && value <= 1.0
            })?
            .unwrap_or(defaults.top_p),
        top_k: read_top_k(fields)?.unwrap_or(defaults.top_k),
        min_p: fields
            .number("min_p", "a number from 0 to 1", |value| {
                (0.0..=1.0).contains(&value)
            })?
            .unwrap_or(defaults.min_p),
        repetition_penalty: fields
            .number("repetition_penalty", "a number above 0", |value| {
                value > 0.0
            })?
            .unwrap_or(defaults.repetition_penalty),
        frequency_penalty: fields
            .number("frequency_penalty", "a number from -2 to 2", penalty)?
            .unwrap_or(defaults.frequency_penalty),
        presence_penalty: fields
            .number("presence_penalty", "a number from -2 to 2", penalty)?
            .unwrap_or(defaults.presence_penalty),
        prompt_ignore_length: fields
            .count("prompt_ignore_length", 0, u32::MAX)?
            .unwrap_or(0),
        logit_bias: read_logit_bias(fields, limits.vocab)?,
        seed: read_seed(fields)?.unwrap_or_else(random_seed),
        max_tokens: 1,
        min_tokens: fields.count("min_tokens", 0, u32::MAX)?.unwrap_or(0),
        ignore_eos: fields.bool("ignore_eos", false)?,
        stop_token_ids: read_stop_tokens(fields, limits.vocab)?,
        logprobs: None,
        prompt_logprobs: None,
    })
}

/// 0 keeps all; so does -1, which is how other servers' clients say it.
fn read_top_k(fields: &mut Fields<'_>) -> Result<Option<u32>, ApiError> {
    let expected = "a whole number of at least 0";
    let Some(raw) = fields.raw("top_k") else {
        return Ok(None);
    };
    match parse::<i64>("top_k", raw, expected)? {
        -1 => Ok(Some(0)),
        value => u32::try_from(value)
            .map(Some)
            .map_err(|_| wrong_type("top_k", raw, expected)),
    }
}

/// Any 64-bit integer, signed or not.
fn read_seed(fields: &mut Fields<'_>) -> Result<Option<u64>, ApiError> {
    let Some(raw) = fields.raw("seed") else {
        return Ok(None);
    };
    if let Ok(seed) = serde_json::from_str::<u64>(raw.get()) {
        return Ok(Some(seed));
    }
    parse::<i64>("seed", raw, "a 64-bit integer").map(|seed| Some(seed.cast_unsigned()))
}

fn random_seed() -> u64 {
    // The halves of a random uuid have their fixed bits in different places.
    let (high, low) = Uuid::new_v4().as_u64_pair();
    high ^ low
}

fn read_logit_bias(fields: &mut Fields<'_>, vocab: u32) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let name = "logit_bias";
    let expected = "an object of token ids and numbers from -100 to 100";
    let Some(raw) = fields.raw(name) else {
        return Ok(Vec::new());
    };
    let biases: BTreeMap<String, f32> = parse(name, raw, expected)?;
    let mut list = Vec::with_capacity(biases.len());
    for (key, bias) in biases {
        let token = key.parse().ok().filter(|token| *token < vocab);
        let Some(token) = token else {
            return Err(ApiError::field(
                name,
                format!("expected token ids below {vocab}, got {}", brief(&key)),
            ));
        };
        if !(-100.0..=100.0).contains(&bias) {
            return Err(ApiError::field(
                name,
                format!("expected numbers from -100 to 100, got {bias} for token {token}"),
            ));
        }
        list.push((token, bias));
    }
    Ok(list)
}

fn read_stop_tokens(fields: &mut Fields<'_>, vocab: u32) -> Result<Vec<TokenId>, ApiError> {
    let name = "stop_token_ids";
    let tokens: Vec<TokenId> = fields
        .take(name, "a list of token ids")?
        .unwrap_or_default();
    if tokens.len() > STOP_TOKENS_MAX {
        return Err(ApiError::field(
            name,
            format!(
                "expected at most {STOP_TOKENS_MAX} tokens, got {}",
                tokens.len()
            ),
        ));
    }
    check_vocab(name, &tokens, vocab)?;
    Ok(tokens)
}

/// Refuses tokens outside the vocabulary.
pub(super) fn check_vocab(name: &str, tokens: &[TokenId], vocab: u32) -> Result<(), ApiError> {
    match tokens.iter().find(|token| **token >= vocab) {
        Some(token) => Err(ApiError::field(
            name,
            format!("expected token ids below {vocab}, got {token}"),
        )),
        None => Ok(()),
    }
}

fn read_text(fields: &mut Fields<'_>, min_tokens: u32) -> Result<TextOptions, ApiError> {
    let options = TextOptions {
        stop: read_stops(fields)?,
        include_stop: fields.bool("include_stop_str_in_output", false)?,
        min_tokens,
        skip_special_tokens: fields.bool("skip_special_tokens", true)?,
        // The protocol's default is true, but no fast tokenizer does it unless told to.
        spaces_between_special_tokens: fields.bool("spaces_between_special_tokens", false)?,
        detokenize: fields.bool("detokenize", true)?,
    };
    if !options.detokenize && !options.stop.is_empty() {
        return Err(ApiError::field(
            "stop",
            "stop strings need text, but `detokenize` is false",
        ));
    }
    Ok(options)
}

fn read_stops(fields: &mut Fields<'_>) -> Result<Vec<String>, ApiError> {
    let expected = "a string or a list of strings";
    let Some(raw) = fields.raw("stop") else {
        return Ok(Vec::new());
    };
    let stops: Vec<String> = match kind(raw) {
        Kind::Text => vec![parse("stop", raw, expected)?],
        Kind::Null | Kind::Bool | Kind::Number | Kind::List | Kind::Object => {
            parse("stop", raw, expected)?
        }
    };
    if stops.len() > STOPS_MAX {
        return Err(ApiError::field(
            "stop",
            format!("expected at most {STOPS_MAX} strings, got {}", stops.len()),
        ));
    }
    for stop in &stops {
        if stop.is_empty() || stop.len() > STOP_BYTES_MAX {
            return Err(ApiError::field(
                "stop",
                format!(
                    "expected strings of 1 to {STOP_BYTES_MAX} bytes, got one of {}",
                    stop.len()
                ),
            ));
        }
    }
    Ok(stops)
}

fn brief(text: &str) -> String {
    format!("{:?}", text.chars().take(24).collect::<String>())
}

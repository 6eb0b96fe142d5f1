//! What requests say and when they go: all of it follows from the seed. Pure, but for reading the dataset.
//!
//! A prompt is made when its request goes, not before: ten thousand long ones need no memory. Invariant: the same seed,
//! case and request give the same prompt, length and time, whatever ran before.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use serde_json::Value;

use super::plan::{Case, Lengths};

/// Largest dataset.
const DATASET_BYTES_MAX: u64 = 1 << 30;
/// A vocabulary of which nothing is known: no model in use has a smaller one.
const VOCAB_USUAL: u32 = 32_000;

/// Words of one token each in the usual vocabularies, the blank before them included.
const WORDS: [&str; 16] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "was", "with", "as", "on", "are", "by",
    "this", "from",
];

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Prompt {
    /// Token ids.
    Ids(Vec<u32>),
    /// Text.
    Text(String),
}

/// A line of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    prompt: Prompt,
    output: Option<u32>,
}

/// Where prompts come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// Random ids.
    Ids(Range<u32>),
    /// Random words.
    Words,
    /// A file's, in its order, again and again.
    Dataset(Vec<Entry>),
}

impl Source {
    /// Random ids of a vocabulary, without its ends, where special tokens are.
    pub(super) fn ids(vocab: Option<u32>) -> Self {
        let vocab = vocab.unwrap_or(VOCAB_USUAL);
        Self::Ids(vocab / 16..vocab - vocab / 16)
    }

    /// Prompts of a file.
    ///
    /// # Errors
    /// When it cannot be read, or a line is no prompt.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let name = path.display();
        let bytes = std::fs::metadata(path)
            .with_context(|| format!("cannot read {name}"))?
            .len();
        if bytes > DATASET_BYTES_MAX {
            return Err(anyhow!(
                "{name} has {bytes} bytes, more than {DATASET_BYTES_MAX}"
            ));
        }
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {name}"))?;
        let entries = entries(&text).with_context(|| name.to_string())?;
        if entries.is_empty() {
            return Err(anyhow!("{name} has no prompt"));
        }
        Ok(Self::Dataset(entries))
    }

    /// How many prompts a file has.
    pub(super) fn count(&self) -> Option<usize> {
        match self {
            Self::Dataset(entries) => Some(entries.len()),
            Self::Ids(_) | Self::Words => None,
        }
    }
}

#[derive(Deserialize)]
struct Line {
    prompt: Value,
    #[serde(alias = "output_tokens", alias = "max_tokens")]
    output_len: Option<u32>,
}

fn entries(text: &str) -> anyhow::Result<Vec<Entry>> {
    if text.trim_start().starts_with('[') {
        let list: Vec<Value> = serde_json::from_str(text).context("expected a JSON array")?;
        let numbered = list.into_iter().enumerate();
        return numbered
            .map(|(index, value)| entry(value).with_context(|| format!("prompt {}", index + 1)))
            .collect();
    }
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            let value = serde_json::from_str(line).context("expected a JSON object a line");
            value
                .and_then(entry)
                .with_context(|| format!("line {}", index + 1))
        })
        .collect()
}

fn entry(value: Value) -> anyhow::Result<Entry> {
    if let Value::String(text) = value {
        return Ok(Entry {
            prompt: Prompt::Text(text),
            output: None,
        });
    }
    let line: Line = serde_json::from_value(value).map_err(|error| {
        anyhow!("expected a text or {{\"prompt\": …, \"output_len\": N}}: {error}")
    })?;
    let prompt = match line.prompt {
        Value::String(text) => Prompt::Text(text),
        ids => Prompt::Ids(
            serde_json::from_value(ids).context("`prompt` is neither a text nor token ids")?,
        ),
    };
    if line.output_len == Some(0) {
        return Err(anyhow!("`output_len` is 0, must be at least 1"));
    }
    Ok(Entry {
        prompt,
        output: line.output_len,
    })
}

/// A request that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) index: usize,
    /// After the begin of the run.
    pub(super) due: Duration,
    pub(super) prompt: Prompt,
    pub(super) output: u32,
}

impl Item {
    /// Tokens of the prompt, where they are known.
    pub(super) fn input_tokens(&self) -> Option<u32> {
        match &self.prompt {
            Prompt::Ids(ids) => Some(u32::try_from(ids.len()).unwrap_or(u32::MAX)),
            Prompt::Text(_) => None,
        }
    }
}

/// The requests of one run of one case.
#[derive(Debug, Clone)]
pub(super) struct Requests {
    source: Source,
    case: Case,
    seed: u64,
    /// Keeps runs of one seed apart: no prompt of one is found in the cache of another.
    run: u64,
}

impl Requests {
    pub(super) fn new(source: Source, case: Case, seed: u64, run: u64) -> Self {
        Self {
            source,
            case,
            seed,
            run,
        }
    }

    /// How many.
    pub(super) fn count(&self) -> usize {
        self.case.requests
    }

    /// The load that they belong to.
    pub(super) fn case(&self) -> &Case {
        &self.case
    }

    /// When each is to go, in order: at once, or with exponential distances (a Poisson process).
    pub(super) fn times(&self) -> Vec<Duration> {
        let Some(rate) = self.case.request_rate else {
            return vec![Duration::ZERO; self.count()];
        };
        let mut random = self.random(0);
        let mut at = 0.0_f64;
        let next = |_| {
            let due = Duration::from_secs_f64(at);
            // In (0, 1], so that the logarithm is finite.
            let uniform = 1.0 - random.random::<f64>();
            at += -uniform.ln() / rate;
            due
        };
        (0..self.count()).map(next).collect()
    }

    /// One of them.
    pub(super) fn item(&self, index: usize, due: Duration) -> Item {
        let mut random = self.random(index as u64 + 1);
        let output = pick(&mut random, self.case.output);
        let input = self.case.input.map(|lengths| pick(&mut random, lengths));
        let (prompt, output) = match &self.source {
            Source::Dataset(entries) => {
                let entry = &entries[index % entries.len()];
                (entry.prompt.clone(), entry.output.unwrap_or(output))
            }
            Source::Ids(range) => {
                let ids = (0..input.unwrap_or(1)).map(|_| random.random_range(range.clone()));
                (Prompt::Ids(ids.collect()), output)
            }
            Source::Words => {
                let words =
                    (0..input.unwrap_or(1)).map(|_| WORDS[random.random_range(0..WORDS.len())]);
                (Prompt::Text(words.collect::<Vec<_>>().join(" ")), output)
            }
        };
        Item {
            index,
            due,
            prompt,
            output,
        }
    }

    fn random(&self, of: u64) -> ChaCha8Rng {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream((self.run << 32) | of);
        random
    }
}

fn pick(random: &mut ChaCha8Rng, lengths: Lengths) -> u32 {
    random.random_range(lengths.min..=lengths.max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(requests: usize, request_rate: Option<f64>) -> Case {
        Case {
            name: "load".to_owned(),
            requests,
            input: Some(Lengths { min: 3, max: 9 }),
            output: Lengths { min: 2, max: 4 },
            concurrency: None,
            request_rate,
            warmup: 0,
            warmup_output: None,
            figures: Vec::new(),
        }
    }

    fn requests(seed: u64, run: u64, request_rate: Option<f64>) -> Requests {
        Requests::new(
            Source::ids(Some(288)),
            case(20_000, request_rate),
            seed,
            run,
        )
    }

    #[test]
    fn everything_follows_from_the_seed() {
        let (one, same) = (requests(7, 1, Some(5.0)), requests(7, 1, Some(5.0)));
        assert_eq!(one.times(), same.times());
        assert_eq!(one.item(3, Duration::ZERO), same.item(3, Duration::ZERO));
        for other in [requests(8, 1, Some(5.0)), requests(7, 2, Some(5.0))] {
            assert_ne!(one.times(), other.times());
            assert_ne!(one.item(3, Duration::ZERO), other.item(3, Duration::ZERO));
        }
        assert_ne!(
            one.item(3, Duration::ZERO).prompt,
            one.item(4, Duration::ZERO).prompt
        );
    }

    #[test]
    fn lengths_and_ids_stay_in_their_ranges_and_reach_their_ends() {
        let requests = requests(0, 0, None);
        let items: Vec<Item> = (0..500)
            .map(|index| requests.item(index, Duration::ZERO))
            .collect();
        let lengths: Vec<u32> = items
            .iter()
            .map(|item| item.input_tokens().unwrap())
            .collect();
        assert_eq!(
            (lengths.iter().min(), lengths.iter().max()),
            (Some(&3), Some(&9))
        );
        let outputs = items.iter().map(|item| item.output);
        assert_eq!((outputs.clone().min(), outputs.max()), (Some(2), Some(4)));
        for item in &items {
            let Prompt::Ids(ids) = &item.prompt else {
                panic!("{item:?}")
            };
            assert!(ids.iter().all(|id| (18..270).contains(id)), "{ids:?}");
        }
    }

    /// Of a Poisson process, distances have the mean 1/rate and as large a deviation, and the share of those longer than
    /// the mean is 1/e. Twenty thousand of them are within four standard errors; the seed is fixed.
    #[test]
    fn arrivals_are_a_poisson_process() {
        let rate = 40.0;
        let times = requests(1, 0, Some(rate)).times();
        assert_eq!(times[0], Duration::ZERO);
        let distances: Vec<f64> = times
            .windows(2)
            .map(|pair| (pair[1] - pair[0]).as_secs_f64() * rate)
            .collect();
        let count = distances.len() as f64;
        let mean = distances.iter().sum::<f64>() / count;
        let variance = distances.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / count;
        let longer = distances.iter().filter(|d| **d > 1.0).count() as f64 / count;
        assert!((mean - 1.0).abs() < 0.03, "mean {mean}");
        assert!(
            (variance.sqrt() - 1.0).abs() < 0.06,
            "deviation {}",
            variance.sqrt()
        );
        assert!((longer - 1.0_f64.exp().recip()).abs() < 0.015, "{longer}");
    }

    #[test]
    fn without_a_rate_all_are_due_at_once() {
        assert!(requests(1, 0, None).times().iter().all(Duration::is_zero));
    }

    #[test]
    fn datasets_are_arrays_or_lines() {
        let texts = entries(r#"["a", {"prompt": [1, 2], "output_len": 5}]"#).unwrap();
        assert_eq!(texts[0].prompt, Prompt::Text("a".to_owned()));
        assert_eq!(texts[1].prompt, Prompt::Ids(vec![1, 2]));
        let lines =
            entries("{\"prompt\": \"a\", \"max_tokens\": 3, \"x\": 1}\n\n{\"prompt\": \"b\"}\n")
                .unwrap();
        assert_eq!((lines[0].output, lines[1].output), (Some(3), None));
        let requests = Requests::new(Source::Dataset(lines), case(4, None), 0, 0);
        let item = requests.item(2, Duration::ZERO);
        assert_eq!(
            (item.prompt, item.output),
            (Prompt::Text("a".to_owned()), 3)
        );
        for (text, reason) in [
            ("{\"prompt\": \"a\"}\nnothing", "line 2"),
            ("[{\"text\": 1}]", "missing field `prompt`"),
            ("[{\"prompt\": true}]", "neither a text nor token ids"),
            (
                "[{\"prompt\": \"a\", \"output_len\": 0}]",
                "must be at least 1",
            ),
        ] {
            let error = format!("{:#}", entries(text).unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
    }
}

//! From the requests of a run to its figures. Pure.
//!
//! Definitions are vLLM's: TTFT from sending to the first token; ITL between two events that carry tokens, over all
//! requests together; TPOT of a request from its first to its last token, over its tokens but one; E2E to the last token;
//! percentiles by linear interpolation. Rates count complete requests only.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, Serializer};

use super::record::Record;
use crate::cli::ObjectiveArg;

const US_PER_MS: f64 = 1e3;
const US_PER_S: f64 = 1e6;

/// How values are distributed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Distribution {
    #[serde(serialize_with = "six_digits")]
    pub(super) mean: f64,
    #[serde(serialize_with = "six_digits")]
    pub(super) min: f64,
    #[serde(serialize_with = "six_digits")]
    pub(super) p50: f64,
    #[serde(serialize_with = "six_digits")]
    pub(super) p90: f64,
    #[serde(serialize_with = "six_digits")]
    pub(super) p95: f64,
    #[serde(serialize_with = "six_digits")]
    pub(super) p99: f64,
    #[serde(serialize_with = "six_digits")]
    pub(super) max: f64,
    /// How many values there are.
    pub(super) samples: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn six_digits<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((value * 1e6).round() / 1e6)
}

impl Distribution {
    /// `None` of no values.
    pub(super) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (first, last) = (*values.first()?, *values.last()?);
        Some(Self {
            mean: values.iter().sum::<f64>() / count(values.len()),
            min: first,
            p50: percentile(&values, 50.0),
            p90: percentile(&values, 90.0),
            p95: percentile(&values, 95.0),
            p99: percentile(&values, 99.0),
            max: last,
            samples: values.len(),
        })
    }
}

/// A percentile of sorted values, interpolated linearly between the two that are nearest.
fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let place = percent / 100.0 * count(sorted.len().saturating_sub(1));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 0 to the number of values"
    )]
    let below = place.floor() as usize;
    let low = sorted[below];
    let high = sorted.get(below + 1).copied().unwrap_or(low);
    low + (high - low) * place.fract()
}

/// The median of a few values.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    (!values.is_empty()).then(|| percentile(&values, 50.0))
}

#[expect(
    clippy::cast_precision_loss,
    reason = "no figure here needs more than 52 bits"
)]
fn count(number: usize) -> f64 {
    number as f64
}

#[expect(
    clippy::cast_precision_loss,
    reason = "no figure here needs more than 52 bits"
)]
fn real(number: u64) -> f64 {
    number as f64
}

/// Requests that failed in one way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failures {
    pub(super) count: usize,
    /// What was seen the first time.
    pub(super) first: String,
}

/// Requests that kept all limits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Goodput {
    pub(super) requests: usize,
    #[serde(serialize_with = "six_digits")]
    pub(super) requests_per_s: f64,
}

/// The figures of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Summary {
    pub(super) requests: usize,
    pub(super) completed: usize,
    pub(super) failed: usize,
    /// By kind.
    pub(super) failures: BTreeMap<String, Failures>,
    /// From the first request to the end of the last.
    #[serde(serialize_with = "six_digits")]
    pub(super) duration_s: f64,
    /// From the first request's sending to the last's.
    #[serde(serialize_with = "six_digits")]
    pub(super) sending_s: f64,
    /// Of complete requests, as the server counts.
    pub(super) input_tokens: u64,
    /// Of these, found in the server's cache.
    pub(super) cached_tokens: u64,
    /// Of complete requests.
    pub(super) output_tokens: u64,
    pub(super) requests_per_s: Option<f64>,
    pub(super) output_tokens_per_s: Option<f64>,
    pub(super) total_tokens_per_s: Option<f64>,
    /// Requests in flight, in the mean.
    pub(super) in_flight: Option<f64>,
    pub(super) ttft_ms: Option<Distribution>,
    pub(super) itl_ms: Option<Distribution>,
    pub(super) tpot_ms: Option<Distribution>,
    pub(super) e2e_ms: Option<Distribution>,
    /// What one user sees after the first token.
    pub(super) tokens_per_s_per_user: Option<Distribution>,
    /// How long after its time a request went.
    pub(super) sent_late_ms: Option<Distribution>,
    /// Tokens a second of all from the last first token to the first end: while all write.
    pub(super) decode_tokens_per_s: Option<f64>,
    /// Tokens a second of all after each one's first, from the first of all to the end.
    pub(super) after_first_tokens_per_s: Option<f64>,
    /// Prompt tokens a second, from the first request to the last first token.
    pub(super) prefill_tokens_per_s: Option<f64>,
    /// Complete requests whose answer is not as long as asked for.
    pub(super) outputs_of_other_length: usize,
    /// Complete requests whose prompt the server counts otherwise.
    pub(super) inputs_of_other_length: usize,
    /// Complete requests of which the server told no count.
    pub(super) uncounted: usize,
    pub(super) goodput: Option<Goodput>,
}

impl Summary {
    /// The figures of some requests.
    pub(super) fn of(records: &[Record], objectives: &[(ObjectiveArg, f64)]) -> Self {
        let done: Vec<&Record> = records
            .iter()
            .filter(|record| record.is_complete())
            .collect();
        let span = Span::of(records);
        let per_s = |number: f64| (span.us() > 0).then(|| number / span.seconds());
        let sum = |of: fn(&Record) -> u64| done.iter().map(|record| of(record)).sum::<u64>();
        let (input_tokens, output_tokens) = (sum(input_tokens), sum(output_tokens));
        let busy_us = records.iter().map(|record| record.end_us - record.sent_us);
        let values = |of: fn(&Record) -> Option<f64>| {
            Distribution::of(done.iter().filter_map(|record| of(record)).collect())
        };
        let good = |record: &&&Record| keeps(record, objectives);
        Self {
            requests: records.len(),
            completed: done.len(),
            failed: records.len() - done.len(),
            failures: failures(records),
            duration_s: span.seconds(),
            sending_s: real(span.last_sent_us - span.first_sent_us) / US_PER_S,
            input_tokens,
            cached_tokens: sum(|record| u64::from(record.answer.cached_tokens.unwrap_or(0))),
            output_tokens,
            requests_per_s: per_s(count(done.len())),
            output_tokens_per_s: per_s(real(output_tokens)),
            total_tokens_per_s: per_s(real(input_tokens + output_tokens)),
            in_flight: per_s(real(busy_us.sum()) / US_PER_S),
            ttft_ms: values(ttft_ms),
            itl_ms: Distribution::of(done.iter().flat_map(|record| gaps_ms(record)).collect()),
            tpot_ms: values(tpot_ms),
            e2e_ms: values(e2e_ms),
            tokens_per_s_per_user: values(|record| {
                let tpot = tpot_ms(record).filter(|tpot| *tpot > 0.0)?;
                Some(1e3 / tpot)
            }),
            sent_late_ms: Distribution::of(records.iter().map(late_ms).collect()),
            decode_tokens_per_s: decode_rate(&done),
            after_first_tokens_per_s: after_first_rate(&done),
            prefill_tokens_per_s: prefill_rate(&done),
            outputs_of_other_length: done
                .iter()
                .filter(|record| record.answer.output_tokens() != record.output_asked)
                .count(),
            inputs_of_other_length: done.iter().filter(|record| has_other_input(record)).count(),
            uncounted: done
                .iter()
                .filter(|record| record.answer.counted_tokens.is_none())
                .count(),
            goodput: (!objectives.is_empty()).then(|| {
                let requests = done.iter().filter(good).count();
                Goodput {
                    requests,
                    requests_per_s: per_s(count(requests)).unwrap_or(0.0),
                }
            }),
        }
    }
}

/// When a run began and ended.
#[derive(Debug, Clone, Copy, Default)]
struct Span {
    first_sent_us: u64,
    last_sent_us: u64,
    end_us: u64,
}

impl Span {
    fn of(records: &[Record]) -> Self {
        let sent = records.iter().map(|record| record.sent_us);
        Self {
            first_sent_us: sent.clone().min().unwrap_or(0),
            last_sent_us: sent.max().unwrap_or(0),
            end_us: records
                .iter()
                .map(|record| record.end_us)
                .max()
                .unwrap_or(0),
        }
    }

    fn us(self) -> u64 {
        self.end_us.saturating_sub(self.first_sent_us)
    }

    fn seconds(self) -> f64 {
        real(self.us()) / US_PER_S
    }
}

fn failures(records: &[Record]) -> BTreeMap<String, Failures> {
    let mut kinds: BTreeMap<String, Failures> = BTreeMap::new();
    for failure in records
        .iter()
        .filter_map(|record| record.answer.failure.as_ref())
    {
        let first = || Failures {
            count: 0,
            first: failure.text.clone(),
        };
        kinds.entry(failure.kind.name()).or_insert_with(first).count += 1;
    }
    kinds
}

fn input_tokens(record: &Record) -> u64 {
    let known = record.answer.prompt_tokens.or(record.input_tokens);
    u64::from(known.unwrap_or(0))
}

fn output_tokens(record: &Record) -> u64 {
    u64::from(record.answer.output_tokens())
}

fn has_other_input(record: &Record) -> bool {
    let both = record.input_tokens.zip(record.answer.prompt_tokens);
    both.is_some_and(|(sent, counted)| sent != counted)
}

fn ttft_ms(record: &Record) -> Option<f64> {
    Some(f64::from(record.answer.first_us()?) / US_PER_MS)
}

fn e2e_ms(record: &Record) -> Option<f64> {
    Some(f64::from(record.answer.last_us()?) / US_PER_MS)
}

fn tpot_ms(record: &Record) -> Option<f64> {
    let further = record.answer.output_tokens().checked_sub(1)?;
    let (first, last) = record.answer.first_us().zip(record.answer.last_us())?;
    (further > 0).then(|| f64::from(last - first) / US_PER_MS / f64::from(further))
}

fn gaps_ms(record: &Record) -> impl Iterator<Item = f64> {
    let pairs = record.answer.arrivals.windows(2);
    pairs.map(|pair| f64::from(pair[1].at_us - pair[0].at_us) / US_PER_MS)
}

fn late_ms(record: &Record) -> f64 {
    real(record.sent_us.saturating_sub(record.due_us)) / US_PER_MS
}

fn keeps(record: &Record, objectives: &[(ObjectiveArg, f64)]) -> bool {
    objectives.iter().all(|(what, limit)| {
        let value = match what {
            ObjectiveArg::FirstToken => ttft_ms(record),
            // An answer of one token has no time between tokens that could be too long.
            ObjectiveArg::TokenTime => Some(tpot_ms(record).unwrap_or(0.0)),
            ObjectiveArg::EndToEnd => e2e_ms(record),
        };
        value.is_some_and(|value| value <= *limit)
    })
}

/// Every arrival of the run: when, and how many tokens.
fn arrivals<'a>(done: &'a [&Record]) -> impl Iterator<Item = (u64, u64)> + 'a {
    done.iter().flat_map(|record| {
        let arrivals = record.answer.arrivals.iter();
        arrivals.map(|arrival| {
            let at = record.sent_us + u64::from(arrival.at_us);
            (at, u64::from(arrival.tokens))
        })
    })
}

fn firsts<'a>(done: &'a [&Record]) -> impl Iterator<Item = u64> + 'a {
    done.iter()
        .filter_map(|record| Some(record.sent_us + u64::from(record.answer.first_us()?)))
}

fn lasts<'a>(done: &'a [&Record]) -> impl Iterator<Item = u64> + 'a {
    done.iter()
        .filter_map(|record| Some(record.sent_us + u64::from(record.answer.last_us()?)))
}

fn rate(tokens: u64, begin_us: u64, end_us: u64) -> Option<f64> {
    (end_us > begin_us).then(|| real(tokens) / (real(end_us - begin_us) / US_PER_S))
}

fn decode_rate(done: &[&Record]) -> Option<f64> {
    let (begin, end) = (firsts(done).max()?, lasts(done).min()?);
    let within = arrivals(done).filter(|(at, _)| *at > begin && *at <= end);
    rate(within.map(|(_, tokens)| tokens).sum(), begin, end)
}

fn after_first_rate(done: &[&Record]) -> Option<f64> {
    let (begin, end) = (firsts(done).min()?, lasts(done).max()?);
    let tokens: u64 = arrivals(done).map(|(_, tokens)| tokens).sum();
    let first_tokens = done
        .iter()
        .filter_map(|record| record.answer.arrivals.first());
    let first_tokens: u64 = first_tokens.map(|arrival| u64::from(arrival.tokens)).sum();
    rate(tokens - first_tokens, begin, end).filter(|rate| *rate > 0.0)
}

fn prefill_rate(done: &[&Record]) -> Option<f64> {
    let begin = done.iter().map(|record| record.sent_us).min()?;
    let tokens = done.iter().map(|record| input_tokens(record)).sum();
    rate(tokens, begin, firsts(done).max()?)
}

#[cfg(test)]
mod tests {
    use super::super::record::{Answer, Arrival, Failure, FailureKind};
    use super::*;

    /// A request of 10 prompt tokens whose tokens come at these milliseconds.
    fn record(sent_ms: u64, arrivals_ms: &[u32]) -> Record {
        let arrival = |at_ms: &u32| Arrival {
            at_us: at_ms * 1000,
            tokens: 1,
        };
        let last = u64::from(arrivals_ms.last().copied().unwrap_or(0));
        Record {
            index: 0,
            due_us: sent_ms * 1000,
            sent_us: sent_ms * 1000,
            end_us: (sent_ms + last) * 1000,
            input_tokens: Some(10),
            output_asked: u32::try_from(arrivals_ms.len()).unwrap(),
            answer: Answer {
                arrivals: arrivals_ms.iter().map(arrival).collect(),
                prompt_tokens: Some(10),
                counted_tokens: Some(u32::try_from(arrivals_ms.len()).unwrap()),
                ..Answer::default()
            },
        }
    }

    fn near(value: Option<f64>, expected: f64) {
        let value = value.expect("a value");
        assert!((value - expected).abs() < 1e-9, "{value}, not {expected}");
    }

    /// As numpy.percentile gives them.
    #[test]
    fn percentiles_are_interpolated() {
        let values = Distribution::of(vec![4.0, 1.0, 3.0, 2.0]).unwrap();
        near(Some(values.p50), 2.5);
        near(Some(values.p90), 3.7);
        near(Some(values.p95), 3.85);
        near(Some(values.p99), 3.97);
        near(Some(values.mean), 2.5);
        assert_eq!((values.min, values.max, values.samples), (1.0, 4.0, 4));
        let one = Distribution::of(vec![7.0]).unwrap();
        assert_eq!((one.p50, one.p99), (7.0, 7.0));
        assert_eq!(Distribution::of(Vec::new()), None);
        near(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(Vec::new()), None);
    }

    #[test]
    fn times_and_rates_of_two_requests() {
        let records = [record(0, &[100, 110, 130]), record(50, &[100, 120, 140])];
        let summary = Summary::of(&records, &[]);
        near(summary.ttft_ms.map(|t| t.mean), 100.0);
        let itl = summary.itl_ms.unwrap();
        assert_eq!((itl.samples, itl.min, itl.max), (4, 10.0, 20.0));
        near(summary.tpot_ms.map(|t| t.mean), 17.5);
        near(summary.e2e_ms.map(|t| t.max), 140.0);
        near(Some(summary.duration_s), 0.19);
        near(Some(summary.sending_s), 0.05);
        near(summary.output_tokens_per_s, 6.0 / 0.19);
        near(summary.total_tokens_per_s, 26.0 / 0.19);
        near(summary.requests_per_s, 2.0 / 0.19);
        near(summary.in_flight, 0.27 / 0.19);
        near(summary.tokens_per_s_per_user.map(|t| t.max), 1000.0 / 15.0);
        // First tokens at 100 and 150; the first one's end at 130 is before the second one's begin.
        assert_eq!(summary.decode_tokens_per_s, None);
        near(summary.after_first_tokens_per_s, 4.0 / 0.09);
        near(summary.prefill_tokens_per_s, 20.0 / 0.15);
        assert_eq!(summary.goodput, None);
    }

    #[test]
    fn the_decode_rate_is_that_of_all_writing() {
        let records = [
            record(0, &[10, 20, 30, 40, 50]),
            record(0, &[30, 40, 50, 60, 70]),
        ];
        // After 30 until 50: two tokens of each.
        near(Summary::of(&records, &[]).decode_tokens_per_s, 4.0 / 0.02);
        // A single request: all but the first.
        near(
            Summary::of(&records[..1], &[]).decode_tokens_per_s,
            4.0 / 0.04,
        );
    }

    #[test]
    fn failures_are_counted_by_kind_and_left_out_of_the_figures() {
        let mut failed = record(0, &[500]);
        failed.answer.failure = Some(Failure::new(FailureKind::Cut, "gone"));
        let records = [record(0, &[100, 110]), failed.clone(), failed];
        let summary = Summary::of(&records, &[]);
        assert_eq!((summary.completed, summary.failed), (1, 2));
        let cut = &summary.failures["stream cut"];
        assert_eq!((cut.count, cut.first.as_str()), (2, "gone"));
        assert_eq!(summary.output_tokens, 2);
        near(summary.ttft_ms.map(|t| t.max), 100.0);
    }

    #[test]
    fn lengths_are_compared_with_what_was_asked_for() {
        let mut short = record(0, &[1, 2]);
        short.output_asked = 3;
        let mut other = record(0, &[1, 2]);
        other.answer.prompt_tokens = Some(11);
        let mut uncounted = record(0, &[1, 2]);
        uncounted.answer.counted_tokens = None;
        let summary = Summary::of(&[short, other, uncounted], &[]);
        assert_eq!(summary.outputs_of_other_length, 1);
        assert_eq!(summary.inputs_of_other_length, 1);
        assert_eq!(summary.uncounted, 1);
    }

    #[test]
    fn goodput_counts_requests_that_keep_every_limit() {
        let records = [
            record(0, &[100, 110]),
            record(0, &[300, 310]),
            record(0, &[100, 200]),
        ];
        let limits = [
            (ObjectiveArg::FirstToken, 200.0),
            (ObjectiveArg::TokenTime, 20.0),
        ];
        let goodput = Summary::of(&records, &limits).goodput.unwrap();
        assert_eq!(goodput.requests, 1);
        near(Some(goodput.requests_per_s), 1.0 / 0.31);
        let limits = [(ObjectiveArg::EndToEnd, 310.0)];
        assert_eq!(Summary::of(&records, &limits).goodput.unwrap().requests, 3);
    }

    #[test]
    fn nothing_measured_gives_no_figure() {
        let summary = Summary::of(&[], &[]);
        assert_eq!(summary.duration_s, 0.0);
        assert_eq!(summary.requests_per_s, None);
        assert_eq!(summary.ttft_ms, None);
    }
}

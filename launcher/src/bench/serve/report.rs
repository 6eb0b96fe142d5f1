//! What a benchmark of serving found: as a table and as JSON. Pure.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::cost::ClientCost;
use super::plan::{Case, Figure};
use super::record::Record;
use super::stats::{Distribution, Summary, median};
use super::verdict::{Finding, Verdict};

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub(super) struct TargetRecord {
    /// `server` or `engine`.
    pub(super) kind: String,
    /// Where it is; `null` for an engine.
    pub(super) url: Option<String>,
    pub(super) model: String,
    /// Of the server, where it tells.
    pub(super) version: Option<String>,
    /// On what it computes, where it tells.
    pub(super) backend: Option<String>,
    /// How the engine came to be there.
    pub(super) start: Option<StartRecord>,
}

/// An engine's start.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct StartRecord {
    /// From the start of its process until it could take requests.
    pub(super) ready_s: f64,
    /// From the start of its process until the first token of its first request was here.
    pub(super) first_token_s: f64,
}

/// What all runs have in common.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Parameters {
    pub(super) endpoint: Option<&'static str>,
    /// `ids`, `text` or the dataset's path.
    pub(super) prompts: String,
    /// Ids are drawn from here, the end excluded.
    pub(super) vocabulary: Option<(u32, u32)>,
    pub(super) seed: u64,
    pub(super) repeat: usize,
    /// As fields of OpenAI's API.
    pub(super) sampling: Map<String, Value>,
    pub(super) ignore_eos: bool,
    pub(super) extra_body: Value,
    pub(super) request_timeout_s: u64,
    /// What, and the limit in milliseconds.
    pub(super) goodput: Vec<(&'static str, f64)>,
    pub(super) cases: Vec<Case>,
}

/// One run of one case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) case: String,
    /// From 1.
    pub(super) repetition: usize,
    #[serde(flatten)]
    pub(super) summary: Summary,
    pub(super) client: ClientCost,
    pub(super) findings: Vec<Finding>,
    /// With `--save-requests`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(default)]
    pub(super) requests_detail: Option<Vec<Record>>,
}

/// A figure of a case over its repetitions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) case: String,
    pub(super) figure: Figure,
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    pub(super) samples: usize,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Report {
    pub(super) bench: &'static str,
    /// Of Baton.
    pub(super) version: &'static str,
    pub(super) target: TargetRecord,
    pub(super) parameters: Parameters,
    pub(super) figures: Vec<Row>,
    pub(super) runs: Vec<Run>,
    pub(super) verdict: Verdict,
}

/// The figures of all cases, over repetitions.
pub(super) fn rows(cases: &[Case], runs: &[Run]) -> Vec<Row> {
    let of_case = |case: &Case| {
        let name = case.name.clone();
        let figures = case.figures.clone();
        figures.into_iter().filter_map(move |figure| {
            let own = runs.iter().filter(|run| run.case == name);
            let values: Vec<f64> = own.filter_map(|run| figure.of(&run.summary)).collect();
            Some(Row {
                case: name.clone(),
                figure,
                min: values.iter().copied().min_by(f64::total_cmp)?,
                max: values.iter().copied().max_by(f64::total_cmp)?,
                samples: values.len(),
                median: median(values)?,
            })
        })
    };
    cases.iter().flat_map(of_case).collect()
}

impl Report {
    /// The report for people.
    pub(super) fn table(&self) -> String {
        let mut lines = vec![self.heading()];
        if let Some(start) = &self.target.start {
            lines.push(format!(
                "start        ready after {:.2} s, first token after {:.2} s",
                start.ready_s, start.first_token_s
            ));
        }
        match self.runs.as_slice() {
            [run] => lines.extend(run_lines(&self.parameters.cases[0], run)),
            _ => lines.extend(self.row_lines()),
        }
        for finding in self.runs.iter().flat_map(|run| &run.findings) {
            let word = if finding.accepted {
                "accepted"
            } else {
                "finding"
            };
            lines.push(format!("{word:<12} {}", finding.text));
        }
        let word = if self.verdict.pass {
            "valid"
        } else {
            "not valid"
        };
        lines.push(format!("{word}: {}", self.verdict.reason));
        lines.join("\n")
    }

    fn heading(&self) -> String {
        let target = &self.target;
        let mut text = format!(
            "target       {} · {}",
            target.url.as_deref().unwrap_or("engine"),
            target.model
        );
        let facts = [self.parameters.endpoint, target.backend.as_deref()];
        for fact in facts.into_iter().flatten() {
            text.push_str(" · ");
            text.push_str(fact);
        }
        text
    }

    fn row_lines(&self) -> Vec<String> {
        let width = |of: fn(&Row) -> usize, least: usize| {
            self.figures.iter().map(of).max().unwrap_or(0).max(least)
        };
        let case = width(|row| row.case.chars().count(), 4);
        let figure = width(|row| row.figure.label().chars().count(), 6);
        let mut lines = vec![
            String::new(),
            format!(
                "{:<case$}  {:<figure$}  {:>10} {:>10} {:>10}  runs",
                "case", "figure", "median", "min", "max"
            ),
        ];
        lines.extend(self.figures.iter().map(|row| {
            format!(
                "{:<case$}  {:<figure$}  {:>10} {:>10} {:>10}  {}",
                row.case,
                row.figure.label(),
                short(row.median),
                short(row.min),
                short(row.max),
                row.samples
            )
        }));
        lines.push(String::new());
        lines
    }
}

/// One run in full.
fn run_lines(case: &Case, run: &Run) -> Vec<String> {
    let summary = &run.summary;
    let mut lines = vec![load_line(case), String::new()];
    lines.push(format!(
        "{:<12} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "", "mean", "p50", "p90", "p95", "p99", "max"
    ));
    for (name, times) in [
        ("TTFT ms", summary.ttft_ms),
        ("ITL ms", summary.itl_ms),
        ("TPOT ms", summary.tpot_ms),
        ("E2E ms", summary.e2e_ms),
        ("tok/s a user", summary.tokens_per_s_per_user),
        (
            "sent late ms",
            summary.sent_late_ms.filter(|_| !case.is_closed_loop()),
        ),
    ] {
        lines.extend(times.map(|times| distribution_line(name, &times)));
    }
    lines.push(String::new());
    let rate = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), short);
    lines.push(format!(
        "requests     {} complete, {} failed in {:.2} s · {} /s · {} in flight",
        summary.completed,
        summary.failed,
        summary.duration_s,
        rate(summary.requests_per_s),
        rate(summary.in_flight)
    ));
    lines.push(format!(
        "tokens       {} in ({} cached), {} out · output {} /s · all {} /s",
        summary.input_tokens,
        summary.cached_tokens,
        summary.output_tokens,
        rate(summary.output_tokens_per_s),
        rate(summary.total_tokens_per_s)
    ));
    if let Some(goodput) = &summary.goodput {
        lines.push(format!(
            "goodput      {} requests kept every limit · {} /s",
            goodput.requests,
            short(goodput.requests_per_s)
        ));
    }
    for (kind, failures) in &summary.failures {
        lines.push(format!(
            "failed       {} × {kind}: {}",
            failures.count, failures.first
        ));
    }
    lines.extend(client_line(&run.client));
    lines
}

fn load_line(case: &Case) -> String {
    let mut parts = vec![format!("{} requests", case.requests)];
    parts.push(match (case.request_rate, case.concurrency) {
        (Some(rate), None) => format!("{rate} /s at random"),
        (Some(rate), Some(places)) => format!("{rate} /s at random, at most {places} at once"),
        (None, Some(places)) => format!("{places} at once"),
        (None, None) => "all at once".to_owned(),
    });
    let range = |lengths: super::plan::Lengths| {
        if lengths.min == lengths.max {
            lengths.min.to_string()
        } else {
            format!("{}-{}", lengths.min, lengths.max)
        }
    };
    let input = case.input.map_or_else(|| "dataset".to_owned(), range);
    parts.push(format!("{input} in, {} out", range(case.output)));
    parts.push(format!("warm-up {}", case.warmup));
    format!("load         {}", parts.join(" · "))
}

fn distribution_line(name: &str, times: &Distribution) -> String {
    format!(
        "{name:<12} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2}",
        times.mean, times.p50, times.p90, times.p95, times.p99, times.max
    )
}

fn client_line(client: &ClientCost) -> Option<String> {
    let mut parts = Vec::new();
    if let Some(share) = client.cpu_share {
        let percent = share * 100.0;
        parts.push(format!("{percent:.1} % of {} cores", client.cores));
    }
    if let Some(cost) = client.cpu_us_per_token {
        parts.push(format!("{cost:.1} µs a token"));
    }
    if let Some(wake) = &client.wake_ms {
        parts.push(format!("late by {:.2} ms (p90)", wake.p90));
    }
    (!parts.is_empty()).then(|| format!("client       {}", parts.join(" · ")))
}

/// Four digits, or all before the point.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 100.0 => format!("{value:.1}"),
        size if size >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Lengths;
    use super::super::record::{Answer, Arrival};
    use super::super::verdict::judge;
    use super::*;

    fn case() -> Case {
        Case {
            name: "load".to_owned(),
            requests: 1,
            input: Some(Lengths::fixed(10)),
            output: Lengths { min: 2, max: 3 },
            concurrency: Some(1),
            request_rate: None,
            warmup: 1,
            warmup_output: None,
            figures: vec![Figure::FirstToken, Figure::Output],
        }
    }

    fn run(repetition: usize, ttft_us: u32) -> Run {
        let arrival = |at_us| Arrival { at_us, tokens: 1 };
        let record = Record {
            index: 0,
            due_us: 0,
            sent_us: 0,
            end_us: 1_000_000,
            input_tokens: Some(10),
            output_asked: 2,
            answer: Answer {
                arrivals: vec![arrival(ttft_us), arrival(ttft_us + 20_000)],
                prompt_tokens: Some(10),
                counted_tokens: Some(2),
                ..Answer::default()
            },
        };
        Run {
            case: "load".to_owned(),
            repetition,
            summary: Summary::of(std::slice::from_ref(&record), &[]),
            client: ClientCost {
                cpu_s: Some(0.01),
                cpu_share: Some(0.005),
                cpu_us_per_token: Some(5000.0),
                cores: 2,
                wake_ms: None,
            },
            findings: Vec::new(),
            requests_detail: Some(vec![record]),
        }
    }

    fn report(runs: Vec<Run>) -> Report {
        Report {
            bench: "serve",
            version: "0.0.0",
            target: TargetRecord {
                kind: "server".to_owned(),
                url: Some("http://h:1".to_owned()),
                model: "m".to_owned(),
                ..TargetRecord::default()
            },
            parameters: Parameters {
                endpoint: Some("completions"),
                prompts: "ids".to_owned(),
                vocabulary: Some((18, 270)),
                seed: 0,
                repeat: runs.len(),
                sampling: Map::new(),
                ignore_eos: true,
                extra_body: Value::Null,
                request_timeout_s: 600,
                goodput: Vec::new(),
                cases: vec![case()],
            },
            figures: rows(&[case()], &runs),
            verdict: judge(&[], runs.len(), 1, 2),
            runs,
        }
    }

    #[test]
    fn one_run_is_shown_in_full() {
        let table = report(vec![run(1, 100_000)]).table();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "target       http://h:1 · m · completions");
        assert_eq!(
            lines[1],
            "load         1 requests · 1 at once · 10 in, 2-3 out · warm-up 1"
        );
        assert_eq!(
            lines[4],
            "TTFT ms         100.00    100.00    100.00    100.00    100.00    100.00"
        );
        assert_eq!(lines[3].chars().count(), lines[4].chars().count());
        assert!(
            table.contains("requests     1 complete, 0 failed in 1.00 s · 1.000 /s"),
            "{table}"
        );
        assert!(
            table.contains("client       0.5 % of 2 cores · 5000.0 µs a token"),
            "{table}"
        );
        assert_eq!(lines.last(), Some(&"valid: 1 requests, 2 tokens written"));
    }

    #[test]
    fn several_runs_are_medians() {
        let report = report(vec![run(1, 100_000), run(2, 300_000), run(3, 200_000)]);
        let first = &report.figures[0];
        assert_eq!((first.median, first.min, first.max), (200.0, 100.0, 300.0));
        assert_eq!(first.samples, 3);
        let table = report.table();
        assert!(table.contains("TTFT (ms)"), "{table}");
        assert!(!table.contains("E2E"), "{table}");
    }

    #[test]
    fn a_run_survives_json_and_keeps_its_requests() {
        let run = run(1, 100_000);
        let text = serde_json::to_string(&run).unwrap();
        let back: Run = serde_json::from_str(&text).unwrap();
        assert_eq!(back, run);
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["ttft_ms"]["p50"], 100.0);
        assert_eq!(value["requests_detail"][0]["arrivals"][1]["at_us"], 120_000);
    }

    #[test]
    fn numbers_have_the_digits_that_they_need() {
        assert_eq!(
            [12_345.6, 123.45, 12.345, 1.2345].map(short),
            ["12346", "123.5", "12.35", "1.234"].map(str::to_owned)
        );
    }
}

//! Whether a run means something. Pure.

use serde::{Deserialize, Serialize};

use super::cost::ClientCost;
use super::plan::{Case, WARMUP_MAX};
use super::stats::Summary;
use crate::cli::FindingArg;
use crate::exit::Outcome;

/// Wakings later than this are no matter of the clock.
const LATE_MS: f64 = 1.0;
/// A tenth of the time between two tokens is as far as a tenth of the wakings may be late.
const LATE_SHARE: f64 = 0.1;
/// Of the cores that the client may use.
const CPU_SHARE: f64 = 0.9;

/// What speaks against a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    /// Requests failed.
    Failed,
    /// No token came.
    Empty,
    /// Answers or prompts are not as long as asked for.
    Length,
    /// The client itself was late.
    Saturated,
    /// Fewer warm-up requests than run at once.
    Warmup,
    /// Too little was measured for a steady state.
    Short,
}

impl Kind {
    fn is(self, accepted: FindingArg) -> bool {
        matches!(
            (self, accepted),
            (Self::Length, FindingArg::Length)
                | (Self::Saturated, FindingArg::Saturated)
                | (Self::Warmup, FindingArg::Warmup)
                | (Self::Short, FindingArg::Short)
        )
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Empty => "empty",
            Self::Length => "length",
            Self::Saturated => "saturated",
            Self::Warmup => "warmup",
            Self::Short => "short",
        }
    }
}

/// Something that speaks against a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Finding {
    pub(super) kind: Kind,
    /// In a sentence.
    pub(super) text: String,
    /// Whether `--accept` names it.
    pub(super) accepted: bool,
    /// Whether it is for want of time only.
    #[serde(default)]
    timed_out: bool,
}

/// The conclusion of all runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Verdict {
    /// Whether nothing speaks against them but what was accepted.
    pub(super) pass: bool,
    /// In a sentence.
    pub(super) reason: String,
    #[serde(skip)]
    pub(super) outcome: Outcome,
}

/// What speaks against a run, the worst first.
pub(super) fn findings(
    case: &Case,
    summary: &Summary,
    client: &ClientCost,
    ignore_eos: bool,
    accept: &[FindingArg],
) -> Vec<Finding> {
    let texts = [
        (Kind::Failed, failed(summary)),
        (Kind::Empty, empty(summary)),
        (Kind::Length, length(summary, ignore_eos)),
        (Kind::Saturated, saturated(summary, client)),
        (Kind::Warmup, warmup(case)),
        (Kind::Short, short(case, summary)),
    ];
    texts
        .into_iter()
        .filter_map(|(kind, text)| {
            Some(Finding {
                kind,
                text: text?,
                accepted: accept.iter().any(|accepted| kind.is(*accepted)),
                timed_out: kind == Kind::Failed && summary.failures.keys().eq(["timeout"]),
            })
        })
        .collect()
}

fn failed(summary: &Summary) -> Option<String> {
    let (kind, worst) = summary
        .failures
        .iter()
        .max_by_key(|(_, failures)| failures.count)?;
    Some(format!(
        "{} of {} requests failed, {} by {kind}: {}",
        summary.failed, summary.requests, worst.count, worst.first
    ))
}

fn empty(summary: &Summary) -> Option<String> {
    let is_empty = summary.failed == 0 && (summary.output_tokens == 0 || summary.ttft_ms.is_none());
    is_empty.then(|| format!("{} requests ended without a token", summary.requests))
}

fn length(summary: &Summary, ignore_eos: bool) -> Option<String> {
    let outputs = if ignore_eos {
        summary.outputs_of_other_length
    } else {
        0
    };
    let what = match (outputs, summary.inputs_of_other_length) {
        (0, 0) => return None,
        (0, inputs) => format!("the server counts the prompts of {inputs} requests otherwise"),
        (outputs, _) => format!("the answers of {outputs} requests are not as long as asked for"),
    };
    Some(format!("{what}, of {} complete ones", summary.completed))
}

fn saturated(summary: &Summary, client: &ClientCost) -> Option<String> {
    if let Some(share) = client.cpu_share.filter(|share| *share > CPU_SHARE) {
        return Some(format!(
            "the client used {:.0} % of its {} cores",
            share * 100.0,
            client.cores
        ));
    }
    let times = summary.itl_ms.or(summary.ttft_ms)?;
    let late = client.wake_ms?.p90;
    (late > LATE_MS && late > times.p50 * LATE_SHARE).then(|| {
        format!(
            "the client was late by {late:.1} ms (p90) where tokens come every {:.1} ms; it needs processors of its own",
            times.p50
        )
    })
}

fn warmup(case: &Case) -> Option<String> {
    let needed = match case.request_rate {
        None => case.at_once().min(WARMUP_MAX),
        Some(_) => 1,
    };
    (case.warmup < needed).then(|| {
        format!(
            "{} warm-up requests, where {} run at once: the first of each kind of step is measured",
            case.warmup,
            case.at_once()
        )
    })
}

fn short(case: &Case, summary: &Summary) -> Option<String> {
    match (case.request_rate, case.concurrency) {
        (None, Some(places)) if places > 1 && case.requests < 2 * places => Some(format!(
            "{} requests over {places} places: the load is never steady",
            case.requests
        )),
        (Some(_), _) => {
            let answer_s = summary.e2e_ms?.mean / 1e3;
            (summary.sending_s < 2.0 * answer_s).then(|| {
                format!(
                    "requests were sent for {:.1} s, and an answer takes {answer_s:.1} s: the load is never steady",
                    summary.sending_s
                )
            })
        }
        // One after the other, or all at once on purpose.
        (None, _) => None,
    }
}

/// Judges the findings of all runs.
pub(super) fn judge(findings: &[&Finding], runs: usize, requests: usize, tokens: u64) -> Verdict {
    let verdict = |outcome, reason| Verdict {
        pass: outcome == Outcome::Success,
        reason,
        outcome,
    };
    if runs == 0 {
        return verdict(Outcome::Failure, "nothing was measured".to_owned());
    }
    let open: Vec<&&Finding> = findings
        .iter()
        .filter(|finding| !finding.accepted)
        .collect();
    let Some(worst) = open.first() else {
        let accepted = match findings.len() {
            0 => String::new(),
            _ => {
                let mut names: Vec<&str> = findings.iter().map(|f| f.kind.name()).collect();
                names.dedup();
                format!("; accepted: {}", names.join(", "))
            }
        };
        let reason = format!("{requests} requests, {tokens} tokens written{accepted}");
        return verdict(Outcome::Success, reason);
    };
    let failures = || open.iter().filter(|finding| finding.kind == Kind::Failed);
    let outcome = match failures().next() {
        None => Outcome::Invalid,
        Some(_) if failures().all(|finding| finding.timed_out) => Outcome::TimedOut,
        Some(_) => Outcome::Failure,
    };
    let worst = failures().next().unwrap_or(worst);
    let more = match open.len() - 1 {
        0 => String::new(),
        more => format!(" (and {more} more findings)"),
    };
    verdict(outcome, format!("{}{more}", worst.text))
}

#[cfg(test)]
mod tests {
    use super::super::plan::Lengths;
    use super::super::stats::{Distribution, Failures};
    use super::*;

    fn case(requests: usize, concurrency: Option<usize>, rate: Option<f64>) -> Case {
        Case {
            name: "load".to_owned(),
            requests,
            input: None,
            output: Lengths::fixed(1),
            concurrency,
            request_rate: rate,
            warmup: 4,
            warmup_output: None,
            figures: Vec::new(),
        }
    }

    fn good() -> Summary {
        Summary {
            requests: 8,
            completed: 8,
            output_tokens: 80,
            sending_s: 10.0,
            ttft_ms: Distribution::of(vec![50.0]),
            itl_ms: Distribution::of(vec![20.0]),
            e2e_ms: Distribution::of(vec![1000.0]),
            ..Summary::of(&[], &[])
        }
    }

    fn client(late_ms: f64, cpu_share: f64) -> ClientCost {
        ClientCost {
            cpu_s: None,
            cpu_share: Some(cpu_share),
            cpu_us_per_token: None,
            cores: 2,
            wake_ms: Distribution::of(vec![late_ms]),
        }
    }

    fn kinds(case: &Case, summary: &Summary, client: &ClientCost) -> Vec<Kind> {
        findings(case, summary, client, true, &[])
            .iter()
            .map(|finding| finding.kind)
            .collect()
    }

    #[test]
    fn each_finding_has_its_cause() {
        let (steady, idle) = (case(8, Some(4), None), client(0.1, 0.1));
        assert_eq!(kinds(&steady, &good(), &idle), []);
        let mut failed = good();
        failed.failed = 1;
        let failures = Failures {
            count: 1,
            first: "no".to_owned(),
        };
        failed.failures.insert("connect".to_owned(), failures);
        assert_eq!(kinds(&steady, &failed, &idle), [Kind::Failed]);
        let silent = Summary {
            output_tokens: 0,
            ..good()
        };
        assert_eq!(kinds(&steady, &silent, &idle), [Kind::Empty]);
        for other in [
            Summary {
                outputs_of_other_length: 1,
                ..good()
            },
            Summary {
                inputs_of_other_length: 1,
                ..good()
            },
        ] {
            assert_eq!(kinds(&steady, &other, &idle), [Kind::Length]);
        }
        assert_eq!(
            kinds(&steady, &good(), &client(0.1, 0.95)),
            [Kind::Saturated]
        );
        assert_eq!(
            kinds(&steady, &good(), &client(2.1, 0.1)),
            [Kind::Saturated]
        );
        assert_eq!(kinds(&steady, &good(), &client(1.9, 0.1)), []);
        assert_eq!(
            kinds(&case(10, Some(5), None), &good(), &idle),
            [Kind::Warmup]
        );
        assert_eq!(
            kinds(&case(7, Some(4), None), &good(), &idle),
            [Kind::Short]
        );
        assert_eq!(kinds(&case(4, None, None), &good(), &idle), []);
        let rated = case(8, None, Some(1.0));
        assert_eq!(kinds(&rated, &good(), &idle), []);
        let hurried = Summary {
            sending_s: 1.9,
            ..good()
        };
        assert_eq!(kinds(&rated, &hurried, &idle), [Kind::Short]);
    }

    #[test]
    fn an_answer_may_be_short_where_it_may_end() {
        let short = Summary {
            outputs_of_other_length: 1,
            ..good()
        };
        let found = findings(
            &case(8, Some(4), None),
            &short,
            &client(0.1, 0.1),
            false,
            &[],
        );
        assert_eq!(found, []);
    }

    #[test]
    fn the_worst_decides_and_what_is_accepted_does_not() {
        let finding = |kind, accepted, timed_out| Finding {
            kind,
            text: format!("{kind:?}"),
            accepted,
            timed_out,
        };
        let outcome = |findings: &[Finding]| {
            let findings: Vec<&Finding> = findings.iter().collect();
            judge(&findings, 1, 8, 80)
        };
        assert_eq!(outcome(&[]).outcome, Outcome::Success);
        assert_eq!(outcome(&[]).reason, "8 requests, 80 tokens written");
        let short = finding(Kind::Short, false, false);
        assert_eq!(
            outcome(std::slice::from_ref(&short)).outcome,
            Outcome::Invalid
        );
        let verdict = outcome(&[finding(Kind::Short, true, false)]);
        assert_eq!(verdict.outcome, Outcome::Success);
        assert_eq!(
            verdict.reason,
            "8 requests, 80 tokens written; accepted: short"
        );
        let verdict = outcome(&[short, finding(Kind::Failed, false, true)]);
        assert_eq!(verdict.outcome, Outcome::TimedOut);
        assert_eq!(verdict.reason, "Failed (and 1 more findings)");
        let mixed = [
            finding(Kind::Failed, false, true),
            finding(Kind::Failed, false, false),
        ];
        assert_eq!(outcome(&mixed).outcome, Outcome::Failure);
        assert_eq!(judge(&[], 0, 0, 0).outcome, Outcome::Failure);
    }
}

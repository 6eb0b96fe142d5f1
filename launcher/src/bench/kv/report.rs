//! What a run of `bench kv` found: as a table, as JSON, and as a verdict. Pure.

use std::fmt::{self, Display};

use serde::{Serialize, Serializer};

use super::pages::Device;
use super::ranks::Pair;
use super::reference::Reference;
use super::shape::ShapeRecord;
use super::transports::Skipped;
use crate::exit::Outcome;

/// How the transfers of one case went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum Status {
    /// Every byte arrived, by checksum and by comparison.
    Pass,
    /// Bytes arrived that are not those that were sent, or not as many.
    Mismatch,
    /// A transfer failed, or could not be started.
    TransferError,
    /// A transfer did not end in time.
    Timeout,
}

impl Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pass => "PASS",
            Self::Mismatch => "MISMATCH",
            Self::TransferError => "TRANSFER_ERROR",
            Self::Timeout => "TIMEOUT",
        })
    }
}

/// One transport at one size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct CaseResult {
    /// The engine's name of the transport.
    pub(crate) transport: String,
    /// Tokens of a request.
    pub(crate) tokens: usize,
    /// Tokens of a block; `null` where pieces have a size of their own.
    pub(crate) tokens_per_block: Option<usize>,
    /// Bytes of a piece, which is one unit of transfer.
    pub(crate) piece_bytes: usize,
    /// Pieces of a request.
    pub(crate) pieces: usize,
    /// Requests in flight at once.
    pub(crate) concurrency: usize,
    /// Whether pieces had checksums; every byte was compared off the clock in any case.
    pub(crate) checksums: bool,
    /// How it went.
    pub(crate) status: Status,
    /// What went wrong, in one line.
    pub(crate) detail: Option<String>,
    /// Bytes that were to be moved, all rounds and requests together.
    pub(crate) bytes_expected: u64,
    /// Bytes that were compared and found equal.
    pub(crate) bytes_verified: u64,
    /// The figures; `null` when it did not pass.
    pub(crate) figures: Option<Figures>,
    /// What the bytes went over, by the transport's own words.
    pub(crate) wire: Option<String>,
}

/// What was measured, with the checksums of both sides inside the time, where there are any.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figures {
    /// Median time of a request, from asking to the last verified byte.
    #[serde(serialize_with = "four_digits")]
    pub(crate) median_ms: f64,
    /// The 99th percentile; of fewer than 100 requests, the longest.
    #[serde(serialize_with = "four_digits")]
    pub(crate) p99_ms: f64,
    /// Gigabytes (10⁹ bytes) a second of the pair: the median over rounds, of all requests of a round together.
    #[serde(serialize_with = "four_digits")]
    pub(crate) gb_per_s: f64,
    /// Requests that were timed.
    pub(crate) samples: usize,
    /// Processor time of both sides while bytes moved, in milliseconds a round.
    #[serde(serialize_with = "four_digits")]
    pub(crate) cpu_ms: f64,
    /// The share of it that the checksum threads took; `null` where the kernel does not tell, or none had anything to sum. What a
    /// transport sums as it copies or sends is not in it: the same case without checksums tells the whole.
    pub(crate) checksum_share: Option<f64>,
}

/// Enough digits for any ratio, few enough for people.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn four_digits<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((value * 1e4).round() / 1e4)
}

/// Whether the run is valid, and fast enough.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Verdict {
    /// Whether every case passed, moved what it should, and was no slower than the floor.
    pub(crate) pass: bool,
    /// In a sentence.
    pub(crate) reason: String,
    #[serde(skip)]
    pub(crate) outcome: Outcome,
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Report {
    /// What was run.
    pub(crate) bench: &'static str,
    /// Of Baton.
    pub(crate) version: &'static str,
    /// The KV.
    pub(crate) shape: ShapeRecord,
    /// Where it lay, on both sides.
    pub(crate) device: Device,
    /// Host that held the KV.
    pub(crate) from: String,
    /// Host that fetched it.
    pub(crate) to: String,
    /// Their ranks, where one srun or mpirun started several pairs.
    pub(crate) ranks: Option<Pair>,
    /// Timed rounds a case.
    pub(crate) repeat: usize,
    /// Rounds before them.
    pub(crate) warmup: usize,
    /// Measured in the same run on the fetching host, so that ratios can be given.
    pub(crate) references: Vec<Reference>,
    /// Transports that are not there.
    pub(crate) skipped: Vec<Skipped>,
    /// One a case.
    pub(crate) results: Vec<CaseResult>,
    /// Cases that there should be.
    pub(crate) cases: usize,
    /// The slowest that is good enough.
    pub(crate) floor_gb_per_s: Option<f64>,
    /// The conclusion.
    pub(crate) verdict: Verdict,
}

/// Judges the cases of a run.
pub(super) fn judge(results: &[CaseResult], cases: usize, floor: Option<f64>) -> Verdict {
    let verdict = |outcome, reason| Verdict {
        pass: outcome == Outcome::Success,
        reason,
        outcome,
    };
    let failed: Vec<&CaseResult> = results
        .iter()
        .filter(|case| case.status != Status::Pass || case.bytes_verified != case.bytes_expected)
        .collect();
    if let Some(first) = failed.first() {
        let all_late = failed.iter().all(|case| case.status == Status::Timeout);
        let outcome = if all_late {
            Outcome::TimedOut
        } else {
            Outcome::Failure
        };
        let detail = first
            .detail
            .as_deref()
            .unwrap_or("not every byte was verified");
        let reason = format!(
            "{} of {cases} cases failed; first {} at {} tokens: {} ({detail})",
            failed.len(),
            first.transport,
            first.tokens,
            first.status
        );
        return verdict(outcome, reason);
    }
    if results.len() != cases || cases == 0 {
        let reason = format!("{} of {cases} cases were run", results.len());
        return verdict(Outcome::Failure, reason);
    }
    let rates = results
        .iter()
        .filter_map(|case| Some((case.figures.as_ref()?.gb_per_s, case)));
    let slowest = rates.min_by(|a, b| a.0.total_cmp(&b.0));
    match (slowest, floor) {
        (Some((rate, case)), Some(floor)) if rate < floor => {
            let reason = format!(
                "{} moves {rate:.3} GB/s at {} tokens, less than the floor of {floor} GB/s",
                case.transport, case.tokens
            );
            verdict(Outcome::BelowFloor, reason)
        }
        (Some(_), _) => {
            let bytes: u64 = results.iter().map(|case| case.bytes_verified).sum();
            let reason = format!("{cases} cases passed, {} MiB verified", bytes >> 20);
            verdict(Outcome::Success, reason)
        }
        (None, _) => verdict(Outcome::Failure, "nothing was timed".to_owned()),
    }
}

/// The table's first line.
pub(super) fn header() -> String {
    format!(
        "{:<9} {:>7} {:>6} {:>17} {:>5}  {:<14} {:>10} {:>10} {:>8} {:>9}  wire",
        "transport",
        "tokens",
        "block",
        "pieces",
        "conc",
        "status",
        "median ms",
        "p99 ms",
        "GB/s",
        "checksum"
    )
}

impl CaseResult {
    /// The case's line of the table, and what went wrong in a second one.
    pub(super) fn row(&self) -> String {
        let block = self
            .tokens_per_block
            .map_or_else(|| "-".to_owned(), |tokens| tokens.to_string());
        let figure = |of: fn(&Figures) -> f64, digits: usize| {
            let value = self.figures.as_ref().map(of);
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        let share = self.figures.as_ref().and_then(|f| f.checksum_share);
        let share = match share {
            _ if !self.checksums => "off".to_owned(),
            Some(share) => format!("{:.0} %", share * 100.0),
            None => "-".to_owned(),
        };
        let mut row = format!(
            "{:<9} {:>7} {:>6} {:>17} {:>5}  {:<14} {:>10} {:>10} {:>8} {:>9}  {}",
            self.transport,
            self.tokens,
            block,
            format!("{} × {}", self.pieces, binary(self.piece_bytes)),
            self.concurrency,
            self.status,
            figure(|f| f.median_ms, 2),
            figure(|f| f.p99_ms, 2),
            figure(|f| f.gb_per_s, 2),
            share,
            self.wire.as_deref().unwrap_or("-"),
        );
        if let Some(detail) = &self.detail {
            row.push_str("\n          ");
            row.push_str(detail);
        }
        row
    }
}

fn binary(bytes: usize) -> String {
    let whole = |unit: usize| bytes >= unit && bytes.is_multiple_of(unit);
    if whole(1 << 20) {
        format!("{} MiB", bytes >> 20)
    } else if whole(1 << 10) {
        format!("{} KiB", bytes >> 10)
    } else {
        format!("{bytes} B")
    }
}

impl Report {
    /// What was measured, for people.
    pub(crate) fn table(&self) -> String {
        let rows = self.results.iter().map(CaseResult::row);
        let references = self.references.iter().map(Reference::to_string);
        let lines = [header()].into_iter().chain(rows).chain(references);
        lines.collect::<Vec<_>>().join("\n")
    }

    /// What stands below the table.
    pub(super) fn footer(&self) -> String {
        let mut lines = Vec::new();
        for skipped in &self.skipped {
            let reason = skipped.reason.replace('\n', "; ");
            lines.push(format!("{:<9} skipped: {reason}", skipped.transport));
        }
        for reference in &self.references {
            lines.push(reference.to_string());
        }
        let word = if self.verdict.pass {
            "valid"
        } else {
            "not valid"
        };
        lines.push(format!("{word}: {}", self.verdict.reason));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(status: Status, gb_per_s: f64) -> CaseResult {
        CaseResult {
            transport: "tcp".to_owned(),
            tokens: 512,
            tokens_per_block: Some(32),
            piece_bytes: 4 << 20,
            pieces: 16,
            concurrency: 1,
            checksums: true,
            status,
            detail: (status != Status::Pass).then(|| "it broke".to_owned()),
            bytes_expected: 64 << 20,
            bytes_verified: if status == Status::Pass { 64 << 20 } else { 0 },
            figures: (status == Status::Pass).then_some(Figures {
                median_ms: 12.345_678,
                p99_ms: 13.0,
                gb_per_s,
                samples: 5,
                cpu_ms: 40.0,
                checksum_share: Some(0.25),
            }),
            wire: Some("tcp over lo".to_owned()),
        }
    }

    #[test]
    fn every_way_to_end_has_its_exit_code() {
        use Status::{Mismatch, Pass, Timeout, TransferError};
        let outcome = |statuses: &[Status], cases, floor| {
            let results: Vec<_> = statuses.iter().map(|status| case(*status, 2.0)).collect();
            judge(&results, cases, floor).outcome
        };
        assert_eq!(outcome(&[Pass, Pass], 2, None), Outcome::Success);
        assert_eq!(outcome(&[Pass, Pass], 2, Some(2.0)), Outcome::Success);
        assert_eq!(outcome(&[Pass, Pass], 2, Some(2.1)), Outcome::BelowFloor);
        assert_eq!(outcome(&[Pass], 2, None), Outcome::Failure);
        assert_eq!(outcome(&[], 0, None), Outcome::Failure);
        assert_eq!(outcome(&[Pass, Mismatch], 2, Some(9.0)), Outcome::Failure);
        assert_eq!(outcome(&[Pass, Timeout], 2, None), Outcome::TimedOut);
        assert_eq!(
            outcome(&[TransferError, Timeout], 2, None),
            Outcome::Failure
        );
    }

    #[test]
    fn a_case_that_verified_too_little_did_not_pass() {
        let short = CaseResult {
            bytes_verified: 1,
            ..case(Status::Pass, 2.0)
        };
        let verdict = judge(&[short], 1, None);
        assert!(!verdict.pass);
        assert!(
            verdict.reason.contains("not every byte"),
            "{}",
            verdict.reason
        );
    }

    #[test]
    fn rows_stand_under_their_header() {
        let row = case(Status::Pass, 2.0).row();
        assert_eq!(
            row,
            "tcp           512     32        16 × 4 MiB     1  PASS                12.35      13.00     2.00      25 %  tcp over lo"
        );
        let at = |text: &str, word: &str| text.split(word).next().map(|part| part.chars().count());
        assert_eq!(at(&row, "tcp over"), at(&header(), "wire"));
        let failed = case(Status::Timeout, 0.0).row();
        assert!(
            failed.contains("TIMEOUT") && failed.ends_with("it broke"),
            "{failed}"
        );
    }

    #[test]
    fn programs_read_statuses_as_they_are_called() {
        let json = serde_json::to_value(case(Status::TransferError, 0.0)).unwrap();
        assert_eq!(json["status"], "TRANSFER_ERROR");
        assert_eq!(json["figures"], serde_json::Value::Null);
        let json = serde_json::to_value(case(Status::Pass, 2.0)).unwrap();
        assert_eq!(json["figures"]["median_ms"], 12.3457);
    }
}

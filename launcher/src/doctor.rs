//! `baton doctor`: what this machine or allocation can do, what is lost without the rest, and how fast its wires are.
//!
//! Libraries are opened and asked for their version; nothing is initialised, no GPU is touched, no packet leaves the
//! machine. Absent: other nodes (`baton bench kv --listen` and `--peer` measure between two), models and configuration
//! files (`baton config check`).

mod library;
mod machine;
mod native;

use std::io::Write;

use anyhow::Context;
use baton_engine::transceiver::{default_transport, transports};
use serde::Serialize;

use crate::bench::kv;
use crate::cli::DoctorArgs;
use crate::exit::Outcome;

/// What a finding means for serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    /// It is there.
    Good,
    /// It is not there, or not enough: something is lost, and serving goes on.
    Absent,
    /// Nothing can be served.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    /// `machine`, `limit`, `library`, `transport`.
    area: &'static str,
    name: String,
    level: Level,
    /// What is there, or why it is not.
    found: String,
    /// What cannot be had without it.
    lost: Option<String>,
    /// How to get it.
    hint: Option<String>,
}

impl Finding {
    fn of(level: Level, area: &'static str, name: &str, found: String) -> Self {
        Self {
            area,
            name: name.to_owned(),
            level,
            found,
            lost: None,
            hint: None,
        }
    }

    fn good(area: &'static str, name: &str, found: String) -> Self {
        Self::of(Level::Good, area, name, found)
    }

    fn absent(area: &'static str, name: &str, found: String) -> Self {
        Self::of(Level::Absent, area, name, found)
    }

    fn bad(area: &'static str, name: &str, found: String) -> Self {
        Self::of(Level::Bad, area, name, found)
    }

    fn losing(mut self, lost: &str, hint: &str) -> Self {
        self.lost = Some(lost.to_owned());
        self.hint = (!hint.is_empty()).then(|| hint.to_owned());
        self
    }

    /// Its lines for people.
    fn text(&self) -> String {
        let mark = match self.level {
            Level::Good => "ok",
            Level::Absent => "--",
            Level::Bad => "!!",
        };
        let mut text = format!("  {mark}  {:<14} {}", self.name, self.found);
        for (word, line) in [("lost", &self.lost), ("hint", &self.hint)] {
            if let Some(line) = line {
                text.push_str(&format!("\n        {word}: {line}"));
            }
        }
        text
    }
}

/// What `DEFAULT` takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct DefaultTransport {
    name: &'static str,
    reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Verdict {
    pass: bool,
    reason: String,
    #[serde(skip)]
    outcome: Outcome,
}

/// All that was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Examination {
    version: &'static str,
    findings: Vec<Finding>,
    default_transport: Option<DefaultTransport>,
    /// As `baton bench kv --json` has it; `null` when no bytes were moved.
    wire: Option<kv::Report>,
    verdict: Verdict,
}

/// Runs the command.
///
/// # Errors
/// When the wires cannot be measured at all.
pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<Outcome> {
    let mut findings = machine::look();
    findings.extend(native::look());
    findings.extend(wires());
    let wire = if args.no_wire {
        None
    } else {
        Some(kv::quick(args.wire_floor)?)
    };
    let default_transport =
        default_transport().map(|(name, reason)| DefaultTransport { name, reason });
    let verdict = judge(&findings, default_transport.is_some(), wire.as_ref());
    let examination = Examination {
        version: env!("CARGO_PKG_VERSION"),
        findings,
        default_transport,
        wire,
        verdict,
    };
    let text = if args.json {
        serde_json::to_string_pretty(&examination)?
    } else {
        examination.text()
    };
    writeln!(std::io::stdout(), "{text}").context("cannot write to stdout")?;
    Ok(examination.verdict.outcome)
}

/// The transports, by the engine's own account.
fn wires() -> Vec<Finding> {
    transports()
        .into_iter()
        .map(|transport| match transport.state {
            Ok(capability) => {
                let memory: Vec<String> = capability
                    .memory
                    .iter()
                    .map(|kind| format!("{kind:?}").to_lowercase())
                    .collect();
                let reach = match capability.reach {
                    baton_engine::transport::Reach::SameHost => "this host only",
                    baton_engine::transport::Reach::AnyHost => "any host",
                };
                let library = transport.library.map(|library| format!(", {library}"));
                let library = library.unwrap_or_default();
                let found = format!("{} memory, {reach}{library}", memory.join(" and "));
                Finding::good("transport", transport.name, found)
            }
            Err(reason) => {
                let (reason, hint) = reason.split_once("\nhint: ").unwrap_or((&reason, ""));
                Finding::absent("transport", transport.name, reason.to_owned())
                    .losing("kv over this transport", hint)
            }
        })
        .collect()
}

fn judge(findings: &[Finding], has_transport: bool, wire: Option<&kv::Report>) -> Verdict {
    let verdict = |outcome, reason| Verdict {
        pass: outcome == Outcome::Success,
        reason,
        outcome,
    };
    let bad = findings.iter().find(|finding| finding.level == Level::Bad);
    if let Some(bad) = bad {
        let reason = format!("{}: {}", bad.name, bad.found);
        return verdict(Outcome::Unavailable, reason);
    }
    if !has_transport {
        return verdict(Outcome::Unavailable, "no kv transport".to_owned());
    }
    match wire.map(|report| &report.verdict) {
        Some(wire) if !wire.pass => verdict(wire.outcome, wire.reason.clone()),
        Some(_) | None => verdict(
            Outcome::Success,
            "what is needed to serve is there".to_owned(),
        ),
    }
}

impl Examination {
    fn text(&self) -> String {
        let mut lines = vec![format!("baton {}", self.version)];
        let mut area = "";
        for finding in &self.findings {
            if finding.area != area {
                area = finding.area;
                lines.push(String::new());
                lines.push(area.to_owned());
            }
            lines.push(finding.text());
        }
        if let Some(choice) = &self.default_transport {
            lines.push(format!("\nkv goes over {}: {}", choice.name, choice.reason));
        }
        if let Some(report) = &self.wire {
            lines.push(format!("\n{}", report.table()));
        }
        let word = if self.verdict.pass { "ok" } else { "not ok" };
        lines.push(format!("\n{word}: {}", self.verdict.reason));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_that_cannot_serve_is_the_verdict() {
        let good = Finding::good("machine", "memory", "much".to_owned());
        let absent =
            Finding::absent("library", "nccl", "none".to_owned()).losing("speed", "get it");
        let bad = Finding::bad("limit", "open files", "3".to_owned());
        let fine = [good.clone(), absent.clone()];
        assert_eq!(judge(&fine, true, None).outcome, Outcome::Success);
        assert_eq!(judge(&fine, false, None).outcome, Outcome::Unavailable);
        let verdict = judge(&[good, bad], true, None);
        assert_eq!(verdict.outcome, Outcome::Unavailable);
        assert_eq!(verdict.reason, "open files: 3");
        assert_eq!(
            absent.text(),
            "  --  nccl           none\n        lost: speed\n        hint: get it"
        );
    }

    #[test]
    fn every_transport_that_the_engine_knows_is_listed() {
        let names: Vec<String> = wires().into_iter().map(|finding| finding.name).collect();
        for name in ["tcp", "shm", "ucx", "nixl", "mpi"] {
            assert!(
                names.iter().any(|known| known == name),
                "{name} in {names:?}"
            );
        }
    }
}

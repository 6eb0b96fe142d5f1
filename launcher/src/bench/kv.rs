//! `baton bench kv`: moves the KV of a model's shape between two processes with the engine's own transceiver.
//!
//! One process holds the KV and the other fetches it; the first is a child of the second, a process of another machine,
//! or the next rank of one srun or mpirun. Every byte of every round is compared off the clock, besides the checksums on it. The
//! KV lies in ordinary memory, or in that of GPUs. Absent: a model.
//!
//! Invariant: a run is valid only when each case that was planned passed and moved exactly what it should.

mod control;
mod cpu;
mod fetch;
mod hold;
mod message;
mod node;
mod pages;
mod ranks;
mod reference;
mod report;
mod shape;
mod transports;
mod wire;

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, anyhow};
use baton_configs::small_file::write_whole;
use baton_engine::machine::available_bytes;

use self::control::Control;
use self::fetch::{Failure, Rounds, Tally};
use self::hold::of_control;
use self::message::{Answer, Ask, PROTOCOL, Setting};
use self::pages::{Device, Side};
use self::ranks::Part;
use self::report::{CaseResult, Status};
use self::shape::{Cut, Geometry, Shape, ShapeRecord};
use self::transports::Selection;
use crate::cli::{BenchKvArgs, ChecksumArg, KvDeviceArg, ShapeArgs, TransportArg};
use crate::exit::{Outcome, WithOutcome};

pub(crate) use self::report::Report;

/// How long the other side may take to say who it is.
const HELLO: Duration = Duration::from_secs(30);

/// A look that takes a second or two.
const QUICK_SHAPE: &str = "llama-3.1-8b";
const QUICK_TOKENS: usize = 512;
const QUICK_TIMEOUT: Duration = Duration::from_secs(30);
const QUICK: Rounds = Rounds {
    warmup: 1,
    timed: 3,
};

/// One transport at one size.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Case {
    transport: &'static str,
    tokens: usize,
    tokens_per_block: Option<usize>,
    geometry: Geometry,
    concurrency: usize,
    checksums: bool,
}

/// What a run does, but for its transports.
#[derive(Debug, Clone, PartialEq)]
struct Plan {
    shape: ShapeRecord,
    device: Device,
    /// Tokens, tokens per block, KV of a request.
    sizes: Vec<(usize, Option<usize>, Geometry)>,
    concurrency: Vec<usize>,
    /// With checksums, without, or both.
    checksums: &'static [bool],
    rounds: Rounds,
    timeout: Duration,
    floor: Option<f64>,
}

/// Runs the command.
///
/// # Errors
/// When nothing can be measured; what was measured and did not pass is an [`Outcome`].
pub(crate) fn run(args: &BenchKvArgs) -> anyhow::Result<Outcome> {
    let wait = Duration::from_secs(args.peer.wait);
    if let Some(address) = &args.peer.listen {
        let (listener, bound) = control::bind(address).map_err(of_control)?;
        if let Some(path) = &args.peer.report_addr {
            write_whole(path, bound.to_string())
                .with_context(|| format!("cannot write {}", path.display()))
                .outcome(Outcome::Unavailable)?;
        }
        tracing::info!(address = %bound, "waiting for the fetching side");
        let mut control = Control::accept(&listener, wait).map_err(of_control)?;
        return hold::serve(&mut control);
    }
    let plan = Plan::new(args)?;
    // What is missing here is said before anything is started.
    transports::select(&args.transport, plan.device, &[])?;
    plan.device.ordinal(Side::Fetching)?;
    let (mut control, pair) = match &args.peer.peer {
        Some(address) => (Control::connect(address, wait).map_err(of_control)?, None),
        None => match ranks::part(wait)? {
            Some(Part::Hold(mut control)) => return hold::serve(&mut control),
            Some(Part::Fetch(control, pair)) => (control, Some(pair)),
            None => {
                plan.check_memory(true)?;
                (Control::child().map_err(of_control)?, None)
            }
        },
    };
    plan.check_memory(false)?;
    // Pairs that run at the same time must not mix their lines.
    let mut kept = Vec::new();
    let mut print = |line: &str| -> anyhow::Result<()> {
        match (args.json, pair) {
            (true, _) => Ok(()),
            (false, Some(_)) => {
                kept.push(line.to_owned());
                Ok(())
            }
            (false, None) => say(line),
        }
    };
    let select = |missing: &[_]| transports::select(&args.transport, plan.device, missing);
    let mut report = plan.run(&mut control, select, &mut print)?;
    report.ranks = pair;
    print(&report.footer())?;
    if let Some(pair) = pair.filter(|_| !args.json) {
        say(&format!(
            "rank {} from rank {}\n{}",
            pair.to,
            pair.from,
            kept.join("\n")
        ))?;
    }
    publish(args, &report)?;
    Ok(report.verdict.outcome)
}

fn say(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{text}").context("cannot write to stdout")
}

fn publish(args: &BenchKvArgs, report: &Report) -> anyhow::Result<()> {
    if args.json {
        // One line a pair, where there may be several.
        let text = match report.ranks {
            Some(_) => serde_json::to_string(report)?,
            None => serde_json::to_string_pretty(report)?,
        };
        say(&text)?;
    }
    if let Some(path) = &args.output {
        let text = serde_json::to_string_pretty(report)? + "\n";
        write_whole(path, &text)
            .with_context(|| format!("cannot write {}", path.display()))
            .outcome(Outcome::Unavailable)?;
    }
    Ok(())
}

/// A quick look at every wire between two processes of this machine: one size, few rounds.
///
/// # Errors
/// When nothing can be measured.
pub(crate) fn quick(floor: Option<f64>) -> anyhow::Result<Report> {
    let plan = Plan {
        rounds: QUICK,
        floor,
        ..Plan::of(
            &Shape::resolve(&ShapeArgs::named(QUICK_SHAPE))?,
            &[QUICK_TOKENS],
            &[Cut::Blocks { tokens: 32 }],
        )?
    };
    plan.check_memory(true)?;
    let mut control = Control::child().map_err(of_control)?;
    let select = |missing: &[_]| transports::select(&[TransportArg::All], Device::Cpu, missing);
    plan.run(&mut control, select, &mut |_| Ok(()))
}

/// The holding side, as a child.
///
/// # Errors
/// When its parent goes without a word.
pub(crate) fn hold() -> anyhow::Result<Outcome> {
    let mut control = Control::stdio().map_err(of_control)?;
    hold::serve(&mut control)
}

impl Plan {
    fn new(args: &BenchKvArgs) -> anyhow::Result<Self> {
        let shape = Shape::resolve(&args.shape)?;
        let cuts: Vec<Cut> = match args.piece_bytes {
            Some(bytes) => vec![Cut::Pieces { bytes }],
            None => args
                .tokens_per_block
                .iter()
                .map(|tokens| Cut::Blocks { tokens: *tokens })
                .collect(),
        };
        if args.concurrency.contains(&0) {
            return Err(anyhow!("a concurrency of 0 moves nothing")).outcome(Outcome::Usage);
        }
        Ok(Self {
            device: match args.device {
                KvDeviceArg::Cpu => Device::Cpu,
                KvDeviceArg::Cuda => Device::Cuda,
            },
            concurrency: args.concurrency.clone(),
            checksums: match args.checksum {
                ChecksumArg::On => &[true],
                ChecksumArg::Off => &[false],
                ChecksumArg::Both => &[true, false],
            },
            rounds: Rounds {
                warmup: args.warmup,
                timed: args.repeat,
            },
            timeout: Duration::from_secs(args.timeout),
            floor: args.floor,
            ..Self::of(&shape, &args.tokens, &cuts)?
        })
    }

    /// One request at a time, of each of these sizes.
    fn of(
        (record, shape): &(ShapeRecord, Shape),
        tokens: &[usize],
        cuts: &[Cut],
    ) -> anyhow::Result<Self> {
        let mut sizes = Vec::new();
        for tokens in tokens {
            for cut in cuts {
                let block = match cut {
                    Cut::Blocks { tokens } => Some(*tokens),
                    Cut::Pieces { .. } => None,
                };
                sizes.push((*tokens, block, Geometry::new(shape, *tokens, *cut)?));
            }
        }
        Ok(Self {
            shape: record.clone(),
            device: Device::Cpu,
            sizes,
            concurrency: vec![1],
            checksums: &[true],
            rounds: QUICK,
            timeout: QUICK_TIMEOUT,
            floor: None,
        })
    }

    /// The most that one side holds.
    fn bytes_max(&self) -> u64 {
        let request = self
            .sizes
            .iter()
            .map(|(_, _, size)| size.request_bytes() as u64);
        let requests = self.concurrency.iter().map(|count| *count as u64);
        request
            .max()
            .unwrap_or(0)
            .saturating_mul(requests.max().unwrap_or(0))
    }

    /// Half an hour of small cases must not end in a large one that cannot be.
    fn check_memory(&self, both_sides: bool) -> anyhow::Result<()> {
        if self.device != Device::Cpu {
            // What a GPU has is said when it is asked for.
            return Ok(());
        }
        let needed = self
            .bytes_max()
            .saturating_mul(if both_sides { 2 } else { 1 });
        let free = available_bytes();
        if needed > free - free / 8 {
            return Err(anyhow!(
                "the largest case takes {} MiB of memory here, and {} are free\nhint: fewer --tokens or a lower --concurrency",
                needed >> 20,
                free >> 20
            ))
            .outcome(Outcome::Unavailable);
        }
        Ok(())
    }

    fn cases(&self, names: &[&'static str]) -> Vec<Case> {
        let mut cases = Vec::new();
        for transport in names {
            for (tokens, tokens_per_block, geometry) in &self.sizes {
                let each = self.concurrency.iter().flat_map(|concurrency| {
                    let each = self.checksums.iter();
                    each.map(move |checksums| (*concurrency, *checksums))
                });
                cases.extend(each.map(|(concurrency, checksums)| Case {
                    transport,
                    tokens: *tokens,
                    tokens_per_block: *tokens_per_block,
                    geometry: *geometry,
                    concurrency,
                    checksums,
                }));
            }
        }
        cases
    }

    /// Runs all cases; a line of the table is said as soon as it is known.
    fn run(
        &self,
        control: &mut Control,
        select: impl FnOnce(&[transports::Skipped]) -> anyhow::Result<Selection>,
        say: &mut dyn FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<Report> {
        let (from, missing) = greet(control)?;
        let Selection { names, skipped } = select(&missing)?;
        let cases = self.cases(&names);
        let bytes = usize::try_from(self.bytes_max()).unwrap_or(usize::MAX);
        let references = match self.device {
            Device::Cpu => reference::measure(bytes),
            Device::Cuda => reference::measure_gpus()?,
        };
        say(&report::header())?;
        let mut results = Vec::new();
        for case in &cases {
            let (result, is_final) = self.run_case(control, case);
            say(&result.row())?;
            results.push(result);
            if is_final {
                break;
            }
        }
        // It may be gone already; its end is nobody's business any more.
        let _ = control.ask(&Ask::End, "end", HELLO);
        Ok(Report {
            bench: "kv",
            version: env!("CARGO_PKG_VERSION"),
            shape: self.shape.clone(),
            device: self.device,
            from,
            to: hold::host_name(),
            ranks: None,
            repeat: self.rounds.timed,
            warmup: self.rounds.warmup,
            references,
            skipped,
            cases: cases.len(),
            floor_gb_per_s: self.floor,
            verdict: report::judge(&results, cases.len(), self.floor),
            results,
        })
    }

    /// One case's result, and whether the other side is lost.
    fn run_case(&self, control: &mut Control, case: &Case) -> (CaseResult, bool) {
        let setting = Setting {
            transport: case.transport.to_owned(),
            device: self.device,
            geometry: case.geometry,
            concurrency: case.concurrency,
            checksums: case.checksums,
            run: fresh(),
            timeout_ms: u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX),
        };
        let mut tally = Tally::default();
        let outcome = fetch::run(control, &setting, self.rounds, &mut tally);
        let rounds = (self.rounds.warmup + self.rounds.timed) as u64;
        let (status, detail, figures, is_final) = match outcome {
            Ok(figures) => (Status::Pass, None, Some(figures), false),
            Err(Failure {
                status,
                detail,
                is_final,
            }) => (status, Some(detail.replace('\n', "; ")), None, is_final),
        };
        if figures.is_none() && !is_final {
            // Its pages make room for the next case; if it cannot, that one will say so.
            let _ = control.ask(&Ask::Clear, "let its pages go", HELLO);
        }
        let result = CaseResult {
            transport: setting.transport.clone(),
            tokens: case.tokens,
            tokens_per_block: case.tokens_per_block,
            piece_bytes: case.geometry.page_bytes(),
            pieces: case.geometry.pages,
            concurrency: case.concurrency,
            checksums: case.checksums,
            status,
            detail,
            bytes_expected: setting.round_bytes() * rounds,
            bytes_verified: tally.bytes_verified,
            figures,
            wire: tally.wire,
        };
        (result, is_final)
    }
}

/// Learns who the other side is and what it lacks.
fn greet(control: &mut Control) -> anyhow::Result<(String, Vec<transports::Skipped>)> {
    let hello = Ask::Hello { protocol: PROTOCOL };
    let answer = control
        .ask(&hello, "say hello", HELLO)
        .map_err(of_control)?;
    match answer {
        Answer::Hello {
            protocol: PROTOCOL,
            host,
            missing,
        } => Ok((host, missing)),
        Answer::Hello { protocol, host, .. } => Err(anyhow!(
            "{host} runs another version of baton: protocol {protocol} there, {PROTOCOL} here"
        ))
        .outcome(Outcome::Failure),
        _ => Err(of_control(control.foreign(&answer))),
    }
}

/// A number that no other run has.
fn fresh() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

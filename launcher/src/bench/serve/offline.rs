//! The engine alone: a child of this program runs it and measures, this side listens and judges.
//!
//! The child writes one JSON line a message to its standard output; its log goes to standard error. The
//! kernel ends it with this process. Invariant: every wait for its next word has a deadline.

use std::io::{self, Write};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use baton_configs::llm;
use baton_configs::yaml::Document;
use baton_engine::engine::{EngineHandle, EngineThread};
use baton_engine::serve::{Offline, ServeOptions, offline};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{ChildStdout, Command};

use super::engine::EngineTarget;
use super::load::{Progress, Target};
use super::plan::{Case, Lengths};
use super::prompts::{Requests, Source};
use super::report::{Run, StartRecord, TargetRecord};
use super::{Measuring, Setting, sampling};
use crate::cli::BenchServeArgs;
use crate::exit::{self, Outcome, WithOutcome};
use crate::world::membership::Membership;
use crate::{files, launch, os, servers};

/// How long the engine is waited for, where nothing is said.
const START: Duration = Duration::from_secs(1800);
/// A run says how far it is more often.
const SILENCE_MAX: Duration = Duration::from_secs(60);
const PROGRESS_PERIOD: Duration = Duration::from_secs(1);
/// Longest line: the times of some millions of tokens.
const LINE_BYTES_MAX: u64 = 1 << 30;
/// How long the engine's thread, and the child, may take to end.
const END: Duration = Duration::from_secs(20);
/// Prompt tokens of the request that the start is measured by; fewer where the longest sequence is not twice as long.
const FIRST_PROMPT: usize = 128;

/// What the child says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Word {
    /// The engine can take requests.
    Ready {
        model: String,
        backend: String,
        vocab: u32,
    },
    /// The first token of its first request has come.
    FirstToken,
    /// Nothing new; so many requests of a run have ended.
    Progress { ended: usize },
    /// A run.
    Run(Box<Run>),
    /// All is done.
    Done,
    /// It cannot go on, and ends with this exit code.
    Failed { reason: String, code: u8 },
}

/// What a child measured.
#[derive(Debug)]
pub(super) struct Heard {
    pub(super) target: TargetRecord,
    pub(super) vocab: u32,
    pub(super) runs: Vec<Run>,
}

/// Runs the child to its end.
///
/// # Errors
/// When it cannot be started, fails, or is silent for too long.
pub(super) async fn run(args: &BenchServeArgs) -> anyhow::Result<Heard> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let begun = Instant::now();
    let mut command = Command::new(program);
    command
        .args(std::env::args_os().skip(1))
        .arg("--engine-side")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    os::bind_to_parent(&mut command);
    let mut child = command
        .spawn()
        .context("cannot start the engine's process")?;
    let output = child
        .stdout
        .take()
        .context("the engine's process has no output")?;
    let heard = listen(args, output, begun).await;
    let ended = tokio::time::timeout(END, child.wait()).await;
    match (heard, ended) {
        (Ok(heard), _) => Ok(heard),
        (Err(Silence::Gone), Ok(Ok(status))) => Err(anyhow!(
            "the engine's process ended in the middle of its work: {}",
            crate::child::describe(Some(status))
        )),
        (Err(Silence::Gone), _) => Err(anyhow!("the engine's process has closed its output")),
        (Err(Silence::Error(error)), _) => Err(error),
    }
}

/// Why nothing more is heard.
enum Silence {
    Gone,
    Error(anyhow::Error),
}

impl From<anyhow::Error> for Silence {
    fn from(error: anyhow::Error) -> Self {
        Self::Error(error)
    }
}

async fn listen(
    args: &BenchServeArgs,
    output: ChildStdout,
    begun: Instant,
) -> Result<Heard, Silence> {
    let mut words = BufReader::new(output);
    let start = args.target.wait.map_or(START, Duration::from_secs);
    let ready = word(&mut words, start, "load its model").await?;
    let ready_s = begun.elapsed().as_secs_f64();
    let Word::Ready {
        model,
        backend,
        vocab,
    } = ready
    else {
        return Err(foreign(&ready));
    };
    let first = word(&mut words, start, "write its first token").await?;
    let first_token_s = begun.elapsed().as_secs_f64();
    let Word::FirstToken = first else {
        return Err(foreign(&first));
    };
    let mut heard = Heard {
        target: TargetRecord {
            kind: "engine".to_owned(),
            url: None,
            model,
            version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            backend: Some(backend),
            start: Some(StartRecord {
                ready_s,
                first_token_s,
            }),
        },
        vocab,
        runs: Vec::new(),
    };
    loop {
        match word(&mut words, SILENCE_MAX, "say how far it is").await? {
            Word::Progress { ended } => tracing::debug!(ended, "requests have ended"),
            Word::Run(run) => heard.runs.push(*run),
            Word::Done => return Ok(heard),
            word => return Err(foreign(&word)),
        }
    }
}

fn foreign(word: &Word) -> Silence {
    let shown: String = format!("{word:?}").chars().take(80).collect();
    Silence::Error(anyhow!(
        "the engine's process said {shown} where something else was due"
    ))
}

/// The child's next word.
async fn word(
    words: &mut BufReader<ChildStdout>,
    limit: Duration,
    what: &str,
) -> Result<Word, Silence> {
    let mut line = Vec::new();
    let mut bounded = words.take(LINE_BYTES_MAX);
    let read = tokio::time::timeout(limit, bounded.read_until(b'\n', &mut line)).await;
    let late = || {
        let text = format!(
            "the engine's process did not {what} within {} s",
            limit.as_secs()
        );
        Silence::Error(exit::coded(Outcome::TimedOut, anyhow!(text)))
    };
    let read = read.map_err(|_| late())?;
    if !matches!(read, Ok(1..)) || line.last() != Some(&b'\n') {
        return Err(Silence::Gone);
    }
    let word = serde_json::from_slice(&line);
    match word.context("the engine's process speaks another language")? {
        Word::Failed { reason, code } => Err(Silence::Error(exit::coded(
            Outcome::Code(code),
            anyhow!(reason),
        ))),
        word => Ok(word),
    }
}

/// The child's life: loads, measures, says what it found.
///
/// # Errors
/// When nobody listens.
pub(super) fn engine_side(args: &BenchServeArgs) -> anyhow::Result<Outcome> {
    let done = measure(args);
    match done {
        Ok(Ended::Here) => Ok(Outcome::Success),
        // The leader of the ranks has spoken.
        Ok(Ended::World(outcome)) => Ok(outcome),
        Err(error) => {
            let outcome = exit::of(&error);
            say(&Word::Failed {
                reason: format!("{error:#}"),
                code: outcome.code(),
            })?;
            Ok(outcome)
        }
    }
}

enum Ended {
    Here,
    World(Outcome),
}

fn measure(args: &BenchServeArgs) -> anyhow::Result<Ended> {
    let membership = Membership::from_environment().outcome(Outcome::Usage)?;
    let mut options = options(args)?;
    if membership.is_none() && launch::ranks_of(&options.llm) > 1 {
        let words: Option<Vec<String>> = std::env::args_os()
            .skip(1)
            .map(|word| word.into_string().ok())
            .collect();
        let words = words
            .ok_or_else(|| anyhow!("an argument is not UTF-8"))
            .outcome(Outcome::Usage)?;
        return launch::local(&options.llm, words, args.log_level).map(Ended::World);
    }
    // Calling for other ranks needs a runtime that runs by itself.
    let calls = crate::on_all_cores()?;
    if let Some(membership) = membership {
        servers::join(&mut options, membership, calls.handle().clone())?;
    }
    let Offline {
        engine,
        thread,
        model,
        backend,
        vocab,
    } = offline(&options, &AtomicBool::new(false)).map_err(servers::of_serve)?;
    say(&Word::Ready {
        model,
        backend,
        vocab,
    })?;
    let runs = all_runs(args, engine.clone(), vocab);
    let measured = followers()?.block_on(runs);
    engine.shutdown(Instant::now());
    end(thread)?;
    drop(calls);
    measured?;
    say(&Word::Done)?;
    Ok(Ended::Here)
}

/// The runtime that follows answers. One thread, so that the engine's has one sleeper to wake a step; and no I/O, because a
/// runtime that has it is woken by a system call for every token, at the engine's cost.
fn followers() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .outcome(Outcome::Unavailable)
}

async fn all_runs(args: &BenchServeArgs, engine: EngineHandle, vocab: u32) -> anyhow::Result<()> {
    let max_seq_len = engine.limits().max_seq_len;
    let target = Target::Engine(Arc::new(EngineTarget {
        engine,
        sampling: sampling::params(&args.sampling),
        ignore_eos: args.prompts.ignore_eos,
        timeout: Duration::from_secs(args.load.request_timeout),
    }));
    let setting = Setting::new(args)?;
    let source = match setting.dataset.clone() {
        Some(dataset) => dataset,
        None => Source::ids(Some(args.prompts.vocab_size.unwrap_or(vocab))),
    };
    let first = Requests::new(source.clone(), first_case(max_seq_len), setting.seed, 0);
    let records = super::load::run(&target, &Arc::new(first), &Progress::default()).await?;
    if let Some(failure) = records.into_iter().find_map(|record| record.answer.failure) {
        return Err(anyhow!("the first request failed: {}", failure.text));
    }
    say(&Word::FirstToken)?;
    let measuring = Measuring {
        target,
        source,
        setting,
        is_alone: false,
    };
    let progress = Progress::default();
    let tell = async {
        loop {
            tokio::time::sleep(PROGRESS_PERIOD).await;
            say(&Word::Progress {
                ended: progress.ended(),
            })?;
        }
    };
    let mut said = |run: Run| say(&Word::Run(Box::new(run)));
    tokio::select! {
        done = measuring.all(&progress, &mut said) => done,
        gone = tell => gone,
    }
}

/// The request that shows that the engine is there.
fn first_case(max_seq_len: usize) -> Case {
    let tokens = FIRST_PROMPT.min(max_seq_len / 2).max(1);
    Case {
        name: "first token".to_owned(),
        requests: 1,
        input: Some(Lengths::fixed(u32::try_from(tokens).unwrap_or(1))),
        output: Lengths::fixed(1),
        concurrency: Some(1),
        request_rate: None,
        warmup: 0,
        warmup_output: None,
        figures: Vec::new(),
    }
}

fn end(thread: EngineThread) -> anyhow::Result<()> {
    thread
        .join(Instant::now() + END)
        .context("the engine")
        .outcome(Outcome::Failure)
}

fn options(args: &BenchServeArgs) -> anyhow::Result<ServeOptions> {
    let file = args.config.as_deref().map(Document::read);
    let file = file.transpose().outcome(Outcome::Config)?;
    let overrides = servers::engine_overrides(&args.engine);
    let (mut llm, warnings) = llm::resolve(file.as_ref(), &overrides).outcome(Outcome::Config)?;
    files::warn(&warnings);
    // Nothing is handed off here, and nobody is told of it.
    llm.transceiver = None;
    llm.cluster = None;
    let model = args
        .target
        .offline
        .clone()
        .context("--offline names no model")?;
    let mut options = ServeOptions::new(model);
    options.llm = llm;
    Ok(options)
}

fn say(word: &Word) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(word)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line)
        .and_then(|()| out.flush())
        .context("nobody listens to the engine's process")
}

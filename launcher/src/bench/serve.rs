//! `baton bench serve`: load on a server, a deployment or the engine alone; what users wait, what the machine writes, and
//! whether the figures mean something.
//!
//! Prompts, lengths and times follow from a seed. A server is asked over OpenAI's API, whoever made it; the engine alone
//! runs in a child of this process and is asked through its own handle. Absent: checking answers for sense, other APIs.
//!
//! Invariant: nothing is reported without a verdict, and a run that failed, fell short or could not keep up with itself
//! never ends with exit code 0.

mod cost;
mod engine;
mod http;
mod load;
mod offline;
mod plan;
mod prompts;
mod record;
mod report;
mod sampling;
mod sse;
mod stats;
mod verdict;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use baton_configs::small_file::write_whole;
use serde_json::Value;

use self::cost::Watch;
use self::http::{Asking, HttpTarget, ServerFacts};
use self::load::{Progress, Target};
use self::plan::Case;
use self::prompts::{Requests, Source};
use self::report::{Parameters, Report, Run, TargetRecord};
use self::stats::Summary;
use self::verdict::{Finding, judge};
use crate::cli::{
    BenchServeArgs, EndpointArg, EngineArgs, FindingArg, ObjectiveArg, PromptFormatArg,
};
use crate::exit::{Outcome, WithOutcome};
use crate::servers::raise_open_files;

/// What is measured, and how it is judged.
#[derive(Debug, Clone)]
struct Setting {
    cases: Vec<Case>,
    dataset: Option<Source>,
    seed: u64,
    repeat: usize,
    objectives: Vec<(ObjectiveArg, f64)>,
    accept: Vec<FindingArg>,
    ignore_eos: bool,
    save_requests: bool,
}

impl Setting {
    fn new(args: &BenchServeArgs) -> anyhow::Result<Self> {
        let dataset = args.prompts.dataset.as_deref().map(Source::read);
        let dataset = dataset.transpose().outcome(Outcome::Usage)?;
        let count = dataset.as_ref().and_then(Source::count);
        Ok(Self {
            cases: plan::cases(&args.load, &args.prompts, count),
            dataset,
            seed: args.load.seed,
            repeat: args.load.repeat,
            objectives: args.result.goodput.clone(),
            accept: args.result.accept.clone(),
            ignore_eos: args.prompts.ignore_eos,
            save_requests: args.result.save_requests,
        })
    }
}

/// A target with what it is asked.
#[derive(Debug)]
struct Measuring {
    target: Target,
    source: Source,
    setting: Setting,
    /// Whether this process does nothing else.
    is_alone: bool,
}

impl Measuring {
    /// Runs every case, and all of them as often as is wanted; tells each run as it ends.
    async fn all(
        &self,
        progress: &Progress,
        said: &mut dyn FnMut(Run) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for repetition in 1..=self.setting.repeat {
            for number in 0..self.setting.cases.len() {
                if repetition == 1 {
                    self.warm_up(number, progress).await?;
                }
                said(self.one(number, repetition, progress).await?)?;
            }
        }
        Ok(())
    }

    /// Runs have numbers, so that no two of them say the same.
    fn requests(&self, case: Case, number: usize, repetition: usize) -> Arc<Requests> {
        let run = repetition * self.setting.cases.len() + number;
        let source = self.source.clone();
        Arc::new(Requests::new(source, case, self.setting.seed, run as u64))
    }

    async fn warm_up(&self, number: usize, progress: &Progress) -> anyhow::Result<()> {
        let requests = self.requests(self.setting.cases[number].warming(), number, 0);
        let records = load::run(&self.target, &requests, progress).await?;
        match records.into_iter().find_map(|record| record.answer.failure) {
            Some(failure) => Err(anyhow!("a warm-up request failed: {}", failure.text)),
            None => Ok(()),
        }
    }

    async fn one(
        &self,
        number: usize,
        repetition: usize,
        progress: &Progress,
    ) -> anyhow::Result<Run> {
        let setting = &self.setting;
        let case = &setting.cases[number];
        let requests = self.requests(case.clone(), number, repetition);
        let watch = Watch::start()?;
        let records = load::run(&self.target, &requests, progress).await?;
        let tokens = records.iter().map(|record| record.answer.output_tokens());
        let tokens = tokens.map(u64::from).sum();
        let client = watch.finish(tokens, self.is_alone).await?;
        let summary = Summary::of(&records, &setting.objectives);
        let findings =
            verdict::findings(case, &summary, &client, setting.ignore_eos, &setting.accept);
        Ok(Run {
            case: case.name.clone(),
            repetition,
            summary,
            client,
            findings,
            requests_detail: setting.save_requests.then_some(records),
        })
    }
}

/// Runs the command.
///
/// # Errors
/// When nothing can be measured; what was measured and is not valid is an [`Outcome`].
pub(crate) fn run(args: &BenchServeArgs) -> anyhow::Result<Outcome> {
    if args.engine_side {
        return offline::engine_side(args);
    }
    check(args).outcome(Outcome::Usage)?;
    let setting = Setting::new(args)?;
    raise_open_files();
    let report = if args.target.offline.is_some() {
        let heard = crate::on_this_thread()?.block_on(offline::run(args))?;
        let vocab = args.prompts.vocab_size.or(Some(heard.vocab));
        report(args, &setting, heard.target, vocab, heard.runs)
    } else {
        crate::on_all_cores()?.block_on(online(args, &setting))?
    };
    publish(args, &report)?;
    Ok(report.verdict.outcome)
}

/// What no single flag says to be wrong.
fn check(args: &BenchServeArgs) -> anyhow::Result<()> {
    let is_offline = args.target.offline.is_some();
    if !is_offline && args.engine != EngineArgs::default() {
        return Err(anyhow!(
            "options of the engine go with --offline; a server has its own"
        ));
    }
    if is_offline && args.prompts.prompt_format == PromptFormatArg::Text {
        return Err(anyhow!(
            "the engine alone takes token ids: no --prompt-format text with --offline"
        ));
    }
    if args.load.preset.is_some() && args.prompts.dataset.is_some() {
        return Err(anyhow!(
            "a preset has its own prompts: no --dataset with --preset"
        ));
    }
    let extra = http::extra_fields(args.prompts.extra_body.as_deref())?;
    let said = sampling::fields(&args.sampling, args.target.endpoint);
    // A temperature there has always won over the flag, which has a default.
    let twice = |name: &&String| *name != "temperature" && extra.contains_key(*name);
    match said.keys().find(twice) {
        Some(name) => Err(anyhow!(
            "--extra-body has `{name}`, which a flag of its own says: leave one of them out"
        )),
        None => Ok(()),
    }
}

async fn online(args: &BenchServeArgs, setting: &Setting) -> anyhow::Result<Report> {
    let (base, model) = match (&args.target.url, &args.target.disagg_config_file) {
        (Some(url), _) => (base_of(url), None),
        (None, Some(path)) => crate::files::client_target(path)?,
        (None, None) => return Err(anyhow!("neither --url nor -c was given")),
    };
    let wait = Duration::from_secs(args.target.wait.unwrap_or(0));
    let model = args.target.model.clone().or(model);
    let (http, model, facts) = http::find(&base, model, wait).await?;
    let vocab = args.prompts.vocab_size.or(facts.vocab_size);
    let target = HttpTarget::new(http, &base, &model, asking(args)?);
    let source = match (&setting.dataset, args.prompts.prompt_format) {
        (Some(dataset), _) => dataset.clone(),
        (None, PromptFormatArg::Ids) => Source::ids(vocab),
        (None, PromptFormatArg::Text) => Source::Words,
    };
    let measuring = Measuring {
        target: Target::Http(Arc::new(target)),
        source,
        setting: setting.clone(),
        is_alone: true,
    };
    let mut runs = Vec::new();
    let mut said = |run: Run| {
        runs.push(run);
        Ok(())
    };
    measuring.all(&Progress::default(), &mut said).await?;
    let ServerFacts {
        version, backend, ..
    } = facts;
    let target = TargetRecord {
        kind: "server".to_owned(),
        url: Some(base),
        model,
        version,
        backend,
        start: None,
    };
    Ok(report(args, setting, target, vocab, runs))
}

/// The address without what people copy along with it.
fn base_of(url: &str) -> String {
    let url = url.trim_end_matches('/');
    let url = url.strip_suffix("/v1").unwrap_or(url);
    if url.contains("://") {
        url.to_owned()
    } else {
        format!("http://{url}")
    }
}

fn asking(args: &BenchServeArgs) -> anyhow::Result<Asking> {
    Ok(Asking {
        endpoint: args.target.endpoint,
        sampling: sampling::fields(&args.sampling, args.target.endpoint),
        ignore_eos: args.prompts.ignore_eos,
        extra: http::extra_fields(args.prompts.extra_body.as_deref())?,
        timeout: Duration::from_secs(args.load.request_timeout),
    })
}

fn report(
    args: &BenchServeArgs,
    setting: &Setting,
    target: TargetRecord,
    vocab: Option<u32>,
    runs: Vec<Run>,
) -> Report {
    let findings: Vec<&Finding> = runs.iter().flat_map(|run| &run.findings).collect();
    let requests = runs.iter().map(|run| run.summary.completed).sum();
    let tokens = runs.iter().map(|run| run.summary.output_tokens).sum();
    Report {
        bench: "serve",
        version: env!("CARGO_PKG_VERSION"),
        parameters: parameters(args, setting, vocab),
        target,
        figures: report::rows(&setting.cases, &runs),
        verdict: judge(&findings, runs.len(), requests, tokens),
        runs,
    }
}

fn parameters(args: &BenchServeArgs, setting: &Setting, vocab: Option<u32>) -> Parameters {
    let prompts = &args.prompts;
    let (prompts_name, vocabulary) = match (&prompts.dataset, prompts.prompt_format) {
        (Some(path), _) => (path.display().to_string(), None),
        (None, PromptFormatArg::Text) => ("text".to_owned(), None),
        (None, PromptFormatArg::Ids) => match Source::ids(vocab) {
            Source::Ids(range) => ("ids".to_owned(), Some((range.start, range.end))),
            Source::Words | Source::Dataset(_) => ("ids".to_owned(), None),
        },
    };
    let limits = setting.objectives.iter().map(|(what, limit)| {
        let name = match what {
            ObjectiveArg::FirstToken => "ttft",
            ObjectiveArg::TokenTime => "tpot",
            ObjectiveArg::EndToEnd => "e2el",
        };
        (name, *limit)
    });
    let endpoint = match args.target.endpoint {
        EndpointArg::Completions => "completions",
        EndpointArg::Chat => "chat",
    };
    Parameters {
        endpoint: args.target.offline.is_none().then_some(endpoint),
        prompts: prompts_name,
        vocabulary,
        seed: setting.seed,
        repeat: setting.repeat,
        sampling: sampling::fields(&args.sampling, args.target.endpoint),
        ignore_eos: prompts.ignore_eos,
        extra_body: extra_body(prompts.extra_body.as_deref()),
        request_timeout_s: args.load.request_timeout,
        goodput: limits.collect(),
        cases: setting.cases.clone(),
    }
}

fn extra_body(text: Option<&str>) -> Value {
    text.and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default()
}

fn publish(args: &BenchServeArgs, report: &Report) -> anyhow::Result<()> {
    let json = || serde_json::to_string_pretty(report);
    match args.result.json.as_deref() {
        Some(path) if path == Path::new("-") => return print(&json()?),
        Some(path) => {
            write_whole(path, json()? + "\n")
                .with_context(|| format!("cannot write {}", path.display()))
                .outcome(Outcome::Unavailable)?;
        }
        None => {}
    }
    print(&report.table())
}

fn print(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{text}").context("cannot write to stdout")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_as_people_have_them() {
        for url in [
            "http://h:1",
            "http://h:1/",
            "http://h:1/v1",
            "http://h:1/v1/",
            "h:1",
        ] {
            assert_eq!(base_of(url), "http://h:1");
        }
        assert_eq!(base_of("https://h"), "https://h");
    }
}

//! The jobs of a layout from the outside: rendered, submitted, looked at, ended.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use baton_slurm::commands::{self, JobId, JobStatus};
use serde_json::json;
use tokio::time::Instant;

use super::folder::{self, Submission, SubmittedJob};
use super::prepare::{Prepared, prepare};
use super::report;
use crate::cli::slurm::{CancelArgs, LogsArgs, RenderArgs, SubmitArgs, TargetArgs};
use crate::exit::{Outcome, WithOutcome};

/// How often the queue is asked while jobs drain: a controller serves a whole cluster.
const QUEUE_POLL: Duration = Duration::from_secs(1);

fn print(text: &str) -> anyhow::Result<()> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("cannot write to stdout")
}

fn say_notes(prepared: &Prepared) {
    for note in prepared.notes.iter().chain(&prepared.plan.notes) {
        tracing::warn!("{note}");
    }
}

/// Writes the run folder.
pub(super) fn render(args: &RenderArgs) -> anyhow::Result<Outcome> {
    let prepared = prepare(args)?;
    folder::write(&prepared)?;
    say_notes(&prepared);
    print(&format!(
        "{}{}\n",
        prepared.plan.summary(),
        prepared.folder.display()
    ))?;
    Ok(Outcome::Success)
}

/// Writes the run folder and submits its scripts.
pub(super) async fn submit(args: &SubmitArgs) -> anyhow::Result<Outcome> {
    let prepared = prepare(&args.render)?;
    if args.dry_run {
        print(&report::text(&prepared))?;
        return Ok(Outcome::Success);
    }
    refuse_a_folder_in_use(&prepared.folder).await?;
    folder::write(&prepared)?;
    folder::forget_addresses(&prepared.folder)?;
    say_notes(&prepared);
    let mut submission = Submission {
        logs: prepared.logs.clone(),
        jobs: Vec::new(),
    };
    for (name, script) in &prepared.rendered.scripts {
        match commands::sbatch(&prepared.folder.join(script), &prepared.folder).await {
            Ok(id) => submission.jobs.push(SubmittedJob {
                id,
                name: name.clone(),
            }),
            Err(error) => {
                take_back(&submission.jobs).await;
                return Err(error).outcome(Outcome::Unavailable);
            }
        }
    }
    folder::remember(&prepared.folder, &submission)?;
    let lines: Vec<String> = submission
        .jobs
        .iter()
        .map(|job| format!("{}\n", job.id))
        .collect();
    print(&lines.concat())?;
    let folder = prepared.folder.display();
    tracing::info!("submitted; `baton slurm status {folder}` says how it goes");
    Ok(Outcome::Success)
}

/// A part of a deployment is of no use.
async fn take_back(jobs: &[SubmittedJob]) {
    let ids: Vec<JobId> = jobs.iter().map(|job| job.id.clone()).collect();
    if let Err(error) = commands::scancel(&ids).await {
        let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
        tracing::error!(%error, jobs = ids.join(" "), "cannot take back what was submitted");
    }
}

async fn refuse_a_folder_in_use(folder: &Path) -> anyhow::Result<()> {
    let Some(earlier) = folder::recall(folder)? else {
        return Ok(());
    };
    let ids: Vec<JobId> = earlier.jobs.into_iter().map(|job| job.id).collect();
    let known = commands::squeue(&ids).await.outcome(Outcome::Unavailable)?;
    let Some(alive) = known.iter().find(|status| !status.is_over()) else {
        return Ok(());
    };
    let folder = folder.display();
    Err(anyhow!(
        "job {} of the run folder {folder} is {}\nhint: baton slurm cancel {folder}, or another folder with -o",
        alive.id,
        alive.state
    ))
    .outcome(Outcome::Usage)
}

/// The jobs that the targets name, and the run folder if there is one.
fn targets(words: &[String]) -> anyhow::Result<Vec<SubmittedJob>> {
    let mut jobs = Vec::new();
    for word in words {
        if let Some(id) = JobId::parse(word) {
            let name = String::new();
            jobs.push(SubmittedJob { id, name });
            continue;
        }
        let Some(submission) = folder::recall(Path::new(word))? else {
            return Err(anyhow!(
                "{word} is neither a job number nor a run folder from which jobs were submitted"
            ))
            .outcome(Outcome::Usage);
        };
        jobs.extend(submission.jobs);
    }
    Ok(jobs)
}

async fn look(jobs: &[SubmittedJob]) -> anyhow::Result<Vec<JobStatus>> {
    let ids: Vec<JobId> = jobs.iter().map(|job| job.id.clone()).collect();
    commands::squeue(&ids).await.outcome(Outcome::Unavailable)
}

/// Prints what the queue knows.
pub(super) async fn status(args: &TargetArgs) -> anyhow::Result<Outcome> {
    let jobs = targets(&args.targets)?;
    let known = look(&jobs).await?;
    let proxy = args
        .targets
        .iter()
        .find_map(|word| folder::proxy_address(Path::new(word)));
    if args.json {
        let rows: Vec<_> = jobs
            .iter()
            .map(|job| {
                let status = known.iter().find(|status| status.id == job.id);
                json!({
                    "id": job.id.to_string(),
                    "name": status.map_or(&job.name, |status| &status.name),
                    "state": status.map(|status| &status.state),
                    "elapsed": status.map(|status| &status.elapsed),
                    "nodes": status.map(|status| &status.nodes),
                    "reason": status.and_then(|status| status.reason.as_ref()),
                })
            })
            .collect();
        print(&format!("{:#}\n", json!({"jobs": rows, "proxy": proxy})))?;
        return Ok(Outcome::Success);
    }
    let mut text = format!(
        "{:<10} {:<20} {:<12} {:>12}  nodes\n",
        "job", "name", "state", "elapsed"
    );
    for job in &jobs {
        let status = known.iter().find(|status| status.id == job.id);
        text.push_str(&row(job, status));
    }
    if let Some(address) = proxy {
        text.push_str(&format!("proxy: http://{address}/v1\n"));
    }
    print(&text)?;
    Ok(Outcome::Success)
}

fn row(job: &SubmittedJob, status: Option<&JobStatus>) -> String {
    let Some(status) = status else {
        return format!(
            "{:<10} {:<20} forgotten by the queue, so it is over\n",
            job.id, job.name
        );
    };
    let why = status
        .reason
        .as_ref()
        .map_or(String::new(), |reason| format!(" ({reason})"));
    format!(
        "{:<10} {:<20} {:<12} {:>12}  {}{why}\n",
        status.id.to_string(),
        status.name,
        status.state,
        status.elapsed,
        status.nodes
    )
}

/// Prints the last lines of log files.
pub(super) fn logs(args: &LogsArgs) -> anyhow::Result<Outcome> {
    let folder = match folder::recall(&args.folder)? {
        Some(submission) => submission.logs,
        None => args.folder.join("logs"),
    };
    let mut paths: Vec<_> = std::fs::read_dir(&folder)
        .with_context(|| format!("no logs in {}", folder.display()))
        .outcome(Outcome::Unavailable)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "log"))
        .collect();
    paths.sort();
    let wanted = |name: &str| {
        args.names.is_empty()
            || args
                .names
                .iter()
                .any(|start| name.starts_with(start.as_str()))
    };
    for path in paths {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if wanted(&name) {
            let text = last_lines(&path, args.lines)
                .with_context(|| format!("cannot read {}", path.display()))
                .outcome(Outcome::Unavailable)?;
            print(&format!("==> {name} <==\n{text}\n"))?;
        }
    }
    Ok(Outcome::Success)
}

/// The last lines of a file, which may be long.
fn last_lines(path: &Path, lines: usize) -> std::io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    const LINE_BYTES: u64 = 1024;
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    let wanted = u64::try_from(lines)
        .unwrap_or(u64::MAX)
        .saturating_mul(LINE_BYTES);
    file.seek(SeekFrom::Start(length.saturating_sub(wanted)))?;
    let mut bytes = Vec::new();
    file.take(wanted).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    Ok(all[all.len().saturating_sub(lines)..].join("\n"))
}

/// Drains the deployment, the proxy first, and ends its jobs.
pub(super) async fn cancel(args: &CancelArgs) -> anyhow::Result<Outcome> {
    let jobs = targets(&args.targets)?;
    let deadline = Instant::now() + Duration::from_secs(args.drain_timeout);
    let (proxies, workers): (Vec<_>, Vec<_>) =
        jobs.iter().cloned().partition(SubmittedJob::is_proxy);
    if args.drain_timeout > 0 {
        for part in [&proxies, &workers] {
            drain(part, deadline).await?;
        }
    }
    let ids: Vec<JobId> = jobs.into_iter().map(|job| job.id).collect();
    commands::scancel(&ids)
        .await
        .outcome(Outcome::Unavailable)?;
    Ok(Outcome::Success)
}

/// Asks the jobs that run to drain, and waits until they have ended.
async fn drain(jobs: &[SubmittedJob], deadline: Instant) -> anyhow::Result<()> {
    let running: Vec<SubmittedJob> = look(jobs)
        .await?
        .into_iter()
        .filter(JobStatus::is_started)
        .map(|status| SubmittedJob {
            id: status.id,
            name: status.name,
        })
        .collect();
    for job in &running {
        if let Err(error) = commands::signal_batch(&job.id, "USR1").await {
            // It may have ended meanwhile; if not, it is ended without draining.
            tracing::warn!(%error, job = %job.id, "cannot ask the job to drain");
        }
    }
    loop {
        let left: Vec<JobStatus> = look(&running)
            .await?
            .into_iter()
            .filter(|status| !status.is_over())
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() + QUEUE_POLL > deadline {
            let ids: Vec<String> = left.iter().map(|status| status.id.to_string()).collect();
            tracing::warn!(
                jobs = ids.join(" "),
                "still draining at the deadline; ending them"
            );
            return Ok(());
        }
        tokio::time::sleep(QUEUE_POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let text: String = (0..5000).map(|line| format!("line {line}\n")).collect();
        std::fs::write(&path, text).unwrap();
        assert_eq!(last_lines(&path, 2).unwrap(), "line 4998\nline 4999");
        assert_eq!(last_lines(&path, 9999).unwrap().lines().count(), 5000);
        assert_eq!(last_lines(&path, 0).unwrap(), "");
    }
}

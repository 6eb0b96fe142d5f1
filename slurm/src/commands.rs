//! The commands of Slurm that are run: `sbatch`, `squeue` and `scancel`; nothing else in the project runs them.
//!
//! Each call has a deadline; what comes back is parsed by pure functions. Accounting is not needed: clusters without it
//! forget a job some minutes after its end, which [`JobStatus`] shows as its absence.

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;

/// Longest time for one command: a busy controller answers within seconds.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a command did not do what it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{command}` {kind}")]
pub struct CommandError {
    /// The command as it was run.
    pub command: String,
    /// What went wrong.
    pub kind: CommandErrorKind,
}

/// What went wrong with a command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandErrorKind {
    /// It is not on this machine.
    #[error(
        "is not on this machine\n  hint: run it on a login node of the cluster, where Slurm's commands are on the PATH"
    )]
    Missing,
    /// It cannot be started.
    #[error("cannot be started: {0}")]
    Unstartable(String),
    /// It took too long.
    #[error("gave no answer within {} s\n  hint: `scontrol ping` says whether the controller is there", .0.as_secs())]
    TimedOut(Duration),
    /// It failed; these are its words.
    #[error("failed: {0}")]
    Failed(String),
    /// It answered something that is not understood.
    #[error("answered `{0}`, which is not understood")]
    Strange(String),
}

/// A job's number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct JobId(String);

impl JobId {
    /// The number in a text; `None` if it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        (digits && text.len() <= 10).then(|| Self(text.to_owned()))
    }
}

impl std::fmt::Display for JobId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the queue says about a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobStatus {
    /// Its number.
    pub id: JobId,
    /// Its name.
    pub name: String,
    /// Its state in Slurm's words, such as `RUNNING`.
    pub state: String,
    /// How long it has run.
    pub elapsed: String,
    /// Its nodes, as a compact list; empty before it runs.
    pub nodes: String,
    /// Why it waits, or `None`.
    pub reason: Option<String>,
}

impl JobStatus {
    /// Whether the job is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        const OVER: [&str; 9] = [
            "BOOT_FAIL",
            "CANCELLED",
            "COMPLETED",
            "DEADLINE",
            "FAILED",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "REVOKED",
            "TIMEOUT",
        ];
        OVER.contains(&self.state.as_str())
    }

    /// Whether its processes may be running.
    #[must_use]
    pub fn is_started(&self) -> bool {
        matches!(
            self.state.as_str(),
            "RUNNING" | "COMPLETING" | "SIGNALING" | "STAGE_OUT"
        )
    }
}

async fn run(program: &str, arguments: &[String]) -> Result<String, CommandError> {
    let command = format!("{program} {}", arguments.join(" "));
    let error = |kind| CommandError {
        command: command.clone(),
        kind,
    };
    let mut process = Command::new(program);
    process
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = match tokio::time::timeout(COMMAND_TIMEOUT, process.output()).await {
        Err(_) => return Err(error(CommandErrorKind::TimedOut(COMMAND_TIMEOUT))),
        Ok(Err(cause)) if cause.kind() == std::io::ErrorKind::NotFound => {
            return Err(error(CommandErrorKind::Missing));
        }
        Ok(Err(cause)) => return Err(error(CommandErrorKind::Unstartable(cause.to_string()))),
        Ok(Ok(output)) => output,
    };
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(error(CommandErrorKind::Failed(words_of(&output))))
}

/// What a command said when it failed, on one line.
fn words_of(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    if lines.is_empty() {
        output.status.to_string()
    } else {
        lines.join("; ")
    }
}

/// Submits a script; the job starts in `folder`.
///
/// # Errors
/// When `sbatch` refuses it, is missing or does not answer.
pub async fn sbatch(script: &Path, folder: &Path) -> Result<JobId, CommandError> {
    let arguments = [
        "--parsable".to_owned(),
        format!("--chdir={}", folder.display()),
        script.display().to_string(),
    ];
    let answer = run("sbatch", &arguments).await?;
    parse_submitted(&answer).ok_or_else(|| CommandError {
        command: format!("sbatch {}", arguments.join(" ")),
        kind: CommandErrorKind::Strange(answer.trim().to_owned()),
    })
}

/// `123` or `123;cluster`, on the last line.
fn parse_submitted(answer: &str) -> Option<JobId> {
    let last = answer.trim().lines().last()?;
    JobId::parse(last.split(';').next()?.trim())
}

/// What the queue says about some jobs; those that it has forgotten are not in the answer.
///
/// # Errors
/// When `squeue` fails, is missing or does not answer.
pub async fn squeue(jobs: &[JobId]) -> Result<Vec<JobStatus>, CommandError> {
    if jobs.is_empty() {
        return Ok(Vec::new());
    }
    let list: Vec<String> = jobs.iter().map(ToString::to_string).collect();
    let arguments = [
        "--noheader".to_owned(),
        "--states=all".to_owned(),
        "--format=%i|%T|%M|%N|%r|%j".to_owned(),
        format!("--jobs={}", list.join(",")),
    ];
    match run("squeue", &arguments).await {
        Ok(answer) => Ok(answer.lines().filter_map(parse_status).collect()),
        Err(CommandError {
            kind: CommandErrorKind::Failed(words),
            ..
        }) if words.contains("Invalid job id") => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn parse_status(line: &str) -> Option<JobStatus> {
    let mut fields = line.trim().splitn(6, '|').map(str::trim);
    let mut next = || fields.next();
    let (id, state, elapsed, nodes, reason) = (next()?, next()?, next()?, next()?, next()?);
    Some(JobStatus {
        id: JobId::parse(id)?,
        state: state.to_owned(),
        elapsed: elapsed.to_owned(),
        nodes: nodes.to_owned(),
        reason: (reason != "None").then(|| reason.to_owned()),
        name: next()?.to_owned(),
    })
}

/// Sends a signal, such as `USR1`, to a job's batch script alone.
///
/// # Errors
/// When `scancel` fails, is missing or does not answer; also when the job does not run.
pub async fn signal_batch(job: &JobId, name: &str) -> Result<(), CommandError> {
    let arguments = [
        "--batch".to_owned(),
        format!("--signal={name}"),
        job.to_string(),
    ];
    run("scancel", &arguments).await.map(|_| ())
}

/// Ends jobs.
///
/// # Errors
/// When `scancel` fails, is missing or does not answer.
pub async fn scancel(jobs: &[JobId]) -> Result<(), CommandError> {
    if jobs.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = jobs.iter().map(ToString::to_string).collect();
    match run("scancel", &list).await {
        Ok(_) => Ok(()),
        // A job that is over needs no end.
        Err(CommandError {
            kind: CommandErrorKind::Failed(words),
            ..
        }) if words.contains("Invalid job id") => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> JobId {
        JobId::parse(text).expect("a job number")
    }

    #[test]
    fn numbers_of_jobs_are_numbers() {
        assert_eq!(parse_submitted("123\n"), Some(id("123")));
        assert_eq!(parse_submitted("a note\n45;east\n"), Some(id("45")));
        assert_eq!(parse_submitted("Submitted batch job 7"), None);
        assert_eq!(JobId::parse(""), None);
        assert_eq!(JobId::parse("-1"), None);
    }

    #[test]
    fn the_queue_is_read_whatever_a_job_is_called() {
        let status = parse_status("7|PENDING|0:00||Resources|a|b c").expect("a line of the queue");
        assert_eq!(status.name, "a|b c");
        assert_eq!(status.reason.as_deref(), Some("Resources"));
        assert!(!status.is_over() && !status.is_started());
        let status = parse_status("8|RUNNING|1-00:00:01|n[1-2]|None|x").expect("a line");
        assert_eq!(
            (status.nodes.as_str(), status.reason.as_deref()),
            ("n[1-2]", None)
        );
        assert!(status.is_started());
        assert_eq!(parse_status("not a line"), None);
    }

    #[tokio::test]
    async fn a_command_that_is_not_there_is_said_in_one_line_with_a_hint() {
        let error = run("no-such-command-of-slurm", &["--x".to_owned()])
            .await
            .expect_err("missing");
        assert_eq!(error.kind, CommandErrorKind::Missing);
        let text = error.to_string();
        assert!(text.starts_with("`no-such-command-of-slurm --x` is not on this machine"));
        assert_eq!(text.lines().count(), 2);
    }

    #[tokio::test]
    async fn a_failure_is_told_in_the_commands_own_words() {
        let script = "echo 'first ' >&2; echo second >&2; exit 3".to_owned();
        let error = run("sh", &["-c".to_owned(), script])
            .await
            .expect_err("fails");
        assert_eq!(
            error.kind,
            CommandErrorKind::Failed("first; second".to_owned())
        );
    }
}

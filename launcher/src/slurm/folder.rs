//! A run folder: what was rendered, and which jobs came of it.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use baton_slurm::commands::JobId;
use baton_slurm::render::ADDRESSES;
use serde_json::{Value, json};

use super::prepare::Prepared;
use crate::exit::{Outcome, WithOutcome};
use crate::files;

/// The file of a run folder that holds its jobs.
const JOBS: &str = "jobs.json";

/// A job that was submitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SubmittedJob {
    /// Its number.
    pub(super) id: JobId,
    /// Its name.
    pub(super) name: String,
}

impl SubmittedJob {
    /// Whether it runs the proxy alone, which is drained before the others.
    pub(super) fn is_proxy(&self) -> bool {
        self.name.ends_with("-proxy")
    }
}

/// What came of a run folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Submission {
    /// The folder of its log files.
    pub(super) logs: PathBuf,
    /// Its jobs, in the order in which they were submitted.
    pub(super) jobs: Vec<SubmittedJob>,
}

/// Writes everything that was rendered.
pub(super) fn write(prepared: &Prepared) -> anyhow::Result<()> {
    let folder = &prepared.folder;
    for path in [folder, &folder.join(ADDRESSES), &prepared.logs] {
        std::fs::create_dir_all(path)
            .with_context(|| format!("cannot make the directory {}", path.display()))
            .outcome(Outcome::Unavailable)?;
    }
    for file in &prepared.rendered.files {
        files::write(&folder.join(&file.name), &file.text)?;
    }
    files::write(&folder.join("layout.yaml"), &prepared.text)
}

/// Removes what an earlier run left that would be taken for this run's.
pub(super) fn forget_addresses(folder: &Path) -> anyhow::Result<()> {
    let left = std::fs::read_dir(folder.join(ADDRESSES))
        .into_iter()
        .flatten();
    let addresses = left.flatten().map(|entry| entry.path());
    for path in addresses.chain([folder.join("ready")]) {
        remove(&path)?;
    }
    Ok(())
}

/// Removes a file that need not be there.
pub(super) fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Notes the jobs of a folder.
pub(super) fn remember(folder: &Path, submission: &Submission) -> anyhow::Result<()> {
    let jobs: Vec<Value> = submission
        .jobs
        .iter()
        .map(|job| json!({"id": job.id.to_string(), "name": job.name}))
        .collect();
    let text = json!({"logs": submission.logs.display().to_string(), "jobs": jobs});
    files::write(&folder.join(JOBS), &format!("{text:#}\n"))
}

/// The jobs of a folder; `None` if none were submitted from it.
pub(super) fn recall(folder: &Path) -> anyhow::Result<Option<Submission>> {
    let path = folder.join(JOBS);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(error)
                .with_context(|| format!("cannot read {}", path.display()))
                .outcome(Outcome::Unavailable);
        }
    };
    parse(&text)
        .map(Some)
        .ok_or_else(|| {
            anyhow!(
                "{} is damaged\nhint: `baton slurm cancel` takes job numbers too",
                path.display()
            )
        })
        .outcome(Outcome::Unavailable)
}

fn parse(text: &str) -> Option<Submission> {
    let value: Value = serde_json::from_str(text).ok()?;
    let job = |job: &Value| {
        Some(SubmittedJob {
            id: JobId::parse(job.get("id")?.as_str()?)?,
            name: job.get("name")?.as_str()?.to_owned(),
        })
    };
    let jobs = value.get("jobs")?.as_array()?.iter().map(job);
    Some(Submission {
        logs: PathBuf::from(value.get("logs")?.as_str()?),
        jobs: jobs.collect::<Option<_>>()?,
    })
}

/// The address in one of a folder's files, if a process has written it.
pub(super) fn proxy_address(folder: &Path) -> Option<String> {
    let files = [
        folder.join(ADDRESSES).join("proxy.addr"),
        folder.join("ready"),
    ];
    let text = |path: &PathBuf| std::fs::read_to_string(path).ok();
    let address = files.iter().find_map(text)?.trim().to_owned();
    (!address.is_empty()).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_remembered() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(recall(folder.path()).unwrap(), None);
        let job = |id: &str, name: &str| SubmittedJob {
            id: JobId::parse(id).unwrap(),
            name: name.to_owned(),
        };
        let submission = Submission {
            logs: PathBuf::from("/x/logs"),
            jobs: vec![job("1", "a-proxy"), job("2", "a-ctx")],
        };
        remember(folder.path(), &submission).unwrap();
        let read = recall(folder.path()).unwrap().unwrap();
        assert_eq!(read, submission);
        assert!(read.jobs[0].is_proxy() && !read.jobs[1].is_proxy());
        std::fs::write(folder.path().join(JOBS), "{}").unwrap();
        assert!(recall(folder.path()).is_err());
    }
}

//! Inside a job: a step of Slurm for each instance and one for the proxy, supervised.
//!
//! A step that ends is started again on the same nodes, bounded and with growing pauses; its new address is found through
//! its file. Draining goes by USR1, which `srun` hands on to its tasks; on TERM it would kill them. The proxy drains first.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use baton_slurm::render::ADDRESSES;
use baton_slurm::srun::{Launch, RunFile};
use nix::sys::signal::Signal;
use tokio::time::Instant;

use super::{bind, folder};
use crate::child::ChildSpec;
use crate::cli::slurm::RunArgs;
use crate::exit::{Outcome, WithOutcome};
use crate::output::LineSink;
use crate::signals::EndSignals;
use crate::supervisor::{Event, FirstCause, Supervisor};

/// How long `srun` gets for ending its tasks by force.
const FORCE_GRACE: Duration = Duration::from_secs(10);
/// The proxy is the first launch of a run.
const PROXY: usize = 0;

/// How serving ended.
enum End {
    Asked(Signal),
    Broken(FirstCause),
}

struct Steps {
    supervisor: Supervisor,
    folder: PathBuf,
    labels: Vec<String>,
    /// Steps that have not ended.
    running: BTreeSet<usize>,
}

/// Runs until it is asked to end, or until a step keeps dying.
pub(super) async fn run(args: &RunArgs) -> anyhow::Result<Outcome> {
    let run = bind::run_file(&args.run)?;
    let hosts = bind::hosts()?;
    let folder = args.run.parent().unwrap_or(Path::new(".")).to_owned();
    std::fs::create_dir_all(&run.logs)
        .with_context(|| format!("cannot make the log directory {}", run.logs))
        .outcome(Outcome::Unavailable)?;
    let mut steps = Steps {
        // USR1 is for `--signal=B:USR1@N` and `baton slurm cancel`.
        supervisor: Supervisor::new(
            EndSignals::new(EndSignals::ALL).context("cannot watch for signals")?,
        ),
        folder,
        labels: run
            .launches
            .iter()
            .map(|launch| launch.label.clone())
            .collect(),
        running: BTreeSet::new(),
    };
    let result = match steps.start_all(&run, &hosts) {
        Ok(()) => steps.serve().await,
        Err(error) => Err(error),
    };
    let drained = steps.drain(Duration::from_secs(args.drain_timeout)).await;
    match result? {
        End::Asked(signal) if drained => {
            tracing::info!(%signal, "all steps ended");
            Ok(Outcome::Success)
        }
        End::Asked(signal) => Err(anyhow::anyhow!("some steps had to be killed"))
            .outcome(Outcome::Signal(signal as i32)),
        End::Broken(cause) => Err(cause.into()),
    }
}

impl Steps {
    fn start_all(&mut self, run: &RunFile, hosts: &[String]) -> anyhow::Result<()> {
        let width = self.labels.iter().map(String::len).max().unwrap_or(0);
        for (index, launch) in run.launches.iter().enumerate() {
            let spec = self.spec(launch, hosts, Path::new(&run.logs))?;
            self.forget_address(index)?;
            let sink = LineSink::open(&spec.label, index, width, &spec.log_file)
                .with_context(|| format!("cannot write {}", spec.log_file.display()))
                .outcome(Outcome::Unavailable)?;
            self.supervisor
                .start(spec, sink)
                .with_context(|| format!("cannot start the step {}", launch.label))
                .outcome(Outcome::Unavailable)?;
            self.running.insert(index);
        }
        tracing::info!(steps = self.labels.len(), "steps started");
        Ok(())
    }

    fn spec(&self, launch: &Launch, hosts: &[String], logs: &Path) -> anyhow::Result<ChildSpec> {
        let bound = launch.on_hosts(hosts).outcome(Outcome::Unavailable)?;
        let mut environment = Vec::new();
        if let Some(lines) = &bound.hosts {
            let file = self.folder.join(format!("{}.hosts", launch.label));
            crate::files::write(&file, lines)?;
            environment.push(("SLURM_HOSTFILE".to_owned(), file.display().to_string()));
        }
        Ok(ChildSpec {
            label: launch.label.clone(),
            argv: bound.argv.into_iter().map(OsString::from).collect(),
            environment,
            log_file: logs.join(format!("step-{}.log", launch.label)),
        })
    }

    /// What an earlier step wrote would be taken for the new one's address.
    fn forget_address(&self, index: usize) -> anyhow::Result<()> {
        let name = format!("{}.addr", self.labels[index]);
        folder::remove(&self.folder.join(ADDRESSES).join(name))
    }

    async fn next(&mut self, deadline: Option<Instant>) -> Event {
        let event = self.supervisor.next(deadline).await;
        if let Event::Exited { index, .. } = event {
            self.running.remove(&index);
        }
        event
    }

    async fn serve(&mut self) -> anyhow::Result<End> {
        loop {
            match self.next(None).await {
                Event::Exited { index, status } => {
                    if let Err(cause) = self.supervisor.plan_restart(index, status) {
                        return Ok(End::Broken(cause));
                    }
                }
                Event::RestartDue { index } => {
                    self.forget_address(index)?;
                    self.supervisor.restart(index).with_context(|| {
                        format!("cannot start the step {} again", self.labels[index])
                    })?;
                    self.running.insert(index);
                }
                Event::Asked(signal) => {
                    tracing::info!(%signal, "draining; once more kills");
                    return Ok(End::Asked(signal));
                }
                Event::Deadline => {}
            }
        }
    }

    /// Lets the proxy finish, then the instances; what is left then is ended by force. Whether none was left.
    async fn drain(&mut self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let everyone: Vec<usize> = (0..self.labels.len()).collect();
        let drained = self.ask(&[PROXY], deadline).await && self.ask(&everyone, deadline).await;
        let ended = self.supervisor.drain(None, FORCE_GRACE).await;
        drained && ended
    }

    /// Sends USR1 and waits; false at the deadline, or when asked to end once more.
    async fn ask(&mut self, indices: &[usize], deadline: Instant) -> bool {
        for index in indices {
            self.supervisor.signal_one(*index, Signal::SIGUSR1);
        }
        while indices.iter().any(|index| self.running.contains(index)) {
            match self.next(Some(deadline)).await {
                Event::Exited { .. } | Event::RestartDue { .. } => {}
                Event::Asked(_) | Event::Deadline => return false,
            }
        }
        true
    }
}

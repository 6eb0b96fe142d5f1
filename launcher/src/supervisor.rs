//! The supervisor: one closed set of events, one loop. It starts, watches, restarts and ends processes and
//! knows nothing of what they do.
//!
//! Each process has a group of its own, so Ctrl-C reaches only the supervisor, which then decides. A process that
//! dies is started again with growing pauses; one that keeps dying ends the deployment, with the first cause.

use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::child::{self, Child, ChildSpec};
use crate::output::LineSink;
use crate::signals::EndSignals;

/// First pause before a restart; doubles up to [`RESTART_PAUSE_MAX`].
const RESTART_PAUSE_MIN: Duration = Duration::from_millis(250);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(8);
/// A process that lived this long starts over with the shortest pause.
const STABLE_AFTER: Duration = Duration::from_secs(60);
/// Restarts without a stable life in between, after which the supervisor gives up.
const RESTARTS_MAX: u32 = 6;
/// Between TERM's deadline and KILL's effect.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// All that can happen to a supervised deployment.
#[derive(Debug)]
pub(crate) enum Event {
    /// A process ended.
    Exited {
        /// Its slot.
        index: usize,
        /// How, when it could be read.
        status: Option<ExitStatus>,
    },
    /// A pause before a restart is over.
    RestartDue {
        /// Its slot.
        index: usize,
    },
    /// This process was asked to end.
    Asked(Signal),
    /// The time the caller waits for is over.
    Deadline,
}

#[derive(Debug)]
struct Slot {
    spec: ChildSpec,
    sink: LineSink,
    child: Option<Child>,
    started: Instant,
    restarts: u32,
}

/// Why a deployment cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FirstCause {
    /// Which process.
    pub(crate) label: String,
    /// How it ended.
    pub(crate) ending: String,
    /// Its last lines.
    pub(crate) tail: Vec<String>,
}

impl std::fmt::Display for FirstCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.label, self.ending)?;
        for line in &self.tail {
            write!(f, "\n    {line}")?;
        }
        Ok(())
    }
}

impl std::error::Error for FirstCause {}

/// The processes of one deployment on this machine.
#[derive(Debug)]
pub(crate) struct Supervisor {
    slots: Vec<Slot>,
    sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    signals: EndSignals,
}

impl Supervisor {
    /// A supervisor of nothing yet, which these signals ask to end.
    pub(crate) fn new(signals: EndSignals) -> Self {
        let (sender, events) = mpsc::channel(64);
        Self {
            slots: Vec::new(),
            sender,
            events,
            signals,
        }
    }

    /// Starts a process and keeps watch over it. Returns its slot.
    pub(crate) fn start(&mut self, spec: ChildSpec, sink: LineSink) -> std::io::Result<usize> {
        let index = self.slots.len();
        let child = Child::start(&spec, index, sink.clone(), self.sender.clone())?;
        self.slots.push(Slot {
            spec,
            sink,
            child: Some(child),
            started: Instant::now(),
            restarts: 0,
        });
        Ok(index)
    }

    /// Replaces what a later restart of the slot runs: a port that the kernel chose stays the same.
    pub(crate) fn set_restart_spec(&mut self, index: usize, spec: ChildSpec) {
        self.slots[index].spec = spec;
    }

    /// The next thing that happens, at the latest at `deadline`.
    pub(crate) async fn next(&mut self, deadline: Option<Instant>) -> Event {
        let expiry = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            signal = self.signals.next() => Event::Asked(signal),
            Some(event) = self.events.recv() => {
                if let Event::Exited { index, .. } = event
                    && let Some(child) = self.slots[index].child.as_mut()
                {
                    child.mark_ended();
                }
                event
            }
            () = expiry => Event::Deadline,
        }
    }

    /// What to tell about a process that ended.
    pub(crate) fn cause(&self, index: usize, status: Option<ExitStatus>) -> FirstCause {
        let slot = &self.slots[index];
        FirstCause {
            label: slot.spec.label.clone(),
            ending: child::describe(status),
            tail: slot.sink.tail(),
        }
    }

    /// Plans the restart of a process that ended while serving.
    ///
    /// # Errors
    /// When it ended too often without living long in between.
    pub(crate) fn plan_restart(
        &mut self,
        index: usize,
        status: Option<ExitStatus>,
    ) -> Result<(), FirstCause> {
        let cause = self.cause(index, status);
        let slot = &mut self.slots[index];
        slot.child = None;
        slot.restarts = if slot.started.elapsed() >= STABLE_AFTER {
            1
        } else {
            slot.restarts + 1
        };
        if slot.restarts > RESTARTS_MAX {
            return Err(cause);
        }
        let pause = restart_pause(slot.restarts);
        tracing::warn!(
            process = slot.spec.label,
            ending = cause.ending,
            attempt = slot.restarts,
            pause_ms = pause.as_millis(),
            "process ended, will be started again"
        );
        let sender = self.sender.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            // Without a receiver the deployment is over and so is the restart.
            let _ = sender.send(Event::RestartDue { index }).await;
        });
        Ok(())
    }

    /// Starts a process again.
    pub(crate) fn restart(&mut self, index: usize) -> std::io::Result<()> {
        let slot = &mut self.slots[index];
        slot.child = Some(Child::start(
            &slot.spec,
            index,
            slot.sink.clone(),
            self.sender.clone(),
        )?);
        slot.started = Instant::now();
        Ok(())
    }

    fn is_running(&self, index: usize) -> bool {
        self.slots[index]
            .child
            .as_ref()
            .is_some_and(Child::is_running)
    }

    /// Sends a signal to one process's group, if it still runs.
    pub(crate) fn signal_one(&self, index: usize, signal: Signal) {
        if let Some(child) = &self.slots[index].child {
            child.signal(signal);
        }
    }

    fn signal_all(&self, signal: Signal) {
        (0..self.slots.len()).for_each(|index| self.signal_one(index, signal));
    }

    /// Ends everything: TERM to `front`, which takes the requests, then to all others once it has let go of them; KILL
    /// at the deadline, or at once when asked a second time. Returns whether all ended by themselves.
    pub(crate) async fn drain(&mut self, front: Option<usize>, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut gentle = true;
        if let Some(front) = front {
            self.signal_one(front, Signal::SIGTERM);
            gentle = self.all_ended(&[front], deadline).await;
        }
        if gentle {
            self.signal_all(Signal::SIGTERM);
            let everyone: Vec<usize> = (0..self.slots.len()).collect();
            gentle = self.all_ended(&everyone, deadline).await;
        }
        if !gentle {
            self.kill().await;
        }
        gentle
    }

    /// Waits for processes to end; false at the deadline, or when asked to end once more.
    async fn all_ended(&mut self, slots: &[usize], deadline: Instant) -> bool {
        while slots.iter().any(|index| self.is_running(*index)) {
            match self.next(Some(deadline)).await {
                Event::Exited { .. } | Event::RestartDue { .. } => {}
                Event::Asked(_) | Event::Deadline => return false,
            }
        }
        true
    }

    async fn kill(&mut self) {
        let running: Vec<usize> = (0..self.slots.len())
            .filter(|index| self.is_running(*index))
            .collect();
        let left: Vec<&str> = running
            .iter()
            .map(|index| self.slots[*index].spec.label.as_str())
            .collect();
        tracing::warn!(
            processes = left.join(", "),
            "killing what has not ended yet"
        );
        self.signal_all(Signal::SIGKILL);
        let deadline = Instant::now() + KILL_GRACE;
        while running.iter().any(|index| self.is_running(*index)) {
            if matches!(self.next(Some(deadline)).await, Event::Deadline) {
                tracing::error!("processes survive SIGKILL; leaving them to the kernel");
                return;
            }
        }
    }
}

pub(crate) fn restart_pause(attempt: u32) -> Duration {
    RESTART_PAUSE_MIN
        .saturating_mul(1 << attempt.saturating_sub(1).min(16))
        .min(RESTART_PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn shell(label: &str, folder: &std::path::Path, script: &str) -> (ChildSpec, LineSink) {
        let log_file = folder.join(format!("{label}.log"));
        let sink = LineSink::open(label, 0, 8, &log_file).unwrap();
        let argv = ["sh", "-c", script].map(OsString::from).to_vec();
        (
            ChildSpec {
                label: label.to_owned(),
                argv,
                environment: Vec::new(),
                log_file,
            },
            sink,
        )
    }

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs(20))
    }

    #[tokio::test]
    async fn an_end_is_reported_with_its_cause_and_last_lines() {
        let folder = tempfile::tempdir().unwrap();
        let mut supervisor = Supervisor::new(EndSignals::new(EndSignals::BY_HAND).unwrap());
        let (spec, sink) = shell(
            "ctx0",
            folder.path(),
            "echo out; echo 'error: no model' >&2; exit 69",
        );
        supervisor.start(spec, sink).unwrap();
        let Event::Exited { index: 0, status } = supervisor.next(soon()).await else {
            panic!("no exit")
        };
        let cause = supervisor.cause(0, status);
        assert_eq!(cause.ending, "exit code 69");
        assert!(
            cause.tail.contains(&"error: no model".to_owned()),
            "{cause}"
        );
    }

    #[tokio::test]
    async fn a_process_that_keeps_dying_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let mut supervisor = Supervisor::new(EndSignals::new(EndSignals::BY_HAND).unwrap());
        let (spec, sink) = shell("gen0", folder.path(), "true");
        supervisor.start(spec, sink).unwrap();
        supervisor.slots[0].restarts = RESTARTS_MAX - 1;
        let Event::Exited { status, .. } = supervisor.next(soon()).await else {
            panic!("no exit")
        };
        assert!(supervisor.plan_restart(0, status).is_ok());
        assert!(supervisor.plan_restart(0, status).is_err());
    }

    #[tokio::test]
    async fn drain_kills_what_ignores_term() {
        let folder = tempfile::tempdir().unwrap();
        let mut supervisor = Supervisor::new(EndSignals::new(EndSignals::BY_HAND).unwrap());
        let (spec, sink) = shell(
            "ctx0",
            folder.path(),
            "trap '' TERM; echo up; while true; do sleep 0.1; done",
        );
        supervisor.start(spec, sink.clone()).unwrap();
        while sink.tail().is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(!supervisor.drain(None, Duration::from_millis(100)).await);
        assert!(!supervisor.is_running(0));
    }

    #[tokio::test]
    async fn drain_ends_the_front_before_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let mut supervisor = Supervisor::new(EndSignals::new(EndSignals::BY_HAND).unwrap());
        let mark = folder.path().join("order");
        for label in ["ctx0", "proxy"] {
            let order = mark.display();
            let script = format!(
                "trap 'echo {label} >> {order}; exit 0' TERM; echo up; while true; do sleep 0.05; done"
            );
            let (spec, sink) = shell(label, folder.path(), &script);
            supervisor.start(spec, sink.clone()).unwrap();
            while sink.tail().is_empty() {
                tokio::task::yield_now().await;
            }
        }
        assert!(supervisor.drain(Some(1), Duration::from_secs(20)).await);
        assert_eq!(std::fs::read_to_string(mark).unwrap(), "proxy\nctx0\n");
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        assert_eq!(restart_pause(1), RESTART_PAUSE_MIN);
        assert_eq!(restart_pause(2), RESTART_PAUSE_MIN * 2);
        assert_eq!(restart_pause(60), RESTART_PAUSE_MAX);
    }
}

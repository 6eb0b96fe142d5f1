//! The thread that MPI belongs to: it starts and ends it, sees to it that what was left to be sent goes, and ends the
//! world when a call is stuck or has failed.
//!
//! MPI moves large messages only while someone calls it, and the engine's thread computes in between; and no call of
//! MPI can be interrupted. Hence a second thread. Invariant: once a failure is known, the world ends within
//! `GRACE`, whatever the other threads do.

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::MpiError;
use super::flight::Flight;
use super::plugin::{Facts, Plugin};
use crate::collective::CollectiveError;
use crate::collective::doing::Doing;

/// Between a failure and the end of the world: time to log the failure and to end by oneself.
const GRACE: Duration = Duration::from_secs(3);

/// How long a call may take beyond its own limit.
const OVERTIME: Duration = Duration::from_secs(2);

/// How often the thread looks up with nothing to send, and with something.
const TICK: Duration = Duration::from_millis(250);
const SENDING_TICK: Duration = Duration::from_micros(100);

/// What may be left to be sent; more makes the sender wait.
const LEFT_BYTES_MAX: usize = 64 << 20;

/// How long ending MPI in good order may take. It waits for all ranks of the world, also for those of an instance that
/// still serves its last requests.
const FINALIZE_TIMEOUT: Duration = Duration::from_secs(180);

/// The exit status of an aborted world.
const ABORT_CODE: i32 = 1;

/// The thread and what it shares with the callers.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    plugin: Arc<Plugin>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    calls: Vec<Call>,
    calls_begun: u64,
    left: Vec<Left>,
    left_bytes: usize,
    failure: Option<(CollectiveError, Instant)>,
    closing: bool,
    closed: bool,
}

/// A call under way, which cannot be interrupted.
#[derive(Debug)]
struct Call {
    number: u64,
    deadline: Instant,
    doing: Doing,
}

/// A message on its way that nobody waits for.
#[derive(Debug)]
struct Left {
    flight: Flight,
    bytes: usize,
    deadline: Instant,
    /// What is wrong when the deadline passes.
    silent: CollectiveError,
}

/// Ends a call's watch.
#[derive(Debug)]
pub(super) struct Guard<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Watch {
    /// Starts MPI on the new thread.
    pub(super) fn start(plugin: Arc<Plugin>, limit: Duration) -> Result<(Self, Facts), MpiError> {
        let shared = Arc::new(Shared {
            plugin,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let (opened, facts) = sync_channel(1);
        let theirs = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("mpi".to_owned())
            .spawn(move || run(&theirs, &opened))
            .map_err(|error| MpiError::Start(error.to_string()))?;
        match facts.recv_timeout(limit) {
            Ok(Ok(facts)) => Ok((Self { shared }, facts)),
            Ok(Err(reason)) => Err(MpiError::Start(reason)),
            // The thread stays in MPI; the process is about to end with this error.
            Err(RecvTimeoutError::Timeout) => Err(MpiError::Stuck {
                waited_s: limit.as_secs(),
            }),
            Err(RecvTimeoutError::Disconnected) => {
                Err(MpiError::Start("the plug-in is at fault".to_owned()))
            }
        }
    }

    pub(super) fn plugin(&self) -> &Arc<Plugin> {
        &self.shared.plugin
    }

    /// Watches a call until the guard is dropped.
    pub(super) fn guard(&self, limit: Duration, doing: Doing) -> Guard<'_> {
        let mut state = self.shared.lock();
        state.calls_begun += 1;
        let number = state.calls_begun;
        state.calls.push(Call {
            number,
            deadline: Instant::now() + limit + OVERTIME,
            doing,
        });
        Guard {
            shared: &self.shared,
            number,
        }
    }

    /// What made the group end, if anything did.
    pub(super) fn check(&self) -> Result<(), CollectiveError> {
        match &self.shared.lock().failure {
            Some((error, _)) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Notes a failure, which ends the world soon; gives back the first there was.
    pub(super) fn fail(&self, error: CollectiveError) -> CollectiveError {
        let mut state = self.shared.lock();
        let (first, _) = state.failure.get_or_insert((error, Instant::now()));
        let first = first.clone();
        self.shared.changed.notify_all();
        first
    }

    /// Takes over a message that is on its way, after waiting for room.
    pub(super) fn leave(
        &self,
        flight: Flight,
        bytes: usize,
        deadline: Instant,
        silent: CollectiveError,
    ) -> Result<(), CollectiveError> {
        let mut state = self.shared.lock();
        state.left_bytes += bytes;
        state.left.push(Left {
            flight,
            bytes,
            deadline,
            silent,
        });
        self.shared.changed.notify_all();
        loop {
            if let Some((error, _)) = &state.failure {
                return Err(error.clone());
            }
            if state.left_bytes <= LEFT_BYTES_MAX {
                return Ok(());
            }
            // Ends by room or by the failure of what is left: each has its deadline.
            let waited = self.shared.changed.wait_timeout(state, TICK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends MPI in good order, which waits for all ranks of the world. After a failure the thread goes on by itself, to end
    /// the world.
    pub(super) fn close(&self) {
        let deadline = Instant::now() + FINALIZE_TIMEOUT;
        let mut state = self.shared.lock();
        state.closing = true;
        self.shared.changed.notify_all();
        while state.failure.is_none() && !state.closed {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!("left MPI without its end: other ranks still use it");
                return;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the world at once.
    pub(super) fn abort(&self, cause: &str) {
        self.shared.abort(cause);
    }
}

impl Guard<'_> {
    /// Something moved: the limit counts anew.
    pub(super) fn renew(&self, limit: Duration) {
        let mut state = self.shared.lock();
        if let Some(call) = state
            .calls
            .iter_mut()
            .find(|call| call.number == self.number)
        {
            call.deadline = Instant::now() + limit + OVERTIME;
        }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.calls.retain(|call| call.number != self.number);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn abort(&self, cause: &str) {
        tracing::error!(cause, "ending all ranks of the MPI world");
        if let Err(reason) = self.plugin.abort(ABORT_CODE) {
            tracing::error!(reason, "MPI does not end the world; the launcher must");
        }
    }
}

fn run(shared: &Shared, opened: &SyncSender<Result<Facts, String>>) {
    let facts = shared.plugin.init();
    let started = facts.is_ok();
    if opened.send(facts).is_err() || !started {
        return;
    }
    if let Some(cause) = watch(shared) {
        shared.abort(&cause);
        return;
    }
    if let Err(reason) = shared.plugin.finalize() {
        tracing::warn!(reason, "MPI did not end in good order");
    }
    shared.lock().closed = true;
    shared.changed.notify_all();
}

/// Looks after calls and messages until MPI is to end: in good order, or with a cause.
fn watch(shared: &Shared) -> Option<String> {
    let mut state = shared.lock();
    loop {
        push(&mut state);
        let now = Instant::now();
        if let Some((error, since)) = &state.failure {
            if now >= *since + GRACE {
                return Some(error.to_string());
            }
        } else if let Some(call) = state.calls.iter().find(|call| now >= call.deadline) {
            return Some(format!("stuck in MPI while {}", call.doing));
        } else if state.closing && state.left.is_empty() {
            return None;
        }
        let tick = match state.left.is_empty() || state.failure.is_some() {
            true => TICK,
            false => SENDING_TICK,
        };
        shared.changed.notify_all();
        let waited = shared.changed.wait_timeout(state, tick);
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Asks MPI about what was left to be sent, which moves it on.
fn push(state: &mut State) {
    if state.failure.is_some() {
        return;
    }
    let now = Instant::now();
    let mut failure = None;
    let mut gone = 0;
    state.left.retain_mut(|left| {
        let tested = left.flight.test();
        let late = now >= left.deadline;
        match tested {
            Ok(true) => {
                gone += left.bytes;
                false
            }
            Ok(false) => {
                if late {
                    failure.get_or_insert_with(|| left.silent.clone());
                }
                true
            }
            Err(reason) => {
                failure.get_or_insert_with(|| lost(&left.silent, reason));
                false
            }
        }
    });
    state.left_bytes -= gone;
    state.failure = failure.map(|error| (error, now));
}

/// The loss of the peer that would have been silent.
fn lost(silent: &CollectiveError, reason: String) -> CollectiveError {
    match silent {
        CollectiveError::TimedOut { peer, doing, .. } => CollectiveError::Lost {
            peer: peer.clone(),
            doing: doing.clone(),
            reason,
        },
        other => other.clone(),
    }
}

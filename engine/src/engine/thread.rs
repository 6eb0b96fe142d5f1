//! The engine's thread: empties the inbox, steps, and sleeps on the inbox when there is nothing to do.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::BackendError;
use crate::request::{Event, RequestFailure};

use super::EngineError;
use super::core::Core;
use super::handle::Shared;
use super::inbox::Command;

/// How often to look again for a page whose last reader goes without a word.
const READER_POLL: Duration = Duration::from_millis(2);

/// The running thread. Dropping it tells the engine to stop at once, and does not wait.
#[derive(Debug)]
pub struct EngineThread {
    thread: Option<JoinHandle<Result<(), EngineError>>>,
    ended: Receiver<()>,
    shared: Arc<Shared>,
}

impl EngineThread {
    /// Waits for the thread to end. Blocks the calling thread, so call it outside async tasks.
    ///
    /// # Errors
    /// How the thread ended if not by [`super::EngineHandle::shutdown`], or that it did not by the deadline.
    pub fn join(mut self, deadline: Instant) -> Result<(), EngineError> {
        let begun = Instant::now();
        let left = deadline.saturating_duration_since(begun);
        if self.ended.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
            return Err(EngineError::JoinTimedOut {
                waited_ms: begun.elapsed().as_millis(),
            });
        }
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(outcome)) => outcome,
            Some(Err(payload)) => Err(EngineError::Panicked(panic_text(payload.as_ref()))),
            None => Ok(()),
        }
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.shared.stop_accepting();
            self.shared.tell(Command::Shutdown(Instant::now()));
        }
    }
}

pub(super) fn spawn(
    core: Core,
    commands: Receiver<Command>,
    shared: &Arc<Shared>,
) -> Result<EngineThread, EngineError> {
    let (guard, ended) = channel();
    let thread = std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || {
            // Dropped last, whatever happens: that is what `join` waits for.
            let _guard: std::sync::mpsc::Sender<()> = guard;
            live(core, &commands)
        })
        .map_err(EngineError::Spawn)?;
    Ok(EngineThread {
        thread: Some(thread),
        ended,
        shared: Arc::clone(shared),
    })
}

/// Runs the engine to its end and leaves nobody waiting.
fn live(mut core: Core, commands: &Receiver<Command>) -> Result<(), EngineError> {
    let outcome = match catch_unwind(AssertUnwindSafe(|| run(&mut core, commands))) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error @ (BackendError::Peer(_) | BackendError::Rank { .. }))) => {
            Err(EngineError::Rank(error))
        }
        Ok(Err(error)) => Err(EngineError::Device(error)),
        Err(payload) => Err(EngineError::Panicked(panic_text(payload.as_ref()))),
    };
    core.shared.set_dead();
    let failure = match &outcome {
        Ok(()) => {
            core.abort(&RequestFailure::ShuttingDown);
            RequestFailure::ShuttingDown
        }
        Err(error) => {
            tracing::error!(%error, "the engine ended");
            let failure = RequestFailure::Engine(error.to_string());
            core.fail_clients(&failure);
            failure
        }
    };
    while let Ok(command) = commands.try_recv() {
        if let Command::Submit(submission) = command
            && submission
                .events
                .try_send(Event::Failed(failure.clone()))
                .is_err()
        {
            tracing::debug!("a client went away while the engine ended");
        }
    }
    outcome
}

/// The loop. Ends when a shutdown is complete or its deadline has passed.
fn run(core: &mut Core, commands: &Receiver<Command>) -> Result<(), BackendError> {
    let mut deadline = None;
    loop {
        while let Ok(command) = commands.try_recv() {
            obey(core, command, &mut deadline);
        }
        if deadline.is_some_and(|deadline| core.is_idle() || Instant::now() >= deadline) {
            return Ok(());
        }
        if core.model.keep_alive_due() == Some(Duration::ZERO) {
            core.model.keep_alive()?;
        }
        if core.step()? {
            continue;
        }
        core.check_books();
        core.publish_stats();
        match wait(core, commands, deadline) {
            Ok(command) => obey(core, command, &mut deadline),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// Sleeps until there is something to do.
fn wait(
    core: &mut Core,
    commands: &Receiver<Command>,
    deadline: Option<Instant>,
) -> Result<Command, RecvTimeoutError> {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let poll = core
        .scheduler
        .pool
        .take_skipped_shared()
        .then_some(READER_POLL);
    let due = core.model.keep_alive_due();
    match left.into_iter().chain(poll).chain(due).min() {
        Some(timeout) => commands.recv_timeout(timeout),
        None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
    }
}

pub(super) fn obey(core: &mut Core, command: Command, deadline: &mut Option<Instant>) {
    match command {
        Command::Submit(submission) => {
            core.submit(*submission);
            if deadline.is_some() {
                core.begin_drain();
            }
        }
        Command::Cancel(id) => core.cancel(id),
        Command::Handoff(event) => core.handoff_event(event),
        Command::Meet { state, met } => core.meet(state, met),
        Command::Shutdown(at) => {
            *deadline = Some(deadline.map_or(at, |earlier| earlier.min(at)));
            core.begin_drain();
        }
    }
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| {
            payload
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
        })
        .unwrap_or_else(|| "no message".to_owned())
}

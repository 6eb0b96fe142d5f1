//! A thread that notices that another rank is gone or silent while this one's device waits for it, and ends the waiting.
//!
//! What waits is a kernel; the host's calls return when it does. Invariant: while steps are under way, no longer than the ranks'
//! patience goes by without one of them ending; and once something is wrong, the first cause is what every step reports.

use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::error::CudaError;
use crate::collective::{CollectiveError, Lifeline};

/// How often lifelines are looked at while a step is under way.
const LOOK: Duration = Duration::from_millis(50);

/// What the device does, for messages.
const DOING: &str = "computing a step on its gpu";

/// The thread, and what it is told.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    trouble: OnceLock<CollectiveError>,
}

#[derive(Debug, Default)]
struct State {
    /// When the oldest step that is under way began, or the one before it ended.
    since: Option<Instant>,
    over: bool,
}

impl Watch {
    /// Begins to watch over these connections. `end` makes the device give up whatever it waits for.
    pub(super) fn start(
        lifelines: Vec<Lifeline>,
        patience: Duration,
        end: impl FnOnce() + Send + 'static,
    ) -> Result<Self, CudaError> {
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("ranks-watch".to_owned())
            .spawn(move || {
                if let Some(trouble) = watch(&own, &lifelines, patience) {
                    tracing::error!(%trouble, "the other ranks are given up");
                    // The first is told.
                    drop(own.trouble.set(trouble));
                    end();
                }
            })
            .map_err(|error| CudaError::Call {
                call: "starting a thread",
                status: error.to_string(),
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// A step has begun, or one has ended and another is under way.
    pub(super) fn busy(&self) {
        let mut state = self.shared.state.lock();
        let was_idle = state.since.replace(Instant::now()).is_none();
        drop(state);
        if was_idle {
            self.shared.changed.notify_one();
        }
    }

    /// No step is under way.
    pub(super) fn idle(&self) {
        self.shared.state.lock().since = None;
    }

    /// What is wrong, if anything is.
    pub(super) fn trouble(&self) -> Option<CollectiveError> {
        self.shared.trouble.get().cloned()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.state.lock().over = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // It ends at once, or when what it ends has ended; a panic in it has been printed.
            drop(thread.join());
        }
    }
}

/// Watches until something is wrong; none when it is over.
fn watch(shared: &Shared, lifelines: &[Lifeline], patience: Duration) -> Option<CollectiveError> {
    let mut state = shared.state.lock();
    loop {
        let since = loop {
            match state.since {
                _ if state.over => return None,
                Some(since) => break since,
                // Woken by a step or by the owner, who joins this thread.
                None => shared.changed.wait(&mut state),
            }
        };
        if since.elapsed() > patience {
            return Some(CollectiveError::TimedOut {
                peer: "another rank".to_owned(),
                doing: DOING.to_owned(),
                waited_ms: patience.as_millis(),
            });
        }
        drop(state);
        let gone = lifelines.iter().find(|lifeline| lifeline.is_cut());
        state = shared.state.lock();
        // A rank that leaves when the work is done is nobody's loss.
        if let (Some(gone), Some(_)) = (gone, state.since) {
            return Some(CollectiveError::Lost {
                peer: gone.peer().to_owned(),
                doing: DOING.to_owned(),
                reason: "its connection is closed".to_owned(),
            });
        }
        if !state.over {
            shared.changed.wait_for(&mut state, LOOK);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(30);

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    fn watched(near: TcpStream, patience: Duration) -> (Watch, Receiver<()>) {
        let (tell, told) = channel();
        let lifelines = vec![Lifeline::new("rank 1 (node1)".to_owned(), near)];
        let watch = Watch::start(lifelines, patience, move || tell.send(()).unwrap());
        (watch.unwrap(), told)
    }

    #[test]
    fn a_rank_that_is_gone_ends_the_waiting() {
        let (near, far) = pair();
        let (watch, told) = watched(near, DEADLINE);
        watch.busy();
        assert!(watch.trouble().is_none());
        drop(far);
        told.recv_timeout(DEADLINE).unwrap();
        let trouble = watch.trouble().unwrap().to_string();
        assert!(trouble.contains("rank 1 (node1)"), "{trouble}");
    }

    #[test]
    fn a_silent_rank_ends_the_waiting() {
        let (near, far) = pair();
        let (watch, told) = watched(near, Duration::from_millis(1));
        watch.busy();
        told.recv_timeout(DEADLINE).unwrap();
        let trouble = watch.trouble().unwrap();
        assert!(matches!(trouble, CollectiveError::TimedOut { .. }));
        drop(far);
    }

    #[test]
    fn nobody_is_missed_when_there_is_no_work() {
        let (near, far) = pair();
        let (watch, told) = watched(near, DEADLINE);
        watch.busy();
        watch.idle();
        drop(far);
        drop(watch);
        assert!(told.try_recv().is_err());
    }
}

//! The PMIx server of srun, mpirun or PRRTE, as a notice board: each rank may put texts there, each rank may read them.
//!
//! Direct modex only: no fence, so one rank that never comes keeps nobody else from reading. All calls block; use them
//! from a thread of their own. libpmix is opened at run time, and its absence is an error like any other.
//! Absent: groups, events, spawning, and everything that MPI needs (it opens its own PMIx).
//!
//! What was seen of PMIx 4.2.2 under Open MPI 4.1's mpirun and Slurm 22.05's srun; the tests hold it:
//! - A rank may finalize before others fetch what it has published. Under Slurm it must still be alive then: the notices
//!   of a node go with its last process, and who asks later waits for ever.
//! - Once one rank has connected, mpirun takes any rank that ends without having finalized, or that never connected, for
//!   a crash and ends the world. srun does not mind.
//! - A child of a connected or finalized rank may connect as the same rank; for its MPI_Init to find its own place it
//!   needs [`CHILD_ENVIRONMENT`].
//! - Connecting changes the process's own environment (`PMIX_MCA_psec`), so it belongs to the start of a program.

mod library;
#[cfg(test)]
mod tests;

use std::ffi::CString;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use self::library::{Fetched, Library, Process, RANK_WILDCARD, Status};
use crate::marks::Marks;

/// What a child of a rank needs in its environment to call MPI_Init as that rank: without it, the shared-memory store
/// of PMIx 4 gives a second client of a rank none of the rank's own facts ("getting local rank failed").
pub(crate) const CHILD_ENVIRONMENT: &[(&str, &str)] = &[("PMIX_MCA_gds", "hash")];

/// How long the local server may take to take a call that needs no other rank.
const LOCAL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a rank's missing value is left alone before it is asked for again.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// Why the notice board is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum PmixError {
    /// libpmix is not on this machine, or too old.
    #[error(
        "cannot open {}: {reason}\nhint: install PMIx 3 or later (package libpmix2), or put its folder into \
         LD_LIBRARY_PATH",
        library::NAME
    )]
    Library {
        /// The loader's words.
        reason: String,
    },
    /// This process was not started by a PMIx launcher.
    #[error(
        "no PMIx server for this process: PMIX_NAMESPACE is not set\nhint: start it with mpirun, or with srun --mpi=pmix"
    )]
    NoServer,
    /// The library refuses a call.
    #[error("{call}: {text} ({code}); {version}\nhint: {}", hint(*code))]
    Call {
        /// What was called.
        call: &'static str,
        /// PMIx's words.
        text: String,
        /// PMIx's number.
        code: i32,
        /// The library's version, as it says it.
        version: String,
    },
    /// A value did not come in time.
    #[error("no `{key}` from rank {rank} after {} s: {reason}", waited.as_secs())]
    TimedOut {
        /// What was asked for.
        key: String,
        /// Whose.
        rank: u32,
        /// How long it was waited for.
        waited: Duration,
        /// What the last try said.
        reason: String,
    },
    /// The local server does not answer at all.
    #[error("{call}: the local PMIx server has not answered for {} s", LOCAL_TIMEOUT.as_secs())]
    Silent {
        /// What was called.
        call: &'static str,
    },
    /// The system gives no more threads.
    #[error("cannot start a thread to call {call}: {reason}")]
    Thread {
        /// What was to be called.
        call: &'static str,
        /// The system's words.
        reason: String,
    },
    /// A value of another type than its key has.
    #[error("`{key}` of rank {rank} is not {wanted}")]
    Type {
        /// What was asked for.
        key: String,
        /// Whose.
        rank: u32,
        /// What it should be.
        wanted: &'static str,
    },
    /// A text that C cannot hold.
    #[error("`{text}` has a NUL byte, which no PMIx text can have")]
    Nul {
        /// The text.
        text: String,
    },
}

fn hint(code: i32) -> &'static str {
    if Status(code) == Status::UNREACHABLE {
        "the launcher that set the PMIX_* variables has gone; start this process with srun --mpi=pmix or mpirun itself"
    } else {
        "the PMIx of this machine and the launcher's may not fit together; `--mpi=none` does without"
    }
}

/// A connection to the local PMIx server. The process must [`Pmix::finalize`] it before it ends.
#[derive(Debug)]
pub(crate) struct Pmix {
    library: Arc<Library>,
    own: Process,
    size: u32,
}

impl Pmix {
    /// Connects to the server of the environment's `PMIX_NAMESPACE`.
    ///
    /// # Errors
    /// When there is no library, no server, or the two do not come together in 30 s.
    pub(crate) fn open() -> Result<Self, PmixError> {
        // Without one, PMIx_Init would make this process a world of its own.
        if std::env::var_os("PMIX_NAMESPACE").is_none() {
            return Err(PmixError::NoServer);
        }
        let library = Arc::new(Library::open().map_err(|error| PmixError::Library {
            reason: error.to_string(),
        })?);
        let shared = Arc::clone(&library);
        let own = OwnThread::start("PMIx_Init", move || shared.init())?
            .wait(LOCAL_TIMEOUT)
            .ok_or(PmixError::Silent { call: "PMIx_Init" })?
            .map_err(|status| refused(&library, "PMIx_Init", status))?;
        let mut pmix = Self {
            library,
            own,
            size: 0,
        };
        match pmix.ask_size() {
            Ok(size) => pmix.size = size,
            Err(error) => {
                pmix.finalize()?;
                return Err(error);
            }
        }
        Ok(pmix)
    }

    fn ask_size(&self) -> Result<u32, PmixError> {
        const KEY: &str = "pmix.job.size";
        let deadline = Instant::now() + LOCAL_TIMEOUT;
        match self.fetch_value(RANK_WILDCARD, KEY, deadline)? {
            Fetched::Number(size) => Ok(size),
            Fetched::Text(_) | Fetched::Other(_) => Err(PmixError::Type {
                key: KEY.to_owned(),
                rank: RANK_WILDCARD,
                wanted: "a 32-bit number",
            }),
        }
    }

    /// This process's rank in its world.
    pub(crate) fn rank(&self) -> u32 {
        self.own.rank
    }

    /// Ranks of the world.
    pub(crate) fn job_size(&self) -> u32 {
        self.size
    }

    /// Puts a text up for all ranks to fetch. It is there when this returns.
    ///
    /// # Errors
    /// When the server refuses it.
    pub(crate) fn publish(&self, key: &str, value: &str) -> Result<(), PmixError> {
        let (key, value) = (c_text(key)?, c_text(value)?);
        let refused = |call, status| refused(&self.library, call, status);
        let put = self.library.put(&key, &value);
        put.map_err(|status| refused("PMIx_Put", status))?;
        let committed = self.library.commit();
        committed.map_err(|status| refused("PMIx_Commit", status))
    }

    /// Waits until a rank has published a key, and says so when that takes long.
    ///
    /// # Errors
    /// When the deadline passes or the server refuses. PMIx cannot be called off: where its server ignores the
    /// deadline, one thread stays behind, waiting in the library, until the process ends.
    pub(crate) fn fetch(
        &self,
        rank: u32,
        key: &str,
        deadline: Instant,
    ) -> Result<String, PmixError> {
        match self.fetch_value(rank, key, deadline)? {
            Fetched::Text(text) => Ok(text),
            Fetched::Number(_) | Fetched::Other(_) => Err(PmixError::Type {
                key: key.to_owned(),
                rank,
                wanted: "text",
            }),
        }
    }

    fn fetch_value(&self, rank: u32, key: &str, deadline: Instant) -> Result<Fetched, PmixError> {
        let start = Instant::now();
        let name = c_text(key)?;
        let of = self.own.with_rank(rank);
        let late = |reason: String| PmixError::TimedOut {
            key: key.to_owned(),
            rank,
            waited: start.elapsed(),
            reason,
        };
        let mut waiting = Waiting::since(start, rank);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Whole seconds, and 0 would be for ever.
            let seconds = u32::try_from(left.as_secs()).unwrap_or(u32::MAX).max(1);
            let (library, name) = (Arc::clone(&self.library), name.clone());
            let call = OwnThread::start("PMIx_Get", move || library.get(&of, &name, seconds))?;
            let status = match waiting.until(deadline, |limit| call.wait(limit)) {
                None => return Err(late("the PMIx server is still waiting for it".to_owned())),
                Some(Ok(fetched)) => return Ok(fetched),
                Some(Err(status)) => status,
            };
            let comes_later = status == Status::NOT_FOUND || status == Status::TIMEOUT;
            if !comes_later {
                return Err(refused(&self.library, "PMIx_Get", status));
            }
            let again = Instant::now() + RETRY_AFTER;
            if again >= deadline {
                return Err(late(self.library.text_of(status)));
            }
            // The reason why this rank's own server knows nothing yet may pass.
            waiting.until(again, |limit| {
                std::thread::park_timeout(limit);
                None::<()>
            });
        }
    }

    /// Takes leave of the server. What was published stays up.
    ///
    /// # Errors
    /// When the server has gone or does not answer in 30 s.
    pub(crate) fn finalize(self) -> Result<(), PmixError> {
        const CALL: &str = "PMIx_Finalize";
        let library = Arc::clone(&self.library);
        OwnThread::start(CALL, move || library.finalize())?
            .wait(LOCAL_TIMEOUT)
            .ok_or(PmixError::Silent { call: CALL })?
            .map_err(|status| refused(&self.library, CALL, status))
    }
}

fn refused(library: &Library, call: &'static str, status: Status) -> PmixError {
    PmixError::Call {
        call,
        text: library.text_of(status),
        code: status.0,
        version: library.version(),
    }
}

fn c_text(text: &str) -> Result<CString, PmixError> {
    CString::new(text).map_err(|_| PmixError::Nul {
        text: text.escape_debug().to_string(),
    })
}

/// A wait for another rank that says from time to time that it goes on.
#[derive(Debug)]
struct Waiting {
    start: Instant,
    rank: u32,
    mark: Instant,
    marks: Marks,
}

impl Waiting {
    fn since(start: Instant, rank: u32) -> Self {
        let mut marks = Marks::default();
        Self {
            start,
            rank,
            mark: start + marks.advance(),
            marks,
        }
    }

    /// Waits in steps, each as long as `wait` is told at most, until that gives something or the time is over.
    fn until<T>(
        &mut self,
        deadline: Instant,
        mut wait: impl FnMut(Duration) -> Option<T>,
    ) -> Option<T> {
        loop {
            let step = deadline
                .min(self.mark)
                .saturating_duration_since(Instant::now());
            if let Some(value) = wait(step) {
                return Some(value);
            }
            let now = Instant::now();
            if now >= deadline {
                return None;
            }
            if now >= self.mark {
                self.say();
            }
        }
    }

    fn say(&mut self) {
        tracing::warn!(
            waited_s = self.start.elapsed().as_secs(),
            rank = self.rank,
            "waiting for a rank to publish where it is"
        );
        self.mark = self.start + self.marks.advance();
    }
}

/// A call that may never return, on a thread of its own. The thread stays behind when nobody waits any more.
#[derive(Debug)]
struct OwnThread<T> {
    answered: Receiver<T>,
}

impl<T: Send + 'static> OwnThread<T> {
    fn start(
        call: &'static str,
        run: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Self, PmixError> {
        let (answer, answered) = sync_channel(1);
        let run = move || {
            // Nobody listens any more when the time is over.
            let _ = answer.send(run());
        };
        std::thread::Builder::new()
            .name(call.to_owned())
            .spawn(run)
            .map_err(|error| PmixError::Thread {
                call,
                reason: error.to_string(),
            })?;
        Ok(Self { answered })
    }

    /// `None`: it has not returned in time.
    fn wait(&self, limit: Duration) -> Option<T> {
        match self.answered.recv_timeout(limit) {
            Ok(value) => Some(value),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                unreachable!("the thread answers before it ends")
            }
        }
    }
}

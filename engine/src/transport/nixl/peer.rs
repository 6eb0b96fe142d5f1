//! One peer, read through an agent of its own. One at a time uses an agent, so no lock is needed; and when a read has to
//! be given up while it is under way, destroying the agent is what ends it for certain, and hurts no other peer.
//!
//! Invariant: while a request is under way, this module neither returns nor lets go of the memory that it writes; the
//! way out is that all requests are done, or that the agent is destroyed. A peer whose read failed has no agent any more.

use std::collections::VecDeque;
use std::collections::btree_map::{BTreeMap, Entry};
use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::NAME;
use super::address::Key;
use super::library::{Agent, Request, Stretch};
use super::windows::Windows;
use crate::page::arena::Arena;
use crate::transport::fabric::{FabricError, FabricPeer, ReadJob, RemoteArena};

/// Requests under way at once: the next is prepared while one moves.
const REQUESTS_MAX: usize = 2;

/// Arenas that one peer may export.
const ARENAS_MAX: usize = 256;

/// How long requests under way are waited for once their read is given up. Most are done by then, and the agent
/// is destroyed in peace.
const GRACE: Duration = Duration::from_millis(200);

/// Looks at a request without a pause, before there are pauses.
const EAGER_LOOKS: u32 = 200;

/// Between looks at a request that takes its time.
const PAUSE: Duration = Duration::from_micros(50);

/// See the module.
#[derive(Debug)]
pub(super) struct NixlPeer {
    /// Before what it has registered, so that it is dropped first. None after a failed read.
    agent: Option<Agent>,
    /// The peer's agent.
    name: CString,
    /// Where the imported arenas begin in the peer, and their lengths.
    imported: Vec<(usize, usize)>,
    /// Arenas of ours that the agent knows.
    registered: BTreeMap<u64, Arc<Arena>>,
    /// The fabric's.
    closed: Arc<AtomicBool>,
}

impl NixlPeer {
    pub(super) const fn new(agent: Agent, name: CString, closed: Arc<AtomicBool>) -> Self {
        Self {
            agent: Some(agent),
            name,
            imported: Vec::new(),
            registered: BTreeMap::new(),
            closed,
        }
    }

    fn agent(&self) -> Result<&Agent, FabricError> {
        let ended = || failed("an earlier read failed".to_owned());
        self.agent.as_ref().ok_or_else(ended)
    }

    /// Reads while the memory of all jobs is borrowed; after an error, requests may still be under way.
    fn carry_out(
        &mut self,
        agent: &Agent,
        jobs: &mut [ReadJob<'_>],
        limits: &Limits<'_>,
    ) -> Result<(), FabricError> {
        let mut passing = Vec::new();
        let mut targets = Vec::with_capacity(jobs.len());
        for job in jobs {
            let remote = self.source(job)?;
            if let Some((arena, _)) = job.page.arena() {
                register_arena(&mut self.registered, agent, arena)?;
            }
            let in_arena = job.page.arena().is_some();
            let bytes = job.page.as_bytes_mut();
            let (length, local) = (bytes.len(), bytes.as_mut_ptr().expose_provenance());
            if !in_arena && length > 0 {
                agent.register(local, length).map_err(memory)?;
                passing.push((local, length));
            }
            targets.push((job.runs, remote, local));
        }
        let stretches = targets.iter().flat_map(|&(runs, remote, local)| {
            runs.stretches().map(move |(source, target)| Stretch {
                remote: remote + source.start,
                local: local + target.start,
                bytes: target.len(),
            })
        });
        fly(agent, &self.name, Windows::new(stretches), limits)?;
        for (start, bytes) in passing {
            agent.deregister(start, bytes).map_err(memory)?;
        }
        Ok(())
    }

    /// Where the job's arena begins in the peer.
    fn source(&self, job: &ReadJob<'_>) -> Result<usize, FabricError> {
        let index = usize::try_from(job.from.handle).ok();
        let (start, bytes) = index
            .and_then(|index| self.imported.get(index).copied())
            .ok_or_else(|| failed(format!("arena {} was not imported", job.from.handle)))?;
        let target_bytes = job.page.as_bytes().len();
        if job.runs.fits(bytes, target_bytes) {
            return Ok(start);
        }
        Err(failed(format!(
            "a piece ends outside of its arena of {bytes} bytes or its page of {target_bytes}"
        )))
    }
}

impl FabricPeer for NixlPeer {
    fn import(&mut self, key: &[u8]) -> Result<RemoteArena, FabricError> {
        let malformed = |detail: String| FabricError::Malformed {
            fabric: NAME,
            what: "arena key",
            detail,
        };
        let key = Key::decode(key).map_err(malformed)?;
        let handle = self.imported.len();
        if handle == ARENAS_MAX {
            return Err(malformed(format!("the peer has {ARENAS_MAX} already")));
        }
        let name = self.agent()?.load(&key.memory).map_err(malformed)?;
        if name != self.name {
            let other = name.to_string_lossy();
            return Err(malformed(format!("it is of another agent, {other}")));
        }
        self.imported.push((key.start, key.bytes));
        Ok(RemoteArena {
            handle: handle as u64,
            bytes: key.bytes as u64,
        })
    }

    fn read(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        self.agent()?;
        let limits = Limits {
            deadline,
            cancelled,
            closed: Arc::clone(&self.closed),
        };
        if let Some(reason) = limits.passed() {
            return Err(reason);
        }
        let Some(agent) = self.agent.take() else {
            return Ok(());
        };
        let result = self.carry_out(&agent, jobs, &limits);
        match result {
            Ok(()) => self.agent = Some(agent),
            // Whatever is still under way ends here, before the pages go back to their owner.
            Err(_) => drop(agent),
        }
        result
    }
}

/// What ends a read before it is done.
struct Limits<'a> {
    deadline: Instant,
    cancelled: &'a AtomicBool,
    closed: Arc<AtomicBool>,
}

impl Limits<'_> {
    fn passed(&self) -> Option<FabricError> {
        let given_up =
            self.cancelled.load(Ordering::Acquire) || self.closed.load(Ordering::Acquire);
        let late = || Instant::now() >= self.deadline;
        if given_up {
            return Some(FabricError::Cancelled { fabric: NAME });
        }
        late().then_some(FabricError::TimedOut { fabric: NAME })
    }
}

/// Requests of one read, looked after by the calling thread, which drives NIXL by asking.
struct Flight<'a> {
    agent: &'a Agent,
    requests: VecDeque<Request>,
    looks: u32,
}

impl Flight<'_> {
    /// Takes the first request down if it is done, else waits a little.
    fn look(&mut self) -> Result<(), FabricError> {
        let Some(first) = self.requests.pop_front() else {
            return Ok(());
        };
        if self.agent.is_done(&first).map_err(failed)? {
            self.looks = 0;
            return self.agent.finish(first).map_err(failed);
        }
        self.requests.push_front(first);
        self.looks += 1;
        if self.looks > EAGER_LOOKS {
            thread::park_timeout(PAUSE);
        }
        Ok(())
    }

    /// Waits for what is under way, for as long as is granted.
    fn settle(mut self) {
        let until = Instant::now() + GRACE;
        while !self.requests.is_empty() && Instant::now() < until {
            if self.look().is_err() {
                return;
            }
        }
    }
}

fn fly<I: Iterator<Item = Stretch>>(
    agent: &Agent,
    peer: &CString,
    mut windows: Windows<I>,
    limits: &Limits<'_>,
) -> Result<(), FabricError> {
    let mut flight = Flight {
        agent,
        requests: VecDeque::with_capacity(REQUESTS_MAX),
        looks: 0,
    };
    loop {
        if let Some(reason) = limits.passed() {
            flight.settle();
            return Err(reason);
        }
        while flight.requests.len() < REQUESTS_MAX {
            let Some(window) = windows.next() else { break };
            let request = agent.read(peer, &window).map_err(failed)?;
            flight.requests.push_back(request);
        }
        if flight.requests.is_empty() {
            return Ok(());
        }
        flight.look()?;
    }
}

fn register_arena(
    registered: &mut BTreeMap<u64, Arc<Arena>>,
    agent: &Agent,
    arena: &Arc<Arena>,
) -> Result<(), FabricError> {
    if let Entry::Vacant(place) = registered.entry(arena.id()) {
        let start = arena.base().expose_provenance();
        agent.register(start, arena.bytes()).map_err(memory)?;
        place.insert(Arc::clone(arena));
    }
    Ok(())
}

fn failed(detail: String) -> FabricError {
    FabricError::Read {
        fabric: NAME,
        detail,
    }
}

fn memory(detail: String) -> FabricError {
    FabricError::Memory {
        fabric: NAME,
        detail,
    }
}

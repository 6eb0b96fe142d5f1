//! One peer, read through agents of its own. One thread at a time uses an agent, so no lock is needed; and when a read
//! has to be given up while it is under way, destroying its agents is what ends it for certain, and hurts no other peer.
//!
//! Within a host it is the calling thread that copies, in NIXL's name; so a large batch is read by several threads, each
//! with an agent (a lane). Over an adapter there is one lane.
//!
//! Invariant: while a request is under way, this module neither returns nor lets go of the memory that it writes; the
//! way out is that all requests are done, or that the agents are destroyed. A peer whose read failed has no lanes any more.

use std::collections::VecDeque;
use std::collections::btree_map::{BTreeMap, Entry};
use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::NAME;
use super::address::Key;
use super::find::Plugin;
use super::library::{Agent, Library, Place, Progress, Request, Stretch};
use super::windows::{WINDOW_BYTES_MAX, Windows};
use crate::page::arena::Arena;
use crate::transport::checksum::sum_of;
use crate::transport::fabric::{FabricError, FabricPeer, ReadJob, RemoteArena};

/// Requests under way at once: the next is prepared while one moves.
const REQUESTS_MAX: usize = 2;

/// Bytes of jobs that one request reads from a peer of the same host: when it is done, a core's caches still have most of
/// them, for their checksums.
const NEAR_BYTES: usize = 2 << 20;

/// Arenas that one peer may export.
const ARENAS_MAX: usize = 1024;

/// How long requests under way are waited for once their read is given up. Most are done by then, and the agent
/// is destroyed in peace.
const GRACE: Duration = Duration::from_millis(200);

/// Looks at a request without a pause, before there are pauses.
const EAGER_LOOKS: u32 = 200;

/// The same of a read of a GPU's memory: a few milliseconds.
const EAGER_LOOKS_GPU: u32 = 20_000;

/// Between looks at a request that takes its time.
const PAUSE: Duration = Duration::from_micros(50);

/// How a lane is made.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) library: &'static Library,
    pub(super) plugin: Plugin,
    /// The peer's description of its agent.
    pub(super) agent: Vec<u8>,
    /// Lanes that may be made.
    pub(super) lanes_max: usize,
    /// Whether the peer is of this host, so that the bytes pass through the caller's caches.
    pub(super) near: bool,
}

/// An agent, and what it knows.
#[derive(Debug)]
struct Lane {
    /// Before what it has registered, so that it is dropped first.
    agent: Agent,
    /// Arenas of ours.
    registered: BTreeMap<u64, Arc<Arena>>,
}

impl Lane {
    /// With the name of the peer's agent.
    fn start(source: &Source) -> Result<(Self, CString), String> {
        let name = super::fresh_name();
        let plugin = source.plugin.c_name();
        let agent = Agent::start(source.library, &name, plugin, Progress::Caller)?;
        let peer = agent.load(&source.agent)?;
        let lane = Self {
            agent,
            registered: BTreeMap::new(),
        };
        Ok((lane, peer))
    }

    fn register(&mut self, arena: &Arc<Arena>) -> Result<(), FabricError> {
        if let Entry::Vacant(place) = self.registered.entry(arena.id()) {
            let start = arena.base().expose_provenance();
            super::enter(arena).map_err(memory)?;
            let range = (start, arena.bytes());
            let registered = self.agent.register(range, Place::of(arena));
            registered.map_err(memory)?;
            place.insert(Arc::clone(arena));
        }
        Ok(())
    }
}

/// What one request reads.
struct Portion<'j, 'p> {
    stretches: Vec<Stretch>,
    /// Jobs that are over with it, if it is all of these.
    jobs: &'j mut [ReadJob<'p>],
}

impl Portion<'_, '_> {
    /// Sums what has just been read, where that is wanted.
    fn sum(self) {
        for job in self.jobs {
            if job.sum && !job.page.is_on_device() {
                let targets = job.runs.stretches().map(|(_, target)| target);
                job.checksum = Some(sum_of(job.page.as_bytes(), targets));
            }
        }
    }
}

/// Divides jobs, of which each begins remotely and here at these addresses. From a peer of this host a few jobs at a time, so
/// that they can be summed at once; else as the windows come.
fn portions<'j, 'p>(
    mut jobs: &'j mut [ReadJob<'p>],
    mut places: &[(usize, usize)],
    near: bool,
) -> Vec<Portion<'j, 'p>> {
    let mut portions = Vec::new();
    while !jobs.is_empty() {
        let mut bytes = 0_usize;
        let fitting = jobs.iter().take_while(|job| {
            bytes = bytes.saturating_add(job.runs.total_bytes());
            !near || bytes <= NEAR_BYTES
        });
        let count = fitting.count().max(1);
        let (some, later) = jobs.split_at_mut(count);
        let (of_some, of_later) = places.split_at(count);
        (jobs, places) = (later, of_later);
        let each = some.iter().zip(of_some);
        let stretches = each.flat_map(|(job, &(remote, local))| {
            job.stretches().map(move |(source, target)| Stretch {
                remote: remote + source.start,
                local: local + target.start,
                bytes: target.len(),
            })
        });
        let windows: Vec<_> = Windows::new(stretches).collect();
        // Of several requests nobody knows which is the last.
        let mut done: &mut [ReadJob<'_>] = if near && windows.len() == 1 {
            some
        } else {
            &mut []
        };
        portions.extend(windows.into_iter().map(|stretches| Portion {
            stretches,
            jobs: std::mem::take(&mut done),
        }));
    }
    portions
}

/// See the module.
#[derive(Debug)]
pub(super) struct NixlPeer {
    source: Source,
    /// The peer's agent.
    name: CString,
    /// At least one, until a read fails.
    lanes: Vec<Lane>,
    /// In the order of import.
    imported: Vec<Key>,
    /// Reads that were begun, in order; those into the host's memory are over.
    begun: VecDeque<Option<Begun>>,
    /// The fabric's.
    closed: Arc<AtomicBool>,
}

impl NixlPeer {
    /// The error says what is wrong.
    pub(super) fn open(source: Source, closed: Arc<AtomicBool>) -> Result<Self, String> {
        let (lane, name) = Lane::start(&source)?;
        Ok(Self {
            source,
            name,
            lanes: vec![lane],
            imported: Vec::new(),
            begun: VecDeque::new(),
            closed,
        })
    }

    fn one_more_lane(&self) -> Result<Lane, String> {
        let (lane, _) = Lane::start(&self.source)?;
        for key in &self.imported {
            lane.agent.load(&key.memory)?;
        }
        Ok(lane)
    }

    /// One more lane, where so many bytes are worth it: making one takes a tenth of a second, which no single read
    /// shall pay several times.
    fn widen(&mut self, bytes: usize) {
        let wanted = (bytes / WINDOW_BYTES_MAX).min(self.source.lanes_max);
        if self.lanes.len() >= wanted {
            return;
        }
        match self.one_more_lane() {
            Ok(lane) => self.lanes.push(lane),
            Err(reason) => {
                tracing::debug!(reason, lanes = self.lanes.len(), "no more lanes");
                self.source.lanes_max = self.lanes.len();
            }
        }
    }

    /// Reads while the memory of all jobs is borrowed; after an error, requests may still be under way.
    fn carry_out(
        &self,
        lanes: &mut [Lane],
        jobs: &mut [ReadJob<'_>],
        limits: &Limits<'_>,
    ) -> Result<(), FabricError> {
        let (mut passing, mut places) = (Vec::new(), Vec::with_capacity(jobs.len()));
        for job in &mut *jobs {
            let key = self.origin(job)?;
            if key.gpu.is_some() || job.page.is_on_device() {
                return Err(failed("memory of a GPU where the host's is due".to_owned()));
            }
            let remote = key.start;
            for lane in &mut *lanes {
                if let Some((arena, _)) = job.page.arena() {
                    lane.register(arena)?;
                }
            }
            let in_arena = job.page.arena().is_some();
            let bytes = job.page.as_bytes_mut();
            let (length, local) = (bytes.len(), bytes.as_mut_ptr().expose_provenance());
            if !in_arena && length > 0 {
                passing.push((local, length));
            }
            places.push((remote, local));
        }
        for lane in &*lanes {
            for (start, bytes) in &passing {
                let registered = lane.agent.register((*start, *bytes), Place::Host);
                registered.map_err(memory)?;
            }
        }
        let portions = portions(jobs, &places, self.source.near);
        fly_all(lanes, &self.name, portions, limits)?;
        for lane in &*lanes {
            for (start, bytes) in &passing {
                lane.agent.deregister(*start, *bytes).map_err(memory)?;
            }
        }
        Ok(())
    }

    /// Starts a read of a GPU's memory into a page of a GPU, in one request of the first lane.
    fn start_on_gpu(&mut self, job: &ReadJob<'_>, deadline: Instant) -> Result<Begun, FabricError> {
        let key = self.origin(job)?;
        let (remote, gpu) = (key.start, key.gpu);
        let not_there = || failed("memory of the host's where a GPU's is due".to_owned());
        let from = gpu.map(Place::Gpu).ok_or_else(not_there)?;
        let (arena, offset) = job.page.arena().ok_or_else(not_there)?;
        let local = arena.base().expose_provenance() + offset;
        let spent = || failed("an earlier read failed".to_owned());
        let lane = self.lanes.first_mut().ok_or_else(spent)?;
        lane.register(arena)?;
        super::enter(arena).map_err(memory)?;
        let stretches = job.stretches().map(|(source, target)| Stretch {
            remote: remote + source.start,
            local: local + target.start,
            bytes: target.len(),
        });
        let stretches: Vec<_> = stretches.collect();
        let places = (from, Place::of(arena));
        let request = lane.agent.read(&self.name, &stretches, places);
        Ok(Begun {
            request: request.map_err(failed)?,
            deadline,
        })
    }

    /// The job's arena in the peer.
    fn origin(&self, job: &ReadJob<'_>) -> Result<&Key, FabricError> {
        let index = usize::try_from(job.from.handle).ok();
        let key = index
            .and_then(|index| self.imported.get(index))
            .ok_or_else(|| failed(format!("arena {} was not imported", job.from.handle)))?;
        let target_bytes = job.page.shape().bytes();
        if job.fits(key.bytes, target_bytes) {
            return Ok(key);
        }
        let bytes = key.bytes;
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
        for lane in &self.lanes {
            let name = lane.agent.load(&key.memory).map_err(malformed)?;
            if name != self.name {
                let other = name.to_string_lossy();
                return Err(malformed(format!("it is of another agent, {other}")));
            }
        }
        let (bytes, on_device) = (key.bytes as u64, key.gpu.is_some());
        self.imported.push(key);
        Ok(RemoteArena {
            handle: handle as u64,
            bytes,
            on_device,
        })
    }

    fn read(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        let limits = Limits {
            deadline,
            cancelled,
            closed: &self.closed.clone(),
            another_failed: AtomicBool::new(false),
        };
        if let Some(reason) = limits.passed() {
            return Err(reason);
        }
        if self.lanes.is_empty() {
            return Err(failed("an earlier read failed".to_owned()));
        }
        let bytes = jobs.iter().map(|job| job.runs.total_bytes());
        self.widen(bytes.fold(0, usize::saturating_add));
        let mut lanes = std::mem::take(&mut self.lanes);
        let result = self.carry_out(&mut lanes, jobs, &limits);
        match result {
            Ok(()) => self.lanes = lanes,
            // Whatever is still under way ends here, before the pages go back to their owner.
            Err(_) => drop(lanes),
        }
        result
    }

    fn begin(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        let job = match jobs {
            [job] if job.page.is_on_device() => job,
            jobs => {
                self.read(jobs, deadline, cancelled)?;
                self.begun.push_back(None);
                return Ok(());
            }
        };
        let limits = Limits {
            deadline,
            cancelled,
            closed: &self.closed.clone(),
            another_failed: AtomicBool::new(false),
        };
        let begun = match limits.passed() {
            None => self.start_on_gpu(job, deadline),
            Some(reason) => Err(reason),
        };
        // Whatever is under way ends with the agents.
        self.begun
            .push_back(Some(begun.inspect_err(|_| self.lanes.clear())?));
        Ok(())
    }

    fn finish(
        &mut self,
        cancelled: &AtomicBool,
        _: &mut Vec<Option<u64>>,
    ) -> Result<(), FabricError> {
        let Some(Some(begun)) = self.begun.pop_front() else {
            return Ok(());
        };
        let limits = Limits {
            deadline: begun.deadline,
            cancelled,
            closed: &self.closed.clone(),
            another_failed: AtomicBool::new(false),
        };
        let landed = self.land(begun.request, &limits);
        if landed.is_err() {
            // As above.
            self.lanes.clear();
        }
        landed
    }
}

/// A read into a GPU's memory.
#[derive(Debug)]
struct Begun {
    request: Request,
    deadline: Instant,
}

impl NixlPeer {
    /// Waits for a request of the first lane: without a pause, for it takes a fraction of a millisecond.
    fn land(&self, request: Request, limits: &Limits<'_>) -> Result<(), FabricError> {
        let spent = || failed("an earlier read failed".to_owned());
        let agent = &self.lanes.first().ok_or_else(spent)?.agent;
        let mut looks = 0_u32;
        while !agent.is_done(&request).map_err(failed)? {
            if let Some(reason) = limits.passed() {
                return Err(reason);
            }
            looks = looks.saturating_add(1);
            if looks > EAGER_LOOKS_GPU {
                thread::park_timeout(PAUSE);
            }
        }
        agent.finish(request).map_err(failed)
    }
}

/// What ends a read before it is done.
struct Limits<'a> {
    deadline: Instant,
    cancelled: &'a AtomicBool,
    closed: &'a AtomicBool,
    /// A lane of the same read.
    another_failed: AtomicBool,
}

impl Limits<'_> {
    fn passed(&self) -> Option<FabricError> {
        let flags = [self.cancelled, self.closed, &self.another_failed];
        if flags.iter().any(|flag| flag.load(Ordering::Acquire)) {
            return Some(FabricError::Cancelled { fabric: NAME });
        }
        let late = Instant::now() >= self.deadline;
        late.then_some(FabricError::TimedOut { fabric: NAME })
    }
}

/// Requests of one read, looked after by the calling thread, which drives NIXL by asking.
struct Flight<'a, 'j, 'p> {
    agent: &'a Agent,
    requests: VecDeque<(Request, Portion<'j, 'p>)>,
    looks: u32,
}

impl Flight<'_, '_, '_> {
    /// Takes the first request down if it is done, else waits a little.
    fn look(&mut self) -> Result<(), FabricError> {
        let Some((first, portion)) = self.requests.pop_front() else {
            return Ok(());
        };
        if self.agent.is_done(&first).map_err(failed)? {
            self.looks = 0;
            self.agent.finish(first).map_err(failed)?;
            portion.sum();
            return Ok(());
        }
        self.requests.push_front((first, portion));
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

/// Deals the portions out to the lanes, each with a thread; the first lane has the calling one.
fn fly_all(
    lanes: &mut [Lane],
    peer: &CStr,
    portions: Vec<Portion<'_, '_>>,
    limits: &Limits<'_>,
) -> Result<(), FabricError> {
    let portions = Mutex::new(portions.into_iter());
    let next = || {
        let mut portions = portions.lock().unwrap_or_else(PoisonError::into_inner);
        portions.next()
    };
    let fly = |lane: &mut Lane| {
        let flown = fly(&lane.agent, peer, next, limits);
        if flown.is_err() {
            limits.another_failed.store(true, Ordering::Release);
        }
        flown
    };
    let Some((first, others)) = lanes.split_first_mut() else {
        return Ok(());
    };
    thread::scope(|scope| {
        // A lane whose thread does not start leaves its share to the others.
        let others: Vec<_> = others
            .iter_mut()
            .filter_map(|lane| {
                let thread = thread::Builder::new().name("nixl-lane".to_owned());
                thread.spawn_scoped(scope, || fly(lane)).ok()
            })
            .collect();
        let own = fly(first);
        let panicked = || Err(failed("a lane panicked".to_owned()));
        let others = others
            .into_iter()
            .map(|lane| lane.join().unwrap_or_else(|_| panicked()));
        // The cause is not the one that was given up because of another.
        let results: Vec<_> = std::iter::once(own).chain(others).collect();
        let given_up = |result: &Result<(), FabricError>| {
            matches!(result, Ok(()) | Err(FabricError::Cancelled { .. }))
        };
        let cause = results.iter().find(|result| !given_up(result));
        let cause = cause.or_else(|| results.iter().find(|result| result.is_err()));
        cause.cloned().unwrap_or(Ok(()))
    })
}

/// Reads portions until there are no more; after an error, requests may still be under way.
fn fly<'j, 'p: 'j>(
    agent: &Agent,
    peer: &CStr,
    next: impl Fn() -> Option<Portion<'j, 'p>>,
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
            let Some(portion) = next() else { break };
            let places = (Place::Host, Place::Host);
            let request = agent.read(peer, &portion.stretches, places);
            let request = request.map_err(failed)?;
            flight.requests.push_back((request, portion));
        }
        if flight.requests.is_empty() {
            return Ok(());
        }
        flight.look()?;
    }
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

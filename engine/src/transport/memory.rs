//! A one-sided transport within this process, for tests: shows that the trait fits a fabric that writes by itself.
//!
//! One progress thread a node carries out what was submitted: it writes the remote page in place and the remote
//! process only hears of it. Peers are found by address in a table of the process.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use super::*;

const QUEUE_MAX: usize = 32;

static NODES: LazyLock<Mutex<HashMap<u64, Weak<Shared>>>> = LazyLock::new(Mutex::default);
static NEXT: AtomicU64 = AtomicU64::new(1);

const CAPABILITY: Capability = Capability {
    name: "memory",
    memory: &[MemoryKind::Host],
    sides: Sides::One,
    reach: Reach::SameHost,
    bandwidth_estimate: 5_000_000_000,
    message_bytes_max: 1 << 20,
    note_bytes_max: 640,
};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// A sink for tests that look at events one by one.
pub(crate) fn one_by_one(look: impl Fn(TransportEvent) + Send + Sync + 'static) -> TransportSink {
    Arc::new(move |events: Vec<_>| events.into_iter().for_each(&look))
}

/// The same, with a channel.
pub(crate) fn into_channel(sender: Sender<TransportEvent>) -> TransportSink {
    one_by_one(move |event| drop(sender.send(event)))
}

pub(crate) fn start_for_tests(sink: TransportSink) -> Arc<dyn Transport> {
    let shared = Arc::new(Shared {
        id: NEXT.fetch_add(1, Ordering::Relaxed),
        sink,
        regions: Mutex::default(),
        state: Mutex::default(),
        wake: Condvar::new(),
    });
    lock(&NODES).insert(shared.id, Arc::downgrade(&shared));
    let progress = std::thread::spawn({
        let shared = Arc::clone(&shared);
        move || shared.progress()
    });
    Arc::new(MemoryTransport {
        shared,
        progress: Some(progress),
    })
}

/// One submission, in order with its peer's others.
#[derive(Debug)]
enum Work {
    Message(PeerId, Vec<u8>),
    Write(Write),
    /// Reports a write that was dropped.
    Dropped(PeerId, TransferId, WriteOutcome),
    Lost(PeerId, String),
    /// Ends a connection once what was submitted before is out.
    HangUp(PeerId),
}

/// The other end of a connection.
#[derive(Debug, Clone)]
struct Link {
    remote: Weak<Shared>,
    /// What this connection is called there.
    remote_peer: PeerId,
}

#[derive(Debug, Default)]
struct Registered {
    /// Key, until it is sealed, and page.
    regions: HashMap<RegionId, (Option<u64>, Page)>,
    /// How many were registered together, by the first one.
    counts: HashMap<RegionId, usize>,
}

#[derive(Debug, Default)]
struct State {
    links: HashMap<PeerId, Link>,
    work: VecDeque<Work>,
    closed: bool,
    stopped: bool,
}

struct Shared {
    id: u64,
    sink: TransportSink,
    /// Writers hold the lock while they write, so a region is never half gone.
    regions: Mutex<Registered>,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug)]
struct MemoryTransport {
    shared: Arc<Shared>,
    progress: Option<JoinHandle<()>>,
}

impl Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory:{}", self.id)
    }
}

impl Shared {
    fn submit(&self, work: Work) {
        lock(&self.state).work.push_back(work);
        self.wake.notify_all();
    }

    fn progress(&self) {
        loop {
            let waited = self.wake.wait_while(lock(&self.state), |state| {
                state.work.is_empty() && !state.stopped
            });
            let mut state = waited.unwrap_or_else(|e| e.into_inner());
            let Some(work) = state.work.pop_front() else {
                return;
            };
            let link = match &work {
                Work::Message(peer, _) | Work::Write(Write { peer, .. }) => {
                    state.links.get(peer).cloned()
                }
                Work::Dropped(..) | Work::Lost(..) | Work::HangUp(_) => None,
            };
            drop(state);
            self.carry_out(work, link);
        }
    }

    fn carry_out(&self, work: Work, link: Option<Link>) {
        let remote = link.and_then(|link| Some((link.remote.upgrade()?, link.remote_peer)));
        match work {
            Work::Message(_, message) => {
                if let Some((remote, peer)) = remote {
                    (remote.sink)(vec![TransportEvent::Message { peer, message }]);
                }
            }
            Work::Write(write) => {
                let outcome = match remote {
                    Some((remote, peer)) => self.put(&write, &remote, peer),
                    None => WriteOutcome::Lost,
                };
                let (peer, transfer) = (write.peer, write.transfer);
                drop(write);
                (self.sink)(vec![TransportEvent::WriteDone {
                    peer,
                    transfer,
                    outcome,
                }]);
            }
            Work::Dropped(peer, transfer, outcome) => {
                (self.sink)(vec![TransportEvent::WriteDone {
                    peer,
                    transfer,
                    outcome,
                }])
            }
            Work::Lost(peer, reason) => {
                (self.sink)(vec![TransportEvent::PeerLost { peer, reason }])
            }
            Work::HangUp(peer) => self.hang_up(peer),
        }
    }

    fn put(&self, write: &Write, remote: &Arc<Self>, there: PeerId) -> WriteOutcome {
        let (first, key) = (write.target.id, write.target.key);
        let ids = (0..).map(|index| first.wrapping_add(index));
        let row = ids.zip(&write.sources);
        let mut registered = lock(&remote.regions);
        for (id, _) in row.clone() {
            let known = registered.regions.get(&RegionId(id));
            let Some((_, page)) = known.filter(|(known, _)| *known == Some(key)) else {
                return WriteOutcome::Sent;
            };
            if !write.runs.fits(usize::MAX, page.as_bytes().len()) {
                drop(registered);
                remote.unlink(there, "write outside the region");
                self.unlink(write.peer, "write outside the region");
                return WriteOutcome::Lost;
            }
        }
        for (id, source) in row {
            let known = registered.regions.get_mut(&RegionId(id));
            let (_, page) = known.expect("looked for above");
            for (from, to) in write.runs.stretches() {
                page.as_bytes_mut()[to].copy_from_slice(&source.as_bytes()[from]);
            }
        }
        drop(registered);
        (remote.sink)(vec![TransportEvent::Landed {
            peer: there,
            region: RegionId(first),
            count: write.sources.len(),
            runs: write.runs.clone(),
            transfer: write.transfer,
            note: write.note.clone(),
            checksums: Found::new(),
            folds: Found::new(),
        }]);
        WriteOutcome::Sent
    }

    /// Drops a connection here; what waits for it is reported lost, then the loss itself.
    fn unlink(&self, peer: PeerId, reason: &str) -> Option<Link> {
        let mut state = lock(&self.state);
        let link = state.links.remove(&peer)?;
        let (mine, others): (Vec<_>, _) =
            std::mem::take(&mut state.work)
                .into_iter()
                .partition(|work| match work {
                    Work::Message(of, _)
                    | Work::Dropped(of, ..)
                    | Work::Lost(of, _)
                    | Work::HangUp(of) => *of == peer,
                    Work::Write(write) => write.peer == peer,
                });
        state.work = VecDeque::from(others);
        for work in mine {
            match work {
                Work::Write(write) => {
                    state
                        .work
                        .push_back(Work::Dropped(peer, write.transfer, WriteOutcome::Lost))
                }
                dropped @ Work::Dropped(..) => state.work.push_back(dropped),
                Work::Message(..) | Work::Lost(..) | Work::HangUp(_) => {}
            }
        }
        state.work.push_back(Work::Lost(peer, reason.to_owned()));
        drop(state);
        self.wake.notify_all();
        Some(link)
    }

    fn close(&self) {
        lock(&NODES).remove(&self.id);
        let mut state = lock(&self.state);
        state.closed = true;
        let peers: Vec<_> = state.links.keys().copied().collect();
        state.work.extend(peers.into_iter().map(Work::HangUp));
        drop(state);
        self.wake.notify_all();
    }

    fn hang_up(&self, peer: PeerId) {
        if let Some(link) = self.unlink(peer, "disconnected by this side")
            && let Some(remote) = link.remote.upgrade()
        {
            remote.unlink(link.remote_peer, "closed by the peer");
        }
    }
}

impl Transport for MemoryTransport {
    fn capability(&self) -> &Capability {
        &CAPABILITY
    }

    fn endpoint(&self) -> EndpointRecord {
        EndpointRecord {
            transport: CAPABILITY.name.to_owned(),
            address: format!("memory:{}", self.shared.id),
            metadata: String::new(),
        }
    }

    fn reaches(&self, endpoint: &EndpointRecord) -> bool {
        endpoint.transport == CAPABILITY.name
    }

    fn connect(&self, endpoint: &EndpointRecord, _: Instant) -> Result<PeerId, ConnectError> {
        let wrong = || ConnectError::Record(format!("{endpoint:?}"));
        if endpoint.transport != CAPABILITY.name {
            return Err(wrong());
        }
        let id = endpoint.address.strip_prefix("memory:").ok_or_else(wrong)?;
        let id: u64 = id.parse().map_err(|_| wrong())?;
        let (here, there) = (PeerId::fresh(), PeerId::fresh());
        let remote = lock(&NODES).get(&id).and_then(Weak::upgrade);
        let mut state = lock(&self.shared.state);
        if state.closed {
            return Err(ConnectError::Closed);
        }
        let Some(remote) = remote else {
            let reason = "cannot be connected to: nobody there".to_owned();
            state.work.push_back(Work::Lost(here, reason));
            drop(state);
            self.shared.wake.notify_all();
            return Ok(here);
        };
        let link = |remote: &Arc<Shared>, remote_peer| Link {
            remote: Arc::downgrade(remote),
            remote_peer,
        };
        state.links.insert(here, link(&remote, there));
        drop(state);
        lock(&remote.state)
            .links
            .insert(there, link(&self.shared, here));
        Ok(here)
    }

    fn disconnect(&self, peer: PeerId) {
        self.shared.hang_up(peer);
    }

    fn register(&self, pages: Vec<Page>) -> Result<Registration, RegisterRefused> {
        if lock(&self.shared.state).closed {
            let reason = "closed".to_owned();
            return Err(RegisterRefused { pages, reason });
        }
        let key = uuid::Uuid::new_v4().as_u64_pair().0;
        let (first, count) = (RegionId::fresh_row(pages.len()), pages.len());
        let bytes = pages.first().map_or(0, |page| page.as_bytes().len() as u64);
        let mut registered = lock(&self.shared.regions);
        registered.counts.insert(first, count);
        let held = pages.into_iter().map(|page| (Some(key), page));
        let held = (first.0..).map(RegionId).zip(held);
        registered.regions.extend(held);
        let id = first.0;
        let first = RemoteRegion { bytes, id, key };
        Ok(Registration { first, count })
    }

    fn deregister(&self, region: RegionId) -> Deregistered {
        match lock(&self.shared.regions).regions.remove(&region) {
            Some((_, page)) => Deregistered::Now(page),
            None => Deregistered::Unknown,
        }
    }

    fn seal(&self, first: RegionId, count: usize) -> bool {
        let mut registered = lock(&self.shared.regions);
        let row = (first.0..).map(RegionId).take(count);
        let open = |id: RegionId| matches!(registered.regions.get(&id), Some((Some(_), _)));
        let sealed = row.clone().all(open);
        for id in row.filter(|_| sealed) {
            registered
                .regions
                .entry(id)
                .and_modify(|held| held.0 = None);
        }
        sealed
    }

    fn reclaim(&self, first: RegionId) -> Option<Vec<Page>> {
        let mut registered = lock(&self.shared.regions);
        let count = *registered.counts.get(&first)?;
        let row = (first.0..).map(RegionId).take(count);
        if !row.clone().all(|id| registered.regions.contains_key(&id)) {
            return None;
        }
        registered.counts.remove(&first);
        let pages = row.map(|id| registered.regions.remove(&id).map(|(_, page)| page));
        pages.collect()
    }

    fn write(&self, write: Write) -> Submission {
        if !write.is_sound() || write.note.len() > CAPABILITY.note_bytes_max {
            return Submission::Invalid;
        }
        let mut state = lock(&self.shared.state);
        if !state.links.contains_key(&write.peer) {
            return Submission::Gone;
        }
        if state.work.len() >= QUEUE_MAX {
            return Submission::Busy;
        }
        state.work.push_back(Work::Write(write));
        drop(state);
        self.shared.wake.notify_all();
        Submission::Accepted
    }

    fn notify(&self, peer: PeerId, message: Vec<u8>) -> Submission {
        if message.len() > CAPABILITY.message_bytes_max {
            return Submission::Invalid;
        }
        if !lock(&self.shared.state).links.contains_key(&peer) {
            return Submission::Gone;
        }
        self.shared.submit(Work::Message(peer, message));
        Submission::Accepted
    }

    fn cancel(&self, peer: PeerId, transfer: TransferId) {
        for work in &mut lock(&self.shared.state).work {
            if matches!(work, Work::Write(w) if w.peer == peer && w.transfer == transfer) {
                *work = Work::Dropped(peer, transfer, WriteOutcome::Cancelled);
            }
        }
    }

    fn close(&self) {
        self.shared.close();
    }
}

impl Drop for MemoryTransport {
    fn drop(&mut self) {
        self.shared.close();
        lock(&self.shared.state).stopped = true;
        self.shared.wake.notify_all();
        if let Some(progress) = self.progress.take() {
            assert!(progress.join().is_ok());
        }
    }
}

//! Peers that are processes: killed, stopped and started again, at each step, over every transport that has them.
//!
//! A test starts this very test program, of which the child runs `as_a_peer`, and that alone. The child ends when its
//! standard input does, so none is left behind.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::conformance::{Node, PATIENCE};
use super::link::tests::brisk;
use super::link::{LinkParams, on_loopback};
use super::memory::{into_channel, one_by_one};
use super::*;
use crate::backend::cuda;
use crate::transport::staging::plain_shape;
use crate::transport::windowed::WindowsOnce;

/// Says to a child which transport it starts.
const KIND: &str = "BATON_TEST_PEER_TRANSPORT";

/// What a line with the child's endpoint begins with.
const ENDPOINT: &str = "endpoint ";

const PAGE_BYTES: usize = 1 << 20;
const PAGES: usize = 48;

/// What the name of a kind ends with whose pages are of a GPU: the first one's here, the last one's in a child.
const ON_GPU: &str = " on gpus";

/// Bytes of a window in these tests: less than all pages have.
const WINDOW_BYTES: usize = 8 * PAGE_BYTES;

/// The GPU that pages of a kind are on, in this process.
fn gpu_of(kind: &str) -> Option<usize> {
    let last = || cuda::device_count().map_or(0, |count| count - 1);
    let is_child = std::env::var_os(KIND).is_some();
    kind.ends_with(ON_GPU)
        .then(|| if is_child { last() } else { 0 })
}

/// Whether this machine has a transport; says what is missing where it has not. A machine that is said to have GPUs
/// (`BATON_TEST_GPU=1`) must have what kinds on GPUs need.
fn is_there(kind: &str) -> bool {
    if kind.ends_with(ON_GPU) && std::env::var_os("BATON_TEST_GPU").is_none() {
        eprintln!("not over {kind}: BATON_TEST_GPU is not set");
        return false;
    }
    let probed = match kind.trim_end_matches(ON_GPU) {
        "ucx" => ucx::probe().map(drop).map_err(|error| error.to_string()),
        "nixl" => nixl::probe().map(drop).map_err(|error| error.to_string()),
        _ => return true,
    };
    let missing = |error: &String| eprintln!("not over {kind}: {error}");
    probed.inspect_err(missing).is_ok()
}

fn start(kind: &str, sink: TransportSink) -> Arc<dyn Transport> {
    let params = LinkParams {
        tuning: brisk(),
        ..on_loopback()
    };
    let windows = gpu_of(kind).map(|gpu| WindowsOnce::of(gpu, WINDOW_BYTES));
    let windows = windows.unwrap_or_default();
    let transport = match kind.trim_end_matches(ON_GPU) {
        "tcp" => tcp::start(params, sink).unwrap(),
        "shm" => shm::start(params, sink).unwrap(),
        "ucx" => ucx::start(&windows, params, sink).unwrap(),
        "nixl" => nixl::start(&windows, params, sink).unwrap(),
        other => panic!("{other}"),
    };
    if kind.ends_with(ON_GPU) {
        let memory = transport.capability().memory;
        assert!(memory.contains(&MemoryKind::Device), "{memory:?}");
    }
    Arc::new(transport)
}

/// What a parent asks of a child, and a child answers.
#[derive(Debug, Serialize, Deserialize)]
enum Wish {
    /// Write a page of yours to each of these.
    Write(Vec<RemoteRegion>),
    /// Register so many pages and name them.
    Register(usize),
    /// Here they are.
    Registered(Vec<RemoteRegion>),
}

fn pages(kind: &str) -> Vec<Page> {
    let mut pages = blank_pages(kind);
    for (index, page) in pages.iter_mut().enumerate() {
        let index = u8::try_from(index).unwrap();
        page.write(0, &vec![index + 1; PAGE_BYTES]).unwrap();
    }
    pages
}

fn blank_pages(kind: &str) -> Vec<Page> {
    let shape = plain_shape(PAGE_BYTES);
    match gpu_of(kind) {
        Some(gpu) => cuda::device_pages(gpu, shape, PAGES).unwrap(),
        None => Page::pool(shape, PAGES).unwrap(),
    }
}

fn piece(peer: PeerId, source: &Arc<Page>, target: &RemoteRegion) -> Write {
    Write {
        peer,
        transfer: TransferId(1),
        sources: Arc::clone(source).into(),
        target: *target,
        runs: Runs::whole(PAGE_BYTES),
        note: Note::new(),
        sum_at: None,
    }
}

// === the child ===

/// What wakes a child.
enum Woken {
    Event(Box<TransportEvent>),
    StdinEnded,
}

/// A child that does what its parent wishes until its standard input ends.
#[test]
#[ignore = "run by other tests as a process of its own"]
fn as_a_peer() {
    let Ok(kind) = std::env::var(KIND) else {
        return;
    };
    let (sender, woken) = channel();
    let events = sender.clone();
    let transport = start(
        &kind,
        one_by_one(move |event| drop(events.send(Woken::Event(Box::new(event))))),
    );
    std::thread::spawn(move || {
        // Nothing is said; its end is all.
        drop(std::io::stdin().read_to_end(&mut Vec::new()));
        drop(sender.send(Woken::StdinEnded));
    });
    println!(
        "\n{ENDPOINT}{}",
        serde_json::to_string(&transport.endpoint()).unwrap()
    );
    let sources: Vec<_> = pages(&kind).into_iter().map(Arc::new).collect();
    let mut writes = Vec::new();
    while let Ok(Woken::Event(event)) = woken.recv() {
        if let TransportEvent::Message { peer, message } = *event {
            match serde_json::from_slice(&message).unwrap() {
                Wish::Write(regions) => {
                    let asked = sources.iter().zip(regions);
                    writes.extend(asked.map(|(source, region)| piece(peer, source, &region)));
                    writes.reverse();
                }
                Wish::Register(count) => {
                    let mut pages = blank_pages(&kind);
                    pages.truncate(count);
                    let regions = transport.register(pages).unwrap().regions();
                    let remotes = regions.map(|region| region.remote);
                    let answer = Wish::Registered(remotes.collect());
                    let answer = serde_json::to_vec(&answer).unwrap();
                    assert_eq!(transport.notify(peer, answer), Submission::Accepted);
                }
                Wish::Registered(_) => panic!("a parent is asked nothing"),
            }
        }
        while let Some(write) = writes.pop() {
            if transport.write(write.clone()) == Submission::Busy {
                writes.push(write);
                break;
            }
        }
    }
}

// === the parent ===

/// A child, ended with this.
struct Peer {
    child: Child,
    endpoint: EndpointRecord,
    _stdin: ChildStdin,
}

impl Peer {
    fn start(kind: &str) -> Self {
        let path = concat!(module_path!(), "::as_a_peer");
        let (_, path) = path.split_once("::").expect("a module of a crate");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                path,
                "--ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(KIND, kind)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let endpoint = lines
            .by_ref()
            .map(Result::unwrap)
            .find_map(|line| line.strip_prefix(ENDPOINT).map(str::to_owned))
            .expect("a peer says where it is");
        // What the test harness says at the end goes nowhere.
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            _stdin: child.stdin.take().unwrap(),
            child,
            endpoint: serde_json::from_str(&endpoint).unwrap(),
        }
    }

    fn suffer(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(pid, signal).unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // A stopped one does not see its input end.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn node(kind: &str) -> Node {
    let (sender, events) = channel();
    let transport = start(kind, into_channel(sender));
    Node { events, transport }
}

fn connect(node: &Node, peer: &Peer) -> PeerId {
    assert!(node.transport.reaches(&peer.endpoint));
    let deadline = Instant::now() + PATIENCE;
    node.transport.connect(&peer.endpoint, deadline).unwrap()
}

fn wish(node: &Node, peer: PeerId, wish: &Wish) {
    assert_eq!(wished(node, peer, wish), Submission::Accepted);
}

fn wished(node: &Node, peer: PeerId, wish: &Wish) -> Submission {
    let message = serde_json::to_vec(wish).unwrap();
    node.transport.notify(peer, message)
}

/// When a child suffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Connected, or about to be; nothing was asked yet.
    Before,
    /// The first piece has come.
    During,
    /// All pieces have come.
    After,
}

/// Has a child write all pages, which suffers at a step; none when it shall not.
fn fetch(kind: &str, node: &Node, peer: &Peer, suffers: Option<(Step, Signal)>) {
    let to = connect(node, peer);
    let regions = node.register_all(blank_pages(kind));
    let suffer_at = |step: Step| match suffers {
        Some((at, signal)) if at == step => peer.suffer(signal),
        _ => {}
    };
    suffer_at(Step::Before);
    let pages = Wish::Write(regions.iter().map(|r| r.remote).collect());
    // That a peer is gone before it is asked may be known by then.
    match (wished(node, to, &pages), suffers) {
        (Submission::Accepted, _) | (Submission::Gone, Some((Step::Before, _))) => {}
        (other, _) => panic!("{other:?}"),
    }
    let mut landed = 0;
    let mut lost = false;
    while !lost && (suffers.is_some() || landed < PAGES) {
        match node.next() {
            TransportEvent::Landed { peer, .. } => {
                assert_eq!(peer, to);
                landed += 1;
                if landed == 1 {
                    suffer_at(Step::During);
                }
                if landed == PAGES {
                    suffer_at(Step::After);
                }
            }
            TransportEvent::PeerLost { peer, .. } => {
                assert_eq!(peer, to);
                lost = true;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(lost, suffers.is_some());
    let mut right = 0;
    for (expected, region) in (1..).zip(&regions) {
        // The peer is lost, or has written all: nothing is under way.
        let Deregistered::Now(page) = node.transport.deregister(region.id) else {
            panic!("a page is kept after the peer is lost");
        };
        let bytes = page.to_host().unwrap();
        right += usize::from(bytes.iter().all(|byte| *byte == expected));
    }
    assert!(right >= landed, "{right} of {landed} pieces are as sent");
    if lost {
        assert_eq!(node.transport.notify(to, Vec::new()), Submission::Gone);
    } else {
        node.transport.disconnect(to);
        assert!(matches!(node.next(), TransportEvent::PeerLost { .. }));
    }
}

/// Writes all pages to a child, which suffers at a step.
fn give(kind: &str, node: &Node, peer: &Peer, suffers: Option<(Step, Signal)>) {
    let to = connect(node, peer);
    wish(node, to, &Wish::Register(PAGES));
    let TransportEvent::Message { message, .. } = node.next() else {
        panic!("a child answers first");
    };
    let Wish::Registered(regions) = serde_json::from_slice(&message).unwrap() else {
        panic!("a child names its regions");
    };
    let sources: Vec<_> = pages(kind).into_iter().map(Arc::new).collect();
    let mut outcomes = BTreeMap::new();
    let suffer_at = |step: Step| match suffers {
        Some((at, signal)) if at == step => peer.suffer(signal),
        _ => {}
    };
    suffer_at(Step::Before);
    let mut accepted = 0;
    let mut lost = false;
    let mut waiting: Vec<_> = sources.iter().zip(&regions).collect();
    while !lost && (suffers.is_some() || accepted < PAGES || !outcomes_are(&outcomes, PAGES)) {
        while let Some((source, region)) = waiting.pop() {
            match node.transport.write(piece(to, source, region)) {
                Submission::Accepted => accepted += 1,
                Submission::Busy => {
                    waiting.push((source, region));
                    break;
                }
                Submission::Gone => waiting.clear(),
                Submission::Invalid => panic!("a valid write"),
            }
        }
        match node.next() {
            TransportEvent::WriteDone { outcome, .. } => {
                *outcomes.entry(format!("{outcome:?}")).or_insert(0) += 1;
                let sent = outcomes.get("Sent").copied().unwrap_or(0);
                if sent == 1 {
                    suffer_at(Step::During);
                }
                if sent == PAGES {
                    suffer_at(Step::After);
                }
            }
            TransportEvent::PeerLost { peer, .. } => {
                assert_eq!(peer, to);
                lost = true;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(outcomes.values().sum::<usize>(), accepted, "{outcomes:?}");
    assert!(sources.iter().all(|source| Arc::strong_count(source) == 1));
    if !lost {
        node.transport.disconnect(to);
        assert!(matches!(node.next(), TransportEvent::PeerLost { .. }));
    }
}

fn outcomes_are(outcomes: &BTreeMap<String, usize>, count: usize) -> bool {
    outcomes.values().sum::<usize>() == count
}

/// At each step: the child suffers, everything comes back, and another child serves the same transport.
fn each_step(kind: &str, signal: Signal, go: fn(&str, &Node, &Peer, Option<(Step, Signal)>)) {
    let node = node(kind);
    for step in [Step::Before, Step::During, Step::After] {
        let peer = Peer::start(kind);
        go(kind, &node, &peer, Some((step, signal)));
        let again = Peer::start(kind);
        go(kind, &node, &again, None);
    }
    assert!(node.events.try_recv().is_err(), "an event too many");
}

fn a_peer_that_dies_before_it_is_connected_to_is_lost(kind: &str) {
    let node = node(kind);
    let mut peer = Peer::start(kind);
    assert!(node.transport.reaches(&peer.endpoint));
    peer.child.kill().unwrap();
    peer.child.wait().unwrap();
    // Where memory is shared, a dead peer is known to be out of reach without asking it.
    if kind == "shm" {
        assert!(!node.transport.reaches(&peer.endpoint));
    }
    let deadline = Instant::now() + PATIENCE;
    let lost = node.transport.connect(&peer.endpoint, deadline).unwrap();
    match node.next() {
        TransportEvent::PeerLost { peer, .. } => assert_eq!(peer, lost),
        other => panic!("{other:?}"),
    }
}

/// The tests of one transport, each by itself.
macro_rules! over {
    ($($module:ident: $kind:literal),*) => {$(
        mod $module {
            use super::*;

            const OVER: &str = $kind;

            #[test]
            fn a_writer_that_is_killed_takes_nothing_with_it() {
                if is_there(OVER) {
                    each_step(OVER, Signal::SIGKILL, fetch);
                }
            }

            #[test]
            fn a_writer_that_is_stopped_is_lost_in_time() {
                if is_there(OVER) {
                    each_step(OVER, Signal::SIGSTOP, fetch);
                }
            }

            #[test]
            fn a_reader_that_is_killed_takes_nothing_with_it() {
                if is_there(OVER) {
                    each_step(OVER, Signal::SIGKILL, give);
                }
            }

            #[test]
            fn a_reader_that_is_stopped_is_lost_in_time() {
                if is_there(OVER) {
                    each_step(OVER, Signal::SIGSTOP, give);
                }
            }

            #[test]
            fn a_peer_that_dies_early_is_lost() {
                if is_there(OVER) {
                    a_peer_that_dies_before_it_is_connected_to_is_lost(OVER);
                }
            }
        }
    )*};
}

over!(
    over_tcp: "tcp",
    over_shm: "shm",
    over_ucx: "ucx",
    over_nixl: "nixl",
    over_ucx_on_gpus: "ucx on gpus",
    over_nixl_on_gpus: "nixl on gpus"
);

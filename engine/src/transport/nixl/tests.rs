//! The fabric with the real NIXL: within a process, between processes, and when the other one is stopped or killed.
//!
//! They need NIXL: `BATON_NIXL_LIBRARY=$(scripts/fetch-nixl)/libnixl_capi.so`, which `scripts/test` sets.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::AtomicBool;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::super::Transport;
use super::super::fabric::{ReadJob, RemoteArena};
use super::super::runs::{Run, Runs};
use super::*;
use crate::page::{KvDtype, Page, PageShape};

mod near;
mod neighbours;

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the other process says begins with this, among what the test runner says.
const MARK: &str = "exporter:";

/// For UCX: no shared memory, no kernel copies. Where there is a GPU, NIXL insists on copies from and to it.
const TCP_ONLY: &str = "tcp,cuda_copy";

/// Bytes of the pages here: 1 MiB.
const PAGE_BYTES: usize = 1 << 20;

fn library() -> &'static Library {
    match Library::get() {
        Ok(library) => library,
        Err(missing) => panic!("these tests need NIXL: {missing}"),
    }
}

fn fabric() -> NixlFabric {
    library();
    NixlFabric::start().unwrap()
}

/// The whole transport.
pub(crate) fn start_for_tests(sink: TransportSink) -> Arc<dyn Transport> {
    library();
    Arc::new(start(&WindowsOnce::default(), link::on_loopback(), sink).unwrap())
}

fn shape(bytes: usize) -> PageShape {
    PageShape {
        layers: 1,
        kv_heads: 1,
        tokens_per_block: 1,
        head_dim: bytes / 2 / 4,
        dtype: KvDtype::F32,
    }
}

/// Pages of one arena, filled so that no two bytes near each other are the same by chance.
fn filled_pages(count: usize, seed: usize) -> Vec<Page> {
    let mut pages = Page::pool(shape(PAGE_BYTES), count).unwrap();
    for (index, page) in pages.iter_mut().enumerate() {
        let bytes = page.as_bytes_mut().iter_mut();
        for (offset, byte) in bytes.enumerate() {
            *byte = pattern(seed + index * PAGE_BYTES + offset);
        }
    }
    pages
}

fn pattern(offset: usize) -> u8 {
    (offset.wrapping_mul(0x9e37_79b9) >> 16).to_le_bytes()[0]
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

fn arena(pages: &[Page]) -> &Arc<Arena> {
    pages[0].arena().unwrap().0
}

/// Reads runs of an arena into a page.
fn read(
    peer: &mut dyn FabricPeer,
    from: RemoteArena,
    runs: &Runs,
    page: &mut Page,
) -> Result<(), FabricError> {
    let mut jobs = [ReadJob::new(from, runs, page)];
    peer.read(&mut jobs, soon(), &AtomicBool::new(false))
}

/// Holds a page to what the source's bytes are where the runs say, and to zeros elsewhere.
fn assert_read(page: &Page, runs: &Runs, source: impl Fn(usize) -> u8) {
    let mut expected = vec![0; page.as_bytes().len()];
    for (from, to) in runs.stretches() {
        for (byte, offset) in expected[to].iter_mut().zip(from) {
            *byte = source(offset);
        }
    }
    assert!(page.as_bytes() == expected, "the bytes are others");
}

fn shapes_of_runs() -> Vec<Runs> {
    let strided = Run {
        source: PAGE_BYTES - 3,
        target: 5,
        bytes: 1001,
        count: 600,
        source_stride: 1500,
        target_stride: 1003,
    };
    let planes = (0..16).map(|plane| Run::once(plane * 90_000, (15 - plane) * 65_536, 65_536));
    vec![
        Runs::whole(0),
        Runs::whole(1),
        Runs::whole(PAGE_BYTES),
        Runs::new([Run::once(12_345, 777, 65_537)]).unwrap(),
        Runs::new([strided]).unwrap(),
        Runs::new(planes).unwrap(),
    ]
}

#[test]
fn any_stretches_are_read_into_arenas_and_elsewhere() {
    let (ours, theirs) = (fabric(), fabric());
    let source = filled_pages(3, 7);
    let key = theirs.export(arena(&source)).unwrap();
    assert_eq!(theirs.export(arena(&source)), Ok(key.clone()));
    assert!(ours.reaches(&theirs.address()));
    let mut peer = ours.open(&theirs.address(), soon()).unwrap();
    let from = peer.import(&key.0).unwrap();
    assert_eq!(from.bytes, arena(&source).bytes() as u64);
    for runs in shapes_of_runs() {
        let mut in_arena = Page::pool(shape(PAGE_BYTES), 2).unwrap();
        read(&mut *peer, from, &runs, &mut in_arena[1]).unwrap();
        assert_read(&in_arena[1], &runs, |offset| pattern(7 + offset));
        assert_read(&in_arena[0], &Runs::whole(0), |_| 0);
        let mut alone = Page::zeroed(shape(PAGE_BYTES));
        read(&mut *peer, from, &runs, &mut alone).unwrap();
        assert_read(&alone, &runs, |offset| pattern(7 + offset));
    }
}

#[test]
fn a_batch_of_several_arenas_is_read_at_once() {
    let (ours, theirs) = (fabric(), fabric());
    let mut peer = ours.open(&theirs.address(), soon()).unwrap();
    let sources = [filled_pages(40, 0), filled_pages(40, 1 << 30)];
    let from = sources.each_ref().map(|source| {
        let key = theirs.export(arena(source)).unwrap();
        peer.import(&key.0).unwrap()
    });
    let mut targets = Page::pool(shape(PAGE_BYTES), 80).unwrap();
    // Every second one from the other arena, so that nothing joins.
    let runs: Vec<_> = (0..40)
        .map(|index| Runs::new([Run::once(index * PAGE_BYTES, 0, PAGE_BYTES)]).unwrap())
        .collect();
    let mut jobs: Vec<_> = targets
        .iter_mut()
        .enumerate()
        .map(|(index, page)| ReadJob::new(from[index % 2], &runs[index / 2], page))
        .collect();
    peer.read(&mut jobs, soon(), &AtomicBool::new(false))
        .unwrap();
    for (index, page) in targets.iter().enumerate() {
        assert!(
            page.as_bytes() == sources[index % 2][index / 2].as_bytes(),
            "page {index}"
        );
    }
}

#[test]
fn what_is_not_understood_is_refused_and_harms_nothing() {
    let (ours, theirs, others) = (fabric(), fabric(), fabric());
    let source = filled_pages(1, 0);
    let key = theirs.export(arena(&source)).unwrap().0;
    let damaged = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        bytes
    };
    assert!(!ours.reaches(&damaged(&theirs.address())));
    let refused = ours.open(&damaged(&theirs.address()), soon()).unwrap_err();
    assert!(
        matches!(
            refused,
            FabricError::Malformed {
                what: "address",
                ..
            }
        ),
        "{refused}"
    );
    let mut peer = ours.open(&theirs.address(), soon()).unwrap();
    let refused = peer.import(&damaged(&key)).unwrap_err();
    assert!(
        matches!(
            refused,
            FabricError::Malformed {
                what: "arena key",
                ..
            }
        ),
        "{refused}"
    );
    let foreign = others.export(arena(&source)).unwrap().0;
    let refused = peer.import(&foreign).unwrap_err();
    assert!(
        matches!(
            refused,
            FabricError::Malformed {
                what: "arena key",
                ..
            }
        ),
        "{refused}"
    );
    let from = peer.import(&key).unwrap();
    let mut page = Page::zeroed(shape(PAGE_BYTES));
    read(&mut *peer, from, &Runs::whole(PAGE_BYTES), &mut page).unwrap();
    assert!(page.as_bytes() == source[0].as_bytes());
}

#[test]
fn a_piece_outside_of_the_arena_or_the_page_is_not_read() {
    let (ours, theirs) = (fabric(), fabric());
    let source = filled_pages(1, 0);
    let key = theirs.export(arena(&source)).unwrap().0;
    let outside = [
        Run::once(1, 0, PAGE_BYTES),
        Run::once(0, 1, PAGE_BYTES),
        Run::once(PAGE_BYTES, 0, 1),
    ];
    for run in outside {
        let mut peer = ours.open(&theirs.address(), soon()).unwrap();
        let from = peer.import(&key).unwrap();
        let mut page = Page::zeroed(shape(PAGE_BYTES));
        let runs = Runs::new([run]).unwrap();
        let refused = read(&mut *peer, from, &runs, &mut page).unwrap_err();
        assert!(refused.to_string().contains("outside"), "{refused}");
        assert_read(&page, &Runs::whole(0), |_| 0);
    }
}

#[test]
fn a_read_that_is_given_up_before_it_starts_does_not_start() {
    let (ours, theirs) = (fabric(), fabric());
    let source = filled_pages(1, 0);
    let key = theirs.export(arena(&source)).unwrap().0;
    let mut peer = ours.open(&theirs.address(), soon()).unwrap();
    let from = peer.import(&key).unwrap();
    let runs = Runs::whole(PAGE_BYTES);
    let mut page = Page::zeroed(shape(PAGE_BYTES));
    let mut jobs = [ReadJob::new(from, &runs, &mut page)];
    let cancelled = peer.read(&mut jobs, soon(), &AtomicBool::new(true));
    assert_eq!(cancelled, Err(FabricError::Cancelled { fabric: NAME }));
    let late = peer.read(&mut jobs, Instant::now(), &AtomicBool::new(false));
    assert_eq!(late, Err(FabricError::TimedOut { fabric: NAME }));
    assert_read(&page, &Runs::whole(0), |_| 0);
    read(&mut *peer, from, &runs, &mut page).unwrap();
    ours.close();
    let closed = read(&mut *peer, from, &runs, &mut page);
    assert_eq!(closed, Err(FabricError::Cancelled { fabric: NAME }));
    assert!(ours.open(&theirs.address(), soon()).is_err());
}

/// Another process with one page exported.
struct Exporter {
    child: Child,
    says: std::io::Lines<BufReader<ChildStdout>>,
    hears: Option<ChildStdin>,
    address: Vec<u8>,
    key: Vec<u8>,
}

/// This test program again, with one of its ignored tests.
fn part(name: &str) -> Command {
    let module = module_path!().split_once("::").unwrap().1;
    let mut command = Command::new(std::env::current_exe().unwrap());
    let name = format!("{module}::{name}");
    let rest = ["--ignored", "--nocapture", "--test-threads=1"];
    command.args(["--exact", &name]).args(rest);
    command
}

impl Exporter {
    fn start() -> Self {
        let mut child = part("as_an_exporter")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let says = BufReader::new(child.stdout.take().unwrap()).lines();
        let hears = child.stdin.take();
        let mut exporter = Self {
            child,
            says,
            hears,
            address: Vec::new(),
            key: Vec::new(),
        };
        exporter.address = BASE64_STANDARD.decode(exporter.word().unwrap()).unwrap();
        exporter.key = BASE64_STANDARD.decode(exporter.word().unwrap()).unwrap();
        exporter
    }

    /// The next thing that it says; `None` when it has ended.
    fn word(&mut self) -> Option<String> {
        let lines = self.says.by_ref().map_while(Result::ok);
        let mut words = lines.filter_map(|line| {
            let (_, word) = line.split_once(MARK)?;
            Some(word.trim().to_owned())
        });
        words.next()
    }

    /// Whether it still answers.
    fn answers(&mut self) -> bool {
        let asked = self
            .hears
            .as_mut()
            .is_some_and(|hears| writeln!(hears, "ping").is_ok());
        asked && self.word().as_deref() == Some("pong")
    }

    fn signal(&self, signal: Signal) {
        let id = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(id, signal).unwrap();
    }

    /// Returns when all of its threads stand still.
    fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let id = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        let stopped = waitpid(id, Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert_eq!(stopped, WaitStatus::Stopped(id, Signal::SIGSTOP));
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        // It may have been killed by its test.
        let _killed = self.child.kill();
        let _ended = self.child.wait();
    }
}

#[test]
#[ignore = "the other tests of this file start it, as another process"]
fn as_an_exporter() {
    let fabric = fabric();
    let source = filled_pages(1, 99);
    let key = fabric.export(arena(&source)).unwrap().0;
    for bytes in [fabric.address(), key] {
        println!("{MARK} {}", BASE64_STANDARD.encode(bytes));
    }
    for line in std::io::stdin().lines().map_while(Result::ok) {
        assert_eq!(line, "ping");
        println!("{MARK} pong");
    }
}

#[test]
fn another_process_is_read_and_one_that_is_killed_is_an_error_for_its_readers_alone() {
    let ours = fabric();
    let (mut first, mut second) = (Exporter::start(), Exporter::start());
    let open = |exporter: &Exporter| {
        let mut peer = ours.open(&exporter.address, soon()).unwrap();
        let from = peer.import(&exporter.key).unwrap();
        (peer, from)
    };
    let (mut one, one_from) = open(&first);
    let (mut other, other_from) = open(&second);
    let runs = Runs::whole(PAGE_BYTES);
    let mut page = Page::zeroed(shape(PAGE_BYTES));
    read(&mut *one, one_from, &runs, &mut page).unwrap();
    assert_read(&page, &runs, |offset| pattern(99 + offset));
    first.signal(Signal::SIGKILL);
    first.child.wait().unwrap();
    let lost = read(&mut *one, one_from, &runs, &mut page).unwrap_err();
    assert!(matches!(lost, FabricError::Read { .. }), "{lost}");
    let ended = read(&mut *one, one_from, &runs, &mut page).unwrap_err();
    assert!(
        ended.to_string().contains("an earlier read failed"),
        "{ended}"
    );
    let mut page = Page::zeroed(shape(PAGE_BYTES));
    read(&mut *other, other_from, &runs, &mut page).unwrap();
    assert_read(&page, &runs, |offset| pattern(99 + offset));
    assert!(second.answers());
}

/// Ends of a read whose peer stands still, over a wire that needs the peer's help.
#[test]
#[ignore = "the next test starts it, with UCX told to use TCP"]
fn as_a_reader_of_a_stopped_process() {
    let ours = fabric();
    for cancel in [true, false] {
        let mut exporter = Exporter::start();
        let mut peer = ours.open(&exporter.address, soon()).unwrap();
        let from = peer.import(&exporter.key).unwrap();
        let runs = Runs::whole(PAGE_BYTES);
        let mut page = Page::zeroed(shape(PAGE_BYTES));
        read(&mut *peer, from, &runs, &mut page).unwrap();
        exporter.stop();
        let mut page = Page::zeroed(shape(PAGE_BYTES));
        let mut jobs = [ReadJob::new(from, &runs, &mut page)];
        let deadline = if cancel {
            soon()
        } else {
            Instant::now() + Duration::from_millis(300)
        };
        let flag = AtomicBool::new(false);
        let ended = thread::scope(|scope| {
            let reading = scope.spawn(|| peer.read(&mut jobs, deadline, &flag));
            if cancel {
                flag.store(true, Ordering::Release);
            }
            reading.join().unwrap()
        });
        let expected = if cancel {
            FabricError::Cancelled { fabric: NAME }
        } else {
            FabricError::TimedOut { fabric: NAME }
        };
        assert_eq!(ended, Err(expected));
        let left = page.as_bytes().to_vec();
        exporter.signal(Signal::SIGCONT);
        // It goes on, until it answers or (UCX over TCP) is aborted: whatever it sends then comes to nobody.
        exporter.answers();
        assert!(
            page.as_bytes() == left,
            "written after the read was given up"
        );
    }
}

#[test]
fn a_stopped_process_holds_its_reader_no_longer_than_wanted() {
    library();
    let reader = part("as_a_reader_of_a_stopped_process")
        .env("UCX_TLS", TCP_ONLY)
        .output()
        .unwrap();
    let said = [reader.stdout, reader.stderr].concat();
    assert!(
        reader.status.success(),
        "{}",
        String::from_utf8_lossy(&said)
    );
    assert!(String::from_utf8_lossy(&said).contains("1 passed"));
}

#[test]
#[ignore = "the next test starts it, to see how it ends"]
fn as_a_process_that_fails() {
    let _fabric = fabric();
    panic!("on purpose");
}

#[test]
fn a_process_that_used_nixl_ends_with_its_own_status() {
    library();
    let status = part("as_a_process_that_fails").output().unwrap().status;
    assert_eq!(status.code(), Some(101), "{status}");
    let mut exporter = Exporter::start();
    assert!(exporter.answers());
    exporter.hears = None;
    let status = exporter.child.wait().unwrap();
    assert!(status.success(), "{status}");
}

/// What was logged as a warning.
#[derive(Debug, Clone, Default)]
struct Warnings(Arc<Mutex<Vec<u8>>>);

impl Write for Warnings {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Warnings {
    fn of<T>(action: impl FnOnce() -> T) -> (T, String) {
        let warnings = Self::default();
        let writer = warnings.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::WARN)
            .with_writer(move || writer.clone())
            .finish();
        let result = tracing::subscriber::with_default(subscriber, action);
        let text = String::from_utf8(warnings.0.lock().unwrap().clone()).unwrap();
        (result, text)
    }
}

/// Without CUDA, or with a libfabric older than NIXL's, LIBFABRIC does not load; then it is UCX, said once.
#[test]
fn a_plugin_that_cannot_be_had_is_replaced_by_ucx_with_one_warning() {
    let library = library();
    let unknown = Err("`mooncake` is neither UCX nor LIBFABRIC".to_owned());
    let libfabric = Plugin::Libfabric.file(library.path());
    assert!(
        libfabric.is_file(),
        "{} is part of NIXL",
        libfabric.display()
    );
    let cases = [
        (Ok(Plugin::Libfabric), library::refusal(&libfabric)),
        (unknown.clone(), unknown.err()),
    ];
    for (asked, reason) in cases {
        let start = || NixlFabric::start_with(library, asked).unwrap();
        let (fabric, warned) = Warnings::of(start);
        // A machine on which LIBFABRIC loads may still fail to start it.
        if let Some(reason) = reason {
            assert_eq!(fabric.plugin, Plugin::Ucx);
            assert!(warned.contains(&reason), "{warned}");
            assert_eq!(warned.lines().count(), 1, "{warned}");
        }
        assert_eq!(
            warned.is_empty(),
            fabric.plugin == Plugin::Libfabric,
            "{warned}"
        );
    }
    let (fabric, warned) = Warnings::of(|| NixlFabric::start_with(library, Ok(Plugin::Ucx)));
    assert_eq!(fabric.unwrap().plugin, Plugin::Ucx);
    assert_eq!(warned, "");
}

#[test]
fn processes_with_different_plugins_do_not_reach_each_other() {
    let ours = fabric();
    let mut address = Address::decode(&ours.address()).unwrap();
    address.plugin = Plugin::Libfabric;
    let encoded = address.encode();
    assert!(!ours.reaches(&encoded));
    let refused = ours.open(&encoded, soon()).unwrap_err().to_string();
    assert!(refused.contains("LIBFABRIC, this process UCX"), "{refused}");
    address.plugin = Plugin::Ucx;
    address.host.kernel = "another".to_owned();
    let refused = ours.open(&address.encode(), soon());
    assert_eq!(refused.is_err(), !address.host.far);
}

#[test]
fn what_is_missing_is_named_with_what_to_do() {
    let nowhere = Library::open(Path::new("/nowhere/libnixl_capi.so")).unwrap_err();
    let text = nowhere.to_string();
    assert!(
        text.contains("/nowhere/libnixl_capi.so") && text.contains("No such file"),
        "{text}"
    );
    assert!(
        text.contains("hint:") && text.contains("BATON_NIXL_LIBRARY"),
        "{text}"
    );
    let other = Library::open(Path::new("libc.so.6")).unwrap_err();
    assert!(matches!(other, NixlMissing::Unusable { .. }), "{other}");
}

#[test]
fn probing_finds_what_is_started_later() {
    library();
    let found = probe().unwrap();
    let fabric = fabric();
    assert_eq!(found.plugin, fabric.plugin.name());
    assert_eq!(&found.capability, fabric.capability());
}

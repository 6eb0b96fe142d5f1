//! Real UCX, within this process and with a second one that is killed or stopped while it is read.
//!
//! The second process is this test binary again, running [`exporter`] alone.

use std::io::{BufRead, BufReader, Write as _};
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::sys::signal::Signal;

use super::*;
use crate::transport::{Run, Transport};

/// Says to the other process that it is one, and which memory it shall export.
const EXPORTER_VARIABLE: &str = "BATON_TEST_UCX_EXPORTER";

/// Of the page that it exports.
const EXPORTED_BYTES: usize = 16 << 20;

pub(crate) fn start_for_tests(sink: TransportSink) -> Arc<dyn Transport> {
    let transport = start(&WindowsOnce::default(), link::on_loopback(), sink);
    Arc::new(transport.expect("libucp is installed: apt-get install libucx0"))
}

fn started() -> Ucx {
    Ucx::start().expect("libucp is installed: apt-get install libucx0, or scripts/test --yes")
}

fn fill(page: &mut Page, seed: usize) {
    for (at, byte) in page.as_bytes_mut().iter_mut().enumerate() {
        *byte = u8::try_from((at * 31 + at / 4096 + seed) % 251).unwrap();
    }
}

fn pool(bytes: usize, count: usize) -> Vec<Page> {
    filled(Page::pool(plain_shape(bytes), count).unwrap())
}

/// Of memory that UCX allocated.
fn own_pool(bytes: usize, count: usize) -> Vec<Page> {
    let pages = Page::pool_of(Some(allocate), plain_shape(bytes), count).unwrap();
    let (arena, _) = pages[0].arena().unwrap();
    assert!(arena.file().is_none(), "UCX gave no memory");
    let blank = |page: &Page| page.as_bytes().iter().all(|byte| *byte == 0);
    assert!(pages.iter().all(blank));
    filled(pages)
}

fn filled(mut pages: Vec<Page>) -> Vec<Page> {
    for (seed, page) in pages.iter_mut().enumerate() {
        fill(page, seed);
    }
    pages
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn key_of(fabric: &Ucx, page: &Page) -> Vec<u8> {
    fabric.export(page.arena().unwrap().0).unwrap().0
}

/// Reads one page.
fn read(
    peer: &mut dyn FabricPeer,
    from: RemoteArena,
    runs: &Runs,
    page: &mut Page,
    deadline: Instant,
) -> Result<(), FabricError> {
    let job = ReadJob::new(from, runs, page);
    peer.read(&mut [job], deadline, &AtomicBool::new(false))
}

#[test]
fn runs_of_several_arenas_are_read_at_once() {
    let (writer, reader) = (started(), started());
    let pools = [pool(3 << 20, 2), own_pool(1 << 20, 2)];
    assert!(reader.reaches(&writer.address()));
    let mut peer = reader.open(&writer.address(), soon()).unwrap();
    let strided = Run {
        source: 3,
        target: 1,
        bytes: 1000,
        count: 500,
        source_stride: 2000,
        target_stride: 1500,
    };
    let cases = [
        (&pools[0][1], Runs::whole(3 << 20)),
        (&pools[0][0], Runs::whole(1)),
        (&pools[0][0], Runs::whole(0)),
        (&pools[1][1], Runs::new([strided]).unwrap()),
        (&pools[1][0], Runs::new([strided]).unwrap()),
    ];
    let arenas: Vec<_> = cases
        .iter()
        .map(|(source, _)| peer.import(&key_of(&writer, source)).unwrap())
        .collect();
    let mut targets: Vec<_> = cases
        .iter()
        .map(|_| Page::zeroed(plain_shape(3 << 20)))
        .collect();
    let mut jobs: Vec<_> = arenas
        .iter()
        .zip(&cases)
        .zip(&mut targets)
        .map(|((from, (source, runs)), page)| {
            ReadJob::new(*from, runs, page).at(source.arena().unwrap().1)
        })
        .collect();
    peer.read(&mut jobs, soon(), &AtomicBool::new(false))
        .unwrap();
    for ((source, runs), target) in cases.iter().zip(&targets) {
        let mut expected = Page::zeroed(plain_shape(3 << 20));
        for (from, to) in runs.stretches() {
            expected.as_bytes_mut()[to].copy_from_slice(&source.as_bytes()[from]);
        }
        assert!(target.as_bytes() == expected.as_bytes(), "{runs:?}");
    }
}

#[test]
fn an_arena_is_registered_once_and_stays_while_it_is_exported() {
    let fabric = started();
    let pages = pool(1 << 16, 2);
    let first = key_of(&fabric, &pages[0]);
    assert_eq!(first, key_of(&fabric, &pages[1]));
    assert_ne!(first, key_of(&fabric, &pool(1 << 16, 1)[0]));
    let arena = Arc::downgrade(pages[0].arena().unwrap().0);
    drop(pages);
    assert!(arena.upgrade().is_some());
    drop(fabric);
    assert!(arena.upgrade().is_none());
}

#[test]
fn what_is_not_of_ucx_never_reaches_ucx() {
    let fabric = started();
    let address = fabric.address();
    for at in [0, 5, address.len() / 2, address.len() - 1] {
        let mut damaged = address.clone();
        damaged[at] ^= 1;
        assert!(!fabric.reaches(&damaged), "byte {at}");
        let error = fabric.open(&damaged, soon()).unwrap_err();
        assert!(matches!(error, FabricError::Malformed { .. }), "{error}");
    }
    let older = AddressRecord {
        version: (1, 2),
        probe: [0; PROBE_BYTES],
        probe_key: Vec::new(),
        worker: vec![0; 8],
    };
    assert!(!fabric.reaches(&older.encode()));
    let error = fabric.open(&older.encode(), soon()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("the peer has UCX 1.2, we have "), "{text}");
    let mut peer = fabric.open(&address, soon()).unwrap();
    let pages = pool(1 << 12, 1);
    let mut key = key_of(&fabric, &pages[0]);
    assert!(peer.import(&key).is_ok());
    key[6] ^= 1;
    let error = peer.import(&key).unwrap_err();
    assert!(matches!(error, FabricError::Malformed { .. }), "{error}");
}

#[test]
fn an_address_whose_process_has_changed_is_not_opened() {
    let fabric = started();
    let mut record = AddressRecord::decode(&fabric.address()).unwrap();
    record.probe[0] ^= 1;
    let error = fabric.open(&record.encode(), soon()).unwrap_err();
    let text = error.to_string();
    assert!(
        text.ends_with("another process answers at its address"),
        "{text}"
    );
}

#[test]
fn a_read_ends_early_when_it_is_given_up_late_or_the_fabric_is_closed() {
    let fabric = started();
    for source in [pool(4 << 20, 1), own_pool(4 << 20, 1)] {
        ends_early(&fabric, &source[0]);
    }
    fabric.close();
    let error = fabric.open(&fabric.address(), soon()).unwrap_err();
    assert_eq!(error, FabricError::Cancelled { fabric: UCX });
}

fn ends_early(fabric: &Ucx, source: &Page) {
    let key = key_of(fabric, source);
    let (runs, mut page) = (Runs::whole(4 << 20), Page::zeroed(plain_shape(4 << 20)));
    let mut fresh = |deadline, cancelled: bool| {
        let mut peer = fabric.open(&fabric.address(), soon()).unwrap();
        let from = peer.import(&key).unwrap();
        let mut read = |deadline, cancelled: bool| {
            let job = ReadJob::new(from, &runs, &mut page);
            peer.read(&mut [job], deadline, &AtomicBool::new(cancelled))
        };
        let first = read(deadline, cancelled);
        (first, read(soon(), false))
    };
    assert_eq!(fresh(soon(), false), (Ok(()), Ok(())));
    // Nothing writes the page any more, which costs the connection.
    let (cancelled, after) = fresh(soon(), true);
    assert_eq!(cancelled, Err(FabricError::Cancelled { fabric: UCX }));
    assert!(matches!(after, Err(FabricError::Read { .. })), "{after:?}");
    let (late, after) = fresh(Instant::now(), false);
    assert_eq!(late, Err(FabricError::TimedOut { fabric: UCX }));
    assert!(matches!(after, Err(FabricError::Read { .. })), "{after:?}");
}

#[test]
fn a_read_beyond_the_memory_or_the_page_is_refused_before_it_starts() {
    let fabric = started();
    let source = pool(1 << 12, 1);
    for (bytes, page_bytes) in [((1 << 12) + 4, 1 << 13), (1 << 12, 1 << 11)] {
        let mut peer = fabric.open(&fabric.address(), soon()).unwrap();
        let from = peer.import(&key_of(&fabric, &source[0])).unwrap();
        let mut page = Page::zeroed(plain_shape(page_bytes));
        let runs = Runs::whole(bytes);
        let error = read(&mut *peer, from, &runs, &mut page, soon()).unwrap_err();
        assert!(error.to_string().contains("not within"), "{error}");
        assert!(page.as_bytes().iter().all(|byte| *byte == 0));
    }
}

/// Another process that exports a page, until its standard input is closed.
struct Exporter {
    child: Child,
    address: Vec<u8>,
    key: Vec<u8>,
}

impl Exporter {
    fn start(memory: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "transport::ucx::tests::exporter"])
            .args(["--ignored", "--nocapture"])
            .env(EXPORTER_VARIABLE, memory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let address = told(&mut lines, "address");
        let key = told(&mut lines, "key");
        Self {
            child,
            address,
            key,
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    fn peer(&self, fabric: &Ucx) -> (Box<dyn FabricPeer>, RemoteArena) {
        let mut peer = fabric.open(&self.address, soon()).unwrap();
        let arena = peer.import(&self.key).unwrap();
        assert_eq!(arena.bytes, EXPORTED_BYTES as u64);
        (peer, arena)
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// The bytes behind a word on a line of its own.
fn told(lines: &mut BufReader<ChildStdout>, word: &str) -> Vec<u8> {
    let mut line = String::new();
    loop {
        line.clear();
        assert_ne!(lines.read_line(&mut line).unwrap(), 0, "it ended early");
        let Some(hex) = line.trim_end().strip_prefix(word) else {
            continue;
        };
        let digits = hex.trim().as_bytes().chunks(2);
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16);
        return digits.map(|pair| byte(pair).unwrap()).collect();
    }
}

fn say(word: &str, bytes: &[u8]) {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut out = io::stdout().lock();
    // A line of its own, whatever the test harness printed before.
    writeln!(out, "\n{word} {hex}").unwrap();
    out.flush().unwrap();
}

#[test]
#[ignore = "it is the other process of the tests below"]
fn exporter() {
    let memory = std::env::var(EXPORTER_VARIABLE).expect("only started by other tests");
    let fabric = started();
    let pages = match memory.as_str() {
        "file" => pool(EXPORTED_BYTES, 1),
        "ucx" => own_pool(EXPORTED_BYTES, 1),
        other => panic!("{other}"),
    };
    say("address", &fabric.address());
    say("key", &key_of(&fabric, &pages[0]));
    // Ends with the process that started it.
    let mut line = String::new();
    io::stdin().read_line(&mut line).unwrap();
}

#[test]
fn another_process_is_read_whole() {
    for memory in ["file", "ucx"] {
        is_read_whole(memory);
    }
}

fn is_read_whole(memory: &str) {
    let exporter = Exporter::start(memory);
    let reader = started();
    let (mut peer, arena) = exporter.peer(&reader);
    let mut page = Page::zeroed(plain_shape(EXPORTED_BYTES));
    let runs = Runs::whole(EXPORTED_BYTES);
    read(&mut *peer, arena, &runs, &mut page, soon()).unwrap();
    let mut expected = Page::zeroed(plain_shape(EXPORTED_BYTES));
    fill(&mut expected, 0);
    assert!(page.as_bytes() == expected.as_bytes());
}

#[test]
fn a_killed_process_fails_the_read_or_leaves_it_whole_and_nothing_is_written_after() {
    let exporter = Exporter::start("file");
    let reader = started();
    let (mut peer, arena) = exporter.peer(&reader);
    let mut page = Page::zeroed(plain_shape(EXPORTED_BYTES));
    let runs = Runs::whole(EXPORTED_BYTES);
    exporter.signal(Signal::SIGKILL);
    let deadline = Instant::now() + Duration::from_secs(2);
    let ended = read(&mut *peer, arena, &runs, &mut page, deadline);
    if ended.is_ok() {
        // The wire was the kernel's copy of what is still there.
        assert!(page.as_bytes()[1] != 0);
    }
    let before = page.as_bytes().to_vec();
    drop(peer);
    drop(reader);
    assert!(page.as_bytes() == before);
}

#[test]
fn a_stopped_process_costs_no_more_than_the_deadline() {
    let exporter = Exporter::start("file");
    let reader = started();
    let (mut peer, arena) = exporter.peer(&reader);
    exporter.signal(Signal::SIGSTOP);
    let late = reader.open(
        &exporter.address,
        Instant::now() + Duration::from_millis(300),
    );
    assert!(
        matches!(late, Ok(_) | Err(FabricError::TimedOut { .. })),
        "{late:?}"
    );
    let mut page = Page::zeroed(plain_shape(EXPORTED_BYTES));
    let runs = Runs::whole(EXPORTED_BYTES);
    let deadline = Instant::now() + Duration::from_millis(300);
    let ended = read(&mut *peer, arena, &runs, &mut page, deadline);
    assert!(
        matches!(ended, Ok(()) | Err(FabricError::TimedOut { .. })),
        "{ended:?}"
    );
    let before = page.as_bytes().to_vec();
    exporter.signal(Signal::SIGCONT);
    // It answers what it was asked before; nobody here writes that down any more.
    let (mut again, arena) = exporter.peer(&reader);
    let mut other = Page::zeroed(plain_shape(EXPORTED_BYTES));
    read(&mut *again, arena, &runs, &mut other, soon()).unwrap();
    assert!(page.as_bytes() == before);
}

#[test]
fn memory_of_ucx_is_mapped_and_needs_nothing_of_its_process() {
    let exporter = Exporter::start("ucx");
    let reader = started();
    let mut expected = Page::zeroed(plain_shape(EXPORTED_BYTES));
    fill(&mut expected, 0);
    let (mut peer, arena) = exporter.peer(&reader);
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        exporter.signal(signal);
        let mut page = Page::zeroed(plain_shape(EXPORTED_BYTES));
        let runs = Runs::whole(EXPORTED_BYTES);
        read(&mut *peer, arena, &runs, &mut page, soon()).unwrap();
        assert!(page.as_bytes() == expected.as_bytes(), "{signal}");
    }
    let wire = reader.wire().unwrap();
    assert!(wire.ends_with(", mapped"), "{wire}");
}

#[test]
#[ignore = "the next test starts it, with TCP alone"]
fn as_a_reader_over_tcp() {
    let exporter = Exporter::start("file");
    let error = started().open(&exporter.address, soon()).unwrap_err();
    assert!(matches!(error, FabricError::Unreachable { .. }));
    assert!(
        error.to_string().contains("UCX has only TCP to the peer"),
        "{error}"
    );
}

/// The variable is read once a process, so that the reader is one of its own.
#[test]
fn who_has_tcp_alone_is_left_to_another_transport() {
    let reader = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "transport::ucx::tests::as_a_reader_over_tcp"])
        .args(["--ignored", "--nocapture"])
        .env("UCX_TLS", "tcp")
        .output()
        .unwrap();
    let said = [reader.stdout, reader.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(reader.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
}

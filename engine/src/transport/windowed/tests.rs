//! Windows over a device that is none and a fabric that reads it within this process: what is gathered, read in one piece, taken
//! apart and summed, and what becomes of windows when that fails. With GPUs: `transport::processes`.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::sync::{LazyLock, Mutex, Weak};

use super::*;
use crate::page::device::fake::pool;
use crate::page::fold::{fold, tests::sample};
use crate::transport::conformance::{Node, PATIENCE};
use crate::transport::link::tests::brisk;
use crate::transport::link::{self, LinkParams, LinkTransport};
use crate::transport::memory::into_channel;
use crate::transport::{
    Deregistered, Note, ROW_PAGES_MAX, Reach, Region, Sides, Submission, TransferId,
    TransportEvent, TransportSink, Write, WriteOutcome,
};

const CAPABILITY: Capability = Capability {
    name: "windowed",
    memory: &[MemoryKind::Host],
    sides: Sides::One,
    reach: Reach::SameHost,
    bandwidth_estimate: 1,
    message_bytes_max: link::MESSAGE_BYTES_MAX,
    note_bytes_max: link::NOTE_BYTES_MAX,
};

/// Bytes of a window: three pieces of [`PIECE_BYTES`], and not four.
const TEST_WINDOW_BYTES: usize = 3 * PIECE_BYTES + 1000;
const PIECE_BYTES: usize = 64 << 10;

/// Every arena that was exported; a key is its number.
static EXPORTED: LazyLock<Mutex<HashMap<u64, Weak<Arena>>>> = LazyLock::new(Mutex::default);

/// Reads arenas of this process, of the host's memory and of the device that is none.
#[derive(Debug, Default)]
struct Within {
    /// Stretches of each read of a device's memory.
    reads: Arc<Mutex<Vec<usize>>>,
    /// Whether reads of a device's memory fail.
    fails: Arc<AtomicBool>,
    /// Whether it takes no memory of devices.
    host_only: bool,
}

fn arena(number: u64) -> Option<Arc<Arena>> {
    EXPORTED.lock().unwrap().get(&number)?.upgrade()
}

impl Fabric for Within {
    fn capability(&self) -> &Capability {
        &CAPABILITY
    }

    fn terms(&self) -> FabricTerms {
        FabricTerms {
            stretch_bytes_min: 1000,
            target_in_arena: false,
            batch_bytes_max: 1 << 20,
            tapers: false,
            reads_ahead: false,
        }
    }

    fn address(&self) -> Vec<u8> {
        b"here".to_vec()
    }

    fn reaches(&self, address: &[u8]) -> bool {
        address == b"here"
    }

    fn export(&self, arena: &Arc<Arena>) -> Result<ArenaKey, FabricError> {
        if self.host_only && arena.device().is_some() {
            return Err(FabricError::Memory {
                fabric: CAPABILITY.name,
                detail: "no memory of devices".to_owned(),
            });
        }
        let mut exported = EXPORTED.lock().unwrap();
        exported.insert(arena.id(), Arc::downgrade(arena));
        Ok(ArenaKey(arena.id().to_le_bytes().to_vec()))
    }

    fn open(&self, _: &[u8], _: Instant) -> Result<Box<dyn FabricPeer>, FabricError> {
        Ok(Box::new(WithinPeer {
            reads: Arc::clone(&self.reads),
            fails: Arc::clone(&self.fails),
        }))
    }

    fn close(&self) {}
}

#[derive(Debug)]
struct WithinPeer {
    reads: Arc<Mutex<Vec<usize>>>,
    fails: Arc<AtomicBool>,
}

impl FabricPeer for WithinPeer {
    fn import(&mut self, key: &[u8]) -> Result<RemoteArena, FabricError> {
        let handle = u64::from_le_bytes(key.try_into().unwrap());
        let arena = arena(handle).unwrap();
        Ok(RemoteArena {
            handle,
            bytes: arena.bytes() as u64,
            on_device: arena.device().is_some(),
        })
    }

    fn read(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        _: Instant,
        _: &AtomicBool,
    ) -> Result<(), FabricError> {
        for job in jobs {
            let from = arena(job.from.handle).expect("a source lives while it is read");
            if from.device().is_some() && self.fails.load(Ordering::Acquire) {
                return Err(FabricError::Read {
                    fabric: CAPABILITY.name,
                    detail: "on purpose".to_owned(),
                });
            }
            if from.device().is_some() {
                self.reads.lock().unwrap().push(job.runs.stretch_count());
            }
            for (source, target) in job.stretches() {
                let mut bytes = vec![0; source.len()];
                match from.device() {
                    Some(device) => device.read(source.start, &mut bytes).unwrap(),
                    None => {
                        let file = from.file().unwrap();
                        file.read_exact_at(&mut bytes, source.start as u64).unwrap();
                    }
                }
                job.page.write(target.start, &bytes).unwrap();
            }
        }
        Ok(())
    }
}

/// Windows of the device that is none.
fn windows() -> DeviceWindows {
    DeviceWindows::of(TEST_WINDOW_BYTES, |shape| Ok(pool(shape, WINDOWS))).unwrap()
}

/// A transport with windows, for tests of the transceiver.
pub(crate) fn start_for_tests(params: LinkParams, sink: TransportSink) -> LinkTransport {
    let fabric = Windowed::over(Arc::new(Within::default()), Some(&windows()));
    LinkTransport::over(Arc::new(fabric), params, sink).unwrap()
}

/// One side, with what can be looked at.
struct Side {
    node: Node,
    windows: Option<DeviceWindows>,
    reads: Arc<Mutex<Vec<usize>>>,
    fails: Arc<AtomicBool>,
}

impl Side {
    fn start(windows: Option<DeviceWindows>, host_only: bool) -> Self {
        let within = Within {
            host_only,
            ..Within::default()
        };
        let (reads, fails) = (Arc::clone(&within.reads), Arc::clone(&within.fails));
        let fabric = Windowed::over(Arc::new(within), windows.as_ref());
        let (sender, events) = channel();
        let params = LinkParams {
            tuning: brisk(),
            ..link::on_loopback()
        };
        let transport = LinkTransport::over(Arc::new(fabric), params, into_channel(sender));
        Self {
            node: Node {
                events,
                transport: Arc::new(transport.unwrap()),
            },
            windows,
            reads,
            fails,
        }
    }

    fn page_of(&self, region: &Region) -> Page {
        match self.node.transport.deregister(region.id) {
            Deregistered::Now(page) => page,
            other => panic!("{other:?}"),
        }
    }

    /// Windows that are free, of those that are lent and of those that are read into.
    fn free(&self) -> (usize, usize) {
        let count = |staging: &Arc<Staging>| {
            let slots: Vec<_> = std::iter::from_fn(|| staging.try_take()).collect();
            slots.len()
        };
        let windows = self.windows.as_ref().unwrap();
        (count(&windows.lending), count(&windows.reading))
    }
}

fn content(index: usize) -> Vec<u8> {
    let mut bytes = sample(PIECE_BYTES);
    bytes.rotate_left(index + 1);
    bytes
}

/// Pages on the device that is none, with the content of their index.
fn sources(count: usize) -> Vec<Arc<Page>> {
    let pages = pool(plain_shape(PIECE_BYTES), count).into_iter();
    let filled = pages.enumerate().map(|(index, mut page)| {
        page.write(0, &content(index)).unwrap();
        Arc::new(page)
    });
    filled.collect()
}

/// Writes all sources to pages of the reader, as fast as the transport takes them; the regions.
fn write_all(writer: &Side, reader: &Side, sources: &[Arc<Page>], runs: &Runs) -> Vec<Region> {
    write_rows(writer, reader, (sources, 1), runs)
}

/// The same, so many in a row.
fn write_rows(
    writer: &Side,
    reader: &Side,
    (sources, in_row): (&[Arc<Page>], usize),
    runs: &Runs,
) -> Vec<Region> {
    let targets = pool(plain_shape(2 * PIECE_BYTES), sources.len());
    let regions = reader.node.register_all(targets);
    let deadline = Instant::now() + PATIENCE;
    let endpoint = reader.node.transport.endpoint();
    assert!(writer.node.transport.reaches(&endpoint));
    let peer = writer.node.transport.connect(&endpoint, deadline).unwrap();
    for (sources, regions) in sources.chunks(in_row).zip(regions.chunks(in_row)) {
        let submission = writer.node.transport.write(Write {
            peer,
            transfer: TransferId(1),
            sources: sources.into(),
            target: regions[0].remote,
            runs: runs.clone(),
            note: Note::new(),
            sum_at: None,
        });
        assert_eq!(submission, Submission::Accepted);
    }
    regions
}

/// The second half of a piece comes first in its target, in short stretches with gaps.
fn swapped() -> Runs {
    let half = PIECE_BYTES / 2;
    let strided = |source, target| Run {
        source,
        target,
        bytes: 512,
        count: half / 512,
        source_stride: 512,
        target_stride: 1024,
    };
    Runs::new([strided(half, 0), strided(0, PIECE_BYTES)]).unwrap()
}

/// The sum of a page's stretches in their order.
fn swapped_fold(index: usize) -> u64 {
    let content = content(index);
    let (first, second) = content.split_at(PIECE_BYTES / 2);
    fold(&[second, first].concat())
}

fn assert_swapped(page: &Page, index: usize) {
    let mut expected = vec![0; 2 * PIECE_BYTES];
    for (from, to) in swapped().stretches() {
        expected[to].copy_from_slice(&content(index)[from]);
    }
    assert!(page.to_host().unwrap()[..] == expected, "page {index}");
}

#[test]
fn addresses_name_windows_or_are_as_they_were() {
    let key = ArenaKey(vec![7; 9]);
    let encoded = encode(b"inner", 4096, &key);
    let windows = Some((4096, &key.0[..]));
    let inner = &b"inner"[..];
    assert_eq!(decode(&encoded), Address { inner, windows });
    for plain in [&b"inner"[..], &encoded[..20], &encoded[..26], b""] {
        let windows = None;
        let inner = plain;
        assert_eq!(decode(plain), Address { inner, windows });
    }
}

#[test]
fn windows_are_as_long_as_a_page_or_what_may_be_under_way() {
    let page = 4 << 20;
    assert_eq!(DeviceWindows::window_bytes(page, None), WINDOW_BYTES);
    assert_eq!(DeviceWindows::window_bytes(page, Some(4 * page)), 2 * page);
    assert_eq!(DeviceWindows::window_bytes(page, Some(page)), page);
    let large = 2 * WINDOW_BYTES + 1;
    let whole = DeviceWindows::window_bytes(large, None);
    assert!(whole >= large && whole.is_multiple_of(PROBE_BYTES));
}

#[test]
fn many_pieces_are_read_in_one_each_window_and_summed_on_the_way() {
    let (writer, reader) = (
        Side::start(Some(windows()), false),
        Side::start(Some(windows()), false),
    );
    let sources = sources(40);
    let regions = write_all(&writer, &reader, &sources, &swapped());
    for _ in &sources {
        match reader.node.next() {
            TransportEvent::Landed { region, folds, .. } => {
                let index = regions.iter().position(|known| known.id == region).unwrap();
                assert_eq!(folds[..], [Some(swapped_fold(index))], "page {index}");
            }
            other => panic!("{other:?}"),
        }
    }
    for _ in &sources {
        let done = writer.node.next();
        assert!(
            matches!(
                done,
                TransportEvent::WriteDone {
                    outcome: WriteOutcome::Sent,
                    ..
                }
            ),
            "{done:?}"
        );
    }
    for (index, region) in regions.iter().enumerate() {
        assert_swapped(&reader.page_of(region), index);
    }
    // The first is that of the peer's windows when it was opened; pieces lie one after the other on both sides.
    let reads = reader.reads.lock().unwrap().clone();
    assert!(
        reads.len() >= sources.len() / 3 && reads.iter().all(|stretches| *stretches == 1),
        "{reads:?}"
    );
    assert!(sources.iter().all(|source| Arc::strong_count(source) == 1));
    assert_eq!(
        (writer.free(), reader.free()),
        ((WINDOWS, WINDOWS), (WINDOWS, WINDOWS))
    );
}

#[test]
fn rows_lie_in_windows_or_go_by_way_of_the_host_where_they_are_longer() {
    for (in_row, in_windows) in [(2, true), (ROW_PAGES_MAX, false)] {
        let (writer, reader) = (
            Side::start(Some(windows()), false),
            Side::start(Some(windows()), false),
        );
        let sources = sources(2 * ROW_PAGES_MAX);
        let regions = write_rows(&writer, &reader, (&sources, in_row), &swapped());
        for _ in sources.chunks(in_row) {
            match reader.node.next() {
                TransportEvent::Landed {
                    region,
                    count,
                    folds,
                    ..
                } => {
                    let first = regions.iter().position(|known| known.id == region);
                    let rows = (first.unwrap()..).take(in_row);
                    let sums = rows.map(|index| Some(swapped_fold(index)));
                    let sums: Vec<_> = sums.filter(|_| in_windows).collect();
                    assert_eq!((count, &folds[..]), (in_row, &sums[..]));
                }
                other => panic!("{other:?}"),
            }
        }
        for (index, region) in regions.iter().enumerate() {
            assert_swapped(&reader.page_of(region), index);
        }
        // The first is that of the peer's windows when it was opened.
        let reads = reader.reads.lock().unwrap().clone();
        assert_eq!(reads.len() > 1, in_windows, "{reads:?}");
        assert_eq!(writer.free(), (WINDOWS, WINDOWS));
    }
}

#[test]
fn who_has_no_windows_gets_what_the_host_can_carry() {
    let cases = [(None, false), (Some(windows()), true)];
    for (windows_there, host_only) in cases {
        let writer = Side::start(Some(windows()), false);
        let reader = Side::start(windows_there, host_only);
        let sources = sources(4);
        let regions = write_all(&writer, &reader, &sources, &swapped());
        for _ in &sources {
            let landed = reader.node.next();
            assert!(
                matches!(&landed, TransportEvent::Landed { folds, count: 1, .. } if folds.is_empty()),
                "{landed:?}"
            );
        }
        for (index, region) in regions.iter().enumerate() {
            assert_swapped(&reader.page_of(region), index);
        }
        assert!(reader.reads.lock().unwrap().is_empty());
        assert_eq!(writer.free(), (WINDOWS, WINDOWS));
    }
}

#[test]
fn a_failed_read_gives_pages_and_windows_back() {
    let (writer, reader) = (
        Side::start(Some(windows()), false),
        Side::start(Some(windows()), false),
    );
    reader.fails.store(true, Ordering::Release);
    let sources = sources(20);
    let regions = write_all(&writer, &reader, &sources, &swapped());
    // Not before the peer's windows are read, which fails.
    match reader.node.next() {
        TransportEvent::PeerLost { reason, .. } => {
            assert!(reason.contains("on purpose"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    for _ in &sources {
        assert!(matches!(
            writer.node.next(),
            TransportEvent::WriteDone { .. }
        ));
    }
    assert!(matches!(
        writer.node.next(),
        TransportEvent::PeerLost { .. }
    ));
    regions
        .iter()
        .for_each(|region| drop(reader.page_of(region)));
    assert!(sources.iter().all(|source| Arc::strong_count(source) == 1));
    assert_eq!(
        (writer.free(), reader.free()),
        ((WINDOWS, WINDOWS), (WINDOWS, WINDOWS))
    );
}

#[test]
fn who_holds_all_windows_but_reads_more_ends_his_own_reads_first() {
    let windows = windows();
    let source = pool(plain_shape(2 * TEST_WINDOW_BYTES), 1);
    let exporting = Within::default();
    let key = exporting.export(source[0].arena().unwrap().0).unwrap();
    let fabric = Windowed::over(Arc::new(exporting), Some(&windows));
    let soon = Instant::now() + PATIENCE;
    let mut peer = fabric.open(&fabric.address(), soon).unwrap();
    let from = peer.import(&key.0).unwrap();
    let never = AtomicBool::new(false);
    let mut targets = pool(plain_shape(PIECE_BYTES), WINDOWS + 3);
    let runs = Runs::whole(PIECE_BYTES);
    for target in &mut targets {
        let mut jobs = [ReadJob::new(from, &runs, target)];
        peer.begin(&mut jobs, soon, &never).unwrap();
    }
    for _ in &targets {
        let mut folds = Vec::new();
        peer.finish(&never, &mut folds).unwrap();
        assert_eq!(folds, [Some(fold(&vec![0; PIECE_BYTES]))]);
    }
    let long = Runs::whole(2 * TEST_WINDOW_BYTES);
    let mut target = pool(plain_shape(2 * TEST_WINDOW_BYTES), 1).pop().unwrap();
    let mut jobs = [ReadJob::new(from, &long, &mut target)];
    let refused = peer.begin(&mut jobs, soon, &never).unwrap_err();
    assert!(
        refused.to_string().contains("more than a window holds"),
        "{refused}"
    );
}

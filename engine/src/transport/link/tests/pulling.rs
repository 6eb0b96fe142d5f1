//! Pulled writes, over a fabric that does what a test says: holds, fails, refuses, and remembers what it was asked for.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, LazyLock, Mutex, Weak};

use smallvec::smallvec;

use super::*;
use crate::page::arena::Arena;
use crate::transport::fabric::{ArenaKey, FabricPeer, FabricTerms, ReadJob, RemoteArena};
use crate::transport::staging::plain_shape;
use crate::transport::{MemoryKind, Reach, Region, Run, Sides};

const CAPABILITY: Capability = Capability {
    name: "scripted",
    memory: &[MemoryKind::Host],
    sides: Sides::One,
    reach: Reach::SameHost,
    bandwidth_estimate: 1,
    message_bytes_max: MESSAGE_BYTES_MAX,
    note_bytes_max: NOTE_BYTES_MAX,
};

const TERMS: FabricTerms = FabricTerms {
    stretch_bytes_min: 0,
    target_in_arena: false,
    batch_bytes_max: 1 << 20,
    tapers: false,
    reads_ahead: true,
};

/// Every arena that was exported; a key is its number.
static EXPORTED: LazyLock<Mutex<HashMap<u64, Weak<Arena>>>> = LazyLock::new(Mutex::default);

/// What a test decides, and what it learns.
#[derive(Debug, Default)]
struct Script {
    hold: bool,
    fail: bool,
    refuse_exports: bool,
    /// Runs of each read so far, with whether the target was in an arena.
    reads: Vec<Vec<(Runs, bool)>>,
}

#[derive(Debug)]
struct Scripted {
    terms: FabricTerms,
    script: Arc<(Mutex<Script>, Condvar)>,
}

fn locked(script: &(Mutex<Script>, Condvar)) -> std::sync::MutexGuard<'_, Script> {
    script.0.lock().unwrap()
}

impl Fabric for Scripted {
    fn capability(&self) -> &Capability {
        &CAPABILITY
    }

    fn terms(&self) -> FabricTerms {
        self.terms
    }

    fn address(&self) -> Vec<u8> {
        b"here".to_vec()
    }

    fn reaches(&self, address: &[u8]) -> bool {
        address == b"here"
    }

    fn export(&self, arena: &Arc<Arena>) -> Result<ArenaKey, FabricError> {
        if locked(&self.script).refuse_exports {
            return Err(FabricError::Memory {
                fabric: CAPABILITY.name,
                detail: "on purpose".to_owned(),
            });
        }
        let mut exported = EXPORTED.lock().unwrap();
        exported.insert(arena.id(), Arc::downgrade(arena));
        Ok(ArenaKey(arena.id().to_le_bytes().to_vec()))
    }

    fn open(&self, _: &[u8], _: Instant) -> Result<Box<dyn FabricPeer>, FabricError> {
        Ok(Box::new(ScriptedPeer(Arc::clone(&self.script))))
    }

    fn close(&self) {}
}

#[derive(Debug)]
struct ScriptedPeer(Arc<(Mutex<Script>, Condvar)>);

fn arena(number: u64) -> Option<Arc<Arena>> {
    EXPORTED.lock().unwrap().get(&number)?.upgrade()
}

impl FabricPeer for ScriptedPeer {
    fn import(&mut self, key: &[u8]) -> Result<RemoteArena, FabricError> {
        let number = key.try_into().ok().map(u64::from_le_bytes);
        let found = number.and_then(|number| Some((number, arena(number)?)));
        let (handle, arena) = found.ok_or_else(|| FabricError::Malformed {
            fabric: CAPABILITY.name,
            what: "arena key",
            detail: "unknown".to_owned(),
        })?;
        let bytes = arena.bytes() as u64;
        Ok(RemoteArena {
            handle,
            bytes,
            on_device: false,
        })
    }

    fn read(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        let fabric = CAPABILITY.name;
        let (script, wake) = &*self.0;
        let mut script = script.lock().unwrap();
        let seen = |job: &ReadJob<'_>| (job.runs.clone(), job.page.arena().is_some());
        script.reads.push(jobs.iter().map(seen).collect());
        wake.notify_all();
        while script.hold {
            if cancelled.load(Ordering::Acquire) {
                return Err(FabricError::Cancelled { fabric });
            }
            assert!(Instant::now() < deadline, "nobody let the read go on");
            let tick = Duration::from_millis(5);
            script = wake.wait_timeout(script, tick).unwrap().0;
        }
        if script.fail {
            let detail = "on purpose".to_owned();
            return Err(FabricError::Read { fabric, detail });
        }
        for job in jobs {
            let from = arena(job.from.handle).expect("a source lives while it is read");
            for (source, target) in job.stretches() {
                let to = &mut job.page.as_bytes_mut()[target];
                let file = from.file().unwrap();
                file.read_exact_at(to, source.start as u64).unwrap();
            }
        }
        Ok(())
    }
}

/// A writer and a reader over scripted fabrics, connected.
struct Scene {
    writer: Node,
    /// The writer's transport, to look into.
    lender: Arc<LinkTransport>,
    reader: Node,
    to_reader: PeerId,
    script: Arc<(Mutex<Script>, Condvar)>,
    /// The writer's fabric.
    lending: Arc<(Mutex<Script>, Condvar)>,
}

type SharedScript = Arc<(Mutex<Script>, Condvar)>;

fn scripted(terms: FabricTerms) -> (Node, Arc<LinkTransport>, SharedScript) {
    let script = Arc::<(Mutex<Script>, Condvar)>::default();
    let fabric = Arc::new(Scripted {
        terms,
        script: Arc::clone(&script),
    });
    let (sender, events) = channel();
    let sink: TransportSink = into_channel(sender);
    let params = LinkParams {
        staging: StagingSize {
            slot_bytes: 1 << 20,
            slots: 3,
        },
        ..params(brisk(), "")
    };
    let transport = Arc::new(LinkTransport::over(fabric, params, sink).unwrap());
    let node = Node {
        events,
        transport: Arc::clone(&transport) as Arc<dyn Transport>,
    };
    (node, transport, script)
}

fn scene(terms: FabricTerms) -> Scene {
    let (writer, lender, lending) = scripted(terms);
    let (reader, _, script) = scripted(terms);
    let deadline = Instant::now() + PATIENCE;
    assert!(writer.transport.reaches(&reader.transport.endpoint()));
    let to_reader = writer
        .transport
        .connect(&reader.transport.endpoint(), deadline)
        .unwrap();
    Scene {
        writer,
        lender,
        reader,
        to_reader,
        script,
        lending,
    }
}

impl Scene {
    fn write(&self, source: &Arc<Page>, region: &Region, runs: Runs) {
        let write = Write {
            peer: self.to_reader,
            transfer: TransferId(1),
            sources: Arc::clone(source).into(),
            target: region.remote,
            runs,
            note: Note::new(),
            sum_at: None,
        };
        assert_eq!(self.writer.transport.write(write), Submission::Accepted);
    }

    fn set(&self, change: impl FnOnce(&mut Script)) {
        change(&mut locked(&self.script));
        self.script.1.notify_all();
    }

    /// Waits until a read was asked for, and returns how many there were.
    fn reading(&self) -> usize {
        let (script, wake) = &*self.script;
        let script = script.lock().unwrap();
        let waited = wake.wait_timeout_while(script, PATIENCE, |script| script.reads.is_empty());
        let count = waited.unwrap().0.reads.len();
        assert!(count > 0, "no read began");
        count
    }

    fn done(&self) -> WriteOutcome {
        match self.writer.next() {
            TransportEvent::WriteDone { outcome, .. } => outcome,
            other => panic!("{other:?}"),
        }
    }

    fn landed(&self) -> (RegionId, Runs) {
        match self.reader.next() {
            TransportEvent::Landed { region, runs, .. } => (region, runs),
            other => panic!("{other:?}"),
        }
    }

    fn page_of(&self, region: RegionId) -> Page {
        match self.reader.transport.deregister(region) {
            Deregistered::Now(page) => page,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_page_under_a_pull_is_quarantined_until_the_read_is_over() {
    let scene = scene(TERMS);
    scene.set(|script| script.hold = true);
    let source = Arc::new(page(1000, 3));
    let region = scene.reader.register(page(1000, 0));
    scene.write(&source, &region, Runs::whole(4000));
    scene.reading();
    assert!(matches!(
        scene.reader.transport.deregister(region.id),
        Deregistered::Later
    ));
    assert!(scene.reader.events.try_recv().is_err());
    assert_eq!(Arc::strong_count(&source), 2, "the source stays meanwhile");
    scene.set(|script| script.hold = false);
    match scene.reader.next() {
        TransportEvent::PageReleased { region: id, page } => {
            assert_eq!(id, region.id);
            assert_eq!(page.as_bytes(), source.as_bytes());
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(scene.done(), WriteOutcome::Sent);
    assert_eq!(Arc::strong_count(&source), 1);
}

#[test]
fn the_end_of_a_connection_ends_its_reads_and_frees_both_sides() {
    for by_writer in [true, false] {
        let scene = scene(TERMS);
        scene.set(|script| script.hold = true);
        let source = Arc::new(page(1000, 3));
        let region = scene.reader.register(page(1000, 0));
        scene.write(&source, &region, Runs::whole(4000));
        scene.reading();
        if by_writer {
            scene.writer.transport.disconnect(scene.to_reader);
        } else {
            scene.reader.transport.close();
        }
        lost(&scene.reader);
        scene.page_of(region.id);
        assert_eq!(scene.done(), WriteOutcome::Lost);
        lost(&scene.writer);
        assert_eq!(Arc::strong_count(&source), 1);
    }
}

#[test]
fn a_failed_read_ends_the_connection_with_the_reason() {
    let scene = scene(TERMS);
    scene.set(|script| script.fail = true);
    let source = Arc::new(page(1000, 3));
    let region = scene.reader.register(page(1000, 0));
    scene.write(&source, &region, Runs::whole(4000));
    assert_eq!(lost(&scene.reader), "scripted: read failed: on purpose");
    scene.page_of(region.id);
    assert_eq!(scene.done(), WriteOutcome::Lost);
    assert_eq!(Arc::strong_count(&source), 1);
    lost(&scene.writer);
}

#[test]
fn a_region_that_is_gone_is_not_read_but_acknowledged() {
    let scene = scene(TERMS);
    let source = Arc::new(page(1000, 3));
    let region = scene.reader.register(page(1000, 0));
    scene.page_of(region.id);
    scene.write(&source, &region, Runs::whole(4000));
    assert_eq!(scene.done(), WriteOutcome::Sent);
    assert!(locked(&scene.script).reads.is_empty());
}

#[test]
fn what_a_fabric_does_not_export_goes_through_the_stream() {
    let scene = scene(TERMS);
    locked(&scene.lending).refuse_exports = true;
    for (transfer, bytes) in [(0, 0), (1, 4000)] {
        let source = Arc::new(page(1000, 3 + transfer));
        let region = scene.reader.register(page(1000, 0));
        scene.write(&source, &region, Runs::whole(bytes));
        assert_eq!(scene.landed(), (region.id, Runs::whole(bytes)));
        assert_eq!(scene.done(), WriteOutcome::Sent);
        let landed = scene.page_of(region.id);
        assert_eq!(landed.as_bytes()[..bytes], source.as_bytes()[..bytes]);
    }
    assert!(locked(&scene.script).reads.is_empty());
}

#[test]
fn short_stretches_and_private_targets_go_through_staging_memory() {
    let scene = scene(FabricTerms {
        stretch_bytes_min: 1000,
        target_in_arena: true,
        ..TERMS
    });
    let strided = |bytes, count| {
        Runs::new([Run {
            source: 4,
            target: 8,
            bytes,
            count,
            source_stride: 3 * bytes,
            target_stride: 2 * bytes,
        }])
        .unwrap()
    };
    // Long enough; too short; too short and too long for a slot.
    let cases = [strided(1000, 100), strided(100, 1000), strided(999, 1100)];
    let source = Arc::new(page(1_000_000, 3));
    for (index, runs) in cases.into_iter().enumerate() {
        let region = scene.reader.register(Page::zeroed(plain_shape(4_000_000)));
        scene.write(&source, &region, runs.clone());
        assert_eq!(scene.landed(), (region.id, runs.clone()));
        assert_eq!(scene.done(), WriteOutcome::Sent);
        let landed = scene.page_of(region.id);
        for (from, to) in runs.stretches() {
            assert_eq!(landed.as_bytes()[to], source.as_bytes()[from]);
        }
        let (read, in_arena) = locked(&scene.script).reads[index][0].clone();
        let expected = [(100, true), (1, true), (1100, false)][index];
        assert_eq!((read.stretch_count(), in_arena), expected, "{runs:?}");
    }
}

#[test]
fn what_waits_is_read_together_but_never_one_region_twice() {
    let scene = scene(TERMS);
    scene.set(|script| script.hold = true);
    let source = Arc::new(page(50_000, 3));
    let region = || scene.reader.register(page(50_000, 0));
    let first = region();
    scene.write(&source, &first, Runs::whole(200_000));
    scene.reading();
    let twice = region();
    for target in [&twice, &region(), &twice, &region(), &region()] {
        scene.write(&source, target, Runs::whole(200_000));
    }
    let deadline = Instant::now() + PATIENCE;
    let shared = &scene.lender.shared;
    while shared.peer(scene.to_reader).unwrap().in_flight() < 6 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    // What came before a message is queued when the message has come.
    let marker = scene.writer.transport.notify(scene.to_reader, vec![1]);
    assert_eq!(marker, Submission::Accepted);
    assert!(matches!(
        scene.reader.next(),
        TransportEvent::Message { .. }
    ));
    scene.set(|script| script.hold = false);
    for _ in 0..6 {
        scene.landed();
        assert_eq!(scene.done(), WriteOutcome::Sent);
    }
    let script = locked(&scene.script);
    let batches: Vec<_> = script.reads.iter().map(Vec::len).collect();
    // The one that was held; two before the region comes again; the rest.
    assert_eq!(batches, [1, 2, 3]);
}

/// A connection of a peer that says what no honest one would.
fn liar(node: &Node) -> TcpStream {
    let mut stream = dial(node);
    let header = Header {
        note_bytes: 8,
        extra_bytes: 4,
        ..Header::plain(Kind::Hello, 0)
    };
    let hello = [&header.encode()[..], b"scripted", b"here"].concat();
    stream.write_all(&hello).unwrap();
    let mut hello = [0; HEADER_BYTES];
    stream.read_exact(&mut hello).unwrap();
    let header = Header::decode(&hello).unwrap();
    let mut rest = vec![0; 8 + 4 + usize::try_from(header.payload_bytes).unwrap()];
    stream.read_exact(&mut rest).unwrap();
    stream
}

fn arena_frame(number: u64, key: &[u8]) -> Vec<u8> {
    let header = Header::numbered(Kind::Arena, number, key.len() as u64);
    [&header.encode()[..], key].concat()
}

/// A pull of `bytes` bytes, from `offset` of arena 5.
fn pull_frame(region: &RemoteRegion, bytes: usize, offset: u64) -> Vec<u8> {
    let RemoteRegion { id, key, .. } = *region;
    let runs = Runs::whole(bytes).encode();
    let descriptor = frame::Descriptor {
        sequence: 1,
        arena: 5,
        offsets: smallvec![offset],
        gathered: false,
    };
    let mut payload = Vec::new();
    descriptor.encode_to(&mut payload);
    let header = Header {
        kind: Kind::Pull,
        more: false,
        note_bytes: 0,
        payload_bytes: payload.len() as u64,
        transfer: TransferId(1),
        region: id,
        key,
        extra_bytes: runs.len() as u64,
    };
    [&header.encode()[..], &runs, &payload].concat()
}

#[test]
fn a_lying_peer_makes_nobody_read_beyond_what_was_exported() {
    let (node, _, script) = scripted(TERMS);
    let source = page(1000, 1);
    let exported = source.arena().unwrap().0;
    EXPORTED
        .lock()
        .unwrap()
        .insert(exported.id(), Arc::downgrade(exported));
    let key = exported.id().to_le_bytes();
    let end = exported.bytes() as u64;
    let region = node.register(page(1000, 0));
    let target = &region.remote;
    let known = arena_frame(5, &key);
    let after = |frame: Vec<u8>| [&known[..], &frame].concat();
    let mut odd = pull_frame(target, 4000, 0);
    let gathered = odd.len() - 16;
    odd[gathered] = 7;
    let cases = [
        (
            pull_frame(target, 4000, 0),
            "an arena 5 that was never described",
        ),
        (
            after(pull_frame(target, 4000, end - 3999)),
            "of an arena of",
        ),
        (after(pull_frame(target, 4000, u64::MAX)), "ends nowhere"),
        (after(pull_frame(target, 4001, 0)), "of a region of 4000"),
        (after(odd), "malformed descriptor"),
        (arena_frame(5, b"no key"), "arena key not understood"),
        (arena_frame(5, &[0; 8]), "arena key not understood"),
        (
            (0..2000).flat_map(|n| arena_frame(n, &key)).collect(),
            "more",
        ),
    ];
    for (bytes, expected) in cases {
        let mut stream = liar(&node);
        // The other side may have had enough before all is written.
        drop(stream.write_all(&bytes));
        let reason = lost(&node);
        assert!(reason.contains(expected), "{reason}");
    }
    assert!(locked(&script).reads.is_empty());
    let mut stream = liar(&node);
    stream
        .write_all(&after(pull_frame(target, 4000, 0)))
        .unwrap();
    assert!(matches!(node.next(), TransportEvent::Landed { .. }));
}

//! The contract of [`Transport`], written once and run over every implementation.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel, sync_channel};
use std::time::{Duration, Instant};

use super::{checksum::sum_of, memory::one_by_one, *};
use crate::page::{KvDtype, PageShape};
use rows::{
    rows_land_page_by_page, rows_that_are_none_are_refused_and_those_of_lost_regions_go_nowhere,
    sealed_regions_are_written_no_more_and_come_back_as_one,
    strided_stretches_land_where_they_belong,
};

mod rows;

/// How long a test waits for an event that must come.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Starts a transport of the kind under test.
pub(super) type Start = fn(TransportSink) -> Arc<dyn Transport>;

/// A transport with its events.
pub(super) struct Node {
    /// Dropped first, so that no thread waits for a test that is over.
    pub(super) events: Receiver<TransportEvent>,
    pub(super) transport: Arc<dyn Transport>,
}

impl Node {
    pub(super) fn start(start: Start) -> Self {
        let (sender, events) = channel();
        let transport = start(one_by_one(move |event| drop(sender.send(event))));
        Self { transport, events }
    }

    pub(super) fn next(&self) -> TransportEvent {
        self.events
            .recv_timeout(PATIENCE)
            .expect("an event within the patience")
    }

    fn connect(&self, to: &Self) -> PeerId {
        let deadline = Instant::now() + PATIENCE;
        self.transport
            .connect(&to.transport.endpoint(), deadline)
            .unwrap()
    }

    fn message(&self) -> (PeerId, Vec<u8>) {
        match self.next() {
            TransportEvent::Message { peer, message } => (peer, message),
            other => panic!("{other:?}"),
        }
    }

    fn lost(&self) -> (PeerId, String) {
        match self.next() {
            TransportEvent::PeerLost { peer, reason } => (peer, reason),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn register(&self, page: Page) -> Region {
        self.register_all(vec![page]).remove(0)
    }

    pub(super) fn register_all(&self, pages: Vec<Page>) -> Vec<Region> {
        self.transport.register(pages).unwrap().regions().collect()
    }

    fn page_of(&self, region: RegionId) -> Page {
        match self.transport.deregister(region) {
            Deregistered::Now(page) => page,
            other => panic!("{other:?}"),
        }
    }
}

/// Two connected nodes: the writer knows the reader under `to_reader`, the reader the writer under `to_writer`.
struct Pair {
    writer: Node,
    reader: Node,
    to_reader: PeerId,
    to_writer: PeerId,
}

fn pair(start: Start) -> Pair {
    let (writer, reader) = (Node::start(start), Node::start(start));
    let to_reader = writer.connect(&reader);
    assert_eq!(
        writer.transport.notify(to_reader, b"hello".to_vec()),
        Submission::Accepted
    );
    let (to_writer, message) = reader.message();
    assert_eq!(message, b"hello");
    Pair {
        writer,
        reader,
        to_reader,
        to_writer,
    }
}

/// A page of `elements * 4` bytes, in an arena of its own, with a pattern that depends on `seed`; 0 leaves it blank.
pub(super) fn page(elements: usize, seed: usize) -> Page {
    let shape = PageShape {
        layers: 1,
        kv_heads: 1,
        tokens_per_block: 1,
        head_dim: elements,
        dtype: KvDtype::F16,
    };
    let mut page = Page::pool(shape, 1).unwrap().pop().unwrap();
    for (at, byte) in page.as_bytes_mut().iter_mut().enumerate() {
        *byte = u8::try_from((at * 7 + at / 253 + 1) * seed % 256).unwrap();
    }
    page
}

fn piece(peer: PeerId, transfer: u64, source: &Arc<Page>, target: &RemoteRegion) -> Write {
    Write {
        peer,
        transfer: TransferId(transfer),
        sources: Arc::clone(source).into(),
        target: *target,
        runs: Runs::whole(source.as_bytes().len()),
        note: b"note"[..].into(),
        sum_at: None,
    }
}

pub(super) fn any_range_of_any_size_lands_where_it_was_sent(start: Start) {
    let pair = pair(start);
    let elements = 300_000;
    let source = Arc::new(page(elements, 3));
    let all = source.as_bytes().len();
    let ranges = [0..0, 0..1, 3..10, all - 1..all, 1..all - 1, 0..all];
    for (transfer, range) in (0..).zip(ranges) {
        let runs = Runs::new([Run::once(range.start, range.start, range.len())]).unwrap();
        let region = pair.reader.register(page(elements, 0));
        let submission = pair.writer.transport.write(Write {
            runs: runs.clone(),
            ..piece(pair.to_reader, transfer, &source, &region.remote)
        });
        assert_eq!(submission, Submission::Accepted);
        match pair.reader.next() {
            TransportEvent::Landed {
                peer,
                region: landed,
                count,
                runs: bytes,
                transfer: of,
                note,
                checksums,
                folds,
            } => {
                assert_eq!((peer, landed), (pair.to_writer, region.id));
                let sent = sum_of(source.as_bytes(), std::iter::once(range.clone()));
                assert!(checksums.iter().flatten().all(|sum| *sum == sent));
                assert!(folds.is_empty() && count == 1 && checksums.len() <= 1);
                assert!((bytes, of) == (runs, TransferId(transfer)) && note[..] == *b"note");
            }
            other => panic!("{other:?}"),
        }
        match pair.writer.next() {
            TransportEvent::WriteDone { outcome, .. } => assert_eq!(outcome, WriteOutcome::Sent),
            other => panic!("{other:?}"),
        }
        assert_eq!(Arc::strong_count(&source), 1, "the source was let go first");
        let landed = pair.reader.page_of(region.id);
        assert_eq!(
            landed.as_bytes()[range.clone()],
            source.as_bytes()[range.clone()]
        );
        assert!(landed.as_bytes()[..range.start].iter().all(|b| *b == 0));
        assert!(landed.as_bytes()[range.end..].iter().all(|b| *b == 0));
    }
}

pub(super) fn messages_go_both_ways_and_too_long_ones_nowhere(start: Start) {
    let pair = pair(start);
    for bytes in [0, 1, 100_000] {
        let message = vec![7; bytes];
        let submission = pair
            .reader
            .transport
            .notify(pair.to_writer, message.clone());
        assert_eq!(submission, Submission::Accepted);
        assert_eq!(pair.writer.message(), (pair.to_reader, message));
    }
    let too_long = pair.writer.transport.capability().message_bytes_max + 1;
    assert_eq!(
        pair.writer
            .transport
            .notify(pair.to_reader, vec![0; too_long]),
        Submission::Invalid
    );
    let source = Arc::new(page(10, 1));
    let region = pair.reader.register(page(10, 0));
    let mut outside = piece(pair.to_reader, 1, &source, &region.remote);
    outside.runs = Runs::whole(41);
    assert_eq!(pair.writer.transport.write(outside), Submission::Invalid);
    pair.reader.page_of(region.id);
}

pub(super) fn sixty_four_transfers_fly_at_once(start: Start) {
    let pair = pair(start);
    let sources: Vec<_> = (1..=64)
        .map(|seed| Arc::new(page(20_000 + seed, seed)))
        .collect();
    let regions: Vec<_> = (1..=64)
        .map(|seed| pair.reader.register(page(20_000 + seed, 0)))
        .collect();
    let mut done = 0;
    for (index, (source, region)) in sources.iter().zip(&regions).enumerate() {
        let write = piece(pair.to_reader, index as u64, source, &region.remote);
        while pair.writer.transport.write(write.clone()) == Submission::Busy {
            assert!(matches!(
                pair.writer.next(),
                TransportEvent::WriteDone { .. }
            ));
            done += 1;
        }
    }
    while done < 64 {
        assert!(matches!(
            pair.writer.next(),
            TransportEvent::WriteDone {
                outcome: WriteOutcome::Sent,
                ..
            }
        ));
        done += 1;
    }
    for _ in 0..64 {
        assert!(matches!(pair.reader.next(), TransportEvent::Landed { .. }));
    }
    for (source, region) in sources.iter().zip(&regions) {
        assert_eq!(pair.reader.page_of(region.id).as_bytes(), source.as_bytes());
    }
}

pub(super) fn private_pages_fly_as_well_as_those_of_an_arena(start: Start) {
    let pair = pair(start);
    let private = |like: &Page| {
        let mut page = Page::zeroed(*like.shape());
        page.as_bytes_mut().copy_from_slice(like.as_bytes());
        page
    };
    // More than staging memory has room for at once, and one that does not fit in at all.
    let sizes = || {
        (1..=40)
            .map(|seed| (10_000 + seed, seed))
            .chain([(2_500_000, 41)])
    };
    let sources: Vec<_> = sizes()
        .map(|(elements, seed)| Arc::new(private(&page(elements, seed))))
        .collect();
    let regions: Vec<_> = sizes()
        .map(|(elements, _)| pair.reader.register(private(&page(elements, 0))))
        .collect();
    let mut open = 0;
    for (index, (source, region)) in sources.iter().zip(&regions).enumerate() {
        let write = piece(pair.to_reader, index as u64, source, &region.remote);
        while pair.writer.transport.write(write.clone()) == Submission::Busy {
            pair.writer.next();
            open -= 1;
        }
        open += 1;
    }
    for _ in 0..open {
        match pair.writer.next() {
            TransportEvent::WriteDone { outcome, .. } => assert_eq!(outcome, WriteOutcome::Sent),
            other => panic!("{other:?}"),
        }
    }
    for source in &sources {
        assert!(matches!(pair.reader.next(), TransportEvent::Landed { .. }));
        assert_eq!(Arc::strong_count(source), 1);
    }
    for (source, region) in sources.iter().zip(&regions) {
        assert!(pair.reader.page_of(region.id).as_bytes() == source.as_bytes());
    }
}

pub(super) fn a_region_that_is_gone_or_guessed_is_written_nowhere(start: Start) {
    let pair = pair(start);
    let source = Arc::new(page(1000, 5));
    let gone = pair.reader.register(page(1000, 0));
    let kept = pair.reader.register(page(1000, 0));
    assert!(matches!(
        pair.reader.transport.deregister(gone.id),
        Deregistered::Now(_)
    ));
    assert!(matches!(
        pair.reader.transport.deregister(gone.id),
        Deregistered::Unknown
    ));
    let mut guessed = kept.remote;
    guessed.key ^= 1;
    let mut nonsense = kept.remote;
    nonsense.id = u64::MAX;
    for target in [&gone.remote, &guessed, &nonsense] {
        let write = piece(pair.to_reader, 1, &source, target);
        assert_eq!(pair.writer.transport.write(write), Submission::Accepted);
        assert!(matches!(
            pair.writer.next(),
            TransportEvent::WriteDone { .. }
        ));
    }
    let sentinel = pair.reader.register(page(1000, 0));
    let write = piece(pair.to_reader, 2, &source, &sentinel.remote);
    assert_eq!(pair.writer.transport.write(write), Submission::Accepted);
    match pair.reader.next() {
        TransportEvent::Landed { region, .. } => assert_eq!(region, sentinel.id),
        other => panic!("{other:?}"),
    }
    assert!(
        pair.reader
            .page_of(kept.id)
            .as_bytes()
            .iter()
            .all(|byte| *byte == 0)
    );
}

pub(super) fn a_write_beyond_its_region_touches_nothing(start: Start) {
    let pair = pair(start);
    let source = Arc::new(page(1000, 5));
    let region = pair.reader.register(page(1000, 0));
    let mut write = piece(pair.to_reader, 1, &source, &region.remote);
    write.runs = Runs::new([Run::once(0, 1, source.as_bytes().len())]).unwrap();
    assert_eq!(pair.writer.transport.write(write), Submission::Accepted);
    assert!(matches!(
        pair.reader.next(),
        TransportEvent::PeerLost { .. }
    ));
    assert!(
        pair.reader
            .page_of(region.id)
            .as_bytes()
            .iter()
            .all(|byte| *byte == 0)
    );
}

pub(super) fn every_write_of_a_cancelled_transfer_is_done_once(start: Start) {
    let pair = pair(start);
    let source = Arc::new(page(500_000, 5));
    let region = pair.reader.register(page(500_000, 0));
    let mut accepted = 0;
    for _ in 0..40 {
        let write = piece(pair.to_reader, 9, &source, &region.remote);
        if pair.writer.transport.write(write) == Submission::Accepted {
            accepted += 1;
        }
    }
    assert!(accepted > 0);
    pair.writer.transport.cancel(pair.to_reader, TransferId(9));
    for _ in 0..accepted {
        match pair.writer.next() {
            TransportEvent::WriteDone {
                transfer, outcome, ..
            } => {
                assert_eq!(transfer, TransferId(9));
                assert_ne!(outcome, WriteOutcome::Lost);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(Arc::strong_count(&source), 1);
    // The connection lives on, and nothing was left over.
    assert_eq!(
        pair.reader
            .transport
            .notify(pair.to_writer, b"and now".to_vec()),
        Submission::Accepted
    );
    assert_eq!(pair.writer.message().1, b"and now");
}

pub(super) fn a_lost_peer_is_reported_once_and_last(start: Start) {
    let pair = pair(start);
    let source = Arc::new(page(500_000, 5));
    let region = pair.reader.register(page(500_000, 0));
    let mut open = 0;
    for _ in 0..8 {
        let write = piece(pair.to_reader, 9, &source, &region.remote);
        if pair.writer.transport.write(write) == Submission::Accepted {
            open += 1;
        }
    }
    pair.writer.transport.disconnect(pair.to_reader);
    loop {
        match pair.writer.next() {
            TransportEvent::WriteDone { .. } => open -= 1,
            TransportEvent::PeerLost { peer, .. } => {
                assert_eq!(peer, pair.to_reader);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(open, 0, "every write was done before the loss was reported");
    assert_eq!(Arc::strong_count(&source), 1);
    loop {
        match pair.reader.next() {
            TransportEvent::Landed { .. } => {}
            TransportEvent::PeerLost { peer, .. } => {
                assert_eq!(peer, pair.to_writer);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    pair.reader.page_of(region.id);
    assert_eq!(
        pair.writer.transport.notify(pair.to_reader, Vec::new()),
        Submission::Gone
    );
    let write = piece(pair.to_reader, 9, &source, &region.remote);
    assert_eq!(pair.writer.transport.write(write), Submission::Gone);
    drop(pair.writer.transport);
    assert!(pair.writer.events.recv_timeout(PATIENCE).is_err());
}

pub(super) fn a_peer_that_is_not_there_is_lost_with_what_was_meant_for_it(start: Start) {
    let node = Node::start(start);
    let endpoint = {
        let gone = Node::start(start);
        gone.transport.endpoint()
    };
    let source = Arc::new(page(10, 1));
    let peer = node
        .transport
        .connect(&endpoint, Instant::now() + PATIENCE)
        .unwrap();
    let target = RemoteRegion {
        bytes: 40,
        id: 0,
        key: 0,
    };
    let submission = node.transport.write(piece(peer, 1, &source, &target));
    let mut open = u32::from(submission == Submission::Accepted);
    loop {
        match node.next() {
            TransportEvent::WriteDone { outcome, .. } => {
                assert_eq!(outcome, WriteOutcome::Lost);
                open -= 1;
            }
            TransportEvent::PeerLost { peer: lost, .. } => {
                assert_eq!(lost, peer);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((open, Arc::strong_count(&source)), (0, 1));
    let mut other = endpoint;
    other.transport = "carrier-pigeon".to_owned();
    assert!(matches!(
        node.transport.connect(&other, Instant::now()),
        Err(ConnectError::Record(_))
    ));
}

pub(super) fn a_slow_reader_makes_busy_and_loses_nothing(start: Start) {
    let writer = Node::start(start);
    let (sender, events) = sync_channel(0);
    let reader = Node {
        transport: start(one_by_one(move |event| drop(sender.send(event)))),
        events,
    };
    let to_reader = writer.connect(&reader);
    let source = Arc::new(page(250_000, 5));
    let region = reader.register(page(250_000, 0));
    let mut accepted = 0_u32;
    while accepted < 10_000 {
        let write = piece(to_reader, 1, &source, &region.remote);
        match writer.transport.write(write) {
            Submission::Accepted => accepted += 1,
            Submission::Busy => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(accepted < 10_000, "the queue has a bound");
    for _ in 0..accepted {
        assert!(matches!(reader.next(), TransportEvent::Landed { .. }));
    }
    for _ in 0..accepted {
        assert!(matches!(writer.next(), TransportEvent::WriteDone { .. }));
    }
    assert_eq!(reader.page_of(region.id).as_bytes(), source.as_bytes());
}

pub(super) fn closing_ends_every_connection(start: Start) {
    let pair = pair(start);
    let idle = pair.reader.register(page(10, 0));
    pair.reader.transport.close();
    assert_eq!(pair.reader.lost().0, pair.to_writer);
    assert_eq!(pair.writer.lost().0, pair.to_reader);
    pair.reader.page_of(idle.id);
    assert!(pair.reader.transport.register(vec![page(10, 0)]).is_err());
    let endpoint = pair.writer.transport.endpoint();
    assert_eq!(
        pair.reader.transport.connect(&endpoint, Instant::now()),
        Err(ConnectError::Closed)
    );
}

pub(super) fn closing_lets_messages_out_first(start: Start) {
    let pair = pair(start);
    for _ in 0..100 {
        let message = vec![1; 10_000];
        assert_eq!(
            pair.writer.transport.notify(pair.to_reader, message),
            Submission::Accepted
        );
    }
    pair.writer.transport.close();
    for _ in 0..100 {
        assert_eq!(pair.reader.message().1.len(), 10_000);
    }
    pair.reader.lost();
}

/// The suite: each check once, for the tests of every transport and for whoever runs it under a launcher.
macro_rules! checks {
    ($with:ident $(, $more:tt)*) => {
        $with! { [$($more)*]
            any_range_of_any_size_lands_where_it_was_sent,
            strided_stretches_land_where_they_belong,
            rows_land_page_by_page,
            rows_that_are_none_are_refused_and_those_of_lost_regions_go_nowhere,
            sealed_regions_are_written_no_more_and_come_back_as_one,
            messages_go_both_ways_and_too_long_ones_nowhere,
            sixty_four_transfers_fly_at_once,
            private_pages_fly_as_well_as_those_of_an_arena,
            a_region_that_is_gone_or_guessed_is_written_nowhere,
            a_write_beyond_its_region_touches_nothing,
            every_write_of_a_cancelled_transfer_is_done_once,
            a_lost_peer_is_reported_once_and_last,
            a_peer_that_is_not_there_is_lost_with_what_was_meant_for_it,
            a_slow_reader_makes_busy_and_loses_nothing,
            closing_ends_every_connection,
            closing_lets_messages_out_first,
        }
    };
}

macro_rules! as_tests {
    ([$kind:ident] $($check:ident,)*) => {
        mod $kind {
            $(#[test] fn $check() { super::$check(crate::transport::$kind::start_for_tests); })*
        }
    };
}

macro_rules! as_list {
    ([] $($check:ident,)*) => {
        /// The suite by name.
        pub(crate) const CHECKS: &[(&str, fn(Start))] = &[$((stringify!($check), $check),)*];
    };
}

checks!(as_list);
checks!(as_tests, tcp);
checks!(as_tests, shm);
checks!(as_tests, nixl);
checks!(as_tests, ucx);
checks!(as_tests, memory);

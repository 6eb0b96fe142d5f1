//! Frames whose bytes come with the stream: whatever the network makes of their borders, each byte goes where it belongs.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Instant;

use proptest::prelude::*;
use smallvec::smallvec;

use super::{brisk, greeted, message_header, node, params};
use crate::page::Page;
use crate::transport::checksum::{sum, sum_of};
use crate::transport::conformance::{Node, PATIENCE, page};
use crate::transport::link::LinkParams;
use crate::transport::link::connection::Rousing;
use crate::transport::link::frame::{HEADER_BYTES, Header, Kind, Trailer};
use crate::transport::memory::into_channel;
use crate::transport::{
    Note, PeerId, RemoteRegion, Run, Runs, Submission, TransferId, Transport, TransportEvent,
    Write, shm, tcp,
};

/// What a peer sends.
#[derive(Debug, Clone)]
enum Sent {
    /// Payload bytes, cut into so many stretches, with a note of so many bytes.
    Piece(usize, usize, usize),
    Message(usize),
    Ping,
}

fn any_sent() -> impl Strategy<Value = Sent> {
    let piece = (0_usize..300_000, 1_usize..5, 0_usize..257);
    prop_oneof![
        4 => piece.prop_map(|(bytes, stretches, note)| Sent::Piece(bytes, stretches, note)),
        1 => (0_usize..3000).prop_map(Sent::Message),
        1 => Just(Sent::Ping),
    ]
}

/// A payload, and where its stretches go: with gaps between them.
fn payload(bytes: usize, stretches: usize, seed: usize) -> (Vec<u8>, Runs) {
    let source = page(bytes.div_ceil(4).max(1), seed);
    let each = bytes / stretches;
    let run = Run {
        source: 0,
        target: 3,
        bytes: each,
        count: stretches,
        source_stride: each,
        target_stride: each + 5,
    };
    (
        source.as_bytes()[..each * stretches].to_vec(),
        Runs::new([run]).unwrap(),
    )
}

fn write_frame(region: &RemoteRegion, note: &[u8], runs: &Runs, payload: &[u8]) -> Vec<u8> {
    let RemoteRegion { id, key, .. } = *region;
    let runs = runs.encode();
    // What the trailer brings is missing in the note.
    let mut sent = note.to_vec();
    let trailer = note.first_chunk().map(|whole| {
        sent[..whole.len()].fill(0);
        let mut trailer = vec![0; Trailer::bytes(1)];
        Trailer::of(0, smallvec![u64::from_le_bytes(*whole)]).encode_to(&mut trailer);
        trailer
    });
    let header = Header {
        kind: trailer.as_ref().map_or(Kind::Write, |_| Kind::Summed),
        more: payload.len().is_multiple_of(2),
        note_bytes: u16::try_from(note.len()).unwrap(),
        payload_bytes: payload.len() as u64,
        transfer: TransferId(7),
        region: id,
        key,
        extra_bytes: runs.len() as u64,
    };
    let trailer = trailer.as_ref().map_or(&[][..], |trailer| trailer);
    [&header.encode()[..], &sent, &runs, payload, trailer].concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn frames_mean_the_same_however_they_are_cut(
        sent in prop::collection::vec(any_sent(), 1..12),
        cuts in prop::collection::vec(1_usize..200_000, 1..8),
    ) {
        let node = node(brisk(), "");
        let mut stream = greeted(&node);
        let mut bytes = Vec::new();
        let mut expected = Vec::new();
        for (seed, sent) in (1..).zip(&sent) {
            match *sent {
                Sent::Piece(length, stretches, note) => {
                    let (payload, runs) = payload(length, stretches, seed);
                    let region = node.register(page(runs.target_end().div_ceil(4) + 1, 0));
                    let note = vec![u8::try_from(seed).unwrap(); note];
                    bytes.extend(write_frame(&region.remote, &note, &runs, &payload));
                    expected.push((Some((region.id, payload)), note));
                }
                Sent::Message(length) => {
                    let message = vec![u8::try_from(seed).unwrap(); length];
                    bytes.extend(Header::plain(Kind::Message, length as u64).encode());
                    bytes.extend(&message);
                    expected.push((None, message));
                }
                Sent::Ping => bytes.extend(Header::plain(Kind::Ping, 0).encode()),
            }
        }
        // The last frame is the one that is handed over at once.
        bytes.extend(Header::plain(Kind::Message, 0).encode());
        let mut rest = &bytes[..];
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            stream.write_all(now).unwrap();
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        for (piece, text) in expected {
            match (node.next(), piece) {
                (TransportEvent::Message { message, .. }, None) => prop_assert_eq!(message, text),
                (TransportEvent::Landed { region, runs, note, checksums, .. }, Some((id, payload))) => {
                    prop_assert_eq!((region, note.into_vec()), (id, text));
                    prop_assert_eq!(&checksums[..], &[Some(sum(&payload))]);
                    let page = match node.transport.deregister(id) {
                        crate::transport::Deregistered::Now(page) => page,
                        other => panic!("{other:?}"),
                    };
                    let landed: Vec<u8> = runs.stretches().flat_map(|(_, at)| page.as_bytes()[at].to_vec()).collect();
                    prop_assert!(landed == payload);
                    let touched: usize = page.as_bytes().iter().filter(|byte| **byte != 0).count();
                    prop_assert!(touched <= payload.len());
                }
                (event, piece) => panic!("{event:?} instead of {piece:?}"),
            }
        }
    }
}

/// A write of pages in three stretches each, to regions of that size, whose sums belong behind the first byte of its note.
fn to_be_summed(peer: PeerId, sources: &[Arc<Page>], first: &RemoteRegion) -> Write {
    let each = sources[0].as_bytes().len() / 4;
    let runs = [Run::once(3, 0, each), Run::once(2 * each, each, 2 * each)];
    Write {
        peer,
        transfer: TransferId(7),
        sources: sources.into(),
        target: *first,
        runs: Runs::new(runs).unwrap(),
        note: Note::from_elem(9, 2 + 8 * sources.len()),
        sum_at: Some(1),
    }
}

#[test]
fn a_write_is_summed_by_who_sends_it_where_that_is_asked_for() {
    let (reader, writer) = (node(brisk(), ""), node(brisk(), ""));
    assert!(writer.transport.sums_writes());
    let deadline = Instant::now() + PATIENCE;
    let peer = writer
        .transport
        .connect(&reader.transport.endpoint(), deadline)
        .unwrap();
    // Shorter and longer than what leaves at once, one after the other, and several together.
    let lengths = [4_000, 300_000, 70_000, 70_000, 4_000_000, 40_000, 100_000];
    for (seed, (length, count)) in (1..).zip(lengths.into_iter().zip([1, 1, 16, 1, 1, 3, 5])) {
        let source = |index: usize| Arc::new(page(length / 4, seed + 10 * index));
        let sources: Vec<_> = (0..count).map(source).collect();
        let targets = (0..count).map(|_| page(length / 4, 0)).collect();
        let regions = reader.register_all(targets);
        let write = to_be_summed(peer, &sources, &regions[0].remote);
        let sum_of = |source: &Arc<Page>| {
            let stretches = write.runs.stretches().map(|(from, _)| from);
            sum_of(source.as_bytes(), stretches)
        };
        let expected: Vec<u64> = sources.iter().map(sum_of).collect();
        assert_eq!(writer.transport.write(write), Submission::Accepted);
        match reader.next() {
            TransportEvent::Landed {
                note, checksums, ..
            } => {
                let sums = expected.iter().flat_map(|sum| sum.to_le_bytes());
                assert!(note[1..note.len() - 1].iter().copied().eq(sums));
                assert_eq!((note[0], note[note.len() - 1]), (9, 9));
                assert!(checksums.iter().copied().eq(expected.into_iter().map(Some)));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn who_does_not_sum_refuses_to() {
    let source = Arc::new(page(1000, 1));
    let (events, _kept) = channel();
    let sink = into_channel(events);
    let unsummed = LinkParams {
        leave_out_sums: true,
        ..params(brisk(), "")
    };
    let others: [Arc<dyn Transport>; 2] = [
        Arc::new(tcp::start(unsummed, Arc::clone(&sink)).unwrap()),
        Arc::new(shm::start(params(brisk(), ""), sink).unwrap()),
    ];
    let of = |transport: &dyn Transport| {
        let target = transport.register(vec![page(1000, 0)]).unwrap().first;
        let deadline = Instant::now() + PATIENCE;
        let peer = transport.connect(&transport.endpoint(), deadline).unwrap();
        to_be_summed(peer, std::slice::from_ref(&source), &target)
    };
    for transport in others {
        assert!(!transport.sums_writes());
        assert_eq!(transport.write(of(&*transport)), Submission::Invalid);
    }
    // Nor has a note room behind its end.
    let node = node(brisk(), "");
    for at in [3, usize::MAX] {
        let write = Write {
            sum_at: Some(at),
            ..of(&*node.transport)
        };
        assert_eq!(node.transport.write(write), Submission::Invalid);
    }
}

#[test]
fn a_peer_that_is_roused_all_the_time_gets_every_frame_whole() {
    let reader = node(brisk(), "");
    let (events, written) = channel();
    let writer = tcp::start(params(brisk(), ""), into_channel(events)).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let peer = writer
        .connect(&reader.transport.endpoint(), deadline)
        .unwrap();
    let connection = writer.shared.peer(peer).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) && Instant::now() < deadline {
                connection.rouse(Rousing::There);
            }
        });
        for seed in 1..30 {
            let source = Arc::new(page(1 + 9_973 * seed, seed));
            let bytes = source.as_bytes().len();
            let region = reader.register(page(bytes / 2, 0));
            let write = Write {
                runs: Runs::whole(bytes),
                sum_at: None,
                ..to_be_summed(peer, std::slice::from_ref(&source), &region.remote)
            };
            assert_eq!(writer.write(write), Submission::Accepted);
            match reader.next() {
                TransportEvent::Landed { checksums, .. } => {
                    assert_eq!(checksums[..], [Some(sum(source.as_bytes()))]);
                }
                other => panic!("{other:?}"),
            }
            let ended = written.recv_timeout(PATIENCE).unwrap();
            assert!(
                matches!(ended, TransportEvent::WriteDone { .. }),
                "{ended:?}"
            );
        }
        over.store(true, Ordering::Release);
    });
}

#[test]
fn nobody_sends_behind_a_frame_that_was_not_sent_to_its_end() {
    let source = Arc::new(page(1_000, 3));
    let target = RemoteRegion {
        bytes: 2_000,
        id: 1,
        key: 1,
    };
    for _ in 0..40 {
        let (events, heard) = channel();
        let faults = params(brisk(), "cut_after_bytes=700");
        let writer = Arc::new(tcp::start(faults, into_channel(events)).unwrap());
        let node = Node {
            events: heard,
            transport: Arc::clone(&writer) as Arc<dyn Transport>,
        };
        let mut stream = greeted(&node);
        stream.write_all(&message_header(0)).unwrap();
        let TransportEvent::Message { peer, .. } = node.next() else {
            panic!("a message came");
        };
        let connection = writer.shared.peer(peer).unwrap();
        let mut received = Vec::new();
        std::thread::scope(|scope| {
            // Until the peer is lost.
            scope.spawn(|| {
                while writer.shared.peer(peer).is_some() {
                    connection.rouse(Rousing::There);
                }
            });
            let write = Write {
                runs: Runs::whole(2_000),
                sum_at: None,
                ..to_be_summed(peer, std::slice::from_ref(&source), &target)
            };
            assert_eq!(writer.write(write), Submission::Accepted);
            stream.read_to_end(&mut received).unwrap();
            drop(stream);
        });
        // Nothing but frames that wake somebody before it, and nothing at all behind what was sent of it.
        let mut rest = &received[..];
        let write = loop {
            let (header, later) = rest.split_first_chunk::<HEADER_BYTES>().unwrap();
            rest = later;
            match Header::decode(header).unwrap() {
                header if header.kind == Kind::Rouse => {}
                header => break header,
            }
        };
        assert_eq!(write.kind, Kind::Write);
        let before = usize::from(write.note_bytes) + Runs::whole(2_000).encoded_bytes();
        let (sent, behind) = rest[before..].split_at(700);
        assert!(*sent == source.as_bytes()[..700]);
        assert!(behind.is_empty(), "{behind:?}");
    }
}

//! What is the control plane's own: strangers at the listener, peers that stop, deadlines, and the fault plan.

use std::io::{Read, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::channel;

use proptest::prelude::*;

use super::frame::{HEADER_BYTES, Header, Kind, MESSAGE_BYTES_MAX};
use super::*;
use crate::transport::conformance::{Node, PATIENCE, page};
use crate::transport::memory::into_channel;
use crate::transport::{Note, RemoteRegion, Runs, WriteOutcome, shm, tcp};

mod pulling;
mod streaming;

fn params(tuning: LinkTuning, faults: &str) -> LinkParams {
    LinkParams {
        bind_host: "127.0.0.1".to_owned(),
        bind_port: 0,
        advertise_host: "127.0.0.1".to_owned(),
        tuning,
        leave_out_sums: false,
        staging: StagingSize::default(),
        faults: FaultPlan::parse(faults).unwrap(),
    }
}

fn node(tuning: LinkTuning, faults: &str) -> Node {
    let (sender, events) = channel();
    let sink: TransportSink = into_channel(sender);
    Node {
        events,
        transport: Arc::new(tcp::start(params(tuning, faults), sink).unwrap()),
    }
}

/// Deadlines so short that a test that waits for them is quick, and so long that a busy machine meets the others.
pub(crate) fn brisk() -> LinkTuning {
    LinkTuning {
        handshake_timeout: Duration::from_secs(1),
        stall_timeout: Duration::from_secs(1),
        pull_timeout: Duration::from_secs(5),
        silence_limit: Duration::from_secs(2),
        peers_max: 64,
        vigil: Duration::ZERO,
    }
}

fn dial(node: &Node) -> TcpStream {
    let stream = TcpStream::connect(node.transport.endpoint().address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A greeting as a peer of this kind sends it.
fn hello(name: &str) -> Vec<u8> {
    let header = Header {
        note_bytes: u16::try_from(name.len()).unwrap(),
        ..Header::plain(Kind::Hello, 0)
    };
    [&header.encode()[..], name.as_bytes()].concat()
}

/// A connection whose greeting is done.
fn greeted(node: &Node) -> TcpStream {
    let mut stream = dial(node);
    stream.write_all(&hello("tcp")).unwrap();
    let mut hello = [0; HEADER_BYTES];
    stream.read_exact(&mut hello).unwrap();
    let length = Header::decode(&hello).unwrap().payload_bytes;
    let mut text = vec![0; 3 + usize::try_from(length).unwrap()];
    stream.read_exact(&mut text).unwrap();
    let address = node.transport.endpoint().address;
    assert_eq!(text, ["tcp", &address].concat().as_bytes());
    stream
}

/// Reads until the other side closes; true when it did within the patience.
fn is_closed(mut stream: TcpStream) -> bool {
    let mut scratch = [0; 4096];
    loop {
        match stream.read(&mut scratch) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

fn lost(node: &Node) -> String {
    match node.next() {
        TransportEvent::PeerLost { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

fn message_header(payload_bytes: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = Header::plain(Kind::Message, 0).encode();
    bytes[8..16].copy_from_slice(&payload_bytes.to_le_bytes());
    bytes
}

/// A write frame for a whole region, up to its payload.
fn write_header(region: &RemoteRegion, payload_bytes: u64) -> Vec<u8> {
    let RemoteRegion { id, key, .. } = *region;
    let runs = Runs::whole(usize::try_from(payload_bytes).unwrap()).encode();
    let header = Header {
        kind: Kind::Write,
        more: false,
        note_bytes: 0,
        payload_bytes,
        transfer: TransferId(1),
        region: id,
        key,
        extra_bytes: runs.len() as u64,
    };
    [&header.encode()[..], &runs].concat()
}

#[test]
fn strangers_are_shown_out() {
    let node = node(brisk(), "");
    let mut other_version = hello("tcp");
    other_version[5] += 1;
    let not_a_hello = Header::plain(Kind::Ping, 0).encode();
    let mut oversize_hello = Header::plain(Kind::Hello, 0).encode();
    oversize_hello[15] = 0xff;
    let other_kind = hello("carrier-pigeon");
    let strangers: [&[u8]; 6] = [
        &other_kind,
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
        &other_version,
        &not_a_hello,
        &oversize_hello,
        &[0x16, 3, 1, 2, 0],
    ];
    for bytes in strangers {
        let mut stream = dial(&node);
        stream.write_all(bytes).unwrap();
        assert!(is_closed(stream), "{bytes:?}");
    }
    // One that says nothing at all is shown out too, and one that only connects leaves no trace.
    assert!(is_closed(dial(&node)));
    drop(dial(&node));
    assert!(node.events.try_recv().is_err(), "strangers make no events");
    drop(greeted(&node));
    assert_eq!(lost(&node), "closed by the peer");
}

#[test]
fn a_peer_that_breaks_the_protocol_is_lost_with_the_reason() {
    let node = node(brisk(), "");
    let oversize = message_header(MESSAGE_BYTES_MAX as u64 + 1);
    let second_hello = Header::plain(Kind::Hello, 0).encode();
    let region = node.register(page(100, 0));
    let beyond = write_header(&region.remote, 401);
    let mut no_runs = write_header(&region.remote, 400);
    no_runs[8] += 1;
    let mut arena = Header::numbered(Kind::Arena, 1, 1).encode().to_vec();
    arena.push(0);
    let pulled = [
        &Header::plain(Kind::Pulled, 8).encode()[..],
        &77_u64.to_le_bytes(),
    ]
    .concat();
    let cases: [(&[u8], &str); 7] = [
        (&arena, "Arena frame though bytes come with the stream here"),
        (&pulled, "end of a write 77 that was not described"),
        (&oversize, "at most"),
        (&second_hello, "second greeting"),
        (&beyond, "up to byte 401 of a region of 400"),
        (&no_runs, "runs of 400 bytes in a frame of 401"),
        (&[7; HEADER_BYTES], "not a kv transport frame"),
    ];
    for (bytes, expected) in cases {
        let mut stream = greeted(&node);
        stream.write_all(bytes).unwrap();
        let reason = lost(&node);
        assert!(reason.contains(expected), "{reason}");
    }
}

#[test]
fn a_peer_that_rouses_is_heard_as_before() {
    for vigil in [Duration::ZERO, Duration::from_millis(5)] {
        let node = node(LinkTuning { vigil, ..brisk() }, "");
        let mut stream = greeted(&node);
        let rouse = Header::plain(Kind::Rouse, 0).encode();
        let frames = [&rouse[..], &message_header(2), b"hi", &rouse];
        stream.write_all(&frames.concat()).unwrap();
        match node.next() {
            TransportEvent::Message { message, .. } => assert_eq!(message, b"hi"),
            other => panic!("{other:?}"),
        }
        // What wakes somebody has nothing to say.
        let too_much = [&Header::plain(Kind::Rouse, 1).encode()[..], b"!"].concat();
        stream.write_all(&too_much).unwrap();
        assert!(lost(&node).contains("Rouse"));
    }
}

#[test]
fn a_truncated_message_is_no_message() {
    let node = node(brisk(), "");
    let mut stream = greeted(&node);
    stream.write_all(&message_header(100)).unwrap();
    stream.write_all(&[1; 50]).unwrap();
    drop(stream);
    assert_eq!(lost(&node), "closed by the peer within a frame");
}

#[test]
fn a_page_under_a_stalled_write_is_quarantined_until_the_peer_is_lost() {
    let (sender, events) = channel();
    let sink: TransportSink = into_channel(sender);
    let tcp = Arc::new(tcp::start(params(brisk(), ""), sink).unwrap());
    let node = Node {
        events,
        transport: Arc::clone(&tcp) as Arc<dyn Transport>,
    };
    let region = node.register(page(100_000, 0));
    let mut stream = greeted(&node);
    stream
        .write_all(&write_header(&region.remote, 400_000))
        .unwrap();
    stream.write_all(&[9; 1000]).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !tcp.shared.regions.is_being_written(region.id) {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert!(matches!(
        node.transport.deregister(region.id),
        Deregistered::Later
    ));
    match node.next() {
        TransportEvent::PageReleased { region: id, page } => {
            assert_eq!(id, region.id);
            assert_eq!(page.as_bytes()[999], 9);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(lost(&node), "no byte for 1s within a frame");
}

#[test]
fn a_silent_peer_is_lost_and_a_pinging_one_is_not() {
    let node = node(brisk(), "");
    let silent = greeted(&node);
    let alive = self::node(brisk(), "");
    let deadline = Instant::now() + PATIENCE;
    let peer = alive
        .transport
        .connect(&node.transport.endpoint(), deadline)
        .unwrap();
    assert_eq!(lost(&node), "silent for 2s");
    drop(silent);
    assert_eq!(
        alive.transport.notify(peer, b"still here".to_vec()),
        Submission::Accepted
    );
    assert!(matches!(node.next(), TransportEvent::Message { .. }));
}

#[test]
fn a_peer_that_takes_no_bytes_is_lost_and_frees_the_source() {
    let tuning = LinkTuning {
        silence_limit: PATIENCE,
        ..brisk()
    };
    let node = node(tuning, "");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = EndpointRecord {
        transport: "tcp".to_owned(),
        address: listener.local_addr().unwrap().to_string(),
        metadata: String::new(),
    };
    let peer = node
        .transport
        .connect(&endpoint, Instant::now() + PATIENCE)
        .unwrap();
    let (mut stopped, _) = listener.accept().unwrap();
    stopped.write_all(&hello("tcp")).unwrap();
    let source = Arc::new(page(10_000_000, 1));
    let write = Write {
        peer,
        transfer: TransferId(1),
        runs: Runs::whole(source.as_bytes().len()),
        sources: Arc::clone(&source).into(),
        target: RemoteRegion {
            bytes: 0,
            id: 0,
            key: 0,
        },
        note: Note::new(),
        sum_at: None,
    };
    assert_eq!(node.transport.write(write), Submission::Accepted);
    match node.next() {
        TransportEvent::WriteDone { outcome, .. } => assert_eq!(outcome, WriteOutcome::Lost),
        other => panic!("{other:?}"),
    }
    assert_eq!(Arc::strong_count(&source), 1);
    assert_eq!(lost(&node), "no byte taken for 1s");
    drop(stopped);
}

#[test]
fn connections_have_a_bound() {
    let tuning = LinkTuning {
        peers_max: 4,
        ..brisk()
    };
    let node = node(tuning, "");
    let kept: Vec<_> = (0..4).map(|_| greeted(&node)).collect();
    assert!(is_closed(dial(&node)));
    let endpoint = node.transport.endpoint();
    assert_eq!(
        node.transport.connect(&endpoint, Instant::now()),
        Err(ConnectError::TooMany(4))
    );
    drop(kept);
}

#[test]
fn no_wildcard_is_advertised() {
    for host in ["", "0.0.0.0", "::", "[::]"] {
        let params = LinkParams {
            advertise_host: host.to_owned(),
            ..params(LinkTuning::default(), "")
        };
        let error = tcp::start(params, Arc::new(|_| {})).unwrap_err();
        assert!(matches!(error, LinkStartError::Advertise(_)), "{error}");
    }
    let params = LinkParams {
        bind_host: "0.0.0.0".to_owned(),
        ..params(LinkTuning::default(), "")
    };
    let transport = tcp::start(params, Arc::new(|_| {})).unwrap();
    assert!(transport.endpoint().address.starts_with("127.0.0.1:"));
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let params = LinkParams {
        bind_port: taken.local_addr().unwrap().port(),
        ..params(LinkTuning::default(), "")
    };
    let error = tcp::start(params.clone(), Arc::new(|_| {})).unwrap_err();
    let expected = format!(
        "kv transport: cannot listen on 127.0.0.1:{}",
        params.bind_port
    );
    assert!(error.to_string().starts_with(&expected), "{error}");
}

/// How a kind of transport is started.
type Start = fn(LinkParams, TransportSink) -> Result<LinkTransport, LinkStartError>;

fn node_of(start: Start, faults: &str) -> Node {
    let (sender, events) = channel();
    let sink: TransportSink = into_channel(sender);
    Node {
        events,
        transport: Arc::new(start(params(brisk(), faults), sink).unwrap()),
    }
}

/// Sends one page from a node with a fault plan; returns the receiving node's first event, and its region's page.
fn send_with(start: Start, faults: &str) -> (TransportEvent, Arc<Page>, Page) {
    let (writer, reader) = (node_of(start, faults), node_of(start, ""));
    let deadline = Instant::now() + PATIENCE;
    let peer = writer
        .transport
        .connect(&reader.transport.endpoint(), deadline)
        .unwrap();
    let source = Arc::new(page(50_000, 3));
    let region = reader.register(page(50_000, 0));
    let write = Write {
        peer,
        transfer: TransferId(1),
        sources: Arc::clone(&source).into(),
        target: region.remote,
        runs: Runs::whole(200_000),
        note: Note::new(),
        sum_at: None,
    };
    assert_eq!(writer.transport.write(write), Submission::Accepted);
    let event = reader.next();
    match reader.transport.deregister(region.id) {
        Deregistered::Now(page) => (event, source, page),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_fault_plan_flips_one_byte() {
    for start in [tcp::start as Start, shm::start] {
        let (event, source, landed) = send_with(start, "flip_byte=123456");
        assert!(matches!(event, TransportEvent::Landed { .. }), "{event:?}");
        let differing: Vec<_> = (0..200_000)
            .filter(|at| source.as_bytes()[*at] != landed.as_bytes()[*at])
            .collect();
        assert_eq!(differing, [123_456]);
    }
}

#[test]
fn the_fault_plan_cuts_and_stalls_what_is_pulled_too() {
    for (faults, expected) in [
        ("cut_after_bytes=100000", "within a frame"),
        ("stall_after_bytes=100000", "no byte for 1s"),
    ] {
        let (event, _, landed) = send_with(shm::start, faults);
        let TransportEvent::PeerLost { reason, .. } = event else {
            panic!("{event:?}");
        };
        assert!(reason.contains(expected), "{reason}");
        assert!(landed.as_bytes().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn the_fault_plan_cuts_and_stalls() {
    for (faults, expected) in [
        ("cut_after_bytes=100000", "within a frame"),
        ("stall_after_bytes=100000", "no byte for 1s"),
    ] {
        let (event, source, landed) = send_with(tcp::start, faults);
        let TransportEvent::PeerLost { reason, .. } = event else {
            panic!("{event:?}");
        };
        assert!(reason.contains(expected), "{reason}");
        assert_eq!(landed.as_bytes()[..100_000], source.as_bytes()[..100_000]);
        assert!(landed.as_bytes()[100_000..].iter().all(|byte| *byte == 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn random_bytes_at_the_listener_end_that_connection_only(
        bytes in proptest::collection::vec(any::<u8>(), 1..300),
        greet in any::<bool>(),
        framed in any::<bool>(),
    ) {
        let node = node(brisk(), "");
        let mut stream = if greet { greeted(&node) } else { dial(&node) };
        let mut frame = bytes;
        if framed && frame.len() > 6 {
            let plain = Header::plain(Kind::Write, 0).encode();
            frame[..4].copy_from_slice(&plain[..4]);
            frame[4] %= 8;
            frame[5] = plain[5];
        }
        // The other side may have closed by now.
        drop(stream.write_all(&frame));
        drop(stream.shutdown(std::net::Shutdown::Write));
        prop_assert!(is_closed(stream));
        drop(greeted(&node));
    }
}

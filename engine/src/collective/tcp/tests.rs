//! The contract over real connections of this machine, and what only these can suffer.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use super::*;
use crate::collective::conformance::CHECKS;

/// Longer than any healthy call takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// For ranks that are silent on purpose.
const SHORT: Duration = Duration::from_millis(300);

fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (back, _) = listener.accept().unwrap();
    for stream in [&out, &back] {
        stream.set_nodelay(true).unwrap();
        stream.set_nonblocking(true).unwrap();
    }
    (out, back)
}

fn names(size: usize) -> RankNames {
    let hosts: Vec<String> = (0..size).map(|rank| format!("node{}", rank / 2)).collect();
    RankNames::new(&hosts)
}

fn ranks(size: usize, peer_timeout: Duration) -> Vec<TcpGroup> {
    let mut streams: Vec<Vec<Option<TcpStream>>> = (0..size)
        .map(|_| (0..size).map(|_| None).collect())
        .collect();
    let pairs = (0..size).flat_map(|high| (0..high).map(move |low| (low, high)));
    for (low, high) in pairs {
        let (out, back) = connected();
        streams[high][low] = Some(out);
        streams[low][high] = Some(back);
    }
    streams
        .into_iter()
        .enumerate()
        .map(|(rank, streams)| TcpGroup::new(rank, streams, names(size), peer_timeout))
        .collect()
}

/// A thread for each rank; gives what they return, by rank.
fn all<T: Send>(groups: Vec<TcpGroup>, work: impl Fn(TcpGroup) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = groups
            .into_iter()
            .map(|group| scope.spawn(|| work(group)))
            .collect();
        threads.into_iter().map(|one| one.join().unwrap()).collect()
    })
}

fn conforms(size: usize) {
    all(ranks(size, PATIENCE), |mut group| {
        assert_eq!(group.name(), "tcp");
        for (name, check) in CHECKS {
            eprintln!("rank {}: {name}", group.rank());
            check(&mut group);
        }
    });
}

#[test]
fn two_ranks_conform() {
    conforms(2);
}

#[test]
fn three_ranks_conform() {
    conforms(3);
}

#[test]
fn four_ranks_conform() {
    conforms(4);
}

#[test]
fn eight_ranks_conform() {
    conforms(8);
}

#[test]
fn a_rank_alone_needs_nobody() {
    let mut group = ranks(1, PATIENCE).remove(0);
    let mut values = [1.5, -2.0];
    group.all_reduce_sum(0..1, &mut values).unwrap();
    group.broadcast(&mut vec![1]).unwrap();
    assert_eq!(values, [1.5, -2.0]);
}

/// Two ranks that both sum so much that the second half waits in neither kernel.
#[test]
fn megabytes_both_ways_do_not_block_each_other() {
    let sums = all(ranks(2, PATIENCE), |mut group| {
        let mut values = vec![1.0; 9 << 20];
        group.all_reduce_sum(0..2, &mut values).unwrap();
        values.iter().all(|value| *value == 2.0)
    });
    assert_eq!(sums, [true, true]);
}

#[test]
fn a_rank_that_ends_is_named_by_all_who_wait_for_it() {
    let errors = all(ranks(4, PATIENCE), |mut group| {
        if group.rank() == 3 {
            return None;
        }
        Some(group.all_reduce_sum(0..4, &mut [1.0; 1000]).unwrap_err())
    });
    for error in errors.into_iter().flatten() {
        let text = error.to_string();
        // Who hears it from another rank first is told the same.
        assert!(text.contains("lost rank 3 (node1)"), "{text}");
        assert!(text.contains("summing 1000 values"), "{text}");
        assert!(text.contains("closed") || text.contains("reset"), "{text}");
    }
}

/// Rank 0 waits for rank 1 alone, which waits for rank 2, which is gone.
#[test]
fn the_first_cause_is_passed_on() {
    let errors = all(ranks(3, PATIENCE), |mut group| {
        let mut message = Vec::new();
        match group.rank() {
            0 => group.receive(1, &mut message).err(),
            1 => group.receive(2, &mut message).err(),
            _ => None,
        }
    });
    assert_eq!(
        errors[0].as_ref().unwrap().to_string(),
        "lost rank 1 (node0) while waiting for its message: it gave up: lost rank 2 (node1) while \
         waiting for its message: the connection was closed"
    );
}

#[test]
fn after_a_failure_every_call_fails_the_same() {
    let errors = all(ranks(2, PATIENCE), |mut group| {
        (group.rank() == 0).then(|| {
            let first = group.broadcast_until_it_fails();
            let second = group.send(1, b"hello").unwrap_err();
            (first, second)
        })
    });
    let (first, second) = errors.into_iter().flatten().next().unwrap();
    assert_eq!(first, second);
}

impl TcpGroup {
    fn broadcast_until_it_fails(&mut self) -> CollectiveError {
        loop {
            if let Err(error) = self.broadcast(&mut vec![0; 1 << 20]) {
                return error;
            }
        }
    }
}

/// Rank 1 lives and says nothing, until rank 0 has given up.
fn with_a_silent_peer(call: impl Fn(&mut TcpGroup) -> CollectiveError + Sync) -> CollectiveError {
    let (done, wait): (Sender<()>, Receiver<()>) = channel();
    let mut groups = ranks(2, SHORT);
    let silent = groups.pop().unwrap();
    let mut group = groups.pop().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // It ends when the other side is dropped.
            wait.recv_timeout(PATIENCE).unwrap_err();
            drop(silent);
        });
        let start = Instant::now();
        let error = call(&mut group);
        assert!(start.elapsed() >= SHORT && start.elapsed() < PATIENCE);
        drop(done);
        error
    })
}

fn assert_silent(error: &CollectiveError, doing: &str) {
    match error {
        CollectiveError::TimedOut {
            peer,
            doing: what,
            waited_ms,
        } => {
            assert_eq!((peer.as_str(), what.as_str()), ("rank 1 (node0)", doing));
            assert!(*waited_ms >= SHORT.as_millis());
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_silent_rank_is_not_waited_for_for_ever() {
    let error = with_a_silent_peer(|group| group.receive(1, &mut Vec::new()).unwrap_err());
    assert_silent(&error, "waiting for its message");
    let error = with_a_silent_peer(|group| group.all_reduce_sum(0..2, &mut [0.0]).unwrap_err());
    assert_silent(&error, "summing 1 values");
}

#[test]
fn a_rank_that_stops_reading_is_not_waited_for_for_ever() {
    let error = with_a_silent_peer(TcpGroup::broadcast_until_it_fails);
    assert_silent(&error, "telling all ranks 1048576 bytes");
}

/// A slow peer is no silent one: what counts is that something moves.
#[test]
fn a_slow_rank_is_waited_for() {
    let (out, back) = connected();
    let limit = Duration::from_secs(1);
    let mut group = TcpGroup::new(0, vec![None, Some(out)], names(2), limit);
    let body = [7_u8; 8];
    let header = frame::Header {
        kind: Kind::Message,
        sequence: 0,
        body_bytes: 8,
    };
    let (_keep, pause) = channel::<()>();
    let waited = std::thread::scope(|scope| {
        scope.spawn(move || {
            for byte in header.encode().iter().chain(&body) {
                (&back).write_all(&[*byte]).unwrap();
                // A pause between the bytes: nothing ever comes.
                pause.recv_timeout(limit / 12).unwrap_err();
            }
        });
        let start = Instant::now();
        let mut message = Vec::new();
        group.receive(1, &mut message).unwrap();
        assert_eq!(message, body);
        start.elapsed()
    });
    assert!(waited > limit, "{waited:?}");
}

/// What rank 0 says to a peer that sends these bytes.
fn answer_to(bytes: &[u8]) -> CollectiveError {
    let (out, back) = connected();
    let mut group = TcpGroup::new(0, vec![None, Some(out)], names(2), PATIENCE);
    (&back).write_all(bytes).unwrap();
    let error = group.receive(1, &mut Vec::new()).unwrap_err();
    drop(group);
    error
}

fn assert_protocol(error: &CollectiveError, wanted: &str) {
    match error {
        CollectiveError::Protocol { peer, reason, .. } => {
            assert_eq!(peer, "rank 1 (node0)");
            assert!(reason.contains(wanted), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_not_due_ends_the_group() {
    assert_protocol(&answer_to(b"HTTP/1.1 400 Bad Request\r\n"), "is no header");
    let header = |kind, sequence, body_bytes| {
        frame::Header {
            kind,
            sequence,
            body_bytes,
        }
        .encode()
    };
    let sum = header(Kind::Sum, 0, 4);
    assert_protocol(&answer_to(&sum), "a part of a sum where a message was due");
    let late = header(Kind::Message, 1, 0);
    assert_protocol(&answer_to(&late), "message 1 where 0 was due");
    let huge = header(Kind::Message, 0, u32::MAX);
    assert_protocol(&answer_to(&huge), "4294967295 bytes is over the limit");
}

#[test]
fn a_sum_of_another_length_is_told_apart() {
    let errors = all(ranks(2, PATIENCE), |mut group| {
        let mut values = vec![0.0; 10 + group.rank()];
        group.all_reduce_sum(0..2, &mut values).unwrap_err()
    });
    assert!(
        errors.iter().any(
            |error| error.to_string().contains("44 bytes where 40 were due")
                || error.to_string().contains("40 bytes where 44 were due")
        ),
        "{errors:?}"
    );
}

/// What a rank sends while another is busy sending is taken in, so that a ring of senders comes round.
#[test]
fn a_ring_of_large_messages_comes_round() {
    let bytes = 24 << 20;
    let whole = all(ranks(3, PATIENCE), |mut group| {
        let rank = group.rank();
        group.send((rank + 1) % 3, &vec![1; bytes]).unwrap();
        let mut came = Vec::new();
        group.receive((rank + 2) % 3, &mut came).unwrap();
        came.len()
    });
    assert_eq!(whole, [bytes; 3]);
}

/// A peer that died in the middle of a message.
#[test]
fn half_a_message_is_a_loss() {
    let (out, mut back) = connected();
    let mut group = TcpGroup::new(0, vec![None, Some(out)], names(2), PATIENCE);
    let header = frame::Header {
        kind: Kind::Message,
        sequence: 0,
        body_bytes: 100,
    };
    back.write_all(&header.encode()).unwrap();
    back.write_all(&[0; 40]).unwrap();
    back.shutdown(std::net::Shutdown::Write).unwrap();
    let error = group.receive(1, &mut Vec::new()).unwrap_err();
    assert!(matches!(error, CollectiveError::Lost { .. }), "{error:?}");
    // The farewell says why.
    back.set_nonblocking(false).unwrap();
    let mut farewell = Vec::new();
    drop(group);
    back.read_to_end(&mut farewell).unwrap();
    assert!(
        String::from_utf8_lossy(&farewell).contains("lost rank 1 (node0)"),
        "{farewell:?}"
    );
}

//! Groups that come together over loopback, and all the ways in which they must not.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::*;
use crate::collective::Collective;
use crate::ranks::Fabric;

/// Longer than any join takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// For joins that must fail.
const SHORT: Duration = Duration::from_millis(700);

fn leader_ranks(secret: &Secret, join_timeout: Duration) -> LeaderRanks {
    LeaderRanks {
        identity: "job 7 step 0 ctx0 epoch 1".to_owned(),
        secret: secret.clone(),
        host: "127.0.0.1".to_owned(),
        hosts: (0..8).map(|rank| format!("node{}", rank / 2)).collect(),
        join_timeout,
        peer_timeout: PATIENCE,
        fabric: Fabric::Tcp,
        call: Arc::new(|_| Ok(())),
    }
}

fn spec(ranks: &LeaderRanks, leader: &Leader, rank: usize, size: usize) -> FollowerSpec {
    FollowerSpec {
        rank,
        size,
        leader: leader.address(),
        identity: ranks.identity.clone(),
        secret: ranks.secret.to_hex(),
        host: ranks.host.clone(),
        hosts: ranks.hosts.clone(),
        join_timeout_ms: u64::try_from(PATIENCE.as_millis()).unwrap(),
        peer_timeout_ms: u64::try_from(PATIENCE.as_millis()).unwrap(),
        fabric: Fabric::Tcp,
        num_threads: None,
    }
}

fn go() -> AtomicBool {
    AtomicBool::new(false)
}

/// Sums over all, so that every connection of a rank is used.
fn rank_sum(mut group: TcpGroup) -> f32 {
    let size = group.size();
    let mut values = [f32::from(u16::try_from(group.rank()).unwrap())];
    group.all_reduce_sum(0..size, &mut values).unwrap();
    values[0]
}

/// Has the ranks meet, each follower in its own thread.
fn sums(size: usize) -> Vec<f32> {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let leader = Leader::bind(&ranks).unwrap();
    std::thread::scope(|scope| {
        let followers: Vec<_> = (1..size)
            .map(|rank| {
                let spec = spec(&ranks, &leader, rank, size);
                scope.spawn(move || rank_sum(join(&spec, &go()).unwrap()))
            })
            .collect();
        let first = rank_sum(leader.gather(size, &ranks, &go()).unwrap());
        let others = followers.into_iter().map(|one| one.join().unwrap());
        std::iter::once(first).chain(others).collect()
    })
}

#[test]
fn ranks_meet() {
    assert_eq!(sums(1), [0.0]);
    assert_eq!(sums(2), [1.0; 2]);
    assert_eq!(sums(5), [10.0; 5]);
    assert_eq!(sums(16), [120.0; 16]);
}

#[test]
fn a_follower_may_be_there_before_its_leader() {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let free = Leader::bind(&ranks).unwrap();
    let address = free.address();
    let spec = spec(&ranks, &free, 1, 2);
    drop(free);
    std::thread::scope(|scope| {
        let (ended, end) = std::sync::mpsc::channel();
        scope.spawn(move || ended.send(join(&spec, &go()).map(rank_sum)).unwrap());
        // Nobody listens for a while.
        end.recv_timeout(SHORT).expect_err("it gave up at once");
        let listener = TcpListener::bind(&address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let leader = Leader { listener, address };
        let first = rank_sum(leader.gather(2, &ranks, &go()).unwrap());
        assert_eq!(first, 1.0);
        assert_eq!(end.recv_timeout(PATIENCE).unwrap(), Ok(1.0));
    });
}

#[test]
fn who_is_missing_is_named_at_the_deadline() {
    let ranks = leader_ranks(&Secret::generate(), SHORT);
    let leader = Leader::bind(&ranks).unwrap();
    let spec = spec(&ranks, &leader, 2, 4);
    std::thread::scope(|scope| {
        let follower = scope.spawn(|| join(&spec, &go()).unwrap_err());
        let error = leader.gather(4, &ranks, &go()).unwrap_err().to_string();
        assert!(
            error.starts_with(
                "after 0 s still waiting for rank 1 (node0), rank 3 (node1) to join\nhint: "
            ),
            "{error}"
        );
        let error = follower.join().unwrap().to_string();
        assert_eq!(
            error,
            "lost rank 0 (node0) while waiting for rank 0 (node0) to gather all ranks: \
             the connection was closed"
        );
    });
}

#[test]
fn a_leader_that_is_not_there_is_named() {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let gone = Leader::bind(&ranks).unwrap();
    let mut spec = spec(&ranks, &gone, 1, 2);
    spec.join_timeout_ms = 500;
    drop(gone);
    let error = join(&spec, &go()).unwrap_err().to_string();
    assert!(
        error.contains("waiting for rank 0 (node0) at 127.0.0.1:"),
        "{error}"
    );
    assert!(error.contains("refused"), "{error}");
}

#[test]
fn the_stop_flag_ends_both_sides_soon() {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let leader = Leader::bind(&ranks).unwrap();
    let spec = spec(&ranks, &leader, 1, 3);
    let stop = go();
    std::thread::scope(|scope| {
        let follower = scope.spawn(|| join(&spec, &stop).unwrap_err());
        let gathering = scope.spawn(|| leader.gather(3, &ranks, &stop).unwrap_err());
        stop.store(true, Ordering::Relaxed);
        let start = Instant::now();
        let ended = [follower.join().unwrap(), gathering.join().unwrap()];
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(matches!(ended[1], GroupError::Stopped { .. }), "{ended:?}");
    });
}

/// How a follower with these facts is answered by a leader that waits for two more.
fn answer(change: impl Fn(&mut FollowerSpec)) -> GroupError {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let leader = Leader::bind(&ranks).unwrap();
    let mut wrong = spec(&ranks, &leader, 1, 2);
    change(&mut wrong);
    let right = spec(&ranks, &leader, 1, 2);
    std::thread::scope(|scope| {
        let gathering = scope.spawn(|| rank_sum(leader.gather(2, &ranks, &go()).unwrap()));
        let error = join(&wrong, &go()).unwrap_err();
        // The leader goes on waiting for the right one.
        assert_eq!(rank_sum(join(&right, &go()).unwrap()), 1.0);
        assert_eq!(gathering.join().unwrap(), 1.0);
        error
    })
}

fn assert_refused(error: &GroupError, wanted: &str) {
    match error {
        GroupError::Refused { peer, reason, .. } => {
            assert_eq!((peer.as_str(), reason.as_str()), ("rank 0 (node0)", wanted));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_does_not_belong_here_is_turned_away() {
    let error = answer(|spec| spec.identity = "job 7 step 0 ctx0 epoch 0".to_owned());
    let wanted = "this is `job 7 step 0 ctx0 epoch 1`, not `job 7 step 0 ctx0 epoch 0`";
    assert_refused(&error, wanted);
    let error = answer(|spec| spec.size = 3);
    assert_refused(&error, "this group has 2 ranks, not 3");
    let error = answer(|spec| spec.secret = Secret::generate().to_hex());
    assert_refused(&error, "the job secrets differ");
}

#[test]
fn wrong_facts_are_told_before_anything_is_opened() {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let leader = Leader::bind(&ranks).unwrap();
    for (rank, size) in [(0, 2), (2, 2), (5, 2)] {
        let error = join(&spec(&ranks, &leader, rank, size), &go()).unwrap_err();
        assert!(matches!(error, GroupError::Facts(_)), "{error:?}");
    }
    let mut broken = spec(&ranks, &leader, 1, 2);
    broken.secret = "tell nobody".to_owned();
    let error = join(&broken, &go()).unwrap_err().to_string();
    assert!(error.contains("64 hexadecimal digits"), "{error}");
    assert!(!error.contains("tell nobody"), "{error}");
    let mut ranks = ranks;
    ranks.host = "192.0.2.1".to_owned();
    let error = Leader::bind(&ranks).unwrap_err().to_string();
    assert!(
        error.contains("`192.0.2.1`") && error.contains("hint: "),
        "{error}"
    );
    ranks.host = "0.0.0.0".to_owned();
    let error = Leader::bind(&ranks).unwrap_err().to_string();
    assert!(error.contains("wildcard"), "{error}");
}

#[test]
fn a_rank_comes_once() {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let leader = Leader::bind(&ranks).unwrap();
    let twice = spec(&ranks, &leader, 1, 3);
    let last = spec(&ranks, &leader, 2, 3);
    std::thread::scope(|scope| {
        let gathering = scope.spawn(|| rank_sum(leader.gather(3, &ranks, &go()).unwrap()));
        let (done, first) = std::sync::mpsc::channel();
        for _ in 0..2 {
            let (twice, done) = (twice.clone(), done.clone());
            scope.spawn(move || done.send(join(&twice, &go()).map(rank_sum)).unwrap());
        }
        let error = first.recv_timeout(PATIENCE).unwrap().unwrap_err();
        assert_refused(&error, "rank 1 is there already");
        assert_eq!(rank_sum(join(&last, &go()).unwrap()), 3.0);
        assert_eq!(first.recv_timeout(PATIENCE).unwrap(), Ok(3.0));
        assert_eq!(gathering.join().unwrap(), 3.0);
    });
}

#[test]
fn foreign_and_silent_connections_hold_up_nobody() {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let leader = Leader::bind(&ranks).unwrap();
    let address = leader.address();
    let right = spec(&ranks, &leader, 1, 2);
    // More than may be unproved at once; none of them says anything.
    let silent: Vec<TcpStream> = (0..300)
        .map_while(|_| TcpStream::connect(&address).ok())
        .collect();
    assert_eq!(silent.len(), 300);
    let mut foreign = TcpStream::connect(&address).unwrap();
    foreign
        .write_all(b"GET / HTTP/1.1\r\nHost: baton\r\n\r\n")
        .unwrap();
    std::thread::scope(|scope| {
        let gathering = scope.spawn(|| rank_sum(leader.gather(2, &ranks, &go()).unwrap()));
        assert_eq!(rank_sum(join(&right, &go()).unwrap()), 1.0);
        assert_eq!(gathering.join().unwrap(), 1.0);
    });
    let mut answer = Vec::new();
    // Unread bytes on the other side make it a reset; either way it ends.
    drop(foreign.read_to_end(&mut answer));
    assert!(answer.len() <= 40, "it was told no more than the greeting");
}

#[test]
fn a_connection_that_proves_nothing_in_time_is_closed() {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let (listener, address) = socket::listen("127.0.0.1").unwrap();
    let party = Party {
        identity: ranks.identity.clone(),
        secret: ranks.secret.clone(),
        rank: 0,
        size: 2,
        address: address.clone(),
        peer_timeout: PATIENCE,
    };
    let names = RankNames::default();
    let limit = Duration::from_millis(50);
    let mut meeting = Meeting::new(&party, &names, &listener).with_handshake_timeout(limit);
    meeting.accept(1..2);
    let mut slow = TcpStream::connect(&address).unwrap();
    slow.write_all(b"batongr1").unwrap();
    slow.set_nonblocking(true).unwrap();
    let start = Instant::now();
    let mut greeting = [0; 100];
    loop {
        meeting.turn(limit).unwrap();
        match slow.read(&mut greeting) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        assert!(start.elapsed() < PATIENCE, "it was never closed");
    }
    assert_eq!(meeting.missing(), [1]);
}

#[test]
fn a_foreign_leader_is_recognised() {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let leader = Leader::bind(&ranks).unwrap();
    let spec = spec(&ranks, &leader, 1, 2);
    leader.listener.set_nonblocking(false).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = leader.listener.accept().unwrap();
            stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
        });
        let error = join(&spec, &go()).unwrap_err();
        assert!(matches!(error, GroupError::Foreign { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("it said \"SSH-2.0-\""), "{text}");
    });
}

/// One that knows the steps but not the secret can neither follow nor lead.
#[test]
fn a_leader_without_the_secret_is_recognised() {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let leader = Leader::bind(&ranks).unwrap();
    let spec = spec(&ranks, &leader, 1, 2);
    leader.listener.set_nonblocking(false).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = leader.listener.accept().unwrap();
            stream
                .write_all(&[&b"batongr1"[..], &[7; 32]].concat())
                .unwrap();
            stream.read_exact(&mut [0; 74]).unwrap();
            stream.write_all(&[0; 33]).unwrap();
        });
        let error = join(&spec, &go()).unwrap_err();
        assert!(
            matches!(&error, GroupError::Foreign { reason, .. } if reason == "its proof is wrong"),
            "{error:?}"
        );
    });
}

/// Rank 1 of 3, played by the test: it proves itself, says that it listens at `address`, and does no more.
fn only_prove(ranks: &LeaderRanks, leader: &str, address: String) -> TcpStream {
    let party = Party {
        identity: ranks.identity.clone(),
        secret: ranks.secret.clone(),
        rank: 1,
        size: 3,
        address,
        peer_timeout: PATIENCE,
    };
    let names = RankNames::default();
    let (listener, _) = socket::listen("127.0.0.1").unwrap();
    let mut meeting = Meeting::new(&party, &names, &listener);
    meeting.connect(0, leader.to_owned());
    while !meeting.is_complete() {
        meeting.turn(Duration::from_millis(50)).unwrap();
    }
    let (mut met, _) = meeting.into_met();
    met.remove(&0).unwrap()
}

#[test]
fn a_rank_that_leaves_before_all_are_there_ends_the_wait() {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let leader = Leader::bind(&ranks).unwrap();
    let address = leader.address();
    std::thread::scope(|scope| {
        let gathering = scope.spawn(|| leader.gather(3, &ranks, &go()).unwrap_err());
        drop(only_prove(&ranks, &address, "nowhere:1".to_owned()));
        let error = gathering.join().unwrap();
        assert_eq!(
            error.to_string(),
            "lost rank 1 (node0) while waiting for rank 2 (node1): it closed its connection"
        );
    });
}

/// Rank 2 is told a wrong address of rank 1, as when a firewall stands between two followers.
#[test]
fn a_pair_that_cannot_connect_is_named_by_the_leader() {
    let ranks = leader_ranks(&Secret::generate(), PATIENCE);
    let leader = Leader::bind(&ranks).unwrap();
    let address = leader.address();
    let mut second = spec(&ranks, &leader, 2, 3);
    second.join_timeout_ms = 1_000;
    let (nobody, nowhere) = socket::listen("127.0.0.1").unwrap();
    drop(nobody);
    std::thread::scope(|scope| {
        let follower = scope.spawn(|| join(&second, &go()).unwrap_err());
        let gathering = scope.spawn(|| leader.gather(3, &ranks, &go()).unwrap_err());
        let stays = only_prove(&ranks, &address, nowhere);
        let error = gathering.join().unwrap();
        drop(stays);
        assert!(matches!(error, GroupError::Failed { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.starts_with("rank 2 (node1) could not join: after 1 s"),
            "{text}"
        );
        assert!(text.contains("connecting with rank 1 (node0)"), "{text}");
        let error = follower.join().unwrap();
        assert!(matches!(error, GroupError::TimedOut { .. }), "{error:?}");
    });
}

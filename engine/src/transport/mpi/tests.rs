//! The fabric's contract between ranks of a real world; `collective/mpi/tests.rs` starts it under mpirun.

use std::time::Duration;

use super::*;
use crate::page::{KvDtype, Page, PageShape};
use crate::transport::conformance::CHECKS;
use crate::transport::fabric::ReadJob;
use crate::transport::link;
use crate::transport::runs::{Run, Runs};

const PATIENCE: Duration = Duration::from_secs(60);

/// Two and a bit of the longest message.
const ELEMENTS: usize = (2 * CHUNK_BYTES + 4321) / 2;

fn page_of(rank: usize) -> Page {
    let shape = PageShape {
        layers: 1,
        kv_heads: 1,
        tokens_per_block: 1,
        head_dim: ELEMENTS / 2,
        dtype: KvDtype::F16,
    };
    let mut page = Page::pool(shape, 1).unwrap().pop().unwrap();
    for (at, byte) in page.as_bytes_mut().iter_mut().enumerate() {
        *byte = pattern(rank, at);
    }
    page
}

fn pattern(rank: usize, at: usize) -> u8 {
    u8::try_from((at * 31 + at / 251 + rank * 7 + 1) % 256).unwrap()
}

/// A rank's address and the key of its page, from one to all.
fn exchange(own: &[u8], mail: &Mail) -> Vec<Vec<u8>> {
    const TAG: i32 = 2;
    let others = (0..mail.size()).filter(|rank| *rank != mail.rank());
    let mut flights: Vec<_> = others
        .clone()
        .map(|rank| mail.post(rank, TAG, Arc::new(own.to_vec())).unwrap())
        .collect();
    let incoming = others.map(|rank| mail.expect(rank, TAG, vec![0; own.len()]).unwrap());
    flights.extend(incoming);
    for flight in &mut flights {
        wait(|| flight.test().unwrap());
    }
    let mut came = flights.split_off(mail.size() - 1).into_iter();
    (0..mail.size())
        .map(|rank| {
            if rank == mail.rank() {
                own.to_vec()
            } else {
                came.next().unwrap().into_bytes()
            }
        })
        .collect()
}

/// The suite of all transports, between two of this process: a rank can write to itself.
pub(crate) fn conforms(say: &mut dyn FnMut(&str)) {
    let kept = MpiFabric::start().unwrap();
    for (name, check) in CHECKS {
        check(|sink| Arc::new(start(link::on_loopback(), sink).unwrap()));
        say(&format!("the transport conforms: {name}"));
    }
    drop(kept);
}

fn wait(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "no end within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

pub(crate) fn as_a_rank(say: &mut dyn FnMut(&str)) {
    let fabric = MpiFabric::start().unwrap();
    let mail = mail().unwrap();
    let own = page_of(mail.rank());
    let (arena, offset) = own.arena().unwrap();
    assert_eq!(offset, 0);
    let key = fabric.export(arena).unwrap();
    assert_eq!(fabric.export(arena).unwrap(), key, "exported once");
    let told = [fabric.address(), key.0].concat();
    let all = exchange(&told, &mail);
    for (rank, told) in all.iter().enumerate() {
        let (address, key) = told.split_at(24);
        assert!(fabric.reaches(address));
        let deadline = Instant::now() + PATIENCE;
        let mut peer = fabric.open(address, deadline).unwrap();
        reads_what_is_there(&mut *peer, key, rank);
        gives_up_and_goes_on(&mut *peer, key, rank);
        refuses_what_is_not_there(&mut *peer, key);
    }
    let mut foreign = told;
    foreign[0] ^= 1;
    assert!(!fabric.reaches(&foreign[..24]));
    assert!(fabric.open(&foreign[..24], Instant::now()).is_err());
    say(&format!("rank {} has read all", mail.rank()));
    // Nobody leaves before all have read from it.
    exchange(b"done", &mail);
    drop(fabric);
}

fn reads_what_is_there(peer: &mut dyn FabricPeer, key: &[u8], rank: usize) {
    let from = peer.import(key).unwrap();
    let mut target = page_of(99);
    let length = target.as_bytes().len();
    let strided = Run {
        source: 5,
        target: 64,
        bytes: 3,
        count: 1000,
        source_stride: 100,
        target_stride: 7,
    };
    for runs in [Runs::whole(length), Runs::new([strided]).unwrap()] {
        let mut jobs = [ReadJob::new(from, &runs, &mut target)];
        let never = AtomicBool::new(false);
        peer.read(&mut jobs, Instant::now() + PATIENCE, &never)
            .unwrap();
        for (source, at) in runs.stretches() {
            let expected: Vec<u8> = source.map(|at| pattern(rank, at)).collect();
            assert_eq!(&target.as_bytes()[at], expected);
        }
    }
}

/// A read that was given up leaves nothing behind that a later one could take for its own.
fn gives_up_and_goes_on(peer: &mut dyn FabricPeer, key: &[u8], rank: usize) {
    let from = peer.import(key).unwrap();
    let mut target = page_of(99);
    let runs = Runs::whole(target.as_bytes().len());
    let mut jobs = [ReadJob::new(from, &runs, &mut target)];
    let given_up = AtomicBool::new(true);
    assert!(matches!(
        peer.read(&mut jobs, Instant::now() + PATIENCE, &given_up),
        Err(FabricError::Cancelled { .. })
    ));
    let never = AtomicBool::new(false);
    assert!(matches!(
        peer.read(&mut jobs, Instant::now(), &never),
        Err(FabricError::TimedOut { .. })
    ));
    reads_what_is_there(peer, key, rank);
}

fn refuses_what_is_not_there(peer: &mut dyn FabricPeer, key: &[u8]) {
    let mut from = peer.import(key).unwrap();
    from.handle += 1;
    let mut target = page_of(99);
    let runs = Runs::whole(10);
    let mut jobs = [ReadJob::new(from, &runs, &mut target)];
    let never = AtomicBool::new(false);
    let error = peer
        .read(&mut jobs, Instant::now() + PATIENCE, &never)
        .unwrap_err();
    assert!(error.to_string().contains("there is no arena"), "{error}");
    let end = usize::try_from(from.bytes).unwrap();
    from.handle -= 1;
    let runs = Runs::new([Run::once(end - 1, 0, 2)]).unwrap();
    let mut jobs = [ReadJob::new(from, &runs, &mut target)];
    let error = peer
        .read(&mut jobs, Instant::now() + PATIENCE, &never)
        .unwrap_err();
    assert!(error.to_string().contains("not within"), "{error}");
    assert!(peer.import(b"no key").is_err());
}

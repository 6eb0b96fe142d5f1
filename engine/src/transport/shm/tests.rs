//! What is shared memory's own: who is let in, what is mapped, and reads that end early.

use std::time::Duration;

use super::*;
use crate::page::Page;
use crate::transport::Run;
use crate::transport::staging::plain_shape;

fn pool(bytes: usize, count: usize) -> Vec<Page> {
    Page::pool(plain_shape(bytes), count).unwrap()
}

fn fill(page: &mut Page, seed: usize) {
    for (at, byte) in page.as_bytes_mut().iter_mut().enumerate() {
        *byte = u8::try_from((at * 31 + at / 4096 + seed) % 251).unwrap();
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A peer of this very process, and the key of a page's arena.
fn opened(page: &Page) -> (ShmFabric, Box<dyn FabricPeer>, RemoteArena) {
    let fabric = ShmFabric::new().unwrap();
    let mut peer = fabric.open(&fabric.address(), soon()).unwrap();
    let key = fabric.export(page.arena().unwrap().0).unwrap();
    let arena = peer.import(&key.0).unwrap();
    (fabric, peer, arena)
}

#[test]
fn an_address_survives_the_wire_and_is_reached_by_those_who_can_read_the_probe() {
    let fabric = ShmFabric::new().unwrap();
    let address = fabric.address();
    assert_eq!(Address::decode(&address), Some(fabric.address));
    assert!(fabric.reaches(&address));
    for at in [0, SECRET_BYTES, ADDRESS_BYTES - 1] {
        let mut other = address.clone();
        other[at] ^= 1;
        assert!(!fabric.reaches(&other), "byte {at}");
        assert!(matches!(
            fabric.open(&other, soon()),
            Err(FabricError::Unreachable { .. })
        ));
    }
    assert!(!fabric.reaches(&address[1..]));
    drop(fabric);
    // Its probe is gone, though this process lives.
    assert!(!ShmFabric::new().unwrap().reaches(&address));
}

#[test]
fn only_sealed_memory_of_the_told_size_is_mapped() {
    let fabric = ShmFabric::new().unwrap();
    let mut peer = fabric.open(&fabric.address(), soon()).unwrap();
    let pages = pool(4096, 2);
    let key = fabric.export(pages[0].arena().unwrap().0).unwrap().0;
    assert_eq!(peer.import(&key).unwrap().bytes, 2 * 4096);
    assert!(peer.import(&key[1..]).is_err());
    let mut larger = key.clone();
    larger[24] ^= 64;
    let error = peer.import(&larger).unwrap_err().to_string();
    assert!(error.ends_with("it has another size"), "{error}");
    let mut elsewhere = key.clone();
    elsewhere[16] ^= 1;
    let error = peer.import(&elsewhere).unwrap_err().to_string();
    assert!(error.ends_with("another file has its place"), "{error}");
    // A file that could shrink under a reader.
    let unsealed = make_probe(&[7; 4096]).unwrap();
    let place = Place::of(&unsealed).unwrap();
    let words = [place.descriptor, place.device, place.inode, 4096];
    let error = peer.import(words.map(u64::to_le_bytes).as_flattened());
    let error = error.unwrap_err().to_string();
    assert!(error.ends_with("its size is not sealed"), "{error}");
}

#[test]
fn several_jobs_are_read_at_once_by_several_threads() {
    let mut sources = pool(6 << 20, 3);
    for (seed, page) in sources.iter_mut().enumerate() {
        fill(page, seed);
    }
    let (_fabric, _, _) = opened(&sources[0]);
    let fabric = ShmFabric::new().unwrap();
    let key = fabric.export(sources[0].arena().unwrap().0).unwrap();
    let mut peer = ShmPeer {
        pid: u64::from(std::process::id()),
        arenas: Vec::new(),
        copy_threads: 3,
        closed: Arc::clone(&fabric.closed),
    };
    let from = peer.import(&key.0).unwrap();
    let strided = Run {
        source: 3,
        target: 1,
        bytes: 1000,
        count: 3000,
        source_stride: 2000,
        target_stride: 1500,
    };
    let cases = [
        Runs::whole(6 << 20),
        Runs::whole(1),
        Runs::new([strided]).unwrap(),
    ];
    let mut targets: Vec<_> = cases
        .iter()
        .map(|_| Page::zeroed(plain_shape(6 << 20)))
        .collect();
    let mut jobs: Vec<_> = cases
        .iter()
        .zip(&sources)
        .zip(&mut targets)
        .map(|((runs, source), page)| ReadJob::new(from, runs, page).at(source.arena().unwrap().1))
        .collect();
    peer.read(&mut jobs, soon(), &AtomicBool::new(false))
        .unwrap();
    for ((runs, source), target) in cases.iter().zip(&sources).zip(&targets) {
        let mut expected = Page::zeroed(plain_shape(6 << 20));
        for (from, to) in runs.stretches() {
            expected.as_bytes_mut()[to].copy_from_slice(&source.as_bytes()[from]);
        }
        assert!(target.as_bytes() == expected.as_bytes(), "{runs:?}");
    }
}

#[test]
fn a_read_ends_early_when_it_is_given_up_late_or_the_fabric_is_closed() {
    let sources = pool(64, 1);
    let (fabric, mut peer, from) = opened(&sources[0]);
    let runs = Runs::whole(64);
    let mut page = Page::zeroed(plain_shape(64));
    let mut read = |deadline, cancelled: bool| {
        let job = ReadJob::new(from, &runs, &mut page);
        peer.read(&mut [job], deadline, &AtomicBool::new(cancelled))
    };
    let fabric_name = CAPABILITY.name;
    assert_eq!(read(soon(), false), Ok(()));
    let cancelled = Err(FabricError::Cancelled {
        fabric: fabric_name,
    });
    assert_eq!(read(soon(), true), cancelled);
    let late = Err(FabricError::TimedOut {
        fabric: fabric_name,
    });
    assert_eq!(read(Instant::now(), false), late);
    fabric.close();
    assert_eq!(read(soon(), false), cancelled);
}

//! What is CUDA IPC's own: its addresses and keys, with a GPU or without; and, with one, its reads.
//!
//! Two processes, and two GPUs, are `baton bench kv --device cuda`.

use std::time::Duration;

use super::*;
use crate::page::device::{DeviceArena as _, FoldRow};
use crate::page::fold::fold;
use crate::transport::Run;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn key() -> Key {
    Key {
        handle: [7; HANDLE_BYTES],
        number: u64::MAX - 1,
        bytes: 1 << 40,
    }
}

/// A fabric on the first GPU. A machine that is said to have one (`BATON_TEST_GPU=1`) must have it.
fn fabric() -> Option<CudaFabric> {
    if let Err(missing) = probe() {
        assert!(std::env::var_os("BATON_TEST_GPU").is_none(), "{missing}");
        eprintln!("skipped: {missing}");
        return None;
    }
    Some(CudaFabric::new(0).unwrap())
}

fn sample(len: usize) -> Vec<u8> {
    let byte = |at: usize| u8::try_from((at * 31 + at / 4096) % 251).unwrap();
    (0..len).map(byte).collect()
}

fn pages(bytes: usize, count: usize) -> Vec<Page> {
    device_pages(0, plain_shape(bytes), count).unwrap()
}

#[test]
fn addresses_and_keys_survive_the_wire_and_nothing_else_is_one() {
    let address = Address {
        boot: [1; SECRET_BYTES],
        secret: [2; SECRET_BYTES],
        process: [3; SECRET_BYTES],
        probe: key(),
    };
    let bytes = address.encode();
    assert_eq!(Address::decode(&bytes), Some(address));
    assert_eq!(Address::decode(&bytes[1..]), None);
    assert_eq!(Key::decode(&key().encode()), Some(key()));
    assert_eq!(Key::decode(&[0; KEY_BYTES + 1]), None);
    assert!(key().own().is_none());
}

#[test]
fn an_arena_of_the_host_is_not_exported() {
    let pages = Page::pool(plain_shape(64), 1).unwrap();
    let error = Key::of(pages[0].arena().unwrap().0).unwrap_err();
    assert!(matches!(error, FabricError::Memory { .. }), "{error}");
}

#[test]
fn runs_of_any_shape_are_read_into_pages() {
    let Some(fabric) = fabric() else { return };
    let mut peer = fabric.open(&fabric.address(), soon()).unwrap();
    let bytes = 300_000;
    let mut source = pages(bytes, 3);
    let content = sample(source[1].shape().bytes());
    source[1].write(0, &content).unwrap();
    let (arena, offset) = source[1].arena().unwrap();
    let key = fabric.export(arena).unwrap();
    let from = peer.import(&key.0).unwrap();
    let strided = |bytes, count| Run {
        source: 32,
        target: 16,
        bytes,
        count,
        source_stride: 2 * bytes,
        target_stride: 3 * bytes,
    };
    let cases = [
        Runs::whole(bytes),
        Runs::new([strided(4096, 9), Run::once(0, 200_000, 16)]).unwrap(),
        // Of no whole vectors.
        Runs::new([Run::once(3, 5, 70_001), Run::once(1, 100_001, 1)]).unwrap(),
        Runs::whole(0),
    ];
    for runs in cases {
        let mut target = pages(bytes, 2).pop().unwrap();
        let mut jobs = [ReadJob::new(from, &runs, &mut target).at(offset)];
        peer.read(&mut jobs, soon(), &AtomicBool::new(false))
            .unwrap();
        let mut expected = vec![0; content.len()];
        for (from, to) in runs.stretches() {
            expected[to].copy_from_slice(&content[from]);
        }
        assert!(*target.to_host().unwrap() == expected, "{runs:?}");
    }
}

#[test]
fn a_gpu_sums_what_a_processor_sums() {
    let Some(_) = fabric() else { return };
    let bytes = (1 << 20) + 48;
    let mut page = pages(bytes, 2).pop().unwrap();
    let content = sample(page.shape().bytes());
    page.write(0, &content).unwrap();
    let (arena, offset) = page.arena().unwrap();
    let on_device = cuda_arena(arena).unwrap();
    let pieces = vec![
        vec![0..bytes],
        vec![0..16],
        vec![64..64],
        vec![4096..8192, 0..4096, 65_536..200_000],
        (0..40).map(|at| at * 1600..at * 1600 + 16).collect(),
    ];
    let odd = vec![vec![1..100_001, 5..6], vec![0..bytes]];
    for pieces in [pieces, odd] {
        let at = [offset as u64];
        let rows: Vec<_> = pieces
            .iter()
            .map(|stretches: &Vec<std::ops::Range<usize>>| FoldRow { at: &at, stretches })
            .collect();
        let expected: Vec<_> = pieces
            .iter()
            .map(|piece| {
                let parts = piece.iter().map(|range| &content[range.clone()]);
                fold(&parts.collect::<Vec<_>>().concat())
            })
            .collect();
        assert_eq!(on_device.fold(&rows).unwrap(), expected);
    }
    // Alike, and not where a vector begins.
    for odd in [0, 1] {
        let at: Vec<_> = [0, 4096 + odd, 64, 100_000].to_vec();
        let there: Vec<_> = at.iter().map(|at| (offset + at) as u64).collect();
        let row = FoldRow {
            at: &there,
            stretches: &[16..4112, 0..16],
        };
        let piece = |at: &usize| {
            let (one, other) = (&content[at + 16..at + 4112], &content[*at..at + 16]);
            fold(&[one, other].concat())
        };
        let expected: Vec<_> = at.iter().map(piece).collect();
        assert_eq!(on_device.fold(&[row]).unwrap(), expected);
    }
}

#[test]
fn who_does_not_know_the_secret_is_not_reached() {
    let Some(fabric) = fabric() else { return };
    let address = fabric.address();
    assert!(fabric.reaches(&address));
    for at in [0, SECRET_BYTES] {
        let mut other = address.clone();
        other[at] ^= 1;
        let opened = fabric.open(&other, soon());
        assert!(
            matches!(opened, Err(FabricError::Unreachable { .. })),
            "{at}"
        );
    }
    // A handle of nobody.
    let mut other = fabric.address;
    other.process = [0; SECRET_BYTES];
    other.probe.handle = [0; HANDLE_BYTES];
    assert!(fabric.open(&other.encode(), soon()).is_err());
    assert!(fabric.open(&address[1..], soon()).is_err());
}

#[test]
fn a_peer_that_was_roused_is_read_as_before() {
    let Some(fabric) = fabric() else { return };
    let mut peer = fabric.open(&fabric.address(), soon()).unwrap();
    let mut source = pages(4096, 1);
    source[0].write(0, &sample(4096)).unwrap();
    let key = fabric.export(source[0].arena().unwrap().0).unwrap();
    let from = peer.import(&key.0).unwrap();
    let runs = Runs::whole(4096);
    for times in [1, 0, 1, 2] {
        for _ in 0..times {
            peer.rouse().unwrap();
        }
        let mut target = pages(4096, 1).pop().unwrap();
        let mut jobs = [ReadJob::new(from, &runs, &mut target)];
        let go_on = AtomicBool::new(false);
        peer.begin(&mut jobs, soon(), &go_on).unwrap();
        let mut sums = Vec::new();
        peer.finish(&go_on, &mut sums).unwrap();
        assert_eq!(sums, [Some(fold(&sample(4096)))]);
        assert_eq!(target.to_host().unwrap()[..], sample(4096));
    }
    // What is under way ends with it.
    peer.rouse().unwrap();
    drop(peer);
}

#[test]
fn a_read_that_is_over_or_called_off_touches_nothing() {
    let Some(fabric) = fabric() else { return };
    let mut peer = fabric.open(&fabric.address(), soon()).unwrap();
    let source = pages(4096, 1);
    let key = fabric.export(source[0].arena().unwrap().0).unwrap();
    let from = peer.import(&key.0).unwrap();
    let mut target = pages(4096, 1).pop().unwrap();
    let runs = Runs::whole(4096);
    let mut read = |deadline, called_off| {
        let mut jobs = [ReadJob::new(from, &runs, &mut target)];
        peer.read(&mut jobs, deadline, &AtomicBool::new(called_off))
    };
    let over = read(Instant::now(), false);
    assert!(matches!(over, Err(FabricError::TimedOut { .. })));
    let called_off = read(soon(), true);
    assert!(matches!(called_off, Err(FabricError::Cancelled { .. })));
    read(soon(), false).unwrap();
    fabric.close();
    let closed = read(soon(), false);
    assert!(matches!(closed, Err(FabricError::Cancelled { .. })));
}

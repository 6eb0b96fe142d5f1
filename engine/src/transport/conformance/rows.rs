//! The contract of writes of several stretches, and of several pages.

use super::*;

pub(in crate::transport) fn strided_stretches_land_where_they_belong(start: Start) {
    let pair = pair(start);
    let source = Arc::new(page(100_000, 3));
    let run = |source, target, bytes, count| Run {
        source,
        target,
        bytes,
        count,
        source_stride: bytes * 3,
        target_stride: bytes * 2,
    };
    let cases = [
        // One long, one short, one of single bytes, and runs that interleave in the target, against its order.
        vec![run(5, 7, 20_000, 5)],
        vec![run(1, 3, 700, 190)],
        vec![run(0, 0, 1, 3000)],
        vec![run(1000, 501, 500, 40), run(9, 1, 500, 40)],
    ];
    for (transfer, runs) in (0..).zip(cases) {
        let runs = Runs::new(runs).unwrap();
        let region = pair.reader.register(page(80_000, 0));
        let write = Write {
            runs: runs.clone(),
            ..piece(pair.to_reader, transfer, &source, &region.remote)
        };
        assert_eq!(pair.writer.transport.write(write), Submission::Accepted);
        match pair.reader.next() {
            TransportEvent::Landed { runs: landed, .. } => assert_eq!(landed, runs),
            other => panic!("{other:?}"),
        }
        pair.writer.next();
        let mut expected = page(80_000, 0);
        for (from, to) in runs.stretches() {
            expected.as_bytes_mut()[to].copy_from_slice(&source.as_bytes()[from]);
        }
        let landed = pair.reader.page_of(region.id);
        assert!(landed.as_bytes() == expected.as_bytes(), "{runs:?}");
    }
}

fn send_row(pair: &Pair, sources: &[Arc<Page>], runs: &Runs, regions: &[Region]) {
    let write = Write {
        sources: sources.into(),
        runs: runs.clone(),
        ..piece(pair.to_reader, 1, &sources[0], &regions[0].remote)
    };
    assert_eq!(pair.writer.transport.write(write), Submission::Accepted);
}

pub(in crate::transport) fn rows_land_page_by_page(start: Start) {
    let pair = pair(start);
    let strided = Run {
        source: 5,
        target: 7,
        bytes: 2000,
        count: 5,
        source_stride: 6000,
        target_stride: 4000,
    };
    let two = [Run::once(20_000, 0, 9001), Run::once(0, 9100, 101)];
    let rows = [
        (2, Runs::whole(40_000)),
        (ROW_PAGES_MAX, Runs::new([strided]).unwrap()),
        (3, Runs::new(two).unwrap()),
    ];
    for (count, runs) in rows {
        let source = |index| Arc::new(page(20_000, index));
        let sources: Vec<_> = (1..=count).map(source).collect();
        let targets = (0..count).map(|_| page(20_000, 0)).collect();
        let regions = pair.reader.register_all(targets);
        send_row(&pair, &sources, &runs, &regions);
        match pair.reader.next() {
            TransportEvent::Landed {
                region,
                count: pieces,
                runs: landed,
                checksums,
                folds,
                ..
            } => {
                assert_eq!((region, &landed), (regions[0].id, &runs));
                assert_eq!((pieces, folds.len()), (count, 0));
                assert!([0, count].contains(&checksums.len()), "{checksums:?}");
                for (source, found) in sources.iter().zip(checksums) {
                    let stretches = runs.stretches().map(|(from, _)| from);
                    let sent = sum_of(source.as_bytes(), stretches);
                    assert!(found.is_none_or(|sum| sum == sent));
                }
            }
            other => panic!("{other:?}"),
        }
        let done = pair.writer.next();
        assert!(done.is_done_of(pair.to_reader, TransferId(1)), "{done:?}");
        for (source, region) in sources.iter().zip(&regions) {
            assert_eq!(Arc::strong_count(source), 1, "it was let go first");
            let mut expected = page(20_000, 0);
            for (from, to) in runs.stretches() {
                expected.as_bytes_mut()[to].copy_from_slice(&source.as_bytes()[from]);
            }
            let landed = pair.reader.page_of(region.id);
            assert!(landed.as_bytes() == expected.as_bytes(), "{count} {runs:?}");
        }
    }
}

pub(in crate::transport) fn rows_that_are_none_are_refused_and_those_of_lost_regions_go_nowhere(
    start: Start,
) {
    let pair = pair(start);
    let source = |index| Arc::new(page(1000, index));
    let sources: Vec<_> = (1..=ROW_PAGES_MAX + 1).map(source).collect();
    let targets = (0..4).map(|_| page(1000, 0)).collect();
    let regions = pair.reader.register_all(targets);
    let short = Arc::new(page(999, 1));
    let broken = [
        vec![],
        sources.clone(),
        vec![Arc::clone(&sources[0]), short],
    ];
    for sources in broken {
        let write = Write {
            sources: sources.into(),
            runs: Runs::whole(4000),
            ..piece(pair.to_reader, 1, &source(1), &regions[0].remote)
        };
        assert_eq!(pair.writer.transport.write(write), Submission::Invalid);
    }
    let nothing = Write {
        sources: sources[..2].into(),
        runs: Runs::whole(0),
        ..piece(pair.to_reader, 1, &sources[0], &regions[0].remote)
    };
    assert_eq!(pair.writer.transport.write(nothing), Submission::Invalid);
    // One of its regions is gone: nothing is told of the others, and they can be had back at once.
    pair.reader.page_of(regions[2].id);
    let runs = Runs::whole(4000);
    send_row(&pair, &sources[..4], &runs, &regions);
    send_row(&pair, &sources[..2], &runs, &regions);
    match pair.reader.next() {
        TransportEvent::Landed { region, count, .. } => {
            assert_eq!((region, count), (regions[0].id, 2));
        }
        other => panic!("{other:?}"),
    }
    for _ in 0..2 {
        let done = pair.writer.next();
        assert!(done.is_done_of(pair.to_reader, TransferId(1)), "{done:?}");
    }
    for index in [0, 1] {
        let landed = pair.reader.page_of(regions[index].id);
        assert!(landed.as_bytes() == sources[index].as_bytes());
    }
    assert!(pair.reader.page_of(regions[3].id).as_bytes() == page(1000, 0).as_bytes());
}

pub(in crate::transport) fn sealed_regions_are_written_no_more_and_come_back_as_one(start: Start) {
    let pair = pair(start);
    let transport = &pair.reader.transport;
    let register = || {
        let targets = (0..4).map(|_| page(1000, 0)).collect();
        transport.register(targets).unwrap()
    };
    let (registration, other) = (register(), register());
    let regions: Vec<_> = registration.regions().collect();
    let source = Arc::new(page(1000, 5));
    let write = |region: &Region| {
        let write = piece(pair.to_reader, 1, &source, &region.remote);
        assert_eq!(pair.writer.transport.write(write), Submission::Accepted);
        pair.writer.next();
    };
    for region in &regions[..2] {
        write(region);
        pair.reader.next();
    }
    // All of a row or none of it; nobody's is nobody's to seal.
    assert!(transport.seal(regions[0].id, 2));
    assert!(!transport.seal(regions[1].id, 2));
    let last = other.id(3);
    assert!(!transport.seal(last, 2));
    write(&regions[1]);
    write(&regions[2]);
    match pair.reader.next() {
        TransportEvent::Landed { region, .. } => assert_eq!(region, regions[2].id),
        other => panic!("{other:?}"),
    }
    // By the first one only, once, and while none of them is gone.
    assert!(transport.reclaim(regions[1].id).is_none());
    let pages = transport.reclaim(registration.id(0)).unwrap();
    let written = |page: &Page| page.as_bytes() == source.as_bytes();
    let written: Vec<_> = pages.iter().map(written).collect();
    assert_eq!(written, [true, true, true, false]);
    assert!(transport.reclaim(registration.id(0)).is_none());
    pair.reader.page_of(other.id(2));
    assert!(transport.reclaim(other.id(0)).is_none());
    let left: Vec<_> = [0, 1, 3]
        .map(|index| pair.reader.page_of(other.id(index)))
        .into();
    assert_eq!(left.len(), 3);
    // Of none at all there is nothing to take back, whatever is registered next.
    let none = transport.register(Vec::new()).unwrap();
    let next = register();
    assert!(none.id(0) != next.id(0) && none.regions().next().is_none());
    assert!(
        transport
            .reclaim(none.id(0))
            .is_none_or(|pages| pages.is_empty())
    );
    assert_eq!(transport.reclaim(next.id(0)).unwrap().len(), 4);
}

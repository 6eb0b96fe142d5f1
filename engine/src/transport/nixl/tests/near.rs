//! What is read from a process of this host is summed at once, as far as one request reads it.

use super::*;
use crate::transport::checksum::sum;

#[test]
fn pieces_of_one_request_come_with_their_checksums() {
    let (ours, theirs) = (fabric(), fabric());
    let source = filled_pages(20, 3);
    let key = theirs.export(arena(&source)).unwrap();
    let mut peer = ours.open(&theirs.address(), soon()).unwrap();
    let from = peer.import(&key.0).unwrap();
    // Of odd lengths, so that requests end between them; the last one is longer than any request.
    let lengths = [1, 4096, 65_536, 700_001, 0, PAGE_BYTES, 65_536, 5];
    let long = 18 * PAGE_BYTES;
    let mut runs: Vec<_> = lengths
        .iter()
        .zip(1..)
        .map(|(bytes, index)| Runs::new([Run::once(index * 9999, 7, *bytes)]).unwrap())
        .collect();
    runs.push(Runs::new([Run::once(77, 7, long)]).unwrap());
    let mut targets = Page::pool(shape(19 * PAGE_BYTES), runs.len()).unwrap();
    for wanted in [true, false] {
        let mut jobs: Vec<_> = targets
            .iter_mut()
            .zip(&runs)
            .map(|(page, runs)| ReadJob {
                sum: wanted,
                ..ReadJob::new(from, runs, page)
            })
            .collect();
        peer.read(&mut jobs, soon(), &AtomicBool::new(false))
            .unwrap();
        let sums: Vec<_> = jobs.iter().map(|job| job.checksum).collect();
        for ((page, runs), made) in targets.iter().zip(&runs).zip(sums) {
            assert_read(page, runs, |offset| pattern(3 + offset));
            let bytes = runs.total_bytes();
            // Whoever gets none makes it itself.
            let made_here = wanted && bytes < long && bytes > 0;
            let right = made_here.then(|| sum(&page.as_bytes()[7..7 + bytes]));
            assert!(made == right || (bytes == 0 && wanted), "{bytes}: {made:?}");
        }
    }
}

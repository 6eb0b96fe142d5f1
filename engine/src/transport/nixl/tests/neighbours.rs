//! NIXL brings a UCX of its own. A process that has `ucx` too has two of them, of different versions, each with its
//! hooks in the memory functions of the C library.

use super::*;
use crate::transport::ucx::Ucx;

#[test]
fn nixl_and_ucx_read_side_by_side() {
    library();
    let ucx = || Ucx::start().unwrap();
    let (nixl_fabrics, ucx_fabrics) = ([fabric(), fabric()], [ucx(), ucx()]);
    let pairs: [[&dyn Fabric; 2]; 2] = [
        nixl_fabrics.each_ref().map(|fabric| fabric as &dyn Fabric),
        ucx_fabrics.each_ref().map(|fabric| fabric as &dyn Fabric),
    ];
    let source = filled_pages(3, 11);
    let mut opened = pairs.map(|[ours, theirs]| {
        let key = theirs.export(arena(&source)).unwrap();
        let mut peer = ours.open(&theirs.address(), soon()).unwrap();
        let from = peer.import(&key.0).unwrap();
        (peer, from)
    });
    for runs in shapes_of_runs() {
        for (peer, from) in &mut opened {
            // A new mapping each time, and one that goes away: what the hooks look at.
            let mut pages = Page::pool(shape(PAGE_BYTES), 1).unwrap();
            read(&mut **peer, *from, &runs, &mut pages[0]).unwrap();
            assert_read(&pages[0], &runs, |offset| pattern(11 + offset));
        }
    }
}

#[test]
#[ignore = "the next test starts it, to see how it ends"]
fn as_a_process_with_both() {
    nixl_and_ucx_read_side_by_side();
}

#[test]
fn a_process_with_both_ends_well() {
    library();
    let name = "neighbours::as_a_process_with_both";
    let ended = part(name).output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
}

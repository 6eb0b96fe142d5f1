//! Pages that lie on a device, handed over by transports that know the host's memory only: on one side or on both. The
//! device is none; what a real one adds is tested where there is one.

use super::*;
use crate::handoff::BlockPages;
pub(super) use crate::page::device::fake::pool;

/// A context and a generation instance; which of them have their pages on a device.
fn pair(wire: Wire, (context, generation): (bool, bool)) -> (Instance, Instance) {
    let mut nodes = two(wire);
    nodes.0.on_device = context;
    nodes.1.on_device = generation;
    nodes
}

const SIDES: [(bool, bool); 3] = [(true, true), (true, false), (false, true)];

/// Every transport with the sides that can be on a device.
fn wires_and_sides() -> impl Iterator<Item = (Wire, &'static [(bool, bool)])> {
    let links = links().into_iter().map(|wire| (wire, &SIDES[..]));
    links.chain([(Wire::WINDOWED, &SIDES[..1])])
}

#[test]
fn pages_of_a_device_go_over_every_transport_to_and_from_any_memory() {
    for (wire, all_sides) in wires_and_sides() {
        for (round, sides) in all_sides.iter().enumerate() {
            let (mut context, mut generation) = pair(wire, *sides);
            // In one arena and in private memory, where it is the host's.
            for id in [1, 2] {
                let ticket = context.offer(id, 3);
                generation.fetch(id, &ticket, 3);
                let stats = generation.outcome(id).unwrap();
                assert_eq!(stats.bytes, kv_bytes(3), "{wire:?} {round}");
                let first = BlockId::try_from((id - 1) * 3).unwrap();
                generation.assert_content(first, id, 3);
                assert_eq!(context.lease_end(id), LeaseEnd::Delivered);
            }
            assert_both_clean(&mut context, &mut generation);
        }
    }
}

#[test]
fn damage_on_the_way_between_devices_is_found() {
    for (wire, all_sides) in wires_and_sides() {
        for sides in all_sides {
            let mut spoilt = params("ctx-0");
            spoilt.faults = FaultPlan::parse("flip_byte=3").unwrap();
            let mut context = Instance::start(wire, spoilt);
            let mut generation = Instance::start(wire, params("gen-0"));
            (context.on_device, generation.on_device) = *sides;
            let ticket = context.offer(1, 3);
            generation.fetch(1, &ticket, 3);
            let error = generation.outcome(1).unwrap_err();
            assert!(
                matches!(error, HandoffError::Checksum(_)),
                "{wire:?}: {error}"
            );
            context.lease_end(1);
            assert_both_clean(&mut context, &mut generation);
        }
    }
}

#[test]
fn a_part_of_a_page_is_summed_as_the_device_sums_it() {
    // Half of the layers on each of two ranks, taken by one: short stretches of several pages.
    for wire in [Wire::TCP, Wire::WINDOWED] {
        a_part_of_a_page_is_summed_over(wire);
    }
}

fn a_part_of_a_page_is_summed_over(wire: Wire) {
    let (mut context, mut generation) = pair(wire, (true, true));
    let ticket = context.offer(2, 4);
    let shape = generation.shape;
    let block = shape.tokens_per_block;
    let pages = generation.blank_pages(2, 2);
    let pages: BlockPages = (0..).zip(pages).collect();
    generation
        .out
        .extend(pages.blocks.iter().map(|block| (*block, 2)));
    generation.transceiver.fetch(Fetch {
        request: RequestId(2),
        ticket,
        token_count: 4 * block - 5,
        first_token: 2 * block,
        pages,
    });
    generation.outcome(2).unwrap();
    for (block, index) in [(0, 2), (1, 3)] {
        let came = generation.back[&block].to_host().unwrap();
        let sent = filled(shape, 2, index);
        // The first token of each head is there in any page.
        let row = shape.head_dim * 4;
        assert_eq!(came[..row], sent.as_bytes()[..row]);
    }
    context.lease_end(2);
    assert_both_clean(&mut context, &mut generation);
}

//! Checksums left out, which is for measuring: both sides have to want it.

use super::*;

fn unsummed(instance: &str) -> TransceiverParams {
    TransceiverParams {
        leave_out_checksums: true,
        ..params(instance)
    }
}

#[test]
fn pieces_without_checksums_are_taken_by_those_alone_who_asked_for_that() {
    for wire in wires() {
        let mut context = Instance::start(wire, unsummed("ctx-0"));
        let mut careful = Instance::start(wire, params("gen-0"));
        let ticket = context.offer(1, 3);
        careful.fetch(1, &ticket, 3);
        let refused = careful.outcome(1).unwrap_err().to_string();
        assert!(refused.contains("a piece without a checksum"), "{refused}");
        context.lease_end(1);
        assert_both_clean(&mut context, &mut careful);
        let mut trusting = Instance::start(wire, unsummed("gen-1"));
        let ticket = context.offer(2, 3);
        trusting.fetch(2, &ticket, 3);
        trusting.outcome(2).unwrap();
        trusting.assert_content(0, 2, 3);
        assert_eq!(context.lease_end(2), LeaseEnd::Delivered);
        assert_both_clean(&mut context, &mut trusting);
    }
}

#[test]
fn checksums_that_come_are_compared_though_none_was_asked_for() {
    for wire in links() {
        let mut faulty = params("ctx-0");
        faulty.faults = FaultPlan::parse("flip_byte=3").unwrap();
        let mut context = Instance::start(wire, faulty);
        let mut generation = Instance::start(wire, unsummed("gen-0"));
        let ticket = context.offer(1, 3);
        generation.fetch(1, &ticket, 3);
        let error = generation.outcome(1).unwrap_err();
        assert!(matches!(error, HandoffError::Checksum(_)), "{error}");
        context.lease_end(1);
        assert_both_clean(&mut context, &mut generation);
    }
}

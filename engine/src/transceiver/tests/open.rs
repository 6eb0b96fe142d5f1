//! Leases that grow while they are taken.

use super::*;

impl Instance {
    /// Waits until so many bytes have gone out.
    fn wait_sent(&self, bytes: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.transceiver.info().stats().bytes_sent < bytes {
            assert!(Instant::now() < deadline, "{bytes} bytes never went out");
            std::thread::yield_now();
        }
    }
}

#[test]
fn what_is_there_goes_out_before_the_rest_is_written() {
    for wire in wires() {
        let (mut context, mut generation) = two(wire);
        let ticket = context.offer_first(1, 7, 2);
        assert_eq!(generation.transceiver.check(&ticket), Ok(7 * 32 - 5));
        generation.fetch(1, &ticket, 7);
        let page = SHAPE.bytes() as u64;
        context.wait_sent(2 * page);
        assert!(generation.decided.is_empty() && context.ended.is_empty());
        context.extend(1, 3);
        context.wait_sent(5 * page);
        context.extend(1, 2);
        let stats = generation.outcome(1).unwrap();
        assert_eq!(stats.bytes, kv_bytes(7));
        generation.assert_content(0, 1, 7);
        assert_eq!(context.lease_end(1), LeaseEnd::Delivered);
        assert_both_clean(&mut context, &mut generation);
    }
}

#[test]
fn a_lease_may_grow_before_anybody_takes_it() {
    for wire in wires() {
        let (mut context, mut generation) = two(wire);
        let ticket = context.offer_first(1, 5, 1);
        context.extend(1, 1);
        context.extend(1, 3);
        generation.fetch(1, &ticket, 5);
        generation.outcome(1).unwrap();
        generation.assert_content(0, 1, 5);
        assert_eq!(context.lease_end(1), LeaseEnd::Delivered);
        assert_both_clean(&mut context, &mut generation);
    }
}

#[test]
fn a_lease_that_is_given_up_while_it_grows_is_over_on_both_sides() {
    for wire in wires() {
        let (mut context, mut generation) = two(wire);
        let ticket = context.offer_first(1, 7, 2);
        generation.fetch(1, &ticket, 7);
        context.wait_sent(2 * SHAPE.bytes() as u64);
        context.transceiver.withdraw(1);
        let error = generation.outcome(1).unwrap_err();
        assert!(matches!(error, HandoffError::Refused(_)), "{error}");
        assert_eq!(context.lease_end(1), LeaseEnd::Cancelled);
        // Too late: nobody holds these.
        context.transceiver.extend(1, context.filled_pages(1, 2, 2));
        assert_both_clean(&mut context, &mut generation);
    }
}

#[test]
fn whoever_gives_up_a_lease_that_grows_ends_it() {
    let (mut context, mut generation) = two(Wire::TCP);
    let ticket = context.offer_first(1, 7, 2);
    generation.fetch(1, &ticket, 7);
    context.wait_sent(2 * SHAPE.bytes() as u64);
    generation.transceiver.cancel_fetch(RequestId(1));
    assert_eq!(generation.outcome(1), Err(HandoffError::Cancelled));
    assert_eq!(context.lease_end(1), LeaseEnd::Cancelled);
    assert_both_clean(&mut context, &mut generation);
}

#[test]
fn a_prompt_that_is_never_read_on_holds_nobody_for_ever() {
    let mut context = Instance::start(Wire::TCP, brief("ctx-0"));
    let mut generation = Instance::start(Wire::TCP, params("gen-0"));
    let ticket = context.offer_first(1, 7, 2);
    generation.fetch(1, &ticket, 7);
    let text = generation.outcome(1).unwrap_err().to_string();
    assert!(text.contains("the lease ended after 300ms"), "{text}");
    assert_eq!(context.lease_end(1), LeaseEnd::Expired);
    assert_both_clean(&mut context, &mut generation);
}

//! Several transports at once: which one is taken, and what happens when it cannot connect.

use super::*;
use crate::transport::EndpointRecord;

/// An instance with the test's transport first and TCP behind it.
fn both(params: TransceiverParams) -> Instance {
    let (sender, events) = channel();
    let sink: HandoffSink = Arc::new(move |event| drop(sender.send(event)));
    let shape = params.layout.page;
    let preference = Preference::of(vec!["absent", "memory", "tcp"]);
    let kinds: Vec<_> = KINDS.iter().copied().chain([MEMORY]).collect();
    let transceiver = Transceiver::start_over(params, sink, &preference, &kinds).unwrap();
    Instance::around(transceiver, shape, events)
}

/// The names of a ticket's endpoints.
fn endpoints(ticket: &HandoffTicket) -> Vec<EndpointRecord> {
    let state = OpaqueState::decode(&ticket.opaque_state).unwrap();
    state.ranks[0].endpoints.clone()
}

#[test]
fn a_ticket_names_every_transport_and_the_best_common_one_is_taken() {
    let mut context = both(params("ctx-0"));
    let mut generation = both(params("gen-0"));
    let mut old = Instance::start(Wire::TCP, params("gen-1"));
    let info = context.transceiver.info();
    assert_eq!(info.transport(), "memory");
    assert_eq!(
        info.missing(),
        [("absent", "this build does not have it".to_owned())]
    );
    for (id, node, transport) in [(1, &mut generation, "memory"), (2, &mut old, "tcp")] {
        let ticket = context.offer(id, 3);
        let names: Vec<_> = endpoints(&ticket)
            .into_iter()
            .map(|e| e.transport)
            .collect();
        assert_eq!(names, ["memory", "tcp"]);
        node.fetch(id, &ticket, 3);
        assert_eq!(node.outcome(id).unwrap().transport(), transport);
        node.assert_content(0, id, 3);
        assert_eq!(context.lease_end(id), LeaseEnd::Delivered);
        node.assert_clean();
    }
    let peers = context.transceiver.info().peers();
    let expected = [("gen-0".to_owned(), "memory"), ("gen-1".to_owned(), "tcp")];
    assert_eq!(Vec::from_iter(peers), expected);
    let sent: Vec<_> = info
        .wires()
        .into_iter()
        .map(|w| (w.transport, w.bytes_sent))
        .collect();
    assert_eq!(sent, [("memory", kv_bytes(3)), ("tcp", kv_bytes(3))]);
    context.assert_clean();
}

#[test]
fn a_transport_that_cannot_connect_is_passed_over() {
    let mut context = both(params("ctx-0"));
    let mut generation = both(params("gen-0"));
    let ticket = tamper(&context.offer(1, 3), |state| {
        state.ranks[0].endpoints[0].address = "4000000000".to_owned();
    });
    generation.fetch(1, &ticket, 3);
    assert_eq!(generation.outcome(1).unwrap().transport(), "tcp");
    generation.assert_content(0, 1, 3);
    assert_eq!(context.lease_end(1), LeaseEnd::Delivered);
    // When no transport connects, the last one's failure is the fetch's.
    let nobody = tamper(&context.offer(2, 3), |state| {
        state.ranks[0].endpoints[0].address = "4000000000".to_owned();
        state.ranks[0].endpoints[1].address = "127.0.0.1:1".to_owned();
    });
    generation.fetch(2, &nobody, 3);
    let text = generation.outcome(2).unwrap_err().to_string();
    assert!(
        text.starts_with("lost context server ctx-0 at 127.0.0.1:1:"),
        "{text}"
    );
    context.transceiver.withdraw(2);
    assert_both_clean(&mut context, &mut generation);
}

#[test]
fn without_a_common_transport_both_sides_are_named() {
    let mut context = Instance::start(Wire::MEMORY, params("ctx-0"));
    let mut generation = Instance::start(Wire::TCP, params("gen-0"));
    let ticket = context.offer(1, 3);
    let expected = "hand-off state not understood: no common transport: tcp here, memory there";
    let refused = generation.transceiver.check(&ticket).unwrap_err();
    assert_eq!(refused.to_string(), expected);
    generation.fetch(1, &ticket, 3);
    assert_eq!(generation.outcome(1).unwrap_err().to_string(), expected);
    context.transceiver.withdraw(1);
    assert_both_clean(&mut context, &mut generation);
}

#[test]
fn nothing_to_start_is_an_error_that_names_what_was_tried() {
    let preference = Preference::of(vec!["absent"]);
    let sink: HandoffSink = Arc::new(|_| {});
    let refused = Transceiver::start_over(params("ctx-0"), sink, &preference, KINDS).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "no kv transport is available: absent: this build does not have it"
    );
}

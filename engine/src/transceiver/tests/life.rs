//! What goes well, and what is given up on purpose.

use proptest::prelude::*;

use super::*;

#[test]
fn kv_of_any_size_arrives_as_it_was() {
    for wire in wires() {
        let (mut context, mut generation) = two(wire);
        let mut first = 0;
        for (id, pages) in [(1, 0), (2, 1), (3, 7), (4, 64)] {
            let ticket = context.offer(id, pages);
            let tokens = generation.transceiver.check(&ticket).unwrap();
            assert_eq!(tokens, (pages * 32).saturating_sub(5));
            generation.fetch(id, &ticket, pages);
            let stats = generation.outcome(id).unwrap();
            assert_eq!(stats.bytes, kv_bytes(pages));
            assert_eq!(stats.transport(), generation.transceiver.info().transport());
            generation.assert_content(first, id, pages);
            first += BlockId::try_from(pages).unwrap();
            assert_eq!(context.lease_end(id), LeaseEnd::Delivered);
        }
        assert_both_clean(&mut context, &mut generation);
        let stats = generation.transceiver.info().stats();
        assert_eq!(stats.fetches_succeeded, 4);
        let sent: u64 = [1, 7, 64].map(kv_bytes).into_iter().sum();
        assert_eq!(stats.bytes_received, sent);
        assert_eq!(
            context.transceiver.info().stats().bytes_sent,
            stats.bytes_received
        );
        assert!(stats.last_bytes_per_second > 0);
    }
}

#[test]
fn one_large_request_arrives_as_it_was() {
    let large = PageShape {
        layers: 30,
        head_dim: 64,
        ..SHAPE
    };
    let with_large = |instance| TransceiverParams {
        layout: layout(large),
        ..params(instance)
    };
    for wire in wires() {
        let mut context = Instance::start(wire, with_large("ctx-0"));
        let mut generation = Instance::start(wire, with_large("gen-0"));
        let ticket = context.offer(1, 16);
        generation.fetch(1, &ticket, 16);
        generation.outcome(1).unwrap();
        generation.assert_content(0, 1, 16);
        assert_eq!(context.lease_end(1), LeaseEnd::Delivered);
        assert_both_clean(&mut context, &mut generation);
    }
}

#[test]
fn sixty_four_fetches_at_once_and_more_in_the_queue() {
    for wire in wires() {
        let mut context = Instance::start(wire, params("ctx-0"));
        let mut receiving = params("gen-0");
        receiving.limits.fetches_running = 8;
        receiving.config.max_tokens_in_buffer = Some(40);
        let mut generation = Instance::start(wire, receiving);
        let tickets: Vec<_> = (0..64).map(|id| context.offer(id, 5)).collect();
        for (id, ticket) in (0..).zip(&tickets) {
            generation.fetch(id, ticket, 5);
        }
        for id in 0..64 {
            generation.outcome(id).unwrap();
            let first = BlockId::try_from(id * 5).unwrap();
            generation.assert_content(first, id, 5);
            assert_eq!(context.lease_end(id), LeaseEnd::Delivered);
        }
        assert_both_clean(&mut context, &mut generation);
    }
}

#[test]
fn a_lease_that_nobody_claims_ends_by_the_clock_alone() {
    for wire in wires() {
        let mut context = Instance::start(wire, brief("ctx-0"));
        let began = Instant::now();
        context.offer(1, 3);
        assert_eq!(context.lease_end(1), LeaseEnd::Expired);
        assert!(began.elapsed() >= Duration::from_millis(300));
        context.assert_clean();
        assert_eq!(context.transceiver.info().stats().leases_expired, 1);
    }
}

#[test]
fn a_ticket_of_an_ended_lease_is_refused() {
    for wire in wires() {
        let mut context = Instance::start(wire, brief("ctx-0"));
        let mut generation = Instance::start(wire, params("gen-0"));
        let ticket = context.offer(1, 3);
        context.lease_end(1);
        generation.fetch(1, &ticket, 3);
        let error = generation.outcome(1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "context server refused: no lease of request 1: ended or never held"
        );
        assert_both_clean(&mut context, &mut generation);
    }
}

#[test]
fn kv_is_given_once_only() {
    for wire in wires() {
        let (mut context, mut generation) = two(wire);
        let ticket = context.offer(1, 3);
        generation.fetch(1, &ticket, 3);
        generation.outcome(1).unwrap();
        context.lease_end(1);
        generation.fetch(2, &ticket, 3);
        assert!(matches!(
            generation.outcome(2),
            Err(HandoffError::Refused(_))
        ));
        assert_both_clean(&mut context, &mut generation);
    }
}

#[test]
fn a_second_request_while_one_runs_is_refused() {
    for wire in links() {
        // The first one stalls on the wire, so that it is certainly running when the second comes.
        let mut sending = params("ctx-0");
        sending.faults = FaultPlan::parse("stall_after_bytes=1000").unwrap();
        sending.link.stall_timeout = PATIENCE * 4;
        sending.link.silence_limit = PATIENCE * 4;
        let mut context = Instance::start(wire, sending);
        let mut first = Instance::start(wire, params("gen-0"));
        let mut second = Instance::start(wire, params("gen-1"));
        let ticket = context.offer(1, 3);
        first.fetch(1, &ticket, 3);
        let deadline = Instant::now() + PATIENCE;
        while context.transceiver.info().stats().leases_serving == 0 {
            assert!(Instant::now() < deadline, "the context server never began");
            std::thread::yield_now();
        }
        second.fetch(2, &ticket, 3);
        let error = second.outcome(2).unwrap_err();
        assert_eq!(
            error.to_string(),
            "context server refused: the kv of request 1 is already being fetched"
        );
        second.assert_clean();
        first.transceiver.cancel_fetch(RequestId(1));
        assert_eq!(first.outcome(1), Err(HandoffError::Cancelled));
        // The page under the stalled write is in quarantine; the end of the connection frees it, and the lease.
        drop(second);
        drop(context.transceiver);
        first.assert_clean();
    }
}

#[test]
fn withdrawing_ends_a_lease_before_during_and_after() {
    for wire in wires() {
        let (mut context, mut generation) = two(wire);
        context.offer(1, 3);
        context.transceiver.withdraw(1);
        assert_eq!(context.lease_end(1), LeaseEnd::Cancelled);
        let ticket = context.offer(2, 64);
        generation.fetch(2, &ticket, 64);
        context.transceiver.withdraw(2);
        let end = context.lease_end(2);
        match (generation.outcome(2), end) {
            // All of it may have arrived before the withdrawal; the acknowledgement then comes too late.
            (Ok(_), LeaseEnd::Delivered | LeaseEnd::Cancelled)
            | (Err(HandoffError::Refused(_)), LeaseEnd::Cancelled) => {}
            other => panic!("{other:?}"),
        }
        context.transceiver.withdraw(2);
        context.transceiver.withdraw(99);
        assert_both_clean(&mut context, &mut generation);
    }
}

#[test]
fn cancelling_a_fetch_that_waits_its_turn_frees_the_lease_too() {
    for wire in links() {
        // The first transfer stalls, so that the others certainly wait.
        let mut sending = params("ctx-0");
        sending.faults = FaultPlan::parse("stall_after_bytes=1000").unwrap();
        let mut receiving = params("gen-0");
        receiving.limits.fetches_running = 1;
        receiving.link.stall_timeout = PATIENCE * 4;
        let mut context = Instance::start(wire, sending);
        let mut generation = Instance::start(wire, receiving);
        let tickets: Vec<_> = (0..4).map(|id| context.offer(id, 3)).collect();
        for (id, ticket) in (0..).zip(&tickets) {
            generation.fetch(id, ticket, 3);
        }
        generation.transceiver.cancel_fetch(RequestId(3));
        assert_eq!(generation.outcome(3), Err(HandoffError::Cancelled));
        assert_eq!(context.lease_end(3), LeaseEnd::Cancelled);
        drop(context.transceiver);
        for id in 0..3 {
            assert!(matches!(
                generation.outcome(id),
                Err(HandoffError::Transport(_) | HandoffError::Refused(_))
            ));
        }
        generation.assert_clean();
    }
}

#[test]
fn too_many_leases_and_fetches_are_refused_and_keep_nothing() {
    let mut narrow = params("both");
    narrow.limits.leases = 2;
    narrow.limits.fetches = 0;
    let mut node = Instance::start(Wire::MEMORY, narrow);
    let ticket = node.offer(1, 1);
    node.offer(2, 1);
    let refused = node.transceiver.offer(Offer {
        ctx_request_id: 3,
        token_count: 0,
        pages: Vec::new(),
    });
    assert_eq!(
        refused.unwrap_err().to_string(),
        "context server refused: 2 leases are held already"
    );
    node.fetch(1, &ticket, 1);
    assert!(matches!(node.outcome(1), Err(HandoffError::Transport(_))));
    node.transceiver.withdraw(1);
    node.transceiver.withdraw(2);
    node.assert_clean();
}

#[test]
fn layouts_that_differ_are_refused_before_anything_moves() {
    let (mut context, mut generation) = two(Wire::MEMORY);
    let ticket = context.offer(1, 2);
    let halves = PageShape {
        dtype: KvDtype::F16,
        ..SHAPE
    };
    let mut other = Instance::start(
        Wire::MEMORY,
        TransceiverParams {
            layout: layout(halves),
            ..params("gen-1")
        },
    );
    let error = other.transceiver.check(&ticket).unwrap_err();
    let expected = "kv layouts differ: kv dtype float16 here, float32 there";
    assert_eq!(error.to_string(), expected);
    other.fetch(1, &ticket, 2);
    assert_eq!(other.outcome(1).unwrap_err().to_string(), expected);
    other.assert_clean();
    // A generation side that lies about its layout is told by the context side.
    let lying = tamper(&ticket, |state| state.token_count = 28);
    generation.fetch(2, &lying, 2);
    assert!(matches!(generation.outcome(2), Err(HandoffError::State(_))));
    // The context side has heard why, and does not wait for anybody else.
    assert_eq!(context.lease_end(1), LeaseEnd::Cancelled);
    assert_both_clean(&mut context, &mut generation);
}

#[test]
fn dropping_a_transceiver_gives_everything_back() {
    for wire in wires() {
        let (mut context, mut generation) = two(wire);
        let tickets: Vec<_> = (0..8).map(|id| context.offer(id, 16)).collect();
        for (id, ticket) in (0..).zip(&tickets) {
            generation.fetch(id, ticket, 16);
        }
        drop(generation.transceiver);
        let deadline = Instant::now() + PATIENCE;
        let mut rest = Books {
            out: generation.out,
            undecided: (0..8).collect(),
        };
        while let Ok(event) = generation.events.try_recv() {
            rest.book(event);
        }
        assert!(rest.out.is_empty() && rest.undecided.is_empty());
        for id in 0..8 {
            context.lease_end(id);
        }
        context.assert_clean();
        assert!(Instant::now() < deadline);
    }
}

/// What is still expected of a transceiver that is gone.
struct Books {
    out: BTreeMap<BlockId, u64>,
    undecided: std::collections::BTreeSet<u64>,
}

impl Books {
    fn book(&mut self, event: HandoffEvent) {
        match event {
            HandoffEvent::PagesReturned { pages } => {
                for (block, _) in pages {
                    assert!(self.out.remove(&block).is_some());
                }
            }
            HandoffEvent::FetchEnded { request, .. } => {
                assert!(self.undecided.remove(&request.0));
            }
            HandoffEvent::LeaseEnded { .. } | HandoffEvent::Ranks(_) => {
                panic!("no lease was held here, and there is one rank")
            }
        }
    }
}

/// One thing that a test does at a random moment.
#[derive(Debug, Clone)]
enum Act {
    Offer { pages: usize },
    Fetch { of: prop::sample::Index },
    Cancel { of: prop::sample::Index },
    Withdraw { of: prop::sample::Index },
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (0_usize..9).prop_map(|pages| Act::Offer { pages }),
        3 => any::<prop::sample::Index>().prop_map(|of| Act::Fetch { of }),
        1 => any::<prop::sample::Index>().prop_map(|of| Act::Cancel { of }),
        1 => any::<prop::sample::Index>().prop_map(|of| Act::Withdraw { of }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_is_done_everything_comes_back(
        acts in prop::collection::vec(act(), 1..60),
        over in any::<prop::sample::Index>(),
    ) {
        let wire = *over.get(&wires());
        let (mut context, mut generation) = two(wire);
        let mut tickets = Vec::new();
        let mut fetched = 0;
        for act in acts {
            match act {
                Act::Offer { pages } => {
                    let id = tickets.len() as u64;
                    tickets.push((context.offer(id, pages), pages));
                }
                Act::Fetch { of } if !tickets.is_empty() => {
                    let (ticket, pages) = of.get(&tickets);
                    generation.fetch(fetched, ticket, *pages);
                    fetched += 1;
                }
                Act::Cancel { of } if fetched > 0 => {
                    let request = RequestId(of.index(usize::try_from(fetched).unwrap()) as u64);
                    generation.transceiver.cancel_fetch(request);
                }
                Act::Withdraw { of } if !tickets.is_empty() => {
                    context.transceiver.withdraw(of.index(tickets.len()) as u64);
                }
                _ => {}
            }
        }
        for request in 0..fetched {
            drop(generation.outcome(request));
        }
        for id in 0..tickets.len() as u64 {
            context.transceiver.withdraw(id);
        }
        assert_both_clean(&mut context, &mut generation);
    }
}

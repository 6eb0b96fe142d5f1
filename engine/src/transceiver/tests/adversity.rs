//! What goes wrong: bad wires, dead peers, forged tickets, and messages that make no sense.

use std::sync::Mutex;

use smallvec::smallvec;

use super::*;
use crate::transceiver::checksum::Algorithm;
use crate::transceiver::message::{Message, Request, RowNote, Taker};
use crate::transceiver::regions::RemoteRegions;
use crate::transport::memory::into_channel;
use crate::transport::{
    EndpointRecord, Note, PeerId, Runs, Submission, TransferId, TransportEvent, TransportSink,
    Write,
};

fn with_faults(mut params: TransceiverParams, faults: &str) -> TransceiverParams {
    params.faults = FaultPlan::parse(faults).unwrap();
    params.link.stall_timeout = Duration::from_secs(1);
    params
}

fn endpoint_of(ticket: &HandoffTicket) -> EndpointRecord {
    let state = OpaqueState::decode(&ticket.opaque_state).unwrap();
    state.ranks[0].endpoints[0].clone()
}

#[test]
fn a_flipped_byte_fails_the_fetch_with_a_checksum_error() {
    for wire in links() {
        let mut context = Instance::start(
            wire,
            with_faults(params("ctx-0"), "flip_byte=20000,every=2"),
        );
        let mut generation = Instance::start(wire, params("gen-0"));
        for id in 1..=4 {
            let ticket = context.offer(id, 3);
            generation.fetch(id, &ticket, 3);
            let outcome = generation.outcome(id);
            if id % 2 == 1 {
                outcome.unwrap();
                assert_eq!(context.lease_end(id), LeaseEnd::Delivered);
                continue;
            }
            let error = outcome.unwrap_err();
            assert!(matches!(error, HandoffError::Checksum(_)), "{error}");
            let text = error.to_string();
            assert!(text.contains("piece 0 of 3 of request"), "{text}");
            assert!(
                text.contains("context server ctx-0 at 127.0.0.1:"),
                "{text}"
            );
            assert_eq!(context.lease_end(id), LeaseEnd::Cancelled);
        }
        assert_both_clean(&mut context, &mut generation);
        assert_eq!(generation.transceiver.info().stats().checksum_mismatches, 2);
    }
}

#[test]
fn a_cut_or_stalled_transfer_fails_and_the_lease_can_be_claimed_again() {
    for wire in links() {
        // Within the second row of pages: who has heard of the first one does not ask again.
        for (faults, expected) in [
            ("cut_after_bytes=2000000,every=2", "within a frame"),
            ("stall_after_bytes=2000000,every=2", "no byte for 1s"),
        ] {
            let mut context = Instance::start(wire, with_faults(params("ctx-0"), faults));
            let receiving = with_faults(params("gen-0"), "");
            let mut generation = Instance::start(wire, receiving);
            let warm_up = context.offer(1, 3);
            generation.fetch(1, &warm_up, 3);
            generation.outcome(1).unwrap();
            let ticket = context.offer(2, 70);
            generation.fetch(2, &ticket, 70);
            let text = generation.outcome(2).unwrap_err().to_string();
            assert!(text.starts_with("lost context server ctx-0 at"), "{text}");
            assert!(text.contains(expected), "{text}");
            fetch_until_served(&mut generation, &ticket);
            assert_eq!(context.lease_end(2), LeaseEnd::Delivered);
            context.lease_end(1);
            assert_both_clean(&mut context, &mut generation);
        }
    }
}

/// Fetches the pages until the context side has seen the loss of the connection that fetched them before.
fn fetch_until_served(generation: &mut Instance, ticket: &HandoffTicket) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline);
        generation.fetch(3, ticket, 70);
        match generation.outcome(3) {
            Err(HandoffError::Refused(text)) if text.contains("already being") => {}
            outcome => {
                outcome.unwrap();
                return;
            }
        }
    }
}

#[test]
fn pieces_of_an_old_epoch_are_not_taken() {
    for wire in wires() {
        let mut context = Instance::start(wire, with_faults(params("ctx-0"), "stale_epoch"));
        let mut generation = Instance::start(wire, params("gen-0"));
        let ticket = context.offer(1, 3);
        generation.fetch(1, &ticket, 3);
        let text = generation.outcome(1).unwrap_err().to_string();
        assert!(text.contains("sent a piece of epoch"), "{text}");
        assert_eq!(context.lease_end(1), LeaseEnd::Cancelled);
        assert_both_clean(&mut context, &mut generation);
    }
}

#[test]
fn a_forged_nonce_or_old_epoch_gets_nothing_and_harms_nothing() {
    for wire in wires() {
        let mut context = Instance::start(wire, params("ctx-0"));
        let mut forging = Instance::start(wire, with_faults(params("gen-0"), "forged_nonce"));
        let mut honest = Instance::start(wire, params("gen-1"));
        let ticket = context.offer(1, 3);
        forging.fetch(1, &ticket, 3);
        let text = forging.outcome(1).unwrap_err().to_string();
        assert_eq!(text, "context server refused: wrong nonce for request 1");
        let replayed = tamper(&ticket, |state| state.epoch ^= 1);
        honest.fetch(2, &replayed, 3);
        let text = honest.outcome(2).unwrap_err().to_string();
        assert!(text.contains("was started again since"), "{text}");
        let unknown = HandoffTicket {
            ctx_request_id: 77,
            ..ticket.clone()
        };
        honest.fetch(3, &unknown, 3);
        assert!(matches!(honest.outcome(3), Err(HandoffError::Refused(_))));
        honest.fetch(4, &ticket, 3);
        honest.outcome(4).unwrap();
        assert_eq!(context.lease_end(1), LeaseEnd::Delivered);
        forging.assert_clean();
        assert_both_clean(&mut context, &mut honest);
    }
}

#[test]
fn a_restarted_context_server_is_reached_again_without_restarting_this_side() {
    let mut generation = Instance::start(Wire::TCP, params("gen-0"));
    let mut context = Instance::start(Wire::TCP, params("ctx-0"));
    let ticket = context.offer(1, 3);
    generation.fetch(1, &ticket, 3);
    generation.outcome(1).unwrap();
    context.lease_end(1);
    let stale = context.offer(2, 3);
    let address = endpoint_of(&stale).address;
    let port = address.rsplit(':').next().unwrap().parse().unwrap();
    drop(context);
    // Nobody is there now.
    generation.fetch(2, &stale, 3);
    let text = generation.outcome(2).unwrap_err().to_string();
    assert!(text.starts_with("lost context server ctx-0 at"), "{text}");
    // Another process has taken the port over: the old ticket is refused, a new one is served.
    let again = TransceiverParams {
        bind_port: port,
        ..params("ctx-0")
    };
    let mut context = Instance::start(Wire::TCP, again);
    let fresh = context.offer(1, 3);
    assert_eq!(endpoint_of(&fresh).address, address);
    generation.fetch(3, &stale, 3);
    let text = generation.outcome(3).unwrap_err().to_string();
    assert!(text.contains("was started again since"), "{text}");
    generation.fetch(4, &fresh, 3);
    generation.outcome(4).unwrap();
    assert_eq!(context.lease_end(1), LeaseEnd::Delivered);
    assert_both_clean(&mut context, &mut generation);
}

#[test]
fn a_context_server_that_never_answers_is_named_when_the_time_is_up() {
    for wire in links() {
        let deaf = Peer::start(wire);
        let mut context = Instance::start(wire, params("ctx-7"));
        let mut generation = Instance::start(wire, brief("gen-0"));
        let ticket = tamper(&context.offer(1, 3), |state| {
            state.ranks[0].endpoints[0] = deaf.transport.endpoint();
        });
        generation.fetch(1, &ticket, 3);
        let error = generation.outcome(1).unwrap_err();
        let HandoffError::TimedOut(text) = &error else {
            panic!("{error}");
        };
        assert!(text.starts_with("no kv from context server ctx-7 at 127.0.0.1:"));
        assert!(text.ends_with("s for an answer"), "{text}");
        context.transceiver.withdraw(1);
        assert_both_clean(&mut context, &mut generation);
    }
}

#[test]
fn a_generation_server_that_dies_leaves_the_lease_to_the_clock() {
    for wire in links() {
        let stalling = with_faults(brief("ctx-0"), "stall_after_bytes=40000");
        let mut context = Instance::start(wire, stalling);
        // First the receiver: the lease is short.
        let mut generation = Instance::start(wire, params("gen-0"));
        let ticket = context.offer(1, 3);
        generation.fetch(1, &ticket, 3);
        let deadline = Instant::now() + PATIENCE;
        while context.transceiver.info().stats().leases_serving == 0 {
            assert!(Instant::now() < deadline, "the context server never began");
            std::thread::yield_now();
        }
        drop(generation);
        assert_ne!(context.lease_end(1), LeaseEnd::Delivered);
        context.assert_clean();
    }
}

/// A bare transport that says what a transceiver would not.
struct Peer {
    events: Mutex<Receiver<TransportEvent>>,
    transport: Arc<dyn Transport>,
}

impl Peer {
    fn start(wire: Wire) -> Self {
        let (sender, events) = channel();
        let sink: TransportSink = into_channel(sender);
        let kind = KINDS.iter().find(|kind| kind.name == wire.0).unwrap();
        Self {
            events: Mutex::new(events),
            transport: (kind.start)(&params("peer"), sink).unwrap(),
        }
    }

    fn next(&self) -> TransportEvent {
        let events = self.events.lock().unwrap();
        events.recv_timeout(PATIENCE).expect("an event in time")
    }

    fn connect(&self, endpoint: &EndpointRecord) -> PeerId {
        let deadline = Instant::now() + PATIENCE;
        self.transport.connect(endpoint, deadline).unwrap()
    }

    fn say(&self, peer: PeerId, bytes: Vec<u8>) {
        assert_eq!(self.transport.notify(peer, bytes), Submission::Accepted);
    }

    /// Waits for a generation side's request.
    fn request(&self) -> (PeerId, Request) {
        loop {
            if let TransportEvent::Message { peer, message } = self.next()
                && let Ok(Message::Request(request)) = Message::decode(&message)
            {
                return (peer, request);
            }
        }
    }

    /// Refuses the next request; returns who asked.
    fn refuse(&self) -> PeerId {
        let (peer, request) = self.request();
        let transfer = request.transfer;
        let reason = "not today".to_owned();
        self.say(peer, Message::Refused { transfer, reason }.encode());
        peer
    }

    fn lost(&self) -> String {
        loop {
            if let TransportEvent::PeerLost { reason, .. } = self.next() {
                return reason;
            }
        }
    }
}

#[test]
fn a_cached_connection_that_turns_out_dead_is_replaced_once() {
    for wire in links() {
        let flaky = Peer::start(wire);
        let mut context = Instance::start(wire, params("ctx-0"));
        let mut generation = Instance::start(wire, params("gen-0"));
        let ticket = tamper(&context.offer(1, 3), |state| {
            state.ranks[0].endpoints[0] = flaky.transport.endpoint();
        });
        generation.fetch(1, &ticket, 3);
        let cached = flaky.refuse();
        assert!(matches!(
            generation.outcome(1),
            Err(HandoffError::Refused(_))
        ));
        // The cached connection breaks under the second request, which comes again over a new one.
        generation.fetch(2, &ticket, 3);
        let (peer, first) = flaky.request();
        assert_eq!(peer, cached);
        flaky.transport.disconnect(peer);
        let (peer, again) = flaky.request();
        assert_eq!(again, first);
        assert_ne!(peer, cached);
        // When that one breaks too, the fetch has failed.
        flaky.transport.disconnect(peer);
        let text = generation.outcome(2).unwrap_err().to_string();
        assert!(text.starts_with("lost context server ctx-0 at"), "{text}");
        context.transceiver.withdraw(1);
        assert_both_clean(&mut context, &mut generation);
    }
}

#[test]
fn a_context_side_survives_messages_that_make_no_sense() {
    for wire in links() {
        let mut context = Instance::start(wire, params("ctx-0"));
        let ticket = context.offer(1, 3);
        let endpoint = endpoint_of(&ticket);
        let stranger = Peer::start(wire);
        for nonsense in [b"{\"request\":{".to_vec(), vec![0xff; 64], Vec::new()] {
            let peer = stranger.connect(&endpoint);
            stranger.say(peer, nonsense);
            assert!(stranger.lost().contains("closed by the peer"));
        }
        // Well-formed, but nobody's business of theirs.
        let peer = stranger.connect(&endpoint);
        let transfer = TransferId(1);
        let strays = [
            Message::Acknowledge { transfer },
            Message::Refused {
                transfer,
                reason: "no".to_owned(),
            },
            Message::Done {
                transfer,
                bytes: 0,
                pieces: 0,
            },
        ];
        for stray in strays {
            stranger.say(peer, stray.encode());
        }
        let mut generation = Instance::start(wire, params("gen-0"));
        generation.fetch(1, &ticket, 3);
        generation.outcome(1).unwrap();
        assert_eq!(context.lease_end(1), LeaseEnd::Delivered);
        assert_both_clean(&mut context, &mut generation);
    }
}

#[test]
fn a_request_of_another_protocol_is_refused_by_number() {
    for wire in links() {
        let mut context = Instance::start(wire, params("ctx-0"));
        let ticket = context.offer(1, 0);
        let state = OpaqueState::decode(&ticket.opaque_state).unwrap();
        let stranger = Peer::start(wire);
        let peer = stranger.connect(&endpoint_of(&ticket));
        let request = Message::Request(Request {
            version: 99,
            claim: message::Claim {
                ctx_request_id: 1,
                epoch: state.epoch,
                nonce: state.nonce,
            },
            taker: Taker {
                epoch: 0,
                request: 0,
            },
            instance: "stranger".to_owned(),
            rank: 0,
            transfer: TransferId(5),
            layout: state.layout,
            first_token: 0,
            token_count: 0,
            regions: RemoteRegions::default(),
        });
        stranger.say(peer, request.encode());
        let TransportEvent::Message { message, .. } = stranger.next() else {
            panic!("an answer was due");
        };
        match Message::decode(&message).unwrap() {
            Message::Refused { reason, .. } => {
                let expected = format!("hand-off protocol 99 asked for, {PROTOCOL_VERSION} here");
                assert_eq!(reason, expected);
            }
            other => panic!("{other:?}"),
        }
        context.transceiver.withdraw(1);
        context.lease_end(1);
        context.assert_clean();
    }
}

/// What a lying context server sends after it was asked.
#[derive(Clone, Copy)]
enum Lie {
    /// The first piece, again and again.
    SamePieceTwice,
    WrongIndex,
    PartOfAPage,
    NoNote,
    DoneWithLess,
    DoneWithoutPieces,
    GoesAway,
}

#[test]
fn a_lying_context_server_is_found_out_and_no_page_is_lost() {
    use Lie::{
        DoneWithLess, DoneWithoutPieces, GoesAway, NoNote, PartOfAPage, SamePieceTwice, WrongIndex,
    };
    let lies = [
        SamePieceTwice,
        WrongIndex,
        PartOfAPage,
        NoNote,
        DoneWithLess,
        DoneWithoutPieces,
        GoesAway,
    ];
    for (wire, lie) in links()
        .into_iter()
        .flat_map(|wire| lies.map(|lie| (wire, lie)))
    {
        let mut honest = Instance::start(wire, params("ctx-0"));
        let liar = Peer::start(wire);
        let receiving = match lie {
            // Nothing contradicts the one, and perhaps not the other; then the clock does.
            DoneWithoutPieces | SamePieceTwice => brief("gen-0"),
            _ => params("gen-0"),
        };
        let mut generation = Instance::start(wire, receiving);
        let ticket = tamper(&honest.offer(1, 3), |state| {
            state.ranks[0].endpoints[0] = liar.transport.endpoint();
        });
        generation.fetch(1, &ticket, 3);
        let (peer, request) = liar.request();
        tell_lie(&liar, peer, &request, &lie);
        let error = generation.outcome(1).unwrap_err();
        match (lie, &error) {
            // The second one came while the first was still in place, or was on its way to it.
            (SamePieceTwice, HandoffError::Transport(text)) => {
                let found_out = ["where it does not belong", "twice"];
                assert!(found_out.iter().any(|t| text.contains(t)), "{text}");
            }
            (DoneWithoutPieces, error) => {
                let text = error.to_string();
                assert!(text.starts_with("timed out"), "{text}");
                assert!(
                    text.contains("of 3 pages came from context server"),
                    "{text}"
                );
            }
            // A wire that is slow to begin may not have brought the first one either.
            (SamePieceTwice, error) => {
                assert!(matches!(error, HandoffError::TimedOut(_)), "{error}");
            }
            (_, error) => assert!(matches!(error, HandoffError::Transport(_)), "{error}"),
        }
        generation.assert_clean();
        honest.transceiver.withdraw(1);
        honest.lease_end(1);
    }
}

fn tell_lie(liar: &Peer, peer: PeerId, request: &Request, lie: &Lie) {
    let transfer = request.transfer;
    let source = Arc::new(filled(SHAPE, 1, 0));
    let note: RowNote = RowNote {
        ctx_request_id: request.claim.ctx_request_id,
        epoch: request.claim.epoch,
        rank: 0,
        piece: u32::from(matches!(lie, Lie::WrongIndex)),
        algorithm: Algorithm::Stripes,
        sums: smallvec![crate::transport::checksum::sum(source.as_bytes())],
    };
    let write = Write {
        peer,
        transfer,
        runs: Runs::whole(SHAPE.bytes() - usize::from(matches!(lie, Lie::PartOfAPage))),
        sources: source.into(),
        target: request.regions.get(0).unwrap(),
        note: match lie {
            Lie::NoNote => Note::new(),
            _ => note.encode(),
        },
        sum_at: None,
    };
    let pieces = 3;
    let bytes = kv_bytes(3);
    let send = |write: &Write| {
        assert_eq!(liar.transport.write(write.clone()), Submission::Accepted);
    };
    match lie {
        Lie::SamePieceTwice => {
            send(&write);
            send(&write);
        }
        Lie::WrongIndex | Lie::PartOfAPage | Lie::NoNote => send(&write),
        Lie::DoneWithLess => {
            let bytes = bytes - 1;
            let done = Message::Done {
                transfer,
                bytes,
                pieces,
            };
            liar.say(peer, done.encode());
        }
        Lie::DoneWithoutPieces => {
            let done = Message::Done {
                transfer,
                bytes,
                pieces,
            };
            liar.say(peer, done.encode());
        }
        Lie::GoesAway => liar.transport.disconnect(peer),
    }
}

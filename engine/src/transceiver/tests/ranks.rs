//! The transceivers of one instance's ranks: what the engine of the leading one hears of the others, and what ends the
//! instance.

use super::*;
use crate::transceiver::message::Message;
use crate::transport::memory::into_channel;
use crate::transport::{Submission, TransportEvent, TransportSink};

/// Of two tensor ranks.
const WHOLE: PageShape = PageShape {
    layers: 1,
    kv_heads: 2,
    tokens_per_block: 16,
    head_dim: 4,
    dtype: KvDtype::F32,
};

/// The page of either.
const PART: PageShape = PageShape {
    kv_heads: 1,
    ..WHOLE
};

fn ranked(mut params: TransceiverParams, rank: u32) -> TransceiverParams {
    params.layout.page = WHOLE;
    params.layout.tensor_parallel = 2;
    params.config.backend = baton_configs::transceiver::TransportChoice::Tcp;
    params.rank = rank;
    params
}

/// A leading rank, and the one that follows it.
struct Pair {
    leader: Instance,
    follower: Instance,
    /// What the follower was told.
    terms: Vec<u8>,
}

impl Pair {
    fn start(params: &TransceiverParams) -> Self {
        let (sender, events) = channel();
        let sink: HandoffSink = Arc::new(move |event| drop(sender.send(event)));
        let mut leader = Transceiver::start(ranked(params.clone(), 0), sink).unwrap();
        let host = "127.0.0.1".to_owned();
        let terms = leader.take_lead(host.clone(), host).unwrap();
        let (sender, heard) = channel();
        let sink: HandoffSink = Arc::new(move |event| drop(sender.send(event)));
        let followed = Transceiver::follow(ranked(params.clone(), 1), &terms, sink);
        let (follower, record) = followed.unwrap();
        leader.joined(&[record]).unwrap();
        Self {
            leader: Instance::around(leader, PART, events),
            follower: Instance::around(follower, PART, heard),
            terms,
        }
    }

    fn nodes(&mut self) -> [&mut Instance; 2] {
        [&mut self.leader, &mut self.follower]
    }

    /// Offers a page on both ranks.
    fn offer(&mut self, id: u64) -> HandoffTicket {
        let ticket = self.leader.offer(id, 1);
        let token_count = PART.tokens_per_block - 5;
        let offer = Offer {
            ctx_request_id: id,
            token_count,
            pages: vec![Arc::new(Page::zeroed(PART))],
        };
        let follower = &mut self.follower.transceiver;
        follower.join_offer(offer, &ticket.opaque_state);
        ticket
    }

    fn heard(&mut self, expected: &RanksEvent) {
        let what = format!("{expected:?}");
        self.leader
            .wait(&what, |node| node.ranks_events.contains(expected));
        self.leader.ranks_events.retain(|event| event != expected);
    }
}

#[test]
fn a_lease_that_nobody_claims_ends_on_every_rank_by_the_clock_alone() {
    let mut pair = Pair::start(&brief("ctx-0"));
    pair.offer(1);
    // Each rank has its own clock; whose comes first has the other give it up, and the engine hears one end.
    pair.heard(&RanksEvent::LeaseUnwanted { ctx_request_id: 1 });
    for node in pair.nodes() {
        node.transceiver.withdraw(1);
    }
    let end = pair.leader.lease_end(1);
    assert!(matches!(end, LeaseEnd::Expired | LeaseEnd::Cancelled));
    pair.leader.assert_clean();
}

#[test]
fn a_lease_that_one_rank_cannot_hold_is_given_up_on_all() {
    let mut params = params("ctx-0");
    params.limits.leases = 1;
    let mut pair = Pair::start(&params);
    // Two on the follower alone use up what it may hold.
    let offer = Offer {
        ctx_request_id: 7,
        token_count: 1,
        pages: vec![Arc::new(Page::zeroed(PART))],
    };
    let ticket = pair.leader.transceiver.template.encode().unwrap();
    pair.follower.transceiver.join_offer(offer, &ticket);
    pair.offer(1);
    pair.heard(&RanksEvent::LeaseUnwanted { ctx_request_id: 1 });
    pair.leader.transceiver.withdraw(1);
    assert_eq!(pair.leader.lease_end(1), LeaseEnd::Cancelled);
}

#[test]
fn more_ends_than_a_line_takes_at_once_are_all_reported_in_their_order() {
    const FETCHES: u64 = 3000;
    let mut pair = Pair::start(&params("gen-0"));
    let bad = HandoffTicket {
        ctx_request_id: 1,
        disagg_request_id: None,
        opaque_state: b"no state".to_vec(),
        first_tokens: Vec::new(),
        first_logprobs: Vec::new(),
    };
    for node in pair.nodes() {
        for request in 1..=FETCHES {
            node.fetch(request, &bad, 1);
        }
    }
    for request in 1..=FETCHES {
        let error = pair.leader.outcome(request).unwrap_err();
        assert!(matches!(error, HandoffError::State(_)), "{error}");
        let doomed = RanksEvent::FetchDoomed {
            request: RequestId(request),
        };
        pair.leader.ranks_events.retain(|event| *event != doomed);
    }
    assert_eq!(pair.leader.ranks_events, []);
    pair.leader.assert_clean();
}

#[test]
fn a_rank_whose_transceiver_is_gone_ends_the_instance() {
    let Pair {
        mut leader,
        follower,
        ..
    } = Pair::start(&params("ctx-0"));
    // It has to have joined; before that its process is missed elsewhere.
    let ticket = leader.offer(1, 1);
    let mut follower = follower;
    let offer = Offer {
        ctx_request_id: 1,
        token_count: 1,
        pages: vec![Arc::new(Page::zeroed(PART))],
    };
    let joining = &mut follower.transceiver;
    joining.join_offer(offer, &ticket.opaque_state);
    joining.withdraw(1);
    leader.wait("the follower's end of the lease", |node| {
        !node.ranks_events.is_empty()
    });
    drop(follower);
    leader.wait("the loss of the follower", |node| {
        let mut events = node.ranks_events.iter();
        events.any(|event| matches!(event, RanksEvent::Lost { rank: 1, .. }))
    });
}

#[test]
fn a_leading_rank_that_is_gone_is_told_to_those_that_follow() {
    let Pair {
        leader,
        mut follower,
        ..
    } = Pair::start(&params("ctx-0"));
    drop(leader);
    follower.wait("the loss of the leader", |node| {
        let mut events = node.ranks_events.iter();
        events.any(|event| matches!(event, RanksEvent::Lost { rank: 0, .. }))
    });
}

#[test]
fn a_report_without_the_instances_secret_is_not_booked() {
    let mut pair = Pair::start(&params("ctx-0"));
    pair.offer(1);
    let (sender, events) = channel();
    let sink: TransportSink = into_channel(sender);
    let tcp = KINDS.iter().find(|kind| kind.name == "tcp").unwrap();
    let stranger = (tcp.start)(&params("stranger"), sink).unwrap();
    let endpoint = &pair.leader.transceiver.template.ranks[0].endpoints[0];
    let deadline = Instant::now() + PATIENCE;
    let peer = stranger.connect(endpoint, deadline).unwrap();
    let report = Message::Rank {
        secret: Nonce::random(),
        rank: 1,
        events: vec![desk::RankEvent::LeaseEnded {
            ctx_request_id: 1,
            end: LeaseEnd::Delivered,
        }],
        totals: info::RankTotals::default(),
    };
    assert_eq!(stranger.notify(peer, report.encode()), Submission::Accepted);
    loop {
        let event = events.recv_timeout(PATIENCE).expect("it is cut off");
        if matches!(event, TransportEvent::PeerLost { .. }) {
            break;
        }
    }
    for node in pair.nodes() {
        node.transceiver.withdraw(1);
    }
    assert_eq!(pair.leader.lease_end(1), LeaseEnd::Cancelled);
}

#[test]
fn terms_of_another_version_are_refused() {
    let pair = Pair::start(&params("ctx-0"));
    let sink: HandoffSink = Arc::new(|_| ());
    let cut = &pair.terms[..pair.terms.len() / 2];
    let refused = Transceiver::follow(ranked(params("ctx-0"), 1), cut, sink);
    assert!(matches!(refused, Err(TransceiverStartError::Terms(_))));
    let mut leader = pair.leader.transceiver;
    let missing = leader.joined(&[]);
    assert!(missing.is_ok(), "both ranks are there");
    leader.template.ranks.pop();
    let missing = leader.joined(&[]).unwrap_err().to_string();
    assert_eq!(missing, "kv transceivers of 1 of 2 ranks have started");
}

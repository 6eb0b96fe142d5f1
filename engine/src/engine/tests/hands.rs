//! Both ends of the hand-off: pins, tickets, fetches, failures, late pages.

use super::*;
use crate::handoff::{Fetch, HandoffError, HandoffEvent, HandoffStats, LeaseEnd};
use crate::request::RequestId;

impl Rig {
    pub(super) fn end_lease(&mut self, ctx_request_id: u64, end: LeaseEnd) {
        self.wire.lock().offers.remove(&ctx_request_id);
        (self.sink)(HandoffEvent::LeaseEnded {
            ctx_request_id,
            end,
        });
        self.obey();
    }

    pub(super) fn deliver(&self, mut fetch: Fetch, prompt: &[TokenId]) {
        fill_pages(&mut fetch.pages.pages, prompt, fetch.first_token);
        let outcome = Ok(HandoffStats {
            bytes: 100,
            ..HandoffStats::default()
        });
        (self.sink)(HandoffEvent::PagesReturned { pages: fetch.pages });
        self.decide(fetch.request, outcome);
    }

    pub(super) fn decide(&self, request: RequestId, outcome: Result<HandoffStats, HandoffError>) {
        (self.sink)(HandoffEvent::FetchEnded { request, outcome });
    }

    fn the_fetch(&self) -> Fetch {
        let id = *self.wire.lock().fetches.keys().next().expect("a fetch");
        self.wire.take_fetch(id).expect("that fetch")
    }
}

/// The request as the generation server gets it.
pub(super) fn generation_half(whole: &GenerateRequest, max_len: usize) -> GenerateRequest {
    let (answer, _) = closed_form(whole, max_len);
    GenerateRequest {
        kind: RequestKind::GenerationOnly(HandoffTicket {
            ctx_request_id: 5,
            disagg_request_id: Some(6),
            opaque_state: fakes::state_for(whole.prompt.len()),
            first_tokens: answer[..1].to_vec(),
            first_logprobs: Vec::new(),
        }),
        ..whole.clone()
    }
}

fn context_half(whole: &GenerateRequest) -> GenerateRequest {
    GenerateRequest {
        kind: RequestKind::ContextOnly {
            disagg_request_id: Some(77),
            early: false,
        },
        ..whole.clone()
    }
}

fn lost() -> HandoffError {
    HandoffError::Transport("connection reset".to_owned())
}

#[test]
fn a_context_server_writes_one_token_and_keeps_the_kv() {
    let mut rig = Rig::new(small_config());
    let mut whole = request(&long_running(11), 10);
    whole.sampling.logprobs = Some(2);
    let mut reader = rig.submit(context_half(&whole));
    rig.run();
    let answer = reader.read();
    assert_eq!(answer.reason(), FinishReason::NotFinished);
    assert_eq!(answer.tokens, closed_form(&whole, 64).0[..1]);
    let ticket = answer.ticket().expect("more is to come").clone();
    assert_ne!(ticket.ctx_request_id, 0);
    assert_eq!(ticket.disagg_request_id, Some(77));
    assert_eq!(ticket.first_tokens, answer.tokens);
    let logprobs = answer.logprobs[0].clone().expect("asked for");
    assert_eq!(ticket.first_logprobs[0][0], logprobs.chosen);
    assert_eq!(ticket.first_logprobs[0][1..], logprobs.top);
    {
        let wire = rig.wire.lock();
        let offer = &wire.offers[&ticket.ctx_request_id];
        assert_eq!((offer.token_count, offer.pages.len()), (5, 2));
        assert!((offer.pages[1].as_f32()[0] - 6.0).abs() < f32::EPSILON);
    }
    let stats = rig.stats();
    assert_eq!(
        (stats.blocks_used, stats.blocks_pinned, stats.leases),
        (2, 2, 1)
    );

    // Others may read the leased prefix meanwhile.
    let mut other = rig.submit(whole.clone());
    rig.run();
    assert_eq!(other.read().tokens, closed_form(&whole, 64).0);
    assert_eq!(other.answer.costs().cached_tokens, 4);

    rig.end_lease(ticket.ctx_request_id, LeaseEnd::Delivered);
    assert_eq!(rig.stats().handoffs_delivered_total, 1);
    rig.assert_clean();
}

#[test]
fn an_answer_of_one_token_needs_no_lease() {
    let mut rig = Rig::new(small_config());
    let mut reader = rig.submit(context_half(&request(&long_running(11), 1)));
    rig.run();
    assert_eq!(reader.read().reason(), FinishReason::Length);
    assert_eq!(reader.answer.ticket(), None);
    rig.assert_clean();
}

#[test]
fn a_refused_offer_fails_the_request_and_frees_its_blocks() {
    let mut rig = Rig::new(small_config());
    rig.wire.lock().refuse_offers = true;
    let mut reader = rig.submit(context_half(&request(&long_running(11), 10)));
    rig.run();
    let RequestFailure::Handoff(text) = reader.read().failure() else {
        panic!("not a hand-off failure");
    };
    assert!(text.contains("2 of 2 leases held"), "{text}");
    rig.assert_clean();
}

#[test]
fn a_client_who_never_read_the_ticket_withdraws_the_lease() {
    let mut rig = Rig::new(small_config());
    let mut reader = rig.submit(context_half(&request(&long_running(11), 10)));
    rig.run();
    assert_eq!(rig.stats().leases, 1);
    reader.drop_stream();
    rig.run();
    let withdrawn = rig.wire.lock().withdrawn.clone();
    assert_eq!(withdrawn.len(), 1);
    rig.end_lease(withdrawn[0], LeaseEnd::Cancelled);
    rig.assert_clean();
}

#[test]
fn a_pool_full_of_leases_takes_new_prompts_when_they_end() {
    let mut rig = Rig::new(EngineConfig {
        block_count: 4,
        ..small_config()
    });
    let mut leased = rig.submit(context_half(&request(&[1; 12], 10)));
    rig.run();
    let waiting = request(&[2; 12], 3);
    let mut reader = rig.submit(waiting.clone());
    rig.run();
    assert!(reader.read().tokens.is_empty());
    let id = leased.read().ticket().expect("a lease").ctx_request_id;
    // A reader that outlives its lease for a moment: its page must not be written yet.
    let late = rig.wire.lock().offers[&id].pages.clone();
    rig.end_lease(id, LeaseEnd::Expired);
    rig.run();
    assert!(reader.read().tokens.is_empty());
    assert!(rig.core.scheduler.pool.take_skipped_shared());
    drop(late);
    rig.run();
    assert_eq!(reader.read().tokens, closed_form(&waiting, 16).0);
    rig.assert_clean();
}

#[test]
fn fetched_kv_is_decoded_from_and_found_again() {
    let mut rig = Rig::new(small_config());
    let whole = request(&long_running(13), 12);
    let mut reader = rig.submit(generation_half(&whole, 64));
    rig.run();
    let stats = rig.stats();
    assert_eq!((stats.blocks_lent, stats.requests_fetching), (2, 1));
    assert!(reader.read().tokens.is_empty());
    let fetch = rig.the_fetch();
    assert_eq!((fetch.token_count, fetch.pages.len()), (5, 2));
    rig.deliver(fetch, &whole.prompt);
    rig.run();
    let (tokens, reason) = closed_form(&whole, 64);
    assert_eq!(reader.read().tokens, tokens);
    assert_eq!(reader.answer.reason(), reason);
    let costs = reader.answer.costs();
    assert_eq!(costs.handoff.as_ref().map(|stats| stats.bytes), Some(100));
    assert!(!costs.prefilled_again);
    rig.assert_clean();

    let mut again = rig.submit(whole);
    rig.run();
    assert_eq!(again.read().costs().cached_tokens, 4);
    assert_eq!(again.answer.tokens, tokens);
}

#[test]
fn only_what_the_prefix_cache_lacks_is_fetched() {
    let mut rig = Rig::new(small_config());
    let whole = request(&long_running(13), 12);
    let (tokens, _) = closed_form(&whole, 64);
    let mut first = rig.submit(whole.clone());
    rig.run();
    assert_eq!(first.read().tokens, tokens);
    // One of the prompt's two blocks is full, hence found.
    let mut second = rig.submit(generation_half(&whole, 64));
    rig.run();
    assert_eq!(rig.stats().blocks_lent, 1);
    let fetch = rig.the_fetch();
    assert_eq!((fetch.first_token, fetch.token_count), (4, 5));
    assert_eq!(fetch.pages.len(), 1);
    rig.deliver(fetch, &whole.prompt);
    rig.run();
    assert_eq!(second.read().tokens, tokens);
    assert_eq!(second.answer.costs().cached_tokens, 4);
    rig.assert_clean();
    // A fetch that fails gives the found blocks back too.
    let mut third = rig.submit(generation_half(&whole, 64));
    rig.run();
    let fetch = rig.the_fetch();
    (rig.sink)(HandoffEvent::PagesReturned { pages: fetch.pages });
    rig.decide(fetch.request, Err(HandoffError::Cancelled));
    rig.run();
    assert!(matches!(third.read().failure(), RequestFailure::Handoff(_)));
    rig.assert_clean();
}

#[test]
fn a_ticket_that_completes_the_answer_gives_exactly_one_token() {
    let mut rig = Rig::new(small_config());
    let whole = request(&long_running(13), 1);
    let mut half = generation_half(&whole, 64);
    let mut reader = rig.submit(half.clone());
    rig.run();
    assert_eq!(reader.read().tokens.len(), 1);
    assert_eq!(reader.answer.reason(), FinishReason::Length);
    assert!(rig.wire.lock().fetches.is_empty());
    rig.assert_clean();

    half.sampling.prompt_logprobs = Some(0);
    let mut reader = rig.submit(half);
    rig.run();
    assert_eq!(reader.read().tokens.len(), 1);
    assert_eq!(
        reader.answer.prompt_logprobs.as_ref().map(Vec::len),
        Some(4)
    );
    rig.assert_clean();
}

#[test]
fn tickets_that_do_not_fit_are_refused_before_anything_is_taken() {
    let mut rig = Rig::new(small_config());
    let whole = request(&long_running(13), 12);
    for (state, text) in [
        (vec![], "hand-off state not understood: 0 bytes"),
        (vec![1, 2], "kv layouts differ: head_dim 64 here, 128 there"),
        (
            vec![9],
            "the hand-off holds kv of 9 tokens, but the prompt has 5",
        ),
    ] {
        let mut half = generation_half(&whole, 64);
        if let RequestKind::GenerationOnly(ticket) = &mut half.kind {
            ticket.opaque_state = state;
        }
        let mut reader = rig.submit(half);
        rig.run();
        let failure = RequestFailure::Unservable(text.to_owned());
        assert_eq!(reader.read().failure(), &failure);
        assert!(rig.wire.lock().fetches.is_empty());
    }
    rig.assert_clean();
}

#[test]
fn a_failed_fetch_reads_the_prompt_again_in_other_blocks() {
    let mut rig = Rig::new(small_config());
    let whole = request(&long_running(17), 12);
    let mut reader = rig.submit(generation_half(&whole, 64));
    rig.run();
    let mut fetch = rig.the_fetch();
    rig.decide(fetch.request, Err(lost()));
    rig.run();
    let (tokens, _) = closed_form(&whole, 64);
    assert_eq!(reader.read().tokens, tokens);
    assert!(reader.answer.costs().prefilled_again);
    let stats = rig.stats();
    assert_eq!((stats.blocks_quarantined, stats.blocks_used), (2, 0));
    assert_eq!(stats.handoffs_prefilled_again_total, 1);
    // What the transport wrote late harms nobody.
    fill_pages(&mut fetch.pages.pages, &[40; 5], fetch.first_token);
    (rig.sink)(HandoffEvent::PagesReturned { pages: fetch.pages });
    rig.run();
    rig.assert_clean();
}

#[test]
fn quarantine_can_make_a_second_reading_wait_for_memory() {
    let mut rig = Rig::new(EngineConfig {
        block_count: 4,
        ..small_config()
    });
    let whole = request(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 6);
    let mut reader = rig.submit(generation_half(&whole, 16));
    rig.run();
    let fetch = rig.the_fetch();
    rig.decide(fetch.request, Err(lost()));
    rig.run();
    assert_eq!(reader.read().tokens.len(), 1);
    assert_eq!(rig.stats().requests_waiting, 1);
    (rig.sink)(HandoffEvent::PagesReturned { pages: fetch.pages });
    rig.run();
    assert_eq!(reader.read().tokens, closed_form(&whole, 16).0);
    rig.assert_clean();
}

#[test]
fn a_layout_found_wrong_late_fails_the_request() {
    let mut rig = Rig::new(small_config());
    let mut reader = rig.submit(generation_half(&request(&long_running(17), 12), 64));
    rig.run();
    let fetch = rig.the_fetch();
    (rig.sink)(HandoffEvent::PagesReturned { pages: fetch.pages });
    rig.decide(
        fetch.request,
        Err(HandoffError::Layout("tp 1, 2".to_owned())),
    );
    rig.run();
    let failure = RequestFailure::Unservable("kv layouts differ: tp 1, 2".to_owned());
    assert_eq!(reader.read().failure(), &failure);
    rig.assert_clean();
}

#[test]
fn a_cancelled_fetch_is_quarantined_until_its_pages_come() {
    let mut rig = Rig::new(small_config());
    let mut reader = rig.submit(generation_half(&request(&long_running(17), 12), 64));
    rig.run();
    let fetch = rig.the_fetch();
    reader.drop_stream();
    rig.run();
    assert_eq!(rig.wire.lock().cancelled, [fetch.request]);
    assert_eq!(rig.stats().blocks_quarantined, 2);
    rig.decide(fetch.request, Err(HandoffError::Cancelled));
    (rig.sink)(HandoffEvent::PagesReturned { pages: fetch.pages });
    rig.run();
    assert_eq!(rig.stats().requests_cancelled_total, 1);
    rig.assert_clean();
}

#[test]
fn a_fetch_holds_blocks_but_no_place_in_the_batch() {
    let mut rig = Rig::new(EngineConfig {
        max_batch_size: 1,
        ..small_config()
    });
    let whole = request(&long_running(19), 12);
    let mut fetched = rig.submit(generation_half(&whole, 64));
    rig.run();
    let local = request(&long_running(23), 12);
    let mut reader = rig.submit(local.clone());
    rig.step();
    assert_eq!(reader.read().tokens.len(), 1);
    let fetch = rig.the_fetch();
    rig.deliver(fetch, &whole.prompt);
    rig.step();
    // The first token comes with the KV, the others when there is a place.
    assert_eq!(fetched.read().tokens.len(), 1);
    rig.run();
    assert_eq!(reader.read().tokens, closed_form(&local, 64).0);
    assert_eq!(fetched.read().tokens, closed_form(&whole, 64).0);
    rig.assert_clean();
}

#[test]
fn prompt_logprobs_are_computed_on_the_generation_side_too() {
    let mut rig = Rig::new(small_config());
    let mut whole = request(&long_running(29), 8);
    whole.sampling.prompt_logprobs = Some(0);
    let mut reader = rig.submit(generation_half(&whole, 64));
    let mut local = rig.submit(whole.clone());
    rig.run();
    let fetch = rig.the_fetch();
    rig.deliver(fetch, &whole.prompt);
    rig.run();
    assert_eq!(reader.read().tokens, closed_form(&whole, 64).0);
    assert!(reader.answer.prompt_logprobs.is_some());
    assert_eq!(reader.answer.prompt_logprobs, local.read().prompt_logprobs);
    rig.assert_clean();
}

#[test]
fn seeded_answers_are_equal_through_a_handoff() {
    let mut whole = request(&long_running(31), 20);
    whole.sampling.temperature = 0.9;
    whole.sampling.top_p = 0.9;
    whole.sampling.repetition_penalty = 1.2;
    whole.sampling.seed = 12345;
    whole.sampling.ignore_eos = true;
    let (expected, _) = closed_form(&whole, 64);

    let mut context = Rig::new(small_config());
    let mut first = context.submit(context_half(&whole));
    context.run();
    let ticket = first.read().ticket().expect("more is to come").clone();
    let mut generation = Rig::new(small_config());
    let mut reader = generation.submit(GenerateRequest {
        kind: RequestKind::GenerationOnly(ticket.clone()),
        ..whole.clone()
    });
    generation.run();
    let mut fetch = generation.the_fetch();
    {
        let wire = context.wire.lock();
        let offer = &wire.offers[&ticket.ctx_request_id];
        for (to, from) in fetch.pages.pages.iter_mut().zip(&offer.pages) {
            to.as_bytes_mut().copy_from_slice(from.as_bytes());
        }
    }
    (generation.sink)(HandoffEvent::PagesReturned { pages: fetch.pages });
    generation.decide(fetch.request, Ok(HandoffStats::default()));
    generation.run();
    assert_eq!(reader.read().tokens, expected);
    context.end_lease(ticket.ctx_request_id, LeaseEnd::Delivered);
    context.assert_clean();
    generation.assert_clean();
}

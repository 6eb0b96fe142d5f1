//! Leases that grow while the prompt is read, and fetches for requests that are still to come.

use super::*;
use crate::handoff::{HandoffError, HandoffEvent, LeaseEnd};
use crate::request::RequestId;

/// A prompt of five blocks, the last of them not full, whose answer goes on for a while.
fn long_prompt() -> Vec<TokenId> {
    (0..40)
        .map(|salt| (0..18).map(|n| 1 + (salt * 7 + n * 3) % 40).collect())
        .find(|prompt: &Vec<_>| closed_form(&request(prompt, 8), 64).1 == FinishReason::Length)
        .expect("some prompt does")
}

/// Reads prompts eight tokens a step.
fn in_chunks() -> EngineConfig {
    EngineConfig {
        max_num_tokens: 8,
        enable_chunked_prefill: true,
        ..small_config()
    }
}

fn context_of(whole: &GenerateRequest) -> GenerateRequest {
    GenerateRequest {
        kind: RequestKind::ContextOnly {
            disagg_request_id: Some(77),
            early: true,
        },
        ..whole.clone()
    }
}

/// What a generation server is asked while the context server still reads.
pub(super) fn prefetch_of(whole: &GenerateRequest) -> GenerateRequest {
    GenerateRequest {
        kind: RequestKind::Prefetch(HandoffTicket {
            ctx_request_id: 5,
            disagg_request_id: Some(6),
            opaque_state: fakes::state_for(whole.prompt.len()),
            first_tokens: Vec::new(),
            first_logprobs: Vec::new(),
        }),
        sampling: SamplingParams::default(),
        ..whole.clone()
    }
}

impl Rig {
    /// Turns until a lease is opened for a prompt that is not read to its end; its ticket.
    fn until_opened(&mut self, reader: &mut Reader) -> HandoffTicket {
        loop {
            if let Some(ticket) = &reader.read().lease {
                return ticket.clone();
            }
            assert!(self.step(), "a lease is opened before the prompt ends");
        }
    }

    fn pages_under(&self, ctx_request_id: u64) -> usize {
        self.wire.lock().offers[&ctx_request_id].pages.len()
    }

    fn fetch_of(&self, id: u64) -> crate::handoff::Fetch {
        self.wire.take_fetch(RequestId(id)).expect("it is fetched")
    }
}

#[test]
fn a_lease_grows_with_the_prompt() {
    for overlap in [false, true] {
        let model = if overlap {
            FakeModel::by_itself()
        } else {
            FakeModel::new()
        };
        let config = EngineConfig {
            overlap,
            ..in_chunks()
        };
        let mut rig = Rig::of(model, config, 100);
        let whole = request(&long_prompt(), 8);
        let mut reader = rig.submit(context_of(&whole));
        let early = rig.until_opened(&mut reader);
        assert!(reader.answer.tokens.is_empty() && early.first_tokens.is_empty());
        assert_eq!(early.disagg_request_id, Some(77));
        assert_eq!(rig.pages_under(early.ctx_request_id), 2);
        rig.run();
        let ticket = reader.read().ticket().expect("more is to come").clone();
        assert_eq!(ticket.ctx_request_id, early.ctx_request_id);
        assert_eq!(ticket.opaque_state, early.opaque_state);
        assert_eq!(ticket.first_tokens, closed_form(&whole, 64).0[..1]);
        assert_eq!(rig.pages_under(ticket.ctx_request_id), 5);
        let stats = rig.stats();
        assert_eq!((stats.blocks_used, stats.blocks_pinned), (5, 5));
        assert_eq!(
            (
                stats.handoffs_offered_total,
                stats.handoffs_opened_early_total
            ),
            (1, 1)
        );
        rig.end_lease(ticket.ctx_request_id, LeaseEnd::Delivered);
        rig.assert_clean();
    }
}

#[test]
fn a_prompt_of_one_step_is_offered_at_its_end() {
    let mut rig = Rig::new(small_config());
    let whole = request(&long_running(3), 8);
    let mut reader = rig.submit(context_of(&whole));
    rig.run();
    assert_eq!(reader.read().lease, None);
    let lease = reader.answer.ticket().expect("a ticket").ctx_request_id;
    assert_eq!(rig.stats().handoffs_opened_early_total, 0);
    rig.end_lease(lease, LeaseEnd::Delivered);
    rig.assert_clean();
}

#[test]
fn an_answer_that_ends_with_its_first_token_gives_its_lease_up() {
    let mut rig = Rig::new(in_chunks());
    let mut reader = rig.submit(context_of(&request(&long_prompt(), 1)));
    rig.run();
    let early = reader
        .read()
        .lease
        .clone()
        .expect("the prompt took several steps");
    assert_eq!(reader.answer.reason(), FinishReason::Length);
    assert_eq!(reader.answer.ticket(), None);
    assert_eq!(rig.wire.lock().withdrawn, [early.ctx_request_id]);
    rig.end_lease(early.ctx_request_id, LeaseEnd::Cancelled);
    rig.assert_clean();
}

#[test]
fn who_goes_away_while_the_prompt_is_read_leaves_no_lease() {
    let mut rig = Rig::new(in_chunks());
    let mut reader = rig.submit(context_of(&request(&long_prompt(), 8)));
    let lease = rig.until_opened(&mut reader).ctx_request_id;
    reader.drop_stream();
    rig.run();
    assert_eq!(rig.wire.lock().withdrawn, [lease]);
    // A generation server may still be reading.
    assert_eq!(rig.stats().blocks_pinned, 2);
    rig.end_lease(lease, LeaseEnd::Cancelled);
    rig.assert_clean();
}

#[test]
fn a_lease_that_ends_before_the_prompt_does_is_replaced_at_its_end() {
    let mut rig = Rig::new(in_chunks());
    let mut reader = rig.submit(context_of(&request(&long_prompt(), 8)));
    let early = rig.until_opened(&mut reader).ctx_request_id;
    rig.end_lease(early, LeaseEnd::Cancelled);
    rig.run();
    let lease = reader
        .read()
        .ticket()
        .expect("more is to come")
        .ctx_request_id;
    assert_ne!(lease, early);
    assert_eq!(rig.pages_under(lease), 5);
    rig.end_lease(lease, LeaseEnd::Delivered);
    rig.assert_clean();
}

#[test]
fn a_request_takes_over_what_was_fetched_for_it() {
    // The KV is there before the request, or comes after it.
    for fetched_first in [true, false] {
        let mut rig = Rig::new(in_chunks());
        let whole = request(&long_prompt(), 8);
        let mut prefetch = rig.submit(prefetch_of(&whole));
        rig.run();
        let fetch = rig.fetch_of(1);
        assert_eq!((fetch.token_count, fetch.pages.len()), (18, 5));
        let fetch = if fetched_first {
            rig.deliver(fetch, &whole.prompt);
            rig.run();
            None
        } else {
            Some(fetch)
        };
        assert_eq!(rig.stats().requests_fetching, 1);
        let mut reader = rig.submit(hands::generation_half(&whole, 64));
        rig.run();
        if let Some(fetch) = fetch {
            assert!(reader.read().tokens.is_empty());
            rig.deliver(fetch, &whole.prompt);
            rig.run();
        }
        assert_eq!(reader.read().tokens, closed_form(&whole, 64).0);
        assert!(rig.wire.lock().fetches.is_empty(), "one fetch was enough");
        let costs = reader.answer.costs();
        assert_eq!(costs.handoff.as_ref().map(|stats| stats.bytes), Some(100));
        assert_eq!(prefetch.read().reason(), FinishReason::NotFinished);
        let stats = rig.stats();
        assert_eq!((stats.requests_total, stats.handoffs_fetched_total), (1, 1));
        assert_eq!(stats.handoffs_prefetched_total, 1);
        rig.assert_clean();
    }
}

#[test]
fn another_prompt_or_tenant_takes_nothing_over() {
    let whole = request(&long_prompt(), 8);
    let mut other = whole.clone();
    other.prompt[3] += 1;
    let tenant = GenerateRequest {
        cache_salt: Some("other".to_owned()),
        ..whole.clone()
    };
    for wanted in [other, tenant] {
        let mut rig = Rig::new(in_chunks());
        let mut prefetch = rig.submit(prefetch_of(&whole));
        let mut reader = rig.submit(hands::generation_half(&wanted, 64));
        rig.run();
        let fetch = rig.fetch_of(2);
        rig.deliver(fetch, &wanted.prompt);
        rig.run();
        assert_eq!(reader.read().tokens, closed_form(&wanted, 64).0);
        assert_eq!(rig.stats().handoffs_prefetched_total, 0);
        prefetch.drop_stream();
        rig.run();
        assert_eq!(rig.wire.lock().cancelled, [RequestId(1)]);
        let fetch = rig.fetch_of(1);
        (rig.sink)(HandoffEvent::PagesReturned { pages: fetch.pages });
        rig.assert_clean();
    }
}

#[test]
fn a_prefetch_that_waits_for_blocks_gives_its_place_to_the_request() {
    let mut rig = Rig::new(EngineConfig {
        block_count: 8,
        ..in_chunks()
    });
    let whole = request(&long_prompt(), 8);
    let running = request(&long_running(7), 20);
    let mut first = rig.submit(running.clone());
    let busy = request(&[9; 17], 3);
    let mut second = rig.submit(busy.clone());
    rig.step();
    let mut prefetch = rig.submit(prefetch_of(&whole));
    rig.step();
    assert!(rig.wire.lock().fetches.is_empty());
    let mut reader = rig.submit(hands::generation_half(&whole, 64));
    rig.obey();
    assert_eq!(prefetch.read().reason(), FinishReason::NotFinished);
    rig.run();
    let fetch = rig.fetch_of(4);
    rig.deliver(fetch, &whole.prompt);
    rig.run();
    assert_eq!(reader.read().tokens, closed_form(&whole, 64).0);
    assert_eq!(first.read().tokens, closed_form(&running, 32).0);
    assert_eq!(second.read().tokens, closed_form(&busy, 32).0);
    rig.assert_clean();
}

#[test]
fn a_prefetch_that_fails_leaves_the_fetch_to_its_request() {
    let mut rig = Rig::new(in_chunks());
    let whole = request(&long_prompt(), 8);
    let mut prefetch = rig.submit(prefetch_of(&whole));
    rig.run();
    let fetch = rig.fetch_of(1);
    (rig.sink)(HandoffEvent::PagesReturned { pages: fetch.pages });
    rig.decide(
        RequestId(1),
        Err(HandoffError::Refused("given up".to_owned())),
    );
    rig.run();
    assert!(matches!(
        prefetch.read().failure(),
        RequestFailure::Handoff(_)
    ));
    let mut reader = rig.submit(hands::generation_half(&whole, 64));
    rig.run();
    let fetch = rig.fetch_of(2);
    rig.deliver(fetch, &whole.prompt);
    rig.run();
    assert_eq!(reader.read().tokens, closed_form(&whole, 64).0);
    let stats = rig.stats();
    assert_eq!(
        (stats.handoffs_failed_total, stats.requests_failed_total),
        (0, 0)
    );
    rig.assert_clean();
}

#[test]
fn a_request_that_goes_away_ends_the_fetch_that_it_took_over() {
    let mut rig = Rig::new(in_chunks());
    let whole = request(&long_prompt(), 8);
    let prefetch = rig.submit(prefetch_of(&whole));
    rig.run();
    let mut reader = rig.submit(hands::generation_half(&whole, 64));
    rig.run();
    reader.drop_stream();
    rig.run();
    assert_eq!(rig.wire.lock().cancelled, [RequestId(1)]);
    assert_eq!(rig.stats().blocks_quarantined, 5);
    let fetch = rig.fetch_of(1);
    (rig.sink)(HandoffEvent::PagesReturned { pages: fetch.pages });
    rig.assert_clean();
    drop(prefetch);
}

#[test]
fn a_drain_does_not_wait_for_requests_that_will_not_come() {
    let mut rig = Rig::new(in_chunks());
    let mut prefetch = rig.submit(prefetch_of(&request(&long_prompt(), 8)));
    rig.run();
    rig.core.begin_drain();
    assert_eq!(prefetch.read().failure(), &RequestFailure::ShuttingDown);
    let fetch = rig.fetch_of(1);
    (rig.sink)(HandoffEvent::PagesReturned { pages: fetch.pages });
    rig.obey();
    assert!(rig.core.is_idle());
    rig.assert_clean();
}

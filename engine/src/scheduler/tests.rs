//! Plans: order, bounds, pre-emption and the way to the batch past a fetch.

use std::time::Duration;

use super::*;
use crate::handoff::HandoffTicket;
use crate::request::{GenerateRequest, RequestKind, SamplingParams};

const ANY: Writable<'static> = &|_| true;

const LIMITS: Limits = Limits {
    batch_size: 4,
    tokens: 16,
    prefill_alone: 16,
    prefill_beside_decode: 8,
    chunked_prefill: true,
};

/// A scheduler whose clock and tokens the test supplies.
struct Rig {
    scheduler: Scheduler,
    now: Instant,
}

impl Rig {
    fn new(limits: Limits, blocks: usize) -> Self {
        Self {
            scheduler: Scheduler::new(limits, BlockPool::new(blocks, 4, true, false)),
            now: Instant::now(),
        }
    }

    fn enqueue(&mut self, id: u64, prompt_len: u32) {
        self.enqueue_kind(id, prompt_len, RequestKind::Aggregated);
    }

    fn enqueue_fetch(&mut self, id: u64, prompt_len: u32) {
        let ticket = HandoffTicket {
            ctx_request_id: 1,
            disagg_request_id: None,
            opaque_state: Vec::new(),
            first_tokens: vec![1],
            first_logprobs: Vec::new(),
        };
        self.enqueue_kind(id, prompt_len, RequestKind::GenerationOnly(ticket));
    }

    fn enqueue_kind(&mut self, id: u64, prompt_len: u32, kind: RequestKind) {
        let first = u32::try_from(id * 1000).expect("small");
        let request = GenerateRequest {
            prompt: (first..first + prompt_len).collect(),
            sampling: SamplingParams {
                max_tokens: 1000,
                ..SamplingParams::default()
            },
            kind,
            cache_salt: None,
        };
        let sequence = Sequence::new(RequestId(id), request, 10_000, self.now);
        self.scheduler.enqueue(sequence);
    }

    /// One step: who ran how many rows. Whoever has nothing left to compute writes a token.
    fn step(&mut self) -> Vec<(u64, usize)> {
        self.now += Duration::from_millis(1);
        let plan = self.scheduler.schedule(ANY, self.now);
        let mut ran = Vec::new();
        for &span in &plan.spans {
            self.scheduler.begun(span, None);
            let computed = self.scheduler.running(span.index).computed;
            self.scheduler.computed(span.index, computed);
            let sequence = self.scheduler.running_mut(span.index);
            ran.push((sequence.id.0, span.rows));
            if sequence.remaining() == 0 {
                sequence.accept(7, &[], self.now);
            }
        }
        ran
    }
}

#[test]
fn those_who_write_go_first_and_prompts_fill_the_rest() {
    let mut rig = Rig::new(LIMITS, 100);
    rig.enqueue(1, 5);
    assert_eq!(rig.step(), [(1, 5)]);
    rig.enqueue(2, 6);
    rig.enqueue(3, 9);
    assert_eq!(rig.step(), [(1, 1), (2, 6), (3, 2)]);
    assert_eq!(rig.step(), [(1, 1), (2, 1), (3, 7)]);
    assert_eq!(rig.step(), [(1, 1), (2, 1), (3, 1)]);
}

#[test]
fn without_chunking_a_prompt_waits_for_a_step_it_fits() {
    let limits = Limits {
        chunked_prefill: false,
        ..LIMITS
    };
    let mut rig = Rig::new(limits, 100);
    rig.enqueue(1, 10);
    rig.enqueue(2, 10);
    assert_eq!(rig.step(), [(1, 10)]);
    // Beside one who writes there are eight at most, so it is split after all.
    assert_eq!(rig.step(), [(1, 1), (2, 8)]);
    assert_eq!(rig.step(), [(1, 1), (2, 2)]);
}

#[test]
fn the_batch_has_no_more_than_its_places() {
    let mut rig = Rig::new(LIMITS, 100);
    for id in 1..=6 {
        rig.enqueue(id, 2);
    }
    assert_eq!(rig.step().len(), 4);
    assert_eq!(rig.scheduler.waiting_count(), 2);
    rig.scheduler.remove(RequestId(2)).expect("it runs");
    assert_eq!(rig.step().last(), Some(&(5, 2)));
}

#[test]
fn the_batch_is_never_larger_than_the_tokens_of_a_step() {
    let limits = Limits {
        tokens: 2,
        ..LIMITS
    };
    let mut rig = Rig::new(limits, 100);
    assert_eq!(rig.scheduler.batch_size_max(), 2);
    for id in 1..=3 {
        rig.enqueue(id, 1);
    }
    assert_eq!(rig.step(), [(1, 1), (2, 1)]);
    assert_eq!(rig.step(), [(1, 1), (2, 1)]);
}

#[test]
fn the_youngest_loses_its_blocks_and_comes_back_in_its_turn() {
    let mut rig = Rig::new(LIMITS, 6);
    rig.enqueue(1, 4);
    rig.enqueue(2, 4);
    rig.step();
    let mut alone = false;
    for _ in 0..16 {
        let ran = rig.step();
        assert_eq!(
            ran.first().map(|first| first.0),
            Some(1),
            "the oldest gets on"
        );
        alone |= ran.len() == 1;
    }
    assert!(
        alone,
        "six blocks do not hold two answers of seventeen tokens"
    );
    rig.enqueue(3, 4);
    rig.scheduler.remove(RequestId(1)).expect("it runs");
    let back = rig.step();
    assert_eq!(back.first().map(|first| first.0), Some(2));
}

#[test]
fn nobody_overtakes_one_who_waits_for_memory() {
    let mut rig = Rig::new(LIMITS, 8);
    rig.enqueue(1, 16);
    rig.step();
    rig.enqueue(2, 16);
    rig.enqueue(3, 1);
    rig.enqueue_fetch(4, 1);
    rig.step();
    assert_eq!(rig.scheduler.waiting_count(), 3);
    assert_eq!(rig.scheduler.fetching_count(), 0);
}

#[test]
fn a_fetch_passes_one_who_waits_for_a_place() {
    let limits = Limits {
        batch_size: 1,
        ..LIMITS
    };
    let mut rig = Rig::new(limits, 100);
    rig.enqueue(1, 4);
    rig.step();
    rig.enqueue(2, 4);
    rig.enqueue_fetch(3, 4);
    rig.enqueue_fetch(4, 4);
    let plan = rig.scheduler.schedule(ANY, rig.now);
    assert_eq!(plan.fetches, [RequestId(3)]);
    assert_eq!(rig.scheduler.pool.counts().lent, 1);
    // The place goes to the older one all the same.
    let block = {
        let fetching = rig.scheduler.fetching_mut(RequestId(3)).expect("fetching");
        fetching.take_ticket();
        fetching.computed = 4;
        fetching.forced.clear();
        fetching.accept(1, &[], rig.now);
        fetching.blocks[0]
    };
    rig.scheduler.pool.page_back(block);
    rig.scheduler.cache_fetched(RequestId(3));
    rig.scheduler.fetched(RequestId(3));
    rig.scheduler.remove(RequestId(1)).expect("it runs");
    assert_eq!(rig.step(), [(2, 4)]);
    rig.scheduler.remove(RequestId(2)).expect("it runs");
    assert_eq!(rig.step(), [(3, 1)]);
}

#[test]
fn a_newcomer_leaves_room_for_those_who_are_there() {
    let mut rig = Rig::new(LIMITS, 4);
    rig.enqueue(1, 4);
    rig.step();
    // One block held, three free: the newcomer's two and one to grow by, and one for the other, are four.
    rig.enqueue(2, 8);
    rig.step();
    assert_eq!(rig.scheduler.waiting_count(), 1);
}

#[test]
fn the_last_one_keeps_its_blocks_while_others_than_sequences_hold_the_rest() {
    let mut rig = Rig::new(LIMITS, 2);
    let leased = rig.scheduler.pool.allocate(1, ANY).expect("room");
    rig.scheduler.pool.pin(&leased);
    rig.enqueue(1, 3);
    assert_eq!(rig.step(), [(1, 3)]);
    assert_eq!(rig.step(), [(1, 1)]);
    assert_eq!(rig.step(), []);
    assert_eq!(rig.scheduler.running_count(), 1);
    rig.scheduler.pool.unpin(&leased);
    assert_eq!(rig.step(), [(1, 1)]);
}

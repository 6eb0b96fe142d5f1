//! Random lives of many requests: whatever happens, answers are right and every block comes back.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::handoff::{Fetch, HandoffError, HandoffEvent, LeaseEnd};
use crate::request::RequestId;

/// One thing that happens.
#[derive(Debug, Clone)]
enum Act {
    Submit(Plan),
    /// The client of the n-th request goes away.
    Leave(usize),
    Steps(usize),
    /// The n-th open fetch brings its KV.
    Deliver(usize),
    /// The n-th open fetch fails; its pages come at once or late, with rubbish in them.
    Lose {
        index: usize,
        late: bool,
    },
    /// Late pages come.
    LatePages,
    /// The n-th lease ends.
    EndLease(usize),
}

#[derive(Debug, Clone)]
struct Plan {
    family: u32,
    shared: u32,
    own: u32,
    max_tokens: u32,
    kind: u32,
    sampled: bool,
    seed: u64,
    salted: bool,
    prompt_logprobs: bool,
}

impl Plan {
    fn request(&self) -> GenerateRequest {
        // Few families, so that prefixes are often equal.
        let shared = (0..self.shared).map(|n| 1 + (n * (self.family + 3)) % 40);
        let own =
            (0..self.own).map(|n| 1 + (n + u32::try_from(self.seed % 7).expect("small")) % 40);
        let mut request = request(&shared.chain(own).collect::<Vec<_>>(), self.max_tokens);
        if self.sampled {
            request.sampling.temperature = 0.8;
            request.sampling.top_k = 20;
            request.sampling.seed = self.seed;
            request.sampling.frequency_penalty = 0.3;
        }
        // What a device needs a table for, or tells.
        if self.seed.is_multiple_of(3) {
            request.sampling.repetition_penalty = 1.4;
            request.sampling.presence_penalty = 0.2;
            request.sampling.prompt_ignore_length = self.shared;
        }
        if self.seed.is_multiple_of(5) {
            request.sampling.min_tokens = self.max_tokens / 2;
            request.sampling.logit_bias = vec![(0, 6.0), (3, -1.0), (3, 0.5)];
        }
        request.sampling.logprobs = [None, None, Some(0), Some(3)][(self.seed % 4) as usize];
        request.sampling.prompt_logprobs = self.prompt_logprobs.then_some(0);
        request.cache_salt = self.salted.then(|| "tenant".to_owned());
        request
    }
}

fn plan() -> impl Strategy<Value = Plan> {
    (
        (0..3_u32, 0..20_u32, 1..8_u32, 1..24_u32, 0..5_u32),
        (any::<bool>(), any::<u64>()),
        (0..8_u32, 0..8_u32),
    )
        .prop_map(
            |((family, shared, own, max_tokens, kind), (sampled, seed), (salt, logprobs))| Plan {
                family,
                shared,
                own,
                max_tokens,
                kind,
                sampled,
                seed,
                salted: salt == 0,
                prompt_logprobs: logprobs == 0,
            },
        )
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => plan().prop_map(Act::Submit),
        1 => (0..20_usize).prop_map(Act::Leave),
        5 => (1..8_usize).prop_map(Act::Steps),
        2 => (0..4_usize).prop_map(Act::Deliver),
        1 => (0..4_usize, any::<bool>()).prop_map(|(index, late)| Act::Lose { index, late }),
        1 => Just(Act::LatePages),
        2 => (0..4_usize).prop_map(Act::EndLease),
    ]
}

fn config() -> impl Strategy<Value = EngineConfig> {
    (
        1..6_usize,
        1..24_usize,
        any::<bool>(),
        any::<bool>(),
        12..30_usize,
    )
        .prop_map(
            |(max_batch_size, max_num_tokens, chunked, reuse, block_count)| EngineConfig {
                max_batch_size,
                max_num_tokens,
                enable_chunked_prefill: chunked,
                enable_block_reuse: reuse,
                prefill_tokens_beside_decode: 8,
                block_count,
                max_seq_len: 48,
                ..small_config()
            },
        )
}

struct Case {
    rig: Rig,
    readers: Vec<(GenerateRequest, Reader)>,
    prompts: HashMap<RequestId, Vec<TokenId>>,
    late: Vec<Fetch>,
}

impl Case {
    fn act(&mut self, act: Act) {
        match act {
            Act::Submit(plan) => self.submit(&plan),
            Act::Leave(index) => {
                if let Some((_, reader)) = self.readers.get_mut(index) {
                    reader.drop_stream();
                }
            }
            Act::Steps(count) => {
                for _ in 0..count {
                    self.rig.step();
                }
            }
            Act::Deliver(index) => {
                if let Some(fetch) = self.open_fetch(index) {
                    let prompt = &self.prompts[&fetch.request];
                    self.rig.deliver(fetch, prompt);
                }
            }
            Act::Lose { index, late } => {
                if let Some(fetch) = self.open_fetch(index) {
                    let error = HandoffError::Checksum("piece 0".to_owned());
                    let request = fetch.request;
                    self.late.push(fetch);
                    if !late {
                        self.return_late_pages();
                    }
                    self.rig.decide(request, Err(error));
                }
            }
            Act::LatePages => self.return_late_pages(),
            Act::EndLease(index) => self.end_lease(index),
        }
    }

    fn submit(&mut self, plan: &Plan) {
        let whole = plan.request();
        let limit = self.rig.core.max_len;
        let request = match plan.kind {
            0 => whole.clone(),
            early @ (1 | 3) => GenerateRequest {
                kind: RequestKind::ContextOnly {
                    disagg_request_id: None,
                    early: early == 3,
                },
                ..whole.clone()
            },
            4 => early::prefetch_of(&whole),
            _ => hands::generation_half(&whole, limit),
        };
        let stream = self.rig.handle.submit(request.clone()).expect("room");
        self.prompts.insert(stream.id(), whole.prompt);
        self.readers.push((request, Reader::new(stream)));
    }

    fn open_fetch(&self, index: usize) -> Option<Fetch> {
        let mut open: Vec<_> = self.rig.wire.lock().fetches.keys().copied().collect();
        open.sort();
        self.rig.wire.take_fetch(*open.get(index)?)
    }

    fn return_late_pages(&mut self) {
        for mut fetch in self.late.drain(..) {
            for page in &mut fetch.pages.pages {
                page.as_f32_mut().fill(31.0);
            }
            (self.rig.sink)(HandoffEvent::PagesReturned { pages: fetch.pages });
        }
    }

    fn end_lease(&self, index: usize) {
        let mut wire = self.rig.wire.lock();
        let mut leases: Vec<_> = wire.offers.keys().copied().collect();
        leases.sort_unstable();
        if let Some(&ctx_request_id) = leases.get(index) {
            wire.offers.remove(&ctx_request_id);
            (self.rig.sink)(HandoffEvent::LeaseEnded {
                ctx_request_id,
                end: LeaseEnd::Delivered,
            });
        }
    }

    /// Lets everything come to its end.
    fn settle(&mut self) {
        for (request, reader) in &mut self.readers {
            if matches!(request.kind, RequestKind::Prefetch(_)) {
                // Nobody comes for it any more.
                reader.drop_stream();
            }
        }
        for _ in 0..10_000 {
            self.return_late_pages();
            self.end_lease(0);
            if let Some(fetch) = self.open_fetch(0) {
                let prompt = &self.prompts[&fetch.request];
                self.rig.deliver(fetch, prompt);
            }
            self.rig.run();
            let quiet =
                self.rig.wire.lock().offers.is_empty() && self.rig.wire.lock().fetches.is_empty();
            if quiet && self.rig.core.is_idle() {
                return;
            }
        }
        panic!("the engine does not come to rest: {:?}", self.rig.stats());
    }

    fn check(&mut self) {
        let limit = self.rig.core.max_len;
        for (request, reader) in &mut self.readers {
            let whole = GenerateRequest {
                kind: RequestKind::Aggregated,
                ..request.clone()
            };
            let (tokens, reason) = closed_form(&whole, limit);
            let left = reader.stream.is_none();
            let answer = reader.read();
            if left {
                assert!(tokens.starts_with(&answer.tokens));
                continue;
            }
            let is_context = matches!(request.kind, RequestKind::ContextOnly { .. });
            if is_context && tokens.len() > 1 {
                assert_eq!(answer.tokens, tokens[..1]);
                assert_eq!(answer.reason(), FinishReason::NotFinished);
            } else {
                assert_eq!(answer.tokens, tokens, "{request:?}");
                assert_eq!(answer.reason(), reason);
            }
            assert_logprobs(request, answer);
            let wanted = request.sampling.prompt_logprobs;
            let expected = wanted.map(|_| request.prompt.len() - 1);
            assert_eq!(answer.prompt_logprobs.as_ref().map(Vec::len), expected);
        }
        self.rig.assert_clean();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_answers_are_right_and_nothing_leaks(
        config in config(),
        (overlap, by_itself) in (any::<bool>(), any::<bool>()),
        acts in prop::collection::vec(act(), 1..60),
    ) {
        let model = if by_itself { FakeModel::by_itself() } else { FakeModel::new() };
        let mut case = Case {
            rig: Rig::of(model, EngineConfig { overlap, ..config }, 100),
            readers: Vec::new(),
            prompts: HashMap::new(),
            late: Vec::new(),
        };
        for act in acts {
            case.act(act);
        }
        case.settle();
        case.check();
    }
}

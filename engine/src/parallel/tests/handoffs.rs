//! Whole hand-offs between instances of any grids: engines, transceivers of all ranks, real connections; the golden
//! answers come out, and everything is given back.

use std::time::{Duration, Instant};

use baton_configs::transceiver::{TransceiverConfig, TransportChoice};

use super::*;
use crate::engine::{Engine, EngineConfig, EngineHandle, EngineThread, Inbox};
use crate::handoff::{Handoff, HandoffTicket, KvLayout};
use crate::model::load::{load, page_shape};
use crate::model::tests::{golden_json, test_gguf};
use crate::page::KvDtype;
use crate::request::{
    Event, FinishReason, GenerateRequest, RequestCosts, RequestId, RequestKind, SamplingParams,
};
use crate::transceiver::{Transceiver, TransceiverParams};

const DEADLINE: Duration = Duration::from_secs(60);

/// Tensor and pipeline ranks.
type Ranks = (u32, u32);

/// One instance with all that belongs to it.
struct Side {
    engine: EngineHandle,
    ending: EngineThread,
    followers: Option<Followers>,
}

/// A request that has run to its end.
struct Ended {
    id: RequestId,
    tokens: Vec<u32>,
    reason: FinishReason,
    costs: RequestCosts,
    ticket: Option<HandoffTicket>,
}

/// What an instance is made of.
#[derive(Clone, Copy)]
struct Sort<'a> {
    model: &'a Path,
    eos: u32,
    grid: Ranks,
    tokens_per_block: u32,
}

impl Side {
    fn start(sort: Sort<'_>) -> Self {
        let mut options = options(sort.grid.0, sort.grid.1);
        options.kv_cache.tokens_per_block = sort.tokens_per_block;
        let config = TransceiverConfig {
            backend: TransportChoice::Tcp,
            ..TransceiverConfig::default()
        };
        options.transceiver = Some(config.clone());
        let (mut model, followers) = if sort.grid == (1, 1) {
            let path = sort.model.to_str().expect("UTF-8");
            let loaded = load(path, &options, None, CpuBackend::new(Some(1)), &|_| ());
            (loaded.expect("it loads").model, None)
        } else {
            let (led, followers) = Instance::new(sort.model, options.clone()).start();
            (led.expect("it loads").loaded.model, Some(followers))
        };
        let layout = KvLayout {
            model_fingerprint: model.shape().fingerprint,
            page: page_shape(model.shape(), &options),
            tensor_parallel: sort.grid.0,
            pipeline_parallel: sort.grid.1,
        };
        let params = TransceiverParams::new(config, layout, "127.0.0.1");
        let inbox = Inbox::new(64);
        let sink = inbox.handoff_sink();
        let transceiver = Transceiver::lead(params, model.as_mut(), sink);
        let handoff: Box<dyn Handoff> = Box::new(transceiver.expect("it starts"));
        let engine_config = EngineConfig {
            max_batch_size: 4,
            max_seq_len: 1024,
            tokens_per_block: sort.tokens_per_block as usize,
            block_count: 128,
            kv_dtype: KvDtype::F32,
            eos_token_ids: vec![sort.eos],
            ..EngineConfig::default()
        };
        let started = Engine::start(model, Some(handoff), engine_config, inbox);
        let (engine, ending) = started.expect("it starts");
        Self {
            engine,
            ending,
            followers,
        }
    }

    /// Runs a request to its end.
    fn run(&self, request: GenerateRequest) -> Ended {
        let mut stream = self.engine.submit(request).expect("room in the queue");
        let (id, mut tokens) = (stream.id(), Vec::new());
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Token { token, .. } => tokens.push(token),
                Event::Finished {
                    reason,
                    costs,
                    ticket,
                } => {
                    return Ended {
                        id,
                        tokens,
                        reason,
                        costs,
                        ticket,
                    };
                }
                Event::Failed(failure) => panic!("{failure}"),
                Event::PromptLogprobs(_) | Event::LeaseOpened(_) => {}
            }
        }
        panic!("the stream ended without an end");
    }

    /// Waits until no block is held for anybody.
    fn wait_until_idle(&self) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let stats = self.engine.stats();
            if stats.blocks_free + stats.blocks_cached == stats.blocks_total {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "blocks are not given back: {stats:?}"
            );
            thread::yield_now();
        }
    }

    fn end(self) {
        self.engine.shutdown(Instant::now() + DEADLINE);
        let ended = self.ending.join(Instant::now() + DEADLINE);
        ended.expect("a clean end");
        if let Some(followers) = self.followers {
            followers.join_well();
        }
    }
}

fn request(item: &serde_json::Value, kind: RequestKind) -> GenerateRequest {
    let ids =
        |key: &str| -> Vec<u32> { serde_json::from_value(item[key].clone()).expect("token ids") };
    GenerateRequest {
        prompt: ids("prompt_token_ids"),
        sampling: SamplingParams {
            temperature: 0.0,
            max_tokens: u32::try_from(ids("output_token_ids").len()).expect("short"),
            ..SamplingParams::default()
        },
        kind,
        cache_salt: None,
    }
}

fn context_only() -> RequestKind {
    RequestKind::ContextOnly {
        disagg_request_id: None,
        early: false,
    }
}

/// Hands items over and holds the answers against the golden ones.
fn hand_over(from: Sort<'_>, to: Sort<'_>, items: &[&serde_json::Value]) {
    let (context, generation) = (Side::start(from), Side::start(to));
    for item in items {
        let ticket = context.run(request(item, context_only())).ticket;
        let ticket = ticket.expect("more is to come");
        let Ended { tokens, costs, .. } =
            generation.run(request(item, RequestKind::GenerationOnly(ticket)));
        let expected: Vec<u32> =
            serde_json::from_value(item["output_token_ids"].clone()).expect("token ids");
        assert_eq!(tokens, expected, "{:?} to {:?}", from.grid, to.grid);
        assert!(!costs.prefilled_again, "{:?} to {:?}", from.grid, to.grid);
        assert!(costs.handoff.expect("kv came").bytes > 0);
    }
    context.wait_until_idle();
    generation.wait_until_idle();
    let (offered, fetched) = (context.engine.stats(), generation.engine.stats());
    let count = items.len() as u64;
    assert_eq!(offered.handoffs_delivered_total, count);
    assert_eq!(fetched.handoffs_fetched_total, count);
    context.end();
    generation.end();
}

/// Items of a tiny model whose choices are clear enough for any order of summing.
fn clear_items(golden: &serde_json::Value) -> Vec<&serde_json::Value> {
    let items = golden["models"]["llama"].as_array().expect("items");
    let clear = |item: &&serde_json::Value| item["min_margin"].as_f64() > Some(0.001);
    let several = |item: &&serde_json::Value| item["output_token_ids"][1].is_u64();
    items.iter().filter(clear).filter(several).take(2).collect()
}

fn check(pairs: &[(Ranks, Ranks)]) {
    let golden = golden_json("tiny.json");
    let items = clear_items(&golden);
    assert_eq!(items.len(), 2);
    let model = golden_path("tiny-llama");
    for &(from, to) in pairs {
        let of = |grid, tokens_per_block| Sort {
            model: &model,
            eos: 257,
            grid,
            tokens_per_block,
        };
        hand_over(of(from, 16), of(to, 16), &items);
    }
}

#[test]
fn one_rank_hands_over_to_two_and_back() {
    check(&[((1, 1), (2, 1)), ((2, 1), (1, 1))]);
}

#[test]
fn more_ranks_hand_over_to_fewer_with_repeated_heads_too() {
    check(&[((4, 1), (2, 1)), ((8, 1), (4, 1)), ((2, 1), (8, 1))]);
}

#[test]
fn stages_hand_over_to_tensor_ranks_and_back() {
    check(&[((1, 2), (2, 1)), ((2, 1), (1, 2)), ((2, 2), (4, 1))]);
}

#[test]
fn the_same_grid_hands_over_to_itself() {
    check(&[((2, 2), (2, 2))]);
}

#[test]
fn blocks_may_be_of_other_sizes() {
    let golden = golden_json("tiny.json");
    let model = golden_path("tiny-llama");
    let of = |grid, tokens_per_block| Sort {
        model: &model,
        eos: 257,
        grid,
        tokens_per_block,
    };
    hand_over(of((2, 1), 64), of((1, 2), 16), &clear_items(&golden));
    hand_over(of((1, 1), 16), of((2, 1), 32), &clear_items(&golden));
}

#[test]
fn smollm2_on_one_rank_hands_over_to_three() {
    let golden = golden_json("smollm2.json");
    let items = golden["items"].as_array().expect("items");
    let model = test_gguf();
    let of = |grid| Sort {
        model: &model,
        eos: 2,
        grid,
        tokens_per_block: 32,
    };
    hand_over(of((1, 1)), of((3, 1)), &[&items[0]]);
}

#[test]
fn a_client_that_leaves_frees_every_ranks_pages() {
    let golden = golden_json("tiny.json");
    let item = clear_items(&golden)[0];
    let model = golden_path("tiny-llama");
    let side = Side::start(Sort {
        model: &model,
        eos: 257,
        grid: (2, 1),
        tokens_per_block: 16,
    });
    let offered = side.run(request(item, context_only()));
    assert_eq!(offered.reason, FinishReason::NotFinished);
    // Nobody fetches it; the client's leaving ends the lease on both ranks, long before its time.
    side.engine.cancel(offered.id);
    side.wait_until_idle();
    assert_eq!(side.engine.stats().handoffs_cancelled_total, 1);
    side.end();
}

#[test]
fn kv_that_no_rank_has_any_more_is_read_again() {
    let golden = golden_json("tiny.json");
    let item = clear_items(&golden)[0];
    let model = golden_path("tiny-llama");
    let of = |grid| Sort {
        model: &model,
        eos: 257,
        grid,
        tokens_per_block: 16,
    };
    let (context, generation) = (Side::start(of((2, 1))), Side::start(of((1, 2))));
    let (first, second) = (
        context.run(request(item, context_only())),
        context.run(request(item, context_only())),
    );
    // The secret of one lease, the number of the other: every rank refuses, and the prompt is read again.
    let mut ticket = first.ticket.expect("more is to come");
    ticket.ctx_request_id = second.ticket.expect("more is to come").ctx_request_id;
    let Ended { tokens, costs, .. } =
        generation.run(request(item, RequestKind::GenerationOnly(ticket)));
    let expected: Vec<u32> =
        serde_json::from_value(item["output_token_ids"].clone()).expect("token ids");
    assert_eq!(tokens, expected);
    assert!(costs.prefilled_again);
    context.engine.cancel(first.id);
    context.engine.cancel(second.id);
    context.wait_until_idle();
    generation.wait_until_idle();
    generation.end();
    context.end();
}

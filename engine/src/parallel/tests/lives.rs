//! What ends an instance of several ranks: refusals, differences, losses, silence, and goodbyes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::*;
use crate::backend::BackendError;
use crate::collective::CollectiveError;
use crate::engine::{Engine, EngineConfig, EngineError, Inbox};
use crate::model::tests::{Session, test_gguf};
use crate::page::KvDtype;
use crate::request::{Event, GenerateRequest, RequestKind, SamplingParams};

/// Far above what any test needs; a test that takes as long has failed.
const DEADLINE: Duration = Duration::from_secs(100);

fn small_config() -> EngineConfig {
    EngineConfig {
        max_batch_size: 4,
        max_seq_len: 1024,
        block_count: 64,
        kv_dtype: KvDtype::F32,
        ..EngineConfig::default()
    }
}

fn error_of(instance: Instance) -> (String, Vec<Result<(), ParallelError>>) {
    let (led, followers) = instance.start();
    let error = led.map(drop).expect_err("it cannot begin").to_string();
    (error, followers.join())
}

#[test]
fn sizes_that_do_not_go_are_refused_before_anybody_is_asked() {
    let path = test_gguf();
    let spec = path.to_str().expect("UTF-8");
    let error = crate::model::load::check_sizes(spec, &options(2, 1), None)
        .expect_err("nine heads")
        .to_string();
    assert!(
        error.ends_with(
            "tensor_parallel_size 2 does not divide 9 attention heads\nhint: this model goes with \
             tensor_parallel_size 1, 3 and pipeline_parallel_size 1 to 30"
        ),
        "{error}"
    );
    let shape = crate::model::load::check_sizes(spec, &options(3, 2), None).expect("it goes");
    assert_eq!((shape.heads, shape.layers), (9, 30));
}

#[test]
fn a_rank_that_has_no_model_is_named() {
    let mut instance = Instance::tiny("llama", 2, 1);
    instance.elsewhere = PathBuf::from("/no/such/model");
    let (error, ends) = error_of(instance);
    assert!(
        error.starts_with("rank 1 (node1): /no/such/model: no such model"),
        "{error}"
    );
    assert!(
        matches!(&ends[..], [Err(ParallelError::Model(_))]),
        "{ends:?}"
    );
}

#[test]
fn ranks_with_different_models_do_not_begin() {
    let mut instance = Instance::tiny("llama", 2, 1);
    instance.elsewhere = golden_path("tiny-qwen2");
    let (error, ends) = error_of(instance);
    assert!(
        error.starts_with("rank 1 (node1) has a model of kind "),
        "{error}"
    );
    assert!(error.contains("\nhint: put the same files at "), "{error}");
    let [Err(ParallelError::GivenUp(told))] = &ends[..] else {
        panic!("{ends:?}");
    };
    assert!(told.contains("rank 1 (node1) has"), "{told}");
}

#[test]
fn ranks_with_different_weights_do_not_begin() {
    let folder = tempfile::tempdir().expect("a folder");
    for file in ["config.json", "model.safetensors"] {
        let from = golden_path("tiny-llama").join(file);
        std::fs::copy(from, folder.path().join(file)).expect("a copy");
    }
    let weights = folder.path().join("model.safetensors");
    let mut bytes = std::fs::read(&weights).expect("weights");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).expect("changed weights");
    let mut instance = Instance::tiny("llama", 1, 2);
    instance.elsewhere = folder.path().to_owned();
    let (error, ends) = error_of(instance);
    assert!(
        error.starts_with("rank 1 (node1) has weights of "),
        "{error}"
    );
    assert!(
        matches!(&ends[..], [Err(ParallelError::GivenUp(_))]),
        "{ends:?}"
    );
}

#[test]
fn a_rank_that_dies_while_loading_ends_the_beginning() {
    let instance = Instance::tiny("llama", 2, 2);
    // It says what it has, and no more.
    instance.group[2].messages_left.store(1, Ordering::Relaxed);
    let (error, ends) = error_of(instance);
    assert!(error.starts_with("lost rank 2"), "{error}");
    assert!(ends.iter().all(Result::is_err), "{ends:?}");
}

fn request() -> GenerateRequest {
    GenerateRequest {
        prompt: (1..100).collect(),
        sampling: SamplingParams {
            temperature: 0.0,
            max_tokens: 200,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        kind: RequestKind::Aggregated,
        cache_salt: None,
    }
}

#[test]
fn a_rank_that_dies_in_a_step_ends_the_engine_with_its_name() {
    for (tensor, pipeline, victim) in [(2, 1, 1), (1, 3, 1), (2, 2, 3)] {
        let instance = Instance::tiny("llama", tensor, pipeline);
        let messages_left = Arc::clone(&instance.group[victim].messages_left);
        let (led, followers) = instance.start();
        let model = led.expect("it loads").loaded.model;
        let (engine, thread) =
            Engine::start(model, None, small_config(), Inbox::new(8)).expect("it starts");
        // Some way into the answer.
        messages_left.store(150, Ordering::Relaxed);
        let mut stream = engine.submit(request()).expect("room");
        let (mut tokens, mut failure) = (0, None);
        while let Some(event) = stream.blocking_next() {
            match event {
                Event::Token { .. } => tokens += 1,
                Event::Failed(reason) => failure = Some(reason.to_string()),
                _ => {}
            }
        }
        assert!((1..200).contains(&tokens), "{tokens} tokens");
        let failure = failure.expect("the request failed");
        assert!(failure.contains("lost rank"), "{failure}");
        let error = thread.join(Instant::now() + DEADLINE).expect_err("it died");
        assert!(
            matches!(error, EngineError::Rank(BackendError::Peer(_))),
            "{error}"
        );
        assert!(!engine.is_alive());
        // Nobody is left behind.
        assert!(followers.join().iter().all(Result::is_err));
    }
}

#[test]
fn a_rank_that_dies_or_falls_silent_is_noticed_without_work() {
    for falls_silent in [false, true] {
        let mut instance = Instance::tiny("llama", 2, 1);
        instance.peer_timeout = Duration::from_millis(40);
        instance.group[1].falls_silent = falls_silent;
        let messages_left = Arc::clone(&instance.group[1].messages_left);
        let patience = Arc::clone(&instance.group[0].patience);
        let (led, followers) = instance.start();
        let model = led.expect("it loads").loaded.model;
        let (_engine, thread) =
            Engine::start(model, None, small_config(), Inbox::new(8)).expect("it starts");
        if falls_silent {
            patience.store(300, Ordering::Relaxed);
        }
        messages_left.store(0, Ordering::Relaxed);
        let error = thread.join(Instant::now() + DEADLINE).expect_err("it ends");
        let EngineError::Rank(BackendError::Peer(cause)) = &error else {
            panic!("{error}");
        };
        let silent = matches!(cause, CollectiveError::TimedOut { .. });
        assert_eq!(silent, falls_silent, "{error}");
        assert!(error.to_string().contains("rank 1"), "{error}");
        assert!(followers.join()[0].is_err());
    }
}

#[test]
fn followers_of_a_silent_leader_end_by_themselves() {
    let instance = Instance::tiny("llama", 2, 1);
    let patience = Arc::clone(&instance.group[1].patience);
    let (led, followers) = instance.start();
    let led = led.expect("it loads");
    patience.store(1, Ordering::Relaxed);
    // The engine is never started, so no order comes. A wait may have begun with the old patience: end that one.
    let mut model = led.loaded.model;
    drop(model.keep_alive());
    let ends = followers.join();
    assert!(
        matches!(
            &ends[..],
            [Err(ParallelError::Collective(
                CollectiveError::TimedOut { .. }
            ))]
        ),
        "{ends:?}"
    );
    assert!(model.keep_alive().is_err());
}

#[test]
fn a_rank_without_memory_for_its_pool_is_named() {
    let (led, followers) = Instance::tiny("llama", 1, 2).start();
    let config = EngineConfig {
        block_count: usize::try_from(u32::MAX).expect("64 bits"),
        tokens_per_block: 1 << 20,
        ..small_config()
    };
    let model = led.expect("it loads").loaded.model;
    let error = Engine::start(model, None, config, Inbox::new(8)).expect_err("no memory");
    assert!(matches!(error, EngineError::Pool(_)), "{error}");
    assert!(followers.join()[0].is_err());
}

#[test]
fn memory_is_counted_machine_by_machine() {
    let mut instance = Instance::tiny("llama", 2, 2);
    instance.options.transceiver = Some(baton_configs::transceiver::TransceiverConfig::default());
    let options = instance.options.clone();
    let (led, followers) = instance.start();
    let led = led.expect("it loads");
    let page = crate::model::load::page_shape(led.loaded.model.shape(), &options);
    let [room] = led.rooms[..] else {
        panic!("all ranks are threads of one machine: {:?}", led.rooms);
    };
    // The ranks' parts make one page; what is handed over is never copied.
    assert_eq!(room.page_bytes, page.bytes() as u64);
    assert_eq!(room.weight_bytes, led.loaded.model.weight_bytes() as u64);
    let description = led.loaded.model.backend_description();
    assert!(
        description.starts_with("4 ranks (tensor 2, pipeline 2; memory)"),
        "{description}"
    );
    drop(led);
    followers.join_well();
}

#[test]
fn dummy_models_are_divided_too() {
    let answers = |tensor, pipeline| {
        let mut instance = Instance::tiny("qwen3", tensor, pipeline);
        instance.options.load_format = baton_configs::llm::LoadFormat::Dummy;
        let options = instance.options.clone();
        let (led, followers) = instance.start();
        let mut session = Session::new(led.expect("it loads").loaded, &options);
        let rows = session.feed(&[1, 2, 3], 0).concat();
        drop(session);
        followers.join_well();
        rows
    };
    let (two, four) = (answers(2, 1), answers(2, 2));
    let differ = two.iter().zip(&four).map(|(a, b)| (a - b).abs());
    assert!(differ.fold(0.0, f32::max) < 1e-4);
}

//! KV that moves while its prompt is read, between real processes: the golden answer, that the way was taken, and what is
//! left when one of the three goes away meanwhile.

use std::time::Duration;

use baton_tests::client;
use baton_tests::deployment::{Deployment, Options, Worker};
use baton_tests::golden::{self, Item};
use baton_tests::process::eventually;
use nix::sys::signal::Signal;
use serde_json::json;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Reads a prompt in many steps.
const IN_STEPS: &str = "dtype: float32\nmax_seq_len: 2048\nmax_batch_size: 2\nmax_num_tokens: 64\nnum_threads: 1\n\
    enable_chunked_prefill: true\nkv_cache_config: {max_tokens: 2048, enable_block_reuse: false}\n\
    cache_transceiver_config: {backend: SHM}\n";

/// The longest prompt that there is a golden answer to: fifteen steps and more.
fn long_item() -> Item {
    let items = golden::smollm2();
    let longest = items
        .into_iter()
        .max_by_key(|item| item.prompt_token_ids.len());
    longest.expect("there are items")
}

async fn start(context_count: usize) -> Deployment {
    let model = baton_tests::model();
    let mut options = Options::new(&model, IN_STEPS);
    options.context_count = context_count;
    Deployment::start(&options).await
}

/// Waits until a part of a prompt is on its way.
async fn fetching(worker: &Worker) {
    eventually("kv on its way", LIMIT, async || {
        (worker.counter("baton_kv_fetches ").await > 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn kv_moves_while_its_prompt_is_read() {
    let (deployment, item) = (start(1).await, long_item());
    let answer = client::ids(&deployment.address, &item, 8).await;
    assert_eq!(answer, item.output_token_ids[..8]);
    deployment.blocks_return(LIMIT).await;
    let (context, generation) = (&deployment.context[0], &deployment.generation);
    for (worker, name, value) in [
        (context, "baton_handoffs_opened_early_total", 1),
        (context, "baton_handoffs_delivered_total", 1),
        (generation, "baton_handoffs_prefetched_total", 1),
        (generation, "baton_handoffs_fetched_total", 1),
        (generation, "baton_handoffs_prefilled_again_total", 0),
    ] {
        assert_eq!(worker.counter(name).await, value, "{name}");
    }
}

#[tokio::test]
async fn they_are_connected_before_the_first_request() {
    let model = baton_tests::tiny_model("llama");
    let engine = "dtype: float32\nmax_seq_len: 256\nmax_batch_size: 2\ntensor_parallel_size: 2\nnum_threads: 1\n\
        kv_cache_config: {max_tokens: 512}\ncache_transceiver_config: {backend: TCP}\n";
    let one = engine.replace("tensor_parallel_size: 2\n", "");
    let mut options = Options::new(&model, engine);
    options.generation_engine = Some(&one);
    let deployment = Deployment::start(&options).await;
    // Two instances of two ranks each, and the generation server takes something of every rank.
    eventually("four connections", LIMIT, async || {
        let count = deployment.generation.counter("baton_kv_connections ").await;
        (count == 4).then_some(())
    })
    .await;
    let item = golden::tiny()
        .remove("llama")
        .expect("it is there")
        .remove(0);
    let answer = client::ids(&deployment.address, &item, 4).await;
    assert_eq!(answer, item.output_token_ids[..4]);
    let count = deployment.generation.counter("baton_kv_connections ").await;
    assert_eq!(count, 4, "the request has opened no other");
}

#[tokio::test]
async fn a_client_that_leaves_meanwhile_leaves_nothing_behind() {
    let (deployment, item) = (start(1).await, long_item());
    let address = deployment.address.clone();
    let asked = tokio::spawn(async move { client::ids(&address, &item, 8).await });
    fetching(&deployment.generation).await;
    asked.abort();
    deployment.blocks_return(LIMIT).await;
    let cancelled = deployment.context[0]
        .counter("baton_requests_cancelled_total")
        .await;
    assert_eq!(cancelled, 1);
}

#[tokio::test]
async fn a_context_server_that_dies_meanwhile_is_replaced() {
    let (mut deployment, item) = (start(2).await, long_item());
    let asked = tokio::spawn({
        let (address, item) = (deployment.address.clone(), item.clone());
        async move { client::ids(&address, &item, 8).await }
    });
    fetching(&deployment.generation).await;
    let mut reading = None;
    for (index, worker) in deployment.context.iter().enumerate() {
        if worker.counter("baton_handoffs_opened_early_total").await > 0 {
            reading = Some(index);
        }
    }
    let killed = deployment.context.remove(reading.expect("one reads"));
    killed.process.signal(Signal::SIGKILL);
    assert_eq!(asked.await.expect("an answer"), item.output_token_ids[..8]);
    deployment.context[0].blocks_return(LIMIT).await;
    deployment.generation.blocks_return(LIMIT).await;
    let again = deployment
        .generation
        .counter("baton_handoffs_prefilled_again_total")
        .await;
    assert_eq!(again, 0);
}

/// A generation server's own word on what it is asked to fetch.
#[tokio::test]
async fn a_ticket_that_means_nothing_is_refused_at_once() {
    let generation = Worker::start(
        &baton_tests::tiny_model("llama"),
        "dtype: float32\nmax_seq_len: 256\n\
        kv_cache_config: {max_tokens: 512}\ncache_transceiver_config: {backend: TCP}\n",
    )
    .await;
    let params = json!({"request_type": "context_only", "ctx_request_id": 3, "encoded_opaque_state": "QUJD"});
    for (body, status, text) in [
        (
            json!({"prompt_token_ids": [1, 2], "disaggregated_params": params}),
            400,
            "hand-off state not understood",
        ),
        (
            json!({"disaggregated_params": params}),
            400,
            "prompt_token_ids",
        ),
        (
            json!({"prompt_token_ids": [1], "disaggregated_params": params, "x": 1}),
            400,
            "unknown field",
        ),
    ] {
        let answer = client::post(&generation.address, "/kv_prefetch", &body)
            .await
            .expect("an answer");
        assert_eq!(answer.status, status, "{}", answer.body);
        assert!(answer.body.contains(text), "{}", answer.body);
    }
    generation.blocks_return(LIMIT).await;
}

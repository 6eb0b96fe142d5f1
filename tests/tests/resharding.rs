//! Real processes on both sides of a hand-off whose ranks divide one model differently: the golden answers, and which rank
//! took how many bytes from which over what, so that a prompt read again cannot pass for KV that came.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_tests::client;
use baton_tests::deployment::{Deployment, Options, Worker};
use baton_tests::golden::{self, Item};
use baton_tests::process::{Baton, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// How long blocks may take to come back after the last answer.
const BACK: Duration = Duration::from_secs(20);

/// How an instance divides its model.
#[derive(Debug, Clone, Copy)]
struct Grid {
    tensor: u32,
    pipeline: u32,
}

const fn grid(tensor: u32, pipeline: u32) -> Grid {
    Grid { tensor, pipeline }
}

impl Grid {
    /// Options of an instance: one thread a rank, no prefix that both requests have, and the wire.
    fn options(self, wire: &str) -> String {
        format!(
            "dtype: float32\nmax_seq_len: 512\nmax_batch_size: 2\nnum_threads: 1\ntensor_parallel_size: {}\n\
             pipeline_parallel_size: {}\nkv_cache_config: {{max_tokens: 1024, enable_block_reuse: false}}\n\
             cache_transceiver_config: {{backend: {wire}}}\n",
            self.tensor, self.pipeline
        )
    }
}

/// Generation rank and context rank.
type Pair = (u64, u64);

async fn info(worker: &Worker) -> Value {
    let answer = client::get(&worker.address, "/server_info").await;
    answer.expect("/server_info answers").json()
}

/// What came: for each pair of ranks, over what and how many bytes.
async fn came(generation: &Worker) -> BTreeMap<Pair, (String, u64)> {
    let info = info(generation).await;
    let pairs = info["transport"]["rank_pairs"].as_array().cloned();
    let number = |pair: &Value, key: &str| pair[key].as_u64().expect("a number");
    let pairs = pairs.expect("the pairs of ranks are told").into_iter();
    pairs
        .map(|pair| {
            let ranks = (number(&pair, "rank"), number(&pair, "peer_rank"));
            let transport = pair["transport"].as_str().expect("a name").to_owned();
            (ranks, (transport, number(&pair, "bytes_received")))
        })
        .collect()
}

/// Bytes that all ranks of the generation side hold of the items' prompts; KV heads that are there twice count twice.
async fn expected_bytes(generation: &Worker, to: Grid, items: &[Item]) -> u64 {
    let layout = info(generation).await["kv_layout"].clone();
    let size = |key: &str| layout[key].as_u64().expect("a size");
    assert_eq!(layout["dtype"], "float32");
    let heads = size("kv_heads").max(to.tensor.into());
    let tokens: usize = items.iter().map(|item| item.prompt_token_ids.len()).sum();
    tokens as u64 * size("layers") * 2 * heads * size("head_dim") * 4
}

/// What is handed over, and between whom.
struct Case<'a> {
    model: &'a str,
    items: &'a [Item],
    /// Of each answer at most.
    tokens: usize,
    wire: &'a str,
}

impl Case<'_> {
    /// Answers through both sides; KV has to go between these ranks and no others.
    async fn check(&self, from: Grid, to: Grid, pairs: &[Pair]) {
        let (context, generation) = (from.options(self.wire), to.options(self.wire));
        let mut options = Options::new(self.model, &context);
        options.context_count = 1;
        options.generation_engine = Some(&generation);
        let deployment = Deployment::start(&options).await;
        let what = format!("{from:?} to {to:?}");
        for item in self.items {
            let count = self.tokens.min(item.output_token_ids.len());
            let answer = client::ids(&deployment.address, item, count).await;
            assert_eq!(answer, item.output_token_ids[..count], "{what}");
        }
        deployment.blocks_return(BACK).await;
        let (context, generation) = (&deployment.context[0], &deployment.generation);
        let came = came(generation).await;
        let ranks: Vec<Pair> = came.keys().copied().collect();
        assert_eq!(ranks, pairs, "{what}");
        let wire = self.wire.to_lowercase();
        assert!(came.values().all(|(over, _)| *over == wire), "{came:?}");
        let bytes: u64 = came.values().map(|(_, bytes)| bytes).sum();
        assert_eq!(
            bytes,
            expected_bytes(generation, to, self.items).await,
            "{what}"
        );
        let count = self.items.len() as u64;
        for (worker, name, value) in [
            (generation, "baton_handoffs_prefilled_again_total", 0),
            (generation, "baton_handoffs_fetched_total", count),
            (generation, "baton_kv_received_bytes_total", bytes),
            (context, "baton_handoffs_delivered_total", count),
            (context, "baton_kv_sent_bytes_total", bytes),
        ] {
            assert_eq!(worker.counter(name).await, value, "{name}, {what}");
        }
    }
}

/// Two prompts of the tiny model with its clearest choices, so that no order of summing changes one.
fn tiny_items() -> Vec<Item> {
    let items = golden::tiny().remove("llama").expect("it is there");
    let clear = items.into_iter().filter(|item| item.min_margin > 0.005);
    clear.take(2).collect()
}

async fn check_tiny(wire: &str, from: Grid, to: Grid, pairs: &[Pair]) {
    let (model, items) = (baton_tests::tiny_model("llama"), tiny_items());
    assert_eq!(items.len(), 2);
    let case = Case {
        model: &model,
        items: &items,
        tokens: usize::MAX,
        wire,
    };
    case.check(from, to, pairs).await;
}

#[tokio::test]
async fn one_rank_to_two_tensor_ranks() {
    check_tiny("SHM", grid(1, 1), grid(2, 1), &[(0, 0), (1, 0)]).await;
}

#[tokio::test]
async fn two_tensor_ranks_to_one() {
    check_tiny("TCP", grid(2, 1), grid(1, 1), &[(0, 0), (0, 1)]).await;
}

#[tokio::test]
async fn four_tensor_ranks_to_two() {
    let pairs = [(0, 0), (0, 1), (1, 2), (1, 3)];
    check_tiny("SHM", grid(4, 1), grid(2, 1), &pairs).await;
}

/// Eight ranks have each of the four KV heads twice; one of each two gives it.
#[tokio::test]
async fn eight_tensor_ranks_with_repeated_heads_to_four() {
    let pairs = [(0, 0), (1, 2), (2, 4), (3, 6)];
    check_tiny("SHM", grid(8, 1), grid(4, 1), &pairs).await;
}

#[tokio::test]
async fn two_stages_to_two_tensor_ranks() {
    let pairs = [(0, 0), (0, 1), (1, 0), (1, 1)];
    check_tiny("SHM", grid(1, 2), grid(2, 1), &pairs).await;
}

#[tokio::test]
async fn two_tensor_ranks_to_two_stages() {
    let pairs = [(0, 0), (0, 1), (1, 0), (1, 1)];
    check_tiny("SHM", grid(2, 1), grid(1, 2), &pairs).await;
}

#[tokio::test]
async fn two_stages_of_two_tensor_ranks_to_four_tensor_ranks() {
    let pairs = [
        (0, 0),
        (0, 2),
        (1, 0),
        (1, 2),
        (2, 1),
        (2, 3),
        (3, 1),
        (3, 3),
    ];
    check_tiny("SHM", grid(2, 2), grid(4, 1), &pairs).await;
}

#[tokio::test]
async fn one_rank_of_smollm2_to_three() {
    let (model, items) = (baton_tests::model(), golden::smollm2());
    let case = Case {
        model: &model,
        items: &items[..1],
        tokens: 12,
        wire: "SHM",
    };
    let pairs = [(0, 0), (1, 0), (2, 0)];
    case.check(grid(1, 1), grid(3, 1), &pairs).await;
}

/// Three stages of 3, 3 and 2 layers: the spoilt byte comes behind what the smallest sends, so that one rank has its KV and
/// the others have not.
#[tokio::test]
async fn kv_that_is_spoilt_on_some_ranks_is_read_again_on_all() {
    let model = baton_tests::tiny_model("llama");
    let item = tiny_items().pop().expect("an item");
    let stages = grid(1, 3);
    let (layer, tokens) = (2 * 4 * 16 * 4, item.prompt_token_ids.len());
    let fault = format!("flip_byte={}", layer * tokens * 5 / 2);
    let environment = [("BATON_TEST_TRANSPORT_FAULT", fault.as_str())];
    let engine = stages.options("TCP");
    let mut options = Options::new(&model, &engine);
    options.context_count = 1;
    options.context_environment = &environment;
    let deployment = Deployment::start(&options).await;
    let count = item.output_token_ids.len();
    let answer = client::ids(&deployment.address, &item, count).await;
    assert_eq!(answer, item.output_token_ids);
    deployment.blocks_return(BACK).await;
    let (context, generation) = (&deployment.context[0], &deployment.generation);
    for (worker, name, value) in [
        (generation, "baton_handoffs_prefilled_again_total", 1),
        (generation, "baton_handoffs_fetched_total", 0),
        (context, "baton_handoffs_delivered_total", 0),
        (context, "baton_handoffs_cancelled_total", 1),
    ] {
        assert_eq!(worker.counter(name).await, value, "{name}");
    }
    assert_eq!(came(generation).await, BTreeMap::new());
    assert!(
        generation
            .counter("baton_kv_checksum_mismatches_total")
            .await
            > 0
    );
}

/// A rank that follows, of an instance whose ranks the launcher started on this machine.
fn follower_of(process: &Baton) -> Pid {
    let tasks = format!("/proc/{}/task", process.pid());
    let tasks = std::fs::read_dir(tasks).expect("the process is there");
    let children = tasks.flatten().filter_map(|task| {
        let children = std::fs::read_to_string(task.path().join("children"));
        children.ok()
    });
    let children: Vec<i32> = children
        .flat_map(|text| {
            let pids = text.split_whitespace();
            pids.filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()
        })
        .collect();
    let follows = |pid: &&i32| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words
            .split(|byte| *byte == 0)
            .nth(1)
            .is_some_and(|word| word == b"rank")
    };
    let follower = children.iter().find(follows).expect("one that follows");
    Pid::from_raw(*follower)
}

/// A ticket whose context server has lost a rank since: the server ends and names the rank, no rank of the generation
/// server waits for what will not come, and the prompt is read again.
#[tokio::test]
async fn kv_of_an_instance_that_lost_a_rank_is_read_again() {
    let model = baton_tests::tiny_model("llama");
    let item = tiny_items().pop().expect("an item");
    let mut context = Worker::start(&model, &grid(2, 1).options("TCP")).await;
    let generation = Worker::start(&model, &grid(1, 2).options("TCP")).await;
    let mut body = json!({
        "model": "m", "prompt": item.prompt_token_ids, "max_tokens": item.output_token_ids.len(), "temperature": 0,
        "detokenize": false, "disaggregated_params": {"request_type": "context_only"},
    });
    let offered = client::post(&context.address, "/v1/completions", &body).await;
    let offered = offered.expect("an answer");
    assert_eq!(offered.status, 200, "{}", offered.body);
    body["disaggregated_params"] = offered.json()["choices"][0]["disaggregated_params"].clone();
    body["disaggregated_params"]["request_type"] = json!("generation_only");
    kill(follower_of(&context.process), Signal::SIGKILL).expect("it is there");
    let status = context.process.ended(BACK).await;
    assert!(!status.success(), "{status}");
    let log = context.process.log();
    assert!(log.contains("rank 1"), "{log}");
    let answer = client::post(&generation.address, "/v1/completions", &body).await;
    let answer = answer.expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.body);
    let written: Vec<u32> =
        serde_json::from_value(answer.json()["choices"][0]["token_ids"].clone()).expect("ids");
    assert_eq!(written, item.output_token_ids);
    generation.blocks_return(BACK).await;
    let again = generation
        .counter("baton_handoffs_prefilled_again_total")
        .await;
    assert_eq!((again, came(&generation).await), (1, BTreeMap::new()));
}

/// KV of another type is refused: in one line on both sides, and to the client with that line.
#[tokio::test]
async fn kv_that_cannot_be_converted_is_refused_on_both_sides_and_to_the_client() {
    let model = baton_tests::tiny_model("llama");
    let context = grid(2, 1).options("SHM");
    let generation = grid(1, 2)
        .options("SHM")
        .replace("enable_block_reuse", "dtype: float16, enable_block_reuse");
    let mut options = Options::new(&model, &context);
    options.context_count = 1;
    options.generation_engine = Some(&generation);
    let deployment = Deployment::start(&options).await;
    let (context, generation) = (&deployment.context[0], &deployment.generation);
    let said = |worker: &Worker, reason: &str| {
        let log = worker.process.log();
        log.lines().filter(|line| line.contains(reason)).count()
    };
    let reason = "kv layouts differ: kv dtype float16 here, float32 there";
    let turned = "kv layouts differ: kv dtype float32 here, float16 there";
    // They are introduced to each other, and say so then.
    eventually("a line on both sides", BACK, async || {
        (said(generation, reason) == 1 && said(context, turned) == 1).then_some(())
    })
    .await;
    let body = json!({"model": "m", "prompt": [1, 2, 3, 4, 5], "max_tokens": 4, "temperature": 0});
    let answer = client::post(&deployment.address, "/v1/completions", &body).await;
    let answer = answer.expect("an answer");
    assert!((400..500).contains(&answer.status), "{}", answer.body);
    assert!(answer.body.contains(reason), "{}", answer.body);
    // The lease does not have to run out, on either rank of the context server.
    deployment.blocks_return(BACK).await;
    assert_eq!((said(context, reason), said(generation, reason)), (1, 2));
    assert_eq!(context.counter("baton_handoffs_cancelled_total").await, 1);
    assert_eq!(generation.counter("baton_kv_received_bytes_total").await, 0);
}

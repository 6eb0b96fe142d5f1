//! Instances whose ranks find each other over real connections, each rank a thread of this process.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::thread;

use super::*;
use crate::model::tests::test_gguf;
use crate::ranks::{Fabric, FollowerSpec, LeaderRanks, RankCall};
use crate::secret::Secret;
use crate::serve::follow;

/// The ranks that were called for, and how they ended.
#[derive(Debug, Clone, Default)]
struct Called(Arc<Mutex<Vec<RankThread>>>);

type RankThread = thread::JoinHandle<Result<(), ServeError>>;

impl Called {
    /// What a launcher does: starts every rank that the leader calls for.
    fn ranks(&self) -> LeaderRanks {
        let (called, secret) = (self.clone(), Secret::generate());
        let identity = "job 1, instance 0, epoch 1".to_owned();
        let hosts: Vec<String> = (0..8).map(|rank| format!("node{rank}")).collect();
        let ranks = LeaderRanks {
            identity: identity.clone(),
            secret: secret.clone(),
            host: "127.0.0.1".to_owned(),
            hosts: hosts.clone(),
            join_timeout: DEADLINE,
            peer_timeout: DEADLINE,
            fabric: Fabric::Tcp,
            call: Arc::new(|_| Ok(())),
        };
        let start = move |call: &RankCall| {
            for rank in 1..call.size {
                let spec = FollowerSpec {
                    rank,
                    size: call.size,
                    leader: call.leader.clone(),
                    identity: identity.clone(),
                    secret: secret.to_hex(),
                    host: "127.0.0.1".to_owned(),
                    hosts: hosts.clone(),
                    join_timeout_ms: 120_000,
                    peer_timeout_ms: 120_000,
                    fabric: Fabric::Tcp,
                    num_threads: Some(1),
                };
                let ended = thread::spawn(move || follow(&spec, &AtomicBool::new(false)));
                called.0.lock().unwrap().push(ended);
            }
            Ok(())
        };
        LeaderRanks {
            call: Arc::new(start),
            ..ranks
        }
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn join(&self) -> Vec<Result<(), ServeError>> {
        let called = std::mem::take(&mut *self.0.lock().unwrap());
        called
            .into_iter()
            .map(|rank| rank.join().unwrap())
            .collect()
    }
}

fn divided(model: &str, tensor: u32, pipeline: u32) -> (ServeOptions, Called) {
    let called = Called::default();
    let mut options = options(model);
    options.llm.tensor_parallel_size = tensor;
    options.llm.pipeline_parallel_size = pipeline;
    options.ranks = Some(called.ranks());
    (options, called)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_of_four_ranks_answers_as_the_reference_and_says_what_it_is() {
    let (options, called) = divided("tiny-qwen3", 2, 2);
    let instance = Instance::start(options).await;
    assert_eq!(called.count(), 3);
    for item in golden_items("qwen3").iter().take(3) {
        let reply = instance.complete(&item_request(item)).await;
        assert_eq!(
            reply["choices"][0]["token_ids"], item["output_token_ids"],
            "{}",
            item["prompt"]
        );
    }
    let (_, info) = instance.call("GET", "/server_info", &Value::Null).await;
    let info: Value = serde_json::from_str(&info).unwrap();
    let text = info.to_string();
    assert!(text.contains("\"tensor_parallel\":2"), "{text}");
    assert!(text.contains("\"pipeline_parallel\":2"), "{text}");
    assert!(
        text.contains("4 ranks (tensor 2, pipeline 2; tcp)"),
        "{text}"
    );
    instance.stop().await.unwrap();
    for end in called.join() {
        end.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_of_different_ranks_hand_over_to_each_other() {
    let (tensor, tensor_ranks) = divided("tiny-llama", 2, 1);
    let (stages, stage_ranks) = divided("tiny-llama", 1, 2);
    let instances = [
        Instance::start(tensor).await,
        Instance::start(stages).await,
        Instance::start(options("tiny-llama")).await,
    ];
    for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 1)] {
        let (context, generation) = (&instances[from], &instances[to]);
        for item in golden_items("llama").iter().take(2) {
            let mut request = item_request(item);
            request["disaggregated_params"] =
                json!({"request_type": "context_only", "disagg_request_id": 7});
            let first = context.complete(&request).await;
            let mut params = first["choices"][0]["disaggregated_params"].clone();
            params["request_type"] = json!("generation_only");
            request["disaggregated_params"] = params;
            request["prompt"] = first["prompt_token_ids"].clone();
            let joined = generation.complete(&request).await;
            assert_eq!(
                joined["choices"][0]["token_ids"], item["output_token_ids"],
                "{from} to {to}: {}",
                item["prompt"]
            );
        }
    }
    let mut fetched = 0;
    for instance in &instances {
        let (_, metrics) = instance
            .call("GET", "/prometheus/metrics", &Value::Null)
            .await;
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix("baton_handoffs_fetched_total "));
        fetched += line.expect("it is counted").parse::<u32>().unwrap();
        within("all blocks to be free", async {
            while instance.used_blocks().await > 0 {}
        })
        .await;
    }
    assert_eq!(fetched, 8);
    for instance in instances {
        instance.stop().await.unwrap();
    }
    for end in tensor_ranks.join().into_iter().chain(stage_ranks.join()) {
        end.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sizes_that_do_not_go_and_ranks_that_nobody_starts_are_refused() {
    let (mut unfit, called) = divided("tiny-llama", 2, 1);
    unfit.model = test_gguf().to_string_lossy().into_owned();
    let error = serve(unfit, std::future::pending()).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("tensor_parallel_size 2 does not divide 9 attention heads\nhint: "),
        "{text}"
    );
    assert_eq!(called.count(), 0, "nobody is called for");

    let (mut alone, _) = divided("tiny-llama", 2, 2);
    alone.ranks = None;
    let error = serve(alone, std::future::pending()).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("tensor_parallel_size 2 and pipeline_parallel_size 2 need 4 ranks"),
        "{text}"
    );

    let (mut deaf, _) = divided("tiny-llama", 2, 1);
    let ranks = deaf.ranks.as_mut().unwrap();
    ranks.call = Arc::new(|_| Err("node1 has no free slot".to_owned()));
    let error = serve(deaf, std::future::pending()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot have the other ranks started: node1 has no free slot"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_that_do_not_come_or_load_end_the_start_with_their_names() {
    let (mut late, _) = divided("tiny-llama", 2, 1);
    let ranks = late.ranks.as_mut().unwrap();
    ranks.call = Arc::new(|_| Ok(()));
    ranks.join_timeout = Duration::from_millis(300);
    let error = serve(late, std::future::pending()).await.unwrap_err();
    assert!(error.to_string().contains("rank 1 (node1)"), "{error}");

    // A stop while the others are waited for ends it at once.
    let (mut stopped, _) = divided("tiny-llama", 2, 1);
    stopped.ranks.as_mut().unwrap().call = Arc::new(|_| Ok(()));
    within("the end", serve(stopped, async {})).await.unwrap();
}

//! Whole instances with a small real model: start, answer, hand off, end.

mod ranks;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use baton_configs::llm::{ComputeDtype, Device, LlmOptions};
use baton_configs::transceiver::TransceiverConfig;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::load::Started;
use super::{Http, Ready, ServeError, ServeOptions, serve};
use crate::backend::{BackendError, BlockId, StepBatch};
use crate::engine::{Engine, EngineConfig, Inbox};
use crate::model::{Logits, Model, ModelShape};
use crate::page::{Page, PageShape};
use crate::server::app::App;
use crate::server::listener::Listener;
use crate::server::port::EnginePort;
use crate::server::tests::harness::service_over;

/// Longest that any test waits for anything; machines that run tests are busy.
const DEADLINE: Duration = Duration::from_secs(120);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited too long for {what}"),
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(name)
}

fn options(model: &str) -> ServeOptions {
    let mut llm = LlmOptions {
        dtype: ComputeDtype::Float32,
        max_batch_size: 8,
        num_threads: Some(1),
        transceiver: Some(TransceiverConfig::default()),
        ..LlmOptions::default()
    };
    llm.kv_cache.max_tokens = Some(4096);
    ServeOptions {
        host: "127.0.0.1".to_owned(),
        port: 0,
        llm,
        drain: Duration::from_secs(20),
        ..ServeOptions::new(golden(model).to_string_lossy())
    }
}

/// An instance of this process that serves.
struct Instance {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<(), ServeError>>,
}

impl Instance {
    async fn start(mut options: ServeOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let report = folder.path().join("address");
        options.report_addr = Some(report.clone());
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(serve(options, async {
            // A dropped sender means the same.
            drop(stopped.await);
        }));
        let address = within("the address", async {
            loop {
                if let Ok(text) = std::fs::read_to_string(&report) {
                    return text.parse().unwrap();
                }
                assert!(!running.is_finished(), "the instance ended");
                tokio::task::yield_now().await;
            }
        })
        .await;
        let instance = Self {
            address,
            stop,
            running,
        };
        within("the instance to be ready", async {
            loop {
                let (status, body) = instance.call("GET", "/health", &Value::Null).await;
                if status == 200 {
                    return;
                }
                assert_eq!(status, 503, "{body}");
            }
        })
        .await;
        instance
    }

    async fn call(&self, method: &str, path: &str, body: &Value) -> (u16, String) {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut raw = String::new();
        within("an answer", stream.read_to_string(&mut raw))
            .await
            .unwrap();
        let (head, body) = raw.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_owned())
    }

    async fn complete(&self, body: &Value) -> Value {
        let (status, body) = self.call("POST", "/v1/completions", body).await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    async fn used_blocks(&self) -> u64 {
        let (_, metrics) = self.call("GET", "/metrics", &Value::Null).await;
        let metrics: Value = serde_json::from_str(&metrics).unwrap();
        let now = metrics.as_array().unwrap().last().unwrap().clone();
        now["kvCacheStats"]["usedNumBlocks"].as_u64().unwrap()
    }

    async fn stop(self) -> Result<(), ServeError> {
        drop(self.stop);
        within("the end", self.running).await.unwrap()
    }
}

fn golden_items(model: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(golden("tiny.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    golden["models"][model].as_array().unwrap().clone()
}

fn item_request(item: &Value) -> Value {
    let count = item["output_token_ids"].as_array().unwrap().len();
    json!({"model": "m", "prompt": item["prompt"], "temperature": 0, "max_tokens": count})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_model_answers_as_the_reference() {
    let instance = Instance::start(options("tiny-qwen2")).await;
    for item in golden_items("qwen2").iter().take(3) {
        let reply = instance.complete(&item_request(item)).await;
        assert_eq!(reply["model"], "tiny-qwen2");
        assert_eq!(
            reply["choices"][0]["token_ids"], item["output_token_ids"],
            "{}",
            item["prompt"]
        );
    }
    let long = json!({"model": "m", "prompt": vec![1; 5000]});
    let (status, body) = instance.call("POST", "/v1/completions", &long).await;
    assert_eq!(status, 400, "{body}");
    assert!(body.contains("5000") && body.contains("4096"), "{body}");
    instance.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_instances_write_what_one_writes_and_free_all_blocks() {
    let context = Instance::start(options("tiny-qwen2")).await;
    let generation = Instance::start(options("tiny-qwen2")).await;
    for item in golden_items("qwen2").iter().take(3) {
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
            "{}",
            item["prompt"]
        );
    }
    let (_, metrics) = generation
        .call("GET", "/prometheus/metrics", &Value::Null)
        .await;
    assert!(
        metrics.contains("baton_handoffs_fetched_total 3"),
        "{metrics}"
    );
    for instance in [&context, &generation] {
        within("all blocks to be free", async {
            while instance.used_blocks().await > 0 {}
        })
        .await;
    }
    context.stop().await.unwrap();
    generation.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stop_string_ends_gives_its_blocks_back() {
    let instance = Instance::start(options("tiny-qwen2")).await;
    let item = golden_items("qwen2").swap_remove(0);
    let whole = instance.complete(&item_request(&item)).await;
    let text: Vec<char> = whole["choices"][0]["text"]
        .as_str()
        .unwrap()
        .chars()
        .collect();

    let mut request = item_request(&item);
    request["stop"] = json!(text[4]);
    request["max_tokens"] = json!(3000);
    let stopped = instance.complete(&request).await;
    let choice = &stopped["choices"][0];
    assert_eq!(choice["stop_reason"], json!(text[4]));
    assert!(choice["text"].as_str().unwrap().chars().count() <= 4);
    assert!(stopped["usage"]["prompt_tokens_details"]["cached_tokens"].is_u64());

    // The lease that the engine gave before the text was known is not kept until it expires.
    request["stop"] = json!(text[0]);
    request["disaggregated_params"] =
        json!({"request_type": "context_only", "disagg_request_id": 1});
    let complete = instance.complete(&request).await;
    assert_eq!(complete["choices"][0]["finish_reason"], "stop");
    assert_eq!(
        complete["choices"][0]["disaggregated_params"]["ctx_request_id"],
        Value::Null
    );
    within("all blocks to be free", async {
        while instance.used_blocks().await > 0 {}
    })
    .await;
    instance.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_fails_is_one_clear_error() {
    let mut missing = options("tiny-qwen2");
    missing.model = "/no/such/model".to_owned();
    let error = serve(missing, std::future::pending()).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/model"), "{error}");

    let mut single = options("tiny-qwen2");
    single.llm.device = Device::Cuda;
    let error = serve(single, std::future::pending()).await.unwrap_err();
    assert!(error.to_string().contains("dtype: float32"), "{error}");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut in_use = options("tiny-qwen2");
    in_use.port = taken.local_addr().unwrap().port();
    let error = serve(in_use, std::future::pending()).await.unwrap_err();
    assert!(matches!(error, ServeError::Listen(_)), "{error}");

    let mut no_pool = options("tiny-qwen2");
    no_pool.llm.kv_cache.max_tokens = None;
    no_pool.llm.kv_cache.free_memory_fraction = 0.0;
    let error = serve(no_pool, std::future::pending()).await.unwrap_err();
    assert!(
        error.to_string().starts_with("the kv pool has no room: "),
        "{error}"
    );

    let mut template = options("tiny-qwen2");
    template.llm.chat_template = Some("{% if %}".to_owned());
    let error = serve(template, std::future::pending()).await.unwrap_err();
    assert!(matches!(error, ServeError::ChatTemplate(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_ends_a_server_that_still_loads() {
    within("the end", serve(options("tiny-qwen2"), async {}))
        .await
        .unwrap();
}

/// A device that fails at its first step.
#[derive(Debug)]
struct BrokenModel(ModelShape);

impl Model for BrokenModel {
    fn shape(&self) -> &ModelShape {
        &self.0
    }

    fn backend_description(&self) -> String {
        "broken".to_owned()
    }

    fn weight_bytes(&self) -> usize {
        0
    }

    fn allocate_pages(&mut self, _: PageShape, _: usize) -> Result<(), BackendError> {
        Ok(())
    }

    fn forward(&mut self, _: &StepBatch) -> Result<Logits, BackendError> {
        Err(BackendError::OutOfMemory {
            what: "a test".to_owned(),
            bytes: 1,
        })
    }

    fn share_pages(&mut self, _: &[BlockId]) -> Result<Vec<Arc<Page>>, BackendError> {
        unreachable!("nothing is handed off")
    }

    fn page_is_unshared(&self, _: BlockId) -> bool {
        true
    }

    fn lend_page(&mut self, _: BlockId) -> Page {
        unreachable!("nothing is handed off")
    }

    fn return_pages(&mut self, _: Vec<(BlockId, Page)>) -> Result<(), BackendError> {
        unreachable!("nothing is handed off")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_dies_ends_the_server_with_its_error() {
    let shape = ModelShape {
        architecture: "broken".to_owned(),
        layers: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 1,
        width: 1,
        vocab: 288,
        max_seq_len: 4096,
        fingerprint: 0,
    };
    let model = Box::new(BrokenModel(shape));
    let config = EngineConfig::default();
    let (engine, thread) = Engine::start(model, None, config, Inbox::new(8)).unwrap();
    let port: Arc<dyn EnginePort> = Arc::new(engine.clone());
    let app = App::new();
    let listener = Listener::bind("127.0.0.1", 0).await.unwrap();
    let address = listener.address();
    let ready = Ready {
        started: Started {
            service: service_over(port, false),
            engine,
            thread,
        },
        http: Http::start(listener, &app),
        app: Arc::clone(&app),
        url: String::new(),
        registration: None,
        drain: DEADLINE,
    };
    let (stop, stopped) = oneshot::channel();
    let running = tokio::spawn(ready.serve(async {
        drop(stopped.await);
    }));
    within("the service", async {
        while app.loaded().is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let instance = Instance {
        address,
        stop,
        running,
    };
    let request = json!({"model": "m", "prompt": "a"});
    let (status, body) = instance.call("POST", "/v1/completions", &request).await;
    assert_eq!(status, 500, "{body}");
    assert!(body.contains("a test"), "{body}");
    // It ends by itself: nobody told it to.
    let error = within("the end", instance.running)
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, ServeError::Engine(_)), "{error}");
    assert!(app.ready().is_err());
}

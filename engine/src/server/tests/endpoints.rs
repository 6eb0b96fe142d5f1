//! Every endpoint but generation, in every state of the server.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::harness::{Reply, ScriptedEngine, TestServer, service, within};

#[tokio::test]
async fn while_loading_everything_says_what_is_being_done() {
    let server = TestServer::loading(ScriptedEngine::saying("x")).await;
    server.app.set_stage("loading the model, 43 %".to_owned());
    let health = server.get("/health").await;
    assert_eq!(
        (health.status, health.body.as_str()),
        (503, "loading the model, 43 %")
    );
    assert_eq!(health.header("retry-after"), Some("1"));
    for path in [
        "/v1/models",
        "/metrics",
        "/server_info",
        "/prometheus/metrics",
    ] {
        assert_eq!(server.get(path).await.error(503), "loading the model, 43 %");
    }
    let body = json!({"model": "m", "prompt": "a"});
    let refused = server.post("/v1/completions", &body).await;
    assert_eq!(refused.error(503), "loading the model, 43 %");
    assert_eq!(refused.header("retry-after"), Some("1"));
    server.app.open(service(&server.engine, true));
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test]
async fn health_follows_the_engine_and_the_drain() {
    let server = TestServer::start(ScriptedEngine::saying("x")).await;
    let health = server.get("/health").await;
    assert_eq!((health.status, health.body.as_str()), (200, ""));
    assert_eq!(server.get("/health_generate").await.status, 200);
    server.engine.die();
    assert_eq!(
        server.get("/health").await.body,
        "the engine is not running"
    );
    let body = json!({"model": "m", "prompt": "a"});
    let refused = server.post("/v1/completions", &body).await;
    assert_eq!(refused.error(503), "the engine is not running");

    let server = TestServer::start(ScriptedEngine::saying("x")).await;
    server.app.drain();
    assert_eq!(server.get("/health").await.status, 503);
    let refused = server.post("/v1/completions", &body).await;
    assert_eq!(refused.error(503), "the server is shutting down");
    assert_eq!(server.get("/metrics").await.status, 200);
}

#[tokio::test]
async fn names_and_facts() {
    let server = TestServer::start(ScriptedEngine::saying("x")).await;
    let version = server.get("/version").await.ok();
    assert_eq!(version, json!({"version": env!("CARGO_PKG_VERSION")}));
    assert_eq!(
        server.get("/v1/models").await.ok(),
        json!({"object": "list", "data": [{"id": "tiny", "object": "model",
            "created": 1_700_000_000, "owned_by": "baton"}]})
    );
    let info = server.get("/server_info").await.ok();
    assert_eq!(info["disaggregated_params"], json!({}));
    assert_eq!(info["kv_cache_hash_algo"], "v1_block_key");
    assert_eq!(info["kv_layout"]["layers"], 8);
    assert_eq!(info["transport"]["name"], "tcp");
    assert_eq!(info["limits"]["kv_blocks"], 64);
}

#[tokio::test]
async fn metrics_always_hold_the_current_blocks() {
    let server = TestServer::start(ScriptedEngine::saying("x")).await;
    let metrics = server.get("/metrics").await.ok();
    let now = metrics.as_array().unwrap().last().unwrap();
    assert_eq!(
        now["kvCacheStats"],
        json!({"maxNumBlocks": 64, "freeNumBlocks": 61, "usedNumBlocks": 3, "tokensPerBlock": 32})
    );
    assert_eq!(now["engineStats"]["blocks_used"], 3);
}

#[tokio::test]
async fn prometheus_counts_requests_by_their_end() {
    let server = TestServer::start(ScriptedEngine::saying("x")).await;
    server.complete(json!({"model": "m", "prompt": "a"})).await;
    server
        .post("/v1/completions", &json!({"model": "m"}))
        .await
        .error(400);
    let reply = server.get("/prometheus/metrics").await;
    let text = &reply.body;
    for line in [
        "baton_http_requests_total{endpoint=\"completions\"} 2",
        "baton_http_requests_ended_total{endpoint=\"completions\",outcome=\"completed\"} 1",
        "baton_http_requests_ended_total{endpoint=\"completions\",outcome=\"failed\"} 1",
        "baton_first_token_seconds_count 1",
        "baton_kv_blocks_total 64",
        "baton_kv_blocks_used 3",
        "baton_handoff_bytes_total 0",
        "# EOF",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[tokio::test]
async fn perf_metrics_are_drained_and_follow_the_shared_clock() {
    let server = TestServer::start(ScriptedEngine::saying("x")).await;
    let set = server
        .post("/steady_clock_offset", &json!({"offset": 5000.5}))
        .await;
    assert_eq!(set.ok(), json!({"offset": 5000.5}));
    server.complete(json!({"model": "m", "prompt": "a"})).await;
    let perf = server.get("/perf_metrics").await.ok();
    let timing = &perf[0]["perf_metrics"]["timing_metrics"];
    assert!(timing["first_token_time"].as_f64().unwrap() > 5000.0);
    assert_eq!(server.get("/perf_metrics").await.ok(), json!([]));
    let clock = server.get("/steady_clock_offset").await.ok();
    let received = clock["receive_ts"].as_f64().unwrap();
    assert!(received < 5000.0 && received <= clock["transmit_ts"].as_f64().unwrap());
    let wrong = json!({"offset": "a"});
    let wrong = server.post("/steady_clock_offset", &wrong).await;
    assert!(wrong.error(400).contains("`offset`"));
}

#[tokio::test]
async fn kv_cache_events_are_posted_for() {
    let server = TestServer::start(ScriptedEngine::saying("x")).await;
    let events = server.call("POST", "/kv_cache_events", "", b"").await;
    assert_eq!(events.ok()[0]["data"]["type"], "created");
}

#[tokio::test]
async fn unknown_paths_and_wrong_methods() {
    let server = TestServer::start(ScriptedEngine::saying("x")).await;
    let unknown = server.get("/v2/nothing").await;
    assert!(unknown.error(404).contains("/v2/nothing"));
    for path in ["/v1/responses", "/v1/responses/resp_1"] {
        let responses = server.call("POST", path, "", b"{}").await;
        assert!(responses.error(404).contains("/v1/responses is not served"));
    }
    let wrong = server.get("/v1/completions").await;
    wrong.error(405);
    assert_eq!(wrong.header("allow"), Some("post"));
    let wrong = server.call("POST", "/health", "", b"").await;
    wrong.error(405);
    assert_eq!(wrong.header("allow"), Some("get, head"));
    assert_eq!(server.call("HEAD", "/health", "", b"").await.status, 200);
}

#[tokio::test]
async fn bodies_that_cannot_be_read() {
    let server = TestServer::start(ScriptedEngine::saying("x")).await;
    let path = "/v1/completions";
    let broken = server.call("POST", path, "", b"{\"model\": ").await;
    assert!(broken.error(400).contains("not a json object"));
    let not_utf8 = server
        .call("POST", path, "", b"{\"model\": \"\xff\"}")
        .await;
    assert!(not_utf8.error(400).contains("not utf-8"));
    let list = server.call("POST", path, "", b"[1]").await;
    list.error(400);
    let packed = server
        .call("POST", path, "x-trtllm-msgpack: 1\r\n", b"\x81")
        .await;
    assert!(packed.error(415).contains("x-trtllm-msgpack"));
    let large = server.open("POST", path, "", b"").await;
    drop(large);
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!("POST {path} HTTP/1.1\r\nhost: t\r\ncontent-length: 99999999\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut raw = Vec::new();
    within("413", stream.read_to_end(&mut raw)).await.unwrap();
    let large = Reply::parse(&raw);
    assert!(large.error(413).contains("33554432"));
    assert_eq!(large.header("connection"), Some("close"));
}

#[tokio::test]
async fn an_expected_continue_is_given() {
    let server = TestServer::start(ScriptedEngine::saying("x")).await;
    let body = json!({"model": "m", "prompt": "a"}).to_string();
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: t\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut go = [0; 25];
    within("100 Continue", stream.read_exact(&mut go))
        .await
        .unwrap();
    assert_eq!(&go, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut raw = Vec::new();
    within("the answer", stream.read_to_end(&mut raw))
        .await
        .unwrap();
    assert_eq!(Reply::parse(&raw).ok()["choices"][0]["text"], "x");
}

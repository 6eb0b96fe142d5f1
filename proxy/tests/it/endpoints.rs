//! The paths beside the two that generate.

use serde_json::{Value, json};

use crate::client::{eventually, exchange, get, post, request};
use crate::harness::{prompt, streamed, trio, trio_with};
use crate::mock::{ticket, written};

#[tokio::test]
async fn small_endpoints_answer_as_documented() {
    let trio = trio(ticket, written).await;
    let address = trio.proxy.address;
    let health = get(address, "/health").await;
    assert_eq!((health.status.as_u16(), health.body.len()), (200, 0));
    let head = exchange(address, request("HEAD", "/health", "")).await;
    assert_eq!(head.status, 200);
    let version = get(address, "/version").await.json();
    assert_eq!(version, json!({"version": env!("CARGO_PKG_VERSION")}));
    let info = get(address, "/cluster_info").await.json();
    let port = trio.context.address.port();
    assert_eq!(info["is_ready"], true);
    assert_eq!(
        info["current_workers"]["context_servers"],
        json!([{"worker_id": format!("CONTEXT-127.0.0.1:{port}"), "host": "127.0.0.1", "port": port, "role": 0}])
    );
    assert_eq!(info["current_workers"]["generation_servers"][0]["role"], 1);
    assert_eq!(
        info["minimal_instances"],
        json!({"context_servers": 1, "generation_servers": 1})
    );
}

#[tokio::test]
async fn unknown_paths_are_404_and_wrong_methods_405() {
    let trio = trio(ticket, written).await;
    let address = trio.proxy.address;
    let missing = get(address, "/v1/embeddings").await;
    assert_eq!(missing.status, 404);
    assert_eq!(missing.json()["type"], "NotFoundError");
    for (method, path, allowed) in [
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/chat/completions", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("PUT", "/prometheus/metrics", "GET, HEAD"),
    ] {
        let answer = exchange(address, request(method, path, "")).await;
        assert_eq!(
            (answer.status.as_u16(), answer.header("allow")),
            (405, allowed)
        );
        assert!(answer.message().contains(path));
    }
}

#[tokio::test]
async fn models_come_from_a_worker_and_are_remembered_for_a_while() {
    let trio = trio(ticket, written).await;
    for _ in 0..5 {
        let models = get(trio.proxy.address, "/v1/models").await;
        assert_eq!(models.json()["data"][0]["id"], "mock");
    }
    assert_eq!(
        trio.generation.models_count() + trio.context.models_count(),
        1
    );
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let trio = trio(ticket, written).await;
    trio.proxy.complete(prompt()).await;
    trio.proxy.complete(streamed()).await;
    trio.proxy.complete(json!({"prompt": 7})).await;
    for (name, expected) in [
        ("total_requests_total", 3.0),
        ("stream_requests_total", 1.0),
        ("nonstream_requests_total", 1.0),
        ("validation_exceptions_total", 1.0),
        ("total_responses_total", 2.0),
        ("http_exceptions_total", 0.0),
        ("ctx_total_requests_total", 2.0),
        ("ctx_completed_requests_total", 2.0),
        ("ctx_first_token_latency_seconds_count", 2.0),
        ("gen_completed_requests_total", 2.0),
        ("gen_complete_latency_seconds_count", 2.0),
        ("gen_first_token_latency_seconds_count", 1.0),
        ("gen_per_token_latency_seconds_count", 1.0),
        ("queue_latency_seconds_count", 2.0),
        ("baton_client_disconnects_total", 0.0),
        ("baton_ready", 1.0),
    ] {
        let value = trio.proxy.metric(name).await;
        assert!(
            (value - expected).abs() < 0.1,
            "{name} is {value}, expected {expected}"
        );
    }
    let text = get(trio.proxy.address, "/prometheus/metrics").await.text();
    let up = format!(
        "baton_worker_up{{role=\"generation\",server=\"{}\"}} 1",
        trio.generation.address
    );
    assert!(text.contains(&up), "{text}");
}

#[tokio::test]
async fn perf_metrics_join_what_three_processes_saw() {
    let trio = trio_with(ticket, written, |options| {
        options.config.perf_metrics_max_requests = 10
    })
    .await;
    let address = trio.proxy.address;
    for mock in [&trio.context, &trio.generation] {
        eventually("the worker knows its offset", async || {
            mock.clock_offset().is_some()
        })
        .await;
    }
    trio.proxy.complete(prompt()).await;
    assert_eq!(get(address, "/perf_metrics").await.json(), json!([]));
    // The generation part comes later than the context part.
    trio.context
        .set_perf(json!([{"request_id": 41, "perf_metrics": {"c": 1}}, {"request_id": 99}]));
    assert_eq!(get(address, "/perf_metrics").await.json(), json!([]));
    trio.generation
        .set_perf(json!([{"request_id": 5, "ctx_request_id": 41, "perf_metrics": {"g": 1}}]));
    let joined = get(address, "/perf_metrics").await.json();
    let joined: &Vec<Value> = joined.as_array().unwrap();
    assert_eq!(joined.len(), 1);
    assert_eq!(joined[0]["ctx_server"], trio.context.address.to_string());
    assert_eq!(joined[0]["gen_server"], trio.generation.address.to_string());
    assert_eq!(
        joined[0]["ctx_perf_metrics"]["perf_metrics"],
        json!({"c": 1})
    );
    assert_eq!(
        joined[0]["gen_perf_metrics"]["perf_metrics"],
        json!({"g": 1})
    );
    let time = |name: &str| joined[0][name].as_f64().unwrap();
    assert!(time("disagg_server_arrival_time") > 0.0);
    // The workers' clocks stand at 5 s, and are told how to read the proxy's.
    for mock in [&trio.context, &trio.generation] {
        let worker_time = mock.clock_offset().unwrap() + 5.0;
        assert!((time("disagg_server_arrival_time") - worker_time).abs() < 30.0);
    }
    assert!(time("disagg_server_first_token_time") >= time("disagg_server_arrival_time"));
    assert_eq!(get(address, "/perf_metrics").await.json(), json!([]));
    assert_eq!(post(address, "/perf_metrics", "").await.status, 405);
}

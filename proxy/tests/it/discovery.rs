//! Service discovery and address files, with scripted workers that register by hand.

use std::net::SocketAddr;
use std::time::Duration;

use baton_configs::cluster::{ClusterConfig, store_token};
use baton_configs::disagg::{Endpoint, ServerAddress};
use baton_proxy::{ProxyOptions, StoreToken};
use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use serde_json::{Value, json};

use crate::client::{Whole, eventually, exchange, get, request};
use crate::harness::{Running, options, prompt};
use crate::mock::{Mock, ticket, written};

fn discovering(name: &str, minimum: (u32, u32)) -> ProxyOptions {
    let mut options = options(&[], &[]);
    options.config.cluster = Some(ClusterConfig {
        store: Endpoint {
            host: "127.0.0.1".to_owned(),
            port: 8000,
        },
        name: name.to_owned(),
        context_servers_min: minimum.0,
        generation_servers_min: minimum.1,
        heartbeat_interval: Duration::from_secs(5),
        inactive_timeout: Duration::from_secs(10),
    });
    options
}

/// One call of the store, and its status and result.
async fn call(proxy: SocketAddr, request: Request<Full<Bytes>>) -> (u16, Value) {
    let answer: Whole = exchange(proxy, request).await;
    (answer.status.as_u16(), answer.json()["result"].clone())
}

async fn set(proxy: SocketAddr, body: Value) -> (u16, Value) {
    call(proxy, request("POST", "/set", body.to_string())).await
}

fn key(cluster: &str, id: &str) -> String {
    format!("/trtllm-disagg/{cluster}/workers/{id}")
}

/// A worker's registration, as it writes it.
fn entry(cluster: &str, id: &str, worker: SocketAddr, role: u8, ttl: f64) -> Value {
    let value = json!({
        "worker_id": id, "host": worker.ip().to_string(), "port": worker.port(), "role": role,
    });
    json!({"key": key(cluster, id), "value": value.to_string(), "ttl": ttl})
}

#[tokio::test]
async fn workers_that_register_are_found_and_those_that_fall_silent_are_dropped() {
    let (context, generation) = (Mock::start(ticket).await, Mock::start(written).await);
    let proxy = Running::listening(discovering("c", (1, 1))).await;
    let at = proxy.address;
    let refused = proxy.complete(prompt()).await;
    assert_eq!(refused.status, 503);
    let text = refused.message();
    assert!(text.contains("no context server has registered"), "{text}");

    let first = entry("c", "CONTEXT-1", context.address, 0, 60.0);
    assert_eq!(set(at, first.clone()).await, (200, json!(true)));
    assert_eq!(set(at, first).await, (400, json!(false)));
    let second = entry("c", "GENERATION-1", generation.address, 1, 60.0);
    assert_eq!(set(at, second).await, (200, json!(true)));
    proxy.wait_health(200).await;
    assert_eq!(proxy.complete(prompt()).await.status, 200);

    let info = get(at, "/cluster_info").await.json();
    assert_eq!(info["is_ready"], true);
    assert_eq!(
        info["current_workers"]["context_servers"],
        json!([{"worker_id": "CONTEXT-1", "host": "127.0.0.1", "port": context.address.port(), "role": 0}])
    );
    assert_eq!(
        info["minimal_instances"],
        json!({"context_servers": 1, "generation_servers": 1})
    );

    let silent = format!("/expire?key={}&ttl=0", key("c", "GENERATION-1"));
    assert_eq!(
        call(at, request("GET", &silent, "")).await,
        (200, json!(true))
    );
    proxy.wait_health(503).await;
    let text = get(at, "/health").await.text();
    assert!(
        text.contains("no generation server has registered"),
        "{text}"
    );
    let metrics = get(at, "/prometheus/metrics").await.text();
    assert!(
        !metrics.contains(&generation.address.to_string()),
        "{metrics}"
    );

    let again = entry("c", "GENERATION-2", generation.address, 1, 60.0);
    assert_eq!(set(at, again).await, (200, json!(true)));
    proxy.wait_health(200).await;
    let gone = format!("/delete?key={}", key("c", "CONTEXT-1").replace('/', "%2F"));
    assert_eq!(
        call(at, request("DELETE", &gone, "")).await,
        (200, json!(true))
    );
    proxy.wait_health(503).await;
}

#[tokio::test]
async fn the_minimum_of_each_role_is_waited_for() {
    let proxy = Running::listening(discovering("", (2, 1))).await;
    let workers = [
        Mock::start(ticket).await,
        Mock::start(ticket).await,
        Mock::start(written).await,
    ];
    for (index, role) in [(0, 0), (2, 1)] {
        let id = format!("W-{index}");
        set(
            proxy.address,
            entry("", &id, workers[index].address, role, 60.0),
        )
        .await;
    }
    eventually("one of two context servers is up", async || {
        let text = get(proxy.address, "/health").await.text();
        text.contains("1 of at least 2 context servers are up") && !text.contains("generation")
    })
    .await;
    set(proxy.address, entry("", "W-1", workers[1].address, 0, 60.0)).await;
    proxy.wait_health(200).await;
    // The same server again, before its first registration has expired: it counts once.
    set(proxy.address, entry("", "W-9", workers[1].address, 0, 60.0)).await;
    eventually("the newest registration stands", async || {
        let info = get(proxy.address, "/cluster_info").await.json();
        let context = info["current_workers"]["context_servers"]
            .as_array()
            .unwrap()
            .clone();
        let ids: Vec<&str> = context
            .iter()
            .map(|worker| worker["worker_id"].as_str().unwrap())
            .collect();
        ids == ["W-0", "W-9"]
    })
    .await;
}

#[tokio::test]
async fn who_does_not_match_is_named_while_the_proxy_is_not_ready() {
    let proxy = Running::listening(discovering("mine", (1, 1))).await;
    let worker = Mock::start(ticket).await;
    set(
        proxy.address,
        entry("", "CONTEXT-1", worker.address, 0, 60.0),
    )
    .await;
    set(
        proxy.address,
        entry("", "CONTEXT-2", worker.address, 0, 60.0),
    )
    .await;
    let everywhere: SocketAddr = "0.0.0.0:8001".parse().unwrap();
    set(
        proxy.address,
        entry("mine", "CONTEXT-3", everywhere, 0, 60.0),
    )
    .await;
    let expected = [
        "2 registered with cluster_name \"\", this proxy has \"mine\"",
        "worker CONTEXT-3 cannot be used: it registered 0.0.0.0",
    ];
    eventually("both kinds are named", async || {
        let text = get(proxy.address, "/health").await.text();
        expected.iter().all(|part| text.contains(part))
    })
    .await;
    let text = proxy.complete(prompt()).await.message();
    assert!(text.contains(expected[0]), "{text}");
}

#[tokio::test]
async fn the_stores_answers_are_the_known_ones() {
    let proxy = Running::listening(discovering("", (1, 1))).await;
    let at = proxy.address;
    let ask = async |method: &str, path: &str| call(at, request(method, path, "")).await;
    assert_eq!(ask("GET", "/get?key=a").await, (400, Value::Null));
    assert_eq!(ask("DELETE", "/delete?key=a").await, (400, json!(false)));
    assert_eq!(ask("GET", "/expire?key=a&ttl=5").await, (400, json!(false)));
    assert_eq!(
        ask("GET", "/get_prefix?key_prefix=/x").await,
        (200, json!({}))
    );
    assert_eq!(set(at, json!({"key": "/x/1"})).await, (200, json!(true)));
    assert_eq!(
        set(at, json!({"key": "/x/2", "value": "v", "ttl": -1})).await,
        (200, json!(true))
    );
    assert_eq!(ask("GET", "/get?key=/x/1").await, (200, json!("")));
    assert_eq!(
        ask("GET", "/get_prefix?key_prefix=%2Fx&keys_only=0").await,
        (200, json!({"/x/1": "", "/x/2": "v"}))
    );
    assert_eq!(
        ask("GET", "/get_prefix?key_prefix=/x&keys_only=1").await,
        (200, json!({"/x/1": "", "/x/2": ""}))
    );
    let over =
        json!({"key": "/x/2", "value": "w", "overwrite_if_exists": true, "expire_time": 0.5});
    assert_eq!(set(at, over).await, (200, json!(true)));
    assert_eq!(
        ask("GET", "/get?key=/x/2").await,
        (400, Value::Null),
        "that time has passed"
    );
    for (method, path, status) in [
        ("GET", "/get", 400),
        ("GET", "/expire?key=/x/1&ttl=soon", 400),
        ("GET", "/get_prefix?key_prefix=/&keys_only=yes", 400),
        ("GET", "/set", 405),
        ("POST", "/delete?key=/x/1", 405),
    ] {
        assert_eq!(ask(method, path).await.0, status, "{path}");
    }
    let bad = exchange(at, request("POST", "/set", "{\"key\": 1}")).await;
    assert_eq!(bad.status, 400);
    assert!(
        bad.json()["error"]
            .as_str()
            .unwrap()
            .contains("body is no entry")
    );
    let static_proxy = Running::listening(options(&[at], &[at])).await;
    assert_eq!(get(static_proxy.address, "/get?key=a").await.status, 404);
}

#[tokio::test]
async fn with_a_job_secret_only_its_holders_change_anything() {
    let mut options = discovering("", (1, 1));
    options.environment.store_token = Some(StoreToken::of_secret("5ec4e7"));
    let proxy = Running::listening(options).await;
    let at = proxy.address;
    let body = json!({"key": "/x", "value": "v"}).to_string();
    let with = |method: &str, path: &str, body: &str, token: Option<&str>| {
        let mut request = request(method, path, body.to_owned());
        if let Some(token) = token {
            let value = format!("Bearer {token}").parse().unwrap();
            request.headers_mut().insert("authorization", value);
        }
        request
    };
    let right = store_token("5ec4e7");
    for token in [None, Some("5ec4e7"), Some(&right[1..])] {
        for (method, path) in [
            ("POST", "/set"),
            ("GET", "/expire?key=/x&ttl=1"),
            ("DELETE", "/delete?key=/x"),
        ] {
            let answer = call(at, with(method, path, &body, token)).await;
            assert_eq!(answer, (403, json!(false)), "{path}");
        }
    }
    assert_eq!(
        call(at, with("POST", "/set", &body, Some(&right))).await.0,
        200
    );
    assert_eq!(
        call(at, with("GET", "/get?key=/x", "", None)).await,
        (200, json!("v"))
    );
    assert_eq!(
        call(at, with("DELETE", "/delete?key=/x", "", Some(&right)))
            .await
            .0,
        200
    );
}

#[tokio::test]
async fn a_server_that_comes_back_elsewhere_is_found_by_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ctx0");
    let generation = Mock::start(written).await;
    let mut options = options(&[], &[generation.address]);
    options.config.context_servers.servers = vec![ServerAddress::File(file.clone())];
    options.timeouts.probe = Duration::from_millis(500);
    let proxy = Running::listening(options).await;
    let waited_for = format!(
        "context server file:{}: the file is not there yet",
        file.display()
    );
    eventually("the file is waited for by name", async || {
        get(proxy.address, "/health")
            .await
            .text()
            .contains(&waited_for)
    })
    .await;
    let first = Mock::start(ticket).await;
    std::fs::write(&file, first.address.to_string()).unwrap();
    proxy.wait_health(200).await;
    assert_eq!(proxy.complete(prompt()).await.status, 200);

    let second = Mock::start(ticket).await;
    first.kill().await;
    proxy.wait_health(503).await;
    std::fs::write(&file, second.address.to_string()).unwrap();
    proxy.wait_health(200).await;
    assert_eq!(proxy.complete(prompt()).await.status, 200);
    assert_eq!(second.seen().len(), 1);
    let info = get(proxy.address, "/cluster_info").await.json();
    let context = &info["current_workers"]["context_servers"];
    assert_eq!(context.as_array().unwrap().len(), 1, "{info}");
    assert_eq!(context[0]["port"], json!(second.address.port()));
    assert_eq!(info["missing_workers"]["context_servers"], json!([]));
}

#[tokio::test]
async fn a_file_that_never_comes_ends_the_start_with_its_name() {
    let generation = Mock::start(written).await;
    let mut options = options(&[], &[generation.address]);
    options.config.context_servers.servers = vec![ServerAddress::File("/nonexistent/ctx0".into())];
    options.timeouts.server_start = Duration::from_millis(300);
    let error = baton_proxy::run(options, std::future::pending())
        .await
        .unwrap_err()
        .to_string();
    let expected = "context server file:/nonexistent/ctx0: the file is not there yet";
    assert!(error.contains(expected), "{error}");
}

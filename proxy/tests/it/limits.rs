//! Bounds, and bodies that no client should send.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::client::{eventually, finish, get, post, request, send};
use crate::harness::{prompt, trio, trio_with};
use crate::mock::{Script, WHOLE, ticket, written};

#[tokio::test]
async fn full_queue_is_told_at_once_and_drains_in_order() {
    let gate = Arc::new(Notify::new());
    let waiting = gate.clone();
    let trio = trio_with(
        move |seen| Script::After(waiting.clone(), Box::new(ticket(seen))),
        written,
        |options| {
            options.limits.max_active = 1;
            options.limits.max_queued = 1;
        },
    )
    .await;
    let address = trio.proxy.address;
    let ask = move || {
        tokio::spawn(async move { post(address, "/v1/completions", prompt().to_string()).await })
    };
    let first = ask();
    trio.context.wait_arrived(1).await;
    let second = ask();
    eventually("the second request waits", async || {
        trio.proxy.metric("baton_queued_requests").await > 0.5
    })
    .await;
    let third = trio.proxy.complete(prompt()).await;
    assert_eq!(
        (third.status.as_u16(), third.header("retry-after")),
        (503, "1")
    );
    assert!(
        third.message().contains("queue is full"),
        "{}",
        third.message()
    );
    gate.notify_one();
    assert_eq!(first.await.unwrap().text(), WHOLE);
    trio.context.wait_arrived(2).await;
    gate.notify_one();
    assert_eq!(second.await.unwrap().text(), WHOLE);
}

#[tokio::test]
async fn too_many_connections_are_told_so() {
    let trio = trio_with(ticket, written, |options| {
        options.limits.max_connections = 2
    })
    .await;
    let address = trio.proxy.address;
    let mut held = Vec::new();
    for _ in 0..2 {
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        eventually("a place for a connection", async || {
            sender.ready().await.unwrap();
            let response = sender
                .send_request(request("GET", "/version", Bytes::new()))
                .await;
            finish(response.unwrap()).await.status == 200
        })
        .await;
        held.push(sender);
    }
    let refused = get(address, "/version").await;
    assert_eq!(refused.status, 503);
    assert!(refused.message().contains("too many connections: 2"));
    assert_eq!(refused.header("connection"), "close");
    drop(held);
    eventually("room again", async || {
        get(address, "/version").await.status == 200
    })
    .await;
}

#[tokio::test]
async fn long_bodies_are_413_and_broken_ones_400() {
    let trio = trio_with(ticket, written, |options| {
        options.limits.max_body_bytes = 1000
    })
    .await;
    let address = trio.proxy.address;
    let fits = json!({"prompt": "x".repeat(900)}).to_string();
    assert_eq!(post(address, "/v1/completions", fits).await.status, 200);
    for size in [1001, 5_000, 100_000] {
        let answer = post(address, "/v1/completions", vec![b'x'; size]).await;
        assert_eq!(answer.status, 413);
        assert!(answer.message().contains("longer than 1000 bytes"));
    }
    for body in [
        "",
        "{",
        "[]",
        "null",
        "{\"prompt\":\"a\"}x",
        "{\"prompt\":\"\u{0}\"}",
    ] {
        let answer = post(address, "/v1/completions", body).await;
        assert_eq!(answer.status, 400, "{body}");
        assert!(
            answer.message().starts_with("body is not a JSON object"),
            "{body}"
        );
    }
    for (body, param) in [
        (json!({"prompt": ["a", "b"]}), "prompt"),
        (json!({"prompt": "a", "stream": 1}), "stream"),
        (json!({"messages": []}), "prompt"),
    ] {
        let answer = trio.proxy.complete(body).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["param"]),
            (400, &json!(param))
        );
        assert_eq!(answer.json()["type"], "BadRequestError");
    }
    assert_eq!(trio.context.seen().len(), 1);
}

fn body() -> impl Strategy<Value = Vec<u8>> {
    let field = prop_oneof![
        Just("prompt"),
        Just("messages"),
        Just("stream"),
        Just("stream_options"),
        Just("n"),
        Just("disaggregated_params"),
        Just("chat_template"),
        Just("prompt_token_ids"),
    ];
    let value = prop_oneof![
        Just("null".to_owned()),
        any::<bool>().prop_map(|value| value.to_string()),
        any::<f64>().prop_map(|value| value.to_string()),
        any::<i64>().prop_map(|value| value.to_string()),
        "[\"\\\\a-z{}\\[\\]:,0-9]{0,12}",
        ".{0,12}".prop_map(|text| serde_json::to_string(&text).unwrap()),
        prop::collection::vec(any::<u32>(), 0..4).prop_map(|ids| format!("{ids:?}")),
        prop::collection::vec("[a-z]{0,3}", 0..3).prop_map(|texts| format!("{texts:?}")),
        Just("{\"include_usage\":7}".to_owned()),
    ];
    let object = prop::collection::vec((field, value), 0..5).prop_map(|members| {
        let members: Vec<String> = members
            .iter()
            .map(|(key, value)| format!("\"{key}\":{value}"))
            .collect();
        format!("{{{}}}", members.join(",")).into_bytes()
    });
    prop_oneof![
        3 => object.clone(),
        1 => prop::collection::vec(any::<u8>(), 0..200),
        // A well-formed body with one byte changed.
        1 => (object, any::<prop::sample::Index>(), any::<u8>()).prop_map(|(mut bytes, at, byte)| {
            let at = at.index(bytes.len());
            bytes[at] = byte;
            bytes
        }),
    ]
}

#[tokio::test]
async fn two_thousand_random_bodies_get_an_answer_each() {
    let trio = trio(ticket, written).await;
    let mut runner = TestRunner::deterministic();
    let strategy = body();
    let stream = TcpStream::connect(trio.proxy.address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut served = 0;
    for index in 0..2_000 {
        let body = strategy.new_tree(&mut runner).unwrap().current();
        let path = if index % 2 == 0 {
            "/v1/completions"
        } else {
            "/v1/chat/completions"
        };
        let text = String::from_utf8_lossy(&body).into_owned();
        // One connection for all: it must outlive every one of them.
        sender.ready().await.unwrap();
        let request = request("POST", path, body).map(|body: Full<Bytes>| body);
        let answer = finish(sender.send_request(request).await.unwrap()).await;
        match answer.status.as_u16() {
            200 => served += 1,
            400 => assert!(!answer.message().is_empty()),
            other => panic!("{other} for {text}: {}", answer.text()),
        }
    }
    assert!((100..1_900).contains(&served), "{served} were served");
    let answer = send(
        trio.proxy.address,
        request("POST", "/v1/completions", prompt().to_string()),
    )
    .await;
    assert_eq!(answer.status(), 200);
}

//! Failures after bytes were relayed: no second try, one clear event, and an end that no client takes for a whole one.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::BodyExt;
use serde_json::Value;

use crate::client::{Whole, finish, request, send};
use crate::harness::{streamed, trio, trio_with};
use crate::mock::{Script, Step, events, ticket};

const PIECE: &str = "data: {\"choices\":[{\"text\":\" t\"}]}\n\n";

fn last_event(answer: &Whole) -> Value {
    assert!(
        !answer.is_complete,
        "the stream must not end as if it were whole"
    );
    let text = answer.text();
    assert!(!text.contains("[DONE]"));
    let event = text.trim_end().rsplit("\n\n").next().unwrap();
    serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()
}

#[tokio::test]
async fn worker_that_breaks_in_the_middle_becomes_an_error_event() {
    let half = Bytes::from_static(b"data: {\"choi");
    let steps = vec![Step::Send(PIECE.into()), Step::Send(half), Step::Cut];
    let trio = trio(ticket, move |_| Script::events(steps.clone())).await;
    let answer = trio.proxy.complete(streamed()).await;
    assert_eq!(answer.status, 200);
    assert!(
        answer
            .text()
            .starts_with(&format!("{PIECE}data: {{\"choi\n\ndata: "))
    );
    let event = last_event(&answer);
    let message = event["error"]["message"].as_str().unwrap();
    let name = format!(
        "generation server {}: connection lost",
        trio.generation.address
    );
    assert!(message.starts_with(&name), "{message}");
    assert_eq!(event["error"]["code"], 502);
    assert_eq!(trio.generation.seen().len(), 1);
    assert!((trio.proxy.metric("gen_error_requests_total").await - 1.0).abs() < 0.1);
}

#[tokio::test]
async fn worker_that_stands_still_is_given_up_in_time() {
    let steps = vec![Step::Send(PIECE.into()), Step::Hang];
    let trio = trio_with(
        ticket,
        move |_| Script::events(steps.clone()),
        |options| {
            options.timeouts.stream_idle = Duration::from_millis(200);
        },
    )
    .await;
    let started = Instant::now();
    let answer = trio.proxy.complete(streamed()).await;
    assert!(started.elapsed() >= Duration::from_millis(200));
    let event = last_event(&answer);
    assert_eq!(event["code"], 504);
    let message = event["message"].as_str().unwrap();
    assert!(
        message.contains("no next piece of the stream within 0."),
        "{message}"
    );
    trio.generation.wait_abandoned(1).await;
}

#[tokio::test]
async fn stream_that_never_ends_is_ended_by_the_total_deadline() {
    // Faster than the idle deadline, for longer than the total one.
    let tick = std::sync::Arc::new(tokio::sync::Notify::new());
    let mut steps = vec![Step::Send(PIECE.into())];
    for _ in 0..100_000 {
        steps.push(Step::Until(tick.clone()));
        steps.push(Step::Send(PIECE.into()));
    }
    let trio = trio_with(
        ticket,
        move |_| Script::events(steps.clone()),
        |options| {
            options.timeouts.request = Duration::from_millis(400);
            options.timeouts.stream_idle = Duration::from_millis(300);
        },
    )
    .await;
    let ticking = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        loop {
            ticks.tick().await;
            tick.notify_one();
        }
    });
    let event = last_event(&trio.proxy.complete(streamed()).await);
    ticking.abort();
    let message = event["message"].as_str().unwrap();
    assert!(
        message.contains("no end of the stream within 0."),
        "{message}"
    );
}

#[tokio::test]
async fn pieces_are_passed_on_while_the_stream_is_open() {
    let gate = std::sync::Arc::new(tokio::sync::Notify::new());
    let mut steps = vec![Step::Send(PIECE.into()), Step::Until(gate.clone())];
    steps.extend(events(1));
    let trio = trio(ticket, move |_| Script::events(steps.clone())).await;
    let body = streamed().to_string();
    let mut answer = send(trio.proxy.address, request("POST", "/v1/completions", body)).await;
    let first = answer
        .body_mut()
        .frame()
        .await
        .unwrap()
        .unwrap()
        .into_data()
        .unwrap();
    assert_eq!(first, PIECE);
    gate.notify_one();
    let rest = finish(answer).await;
    assert!(rest.is_complete && rest.text().ends_with("data: [DONE]\n\n"));
}

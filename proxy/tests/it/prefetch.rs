//! KV that moves while its prompt is read: the context server's announcement, and who is asked to fetch.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::client::{Whole, post, request, send};
use crate::harness::{Running, options, prompt, trio, trio_with};
use crate::mock::{Mock, Script, Seen, Step, WHOLE, ticket, written};

const LINE: &str = "{\"prompt_token_ids\":[11,12,13],\"any\":{\"thing\":1}}\n";

/// Announces its KV, waits for the test, and gives an answer with a head, in pieces that end anywhere.
fn announced(until: &Arc<Notify>, status: u16, body: &str) -> Script {
    let head = json!({"status": status, "headers": {"content-type": "application/json"}});
    let rest = format!("{head}\n{body}");
    let (line, rest) = (LINE.as_bytes(), rest.as_bytes());
    let piece = |bytes: &[u8]| Step::Send(Bytes::copy_from_slice(bytes));
    Script::Answer {
        status: 200,
        headers: vec![
            ("content-type", "application/x-ndjson".to_owned()),
            ("x-baton-kv-prefetch", "1".to_owned()),
        ],
        steps: vec![
            piece(&line[..10]),
            piece(&line[10..]),
            Step::Until(until.clone()),
            piece(&rest[..7]),
            piece(&rest[7..]),
        ],
    }
}

/// The body of a ticket for whoever asked.
fn ticket_text(seen: &Seen) -> String {
    let Script::Answer { steps, .. } = ticket(seen) else {
        panic!("a ticket is an answer");
    };
    let bytes = crate::mock::bytes_of(&steps);
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A context server that announces its KV and goes on when the test says so.
fn early(until: &Arc<Notify>) -> impl Fn(&Seen) -> Script + Send + Sync + 'static {
    let until = until.clone();
    move |seen| {
        assert_eq!(seen.headers["x-baton-kv-prefetch"], "1");
        announced(&until, 200, &ticket_text(seen))
    }
}

/// Sends a request; its answer is the task's.
fn ask(proxy: &Running) -> JoinHandle<Whole> {
    let address = proxy.address;
    let body = prompt().to_string();
    tokio::spawn(async move { post(address, "/v1/completions", body).await })
}

/// A generation server that fetches until its client goes away.
fn fetching(seen: &Seen) -> Script {
    match seen.path.as_str() {
        "/kv_prefetch" => Script::Silence,
        _ => written(seen),
    }
}

#[tokio::test]
async fn kv_moves_before_the_prompt_is_read_to_its_end() {
    let until = Arc::new(Notify::new());
    let trio = trio(early(&until), fetching).await;
    let asked = ask(&trio.proxy);
    trio.generation.wait_arrived(1).await;
    let fetch = trio.generation.seen().remove(0);
    assert_eq!(fetch.path, "/kv_prefetch");
    assert_eq!(fetch.body, LINE.trim_end());
    assert!(!fetch.headers.contains_key("x-baton-kv-prefetch"));
    until.notify_one();
    let answer = asked.await.unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.text(), WHOLE);
    let seen = trio.generation.seen();
    assert_eq!(seen[1].path, "/v1/completions");
    assert_eq!(seen[1].json()["prompt"], json!([11, 12, 13]));
    assert_eq!(seen[1].params()["ctx_request_id"], 41);
    // What was not taken over is given up with the request.
    trio.generation.wait_abandoned(1).await;
    let count = trio.proxy.metric("baton_kv_prefetches_total").await;
    assert!((count - 1.0).abs() < 0.1);
}

#[tokio::test]
async fn who_fetches_gets_the_request() {
    let until = Arc::new(Notify::new());
    let context = Mock::start(early(&until)).await;
    let generation = [Mock::start(fetching).await, Mock::start(fetching).await];
    let addresses = generation.each_ref().map(|mock| mock.address);
    let proxy = Running::ready(options(&[context.address], &addresses)).await;
    for turn in 0..4 {
        let asked = ask(&proxy);
        generation[turn % 2].wait_arrived(turn / 2 * 2 + 1).await;
        until.notify_one();
        assert_eq!(asked.await.unwrap().status, 200);
    }
    for mock in &generation {
        let seen = mock.seen();
        let paths: Vec<_> = seen.iter().map(|seen| seen.path.as_str()).collect();
        assert_eq!(paths, ["/kv_prefetch", "/v1/completions"].repeat(2));
    }
}

#[tokio::test]
async fn a_failure_after_the_announcement_has_its_own_status() {
    let until = Arc::new(Notify::new());
    let failing = {
        let until = until.clone();
        move |_: &Seen| announced(&until, 400, r#"{"error":{"message":"too long"}}"#)
    };
    let trio = trio(failing, fetching).await;
    let asked = ask(&trio.proxy);
    trio.generation.wait_arrived(1).await;
    until.notify_one();
    let answer = asked.await.unwrap();
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains("too long"), "{}", answer.text());
    trio.generation.wait_abandoned(1).await;
    assert_eq!(trio.context.seen().len(), 1);
}

#[tokio::test]
async fn an_answer_that_is_complete_needs_no_generation_server() {
    let until = Arc::new(Notify::new());
    let complete = {
        let until = until.clone();
        move |seen: &Seen| {
            let mut answer: Value = serde_json::from_str(&ticket_text(seen)).unwrap();
            answer["choices"][0]["finish_reason"] = json!("stop");
            announced(&until, 200, &answer.to_string())
        }
    };
    let trio = trio(complete, fetching).await;
    let asked = ask(&trio.proxy);
    trio.generation.wait_arrived(1).await;
    until.notify_one();
    let answer = asked.await.unwrap();
    assert_eq!(answer.json()["choices"][0]["text"], " a");
    trio.generation.wait_abandoned(1).await;
    let seen = trio.generation.seen();
    assert!(seen.iter().all(|seen| seen.path == "/kv_prefetch"));
}

#[tokio::test]
async fn who_leaves_meanwhile_ends_both() {
    let until = Arc::new(Notify::new());
    let trio = trio(early(&until), fetching).await;
    let body = prompt().to_string();
    let asked = tokio::spawn({
        let address = trio.proxy.address;
        async move { drop(send(address, request("POST", "/v1/completions", body)).await) }
    });
    trio.generation.wait_arrived(1).await;
    asked.abort();
    trio.context.wait_abandoned(1).await;
    trio.generation.wait_abandoned(1).await;
}

#[tokio::test]
async fn a_generation_server_that_knows_nothing_of_it_is_asked_later() {
    let until = Arc::new(Notify::new());
    let trio = trio(early(&until), |seen| match seen.path.as_str() {
        "/kv_prefetch" => Script::text(404, "text/plain", "there is nothing here"),
        _ => written(seen),
    })
    .await;
    let asked = ask(&trio.proxy);
    trio.generation.wait_arrived(1).await;
    until.notify_one();
    let answer = asked.await.unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.text(), WHOLE);
    assert_eq!(trio.generation.seen().len(), 2);
}

#[tokio::test]
async fn a_context_server_lost_after_its_announcement_is_replaced() {
    let cut = Mock::start(|_| Script::Answer {
        status: 200,
        headers: vec![("x-baton-kv-prefetch", "1".to_owned())],
        steps: vec![Step::Send(Bytes::from_static(LINE.as_bytes())), Step::Cut],
    })
    .await;
    let good = Mock::start(ticket).await;
    let generation = Mock::start(fetching).await;
    let options = options(&[cut.address, good.address], &[generation.address]);
    let proxy = Running::ready(options).await;
    for _ in 0..2 {
        assert_eq!(proxy.complete(prompt()).await.status, 200);
    }
    assert!(!cut.seen().is_empty());
    assert_eq!(good.seen().len(), 2);
}

#[tokio::test]
async fn it_can_be_left_out() {
    let trio = trio_with(
        |seen| {
            assert!(!seen.headers.contains_key("x-baton-kv-prefetch"));
            ticket(seen)
        },
        written,
        |options| options.environment.no_kv_prefetch = true,
    )
    .await;
    assert_eq!(trio.proxy.complete(prompt()).await.status, 200);
}

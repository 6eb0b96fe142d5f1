//! Failures before anything was relayed: tried again elsewhere, or told with the right name and status.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use baton_proxy::{Environment, ProxyOptions};
use serde_json::json;

use crate::client::Whole;
use crate::harness::{Running, options, prompt, streamed, trio_with};
use crate::mock::{Mock, Script, Seen, Step, WHOLE, bytes_of, events, ticket, written};

fn busy(_: &Seen) -> Script {
    Script::json(503, &json!({"object": "error", "message": "batch is full"}))
        .with_header("retry-after", "7")
}

fn broken(_: &Seen) -> Script {
    Script::json(500, &json!({"object": "error", "message": "cuda is gone"}))
}

/// A health check an hour: what a request finds out is all that is known.
fn rarely_checked(options: &mut ProxyOptions) {
    options.timeouts.health_interval = Duration::from_secs(3600);
}

async fn proxy(
    context: &[&Mock],
    generation: &[&Mock],
    adjust: impl FnOnce(&mut ProxyOptions),
) -> Running {
    let addresses = |mocks: &[&Mock]| mocks.iter().map(|mock| mock.address).collect::<Vec<_>>();
    let mut options = options(&addresses(context), &addresses(generation));
    adjust(&mut options);
    Running::ready(options).await
}

#[tokio::test]
async fn context_failure_is_tried_on_another_server_under_a_new_id() {
    for failure in [busy, broken, |_: &Seen| Script::Drop] {
        let bad = Mock::start(failure).await;
        let good = Mock::start(ticket).await;
        let generation = Mock::start(written).await;
        let proxy = proxy(&[&bad, &good], &[&generation], |_| ()).await;
        let answer = proxy.complete(prompt()).await;
        assert_eq!(
            (answer.status.as_u16(), answer.text().as_str()),
            (200, WHOLE)
        );
        let (first, second) = (bad.seen(), good.seen());
        assert_eq!((first.len(), second.len()), (1, 1));
        let id = |seen: &Seen| seen.params()["disagg_request_id"].as_u64().unwrap();
        assert_ne!(id(&first[0]), id(&second[0]));
        assert_eq!(id(&generation.seen()[0]), id(&second[0]));
        assert!((proxy.metric("ctx_retry_requests_total").await - 1.0).abs() < 0.1);
    }
}

#[tokio::test]
async fn generation_failure_repeats_the_context_phase() {
    let context = Mock::start(ticket).await;
    let bad = Mock::start(busy).await;
    let good = Mock::start(written).await;
    let proxy = proxy(&[&context], &[&bad, &good], |_| ()).await;
    let answer = proxy.complete(streamed()).await;
    assert_eq!(answer.body, bytes_of(&events(3)));
    let ids: Vec<_> = context
        .seen()
        .iter()
        .map(|seen| seen.params()["disagg_request_id"].clone())
        .collect();
    assert_eq!(ids.len(), 2);
    assert_eq!(bad.seen()[0].params()["disagg_request_id"], ids[0]);
    assert_eq!(good.seen()[0].params()["disagg_request_id"], ids[1]);
    assert_ne!(ids[0], ids[1]);
}

#[tokio::test]
async fn ticket_that_no_server_touched_is_used_again() {
    let context = Mock::start(ticket).await;
    let dead = Mock::start(written).await;
    let good = Mock::start(written).await;
    let proxy = proxy(&[&context], &[&dead, &good], rarely_checked).await;
    dead.kill().await;
    assert_eq!(proxy.complete(prompt()).await.text(), WHOLE);
    assert_eq!(context.seen().len(), 1);
    // What the request found out, the next one need not.
    assert_eq!(proxy.complete(prompt()).await.text(), WHOLE);
    assert!((proxy.metric("gen_error_requests_total").await - 1.0).abs() < 0.1);
}

#[tokio::test]
async fn stream_that_breaks_before_its_first_piece_is_tried_elsewhere() {
    for steps in [vec![Step::Cut], vec![]] {
        let context = Mock::start(ticket).await;
        let bad = Mock::start(move |_| Script::events(steps.clone())).await;
        let good = Mock::start(written).await;
        let proxy = proxy(&[&context], &[&bad, &good], |_| ()).await;
        let answer = proxy.complete(streamed()).await;
        assert!(answer.is_complete);
        assert_eq!(answer.body, bytes_of(&events(3)));
        assert_eq!(context.seen().len(), 2);
    }
}

#[tokio::test]
async fn never_the_same_server_and_never_more_than_allowed() {
    let contexts = [
        Mock::start(broken).await,
        Mock::start(broken).await,
        Mock::start(broken).await,
    ];
    let generation = Mock::start(written).await;
    let all: Vec<&Mock> = contexts.iter().collect();
    for (max_retries, expected) in [(0, 1), (1, 2), (2, 3), (9, 3)] {
        let proxy = proxy(&all, &[&generation], |options| {
            options.config.max_retries = max_retries
        })
        .await;
        let before: Vec<usize> = contexts.iter().map(|mock| mock.seen().len()).collect();
        let answer = proxy.complete(prompt()).await;
        assert_eq!(answer.status, 500);
        let attempts: Vec<usize> = contexts
            .iter()
            .zip(&before)
            .map(|(mock, before)| mock.seen().len() - before)
            .collect();
        assert_eq!(
            attempts.iter().sum::<usize>(),
            expected,
            "{max_retries} retries"
        );
        assert!(attempts.iter().all(|count| *count <= 1), "{attempts:?}");
    }
    assert!(generation.seen().is_empty());
}

#[tokio::test]
async fn environment_can_forbid_retries() {
    let bad = Mock::start(busy).await;
    let good = Mock::start(ticket).await;
    let generation = Mock::start(written).await;
    let proxy = proxy(&[&bad, &good], &[&generation], |options| {
        let forbidden = |name: &str| (name == "TRTLLM_DISAGG_NO_RETRY").then(|| "1".to_owned());
        options.environment = Environment::from_lookup(forbidden).unwrap();
    })
    .await;
    let answer = proxy.complete(prompt()).await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.header("retry-after"), "7");
    assert!(good.seen().is_empty());
}

/// Answers of one context and one generation server with these behaviours.
async fn answer_of(
    context: impl Fn(&Seen) -> Script + Send + Sync + 'static,
    generation: impl Fn(&Seen) -> Script + Send + Sync + 'static,
) -> (Whole, String, String) {
    let trio = trio_with(context, generation, |options| {
        options.timeouts.request = Duration::from_millis(300);
        options.timeouts.server_start = Duration::from_secs(20);
    })
    .await;
    let context = format!("context server {}", trio.context.address);
    let generation = format!("generation server {}", trio.generation.address);
    (trio.proxy.complete(streamed()).await, context, generation)
}

#[tokio::test]
async fn error_names_the_worker_and_keeps_its_status() {
    let (answer, context, _) = answer_of(broken, written).await;
    assert_eq!(answer.status, 500);
    assert_eq!(
        answer.message(),
        format!("{context}: answered 500: cuda is gone")
    );
    let (answer, _, generation) = answer_of(ticket, busy).await;
    assert_eq!(
        (answer.status.as_u16(), answer.header("retry-after")),
        (503, "7")
    );
    assert_eq!(
        answer.message(),
        format!("{generation}: answered 503: batch is full")
    );
    assert_eq!(
        answer.header("x-baton-failed-worker"),
        generation.replace(" server", "")
    );
    let (answer, context, _) = answer_of(|_| Script::Drop, written).await;
    assert_eq!(answer.status, 502);
    assert!(
        answer
            .message()
            .starts_with(&format!("{context}: connection lost"))
    );
}

#[tokio::test]
async fn silence_ends_in_504_that_names_what_was_waited_for() {
    let (answer, context, _) = answer_of(|_| Script::Silence, written).await;
    assert_eq!(answer.status, 504);
    assert!(
        answer
            .message()
            .starts_with(&format!("{context}: no answer within 0.")),
        "{}",
        answer.message()
    );
    let (answer, _, generation) = answer_of(ticket, |_| Script::events(vec![Step::Hang])).await;
    assert_eq!(answer.status, 504);
    let expected = format!("{generation}: no first piece of the stream within 0.");
    assert!(
        answer.message().starts_with(&expected),
        "{}",
        answer.message()
    );
}

#[tokio::test]
async fn wrong_answers_are_502() {
    let of = |from: &'static str, to: &'static str| {
        move |seen: &Seen| match ticket(seen) {
            Script::Answer { steps, .. } => {
                let text = String::from_utf8(bytes_of(&steps)).unwrap();
                assert!(text.contains(from), "{text}");
                Script::text(200, "application/json", &text.replacen(from, to, 1))
            }
            other => other,
        }
    };
    for (from, to, expected) in [
        (
            "\"ctx_request_id\":41",
            "\"ctx_request_id\":null",
            "ctx_request_id is missing",
        ),
        (
            "\"disagg_request_id\"",
            "\"x\"",
            "disagg_request_id is missing",
        ),
        ("\"choices\":[", "\"choices\":[{},", "2 choices, expected 1"),
        ("{", "<", "not a completion"),
    ] {
        let (answer, context, _) = answer_of(of(from, to), written).await;
        assert_eq!(answer.status, 502);
        let message = answer.message();
        assert!(
            message.contains(expected) && message.starts_with(&context),
            "{message}"
        );
    }
    let (answer, context, _) = answer_of(|_| Script::text(302, "text/html", ""), written).await;
    assert_eq!(answer.status, 502);
    assert!(answer.message().starts_with(&context));
}

#[tokio::test]
async fn failed_handoff_is_blamed_on_the_context_server() {
    let contexts = [Mock::start(ticket).await, Mock::start(ticket).await];
    let calls = AtomicUsize::new(0);
    let generation = Mock::start(move |seen| match calls.fetch_add(1, Ordering::SeqCst) {
        0 => Script::json(
            502,
            &json!({"object": "error", "message": "context server went away"}),
        ),
        _ => written(seen),
    })
    .await;
    let proxy = proxy(&[&contexts[0], &contexts[1]], &[&generation], |_| ()).await;
    let answer = proxy.complete(prompt()).await;
    assert_eq!(answer.text(), WHOLE);
    assert_eq!(contexts.each_ref().map(|mock| mock.seen().len()), [1, 1]);
    assert_eq!(generation.seen().len(), 2);
}

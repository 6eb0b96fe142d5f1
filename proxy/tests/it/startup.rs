//! The wait for workers, what it says, and health afterwards.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_proxy::{ProxyError, run};
use serde_json::json;

use crate::client::{eventually, get};
use crate::harness::{Running, options, prompt, trio};
use crate::mock::{Mock, Script, Step, ticket, written};

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn until_every_worker_is_up_the_proxy_says_who_is_missing() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    // While just one subscriber lives, a line first reached by another test's thread is switched off for every thread.
    let sink = tracing_subscriber::fmt()
        .with_writer(std::io::sink)
        .finish();
    let _second = tracing::Dispatch::new(sink);
    let _guard = tracing::subscriber::set_default(subscriber);
    let context = Mock::start(ticket).await;
    context.set_health(Script::text(503, "text/plain", "loading 43 %"));
    let generation = Mock::start(written).await;
    let absent = Mock::start(written).await.kill().await;
    let options = options(&[context.address], &[generation.address, absent]);
    let proxy = Running::listening(options).await;
    let waiting = format!("context server {}: loading 43 %", context.address);
    let refused = format!("generation server {absent}: connection refused");
    eventually("both missing workers are named", async || {
        let health = get(proxy.address, "/health").await;
        health.status == 503 && health.text().contains(&waiting) && health.text().contains(&refused)
    })
    .await;
    let answer = proxy.complete(prompt()).await;
    assert_eq!(
        (answer.status.as_u16(), answer.header("retry-after")),
        (503, "1")
    );
    assert!(answer.message().contains(&waiting), "{}", answer.message());
    assert_eq!(
        get(proxy.address, "/cluster_info").await.json()["is_ready"],
        false
    );
    assert_eq!(get(proxy.address, "/version").await.status, 200);

    context.set_health(Script::text(503, "text/plain", "loading 90 %"));
    eventually("progress is followed", async || {
        get(proxy.address, "/health")
            .await
            .text()
            .contains("loading 90 %")
    })
    .await;
    context.set_health(Script::text(200, "text/plain", ""));
    let _late = Mock::start_at(absent, written).await;
    proxy.wait_health(200).await;
    assert_eq!(proxy.complete(prompt()).await.status, 200);

    let text = log.text();
    let count = |line: &str| text.matches(line).count();
    assert_eq!(count(&waiting), 1, "{text}");
    assert_eq!(count(&refused), 1, "{text}");
    for address in [context.address, generation.address, absent] {
        assert_eq!(count(&format!("server {address} is up")), 1, "{text}");
    }
    assert_eq!(
        count("ready: every context and generation server is up"),
        1,
        "{text}"
    );
}

#[tokio::test]
async fn missing_workers_end_the_start_with_their_names() {
    let generation = Mock::start(written).await;
    let silent = Mock::start(ticket).await;
    silent.set_health(Script::Silence);
    let absent = Mock::start(ticket).await.kill().await;
    let mut options = options(&[absent, silent.address], &[generation.address]);
    options.timeouts.server_start = Duration::from_millis(600);
    options.timeouts.probe = Duration::from_millis(100);
    let error = run(options, std::future::pending()).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, ProxyError::StartTimeout { .. }));
    assert!(
        text.contains(&format!("context server {absent}: connection refused")),
        "{text}"
    );
    let stuck = format!("context server {}: no answer within 0.1 s", silent.address);
    assert!(text.contains(&stuck), "{text}");
    assert!(!text.contains("generation server"), "{text}");
    assert!(text.contains("\nhint: "), "{text}");
}

#[tokio::test]
async fn port_in_use_is_one_line_and_a_hint() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port();
    let address = taken.local_addr().unwrap();
    let mut options = options(&[address], &[address]);
    options.config.port = port;
    let error = run(options, std::future::pending())
        .await
        .unwrap_err()
        .to_string();
    let (line, hint) = error.split_once('\n').unwrap();
    assert_eq!(
        line,
        format!("cannot listen on 127.0.0.1:{port}: the port is in use")
    );
    assert!(hint.starts_with("hint: "), "{hint}");
}

#[tokio::test]
async fn config_without_servers_is_refused() {
    let options = options(&[], &[]);
    let error = run(options, std::future::pending()).await.unwrap_err();
    assert!(
        error.to_string().starts_with("context_servers has no urls"),
        "{error}"
    );
}

#[tokio::test]
async fn health_follows_the_workers() {
    let mut trio = trio(ticket, written).await;
    trio.generation
        .set_health(Script::text(503, "text/plain", "engine stopped"));
    trio.proxy.wait_health(503).await;
    let text = get(trio.proxy.address, "/health").await.text();
    let expected = format!(
        "no generation server is up: {} (engine stopped)\n",
        trio.generation.address
    );
    assert_eq!(text, expected);
    let answer = trio.proxy.complete(prompt()).await;
    assert_eq!(answer.status, 503);
    assert!(answer.message().contains("no generation server is up"));
    assert!(trio.context.seen().is_empty());
    trio.generation
        .set_health(Script::text(200, "text/plain", ""));
    trio.proxy.wait_health(200).await;

    let address = trio.context.kill().await;
    trio.proxy.wait_health(503).await;
    trio.context = Mock::start_at(address, ticket).await;
    trio.proxy.wait_health(200).await;
    assert_eq!(trio.proxy.complete(prompt()).await.status, 200);
}

#[tokio::test]
async fn worker_that_stops_answering_is_down_after_silence_repeats() {
    let context = Mock::start(ticket).await;
    let generation = Mock::start(written).await;
    let mut options = options(&[context.address], &[generation.address]);
    options.timeouts.probe = Duration::from_millis(100);
    let proxy = Running::ready(options).await;
    generation.set_health(Script::Silence);
    proxy.wait_health(503).await;
    let info = get(proxy.address, "/cluster_info").await.json();
    let missing = &info["missing_workers"]["generation_servers"][0];
    assert_eq!(missing["reason"], "no answer within 0.1 s", "{info}");
    assert_eq!(missing["port"], json!(generation.address.port()));
}

#[tokio::test]
async fn stopping_lets_streams_end_and_refuses_new_work() {
    let gate = Arc::new(tokio::sync::Notify::new());
    let steps = vec![
        Step::Send("data: 1\n\n".into()),
        Step::Until(gate.clone()),
        Step::Send("data: [DONE]\n\n".into()),
    ];
    let mut trio = trio(ticket, move |_| Script::events(steps.clone())).await;
    let body = crate::harness::streamed().to_string();
    let open = crate::client::send(
        trio.proxy.address,
        crate::client::request("POST", "/v1/completions", body),
    )
    .await;
    trio.proxy.ask_to_stop();
    let address = trio.proxy.address;
    eventually("the port refuses", async || {
        tokio::net::TcpStream::connect(address).await.is_err()
    })
    .await;
    gate.notify_one();
    let answer = crate::client::finish(open).await;
    assert!(answer.is_complete);
    assert_eq!(answer.text(), "data: 1\n\ndata: [DONE]\n\n");
    trio.proxy.ended().await.unwrap();
}

#[tokio::test]
async fn stopping_does_not_wait_for_ever() {
    let steps = vec![Step::Send("data: 1\n\n".into()), Step::Hang];
    let mut trio = crate::harness::trio_with(
        ticket,
        move |_| Script::events(steps.clone()),
        |options| {
            options.timeouts.drain = Duration::from_millis(100);
        },
    )
    .await;
    let body = crate::harness::streamed().to_string();
    let _open = crate::client::send(
        trio.proxy.address,
        crate::client::request("POST", "/v1/completions", body),
    )
    .await;
    trio.proxy.ask_to_stop();
    trio.proxy.ended().await.unwrap();
    trio.generation.wait_abandoned(1).await;
}

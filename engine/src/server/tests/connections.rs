//! Clients that go away, are slow, or stay while the server ends.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::harness::{Reply, Scripted, ScriptedEngine, TestServer, finished, ids, token, within};
use crate::request::{Event, FinishReason};
use crate::server::listener::{ListenError, Listener, reachable, report_address};

/// An engine whose requests wait for the test; the events' senders come out of the receiver.
fn live() -> (
    std::sync::Arc<ScriptedEngine>,
    mpsc::UnboundedReceiver<mpsc::UnboundedSender<Event>>,
) {
    let (senders, receiver) = mpsc::unbounded_channel();
    let engine = ScriptedEngine::new(move |_| {
        let (sender, events) = mpsc::unbounded_channel();
        senders.send(sender).unwrap();
        Ok(Scripted::Live(events))
    });
    (engine, receiver)
}

#[tokio::test]
async fn a_client_that_goes_away_cancels() {
    for stream in [true, false] {
        for after_first in [true, false] {
            let (engine, mut senders) = live();
            let server = TestServer::start(engine).await;
            let body = json!({"model": "m", "prompt": "a", "n": 2, "stream": stream}).to_string();
            let mut client = server
                .open("POST", "/v1/completions", "", body.as_bytes())
                .await;
            let first = within("a submission", senders.recv()).await.unwrap();
            let second = within("a submission", senders.recv()).await.unwrap();
            if after_first {
                first.send(token(ids("a")[0])).unwrap();
            }
            if after_first && stream {
                let mut head = [0; 12];
                within("the head", client.read_exact(&mut head))
                    .await
                    .unwrap();
                assert_eq!(&head, b"HTTP/1.1 200");
            }
            drop(client);
            server.engine.wait_cancelled(2).await;
            drop((first, second));
        }
    }
}

#[tokio::test]
async fn a_slow_reader_gets_everything() {
    let text = "0123456789".repeat(400);
    let server = TestServer::start(ScriptedEngine::saying(&text)).await;
    let body = json!({"model": "m", "prompt": "a", "stream": true}).to_string();
    let mut client = server
        .open("POST", "/v1/completions", "", body.as_bytes())
        .await;
    let mut raw = Vec::new();
    let mut piece = [0; 509];
    loop {
        let read = within("bytes", client.read(&mut piece)).await.unwrap();
        if read == 0 {
            break;
        }
        raw.extend_from_slice(&piece[..read]);
        tokio::task::yield_now().await;
    }
    let events = Reply::parse(&raw).events();
    let got: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(got, text);
}

#[tokio::test]
async fn a_connection_serves_one_request_after_another() {
    let server = TestServer::start(ScriptedEngine::saying("x")).await;
    let mut client = TcpStream::connect(server.address).await.unwrap();
    for round in 0..3 {
        let end = if round == 2 {
            "connection: close\r\n"
        } else {
            ""
        };
        let request = format!("GET /version HTTP/1.1\r\nhost: t\r\n{end}\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        if round < 2 {
            let mut raw = Vec::new();
            while !raw.ends_with(b"}") {
                within("an answer", client.read_buf(&mut raw))
                    .await
                    .unwrap();
            }
            assert_eq!(Reply::parse(&raw).status, 200);
        }
    }
    let mut rest = Vec::new();
    within("the end", client.read_to_end(&mut rest))
        .await
        .unwrap();
    assert_eq!(Reply::parse(&rest).status, 200);
}

#[tokio::test]
async fn the_end_waits_for_running_answers() {
    let (engine, mut senders) = live();
    let server = TestServer::start(engine).await;
    let body = json!({"model": "m", "prompt": "a"}).to_string();
    let mut client = server
        .open("POST", "/v1/completions", "", body.as_bytes())
        .await;
    let events = within("a submission", senders.recv()).await.unwrap();
    let address = server.address;
    let ended = tokio::spawn(server.shut_down());
    // New connections are refused as soon as the socket is closed.
    within("the socket to close", async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    events.send(token(ids("z")[0])).unwrap();
    events.send(finished(FinishReason::Length)).unwrap();
    let mut raw = Vec::new();
    within("the answer", client.read_to_end(&mut raw))
        .await
        .unwrap();
    assert_eq!(Reply::parse(&raw).ok()["choices"][0]["text"], "z");
    assert_eq!(within("the end", ended).await.unwrap(), 0);
}

#[tokio::test]
async fn a_port_in_use_is_named_with_a_remedy() {
    let first = Listener::bind("127.0.0.1", 0).await.unwrap();
    let port = first.address().port();
    let error = Listener::bind("127.0.0.1", port).await.unwrap_err();
    assert!(matches!(error, ListenError::InUse { .. }));
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("cannot listen on 127.0.0.1:{port}: ")),
        "{text}"
    );
    assert!(text.contains("\nhint: "));
    let error = Listener::bind("no.such.host.invalid", 0).await.unwrap_err();
    assert!(error.to_string().contains("no.such.host.invalid"));
}

#[tokio::test]
async fn the_address_is_reported_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("address");
    report_address(&path, "127.0.0.1:81".parse().unwrap()).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "127.0.0.1:81");
    report_address(&path, "[::1]:82".parse().unwrap()).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "[::1]:82");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    let missing = folder.path().join("no/such/folder");
    assert!(report_address(&missing, "127.0.0.1:83".parse().unwrap()).is_err());
    assert!(!reachable("0.0.0.0:84".parse().unwrap()).starts_with("0.0.0.0"));
}

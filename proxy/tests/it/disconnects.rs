//! A client that leaves takes its request with it, at whichever side it is.

use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};

use crate::client::{eventually, request, send};
use crate::harness::{prompt, streamed, trio, trio_with};
use crate::mock::{Script, Step, ticket, written};

/// Sends a request and returns the connection, whose answer nobody reads.
async fn ask(address: std::net::SocketAddr, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nhost: p\r\ncontent-length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn leaving_during_the_context_phase_closes_that_connection() {
    let trio = trio(|_| Script::Silence, written).await;
    let client = ask(trio.proxy.address, &prompt().to_string()).await;
    trio.context.wait_arrived(1).await;
    drop(client);
    trio.context.wait_abandoned(1).await;
    eventually("the disconnect is counted", async || {
        trio.proxy.metric("baton_client_disconnects_total").await > 0.5
    })
    .await;
    assert!(trio.proxy.metric("baton_active_requests").await < 0.5);
}

#[tokio::test]
async fn leaving_before_the_generation_server_answers_closes_that_connection() {
    let trio = trio(ticket, |_| Script::Silence).await;
    let client = ask(trio.proxy.address, &streamed().to_string()).await;
    trio.generation.wait_arrived(1).await;
    drop(client);
    trio.generation.wait_abandoned(1).await;
}

#[tokio::test]
async fn leaving_in_the_middle_of_a_stream_closes_that_connection() {
    let steps = vec![Step::Send(Bytes::from_static(b"data: {}\n\n")), Step::Hang];
    let trio = trio(ticket, move |_| Script::events(steps.clone())).await;
    let body = streamed().to_string();
    let answer = send(trio.proxy.address, request("POST", "/v1/completions", body)).await;
    assert_eq!(answer.status(), 200);
    drop(answer);
    trio.generation.wait_abandoned(1).await;
    eventually("the place is free again", async || {
        trio.proxy.metric("baton_active_requests").await < 0.5
    })
    .await;
}

#[tokio::test]
async fn client_that_takes_nothing_is_given_up() {
    let steps = vec![Step::Send(Bytes::from(vec![b'x'; 1 << 16])); 2_000];
    let trio = trio_with(
        ticket,
        move |_| Script::events(steps.clone()),
        |options| {
            options.timeouts.client_write = Duration::from_millis(200);
        },
    )
    .await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut client = socket.connect(trio.proxy.address).await.unwrap();
    let body = streamed().to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: p\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    client.write_all(head.as_bytes()).await.unwrap();
    client.write_all(body.as_bytes()).await.unwrap();
    trio.generation.wait_abandoned(1).await;
}

#[tokio::test]
async fn two_hundred_clients_that_leave_at_any_moment_leave_nothing_behind() {
    let steps: Vec<Step> = (0..50)
        .map(|_| Step::Send(Bytes::from_static(b"data: {}\n\n")))
        .chain([Step::Hang])
        .collect();
    let trio = trio(ticket, move |seen| match seen.json()["stay"] == true {
        true => written(seen),
        false => Script::events(steps.clone()),
    })
    .await;
    let mut clients = tokio::task::JoinSet::new();
    for index in 0..200_u64 {
        let address = trio.proxy.address;
        clients.spawn(async move {
            let client = ask(address, &streamed().to_string()).await;
            // Anywhere between the first byte out and the middle of the stream.
            tokio::time::sleep(Duration::from_micros(index * 97 % 20_000)).await;
            drop(client);
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }
    eventually("no request is active", async || {
        trio.proxy.metric("baton_active_requests").await < 0.5
    })
    .await;
    let seen = trio.generation.seen().len();
    trio.generation.wait_abandoned(seen).await;
    let mut body = prompt();
    body["stay"] = json!(true);
    assert_eq!(trio.proxy.complete(body).await.status, 200);
}

//! An HTTP client that shows what came, bytes and all.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::HeaderMap;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longest wait for anything in these tests.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// An answer that came to its end.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// Whether the body ended as HTTP says it must.
    pub(crate) is_complete: bool,
}

impl Whole {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    /// The message of the error object.
    pub(crate) fn message(&self) -> String {
        let value = self.json();
        assert_eq!(value["code"], self.status.as_u16(), "{value}");
        assert_eq!(value["message"], value["error"]["message"]);
        value["message"].as_str().unwrap().to_owned()
    }
}

/// Sends a request on a connection of its own and waits for the head of the answer. Dropping what is returned closes
/// the connection.
pub(crate) async fn send(address: SocketAddr, request: Request<Full<Bytes>>) -> Response<Incoming> {
    timeout(DEADLINE, async {
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender.send_request(request).await.unwrap()
    })
    .await
    .unwrap()
}

pub(crate) fn request(method: &str, path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "proxy")
        .header("content-type", "application/json")
        .body(Full::new(body.into()))
        .unwrap()
}

/// Reads an answer to its end, however it ends.
pub(crate) async fn finish(response: Response<Incoming>) -> Whole {
    let (head, mut incoming) = response.into_parts();
    let mut body = Vec::new();
    let mut is_complete = true;
    let read = async {
        while let Some(frame) = incoming.frame().await {
            match frame {
                Ok(frame) => body.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Err(_) => {
                    is_complete = false;
                    break;
                }
            }
        }
    };
    timeout(DEADLINE, read).await.unwrap();
    Whole {
        status: head.status,
        headers: head.headers,
        body: body.into(),
        is_complete,
    }
}

pub(crate) async fn exchange(address: SocketAddr, request: Request<Full<Bytes>>) -> Whole {
    finish(send(address, request).await).await
}

pub(crate) async fn post(address: SocketAddr, path: &str, body: impl Into<Bytes>) -> Whole {
    exchange(address, request("POST", path, body)).await
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> Whole {
    exchange(address, request("GET", path, Bytes::new())).await
}

/// Waits until `holds` is true; the proxy's own background work has no event to wait for.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(DEADLINE, wait)
        .await
        .unwrap_or_else(|_| panic!("never happened: {what}"));
}

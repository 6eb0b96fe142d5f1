//! Tests of registering, against a store that a test scripts.

use std::sync::{Arc, Mutex};

use baton_configs::disagg::Endpoint;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;

const SOON: Duration = Duration::from_secs(20);

/// A store that tells what it is asked, and answers as it is told.
struct FakeStore {
    address: SocketAddr,
    calls: mpsc::Receiver<(String, String)>,
    answer: Arc<Mutex<(u16, Value)>>,
    task: JoinHandle<()>,
}

impl Drop for FakeStore {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeStore {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (tell, calls) = mpsc::channel(64);
        let answer = Arc::new(Mutex::new((200, json!({"result": true}))));
        let task = tokio::spawn(accept(listener, tell, Arc::clone(&answer)));
        Self {
            address,
            calls,
            answer,
            task,
        }
    }

    fn answers(&self, status: u16, body: Value) {
        *self.answer.lock().expect("not poisoned") = (status, body);
    }

    /// The next call: method and path, and body.
    async fn asked(&mut self) -> (String, String) {
        timeout(SOON, self.calls.recv())
            .await
            .expect("a call within 20 s")
            .expect("the store runs")
    }

    /// The next call that begins so, after any others.
    async fn asked_for(&mut self, start: &str) -> (String, String) {
        loop {
            let call = self.asked().await;
            if call.0.starts_with(start) {
                return call;
            }
        }
    }
}

async fn accept(
    listener: TcpListener,
    tell: mpsc::Sender<(String, String)>,
    answer: Arc<Mutex<(u16, Value)>>,
) {
    while let Ok((stream, _)) = listener.accept().await {
        let (tell, answer) = (tell.clone(), Arc::clone(&answer));
        let service = service_fn(move |request: Request<Incoming>| {
            let (tell, answer) = (tell.clone(), Arc::clone(&answer));
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await?.to_bytes();
                let text = String::from_utf8_lossy(&body).into_owned();
                let asked = format!("{} {}", head.method, head.uri);
                tell.send((asked, text)).await.ok();
                let (status, body) = answer.lock().expect("not poisoned").clone();
                let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
                *response.status_mut() = status.try_into().expect("a status");
                Ok::<_, hyper::Error>(response)
            }
        });
        // A connection without a request is how the way to the store is found; its end is no news.
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

fn plan(store: SocketAddr, own: &str) -> RegistrationPlan {
    let cluster = ClusterConfig {
        store: Endpoint {
            host: store.ip().to_string(),
            port: store.port(),
        },
        name: "c d".to_owned(),
        context_servers_min: 1,
        generation_servers_min: 1,
        heartbeat_interval: Duration::from_millis(50),
        inactive_timeout: Duration::from_secs(3),
    };
    let own = own.parse().expect("an address");
    RegistrationPlan::new(Some(&cluster), Some(WorkerRole::Generation), own)
        .expect("a role")
        .expect("a cluster")
}

#[tokio::test]
async fn a_server_registers_beats_comes_back_and_takes_its_name_out() {
    let mut store = FakeStore::start().await;
    let registration = Registration::start(Some(plan(store.address, "0.0.0.0:8001")));
    let (asked, body) = store.asked_for("POST").await;
    assert_eq!(asked, "POST /set");
    let body: Value = serde_json::from_str(&body).expect("JSON");
    let key = body["key"].as_str().expect("a key").to_owned();
    let id = key
        .strip_prefix("/trtllm-disagg/c d/workers/")
        .expect("the known prefix");
    assert!(id.starts_with("GENERATION-127.0.0.1:8001-"), "{id}");
    assert_eq!(body["ttl"], json!(3.0));
    let value: Value = serde_json::from_str(body["value"].as_str().expect("text")).expect("JSON");
    // A wildcard is no address; the one that leads to the store is.
    let expected = json!({"worker_id": id, "host": "127.0.0.1", "port": 8001, "role": 1});
    assert_eq!(value, expected);

    let beat = format!("GET /expire?key={}&ttl=3", escaped(&key));
    assert_eq!(store.asked().await.0, beat);
    assert_eq!(store.asked().await.0, beat);
    store.answers(400, json!({"result": false}));
    store.asked_for("POST /set").await;
    store.answers(200, json!({"result": true}));
    let (_, again) = store.asked_for("POST /set").await;
    assert!(again.contains(&key), "{again}");
    store.asked_for("GET /expire").await;

    registration.end().await;
    let (asked, _) = store.asked_for("DELETE").await;
    assert_eq!(asked, format!("DELETE /delete?key={}", escaped(&key)));
    assert!(
        store.calls.try_recv().is_err(),
        "nothing follows the farewell"
    );
}

#[tokio::test]
async fn a_store_that_comes_later_is_waited_for() {
    let port = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = port.local_addr().expect("an address");
    drop(port);
    let registration = Registration::start(Some(plan(address, "127.0.0.1:8001")));
    let listener = TcpListener::bind(address).await.expect("the port again");
    let (tell, mut calls) = mpsc::channel(64);
    let answer = Arc::new(Mutex::new((200, json!({"result": true}))));
    let task = tokio::spawn(accept(listener, tell, answer));
    let first = timeout(SOON, calls.recv())
        .await
        .expect("a call within 20 s");
    assert_eq!(first.expect("the store runs").0, "POST /set");
    registration.end().await;
    task.abort();
}

#[tokio::test]
async fn refusals_say_what_is_wrong() {
    let store = FakeStore::start().await;
    let endpoint = Endpoint {
        host: "127.0.0.1".to_owned(),
        port: store.address.port(),
    };
    let open = StoreClient::new(endpoint.clone(), None);
    let guarded = StoreClient::new(endpoint, Some("t0ken".to_owned()));
    assert!(!format!("{guarded:?}").contains("t0ken"));
    let ask = async |client: &StoreClient| client.call(Method::GET, "/get?key=a", None).await;
    for (status, body, client, expected) in [
        (
            403,
            json!({}),
            &open,
            "set BATON_JOB_SECRET to the same here",
        ),
        (403, json!({}), &guarded, "is not the same here as there"),
        (
            404,
            json!({"error": {}}),
            &open,
            "its config needs `disagg_cluster`",
        ),
        (
            400,
            json!({"result": false, "error": "the store is full"}),
            &open,
            "the store is full",
        ),
        (500, json!("?"), &open, "status 500 without a result"),
    ] {
        store.answers(status, body);
        let error = ask(client).await.expect_err("refused").to_string();
        assert!(error.contains(expected), "{error}");
    }
    store.answers(400, json!({"result": null}));
    assert_eq!(ask(&open).await, Ok(Value::Null));
}

#[test]
fn an_address_that_the_proxy_cannot_reach_is_never_registered() {
    let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
    let route = |local: &str, peer: &str| Route {
        local: ip(local),
        peer: ip(peer),
    };
    let (near, same, far) = (
        route("127.0.0.1", "127.0.0.1"),
        route("10.0.0.2", "10.0.0.2"),
        route("10.0.0.2", "10.0.0.1"),
    );
    for (own, route, expected) in [
        ("0.0.0.0", far, "10.0.0.2"),
        ("::", near, "127.0.0.1"),
        ("127.0.0.1", near, "127.0.0.1"),
        ("127.0.0.1", same, "127.0.0.1"),
        ("10.9.9.9", far, "10.9.9.9"),
    ] {
        assert_eq!(
            advertised(ip(own), route),
            Ok(ip(expected)),
            "{own} {route:?}"
        );
    }
    let error = advertised(ip("127.0.0.1"), far)
        .expect_err("refused")
        .to_string();
    assert!(
        error.contains("127.0.0.1 only, which the proxy at 10.0.0.1 cannot reach"),
        "{error}"
    );
}

#[test]
fn a_server_without_a_role_is_told_before_it_loads_anything() {
    let plan = plan("127.0.0.1:1".parse().expect("an address"), "127.0.0.1:2");
    let error =
        RegistrationPlan::new(Some(&plan.cluster), None, plan.address).expect_err("no role");
    let text = error.to_string();
    assert!(
        text.contains("registering at 127.0.0.1:1 needs a role\nhint: "),
        "{text}"
    );
    assert!(matches!(
        RegistrationPlan::new(None, None, plan.address),
        Ok(None)
    ));
}

#[test]
fn seconds_are_whole_where_they_are() {
    assert_eq!(ttl(Duration::from_secs(10)), "10");
    assert_eq!(ttl(Duration::from_millis(1500)), "1.5");
    assert_eq!(escaped("/a b_c"), "%2Fa%20b_c");
}

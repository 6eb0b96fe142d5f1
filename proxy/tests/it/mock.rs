//! A worker that does what a test's script says, over a real socket.

use std::future::{Future, pending};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming};
use hyper::header::HeaderMap;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::client::DEADLINE;

/// One step of an answer's body.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// Write these bytes, as a piece of their own.
    Send(Bytes),
    /// Wait for the test.
    Until(Arc<Notify>),
    /// Write nothing more and keep the connection open.
    Hang,
    /// Break the connection.
    Cut,
}

/// What a worker does with a request.
#[derive(Debug, Clone)]
pub(crate) enum Script {
    /// Answer; the body is done after the last step.
    Answer {
        status: u16,
        headers: Vec<(&'static str, String)>,
        steps: Vec<Step>,
    },
    /// Answer nothing and keep the connection open.
    Silence,
    /// Break the connection without an answer.
    Drop,
    /// Wait for the test, then go on.
    After(Arc<Notify>, Box<Self>),
}

impl Script {
    pub(crate) fn json(status: u16, value: &Value) -> Self {
        Self::text(status, "application/json", &value.to_string())
    }

    pub(crate) fn text(status: u16, content_type: &str, body: &str) -> Self {
        Self::Answer {
            status,
            headers: vec![("content-type", content_type.to_owned())],
            steps: vec![Step::Send(Bytes::copy_from_slice(body.as_bytes()))],
        }
    }

    pub(crate) fn events(steps: Vec<Step>) -> Self {
        Self::Answer {
            status: 200,
            headers: vec![(
                "content-type",
                "text/event-stream; charset=utf-8".to_owned(),
            )],
            steps,
        }
    }

    pub(crate) fn with_header(mut self, name: &'static str, value: &str) -> Self {
        if let Self::Answer { headers, .. } = &mut self {
            headers.push((name, value.to_owned()));
        }
        self
    }
}

/// A request that came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Seen {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub(crate) fn params(&self) -> Value {
        self.json()["disaggregated_params"].clone()
    }
}

type Behaviour = Arc<dyn Fn(&Seen) -> Script + Send + Sync>;

struct State {
    behaviour: Mutex<Behaviour>,
    health: Mutex<Script>,
    models: AtomicUsize,
    seen: Mutex<Vec<Seen>>,
    connections: AtomicUsize,
    /// Answers that were dropped before they were done: the proxy closed the connection.
    abandoned: watch::Sender<usize>,
    arrived: watch::Sender<usize>,
    perf: Mutex<Value>,
    /// What the proxy said is to be added to this worker's clock.
    clock_offset: Mutex<Option<f64>>,
    kv_endpoint: Mutex<Script>,
    kv_peers: Mutex<Script>,
    /// Whom this worker was told to connect to.
    peers: watch::Sender<Vec<Bytes>>,
}

/// A scripted worker.
pub(crate) struct Mock {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
    server: JoinHandle<()>,
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Mock {
    pub(crate) async fn start(behaviour: impl Fn(&Seen) -> Script + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), behaviour).await
    }

    pub(crate) async fn start_at(
        address: SocketAddr,
        behaviour: impl Fn(&Seen) -> Script + Send + Sync + 'static,
    ) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(address).unwrap();
        let listener = socket.listen(1024).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            behaviour: Mutex::new(Arc::new(behaviour)),
            health: Mutex::new(Script::text(200, "text/plain", "")),
            models: AtomicUsize::new(0),
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
            abandoned: watch::Sender::new(0),
            arrived: watch::Sender::new(0),
            perf: Mutex::new(json!([])),
            clock_offset: Mutex::default(),
            kv_endpoint: Mutex::new(Script::text(404, "text/plain", "")),
            kv_peers: Mutex::new(Script::text(404, "text/plain", "")),
            peers: watch::Sender::default(),
        });
        let server = tokio::spawn(accept(listener, state.clone()));
        Self {
            address,
            state,
            server,
        }
    }

    pub(crate) fn set_health(&self, script: Script) {
        *self.state.health.lock().unwrap() = script;
    }

    /// What it says of how its KV is reached.
    pub(crate) fn set_kv_endpoint(&self, script: Script) {
        *self.state.kv_endpoint.lock().unwrap() = script;
    }

    /// What it says when it is told of a context server.
    pub(crate) fn set_kv_peers(&self, script: Script) {
        *self.state.kv_peers.lock().unwrap() = script;
    }

    /// Waits until it was told of so many context servers; what it was told.
    pub(crate) async fn wait_peers(&self, count: usize) -> Vec<Bytes> {
        let mut told = self.state.peers.subscribe();
        let wait = told.wait_for(|told| told.len() >= count);
        timeout(DEADLINE, wait)
            .await
            .expect("in time")
            .unwrap()
            .clone()
    }

    pub(crate) fn set_perf(&self, value: Value) {
        *self.state.perf.lock().unwrap() = value;
    }

    pub(crate) fn clock_offset(&self) -> Option<f64> {
        *self.state.clock_offset.lock().unwrap()
    }

    pub(crate) fn models_count(&self) -> usize {
        self.state.models.load(Ordering::SeqCst)
    }

    /// Connections that carried a generation request.
    pub(crate) fn connection_count(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Generation requests so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }

    /// Waits until this many generation requests have come.
    pub(crate) async fn wait_arrived(&self, count: usize) {
        wait_for(&self.state.arrived, count).await;
    }

    /// Waits until this many answers were abandoned.
    pub(crate) async fn wait_abandoned(&self, count: usize) {
        wait_for(&self.state.abandoned, count).await;
    }

    /// Ends the worker as `kill -9` would: its connections break and its port refuses.
    pub(crate) async fn kill(self) -> SocketAddr {
        self.server.abort();
        let address = self.address;
        crate::client::eventually("the worker's port refuses", async || {
            tokio::net::TcpStream::connect(address).await.is_err()
        })
        .await;
        address
    }
}

async fn wait_for(sender: &watch::Sender<usize>, count: usize) {
    let mut receiver = sender.subscribe();
    let wait = receiver.wait_for(|value| *value >= count);
    timeout(DEADLINE, wait).await.expect("in time").unwrap();
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    // Aborting this task drops the set, and with it every connection.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        stream.set_nodelay(true).unwrap();
        let state = state.clone();
        let is_counted = Arc::new(AtomicUsize::new(0));
        connections.spawn(async move {
            let service =
                service_fn(move |request| answer(state.clone(), is_counted.clone(), request));
            let _ = http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

#[derive(Debug)]
struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("broken as scripted")
    }
}

impl std::error::Error for Broken {}

async fn answer(
    state: Arc<State>,
    is_counted: Arc<AtomicUsize>,
    request: Request<Incoming>,
) -> Result<Response<Steps>, Broken> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Broken)?.to_bytes();
    let script = match head.uri.path() {
        "/health" => state.health.lock().unwrap().clone(),
        "/v1/models" => {
            state.models.fetch_add(1, Ordering::SeqCst);
            Script::json(200, &json!({"object": "list", "data": [{"id": "mock"}]}))
        }
        "/steady_clock_offset" if head.method == "POST" => {
            let value: Value = serde_json::from_slice(&body).unwrap();
            *state.clock_offset.lock().unwrap() = value["offset"].as_f64();
            Script::json(200, &value)
        }
        "/steady_clock_offset" => {
            Script::json(200, &json!({"receive_ts": 5.0, "transmit_ts": 5.0}))
        }
        "/perf_metrics" => Script::json(200, &state.perf.lock().unwrap().take()),
        // Nothing of this reaches a test that did not ask for it.
        "/kv_endpoint" => state.kv_endpoint.lock().unwrap().clone(),
        "/kv_peers" => {
            state.peers.send_modify(|told| told.push(body));
            state.kv_peers.lock().unwrap().clone()
        }
        path => {
            if is_counted.fetch_add(1, Ordering::SeqCst) == 0 {
                state.connections.fetch_add(1, Ordering::SeqCst);
            }
            let seen = Seen {
                path: path.to_owned(),
                headers: head.headers,
                body,
            };
            let behaviour = state.behaviour.lock().unwrap().clone();
            let script = behaviour(&seen);
            state.seen.lock().unwrap().push(seen);
            state.arrived.send_modify(|count| *count += 1);
            script
        }
    };
    play(&state, script).await
}

async fn play(state: &Arc<State>, script: Script) -> Result<Response<Steps>, Broken> {
    let mut guard = Guard(Some(state.clone()));
    let mut script = script;
    loop {
        match script {
            Script::Silence => return pending().await,
            Script::Drop => {
                guard.0 = None;
                return Err(Broken);
            }
            Script::After(notify, next) => {
                notify.notified().await;
                script = *next;
            }
            Script::Answer {
                status,
                headers,
                steps,
            } => {
                let mut response = Response::builder().status(status);
                for (name, value) in headers {
                    response = response.header(name, value);
                }
                let steps = Steps {
                    steps: steps.into_iter().collect(),
                    waiting: None,
                    has_yielded: true,
                    guard,
                };
                return Ok(response.body(steps).unwrap());
            }
        }
    }
}

/// Tells the test when an answer is dropped before its end.
struct Guard(Option<Arc<State>>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(state) = &self.0 {
            state.abandoned.send_modify(|count| *count += 1);
        }
    }
}

/// A body that follows its steps, one write each.
struct Steps {
    steps: std::collections::VecDeque<Step>,
    waiting: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    has_yielded: bool,
    guard: Guard,
}

impl Body for Steps {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        loop {
            if let Some(waiting) = &mut self.waiting {
                if waiting.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                self.waiting = None;
            }
            if !self.has_yielded {
                // Makes the server write out each step by itself.
                self.has_yielded = true;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            match self.steps.pop_front() {
                Some(Step::Send(bytes)) => {
                    self.has_yielded = false;
                    return Poll::Ready(Some(Ok(Frame::data(bytes))));
                }
                Some(Step::Until(notify)) => {
                    self.waiting = Some(Box::pin(async move { notify.notified().await }));
                }
                Some(Step::Hang) => self.waiting = Some(Box::pin(pending())),
                Some(Step::Cut) => {
                    self.guard.0 = None;
                    return Poll::Ready(Some(Err(Broken)));
                }
                None => {
                    self.guard.0 = None;
                    return Poll::Ready(None);
                }
            }
        }
    }
}

/// A context server's answer: a ticket for the id that was asked for.
pub(crate) fn ticket(seen: &Seen) -> Script {
    let id = seen.params()["disagg_request_id"].clone();
    assert_eq!(seen.params()["request_type"], "context_only");
    Script::json(
        200,
        &json!({
            "id": "cmpl-ctx", "object": "text_completion", "model": "m",
            "choices": [{"index": 0, "text": " a", "finish_reason": "length", "disaggregated_params": {
                "request_type": "context_only", "first_gen_tokens": [7], "ctx_request_id": 41,
                "disagg_request_id": id, "encoded_opaque_state": "QUJD"}}],
            "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1,
                "prompt_tokens_details": {"cached_tokens": 2}},
            "prompt_token_ids": [11, 12, 13],
        }),
    )
}

/// Text of a generation server's whole answer.
pub(crate) const WHOLE: &str = r#"{"id":"cmpl-gen","object":"text_completion","choices":[{"index":0,"text":" a b","finish_reason":"length"}],"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":2}}}"#;

/// A generation server's answer to a ticket, streamed if asked for.
pub(crate) fn written(seen: &Seen) -> Script {
    if seen.json()["stream"] == true {
        Script::events(events(3))
    } else {
        Script::text(200, "application/json", WHOLE)
    }
}

/// `count` token events and the end.
pub(crate) fn events(count: usize) -> Vec<Step> {
    let mut steps: Vec<Step> = (0..count)
        .map(|index| {
            Step::Send(
                format!("data: {{\"choices\":[{{\"index\":0,\"text\":\" t{index}\"}}]}}\n\n")
                    .into(),
            )
        })
        .collect();
    steps.push(Step::Send(Bytes::from_static(b"data: [DONE]\n\n")));
    steps
}

/// The bytes that steps write.
pub(crate) fn bytes_of(steps: &[Step]) -> Vec<u8> {
    steps
        .iter()
        .filter_map(|step| match step {
            Step::Send(bytes) => Some(bytes.to_vec()),
            Step::Until(_) | Step::Hang | Step::Cut => None,
        })
        .flatten()
        .collect()
}

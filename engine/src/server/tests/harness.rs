//! A scripted engine, a server around it, and a client that shows the bytes.

use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::backend::TokenId;
use crate::handoff::{HandoffError, HandoffTicket};
use crate::metrics::{EngineStats, IterationStats};
use crate::request::{
    Event, FinishReason, GenerateRequest, Logprob, RequestCosts, RequestKind, SamplingParams,
    SubmitError, TokenLogprobs,
};
use crate::server::app::App;
use crate::server::listener::Listener;
use crate::server::metrics::Metrics;
use crate::server::perf::PerfRing;
use crate::server::port::{EnginePort, EventSource};
use crate::server::pulse::Pulse;
use crate::server::sampling::Limits;
use crate::server::service::{Facts, KvLayoutFacts, LimitFacts, Service, TransportFacts};
use crate::server::text::TextTools;
use crate::tokenizer::{ChatTemplate, Tokenizer};

pub(super) const VOCAB: u32 = 288;
pub(super) const MAX_SEQ_LEN: u32 = 4096;
pub(super) const EOS: TokenId = 257;
pub(super) const LEASE: u64 = 77;
/// Prompt tokens that the scripted engine says it found in its cache.
pub(super) const CACHED: u32 = 3;

/// Longest that any test waits for anything.
pub(super) const DEADLINE: Duration = Duration::from_secs(20);

/// Fails instead of hanging.
pub(super) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited too long for {what}"),
    }
}

pub(super) fn tokenizer() -> Arc<Tokenizer> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny-qwen2");
    Arc::new(Tokenizer::from_hf_dir(&directory).unwrap())
}

/// The ids of a text; each byte is one.
pub(super) fn ids(text: &str) -> Vec<TokenId> {
    tokenizer().encode(text, false).unwrap()
}

type Script = dyn Fn(&GenerateRequest) -> Result<Scripted, SubmitError> + Send + Sync;

/// What a submitted request gets.
pub(super) enum Scripted {
    /// These events, at once.
    Events(Vec<Event>),
    /// Whatever the test sends.
    Live(mpsc::UnboundedReceiver<Event>),
}

pub(super) struct ScriptedEngine {
    script: Box<Script>,
    pub(super) requests: Mutex<Vec<GenerateRequest>>,
    alive: AtomicBool,
    /// Requests that were given up before their end.
    cancelled: watch::Sender<usize>,
    stats: Mutex<EngineStats>,
}

impl fmt::Debug for ScriptedEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ScriptedEngine")
    }
}

impl ScriptedEngine {
    pub(super) fn new(
        script: impl Fn(&GenerateRequest) -> Result<Scripted, SubmitError> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            script: Box::new(script),
            requests: Mutex::new(Vec::new()),
            alive: AtomicBool::new(true),
            cancelled: watch::Sender::new(0),
            stats: Mutex::new(EngineStats {
                blocks_total: 64,
                blocks_free: 60,
                blocks_cached: 1,
                blocks_used: 3,
                ..EngineStats::default()
            }),
        })
    }

    /// Answers every request with a text, then end-of-sequence.
    pub(super) fn saying(text: &str) -> Arc<Self> {
        let mut tokens = ids(text);
        tokens.push(EOS);
        Self::new(move |request| Ok(Scripted::Events(answer(request, &tokens))))
    }

    pub(super) fn die(&self) {
        self.alive.store(false, Ordering::SeqCst);
    }

    pub(super) fn last_request(&self) -> GenerateRequest {
        self.requests.lock().unwrap().last().unwrap().clone()
    }

    /// Waits until that many requests were given up.
    pub(super) async fn wait_cancelled(&self, count: usize) {
        let mut cancelled = self.cancelled.subscribe();
        within(
            "cancelled requests",
            cancelled.wait_for(|seen| *seen >= count),
        )
        .await
        .unwrap();
    }

    pub(super) fn cancelled(&self) -> usize {
        *self.cancelled.borrow()
    }
}

#[derive(Debug)]
struct ScriptedEvents {
    queue: VecDeque<Event>,
    live: Option<mpsc::UnboundedReceiver<Event>>,
    ended: bool,
    cancelled: watch::Sender<usize>,
}

impl EventSource for ScriptedEvents {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let event = match (self.queue.pop_front(), &mut self.live) {
            (Some(event), _) => Some(event),
            (None, Some(live)) => match live.poll_recv(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(event) => event,
            },
            (None, None) => None,
        };
        self.ended = !matches!(
            event,
            Some(Event::LeaseOpened(_) | Event::Token { .. } | Event::PromptLogprobs(_))
        );
        Poll::Ready(event)
    }

    fn cancel(&mut self) {
        self.cancelled.send_modify(|count| *count += 1);
        if !self.ended {
            self.live = None;
            self.queue = VecDeque::from([Event::Finished {
                reason: FinishReason::Cancelled,
                costs: costs(),
                ticket: None,
            }]);
        }
    }
}

impl Drop for ScriptedEvents {
    fn drop(&mut self) {
        if !self.ended {
            self.cancelled.send_modify(|count| *count += 1);
        }
    }
}

impl EnginePort for ScriptedEngine {
    fn submit(&self, request: GenerateRequest) -> Result<Box<dyn EventSource>, SubmitError> {
        let scripted = (self.script)(&request);
        self.requests.lock().unwrap().push(request);
        let (queue, live) = match scripted? {
            Scripted::Events(events) => (events.into(), None),
            Scripted::Live(live) => (VecDeque::new(), Some(live)),
        };
        Ok(Box::new(ScriptedEvents {
            queue,
            live,
            ended: false,
            cancelled: self.cancelled.clone(),
        }))
    }

    fn meet(&self, state: Vec<u8>) -> oneshot::Receiver<Result<(), HandoffError>> {
        let (met, answer) = oneshot::channel();
        let fits = match &state[..] {
            b"fits" => Ok(()),
            _ => Err(HandoffError::Layout(
                "head size 64 here, 128 there".to_owned(),
            )),
        };
        met.send(fits).unwrap();
        answer
    }

    fn is_alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst)
    }

    fn queued(&self) -> usize {
        0
    }

    fn stats(&self) -> EngineStats {
        self.stats.lock().unwrap().clone()
    }

    fn take_iterations(&self) -> Vec<IterationStats> {
        Vec::new()
    }

    fn take_kv_events(&self) -> Vec<Value> {
        vec![serde_json::json!({"event_id": 0, "data": {"type": "created"}})]
    }
}

pub(super) fn costs() -> RequestCosts {
    RequestCosts {
        cached_tokens: CACHED,
        queue: Duration::from_micros(100),
        prefill: Duration::from_micros(2000),
        decode: Duration::from_micros(30_000),
        ..RequestCosts::default()
    }
}

pub(super) fn token(token: TokenId) -> Event {
    Event::Token {
        token,
        logprobs: None,
    }
}

pub(super) fn finished(reason: FinishReason) -> Event {
    Event::Finished {
        reason,
        costs: costs(),
        ticket: None,
    }
}

fn logprobs(token: TokenId, position: u32, alternatives: u32) -> TokenLogprobs {
    // The seed makes two candidates of one prompt differ.
    let logprob = |token, rank: u32| Logprob {
        token,
        #[expect(clippy::cast_precision_loss, reason = "small numbers of a test")]
        logprob: -0.25 * (position + rank) as f32,
        rank,
    };
    let others = (1..=alternatives).map(|rank| logprob((token + rank - 1) % VOCAB, rank));
    TokenLogprobs {
        chosen: logprob(token, 1),
        top: others.collect(),
    }
}

/// What an engine answers that would write `tokens`, as its contract says it.
pub(super) fn answer(request: &GenerateRequest, tokens: &[TokenId]) -> Vec<Event> {
    let sampling = &request.sampling;
    let mut events = Vec::new();
    if let Some(alternatives) = sampling.prompt_logprobs {
        let rest = request.prompt.iter().skip(1);
        let list = rest.map(|token| logprobs(*token, 0, alternatives));
        events.push(Event::PromptLogprobs(list.collect()));
    }
    let forced = match &request.kind {
        RequestKind::GenerationOnly(ticket) => ticket.first_tokens.clone(),
        RequestKind::Aggregated | RequestKind::ContextOnly { .. } | RequestKind::Prefetch(_) => {
            Vec::new()
        }
    };
    assert!(tokens.starts_with(&forced), "{forced:?}");
    let endless = tokens.iter().copied().chain(std::iter::repeat(ids("x")[0]));
    for (token, position) in endless.zip(0_u32..) {
        let given = sampling
            .logprobs
            .map(|alternatives| logprobs(token, position, alternatives));
        events.push(Event::Token {
            token,
            logprobs: given.clone(),
        });
        if let Some(reason) = end(sampling, token, position + 1) {
            events.push(finished(reason));
            return events;
        }
        if let RequestKind::ContextOnly {
            disagg_request_id, ..
        } = request.kind
        {
            let first = given.map(|given| [vec![given.chosen], given.top].concat());
            events.push(Event::Finished {
                reason: FinishReason::NotFinished,
                costs: costs(),
                ticket: Some(HandoffTicket {
                    ctx_request_id: LEASE,
                    disagg_request_id,
                    opaque_state: b"opaque".to_vec(),
                    first_tokens: vec![token],
                    first_logprobs: first.into_iter().collect(),
                }),
            });
            return events;
        }
    }
    unreachable!("an answer ends at max_tokens at the latest")
}

fn end(sampling: &SamplingParams, token: TokenId, count: u32) -> Option<FinishReason> {
    if token == EOS && !sampling.ignore_eos {
        return Some(FinishReason::Eos);
    }
    if sampling.stop_token_ids.contains(&token) {
        return Some(FinishReason::StopToken(token));
    }
    (count >= sampling.max_tokens).then_some(FinishReason::Length)
}

/// A running server. Dropping it stops it.
pub(super) struct TestServer {
    pub(super) address: SocketAddr,
    pub(super) app: Arc<App>,
    pub(super) engine: Arc<ScriptedEngine>,
    stop: oneshot::Sender<Duration>,
    running: JoinHandle<usize>,
}

pub(super) fn limits() -> Limits {
    Limits {
        vocab: VOCAB,
        max_seq_len: MAX_SEQ_LEN,
        defaults: SamplingParams::default(),
    }
}

pub(super) fn service(engine: &Arc<ScriptedEngine>, with_template: bool) -> Arc<Service> {
    service_over(Arc::clone(engine) as Arc<dyn EnginePort>, with_template)
}

/// A service over any engine.
pub(crate) fn service_over(engine: Arc<dyn EnginePort>, with_template: bool) -> Arc<Service> {
    let tokenizer = tokenizer();
    let template = with_template.then(|| ChatTemplate::of_model(&tokenizer).unwrap());
    Arc::new(Service {
        facts: facts(),
        limits: limits(),
        tools: TextTools::new(tokenizer, template, vec![EOS]),
        transceiver: None,
        metrics: Metrics::new(Arc::clone(&engine), None),
        engine,
        perf: PerfRing::new(16),
        pulse: Pulse::new(),
    })
}

fn facts() -> Facts {
    Facts {
        model: "tiny".to_owned(),
        created: 1_700_000_000,
        architecture: "qwen2".to_owned(),
        backend: "scripted".to_owned(),
        kv_layout: KvLayoutFacts {
            model_fingerprint: "00ff".to_owned(),
            layers: 8,
            kv_heads: 4,
            head_dim: 16,
            dtype: "float16",
            tokens_per_block: 32,
            page_bytes: 65_536,
            tensor_parallel: 1,
            pipeline_parallel: 1,
        },
        transport: Some(TransportFacts {
            name: "tcp".to_owned(),
            reason: "the only one".to_owned(),
            endpoint: "127.0.0.1:1".to_owned(),
        }),
        limits: LimitFacts {
            max_batch_size: 8,
            max_num_tokens: 512,
            max_seq_len: MAX_SEQ_LEN,
            kv_blocks: 64,
            vocab_size: VOCAB as usize,
        },
    }
}

impl TestServer {
    /// Bound, with nothing loaded.
    pub(super) async fn loading(engine: Arc<ScriptedEngine>) -> Self {
        let listener = Listener::bind("127.0.0.1", 0).await.unwrap();
        let address = listener.address();
        let app = App::new();
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(listener.run(Arc::clone(&app), stopped));
        Self {
            address,
            app,
            engine,
            stop,
            running,
        }
    }

    /// Serving.
    pub(super) async fn start(engine: Arc<ScriptedEngine>) -> Self {
        let server = Self::loading(engine).await;
        server.app.open(service(&server.engine, true));
        server
    }

    /// Stops accepting and waits for open connections; the number of those that were cut.
    pub(super) async fn shut_down(self) -> usize {
        self.app.drain();
        self.stop.send(DEADLINE).unwrap();
        within("the server's end", self.running).await.unwrap()
    }

    pub(super) async fn get(&self, path: &str) -> Reply {
        self.call("GET", path, "", b"").await
    }

    pub(super) async fn post(&self, path: &str, body: &Value) -> Reply {
        self.call("POST", path, "", body.to_string().as_bytes())
            .await
    }

    pub(super) async fn complete(&self, body: Value) -> Value {
        self.post("/v1/completions", &body).await.ok()
    }

    pub(super) async fn chat(&self, body: Value) -> Value {
        self.post("/v1/chat/completions", &body).await.ok()
    }

    /// One request on a connection of its own; `headers` are whole lines.
    pub(super) async fn call(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Reply {
        let mut stream = self.open(method, path, headers, body).await;
        let mut raw = Vec::new();
        within("the answer", stream.read_to_end(&mut raw))
            .await
            .unwrap();
        Reply::parse(&raw)
    }

    /// Sends a request and leaves the answer to the test.
    pub(super) async fn open(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: &[u8],
    ) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        // A server that has seen enough may have closed already.
        drop(stream.write_all(body).await);
        stream
    }
}

/// An answer, its chunks put together.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    head: String,
    pub(super) body: String,
    /// Whether the body ended as its framing says.
    pub(super) complete: bool,
}

impl Reply {
    pub(super) fn parse(raw: &[u8]) -> Self {
        let text = String::from_utf8(raw.to_vec()).unwrap();
        let (head, rest) = text.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let head = head.to_ascii_lowercase();
        let (body, complete) = if head.contains("transfer-encoding: chunked") {
            unchunked(rest)
        } else {
            (rest.to_owned(), true)
        };
        Self {
            status,
            head,
            body,
            complete,
        }
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let start = format!("{name}: ");
        self.head.lines().find_map(|line| line.strip_prefix(&start))
    }

    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The body of a 200.
    pub(super) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// The message of an error with this status.
    pub(super) fn error(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", self.body);
        let body = self.json();
        assert_eq!(body["object"], "error");
        assert_eq!(body["code"], status);
        assert_eq!(body["error"]["message"], body["message"]);
        body["message"].as_str().unwrap().to_owned()
    }

    /// The data of each server-sent event, `[DONE]` checked and left out.
    pub(super) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        let data = self
            .body
            .strip_suffix("data: [DONE]\n\n")
            .unwrap_or_else(|| panic!("no [DONE]: {}", self.body));
        data.split_terminator("\n\n")
            .filter(|event| !event.starts_with(':'))
            .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
            .collect()
    }
}

fn unchunked(mut rest: &str) -> (String, bool) {
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return (body, true);
        }
        let Some(chunk) = after.get(..size) else {
            break;
        };
        body.push_str(chunk);
        rest = after[size..].strip_prefix("\r\n").unwrap_or("");
    }
    (body, false)
}

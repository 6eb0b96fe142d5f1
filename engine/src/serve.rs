//! One instance, from its options to its end: socket, model, KV pool, transceiver, engine thread, HTTP.
//!
//! The socket is bound before anything is loaded, so that a port in use is known at once and health checks get
//! an answer all the time. Whatever ends the engine ends the process: a server that cannot serve does not stay.

mod load;
mod memory;
mod offline;
mod plan;
mod port;
mod progress;
mod ranks;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use baton_configs::llm::LlmOptions;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use self::load::Started;
pub use self::offline::{Offline, offline};
pub use self::ranks::follow;
use crate::backend::BackendError;
use crate::collective::mpi;
use crate::engine::{EngineError, EngineThread};
use crate::group::GroupError;
use crate::model::ModelError;
use crate::parallel::ParallelError;
use crate::ranks::LeaderRanks;
use crate::server::app::App;
pub use crate::server::listener::ListenError;
use crate::server::listener::{Listener, reachable, report_address};
use crate::server::registration::{Registration, RegistrationPlan};
pub use crate::server::registration::{RegistrationError, WorkerRole};
use crate::tokenizer::{ChatError, TokenizerError};
use crate::transceiver::TransceiverStartError;
use crate::transport::fault::FaultSyntaxError;

/// How long connections may still flush their last words when the engine has died.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How much longer than its own deadline the engine thread is waited for: one step may be under way.
const STEP_GRACE: Duration = Duration::from_secs(10);

/// Longer than any process runs; the engine thread ends by being told to, or by failing.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// What one instance is told.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Path of a GGUF file or of a Hugging Face directory, or a hub id that is in the local cache.
    pub model: String,
    /// Revision within the hub cache.
    pub revision: Option<String>,
    /// Address or name to listen on.
    pub host: String,
    /// Port to listen on; 0 lets the kernel choose.
    pub port: u16,
    /// File that gets `host:port` as soon as the socket is bound.
    pub report_addr: Option<PathBuf>,
    /// This instance's name in messages of both sides of a hand-off.
    pub instance: String,
    /// Engine options.
    pub llm: LlmOptions,
    /// How long running requests may go on after the shutdown was asked for.
    pub drain: Duration,
    /// This machine's address for others, where [`ServeOptions::host`] is all of its addresses; else its name.
    pub advertise: Option<IpAddr>,
    /// As what it registers, where `llm` says where.
    pub role: Option<WorkerRole>,
    /// How to come by the other ranks, where `llm` asks for more than one.
    pub ranks: Option<LeaderRanks>,
}

impl ServeOptions {
    /// Options for a model with everything else as it is by default: `localhost:8000`.
    #[must_use]
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            revision: None,
            host: "localhost".to_owned(),
            port: 8000,
            report_addr: None,
            instance: String::new(),
            llm: LlmOptions::default(),
            drain: Duration::from_secs(30),
            advertise: None,
            role: None,
            ranks: None,
        }
    }
}

/// Why an instance did not start, or how it ended. Each text is one line, and a `hint:` line where there is a remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Where and as what to register.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template that was given.
    #[error(transparent)]
    ChatTemplate(#[from] ChatError),
    /// The device.
    #[error(transparent)]
    Device(#[from] BackendError),
    /// The KV pool would hold nothing.
    #[error(
        "the kv pool has no room: {needed_bytes} bytes for one block of {tokens_per_block} tokens, {granted_bytes} granted\nhint: raise kv_cache_config.free_gpu_memory_fraction, or set kv_cache_config.max_tokens"
    )]
    NoPool {
        /// Bytes of one block.
        needed_bytes: u64,
        /// Its tokens.
        tokens_per_block: u32,
        /// What the memory and the options leave.
        granted_bytes: u64,
    },
    /// The KV transceiver.
    #[error(transparent)]
    Transceiver(#[from] TransceiverStartError),
    /// The transport's test variable.
    #[error(transparent)]
    Fault(#[from] FaultSyntaxError),
    /// The engine did not start, or ended by itself.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// More than one rank is asked for, and nobody starts the others.
    #[error(
        "tensor_parallel_size {tensor} and pipeline_parallel_size {pipeline} need {} ranks, and nothing starts the others\nhint: start it with `baton serve` or `llmapi-launch`", tensor * pipeline
    )]
    NoRanks {
        /// `tensor_parallel_size`.
        tensor: usize,
        /// `pipeline_parallel_size`.
        pipeline: usize,
    },
    /// The other ranks were called for in vain.
    #[error("cannot have the other ranks started: {0}")]
    Call(String),
    /// The ranks did not find each other.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The ranks did not begin together, or one of them ended.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
    /// A thread that start-up needs.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// A bug: start-up ended without a word.
    #[error("loading the model ended without a result; the log has more")]
    LoadingVanished,
}

/// Runs one instance until `shutdown` completes, then lets running requests finish within `options.drain`.
///
/// # Errors
/// When it cannot start, or when the engine fails while serving.
pub async fn serve(
    options: ServeOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let listener = Listener::bind(&options.host, options.port).await?;
    let bound = listener.address();
    let cluster = options.llm.cluster.as_ref();
    let registration = RegistrationPlan::new(cluster, options.role, bound)?;
    let address = told_address(bound, options.advertise);
    if let Some(path) = &options.report_addr {
        report_address(path, address)?;
    }
    let app = App::new();
    let http = Http::start(listener, &app);
    let mut shutdown = pin!(shutdown);
    let stop = Arc::new(AtomicBool::new(false));
    let mut loading = load::start(options.clone(), (address, Arc::clone(&app)), &stop)?;
    let started = tokio::select! {
        () = &mut shutdown => {
            tracing::info!("told to stop while loading");
            stop.store(true, Ordering::Relaxed);
            http.stop(LAST_WORDS).await;
            if options.ranks.is_some() {
                // The other ranks are told, if that goes at once.
                drop(timeout(LAST_WORDS, &mut loading).await);
            }
            return Ok(());
        }
        started = &mut loading => started.unwrap_or(Err(ServeError::LoadingVanished)),
    };
    let started = match started {
        Ok(started) => started,
        Err(error) => {
            http.stop(LAST_WORDS).await;
            return Err(error);
        }
    };
    let url = format!("http://{}", reachable(address));
    let ready = Ready {
        started,
        http,
        app,
        url,
        registration,
        drain: options.drain,
    };
    ready.serve(shutdown).await?;
    // It waits for the other ranks of the world, where MPI is the fabric.
    tokio::task::spawn_blocking(mpi::leave).await.ok();
    Ok(())
}

/// What others are told of an address that was bound.
fn told_address(bound: SocketAddr, advertise: Option<IpAddr>) -> SocketAddr {
    match advertise {
        Some(ip) if bound.ip().is_unspecified() => SocketAddr::new(ip, bound.port()),
        _ => bound,
    }
}

/// An instance that has all it needs.
struct Ready {
    started: Started,
    http: Http,
    app: Arc<App>,
    url: String,
    registration: Option<RegistrationPlan>,
    drain: Duration,
}

impl Ready {
    /// Serves until told to stop, or until the engine ends by itself.
    async fn serve(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Started {
            service,
            engine,
            thread,
        } = self.started;
        let mut watch = watch_engine(thread)?;
        let model = service.facts.model.clone();
        self.app.open(service);
        tracing::info!(%model, url = %self.url, "serving");
        let registration = Registration::start(self.registration);
        tokio::select! {
            () = shutdown => {}
            ended = &mut watch => {
                registration.end().await;
                self.http.stop(LAST_WORDS).await;
                return engine_end(ended);
            }
        }
        // First of all, so that no new request is sent here.
        registration.end().await;
        tracing::info!(drain_ms = self.drain.as_millis(), "draining");
        self.app.drain();
        engine.shutdown(Instant::now() + self.drain);
        self.http.stop(self.drain).await;
        let grace = self.drain + STEP_GRACE;
        match timeout(grace, watch).await {
            Ok(ended) => engine_end(ended),
            Err(_) => Err(ServeError::Engine(EngineError::JoinTimedOut {
                waited_ms: grace.as_millis(),
            })),
        }
    }
}

/// The HTTP side as a task.
struct Http {
    stop: oneshot::Sender<Duration>,
    running: JoinHandle<usize>,
}

impl Http {
    fn start(listener: Listener, app: &Arc<App>) -> Self {
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(listener.run(Arc::clone(app), stopped));
        Self { stop, running }
    }

    /// Stops accepting and waits for open connections.
    async fn stop(self, drain: Duration) {
        if self.stop.send(drain).is_err() {
            tracing::error!("the http side had ended already");
        }
        match self.running.await {
            Ok(0) => {}
            Ok(cut) => tracing::warn!(connections = cut, "connections were cut"),
            Err(error) => tracing::error!(%error, "the http side failed"),
        }
    }
}

type EngineEnd = Result<Result<(), EngineError>, oneshot::error::RecvError>;

fn engine_end(ended: EngineEnd) -> Result<(), ServeError> {
    match ended {
        Ok(outcome) => outcome.map_err(ServeError::Engine),
        Err(_) => Err(ServeError::Engine(EngineError::Panicked(
            "the thread that waits for it ended".to_owned(),
        ))),
    }
}

/// Tells when the engine thread has ended, and how. A thread of its own: waiting for a thread blocks.
fn watch_engine(
    engine: EngineThread,
) -> Result<oneshot::Receiver<Result<(), EngineError>>, ServeError> {
    let (tell, told) = oneshot::channel();
    thread::Builder::new()
        .name("engine-watch".to_owned())
        .spawn(move || {
            let outcome = engine.join(Instant::now() + FOR_EVER);
            // Nobody listens when the process ends without waiting for the engine.
            drop(tell.send(outcome));
        })
        .map_err(ServeError::Thread)?;
    Ok(told)
}

//! The life of the proxy: bind, report the address, wait for workers while answering, serve, drain.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_configs::disagg::{DisaggConfig, Endpoint};
use baton_configs::small_file::write_whole;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::address_file::FileServer;
use crate::discovery::Discovery;
use crate::endpoints;
use crate::health::{self, Watching};
use crate::introduce;
use crate::metrics::Metrics;
use crate::options::ProxyOptions;
use crate::proxy::Proxy;
use crate::reply::{self, Reply};
use crate::socket::ImpatientStream;
use crate::startup;
use crate::workers::Role;

/// Pause after a failed accept, so that a process without free descriptors does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections beyond the limit that are still told 503; further ones are closed without a word.
const REFUSED_CONNECTIONS_MAX: usize = 256;

/// Why the proxy ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// The configuration names no server of a role.
    #[error(
        "{role}_servers has no urls\nhint: list each server as host:port under {role}_servers.urls"
    )]
    NoServers {
        /// `context` or `generation`.
        role: &'static str,
    },
    /// The socket could not be bound.
    #[error("cannot listen on {endpoint}: {reason}\nhint: {hint}")]
    Bind {
        /// Where.
        endpoint: Endpoint,
        /// What the system said.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// The address could not be written to `--report_addr`.
    #[error("cannot write the address to {}: {source}", path.display())]
    Report {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Workers were missing when the start-up time was over.
    #[error(
        "not all servers were up within {} s: {}\nhint: look at the logs of the servers named, or give them more time with --server_start_timeout",
        patience.as_secs(),
        missing.join("; ")
    )]
    StartTimeout {
        /// The time.
        patience: Duration,
        /// Each missing server with the last that was seen of it.
        missing: Vec<String>,
    },
}

/// Runs the proxy until `shutdown` is done and every request in flight is answered, or the drain deadline passes.
///
/// # Errors
/// When the socket cannot be bound, or not all workers are up in time.
pub async fn run<F>(options: ProxyOptions, shutdown: F) -> Result<(), ProxyError>
where
    F: Future<Output = ()>,
{
    for (role, group) in [
        ("context", &options.config.context_servers),
        ("generation", &options.config.generation_servers),
    ] {
        if group.servers.is_empty() && options.config.cluster.is_none() {
            return Err(ProxyError::NoServers { role });
        }
    }
    let listener = bind(&options).await?;
    let address = listener.local_addr().ok();
    if let (Some(path), Some(address)) = (&options.report_addr, address) {
        let told = told_address(address, options.advertise).to_string();
        write_whole(path, &told).map_err(|source| ProxyError::Report {
            path: path.clone(),
            source,
        })?;
    }
    let proxy = Arc::new(Proxy::new(&options));
    let mut tasks = JoinSet::new();
    follow_workers(&proxy, &options.config, &mut tasks);
    let patience = proxy.timeouts.probe;
    tasks.spawn(introduce::follow(proxy.cluster.clone(), patience));
    if let Some(period) = options
        .metrics_log_interval
        .filter(|period| !period.is_zero())
    {
        tasks.spawn(log_metrics(proxy.clone(), period));
    }
    if let Some(address) = address {
        tracing::info!("listening on {address}");
    }
    let mut front = Front::new(proxy.clone(), listener, options.config.keep_alive);
    let outcome = tokio::select! {
        () = front.accept_forever() => Ok(()),
        error = start_and_stay(&proxy) => Err(error),
        () = shutdown => Ok(()),
    };
    proxy.stop();
    front.drain(proxy.timeouts.drain).await;
    tasks.shutdown().await;
    outcome
}

/// Starts what keeps the list of workers and their health.
fn follow_workers(proxy: &Arc<Proxy>, config: &DisaggConfig, tasks: &mut JoinSet<()>) {
    let watching = Watching {
        timeouts: proxy.timeouts.clone(),
        sets_clock: config.perf_metrics_max_requests > 0,
    };
    for worker in proxy.cluster.workers() {
        tasks.spawn(health::watch(worker, watching.clone()));
    }
    for (role, group) in [
        (Role::Context, &config.context_servers),
        (Role::Generation, &config.generation_servers),
    ] {
        let files = group
            .servers
            .iter()
            .filter(|server| server.fixed().is_none());
        for address in files {
            let server = FileServer {
                role,
                address: address.clone(),
                watching: watching.clone(),
            };
            tasks.spawn(server.follow(proxy.cluster.clone()));
        }
    }
    if let (Some(config), Some(store)) = (&config.cluster, &proxy.store) {
        let discovery = Discovery {
            config: config.clone(),
            store: store.clone(),
            cluster: proxy.cluster.clone(),
            watching,
        };
        tasks.spawn(discovery.follow());
    }
}

/// Returns only if the start fails.
async fn start_and_stay(proxy: &Proxy) -> ProxyError {
    match startup::wait_for_all(&proxy.cluster, proxy.timeouts.server_start).await {
        Ok(()) => std::future::pending().await,
        Err(error) => error,
    }
}

async fn bind(options: &ProxyOptions) -> Result<TcpListener, ProxyError> {
    let config = &options.config;
    let bound = TcpListener::bind((config.hostname.as_str(), config.port)).await;
    bound.map_err(|error| {
        let (reason, hint) = match error.kind() {
            io::ErrorKind::AddrInUse => (
                "the port is in use".to_owned(),
                "stop the program that has it (`ss -ltnp` names it), or set another port in the config; 0 lets the kernel choose",
            ),
            io::ErrorKind::PermissionDenied => (
                "not allowed".to_owned(),
                "ports below 1024 belong to root; set another port in the config",
            ),
            io::ErrorKind::AddrNotAvailable => (
                "this machine has no such address".to_owned(),
                "set hostname to an address of this machine, or to 0.0.0.0 for all of them",
            ),
            _ => (error.to_string(), "check hostname and port in the config"),
        };
        ProxyError::Bind {
            endpoint: Endpoint {
                host: config.hostname.clone(),
                port: config.port,
            },
            reason,
            hint,
        }
    })
}

/// What others are told of an address that was bound: one that they can reach, where it is all of the machine's.
fn told_address(mut bound: SocketAddr, advertise: Option<IpAddr>) -> SocketAddr {
    if bound.ip().is_unspecified() {
        let loopback = match bound.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        bound.set_ip(advertise.unwrap_or(loopback));
    }
    bound
}

async fn log_metrics(proxy: Arc<Proxy>, period: Duration) {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        tracing::info!(
            active_requests = proxy.admission.active(),
            queued_requests = proxy.admission.waiting(),
            "{}",
            proxy.metrics.summary()
        );
    }
}

/// The listening socket and the connections that came from it.
struct Front {
    proxy: Arc<Proxy>,
    listener: TcpListener,
    http: http1::Builder,
    graceful: GracefulShutdown,
    connections: JoinSet<()>,
}

impl Front {
    fn new(proxy: Arc<Proxy>, listener: TcpListener, keep_alive: Duration) -> Self {
        let mut http = http1::Builder::new();
        // The same clock covers a client that sends its head slowly and one that keeps a connection for later.
        http.timer(TokioTimer::new())
            .header_read_timeout(keep_alive);
        Self {
            proxy,
            listener,
            http,
            graceful: GracefulShutdown::new(),
            connections: JoinSet::new(),
        }
    }

    async fn accept_forever(&mut self) {
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => self.open(stream),
                    Err(error) => {
                        tracing::warn!("cannot accept a connection: {error}");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(ended) = self.connections.join_next() => {
                    if let Err(error) = ended {
                        tracing::error!("a client connection ended by a bug: {error}");
                    }
                }
            }
        }
    }

    fn open(&mut self, stream: TcpStream) {
        let limit = self.proxy.limits.max_connections;
        if self.connections.len() >= limit.saturating_add(REFUSED_CONNECTIONS_MAX) {
            return;
        }
        // A failure here costs latency, not correctness.
        let _ = stream.set_nodelay(true);
        let proxy = self.proxy.clone();
        let is_over = self.connections.len() >= limit;
        let stream = ImpatientStream::new(stream, proxy.timeouts.client_write);
        let service = service_fn(move |request| {
            let proxy = proxy.clone();
            async move { Ok::<_, Infallible>(answer(&proxy, request, is_over).await) }
        });
        let connection = self.http.serve_connection(TokioIo::new(stream), service);
        let connection = self.graceful.watch(connection);
        let open = OpenConnection::new(self.proxy.metrics.clone());
        self.connections.spawn(async move {
            let _open = open;
            if let Err(error) = connection.await {
                tracing::debug!("client connection ended early: {error}");
            }
        });
    }

    /// Lets requests in flight end, up to `patience`.
    async fn drain(self, patience: Duration) {
        let Self {
            listener,
            graceful,
            mut connections,
            ..
        } = self;
        drop(listener);
        let count = graceful.count();
        if count > 0 {
            tracing::info!(connections = count, "waiting for requests in flight");
        }
        if timeout(patience, graceful.shutdown()).await.is_err() {
            tracing::warn!(
                connections = connections.len(),
                "closing connections that are still busy after {:.1} s",
                patience.as_secs_f64()
            );
        }
        connections.shutdown().await;
    }
}

/// Counts a connection for as long as it lives.
struct OpenConnection(Arc<Metrics>);

impl OpenConnection {
    fn new(metrics: Arc<Metrics>) -> Self {
        metrics.connections.inc();
        Self(metrics)
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.connections.dec();
    }
}

async fn answer(proxy: &Proxy, request: Request<Incoming>, is_over: bool) -> Reply {
    if is_over {
        let limit = proxy.limits.max_connections;
        let text = format!("too many connections: {limit} are open");
        let mut reply = reply::error(StatusCode::SERVICE_UNAVAILABLE, &text, None);
        let close = HeaderValue::from_static("close");
        reply.headers_mut().insert(CONNECTION, close);
        return reply;
    }
    endpoints::handle(proxy, request).await
}

//! The socket: bound before anything is loaded, accepting until told to stop, draining with a deadline.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use baton_configs::small_file::write_whole;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::server::app::App;
use crate::server::route::handle;
use crate::server::stall::StallGuard;

/// Most connections at once; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 4096;

/// How long a client may take to send a request's head, and how long an idle connection is kept.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);

/// How long a client may refuse to read before its connection is given up.
const STALL_DEADLINE: Duration = Duration::from_secs(120);

/// How long to wait after a failed `accept`, which is nearly always a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The host has no address.
    #[error(
        "cannot resolve host `{host}`: {source}\nhint: give an address of this machine, such as 127.0.0.1 or 0.0.0.0, with --host"
    )]
    Resolve {
        /// As given.
        host: String,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has the port.
    #[error(
        "cannot listen on {address}: the port is in use\nhint: stop the other server, choose another --port, or let the kernel choose with --port 0 and --report_addr"
    )]
    InUse {
        /// `host:port`.
        address: String,
    },
    /// Anything else.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// `host:port`.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The address cannot be reported.
    #[error("cannot write the address to {path}: {source}")]
    Report {
        /// As given.
        path: String,
        /// What the system said.
        source: io::Error,
    },
}

/// A bound socket.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Binds the first address of the host that can be bound, IPv4 before IPv6.
    pub(crate) async fn bind(host: &str, port: u16) -> Result<Self, ListenError> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let resolve_error = |source| ListenError::Resolve {
            host: host.to_owned(),
            source,
        };
        let mut addresses: Vec<SocketAddr> = lookup_host((bare, port))
            .await
            .map_err(resolve_error)?
            .collect();
        addresses.sort_by_key(SocketAddr::is_ipv6);
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in &addresses {
            match TcpListener::bind(address).await {
                Ok(socket) => {
                    let address = socket.local_addr().map_err(|source| ListenError::Bind {
                        address: address.to_string(),
                        source,
                    })?;
                    return Ok(Self { socket, address });
                }
                Err(error) => last = error,
            }
        }
        let shown = if bare.contains(':') {
            format!("[{bare}]:{port}")
        } else {
            format!("{bare}:{port}")
        };
        Err(match last.kind() {
            io::ErrorKind::AddrInUse => ListenError::InUse { address: shown },
            _ => ListenError::Bind {
                address: shown,
                source: last,
            },
        })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts until told to stop, then lets open connections finish within the time it was told. Returns how
    /// many did not.
    pub(crate) async fn run(self, app: Arc<App>, stop: oneshot::Receiver<Duration>) -> usize {
        let graceful = GracefulShutdown::new();
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        let mut stop = pin!(stop);
        let drain = loop {
            tokio::select! {
                // Whoever could have told us is gone: nothing is worth waiting for.
                drain = &mut stop => break drain.unwrap_or(Duration::ZERO),
                Some(ended) = connections.join_next(), if !connections.is_empty() => {
                    report(ended);
                }
                accepted = accept(&self.socket, &places) => match accepted {
                    Ok((stream, place)) => {
                        let connection = connection(stream, Arc::clone(&app), &graceful);
                        connections.spawn(async move {
                            connection.await;
                            drop(place);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        };
        drop(self.socket);
        if timeout(drain, graceful.shutdown()).await.is_err() {
            tracing::warn!(
                open = connections.len(),
                drain_ms = drain.as_millis(),
                "connections did not end in time and are cut"
            );
        }
        while let Some(ended) = connections.try_join_next() {
            report(ended);
        }
        let open = connections.len();
        connections.shutdown().await;
        open
    }
}

async fn accept(
    socket: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let place = Arc::clone(places)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (stream, _) = socket.accept().await?;
    Ok((stream, place))
}

fn connection(
    stream: TcpStream,
    app: Arc<App>,
    graceful: &GracefulShutdown,
) -> impl Future<Output = ()> + Send + use<> {
    // Tokens are small and late ones are what a client notices.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let io = TokioIo::new(StallGuard::new(stream, STALL_DEADLINE));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .serve_connection(
            io,
            service_fn(move |request| handle(Arc::clone(&app), request)),
        );
    let connection = graceful.watch(connection);
    async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection ended early");
        }
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task panicked");
    }
}

/// Writes `host:port` so that a reader sees the whole of it or nothing.
pub(crate) fn report_address(path: &Path, address: SocketAddr) -> Result<(), ListenError> {
    write_whole(path, reachable(address)).map_err(|source| ListenError::Report {
        path: path.display().to_string(),
        source,
    })
}

/// `host:port` that others can use.
pub(crate) fn reachable(address: SocketAddr) -> String {
    if address.ip().is_unspecified() {
        format!("{}:{}", reachable_host(address), address.port())
    } else {
        address.to_string()
    }
}

/// A host that others can use: a wildcard is replaced by this machine's name.
pub(crate) fn reachable_host(address: SocketAddr) -> String {
    if !address.ip().is_unspecified() {
        return address.ip().to_string();
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "127.0.0.1".to_owned(),
        name => name.to_owned(),
    }
}

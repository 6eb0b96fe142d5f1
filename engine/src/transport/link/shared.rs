//! What the transport's threads share, and the life of a connection: admitted, greeted, carried, forgotten.
//!
//! The thread that reads a connection owns it: it starts and joins the writer and the puller, and only then reports the
//! peer lost, so that nothing of a peer follows its loss.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::LinkTuning;
use super::connection::{Connection, STREAM_BYTES_QUEUED_MAX};
use super::lender::Lender;
use super::puller::{Puller, PullerParts};
use super::reader::{Greeting, Reader, Receiving};
use super::regions::Regions;
use super::socket;
use super::writer::{WriteEnd, Writer};
use crate::transport::fault::{FaultPlan, Faults};
use crate::transport::numbered::NumberedMap;
use crate::transport::vigil::Vigil;
use crate::transport::{ConnectError, PeerId, TransportEvent, TransportSink};

/// A host that does not answer at all is given up after this, whatever the caller's deadline.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// What a transport has beside its stream, if its peers read each other's memory.
#[derive(Debug)]
pub(super) struct Pulling {
    /// Of our fabric.
    pub(super) address: Vec<u8>,
    pub(super) lender: Lender,
    pub(super) parts: PullerParts,
}

/// Shared by the transport's handle and its threads.
pub(super) struct Shared {
    /// Peers greet with it.
    name: &'static str,
    tuning: LinkTuning,
    faults: Faults,
    /// Whether what comes with the stream is summed.
    sum: bool,
    pub(super) pulling: Option<Pulling>,
    /// `host:port` that peers connect to.
    pub(super) advertised: String,
    /// Where the listener really is, to wake it.
    listening: SocketAddr,
    sink: TransportSink,
    pub(super) regions: Regions,
    peers: Mutex<NumberedMap<PeerId, Arc<Connection>>>,
    connections: AtomicUsize,
    closed: AtomicBool,
    closing: (Mutex<bool>, Condvar),
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("advertised", &self.advertised)
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

/// Who opened a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Connecting,
    Accepted,
}

/// Waits for a thread to end; all of ours end soon after [`Shared::close`].
pub(super) fn join(thread: JoinHandle<()>) {
    // The last reference may be dropped by one of the transport's own threads, which cannot wait for itself.
    if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
        tracing::error!("a kv transport thread panicked");
    }
}

impl Shared {
    pub(super) fn new(
        (name, pulling): (&'static str, Option<Pulling>),
        (tuning, faults, sum): (LinkTuning, FaultPlan, bool),
        (advertised, listening): (String, SocketAddr),
        sink: TransportSink,
    ) -> Self {
        Self {
            name,
            tuning,
            faults: Faults::new(faults),
            sum,
            pulling,
            advertised,
            listening,
            sink,
            regions: Regions::default(),
            peers: Mutex::default(),
            connections: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            closing: (Mutex::new(false), Condvar::new()),
            threads: Mutex::default(),
        }
    }

    /// How long threads of connections watch before they sleep.
    pub(super) const fn vigil(&self) -> Vigil {
        Vigil::of(self.tuning.vigil)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub(super) fn peer(&self, peer: PeerId) -> Option<Arc<Connection>> {
        self.lock_peers().get(&peer).cloned()
    }

    pub(super) fn take_threads(&self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut *self.lock_threads())
    }

    fn lock_peers(&self) -> MutexGuard<'_, NumberedMap<PeerId, Arc<Connection>>> {
        self.peers.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn lock_threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Ends everything, without waiting.
    pub(super) fn close(&self) {
        if self.closed.swap(true, Ordering::SeqCst) {
            return;
        }
        *self.closing.0.lock().unwrap_or_else(|e| e.into_inner()) = true;
        self.closing.1.notify_all();
        for connection in self.lock_peers().values() {
            connection.finish("closed by this side");
        }
        // The accepting thread blocks in the kernel; a connection from ourselves wakes it.
        let mut wake = self.listening;
        if wake.ip().is_unspecified() {
            wake.set_ip(match wake {
                SocketAddr::V4(_) => IpAddr::from([127, 0, 0, 1]),
                SocketAddr::V6(_) => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
            });
        }
        drop(TcpStream::connect_timeout(&wake, Duration::from_secs(1)));
    }

    /// Makes room for one more connection.
    pub(super) fn admit(&self, address: String) -> Result<Arc<Connection>, ConnectError> {
        if self.is_closed() {
            return Err(ConnectError::Closed);
        }
        let limit = self.tuning.peers_max;
        let room = |count: usize| (count < limit).then_some(count + 1);
        self.connections
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, room)
            .map_err(|_| ConnectError::TooMany(limit))?;
        let write_bytes_max = match self.pulling {
            Some(_) => usize::MAX,
            None => STREAM_BYTES_QUEUED_MAX,
        };
        let peer = PeerId::fresh();
        let bounds = (write_bytes_max, self.vigil());
        Ok(Arc::new(Connection::new(peer, address, bounds)))
    }

    /// Makes a connection known to callers; from now on its end is reported.
    pub(super) fn know(&self, connection: &Arc<Connection>) {
        self.lock_peers()
            .insert(connection.id, Arc::clone(connection));
        if self.is_closed() {
            connection.finish("closed by this side");
        }
    }

    /// Ends a connection's books: the last thing that happens to it.
    fn forget(&self, connection: &Connection) {
        let reason = connection.reason();
        let known = self.lock_peers().remove(&connection.id).is_some();
        self.connections.fetch_sub(1, Ordering::SeqCst);
        tracing::debug!(peer = %connection.address, %reason, "kv connection closed");
        if known {
            let peer = connection.id;
            (self.sink)(vec![TransportEvent::PeerLost { peer, reason }]);
        }
    }

    /// Starts a connection's owner thread.
    pub(super) fn spawn(
        self: &Arc<Self>,
        connection: Arc<Connection>,
        run: impl FnOnce(&Self, &Arc<Connection>) + Send + 'static,
    ) -> Result<(), ConnectError> {
        let shared = Arc::clone(self);
        let kept = Arc::clone(&connection);
        let spawned = std::thread::Builder::new()
            .name(format!("kv-link-{}", connection.id.0))
            .spawn(move || {
                run(&shared, &connection);
                shared.forget(&connection);
            });
        let mut threads = self.lock_threads();
        threads.retain(|thread| !thread.is_finished());
        match spawned {
            Ok(thread) => {
                threads.push(thread);
                Ok(())
            }
            Err(error) => {
                drop(threads);
                kept.close("no thread");
                self.lock_peers().remove(&kept.id);
                self.connections.fetch_sub(1, Ordering::SeqCst);
                Err(ConnectError::Thread(error.to_string()))
            }
        }
    }

    /// The accepting thread.
    pub(super) fn accept(self: &Arc<Self>, listener: &TcpListener) {
        while !self.is_closed() {
            match listener.accept() {
                Ok(_) if self.is_closed() => return,
                Ok((stream, address)) => self.take_in(stream, address),
                Err(error) => {
                    tracing::debug!(%error, "accepting a kv connection failed");
                    self.rest_after_accept_error();
                }
            }
        }
    }

    fn take_in(self: &Arc<Self>, stream: TcpStream, address: SocketAddr) {
        let taken = self.admit(address.to_string()).and_then(|connection| {
            self.spawn(connection, move |shared, connection| {
                shared.run_incoming(connection, &stream);
            })
        });
        if let Err(error) = taken {
            tracing::debug!(peer = %address, %error, "kv connection turned away");
        }
    }

    /// Out of descriptors, most likely: a pause, ended at once by closing.
    fn rest_after_accept_error(&self) {
        let (lock, wake) = &self.closing;
        let guard = lock.lock().unwrap_or_else(|e| e.into_inner());
        drop(wake.wait_timeout_while(guard, Duration::from_millis(50), |closing| !*closing));
    }

    fn run_incoming(&self, connection: &Arc<Connection>, stream: &TcpStream) {
        match self.greet(connection, stream, Side::Accepted) {
            Ok(theirs) => {
                self.know(connection);
                self.carry(connection, stream, &theirs, Side::Accepted);
            }
            Err(reason) => connection.close(&reason),
        }
    }

    /// Runs a connection that we open.
    pub(super) fn run_outgoing(&self, connection: &Arc<Connection>, deadline: Instant) {
        let connected = dial(&connection.address, deadline).and_then(|stream| {
            let theirs = self.greet(connection, &stream, Side::Connecting)?;
            Ok((stream, theirs))
        });
        match connected {
            Ok((stream, theirs)) => self.carry(connection, &stream, &theirs, Side::Connecting),
            Err(reason) => {
                connection.close(&format!("cannot be connected to: {reason}"));
                // Nothing was written; what was submitted meanwhile is completed all the same.
                Writer::finish(connection, &self.sink);
            }
        }
    }

    /// Exchanges greetings and hands the socket to the connection. The one who connects speaks first.
    fn greet(
        &self,
        connection: &Connection,
        stream: &TcpStream,
        side: Side,
    ) -> Result<Greeting, String> {
        let text = |error: std::io::Error| error.to_string();
        socket::prepare(stream).map_err(text)?;
        let closing_handle = stream.try_clone().map_err(text)?;
        if !connection.attach(Arc::new(closing_handle)) {
            return Err(connection.reason());
        }
        let mut reader = Reader::new(stream, &self.tuning).map_err(|e| e.to_string())?;
        let writer = self.writer(stream).map_err(|e| e.to_string())?;
        let mut listen = || reader.greeting(self.name).map_err(|e| e.to_string());
        let fabric: &[u8] = self.pulling.as_ref().map_or(&[], |p| &p.address);
        let speak = || {
            let spoken = writer.greet(self.name, &self.advertised, fabric);
            spoken.map_err(|e| e.to_string())
        };
        let theirs = match side {
            Side::Connecting => {
                speak()?;
                listen()?
            }
            Side::Accepted => {
                let theirs = listen()?;
                speak()?;
                theirs
            }
        };
        let listens_at = &theirs.address;
        tracing::debug!(peer = %connection.address, %listens_at, transport = self.name, "kv connection open");
        Ok(theirs)
    }

    fn writer<'a>(&'a self, stream: &'a TcpStream) -> Result<Writer<'a>, WriteEnd> {
        let lender = self.pulling.as_ref().map(|pulling| &pulling.lender);
        Writer::new(stream, &self.tuning, &self.faults, lender)
    }

    /// Carries frames both ways, and pulls, until one of the threads ends; returns when all have.
    fn carry(
        &self,
        connection: &Arc<Connection>,
        stream: &TcpStream,
        theirs: &Greeting,
        side: Side,
    ) {
        let lender = self.pulling.as_ref().map(|pulling| &pulling.lender);
        if let Some(bytes) = lender.and_then(|lender| lender.window_of(&theirs.fabric)) {
            connection.has_windows(bytes);
        }
        connection.greeted();
        std::thread::scope(|scope| {
            let id = connection.id.0;
            let thread =
                |what: &str| std::thread::Builder::new().name(format!("kv-link-{id}-{what}"));
            let writing =
                thread("out").spawn_scoped(scope, || self.write_until_end(connection, stream));
            if let Err(error) = writing {
                connection.close(&format!("cannot start a thread: {error}"));
                Writer::finish(connection, &self.sink);
                return;
            }
            if let Some(pulling) = &self.pulling {
                let pulling = thread("pull").spawn_scoped(scope, || {
                    self.pull_until_end(connection, &pulling.parts, theirs, side);
                });
                if let Err(error) = pulling {
                    connection.close(&format!("cannot start a thread: {error}"));
                    return;
                }
            }
            let receiving = Receiving {
                connection,
                regions: &self.regions,
                sink: &self.sink,
                pulls: self.pulling.is_some(),
                sum: self.sum,
            };
            let end =
                Reader::new(stream, &self.tuning).and_then(|mut reader| reader.run(&receiving));
            if let Err(end) = end {
                connection.close(&end.to_string());
            }
        });
    }

    fn write_until_end(&self, connection: &Arc<Connection>, stream: &TcpStream) {
        match self.writer(stream) {
            Ok(mut writer) => writer.run(connection, &self.sink),
            Err(end) => connection.close(&end.to_string()),
        }
        Writer::finish(connection, &self.sink);
    }

    fn pull_until_end(
        &self,
        connection: &Connection,
        parts: &PullerParts,
        theirs: &Greeting,
        side: Side,
    ) {
        let mut puller = Puller::new(
            parts,
            &self.tuning,
            (connection, &self.regions),
            &theirs.fabric,
        );
        // Who connects is the one who fetches: it prepares at once, the other side when it has to.
        let opened = match side {
            Side::Connecting => puller.open(),
            Side::Accepted => Ok(()),
        };
        if let Err(end) = opened.and_then(|()| puller.run(&self.sink)) {
            connection.close(&end.to_string());
        }
    }
}

/// Connects to the first of an address's hosts that answers before the deadline.
fn dial(address: &str, deadline: Instant) -> Result<TcpStream, String> {
    let candidates = address.to_socket_addrs().map_err(|e| e.to_string())?;
    let mut last = "the name has no address".to_owned();
    for candidate in candidates {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("no answer before the deadline; last: {last}"));
        }
        match TcpStream::connect_timeout(&candidate, left.min(DIAL_TIMEOUT)) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

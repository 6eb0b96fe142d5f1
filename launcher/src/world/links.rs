//! The coordinator's connections: accepting and proving callers, and one reader and one writer task an agent.
//!
//! Invariant: whatever happens to a connection ends as one [`Event::Lost`]; both directions carry a sign of life often
//! enough that a silent side is noticed within the peer timeout.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_engine::secret::Secret;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::channel::{self, Caller, Channel, ChannelError, Incoming, Outgoing};
use super::protocol::{AgentHello, Order, Report, SlotId};

/// Callers that are being proved at one time; more wait in the system's queue.
const HANDSHAKES_MAX: usize = 256;
/// Orders that wait for an agent. An agent that does not take them in time is lost.
const ORDERS_MAX: usize = 256;

/// All that can happen to a world.
#[derive(Debug)]
pub(crate) enum Event {
    /// Somebody who knows the secret calls.
    Came(Box<Caller>),
    /// An agent has news.
    Told {
        /// Its place in the list of agents.
        agent: usize,
        /// What.
        report: Report,
    },
    /// An agent is gone.
    Lost {
        /// Its place in the list of agents.
        agent: usize,
        /// What the system said.
        reason: String,
    },
    /// A process answers its /health with 200.
    Healthy(SlotId),
    /// A pause before an instance's restart is over.
    RestartDue {
        /// Its place in the list of instances.
        instance: usize,
    },
    /// The time that the rest of a broken instance had to end by itself is over.
    GraceOver(SlotId),
    /// The time that the caller waits for is over.
    Deadline,
}

/// What went over the connections, for start-up's account.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) connections: AtomicU64,
    pub(crate) received: AtomicU64,
    pub(crate) sent: AtomicU64,
}

/// One agent, as the coordinator reaches it.
#[derive(Debug)]
pub(crate) struct Link {
    orders: mpsc::Sender<Order>,
    /// Sends the orders out; without one they are taken where they are given.
    writer: Option<JoinHandle<()>>,
    reader: JoinHandle<()>,
    pub(crate) hello: AgentHello,
    /// Where others reach processes of this agent.
    pub(crate) address: IpAddr,
}

impl Link {
    /// The agent that lives in the coordinator's own process.
    pub(crate) fn own(
        hello: AgentHello,
        orders: mpsc::Sender<Order>,
        mut reports: mpsc::Receiver<Report>,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let forward = async move {
            while let Some(report) = reports.recv().await {
                if events.send(Event::Told { agent: 0, report }).await.is_err() {
                    return;
                }
            }
        };
        Self {
            orders,
            writer: None,
            reader: tokio::spawn(forward),
            hello,
            address: IpAddr::from([127, 0, 0, 1]),
        }
    }

    /// An agent behind a connection.
    pub(crate) fn remote(
        (agent, hello): (usize, AgentHello),
        channel: Channel,
        events: mpsc::Sender<Event>,
        traffic: Arc<Traffic>,
        peer_timeout: Duration,
    ) -> Self {
        let (orders, waiting) = mpsc::channel(ORDERS_MAX);
        let address = channel.peer.ip();
        let reading = read(
            agent,
            channel.incoming,
            events,
            Arc::clone(&traffic),
            peer_timeout,
        );
        let writing = write(channel.outgoing, waiting, traffic, peer_timeout);
        Self {
            orders,
            writer: Some(tokio::spawn(writing)),
            reader: tokio::spawn(reading),
            hello,
            address,
        }
    }

    /// Hands an order over. One that an agent cannot take any more is dropped: its loss is reported by its reader.
    pub(crate) fn order(&self, order: Order) {
        if let Err(error) = self.orders.try_send(order) {
            tracing::debug!(rank = self.hello.rank, %error, "an order found no agent");
        }
    }

    /// Lets the last orders go out.
    pub(crate) async fn close(self, grace: Duration) {
        drop(self.orders);
        if let Some(writer) = self.writer {
            let _ = timeout(grace, writer).await;
        }
        self.reader.abort();
    }
}

async fn read(
    agent: usize,
    mut incoming: Incoming,
    events: mpsc::Sender<Event>,
    traffic: Arc<Traffic>,
    peer_timeout: Duration,
) {
    let reason = loop {
        let report = match timeout(peer_timeout, incoming.next::<Report>()).await {
            Ok(Ok(report)) => report,
            Ok(Err(error)) => break error.to_string(),
            Err(_) => break format!("silent for {} s", peer_timeout.as_secs()),
        };
        traffic.received.fetch_add(1, Ordering::Relaxed);
        if report != Report::Alive && events.send(Event::Told { agent, report }).await.is_err() {
            return;
        }
    };
    // Without a coordinator nobody needs the news.
    let _ = events.send(Event::Lost { agent, reason }).await;
}

async fn write(
    mut outgoing: Outgoing,
    mut orders: mpsc::Receiver<Order>,
    traffic: Arc<Traffic>,
    peer_timeout: Duration,
) {
    loop {
        let order = match timeout(sign_of_life(peer_timeout), orders.recv()).await {
            Ok(Some(order)) => order,
            Ok(None) => return,
            Err(_) => Order::Alive,
        };
        // The reader of the same connection reports its end.
        if outgoing.send(&order, peer_timeout).await.is_err() {
            return;
        }
        traffic.sent.fetch_add(1, Ordering::Relaxed);
    }
}

/// How often a side with nothing to say speaks.
pub(crate) fn sign_of_life(peer_timeout: Duration) -> Duration {
    peer_timeout / 4
}

/// Proves callers until the listener's task is aborted.
pub(crate) fn listen(
    listener: TcpListener,
    secret: Secret,
    world: String,
    events: mpsc::Sender<Event>,
    traffic: Arc<Traffic>,
) -> JoinHandle<()> {
    let free = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    tokio::spawn(async move {
        loop {
            let Ok(permit) = Arc::clone(&free).acquire_owned().await else {
                return;
            };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, or the caller was gone already; both pass.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (secret, world, events) = (secret.clone(), world.clone(), events.clone());
            let traffic = Arc::clone(&traffic);
            tokio::spawn(async move {
                prove(stream, &secret, &world, &events, &traffic).await;
                drop(permit);
            });
        }
    })
}

async fn prove(
    stream: tokio::net::TcpStream,
    secret: &Secret,
    world: &str,
    events: &mpsc::Sender<Event>,
    traffic: &Traffic,
) {
    let peer = stream
        .peer_addr()
        .map_or_else(|_| "?".to_owned(), |peer| peer.to_string());
    match channel::accept(stream, secret, world).await {
        Ok(caller) => {
            traffic.connections.fetch_add(1, Ordering::Relaxed);
            // Without a coordinator the caller sees a closed connection.
            let _ = events.send(Event::Came(Box::new(caller))).await;
        }
        Err(ChannelError::Closed) => tracing::debug!(peer, "a connection was closed unused"),
        Err(error) => tracing::warn!(peer, %error, "turned a connection away"),
    }
}

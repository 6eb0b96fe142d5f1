//! A world of ranks: what one srun or mpirun has started, or what `baton serve --tp_size N` starts by itself.
//!
//! Each task of the world is an [`agent`] that starts and stops processes; rank 0's is the [`coordinator`] too, which
//! decides. Ranks find rank 0 as [`bootstrap`] says, prove the job's secret ([`channel`]) and keep one connection.
//! Invariant: an agent's processes end with it, and an agent ends with its coordinator; so nothing is left anywhere.
//! Absent: MPI. A world needs none; engines that want it open it themselves.

pub(crate) mod agent;
pub(crate) mod bootstrap;
mod channel;
pub(crate) mod coordinator;
pub(crate) mod instance;
mod links;
pub(crate) mod membership;
pub(crate) mod plan;
pub(crate) mod protocol;

use std::time::Duration;

use anyhow::anyhow;
use baton_engine::secret::Secret;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use self::agent::{Agent, Leave};
use self::channel::Channel;
use self::coordinator::{Coordinator, Verdict, WorldSpec};
use self::protocol::{AgentHello, Hello, Order, Report};
use crate::exit::{Outcome, WithOutcome, coded};
use crate::signals::EndSignals;

/// Orders and reports that wait between an agent and its connection.
const MESSAGES_MAX: usize = 256;

/// This process's own place in the world.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) hello: AgentHello,
    /// For all processes that it starts.
    pub(crate) environment: Vec<(String, String)>,
}

/// Runs rank 0 of a world to its end.
///
/// # Errors
/// Why the world could not go on.
pub(crate) async fn lead(
    spec: WorldSpec,
    listener: TcpListener,
    own: Own,
) -> anyhow::Result<Outcome> {
    let (orders, received) = mpsc::channel(MESSAGES_MAX);
    let (reports, told) = mpsc::channel(MESSAGES_MAX);
    let mut signals = EndSignals::new(EndSignals::ALL).outcome(Outcome::Unavailable)?;
    let agent = Agent::new(reports, own.environment);
    let coordinator =
        Coordinator::new(spec, listener, (own.hello, orders, told)).outcome(Outcome::Address)?;
    let (_, verdict) = tokio::join!(agent.run(received, &mut signals), coordinator.run());
    let code = verdict.code();
    match verdict {
        Verdict::Command { cause: None, .. } => Ok(Outcome::Code(code)),
        Verdict::Command {
            cause: Some(cause), ..
        } => Err(coded(Outcome::Code(code), anyhow!(cause))),
        Verdict::Asked(_) => {
            tracing::info!("all processes ended");
            Ok(Outcome::Code(code))
        }
        Verdict::Killed(_) => Err(coded(
            Outcome::Code(code),
            anyhow!("some processes had to be killed"),
        )),
        Verdict::Broken { outcome, cause } => Err(coded(outcome, anyhow!(cause))),
    }
}

/// Sends the other ranks away when rank 0 cannot even begin.
pub(crate) async fn dismiss(
    spec: WorldSpec,
    listener: TcpListener,
    hello: AgentHello,
    outcome: Outcome,
) {
    let (orders, _received) = mpsc::channel(MESSAGES_MAX);
    let (_reports, told) = mpsc::channel(MESSAGES_MAX);
    if let Ok(coordinator) = Coordinator::new(spec, listener, (hello, orders, told)) {
        coordinator.dismiss(outcome).await;
    }
}

/// What a rank other than 0 needs to find its coordinator.
#[derive(Debug)]
pub(crate) struct Way {
    /// Where rank 0 may be.
    pub(crate) addresses: Vec<String>,
    /// The job's secret.
    pub(crate) secret: Secret,
    /// The world's name.
    pub(crate) world: String,
    /// Until when it is looked for.
    pub(crate) deadline: Instant,
    /// How long it may be silent.
    pub(crate) peer_timeout: Duration,
}

/// Runs another rank of a world to its end.
///
/// # Errors
/// When rank 0 is not found, turns this rank away, or is lost.
pub(crate) async fn join(way: Way, own: Own) -> anyhow::Result<Outcome> {
    let mut signals = EndSignals::new(EndSignals::ALL).outcome(Outcome::Unavailable)?;
    let rank = own.hello.rank;
    let hello = Hello::Agent(own.hello);
    let reached = bootstrap::reach(
        &way.addresses,
        (&way.secret, &way.world),
        &hello,
        way.deadline,
    );
    let channel = tokio::select! {
        channel = reached => channel?,
        signal = signals.next() => return Ok(Outcome::Signal(signal as i32)),
    };
    let peer = channel.peer;
    let (reports, waiting) = mpsc::channel(MESSAGES_MAX);
    let (given, orders) = mpsc::channel(MESSAGES_MAX);
    let pump = tokio::spawn(pump(channel, given, waiting, way.peer_timeout));
    let leave = Agent::new(reports, own.environment)
        .run(orders, &mut signals)
        .await;
    let lost = pump.await.unwrap_or_default();
    match leave {
        Leave::Told(code) => Ok(Outcome::Code(code)),
        Leave::Abandoned => Err(anyhow!(
            "rank {rank} lost rank 0 at {peer}: {lost}\nhint: rank 0's last lines, or its machine, say why"
        )),
    }
}

/// Moves orders in and reports out until either side ends; returns why the connection ended, if it did.
async fn pump(
    channel: Channel,
    orders: mpsc::Sender<Order>,
    mut reports: mpsc::Receiver<Report>,
    peer_timeout: Duration,
) -> String {
    let Channel {
        mut incoming,
        mut outgoing,
        ..
    } = channel;
    let reading = async {
        loop {
            match timeout(peer_timeout, incoming.next::<Order>()).await {
                Ok(Ok(order)) => {
                    let last = matches!(order, Order::Leave { .. });
                    if orders.send(order).await.is_err() || last {
                        return String::new();
                    }
                }
                Ok(Err(error)) => return error.to_string(),
                Err(_) => return format!("silent for {} s", peer_timeout.as_secs()),
            }
        }
    };
    let writing = async {
        loop {
            let report = match timeout(links::sign_of_life(peer_timeout), reports.recv()).await {
                Ok(Some(report)) => report,
                Ok(None) => return String::new(),
                Err(_) => Report::Alive,
            };
            if let Err(error) = outgoing.send(&report, peer_timeout).await {
                return error.to_string();
            }
        }
    };
    tokio::select! {
        end = reading => end,
        end = writing => end,
    }
}

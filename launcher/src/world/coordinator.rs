//! Rank 0's decisions: gather the agents, start the instances, call followers for their leaders, start broken instances
//! again, drain, and end. One closed set of events (`links.rs`), one loop.
//!
//! States of a world: gathering → running → draining → left. States of an instance: `instance.rs`.
//! Invariant: every way out goes through [`Coordinator::leave`], which tells every agent to end.

mod end;
mod run;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_engine::ranks::Fabric;
use baton_engine::secret::Secret;
use nix::sys::signal::Signal;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::channel::Caller;
use super::instance::{Instance, InstanceSpec};
use super::links::{self, Event, Link, Traffic};
use super::protocol::{AgentHello, Answer, End, Hello, Order, Report, VERSION};
use crate::exit::Outcome;
use crate::marks::Marks;

/// How long a refused or answered caller may take to read why.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Events that wait for the loop; senders wait beyond.
pub(crate) const EVENTS_MAX: usize = 1024;

/// What a world is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    /// One command; its end is the world's, with its exit code.
    Command,
    /// Instances that are kept up.
    Deployment,
}

/// What the coordinator is told once.
#[derive(Debug)]
pub(crate) struct WorldSpec {
    /// Names job and step; both sides of every connection must have the same.
    pub(crate) name: String,
    /// Ranks in the world.
    pub(crate) size: u32,
    /// All ranks live in the coordinator's own process tree.
    pub(crate) local: bool,
    /// For a local world: each rank's environment (devices).
    pub(crate) local_environment: Vec<Vec<(String, String)>>,
    /// Where others reach a rank that has been reached over the loopback only.
    pub(crate) public: IpAddr,
    /// The job's secret.
    pub(crate) secret: Secret,
    /// The host of each rank, as far as the starter told it.
    pub(crate) hosts: Vec<Option<String>>,
    pub(crate) policy: Policy,
    pub(crate) instances: Vec<InstanceSpec>,
    /// Makes the proxy's process once all addresses are known, if there is a proxy.
    pub(crate) proxy: Option<ProxySpec>,
    pub(crate) fabric: Fabric,
    pub(crate) timeouts: Timeouts,
    pub(crate) restarts_max: u32,
    /// One log file a process goes here.
    pub(crate) log_dir: Option<PathBuf>,
    /// `<label>.addr` of each instance and of the proxy goes here.
    pub(crate) address_dir: Option<PathBuf>,
    /// Gets the proxy's address once the deployment can serve.
    pub(crate) ready_file: Option<PathBuf>,
}

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    /// Until all ranks are there, and until a started instance can serve.
    pub(crate) start: Duration,
    /// How long a rank may be silent.
    pub(crate) peer: Duration,
    /// How long running requests may take once the end was asked for.
    pub(crate) drain: Duration,
}

type StartProxy = Box<dyn Fn(&[String]) -> anyhow::Result<ProxyStart> + Send>;

/// The proxy of a world.
pub(crate) struct ProxySpec {
    /// Its command line, and the text of its config for instances at these addresses (in the order of the instances).
    pub(crate) start: StartProxy,
}

impl std::fmt::Debug for ProxySpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ProxySpec")
    }
}

/// What the proxy's process gets.
#[derive(Debug, Clone)]
pub(crate) struct ProxyStart {
    pub(crate) arguments: Vec<String>,
    pub(crate) files: Vec<(String, String)>,
}

/// How a world ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// As the command ended.
    Command {
        end: End,
        /// What went wrong before it did, with the last lines of who failed.
        cause: Option<String>,
    },
    /// Asked by a signal; everything drained.
    Asked(i32),
    /// Asked by a signal; something had to be killed.
    Killed(i32),
    /// It cannot go on.
    Broken {
        outcome: Outcome,
        /// The last line, with its hint.
        cause: String,
    },
}

impl Verdict {
    /// The exit code of every rank's launcher.
    pub(crate) fn code(&self) -> u8 {
        match self {
            // A command that had to be killed because of a rank has not ended by that signal of its own.
            Self::Command {
                end: End::Signal(_) | End::Unknown | End::Code(0),
                cause: Some(_),
            } => Outcome::Failure.code(),
            Self::Command { end, .. } => end.shell_code(),
            // A drain before the wall time is what was planned, not a failure.
            Self::Asked(signal) if *signal == Signal::SIGUSR1 as i32 => 0,
            Self::Asked(signal) | Self::Killed(signal) => Outcome::Signal(*signal).code(),
            Self::Broken { outcome, .. } => outcome.code(),
        }
    }
}

/// Rank 0's decisions, and what they rest on.
#[derive(Debug)]
pub(crate) struct Coordinator {
    spec: WorldSpec,
    /// By rank; in a local world the only one is 0.
    agents: BTreeMap<usize, Link>,
    /// The instances, and the proxy behind them as one more of one rank.
    instances: Vec<Instance>,
    sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    traffic: Arc<Traffic>,
    acceptor: JoinHandle<()>,
    /// Where this process listens.
    port: u16,
    /// Whether it was said that the deployment can serve.
    announced: bool,
    /// What went wrong first, with the last lines of who failed.
    first_cause: Option<String>,
    begun: Instant,
}

impl Coordinator {
    /// Listens for the other ranks. `own` is this process's agent.
    pub(crate) fn new(
        spec: WorldSpec,
        listener: TcpListener,
        own: (AgentHello, mpsc::Sender<Order>, mpsc::Receiver<Report>),
    ) -> std::io::Result<Self> {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let traffic = Arc::new(Traffic::default());
        let port = listener.local_addr()?.port();
        let acceptor = links::listen(
            listener,
            spec.secret.clone(),
            spec.name.clone(),
            sender.clone(),
            Arc::clone(&traffic),
        );
        let (hello, orders, reports) = own;
        let link = Link::own(hello, orders, reports, sender.clone());
        let proxy = spec.proxy.as_ref().map(|_| InstanceSpec::proxy());
        let specs = spec.instances.iter().cloned().chain(proxy);
        Ok(Self {
            instances: specs.map(Instance::new).collect(),
            spec,
            agents: BTreeMap::from([(0, link)]),
            sender,
            events,
            traffic,
            acceptor,
            port,
            announced: false,
            first_cause: None,
            begun: Instant::now(),
        })
    }

    /// Runs the world to its end. Every agent has been told to leave when this returns.
    pub(crate) async fn run(mut self) -> Verdict {
        let verdict = match self.gather().await {
            Ok(()) => self.serve().await,
            Err(verdict) => verdict,
        };
        self.leave(&verdict).await;
        verdict
    }

    async fn next(&mut self, deadline: Option<Instant>) -> Event {
        let Some(deadline) = deadline else {
            // The coordinator holds a sender itself, so the channel never closes.
            return self.events.recv().await.unwrap_or(Event::Deadline);
        };
        match timeout_at(deadline, self.events.recv()).await {
            Ok(Some(event)) => event,
            Ok(None) | Err(_) => Event::Deadline,
        }
    }

    // === gathering ===

    fn agents_wanted(&self) -> usize {
        if self.spec.local {
            1
        } else {
            self.spec.size as usize
        }
    }

    async fn gather(&mut self) -> Result<(), Verdict> {
        let end = self.begun + self.spec.timeouts.start;
        let mut marks = Marks::default();
        let mut mark = self.begun + marks.advance();
        while self.agents.len() < self.agents_wanted() {
            match self.next(Some(mark.min(end))).await {
                Event::Came(caller) => self.came(*caller).await,
                Event::Lost { agent, reason } => return Err(self.lost_early(agent, &reason)),
                Event::Told {
                    report: Report::Asked { signal },
                    ..
                } => {
                    return Err(Verdict::Asked(signal));
                }
                Event::Deadline if Instant::now() >= end => return Err(self.never_came()),
                Event::Deadline => {
                    tracing::warn!(
                        waited_s = self.begun.elapsed().as_secs(),
                        here = self.agents.len(),
                        size = self.spec.size,
                        missing = self.missing(),
                        "waiting for ranks"
                    );
                    mark = self.begun + marks.advance();
                }
                Event::Told { .. }
                | Event::Healthy(_)
                | Event::RestartDue { .. }
                | Event::GraceOver(_) => {}
            }
        }
        tracing::info!(
            ranks = self.spec.size,
            connections = self.traffic.connections.load(Ordering::Relaxed),
            messages_received = self.traffic.received.load(Ordering::Relaxed),
            messages_sent = self.traffic.sent.load(Ordering::Relaxed),
            elapsed_ms = self.begun.elapsed().as_millis(),
            "all ranks are here"
        );
        Ok(())
    }

    /// The ranks that have not come, with their hosts, shortened.
    fn missing(&self) -> String {
        const SHOWN_MAX: usize = 16;
        let missing: Vec<usize> = (0..self.spec.size as usize)
            .filter(|rank| !self.agents.contains_key(rank))
            .collect();
        let mut shown: Vec<String> = missing
            .iter()
            .take(SHOWN_MAX)
            .map(|rank| self.rank_name(*rank))
            .collect();
        if missing.len() > SHOWN_MAX {
            shown.push(format!("{} more", missing.len() - SHOWN_MAX));
        }
        shown.join(", ")
    }

    /// `rank 3 (node2)`.
    fn rank_name(&self, rank: usize) -> String {
        let come = self.agents.get(&rank).map(|link| link.hello.host.clone());
        match come.or_else(|| self.spec.hosts.get(rank).cloned().flatten()) {
            Some(host) => format!("rank {rank} ({host})"),
            None => format!("rank {rank}"),
        }
    }

    fn never_came(&self) -> Verdict {
        Verdict::Broken {
            outcome: Outcome::TimedOut,
            cause: format!(
                "{} of {} ranks came within {} s; missing: {}\nhint: look for the missing ranks' own last lines; if fewer tasks run than the starter said, check -n/--ntasks (SLURM_NTASKS) and that every task runs this command",
                self.agents.len(),
                self.spec.size,
                self.spec.timeouts.start.as_secs(),
                self.missing()
            ),
        }
    }

    fn lost_early(&self, agent: usize, reason: &str) -> Verdict {
        Verdict::Broken {
            outcome: Outcome::Failure,
            cause: format!(
                "{} left before all ranks were there: {reason}\nhint: its own last lines say why",
                self.rank_name(agent)
            ),
        }
    }

    /// Somebody who knows the secret: an agent, or a leader that calls for its followers.
    async fn came(&mut self, caller: Caller) {
        match caller.hello.clone() {
            Hello::Agent(hello) => self.agent_came(hello, caller).await,
            Hello::Leader {
                instance,
                epoch,
                call,
            } => {
                let refusal = self.call(&instance, epoch, &call).err();
                if let Some(reason) = &refusal {
                    tracing::error!(instance, reason, "a leader gets no followers");
                }
                answer(caller, refusal).await;
            }
        }
    }

    async fn agent_came(&mut self, hello: AgentHello, caller: Caller) {
        let rank = hello.rank as usize;
        let refusal = if hello.version != VERSION {
            Some(format!(
                "rank {rank} speaks version {} of the ranks' protocol, rank 0 version {VERSION}; run the same baton on every node",
                hello.version
            ))
        } else if hello.size != self.spec.size {
            Some(format!(
                "rank {rank} was told that the world has {} ranks, rank 0 that it has {}; is SLURM_NTASKS set by hand?",
                hello.size, self.spec.size
            ))
        } else {
            self.agents.get(&rank).map(|link| {
                format!(
                    "rank {rank} is here already: process {} on {}; two tasks claim one rank",
                    link.hello.pid, link.hello.host
                )
            })
        };
        if let Some(reason) = refusal {
            tracing::warn!(host = hello.host, pid = hello.pid, %reason, "turned a rank away");
            caller.refuse(&reason).await;
            return;
        }
        let local = caller.local();
        match caller.welcome().await {
            Ok(channel) => {
                self.learn_own_address(local);
                let link = Link::remote(
                    (rank, hello),
                    channel,
                    self.sender.clone(),
                    Arc::clone(&self.traffic),
                    self.spec.timeouts.peer,
                );
                // The handshake: a greeting and a verdict out, an introduction in.
                self.traffic.sent.fetch_add(2, Ordering::Relaxed);
                self.traffic.received.fetch_add(1, Ordering::Relaxed);
                self.agents.insert(rank, link);
            }
            Err(error) => tracing::warn!(rank, %error, "a rank left while it was welcomed"),
        }
    }

    /// The address by which others reach this process is the one by which others have reached it.
    fn learn_own_address(&mut self, local: SocketAddr) {
        if let Some(own) = self.agents.get_mut(&0)
            && own.address.is_loopback()
            && !local.ip().is_loopback()
        {
            own.address = local.ip();
        }
    }
}

async fn answer(caller: Caller, refusal: Option<String>) {
    let sent = match caller.welcome().await {
        Ok(mut channel) => {
            let answer = Answer { refusal };
            channel.outgoing.send(&answer, ANSWER_TIMEOUT).await
        }
        Err(error) => Err(error),
    };
    if let Err(error) = sent {
        tracing::warn!(%error, "a leader left before it was answered");
    }
}

#[cfg(test)]
mod tests;

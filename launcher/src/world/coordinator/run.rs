//! The running world: instances are started, called for, broken and started again; the proxy comes once all addresses
//! are known.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context;
use baton_engine::ranks::{Fabric, FollowerSpec, RankCall};
use nix::sys::signal::Signal;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{Coordinator, Policy, Verdict};
use crate::exit::Outcome;
use crate::files;
use crate::http::HttpClient;
use crate::supervisor::restart_pause;
use crate::world::instance::{Instance, InstanceSpec, PROXY, Step};
use crate::world::links::{Event, Link};
use crate::world::membership::{COMMAND, Membership, identity, wrong_size};
use crate::world::protocol::{End, Order, Program, Report, SlotId, Start, Streams};

/// How long the others of a broken instance may take to end by themselves.
///
/// One that computes sees the loss at once and tells its clients; one that idles has nobody to tell.
const BROKEN_GRACE: Duration = Duration::from_secs(1);
const HEALTH_POLL: Duration = Duration::from_millis(50);
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);

impl Coordinator {
    pub(super) async fn serve(&mut self) -> Verdict {
        let deadline = Instant::now() + self.spec.timeouts.start;
        for index in 0..self.instances.len() {
            if self.instances[index].spec.label != PROXY {
                self.start_instance(index);
            }
        }
        loop {
            if let Err(error) = self.advance() {
                return Verdict::Broken {
                    outcome: crate::exit::of(&error),
                    cause: format!("{error:#}"),
                };
            }
            let waiting = self.spec.policy == Policy::Deployment && !self.announced;
            let event = self.next(waiting.then_some(deadline)).await;
            if let Some(verdict) = self.handle(event).await {
                return verdict;
            }
        }
    }

    /// Acts on an event; a verdict ends the world.
    async fn handle(&mut self, event: Event) -> Option<Verdict> {
        match event {
            Event::Came(caller) => self.came(*caller).await,
            Event::Told { agent, report } => return self.told(agent, report).await,
            Event::Lost { agent, reason } => return self.lost(agent, &reason),
            Event::Healthy(slot) => self.healthy(&slot),
            Event::RestartDue { instance } => {
                if self.instances[instance].is_pausing() {
                    self.start_instance(instance);
                }
            }
            Event::GraceOver(slot) => self.kill(&slot),
            Event::Deadline => return Some(self.not_ready()),
        }
        None
    }

    async fn told(&mut self, agent: usize, report: Report) -> Option<Verdict> {
        match report {
            Report::Alive => None,
            Report::Bound { slot, address } => {
                self.bound(&slot, &address);
                None
            }
            Report::NotStarted { slot, reason } => {
                let cause = format!("{}: {reason}", self.process_name(agent, &slot));
                Some(Verdict::Broken {
                    outcome: Outcome::Unavailable,
                    cause,
                })
            }
            Report::Ended { slot, end, tail } => self.ended(agent, &slot, end, &tail),
            Report::Asked { signal } => Some(self.drain(agent, signal).await),
        }
    }

    /// What follows from the state of all instances: the proxy can be started, the deployment can serve.
    fn advance(&mut self) -> anyhow::Result<()> {
        if self.spec.policy == Policy::Command || self.announced {
            return Ok(());
        }
        let is_proxy = |instance: &&Instance| instance.spec.label == PROXY;
        let servers = || self.instances.iter().filter(|instance| !is_proxy(instance));
        let addresses: Vec<String> = servers()
            .filter_map(Instance::address)
            .map(str::to_owned)
            .collect();
        let all_known = addresses.len() == servers().count();
        if let Some(index) = self
            .instances
            .iter()
            .position(|instance| is_proxy(&instance))
            && self.instances[index].is_waiting()
            && all_known
        {
            self.prepare_proxy(index, &addresses)?;
            self.start_instance(index);
        }
        if self.instances.iter().all(Instance::is_serving) {
            self.announce()?;
        }
        Ok(())
    }

    fn prepare_proxy(&mut self, index: usize, addresses: &[String]) -> anyhow::Result<()> {
        let make = self.spec.proxy.as_ref().map(|proxy| &proxy.start);
        let start = make.map(|make| make(addresses)).transpose()?;
        if let Some(start) = start {
            let spec = &mut self.instances[index].spec;
            spec.arguments = start.arguments;
            spec.files = start.files;
        }
        Ok(())
    }

    fn announce(&mut self) -> anyhow::Result<()> {
        self.announced = true;
        let front = self
            .instances
            .iter()
            .find(|instance| instance.spec.label == PROXY)
            .or_else(|| self.instances.first());
        let address = front
            .and_then(Instance::address)
            .unwrap_or_default()
            .to_owned();
        tracing::info!(
            elapsed_ms = self.begun.elapsed().as_millis(),
            url = format!("http://{address}"),
            "ready"
        );
        if let Some(file) = &self.spec.ready_file {
            files::write(file, &format!("{address}\n"))?;
        }
        writeln!(
            std::io::stdout(),
            "ready: OpenAI API at http://{address}/v1"
        )
        .context("cannot write to stdout")
    }

    fn not_ready(&self) -> Verdict {
        let waiting: Vec<String> = self
            .instances
            .iter()
            .filter(|instance| !instance.is_serving())
            .map(|instance| instance.spec.label.clone())
            .collect();
        Verdict::Broken {
            outcome: Outcome::TimedOut,
            cause: format!(
                "not ready within {} s; still waiting for {}\nhint: their lines above say what they do; a longer wait is --server-start-timeout",
                self.spec.timeouts.start.as_secs(),
                waiting.join(", ")
            ),
        }
    }

    // === starting ===

    pub(super) fn instance_mut(&mut self, slot: &SlotId) -> Option<&mut Instance> {
        self.instances.iter_mut().find(|instance| instance.is(slot))
    }

    /// The agent that runs a rank of an instance.
    pub(super) fn agent_of(&self, spec: &InstanceSpec, rank: u32) -> usize {
        if self.spec.local {
            0
        } else {
            (spec.first + rank) as usize
        }
    }

    /// The rank of an instance that an agent runs. The proxy is rank 0's own, which is never lost.
    pub(super) fn rank_on(&self, spec: &InstanceSpec, agent: usize) -> Option<u32> {
        (0..spec.ranks).find(|rank| self.agent_of(spec, *rank) == agent)
    }

    fn address_of_agent(&self, agent: usize) -> IpAddr {
        // All ranks of a world on one host meet over the loopback; its servers' clients may be elsewhere.
        let met = self.agents.get(&agent).map(|link| link.address);
        met.filter(|address| !address.is_loopback())
            .unwrap_or(self.spec.public)
    }

    fn host_names(&self, spec: &InstanceSpec) -> Vec<String> {
        (0..spec.ranks)
            .filter_map(|rank| self.agents.get(&self.agent_of(spec, rank)))
            .map(|link| link.hello.host.clone())
            .collect()
    }

    /// Devices and the role's own variables. A command that is not ours keeps its environment as it is.
    fn environment(&self, spec: &InstanceSpec, rank: u32, link: &Link) -> Vec<(String, String)> {
        let devices = if spec.label == COMMAND && rank == 0 {
            None
        } else if self.spec.local {
            self.spec.local_environment.get(rank as usize).cloned()
        } else {
            Some(link.hello.environment.clone())
        };
        let mut environment = devices.unwrap_or_default();
        environment.extend(spec.environment.iter().cloned());
        environment
    }

    fn start_instance(&mut self, index: usize) {
        let slot = self.instances[index].begin();
        let instance = &self.instances[index];
        let spec = &instance.spec;
        let agent = self.agent_of(spec, 0);
        let Some(link) = self.agents.get(&agent) else {
            tracing::error!(
                instance = spec.label,
                agent,
                "an instance's first rank is gone"
            );
            return;
        };
        let host = self.address_of_agent(agent);
        let mut environment = self.environment(spec, 0, link);
        let mut arguments = spec.arguments.clone();
        environment.extend(self.membership(spec, &slot, link).variables());
        if spec.label == PROXY {
            arguments.extend(proxy_port(instance));
        } else if spec.is_server {
            let port = instance.port().to_string();
            arguments.extend([
                "--host".to_owned(),
                host.to_string(),
                "--port".to_owned(),
                port,
            ]);
        }
        tracing::info!(
            instance = spec.label,
            epoch = slot.epoch,
            ranks = spec.ranks,
            "starting"
        );
        let start = Start {
            slot,
            program: spec.program.clone(),
            arguments,
            environment,
            files: spec.files.clone(),
            input: None,
            reports_address: spec.is_server,
            streams: spec.streams,
            log_dir: self.log_dir(),
        };
        link.order(Order::Start(Box::new(start)));
    }

    fn membership(&self, spec: &InstanceSpec, slot: &SlotId, link: &Link) -> Membership {
        let agent = self.agent_of(spec, 0);
        // Where all ranks are on one host, the coordinator listens there only.
        let reached = self.agents.get(&0).map(|own| own.address);
        let coordinator = reached
            .filter(|_| agent != 0)
            .unwrap_or(IpAddr::from([127, 0, 0, 1]));
        Membership {
            address: SocketAddr::new(coordinator, self.port).to_string(),
            secret: self.spec.secret.to_hex(),
            world: self.spec.name.clone(),
            instance: spec.label.clone(),
            epoch: slot.epoch,
            ranks: spec.ranks,
            host: self.address_of_agent(agent).to_string(),
            hosts: self.host_names(spec),
            join_timeout_ms: millis(self.spec.timeouts.start),
            peer_timeout_ms: millis(self.spec.timeouts.peer),
            fabric: self.spec.fabric,
            num_threads: link.hello.num_threads,
        }
    }

    fn log_dir(&self) -> Option<String> {
        let folder = self.spec.log_dir.as_ref();
        folder.map(|folder| folder.to_string_lossy().into_owned())
    }

    /// A leader's call for its followers.
    pub(super) fn call(&mut self, label: &str, epoch: u32, call: &RankCall) -> Result<(), String> {
        let found = self
            .instances
            .iter()
            .position(|instance| instance.spec.label == label);
        let index = found.ok_or_else(|| format!("there is no instance {label} in this world"))?;
        let spec = self.instances[index].spec.clone();
        if call.size != spec.ranks as usize {
            let has = format!("{} has {} ranks in this world", spec.label, spec.ranks);
            let sizes = [call.tensor_parallel, call.pipeline_parallel];
            return Err(wrong_size(&has, sizes));
        }
        self.instances[index].called(epoch)?;
        for rank in 1..spec.ranks {
            let agent = self.agent_of(&spec, rank);
            let Some(link) = self.agents.get(&agent) else {
                return Err(format!("{} is gone", self.rank_name(agent)));
            };
            let start = self.follower(&spec, (rank, epoch), link, call);
            link.order(Order::Start(Box::new(start)));
            self.instances[index].follower_started(rank);
        }
        Ok(())
    }

    fn follower(
        &self,
        spec: &InstanceSpec,
        (rank, epoch): (u32, u32),
        link: &Link,
        call: &RankCall,
    ) -> Start {
        let follower = FollowerSpec {
            rank: rank as usize,
            size: call.size,
            leader: call.leader.clone(),
            identity: identity(&self.spec.name, &spec.label, epoch),
            secret: self.spec.secret.to_hex(),
            host: self.address_of_agent(self.agent_of(spec, rank)).to_string(),
            hosts: self.host_names(spec),
            join_timeout_ms: millis(self.spec.timeouts.start),
            peer_timeout_ms: millis(self.spec.timeouts.peer),
            fabric: self.spec.fabric,
            num_threads: Some(link.hello.num_threads),
        };
        Start {
            slot: SlotId {
                instance: spec.label.clone(),
                rank,
                epoch,
            },
            program: Program::Baton,
            arguments: vec!["rank".to_owned()],
            environment: self.environment(spec, rank, link),
            files: Vec::new(),
            input: Some(serde_json::to_string(&follower).expect("strings and numbers are JSON")),
            reports_address: false,
            streams: Streams::Labelled,
            log_dir: self.log_dir(),
        }
    }

    fn bound(&mut self, slot: &SlotId, address: &str) {
        let (url, events, found) = (
            format!("http://{address}/health"),
            self.sender.clone(),
            slot.clone(),
        );
        let Some(instance) = self.instance_mut(slot) else {
            return;
        };
        let watch = tokio::spawn(async move {
            until_healthy(&url).await;
            // Without a coordinator nobody needs the news.
            let _ = events.send(Event::Healthy(found)).await;
        });
        instance.bound(address, watch);
        if let Some(folder) = &self.spec.address_dir {
            let file = folder.join(format!("{}.addr", slot.instance));
            let written = std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot make {}", folder.display()))
                .and_then(|()| files::write(&file, &format!("{address}\n")));
            if let Err(error) = written {
                tracing::error!(error = format!("{error:#}"), "an address is told to nobody");
            }
        }
    }

    fn healthy(&mut self, slot: &SlotId) {
        let Some(instance) = self.instance_mut(slot) else {
            return;
        };
        if let Some(took) = instance.healthy() {
            let again = slot.epoch > 1;
            tracing::info!(
                instance = slot.instance,
                epoch = slot.epoch,
                elapsed_ms = took.as_millis(),
                "{}",
                if again { "serves again" } else { "serves" }
            );
        }
    }

    // === breaking ===

    fn ended(&mut self, agent: usize, slot: &SlotId, end: End, tail: &[String]) -> Option<Verdict> {
        let mut cause = format!("{}: {end}", self.process_name(agent, slot));
        for line in tail {
            cause.push_str(&format!("\n    {line}"));
        }
        let index = self
            .instances
            .iter()
            .position(|instance| instance.is(slot))?;
        let step = self.instances[index].ended(slot.rank, end, cause);
        self.after(index, step)
    }

    /// `gen0.1 on rank 5 (node3)`.
    fn process_name(&self, agent: usize, slot: &SlotId) -> String {
        if self.spec.local {
            return slot.label();
        }
        format!("{} on {}", slot.label(), self.rank_name(agent))
    }

    fn lost(&mut self, agent: usize, reason: &str) -> Option<Verdict> {
        let name = self.rank_name(agent);
        tracing::error!(rank = name, reason, "a rank's launcher is lost");
        self.agents.remove(&agent);
        for index in 0..self.instances.len() {
            let Some(rank) = self.rank_on(&self.instances[index].spec, agent) else {
                continue;
            };
            let cause = format!(
                "{name} is lost: {reason}\nhint: look at that machine and its network; a longer patience is --peer-timeout"
            );
            let step = self.instances[index].lose(rank, cause);
            if let Some(verdict) = self.after(index, step) {
                return Some(verdict);
            }
        }
        None
    }

    /// Does what an instance's end asks for; a verdict ends the world.
    fn after(&mut self, index: usize, step: Step) -> Option<Verdict> {
        let instance = &self.instances[index];
        let label = instance.spec.label.clone();
        match step {
            Step::Nothing => None,
            Step::Grace => {
                if instance.is_dismissed() {
                    tracing::info!(instance = label, "its leader has let its ranks go");
                } else {
                    tracing::warn!(instance = label, "broken; its other ranks end");
                }
                if self.spec.policy == Policy::Command {
                    let follower_first = instance.leader_end().is_none();
                    self.first_cause = follower_first.then(|| instance.cause().to_owned());
                }
                let (slot, events) = (instance.slot(0), self.sender.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(BROKEN_GRACE).await;
                    // Without a coordinator nobody needs the news.
                    let _ = events.send(Event::GraceOver(slot)).await;
                });
                None
            }
            Step::Over if self.spec.policy == Policy::Command => Some(Verdict::Command {
                end: instance.leader_end().unwrap_or(End::Unknown),
                cause: self.first_cause.take(),
            }),
            Step::Over => self.broken(index),
        }
    }

    /// Nothing of an instance runs any more: it is started again, or the world ends.
    fn broken(&mut self, index: usize) -> Option<Verdict> {
        let instance = &mut self.instances[index];
        let label = instance.spec.label.clone();
        let outcome = match instance.leader_end() {
            Some(End::Code(code)) => files::outcome_of_code(code),
            _ => Outcome::Failure,
        };
        let broken = |cause: String| Some(Verdict::Broken { outcome, cause });
        if self.spec.fabric == Fabric::Mpi {
            return broken(instance.cause().to_owned());
        }
        match instance.plan_restart(self.spec.restarts_max) {
            Ok(attempt) => {
                let pause = restart_pause(attempt);
                tracing::warn!(
                    instance = label,
                    // Its last lines stand above.
                    cause = instance.cause().lines().next().unwrap_or_default(),
                    attempt,
                    pause_ms = pause.as_millis(),
                    "will be started again"
                );
                let events = self.sender.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(pause).await;
                    // Without a coordinator the world is over and so is the restart.
                    let _ = events.send(Event::RestartDue { instance: index }).await;
                });
                None
            }
            Err(why) => {
                let cause = format!("{}\n{label} is not started again: {why}", instance.cause());
                if self.can_do_without(index) {
                    tracing::error!(instance = label, cause, "gone for good; the others go on");
                    return None;
                }
                broken(cause)
            }
        }
    }

    /// Whether another instance of the same role is left. An instance's label begins with its role.
    fn can_do_without(&self, index: usize) -> bool {
        let role = |instance: &Instance| instance.spec.label[..3].to_owned();
        let gone = &self.instances[index];
        let others = |other: &&Instance| role(other) == role(gone) && !other.is_gone();
        self.announced && self.instances.iter().any(|other| others(&other))
    }

    /// Kills what is left of a slot's instance, if it is still the same epoch.
    fn kill(&self, slot: &SlotId) {
        if let Some(instance) = self.instances.iter().find(|instance| instance.is(slot)) {
            self.signal_instance(instance, Signal::SIGKILL);
        }
    }

    /// Sends a signal to all processes of an instance.
    pub(super) fn signal_instance(&self, instance: &Instance, signal: Signal) {
        for rank in instance.running() {
            self.signal_rank(instance, rank, signal);
        }
    }

    /// Sends a signal to one process of an instance.
    pub(super) fn signal_rank(&self, instance: &Instance, rank: u32, signal: Signal) {
        let agent = self.agent_of(&instance.spec, rank);
        if let Some(link) = self.agents.get(&agent) {
            link.order(Order::Signal {
                slot: instance.slot(rank),
                signal: signal as i32,
            });
        }
    }
}

/// A proxy that was bound once keeps its port.
fn proxy_port(instance: &Instance) -> Vec<String> {
    match instance.port() {
        0 => Vec::new(),
        port => vec!["--port".to_owned(), port.to_string()],
    }
}

/// Asks until the answer is 200; ends by being aborted with the process that it watches.
async fn until_healthy(url: &str) {
    let http = HttpClient::new(HEALTH_TIMEOUT);
    let mut poll = interval(HEALTH_POLL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        poll.tick().await;
        if let Ok((200, _)) = http.get(url, HEALTH_TIMEOUT).await {
            return;
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

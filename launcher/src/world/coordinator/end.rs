//! The world's end: drain in order, kill what does not end, and send every agent away.

use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Coordinator, Policy, Verdict};
use crate::exit::Outcome;
use crate::world::instance::{Instance, PROXY};
use crate::world::links::Event;
use crate::world::protocol::{End, Order, Report};

/// Between KILL and its effect, for followers that their leader has sent away, and for the last orders.
const KILL_GRACE: Duration = Duration::from_secs(5);
/// How long a world that cannot begin waits for its ranks, to send them away.
const DISMISS_TIMEOUT: Duration = Duration::from_secs(20);

impl Coordinator {
    /// Ends everything as a signal asks: the proxy first, which takes the requests, then the leaders, which send their
    /// followers away. What is left at the deadline, or when the same agent is asked once more, is killed.
    pub(super) async fn drain(&mut self, agent: usize, number: i32) -> Verdict {
        let deadline = Instant::now() + self.spec.timeouts.drain;
        let signal = Signal::try_from(number).unwrap_or(Signal::SIGTERM);
        tracing::info!(%signal, by = self.rank_name(agent), drain_s = self.spec.timeouts.drain.as_secs(), "draining");
        let asked = (agent, number);
        let command = self.spec.policy == Policy::Command;
        let mut gentle = if command {
            self.end_leaders(signal, |_| true, asked, deadline).await
        } else {
            let term = Signal::SIGTERM;
            let proxy = |label: &str| label == PROXY;
            self.end_leaders(term, proxy, asked, deadline).await
                && self
                    .end_leaders(term, |label| label != PROXY, asked, deadline)
                    .await
        };
        let farewell = if gentle {
            KILL_GRACE.min(self.spec.timeouts.drain)
        } else {
            Duration::ZERO
        };
        gentle &= self
            .wait(Instant::now() + farewell, asked, Instance::is_over)
            .await;
        if !gentle {
            self.kill_all(asked).await;
        }
        let end = self.instances.first().and_then(Instance::leader_end);
        match (command, gentle) {
            (true, _) => Verdict::Command {
                end: end.unwrap_or(End::Signal(number)),
                cause: None,
            },
            (false, true) => Verdict::Asked(number),
            (false, false) => Verdict::Killed(number),
        }
    }

    /// Signals the leaders of the chosen instances and waits for their ends.
    async fn end_leaders(
        &mut self,
        signal: Signal,
        chosen: impl Fn(&str) -> bool,
        asked: (usize, i32),
        deadline: Instant,
    ) -> bool {
        for instance in &self.instances {
            if chosen(&instance.spec.label) {
                self.signal_rank(instance, 0, signal);
            }
        }
        let leader_is_over = |instance: &Instance| {
            !chosen(&instance.spec.label) || instance.running().all(|rank| rank != 0)
        };
        self.wait(deadline, asked, leader_is_over).await
    }

    /// Waits until something holds of all instances; false at the deadline, or when the same agent is asked again.
    async fn wait(
        &mut self,
        deadline: Instant,
        asked: (usize, i32),
        holds: impl Fn(&Instance) -> bool,
    ) -> bool {
        while !self.instances.iter().all(&holds) {
            match self.next(Some(deadline)).await {
                Event::Told { agent, report } => match report {
                    Report::Ended { slot, end, .. } => self.note_end(&slot, end),
                    Report::Asked { signal } if (agent, signal) == asked => return false,
                    Report::Alive
                    | Report::Bound { .. }
                    | Report::NotStarted { .. }
                    | Report::Asked { .. } => {}
                },
                Event::Lost { agent, .. } => self.note_loss(agent),
                Event::Came(caller) => caller.refuse("the world is ending").await,
                Event::Deadline => return false,
                Event::Healthy(_) | Event::RestartDue { .. } | Event::GraceOver(_) => {}
            }
        }
        true
    }

    fn note_end(&mut self, slot: &crate::world::protocol::SlotId, end: End) {
        let rank = slot.rank;
        if let Some(instance) = self.instance_mut(slot) {
            instance.ended(rank, end, String::new());
        }
    }

    fn note_loss(&mut self, agent: usize) {
        self.agents.remove(&agent);
        for index in 0..self.instances.len() {
            if let Some(rank) = self.rank_on(&self.instances[index].spec, agent) {
                self.instances[index].lose(rank, String::new());
            }
        }
    }

    async fn kill_all(&mut self, asked: (usize, i32)) {
        let left: Vec<&str> = self
            .instances
            .iter()
            .filter(|instance| !instance.is_over())
            .map(|instance| instance.spec.label.as_str())
            .collect();
        tracing::warn!(
            instances = left.join(", "),
            "killing what has not ended yet"
        );
        for instance in &self.instances {
            self.signal_instance(instance, Signal::SIGKILL);
        }
        // An impatient third request changes nothing any more.
        let nobody = (usize::MAX, asked.1);
        if !self
            .wait(Instant::now() + KILL_GRACE, nobody, Instance::is_over)
            .await
        {
            tracing::error!("processes survive SIGKILL; their launchers go on without them");
        }
    }

    /// Gathers the ranks for no more than to send them away: rank 0 cannot begin.
    pub(crate) async fn dismiss(mut self, outcome: Outcome) {
        let deadline = Instant::now() + DISMISS_TIMEOUT.min(self.spec.timeouts.start);
        while self.agents.len() < self.agents_wanted() {
            match self.next(Some(deadline)).await {
                Event::Came(caller) => self.came(*caller).await,
                Event::Deadline => break,
                _ => {}
            }
        }
        let cause = String::new();
        self.leave(&Verdict::Broken { outcome, cause }).await;
    }

    /// Tells every agent to end, each with the world's exit code.
    pub(super) async fn leave(self, verdict: &Verdict) {
        self.acceptor.abort();
        let code = match verdict {
            // The command's code is its own rank's; the others did what they were asked.
            Verdict::Command { .. } => 0,
            other => other.code(),
        };
        for (rank, link) in &self.agents {
            let code = if *rank == 0 { verdict.code() } else { code };
            link.order(Order::Leave { code });
        }
        let mut closing: JoinSet<()> = self
            .agents
            .into_values()
            .map(|link| link.close(KILL_GRACE))
            .collect();
        while closing.join_next().await.is_some() {}
    }
}

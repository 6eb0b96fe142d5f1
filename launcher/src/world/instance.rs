//! One instance's life, as rank 0 sees it: waiting → starting → serving → broken (its other ranks end) → pausing →
//! starting …, or gone. Pure but for the clock: the coordinator does what a [`Step`] says.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::protocol::{End, Program, SlotId, Streams};

/// An instance that served this long starts over with the shortest pause.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// The label of the proxy's slot.
pub(crate) const PROXY: &str = "proxy";

/// What an instance consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InstanceSpec {
    /// `ctx0`, `gen1`, `proxy`; `command` for what `llmapi-launch` runs.
    pub(crate) label: String,
    /// Its first rank in the world, which leads.
    pub(crate) first: u32,
    /// How many ranks it has.
    pub(crate) ranks: u32,
    /// What the leader runs.
    pub(crate) program: Program,
    /// The leader's arguments; `{dir}/` stands for the folder of [`InstanceSpec::files`].
    pub(crate) arguments: Vec<String>,
    /// Beside the inherited environment, for all its ranks.
    pub(crate) environment: Vec<(String, String)>,
    /// What the leader reads.
    pub(crate) files: Vec<(String, String)>,
    /// Whether the launcher gives the leader its address; an address that the kernel chose is kept over restarts.
    pub(crate) is_server: bool,
    /// The port that the leader shall have; 0 lets the kernel choose.
    pub(crate) port: u16,
    /// Where the leader's lines go.
    pub(crate) streams: Streams,
}

impl InstanceSpec {
    /// The proxy: one rank on rank 0's host, whose command line is known later.
    pub(crate) fn proxy() -> Self {
        Self {
            label: PROXY.to_owned(),
            first: 0,
            ranks: 1,
            program: Program::Baton,
            arguments: Vec::new(),
            environment: Vec::new(),
            files: Vec::new(),
            is_server: true,
            port: 0,
            streams: Streams::Labelled,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    Starting,
    Serving { since: Instant },
    Broken,
    Pausing,
    Gone,
}

/// What the coordinator has to do after a process's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing: the news is old, or others are still ending.
    Nothing,
    /// The first of several ended; the others get some time.
    Grace,
    /// All have ended.
    Over,
}

/// One instance's life.
#[derive(Debug)]
pub(crate) struct Instance {
    pub(crate) spec: InstanceSpec,
    state: State,
    epoch: u32,
    /// Ranks whose processes run.
    running: BTreeSet<u32>,
    /// How the leader ended, in this epoch.
    leader_end: Option<End>,
    /// Whether it was the first to end: otherwise its own end follows from another's.
    leader_first: bool,
    /// What broke this epoch: a label, an end and last lines.
    cause: Option<String>,
    called: bool,
    address: Option<String>,
    restarts: u32,
    ever_served: bool,
    /// An agent of it is gone, so it cannot be started again.
    lost: bool,
    begun: Instant,
    broke: Option<Instant>,
    /// Looks for the leader's health.
    watch: Option<JoinHandle<()>>,
}

impl Instance {
    pub(crate) fn new(spec: InstanceSpec) -> Self {
        Self {
            spec,
            state: State::Waiting,
            epoch: 0,
            running: BTreeSet::new(),
            leader_end: None,
            leader_first: false,
            cause: None,
            called: false,
            address: None,
            restarts: 0,
            ever_served: false,
            lost: false,
            begun: Instant::now(),
            broke: None,
            watch: None,
        }
    }

    /// Begins a new epoch; returns the leader's slot.
    pub(crate) fn begin(&mut self) -> SlotId {
        assert!(
            self.running.is_empty(),
            "an epoch begins when the last one is over"
        );
        self.epoch += 1;
        self.state = State::Starting;
        self.running.insert(0);
        self.leader_end = None;
        self.leader_first = false;
        self.cause = None;
        self.called = false;
        self.begun = Instant::now();
        self.slot(0)
    }

    /// A rank's slot in this epoch.
    pub(crate) fn slot(&self, rank: u32) -> SlotId {
        SlotId {
            instance: self.spec.label.clone(),
            rank,
            epoch: self.epoch,
        }
    }

    /// Whether a slot belongs to this epoch of this instance.
    pub(crate) fn is(&self, slot: &SlotId) -> bool {
        slot.instance == self.spec.label && slot.epoch == self.epoch
    }

    /// Takes the leader's call for followers, once an epoch.
    pub(crate) fn called(&mut self, epoch: u32) -> Result<(), String> {
        if epoch != self.epoch || self.state != State::Starting {
            return Err(format!(
                "{} is in epoch {} by now, not in {epoch}",
                self.spec.label, self.epoch
            ));
        }
        if std::mem::replace(&mut self.called, true) {
            return Err(format!(
                "{} has called for its ranks already; one server uses them all",
                self.spec.label
            ));
        }
        Ok(())
    }

    /// Notes that a follower's process was ordered.
    pub(crate) fn follower_started(&mut self, rank: u32) {
        self.running.insert(rank);
    }

    /// The leader listens.
    pub(crate) fn bound(&mut self, address: &str, watch: JoinHandle<()>) {
        self.address = Some(address.to_owned());
        self.stop_watching();
        self.watch = Some(watch);
    }

    /// Where the leader listens, once it does; the same over restarts.
    pub(crate) fn address(&self) -> Option<&str> {
        self.address.as_deref()
    }

    /// The port that the leader shall have.
    pub(crate) fn port(&self) -> u16 {
        let bound = self
            .address
            .as_deref()
            .and_then(|address| address.rsplit(':').next());
        bound
            .and_then(|port| port.parse().ok())
            .unwrap_or(self.spec.port)
    }

    /// The leader can serve. Returns how long that took since it was started, or since it broke.
    pub(crate) fn healthy(&mut self) -> Option<Duration> {
        if self.state != State::Starting {
            return None;
        }
        let since = self.broke.take().unwrap_or(self.begun);
        self.state = State::Serving {
            since: Instant::now(),
        };
        self.ever_served = true;
        Some(since.elapsed())
    }

    /// A process ended.
    pub(crate) fn ended(&mut self, rank: u32, end: End, cause: String) -> Step {
        if !self.running.remove(&rank) {
            return Step::Nothing;
        }
        if rank == 0 {
            self.leader_end = Some(end);
            self.leader_first = self.state != State::Broken;
            self.stop_watching();
        }
        self.broke.get_or_insert_with(Instant::now);
        // A follower that ends well was sent away by its leader, whose own end tells more.
        if end != End::Code(0) || rank == 0 {
            self.cause.get_or_insert(cause);
        }
        if let State::Serving { since } = self.state
            && since.elapsed() >= STABLE_AFTER
        {
            self.restarts = 0;
        }
        let first = self.state != State::Broken;
        self.state = State::Broken;
        match (self.running.is_empty(), first) {
            (true, _) => Step::Over,
            (false, true) => Step::Grace,
            (false, false) => Step::Nothing,
        }
    }

    /// An agent is gone with what it ran; there is no other in its place.
    pub(crate) fn lose(&mut self, rank: u32, cause: String) -> Step {
        self.lost = true;
        if self.state == State::Pausing {
            // Nothing of it runs, so no end will be told: the restart that was planned cannot be.
            self.cause = Some(cause);
            return Step::Over;
        }
        self.ended(rank, End::Unknown, cause)
    }

    /// Whether it is to be started again.
    pub(crate) fn is_pausing(&self) -> bool {
        self.state == State::Pausing
    }

    /// Whether a new epoch makes sense; counts it.
    ///
    /// # Errors
    /// Why it does not.
    pub(crate) fn plan_restart(&mut self, restarts_max: u32) -> Result<u32, &'static str> {
        if self.lost {
            self.state = State::Gone;
            return Err("one of its hosts is lost");
        }
        let by_itself = self.leader_first && matches!(self.leader_end, Some(End::Code(_)));
        if !self.ever_served && by_itself {
            self.state = State::Gone;
            return Err("it has never served, so it would end the same way again");
        }
        if self.restarts >= restarts_max {
            self.state = State::Gone;
            return Err("it has been started again too often");
        }
        self.restarts += 1;
        self.state = State::Pausing;
        Ok(self.restarts)
    }

    /// Ranks whose processes run.
    pub(crate) fn running(&self) -> impl Iterator<Item = u32> + '_ {
        self.running.iter().copied()
    }

    /// Whether nothing of it runs.
    pub(crate) fn is_over(&self) -> bool {
        self.running.is_empty()
    }

    /// Whether it can serve.
    pub(crate) fn is_serving(&self) -> bool {
        matches!(self.state, State::Serving { .. })
    }

    /// Whether it has not been started yet.
    pub(crate) fn is_waiting(&self) -> bool {
        self.state == State::Waiting
    }

    /// Whether it will never come back.
    pub(crate) fn is_gone(&self) -> bool {
        self.state == State::Gone
    }

    /// Whether all that ended so far are followers that ended well: their leader is about to end, too.
    pub(crate) fn is_dismissed(&self) -> bool {
        self.leader_end.is_none() && self.cause.is_none()
    }

    /// How the leader of this epoch ended.
    pub(crate) fn leader_end(&self) -> Option<End> {
        self.leader_end
    }

    /// What broke this epoch.
    pub(crate) fn cause(&self) -> &str {
        self.cause.as_deref().unwrap_or("it ended by itself")
    }

    fn stop_watching(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.abort();
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.stop_watching();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(ranks: u32) -> Instance {
        Instance::new(InstanceSpec {
            label: "gen0".to_owned(),
            ranks,
            ..InstanceSpec::proxy()
        })
    }

    fn started(ranks: u32) -> Instance {
        let mut instance = instance(ranks);
        let slot = instance.begin();
        instance.called(slot.epoch).unwrap();
        (1..ranks).for_each(|rank| instance.follower_started(rank));
        instance
    }

    #[test]
    fn a_rank_that_dies_breaks_its_instance_and_the_first_cause_stays() {
        let mut instance = started(3);
        assert!(instance.healthy().is_some());
        assert_eq!(
            instance.ended(1, End::Signal(9), "first".to_owned()),
            Step::Grace
        );
        assert_eq!(
            instance.ended(0, End::Code(1), "second".to_owned()),
            Step::Nothing
        );
        assert_eq!(
            instance.ended(2, End::Code(1), "third".to_owned()),
            Step::Over
        );
        assert_eq!(instance.cause(), "first");
        assert_eq!(instance.plan_restart(1), Ok(1));
        assert_eq!(instance.begin().epoch, 2);
    }

    #[test]
    fn news_of_an_earlier_epoch_is_stale() {
        let mut instance = started(1);
        let old = instance.slot(0);
        instance.healthy();
        assert_eq!(instance.ended(0, End::Signal(9), String::new()), Step::Over);
        instance.plan_restart(6).unwrap();
        instance.begin();
        assert!(!instance.is(&old));
        assert!(instance.called(1).is_err());
    }

    #[test]
    fn one_server_has_the_ranks() {
        let mut instance = started(2);
        assert!(instance.called(1).unwrap_err().contains("already"));
    }

    #[test]
    fn what_never_served_and_ended_by_itself_is_not_started_again() {
        let mut instance = started(1);
        instance.ended(0, End::Code(65), String::new());
        assert!(
            instance
                .plan_restart(6)
                .unwrap_err()
                .contains("never served")
        );
        assert!(instance.is_gone());
    }

    #[test]
    fn what_broke_by_another_rank_while_it_started_is_started_again() {
        let mut instance = started(2);
        instance.ended(1, End::Signal(9), "killed".to_owned());
        instance.ended(0, End::Code(1), "lost rank 1".to_owned());
        assert_eq!(instance.plan_restart(6), Ok(1));
        assert_eq!(instance.cause(), "killed");
    }

    #[test]
    fn restarts_are_bounded_and_a_lost_host_ends_them() {
        let mut instance = started(1);
        instance.healthy();
        instance.ended(0, End::Signal(9), String::new());
        assert_eq!(
            instance.plan_restart(0).unwrap_err(),
            "it has been started again too often"
        );
        let mut instance = started(2);
        instance.healthy();
        assert_eq!(instance.lose(1, "rank 1 is lost".to_owned()), Step::Grace);
        assert_eq!(instance.ended(0, End::Code(1), String::new()), Step::Over);
        assert_eq!(
            instance.plan_restart(6).unwrap_err(),
            "one of its hosts is lost"
        );
        assert_eq!(instance.cause(), "rank 1 is lost");
    }

    #[test]
    fn a_host_that_is_lost_before_the_restart_ends_it_too() {
        let mut instance = started(2);
        instance.healthy();
        instance.ended(0, End::Signal(9), String::new());
        instance.ended(1, End::Code(1), String::new());
        instance.plan_restart(6).unwrap();
        assert!(instance.is_pausing());
        assert_eq!(instance.lose(0, "rank 0 is lost".to_owned()), Step::Over);
        assert!(instance.plan_restart(6).is_err());
        assert!(instance.is_gone() && !instance.is_pausing());
        assert_eq!(instance.cause(), "rank 0 is lost");
    }

    #[test]
    fn a_follower_that_was_sent_away_is_no_cause() {
        let mut instance = started(2);
        instance.ended(1, End::Code(0), "follower".to_owned());
        assert!(instance.is_dismissed());
        instance.ended(0, End::Code(3), "leader".to_owned());
        assert!(!instance.is_dismissed());
        assert_eq!(instance.cause(), "leader");
        assert_eq!(instance.leader_end(), Some(End::Code(3)));
    }

    #[test]
    fn a_port_that_the_kernel_chose_is_kept() {
        let mut instance = instance(1);
        assert_eq!(instance.port(), 0);
        instance.address = Some("[::1]:4242".to_owned());
        assert_eq!(instance.port(), 4242);
    }
}

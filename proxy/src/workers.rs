//! The workers that the proxy knows: addresses, what is known of their health, and readiness as a whole.
//!
//! Facts arrive from two sides, the health checks (`health`) and failed requests; both go through
//! [`Worker::report`], the only place that changes a worker's condition and the only one that logs it.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_configs::disagg::{Endpoint, ServerGroup};
use hyper::header::HeaderValue;
use tokio::sync::{Notify, watch};

use crate::router::{self, Router};
use crate::upstream::Pool;

/// Which half of a request a worker serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    /// Reads prompts.
    Context,
    /// Writes answers.
    Generation,
}

impl Role {
    /// `context` or `generation`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Context => "context",
            Self::Generation => "generation",
        }
    }

    /// The role's name and number in `/cluster_info` (COMPAT.md §6.3).
    pub(crate) fn in_cluster_info(self) -> (&'static str, u8) {
        match self {
            Self::Context => ("CONTEXT", 0),
            Self::Generation => ("GENERATION", 1),
        }
    }
}

/// What is known of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Not asked yet.
    Unknown,
    /// No connection is made.
    Unreachable(String),
    /// It answers, but says that it cannot serve; with its own words.
    NotReady(String),
    /// It takes connections and does not answer.
    Silent(String),
    /// It can serve.
    Up,
}

impl Condition {
    fn is_same_kind(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("not asked yet"),
            Self::Unreachable(text) | Self::NotReady(text) | Self::Silent(text) => {
                f.write_str(text)
            }
            Self::Up => f.write_str("up"),
        }
    }
}

/// One server of one role.
pub(crate) struct Worker {
    role: Role,
    endpoint: Endpoint,
    name: String,
    host_header: HeaderValue,
    name_header: HeaderValue,
    /// Idle connections.
    pub(crate) pool: Pool,
    /// Asks for a health check now.
    pub(crate) probe_wanted: Notify,
    up: AtomicBool,
    condition: Mutex<Condition>,
    changed: Arc<watch::Sender<()>>,
}

impl Worker {
    fn new(role: Role, endpoint: Endpoint, changed: Arc<watch::Sender<()>>) -> Self {
        let address = endpoint.to_string();
        let header = |text: &str| {
            HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static("worker"))
        };
        Self {
            name: format!("{} server {address}", role.name()),
            host_header: header(&address),
            name_header: header(&format!("{} {address}", role.name())),
            role,
            endpoint,
            pool: Pool::default(),
            probe_wanted: Notify::new(),
            up: AtomicBool::new(false),
            condition: Mutex::new(Condition::Unknown),
            changed,
        }
    }

    pub(crate) fn role(&self) -> Role {
        self.role
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// `context server 127.0.0.1:8001`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// `context 127.0.0.1:8001`, for the header that names a failed worker.
    pub(crate) fn header_name(&self) -> HeaderValue {
        self.name_header.clone()
    }

    pub(crate) fn host_header(&self) -> HeaderValue {
        self.host_header.clone()
    }

    pub(crate) fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Condition> {
        self.condition
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn condition(&self) -> Condition {
        self.lock().clone()
    }

    /// Takes note of what was seen. Logs when the kind of condition changes. Returns whether it did.
    pub(crate) fn report(&self, seen: Condition) -> bool {
        let up = seen == Condition::Up;
        let text = seen.to_string();
        let (changed, was_up) = {
            let mut condition = self.lock();
            let changed = !condition.is_same_kind(&seen);
            let was_up = *condition == Condition::Up;
            *condition = seen;
            self.up.store(up, Ordering::Release);
            (changed, was_up)
        };
        if !changed {
            return false;
        }
        if up {
            tracing::info!("{} is up", self.name);
        } else if was_up {
            self.pool.clear();
            tracing::warn!("{} is down: {text}", self.name);
        } else {
            tracing::info!("{}: {text}", self.name);
        }
        self.changed.send_replace(());
        true
    }

    /// A request could not connect: nobody else need try before the next health check.
    pub(crate) fn mark_unreachable(&self, reason: &str) {
        self.report(Condition::Unreachable(reason.to_owned()));
        self.probe_wanted.notify_one();
    }

    /// Something went wrong that may or may not mean that the worker is gone: ask it now.
    pub(crate) fn suspect(&self) {
        self.probe_wanted.notify_one();
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("name", &self.name)
            .field("condition", &self.condition())
            .finish_non_exhaustive()
    }
}

/// The servers of one role and how one is chosen.
#[derive(Debug)]
pub(crate) struct Group {
    role: Role,
    servers: Vec<Arc<Worker>>,
    router: Box<dyn Router>,
}

impl Group {
    pub(crate) fn servers(&self) -> &[Arc<Worker>] {
        &self.servers
    }

    /// A server that is up and not among `excluded`.
    pub(crate) fn choose(&self, excluded: &[Arc<Worker>]) -> Option<Arc<Worker>> {
        let eligible = |worker: &Arc<Worker>| is_eligible(worker, excluded);
        let index = self.router.choose(&self.servers, &eligible)?;
        self.servers.get(index).cloned()
    }

    /// Whether [`Group::choose`] would find one; does not take a turn.
    pub(crate) fn has_choice(&self, excluded: &[Arc<Worker>]) -> bool {
        self.servers
            .iter()
            .any(|worker| is_eligible(worker, excluded))
    }

    fn missing_text(&self) -> String {
        let servers: Vec<String> = self
            .servers
            .iter()
            .map(|worker| format!("{} ({})", worker.endpoint, worker.condition()))
            .collect();
        format!(
            "no {} server is up: {}",
            self.role.name(),
            servers.join(", ")
        )
    }
}

/// Excluded servers are compared by address: one process may serve both roles.
fn is_eligible(worker: &Worker, excluded: &[Arc<Worker>]) -> bool {
    worker.is_up()
        && !excluded
            .iter()
            .any(|other| other.endpoint == worker.endpoint)
}

/// All workers.
#[derive(Debug)]
pub(crate) struct Cluster {
    context: Group,
    generation: Group,
    started: AtomicBool,
    changed: Arc<watch::Sender<()>>,
}

impl Cluster {
    pub(crate) fn new(context: &ServerGroup, generation: &ServerGroup) -> Self {
        let changed = Arc::new(watch::Sender::new(()));
        let group = |role: Role, config: &ServerGroup| Group {
            role,
            servers: config
                .servers
                .iter()
                .map(|endpoint| Arc::new(Worker::new(role, endpoint.clone(), changed.clone())))
                .collect(),
            router: router::for_config(&config.router),
        };
        Self {
            context: group(Role::Context, context),
            generation: group(Role::Generation, generation),
            started: AtomicBool::new(false),
            changed,
        }
    }

    pub(crate) fn group(&self, role: Role) -> &Group {
        match role {
            Role::Context => &self.context,
            Role::Generation => &self.generation,
        }
    }

    /// Every worker, context servers first.
    pub(crate) fn workers(&self) -> impl Iterator<Item = &Arc<Worker>> {
        self.context.servers.iter().chain(&self.generation.servers)
    }

    /// Wakes when any worker's condition changes.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The first start-up is over: from now on one live server of each role is enough.
    pub(crate) fn set_started(&self) {
        self.started.store(true, Ordering::Release);
    }

    /// Workers that are not up.
    pub(crate) fn missing(&self) -> Vec<&Arc<Worker>> {
        self.workers().filter(|worker| !worker.is_up()).collect()
    }

    /// Whether requests can be served now; else who is missing and why.
    pub(crate) fn readiness(&self) -> Result<(), String> {
        if !self.started.load(Ordering::Acquire) {
            let missing: Vec<String> = self
                .missing()
                .iter()
                .map(|worker| format!("{}: {}", worker.name, worker.condition()))
                .collect();
            return Err(format!("starting, waiting for {}", missing.join("; ")));
        }
        for group in [&self.context, &self.generation] {
            if !group.has_choice(&[]) {
                return Err(group.missing_text());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn endpoint(port: u16) -> Endpoint {
        Endpoint {
            host: "127.0.0.1".to_owned(),
            port,
        }
    }

    fn cluster(context: &[u16], generation: &[u16]) -> Cluster {
        let group = |ports: &[u16]| ServerGroup {
            servers: ports.iter().map(|port| endpoint(*port)).collect(),
            ..ServerGroup::default()
        };
        Cluster::new(&group(context), &group(generation))
    }

    #[test]
    fn readiness_needs_all_at_first_and_one_of_each_role_later() {
        let cluster = cluster(&[1, 2], &[3]);
        let all: Vec<_> = cluster.workers().cloned().collect();
        for worker in &all {
            worker.report(Condition::Up);
        }
        assert!(cluster.readiness().is_err(), "start-up is not over");
        cluster.set_started();
        assert_eq!(cluster.readiness(), Ok(()));
        all[0].report(Condition::Unreachable("connection refused".to_owned()));
        assert_eq!(cluster.readiness(), Ok(()));
        all[2].report(Condition::NotReady("answered 503: engine down".to_owned()));
        assert_eq!(
            cluster.readiness(),
            Err("no generation server is up: 127.0.0.1:3 (answered 503: engine down)".to_owned())
        );
    }

    #[test]
    fn round_robin_skips_the_down_and_the_excluded() {
        let cluster = cluster(&[1, 2, 3], &[4]);
        let all = cluster.group(Role::Context).servers().to_vec();
        assert!(cluster.group(Role::Context).choose(&[]).is_none());
        for worker in &all {
            worker.report(Condition::Up);
        }
        let ports = |excluded: &[Arc<Worker>]| -> Vec<u16> {
            (0..4)
                .filter_map(|_| cluster.group(Role::Context).choose(excluded))
                .map(|worker| worker.endpoint().port)
                .collect()
        };
        assert_eq!(ports(&[]), [1, 2, 3, 1]);
        all[1].report(Condition::Silent("no answer".to_owned()));
        assert!(!ports(&[]).contains(&2));
        assert!(
            ports(std::slice::from_ref(&all[0]))
                .iter()
                .all(|port| *port == 3)
        );
        assert!(ports(&[all[0].clone(), all[2].clone()]).is_empty());
    }

    #[test]
    fn only_changes_of_kind_are_news() {
        let cluster = cluster(&[1], &[2]);
        let worker = cluster.workers().next().unwrap().clone();
        assert!(worker.report(Condition::NotReady("loading 1 %".to_owned())));
        assert!(!worker.report(Condition::NotReady("loading 2 %".to_owned())));
        assert_eq!(worker.condition().to_string(), "loading 2 %");
        assert!(worker.report(Condition::Up));
    }
}

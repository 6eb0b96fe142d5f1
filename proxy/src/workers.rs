//! A worker: its address, and what is known of its health.
//!
//! Facts arrive from two sides, the health checks (`health`) and failed requests; both go through
//! [`Worker::report`], the only place that changes a worker's condition and the only one that logs it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_configs::disagg::Endpoint;
use hyper::header::HeaderValue;
use tokio::sync::{Notify, watch};

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

    /// The role of a number (COMPAT.md §6.3); `None` for roles that are not served here.
    pub(crate) fn of_number(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::Context),
            1 => Some(Self::Generation),
            _ => None,
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

/// How the proxy came to know a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The configuration names it; it is waited for.
    Configured,
    /// It registered under this id.
    Registered(String),
}

/// One server of one role.
pub(crate) struct Worker {
    role: Role,
    origin: Origin,
    endpoint: Endpoint,
    name: String,
    host_header: HeaderValue,
    name_header: HeaderValue,
    /// Idle connections.
    pub(crate) pool: Pool,
    /// Asks for a health check now.
    pub(crate) probe_wanted: Notify,
    up: AtomicBool,
    /// How often it has come up.
    ups: AtomicU64,
    retired: AtomicBool,
    condition: Mutex<Condition>,
    changed: Arc<watch::Sender<()>>,
}

impl Worker {
    pub(crate) fn new(
        role: Role,
        endpoint: Endpoint,
        origin: Origin,
        changed: Arc<watch::Sender<()>>,
    ) -> Self {
        let address = endpoint.to_string();
        let header = |text: &str| {
            HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static("worker"))
        };
        Self {
            name: format!("{} server {address}", role.name()),
            host_header: header(&address),
            name_header: header(&format!("{} {address}", role.name())),
            role,
            origin,
            endpoint,
            pool: Pool::default(),
            probe_wanted: Notify::new(),
            up: AtomicBool::new(false),
            ups: AtomicU64::new(0),
            retired: AtomicBool::new(false),
            condition: Mutex::new(Condition::Unknown),
            changed,
        }
    }

    pub(crate) fn role(&self) -> Role {
        self.role
    }

    /// Its id in `/cluster_info`.
    pub(crate) fn id(&self) -> String {
        match &self.origin {
            Origin::Registered(id) => id.clone(),
            Origin::Configured => format!("{}-{}", self.role.in_cluster_info().0, self.endpoint),
        }
    }

    pub(crate) fn is_configured(&self) -> bool {
        self.origin == Origin::Configured
    }

    /// It has left: nobody asks it any more. Requests that it works on go on.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
        self.up.store(false, Ordering::Release);
        self.pool.clear();
        self.probe_wanted.notify_one();
    }

    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
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

    /// How often it has come up: another number, another process, or the same one after a silence.
    pub(crate) fn ups(&self) -> u64 {
        self.ups.load(Ordering::Acquire)
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
            self.ups
                .fetch_add(u64::from(changed && up), Ordering::AcqRel);
            self.up.store(up && !self.is_retired(), Ordering::Release);
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

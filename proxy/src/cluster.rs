//! All workers, by role: who can be chosen, who is missing, and whether requests can be served.
//!
//! The list of a role's workers changes while the proxy runs, by registration (`discovery`) and by address files
//! (`address_file`). A reader gets the list as it is at that moment; a request keeps the worker that it has chosen.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use baton_configs::disagg::{DisaggConfig, Endpoint, ServerAddress, ServerGroup};
use tokio::sync::watch;

use crate::router::{self, Router};
use crate::workers::{Origin, Role, Worker};

/// Someone who is waited for, and what is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Missing {
    /// `context server 127.0.0.1:8001`.
    pub(crate) name: String,
    /// `loading 43 %`.
    pub(crate) condition: String,
}

/// The servers of one role and how one is chosen.
#[derive(Debug)]
pub(crate) struct Group {
    role: Role,
    servers: Mutex<Arc<[Arc<Worker>]>>,
    /// Servers whose address is not known yet: their names, and why.
    unfound: Mutex<BTreeMap<String, String>>,
    router: Box<dyn Router>,
    /// How many must be up before requests are served.
    up_min: usize,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Group {
    pub(crate) fn servers(&self) -> Arc<[Arc<Worker>]> {
        locked(&self.servers).clone()
    }

    /// A server that is up and not among `excluded`.
    pub(crate) fn choose(&self, excluded: &[Arc<Worker>]) -> Option<Arc<Worker>> {
        let eligible = |worker: &Arc<Worker>| is_eligible(worker, excluded);
        let servers = self.servers();
        let index = self.router.choose(&servers, &eligible)?;
        servers.get(index).cloned()
    }

    /// Whether [`Group::choose`] would find one; does not take a turn.
    pub(crate) fn has_choice(&self, excluded: &[Arc<Worker>]) -> bool {
        self.servers()
            .iter()
            .any(|worker| is_eligible(worker, excluded))
    }

    /// How many must be up before requests are served.
    pub(crate) fn up_min(&self) -> usize {
        self.up_min
    }

    pub(crate) fn up_count(&self) -> usize {
        self.servers()
            .iter()
            .filter(|worker| worker.is_up())
            .count()
    }

    fn missing(&self) -> Vec<Missing> {
        let servers = self.servers();
        let down = servers
            .iter()
            .filter(|worker| worker.is_configured() && !worker.is_up());
        let down = down.map(|worker| Missing {
            name: worker.name().to_owned(),
            condition: worker.condition().to_string(),
        });
        let unfound = locked(&self.unfound);
        let unfound = unfound.iter().map(|(name, reason)| Missing {
            name: name.clone(),
            condition: reason.clone(),
        });
        down.chain(unfound).collect()
    }

    /// Why it is not ready.
    fn missing_text(&self) -> String {
        let role = self.role.name();
        let servers = self.servers();
        let down = servers.iter().filter(|worker| !worker.is_up());
        let mut known: Vec<String> = down
            .map(|worker| format!("{} ({})", worker.endpoint(), worker.condition()))
            .collect();
        for (name, reason) in locked(&self.unfound).iter() {
            known.push(format!("{name} ({reason})"));
        }
        let mut text = match (self.up_count(), self.up_min) {
            (0, 1) => format!("no {role} server is up"),
            (up, min) => format!("{up} of at least {min} {role} servers are up"),
        };
        if known.is_empty() {
            let others = if servers.is_empty() { "" } else { " other" };
            text.push_str(&format!(": no{others} {role} server has registered"));
        } else {
            text.push_str(&format!(": {}", known.join(", ")));
        }
        text
    }
}

/// Excluded servers are compared by address: one process may serve both roles.
fn is_eligible(worker: &Worker, excluded: &[Arc<Worker>]) -> bool {
    worker.is_up()
        && !excluded
            .iter()
            .any(|other| other.endpoint() == worker.endpoint())
}

/// All workers.
#[derive(Debug)]
pub(crate) struct Cluster {
    context: Group,
    generation: Group,
    /// Workers register by themselves.
    discovers: bool,
    /// What else discovery has seen, for whoever wonders why nobody comes.
    sightings: Mutex<String>,
    started: AtomicBool,
    changed: Arc<watch::Sender<()>>,
}

impl Cluster {
    /// The workers that the configuration names; those in address files are added when they are found.
    pub(crate) fn new(config: &DisaggConfig) -> Self {
        let min = |wanted: Option<u32>| {
            // A role of which none is needed cannot serve without one either.
            usize::try_from(wanted.unwrap_or(1))
                .unwrap_or(usize::MAX)
                .max(1)
        };
        let discovery = config.cluster.as_ref();
        let group = |role: Role, servers: &ServerGroup, up_min: usize| Group {
            role,
            servers: Mutex::new(Arc::new([])),
            unfound: Mutex::default(),
            router: router::for_config(&servers.router),
            up_min,
        };
        let cluster = Self {
            context: group(
                Role::Context,
                &config.context_servers,
                min(discovery.map(|cluster| cluster.context_servers_min)),
            ),
            generation: group(
                Role::Generation,
                &config.generation_servers,
                min(discovery.map(|cluster| cluster.generation_servers_min)),
            ),
            discovers: discovery.is_some(),
            sightings: Mutex::default(),
            started: AtomicBool::new(false),
            changed: Arc::new(watch::Sender::new(())),
        };
        for (role, servers) in [
            (Role::Context, &config.context_servers),
            (Role::Generation, &config.generation_servers),
        ] {
            for server in &servers.servers {
                match server {
                    ServerAddress::At(endpoint) => {
                        cluster.add(role, endpoint.clone(), Origin::Configured);
                    }
                    ServerAddress::File(_) => {
                        cluster.set_unfound(role, server, "not looked for yet")
                    }
                }
            }
        }
        cluster
    }

    pub(crate) fn group(&self, role: Role) -> &Group {
        match role {
            Role::Context => &self.context,
            Role::Generation => &self.generation,
        }
    }

    /// Every worker, context servers first.
    pub(crate) fn workers(&self) -> impl Iterator<Item = Arc<Worker>> + use<> {
        let both = [self.context.servers(), self.generation.servers()];
        both.into_iter().flat_map(|servers| servers.to_vec())
    }

    /// Adds a worker; the caller has its health watched.
    pub(crate) fn add(&self, role: Role, endpoint: Endpoint, origin: Origin) -> Arc<Worker> {
        let worker = Arc::new(Worker::new(role, endpoint, origin, self.changed.clone()));
        let mut servers = locked(&self.group(role).servers);
        *servers = servers.iter().chain([&worker]).cloned().collect();
        drop(servers);
        self.changed.send_replace(());
        worker
    }

    /// Takes a worker out: no request chooses it any more.
    pub(crate) fn remove(&self, worker: &Arc<Worker>) {
        let mut servers = locked(&self.group(worker.role()).servers);
        let others = servers.iter().filter(|other| !Arc::ptr_eq(other, worker));
        *servers = others.cloned().collect();
        drop(servers);
        worker.retire();
        self.changed.send_replace(());
    }

    /// The server of an address file is waited for.
    pub(crate) fn set_unfound(&self, role: Role, address: &ServerAddress, reason: &str) {
        let name = format!("{} server {address}", role.name());
        locked(&self.group(role).unfound).insert(name, reason.to_owned());
    }

    /// The server of an address file is a worker now.
    pub(crate) fn set_found(&self, role: Role, address: &ServerAddress) {
        let name = format!("{} server {address}", role.name());
        locked(&self.group(role).unfound).remove(&name);
    }

    /// What discovery has seen that is no worker of this cluster; said when the cluster is not ready.
    pub(crate) fn set_sightings(&self, text: String) {
        *locked(&self.sightings) = text;
    }

    /// Wakes when any worker's condition changes, and when workers come or go.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The first start-up is over: from now on enough live servers of each role are enough.
    pub(crate) fn set_started(&self) {
        self.started.store(true, Ordering::Release);
    }

    /// Whether workers register by themselves.
    pub(crate) fn discovers(&self) -> bool {
        self.discovers
    }

    /// Configured workers that are not up.
    pub(crate) fn missing(&self) -> Vec<Missing> {
        let mut missing = self.context.missing();
        missing.extend(self.generation.missing());
        missing
    }

    /// Whether requests can be served now; else who is missing and why.
    pub(crate) fn readiness(&self) -> Result<(), String> {
        if !self.started.load(Ordering::Acquire) {
            let missing: Vec<String> = self
                .missing()
                .iter()
                .map(|missing| format!("{}: {}", missing.name, missing.condition))
                .collect();
            // Nothing is missing for the moment between the last worker's word and the end of the start.
            if !missing.is_empty() {
                return Err(format!("starting, waiting for {}", missing.join("; ")));
            }
            if !self.discovers {
                return Err("starting".to_owned());
            }
        }
        let short = |group: &&Group| group.up_count() < group.up_min;
        let short: Vec<String> = [&self.context, &self.generation]
            .iter()
            .copied()
            .filter(short)
            .map(Group::missing_text)
            .collect();
        if short.is_empty() {
            return Ok(());
        }
        let sightings = locked(&self.sightings);
        let seen = [&*sightings].into_iter().filter(|text| !text.is_empty());
        Err(short
            .iter()
            .chain(seen)
            .cloned()
            .collect::<Vec<_>>()
            .join("; "))
    }
}

#[cfg(test)]
mod tests;

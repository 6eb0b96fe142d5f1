//! Service discovery: what workers write into the store becomes workers of the cluster, and what expires leaves it.
//!
//! State is compared rather than events replayed: whatever happened, the cluster ends up with those that are
//! registered now. A registration that cannot be used is never silent: it is logged once, and said as long as the
//! cluster is not ready.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use baton_configs::cluster::{ClusterConfig, KEY_ROOT};
use baton_configs::disagg::Endpoint;
use serde::Deserialize;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::cluster::Cluster;
use crate::health::{self, Watching};
use crate::store::Store;
use crate::workers::{Origin, Role, Worker};

/// Between two sweeps of what has expired (COMPAT.md §6.2).
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Sightings that are told at once; more are counted.
const SIGHTINGS_MAX: usize = 3;

/// A worker's own words (COMPAT.md §6.3).
#[derive(Debug, Deserialize)]
struct Registration {
    worker_id: String,
    host: String,
    port: u16,
    role: u64,
}

/// The followed cluster.
#[derive(Debug)]
pub(crate) struct Discovery {
    pub(crate) config: ClusterConfig,
    pub(crate) store: Arc<Store>,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) watching: Watching,
}

impl Discovery {
    /// Follows the store for as long as the proxy runs.
    pub(crate) async fn follow(self) {
        let mut ticks = interval(SWEEP_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut written = self.store.changes();
        let mut changed = self.cluster.changes();
        let mut roster = Roster::default();
        let mut was_ready = false;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                // The store outlives this task and holds the sender; so does the cluster.
                _ = written.changed() => {}
                _ = changed.changed() => {}
            }
            self.store.sweep();
            self.reconcile(&mut roster);
            while roster.checks.try_join_next().is_some() {}
            was_ready = self.tell_readiness(was_ready);
        }
    }

    fn reconcile(&self, roster: &mut Roster) {
        let mut registered = BTreeMap::new();
        let mut unusable = BTreeMap::new();
        for (key, value) in self.store.with_prefix(&self.config.key_prefix()) {
            match understand(&value) {
                Ok(registration) => {
                    registered.insert(key, registration);
                }
                Err(reason) => {
                    let name = key.rsplit('/').next().unwrap_or(&key).to_owned();
                    unusable.insert(name, reason);
                }
            }
        }
        keep_newest(&mut registered);
        roster.workers.retain(|key, worker| {
            let stays = registered.contains_key(key);
            if !stays {
                tracing::warn!("{} has left: its registration is gone", worker.name());
                self.cluster.remove(worker);
            }
            stays
        });
        for (key, (id, role, endpoint)) in registered {
            if !roster.workers.contains_key(&key) {
                tracing::info!("{} server {endpoint} has registered", role.name());
                let worker = self.cluster.add(role, endpoint, Origin::Registered(id));
                let check = health::watch(worker.clone(), self.watching.clone());
                roster.checks.spawn(check);
                roster.workers.insert(key, worker);
            }
        }
        for (name, reason) in &unusable {
            if !roster.refused.contains(name) {
                tracing::warn!("worker {name} cannot be used: {reason}");
            }
        }
        roster.refused = unusable.keys().cloned().collect();
        self.cluster.set_sightings(self.sightings(&unusable));
    }

    /// What has been seen and is no worker of this cluster.
    fn sightings(&self, unusable: &BTreeMap<String, String>) -> String {
        let mut others: BTreeMap<String, usize> = BTreeMap::new();
        for key in self.store.with_prefix(KEY_ROOT).keys() {
            let name = key
                .strip_prefix(KEY_ROOT)
                .and_then(|rest| rest.split_once("/workers/"))
                .map(|(name, _)| name);
            if let Some(name) = name.filter(|name| *name != self.config.name) {
                *others.entry(name.to_owned()).or_default() += 1;
            }
        }
        let own = &self.config.name;
        let others = others.iter().map(|(name, count)| {
            format!("{count} registered with cluster_name {name:?}, this proxy has {own:?}")
        });
        let unusable = unusable
            .iter()
            .map(|(name, reason)| format!("worker {name} cannot be used: {reason}"));
        let all: Vec<String> = others.chain(unusable).collect();
        let more = all.len().saturating_sub(SIGHTINGS_MAX);
        let mut text = all[..all.len() - more].join("; ");
        if more > 0 {
            text.push_str(&format!("; and {more} more"));
        }
        text
    }

    /// Logs when readiness changes.
    fn tell_readiness(&self, was_ready: bool) -> bool {
        let readiness = self.cluster.readiness();
        match &readiness {
            Ok(()) if !was_ready => {
                let up = |role| self.cluster.group(role).up_count();
                tracing::info!(
                    context_servers = up(Role::Context),
                    generation_servers = up(Role::Generation),
                    "ready: enough servers are up"
                );
            }
            Err(reason) if was_ready => tracing::warn!("not ready any more: {reason}"),
            Ok(()) | Err(_) => {}
        }
        readiness.is_ok()
    }
}

/// Who is registered, by key.
#[derive(Debug, Default)]
struct Roster {
    workers: BTreeMap<String, Arc<Worker>>,
    /// Names of registrations that cannot be used, so that each is logged once.
    refused: BTreeSet<String>,
    checks: JoinSet<()>,
}

/// A server that started again on its port before its former registration expired stands in the store twice. The ids
/// hold the time, so the last of them is the newest.
fn keep_newest(registered: &mut BTreeMap<String, (String, Role, Endpoint)>) {
    let newest: BTreeMap<(u8, Endpoint), String> = registered
        .iter()
        .map(|(key, (_, role, endpoint))| {
            ((role.in_cluster_info().1, endpoint.clone()), key.clone())
        })
        .collect();
    registered.retain(|key, (_, role, endpoint)| {
        newest.get(&(role.in_cluster_info().1, endpoint.clone())) == Some(key)
    });
}

/// A registration's id, role and address, or why it cannot be used.
fn understand(value: &str) -> Result<(String, Role, Endpoint), String> {
    let registration: Registration = serde_json::from_str(value)
        .map_err(|error| format!("its value is no registration: {error}"))?;
    let Registration {
        worker_id,
        host,
        port,
        role,
    } = registration;
    let role = Role::of_number(role)
        .ok_or_else(|| format!("its role is {role}, expected 0 (context) or 1 (generation)"))?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let is_wildcard = bare
        .parse::<std::net::IpAddr>()
        .is_ok_and(|address| address.is_unspecified());
    if is_wildcard {
        return Err(format!(
            "it registered {host}, which is no address of anyone"
        ));
    }
    let endpoint = Endpoint {
        host: bare.to_owned(),
        port,
    };
    // The same rules as for an address in a file.
    let endpoint = endpoint
        .to_string()
        .parse()
        .map_err(|_| format!("{endpoint} is no address"))?;
    Ok((worker_id, role, endpoint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registration_is_understood_or_refused_with_its_reason() {
        let value = |host: &str, port: u32, role: u32| {
            format!(r#"{{"worker_id":"w","host":"{host}","port":{port},"role":{role}}}"#)
        };
        let (id, role, endpoint) = understand(&value("node1", 8001, 1)).unwrap();
        assert_eq!((id.as_str(), role), ("w", Role::Generation));
        assert_eq!(endpoint.to_string(), "node1:8001");
        for host in ["::1", "[::1]"] {
            let (_, _, endpoint) = understand(&value(host, 8001, 0)).unwrap();
            assert_eq!(endpoint.to_string(), "[::1]:8001");
        }
        for (text, reason) in [
            (value("0.0.0.0", 8001, 0), "it registered 0.0.0.0"),
            (value("::", 8001, 0), "it registered ::"),
            (value("node1", 8001, 2), "its role is 2"),
            (value("node1", 0, 0), "node1:0 is no address"),
            (value("a b", 1, 0), "a b:1 is no address"),
            (value("node1", 70000, 0), "its value is no registration"),
            ("{}".to_owned(), "its value is no registration"),
        ] {
            let error = understand(&text).unwrap_err();
            assert!(error.starts_with(reason), "{error}");
        }
    }
}

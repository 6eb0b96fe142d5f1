//! `disagg_cluster`: service discovery (COMPAT.md §6.1). Typed and checked here; not yet served.

use std::time::Duration;

use crate::disagg::Endpoint;
use crate::error::ConfigErrorKind;
use crate::section::kind::{FreeText, Seconds, Size, Sub, Text};
use crate::section::read::{Findings, read_section};
use crate::section::{Located, section};
use crate::yaml::{Node, quoted};

/// Where a cluster keeps its list of workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterStore {
    /// In the proxy itself, reached over HTTP.
    Proxy {
        /// Whether the connection is encrypted.
        tls: bool,
        /// The proxy's address.
        endpoint: Endpoint,
    },
    /// In etcd.
    Etcd {
        /// The members' addresses.
        endpoints: Vec<Endpoint>,
    },
}

/// `disagg_cluster`, resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterConfig {
    /// Where the list of workers is kept.
    pub store: ClusterStore,
    /// Namespace; the same on all sides.
    pub name: String,
    /// Context servers that must be there before requests are served.
    pub context_servers_min: u32,
    /// Generation servers that must be there before requests are served.
    pub generation_servers_min: u32,
    /// How often a worker says that it is alive.
    pub heartbeat_interval: Duration,
    /// After how long a silent worker is dropped.
    pub inactive_timeout: Duration,
}

section! {
    /// How many servers must be there before requests are served.
    RawMinimalInstances "minimal_instances" {
        /// Context servers.
        context_servers: Size = "1";
        /// Generation servers.
        generation_servers: Size = "1";
    }
    unserved {}
    groups &[];
}

section! {
    /// Service discovery: workers register, and the proxy finds them.
    RawCluster "disagg_cluster" {
        /// Where the list of workers is kept: `http://host:port` or `https://host:port` for the proxy's
        /// own store, `etcd://host:port[,etcd://host:port…]` for etcd.
        cluster_uri: Text = "null";
        /// Namespace; the same on all sides.
        cluster_name: FreeText = "\"\"";
        /// How many servers must be there before requests are served.
        minimal_instances: Sub<RawMinimalInstances> = "{}";
        /// How often a worker says that it is alive, in seconds.
        heartbeat_interval_sec: Seconds = "5";
        /// After how many seconds of silence a worker is dropped; more than the heartbeat interval.
        inactive_timeout_sec["inactive_interval_sec"]: Seconds = "10";
    }
    unserved {}
    groups &[];
}

/// Reads and checks the section.
pub(crate) fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<ClusterConfig> {
    let raw = read_section::<RawCluster>(node, path, findings)?;
    let minimal = raw
        .minimal_instances
        .map(|given| given.value)
        .unwrap_or_default();
    let heartbeat_interval = raw
        .heartbeat_interval_sec
        .map_or(Duration::from_secs(5), |given| given.value);
    let inactive_timeout = raw
        .inactive_timeout_sec
        .as_ref()
        .map_or(Duration::from_secs(10), |given| given.value);
    if heartbeat_interval >= inactive_timeout {
        let (place, path) = raw.inactive_timeout_sec.map_or(
            (node.place, format!("{path}.inactive_timeout_sec")),
            |given| (given.place, given.path),
        );
        let what = format!(
            "is {} s, not more than the heartbeat interval of {} s: every worker would be dropped",
            inactive_timeout.as_secs_f64(),
            heartbeat_interval.as_secs_f64()
        );
        findings.conflict(place, &path, what);
    }
    let Some(uri) = raw.cluster_uri else {
        if node
            .entry("cluster_uri")
            .is_none_or(|entry| entry.node.is_null())
        {
            findings.missing(node.place, &format!("{path}.cluster_uri"), URI_FORMS);
        }
        return None;
    };
    Some(ClusterConfig {
        store: store_of(&uri, findings)?,
        name: raw
            .cluster_name
            .map(|given| given.value)
            .unwrap_or_default(),
        context_servers_min: minimal.context_servers.map_or(1, |given| given.value),
        generation_servers_min: minimal.generation_servers.map_or(1, |given| given.value),
        heartbeat_interval,
        inactive_timeout,
    })
}

const URI_FORMS: &str =
    "`http://host:port`, `https://host:port` or `etcd://host:port[,etcd://host:port…]`";

fn store_of(uri: &Located<String>, findings: &mut Findings) -> Option<ClusterStore> {
    let store = parse_store(&uri.value);
    if store.is_none() {
        let kind = ConfigErrorKind::WrongValue {
            found: quoted(&uri.value),
            expected: URI_FORMS.to_owned(),
        };
        findings.error(uri.place, &uri.path, kind, None);
    }
    store
}

fn parse_store(uri: &str) -> Option<ClusterStore> {
    if uri.starts_with("etcd://") {
        let endpoint = |part: &str| part.trim().strip_prefix("etcd://")?.parse().ok();
        let endpoints = uri
            .split(',')
            .map(endpoint)
            .collect::<Option<Vec<Endpoint>>>()?;
        return Some(ClusterStore::Etcd { endpoints });
    }
    let (scheme, address) = uri.split_once("://")?;
    let tls = match scheme {
        "http" => false,
        "https" => true,
        _ => return None,
    };
    let endpoint = address.trim_end_matches('/').parse().ok()?;
    Some(ClusterStore::Proxy { tls, endpoint })
}

#[cfg(test)]
mod tests;

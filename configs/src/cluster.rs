//! `disagg_cluster`: service discovery (COMPAT.md §6.1), and the token that guards it.
//!
//! The proxy keeps the list of workers; workers register there over HTTP. Other stores are known and refused by name.

use std::fmt::Write as _;
use std::time::Duration;

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::disagg::Endpoint;
use crate::error::ConfigErrorKind;
use crate::section::kind::{FreeText, Seconds, Size, Sub, Text};
use crate::section::read::{Findings, read_section};
use crate::section::{Located, section};
use crate::yaml::{Node, number_text, quoted};

/// Variable with the secret that all processes of one job share.
pub const JOB_SECRET_VARIABLE: &str = "BATON_JOB_SECRET";

/// What every key of every cluster begins with; the cluster's name follows.
pub const KEY_ROOT: &str = "/trtllm-disagg/";

/// `disagg_cluster`, resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterConfig {
    /// The proxy that keeps the list of workers.
    pub store: Endpoint,
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

impl ClusterConfig {
    /// What the keys of this cluster's workers begin with.
    #[must_use]
    pub fn key_prefix(&self) -> String {
        format!("{KEY_ROOT}{}/workers/", self.name)
    }
}

/// What a caller of the store shows as `authorization: Bearer …` where a job secret is set. It proves the secret and
/// does not give it away; it is of use for the store alone.
#[must_use]
pub fn store_token(secret: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.trim().as_bytes())
        .expect("HMAC takes keys of any length");
    mac.update(b"baton store of workers");
    let bytes = mac.finalize().into_bytes();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
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
        /// Where the list of workers is kept: `http://host:port`, the proxy's own address.
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

/// The section as YAML that resolves to the same.
pub(crate) fn render(out: &mut String, config: Option<&ClusterConfig>) {
    let Some(config) = config else {
        out.push_str("disagg_cluster: null\n");
        return;
    };
    // Writing to a String cannot fail.
    let _ = write!(
        out,
        "disagg_cluster:\n  cluster_uri: {}\n  cluster_name: {}\n  minimal_instances:\n    context_servers: {}\n    \
         generation_servers: {}\n  heartbeat_interval_sec: {}\n  inactive_timeout_sec: {}\n",
        quoted(&format!("http://{}", config.store)),
        quoted(&config.name),
        config.context_servers_min,
        config.generation_servers_min,
        number_text(config.heartbeat_interval.as_secs_f64()),
        number_text(config.inactive_timeout.as_secs_f64()),
    );
}

const URI_FORMS: &str = "`http://host:port`, the proxy's address";

/// A store as its URI names it.
#[derive(Debug, PartialEq, Eq)]
enum Store {
    /// The proxy's own.
    Proxy(Endpoint),
    /// Known, and not served.
    Elsewhere(&'static str),
}

/// The proxy that a URI names.
pub(crate) fn store_of(uri: &Located<String>, findings: &mut Findings) -> Option<Endpoint> {
    let kind = match parse_store(&uri.value) {
        Some(Store::Proxy(endpoint)) => return Some(endpoint),
        Some(Store::Elsewhere(what)) => ConfigErrorKind::NotServed {
            found: quoted(&uri.value),
            what: what.to_owned(),
        },
        None => ConfigErrorKind::WrongValue {
            found: quoted(&uri.value),
            expected: URI_FORMS.to_owned(),
        },
    };
    let hint = matches!(kind, ConfigErrorKind::NotServed { .. })
        .then(|| format!("the proxy keeps the list itself: {URI_FORMS}"));
    findings.error(uri.place, &uri.path, kind, hint);
    None
}

fn parse_store(uri: &str) -> Option<Store> {
    if uri.starts_with("etcd://") {
        let endpoint = |part: &str| part.trim().strip_prefix("etcd://")?.parse().ok();
        uri.split(',')
            .map(endpoint)
            .collect::<Option<Vec<Endpoint>>>()?;
        return Some(Store::Elsewhere("etcd as the list of workers"));
    }
    let (scheme, address) = uri.split_once("://")?;
    let endpoint = address.trim_end_matches('/').parse().ok()?;
    match scheme {
        "http" => Some(Store::Proxy(endpoint)),
        "https" => Some(Store::Elsewhere("an encrypted connection to the proxy")),
        _ => None,
    }
}

#[cfg(test)]
mod tests;

//! `disagg_config.yaml`: what the proxy is told (COMPAT.md §4).
//!
//! Top-level keys that are engine options are inherited by both server sections. The proxy uses addresses
//! and its own keys; `baton up` and MPI worlds also use the sections' engine options.

mod endpoint;
mod group;
mod render;
pub(crate) mod router;

use std::path::Path;
use std::time::Duration;

use crate::cluster::{self, ClusterConfig, RawCluster};
use crate::error::{ConfigErrors, Warning};
use crate::llm::RawLlm;
use crate::section::kind::{
    Anything, Choice, Choices, Flag, Later, OneOf, Port, Seconds, Size, StrictFlag, Text, Whole,
};
use crate::section::read::{Findings, read_open_section, report_unknown};
use crate::section::{Section, section};
use crate::yaml::{Document, Entry, Node, Origin, Value};

pub(crate) use endpoint::Address;
pub use endpoint::{Endpoint, EndpointError, ServerAddress};
pub use group::InstanceGroup;
pub(crate) use group::RawGroup;
pub use render::to_yaml;
pub use router::RouterConfig;

/// One role's servers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerGroup {
    /// Where they are, one an instance.
    pub servers: Vec<ServerAddress>,
    /// How one of them is chosen.
    pub router: RouterConfig,
}

/// `disagg_config.yaml`, resolved for the proxy.
#[derive(Debug, Clone, PartialEq)]
pub struct DisaggConfig {
    /// Bind address.
    pub hostname: String,
    /// Bind port; 0 lets the kernel choose.
    pub port: u16,
    /// Model name, for the sample client; the proxy does not use it.
    pub model: Option<String>,
    /// Context servers.
    pub context_servers: ServerGroup,
    /// Generation servers.
    pub generation_servers: ServerGroup,
    /// Service discovery: further servers register.
    pub cluster: Option<ClusterConfig>,
    /// Retries of an upstream call, each on another server.
    pub max_retries: u32,
    /// Size of the per-request metrics ring; 0 keeps nothing.
    pub perf_metrics_max_requests: u32,
    /// Node id inside `disagg_request_id`, 0 to 255 (COMPAT.md §8.4).
    pub node_id: u8,
    /// Whether a request may bring its own chat template.
    pub allow_request_chat_template: bool,
    /// How long idle client connections are kept.
    pub keep_alive: Duration,
}

impl Default for DisaggConfig {
    fn default() -> Self {
        Self {
            hostname: "localhost".to_owned(),
            port: 8000,
            model: None,
            context_servers: ServerGroup::default(),
            generation_servers: ServerGroup::default(),
            cluster: None,
            max_retries: 1,
            perf_metrics_max_requests: 0,
            node_id: 0,
            allow_request_chat_template: false,
            keep_alive: Duration::from_secs(10),
        }
    }
}

/// The whole document, for those who also start the instances.
#[derive(Debug, Clone, PartialEq)]
pub struct DisaggDocument {
    /// The proxy's part; a section without `urls` has no servers here.
    pub proxy: DisaggConfig,
    /// The context instances.
    pub context: InstanceGroup,
    /// The generation instances.
    pub generation: InstanceGroup,
}

impl DisaggDocument {
    /// Ranks of one MPI world that holds every instance: the sum over distinct addresses (COMPAT.md §4.4).
    #[must_use]
    pub fn world_ranks(&self) -> u64 {
        let context = &self.proxy.context_servers.servers;
        let generation = self.proxy.generation_servers.servers.iter();
        let shared_count = generation.filter(|server| context.contains(server)).count();
        let ranks = |group: &InstanceGroup, less: usize| {
            let instances = u64::from(group.num_instances);
            let less = u64::try_from(less).unwrap_or(u64::MAX);
            instances
                .saturating_sub(less)
                .saturating_mul(group.instance_ranks())
        };
        ranks(&self.context, 0).saturating_add(ranks(&self.generation, shared_count))
    }
}

/// Order of the two phases of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScheduleStyle {
    ContextFirst,
}

impl Choices for ScheduleStyle {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[
        ("context_first", Choice::Is(Self::ContextFirst)),
        (
            "generation_first",
            Choice::NotServed("asking both servers at once; use `context_first`"),
        ),
    ];
}

section! {
    /// What the proxy is told: its own address, its servers, and options that the servers inherit.
    RawDisagg "disagg_config" {
        /// Address that the proxy binds and that the sample client asks.
        hostname: Text = "localhost";
        /// Port that the proxy binds; 0 lets the kernel choose.
        port: Port = "8000";
        /// How often a failed call to a server is tried again, each time on another server.
        max_retries: Whole<u32, 0, 100> = "1";
        /// For how many requests timings are kept for `/perf_metrics`; 0 keeps none.
        perf_metrics_max_requests: Size = "0";
        /// Sets `return_perf_metrics` in both server sections.
        return_perf_metrics: Flag = "false";
        /// Number of this proxy in request ids, 0 to 255; proxies that share workers need different ones.
        /// `null` takes the last byte of the machine's network address.
        node_id: Whole<u8, 0, 255> = "null";
        /// Whether a request may bring its own chat template.
        allow_request_chat_template: StrictFlag = "false";
        /// Processes of the original's proxy. One process uses every core here, so more change nothing.
        num_workers: Whole<u32, 1, 1024> = "1";
        /// How long an idle client connection is kept, in seconds.
        server_keep_alive_timeout: Seconds = "10";
    }
    checked {
        /// The servers that read prompts.
        context_servers: Later<RawGroup> = "{}";
        /// The servers that write answers.
        generation_servers: Later<RawGroup> = "{}";
        /// Service discovery: servers register with the proxy, and need no `urls`.
        disagg_cluster: Later<RawCluster> = "null";
    }
    unserved {
        /// Whether the context or the generation server is asked first.
        schedule_style: OneOf<ScheduleStyle> = "context_first", Quiet "the context server is asked first";
        /// Directory for files of request timings.
        perf_metrics_output_dir: Text = "null", Refused "writing request timings to files; read `/perf_metrics`";
        /// When a generation server reads the prompt itself.
        conditional_disagg_config: Anything = "null", Refused "skipping the context server";
        /// Where traces are sent.
        otlp_config: Anything = "null", Refused "exporting traces";
        /// Leave the messages out of requests to generation servers.
        gen_strip_message_history: Flag = "false", Refused "leaving messages out of requests";
        /// Send token ids as bytes to generation servers.
        gen_tokids_ctxbytes: Flag = "false", Refused "token ids as bytes in requests";
        /// Another proxy that coordinates this one.
        disagg_coordinator_url: Text = "null", Refused "a coordinator; one process serves on every core";
    }
    groups &[];
}

/// Reads and resolves a file for the proxy, which needs the addresses of both sections, or service discovery.
///
/// # Errors
/// Everything that is wrong with the file.
pub fn load(path: &Path) -> Result<(DisaggConfig, Vec<Warning>), ConfigErrors> {
    let document = Document::read(path)?;
    let (resolved, warnings) = resolve(&document, default_node_id())?;
    let mut findings = Findings::new(&document);
    let groups = [
        ("context_servers", &resolved.proxy.context_servers),
        ("generation_servers", &resolved.proxy.generation_servers),
    ];
    for (name, group) in groups {
        if group.servers.is_empty() && resolved.proxy.cluster.is_none() {
            let place = document.root().entry(name).and_then(|entry| entry.place);
            findings.missing(place, &format!("{name}.urls"), "a list of `host:port`");
        }
    }
    findings.finish()?;
    Ok((resolved.proxy, warnings))
}

/// Resolves a document; sections need no addresses.
///
/// # Errors
/// Everything that is wrong with the document.
pub fn resolve(
    document: &Document,
    default_node_id: u8,
) -> Result<(DisaggDocument, Vec<Warning>), ConfigErrors> {
    let mut findings = Findings::new(document);
    let resolved = read(document.root(), default_node_id, &mut findings);
    let warnings = findings.finish()?;
    let mut complete = resolved.expect("a document without mistakes resolves");
    let folder = Path::new(document.file()).parent().unwrap_or(Path::new(""));
    for group in [
        &mut complete.proxy.context_servers,
        &mut complete.proxy.generation_servers,
    ] {
        let servers = std::mem::take(&mut group.servers);
        group.servers = servers
            .into_iter()
            .map(|server| server.in_folder(folder))
            .collect();
    }
    Ok((complete, warnings))
}

fn read(root: &Node, default_node_id: u8, findings: &mut Findings) -> Option<DisaggDocument> {
    let (raw, rest) = read_open_section::<RawDisagg>(root, "", findings)?;
    let (inherited, unknown): (Vec<Entry>, Vec<Entry>) = rest
        .into_iter()
        .partition(|entry| RawLlm::TABLE.knows(&entry.key));
    let known: Vec<&str> = RawDisagg::TABLE
        .names()
        .chain(RawLlm::TABLE.names())
        .collect();
    report_unknown(&unknown, "", &known, findings);
    if let Some(workers) = raw.num_workers.as_ref().filter(|workers| workers.value > 1) {
        let text = format!(
            "{} changes nothing: one process serves on every core",
            workers.value
        );
        findings.warn(workers.place, &workers.path, text);
    }
    let given = |name: &str| {
        root.entry(name)
            .map(|entry| &entry.node)
            .filter(|n| !n.is_null())
    };
    // What is no mapping has been reported with the other keys.
    let cluster = given("disagg_cluster")
        .filter(|node| matches!(node.value, Value::Map(_)))
        .and_then(|node| {
            let config = cluster::read(node, "disagg_cluster", findings)?;
            warn_of_unreachable_store(&config, node, &raw, findings);
            Some(config)
        });
    let model = given_text(&inherited, "model");
    let force_metrics = raw
        .return_perf_metrics
        .as_ref()
        .is_some_and(|flag| flag.value);
    let inherited = mark_inherited(inherited, force_metrics.then_some(root));
    let mut section = |name: &str| group::read(given(name), name, &inherited, findings);
    let (context, generation) = (section("context_servers"), section("generation_servers"));
    let (context, generation) = (context?, generation?);
    group::check_shared(&context, &generation, findings);
    let proxy = DisaggConfig {
        model,
        context_servers: context.server_group(),
        generation_servers: generation.server_group(),
        cluster,
        ..resolve_proxy(raw, default_node_id)
    };
    Some(DisaggDocument {
        proxy,
        context: context.instances,
        generation: generation.instances,
    })
}

/// Workers register where the URI says; the proxy listens where its own keys say.
fn warn_of_unreachable_store(
    config: &ClusterConfig,
    node: &Node,
    raw: &RawDisagg,
    findings: &mut Findings,
) {
    let host = raw
        .hostname
        .as_ref()
        .map_or("localhost", |given| given.value.as_str());
    let port = raw.port.as_ref().map_or(8000, |given| given.value);
    let is_local = |host: &str| {
        host.eq_ignore_ascii_case("localhost")
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|address| address.is_loopback())
    };
    let place = node.entry("cluster_uri").and_then(|entry| entry.node.place);
    let path = "disagg_cluster.cluster_uri";
    let store = &config.store;
    if is_local(host) && !is_local(&store.host) {
        let text = format!(
            "is at {store}, but the proxy listens on {host} only: servers on other machines cannot register; \
             set `hostname: 0.0.0.0`"
        );
        findings.warn(place, path, text);
    }
    if port != 0 && port != store.port {
        let text = format!(
            "is at port {}, but the proxy listens on port {port}",
            store.port
        );
        findings.warn(place, path, text);
    }
}

/// The proxy's own keys; the servers are added by the caller.
fn resolve_proxy(raw: RawDisagg, default_node_id: u8) -> DisaggConfig {
    let defaults = DisaggConfig::default();
    DisaggConfig {
        hostname: raw.hostname.map_or(defaults.hostname, |given| given.value),
        port: raw.port.map_or(defaults.port, |given| given.value),
        max_retries: raw
            .max_retries
            .map_or(defaults.max_retries, |given| given.value),
        perf_metrics_max_requests: raw
            .perf_metrics_max_requests
            .map_or(defaults.perf_metrics_max_requests, |given| given.value),
        node_id: raw.node_id.map_or(default_node_id, |given| given.value),
        allow_request_chat_template: raw
            .allow_request_chat_template
            .map_or(defaults.allow_request_chat_template, |given| given.value),
        keep_alive: raw
            .server_keep_alive_timeout
            .map_or(defaults.keep_alive, |given| given.value),
        ..defaults
    }
}

/// The text of a key, if it is one.
fn given_text(entries: &[Entry], key: &str) -> Option<String> {
    match &entries.iter().find(|entry| entry.key == key)?.node.value {
        Value::Text(text) => Some(text.clone()),
        _ => None,
    }
}

/// A section's own keys, and its engine options with the inherited ones.
pub(crate) fn effective_section(root: &Node, name: &str) -> (Node, Node) {
    let inherited = root
        .entries()
        .iter()
        .filter(|entry| RawLlm::TABLE.knows(&entry.key) && !RawDisagg::TABLE.knows(&entry.key))
        .cloned()
        .collect();
    let forced = root
        .entry("return_perf_metrics")
        .filter(|e| e.node.value == Value::Bool(true));
    let inherited = mark_inherited(inherited, forced.map(|_| root));
    let section = root
        .entry(name)
        .map(|entry| entry.node.entries().to_vec())
        .unwrap_or_default();
    let (own, engine): (Vec<Entry>, Vec<Entry>) = section
        .into_iter()
        .partition(|entry| RawGroup::TABLE.knows(&entry.key));
    // The document has been checked, so what would be found here is known not to be there.
    let mut scratch = Findings::new(&Document::from_root("", root.clone()));
    let engine = group::inherit(engine, name, &inherited, &mut scratch);
    (Node::new(Value::Map(own)), Node::new(Value::Map(engine)))
}

/// The top level's engine options as both sections get them; `forced` adds `return_perf_metrics`.
fn mark_inherited(mut entries: Vec<Entry>, forced: Option<&Node>) -> Vec<Entry> {
    entries.extend(
        forced
            .and_then(|root| root.entry("return_perf_metrics"))
            .cloned(),
    );
    for entry in &mut entries {
        entry.origin = Origin::Inherited(entry.key.clone());
    }
    entries
}

/// The node id of a proxy that is given none: the last byte of this machine's first network address.
#[must_use]
pub fn default_node_id() -> u8 {
    let Ok(interfaces) = std::fs::read_dir("/sys/class/net") else {
        return 0;
    };
    let mut names: Vec<_> = interfaces
        .flatten()
        .map(|interface| interface.path())
        .collect();
    names.sort();
    let address = |path: std::path::PathBuf| std::fs::read_to_string(path.join("address")).ok();
    names
        .into_iter()
        .filter_map(address)
        .find_map(|text| last_byte(text.trim()))
        .unwrap_or(0)
}

/// The last byte of a hardware address, unless it is all zeros as the loopback's is.
fn last_byte(address: &str) -> Option<u8> {
    let (_, last) = address.rsplit_once(':')?;
    let all_zero = address.chars().all(|c| c == '0' || c == ':');
    u8::from_str_radix(last, 16).ok().filter(|_| !all_zero)
}

#[cfg(test)]
mod tests;

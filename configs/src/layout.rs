//! Our layout file: a whole deployment, as `baton up` runs it on one machine and `baton slurm` on a cluster.
//!
//! `baton up -c` also takes a `disagg_config.yaml` that names a model: its `urls` give the ports and its
//! sections the engine options. An existing benchmark `config.yaml` is read as the layout that it means. [`load`]
//! recognises which of the three it has.

pub mod inspect;
pub mod job;
mod raw;
pub mod render;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::disagg::{self, DisaggConfig, DisaggDocument, Endpoint, InstanceGroup};
use crate::error::{ConfigErrors, Warning};
use crate::layout::job::{JobLayout, RawAddress};
pub(crate) use crate::layout::raw::RawLayout;
use crate::layout::raw::{RawProxy, RawRole};
use crate::llm::{self, LlmOptions};
use crate::section::Located;
use crate::section::read::{Findings, read_section};
use crate::transceiver::TransceiverConfig;
use crate::yaml::{Document, Entry, Node, Origin, Value, join};

/// The layout that `baton up` runs when it is given no file; it names no model.
pub const QUICKSTART: &str = include_str!("../samples/quickstart.yaml");

/// Context instances of a layout that does not say.
pub(crate) const CONTEXT_INSTANCES: u32 = 2;
/// Generation instances of a layout that does not say.
pub(crate) const GENERATION_INSTANCES: u32 = 1;

/// One role's instances, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct RoleLayout {
    /// How many instances there are.
    pub instances: u32,
    /// Their addresses, one an instance; empty lets the kernel choose ports on the loopback.
    pub endpoints: Vec<Endpoint>,
    /// Their engine options; the model is always named in them.
    pub options: LlmOptions,
    /// Environment variables of their processes, beside the inherited ones.
    pub environment: BTreeMap<String, String>,
}

/// The proxy, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct ProxyLayout {
    /// Everything but the servers, whose addresses are known once they run.
    pub config: DisaggConfig,
    /// How long the proxy waits for the servers to come up.
    pub server_start_timeout: Duration,
    /// How long one call to a server may take.
    pub request_timeout: Duration,
    /// Environment variables of the proxy, beside the inherited ones.
    pub environment: BTreeMap<String, String>,
}

/// A whole deployment.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// The model.
    pub model: String,
    /// The instances that read prompts.
    pub context: RoleLayout,
    /// The instances that write answers.
    pub generation: RoleLayout,
    /// The proxy.
    pub proxy: ProxyLayout,
    /// Directory for log files, if the file names one.
    pub log_dir: Option<PathBuf>,
    /// How it becomes jobs of a cluster, if the file says.
    pub job: Option<JobLayout>,
    /// The keys that it gives for clusters only.
    pub job_keys: Vec<&'static str>,
}

impl Layout {
    /// The proxy's configuration once the instances' addresses are known.
    #[must_use]
    pub fn disagg_config(&self, context: Vec<Endpoint>, generation: Vec<Endpoint>) -> DisaggConfig {
        let mut config = self.proxy.config.clone();
        config.context_servers.servers = context.into_iter().map(Into::into).collect();
        config.generation_servers.servers = generation.into_iter().map(Into::into).collect();
        config
    }
}

/// Reads and resolves a layout, or a `disagg_config.yaml` that names a model.
///
/// # Errors
/// Everything that is wrong with the file.
pub fn load(path: &Path) -> Result<(Layout, Vec<Warning>), ConfigErrors> {
    resolve(&Document::read(path)?, None)
}

/// The embedded layout with this model.
///
/// # Errors
/// If the model's name is empty.
pub fn quickstart(model: &str) -> Result<(Layout, Vec<Warning>), ConfigErrors> {
    resolve(
        &Document::parse("quickstart.yaml", QUICKSTART)?,
        Some(model),
    )
}

/// Resolves a document; `model` is taken where the document names none.
///
/// # Errors
/// Everything that is wrong with the document.
pub fn resolve(
    document: &Document,
    model: Option<&str>,
) -> Result<(Layout, Vec<Warning>), ConfigErrors> {
    inspect::inspect(document, model).finish(Vec::new())
}

/// Resolves a document that is a layout and nothing else.
pub(crate) fn resolve_layout(
    document: &Document,
    model: Option<&str>,
) -> Result<(Layout, Vec<Warning>), ConfigErrors> {
    inspect::inspect_layout(document, model).finish(Vec::new())
}

/// The document with each role's engine options as they work, and without those that were inherited.
pub(crate) fn effective_root(root: &Node) -> Node {
    let shared = root.entry("engine").map(|entry| &entry.node);
    let others = |entries: &[Entry]| -> Vec<Entry> {
        entries
            .iter()
            .filter(|entry| entry.key != "engine")
            .cloned()
            .collect()
    };
    let mut entries = others(root.entries());
    for role in ["context", "generation"] {
        if !entries.iter().any(|entry| entry.key == role) {
            entries.push(written(role, Node::new(Value::Null)));
        }
    }
    for role in entries
        .iter_mut()
        .filter(|e| e.key == "context" || e.key == "generation")
    {
        let own = role.node.entry("engine").map(|entry| &entry.node);
        let merged = written("engine", merged_engine(shared, own));
        let mut inner = others(role.node.entries());
        inner.push(merged);
        role.node.value = Value::Map(inner);
    }
    Node {
        value: Value::Map(entries),
        place: root.place,
    }
}

fn written(key: &str, node: Node) -> Entry {
    Entry {
        key: key.to_owned(),
        place: None,
        node,
        origin: Origin::Written,
    }
}

/// Whether the keys are those of a `disagg_config.yaml`.
pub(crate) fn is_disagg(document: &Document) -> bool {
    const SIGNS: [&str; 5] = [
        "context_servers",
        "generation_servers",
        "disagg_cluster",
        "hostname",
        "port",
    ];
    document.top_level_keys().any(|key| SIGNS.contains(&key))
}

pub(crate) fn with_model(document: &Document, model: Option<&str>) -> Document {
    let named = document
        .root()
        .entry("model")
        .is_some_and(|entry| !entry.node.is_null());
    let (Some(model), false, Value::Map(written)) = (model, named, &document.root().value) else {
        return document.clone();
    };
    let mut entries: Vec<Entry> = written
        .iter()
        .filter(|entry| entry.key != "model")
        .cloned()
        .collect();
    entries.push(Entry {
        key: "model".to_owned(),
        place: None,
        node: Node::text(model),
        origin: Origin::CommandLine,
    });
    document.with_entries(entries)
}

pub(crate) fn read(root: &Node, findings: &mut Findings) -> Option<Layout> {
    let mut raw = read_section::<RawLayout>(root, "", findings)?;
    if raw.model.is_none() && root.entry("model").is_none_or(|entry| entry.node.is_null()) {
        findings.missing(None, "model", MODEL_FORMS);
    }
    let shared = Shared {
        engine: raw.engine.as_ref().map(|given| given.value.clone()),
        model: raw.model.as_ref().map(|given| given.value.clone()),
        served_model_name: raw.served_model_name.take().map(|given| given.value),
    };
    let context = read_role(
        raw.context.as_ref(),
        "context",
        CONTEXT_INSTANCES,
        &shared,
        findings,
    );
    let generation = read_role(
        raw.generation.as_ref(),
        "generation",
        GENERATION_INSTANCES,
        &shared,
        findings,
    );
    let raw_proxy = raw
        .proxy
        .take()
        .map(|given| given.value)
        .unwrap_or_default();
    let address = address_of(&raw_proxy);
    let proxy = resolve_proxy(raw_proxy, findings);
    let mut job = job::read(&raw, root, address, findings);
    let (mut context, mut generation) = (context?, generation?);
    if let Some(store) = job.as_mut().and_then(|job| job.discovery.as_mut()) {
        store.context_servers_min = context.instances;
        store.generation_servers_min = generation.instances;
        for role in [&mut context, &mut generation] {
            role.options.cluster.get_or_insert_with(|| store.clone());
        }
    }
    Some(Layout {
        model: shared.model?,
        context,
        generation,
        proxy,
        log_dir: raw.log_dir.map(|given| PathBuf::from(given.value)),
        job,
        job_keys: job::keys_of(root),
    })
}

const MODEL_FORMS: &str = "a GGUF file, a Hugging Face directory or a model id";

/// What the top level says to both roles.
struct Shared {
    engine: Option<Node>,
    model: Option<String>,
    served_model_name: Option<String>,
}

fn read_role(
    section: Option<&Located<Node>>,
    path: &str,
    default_instances: u32,
    shared: &Shared,
    findings: &mut Findings,
) -> Option<RoleLayout> {
    let absent = Node::new(Value::Map(Vec::new()));
    let node = section.map_or(&absent, |given| &given.value);
    let raw = read_section::<RawRole>(node, path, findings)?;
    let own = raw.engine.map(|given| given.value);
    let engine_path = join(path, "engine");
    let engine = merged_engine(shared.engine.as_ref(), own.as_ref());
    let mut options = llm::read(&engine, &engine_path, findings)?;
    options.model = options.model.or_else(|| shared.model.clone());
    options.served_model_name = options
        .served_model_name
        .or_else(|| shared.served_model_name.clone());
    options
        .transceiver
        .get_or_insert_with(TransceiverConfig::default);
    if let Some(given) = &raw.environment {
        check_names(given, findings);
    }
    Some(RoleLayout {
        instances: raw.instances.map_or(default_instances, |given| given.value),
        endpoints: Vec::new(),
        options,
        environment: raw.environment.map(|given| given.value).unwrap_or_default(),
    })
}

fn check_names(given: &Located<BTreeMap<String, String>>, findings: &mut Findings) {
    let at = Located {
        value: (),
        place: given.place,
        path: given.path.clone(),
    };
    job::check_environment(given.value.keys(), &at, findings);
}

/// A role's engine options over those of the top level.
pub(crate) fn merged_engine(shared: Option<&Node>, own: Option<&Node>) -> Node {
    let entries =
        |node: Option<&Node>| node.map(|node| node.entries().to_vec()).unwrap_or_default();
    let merged = merge(entries(shared), entries(own), "engine");
    Node {
        value: Value::Map(merged),
        place: own.or(shared).and_then(|node| node.place),
    }
}

fn merge(shared: Vec<Entry>, mut own: Vec<Entry>, shared_path: &str) -> Vec<Entry> {
    for mut entry in shared {
        let path = join(shared_path, &entry.key);
        entry.origin = Origin::Inherited(path.clone());
        let Some(present) = own.iter_mut().find(|own| own.key == entry.key) else {
            own.push(entry);
            continue;
        };
        if let (Value::Map(inner), Value::Map(below)) = (&mut present.node.value, entry.node.value)
        {
            *inner = merge(below, std::mem::take(inner), &path);
        }
    }
    own
}

/// What of the proxy is another thing on a cluster.
fn address_of(raw: &RawProxy) -> RawAddress {
    let environment = raw.environment.as_ref();
    RawAddress {
        hostname: raw.hostname.as_ref().map(|given| given.value.clone()),
        port: raw.port.clone(),
        node_id: raw.node_id.as_ref().map(|given| given.value),
        environment: environment
            .filter(|given| !given.value.is_empty())
            .map(|given| Located {
                value: (),
                place: given.place,
                path: given.path.clone(),
            }),
    }
}

fn resolve_proxy(raw: RawProxy, findings: &mut Findings) -> ProxyLayout {
    if let Some(given) = &raw.environment {
        check_names(given, findings);
    }
    let defaults = DisaggConfig::default();
    let seconds = Duration::from_secs;
    let config = DisaggConfig {
        hostname: raw
            .hostname
            .map_or("127.0.0.1".to_owned(), |given| given.value),
        port: raw.port.map_or(0, |given| given.value),
        max_retries: raw
            .max_retries
            .map_or(defaults.max_retries, |given| given.value),
        perf_metrics_max_requests: raw
            .perf_metrics_max_requests
            .map_or(defaults.perf_metrics_max_requests, |given| given.value),
        node_id: raw
            .node_id
            .map_or_else(disagg::default_node_id, |given| given.value),
        allow_request_chat_template: raw
            .allow_request_chat_template
            .map_or(defaults.allow_request_chat_template, |given| given.value),
        keep_alive: raw
            .server_keep_alive_timeout
            .map_or(defaults.keep_alive, |given| given.value),
        ..defaults
    };
    ProxyLayout {
        config,
        server_start_timeout: raw
            .server_start_timeout
            .map_or(seconds(180), |given| given.value),
        request_timeout: raw
            .request_timeout
            .map_or(seconds(180), |given| given.value),
        environment: raw.environment.map(|given| given.value).unwrap_or_default(),
    }
}

/// A layout from a `disagg_config.yaml`; every role must know its model.
pub(crate) fn from_disagg(
    document: DisaggDocument,
    root: &Node,
    findings: &mut Findings,
) -> Option<Layout> {
    let groups = [
        ("context_servers", &document.context),
        ("generation_servers", &document.generation),
    ];
    let unnamed = groups
        .into_iter()
        .find(|(_, group)| group.options.model.is_none());
    if let Some((section, _)) = unnamed {
        let both = groups
            .iter()
            .all(|(_, group)| group.options.model.is_none());
        let path = if both {
            "model".to_owned()
        } else {
            join(section, "model")
        };
        let place = root
            .entry(section)
            .and_then(|entry| entry.place)
            .filter(|_| !both);
        findings.missing(place, &path, MODEL_FORMS);
    }
    let model = document
        .proxy
        .model
        .clone()
        .or_else(|| document.context.options.model.clone())?;
    let mut config = document.proxy;
    config.model = Some(model.clone());
    config.context_servers.servers.clear();
    config.generation_servers.servers.clear();
    let timeout = Duration::from_secs(180);
    Some(Layout {
        model,
        context: role_of(document.context),
        generation: role_of(document.generation),
        proxy: ProxyLayout {
            config,
            server_start_timeout: timeout,
            request_timeout: timeout,
            environment: BTreeMap::new(),
        },
        log_dir: None,
        job: None,
        job_keys: Vec::new(),
    })
}

fn role_of(group: InstanceGroup) -> RoleLayout {
    let mut options = group.options;
    options
        .transceiver
        .get_or_insert_with(TransceiverConfig::default);
    RoleLayout {
        instances: group.num_instances,
        endpoints: group.endpoints,
        options,
        environment: BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests;

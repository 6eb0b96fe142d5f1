//! `context_servers` and `generation_servers`: addresses, router, and the instances' engine options.

use crate::disagg::router::{self, RouterConfig};
use crate::disagg::{Address, Endpoint, ServerAddress, ServerGroup};
use crate::error::ConfigErrorKind;
use crate::llm::{self, LlmOptions};
use crate::section::kind::{Later, List, Whole};
use crate::section::read::{Findings, read_open_section};
use crate::section::{Located, Section, section};
use crate::yaml::{Entry, Node, Value, join};

section! {
    /// One role's servers. Every other key is an engine option of its instances.
    RawGroup "server section" {
        /// How many instances there are. Without it there are as many as `urls`, or one.
        num_instances: Whole<u32, 1, 65535> = "1";
        /// Their addresses, one an instance: `host:port`, an IPv6 address in brackets; or `file:PATH` for a file
        /// that holds it, as `--report-addr` writes it, relative to this file.
        urls: List<Address> = "null";
        /// How one of them is chosen for a request.
        router: Later<router::RawRoundRobin> = "{}";
    }
    unserved {}
    groups &[];
}

/// One role's instances, for those who start them.
#[derive(Debug, Clone, PartialEq)]
pub struct InstanceGroup {
    /// How many there are.
    pub num_instances: u32,
    /// Their addresses, one an instance; empty where the file gives none, or gives address files.
    pub endpoints: Vec<Endpoint>,
    /// Their engine options.
    pub options: LlmOptions,
}

impl InstanceGroup {
    /// Ranks of one instance.
    #[must_use]
    pub fn instance_ranks(&self) -> u64 {
        let tensor = u64::from(self.options.tensor_parallel_size);
        tensor.saturating_mul(u64::from(self.options.pipeline_parallel_size))
    }
}

/// A section as it was read.
pub(crate) struct Group {
    pub(crate) instances: InstanceGroup,
    router: RouterConfig,
    /// The addresses with their places.
    urls: Vec<(ServerAddress, Node)>,
    /// The engine options as given, inherited ones included.
    engine: Node,
}

impl Group {
    pub(crate) fn server_group(&self) -> ServerGroup {
        ServerGroup {
            servers: self.urls.iter().map(|(url, _)| url.clone()).collect(),
            router: self.router.clone(),
        }
    }
}

/// Reads a section with what it inherits.
pub(crate) fn read(
    section: Option<&Node>,
    path: &str,
    inherited: &[Entry],
    findings: &mut Findings,
) -> Option<Group> {
    let absent = Node::new(Value::Map(Vec::new()));
    let node = section.unwrap_or(&absent);
    let (raw, own) = read_open_section::<RawGroup>(node, path, findings)?;
    let engine = Node {
        value: Value::Map(inherit(own, path, inherited, findings)),
        place: node.place,
    };
    let beside: Vec<&'static str> = RawGroup::TABLE.names().collect();
    let options = llm::read_beside(&engine, path, &beside, findings);
    let router_node = raw.router.as_ref().map(|given| &given.value);
    let router_path = join(path, "router");
    let router = router::read(router_node, &router_path, &engine, findings)
        .and_then(|wish| wish.served(router_node, &router_path, findings));
    let urls_given = node
        .entry("urls")
        .is_some_and(|entry| !entry.node.is_null());
    let urls = raw.urls;
    let num_instances = count(raw.num_instances.as_ref(), urls.as_ref(), findings);
    if urls_given && urls.is_none() {
        return None;
    }
    let urls = urls.map(|given| given.value).unwrap_or_default();
    check_distinct(&urls, path, findings);
    let fixed = urls.iter().map(|(url, _)| url.fixed().cloned());
    let endpoints = fixed.collect::<Option<_>>().unwrap_or_default();
    let instances = InstanceGroup {
        num_instances,
        endpoints,
        options: options?,
    };
    Some(Group {
        instances,
        router: router?,
        urls,
        engine,
    })
}

type Urls = Located<Vec<(ServerAddress, Node)>>;

fn count(given: Option<&Located<u32>>, urls: Option<&Urls>, findings: &mut Findings) -> u32 {
    let Some(urls) = urls else {
        return given.map_or(1, |given| given.value);
    };
    let found = u32::try_from(urls.value.len()).unwrap_or(u32::MAX);
    if let Some(count) = given.filter(|count| count.value != found) {
        let what = format!("{found} addresses for `num_instances: {}`", count.value);
        findings.conflict(urls.place, &urls.path, what);
    } else if found == 0 {
        let kind = ConfigErrorKind::WrongValue {
            found: "an empty list".to_owned(),
            expected: "at least one `host:port`".to_owned(),
        };
        findings.error(urls.place, &urls.path, kind, None);
    }
    found
}

fn check_distinct(urls: &[(ServerAddress, Node)], path: &str, findings: &mut Findings) {
    for (index, (url, node)) in urls.iter().enumerate() {
        if urls[..index].iter().any(|(earlier, _)| earlier == url) {
            let what = format!("duplicated address {url}");
            findings.conflict(node.place, &format!("{path}.urls[{index}]"), what);
        }
    }
}

/// The section's own options and the inherited ones; a key that stands in both must say the same.
pub(super) fn inherit(
    mut own: Vec<Entry>,
    path: &str,
    inherited: &[Entry],
    findings: &mut Findings,
) -> Vec<Entry> {
    for entry in inherited {
        let Some(present) = own.iter_mut().find(|own| own.key == entry.key) else {
            own.push(entry.clone());
            continue;
        };
        // The top level's switch for metrics is stronger than the sections'.
        if present.key == "return_perf_metrics" {
            *present = entry.clone();
        } else if !present.node.same_value(&entry.node) {
            let line = entry.place.map_or(0, |place| place.line);
            let what = format!(
                "key `{}` of section `{path}` is {}, but the top level has {} on line {line}",
                entry.key,
                present.node.shown(),
                entry.node.shown()
            );
            findings.conflict(present.node.place, &join(path, &present.key), what);
        }
    }
    own
}

/// An address in both sections is one instance, so both must tell it the same.
pub(crate) fn check_shared(context: &Group, generation: &Group, findings: &mut Findings) {
    for (index, (url, node)) in generation.urls.iter().enumerate() {
        let shared = context.urls.iter().any(|(other, _)| other == url);
        if shared && !context.engine.same_value(&generation.engine) {
            let what = format!("{url} is in both sections, which give it different engine options");
            findings.conflict(
                node.place,
                &format!("generation_servers.urls[{index}]"),
                what,
            );
        }
    }
}

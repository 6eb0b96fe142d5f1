//! The existing benchmark `config.yaml` (COMPAT.md §14.4), read as it is and taken for the layout that it means.
//!
//! What only concerns measuring, profiling or building is accepted and named in one warning. Two things differ from the
//! original on purpose: each instance gets a port of its own (there, a context and a generation instance on one node
//! collide), and `--segment` is asked for only where `set_segment: true` is written, because most clusters refuse it.

mod keys;
mod words;

use crate::layout::inspect::{Inspection, inspect_root};
use crate::section::kind::{Anything, Sub};
use crate::section::read::{Findings, read_section};
use crate::section::section;
use crate::yaml::{Document, Entry, Node, Origin, Value};

use keys::{RawEnvironment, RawHardware, RawJob, RawWorkers};
use words::{shell_words, variables};

section! {
    /// A deployment as the benchmark scripts of TensorRT-LLM describe it.
    RawBenchmark "benchmark" {}
    checked {
        /// What Slurm is told.
        slurm: Sub<RawJob> = "{}";
        /// How many instances there are, and where.
        hardware: Sub<RawHardware> = "{}";
        /// Container, model and variables.
        environment: Sub<RawEnvironment> = "{}";
        /// Engine options of both roles.
        worker_config: Sub<RawWorkers> = "{}";
    }
    unserved {
        /// What is measured.
        benchmark: Anything = "null", Ignored "concerns measuring; `scripts/bench` measures";
        /// What is profiled.
        profiling: Anything = "null", Ignored "concerns profiling the original";
        /// Which accuracy test runs.
        accuracy: Anything = "null", Ignored "concerns measuring";
    }
    groups &[];
}

/// GPUs of a node where the file does not say.
const GPUS_PER_NODE: u32 = 4;
/// Ports of the instances, up to the proxy's.
const PORTS: &str = "8000-8332";
const PROXY_PORT: u32 = 8333;
/// How long the scripts let the proxy wait for its servers, and for one answer, in seconds.
const PROXY_TIMEOUT_S: u32 = 7200;

/// Whether the keys are those of a benchmark file.
pub(crate) fn is_benchmark(document: &Document) -> bool {
    const SIGNS: [&str; 2] = ["worker_config", "hardware"];
    document.top_level_keys().any(|key| SIGNS.contains(&key))
}

/// Reads a benchmark file as a layout; mistakes stand where they were written.
pub(crate) fn inspect(document: &Document, model: Option<&str>) -> Inspection {
    let mut findings = Findings::new(document);
    let root = translate(document.root(), model, &mut findings);
    inspect_root(document, &root, findings)
}

/// The layout that the file means, each value with the path at which it was written.
fn translate(root: &Node, model: Option<&str>, findings: &mut Findings) -> Node {
    // Read for its mistakes and for the list of what has no effect; the values are taken as they stand.
    let _ = read_section::<RawBenchmark>(root, "", findings);
    let section = |name: &str| root.entry(name).map(|entry| &entry.node);
    let (slurm, hardware) = (section("slurm"), section("hardware"));
    let (environment, workers) = (section("environment"), section("worker_config"));
    let mut out = Vec::new();
    let mut add = |entry: Option<Entry>| out.extend(entry);
    let gpus = moved(hardware, "hardware", "gpus_per_node", "gpus_per_node");
    add(Some(gpus.unwrap_or_else(|| {
        fixed("gpus_per_node", Node::whole(GPUS_PER_NODE))
    })));
    add(Some(fixed("start", Node::text("steps"))));
    add(Some(fixed("ports", Node::text(PORTS))));
    let named = moved(environment, "environment", "model_path", "model");
    add(named.or_else(|| {
        model.map(|model| Entry {
            origin: Origin::CommandLine,
            ..fixed("model", Node::text(model))
        })
    }));
    add(moved(environment, "environment", "log_dir", "log_dir"));
    for (role, count, short) in [
        ("context", "num_ctx_servers", "ctx"),
        ("generation", "num_gen_servers", "gen"),
    ] {
        let instances = moved(hardware, "hardware", count, "instances")
            .unwrap_or_else(|| fixed("instances", Node::whole(1)));
        let own = format!("{short}_worker_env_var");
        let variables = variables(environment, &["worker_env_var", &own], findings);
        let entries = [
            Some(instances),
            workers.and_then(|workers| engine(workers, short)),
            variables.map(|map| fixed("environment", map)),
        ];
        let role_map = Value::Map(entries.into_iter().flatten().collect());
        add(Some(fixed(role, Node::new(role_map))));
    }
    add(Some(fixed("proxy", proxy(environment, findings))));
    add(Some(fixed("slurm", job(slurm, findings))));
    add(container(environment));
    Node {
        value: Value::Map(out),
        place: root.place,
    }
}

/// A key under its new name, with the path at which it was written. Nothing and empty text are not given.
fn moved(section: Option<&Node>, path: &str, from: &str, to: &str) -> Option<Entry> {
    let entry = section?.entry(from)?;
    let empty = entry.node.is_null() || entry.node.value == Value::Text(String::new());
    (!empty).then(|| Entry {
        key: to.to_owned(),
        place: entry.place,
        node: entry.node.clone(),
        origin: Origin::Inherited(format!("{path}.{from}")),
    })
}

fn fixed(key: &str, node: Node) -> Entry {
    Entry {
        key: key.to_owned(),
        place: None,
        node,
        origin: Origin::Written,
    }
}

/// A list of texts that were one text, each at the place of the whole.
fn list(from: &Node, words: Vec<String>) -> Node {
    let item = |word: String| Node {
        value: Value::Text(word),
        place: from.place,
    };
    Node {
        value: Value::List(words.into_iter().map(item).collect()),
        place: from.place,
    }
}

/// A role's engine options; each says where it was written, since they will be merged with others.
fn engine(workers: &Node, short: &str) -> Option<Entry> {
    let mut entry = moved(Some(workers), "worker_config", short, "engine")?;
    if let Value::Map(options) = &mut entry.node.value {
        for option in options {
            option.origin = Origin::Inherited(format!("worker_config.{short}.{}", option.key));
        }
    }
    Some(entry)
}

fn proxy(environment: Option<&Node>, findings: &mut Findings) -> Node {
    let timeout = || Node::whole(PROXY_TIMEOUT_S);
    let mut entries = vec![
        fixed("port", Node::whole(PROXY_PORT)),
        fixed("server_start_timeout", timeout()),
        fixed("request_timeout", timeout()),
    ];
    let own = variables(environment, &["server_env_var"], findings);
    entries.extend(own.map(|map| fixed("environment", map)));
    Node::new(Value::Map(entries))
}

fn job(slurm: Option<&Node>, findings: &mut Findings) -> Node {
    let names = [
        ("partition", "partition"),
        ("account", "account"),
        ("job_time", "time"),
        ("job_name", "job_name"),
        ("set_segment", "segment"),
    ];
    let mut entries: Vec<Entry> = names
        .into_iter()
        .filter_map(|(from, to)| moved(slurm, "slurm", from, to))
        .collect();
    if !entries.iter().any(|entry| entry.key == "time") {
        entries.push(fixed("time", Node::text("02:00:00")));
    }
    if let Some(mut extra) = moved(slurm, "slurm", "extra_args", "sbatch_args")
        && let Value::Text(text) = &extra.node.value
    {
        match shell_words(text) {
            Some(words) => {
                extra.node = list(&extra.node, words);
                entries.push(extra);
            }
            None => findings.wrong(
                &extra.node,
                "slurm.extra_args",
                "words as a shell splits them; a quote is never closed",
                None,
            ),
        }
    }
    Node::new(Value::Map(entries))
}

fn container(environment: Option<&Node>) -> Option<Entry> {
    let image = moved(environment, "environment", "container_image", "image")?;
    let mut entries = vec![image];
    if let Some(mut mounts) = moved(environment, "environment", "container_mount", "mounts")
        && let Value::Text(text) = &mounts.node.value
    {
        let split = text.split(',').map(|mount| mount.trim().to_owned());
        mounts.node = list(&mounts.node, split.collect());
        entries.push(mounts);
    }
    Some(fixed("container", Node::new(Value::Map(entries))))
}

#[cfg(test)]
mod tests;

//! The part of a layout that says how it becomes jobs of a Slurm cluster.
//!
//! Everything that is wrong with a value by itself, or with two values of this part, is found here. What needs the
//! instances' sizes is found by the planner (`baton-slurm`), what needs the model by the launcher.

mod checks;

pub(crate) use checks::environment as check_environment;

use crate::cluster::ClusterConfig;
use crate::layout::raw::{RawContainer, RawLayout, RawSlurm};
use crate::section::Located;
use crate::section::kind::{Choice, Choices};
use crate::section::read::Findings;
use crate::yaml::Node;

/// How the ranks of a deployment are started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartMode {
    /// A single `srun` for all ranks.
    OneWorld,
    /// A job step for each instance, in one job.
    Steps,
    /// A job for each role, and one for the proxy.
    Jobs,
}

impl StartMode {
    /// The name as files spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        crate::section::kind::name_of(self)
    }
}

impl Choices for StartMode {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[
        ("one_world", Choice::Is(Self::OneWorld)),
        ("steps", Choice::Is(Self::Steps)),
        ("jobs", Choice::Is(Self::Jobs)),
    ];
}

/// Through what the ranks of an instance talk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fabric {
    /// TCP: a rank that dies ends its instance only.
    Tcp,
    /// MPI: a rank that dies ends everything.
    Mpi,
}

impl Fabric {
    /// The name as files and flags spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        crate::section::kind::name_of(self)
    }
}

impl Choices for Fabric {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[
        ("tcp", Choice::Is(Self::Tcp)),
        ("mpi", Choice::Is(Self::Mpi)),
    ];
}

/// Ports that instances may be given, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// The first of them.
    pub first: u16,
    /// The last of them.
    pub last: u16,
}

impl PortRange {
    /// How many ports there are.
    #[must_use]
    pub fn count(self) -> u32 {
        u32::from(self.last) - u32::from(self.first) + 1
    }
}

/// A directory of the node as the container sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where it is outside.
    pub host: String,
    /// Where it is inside.
    pub container: String,
    /// Flags behind the second colon, such as `ro`; empty where there are none.
    pub flags: String,
}

impl std::fmt::Display for Mount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.container)?;
        if self.flags.is_empty() {
            Ok(())
        } else {
            write!(f, ":{}", self.flags)
        }
    }
}

/// The container that the processes run in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Image, as `--container-image` takes it.
    pub image: String,
    /// What is mounted.
    pub mounts: Vec<Mount>,
    /// Working directory inside, if one is wished for.
    pub workdir: Option<String>,
    /// The program inside, where that is elsewhere than outside.
    pub baton: Option<String>,
}

impl Container {
    /// Where a file of the container is outside, if a mount holds it.
    #[must_use]
    pub fn outside(&self, inside: &str) -> Option<String> {
        let below = |mount: &Mount| {
            let rest = inside.strip_prefix(mount.container.trim_end_matches('/'))?;
            let whole = rest.is_empty() || rest.starts_with('/');
            whole.then(|| format!("{}{rest}", mount.host.trim_end_matches('/')))
        };
        self.mounts.iter().rev().find_map(below)
    }
}

/// What Slurm is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlurmOptions {
    /// Partition, if one is named.
    pub partition: Option<String>,
    /// Account, if one is named.
    pub account: Option<String>,
    /// Time limit as Slurm writes it, if there is one.
    pub time: Option<String>,
    /// Name of the job.
    pub job_name: String,
    /// How many nodes the ranks may take; `None` is what they need.
    pub nodes: Option<u32>,
    /// CPUs of each rank, if the layout says.
    pub cpus_per_task: Option<u32>,
    /// Take whole nodes.
    pub exclusive: bool,
    /// Ask for the GPUs.
    pub request_gpus: bool,
    /// Keep the nodes together.
    pub segment: bool,
    /// What `sbatch --signal` is given.
    pub signal: String,
    /// Whether the job may start again; `None` is the cluster's default.
    pub requeue: Option<bool>,
    /// More options of `sbatch`.
    pub sbatch_args: Vec<String>,
    /// More options of `srun`.
    pub srun_args: Vec<String>,
}

/// How a layout becomes jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobLayout {
    /// How the ranks are started.
    pub start: StartMode,
    /// Through what the ranks of an instance talk.
    pub fabric: Fabric,
    /// Ranks that a node holds.
    pub gpus_per_node: u32,
    /// What `srun --mpi` is given.
    pub mpi: String,
    /// Ports of the instances; `None` lets the kernel choose.
    pub ports: Option<PortRange>,
    /// The `baton` program on the nodes.
    pub baton: String,
    /// Where workers register, if not in address files.
    pub discovery: Option<ClusterConfig>,
    /// Address that the proxy binds.
    pub proxy_hostname: String,
    /// Port that the proxy binds.
    pub proxy_port: u16,
    /// Number of the proxy in request ids, if the layout says.
    pub proxy_node_id: Option<u8>,
    /// What Slurm is told.
    pub slurm: SlurmOptions,
    /// The container that the processes run in, if any.
    pub container: Option<Container>,
}

/// Where the proxy of a layout is, before it is moved out of the raw form.
#[derive(Debug, Clone, Default)]
pub(crate) struct RawAddress {
    pub(crate) hostname: Option<String>,
    pub(crate) port: Option<Located<u16>>,
    pub(crate) node_id: Option<u8>,
    /// Whether the proxy has an environment of its own, and where that is.
    pub(crate) environment: Option<Located<()>>,
}

const PROXY_PORT: u16 = 8000;

/// Reads the part; `None` if the document has none, or if what it needs most is missing.
pub(crate) fn read(
    raw: &RawLayout,
    root: &Node,
    proxy: RawAddress,
    findings: &mut Findings,
) -> Option<JobLayout> {
    if keys_of(root).is_empty() {
        return None;
    }
    let given = |key: &str| root.entry(key).is_some_and(|entry| !entry.node.is_null());
    if !given("gpus_per_node") {
        let expected =
            "how many ranks a node holds, one GPU each; a node without GPUs holds ranks too";
        findings.missing(None, "gpus_per_node", expected);
    }
    let slurm = raw.slurm.as_ref().map(|given| &given.value);
    let start = raw
        .start
        .as_ref()
        .map_or(StartMode::OneWorld, |given| given.value);
    let mut job = JobLayout {
        start,
        fabric: raw.fabric.as_ref().map_or(Fabric::Tcp, |given| given.value),
        gpus_per_node: raw.gpus_per_node.as_ref().map_or(1, |given| given.value),
        mpi: text(raw.mpi.as_ref()).unwrap_or_else(|| "pmix".to_owned()),
        ports: raw
            .ports
            .as_ref()
            .and_then(|given| checks::port_range(given, findings)),
        baton: text(raw.baton.as_ref()).unwrap_or_else(|| "baton".to_owned()),
        discovery: None,
        proxy_hostname: proxy.hostname.unwrap_or_else(|| "0.0.0.0".to_owned()),
        proxy_port: proxy.port.as_ref().map_or(PROXY_PORT, |given| given.value),
        proxy_node_id: proxy.node_id,
        slurm: read_slurm(slurm.unwrap_or(&RawSlurm::default()), start, findings),
        container: raw
            .container
            .as_ref()
            .and_then(|given| read_container(given, findings)),
    };
    checks::together(&job, raw, proxy.port.as_ref(), findings);
    // What depends on a start mode that nobody can read would only mislead.
    let start_known = raw.start.is_some() || !given("start");
    if start_known && let Some(uri) = &raw.discovery_uri {
        job.discovery = checks::discovery(&job, uri, findings);
    }
    if start == StartMode::OneWorld
        && let Some(own) = proxy.environment
    {
        let what = "the proxy of `start: one_world` is a child of the first rank's launcher and has its environment";
        findings.conflict(own.place, &own.path, what.to_owned());
    }
    Some(job)
}

/// The keys of this part that a document gives.
pub(crate) fn keys_of(root: &Node) -> Vec<&'static str> {
    let given = |key: &&str| root.entry(key).is_some_and(|entry| !entry.node.is_null());
    super::raw::JOB_KEYS.into_iter().filter(given).collect()
}

fn text(given: Option<&Located<String>>) -> Option<String> {
    given.map(|given| given.value.clone())
}

fn read_slurm(raw: &RawSlurm, start: StartMode, findings: &mut Findings) -> SlurmOptions {
    if let Some(time) = &raw.time {
        checks::time(time, findings);
    }
    if let Some(signal) = &raw.signal {
        checks::signal(signal, start, findings);
    }
    let words = [&raw.partition, &raw.account, &raw.job_name];
    for word in words.into_iter().flatten() {
        checks::one_line(word, findings);
    }
    let flag = |given: &Option<Located<bool>>| given.as_ref().is_some_and(|given| given.value);
    SlurmOptions {
        partition: text(raw.partition.as_ref()),
        account: text(raw.account.as_ref()),
        time: text(raw.time.as_ref()),
        job_name: text(raw.job_name.as_ref()).unwrap_or_else(|| "baton".to_owned()),
        nodes: raw.nodes.as_ref().map(|given| given.value),
        cpus_per_task: raw.cpus_per_task.as_ref().map(|given| given.value),
        exclusive: flag(&raw.exclusive),
        request_gpus: flag(&raw.request_gpus),
        segment: flag(&raw.segment),
        signal: text(raw.signal.as_ref()).unwrap_or_else(|| "B:USR1@60".to_owned()),
        requeue: raw.requeue.as_ref().map(|given| given.value),
        sbatch_args: checks::arguments(raw.sbatch_args.as_ref(), checks::SBATCH_PLANNED, findings),
        srun_args: checks::arguments(raw.srun_args.as_ref(), checks::SRUN_PLANNED, findings),
    }
}

fn read_container(raw: &Located<RawContainer>, findings: &mut Findings) -> Option<Container> {
    let section = &raw.value;
    let mounts = section
        .mounts
        .as_ref()
        .map(|given| checks::mounts(given, findings))
        .unwrap_or_default();
    for path in [&section.workdir, &section.baton].into_iter().flatten() {
        checks::absolute(path, findings);
    }
    let Some(image) = &section.image else {
        findings.missing(
            raw.place,
            &format!("{}.image", raw.path),
            "an image, as `srun --container-image` takes it",
        );
        return None;
    };
    checks::one_line(image, findings);
    Some(Container {
        image: image.value.clone(),
        mounts,
        workdir: text(section.workdir.as_ref()),
        baton: text(section.baton.as_ref()),
    })
}

//! Which device and how many CPU threads a rank gets of the node that it shares with others.
//!
//! [`decide`] is pure; [`of_this_process`] looks at this machine and asks it. What the launcher or a container has already
//! limited is respected: a device list is only ever narrowed, and an affinity mask is never changed. Absent: setting
//! affinity, and choosing devices by topology.

mod mask;
#[cfg(test)]
mod tests;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use self::mask::CpuMask;
use crate::rank::Environment;

const DEVICES: &str = "CUDA_VISIBLE_DEVICES";

/// What a child is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Binding {
    /// Variables to set.
    pub(crate) environment: Vec<(String, String)>,
    /// CPU threads that it may use.
    pub(crate) threads: u32,
}

/// A rank's node, as far as the decision needs it.
#[derive(Debug, Clone)]
struct Node {
    /// This rank among those of the node.
    local_rank: usize,
    /// Ranks on the node, at least one.
    local_size: usize,
    /// Devices that this process may see, in CUDA's order.
    devices: Vec<String>,
    /// Whether that list is this rank's own, and not the node's.
    devices_are_own: bool,
    /// CPUs that this process may run on.
    cpus: CpuMask,
    /// The same of each rank on the node, where the launcher tells.
    neighbours: Vec<CpuMask>,
    /// CPUs of the node that the job may use.
    node_cpus: usize,
    /// CPUs' worth of time that all ranks together may use, where a cgroup limits it.
    cpu_quota: Option<usize>,
}

fn decide(node: &Node) -> Binding {
    let device = chosen_device(node).map(|device| (DEVICES.to_owned(), device.to_owned()));
    Binding {
        environment: device.into_iter().collect(),
        threads: u32::try_from(thread_count(node)).unwrap_or(u32::MAX),
    }
}

/// The one device to narrow the list to. Fewer devices than ranks are shared, in turn.
fn chosen_device(node: &Node) -> Option<&str> {
    if node.devices.len() < 2 || (node.local_size < 2 && !node.devices_are_own) {
        return None;
    }
    let index = if node.devices_are_own {
        0
    } else {
        node.local_rank % node.devices.len()
    };
    node.devices.get(index).map(String::as_str)
}

/// More ranks than GPUs, where each needs one of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "device: cuda wants a gpu for each of {ranks} ranks, and this process sees {devices}\nhint: make tensor_parallel_size times pipeline_parallel_size {devices} or less, or use --device cpu; CUDA_VISIBLE_DEVICES may hide others"
)]
pub(crate) struct TooFewDevices {
    ranks: usize,
    devices: usize,
}

/// Whether so many ranks can each have a device that this process sees. Where there are none, the driver says it better.
pub(crate) fn check_devices(environment: &Environment, ranks: u32) -> Result<(), TooFewDevices> {
    let devices = devices(environment).len();
    let ranks = usize::try_from(ranks).unwrap_or(usize::MAX);
    match devices {
        1.. if devices < ranks => Err(TooFewDevices { ranks, devices }),
        _ => Ok(()),
    }
}

/// Devices that this process may see.
fn devices(environment: &Environment) -> Vec<String> {
    environment
        .get(DEVICES)
        .map_or_else(|| devices_of_machine(environment), visible_devices)
}

fn thread_count(node: &Node) -> usize {
    let share = node.cpus.count() / sharers(node).max(1);
    let quota = node
        .cpu_quota
        .map_or(usize::MAX, |quota| quota / node.local_size.max(1));
    share.min(quota).max(1)
}

/// Ranks that run on this rank's CPUs, itself included.
fn sharers(node: &Node) -> usize {
    if node.neighbours.len() == node.local_size {
        let same = node.neighbours.iter().filter(|mask| **mask == node.cpus);
        return same.count();
    }
    // Each has a mask of this size: they overlap just as often as they don't fit side by side.
    let wanted = node.cpus.count() * node.local_size;
    wanted.div_ceil(node.node_cpus.max(1)).min(node.local_size)
}

/// What a rank that this process starts is given.
pub(crate) fn of_this_process(
    environment: &Environment,
    local_rank: u32,
    local_size: u32,
) -> Binding {
    let cpus = own_mask();
    let parallelism = std::thread::available_parallelism().map_or(1, usize::from);
    let index = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
    decide(&Node {
        local_rank: index(local_rank),
        local_size: index(local_size).max(1),
        devices: devices(environment),
        devices_are_own: environment.get("SLURM_GPUS_PER_TASK").is_some(),
        neighbours: mask::of_step(environment, &cpus, index(local_rank)),
        node_cpus: node_cpus(environment),
        cpu_quota: (parallelism < cpus.count()).then_some(parallelism),
        cpus,
    })
}

/// CUDA's reading: the list ends at the first entry that names no device.
fn visible_devices(list: &str) -> Vec<String> {
    let valid = |device: &&str| {
        device.bytes().all(|byte| byte.is_ascii_digit()) && !device.is_empty()
            || device.starts_with("GPU-")
            || device.starts_with("MIG-")
    };
    let devices = list.split(',').map(str::trim).take_while(valid);
    devices.map(str::to_owned).collect()
}

/// The devices of a machine where nobody has chosen any: CUDA numbers those that it can open from 0.
fn devices_of_machine(environment: &Environment) -> Vec<String> {
    // Set and empty: somebody has chosen none.
    if environment.is_set(DEVICES) {
        return Vec::new();
    }
    let is_device = |name: &str| {
        name.strip_prefix("nvidia").is_some_and(|number| {
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        })
    };
    let files = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let count = files
        .filter(|file| file.file_name().to_str().is_some_and(is_device))
        .count();
    (0..count).map(|index| index.to_string()).collect()
}

/// CPUs of the node that the job may use: what Slurm gave, but no more than are there (a configuration may claim more).
fn node_cpus(environment: &Environment) -> usize {
    let given = environment
        .get("SLURM_CPUS_ON_NODE")
        .and_then(|count| count.parse().ok());
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online")
        .ok()
        .and_then(|list| CpuMask::from_list(list.trim()))
        .map(|mask| mask.count());
    given.into_iter().chain(online).min().unwrap_or(1)
}

fn own_mask() -> CpuMask {
    match sched_getaffinity(Pid::from_raw(0)) {
        Ok(set) => (0..CpuSet::count())
            .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
            .collect(),
        // A machine of more CPUs than the call's set holds.
        Err(_) => (0..std::thread::available_parallelism().map_or(1, usize::from)).collect(),
    }
}

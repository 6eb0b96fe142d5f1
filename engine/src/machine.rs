//! What this process may use of the machine it runs on: memory and processors. Reads /proc and the control group;
//! where they say nothing, the answers are careful.

use std::fs;
use std::num::NonZero;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Bytes that this process could still take: what the machine has left, and what its control group leaves it.
#[must_use]
pub fn available_bytes() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| mem_available(&text));
    let group = group_left(Path::new("/sys/fs/cgroup"));
    // Without any of the two there is no way to know; a small pool works everywhere.
    machine.into_iter().chain(group).min().unwrap_or(1 << 30)
}

/// The processors of one process, told to others that may run beside it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Processors {
    /// Equal exactly for processes of one running machine; empty when it cannot be told.
    pub(crate) machine: String,
    /// Numbers of the processors that the process is bound to; empty when they cannot be told.
    pub(crate) allowed: Vec<u32>,
    /// Threads that run at the same time, by the binding and by the control group's quota.
    pub(crate) threads_max: usize,
}

impl Processors {
    /// Those of this process.
    pub(crate) fn of_this_process() -> Self {
        let machine = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self {
            machine: machine.trim().to_owned(),
            allowed: allowed_list(&status).unwrap_or_default(),
            threads_max: std::thread::available_parallelism().map_or(1, NonZero::get),
        }
    }

    /// Threads for this process, where `all` processes, itself included, compute at the same time: processors that
    /// several are bound to are shared.
    pub(crate) fn fair_share(&self, all: &[Self]) -> usize {
        let sharing = all.iter().filter(|other| self.meets(other)).count();
        (self.threads_max / sharing.max(1)).max(1)
    }

    fn meets(&self, other: &Self) -> bool {
        let unknown = self.allowed.is_empty() || other.allowed.is_empty();
        self.machine == other.machine
            && (unknown || self.allowed.iter().any(|cpu| other.allowed.contains(cpu)))
    }
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The control group's limit less what it uses; `None` without a limit. Version 2 first, then version 1.
fn group_left(root: &Path) -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(root.join(name))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let two = number("memory.max").zip(number("memory.current"));
    let one = || number("memory/memory.limit_in_bytes").zip(number("memory/memory.usage_in_bytes"));
    let (limit, used) = two.or_else(one)?;
    Some(limit.saturating_sub(used))
}

/// `Cpus_allowed_list: 0-3,8` as numbers.
fn allowed_list(status: &str) -> Option<Vec<u32>> {
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut allowed = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        // A machine has some hundreds; anything else is no list of processors.
        if last.checked_sub(first)? > 1 << 16 {
            return None;
        }
        allowed.extend(first..=last);
    }
    Some(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_the_system_is_read() {
        let meminfo = "MemTotal:       100 kB\nMemAvailable:    20 kB\n";
        assert_eq!(mem_available(meminfo), Some(20 * 1024));
        assert_eq!(mem_available("MemAvailable: many kB"), None);
        let group = tempfile::tempdir().unwrap();
        fs::write(group.path().join("memory.max"), "max\n").unwrap();
        fs::write(group.path().join("memory.current"), "5\n").unwrap();
        assert_eq!(group_left(group.path()), None);
        fs::write(group.path().join("memory.max"), "105\n").unwrap();
        assert_eq!(group_left(group.path()), Some(100));
        assert!(available_bytes() > 0);
    }

    #[test]
    fn processors_of_the_system_are_read() {
        let list = |text: &str| allowed_list(&format!("Name:\tx\nCpus_allowed_list:\t{text}\n"));
        assert_eq!(list("0-2,8,10-11"), Some(vec![0, 1, 2, 8, 10, 11]));
        assert_eq!(list("5"), Some(vec![5]));
        for wrong in ["", "a-b", "3-1", "0-4000000000"] {
            assert_eq!(list(wrong), None, "{wrong}");
        }
        let own = Processors::of_this_process();
        assert!(own.threads_max >= 1);
        assert_eq!(own.fair_share(std::slice::from_ref(&own)), own.threads_max);
    }

    #[test]
    fn processors_are_shared_by_those_who_are_bound_to_them() {
        let rank = |machine: &str, allowed: &[u32]| Processors {
            machine: machine.to_owned(),
            allowed: allowed.to_vec(),
            threads_max: 8,
        };
        let free = rank("a", &[0, 1, 2, 3, 4, 5, 6, 7]);
        let all = [free.clone(), free.clone(), rank("b", &free.allowed)];
        assert_eq!(free.fair_share(&all), 4);
        let bound = [rank("a", &[0, 1]), rank("a", &[2, 3])];
        assert_eq!(bound[0].fair_share(&bound), 8);
        let unknown = vec![rank("a", &[]); 16];
        assert_eq!(unknown[0].fair_share(&unknown), 1);
    }
}

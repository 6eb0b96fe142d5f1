//! What the threads of this process have cost, from /proc: all of them, and those that sum checksums.
//!
//! A thread that ended in between is not counted; the transceiver's live as long as it does.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// How the transceiver's checksum threads are called.
const CHECKSUM_THREADS: &str = "kv-checksum";

/// Processor time in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct CpuTime {
    /// Of all threads.
    pub(crate) all_ns: u64,
    /// Of the checksum threads.
    pub(crate) checksum_ns: u64,
}

/// What each thread of this process has cost so far, by its number.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct CpuLook(BTreeMap<String, Thread>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Thread {
    spent_ns: u64,
    sums_checksums: bool,
}

impl CpuLook {
    /// This process's threads now. Empty where the kernel does not tell.
    pub(super) fn now() -> Self {
        Self::of(Path::new("/proc/self/task"))
    }

    fn of(tasks: &Path) -> Self {
        let tasks = fs::read_dir(tasks).into_iter().flatten().flatten();
        let threads = tasks.filter_map(|task| {
            let read = |name| fs::read_to_string(task.path().join(name)).ok();
            let thread = Thread {
                spent_ns: on_processor(&read("schedstat")?)?,
                sums_checksums: read("comm")?.starts_with(CHECKSUM_THREADS),
            };
            Some((task.file_name().to_string_lossy().into_owned(), thread))
        });
        Self(threads.collect())
    }

    /// What the threads that are there have spent since an earlier look.
    pub(super) fn since(&self, before: &Self) -> CpuTime {
        let mut sum = CpuTime::default();
        for (number, thread) in &self.0 {
            let spent_before = before.0.get(number).map_or(0, |thread| thread.spent_ns);
            let spent = thread.spent_ns.saturating_sub(spent_before);
            sum.all_ns += spent;
            if thread.sums_checksums {
                sum.checksum_ns += spent;
            }
        }
        sum
    }
}

impl CpuTime {
    /// Both together.
    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            all_ns: self.all_ns + other.all_ns,
            checksum_ns: self.checksum_ns + other.checksum_ns,
        }
    }

    /// The checksums' share; `None` where nothing was told.
    #[expect(
        clippy::cast_precision_loss,
        reason = "a share does not need more than 52 bits"
    )]
    pub(super) fn checksum_share(self) -> Option<f64> {
        (self.all_ns > 0 && self.checksum_ns > 0)
            .then(|| self.checksum_ns as f64 / self.all_ns as f64)
    }
}

/// The first of `schedstat`'s numbers.
fn on_processor(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_added_up_and_checksum_threads_once_more() {
        let folder = tempfile::tempdir().unwrap();
        for (id, name, spent) in [(1, "baton", 5), (2, "kv-checksum-0", 7), (3, "kv-desk", 1)] {
            let task = folder.path().join(id.to_string());
            fs::create_dir(&task).unwrap();
            fs::write(task.join("comm"), format!("{name}\n")).unwrap();
            fs::write(task.join("schedstat"), format!("{spent} 0 1\n")).unwrap();
        }
        let first = CpuLook::of(folder.path());
        let sum = first.since(&CpuLook::default());
        assert_eq!((sum.all_ns, sum.checksum_ns), (13, 7));
        assert_eq!(sum.plus(sum).all_ns, 26);
        assert!((sum.checksum_share().unwrap() - 7.0 / 13.0).abs() < 1e-9);
        assert_eq!(CpuTime::default().checksum_share(), None);
        // A thread that has ended takes nothing from the others' sum.
        fs::remove_dir_all(folder.path().join("1")).unwrap();
        fs::write(folder.path().join("3/schedstat"), "9 0 1\n").unwrap();
        let later = CpuLook::of(folder.path()).since(&first);
        assert_eq!((later.all_ns, later.checksum_ns), (8, 0));
        assert_eq!(CpuLook::of(&folder.path().join("none")), CpuLook::default());
    }
}

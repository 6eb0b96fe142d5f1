//! Processor, memory, limits, GPUs, and this process's place among ranks: read from /proc, the limits and the
//! environment.

use std::fs;
use std::num::NonZero;

use baton_engine::backend::cpu::instructions;
use baton_engine::machine::available_bytes;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::Finding;
use crate::rank::{self, Environment, RankError, RankFacts, Starter};

/// A small model with a small pool.
const MEMORY_MIN: u64 = 1 << 30;
/// A few clients, workers and ranks.
const FILES_MIN: u64 = 1024;
/// A proxy with many streams, which have two connections each.
const FILES_GOOD: u64 = 8192;

/// Looks at all of it.
pub(super) fn look() -> Vec<Finding> {
    let mut findings = vec![processor(), memory(available_bytes())];
    findings.push(gpus());
    findings.push(place(&rank::discover(&Environment::of_process())));
    findings.extend([locked_memory(), open_files()].into_iter().flatten());
    findings
}

fn processor() -> Finding {
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let s = if threads == 1 { "" } else { "s" };
    let found = format!("{threads} thread{s}, {}", instructions());
    match instructions() {
        "portable" => Finding::absent("machine", "processor", found).losing(
            "speed: neither AVX2 nor AVX-512 nor NEON is there",
            "in a virtual machine, pass the host's processor through",
        ),
        _ => Finding::good("machine", "processor", found),
    }
}

fn memory(free: u64) -> Finding {
    let found = format!("{} MiB free", free >> 20);
    if free >= MEMORY_MIN {
        return Finding::good("machine", "memory", found);
    }
    Finding::bad("machine", "memory", found).losing(
        "any model but the smallest",
        "free some, or ask Slurm for more (--mem)",
    )
}

fn locked_memory() -> Option<Finding> {
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    Some(locked(soft))
}

fn locked(soft: u64) -> Finding {
    if soft == RLIM_INFINITY {
        return Finding::good("limit", "locked memory", "unlimited".to_owned());
    }
    let found = format!("{} KiB (ulimit -l)", soft >> 10);
    Finding::absent("limit", "locked memory", found).losing(
        "InfiniBand and RoCE, which pin the kv pool; shared memory and TCP do without",
        "ulimit -l unlimited; under Slurm PropagateResourceLimitsExcept=MEMLOCK, in systemd LimitMEMLOCK=infinity",
    )
}

fn open_files() -> Option<Finding> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    Some(files(soft, hard))
}

fn files(soft: u64, hard: u64) -> Finding {
    let found = format!("{soft} of at most {hard} (ulimit -n)");
    let lost = "connections: each client stream takes two in the proxy, each peer one in a worker";
    let hint = "ulimit -n 65536 before starting; in systemd LimitNOFILE=65536";
    match soft {
        FILES_GOOD.. => Finding::good("limit", "open files", found),
        FILES_MIN.. => Finding::absent("limit", "open files", found).losing(lost, hint),
        _ => Finding::bad("limit", "open files", found).losing(lost, hint),
    }
}

/// By the kernel driver's own list: it needs no library.
fn gpus() -> Finding {
    let count = fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, Iterator::count);
    match count {
        0 => Finding::absent(
            "machine",
            "gpus",
            "none that the kernel's driver knows".to_owned(),
        )
        .losing(
            "GPUs: models run on the processor",
            "run it on a machine, or in an allocation, with NVIDIA GPUs",
        ),
        1 => Finding::good("machine", "gpus", "1".to_owned()),
        _ => Finding::good("machine", "gpus", count.to_string()),
    }
}

fn place(facts: &Result<RankFacts, RankError>) -> Finding {
    let facts = match facts {
        Ok(facts) => facts,
        Err(error) => {
            let text = error.to_string();
            let (reason, hint) = text.split_once("\nhint: ").unwrap_or((&text, ""));
            return Finding::bad("machine", "rank", reason.to_owned())
                .losing("worlds of ranks: who is who cannot be told", hint);
        }
    };
    let mut found = match (facts.starter, facts.in_batch_script) {
        (Starter::Alone, true) => "none: a batch script, or a shell of an allocation".to_owned(),
        (Starter::Alone, false) => "none: not started by srun or mpirun".to_owned(),
        (starter, _) => {
            let size = facts.size.map_or_else(
                || "of a size that PMIx knows".to_owned(),
                |size| format!("of {size}"),
            );
            let pmix = if facts.pmix { ", PMIx" } else { ", no PMIx" };
            format!("{} {size}, by {}{pmix}", facts.rank, starter.command())
        }
    };
    for (name, value) in [
        ("job", &facts.job),
        ("step", &facts.step),
        ("node", &facts.this_host),
    ] {
        if let Some(value) = value {
            found.push_str(&format!(", {name} {value}"));
        }
    }
    if !facts.hosts.is_empty() {
        found.push_str(&format!(", nodes {}", facts.hosts.join(" ")));
    }
    Finding::good("machine", "rank", found)
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn limits_are_judged() {
        assert_eq!(locked(RLIM_INFINITY).level, Level::Good);
        assert_eq!(locked(8 << 20).found, "8192 KiB (ulimit -l)");
        assert_eq!(locked(8 << 20).level, Level::Absent);
        assert_eq!(files(65_536, 65_536).level, Level::Good);
        assert_eq!(files(1024, 65_536).level, Level::Absent);
        assert_eq!(files(256, 256).level, Level::Bad);
        assert_eq!(memory(2 << 30).level, Level::Good);
        assert_eq!(memory(1 << 20).level, Level::Bad);
    }

    #[test]
    fn the_place_among_ranks_is_told() {
        let of = |pairs: &[(&str, &str)]| {
            place(&rank::discover(&Environment::from_pairs(
                pairs.iter().copied(),
            )))
        };
        assert!(of(&[]).found.starts_with("none: not started"));
        let batch = of(&[
            ("SLURM_JOB_ID", "7"),
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "4"),
        ]);
        assert!(
            batch.found.contains("batch script") && batch.found.contains("job 7"),
            "{batch:?}"
        );
        let mpi = of(&[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "4")]);
        assert!(mpi.found.starts_with("1 of 4, by mpirun"), "{mpi:?}");
        let wrong = of(&[("OMPI_COMM_WORLD_RANK", "x"), ("OMPI_COMM_WORLD_SIZE", "4")]);
        assert_eq!(wrong.level, Level::Bad, "{wrong:?}");
    }
}

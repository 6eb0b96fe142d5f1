//! Our host lists against Slurm's own reading of them, `scontrol show hostnames`.
//!
//! Slurm refuses text after the last bracket, which we take, so the lists here have none. Skipped, with the reason
//! printed, where there is no scontrol.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use baton_slurm::hostlist::{compress, expand};
use proptest::prelude::*;

/// The least configuration with which scontrol runs; nothing is contacted.
const CONFIGURATION: &str =
    "ClusterName=none\nSlurmctldHost=localhost\nNodeName=none\nPartitionName=none Nodes=none\n";

fn configuration() -> &'static Path {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let (own, file) = (std::process::id(), folder.join("slurm.conf"));
        // Each test may be a process of its own; none shall read what another has half written.
        let whole = folder.join(format!("slurm.conf.{own}"));
        std::fs::write(&whole, CONFIGURATION).expect("a configuration");
        std::fs::rename(&whole, &file).expect("a configuration");
        file
    })
}

/// `None`: there is no scontrol.
fn scontrol(list: &str) -> Option<Vec<String>> {
    let output = Command::new("scontrol")
        .args(["show", "hostnames", list])
        .env("SLURM_CONF", configuration())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "`{list}`: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(text.lines().map(str::to_owned).collect())
}

const SKIPPED: &str = "skipped: there is no scontrol; install slurm-client";

fn is_there() -> bool {
    Command::new("scontrol").arg("--version").output().is_ok()
}

fn range() -> impl Strategy<Value = String> {
    (0..120_u32, 0..12_u32, 0..4_usize, any::<bool>()).prop_map(|(first, more, width, single)| {
        if single {
            format!("{first:0width$}")
        } else {
            format!("{first:0width$}-{last:0width$}", last = first + more)
        }
    })
}

fn brackets() -> impl Strategy<Value = String> {
    prop::collection::vec(range(), 1..4).prop_map(|ranges| format!("[{}]", ranges.join(",")))
}

fn name() -> impl Strategy<Value = String> {
    let text = || "[a-z]{1,5}(-[a-z]{1,3})?";
    prop_oneof![
        text().prop_map(String::from),
        (text(), 0..2000_u32).prop_map(|(text, number)| format!("{text}{number}")),
        (text(), brackets()).prop_map(|(text, numbers)| format!("{text}{numbers}")),
        (text(), 0..20_u32, "[a-z]{1,3}", brackets())
            .prop_map(|(text, rack, more, numbers)| format!("{text}{rack}{more}{numbers}")),
        (text(), brackets(), "[a-z]{1,3}", brackets())
            .prop_map(|(text, rack, more, numbers)| format!("{text}{rack}{more}{numbers}")),
    ]
}

#[test]
fn lists_expand_as_scontrol_expands_them() {
    if !is_there() {
        eprintln!("{SKIPPED}");
        return;
    }
    proptest!(|(names in prop::collection::vec(name(), 1..4))| {
        let list = names.join(",");
        let theirs = scontrol(&list).expect("it is there");
        prop_assert_eq!(expand(&list).expect("a host list"), theirs, "{}", list);
    });
}

#[test]
fn scontrol_reads_what_we_compress() {
    if !is_there() {
        eprintln!("{SKIPPED}");
        return;
    }
    let host = "(rack[0-2]n|node|gpu-[ab])(0[0-9]|1?[0-9])";
    proptest!(|(hosts in prop::collection::vec(host, 1..20))| {
        let list = compress(&hosts).expect("hosts");
        prop_assert_eq!(scontrol(&list).expect("it is there"), hosts, "{}", list);
    });
}

#[test]
fn counts_expand_as_slurm_writes_them() {
    // Recorded: SLURM_STEP_TASKS_PER_NODE of cyclic, plane and heterogeneous steps.
    for (list, counts) in [
        ("4,1(x2)", vec![4, 1, 1]),
        ("5,1(x2)", vec![5, 1, 1]),
        ("1,2,1", vec![1, 2, 1]),
        ("2(x2)", vec![2, 2]),
    ] {
        let expanded = baton_slurm::hostlist::expand_counts(list).expect("counts");
        assert_eq!(expanded, counts, "{list}");
    }
}

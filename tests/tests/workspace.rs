//! The house rules that a compiler cannot hold: who may import whom, where unsafe may stand, how large files grow.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Which crate may depend on which of ours (ARCHITECTURE.md). Tests run the binary and import none.
const EDGES: &[(&str, &[&str])] = &[
    ("baton-configs", &[]),
    ("baton-engine", &["baton-configs", "baton-ucx-sys"]),
    ("baton-proxy", &["baton-configs"]),
    ("baton-slurm", &["baton-configs"]),
    (
        "baton-launcher",
        &[
            "baton-configs",
            "baton-engine",
            "baton-proxy",
            "baton-slurm",
        ],
    ),
    ("baton-tests", &[]),
    ("baton-ucx-sys", &[]),
];

/// The doors behind which unsafe code is allowed.
const UNSAFE_DOORS: &[&str] = &[
    "launcher/src/os.rs",
    "launcher/src/pmix/library.rs",
    "launcher/src/doctor/library.rs",
    "engine/src/backend/cpu/simd.rs",
    "engine/src/backend/cpu/team.rs",
    "engine/src/backend/cuda/compiler.rs",
    "engine/src/backend/cuda/driver.rs",
    "engine/src/backend/cuda/event.rs",
    "engine/src/backend/cuda/linear.rs",
    "engine/src/backend/cuda/nccl.rs",
    "engine/src/backend/cuda/one_shot.rs",
    "engine/src/backend/cuda/ops.rs",
    "engine/src/backend/cuda/peer.rs",
    "engine/src/collective/mpi/plugin.rs",
    "engine/mpi/src/",
    "engine/ucx-sys/src/lib.rs",
    "engine/src/model/mmap.rs",
    "engine/src/transport/nixl/library",
    "engine/src/page/arena.rs",
    "engine/src/page/mapped.rs",
    "engine/src/transport/checksum",
    "engine/src/transport/shm.rs",
    "engine/src/transport/ucx/",
];

const FILE_LINES_MAX: usize = 600;
const LOCKED_PACKAGES_MAX: usize = 350;

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
            "--locked",
        ])
        .current_dir(baton_tests::root())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON")
}

#[test]
fn the_edges_between_crates_hold() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    let mut seen: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        let own = package["dependencies"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|edge| edge["name"].as_str());
        seen.insert(
            package["name"].as_str().expect("a name"),
            own.filter(|name| name.starts_with("baton-")).collect(),
        );
    }
    assert_eq!(seen.keys().copied().collect::<Vec<_>>(), {
        let mut names: Vec<&str> = EDGES.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        names
    });
    for (name, allowed) in EDGES {
        for edge in &seen[name] {
            assert!(allowed.contains(edge), "{name} may not depend on {edge}");
        }
    }
}

#[test]
fn every_crate_inherits_the_lints() {
    for folder in [
        "configs",
        "engine",
        "engine/ucx-sys",
        "proxy",
        "slurm",
        "launcher",
        "tests",
    ] {
        let text = std::fs::read_to_string(baton_tests::root().join(folder).join("Cargo.toml"))
            .expect("a manifest");
        assert!(text.contains("[lints]\nworkspace = true"), "{folder}");
        assert!(!text.contains("[features]"), "{folder} has cargo features");
    }
}

#[test]
fn the_lock_file_stays_lean() {
    let text =
        std::fs::read_to_string(baton_tests::root().join("Cargo.lock")).expect("a lock file");
    let count = text.lines().filter(|line| *line == "[[package]]").count();
    assert!(count < LOCKED_PACKAGES_MAX, "{count} packages");
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            if path
                .file_name()
                .is_some_and(|name| name != "target" && name != ".git")
            {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn unsafe_stands_only_behind_its_doors() {
    let root = baton_tests::root();
    let mut files = Vec::new();
    sources(&root, &mut files);
    for file in files {
        let name = file
            .strip_prefix(&root)
            .expect("under the root")
            .to_string_lossy()
            .into_owned();
        let text = std::fs::read_to_string(&file).expect("a source");
        let opens = text.contains(concat!("expect(un", "safe_code"));
        assert!(
            !opens || UNSAFE_DOORS.iter().any(|door| name.starts_with(door)),
            "{name} opens unsafe code"
        );
    }
}

#[test]
fn files_stay_readable() {
    let root = baton_tests::root();
    let mut files = Vec::new();
    sources(&root, &mut files);
    for file in files {
        let text = std::fs::read_to_string(&file).expect("a source");
        let lines = text.lines().count();
        assert!(
            lines <= FILE_LINES_MAX,
            "{} has {lines} lines",
            file.display()
        );
        assert!(
            text.starts_with("//!"),
            "{} does not say what it is for",
            file.display()
        );
    }
}

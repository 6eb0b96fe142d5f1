//! Worlds whose ranks talk over MPI: the same answers as over our own connections, and one fate for all.
//!
//! Needs the MPI plug-in, which scripts/test builds and names, and Open MPI's mpirun.

use std::path::Path;
use std::time::{Duration, Instant};

use baton_tests::launch::{self, Launcher, READY, Shape};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const PLUGIN: &str = "BATON_MPI_PLUGIN";
const GONE: Duration = Duration::from_secs(60);

/// How long a world may outlive one of its ranks.
const ONE_FATE: Duration = Duration::from_secs(10);

struct World {
    launcher: Launcher,
    address: String,
    _folder: TempDir,
}

/// Two contexts' ranks and a generation server that is one rank by itself.
#[expect(clippy::print_stderr, reason = "a test that is skipped says why")]
async fn world() -> Option<World> {
    let named = std::env::var_os(PLUGIN);
    let there = |path: &Path| path.is_file();
    if !named.is_some_and(|path| there(Path::new(&path))) {
        eprintln!("skipped: {PLUGIN} names no plug-in; scripts/build-mpi builds one");
        return None;
    }
    assert!(launch::has_mpirun(), "the plug-in is there, mpirun is not");
    let folder = tempfile::tempdir().expect("a folder");
    let (config, ready) = (
        folder.path().join("disagg_config.yaml"),
        folder.path().join("ready"),
    );
    let (context, generation) = (Shape::new(1, 2, 1), Shape::new(1, 1, 1));
    let model = baton_tests::tiny_model("llama");
    let text = launch::config(&model, "127.0.0.1", context, generation);
    std::fs::write(&config, text).expect("a config");
    let (config, ready_file) = (config.to_string_lossy(), ready.to_string_lossy());
    let arguments = ["launch", "-c", &config, "--ready-file", &ready_file];
    let arguments = [&arguments[..], &["--fabric", "mpi"]].concat();
    let ranks = context.ranks() + generation.ranks();
    let mut launcher = Launcher::mpirun(ranks, &arguments, &[]);
    let address = launch::file_text(&ready, READY, || launcher.try_status().is_some()).await;
    Some(World {
        launcher,
        address,
        _folder: folder,
    })
}

/// The processes that descend from one, with their words.
fn descendants(of: Pid) -> Vec<(Pid, String)> {
    let mut found = vec![(of, String::new())];
    let mut next = 0;
    while let Some((parent, _)) = found.get(next).cloned() {
        next += 1;
        for child in children(parent) {
            let words = std::fs::read_to_string(format!("/proc/{child}/cmdline"));
            found.push((child, words.unwrap_or_default().replace('\0', " ")));
        }
    }
    found.split_off(1)
}

/// Each thread has the children that it has started.
fn children(of: Pid) -> Vec<Pid> {
    let threads = std::fs::read_dir(format!("/proc/{of}/task"));
    let threads = threads.into_iter().flatten().flatten();
    let lists = threads.filter_map(|one| std::fs::read_to_string(one.path().join("children")).ok());
    let ids: Vec<String> = lists
        .flat_map(|list| list.split(' ').map(str::to_owned).collect::<Vec<_>>())
        .collect();
    ids.iter()
        .filter_map(|id| id.trim().parse().ok())
        .map(Pid::from_raw)
        .collect()
}

#[tokio::test]
async fn mpi_gives_the_golden_answers_and_ends_in_good_order() {
    let Some(mut world) = world().await else {
        return;
    };
    launch::answers_tiny(&world.address, "llama").await;
    let log = world.launcher.log();
    assert_eq!(log.matches("the ranks talk over MPI").count(), 1, "{log}");
    let (agent, _) = descendants(world.launcher.pid()).remove(0);
    kill(agent, Signal::SIGTERM).expect("the agent is there");
    world.launcher.ended(GONE).await;
    let log = world.launcher.log();
    assert!(log.contains("all processes ended"), "{log}");
    assert!(!log.contains("without its end"), "{log}");
    assert!(!log.contains("MPI_ABORT"), "{log}");
}

#[tokio::test]
async fn a_rank_that_is_killed_ends_the_world() {
    let Some(mut world) = world().await else {
        return;
    };
    let processes = descendants(world.launcher.pid());
    let followers: Vec<Pid> = processes
        .iter()
        .filter(|(_, words)| words.ends_with("baton rank "))
        .map(|(process, _)| *process)
        .collect();
    assert_eq!(followers.len(), 1, "{processes:?}");
    let start = Instant::now();
    kill(followers[0], Signal::SIGKILL).expect("the follower is there");
    let status = world.launcher.ended(ONE_FATE).await;
    let log = world.launcher.log();
    assert!(!status.success(), "{log}");
    assert!(log.contains("ctx0.1 on rank 1"), "{log}");
    assert!(log.contains("killed by SIGKILL"), "{log}");
    assert!(start.elapsed() < ONE_FATE, "{:?}", start.elapsed());
}

/// A fabric that isn't there is told before anything serves, and by its name.
#[tokio::test]
async fn without_the_plugin_the_world_says_how_to_get_it() {
    if !launch::has_mpirun() {
        eprintln!("skipped: there is no Open MPI; install openmpi-bin");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("disagg_config.yaml");
    let model = baton_tests::tiny_model("llama");
    let shape = Shape::new(1, 1, 1);
    let text = launch::config(&model, "127.0.0.1", Shape::new(1, 2, 1), shape);
    std::fs::write(&config, text).expect("a config");
    let config = config.to_string_lossy();
    let arguments = ["launch", "-c", &config, "--fabric", "mpi"];
    let mut launcher = Launcher::mpirun(3, &arguments, &[(PLUGIN, "/nowhere/libbaton_mpi.so")]);
    let status = launcher.ended(GONE).await;
    let log = launcher.log();
    assert!(!status.success(), "{log}");
    assert!(
        log.contains("the MPI plug-in libbaton_mpi.so is not there"),
        "{log}"
    );
    assert!(log.contains("scripts/build-mpi"), "{log}");
}

//! Worlds of ranks that a real mpirun starts on this machine, outside Slurm.

use std::time::Duration;

use baton_tests::launch::{self, Launcher, READY, Shape};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const GONE: Duration = Duration::from_secs(60);
const SKIPPED: &str = "skipped: there is no Open MPI; install openmpi-bin";

struct World {
    launcher: Launcher,
    address: String,
    _folder: TempDir,
}

async fn world(family: &str, context: Shape, generation: Shape) -> World {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, ready) = (
        folder.path().join("disagg_config.yaml"),
        folder.path().join("ready"),
    );
    let model = baton_tests::tiny_model(family);
    let text = launch::config(&model, "127.0.0.1", context, generation);
    std::fs::write(&config, text).expect("a config");
    let (config, ready_file) = (config.to_string_lossy(), ready.to_string_lossy());
    let ranks = context.ranks() + generation.ranks();
    let arguments = ["launch", "-c", &config, "--ready-file", &ready_file];
    let mut launcher = Launcher::mpirun(ranks, &arguments, &[]);
    let address = launch::file_text(&ready, READY, || launcher.try_status().is_some()).await;
    World {
        launcher,
        address,
        _folder: folder,
    }
}

#[tokio::test]
async fn mpirun_gives_the_golden_answers() {
    if !launch::has_mpirun() {
        eprintln!("{SKIPPED}");
        return;
    }
    for (family, context, generation) in [
        ("llama", Shape::new(2, 2, 1), Shape::new(1, 2, 1)),
        ("qwen3", Shape::new(1, 1, 2), Shape::new(1, 2, 1)),
    ] {
        let mut world = world(family, context, generation).await;
        launch::answers_tiny(&world.address, family).await;
        world.launcher.signal(Signal::SIGTERM);
        world.launcher.ended(GONE).await;
    }
}

/// Runs `mpirun -n RANKS llmapi-launch CMD…` to its end; its code and output.
async fn command(
    ranks: u32,
    words: &[&str],
    environment: &[(&str, &str)],
) -> (Option<i32>, String) {
    let arguments = [&["llmapi-launch"], words].concat();
    let mut launcher = Launcher::mpirun(ranks, &arguments, environment);
    let status = launcher.ended(GONE).await;
    (status.code(), launcher.log())
}

#[tokio::test]
async fn a_command_runs_once_with_its_words_and_variables() {
    if !launch::has_mpirun() {
        eprintln!("{SKIPPED}");
        return;
    }
    let script = r#"echo "ran with $# words: <$1> <$2> size=$tllm_mpi_size ucx=$UCX_TLS""#;
    let (code, log) = command(
        3,
        &["bash", "-c", script, "name", "--tp_size a", "--"],
        &[("UCX_TLS", "tcp,self")],
    )
    .await;
    assert_eq!(code, Some(0), "{log}");
    let ran: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("ran with"))
        .collect();
    assert_eq!(
        ran,
        ["ran with 2 words: <--tp_size a> <--> size=3 ucx=tcp,self"],
        "{log}"
    );
}

#[tokio::test]
async fn the_commands_exit_code_is_the_worlds() {
    if !launch::has_mpirun() {
        eprintln!("{SKIPPED}");
        return;
    }
    let (code, log) = command(2, &["bash", "-c", "exit 7"], &[]).await;
    assert_eq!(code, Some(7), "{log}");
    let (code, log) = command(2, &["bash", "-c", "kill -KILL $$"], &[]).await;
    assert_eq!(code, Some(137), "{log}");
}

#[tokio::test]
async fn a_world_of_the_wrong_size_shows_the_sum() {
    if !launch::has_mpirun() {
        eprintln!("{SKIPPED}");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("disagg_config.yaml");
    let model = baton_tests::tiny_model("llama");
    let text = launch::config(
        &model,
        "127.0.0.1",
        Shape::new(2, 2, 1),
        Shape::new(1, 2, 1),
    );
    std::fs::write(&config, text).expect("a config");
    for ranks in [5, 7] {
        let mut launcher =
            Launcher::mpirun(ranks, &["launch", "-c", &config.to_string_lossy()], &[]);
        let status = launcher.ended(GONE).await;
        let log = launcher.log();
        assert!(!status.success(), "{log}");
        let sum = "ctx0 2 (tp 2 × pp 1) + ctx1 2 (tp 2 × pp 1) + gen0 2 (tp 2 × pp 1)";
        let said: Vec<&str> = log.lines().filter(|line| line.contains(sum)).collect();
        assert_eq!(said.len(), 1, "{log}");
        assert!(
            said[0].contains(&format!("{ranks} ranks")) && said[0].contains('6'),
            "{log}"
        );
    }
}

#[tokio::test]
async fn a_bench_pairs_the_ranks() {
    if !launch::has_mpirun() {
        eprintln!("{SKIPPED}");
        return;
    }
    let small = ["--shape", "smollm2-135m", "--tokens", "64", "--repeat", "1"];
    let arguments = [&["bench", "kv", "--json", "--transport", "tcp"][..], &small].concat();
    let mut launcher = Launcher::mpirun(4, &arguments, &[]);
    let status = launcher.ended(GONE).await;
    let log = launcher.log();
    assert!(status.success(), "{log}");
    let mut pairs: Vec<(u64, u64)> = Vec::new();
    for line in log.lines().filter(|line| line.starts_with('{')) {
        let report: serde_json::Value = serde_json::from_str(line).expect("a report a line");
        assert_eq!(report["verdict"]["pass"], true, "{report:#}");
        let rank = |side: &str| report["ranks"][side].as_u64().expect("a rank");
        pairs.push((rank("to"), rank("from")));
    }
    pairs.sort_unstable();
    assert_eq!(pairs, [(0, 1), (2, 3)], "{log}");
    let mut launcher = Launcher::mpirun(3, &arguments, &[]);
    assert_eq!(
        launcher.ended(GONE).await.code(),
        Some(64),
        "{}",
        launcher.log()
    );
    assert!(
        launcher.log().contains("3 ranks make no pairs"),
        "{}",
        launcher.log()
    );
}

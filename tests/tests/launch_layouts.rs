//! Job layouts from `baton slurm submit` through answered requests to `cancel`, and the example scripts, on the local
//! Slurm cluster.

use std::path::Path;
use std::time::Duration;

use baton_tests::client;
use baton_tests::cluster::Cluster;
use baton_tests::launch::{self, Launcher, READY};
use baton_tests::process::eventually;
use nix::sys::signal::Signal;

/// How long everything may take to be gone once the end was asked for.
const GONE: Duration = Duration::from_secs(60);

fn words(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn baton() -> String {
    words(&baton_tests::binary())
}

async fn healthy(address: &str) {
    eventually("the proxy to be ready", READY, async || {
        let health = client::get(address, "/health").await.ok()?;
        (health.status == 200).then_some(())
    })
    .await;
}

async fn submit_and_cancel(mode: &str) {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let (layout, run) = (
        cluster.folder().join("layout.yaml"),
        cluster.folder().join("run"),
    );
    let text = format!(
        "model: {}\nbaton: {}\nstart: {mode}\ngpus_per_node: 4\nproxy: {{hostname: 0.0.0.0}}\n\
         engine: {{dtype: float32, kv_cache_config: {{max_tokens: 4096}}, tensor_parallel_size: 2}}\n\
         context: {{instances: 2}}\ngeneration: {{instances: 1}}\n",
        baton_tests::tiny_model("llama"),
        baton()
    );
    std::fs::write(&layout, text).expect("a layout");
    let run_folder = words(&run);
    let submit = ["slurm", "submit", "-c", &words(&layout), "-o", &run_folder];
    let submitted = cluster.slurm(&baton(), &submit).await;
    assert!(submitted.status.success(), "{submitted:?}");
    let address = launch::file_text(&run.join("addresses/proxy.addr"), READY, || false).await;
    healthy(&address).await;
    launch::answers_tiny(&address, "llama").await;
    let cancelled = cluster
        .slurm(&baton(), &["slurm", "cancel", &run_folder])
        .await;
    assert!(cancelled.status.success(), "{cancelled:?}");
    cluster.nothing_left(&baton(), GONE).await;
    let refused = client::get(&address, "/health").await;
    assert!(refused.is_err(), "something still listens at {address}");
}

#[tokio::test]
async fn one_world_from_submit_to_cancel() {
    submit_and_cancel("one_world").await;
}

#[tokio::test]
async fn steps_from_submit_to_cancel() {
    submit_and_cancel("steps").await;
}

#[tokio::test]
async fn jobs_from_submit_to_cancel() {
    submit_and_cancel("jobs").await;
}

const ENGINE: &str = "dtype: float32\nkv_cache_config: {max_tokens: 4096}";

fn example(name: &str) -> String {
    words(&baton_tests::root().join("scripts/examples").join(name))
}

/// What all examples take from the environment.
fn variables(work: &Path, port: &str) -> Vec<(&'static str, String)> {
    vec![
        ("MODEL", baton_tests::tiny_model("llama")),
        ("WORK", words(work)),
        ("BATON", baton()),
        ("LLMAPI_LAUNCH", words(&launch::llmapi_launch())),
        ("ENGINE", ENGINE.to_owned()),
        ("PORT", port.to_owned()),
        ("CTX_TP", "2".to_owned()),
        ("GEN_TP", "2".to_owned()),
    ]
}

fn borrowed<'a>(variables: &'a [(&'static str, String)]) -> Vec<(&'a str, &'a str)> {
    variables
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect()
}

#[tokio::test]
async fn the_single_node_example_answers() {
    let folder = tempfile::tempdir().expect("a folder");
    let variables = variables(folder.path(), "0");
    let mut script = Launcher::start("bash", &[&example("single-node.sh")], &borrowed(&variables));
    let file = folder.path().join("proxy.addr");
    let address = launch::file_text(&file, READY, || script.try_status().is_some()).await;
    healthy(&address).await;
    launch::answers_tiny(&address, "llama").await;
    script.signal(Signal::SIGTERM);
    script.ended(GONE).await;
}

#[tokio::test]
async fn the_mpirun_example_answers() {
    if !launch::has_mpirun() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let mut variables = variables(folder.path(), "0");
    let mpirun = "--allow-run-as-root --oversubscribe --bind-to none";
    variables.push(("MPIRUN_ARGS", mpirun.to_owned()));
    variables.push(("RANKS", "6".to_owned()));
    let script = [example("mpirun-single-node.sh")];
    let mut script = Launcher::start("bash", &[&script[0]], &borrowed(&variables));
    let address = eventually("the world to be ready", READY, async || {
        assert!(script.try_status().is_none(), "{}", script.log());
        let log = script.log();
        let (_, rest) = log.split_once("ready: OpenAI API at http://")?;
        Some(rest.split_once("/v1")?.0.to_owned())
    })
    .await;
    launch::answers_tiny(&address, "llama").await;
    // mpirun hands it on to its ranks, which drain.
    script.signal(Signal::SIGUSR1);
    script.ended(GONE).await;
}

#[tokio::test]
async fn the_multi_node_example_answers() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let mut variables = variables(&cluster.folder(), "0");
    variables.push(("CTX_NODES", "2".to_owned()));
    let mut step = cluster.start(
        "bash",
        &[&example("multi-node-srun.sh")],
        &borrowed(&variables),
    );
    let file = cluster.folder().join("proxy.addr");
    let address = launch::file_text(&file, READY, || step.try_status().is_some()).await;
    healthy(&address).await;
    launch::answers_tiny(&address, "llama").await;
    step.signal(Signal::SIGUSR1);
    step.ended(GONE).await;
    cluster.nothing_left(&baton(), GONE).await;
}

#[tokio::test]
async fn the_batch_example_answers() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let variables = variables(&cluster.folder(), "0");
    let batch = cluster
        .sbatch(
            &["-N2", "-n6", &example("simple.sbatch")],
            &borrowed(&variables),
        )
        .await;
    let address = launch::file_text(&cluster.folder().join("ready"), READY, || false).await;
    launch::answers_tiny(&address, "llama").await;
    cluster.slurm("scancel", &[&batch.id]).await;
    batch.ended(&cluster, GONE).await;
    cluster.nothing_left(&baton(), GONE).await;
}

//! Worlds of ranks that real srun, sbatch and mpirun start on the local Slurm cluster: each gives the golden answers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_tests::client;
use baton_tests::cluster::{Cluster, Step};
use baton_tests::golden;
use baton_tests::launch::{self, READY, Shape};
use baton_tests::process::{Baton, eventually};

/// How long everything may take to be gone once the end was asked for.
const GONE: Duration = Duration::from_secs(60);

fn words(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A config for the nodes: the proxy listens where this machine reaches it.
fn write_config(cluster: &Cluster, model: &str, context: Shape, generation: Shape) -> PathBuf {
    let file = cluster.folder().join("disagg_config.yaml");
    std::fs::write(&file, launch::config(model, "0.0.0.0", context, generation)).expect("a config");
    file
}

/// The small real model where every node sees it; its cache may lie in /tmp.
fn shared_model(cluster: &Cluster) -> String {
    let file = cluster.folder().join("SmolLM2-135M-Instruct.Q4_1.gguf");
    std::fs::copy(baton_tests::model(), &file).expect("a copy of the model");
    words(&file)
}

/// Starts `srun SRUN… baton launch -c CONFIG` and waits until the proxy can serve; gives its address.
async fn world(cluster: &Cluster, srun: &[&str], config: &Path) -> (Step, String) {
    world_with(cluster, srun, config, &[]).await
}

/// The same with more options of `baton launch`.
async fn world_with(
    cluster: &Cluster,
    srun: &[&str],
    config: &Path,
    more: &[&str],
) -> (Step, String) {
    let baton = words(&baton_tests::binary());
    let ready = cluster.folder().join("ready");
    std::fs::remove_file(&ready).ok();
    let (config, ready_file) = (words(config), words(&ready));
    let own = [
        baton.as_str(),
        "launch",
        "-c",
        &config,
        "--ready-file",
        &ready_file,
    ];
    let mut step = cluster.srun(&[srun, &own[..], more].concat(), &[]);
    let address = launch::file_text(&ready, READY, || step.try_status().is_some()).await;
    (step, address)
}

/// No process of the binary under test on any node.
async fn nothing_left(cluster: &Cluster) {
    cluster
        .nothing_left(&words(&baton_tests::binary()), GONE)
        .await;
}

/// Ends a world as scancel does.
async fn cancel(cluster: &Cluster, mut step: Step) {
    let job = step.job().to_owned();
    let cancelled = cluster.slurm("scancel", &["--name", &job]).await;
    assert!(cancelled.status.success(), "{cancelled:?}");
    step.ended(GONE).await;
}

/// The same, and looks whether anything is left on any node.
async fn end(cluster: &Cluster, step: Step) {
    cancel(cluster, step).await;
    nothing_left(cluster).await;
}

/// Both roles in the same shape, under srun options that spread each instance over nodes.
async fn is_golden(srun: &[&str], shape: Shape) {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    for family in ["llama", "qwen3"] {
        let model = baton_tests::tiny_model(family);
        let config = write_config(&cluster, &model, shape, shape);
        let (step, address) = world(&cluster, srun, &config).await;
        launch::answers_tiny(&address, family).await;
        end(&cluster, step).await;
    }
}

#[tokio::test]
async fn four_tensor_ranks_over_two_nodes() {
    is_golden(
        &["-N2", "-n8", "-m", "cyclic", "--mpi=pmix"],
        Shape::new(1, 4, 1),
    )
    .await;
}

#[tokio::test]
async fn two_pipeline_ranks_over_two_nodes() {
    is_golden(
        &["-N2", "-n4", "-m", "cyclic", "--mpi=pmix"],
        Shape::new(1, 1, 2),
    )
    .await;
}

#[tokio::test]
async fn tensor_and_pipeline_ranks_over_two_nodes() {
    is_golden(
        &["-N2", "-n8", "-m", "cyclic", "--mpi=pmix"],
        Shape::new(1, 2, 2),
    )
    .await;
}

/// Sums through MPI, over nodes, in ranks that srun and not mpirun has started.
#[tokio::test]
async fn mpi_sums_over_two_nodes() {
    if std::env::var_os("BATON_MPI_PLUGIN").is_none() {
        eprintln!("skipped: BATON_MPI_PLUGIN names no plug-in; scripts/build-mpi builds one");
        return;
    }
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let model = baton_tests::tiny_model("llama");
    let config = write_config(&cluster, &model, Shape::new(1, 2, 1), Shape::new(1, 2, 2));
    let srun = ["-N2", "-n6", "-m", "cyclic", "--mpi=pmix"];
    let (step, address) = world_with(&cluster, &srun, &config, &["--fabric", "mpi"]).await;
    assert!(
        step.log().contains("the ranks talk over MPI"),
        "{}",
        step.log()
    );
    launch::answers_tiny(&address, "llama").await;
    end(&cluster, step).await;
}

/// One srun for two context instances, a generation instance and the proxy.
#[tokio::test]
async fn one_world_for_everything() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let model = baton_tests::tiny_model("llama");
    let config = write_config(&cluster, &model, Shape::new(2, 2, 1), Shape::new(1, 2, 1));
    let (step, address) = world(&cluster, &["-N3", "-n6", "--mpi=pmix"], &config).await;
    let nodes = cluster.nodes().await;
    // The proxy runs on rank 0's host, under an address that others reach.
    assert!(
        address.starts_with(&format!("{}:", nodes[0].1)),
        "{address} on {nodes:?}"
    );
    launch::answers_tiny(&address, "llama").await;
    end(&cluster, step).await;
}

/// Without PMIx the ranks meet at a port of the job, once they share a secret.
#[tokio::test]
async fn a_secret_does_without_pmix() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let model = baton_tests::tiny_model("qwen3");
    let config = write_config(&cluster, &model, Shape::new(1, 2, 1), Shape::new(1, 1, 1));
    let secret = format!("--export=ALL,BATON_JOB_SECRET={}", "5e".repeat(32));
    let srun = ["-N3", "-n3", "--mpi=none", &secret];
    let (step, address) = world(&cluster, &srun, &config).await;
    launch::answers_tiny(&address, "qwen3").await;
    end(&cluster, step).await;
}

/// The existing scripts' way: one server over all ranks of a step, with one URL on the first node.
#[tokio::test]
async fn llmapi_launch_makes_one_server() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let nodes = cluster.nodes().await;
    let (launcher, baton) = (
        words(&launch::llmapi_launch()),
        words(&baton_tests::binary()),
    );
    let model = baton_tests::tiny_model("llama");
    let options = cluster.folder().join("options.yaml");
    std::fs::write(
        &options,
        "dtype: float32\nmax_seq_len: 512\nkv_cache_config:\n  max_tokens: 4096\n",
    )
    .expect("options");
    let options = words(&options);
    let srun = [
        "-N2",
        "--ntasks-per-node=2",
        "--mpi=pmix",
        "-w",
        &format!("{},{}", nodes[0].0, nodes[1].0),
    ]
    .map(str::to_owned);
    let serve = [
        launcher.as_str(),
        &baton,
        "serve",
        &model,
        "--tp_size",
        "4",
        "--host",
        "0.0.0.0",
        "--port",
        "8001",
        "--extra_llm_api_options",
        &options,
    ];
    let srun: Vec<&str> = srun.iter().map(String::as_str).collect();
    let mut step = cluster.srun(&[&srun[..], &serve[..]].concat(), &[]);
    let address = format!("{}:8001", nodes[0].1);
    let what = format!("{address} to be healthy");
    eventually(&what, READY, async || {
        assert_eq!(step.try_status(), None, "it ended:\n{}", step.log());
        let answer = client::get(&address, "/health").await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await;
    launch::answers_tiny(&address, "llama").await;
    end(&cluster, step).await;
}

/// 9 heads and 3 KV heads: three ranks divide them.
#[tokio::test]
async fn a_real_model_over_three_ranks() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let model = shared_model(&cluster);
    for (shape, count) in [(Shape::new(1, 3, 1), "-n6"), (Shape::new(1, 1, 2), "-n4")] {
        let config = write_config(&cluster, &model, shape, shape);
        let srun = ["-N3", count, "-m", "cyclic", "--mpi=pmix"];
        let (step, address) = world(&cluster, &srun, &config).await;
        launch::answers(&address, &golden::smollm2()).await;
        end(&cluster, step).await;
    }
}

/// 9 heads do not fall into two halves: one line, before any weight is read.
#[tokio::test]
async fn a_model_that_does_not_divide_is_refused() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(
        &cluster,
        &shared_model(&cluster),
        Shape::new(1, 2, 1),
        Shape::new(1, 2, 1),
    );
    let (baton, config) = (words(&baton_tests::binary()), words(&config));
    let srun = ["-N2", "-n4", "--mpi=pmix", &baton, "launch", "-c", &config];
    let mut step = cluster.srun(&srun, &[]);
    let status = step.ended(READY).await;
    assert!(!status.success(), "{}", step.log());
    let log = step.log();
    assert!(
        log.lines()
            .any(|line| line.contains('9') && line.contains("heads") && line.contains('2')),
        "{log}"
    );
    assert!(log.contains("hint: "), "{log}");
    nothing_left(&cluster).await;
}

/// Contexts and generation as three jobs of their own, and a proxy outside that reads their address files.
#[tokio::test]
async fn separate_jobs_and_a_proxy() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let model = baton_tests::tiny_model("qwen3");
    let config = write_config(&cluster, &model, Shape::new(2, 2, 1), Shape::new(1, 2, 1));
    let (baton, config, folder) = (
        words(&baton_tests::binary()),
        words(&config),
        words(&cluster.folder()),
    );
    let mut jobs = Vec::new();
    for label in ["ctx0", "ctx1", "gen0"] {
        let srun = [
            "-N1",
            "-n2",
            "--mpi=pmix",
            &baton,
            "launch",
            "-c",
            &config,
            "--only",
            label,
            "--address-dir",
            &folder,
        ];
        jobs.push(cluster.srun(&srun, &[]));
    }
    let url = |label: &str| format!("\"file:{folder}/{label}.addr\"");
    let text = format!(
        "hostname: 127.0.0.1\nport: 0\ncontext_servers:\n  num_instances: 2\n  urls: [{}, {}]\n\
         generation_servers:\n  num_instances: 1\n  urls: [{}]\n",
        url("ctx0"),
        url("ctx1"),
        url("gen0")
    );
    let mut proxy = Baton::start_with(
        &[("disagg_config.yaml", &text)],
        &["disaggregated", "-c", "@/disagg_config.yaml"],
        &[],
    );
    let address = proxy.ready().await;
    launch::answers_tiny(&address, "qwen3").await;
    drop(proxy);
    for step in jobs {
        cancel(&cluster, step).await;
    }
    nothing_left(&cluster).await;
}

/// Open MPI's own launcher inside an allocation, from a batch script.
#[tokio::test]
async fn mpirun_inside_an_allocation() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let model = baton_tests::tiny_model("llama");
    let config = write_config(&cluster, &model, Shape::new(1, 2, 1), Shape::new(1, 2, 1));
    let ready = cluster.folder().join("ready");
    let script = cluster.folder().join("job.sh");
    let text = format!(
        "#!/bin/bash\nexec mpirun --allow-run-as-root --bind-to none -n 4 {} launch -c {} --ready-file {}\n",
        words(&baton_tests::binary()),
        words(&config),
        words(&ready)
    );
    std::fs::write(&script, text).expect("a script");
    let script = words(&script);
    let batch = cluster
        .sbatch(&["-N2", "--ntasks-per-node=2", &script], &[])
        .await;
    let address = launch::file_text(&ready, READY, || false).await;
    launch::answers_tiny(&address, "llama").await;
    cluster.slurm("scancel", &[&batch.id.clone()]).await;
    batch.ended(&cluster, GONE).await;
    nothing_left(&cluster).await;
}

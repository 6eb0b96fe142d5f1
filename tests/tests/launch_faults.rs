//! Worlds that start wrong, in part, or lose a rank, a node or their secret: each ends or goes on in bounded time, with
//! the one line that says what to do.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use baton_tests::client;
use baton_tests::cluster::{Cluster, NodeProcess, Step};
use baton_tests::launch::{self, READY, Shape};
use baton_tests::process::eventually;
use http_body_util::BodyExt;
use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::task::JoinSet;

const GONE: Duration = Duration::from_secs(60);

fn baton() -> String {
    baton_tests::binary().to_string_lossy().into_owned()
}

fn write_config(cluster: &Cluster, context: Shape, generation: Shape) -> String {
    let file = cluster.folder().join("disagg_config.yaml");
    let model = baton_tests::tiny_model("llama");
    std::fs::write(
        &file,
        launch::config(&model, "0.0.0.0", context, generation),
    )
    .expect("a config");
    file.to_string_lossy().into_owned()
}

fn ready_file(cluster: &Cluster) -> PathBuf {
    cluster.folder().join("ready")
}

/// Starts `srun SRUN… baton launch -c CONFIG MORE…`.
fn start(cluster: &Cluster, srun: &[&str], config: &str, more: &[&str]) -> Step {
    let (baton, ready) = (baton(), ready_file(cluster));
    let ready = ready.to_string_lossy();
    let own = [&baton, "launch", "-c", config, "--ready-file", &ready];
    cluster.srun(&[srun, &own, more].concat(), &[])
}

async fn ready(cluster: &Cluster, step: &mut Step) -> String {
    launch::file_text(&ready_file(cluster), READY, || step.try_status().is_some()).await
}

async fn end(cluster: &Cluster, mut step: Step) {
    cluster.slurm("scancel", &["--name", step.job()]).await;
    step.ended(GONE).await;
    cluster.nothing_left(&baton(), GONE).await;
}

/// Waits for the step's failure and looks for the line that explains it; prints case, time and line.
#[expect(
    clippy::print_stderr,
    reason = "the table of cases is made of these lines"
)]
async fn fails(case: &str, step: &mut Step, limit: Duration, needles: &[&str]) {
    let begun = Instant::now();
    let status = step.ended(limit).await;
    let log = step.log();
    assert!(!status.success(), "{case}:\n{log}");
    let told = log
        .lines()
        .find(|line| needles.iter().all(|needle| line.contains(needle)));
    let told = told.unwrap_or_else(|| panic!("{case}: no line with {needles:?} in\n{log}"));
    assert!(log.contains("hint: "), "{case}: no hint in\n{log}");
    eprintln!("{case} | {:.1} s | {told}", begun.elapsed().as_secs_f32());
}

#[tokio::test]
async fn a_rank_that_never_starts() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(&cluster, Shape::new(1, 2, 1), Shape::new(1, 1, 1));
    let script = format!(
        "[ $SLURM_PROCID != 2 ] || exec sleep 30; exec {} launch -c {config} -t 7",
        baton()
    );
    let mut step = cluster.srun(&["-N3", "-n3", "--mpi=pmix", "bash", "-c", &script], &[]);
    // Said while it waits, not only at the end.
    let waiting = step.line("waiting for ranks", READY).await;
    assert!(waiting.contains("rank 2 (node3)"), "{waiting}");
    let job = step.job().to_owned();
    let told = step.line("2 of 3 ranks came within 7 s", GONE).await;
    assert!(told.contains("missing: rank 2 (node3)"), "{told}");
    cluster.slurm("scancel", &["--name", &job]).await;
    fails("2 of 3 ranks start", &mut step, GONE, &["2 of 3 ranks"]).await;
    cluster.nothing_left(&baton(), GONE).await;
}

#[tokio::test]
async fn rank_zero_never_starts() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(&cluster, Shape::new(1, 1, 1), Shape::new(1, 1, 1));
    let script = format!(
        "[ $SLURM_PROCID != 0 ] || exec sleep 300; exec {} launch -c {config} -t 7",
        baton()
    );
    let mut step = cluster.srun(&["-N2", "-n2", "--mpi=pmix", "bash", "-c", &script], &[]);
    step.line("waiting for a rank to publish where it is", READY)
        .await;
    step.line("rank 0 on node1 has not told where it is", GONE)
        .await;
    let job = step.job().to_owned();
    cluster.slurm("scancel", &["--name", &job]).await;
    fails("rank 0 never starts", &mut step, GONE, &["rank 0 on node1"]).await;
    cluster.nothing_left(&baton(), GONE).await;
}

#[tokio::test]
async fn a_size_that_lies() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(&cluster, Shape::new(1, 1, 1), Shape::new(1, 1, 1));
    let script = format!("export SLURM_NTASKS=8; exec {} launch -c {config}", baton());
    let mut step = cluster.srun(&["-N2", "-n2", "--mpi=pmix", "bash", "-c", &script], &[]);
    fails(
        "SLURM_NTASKS lies",
        &mut step,
        Duration::from_secs(15),
        &["SLURM_STEP_NUM_TASKS=2", "SLURM_NTASKS=8"],
    )
    .await;
}

#[tokio::test]
async fn no_pmix_and_no_secret() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(&cluster, Shape::new(1, 1, 1), Shape::new(1, 1, 1));
    let mut step = start(&cluster, &["-N2", "-n2", "--mpi=none"], &config, &[]);
    fails(
        "--mpi=none without a secret",
        &mut step,
        Duration::from_secs(15),
        &["srun", "no PMIx server", "BATON_JOB_SECRET"],
    )
    .await;
    assert!(step.log().contains("--mpi=pmix"), "{}", step.log());
}

/// One process of a world on a node, by what its command line holds.
async fn process_on(cluster: &Cluster, node: &str, needle: &str) -> NodeProcess {
    let own = baton();
    let what = format!("`{needle}` to run on {node}");
    eventually(&what, READY, async || {
        let all = cluster.processes(node).await;
        all.into_iter()
            .find(|process| process.command.contains(&own) && process.command.contains(needle))
    })
    .await
}

/// One follower rank, on whatever node.
async fn follower_anywhere(cluster: &Cluster) -> NodeProcess {
    let command = format!("{} rank", baton());
    eventually("a follower to run", READY, async || {
        for (node, _) in cluster.nodes().await {
            let mut all = cluster.processes(&node).await.into_iter();
            if let Some(found) = all.find(|process| process.command.ends_with(&command)) {
                return Some(found);
            }
        }
        None
    })
    .await
}

fn kill_now(process: &NodeProcess) {
    kill(Pid::from_raw(process.pid), Signal::SIGKILL).expect("the process is there");
}

/// How a streaming request went.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Told {
    /// To its end.
    Whole,
    /// Broken, and the client was told why: an error event, or a status that says so.
    Why(String),
    /// Neither: the connection ended without a word.
    Nothing(String),
}

async fn stream(address: &str, tokens: u32) -> Told {
    let body = json!({"model": "m", "prompt": [5, 6, 7], "max_tokens": tokens, "temperature": 0, "stream": true,
        "ignore_eos": true});
    let read = read_stream(address, body.to_string());
    match tokio::time::timeout(client::ANSWER_TIMEOUT, read).await {
        Ok(Ok(told)) => told,
        Ok(Err(error)) => Told::Nothing(format!("{error:#}")),
        Err(_) => Told::Nothing("silence".to_owned()),
    }
}

/// Reads what comes up to the end or the cut; a cut after an error event is what a broken stream looks like.
async fn read_stream(address: &str, body: String) -> anyhow::Result<Told> {
    let response = client::send(address, Method::POST, "/v1/completions", body).await?;
    let status = response.status();
    let mut body = response.into_body();
    let mut text = String::new();
    while let Some(Ok(frame)) = body.frame().await {
        if let Some(bytes) = frame.data_ref() {
            text.push_str(&String::from_utf8_lossy(bytes));
        }
    }
    let error = text.lines().find(|line| line.contains("\"error\""));
    Ok(match error {
        _ if !status.is_success() => Told::Why(format!("status {status}: {text}")),
        Some(event) => Told::Why(event.to_owned()),
        None if text.contains("data: [DONE]") => Told::Whole,
        None => Told::Nothing(text),
    })
}

async fn whole(address: &str, tokens: u32) -> Option<()> {
    (stream(address, tokens).await == Told::Whole).then_some(())
}

/// kill -9 of a generation rank under 20 requests a second: the others serve on, it comes back, nobody hangs.
#[tokio::test]
async fn a_killed_generation_rank_comes_back() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(&cluster, Shape::new(1, 1, 1), Shape::new(2, 2, 1));
    let srun = ["-N3", "-n5", "--mpi=pmix"];
    let mut step = start(&cluster, &srun, &config, &[]);
    let address = ready(&cluster, &mut step).await;
    // The context server has one rank, so whatever follows belongs to a generation server.
    let follower = follower_anywhere(&cluster).await;
    let mut requests = JoinSet::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    let begun = Instant::now();
    let mut killed = false;
    while begun.elapsed() < Duration::from_secs(8) {
        ticks.tick().await;
        let address = address.clone();
        requests.spawn(async move { stream(&address, 24).await });
        if !killed && begun.elapsed() > Duration::from_secs(2) {
            kill_now(&follower);
            killed = true;
        }
    }
    let back = step.line("epoch=2 elapsed_ms=", READY).await;
    let mut ends = Vec::new();
    while let Some(done) = requests.join_next().await {
        ends.push(done.expect("a request ends"));
    }
    let (served, lost): (Vec<Told>, Vec<Told>) =
        ends.into_iter().partition(|told| *told == Told::Whole);
    eprintln!(
        "killed generation rank | {back} | {} served, {} lost: {lost:?}",
        served.len(),
        lost.len()
    );
    // At most what one of two instances had in hand, and each was told.
    assert!(served.len() >= 50 && lost.len() <= 64, "{lost:?}");
    assert!(
        lost.iter().all(|told| matches!(told, Told::Why(_))),
        "{lost:?}"
    );
    launch::answers_tiny(&address, "llama").await;
    end(&cluster, step).await;
}

/// A counter or gauge of the proxy.
async fn proxy_metric(address: &str, name: &str) -> Option<u64> {
    let answer = client::get(address, "/prometheus/metrics").await.ok()?;
    let line = answer.body.lines().find_map(|line| line.strip_prefix(name));
    line?.trim().parse().ok()
}

/// A rank that is killed while its instance reads a prompt: stopped first, so that the prompt cannot be finished before.
/// With the only context server gone the client is told; with the server back it is served.
#[tokio::test]
async fn a_rank_killed_during_prefill() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(&cluster, Shape::new(1, 2, 1), Shape::new(1, 1, 1));
    let mut step = start(&cluster, &["-N3", "-n3", "--mpi=pmix"], &config, &[]);
    let address = ready(&cluster, &mut step).await;
    // The generation server has one rank, so what follows belongs to the context server.
    let follower = follower_anywhere(&cluster).await;
    kill(Pid::from_raw(follower.pid), Signal::SIGSTOP).expect("the process is there");
    let asked = tokio::spawn({
        let address = address.clone();
        async move { stream(&address, 4).await }
    });
    eventually(
        "the prompt to be at the context server",
        READY,
        async || {
            let sent = proxy_metric(&address, "ctx_total_requests_total").await?;
            (sent == 1).then_some(())
        },
    )
    .await;
    assert!(!asked.is_finished(), "a stopped rank cannot have answered");
    let begun = Instant::now();
    kill_now(&follower);
    let line = step.line("ctx0.1 on rank 1", GONE).await;
    assert!(line.contains("SIGKILL"), "{line}");
    let told = asked.await.expect("a request ends");
    assert!(!matches!(told, Told::Nothing(_)), "{told:?}");
    eprintln!(
        "killed during prefill | {:.1} s | {line} | the client: {told:?}",
        begun.elapsed().as_secs_f32()
    );
    step.line("serves again instance=\"ctx0\" epoch=2", READY)
        .await;
    eventually("the proxy to see it", READY, async || {
        whole(&address, 2).await
    })
    .await;
    launch::answers_tiny(&address, "llama").await;
    end(&cluster, step).await;
}

/// A rank that is killed between two tokens of an answer: the stream ends with an error event.
#[tokio::test]
async fn a_rank_killed_during_decode() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(&cluster, Shape::new(1, 1, 1), Shape::new(1, 2, 1));
    let mut step = start(&cluster, &["-N3", "-n3", "--mpi=pmix"], &config, &[]);
    let address = ready(&cluster, &mut step).await;
    let follower = follower_anywhere(&cluster).await;
    let body = json!({"model": "m", "prompt": [5, 6, 7], "max_tokens": 1500, "temperature": 0, "stream": true,
        "ignore_eos": true});
    let response = client::send(&address, Method::POST, "/v1/completions", body.to_string());
    let mut body = response.await.expect("an answer begins").into_body();
    let first = body.frame().await.expect("a first event").expect("of it");
    assert!(
        first
            .data_ref()
            .is_some_and(|data| data.starts_with(b"data: "))
    );
    let begun = Instant::now();
    kill_now(&follower);
    let rest = async {
        let mut text = String::new();
        while let Some(Ok(frame)) = body.frame().await {
            let bytes = frame.data_ref().cloned().unwrap_or_default();
            text.push_str(&String::from_utf8_lossy(&bytes));
        }
        text
    };
    let text = tokio::time::timeout(GONE, rest).await.expect("it ends");
    let event = text.lines().find(|line| line.contains("\"error\""));
    let event = event.unwrap_or_else(|| panic!("no error event in {text}"));
    eprintln!(
        "killed during decode | {:.1} s | {event}",
        begun.elapsed().as_secs_f32()
    );
    let line = step.line("gen0.1 on rank 2", GONE).await;
    assert!(line.contains("SIGKILL"), "{line}");
    step.line("serves again instance=\"gen0\" epoch=2", READY)
        .await;
    eventually("the proxy to see it", READY, async || {
        whole(&address, 2).await
    })
    .await;
    end(&cluster, step).await;
}

/// The same for the leader, and for a context rank; each is one instance's loss.
#[tokio::test]
async fn killed_leaders_come_back() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(&cluster, Shape::new(1, 2, 1), Shape::new(1, 2, 1));
    let srun = [
        "-N2",
        "-n4",
        "-m",
        "block",
        "--ntasks-per-node=2",
        "--mpi=pmix",
    ];
    let mut step = start(&cluster, &srun, &config, &[]);
    let address = ready(&cluster, &mut step).await;
    for (node, label) in [("node1", "ctx0"), ("node2", "gen0")] {
        let needle = format!("--instance {label}");
        kill_now(&process_on(&cluster, node, &needle).await);
        let line = format!("serves again instance=\"{label}\" epoch=2");
        step.line(&line, READY).await;
        eventually("the proxy to see it", READY, async || {
            whole(&address, 2).await
        })
        .await;
        launch::answers_tiny(&address, "llama").await;
    }
    end(&cluster, step).await;
}

/// The first follower that this machine starts, seen within a millisecond or two of its start.
fn first_follower(limit: Duration) -> Option<Pid> {
    let command = format!("{}\0rank\0", baton());
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let found = processes.into_iter().find_map(|process| {
            let pid: i32 = process.file_name().to_str()?.parse().ok()?;
            let words = std::fs::read(process.path().join("cmdline")).ok()?;
            String::from_utf8_lossy(&words)
                .starts_with(&command)
                .then_some(Pid::from_raw(pid))
        });
        if found.is_some() {
            return found;
        }
        std::thread::park_timeout(Duration::from_millis(1));
    }
    None
}

/// A rank that is killed while it starts is told of at once, with its name and how it ended, and started again.
#[tokio::test]
async fn a_rank_killed_while_it_starts() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(&cluster, Shape::new(1, 1, 1), Shape::new(1, 2, 1));
    let killer = std::thread::spawn(|| {
        let follower = first_follower(READY).expect("a follower");
        kill(follower, Signal::SIGKILL).expect("it is there");
    });
    let mut step = start(&cluster, &["-N3", "-n3", "--mpi=pmix"], &config, &[]);
    let begun = Instant::now();
    let told = step.line("gen0.1 on rank 2 (node3)", READY).await;
    eprintln!(
        "killed while it starts | {:.1} s | {told}",
        begun.elapsed().as_secs_f32()
    );
    assert!(told.contains("SIGKILL"), "{told}");
    killer.join().expect("it was killed");
    let address = ready(&cluster, &mut step).await;
    launch::answers_tiny(&address, "llama").await;
    end(&cluster, step).await;
}

#[tokio::test]
async fn a_node_cut_off_for_20_seconds() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(&cluster, Shape::new(1, 1, 1), Shape::new(1, 2, 1));
    let mut step = start(&cluster, &["-N3", "-n3", "--mpi=pmix"], &config, &[]);
    let address = ready(&cluster, &mut step).await;
    let cut = cluster.cut("node3").await;
    let outage = tokio::time::sleep(Duration::from_secs(20));
    // Asked while its rank is away: answered late or refused, but not left hanging.
    let asked = tokio::spawn({
        let address = address.clone();
        async move { stream(&address, 4).await }
    });
    outage.await;
    drop(cut);
    let told = asked.await.expect("a request ends");
    assert!(!matches!(told, Told::Nothing(_)), "{told:?}");
    eprintln!("20 s without node3 | a request meanwhile: {told:?}");
    eventually("the deployment to answer again", READY, async || {
        whole(&address, 2).await
    })
    .await;
    launch::answers_tiny(&address, "llama").await;
    end(&cluster, step).await;
}

#[tokio::test]
async fn a_node_cut_off_for_ever() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(&cluster, Shape::new(1, 1, 1), Shape::new(1, 2, 1));
    let more = ["--peer-timeout", "6"];
    let mut step = start(&cluster, &["-N3", "-n3", "--mpi=pmix"], &config, &more);
    ready(&cluster, &mut step).await;
    let cut = cluster.cut("node3").await;
    let begun = Instant::now();
    let told = step.line("rank 2 (node3)", GONE).await;
    eprintln!(
        "node3 gone | {:.1} s | {told}",
        begun.elapsed().as_secs_f32()
    );
    assert!(begun.elapsed() < Duration::from_secs(20), "{told}");
    drop(cut);
    let job = step.job().to_owned();
    cluster.slurm("scancel", &["--name", &job]).await;
    step.ended(GONE).await;
    cluster.nothing_left(&baton(), GONE).await;
}

#[tokio::test]
async fn two_jobs_of_one_config_on_one_node() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let config = write_config(&cluster, Shape::new(1, 1, 1), Shape::new(1, 1, 1));
    let baton = baton();
    let files = ["one", "two"].map(|name| cluster.folder().join(name));
    let mut steps = Vec::new();
    for file in &files {
        let file = file.to_string_lossy();
        let srun = [
            "-w",
            "node1",
            "-n2",
            "--mpi=pmix",
            &baton,
            "launch",
            "-c",
            &config,
            "--ready-file",
            &file,
        ];
        steps.push(cluster.srun(&srun, &[]));
    }
    for (file, step) in files.iter().zip(&mut steps) {
        let address = launch::file_text(file, READY, || step.try_status().is_some()).await;
        launch::answers_tiny(&address, "llama").await;
    }
    for step in steps {
        let mut step = step;
        let job = step.job().to_owned();
        cluster.slurm("scancel", &["--name", &job]).await;
        step.ended(GONE).await;
    }
    cluster.nothing_left(&baton, GONE).await;
}

#[tokio::test]
async fn a_leftover_process_on_the_wanted_port() {
    let Some(cluster) = Cluster::alone().await else {
        return;
    };
    let script = baton_tests::root().join("scripts/slurm-cluster");
    let listener = "import socket,time; s=socket.socket(); s.bind(('0.0.0.0',8123)); s.listen(); print('holds', flush=True); time.sleep(60)";
    let mut holder = cluster.start(
        &script.to_string_lossy(),
        &["exec", "node1", "python3", "-c", listener],
        &[],
    );
    holder.line("holds", GONE).await;
    let config = write_config(&cluster, Shape::new(1, 1, 1), Shape::new(1, 1, 1));
    let text = std::fs::read_to_string(&config).expect("the config");
    std::fs::write(&config, text.replacen("port: 0", "port: 8123", 1)).expect("the config");
    let mut step = start(
        &cluster,
        &["-w", "node1", "-n2", "--mpi=pmix"],
        &config,
        &[],
    );
    fails("a leftover on the port", &mut step, READY, &["8123"]).await;
    cluster.nothing_left(&baton(), GONE).await;
}

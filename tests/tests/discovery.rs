//! Servers that the proxy finds by itself: registered with it, or told by address files; on this machine and over the
//! nodes of the local cluster.

use std::time::Duration;

use baton_tests::client;
use baton_tests::cluster::Cluster;
use baton_tests::process::{Baton, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const ENGINE: &str = "dtype: float32\nmax_seq_len: 512\nkv_cache_config:\n  max_tokens: 4096\n\
                      cache_transceiver_config:\n  backend: DEFAULT\n";
/// Falls silent for good after a second and a half.
const RESTLESS: &str = "  heartbeat_interval_sec: 0.3\n  inactive_timeout_sec: 1.5\n";
/// Is missed only if it says so itself.
const PATIENT: &str = "  heartbeat_interval_sec: 0.3\n  inactive_timeout_sec: 600\n";

/// A proxy on a port of the kernel's choice whose workers register under `name`.
fn proxy(name: &str, environment: &[(&str, &str)]) -> Baton {
    let config = format!(
        "hostname: 127.0.0.1\ndisagg_cluster:\n  cluster_uri: http://127.0.0.1:8000\n  cluster_name: {name:?}\n"
    );
    let arguments = ["disaggregated", "-c", "@/disagg_config.yaml", "--port", "0"];
    Baton::start_with(&[("disagg_config.yaml", &config)], &arguments, environment)
}

struct Wish<'a> {
    proxy: &'a str,
    role: &'a str,
    name: &'a str,
    pace: &'a str,
    environment: &'a [(&'a str, &'a str)],
}

/// A worker on a port of the kernel's choice that registers with the proxy.
fn worker(wish: &Wish<'_>) -> Baton {
    let options = format!(
        "{ENGINE}disagg_cluster:\n  cluster_name: {:?}\n{}",
        wish.name, wish.pace
    );
    let uri = format!("http://{}", wish.proxy);
    let model = baton_tests::tiny_model("llama");
    let arguments = [
        "serve",
        &model,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--config",
        "@/options.yaml",
        "--disagg_cluster_uri",
        &uri,
        "--server_role",
        wish.role,
    ];
    Baton::start_with(&[("options.yaml", &options)], &arguments, wish.environment)
}

async fn health_is(proxy: &str, status: u16, text: &str) {
    let what = format!("/health to be {status} with {text:?}");
    eventually(&what, SOON, async || {
        let answer = client::get(proxy, "/health").await.ok()?;
        (answer.status == status && answer.body.contains(text)).then_some(())
    })
    .await;
}

async fn answers(proxy: &str) {
    let body = json!({"model": "m", "prompt": "hello", "max_tokens": 4, "temperature": 0});
    let answer = client::post(proxy, "/v1/completions", &body)
        .await
        .expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.json()["usage"]["completion_tokens"], json!(4));
}

async fn hosts(proxy: &str, role: &str) -> Vec<String> {
    let info = client::get(proxy, "/cluster_info")
        .await
        .expect("an answer");
    let info = info.json();
    let workers = info["current_workers"][role].as_array().cloned();
    let host = |worker: &Value| worker["host"].as_str().unwrap_or_default().to_owned();
    workers.unwrap_or_default().iter().map(host).collect()
}

#[tokio::test]
async fn workers_are_found_dropped_when_killed_and_found_again_elsewhere() {
    let mut proxy_process = proxy("", &[]);
    let at = proxy_process.address().await;
    let wish = |role, pace| Wish {
        proxy: &at,
        role,
        name: "",
        pace,
        environment: &[],
    };
    let mut context = worker(&wish("CONTEXT", PATIENT));
    let mut generation = worker(&wish("generation", RESTLESS));
    health_is(&at, 200, "").await;
    answers(&at).await;

    generation.signal(Signal::SIGKILL);
    health_is(&at, 503, "no generation server has registered").await;
    // Port 0: it comes back wherever there is room.
    generation.restart_at("127.0.0.1:0", &[]).await;
    health_is(&at, 200, "").await;
    answers(&at).await;

    // One that is told to end says so before anything else, however long its silence would be borne.
    context.signal(Signal::SIGTERM);
    health_is(&at, 503, "no context server has registered").await;
    context.ended(SOON).await;
    assert!(
        context.log().contains("registration taken out"),
        "{}",
        context.log()
    );
}

#[tokio::test]
async fn a_proxy_that_forgot_everything_is_told_anew() {
    let mut proxy_process = proxy("c", &[]);
    let at = proxy_process.address().await;
    let wish = |role| Wish {
        proxy: &at,
        role,
        name: "c",
        pace: PATIENT,
        environment: &[],
    };
    let workers = [worker(&wish("CONTEXT")), worker(&wish("GENERATION"))];
    health_is(&at, 200, "").await;
    proxy_process.restart_at(&at, &[]).await;
    answers(&at).await;
    for worker in &workers {
        assert!(
            worker.log().contains("registering again"),
            "{}",
            worker.log()
        );
    }
}

#[tokio::test]
async fn a_wrong_name_never_matches_and_the_proxy_says_what_it_has_seen() {
    let mut proxy_process = proxy("example_cluster", &[]);
    let at = proxy_process.address().await;
    let wish = |role, name| Wish {
        proxy: &at,
        role,
        name,
        pace: RESTLESS,
        environment: &[],
    };
    let mut stray = worker(&wish("CONTEXT", ""));
    let _generation = worker(&wish("GENERATION", "example_cluster"));
    stray.ready().await;
    let seen = "1 registered with cluster_name \"\", this proxy has \"example_cluster\"";
    health_is(&at, 503, seen).await;
    assert_eq!(hosts(&at, "context_servers").await, [""; 0]);
    let body = json!({"model": "m", "prompt": "hello", "max_tokens": 4});
    let refused = client::post(&at, "/v1/completions", &body)
        .await
        .expect("an answer");
    assert_eq!(refused.status, 503);
    assert!(
        refused.body.contains("no context server has registered"),
        "{}",
        refused.body
    );
}

#[tokio::test]
async fn with_a_job_secret_only_workers_of_the_job_are_let_in() {
    const SECRET: (&str, &str) = (
        "BATON_JOB_SECRET",
        "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff",
    );
    let mut proxy_process = proxy("", &[SECRET]);
    let at = proxy_process.address().await;
    let wish = |role, environment| Wish {
        proxy: &at,
        role,
        name: "",
        pace: RESTLESS,
        environment,
    };
    let strange = worker(&wish("CONTEXT", &[]));
    let told = "its job has a secret; set BATON_JOB_SECRET to the same here";
    eventually("the stranger to be told", SOON, async || {
        strange.log().contains(told).then_some(())
    })
    .await;
    let _context = worker(&wish("CONTEXT", &[SECRET]));
    let _generation = worker(&wish("GENERATION", &[SECRET]));
    health_is(&at, 200, "").await;
    assert_eq!(hosts(&at, "context_servers").await.len(), 1);
    answers(&at).await;
}

#[tokio::test]
async fn a_worker_without_a_role_is_refused_before_it_loads() {
    let arguments = [
        "serve",
        "/nonexistent/model",
        "--port",
        "0",
        "--host",
        "127.0.0.1",
        "--disagg_cluster_uri",
        "http://127.0.0.1:9",
    ];
    let (status, _, talk) = Baton::run(&arguments, &[]).await;
    assert_eq!(status.code(), Some(64), "{talk}");
    assert!(
        talk.contains("registering at 127.0.0.1:9 needs a role"),
        "{talk}"
    );
    assert!(talk.contains("hint: add --server_role CONTEXT"), "{talk}");
}

#[tokio::test]
async fn address_files_are_waited_for_and_followed() {
    let model = baton_tests::tiny_model("llama");
    let start = || {
        let arguments = [
            "serve",
            &model,
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--config",
            "@/options.yaml",
        ];
        Baton::start_with(&[("options.yaml", ENGINE)], &arguments, &[])
    };
    let mut context = start();
    let generation = start();
    let file = |process: &Baton| process.folder().join("addr").display().to_string();
    let config = format!(
        "hostname: 127.0.0.1\nport: 0\ncontext_servers:\n  urls: ['file:{}']\n\
         generation_servers:\n  urls: ['file:{}']\n",
        file(&context),
        file(&generation)
    );
    let arguments = ["disaggregated", "-c", "@/disagg_config.yaml"];
    let mut proxy = Baton::start_with(&[("disagg_config.yaml", &config)], &arguments, &[]);
    let at = proxy.ready().await;
    answers(&at).await;
    let before = context.address().await;
    context.signal(Signal::SIGKILL);
    health_is(&at, 503, "no context server is up").await;
    context.restart_at("127.0.0.1:0", &[]).await;
    assert_ne!(context.address().await, before);
    health_is(&at, 200, "").await;
    answers(&at).await;
}

/// Three separate steps that share nothing but the proxy's address: workers bind every address, and register the one
/// that others reach.
#[tokio::test]
async fn workers_on_other_nodes_register_addresses_that_the_proxy_reaches() {
    let Some(cluster) = Cluster::get().await else {
        return;
    };
    let nodes = cluster.nodes().await;
    let folder = cluster.folder();
    let path = |name: &str| folder.join(name).display().to_string();
    let config = "hostname: 0.0.0.0\nport: 0\ndisagg_cluster:\n  cluster_uri: http://node1:8000\n";
    std::fs::write(path("disagg_config.yaml"), config).expect("written");
    std::fs::write(path("options.yaml"), ENGINE).expect("written");
    let binary = baton_tests::binary().display().to_string();
    let model = baton_tests::tiny_model("llama");
    let on = |node: usize, words: &[&str]| {
        let node = format!("--nodelist={}", nodes[node].0);
        let mut all = vec!["-N1", "-n1", "--mpi=none", &node, &binary];
        all.extend(words);
        cluster.srun(&all, &[])
    };
    let (config, report, options) = (
        path("disagg_config.yaml"),
        path("proxy"),
        path("options.yaml"),
    );
    let _proxy = on(
        0,
        &["disaggregated", "-c", &config, "--report-addr", &report],
    );
    let port = eventually("the proxy's address", SOON, async || {
        let text = std::fs::read_to_string(&report).ok()?;
        text.trim().rsplit(':').next().map(str::to_owned)
    })
    .await;
    let uri = format!("http://{}:{port}", nodes[0].0);
    let at = format!("{}:{port}", nodes[0].1);
    let serve = |node: usize, role: &str| {
        let words = [
            "serve",
            &model,
            "--host",
            "0.0.0.0",
            "--port",
            "0",
            "--config",
            &options,
            "--disagg-cluster-uri",
            &uri,
            "--server-role",
            role,
        ];
        on(node, &words)
    };
    let _context = serve(1, "CONTEXT");
    let _generation = serve(2, "GENERATION");
    health_is(&at, 200, "").await;
    assert_eq!(hosts(&at, "context_servers").await, [nodes[1].1.clone()]);
    assert_eq!(hosts(&at, "generation_servers").await, [nodes[2].1.clone()]);
    answers(&at).await;
}

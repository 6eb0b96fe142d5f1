//! Killed, stopped and corrupted parts: every client gets an answer or a clear error in bounded time, no block
//! stays behind, and the deployment answers again.

use std::time::Duration;

use baton_tests::client::{self, ANSWER_TIMEOUT};
use baton_tests::deployment::{Deployment, Options};
use baton_tests::golden;
use baton_tests::process::eventually;
use http_body_util::BodyExt;
use hyper::Method;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const ENGINE: &str = "dtype: float32\nmax_seq_len: 2048\nmax_batch_size: 32\nkv_cache_config:\n  max_tokens: 24576\n\
    cache_transceiver_config:\n  backend: DEFAULT\n  kv_transfer_timeout_ms: 8000\n";
/// Leases end by themselves after `kv_transfer_timeout_ms`; the rest is slack for a busy machine.
const ALL_BACK: Duration = Duration::from_secs(60);

fn long_request(stream: bool) -> Value {
    json!({"model": "m", "prompt": "Once upon a time, in a village by the sea,", "max_tokens": 400, "temperature": 0,
        "ignore_eos": true, "stream": stream})
}

/// The deployment answers as if nothing had happened.
async fn answers(deployment: &Deployment) {
    let item = golden::smollm2().swap_remove(0);
    let body = json!({"model": "m", "prompt": item.prompt, "max_tokens": item.output_token_ids.len(), "temperature": 0});
    let text = eventually(
        "the deployment to answer again",
        Duration::from_secs(60),
        async || {
            let answer = client::post(&deployment.address, "/v1/completions", &body)
                .await
                .ok()?;
            (answer.status == 200).then(|| {
                answer.json()["choices"][0]["text"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned()
            })
        },
    );
    assert_eq!(text.await, item.text);
}

/// Every one of `count` concurrent requests ends with an answer or a clear error; returns how many were answered.
async fn all_end(address: &str, count: usize, hurt: impl AsyncFnOnce()) -> usize {
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..count {
        let address = address.to_owned();
        tasks.spawn(async move {
            let body = long_request(index % 2 == 0);
            if index % 2 == 0 {
                client::stream(&address, "/v1/completions", &body)
                    .await
                    .map(drop)
            } else {
                let answer = client::post(&address, "/v1/completions", &body).await?;
                let message = answer.json()["error"]["message"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned();
                anyhow::ensure!(answer.status == 200, "status {} {message}", answer.status);
                Ok(())
            }
        });
    }
    hurt().await;
    let mut answered = 0;
    while let Some(done) = tasks.join_next().await {
        match done.expect("no client task panics") {
            Ok(()) => answered += 1,
            Err(error) => {
                let text = format!("{error:#}");
                assert!(
                    !text.contains("deadline has elapsed"),
                    "a client waited {ANSWER_TIMEOUT:?} in vain: {text}"
                );
            }
        }
    }
    answered
}

/// Waits until some stream from the deployment has begun.
async fn streaming(deployment: &Deployment) {
    eventually(
        "the generation server to decode",
        Duration::from_secs(30),
        async || {
            let metrics = client::get(&deployment.generation.address, "/prometheus/metrics")
                .await
                .ok()?
                .body;
            metrics
                .lines()
                .any(|line| line.starts_with("baton_requests_running ") && !line.ends_with(" 0"))
                .then_some(())
        },
    )
    .await;
}

#[tokio::test]
async fn a_context_server_killed_while_it_sends() {
    let model = baton_tests::model();
    let mut options = Options::new(&model, ENGINE);
    // Its KV stops in the middle, for ever, so that the kill falls into the transfer.
    options.context_environment = &[("BATON_TEST_TRANSPORT_FAULT", "stall_after_bytes=500000")];
    options.context_count = 1;
    let mut deployment = Deployment::start(&options).await;
    let address = deployment.address.clone();
    all_end(&address, 4, async || {
        eventually("KV to be fetched", Duration::from_secs(30), async || {
            let metrics = client::get(&deployment.generation.address, "/prometheus/metrics")
                .await
                .ok()?
                .body;
            metrics
                .lines()
                .any(|line| line.starts_with("baton_kv_blocks_lent ") && !line.ends_with(" 0"))
                .then_some(())
        })
        .await;
        deployment.context[0].process.signal(Signal::SIGKILL);
    })
    .await;
    deployment.generation.blocks_return(ALL_BACK).await;
    let at = deployment.context[0].address.clone();
    deployment.context[0].process.restart_at(&at, &[]).await;
    answers(&deployment).await;
    deployment.blocks_return(ALL_BACK).await;
}

#[tokio::test]
async fn a_generation_server_killed_mid_stream() {
    let model = baton_tests::model();
    let mut deployment = Deployment::start(&Options::new(&model, ENGINE)).await;
    let address = deployment.address.clone();
    all_end(&address, 6, async || {
        streaming(&deployment).await;
        deployment.generation.process.signal(Signal::SIGKILL);
    })
    .await;
    let at = deployment.generation.address.clone();
    deployment.generation.process.restart_at(&at, &[]).await;
    answers(&deployment).await;
    deployment.blocks_return(ALL_BACK).await;
}

#[tokio::test]
async fn a_proxy_killed_mid_stream() {
    let model = baton_tests::model();
    let mut deployment = Deployment::start(&Options::new(&model, ENGINE)).await;
    let address = deployment.address.clone();
    all_end(&address, 6, async || {
        streaming(&deployment).await;
        deployment.proxy.signal(Signal::SIGKILL);
    })
    .await;
    // Workers see their client gone and stop by themselves.
    deployment.blocks_return(ALL_BACK).await;
    deployment.restart_proxy().await;
    answers(&deployment).await;
}

/// Stops one part for 30 s under load, lets it go on, and wants everything back.
async fn stopped_for_30_s(pick: impl Fn(&Deployment) -> nix::unistd::Pid) {
    let model = baton_tests::model();
    let mut options = Options::new(&model, ENGINE);
    options.proxy_arguments = &["--request-timeout", "60"];
    let deployment = Deployment::start(&options).await;
    let address = deployment.address.clone();
    let pid = pick(&deployment);
    all_end(&address, 6, async || {
        streaming(&deployment).await;
        nix::sys::signal::kill(pid, Signal::SIGSTOP).expect("the process is there");
        tokio::time::sleep(Duration::from_secs(30)).await;
        nix::sys::signal::kill(pid, Signal::SIGCONT).expect("the process is there");
    })
    .await;
    deployment.blocks_return(ALL_BACK).await;
    answers(&deployment).await;
}

#[tokio::test]
async fn a_context_server_stopped_for_30_s() {
    stopped_for_30_s(|deployment| deployment.context[0].process.pid()).await;
}

#[tokio::test]
async fn a_generation_server_stopped_for_30_s() {
    stopped_for_30_s(|deployment| deployment.generation.process.pid()).await;
}

#[tokio::test]
async fn a_proxy_stopped_for_30_s() {
    stopped_for_30_s(|deployment| deployment.proxy.pid()).await;
}

async fn read_whole(address: &str, body: String) -> anyhow::Result<()> {
    let mut response = client::send(address, Method::POST, "/v1/completions", body)
        .await?
        .into_body();
    while response.frame().await.transpose()?.is_some() {}
    Ok(())
}

/// 200 clients that go away at random moments, half of them streaming.
#[tokio::test]
async fn clients_that_disconnect_at_random_moments() {
    let model = baton_tests::model();
    let deployment = Deployment::start(&Options::new(&model, ENGINE)).await;
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..200_u64 {
        let address = deployment.address.clone();
        // A fixed, well-spread set of moments: from before the prompt is read to deep into the answer.
        let patience = Duration::from_millis(index.wrapping_mul(2_654_435_761) % 4000);
        let body = long_request(index % 2 == 0).to_string();
        // Dropping the future closes the connection.
        tasks.spawn(async move {
            drop(tokio::time::timeout(patience, read_whole(&address, body)).await)
        });
    }
    while tasks.join_next().await.is_some() {}
    deployment.blocks_return(ALL_BACK).await;
    answers(&deployment).await;
    deployment.blocks_return(ALL_BACK).await;
}

/// One byte of KV changes on the wire: the answer is the golden one (the prompt is read again) or an error.
#[tokio::test]
async fn a_flipped_byte_never_gives_a_wrong_answer() {
    let model = baton_tests::model();
    let mut options = Options::new(&model, ENGINE);
    options.context_environment = &[("BATON_TEST_TRANSPORT_FAULT", "flip_byte=1000")];
    let deployment = Deployment::start(&options).await;
    for item in golden::smollm2()
        .into_iter()
        .filter(|item| item.kind == "completion")
        .take(4)
    {
        let body = json!({"model": "m", "prompt": item.prompt, "max_tokens": item.output_token_ids.len(), "temperature": 0});
        let answer = client::post(&deployment.address, "/v1/completions", &body)
            .await
            .expect("an answer");
        if answer.status == 200 {
            assert_eq!(answer.json()["choices"][0]["text"], json!(item.text));
        } else {
            assert!(answer.body.contains("checksum"), "{}", answer.body);
        }
    }
    let metrics = client::get(&deployment.generation.address, "/prometheus/metrics")
        .await
        .expect("metrics")
        .body;
    let failed = metrics
        .lines()
        .find(|line| line.starts_with("baton_handoffs_failed_total"));
    assert!(
        failed.is_some_and(|line| !line.ends_with(" 0")),
        "the fault never struck:\n{metrics}"
    );
    deployment.blocks_return(ALL_BACK).await;
}

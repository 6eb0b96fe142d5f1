//! `baton up`: one command, a whole deployment; and its ends.

use std::time::Duration;

use baton_tests::client;
use baton_tests::process::{Baton, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// Processes whose parent is `parent`, by label-bearing command line.
fn children(parent: Pid) -> Vec<(Pid, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(id) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // The name in brackets may hold anything; the parent follows the state behind the last bracket.
        let parent_id = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().nth(1))
            .and_then(|word| word.parse().ok());
        if parent_id == Some(parent.as_raw()) {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            found.push((
                Pid::from_raw(id),
                String::from_utf8_lossy(&line).replace('\0', " "),
            ));
        }
    }
    found
}

fn alive(pid: Pid) -> bool {
    kill(pid, None).is_ok()
}

async fn completes(address: &str) {
    let body = json!({"model": "m", "prompt": "hello", "max_tokens": 4, "temperature": 0});
    eventually(
        "the deployment to answer",
        Duration::from_secs(60),
        async || {
            let answer = client::post(address, "/v1/completions", &body).await.ok()?;
            (answer.status == 200).then_some(())
        },
    )
    .await;
}

async fn start() -> (Baton, String, tempfile::TempDir) {
    let logs = tempfile::tempdir().expect("a folder");
    let model = baton_tests::tiny_model("llama");
    let folder = logs.path().to_string_lossy().into_owned();
    let mut up = Baton::start(
        &["up", "--model", &model, "--port", "0", "--log-dir", &folder],
        &[],
    );
    let address = up.ready().await;
    (up, address, logs)
}

#[tokio::test]
async fn it_serves_restarts_and_drains() {
    let (mut up, address, logs) = start().await;
    completes(&address).await;
    eventually(
        "the table of endpoints",
        Duration::from_secs(20),
        async || up.log().contains("ready: OpenAI API").then_some(()),
    )
    .await;
    let running = children(up.pid());
    assert_eq!(
        running.len(),
        4,
        "two context servers, a generation server, the proxy: {running:?}"
    );
    for (pid, line) in &running {
        if line.contains("serve") {
            kill(*pid, Signal::SIGKILL).expect("the process is there");
        }
    }
    eventually(
        "the instances to come back",
        Duration::from_secs(60),
        async || {
            (children(up.pid()).len() == 4
                && !running
                    .iter()
                    .any(|(pid, line)| line.contains("serve") && alive(*pid)))
            .then_some(())
        },
    )
    .await;
    completes(&address).await;
    let running = children(up.pid());
    up.signal(Signal::SIGINT);
    let status = up.ended(Duration::from_secs(40)).await;
    assert_eq!(status.code(), Some(130));
    assert!(
        running.iter().all(|(pid, _)| !alive(*pid)),
        "children survive"
    );
    for label in ["ctx0", "ctx1", "gen0", "proxy"] {
        assert!(
            logs.path().join(format!("{label}.log")).exists(),
            "no log of {label}"
        );
    }
}

#[tokio::test]
async fn its_children_die_with_it() {
    let (mut up, _, _logs) = start().await;
    let running = children(up.pid());
    up.signal(Signal::SIGKILL);
    up.ended(Duration::from_secs(10)).await;
    eventually("the children to die", Duration::from_secs(10), async || {
        running.iter().all(|(pid, _)| !alive(*pid)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_instance_that_cannot_start_ends_it_with_the_first_cause() {
    let folder = tempfile::tempdir().expect("a folder");
    let broken = folder.path().join("broken.gguf");
    std::fs::write(&broken, b"GGUF but not really").expect("a file");
    let logs = folder.path().join("logs").to_string_lossy().into_owned();
    let (status, _, stderr) = Baton::run(
        &[
            "up",
            "--model",
            &broken.to_string_lossy(),
            "--port",
            "0",
            "--log-dir",
            &logs,
        ],
        &[],
    )
    .await;
    assert_eq!(status.code(), Some(69), "{stderr}");
    let cause = stderr
        .lines()
        .skip_while(|line| !line.starts_with("error:"))
        .collect::<Vec<_>>()
        .join("\n");
    assert!(
        cause.contains("exit code 69") && cause.contains("broken.gguf"),
        "{stderr}"
    );
}

#[tokio::test]
async fn the_sample_client_writes_answers_in_order() {
    let (_up, address, logs) = start().await;
    let (prompts, output) = (
        logs.path().join("prompts.json"),
        logs.path().join("output.json"),
    );
    std::fs::write(&prompts, r#"["hello", "a", "The quick brown fox"]"#).expect("a file");
    let port = address.rsplit(':').next().expect("a port");
    let config = logs
        .path()
        .join("disagg_config.yaml")
        .to_string_lossy()
        .into_owned();
    assert!(
        std::fs::read_to_string(&config)
            .expect("the proxy's config")
            .contains(port)
    );
    for streaming in [false, true] {
        let (prompts, output) = (prompts.to_string_lossy(), output.to_string_lossy());
        let mut arguments = vec![
            "client",
            "-c",
            &config,
            "-p",
            &prompts,
            "-o",
            &output,
            "-e",
            "chat",
            "--max-tokens",
            "5",
        ];
        if streaming {
            arguments.push("--streaming");
        }
        let (status, _, stderr) = Baton::run(&arguments, &[]).await;
        assert!(status.success(), "{stderr}");
    }
    let text = std::fs::read_to_string(&output).expect("the answers");
    let answers: Vec<String> = serde_json::from_str(&text).expect("a JSON array of strings");
    assert_eq!(answers.len(), 3);
    assert!(text.starts_with("[\n  \""), "indent 2: {text}");
}

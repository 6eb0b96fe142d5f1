//! What users and networks get wrong: one clear line each, no panic, no crash.

use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_tests::client;
use baton_tests::deployment::{Deployment, Options, Worker};
use baton_tests::process::Baton;
use proptest::strategy::{Strategy, ValueTree};
use serde_json::json;

const SMALL: &str = "max_seq_len: 512\nkv_cache_config:\n  max_tokens: 2048\n";

/// Runs a command that must fail; returns its last line of error text.
async fn fails(arguments: &[&str], code: i32) -> String {
    let (status, _, stderr) = Baton::run(arguments, &[]).await;
    assert_eq!(
        status.code(),
        Some(code),
        "`baton {}`:\n{stderr}",
        arguments.join(" ")
    );
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
        .lines()
        .rfind(|line| line.contains("error"))
        .unwrap_or_default()
        .to_owned()
}

fn copy_tiny(folder: &Path) -> PathBuf {
    let target = folder.join("tiny");
    std::fs::create_dir_all(&target).expect("a folder");
    for entry in
        std::fs::read_dir(baton_tests::tiny_model("llama")).expect("the tiny model is in the tree")
    {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), target.join(entry.file_name())).expect("a copy");
    }
    target
}

#[tokio::test]
async fn a_truncated_gguf() {
    let folder = tempfile::tempdir().expect("a folder");
    let bytes = std::fs::read(baton_tests::model()).expect("the model");
    for keep in [3, 100, 1_000_000, bytes.len() / 2, bytes.len() - 1] {
        let path = folder.path().join(format!("cut-{keep}.gguf"));
        std::fs::write(&path, &bytes[..keep]).expect("a file");
        let line = fails(
            &[
                "serve",
                &path.to_string_lossy(),
                "--port",
                "0",
                "--report-addr",
                "/dev/null",
            ],
            69,
        )
        .await;
        assert!(line.contains("cut-"), "{keep}: {line}");
    }
}

#[tokio::test]
async fn a_safetensors_file_with_a_lying_header() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = copy_tiny(folder.path());
    let file = model.join("model.safetensors");
    let good = std::fs::read(&file).expect("the weights");
    let mut longer = good.clone();
    longer[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut past_the_end = good.clone();
    past_the_end.truncate(good.len() / 2);
    let text = String::from_utf8_lossy(&good[8..2000]).into_owned();
    let at = 8 + text.find("data_offsets").expect("a header") + 15;
    let mut offsets = good.clone();
    offsets[at] = b'9';
    for bytes in [longer, past_the_end, offsets] {
        std::fs::write(&file, bytes).expect("a file");
        let line = fails(
            &[
                "serve",
                &model.to_string_lossy(),
                "--port",
                "0",
                "--report-addr",
                "/dev/null",
            ],
            69,
        )
        .await;
        assert!(line.contains("model.safetensors"), "{line}");
    }
}

#[tokio::test]
async fn a_model_without_a_chat_template_asked_to_chat() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = copy_tiny(folder.path());
    let path = model.join("tokenizer_config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).expect("a config")).expect("JSON");
    config
        .as_object_mut()
        .expect("an object")
        .remove("chat_template");
    std::fs::write(&path, config.to_string()).expect("a file");
    let worker = Worker::start(&model.to_string_lossy(), SMALL).await;
    let body =
        json!({"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2});
    let answer = client::post(&worker.address, "/v1/chat/completions", &body)
        .await
        .expect("an answer");
    assert_eq!(answer.status, 400, "{}", answer.body);
    assert!(answer.body.contains("chat template"), "{}", answer.body);
    let body = json!({"model": "m", "prompt": "hello", "max_tokens": 2});
    assert_eq!(
        client::post(&worker.address, "/v1/completions", &body)
            .await
            .expect("an answer")
            .status,
        200
    );
}

#[tokio::test]
async fn unknown_config_keys() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("options.yaml");
    std::fs::write(
        &path,
        "kv_cache_config:\n  tokens_per_blok: 32\nmax_batch_sze: 4\n",
    )
    .expect("a file");
    let path = path.to_string_lossy();
    let model = baton_tests::tiny_model("llama");
    let (status, _, stderr) = Baton::run(
        &[
            "serve",
            &model,
            "--config",
            &path,
            "--port",
            "0",
            "--report-addr",
            "/dev/null",
        ],
        &[],
    )
    .await;
    assert_eq!(status.code(), Some(65), "{stderr}");
    for expected in [
        "tokens_per_block",
        "max_batch_size",
        "options.yaml:2",
        "options.yaml:3",
    ] {
        assert!(stderr.contains(expected), "no `{expected}` in:\n{stderr}");
    }
    let (status, _, stderr) = Baton::run(&["config", "check", &path], &[]).await;
    assert_eq!(status.code(), Some(65), "{stderr}");
}

#[tokio::test]
async fn a_port_in_use() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
    let port = taken.local_addr().expect("an address").port().to_string();
    let model = baton_tests::tiny_model("llama");
    let line = fails(
        &["serve", &model, "--host", "127.0.0.1", "--port", &port],
        98,
    )
    .await;
    assert!(line.contains(&port), "{line}");
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("disagg_config.yaml");
    let text = format!(
        "hostname: 127.0.0.1\nport: {port}\ncontext_servers:\n  num_instances: 1\n  urls: [\"localhost:1\"]\n\
         generation_servers:\n  num_instances: 1\n  urls: [\"localhost:2\"]\n"
    );
    std::fs::write(&config, text).expect("a file");
    let line = fails(&["disaggregated", "-c", &config.to_string_lossy()], 98).await;
    assert!(line.contains(&port), "{line}");
}

#[tokio::test]
async fn workers_that_never_come() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("disagg_config.yaml");
    let text = "hostname: 127.0.0.1\nport: 0\ncontext_servers:\n  num_instances: 1\n  urls: [\"127.0.0.1:1\"]\n\
        generation_servers:\n  num_instances: 1\n  urls: [\"127.0.0.1:2\"]\n";
    std::fs::write(&config, text).expect("a file");
    let line = fails(
        &["disaggregated", "-c", &config.to_string_lossy(), "-t", "2"],
        75,
    )
    .await;
    assert!(
        line.contains("127.0.0.1:1") && line.contains("127.0.0.1:2"),
        "{line}"
    );
}

#[tokio::test]
async fn a_missing_model() {
    let line = fails(
        &[
            "serve",
            "no-such-org/no-such-model",
            "--port",
            "0",
            "--report-addr",
            "/dev/null",
        ],
        69,
    )
    .await;
    assert!(line.contains("no-such-org/no-such-model"), "{line}");
}

#[tokio::test]
async fn a_prompt_that_is_too_long() {
    let model = baton_tests::tiny_model("llama");
    let mut options = Options::new(&model, SMALL);
    options.context_count = 1;
    let deployment = Deployment::start(&options).await;
    let body = json!({"model": "m", "prompt": vec![5; 600], "max_tokens": 2});
    for address in [&deployment.address, &deployment.generation.address] {
        let answer = client::post(address, "/v1/completions", &body)
            .await
            .expect("an answer");
        assert_eq!(answer.status, 400, "{}", answer.body);
        assert!(
            answer.body.contains("600") && answer.body.contains("512"),
            "{}",
            answer.body
        );
    }
}

/// 10,000 bodies from random bytes and from mutated real requests, at the proxy and at a worker.
#[tokio::test]
async fn ten_thousand_random_bodies() {
    let model = baton_tests::tiny_model("llama");
    let mut options = Options::new(&model, SMALL);
    options.context_count = 1;
    let deployment = Deployment::start(&options).await;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let bytes = proptest::collection::vec(proptest::num::u8::ANY, 0..300);
    let seeds = [
        r#"{"model":"m","prompt":"hello","max_tokens":3,"temperature":0.5,"logprobs":1,"stream":false}"#,
        r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":2,"top_p":0.9,"stop":["a"]}"#,
        r#"{"model":"m","prompt":[5,6,7],"max_tokens":2,"disaggregated_params":{"request_type":"context_only"}}"#,
        r#"{"model":"m","prompt":[5],"max_tokens":2,"disaggregated_params":{"request_type":"generation_only","first_gen_tokens":[7],"ctx_request_id":1,"encoded_opaque_state":"AAAA"}}"#,
    ];
    let edits = proptest::collection::vec((0.0..1.0_f64, proptest::num::u8::ANY), 1..6);
    for index in 0..10_000_usize {
        let address = if index % 2 == 0 {
            &deployment.address
        } else {
            &deployment.generation.address
        };
        let path = if index % 3 == 0 {
            "/v1/chat/completions"
        } else {
            "/v1/completions"
        };
        let body = if index % 4 == 0 {
            bytes.new_tree(&mut runner).expect("bytes").current()
        } else {
            mutated(
                seeds[index % seeds.len()],
                &edits.new_tree(&mut runner).expect("edits").current(),
            )
        };
        let shown = String::from_utf8_lossy(&body).into_owned();
        let answer = client::post_bytes(address, path, body)
            .await
            .expect("an answer");
        let fine = answer.status < 500
            || (answer.status == 502 || answer.status == 503) && shown.contains("generation_only");
        assert!(
            fine,
            "status {} for {shown}: {}",
            answer.status, answer.body
        );
    }
    assert!(!deployment.generation.process.log().contains("panicked"));
    assert!(!deployment.proxy.log().contains("panicked"));
    deployment.blocks_return(Duration::from_secs(90)).await;
}

fn mutated(seed: &str, edits: &[(f64, u8)]) -> Vec<u8> {
    let mut body = seed.as_bytes().to_vec();
    for (place, byte) in edits {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a place within a short text"
        )]
        let at = ((body.len() as f64) * place) as usize;
        match byte % 3 {
            0 => body[at] = *byte,
            1 => body.insert(at, *byte),
            _ => drop(body.remove(at)),
        }
    }
    body
}

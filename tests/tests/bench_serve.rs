//! `baton bench serve` as people run it: against a real server, a whole deployment, the engine alone, and servers that fail.
//!
//! The machine that runs this may be busy, so that the client's own lateness is accepted; all else must be right.

use std::process::ExitStatus;

use baton_tests::deployment::{Deployment, Options, Worker};
use baton_tests::process::Baton;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const ENGINE: &str =
    "device: cpu\nnum_threads: 1\nmax_seq_len: 512\nkv_cache_config:\n  max_tokens: 8192\n";

/// Runs it with `--json -`; the report is all that stdout holds.
async fn bench(arguments: &[&str]) -> (ExitStatus, Value, String) {
    let arguments = [&["bench", "serve", "--json", "-"], arguments].concat();
    let (status, stdout, stderr) = Baton::run(&arguments, &[]).await;
    let report = serde_json::from_str(&stdout)
        .unwrap_or_else(|error| panic!("{error} in:\n{stdout}\n{stderr}"));
    (status, report, stderr)
}

/// Runs a command that must fail before anything is measured; returns its error text.
async fn refused(arguments: &[&str], code: i32) -> String {
    let arguments = [&["bench", "serve"], arguments].concat();
    let (status, stdout, stderr) = Baton::run(&arguments, &[]).await;
    assert_eq!(status.code(), Some(code), "{stderr}");
    assert_eq!(stdout, "");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

fn whole(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no count"))
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

/// The figures of a run in which every request was complete, and `output` tokens long.
fn check_run(run: &Value, requests: u64, output: u64) {
    assert_eq!(
        (whole(&run["completed"]), whole(&run["failed"])),
        (requests, 0),
        "{run:#}"
    );
    assert_eq!(whole(&run["output_tokens"]), requests * output, "{run:#}");
    assert_eq!(whole(&run["outputs_of_other_length"]), 0);
    assert_eq!(whole(&run["inputs_of_other_length"]), 0);
    assert_eq!(whole(&run["uncounted"]), 0);
    for name in ["ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"] {
        let times = &run[name];
        let order = ["min", "p50", "p90", "p95", "p99", "max"].map(|name| number(&times[name]));
        assert!(order[0] >= 0.0 && order.is_sorted(), "{name}: {times}");
        assert!(number(&times["mean"]) > 0.0, "{name}: {times}");
    }
    assert_eq!(whole(&run["ttft_ms"]["samples"]), requests);
    assert!(number(&run["ttft_ms"]["p50"]) < number(&run["e2e_ms"]["p50"]));
    let rate = number(&run["output_tokens_per_s"]) * number(&run["duration_s"]);
    assert!((rate - (requests * output) as f64).abs() < 0.1, "{run:#}");
}

#[tokio::test]
async fn a_server_is_measured_with_prompts_and_answers_of_exact_length() {
    let worker = Worker::start(&baton_tests::tiny_model("llama"), ENGINE).await;
    let load = "--concurrency 4 --num-prompts 8 --isl 48 --osl 12 --accept saturated --save-requests --url";
    let url = format!("http://{}/v1", worker.address);
    let (status, report, _) = bench(&[words(load), vec![&url]].concat()).await;
    assert_eq!(status.code(), Some(0), "{report:#}");
    assert_eq!(report["verdict"]["pass"], true);
    assert_eq!(report["target"]["model"], "tiny-llama");
    // A sixteenth of the server's 288 ids is left out at both ends.
    assert_eq!(
        report["parameters"]["vocabulary"],
        serde_json::json!([18, 270])
    );
    assert_eq!(report["parameters"]["cases"][0]["warmup"], 4);
    let run = &report["runs"][0];
    check_run(run, 8, 12);
    assert_eq!(whole(&run["input_tokens"]), 8 * 48);
    assert_eq!(whole(&run["cached_tokens"]), 0, "no prompt is sent twice");
    assert!(number(&run["client"]["cpu_us_per_token"]) > 0.0);
    let requests = run["requests_detail"].as_array().expect("requests");
    assert_eq!(requests.len(), 8);
    for request in requests {
        let arrivals = request["arrivals"].as_array().expect("arrivals");
        let tokens: u64 = arrivals
            .iter()
            .map(|arrival| whole(&arrival["tokens"]))
            .sum();
        assert_eq!(
            tokens, 12,
            "the tokens that came are those that were counted"
        );
        let times: Vec<u64> = arrivals
            .iter()
            .map(|arrival| whole(&arrival["at_us"]))
            .collect();
        assert!(times.is_sorted(), "{times:?}");
        assert_eq!(whole(&request["input_tokens"]), 48);
    }
    // What the server itself has counted: those eight and four to warm up.
    let state = worker.state().await;
    assert_eq!(state["engineStats"]["requests_total"], 12, "{state:#}");
}

#[tokio::test]
async fn a_deployment_is_found_by_its_config_and_asked_at_random_times() {
    let model = baton_tests::tiny_model("llama");
    let mut options = Options::new(&model, ENGINE);
    options.context_count = 1;
    let deployment = Deployment::start(&options).await;
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("disagg_config.yaml");
    let (host, port) = deployment.address.split_once(':').expect("host:port");
    let text = format!(
        "hostname: {host}\nport: {port}\ncontext_servers: {{num_instances: 1, urls: [\"{}\"]}}\ngeneration_servers: {{num_instances: 1, urls: [\"{}\"]}}\n",
        deployment.context[0].address, deployment.generation.address
    );
    std::fs::write(&config, text).expect("a file");
    let config = config.to_string_lossy().into_owned();
    let load = "--endpoint /v1/chat/completions --request-rate 40 --num-prompts 10 --isl 20-40 --osl 6 --vocab-size 288 --warmup 2 --accept saturated,short --goodput ttft:60000 e2el:120000 -c";
    let (status, report, _) = bench(&[words(load), vec![&config]].concat()).await;
    assert_eq!(status.code(), Some(0), "{report:#}");
    let run = &report["runs"][0];
    check_run(run, 10, 6);
    assert_eq!(whole(&run["goodput"]["requests"]), 10);
    assert!(
        (200..=400).contains(&whole(&run["input_tokens"])),
        "{run:#}"
    );
    assert!(number(&run["sent_late_ms"]["p50"]) >= 0.0);
    let state = deployment.generation.state().await;
    assert_eq!(
        state["engineStats"]["handoffs_fetched_total"], 12,
        "{state:#}"
    );
}

#[tokio::test]
async fn prompts_of_a_file_are_sent_as_they_are() {
    let worker = Worker::start(&baton_tests::tiny_model("llama"), ENGINE).await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("prompts.jsonl");
    let text = "{\"prompt\": \"hello\", \"output_len\": 3}\n{\"prompt\": [40, 41, 42, 43], \"output_len\": 5}\n";
    std::fs::write(&file, text).expect("a file");
    let file = file.to_string_lossy().into_owned();
    let (status, stdout, stderr) = Baton::run(
        &[
            "bench",
            "serve",
            "--url",
            &worker.address,
            "--dataset",
            &file,
            "--accept",
            "saturated",
        ],
        &[],
    )
    .await;
    assert_eq!(status.code(), Some(0), "{stdout}\n{stderr}");
    assert!(
        stdout.contains("2 requests · 1 at once · dataset in"),
        "{stdout}"
    );
    let last = stdout.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("valid: 2 requests, 8 tokens written"),
        "{stdout}"
    );
    for name in ["TTFT ms", "ITL ms", "TPOT ms", "E2E ms"] {
        assert!(stdout.contains(name), "{stdout}");
    }
}

#[tokio::test]
async fn the_engine_alone_gives_every_row_of_a_preset() {
    let model = baton_tests::tiny_model("llama");
    let folder = tempfile::tempdir().expect("a folder");
    let options = folder.path().join("options.yaml");
    std::fs::write(&options, ENGINE).expect("a file");
    let options = options.to_string_lossy().into_owned();
    let line = "--load-format dummy --preset smoke --repeat 2 --accept saturated --offline";
    let arguments = [words(line), vec![&model, "--config", &options]].concat();
    let (status, report, stderr) = bench(&arguments).await;
    assert_eq!(status.code(), Some(0), "{report:#}\n{stderr}");
    assert_eq!(report["target"]["kind"], "engine");
    let start = &report["target"]["start"];
    assert!(
        number(&start["first_token_s"]) > number(&start["ready_s"]),
        "{start}"
    );
    let figures = report["figures"].as_array().expect("figures");
    let names: Vec<String> = figures
        .iter()
        .map(|row| format!("{}: {}", row["case"], row["figure"]).replace('"', ""))
        .collect();
    assert_eq!(
        names,
        [
            "decode, 1 sequence: decode",
            "decode, 4 sequences: decode",
            "decode, 4 sequences: after_first",
            "1 × 64: first_token",
            "2 × 64: prefill",
            "6 × 32 in, 8 out: output",
        ]
    );
    for row in figures {
        assert_eq!(row["samples"], 2, "{row}");
        assert!(number(&row["min"]) > 0.0, "{row}");
    }
    assert_eq!(report["runs"].as_array().expect("runs").len(), 10);
}

#[tokio::test]
async fn the_engine_alone_runs_on_several_ranks() {
    let model = baton_tests::tiny_model("llama");
    let line = "--load-format dummy --device cpu --max-seq-len 512 --tp_size 2 --concurrency 2 --num-prompts 4 --isl 32 --osl 8 --accept saturated --offline";
    let (status, report, stderr) = bench(&[words(line), vec![&model]].concat()).await;
    assert_eq!(status.code(), Some(0), "{report:#}\n{stderr}");
    check_run(&report["runs"][0], 4, 8);
    let backend = report["target"]["backend"].as_str().expect("a backend");
    assert!(backend.starts_with("2 ranks"), "{backend}");
    assert!(!stderr.contains("broken"), "{stderr}");
}

#[tokio::test]
async fn servers_and_the_engine_alone_draw_as_the_flags_say() {
    let model = baton_tests::tiny_model("llama");
    let worker = Worker::start(&model, ENGINE).await;
    let sampling = "--temperature 0.5 --top-k 20 --min-p 0.25 --repetition-penalty 1.5 --frequency-penalty -0.5 --logprobs 2";
    let load = "--concurrency 2 --num-prompts 4 --isl 32 --osl 8 --accept saturated";
    let engine = "--load-format dummy --device cpu --max-seq-len 512 --offline";
    let url = ["--url", &worker.address];
    for (endpoint, target) in [
        ("completions", url.to_vec()),
        ("chat", url.to_vec()),
        ("completions", [words(engine), vec![&model]].concat()),
    ] {
        let named = vec!["--endpoint", endpoint];
        let arguments = [words(load), words(sampling), named, target].concat();
        let (status, report, stderr) = bench(&arguments).await;
        assert_eq!(status.code(), Some(0), "{report:#}\n{stderr}");
        check_run(&report["runs"][0], 4, 8);
        let mut asked = serde_json::json!({"temperature": 0.5, "top_k": 20, "min_p": 0.25, "repetition_penalty": 1.5,
            "frequency_penalty": -0.5, "logprobs": 2});
        if endpoint == "chat" {
            asked["logprobs"] = true.into();
            asked["top_logprobs"] = 2.into();
        }
        assert_eq!(report["parameters"]["sampling"], asked);
    }
}

const MODELS: &str = r#"{"object":"list","data":[{"id":"mock"}]}"#;
const TOKEN: &str = "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n\n";
const USAGE: &str =
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":4,\"completion_tokens\":2}}\n\n";
const DONE: &str = "data: [DONE]\n\n";

/// Answers every POST with this head and body and then closes, and names a model to who asks.
async fn canned(status: &'static str, body: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a socket");
    let address = listener.local_addr().expect("an address").to_string();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(answer(socket, status, body.clone()));
        }
    });
    address
}

async fn answer(mut socket: TcpStream, status: &'static str, body: String) {
    let mut request = Vec::new();
    let mut piece = [0; 4096];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        match socket.read(&mut piece).await {
            Ok(read @ 1..) => request.extend_from_slice(&piece[..read]),
            Ok(_) | Err(_) => return,
        }
    }
    let text = if request.starts_with(b"GET /v1/models ") {
        format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{MODELS}")
    } else if request.starts_with(b"GET ") {
        "HTTP/1.1 404 Not Found\r\nconnection: close\r\n\r\n".to_owned()
    } else {
        format!("HTTP/1.1 {status}\r\nconnection: close\r\n\r\n{body}")
    };
    // A client that has gone needs no answer.
    let _ = socket.write_all(text.as_bytes()).await;
    let _ = socket.shutdown().await;
}

#[tokio::test]
async fn failures_are_counted_by_kind_and_never_end_well() {
    for (status, body, kind, words_of_it) in [
        (
            "503 Service Unavailable",
            r#"{"error":{"message":"too busy"}}"#.to_owned(),
            "status 503",
            "too busy",
        ),
        (
            "200 OK",
            format!("{TOKEN}{TOKEN}"),
            "stream cut",
            "broke off after 2 tokens",
        ),
        (
            "200 OK",
            format!("{TOKEN}data: {{\"error\":{{\"message\":\"device lost\"}}}}\n\n"),
            "error event",
            "device lost",
        ),
        (
            "200 OK",
            "{\"choices\":[{\"text\":\"a\"}]}".to_owned(),
            "not understood",
            "no stream of events",
        ),
        (
            "200 OK",
            "data: <html>\n\n".to_owned(),
            "not understood",
            "<html>",
        ),
    ] {
        let address = canned(status, body).await;
        let load = "--num-prompts 4 --concurrency 2 --isl 4 --osl 2 --warmup 0 --accept warmup,saturated,short --url";
        let (code, report, _) = bench(&[words(load), vec![&address]].concat()).await;
        assert_eq!(code.code(), Some(1), "{report:#}");
        let run = &report["runs"][0];
        assert_eq!(
            (whole(&run["completed"]), whole(&run["failed"])),
            (0, 4),
            "{report:#}"
        );
        assert_eq!(whole(&run["failures"][kind]["count"]), 4, "{report:#}");
        let first = run["failures"][kind]["first"].as_str().expect("words");
        assert!(first.contains(words_of_it), "{first}");
        assert_eq!(run["ttft_ms"], Value::Null);
        let reason = report["verdict"]["reason"].as_str().expect("a reason");
        assert!(reason.contains("4 of 4 requests failed"), "{reason}");
        // Where there is a warm-up it ends there, in one line.
        let text = refused(&["--url", &address, "--isl", "4"], 1).await;
        assert!(
            text.starts_with("error: a warm-up request failed: "),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

#[tokio::test]
async fn a_run_that_means_nothing_has_an_exit_code_of_its_own() {
    let address = canned("200 OK", format!("{TOKEN}{TOKEN}{USAGE}{DONE}")).await;
    let run = async |line: &str| {
        let line = format!("{line} --url {address}");
        let (status, report, _) = bench(&words(&line)).await;
        let reason = report["verdict"]["reason"]
            .as_str()
            .expect("a reason")
            .to_owned();
        (status.code(), reason)
    };
    // Two tokens each, as asked for.
    let (code, reason) = run("--num-prompts 4 --isl 4 --osl 2 --accept saturated").await;
    assert_eq!(code, Some(0), "{reason}");
    let (code, reason) = run("--num-prompts 4 --isl 4 --osl 3 --accept saturated").await;
    assert_eq!(code, Some(80));
    assert!(reason.contains("not as long as asked for"), "{reason}");
    let (code, reason) = run("--num-prompts 4 --isl 5 --osl 2 --accept saturated").await;
    assert_eq!(code, Some(80));
    assert!(
        reason.contains("counts the prompts of 4 requests otherwise"),
        "{reason}"
    );
    let (code, reason) = run("--num-prompts 4 --isl 4 --osl 2 --warmup 0 --accept saturated").await;
    assert_eq!(code, Some(80));
    assert!(reason.contains("0 warm-up requests"), "{reason}");
    let (code, reason) =
        run("--num-prompts 4 --concurrency 3 --isl 4 --osl 2 --accept saturated").await;
    assert_eq!(code, Some(80));
    assert!(reason.contains("never steady"), "{reason}");
    let (code, reason) =
        run("--num-prompts 4 --isl 4 --osl 3 --accept saturated,length --ignore-eos true").await;
    assert_eq!(code, Some(0));
    assert!(reason.contains("accepted: length"), "{reason}");
    let (code, reason) =
        run("--num-prompts 4 --isl 4 --osl 3 --accept saturated --ignore-eos false").await;
    assert_eq!(code, Some(0), "{reason}");
}

#[tokio::test]
async fn what_cannot_be_measured_is_said_in_one_line() {
    let text = refused(&["--url", "http://127.0.0.1:9"], 1).await;
    assert!(
        text.contains("no server answers at http://127.0.0.1:9"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1, "{text}");
    let text = refused(&["--url", "http://127.0.0.1:9", "--wait", "1"], 75).await;
    assert!(text.contains("/health is not 200 after 1s"), "{text}");
    let address = canned("404 Not Found", "nothing here".to_owned()).await;
    let text = refused(&["--url", &format!("{address}/elsewhere")], 1).await;
    assert!(text.contains("names no model (status 404)"), "{text}");
    let text = refused(&["--url", "https://127.0.0.1:9"], 1).await;
    assert!(text.contains("is not an http:// URL"), "{text}");
    for (flags, reason) in [
        ("", "--url"),
        ("--url h:1 --tp_size 2", "go with --offline"),
        ("--url h:1 --isl 0", "a number of tokens, or MIN-MAX"),
        ("--url h:1 --isl 9-3", "a number of tokens, or MIN-MAX"),
        ("--url h:1 --range-ratio 1", "from 0 to below 1"),
        ("--url h:1 --request-rate 0", "more than 0, or inf"),
        (
            "--url h:1 --goodput itl:5",
            "expected ttft:MS, tpot:MS or e2el:MS",
        ),
        ("--url h:1 --accept nothing", "invalid value 'nothing'"),
        ("--url h:1 --save-requests", "--json"),
        (
            "--url h:1 --extra-body {\"stream\":false}",
            "`stream`, which the benchmark sets",
        ),
        (
            "--url h:1 --dataset /nonexistent.json",
            "cannot read /nonexistent.json",
        ),
        (
            "--url h:1 --top-p 0",
            "expected a number above 0, at most 1",
        ),
        (
            "--url h:1 --top-p 0.5 --extra-body {\"top_p\":0.9}",
            "`top_p`, which a flag of its own says",
        ),
        ("--url h:1 --preset standard --isl 4", "cannot be used with"),
        ("--offline m --prompt-format text", "takes token ids"),
        ("--offline m --url h:1", "cannot be used with"),
    ] {
        let text = refused(&words(flags), 64).await;
        assert!(text.contains(reason), "{flags}: {text}");
    }
    let text = refused(&["-c", "/nonexistent.yaml"], 65).await;
    assert!(text.contains("/nonexistent.yaml"), "{text}");
    let text = refused(&["--offline", "/nonexistent"], 69).await;
    assert!(
        text.starts_with("error: /nonexistent: no such model"),
        "{text}"
    );
    let model = baton_tests::tiny_model("llama");
    let long = [
        "--offline",
        &model,
        "--max-seq-len",
        "64",
        "--device",
        "cpu",
    ];
    let text = refused(&[&long[..], &["--isl", "64"]].concat(), 1).await;
    assert!(text.contains("the prompt has 64 tokens"), "{text}");
}

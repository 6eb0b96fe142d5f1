//! `baton bench kv` and `baton doctor`, between real processes over a real wire.

use std::process::ExitStatus;
use std::time::Duration;

use baton_tests::process::{Baton, eventually};
use serde_json::Value;

const QUICK: &[&str] = &["--tokens", "64", "--repeat", "2", "--transport", "tcp"];

/// Runs it with `--json`; the report is all that stdout holds.
async fn bench(arguments: &[&str], environment: &[(&str, &str)]) -> (ExitStatus, Value) {
    let arguments = [&["bench", "kv", "--json"], arguments].concat();
    let (status, stdout, stderr) = Baton::run(&arguments, environment).await;
    let report = serde_json::from_str(&stdout)
        .unwrap_or_else(|error| panic!("{error} in:\n{stdout}\n{stderr}"));
    (status, report)
}

/// Runs a command that must fail before anything is moved; returns its error text.
async fn refused(arguments: &[&str], code: i32) -> String {
    refused_with(arguments, &[], code).await
}

async fn refused_with(arguments: &[&str], variables: &[(&str, &str)], code: i32) -> String {
    let arguments = [&["bench", "kv"], arguments].concat();
    let (status, stdout, stderr) = Baton::run(&arguments, variables).await;
    assert_eq!(status.code(), Some(code), "{stderr}");
    assert_eq!(stdout, "");
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

#[tokio::test]
async fn the_kv_of_512_tokens_goes_over_tcp_and_every_byte_is_compared() {
    let (status, report) = bench(
        &["--tokens", "512", "--repeat", "3", "--transport", "tcp"],
        &[],
    )
    .await;
    assert_eq!(status.code(), Some(0), "{report:#}");
    assert_eq!(report["verdict"]["pass"], true);
    assert_eq!(report["shape"]["name"], "llama-3.1-8b");
    let results = report["results"].as_array().expect("results");
    assert_eq!(results.len(), 1);
    let case = &results[0];
    assert_eq!(case["transport"], "tcp");
    assert_eq!(case["status"], "PASS");
    assert_eq!(case["detail"], Value::Null);
    assert_eq!(
        (&case["pieces"], &case["piece_bytes"]),
        (&16.into(), &(4 << 20).into())
    );
    // One round to warm up and three on the clock, of 64 MiB.
    assert_eq!(case["bytes_expected"], 4_u64 * (64 << 20));
    assert_eq!(case["bytes_verified"], case["bytes_expected"]);
    let figure = |name: &str| case["figures"][name].as_f64().expect("a number");
    assert!(figure("median_ms") > 0.0 && figure("p99_ms") >= figure("median_ms"));
    assert!(figure("gb_per_s") > 0.0);
    assert_eq!(case["figures"]["samples"], 3);
    let wire = case["wire"].as_str().expect("a wire");
    assert!(
        wire.starts_with("tcp to 127.0.0.1:") && wire.ends_with("over lo"),
        "{wire}"
    );
    let references = report["references"].as_array().expect("references");
    assert!(
        references
            .iter()
            .any(|r| r["name"] == "memcpy" && r["threads"] == 1)
    );
    assert!(
        references
            .iter()
            .all(|r| r["gb_per_s"].as_f64() > Some(0.0))
    );
}

#[tokio::test]
async fn lists_are_crossed_and_pieces_scattered() {
    let lists = [
        "--tokens",
        "32,33",
        "--tokens-per-block",
        "16,32",
        "--concurrency",
        "1,3",
    ];
    let small = [
        "--shape",
        "smollm2-135m",
        "--repeat",
        "1",
        "--transport",
        "tcp,tcp",
    ];
    let (status, report) = bench(&[lists, small].concat(), &[]).await;
    assert_eq!(status.code(), Some(0), "{report:#}");
    let results = report["results"].as_array().expect("results");
    assert_eq!(results.len(), 8);
    let last = &results[7];
    assert_eq!(
        (&last["tokens"], &last["pieces"], &last["concurrency"]),
        (&33.into(), &2.into(), &3.into())
    );
    assert_eq!(last["figures"]["samples"], 3);
    let pieces = [
        "--tokens",
        "64",
        "--piece-bytes",
        "65536",
        "--concurrency",
        "2",
        "--repeat",
        "1",
        "--transport",
        "tcp",
    ];
    let (status, report) = bench(&pieces, &[]).await;
    assert_eq!(status.code(), Some(0), "{report:#}");
    let case = &report["results"][0];
    assert_eq!(
        (&case["pieces"], &case["piece_bytes"]),
        (&128.into(), &65536.into())
    );
    assert_eq!(case["tokens_per_block"], Value::Null);
}

#[tokio::test]
async fn the_table_is_for_people() {
    let (status, stdout, stderr) = Baton::run(&[&["bench", "kv"], QUICK].concat(), &[]).await;
    assert_eq!(status.code(), Some(0), "{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(lines[0].starts_with("transport"), "{stdout}");
    assert!(
        lines[1].starts_with("tcp") && lines[1].contains("PASS"),
        "{stdout}"
    );
    assert!(
        lines
            .last()
            .expect("lines")
            .starts_with("valid: 1 cases passed"),
        "{stdout}"
    );
}

#[tokio::test]
async fn a_spoilt_wire_is_told_and_ends_with_a_failure() {
    for (fault, expected) in [
        ("flip_byte=5000000", "MISMATCH"),
        ("cut_after_bytes=5000000", "TRANSFER_ERROR"),
    ] {
        let environment = [("BATON_TEST_TRANSPORT_FAULT", fault)];
        let (status, report) = bench(QUICK, &environment).await;
        assert_eq!(status.code(), Some(1), "{report:#}");
        let case = &report["results"][0];
        assert_eq!(case["status"], expected, "{report:#}");
        assert!(case["detail"].as_str().is_some_and(|text| !text.is_empty()));
        assert_eq!(case["figures"], Value::Null);
        assert_eq!(case["bytes_verified"], 0);
        assert_eq!(report["verdict"]["pass"], false);
    }
}

#[tokio::test]
async fn slower_than_the_floor_has_an_exit_code_of_its_own() {
    let (status, report) = bench(&[QUICK, &["--floor", "1000000"]].concat(), &[]).await;
    assert_eq!(status.code(), Some(79), "{report:#}");
    assert_eq!(report["results"][0]["status"], "PASS");
    assert_eq!(report["verdict"]["pass"], false);
    let reason = report["verdict"]["reason"].as_str().expect("a reason");
    assert!(reason.contains("floor of 1000000 GB/s"), "{reason}");
}

#[tokio::test]
async fn what_cannot_be_measured_is_said_before_anything_is_moved() {
    let text = refused(&["--shape", "lama-3.1-8b"], 64).await;
    assert!(text.contains("did you mean `llama-3.1-8b`?"), "{text}");
    // No MPI world is around this test.
    let text = refused(&["--transport", "mpi"], 69).await;
    assert!(text.contains("transport mpi cannot be used here"), "{text}");
    // Whether there is a GPU or not, this process may see none.
    let none = [("CUDA_VISIBLE_DEVICES", "")];
    let text = refused_with(&["--device", "cuda", "--transport", "tcp"], &none, 69).await;
    assert!(text.contains("kv in gpu memory"), "{text}");
    let text = refused(&["--transport", "cuda_ipc"], 69).await;
    assert!(
        text.contains("transport cuda_ipc cannot be used here"),
        "{text}"
    );
    let text = refused(&["--tokens", "100000000"], 69).await;
    assert!(text.contains("hint: fewer --tokens"), "{text}");
    let text = refused(&["--piece-bytes", "3"], 64).await;
    assert!(text.contains("a piece of 3 bytes"), "{text}");
}

#[tokio::test]
async fn two_processes_meet_at_an_address() {
    let mut listening = Baton::start(&["bench", "kv", "--listen", "127.0.0.1:0"], &[]);
    let address = listening.address().await;
    let (status, report) = bench(&[QUICK, &["--peer", &address]].concat(), &[]).await;
    assert_eq!(status.code(), Some(0), "{report:#}");
    assert!(listening.ended(Duration::from_secs(20)).await.success());
}

#[tokio::test]
async fn a_peer_that_goes_is_told_at_once() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
    let address = listener.local_addr().expect("an address").to_string();
    let closing = std::thread::spawn(move || drop(listener.accept()));
    let text = refused(&["--transport", "tcp", "--peer", &address], 1).await;
    assert!(text.contains(&format!("{address} has gone")), "{text}");
    closing.join().expect("the listener's thread");
}

#[tokio::test]
async fn the_holding_side_ends_with_the_fetching_one() {
    let mut listening = Baton::start(&["bench", "kv", "--listen", "127.0.0.1:0"], &[]);
    let address = listening.address().await;
    drop(std::net::TcpStream::connect(&address).expect("it listens"));
    let status = listening.ended(Duration::from_secs(20)).await;
    assert_eq!(status.code(), Some(1), "{}", listening.log());
    eventually("its last words", Duration::from_secs(5), async || {
        listening
            .log()
            .contains("has gone while it was to ask")
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_doctor_looks_at_everything_and_measures_the_wires() {
    let (status, stdout, stderr) = Baton::run(&["doctor", "--json"], &[]).await;
    assert_eq!(status.code(), Some(0), "{stdout}\n{stderr}");
    let found: Value = serde_json::from_str(&stdout).expect("JSON");
    let findings = found["findings"].as_array().expect("findings");
    for name in [
        "processor",
        "memory",
        "rank",
        "open files",
        "cuda driver",
        "pmix",
        "mpi plug-in",
        "tcp",
        "ucx",
        "nixl",
    ] {
        let finding = findings.iter().find(|finding| finding["name"] == name);
        let finding = finding.unwrap_or_else(|| panic!("no {name} in {found:#}"));
        let good = finding["level"] == "good";
        assert_eq!(finding["lost"].is_null(), good, "{finding:#}");
    }
    let choice = found["default_transport"]["name"]
        .as_str()
        .expect("a transport");
    let chosen = findings.iter().find(|finding| finding["name"] == choice);
    assert_eq!(
        chosen.map(|finding| &finding["level"]),
        Some(&Value::from("good"))
    );
    let wires = found["wire"]["results"].as_array().expect("wires");
    assert!(wires.iter().any(|wire| wire["transport"] == "tcp"));
    assert!(
        wires.iter().all(|wire| wire["status"] == "PASS"),
        "{found:#}"
    );
}

#[tokio::test]
async fn the_doctor_has_a_floor_and_can_keep_still() {
    let (status, stdout, _) = Baton::run(&["doctor", "--wire-floor", "1000000"], &[]).await;
    assert_eq!(status.code(), Some(79), "{stdout}");
    assert!(stdout.contains("not ok: "), "{stdout}");
    let (status, stdout, _) = Baton::run(&["doctor", "--no-wire"], &[]).await;
    assert_eq!(status.code(), Some(0), "{stdout}");
    assert!(
        stdout.contains("kv goes over ") && !stdout.contains("median ms"),
        "{stdout}"
    );
    assert!(
        stdout.ends_with("ok: what is needed to serve is there\n"),
        "{stdout}"
    );
}

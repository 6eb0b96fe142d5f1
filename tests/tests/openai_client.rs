//! A real client, the `openai` Python package, through the proxy.

use std::process::Stdio;
use std::time::Duration;

use baton_tests::deployment::{Deployment, Options};

#[tokio::test]
async fn the_openai_package_is_served() {
    let python = std::env::var("BATON_TEST_PYTHON").unwrap_or_else(|_| {
        let cache = std::env::var("XDG_CACHE_HOME")
            .unwrap_or_else(|_| format!("{}/.cache", std::env::var("HOME").expect("HOME is set")));
        format!("{cache}/baton/python/bin/python")
    });
    assert!(
        std::path::Path::new(&python).exists(),
        "{python} is not there; run the tests with scripts/test"
    );
    let model = baton_tests::model();
    let engine = "dtype: float32\nmax_seq_len: 1024\nkv_cache_config:\n  max_tokens: 8192\n";
    let deployment = Deployment::start(&Options::new(&model, engine)).await;
    let script = baton_tests::root().join("tests/python/openai_client.py");
    let golden = baton_tests::root().join("tests/golden/smollm2.json");
    let mut command = tokio::process::Command::new(python);
    command
        .arg(script)
        .arg(format!("http://{}/v1", deployment.address))
        .arg(golden)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(180), command.output());
    let output = output
        .await
        .expect("the client ends within 180 s")
        .expect("Python starts");
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}");
    assert!(text.contains("all checks passed"), "{text}");
}

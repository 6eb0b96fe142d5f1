//! Harness of the end-to-end tests: real `baton` processes, a small HTTP client, the golden data.
//!
//! Every process started here ends with its handle, whatever the test's outcome; every wait has a deadline and
//! names what it waits for. Nothing here is skipped when a part is missing: the failure says how to get it.

pub mod client;
pub mod cluster;
pub mod deployment;
pub mod golden;
pub mod launch;
pub mod process;

use std::path::PathBuf;

/// The repository's root.
///
/// # Panics
/// When this crate has been moved out of the workspace.
#[must_use]
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the workspace")
        .to_path_buf()
}

/// The binary under test: `$BATON_TEST_BINARY`, else the one beside this test's own executable.
///
/// # Panics
/// When it has not been built.
#[must_use]
pub fn binary() -> PathBuf {
    let path = std::env::var_os("BATON_TEST_BINARY").map_or_else(
        || {
            let own = std::env::current_exe().expect("a running test has an executable");
            own.ancestors()
                .nth(2)
                .expect("it lies in target/PROFILE/deps")
                .join("baton")
        },
        PathBuf::from,
    );
    assert!(
        path.exists(),
        "{} is not there; run the tests with scripts/test",
        path.display()
    );
    path
}

/// The small real model: `$BATON_TEST_GGUF`, else the cache that `scripts/fetch-model` fills.
///
/// # Panics
/// When it has not been fetched.
#[must_use]
pub fn model() -> String {
    let path = std::env::var_os("BATON_TEST_GGUF").map_or_else(
        || {
            let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(
                || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"),
                PathBuf::from,
            );
            cache.join("baton/models/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        PathBuf::from,
    );
    assert!(
        path.exists(),
        "{} is not there; run the tests with scripts/test",
        path.display()
    );
    path.to_string_lossy().into_owned()
}

/// One of the small Hugging Face directories under tests/golden.
#[must_use]
pub fn tiny_model(family: &str) -> String {
    root()
        .join("tests/golden")
        .join(format!("tiny-{family}"))
        .to_string_lossy()
        .into_owned()
}

//! Tests of the `disagg_cluster` section.

use super::*;
use crate::yaml::Document;

fn outcome(text: &str) -> Result<ClusterConfig, String> {
    let document = Document::parse("cluster.yaml", text).expect("valid YAML");
    let mut findings = Findings::new(&document);
    let config = read(document.root(), "disagg_cluster", &mut findings);
    findings.finish().map_err(|errors| errors.to_string())?;
    Ok(config.expect("a section without mistakes resolves"))
}

#[test]
fn both_spellings_of_the_silence_are_accepted() {
    for key in ["inactive_timeout_sec", "inactive_interval_sec"] {
        let config = outcome(&format!(
            "cluster_uri: http://localhost:8000\ncluster_name: c\n\
             minimal_instances: {{context_servers: 2, generation_servers: 3}}\n\
             heartbeat_interval_sec: 1\n{key}: 4\n"
        ));
        let expected = ClusterConfig {
            store: Endpoint {
                host: "localhost".to_owned(),
                port: 8000,
            },
            name: "c".to_owned(),
            context_servers_min: 2,
            generation_servers_min: 3,
            heartbeat_interval: Duration::from_secs(1),
            inactive_timeout: Duration::from_secs(4),
        };
        assert_eq!(config, Ok(expected));
    }
    let both =
        outcome("cluster_uri: http://a:1\ninactive_timeout_sec: 20\ninactive_interval_sec: 20\n");
    assert!(
        both.expect_err("refused")
            .contains("says the same as `inactive_timeout_sec`")
    );
}

#[test]
fn nulls_keep_defaults() {
    let config =
        outcome("cluster_uri: http://[::1]:2379/\ncluster_name: null\nminimal_instances:\n");
    let config = config.expect("good");
    assert_eq!(config.name, "");
    assert_eq!(
        (config.context_servers_min, config.generation_servers_min),
        (1, 1)
    );
    assert_eq!(config.heartbeat_interval, Duration::from_secs(5));
    assert_eq!(config.inactive_timeout, Duration::from_secs(10));
    assert_eq!(config.store.to_string(), "[::1]:2379");
    assert_eq!(config.key_prefix(), "/trtllm-disagg//workers/");
}

#[test]
fn mistakes_are_named() {
    for uri in [
        "redis://a:1",
        "localhost:8000",
        "http://",
        "etcd://a:1,b:2",
        "http://a",
    ] {
        let message = outcome(&format!("cluster_uri: {uri}")).expect_err("refused");
        assert!(message.contains("expected `http://host:port`"), "{message}");
    }
    let missing = outcome("cluster_name: x").expect_err("refused");
    assert!(
        missing.contains("disagg_cluster.cluster_uri: missing"),
        "{missing}"
    );
    let order =
        outcome("cluster_uri: http://a:1\nheartbeat_interval_sec: 10\n").expect_err("refused");
    assert!(order.contains("every worker would be dropped"), "{order}");
}

#[test]
fn other_stores_are_refused_by_name() {
    for (uri, what) in [
        ("etcd://a:2379,etcd://b:2380", "etcd as the list of workers"),
        ("https://a:8000", "an encrypted connection"),
    ] {
        let message = outcome(&format!("cluster_uri: {uri}")).expect_err("refused");
        assert!(
            message.contains("is not served by this version"),
            "{message}"
        );
        assert!(message.contains(what), "{message}");
        assert!(message.contains("hint: "), "{message}");
    }
}

#[test]
fn a_token_follows_from_its_secret_alone() {
    let token = store_token("abc");
    assert_eq!(token.len(), 64);
    assert_eq!(token, store_token(" abc\n"));
    assert_ne!(token, store_token("abd"));
    assert!(!token.contains("abc"));
}

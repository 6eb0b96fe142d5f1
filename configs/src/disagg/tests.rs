//! Tests of `disagg_config.yaml`: COMPAT.md §4.3's expectations, inheritance, refusals.

use super::*;
use crate::llm::LlmOptions;
use crate::transceiver::{PreferredTransport, TransportChoice};

fn document(text: &str) -> Document {
    Document::parse("disagg.yaml", text).expect("valid YAML")
}

fn resolved(text: &str) -> DisaggDocument {
    let (resolved, warnings) =
        resolve(&document(text), 7).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(warnings, []);
    resolved
}

fn errors(text: &str) -> String {
    resolve(&document(text), 7)
        .expect_err("refused")
        .to_string()
}

fn endpoint(host: &str, port: u16) -> Endpoint {
    Endpoint {
        host: host.to_owned(),
        port,
    }
}

#[test]
fn addresses_and_ranks_follow_the_sections() {
    let config = resolved(
        "context_servers:\n  num_instances: 2\n  tensor_parallel_size: 2\n  pipeline_parallel_size: 1\n  \
         urls: [host1:8001, host2:8002]\ngeneration_servers:\n  urls: ['[::1]:8003']\n",
    );
    assert_eq!(
        config.context.endpoints,
        [endpoint("host1", 8001), endpoint("host2", 8002)]
    );
    assert_eq!(config.context.instance_ranks(), 2);
    assert_eq!(config.generation.endpoints, [endpoint("::1", 8003)]);
    assert_eq!(config.generation.num_instances, 1);
    assert_eq!(
        config.proxy.context_servers.router,
        RouterConfig::RoundRobin
    );
    assert_eq!(config.proxy.node_id, 7);
    assert_eq!(config.world_ranks(), 5);
}

#[test]
fn a_world_counts_each_address_once() {
    let one = "context_servers: {tensor_parallel_size: 2, urls: [host1:8001]}\n\
               generation_servers: {urls: [host2:8002]}\n";
    assert_eq!(resolved(one).world_ranks(), 3);
    let mixed = "context_servers: {urls: [host1:8001]}\n\
                 generation_servers: {num_instances: 2, urls: [host1:8001, host2:8002]}\n";
    assert_eq!(resolved(mixed).world_ranks(), 2);
}

#[test]
fn without_sections_there_is_one_instance_of_each() {
    let config = resolved("port: 9000");
    assert_eq!(
        (
            config.context.num_instances,
            config.generation.num_instances
        ),
        (1, 1)
    );
    assert_eq!(config.context.endpoints, []);
    assert_eq!(config.context.options, LlmOptions::default());
    assert_eq!(config.proxy.port, 9000);
    assert_eq!(config.proxy.hostname, "localhost");
    assert_eq!(config.proxy.keep_alive, Duration::from_secs(10));
}

#[test]
fn addresses_must_be_host_and_port() {
    let text = "\
context_servers:
  urls:
    - http://localhost:8001
    - \"::1:8001\"
    - localhost
    - localhost:0
    - localhost:99999
    - localhost:+80
    - 8001
    - host/path:80
    - localhost:8001/
generation_servers:
  num_instances: 2
  urls: [a:1]
";
    assert_eq!(
        errors(text),
        "\
disagg.yaml:3:7: context_servers.urls[0]: found text \"http://localhost:8001\", expected `host:port`, with a port from 1 to 65535
  hint: write it without the scheme: \"localhost:8001\"
disagg.yaml:4:7: context_servers.urls[1]: found text \"::1:8001\", expected `host:port`, with a port from 1 to 65535
  hint: put an IPv6 address in brackets: \"[::1]:8001\"
disagg.yaml:5:7: context_servers.urls[2]: found text \"localhost\", expected `host:port`, with a port from 1 to 65535
disagg.yaml:6:7: context_servers.urls[3]: found text \"localhost:0\", expected `host:port`, with a port from 1 to 65535
disagg.yaml:7:7: context_servers.urls[4]: found text \"localhost:99999\", expected `host:port`, with a port from 1 to 65535
disagg.yaml:8:7: context_servers.urls[5]: found text \"localhost:+80\", expected `host:port`, with a port from 1 to 65535
disagg.yaml:9:7: context_servers.urls[6]: found 8001, expected `host:port`, with a port from 1 to 65535
disagg.yaml:10:7: context_servers.urls[7]: found text \"host/path:80\", expected `host:port`, with a port from 1 to 65535
disagg.yaml:11:7: context_servers.urls[8]: found text \"localhost:8001/\", expected `host:port`, with a port from 1 to 65535
  hint: write it without the slash: \"localhost:8001\"
disagg.yaml:14:9: generation_servers.urls: 1 addresses for `num_instances: 2`"
    );
}

#[test]
fn an_address_may_be_in_a_file_that_lies_beside_the_config() {
    let parsed = |text: &str| {
        let document = Document::parse("/etc/baton/d.yaml", text).expect("valid YAML");
        let (resolved, _) = resolve(&document, 7).unwrap_or_else(|error| panic!("{error}"));
        resolved
    };
    let config = parsed(
        "context_servers: {urls: ['file:run/ctx0', 'file:/run/ctx1', 'file:///run/ctx2']}\n\
         generation_servers: {urls: ['a:1', 'file:/run/ctx1'], num_instances: 2}\n",
    );
    let shown = |group: &ServerGroup| -> Vec<String> {
        group.servers.iter().map(ToString::to_string).collect()
    };
    assert_eq!(
        shown(&config.proxy.context_servers),
        [
            "file:/etc/baton/run/ctx0",
            "file:/run/ctx1",
            "file:/run/ctx2"
        ]
    );
    assert_eq!(
        shown(&config.proxy.generation_servers),
        ["a:1", "file:/run/ctx1"]
    );
    assert_eq!(
        (config.context.num_instances, config.context.endpoints.len()),
        (3, 0)
    );
    assert_eq!(config.world_ranks(), 4, "one instance serves both roles");
    assert!(errors("context_servers: {urls: ['file:']}").contains("the path of a file"));
    assert!(
        errors("context_servers: {urls: [file:x, file:x]}").contains("duplicated address file:x")
    );
}

#[test]
fn with_discovery_the_proxy_needs_no_addresses() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("d.yaml");
    let text =
        "hostname: 0.0.0.0\ndisagg_cluster: {cluster_uri: 'http://node1:8000', cluster_name: c}\n";
    std::fs::write(&path, text).expect("written");
    let (config, warnings) = load(&path).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(warnings, []);
    assert_eq!(
        config.cluster.expect("one").key_prefix(),
        "/trtllm-disagg/c/workers/"
    );
}

#[test]
fn a_store_that_workers_would_not_reach_is_warned_of() {
    let text = "port: 8001\ndisagg_cluster:\n  cluster_uri: http://node1:8000\n";
    let (_, warnings) = resolve(&document(text), 0).expect("good");
    let texts: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "disagg.yaml:3:16: disagg_cluster.cluster_uri: is at node1:8000, but the proxy listens on localhost only: \
             servers on other machines cannot register; set `hostname: 0.0.0.0`",
            "disagg.yaml:3:16: disagg_cluster.cluster_uri: is at port 8000, but the proxy listens on port 8001",
        ]
    );
    let same = "hostname: 127.0.0.1\ndisagg_cluster: {cluster_uri: 'http://LOCALHOST:8000'}\n";
    assert_eq!(resolve(&document(same), 0).expect("good").1, []);
}

#[test]
fn an_address_stands_once_in_a_section() {
    assert_eq!(
        errors("context_servers:\n  urls: [a:1, b:1, a:1]\n"),
        "disagg.yaml:2:20: context_servers.urls[2]: duplicated address a:1"
    );
    assert!(errors("context_servers: {urls: []}").contains("expected at least one `host:port`"));
}

#[test]
fn a_shared_address_has_the_same_options_on_both_sides() {
    let text = "context_servers: {urls: [a:1], max_batch_size: 1}\n\
                generation_servers: {urls: [a:1], max_batch_size: 2}\n";
    assert_eq!(
        errors(text),
        "disagg.yaml:2:29: generation_servers.urls[0]: a:1 is in both sections, which give it different engine options"
    );
}

#[test]
fn other_top_level_keys_are_inherited() {
    let config = resolved(
        "model: m\nbackend: pytorch\nmax_batch_size: 4\nfree_gpu_memory_fraction: 0.5\n\
         context_servers: {max_batch_size: 4, cache_transceiver_config: {backend: ucx}}\n",
    );
    assert_eq!(config.proxy.model.as_deref(), Some("m"));
    for group in [&config.context, &config.generation] {
        assert_eq!(group.options.model.as_deref(), Some("m"));
        assert_eq!(group.options.max_batch_size, 4);
        assert!((group.options.kv_cache.free_memory_fraction - 0.5).abs() < 1e-9);
    }
    assert_eq!(
        config.context.options.transceiver.expect("one").backend,
        TransportChoice::Preferred(PreferredTransport::Ucx)
    );
    assert_eq!(config.generation.options.transceiver, None);
}

#[test]
fn inherited_keys_that_differ_name_key_and_section() {
    assert_eq!(
        errors("max_batch_size: 4\ngeneration_servers:\n  max_batch_size: 8\n"),
        "disagg.yaml:3:19: generation_servers.max_batch_size: key `max_batch_size` of section \
         `generation_servers` is 8, but the top level has 4 on line 1"
    );
}

#[test]
fn a_wrong_inherited_value_is_reported_once_where_it_stands() {
    assert_eq!(
        errors("max_batch_size: 0\nmax_retires: 2\ncontext_servers: {url: [a:1]}\n"),
        "\
disagg.yaml:1:17: max_batch_size: found 0, expected a whole number from 1
disagg.yaml:2:1: max_retires: unknown key `max_retires`
  hint: did you mean `max_retries`?
disagg.yaml:3:19: context_servers.url: unknown key `url`
  hint: did you mean `urls`?"
    );
}

#[test]
fn metrics_are_switched_on_in_both_sections() {
    let config =
        resolved("return_perf_metrics: true\ncontext_servers: {return_perf_metrics: false}\n");
    assert!(config.context.options.return_perf_metrics);
    assert!(config.generation.options.return_perf_metrics);
}

#[test]
fn allow_request_chat_template_is_a_strict_boolean() {
    for value in ["'false'", "'true'", "0", "1", "null", "None"] {
        let message = errors(&format!("allow_request_chat_template: {value}\n"));
        assert!(
            message.contains("expected true or false"),
            "{value}: {message}"
        );
    }
    assert!(
        resolved("allow_request_chat_template: true")
            .proxy
            .allow_request_chat_template
    );
}

#[test]
fn node_ids_fit_their_field() {
    assert_eq!(resolved("node_id: 255").proxy.node_id, 255);
    for value in ["256", "-1", "1.5"] {
        assert!(errors(&format!("node_id: {value}")).contains("a whole number from 0 to 255"));
    }
}

#[test]
fn the_default_node_id_is_the_last_byte_of_an_address() {
    assert_eq!(last_byte("02:42:ac:11:00:fe"), Some(0xfe));
    assert_eq!(last_byte("00:00:00:00:00:00"), None);
    assert_eq!(last_byte(""), None);
    assert_eq!(default_node_id(), default_node_id());
}

#[test]
fn routers_that_are_not_served_are_refused_by_name() {
    for name in [
        "load_balancing",
        "kv_cache_aware",
        "conversation",
        "KV_Cache_Aware",
    ] {
        let message = errors(&format!(
            "generation_servers:\n  router: {{type: {name}}}\n"
        ));
        let lower = name.to_lowercase();
        assert_eq!(
            message,
            format!(
                "disagg.yaml:2:11: generation_servers.router.type: `{lower}` is not served by this version: \
                 routers other than `round_robin`"
            )
        );
    }
    assert_eq!(
        errors("context_servers:\n  router: {type: roundrobin}\n"),
        "disagg.yaml:2:18: context_servers.router.type: found text \"roundrobin\", expected one of \
         `round_robin`, `load_balancing`, `kv_cache_aware`, `conversation`\n  hint: did you mean `round_robin`?"
    );
    assert!(
        errors("context_servers: {router: round_robin}").contains("expected a mapping, `router`")
    );
}

#[test]
fn router_arguments_come_from_the_block_and_the_section() {
    let text = "max_batch_size: 1\nkv_cache_config: {tokens_per_block: 64}\nrouter: {type: load_balancing, use_tokens: false}\n";
    let document = document(text);
    let router_node = document.root().entry("router").map(|entry| &entry.node);
    let mut findings = Findings::new(&document);
    let wish = router::read(router_node, "router", document.root(), &mut findings).expect("known");
    assert_eq!(findings.finish(), Ok(Vec::new()));
    assert_eq!(wish.kind, router::RouterType::LoadBalancing);
    let shown: Vec<String> = wish
        .arguments
        .iter()
        .map(|(key, value)| format!("{key}={}", value.shown()))
        .collect();
    assert_eq!(
        shown,
        [
            "max_batch_size=1",
            "tokens_per_block=64",
            "use_tokens=false"
        ]
    );
    assert!(
        errors("context_servers: {router: {type: kv_cache_aware, tokens_per_blok: 1}}")
            .contains("did you mean `tokens_per_block`?")
    );
}

#[test]
fn features_that_are_not_served_are_refused_by_name() {
    for (text, what) in [
        (
            "schedule_style: generation_first",
            "asking both servers at once",
        ),
        (
            "conditional_disagg_config: {max_local_prefill_length: 10}",
            "skipping the context server",
        ),
        ("otlp_config: {otlp_traces_endpoint: x}", "exporting traces"),
        ("gen_strip_message_history: true", "leaving messages out"),
        ("gen_tokids_ctxbytes: true", "token ids as bytes"),
        ("disagg_coordinator_url: http://x", "a coordinator"),
        ("perf_metrics_output_dir: /tmp", "writing request timings"),
        (
            "disagg_cluster: {cluster_uri: 'etcd://localhost:8000'}",
            "etcd as the list of workers",
        ),
    ] {
        let message = errors(text);
        assert!(
            message.contains("is not served by this version"),
            "{message}"
        );
        assert!(message.contains(what), "{message}");
        assert!(
            message.contains(text.split(':').next().expect("a key")),
            "{message}"
        );
    }
    let harmless = "schedule_style: Context_First\nconditional_disagg_config: null\notlp_config:\n\
                    gen_strip_message_history: false\ngen_tokids_ctxbytes: false\nnum_workers: 1\n";
    assert_eq!(resolved(harmless).proxy.port, 8000);
    assert!(errors("schedule_style: contextfirst").contains("did you mean `context_first`?"));
}

#[test]
fn more_workers_are_accepted_with_a_note() {
    let (_, warnings) = resolve(&document("num_workers: 8"), 0).expect("good");
    let texts: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        ["disagg.yaml:1:14: num_workers: 8 changes nothing: one process serves on every core"]
    );
}

#[test]
fn the_proxy_needs_addresses() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("d.yaml");
    std::fs::write(
        &path,
        "context_servers: {urls: [a:1]}\ngeneration_servers:\n  num_instances: 1\n",
    )
    .expect("written");
    let message = load(&path).expect_err("refused").to_string();
    assert_eq!(
        message,
        format!(
            "{}:2:1: generation_servers.urls: missing, expected a list of `host:port`",
            path.display()
        )
    );
    let missing = load(&directory.path().join("none.yaml"))
        .expect_err("refused")
        .to_string();
    assert!(missing.contains("none.yaml: cannot be read: "), "{missing}");
}

#[test]
fn rendered_text_resolves_to_the_same() {
    let config = DisaggConfig {
        hostname: "0.0.0.0".to_owned(),
        port: 0,
        model: Some("dir/a \"b\" # c".to_owned()),
        context_servers: ServerGroup {
            servers: vec![
                endpoint("localhost", 1).into(),
                ServerAddress::File("/run/a b/ctx.addr".into()),
            ],
            router: RouterConfig::RoundRobin,
        },
        generation_servers: ServerGroup::default(),
        cluster: Some(ClusterConfig {
            store: endpoint("::1", 8000),
            name: "a: b".to_owned(),
            context_servers_min: 2,
            generation_servers_min: 0,
            heartbeat_interval: Duration::from_millis(1500),
            inactive_timeout: Duration::from_secs(7),
        }),
        max_retries: 3,
        perf_metrics_max_requests: 9,
        node_id: 200,
        allow_request_chat_template: true,
        keep_alive: Duration::from_millis(1500),
    };
    let text = to_yaml(&config);
    assert_eq!(resolved(&text).proxy, config, "{text}");
}

#[test]
fn defaults_in_the_table_are_those_of_the_type() {
    let rows = RawDisagg::TABLE.rows().filter(|row| row.name != "node_id");
    let text: String = rows
        .map(|row| format!("{}: {}\n", row.name, row.default))
        .collect();
    assert_eq!(
        resolved(&text).proxy,
        DisaggConfig {
            node_id: 7,
            ..DisaggConfig::default()
        }
    );
}

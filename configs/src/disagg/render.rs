//! A proxy's configuration as the text of a `disagg_config.yaml`, for the proxy that `baton up` starts.

use std::fmt::Write as _;

use crate::cluster;
use crate::disagg::{DisaggConfig, ServerGroup};
use crate::yaml::{number_text, quoted};

/// The configuration as YAML that resolves to the same; the same configuration gives the same text.
#[must_use]
pub fn to_yaml(config: &DisaggConfig) -> String {
    let mut out = String::from("# Written by baton.\n");
    let model = config.model.as_deref().map_or("null".to_owned(), quoted);
    let lines = [
        ("hostname", quoted(&config.hostname)),
        ("port", config.port.to_string()),
        ("model", model),
        ("max_retries", config.max_retries.to_string()),
        (
            "perf_metrics_max_requests",
            config.perf_metrics_max_requests.to_string(),
        ),
        ("node_id", config.node_id.to_string()),
        (
            "allow_request_chat_template",
            config.allow_request_chat_template.to_string(),
        ),
        (
            "server_keep_alive_timeout",
            number_text(config.keep_alive.as_secs_f64()),
        ),
    ];
    for (key, value) in lines {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{key}: {value}");
    }
    render_group(&mut out, "context_servers", &config.context_servers);
    render_group(&mut out, "generation_servers", &config.generation_servers);
    cluster::render(&mut out, config.cluster.as_ref());
    out
}

fn render_group(out: &mut String, name: &str, group: &ServerGroup) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{name}:");
    if !group.servers.is_empty() {
        let _ = writeln!(out, "  num_instances: {}\n  urls:", group.servers.len());
        for server in &group.servers {
            let _ = writeln!(out, "    - {}", quoted(&server.to_string()));
        }
    }
    let _ = writeln!(out, "  router: {{type: {}}}", group.router.name());
}

//! A layout as the files that its processes read on a cluster.
//!
//! No host name and no address of this machine gets into them: the hosts are known inside the allocation only.

use std::fmt::Write as _;

use crate::cluster;
use crate::layout::job::JobLayout;
use crate::layout::{Layout, RoleLayout};
use crate::llm;
use crate::yaml::{number_text, quoted};

/// How the proxy and the instances of a rendered file find each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addresses<'a> {
    /// The launcher knows: the file says no more than the ports, one an instance, contexts first; or nothing.
    OfTheStep(&'a [u16]),
    /// Each instance has a file that holds its address, contexts first.
    Files(&'a [String]),
}

impl Layout {
    /// The text of a `disagg_config.yaml` with the engine options of both roles: all that a launcher of ranks needs.
    #[must_use]
    pub fn world_yaml(&self, job: &JobLayout, addresses: Addresses<'_>) -> String {
        let shared = self.shared_model();
        let mut out = String::from("# Written by baton.\n");
        self.write_proxy(&mut out, job, shared);
        let split = self.context.instances as usize;
        let groups = [
            ("context_servers", &self.context, 0..split),
            (
                "generation_servers",
                &self.generation,
                split..split + self.generation.instances as usize,
            ),
        ];
        for (name, role, range) in groups {
            let urls: Vec<String> = match addresses {
                Addresses::OfTheStep([]) => Vec::new(),
                Addresses::OfTheStep(ports) => range
                    .map(|index| format!("localhost:{}", ports[index]))
                    .collect(),
                Addresses::Files(files) => range
                    .map(|index| format!("file:{}", files[index]))
                    .collect(),
            };
            line(&mut out, &format!("{name}:"));
            line(&mut out, &format!("  num_instances: {}", role.instances));
            line(&mut out, "  router: {type: round_robin}");
            write_urls(&mut out, &urls);
            write_engine(&mut out, role, shared.is_some());
        }
        out
    }

    /// The text of a `disagg_config.yaml` for the proxy alone.
    #[must_use]
    pub fn proxy_yaml(&self, job: &JobLayout, files: &[String]) -> String {
        let mut out = String::from("# Written by baton.\n");
        self.write_proxy(&mut out, job, self.shared_model());
        if job.discovery.is_some() {
            cluster::render(&mut out, job.discovery.as_ref());
            return out;
        }
        let (context, generation) = files.split_at(self.context.instances as usize);
        for (name, files) in [
            ("context_servers", context),
            ("generation_servers", generation),
        ] {
            let urls: Vec<String> = files.iter().map(|file| format!("file:{file}")).collect();
            line(&mut out, &format!("{name}:"));
            line(&mut out, &format!("  num_instances: {}", urls.len()));
            line(&mut out, "  router: {type: round_robin}");
            write_urls(&mut out, &urls);
        }
        out
    }

    /// The model of both roles, if it is one.
    fn shared_model(&self) -> Option<&str> {
        let model = |role: &RoleLayout| role.options.model.clone();
        let same = model(&self.context) == model(&self.generation);
        let own = self.context.options.model.as_deref();
        own.filter(|_| same)
    }

    fn write_proxy(&self, out: &mut String, job: &JobLayout, model: Option<&str>) {
        let config = &self.proxy.config;
        line(out, &format!("hostname: {}", quoted(&job.proxy_hostname)));
        line(out, &format!("port: {}", job.proxy_port));
        if let Some(model) = model {
            line(out, &format!("model: {}", quoted(model)));
        }
        line(out, &format!("max_retries: {}", config.max_retries));
        line(
            out,
            &format!(
                "perf_metrics_max_requests: {}",
                config.perf_metrics_max_requests
            ),
        );
        if let Some(node_id) = job.proxy_node_id {
            line(out, &format!("node_id: {node_id}"));
        }
        line(
            out,
            &format!(
                "allow_request_chat_template: {}",
                config.allow_request_chat_template
            ),
        );
        let keep_alive = number_text(config.keep_alive.as_secs_f64());
        line(out, &format!("server_keep_alive_timeout: {keep_alive}"));
    }
}

fn line(out: &mut String, text: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{text}");
}

fn write_urls(out: &mut String, urls: &[String]) {
    if urls.is_empty() {
        return;
    }
    line(out, "  urls:");
    for url in urls {
        line(out, &format!("    - {}", quoted(url)));
    }
}

/// The engine options, two columns further in; a model that the top level names is not named again.
fn write_engine(out: &mut String, role: &RoleLayout, has_shared_model: bool) {
    for text in llm::to_yaml(&role.options).lines() {
        let repeated = text.starts_with('#') || (has_shared_model && text.starts_with("model:"));
        if !repeated {
            line(out, &format!("  {text}"));
        }
    }
}

//! Between configuration files and what the commands need: what a deployment consists of, what its children are told.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use baton_configs::disagg::{self, Endpoint};
use baton_configs::error::Warning;
use baton_configs::layout::inspect::{Fault, inspect};
use baton_configs::layout::job::Fabric;
use baton_configs::layout::{self, Layout, RoleLayout};
use baton_configs::llm;
use baton_configs::small_file::write_whole;

use crate::cli::UpArgs;
use crate::exit::{Outcome, WithOutcome};

/// One instance as `baton up` starts it.
#[derive(Debug, Clone)]
pub(crate) struct InstancePlan {
    /// `ctx0`, `gen0`.
    pub(crate) label: String,
    /// `CONTEXT` or `GENERATION`, as `--server-role` takes it.
    pub(crate) role: &'static str,
    /// Model argument.
    pub(crate) model: String,
    /// Bind address.
    pub(crate) host: String,
    /// Bind port; 0 lets the kernel choose.
    pub(crate) port: u16,
    /// Added to the inherited environment.
    pub(crate) environment: Vec<(String, String)>,
    /// Text of its options file.
    pub(crate) config_text: String,
}

impl InstancePlan {
    /// Where its options file goes; instances of a role share it.
    pub(crate) fn config_path(&self, folder: &Path) -> PathBuf {
        folder.join(if self.role == "CONTEXT" {
            "ctx_config.yaml"
        } else {
            "gen_config.yaml"
        })
    }
}

/// A whole deployment on this machine.
#[derive(Debug)]
pub(crate) struct Deployment {
    layout: Layout,
    instances: Vec<InstancePlan>,
}

impl Deployment {
    fn new(layout: Layout) -> Self {
        let mut instances = role_plans(&layout.model, &layout.context, "ctx", "CONTEXT");
        instances.extend(role_plans(
            &layout.model,
            &layout.generation,
            "gen",
            "GENERATION",
        ));
        Self { layout, instances }
    }

    /// The instances, context servers first.
    pub(crate) fn instances(&self) -> &[InstancePlan] {
        &self.instances
    }

    /// Where logs go, if the file says so.
    pub(crate) fn log_dir(&self) -> Option<&Path> {
        self.layout.log_dir.as_deref()
    }

    /// How long the proxy may wait for the servers and for one call.
    pub(crate) fn proxy_timeouts_s(&self) -> (u64, u64) {
        (
            self.layout.proxy.server_start_timeout.as_secs(),
            self.layout.proxy.request_timeout.as_secs(),
        )
    }

    /// Added to the proxy's inherited environment.
    pub(crate) fn proxy_environment(&self) -> Vec<(String, String)> {
        self.layout.proxy.environment.clone().into_iter().collect()
    }

    /// A process's place among all, for its colour.
    pub(crate) fn index_of(&self, label: &str) -> usize {
        self.instances
            .iter()
            .position(|instance| instance.label == label)
            .unwrap_or(self.instances.len())
    }

    /// Text of the proxy's file for instances at these addresses, in the order of [`Deployment::instances`].
    pub(crate) fn proxy_config(&self, addresses: &[String]) -> anyhow::Result<String> {
        self.proxy_text(addresses, None)
    }

    /// The same with the address that the proxy is bound to, so that the file serves clients and restarts too.
    pub(crate) fn proxy_config_at(
        &self,
        addresses: &[String],
        proxy: &str,
    ) -> anyhow::Result<String> {
        self.proxy_text(addresses, Some(endpoint(proxy)?))
    }

    fn proxy_text(&self, addresses: &[String], proxy: Option<Endpoint>) -> anyhow::Result<String> {
        let mut endpoints = addresses
            .iter()
            .map(|address| endpoint(address))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let generation = endpoints.split_off(
            self.instances
                .iter()
                .filter(|instance| instance.role == "CONTEXT")
                .count(),
        );
        let mut config = self.layout.disagg_config(endpoints, generation);
        if let Some(bound) = proxy {
            config.port = bound.port;
        }
        config
            .model
            .get_or_insert_with(|| self.layout.model.clone());
        Ok(disagg::to_yaml(&config))
    }
}

fn role_plans(
    model: &str,
    role: &RoleLayout,
    short: &str,
    name: &'static str,
) -> Vec<InstancePlan> {
    let environment = |role: &RoleLayout| {
        role.environment
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    };
    (0..role.instances as usize)
        .map(|index| {
            let fixed = role.endpoints.get(index);
            InstancePlan {
                label: format!("{short}{index}"),
                role: name,
                model: model.to_owned(),
                host: fixed
                    .map_or_else(|| "127.0.0.1".to_owned(), |endpoint| endpoint.host.clone()),
                port: fixed.map_or(0, |endpoint| endpoint.port),
                environment: environment(role),
                config_text: llm::to_yaml(&role.options),
            }
        })
        .collect()
}

/// `host:port`, an IPv6 host in brackets.
pub(crate) fn endpoint(address: &str) -> anyhow::Result<Endpoint> {
    let (host, port) = address
        .rsplit_once(':')
        .ok_or_else(|| anyhow!("`{address}` is not host:port"))?;
    let port = port
        .parse()
        .map_err(|_| anyhow!("`{address}` has no port"))?;
    Ok(Endpoint {
        host: host.trim_matches(['[', ']']).to_owned(),
        port,
    })
}

/// What `baton up` shall run.
pub(crate) fn deployment(args: &UpArgs) -> anyhow::Result<Deployment> {
    let (mut layout, warnings) = match (&args.config, &args.model) {
        (Some(path), model) => {
            let document = baton_configs::yaml::Document::read(path).outcome(Outcome::Config)?;
            let inspection = inspect(&document, model.as_deref());
            let faults = inspection.layout().map(beyond_one_machine);
            inspection
                .finish(faults.unwrap_or_default())
                .outcome(Outcome::Config)?
        }
        (None, Some(model)) => layout::quickstart(model).outcome(Outcome::Config)?,
        (None, None) => {
            return Err(anyhow!(
                "no model was given\nhint: baton up --model MODEL, or baton up -c FILE"
            ))
            .outcome(Outcome::Usage);
        }
    };
    warn(&warnings);
    if !layout.job_keys.is_empty() {
        tracing::warn!(
            keys = layout.job_keys.join(", "),
            "these keys are for clusters and have no effect on one machine; `baton slurm` uses them"
        );
    }
    if let Some(port) = args.port {
        layout.proxy.config.port = port;
    }
    Ok(Deployment::new(layout))
}

/// What of a layout cannot work where this program starts the processes itself.
fn beyond_one_machine(layout: &Layout) -> Vec<Fault> {
    let fabric = layout.job.as_ref().map(|job| job.fabric);
    let needs_mpi = fabric == Some(Fabric::Mpi);
    let what = "mpi needs processes that srun or mpirun started; `baton up` starts them itself";
    let hint = "remove `fabric`, or use `baton slurm submit`";
    needs_mpi
        .then(|| Fault::new("fabric", what.to_owned(), hint))
        .into_iter()
        .collect()
}

/// Logs what a file's writer should know, once each.
pub(crate) fn warn(warnings: &[Warning]) {
    for warning in warnings {
        tracing::warn!("{warning}");
    }
}

/// Where the sample client finds a deployment, and the model that its file names.
pub(crate) fn client_target(path: &Path) -> anyhow::Result<(String, Option<String>)> {
    let (config, _) = disagg::load(path).outcome(Outcome::Config)?;
    let host = if config.hostname == "0.0.0.0" {
        "127.0.0.1".to_owned()
    } else {
        config.hostname
    };
    Ok((
        format!(
            "http://{}",
            Endpoint {
                host,
                port: config.port
            }
        ),
        config.model,
    ))
}

/// Writes a file that another process reads: whole or not at all.
pub(crate) fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    write_whole(path, text)
        .with_context(|| format!("cannot write {}", path.display()))
        .outcome(Outcome::Unavailable)
}

/// What a child's exit code means for the supervisor's own.
pub(crate) fn outcome_of_code(code: i32) -> Outcome {
    let known = [
        Outcome::Usage,
        Outcome::Config,
        Outcome::Unavailable,
        Outcome::Address,
        Outcome::TimedOut,
    ];
    let known: BTreeMap<i32, Outcome> = known
        .into_iter()
        .map(|outcome| (i32::from(outcome.code()), outcome))
        .collect();
    known.get(&code).copied().unwrap_or(Outcome::Failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quickstart_layout_becomes_three_instances_and_a_proxy() {
        let (layout, _) = layout::quickstart("m.gguf").unwrap();
        let plan = Deployment::new(layout);
        let labels: Vec<&str> = plan
            .instances()
            .iter()
            .map(|instance| instance.label.as_str())
            .collect();
        assert_eq!(labels, ["ctx0", "ctx1", "gen0"]);
        let addresses = ["127.0.0.1:5001", "127.0.0.1:5002", "[::1]:5003"].map(str::to_owned);
        let text = plan.proxy_config_at(&addresses, "127.0.0.1:7000").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disagg_config.yaml");
        write(&path, &text).unwrap();
        let (config, _) = disagg::load(&path).unwrap();
        assert_eq!(config.port, 7000);
        assert_eq!(config.context_servers.servers.len(), 2);
        assert_eq!(
            config.generation_servers.servers[0].to_string(),
            "[::1]:5003"
        );
        assert_eq!(config.model.as_deref(), Some("m.gguf"));
    }

    #[test]
    fn a_childs_code_becomes_ours() {
        assert_eq!(outcome_of_code(69), Outcome::Unavailable);
        assert_eq!(outcome_of_code(101), Outcome::Failure);
    }
}

//! `disagg_config.yaml`: what the proxy is told (COMPAT.md §4).

use std::time::Duration;

/// A worker's `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// Host name or address, without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// How a role's server is chosen (COMPAT.md §9).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum RouterConfig {
    /// Next in turn.
    #[default]
    RoundRobin,
}

/// One role's servers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerGroup {
    /// Static addresses, one an instance.
    pub servers: Vec<Endpoint>,
    /// How one of them is chosen.
    pub router: RouterConfig,
}

/// `disagg_config.yaml`, resolved for the proxy.
#[derive(Debug, Clone, PartialEq)]
pub struct DisaggConfig {
    /// Bind address.
    pub hostname: String,
    /// Bind port; 0 lets the kernel choose.
    pub port: u16,
    /// Model name, for the sample client; the proxy does not use it.
    pub model: Option<String>,
    /// Context servers.
    pub context_servers: ServerGroup,
    /// Generation servers.
    pub generation_servers: ServerGroup,
    /// Retries of an upstream call, each on another server.
    pub max_retries: u32,
    /// Size of the per-request metrics ring; 0 keeps nothing.
    pub perf_metrics_max_requests: u32,
    /// Node id inside `disagg_request_id`, 0 to 255 (COMPAT.md §8.4).
    pub node_id: u8,
    /// Whether a request may bring its own chat template.
    pub allow_request_chat_template: bool,
    /// How long idle client connections are kept.
    pub keep_alive: Duration,
}

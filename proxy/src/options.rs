//! What the proxy is told when it starts, besides `disagg_config.yaml`: deadlines, bounds and environment.
//!
//! Plain values with documented defaults; reading files and flags is the caller's business.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use baton_configs::cluster::JOB_SECRET_VARIABLE;
use baton_configs::disagg::DisaggConfig;

use crate::store::StoreToken;

/// How long the proxy waits for what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    /// For all static workers to answer `/health` with 200 after the start (`--server_start_timeout`).
    pub server_start: Duration,
    /// For one upstream call from connecting to its last byte (`--request_timeout`).
    pub request: Duration,
    /// For a TCP connection to a worker.
    pub connect: Duration,
    /// Between two chunks of a stream; never longer than [`Timeouts::request`].
    pub stream_idle: Duration,
    /// For a client to send its whole body.
    pub client_body: Duration,
    /// For a client to take bytes that are ready for it.
    pub client_write: Duration,
    /// For an answer to a `/health`, `/v1/models` or `/perf_metrics` call.
    pub probe: Duration,
    /// Between two health checks of a worker that is up.
    pub health_interval: Duration,
    /// For requests in flight when the proxy is asked to stop.
    pub drain: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            server_start: Duration::from_secs(180),
            request: Duration::from_secs(180),
            connect: Duration::from_secs(5),
            stream_idle: Duration::from_secs(60),
            client_body: Duration::from_secs(60),
            client_write: Duration::from_secs(60),
            probe: Duration::from_secs(5),
            health_interval: Duration::from_secs(3),
            drain: Duration::from_secs(30),
        }
    }
}

/// How much the proxy holds at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Client connections; further ones are told 503 and closed.
    pub max_connections: usize,
    /// Requests with work in progress upstream.
    pub max_active: usize,
    /// Requests that wait for one of those places; further ones are told 503.
    pub max_queued: usize,
    /// Bytes of a request's body; longer ones are told 413.
    pub max_body_bytes: usize,
    /// Bytes of a worker's answer that has to be held whole (all but streams).
    pub max_answer_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 8192,
            max_active: 2048,
            max_queued: 4096,
            max_body_bytes: 32 << 20,
            max_answer_bytes: 256 << 20,
        }
    }
}

/// The environment variables that the proxy honours (COMPAT.md §8.3, §8.4).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Environment {
    /// `TRTLLM_DISAGG_NO_RETRY=1`: every failure is final.
    pub no_retry: bool,
    /// `BATON_NO_KV_PREFETCH=1`: KV moves when its prompt is read to the end, not before.
    pub no_kv_prefetch: bool,
    /// `TRTLLM_DISAGG_WORKER_PROCESS_ID`, 0 to 63: part of every `disagg_request_id`.
    pub process_id: u8,
    /// What `BATON_JOB_SECRET` makes callers of the store show; without that variable the store takes every caller.
    pub store_token: Option<StoreToken>,
}

impl Environment {
    /// Reads the variables of this process.
    ///
    /// # Errors
    /// One line that names the variable and its value when the value cannot be used.
    pub fn from_process() -> Result<Self, String> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// Reads the variables through `lookup`.
    ///
    /// # Errors
    /// As [`Environment::from_process`].
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        const PROCESS_ID: &str = "TRTLLM_DISAGG_WORKER_PROCESS_ID";
        let process_id = match lookup(PROCESS_ID) {
            None => 0,
            Some(text) => text
                .trim()
                .parse::<u8>()
                .ok()
                .filter(|id| *id < 64)
                .ok_or_else(|| format!("{PROCESS_ID} is {text:?}, expected 0 to 63"))?,
        };
        Ok(Self {
            no_retry: lookup("TRTLLM_DISAGG_NO_RETRY").as_deref() == Some("1"),
            no_kv_prefetch: lookup("BATON_NO_KV_PREFETCH").as_deref() == Some("1"),
            process_id,
            store_token: lookup(JOB_SECRET_VARIABLE)
                .filter(|secret| !secret.trim().is_empty())
                .map(|secret| StoreToken::of_secret(&secret)),
        })
    }
}

/// Everything that [`crate::run`] needs.
#[derive(Debug, Clone)]
pub struct ProxyOptions {
    /// `disagg_config.yaml`, resolved.
    pub config: DisaggConfig,
    /// Deadlines.
    pub timeouts: Timeouts,
    /// Bounds.
    pub limits: Limits,
    /// Environment variables.
    pub environment: Environment,
    /// File that gets `host:port` once the socket is bound (`--report_addr`), written atomically.
    pub report_addr: Option<PathBuf>,
    /// This machine's address for others, where the config binds all of its addresses; else the loopback's.
    pub advertise: Option<IpAddr>,
    /// How often a summary of the metrics is logged (`--metrics-log-interval`); `None` never.
    pub metrics_log_interval: Option<Duration>,
}

impl ProxyOptions {
    /// Options with every default for `config`.
    #[must_use]
    pub fn new(config: DisaggConfig) -> Self {
        Self {
            config,
            timeouts: Timeouts::default(),
            limits: Limits::default(),
            environment: Environment::default(),
            report_addr: None,
            advertise: None,
            metrics_log_interval: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_is_read_and_checked() {
        let of = |pairs: &'static [(&str, &str)]| {
            Environment::from_lookup(|name| {
                pairs
                    .iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| (*value).to_owned())
            })
        };
        assert_eq!(of(&[]), Ok(Environment::default()));
        let both = of(&[
            ("TRTLLM_DISAGG_NO_RETRY", "1"),
            ("BATON_NO_KV_PREFETCH", "1"),
            ("TRTLLM_DISAGG_WORKER_PROCESS_ID", "63"),
        ]);
        assert_eq!(
            both,
            Ok(Environment {
                no_retry: true,
                no_kv_prefetch: true,
                process_id: 63,
                store_token: None,
            })
        );
        // Booleans are true for the exact string 1 alone (COMPAT.md §12.3).
        assert_eq!(
            of(&[("TRTLLM_DISAGG_NO_RETRY", "true")]),
            Ok(Environment::default())
        );
        let guarded = of(&[("BATON_JOB_SECRET", "5ec4e7")]).unwrap();
        assert!(guarded.store_token.is_some());
        assert!(!format!("{guarded:?}").contains("5ec4e7"));
        assert_eq!(of(&[("BATON_JOB_SECRET", " ")]), Ok(Environment::default()));
        let error = of(&[("TRTLLM_DISAGG_WORKER_PROCESS_ID", "64")]).unwrap_err();
        assert!(error.contains("\"64\""), "{error}");
    }
}

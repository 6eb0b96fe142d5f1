//! Context servers, a generation server and the proxy, each a process of its own that a test can hurt.

use std::time::Duration;

use serde_json::Value;

use crate::client;
use crate::process::{Baton, eventually};

/// One `baton serve`, ready to answer.
#[derive(Debug)]
pub struct Worker {
    /// The process.
    pub process: Baton,
    /// Its host:port.
    pub address: String,
}

impl Worker {
    /// Starts a worker without waiting for it. `options` is the text of its options file.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn launch(model: &str, options: &str, environment: &[(&str, &str)]) -> Baton {
        let arguments = [
            "serve",
            model,
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--config",
            "@/options.yaml",
        ];
        Baton::start_with(&[("options.yaml", options)], &arguments, environment)
    }

    /// Starts a worker and waits until it can answer.
    ///
    /// # Panics
    /// When it does not become ready.
    pub async fn start(model: &str, options: &str) -> Self {
        let mut process = Self::launch(model, options, &[]);
        let address = process.ready().await;
        Self { process, address }
    }

    /// Its current state as `/metrics` tells.
    ///
    /// # Panics
    /// When it does not answer.
    pub async fn state(&self) -> Value {
        let answer = client::get(&self.address, "/metrics")
            .await
            .expect("/metrics answers");
        answer
            .json()
            .as_array()
            .and_then(|list| list.last().cloned())
            .unwrap_or_default()
    }

    /// A counter or gauge as `/prometheus/metrics` tells.
    ///
    /// # Panics
    /// When it is not told.
    pub async fn counter(&self, name: &str) -> u64 {
        let answer = client::get(&self.address, "/prometheus/metrics").await;
        let text = answer.expect("metrics").body;
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let value = line.unwrap_or_else(|| panic!("no {name} in:\n{text}"));
        value.trim().parse().expect("a whole number")
    }

    /// Waits until no block is used, leased, lent or quarantined.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub async fn blocks_return(&self, limit: Duration) {
        let mut last = String::new();
        let name = format!("every block of {} to come back", self.address);
        let all_back = eventually(&name, limit, async || {
            let answer = client::get(&self.address, "/prometheus/metrics")
                .await
                .ok()?
                .body;
            let used: Vec<&str> = held_blocks(&answer);
            last = used.join("; ");
            used.is_empty().then_some(())
        });
        if tokio::time::timeout(limit, all_back).await.is_err() {
            panic!("{name}: still held after {limit:?}: {last}");
        }
    }
}

/// Gauges of held blocks that are not zero.
fn held_blocks(metrics: &str) -> Vec<&str> {
    const HELD: [&str; 5] = [
        "baton_kv_blocks_used ",
        "baton_kv_blocks_pinned ",
        "baton_kv_blocks_lent ",
        "baton_kv_blocks_quarantined ",
        "baton_kv_leases ",
    ];
    let held: Vec<&str> = metrics
        .lines()
        .filter(|line| HELD.iter().any(|name| line.starts_with(name)))
        .collect();
    assert_eq!(
        held.len(),
        HELD.len(),
        "the block gauges are not all there:\n{metrics}"
    );
    held.into_iter()
        .filter(|line| !line.ends_with(" 0"))
        .collect()
}

/// A whole deployment. Fields are public so that a test can kill, stop or restart any of them.
#[derive(Debug)]
pub struct Deployment {
    /// Context servers.
    pub context: Vec<Worker>,
    /// The generation server.
    pub generation: Worker,
    /// The proxy's process.
    pub proxy: Baton,
    /// The proxy's host:port.
    pub address: String,
    config: String,
}

/// What differs from test to test.
#[derive(Debug, Clone)]
pub struct Options<'a> {
    /// Model path.
    pub model: &'a str,
    /// Number of context servers.
    pub context_count: usize,
    /// Options file of every worker; `cache_transceiver_config` is added when it names none.
    pub engine: &'a str,
    /// Options file of the generation server, where it has another.
    pub generation_engine: Option<&'a str>,
    /// Further lines of disagg_config.yaml.
    pub proxy: &'a str,
    /// Arguments of `baton disaggregated`.
    pub proxy_arguments: &'a [&'a str],
    /// Environment of the context servers.
    pub context_environment: &'a [(&'a str, &'a str)],
}

impl<'a> Options<'a> {
    /// Two context servers of `model` with `engine` options.
    #[must_use]
    pub const fn new(model: &'a str, engine: &'a str) -> Self {
        Self {
            model,
            context_count: 2,
            engine,
            generation_engine: None,
            proxy: "",
            proxy_arguments: &[],
            context_environment: &[],
        }
    }
}

impl Deployment {
    /// Starts everything and waits until the proxy is ready.
    ///
    /// # Panics
    /// When a part does not become ready.
    pub async fn start(options: &Options<'_>) -> Self {
        let launch = |engine: &str, environment| {
            Worker::launch(options.model, &with_transceiver(engine), environment)
        };
        let mut context: Vec<Baton> = (0..options.context_count)
            .map(|_| launch(options.engine, options.context_environment))
            .collect();
        let generation = options.generation_engine.unwrap_or(options.engine);
        let mut generation = launch(generation, &[]);
        let mut ready = Vec::new();
        for mut process in context.drain(..) {
            let address = process.ready().await;
            ready.push(Worker { process, address });
        }
        let address = generation.ready().await;
        let generation = Worker {
            process: generation,
            address,
        };
        let config = config_text(&ready, &generation, options.proxy);
        let mut proxy = start_proxy(&config, options.proxy_arguments);
        let address = proxy.ready().await;
        Self {
            context: ready,
            generation,
            proxy,
            address,
            config,
        }
    }

    /// Starts the proxy again after it was killed; its port may change.
    ///
    /// # Panics
    /// When it does not become ready.
    pub async fn restart_proxy(&mut self) {
        self.proxy = start_proxy(&self.config, &[]);
        self.address = self.proxy.ready().await;
    }

    /// Waits until every block of every worker is back.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub async fn blocks_return(&self, limit: Duration) {
        for worker in self.context.iter().chain([&self.generation]) {
            worker.blocks_return(limit).await;
        }
    }
}

fn with_transceiver(engine: &str) -> String {
    if engine.contains("cache_transceiver_config") {
        engine.to_owned()
    } else {
        format!("{engine}\ncache_transceiver_config:\n  backend: DEFAULT\n")
    }
}

fn start_proxy(config: &str, further: &[&str]) -> Baton {
    let mut arguments = vec!["disaggregated", "-c", "@/disagg_config.yaml"];
    arguments.extend(further);
    Baton::start_with(&[("disagg_config.yaml", config)], &arguments, &[])
}

fn config_text(context: &[Worker], generation: &Worker, further: &str) -> String {
    let urls: String = context
        .iter()
        .map(|worker| format!("    - \"{}\"\n", worker.address))
        .collect();
    format!(
        "hostname: 127.0.0.1\nport: 0\n{further}\ncontext_servers:\n  num_instances: {}\n  urls:\n{urls}\
         generation_servers:\n  num_instances: 1\n  urls:\n    - \"{}\"\n",
        context.len(),
        generation.address
    )
}

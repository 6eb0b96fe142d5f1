//! A proxy in this process, on a port of the kernel's choice.

use std::net::SocketAddr;
use std::time::Duration;

use baton_configs::disagg::{DisaggConfig, Endpoint, ServerGroup};
use baton_proxy::{ProxyError, ProxyOptions, run};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::client::Whole;
use crate::client::{DEADLINE, eventually, get, post};
use crate::mock::{Mock, Script, Seen};

/// A running proxy.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ProxyError>>,
    _dir: tempfile::TempDir,
}

pub(crate) fn group(addresses: &[SocketAddr]) -> ServerGroup {
    ServerGroup {
        servers: addresses
            .iter()
            .map(|address| {
                let host = address.ip().to_string();
                let port = address.port();
                Endpoint { host, port }.into()
            })
            .collect(),
        ..ServerGroup::default()
    }
}

pub(crate) fn options(context: &[SocketAddr], generation: &[SocketAddr]) -> ProxyOptions {
    let mut options = ProxyOptions::new(DisaggConfig {
        hostname: "127.0.0.1".to_owned(),
        port: 0,
        model: None,
        context_servers: group(context),
        generation_servers: group(generation),
        cluster: None,
        max_retries: 1,
        perf_metrics_max_requests: 0,
        node_id: 1,
        allow_request_chat_template: false,
        keep_alive: Duration::from_secs(10),
    });
    options.timeouts.health_interval = Duration::from_millis(50);
    options.timeouts.drain = Duration::from_secs(5);
    options
}

impl Running {
    /// Starts a proxy and waits until it listens.
    pub(crate) async fn listening(mut options: ProxyOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("address");
        options.report_addr = Some(file.clone());
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(run(options, async {
            let _ = stopped.await;
        }));
        let mut address = None;
        eventually("the proxy reports its address", async || {
            address = std::fs::read_to_string(&file)
                .ok()
                .map(|text| text.parse().unwrap());
            address.is_some()
        })
        .await;
        Self {
            address: address.unwrap(),
            stop: Some(stop),
            task,
            _dir: dir,
        }
    }

    /// Starts a proxy and waits until it is ready.
    pub(crate) async fn ready(options: ProxyOptions) -> Self {
        let running = Self::listening(options).await;
        running.wait_health(200).await;
        running
    }

    pub(crate) async fn wait_health(&self, status: u16) {
        eventually(&format!("health is {status}"), async || {
            get(self.address, "/health").await.status == status
        })
        .await;
    }

    pub(crate) async fn complete(&self, body: Value) -> Whole {
        post(self.address, "/v1/completions", body.to_string()).await
    }

    /// The value of one line of the metrics.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let text = get(self.address, "/prometheus/metrics").await.text();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .parse()
            .unwrap()
    }

    /// Asks the proxy to stop.
    pub(crate) fn ask_to_stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    /// Waits for the proxy's end.
    pub(crate) async fn ended(mut self) -> Result<(), ProxyError> {
        timeout(DEADLINE, &mut self.task).await.unwrap().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One context server, one generation server and a proxy that is ready.
pub(crate) struct Trio {
    pub(crate) context: Mock,
    pub(crate) generation: Mock,
    pub(crate) proxy: Running,
}

pub(crate) async fn trio(
    context: impl Fn(&Seen) -> Script + Send + Sync + 'static,
    generation: impl Fn(&Seen) -> Script + Send + Sync + 'static,
) -> Trio {
    trio_with(context, generation, |_| ()).await
}

pub(crate) async fn trio_with(
    context: impl Fn(&Seen) -> Script + Send + Sync + 'static,
    generation: impl Fn(&Seen) -> Script + Send + Sync + 'static,
    adjust: impl FnOnce(&mut ProxyOptions),
) -> Trio {
    let context = Mock::start(context).await;
    let generation = Mock::start(generation).await;
    let mut options = options(&[context.address], &[generation.address]);
    adjust(&mut options);
    let proxy = Running::ready(options).await;
    Trio {
        context,
        generation,
        proxy,
    }
}

pub(crate) fn prompt() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 2})
}

pub(crate) fn streamed() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 2, "stream": true})
}

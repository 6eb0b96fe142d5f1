//! Registers this server with the proxy's store of workers, says that it lives, and takes its name out when it ends
//! (COMPAT.md §6.3).
//!
//! It registers when it can answer, never before, and never under an address that others cannot reach: a wildcard
//! becomes the address from which the proxy is reached. A proxy that is away is waited for; one that has forgotten
//! everything is told anew.

mod client;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use baton_configs::cluster::{ClusterConfig, JOB_SECRET_VARIABLE, store_token};
use hyper::Method;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use self::client::{CallError, Route, StoreClient, escaped};
use crate::secret::nonce;

/// Between two attempts while the proxy does not answer, at most.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// The same at first.
const RETRY_MIN: Duration = Duration::from_millis(500);
/// How long taking the name out may keep a drain waiting.
const FAREWELL: Duration = Duration::from_secs(2);

/// As what a server registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerRole {
    /// It reads prompts.
    Context,
    /// It writes answers.
    Generation,
}

impl WorkerRole {
    fn name(self) -> &'static str {
        match self {
            Self::Context => "CONTEXT",
            Self::Generation => "GENERATION",
        }
    }

    /// Its number in a registration.
    fn number(self) -> u8 {
        match self {
            Self::Context => 0,
            Self::Generation => 1,
        }
    }
}

/// Why a server cannot register.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistrationError {
    /// It has no role.
    #[error(
        "registering at {store} needs a role\nhint: add --server_role CONTEXT or --server_role GENERATION"
    )]
    NoRole {
        /// `host:port`.
        store: String,
    },
}

/// Where, as what and with which address this server registers.
#[derive(Debug)]
pub(crate) struct RegistrationPlan {
    cluster: ClusterConfig,
    role: WorkerRole,
    address: SocketAddr,
    client: StoreClient,
}

impl RegistrationPlan {
    /// What can be known before anything is loaded. `None` without a cluster.
    pub(crate) fn new(
        cluster: Option<&ClusterConfig>,
        role: Option<WorkerRole>,
        address: SocketAddr,
    ) -> Result<Option<Self>, RegistrationError> {
        let Some(cluster) = cluster else {
            return Ok(None);
        };
        let role = role.ok_or_else(|| RegistrationError::NoRole {
            store: cluster.store.to_string(),
        })?;
        let secret = std::env::var(JOB_SECRET_VARIABLE).ok();
        let token = secret
            .filter(|secret| !secret.trim().is_empty())
            .map(|secret| store_token(&secret));
        Ok(Some(Self {
            cluster: cluster.clone(),
            role,
            address,
            client: StoreClient::new(cluster.store.clone(), token),
        }))
    }
}

/// A server's name in the store, kept alive by a task until [`Registration::end`].
#[derive(Debug)]
pub(crate) struct Registration {
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Registration {
    /// Begins to register. Without a plan it does nothing.
    pub(crate) fn start(plan: Option<RegistrationPlan>) -> Self {
        let running = plan.map(|plan| {
            let (stop, stopped) = oneshot::channel();
            (stop, tokio::spawn(Keeper::new(plan).run(stopped)))
        });
        Self { running }
    }

    /// Takes the name out, so that nobody sends anything here any more. Bounded.
    pub(crate) async fn end(self) {
        let Some((stop, mut task)) = self.running else {
            return;
        };
        // A task that has ended by itself has said why.
        let _ = stop.send(());
        if timeout(FAREWELL + Duration::from_secs(1), &mut task)
            .await
            .is_err()
        {
            task.abort();
        }
    }
}

/// What the proxy knows of this server, as far as this server knows.
#[derive(Debug)]
struct Keeper {
    plan: RegistrationPlan,
    /// Key and value, once an address is known.
    entry: Option<(String, String)>,
    is_registered: bool,
    /// What was last said about a failure, so that it is said once.
    complaint: Option<String>,
}

impl Keeper {
    fn new(plan: RegistrationPlan) -> Self {
        Self {
            plan,
            entry: None,
            is_registered: false,
            complaint: None,
        }
    }

    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        let mut retry = RETRY_MIN;
        loop {
            let turn = async {
                let pause = match self.turn().await {
                    Ok(()) => {
                        retry = RETRY_MIN;
                        self.plan.cluster.heartbeat_interval
                    }
                    Err(reason) => {
                        self.complain(&reason);
                        let pause = retry.min(self.plan.cluster.heartbeat_interval);
                        retry = (retry * 2).min(RETRY_MAX);
                        pause
                    }
                };
                sleep(pause).await;
            };
            tokio::select! {
                // Told to stop, or nobody is left to tell.
                _ = &mut stopped => break,
                () = turn => {}
            }
        }
        self.leave().await;
    }

    /// One heartbeat, or one attempt to register.
    async fn turn(&mut self) -> Result<(), CallError> {
        if self.is_registered {
            if self.beat().await? {
                self.complaint = None;
                return Ok(());
            }
            self.is_registered = false;
            tracing::warn!(store = %self.plan.cluster.store, "the proxy has forgotten this server; registering again");
        }
        self.register().await
    }

    async fn beat(&self) -> Result<bool, CallError> {
        let Some((key, _)) = &self.entry else {
            return Ok(false);
        };
        let ttl = ttl(self.plan.cluster.inactive_timeout);
        let path = format!("/expire?key={}&ttl={ttl}", escaped(key));
        let answer = self.plan.client.call(Method::GET, &path, None).await?;
        Ok(answer == Value::Bool(true))
    }

    async fn register(&mut self) -> Result<(), CallError> {
        let route = self.plan.client.route().await?;
        let host = advertised(self.plan.address.ip(), route)?;
        let (key, value) = self
            .entry
            .get_or_insert_with(|| entry(&self.plan, &host, std::process::id()));
        let body = json!({
            "key": key,
            "value": value,
            "ttl": self.plan.cluster.inactive_timeout.as_secs_f64(),
            // The key is this process's own: what may stand there is what it wrote before.
            "overwrite_if_exists": true,
        });
        let answer = self
            .plan
            .client
            .call(Method::POST, "/set", Some(&body))
            .await?;
        if answer != Value::Bool(true) {
            return Err(CallError::Refused(format!("it answered {answer}")));
        }
        self.is_registered = true;
        self.complaint = None;
        let cluster = &self.plan.cluster;
        tracing::info!(store = %cluster.store, cluster_name = cluster.name, key, "registered");
        Ok(())
    }

    async fn leave(&mut self) {
        // An attempt that was broken off may have reached the store, so what was tried is taken out too.
        let Some((key, _)) = &self.entry else {
            return;
        };
        let path = format!("/delete?key={}", escaped(key));
        let gone = timeout(FAREWELL, self.plan.client.call(Method::DELETE, &path, None)).await;
        match gone {
            Ok(Ok(_)) => tracing::info!(store = %self.plan.cluster.store, "registration taken out"),
            Ok(Err(error)) => tracing::warn!("the registration cannot be taken out: {error}"),
            Err(_) => tracing::warn!(
                "the registration could not be taken out within {} s; it expires by itself",
                FAREWELL.as_secs()
            ),
        }
    }

    fn complain(&mut self, error: &CallError) {
        let text = error.to_string();
        if self.complaint.as_ref() != Some(&text) {
            let store = &self.plan.cluster.store;
            let what = if self.is_registered {
                "keep its registration"
            } else {
                "register"
            };
            tracing::warn!("this server cannot {what} at {store}, and goes on trying: {text}");
            self.complaint = Some(text);
        }
    }
}

/// The address under which others find a server that listens on `own`.
fn advertised(own: IpAddr, route: Route) -> Result<IpAddr, CallError> {
    if own.is_unspecified() {
        return Ok(route.local);
    }
    let is_this_machine = route.local == route.peer || route.peer.is_loopback();
    if own.is_loopback() && !is_this_machine {
        return Err(CallError::Unreachable(format!(
            "this server listens on {own} only, which the proxy at {} cannot reach; start it with --host 0.0.0.0",
            route.peer
        )));
    }
    Ok(own)
}

/// Key and value of a registration.
fn entry(plan: &RegistrationPlan, host: &IpAddr, pid: u32) -> (String, String) {
    let (role, port) = (plan.role, plan.address.port());
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    // For two that begin in the same millisecond where process ids agree too, as they do in containers.
    let [high, low, ..] = nonce();
    let random = u16::from_be_bytes([high, low]) % 1001;
    let id = format!(
        "{}-{}-{}-{pid}-{random:03}",
        role.name(),
        SocketAddr::new(*host, port),
        since.as_millis()
    );
    let value = json!({
        "worker_id": id,
        "host": host.to_string(),
        "port": port,
        "role": role.number(),
    });
    (
        format!("{}{id}", plan.cluster.key_prefix()),
        value.to_string(),
    )
}

/// Seconds as the store reads them: whole where they are.
fn ttl(duration: Duration) -> String {
    if duration.subsec_nanos() == 0 {
        duration.as_secs().to_string()
    } else {
        duration.as_secs_f64().to_string()
    }
}

#[cfg(test)]
mod tests;

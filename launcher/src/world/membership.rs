//! What the leading process of an instance finds in its environment: its place in the world and the way to the
//! coordinator. Ours is one variable, `BATON_WORLD` (JSON); beside it stand those of COMPAT.md §2.1, for commands that
//! are not ours.

use std::sync::Arc;
use std::time::Duration;

use baton_configs::llm::LlmOptions;
use baton_engine::ranks::{Fabric, LeaderRanks, RankCall};
use baton_engine::secret::Secret;
use serde::{Deserialize, Serialize};

use super::channel;
use super::protocol::{Answer, Hello};

/// The variable's name.
pub(crate) const VARIABLE: &str = "BATON_WORLD";
/// The instance label of a command that is not ours to know.
pub(crate) const COMMAND: &str = "command";
/// How long the coordinator may take to answer a call.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A leading process's place in a world.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Membership {
    /// Where the coordinator listens.
    pub(crate) address: String,
    /// The job's secret.
    pub(crate) secret: String,
    /// The world's name.
    pub(crate) world: String,
    /// The instance that this process leads.
    pub(crate) instance: String,
    /// Which start of it this is.
    pub(crate) epoch: u32,
    /// Ranks of the instance.
    pub(crate) ranks: u32,
    /// This process's address, as the other ranks reach it.
    pub(crate) host: String,
    /// A host name for each rank of the instance.
    pub(crate) hosts: Vec<String>,
    pub(crate) join_timeout_ms: u64,
    pub(crate) peer_timeout_ms: u64,
    pub(crate) fabric: Fabric,
    /// CPU threads for this process.
    pub(crate) num_threads: u32,
}

impl Membership {
    /// The variables that a leading process gets.
    pub(crate) fn variables(&self) -> Vec<(String, String)> {
        let json = serde_json::to_string(self).expect("strings and numbers are JSON");
        [
            (VARIABLE, json),
            ("TLLM_SPAWN_PROXY_PROCESS", "1".to_owned()),
            (
                "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR",
                format!("tcp://{}", self.address),
            ),
            ("TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY", self.secret.clone()),
            ("tllm_mpi_size", self.ranks.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }

    /// This process's place, if a launcher gave it one.
    ///
    /// # Errors
    /// When the variable is there and is not ours.
    pub(crate) fn from_environment() -> anyhow::Result<Option<Self>> {
        match std::env::var(VARIABLE) {
            Err(_) => Ok(None),
            Ok(text) => serde_json::from_str(&text).map(Some).map_err(|error| {
                anyhow::anyhow!(
                    "{VARIABLE} is not what a baton launcher sets: {error}\nhint: unset it"
                )
            }),
        }
    }

    /// Whether the launcher gave these ranks to this very server, and not to some command that runs it.
    pub(crate) fn is_instance(&self) -> bool {
        self.instance != COMMAND
    }

    /// Why this server cannot have these ranks.
    pub(crate) fn wrong_size(&self, llm: &LlmOptions) -> String {
        let has = format!("the launcher has {} ranks for this server", self.ranks);
        let sizes = [llm.tensor_parallel_size, llm.pipeline_parallel_size];
        wrong_size(&has, sizes.map(|size| size as usize))
    }

    /// What the engine is told, so that it can call for its followers.
    ///
    /// # Errors
    /// When the secret is none.
    pub(crate) fn leader_ranks(
        self,
        runtime: tokio::runtime::Handle,
    ) -> anyhow::Result<LeaderRanks> {
        let secret = Secret::from_hex(&self.secret)?;
        Ok(LeaderRanks {
            identity: identity(&self.world, &self.instance, self.epoch),
            secret: secret.clone(),
            host: self.host.clone(),
            hosts: self.hosts.clone(),
            join_timeout: Duration::from_millis(self.join_timeout_ms),
            peer_timeout: Duration::from_millis(self.peer_timeout_ms),
            fabric: self.fabric,
            call: Arc::new(move |call| runtime.block_on(self.call(&secret, call))),
        })
    }

    async fn call(&self, secret: &Secret, call: &RankCall) -> Result<(), String> {
        let hello = Hello::Leader {
            instance: self.instance.clone(),
            epoch: self.epoch,
            call: call.clone(),
        };
        let unreachable =
            |error| format!("the launcher at {} does not answer: {error}", self.address);
        let mut channel = channel::connect(&self.address, secret, &self.world, &hello)
            .await
            .map_err(|error| unreachable(error.to_string()))?;
        let answer = tokio::time::timeout(CALL_TIMEOUT, channel.incoming.next::<Answer>())
            .await
            .map_err(|_| unreachable(format!("nothing within {} s", CALL_TIMEOUT.as_secs())))?
            .map_err(|error| unreachable(error.to_string()))?;
        answer.refusal.map_or(Ok(()), Err)
    }
}

/// That a server needs other ranks than there are.
pub(crate) fn wrong_size(has: &str, [tensor, pipeline]: [usize; 2]) -> String {
    format!(
        "{has}, but tensor_parallel_size {tensor} × pipeline_parallel_size {pipeline} is {}\nhint: start as many ranks as that, or change --tp_size and --pp_size",
        tensor.saturating_mul(pipeline)
    )
}

/// Names one epoch of one instance of one world; leader and followers must agree on it.
pub(crate) fn identity(world: &str, instance: &str, epoch: u32) -> String {
    format!("{world} {instance} epoch {epoch}")
}

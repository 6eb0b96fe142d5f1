//! The ranks of one instance: what the leading one is told about the others, and what each of them is started with.
//!
//! The leader binds a socket, calls for its followers through [`RankCall`] (the launcher starts them), and waits for
//! all of them; each proves the job's secret. Invariant: a follower that belongs to another job, instance or epoch is
//! turned away; one that does not come ends the wait by its deadline, with its number and host.

use std::fmt::{self, Debug};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::secret::Secret;

/// What moves sums and messages between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fabric {
    /// Our own connections. A rank that dies ends its instance only.
    #[default]
    Tcp,
    /// MPI, through the plug-in. The world is one fate.
    Mpi,
}

/// Has a leader's followers started; the error is one line.
pub type CallRanks = Arc<dyn Fn(&RankCall) -> Result<(), String> + Send + Sync>;

/// What the leading rank is told about its group.
#[derive(Clone)]
pub struct LeaderRanks {
    /// Names job, step, instance and epoch; both sides must have the same.
    pub identity: String,
    /// The job's secret.
    pub secret: Secret,
    /// Address to bind, which the followers reach: an IP address or host name of this machine.
    pub host: String,
    /// One host name a rank, for messages. Empty when they are not known.
    pub hosts: Vec<String>,
    /// How long the followers may take to come.
    pub join_timeout: Duration,
    /// How long a rank may be silent while it is waited for.
    pub peer_timeout: Duration,
    /// What moves the bytes.
    pub fabric: Fabric,
    /// Has the followers started. Called once, when the leader's socket is bound.
    pub call: CallRanks,
}

impl Debug for LeaderRanks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaderRanks")
            .field("identity", &self.identity)
            .field("host", &self.host)
            .field("hosts", &self.hosts)
            .field("join_timeout", &self.join_timeout)
            .field("peer_timeout", &self.peer_timeout)
            .field("fabric", &self.fabric)
            .finish_non_exhaustive()
    }
}

/// The leader's call for its followers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankCall {
    /// Where the leader listens, `host:port`.
    pub leader: String,
    /// Ranks of the instance, the leader included: `tensor_parallel`·`pipeline_parallel`.
    pub size: usize,
    /// `tensor_parallel_size`.
    pub tensor_parallel: usize,
    /// `pipeline_parallel_size`.
    pub pipeline_parallel: usize,
}

/// What a follower is started with. Everything else (model, options, pool) comes from the leader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FollowerSpec {
    /// This rank, `1..size`.
    pub rank: usize,
    /// Ranks of the instance.
    pub size: usize,
    /// Where the leader listens, `host:port`.
    pub leader: String,
    /// As [`LeaderRanks::identity`].
    pub identity: String,
    /// The job's secret, as [`Secret::to_hex`] writes it.
    pub secret: String,
    /// Address to bind, which the other ranks reach.
    pub host: String,
    /// One host name a rank, for messages. Empty when they are not known.
    pub hosts: Vec<String>,
    /// How long joining may take.
    pub join_timeout_ms: u64,
    /// How long a rank may be silent while it is waited for.
    pub peer_timeout_ms: u64,
    /// What moves the bytes.
    pub fabric: Fabric,
    /// Threads for the CPU backend; `None` takes what the options say, else the cores of this process.
    pub num_threads: Option<u32>,
}

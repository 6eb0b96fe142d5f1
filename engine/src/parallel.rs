//! One instance on several ranks: rank 0 has the scheduler and leads, the others follow.
//!
//! Rank 0's engine sees a [`Model`](crate::model::Model) like any other (`parallel/model.rs`). Each thing that it does is
//! one message to all ranks (`parallel/order.rs`); each of them does its part (`parallel/follower.rs`), and keeps and hands
//! over its own pages. How they load, agree and begin is `parallel/opening.rs`. Invariant: between two orders no rank waits
//! for another but for the next order, and that comes at least every few seconds, so a rank that is lost is noticed
//! whether there is work or not.

pub(crate) mod follower;
pub(crate) mod model;
pub(crate) mod opening;
mod order;
#[cfg(test)]
pub(crate) mod tests;

use crate::backend::BackendError;
use crate::collective::CollectiveError;
use crate::model::ModelError;
use crate::transceiver::TransceiverStartError;
use crate::transport::fault::FaultSyntaxError;

pub(crate) use opening::{Following, Leading, Led, Room, await_order, follow, lead};

/// Why an instance of several ranks did not begin, or how a rank that follows ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParallelError {
    /// Another rank is lost, silent, or speaks nonsense.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// Another rank failed; what it says.
    #[error("{rank}: {reason}")]
    Rank {
        /// `rank 3 (node2)`.
        rank: String,
        /// Its own error.
        reason: String,
    },
    /// Two ranks would compute with different models or programs.
    #[error("{rank} has {there}, rank 0 has {here}\nhint: {hint}")]
    Disagree {
        /// `rank 3 (node2)`.
        rank: String,
        /// What the other rank has.
        there: String,
        /// What rank 0 has.
        here: String,
        /// What to do.
        hint: String,
    },
    /// Rank 0 does not go on; told to the others.
    #[error("rank 0 gave up: {0}")]
    GivenUp(String),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// This rank's device.
    #[error(transparent)]
    Device(#[from] BackendError),
    /// This rank's KV transceiver.
    #[error(transparent)]
    Transceiver(#[from] TransceiverStartError),
    /// A test variable is no fault plan.
    #[error(transparent)]
    Faults(#[from] FaultSyntaxError),
    /// Options that came from rank 0 are not understood here.
    #[error("rank 0's options are not understood: {0}")]
    Options(String),
    /// A message of the other side is not understood: another version, or a bug.
    #[error("rank {from} sent what is not understood: {reason}")]
    Message {
        /// Who sent it.
        from: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// This process was told to stop.
    #[error("told to stop")]
    Stopped,
}

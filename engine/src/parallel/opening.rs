//! How the ranks of an instance begin: each says what processors it has, rank 0 says what to load, all load at the same
//! time, and rank 0 makes sure that all have the same.
//!
//! Loading takes as long as it takes, so whoever loads says so every second, and whoever waits looks at no clock but the
//! one for silence. Invariant: a rank that cannot go on says why before it leaves, and rank 0's error names it.

mod lead;
mod load;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::ParallelError;
use crate::machine::Processors;
use crate::model::checkpoint::WeightsIdentity;

pub(crate) use lead::{Leading, Led, Room, lead};
pub(crate) use load::{Following, await_order, follow};

/// What a rank says first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Hello {
    /// Of the program.
    version: String,
    processors: Processors,
}

impl Hello {
    fn of_this_process() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            processors: Processors::of_this_process(),
        }
    }
}

/// What rank 0 tells all others until the first order.
#[derive(Debug, Serialize, Deserialize)]
enum ToAll {
    /// Load your part.
    Load(LoadOrder),
    /// Others still load.
    Wait,
    /// It will not be.
    GiveUp(String),
    /// Orders come now.
    Begin,
}

/// What to load.
#[derive(Debug, Serialize, Deserialize)]
struct LoadOrder {
    model: String,
    revision: Option<String>,
    /// Engine options, as the text of an options file.
    options: String,
    /// Each rank's share of the processors, in threads.
    threads: Vec<usize>,
}

/// What a rank tells rank 0 while it loads.
#[derive(Debug, Serialize, Deserialize)]
enum ToLeader {
    Progress { bytes_done: u64, bytes_total: u64 },
    Loaded(Report),
    Failed(String),
}

/// What a rank has loaded.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    /// Of the whole model.
    fingerprint: u64,
    identity: WeightsIdentity,
    /// Of this rank's part.
    weight_bytes: u64,
    /// What the machine had left for this rank.
    available_bytes: u64,
    /// What its device has left for pages, where it has memory of its own.
    device_bytes: Option<u64>,
}

fn to_bytes(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).expect("plain data serialises")
}

fn from_bytes<T: DeserializeOwned>(from: usize, bytes: &[u8]) -> Result<T, ParallelError> {
    serde_json::from_slice(bytes).map_err(|error| ParallelError::Message {
        from,
        reason: error.to_string(),
    })
}

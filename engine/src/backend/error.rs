//! Why a backend refuses: what it was doing, and what the device, the file or another rank says.

use crate::collective::CollectiveError;

/// Why a backend refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// A weight's bytes do not fit its shape.
    #[error("weight `{name}`: {reason}")]
    Weight {
        /// Name in the file.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A weight cannot be read from its file.
    #[error("weight `{name}`: {reason}")]
    Read {
        /// Name in the file.
        name: String,
        /// The file and what happened to it.
        reason: String,
    },
    /// Memory for the KV pool or for activations is not there.
    #[error("out of memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// What was to be allocated.
        what: String,
        /// Its size.
        bytes: usize,
    },
    /// The device failed.
    #[error("{what}: {reason}")]
    Device {
        /// What was being done.
        what: String,
        /// What the device or its library says.
        reason: String,
    },
    /// Another rank of the instance is lost, or silent.
    #[error(transparent)]
    Peer(#[from] CollectiveError),
    /// Another rank of the instance refused.
    #[error("{rank}: {reason}")]
    Rank {
        /// `rank 3 (node2)`.
        rank: String,
        /// What it says.
        reason: String,
    },
}

//! Which transports this engine knows, and which of them can be used on this machine: for benchmarks and `baton doctor`.
//!
//! It looks and starts nothing. Invariant: a transport that is missing says why, what it would give and how to get it.

use baton_configs::transceiver::{PreferredTransport, TransportChoice};

use crate::transport::{Capability, tcp};

/// A transport that the engine knows by name.
#[derive(Debug, Clone, PartialEq)]
pub struct TransportState {
    /// Its name in configs, logs and metrics.
    pub name: &'static str,
    /// What asks for it alone; `None` when no configuration can.
    pub choice: Option<TransportChoice>,
    /// What it can do here, or what is missing: one line, and a `hint:` line where there is a remedy.
    pub state: Result<Capability, String>,
}

/// All transports, the best first.
#[must_use]
pub fn transports() -> Vec<TransportState> {
    let absent = |name, choice| TransportState {
        name,
        choice,
        state: Err("this build does not have it".to_owned()),
    };
    let preferred = |wish| Some(TransportChoice::Preferred(wish));
    vec![
        absent("nixl", preferred(PreferredTransport::Nixl)),
        absent("ucx", preferred(PreferredTransport::Ucx)),
        absent("shm", None),
        absent("mpi", preferred(PreferredTransport::Mpi)),
        TransportState {
            name: tcp::CAPABILITY.name,
            choice: Some(TransportChoice::Tcp),
            state: Ok(tcp::CAPABILITY),
        },
    ]
}

//! Which transports this engine knows, and which of them can be used on this machine: for benchmarks and `baton doctor`.
//!
//! It looks and starts nothing. Invariant: a transport that is missing says why, what it would give and how to get it.

use baton_configs::transceiver::{PreferredTransport, TransportChoice};

use super::select;
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

/// The transport that `backend: DEFAULT` takes here, and why, in a sentence; `None` when there is none.
#[must_use]
pub fn default_transport() -> Option<(&'static str, String)> {
    let there: Vec<Capability> = transports()
        .into_iter()
        .filter_map(|known| known.state.ok())
        .collect();
    let choice = select::choose(TransportChoice::Default, &there)?;
    Some((choice.transport, choice.reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_is_always_there_and_the_default_is_one_that_is() {
        let known = transports();
        assert!(known.iter().any(|t| t.name == "tcp" && t.state.is_ok()));
        let (name, reason) = default_transport().unwrap();
        assert!(known.iter().any(|t| t.name == name && t.state.is_ok()));
        assert!(reason.starts_with("DEFAULT"), "{reason}");
    }

    #[test]
    fn each_is_asked_for_by_its_own_name() {
        for known in transports() {
            if let Some(choice) = known.choice {
                assert_eq!(choice.name().to_lowercase(), known.name);
            }
        }
    }
}

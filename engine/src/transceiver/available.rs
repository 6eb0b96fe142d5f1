//! Which transports this engine knows, and which of them can be used on this machine: for benchmarks and `baton doctor`.
//!
//! It looks and starts nothing. Invariant: a transport that is missing says why, what it would give and how to get it.

use baton_configs::transceiver::{PreferredTransport, TransportChoice};

use super::select::Preference;
use super::wires::KINDS;
use crate::transport::{Capability, nixl, ucx};

/// A transport that the engine knows by name.
#[derive(Debug, Clone, PartialEq)]
pub struct TransportState {
    /// Its name in configs, logs and metrics.
    pub name: &'static str,
    /// What asks for it first; `None` when no configuration can.
    pub choice: Option<TransportChoice>,
    /// Of a library: which one was found, in words.
    pub library: Option<String>,
    /// What it can do here, or what is missing: one line, and a `hint:` line where there is a remedy.
    pub state: Result<Capability, String>,
}

/// All transports, the best first.
#[must_use]
pub fn transports() -> Vec<TransportState> {
    let preferred = |wish| Some(TransportChoice::Preferred(wish));
    let known = [
        ("cuda_ipc", preferred(PreferredTransport::CudaIpc)),
        ("nixl", preferred(PreferredTransport::Nixl)),
        ("ucx", preferred(PreferredTransport::Ucx)),
        ("shm", preferred(PreferredTransport::Shm)),
        ("mpi", preferred(PreferredTransport::Mpi)),
        ("tcp", Some(TransportChoice::Tcp)),
    ];
    let states = known.map(|(name, choice)| TransportState {
        name,
        choice,
        library: library(name),
        state: probe(name),
    });
    states.into()
}

fn probe(name: &str) -> Result<Capability, String> {
    let mut kinds = KINDS.iter();
    match kinds.find(|kind| kind.name == name) {
        Some(kind) => (kind.probe)(),
        None => Err("this build does not have it".to_owned()),
    }
}

fn library(name: &str) -> Option<String> {
    match name {
        "nixl" => {
            let found = nixl::probe().ok()?;
            let instead = found.instead.map(|why| format!(" ({why})"));
            let instead = instead.unwrap_or_default();
            Some(format!(
                "{}, plug-in {}{instead}",
                found.library, found.plugin
            ))
        }
        "ucx" => ucx::probe().ok().map(|version| format!("UCX {version}")),
        _ => None,
    }
}

/// The transport that `backend: DEFAULT` takes here for KV in the host's memory, and why, in a sentence; `None` when there is none.
#[must_use]
pub fn default_transport() -> Option<(&'static str, String)> {
    let variable = |name: &str| std::env::var_os(name);
    let preference = Preference::new(TransportChoice::Default, None, variable);
    let tried = preference
        .order
        .iter()
        .map(|&name| (name, probe(name).err()));
    let choice = preference.choose(&tried.collect::<Vec<_>>())?;
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

//! Which transports are measured: what the engine knows, what is there, what was asked for.

use anyhow::anyhow;
use baton_configs::transceiver::TransportChoice;
use baton_engine::transceiver::{TransportState, transports};
use baton_engine::transport::{Capability, MemoryKind};
use serde::{Deserialize, Serialize};

use super::pages::Device;
use crate::cli::TransportArg;
use crate::exit::{Outcome, WithOutcome};

/// A transport that is not measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Skipped {
    /// Its name.
    pub(crate) transport: String,
    /// What is missing and how to get it.
    pub(crate) reason: String,
}

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Selection {
    pub(super) names: Vec<&'static str>,
    pub(super) skipped: Vec<Skipped>,
}

/// Those asked for; each once, in the order of the engine's preference.
///
/// # Errors
/// When one that was asked for by name cannot be used.
pub(super) fn select(
    asked: &[TransportArg],
    device: Device,
    missing_there: &[Skipped],
) -> anyhow::Result<Selection> {
    let mut known = transports();
    for transport in &mut known {
        let abroad = |there: &Capability| !there.memory.contains(&MemoryKind::Host);
        if device == Device::Cpu && transport.state.as_ref().is_ok_and(abroad) {
            let reason = "it moves the memory of GPUs\nhint: --device cuda";
            transport.state = Err(reason.to_owned());
        }
    }
    for transport in &mut known {
        let there = missing_there
            .iter()
            .find(|missing| missing.transport == transport.name);
        if let Some(missing) = there
            && transport.state.is_ok()
        {
            transport.state = Err(format!("on the other side: {}", missing.reason));
        }
    }
    select_of(asked, known)
}

fn select_of(asked: &[TransportArg], known: Vec<TransportState>) -> anyhow::Result<Selection> {
    let all = asked.contains(&TransportArg::All);
    let mut selection = Selection {
        names: Vec::new(),
        skipped: Vec::new(),
    };
    for transport in known {
        let named = asked.iter().any(|arg| arg.name() == Some(transport.name));
        match transport.state {
            Ok(_) if named || all => selection.names.push(transport.name),
            Err(reason) if named => {
                return Err(anyhow!(
                    "transport {} cannot be used here: {reason}",
                    transport.name
                ))
                .outcome(Outcome::Unavailable);
            }
            Err(reason) if all => selection.skipped.push(Skipped {
                transport: transport.name.to_owned(),
                reason,
            }),
            Ok(_) | Err(_) => {}
        }
    }
    Ok(selection)
}

/// What asks the engine for this transport alone.
///
/// # Errors
/// When it cannot be used here.
pub(super) fn choice(name: &str) -> anyhow::Result<TransportChoice> {
    let known = transports().into_iter().find(|known| known.name == name);
    let unusable = |reason: String| {
        Err(anyhow!("transport {name} cannot be used here: {reason}")).outcome(Outcome::Unavailable)
    };
    match known {
        Some(TransportState {
            state: Err(reason), ..
        }) => unusable(reason),
        Some(TransportState {
            choice: Some(choice),
            ..
        }) => Ok(choice),
        Some(_) | None => unusable("this build does not know it".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Vec<TransportState> {
        let tcp = transports().into_iter().find(|t| t.name == "tcp").unwrap();
        let absent = TransportState {
            name: "ucx",
            choice: None,
            library: None,
            state: Err("libucp.so.0 is not there\nhint: install libucx0".to_owned()),
        };
        vec![absent, tcp]
    }

    #[test]
    fn all_takes_what_is_there_and_lists_the_rest() {
        let selection = select_of(&[TransportArg::All], known()).unwrap();
        assert_eq!(selection.names, ["tcp"]);
        assert_eq!(selection.skipped[0].transport, "ucx");
        assert!(selection.skipped[0].reason.contains("libucx0"));
        let selection = select_of(&[TransportArg::Tcp, TransportArg::Tcp], known()).unwrap();
        assert_eq!((selection.names.len(), selection.skipped.len()), (1, 0));
    }

    #[test]
    fn one_that_is_named_and_missing_is_an_error_that_says_how_to_get_it() {
        for asked in [
            vec![TransportArg::Ucx],
            vec![TransportArg::All, TransportArg::Ucx],
        ] {
            let error = select_of(&asked, known()).unwrap_err();
            assert_eq!(crate::exit::of(&error), Outcome::Unavailable);
            let text = format!("{error:#}");
            assert!(
                text.starts_with("transport ucx cannot be used here"),
                "{text}"
            );
            assert!(text.contains("hint: install libucx0"), "{text}");
        }
    }

    #[test]
    fn tcp_is_always_there_and_unknown_names_are_refused() {
        assert_eq!(choice("tcp").unwrap(), TransportChoice::Tcp);
        assert!(choice("pigeon").is_err());
    }
}

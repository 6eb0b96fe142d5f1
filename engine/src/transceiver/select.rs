//! In which order transports are preferred, and what came of it. Pure.
//!
//! `DEFAULT` takes the fastest that loads, between devices first where the pages lie on one; a name takes that one first and, where it is not there, says so once and
//! goes on with what needs no library. TCP is always last, because it always works; asked for, it is alone.

use std::ffi::OsString;

use baton_configs::transceiver::{PreferredTransport, TransportChoice};

/// What is tried when nothing is asked for, best first.
const DEFAULT_ORDER: [&str; 4] = ["nixl", "ucx", "shm", "tcp"];

/// The fabric between devices; what it moves is nowhere else.
const BETWEEN_DEVICES: &str = "cuda_ipc";

/// What is left when what was asked for is not there.
const FALL_BACK: [&str; 2] = ["shm", "tcp"];

/// Variables that choose where the config says DEFAULT (COMPAT.md §12.3), the first that is `1`.
const VARIABLES: [(&str, &str); 4] = [
    ("TRTLLM_USE_UCX_KVCACHE", "ucx"),
    ("TRTLLM_USE_NIXL_KVCACHE", "nixl"),
    ("TRTLLM_USE_MOONCAKE_KVCACHE", "mooncake"),
    ("TRTLLM_USE_MPI_KVCACHE", "mpi"),
];

/// Which transports to start, best first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Preference {
    pub(super) order: Vec<&'static str>,
    /// The one that was asked for, and by what.
    asked: Option<(&'static str, &'static str)>,
}

/// A decision with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Choice {
    /// The best one that is there.
    pub(super) transport: &'static str,
    pub(super) reason: String,
    /// Whether the user asked for another one.
    pub(super) fell_back: bool,
}

/// What became of a transport that was to be started: nothing, or why it is not there.
pub(super) type Tried = (&'static str, Option<String>);

impl Preference {
    /// What config and environment ask for, of pages on this device or in the host's memory.
    pub(super) fn new(
        choice: TransportChoice,
        device: Option<usize>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Self {
        let set = |name: &str| variable(name).is_some_and(|value| value == "1");
        let config = "cache_transceiver_config.backend";
        let asked = match choice {
            TransportChoice::Default => VARIABLES
                .into_iter()
                .find(|(name, _)| set(name))
                .map(|(name, transport)| (transport, name)),
            TransportChoice::Tcp => Some(("tcp", config)),
            TransportChoice::Preferred(preferred) => Some((name_of(preferred), config)),
        };
        let order = match asked {
            None => device
                .map(|_| BETWEEN_DEVICES)
                .into_iter()
                .chain(DEFAULT_ORDER)
                .collect(),
            Some(("tcp", _)) => vec!["tcp"],
            Some((first, _)) => {
                let rest = FALL_BACK.into_iter().filter(|name| *name != first);
                std::iter::once(first).chain(rest).collect()
            }
        };
        Self { order, asked }
    }

    /// Only these, for tests.
    #[cfg(test)]
    pub(super) const fn of(order: Vec<&'static str>) -> Self {
        Self { order, asked: None }
    }

    /// The best of those that are there, in the order of trying; `None` when none is.
    pub(super) fn choose(&self, tried: &[Tried]) -> Option<Choice> {
        let (transport, _) = *tried.iter().find(|(_, missing)| missing.is_none())?;
        let missing: Vec<_> = tried
            .iter()
            .take_while(|(name, _)| *name != transport)
            .filter_map(|(name, why)| Some(format!("no {name}: {}", why.as_ref()?)))
            .collect();
        let missing = missing.join("; ");
        let (reason, fell_back) = match self.asked {
            Some((wish, by)) if wish == transport => (format!("asked for by {by}: {wish}"), false),
            Some((wish, by)) => {
                let text = format!("{by} asks for {wish}; using {transport} ({missing})");
                (text, true)
            }
            None if missing.is_empty() => (format!("DEFAULT: {transport} is the best"), false),
            None => {
                let text = format!("DEFAULT: {transport} is the best that is there ({missing})");
                (text, false)
            }
        };
        Some(Choice {
            transport,
            reason,
            fell_back,
        })
    }
}

const fn name_of(preferred: PreferredTransport) -> &'static str {
    match preferred {
        PreferredTransport::Ucx => "ucx",
        PreferredTransport::Nixl => "nixl",
        PreferredTransport::Mpi => "mpi",
        PreferredTransport::Mooncake => "mooncake",
        PreferredTransport::Shm => "shm",
        PreferredTransport::CudaIpc => BETWEEN_DEVICES,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing_set(_: &str) -> Option<OsString> {
        None
    }

    fn preferred(preferred: PreferredTransport) -> Preference {
        Preference::new(TransportChoice::Preferred(preferred), None, nothing_set)
    }

    fn missing(name: &'static str) -> Tried {
        (name, Some("its library is not there".to_owned()))
    }

    #[test]
    fn default_takes_the_best_that_is_there_and_says_what_is_not() {
        let preference = Preference::new(TransportChoice::Default, None, nothing_set);
        assert_eq!(preference.order, DEFAULT_ORDER);
        let on_device = Preference::new(TransportChoice::Default, Some(0), nothing_set);
        assert_eq!(on_device.order[0], "cuda_ipc");
        assert_eq!(on_device.order[1..], DEFAULT_ORDER);
        let all = DEFAULT_ORDER.map(|name| (name, None));
        let choice = preference.choose(&all).unwrap();
        assert_eq!((choice.transport, choice.fell_back), ("nixl", false));
        let some = [
            missing("nixl"),
            missing("ucx"),
            ("shm", None),
            ("tcp", None),
        ];
        let choice = preference.choose(&some).unwrap();
        assert_eq!((choice.transport, choice.fell_back), ("shm", false));
        assert_eq!(
            choice.reason,
            "DEFAULT: shm is the best that is there (no nixl: its library is not there; no ucx: its library is not there)"
        );
        assert_eq!(preference.choose(&[missing("tcp")]), None);
    }

    #[test]
    fn a_wish_comes_first_and_falls_back_with_its_reason() {
        let ucx = preferred(PreferredTransport::Ucx);
        assert_eq!(ucx.order, ["ucx", "shm", "tcp"]);
        let granted = ucx.choose(&[("ucx", None), ("shm", None)]).unwrap();
        assert_eq!((granted.transport, granted.fell_back), ("ucx", false));
        let fallen = ucx.choose(&[missing("ucx"), ("shm", None)]).unwrap();
        assert!(fallen.fell_back);
        assert_eq!(
            fallen.reason,
            "cache_transceiver_config.backend asks for ucx; using shm (no ucx: its library is not there)"
        );
        assert_eq!(preferred(PreferredTransport::Shm).order, ["shm", "tcp"]);
        let between = preferred(PreferredTransport::CudaIpc);
        assert_eq!(between.order, ["cuda_ipc", "shm", "tcp"]);
    }

    #[test]
    fn tcp_asked_for_is_alone() {
        let tcp = Preference::new(TransportChoice::Tcp, None, nothing_set);
        assert_eq!(tcp.order, ["tcp"]);
    }

    #[test]
    fn variables_choose_where_the_config_does_not() {
        let mpi = |name: &str| (name == "TRTLLM_USE_MPI_KVCACHE").then(|| "1".into());
        let asked = Preference::new(TransportChoice::Default, None, mpi);
        assert_eq!(asked.order, ["mpi", "shm", "tcp"]);
        let fallen = asked.choose(&[missing("mpi"), ("tcp", None)]).unwrap();
        assert!(
            fallen
                .reason
                .starts_with("TRTLLM_USE_MPI_KVCACHE asks for mpi")
        );
        assert_eq!(
            Preference::new(TransportChoice::Tcp, None, mpi).order,
            ["tcp"]
        );
        let not_one = |_: &str| Some("true".into());
        let untouched = Preference::new(TransportChoice::Default, None, not_one);
        assert_eq!(untouched.order, DEFAULT_ORDER);
        let all = |_: &str| Some("1".into());
        let first = Preference::new(TransportChoice::Default, None, all);
        assert_eq!(first.order, ["ucx", "shm", "tcp"]);
    }
}

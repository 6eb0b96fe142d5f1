//! Which transport moves the KV: the best that is there, or the one asked for if it is there. Pure.

use baton_configs::transceiver::TransportChoice;

use crate::transport::Capability;

/// A decision with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) transport: &'static str,
    pub(super) reason: String,
    /// Whether the user asked for another one.
    pub(super) fell_back: bool,
}

/// Chooses among the transports that are there; `None` when there is none.
pub(super) fn choose(choice: TransportChoice, available: &[Capability]) -> Option<Choice> {
    let best = available
        .iter()
        .max_by_key(|capability| capability.bandwidth_estimate)?;
    let choose_best = |reason, fell_back| Choice {
        transport: best.name,
        reason,
        fell_back,
    };
    // By name, so that a choice that configs learn first still falls back here, with its warning.
    let wish = choice.name().to_lowercase();
    if choice == TransportChoice::Default {
        let names: Vec<_> = available.iter().map(|c| c.name).collect();
        return Some(choose_best(
            format!(
                "DEFAULT: the best of those available ({})",
                names.join(", ")
            ),
            false,
        ));
    }
    Some(match available.iter().find(|c| c.name == wish) {
        Some(wished) => Choice {
            transport: wished.name,
            reason: format!("asked for by cache_transceiver_config.backend: {wish}"),
            fell_back: false,
        },
        None => choose_best(
            format!(
                "cache_transceiver_config.backend asks for {wish}, which this build does not have; using {}",
                best.name
            ),
            true,
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::tcp::CAPABILITY as TCP;

    fn named(name: &'static str, bandwidth_estimate: u64) -> Capability {
        Capability {
            name,
            bandwidth_estimate,
            ..TCP
        }
    }

    #[test]
    fn default_takes_the_best_and_says_among_which() {
        let there = [named("slow", 1), named("fast", 9), named("middling", 5)];
        let choice = choose(TransportChoice::Default, &there).unwrap();
        assert_eq!(choice.transport, "fast");
        assert!(choice.reason.contains("slow, fast, middling"));
        assert!(!choice.fell_back);
        assert_eq!(choose(TransportChoice::Default, &[]), None);
    }

    #[test]
    fn a_wish_is_granted_or_falls_back_with_both_names() {
        let granted = choose(TransportChoice::Tcp, &[named("fast", u64::MAX), TCP]).unwrap();
        assert_eq!((granted.transport, granted.fell_back), ("tcp", false));
        let fallen = choose(TransportChoice::Tcp, &[named("other", 1)]).unwrap();
        assert!(fallen.fell_back);
        assert!(fallen.reason.contains("asks for tcp"));
        assert!(fallen.reason.contains("using other"));
    }
}

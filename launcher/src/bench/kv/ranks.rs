//! Pairs among the ranks that one srun or mpirun started: rank 0 fetches from rank 1, rank 2 from rank 3, and so on.
//!
//! A pair meets through PMIx: the holding rank publishes where it listens. Each pair reports for itself, all at the same
//! time; nothing is added up over pairs.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::anyhow;

use super::control::{self, Control, ControlError};
use super::hold::of_control;
use crate::exit::{Outcome, WithOutcome};
use crate::pmix::Pmix;
use crate::rank::{self, Environment, RankFacts, Starter};
use crate::reach;

/// Under this key a holding rank publishes its addresses.
const KEY: &str = "baton.bench.kv";

/// What a rank does.
#[derive(Debug)]
pub(super) enum Part {
    /// It fetches from the rank after it.
    Fetch(Control, Pair),
    /// It holds for the rank before it.
    Hold(Control),
}

/// The ranks of a pair: who holds, who fetches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Pair {
    /// Holds the KV.
    pub(crate) from: u32,
    /// Fetches it.
    pub(crate) to: u32,
}

/// This process's part; nothing when it is alone.
///
/// # Errors
/// When it has no partner, or the two do not meet in time.
pub(super) fn part(wait: Duration) -> anyhow::Result<Option<Part>> {
    let facts = rank::discover(&Environment::of_process()).outcome(Outcome::Usage)?;
    if facts.starter == Starter::Alone || facts.size == Some(1) {
        return Ok(None);
    }
    if !facts.pmix {
        return Err(anyhow!(
            "rank {} cannot find its partner: {} gave it no PMIx server\nhint: srun --mpi=pmix, or Open MPI's mpirun; or start two by hand, one with --listen HOST:PORT and one with --peer HOST:PORT",
            facts.rank,
            facts.starter.command()
        ))
        .outcome(Outcome::Unavailable);
    }
    let deadline = Instant::now() + wait;
    let pmix = Pmix::open().outcome(Outcome::Unavailable)?;
    let size = pmix.job_size();
    let part = if size.is_multiple_of(2) {
        meet(&pmix, &facts, wait, deadline)
    } else {
        Err(anyhow!(
            "{size} ranks make no pairs\nhint: start an even number"
        ))
        .outcome(Outcome::Usage)
    };
    // A rank that ends without taking leave takes mpirun's whole world with it.
    if let Err(error) = pmix.finalize() {
        tracing::warn!(%error, "cannot take leave of the PMIx server");
    }
    part.map(Some)
}

fn meet(pmix: &Pmix, facts: &RankFacts, wait: Duration, deadline: Instant) -> anyhow::Result<Part> {
    if !facts.rank.is_multiple_of(2) {
        let (listener, bound) = control::bind("0.0.0.0:0").map_err(of_control)?;
        let addresses = addresses(bound.port(), facts.hosts.len() == 1);
        pmix.publish(KEY, &addresses.join(" "))
            .outcome(Outcome::Unavailable)?;
        let left = deadline.saturating_duration_since(Instant::now());
        let control = Control::accept(&listener, left).map_err(of_control)?;
        return Ok(Part::Hold(control));
    }
    let pair = Pair {
        from: facts.rank + 1,
        to: facts.rank,
    };
    let text = pmix
        .fetch(pair.from, KEY, deadline)
        .outcome(Outcome::TimedOut)?;
    let mut last = ControlError::Unreachable(format!("rank {} has no address", pair.from));
    let addresses: Vec<&str> = text.split(' ').collect();
    let share = wait / u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
    for address in addresses {
        match Control::connect(address, share) {
            Ok(control) => return Ok(Part::Fetch(control, pair)),
            Err(error) => last = error,
        }
    }
    Err(of_control(last))
}

/// Where the partner may reach this rank, the likeliest first. On one host that is the loopback; with several the
/// loopback would reach a stranger.
fn addresses(port: u16, one_host: bool) -> Vec<String> {
    let loopback = IpAddr::from([127, 0, 0, 1]);
    let found = if one_host {
        Vec::new()
    } else {
        reach::addresses()
    };
    let found = if found.is_empty() {
        vec![loopback]
    } else {
        found
    };
    let with_port = found
        .into_iter()
        .map(|ip| SocketAddr::new(ip, port).to_string());
    with_port.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_host_meets_at_the_loopback() {
        assert_eq!(addresses(7, true), ["127.0.0.1:7"]);
        let several = addresses(7, false);
        assert!(several.iter().all(|address| address.ends_with(":7")));
        assert!(!several.is_empty());
    }
}

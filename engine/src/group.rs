//! How the ranks of an instance become a group: the leader waits for its followers, every pair gets a connection.
//!
//! A follower connects to the leader and proves the job's secret, its rank, the instance and the epoch; the leader
//! proves itself in return. When all are there, each learns where the others listen, and of each pair the higher rank
//! connects to the lower, proved the same way. Then each says that it is ready, or why not. A connection that has not
//! proved itself holds up nobody, and nothing waits longer than `join_timeout`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::collective::mpi::MpiError;
use crate::collective::tcp::TcpGroup;
use crate::collective::{CollectiveError, RankNames};
use crate::ranks::{FollowerSpec, LeaderRanks};
use crate::secret::Secret;
use handshake::Party;
use meeting::Meeting;
use waiting::Waiting;

mod fabric;
mod handshake;
mod meeting;
mod socket;
mod waiting;

#[cfg(test)]
mod tests;

pub use fabric::{on_fabric, stand_aside};

/// Why there is no group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GroupError {
    /// What the rank was started with makes no sense.
    #[error("this rank was started with wrong facts: {0}")]
    Facts(String),
    /// The host's address cannot be found or bound.
    #[error(
        "cannot listen on `{host}` for the other ranks: {reason}\nhint: it must be a name or an address of this machine, which the other machines reach"
    )]
    Bind {
        /// The host as it was given.
        host: String,
        /// What the system said.
        reason: String,
    },
    /// The time to join is over.
    #[error(
        "after {waited_s} s still {waiting_for}\nhint: their logs say why they did not come; a firewall between the nodes looks the same"
    )]
    TimedOut {
        /// On what and on whom, such as `waiting for rank 2 (node1), rank 3 (node1) to join`.
        waiting_for: String,
        /// Seconds.
        waited_s: u64,
    },
    /// The other side does not take this rank.
    #[error("{peer} at {address} turned this rank away: {reason}")]
    Refused {
        /// `rank 0 (node1)`.
        peer: String,
        /// Where it listens.
        address: String,
        /// What it said.
        reason: String,
    },
    /// What answers is no rank of this job.
    #[error(
        "what answers at {address} is not {peer} of this job: {reason}\nhint: another program may have taken the port, or the job secrets differ"
    )]
    Foreign {
        /// `rank 0 (node1)`.
        peer: String,
        /// Where it listens.
        address: String,
        /// What is wrong with its answer.
        reason: String,
    },
    /// A rank that had come is gone.
    #[error("lost {peer} while {doing}: {reason}")]
    Lost {
        /// `rank 3 (node2)`.
        peer: String,
        /// What was under way.
        doing: String,
        /// What the system said.
        reason: String,
    },
    /// A rank could not connect to the others, and said so.
    #[error("{peer} could not join: {reason}")]
    Failed {
        /// `rank 3 (node2)`.
        peer: String,
        /// Its own error.
        reason: String,
    },
    /// A rank was lost while the group changed over to its fabric.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// MPI is asked for and cannot be used.
    #[error(transparent)]
    Mpi(#[from] MpiError),
    /// This process is asked to stop.
    #[error("asked to stop while {doing}")]
    Stopped {
        /// What was under way.
        doing: String,
    },
}

/// The leading rank's listening socket, before its followers have come.
#[derive(Debug)]
pub struct Leader {
    listener: TcpListener,
    address: String,
}

impl Leader {
    /// Listens on a port that the kernel chooses.
    ///
    /// # Errors
    /// When the host is not this machine's.
    pub fn bind(ranks: &LeaderRanks) -> Result<Self, GroupError> {
        let (listener, address) = socket::listen(&ranks.host)?;
        Ok(Self { listener, address })
    }

    /// Where the followers find it, `host:port`.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// Waits for the ranks `1..size`, and until they have found each other.
    ///
    /// # Errors
    /// When ranks are missing at the deadline, one that had come is lost, or `stop` is set.
    pub fn gather(
        self,
        size: usize,
        ranks: &LeaderRanks,
        stop: &AtomicBool,
    ) -> Result<TcpGroup, GroupError> {
        let names = RankNames::new(&ranks.hosts);
        let party = Party {
            identity: ranks.identity.clone(),
            secret: ranks.secret.clone(),
            rank: 0,
            size,
            address: self.address.clone(),
            peer_timeout: ranks.peer_timeout,
        };
        let mut waiting = Waiting::new(ranks.join_timeout, stop);
        let mut meeting = Meeting::new(&party, &names, &self.listener);
        meeting.accept(1..size);
        while !meeting.is_complete() {
            let doing = || format!("waiting for {} to join", names.list(&meeting.missing()));
            let slice = waiting.check(doing)?;
            meeting.turn(slice)?;
        }
        let (mut streams, addresses) = meeting.into_met();
        for (rank, stream) in &mut streams {
            let doing = || format!("telling {} where the others are", names.name(*rank));
            socket::write_message(stream, &addresses, &waiting, doing)
                .map_err(|reason| reason.lost(names.name(*rank), doing()))?;
        }
        collect_ready(&mut streams, &names, &mut waiting)?;
        Ok(group(0, size, streams, names, ranks.peer_timeout))
    }
}

/// Joins the group of `spec.leader`.
///
/// # Errors
/// When the leader or another rank is not reached by the deadline, turns this one away or is lost, or `stop` is set.
pub fn join(spec: &FollowerSpec, stop: &AtomicBool) -> Result<TcpGroup, GroupError> {
    if !(1..spec.size).contains(&spec.rank) {
        return Err(GroupError::Facts(format!(
            "rank {} does not follow in a group of {}",
            spec.rank, spec.size
        )));
    }
    let secret =
        Secret::from_hex(&spec.secret).map_err(|error| GroupError::Facts(error.to_string()))?;
    let names = RankNames::new(&spec.hosts);
    let (listener, address) = socket::listen(&spec.host)?;
    let party = Party {
        identity: spec.identity.clone(),
        secret,
        rank: spec.rank,
        size: spec.size,
        address,
        peer_timeout: Duration::from_millis(spec.peer_timeout_ms),
    };
    let mut waiting = Waiting::new(Duration::from_millis(spec.join_timeout_ms), stop);
    let mut meeting = Meeting::new(&party, &names, &listener);
    meeting.connect(0, spec.leader.clone());
    while !meeting.is_complete() {
        let doing = || {
            let trouble = meeting.trouble().unwrap_or("it does not answer");
            let leader = names.name(0);
            format!("waiting for {leader} at {}: {trouble}", spec.leader)
        };
        let slice = waiting.check(doing)?;
        meeting.turn(slice)?;
    }
    let (mut met, _) = meeting.into_met();
    let (_, mut leader) = met.pop_first().expect("the leader was met");
    let roster = hear_roster(&mut leader, spec, &names, &mut waiting)?;

    let mut meeting = Meeting::new(&party, &names, &listener);
    meeting.accept(spec.rank + 1..spec.size);
    for (rank, address) in roster.into_iter().enumerate().take(spec.rank).skip(1) {
        meeting.connect(rank, address);
    }
    meeting.watch(&leader);
    let meshed = loop {
        if meeting.is_complete() {
            break Ok(meeting.into_met().0);
        }
        let doing = || format!("connecting with {}", names.list(&meeting.missing()));
        if let Err(error) = waiting.check(doing).and_then(|slice| meeting.turn(slice)) {
            break Err(error);
        }
    };
    let word = meshed
        .as_ref()
        .map(|_| Vec::new())
        .unwrap_or_else(|error| vec![error.to_string()]);
    let doing = || "telling the leader how joining went".to_owned();
    let told = socket::write_message(&mut leader, &word, &waiting, doing);
    let mut streams = meshed?;
    told.map_err(|reason| reason.lost(names.name(0), doing()))?;
    streams.insert(0, leader);
    Ok(group(
        spec.rank,
        spec.size,
        streams,
        names,
        party.peer_timeout,
    ))
}

/// Where every rank listens, from the leader.
fn hear_roster(
    leader: &mut TcpStream,
    spec: &FollowerSpec,
    names: &RankNames,
    waiting: &mut Waiting<'_>,
) -> Result<Vec<String>, GroupError> {
    let doing = || format!("waiting for {} to gather all ranks", names.name(0));
    while !socket::readable(leader, waiting.check(doing)?) {}
    let roster = socket::read_message(leader, waiting, doing)
        .map_err(|reason| reason.lost(names.name(0), doing()))?;
    if roster.len() != spec.size {
        return Err(GroupError::Facts(format!(
            "the leader knows {} ranks, this one was told {}",
            roster.len(),
            spec.size
        )));
    }
    Ok(roster)
}

/// Waits until every follower has its connections.
fn collect_ready(
    streams: &mut BTreeMap<usize, TcpStream>,
    names: &RankNames,
    waiting: &mut Waiting<'_>,
) -> Result<(), GroupError> {
    let mut missing: BTreeSet<usize> = streams.keys().copied().collect();
    while !missing.is_empty() {
        let doing = || {
            let missing: Vec<usize> = missing.iter().copied().collect();
            format!("waiting for {} to find the others", names.list(&missing))
        };
        let slice = waiting.check(doing)?;
        let waited = streams.iter().filter(|(rank, _)| missing.contains(rank));
        for rank in socket::readable_ones(waited, slice) {
            let stream = streams.get_mut(&rank).expect("it was waited for");
            let doing = || format!("waiting for {} to find the others", names.name(rank));
            let word = socket::read_message(stream, waiting, doing)
                .map_err(|reason| reason.lost(names.name(rank), doing()))?;
            if let Some(reason) = word.into_iter().next() {
                return Err(GroupError::Failed {
                    peer: names.name(rank),
                    reason,
                });
            }
            missing.remove(&rank);
        }
    }
    Ok(())
}

fn group(
    rank: usize,
    size: usize,
    mut streams: BTreeMap<usize, TcpStream>,
    names: RankNames,
    peer_timeout: Duration,
) -> TcpGroup {
    let streams = (0..size).map(|peer| streams.remove(&peer)).collect();
    TcpGroup::new(rank, streams, names, peer_timeout)
}

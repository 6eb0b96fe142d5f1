//! What the ranks of one instance say to each other: sums over tensor-parallel ranks, bytes between pipeline stages,
//! and one message from rank 0 to all. Ranks are numbered `pp * TP + tp` (COMPAT.md §13.3), rank 0 leads. GPUs that have joined sum
//! and hand over rows by themselves (`backend/cuda/ranks.rs`); what their ranks say here is all the rest.
//!
//! Invariant: a sum is taken in the order of the ranks, whatever the message size, so every rank gets the same bits and
//! a row's result does not depend on the rows beside it. Every call has a deadline and names the peer that missed it.

use std::fmt::Debug;
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

mod doing;
pub mod mpi;
mod sum;
pub mod tcp;

#[cfg(test)]
mod conformance;

/// One rank's end of an instance's group. All ranks make the same calls in the same order.
pub trait Collective: Debug + Send {
    /// This rank, `0..size`.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// `tcp`, `mpi`, for logs.
    fn name(&self) -> &'static str;

    /// Sums elementwise over `members`, which contain this rank, in rank order; all of them get the same bits.
    ///
    /// # Errors
    /// When a peer is lost or does not answer in time.
    fn all_reduce_sum(
        &mut self,
        members: Range<usize>,
        values: &mut [f32],
    ) -> Result<(), CollectiveError>;

    /// Sends one message to another rank. May return before the peer has it.
    ///
    /// # Errors
    /// When the peer is lost or does not take it in time.
    fn send(&mut self, to: usize, message: &[u8]) -> Result<(), CollectiveError>;

    /// The next message of a rank, in the order in which they were sent; replaces `message`.
    ///
    /// # Errors
    /// When the peer is lost or sends nothing in time.
    fn receive(&mut self, from: usize, message: &mut Vec<u8>) -> Result<(), CollectiveError>;

    /// Gives rank 0's message to all ranks: one message to each of them.
    ///
    /// # Errors
    /// When a peer is lost or does not answer in time.
    fn broadcast(&mut self, message: &mut Vec<u8>) -> Result<(), CollectiveError>;

    /// How long a rank may be silent while it is waited for.
    fn peer_timeout(&self) -> Duration;

    /// A connection to each other rank whose end tells that it is gone; none where a loss shows otherwise.
    fn lifelines(&self) -> Vec<Lifeline> {
        Vec::new()
    }
}

/// Gives what each rank says to all of them, in the order of the ranks.
pub(crate) fn tell_all(
    collective: &mut dyn Collective,
    own: &[u8],
) -> Result<Vec<Vec<u8>>, CollectiveError> {
    let mut message = Vec::new();
    if collective.rank() > 0 {
        collective.send(0, own)?;
        collective.broadcast(&mut message)?;
    } else {
        let mut said = vec![own.to_vec()];
        for rank in 1..collective.size() {
            collective.receive(rank, &mut message)?;
            said.push(message.clone());
        }
        message = serde_json::to_vec(&said).expect("plain data serialises");
        collective.broadcast(&mut message)?;
    }
    let nonsense = |reason: String| CollectiveError::Protocol {
        peer: "rank 0".to_owned(),
        doing: "telling what all ranks say".to_owned(),
        reason,
    };
    let said: Vec<Vec<u8>> =
        serde_json::from_slice(&message).map_err(|error| nonsense(error.to_string()))?;
    match said.len() == collective.size() {
        true => Ok(said),
        false => Err(nonsense(format!("{} ranks said something", said.len()))),
    }
}

/// A connection that is only looked at: whether the rank at its other end has closed it.
#[derive(Debug)]
pub struct Lifeline {
    peer: String,
    stream: TcpStream,
}

impl Lifeline {
    /// To `peer`, such as `rank 3 (node2)`.
    #[must_use]
    pub const fn new(peer: String, stream: TcpStream) -> Self {
        Self { peer, stream }
    }

    /// `rank 3 (node2)`.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether the other end is closed. What was sent before may still be unread.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        // Asked for nothing but the peer's end, it tells of that and of errors.
        let end = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);
        let mut fds = [PollFd::new(self.stream.as_fd(), end)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|happened| happened > 0)
    }
}

/// How many ranks a message names.
const NAMED_MAX: usize = 16;

/// How the ranks are named in messages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RankNames {
    hosts: Vec<String>,
}

impl RankNames {
    /// With one host name a rank, or none.
    #[must_use]
    pub fn new(hosts: &[String]) -> Self {
        Self {
            hosts: hosts.to_vec(),
        }
    }

    /// `rank 3 (node2)`.
    #[must_use]
    pub fn name(&self, rank: usize) -> String {
        match self.hosts.get(rank) {
            Some(host) if !host.is_empty() => format!("rank {rank} ({host})"),
            Some(_) | None => format!("rank {rank}"),
        }
    }

    /// All of these, the first 16 by name.
    #[must_use]
    pub fn list(&self, ranks: &[usize]) -> String {
        let mut text = ranks
            .iter()
            .take(NAMED_MAX)
            .map(|rank| self.name(*rank))
            .collect::<Vec<_>>()
            .join(", ");
        if let Some(more) = ranks.len().checked_sub(NAMED_MAX).filter(|more| *more > 0) {
            text.push_str(&format!(" and {more} more"));
        }
        text
    }
}

/// What ended a group. There is no going on after it: the instance ends, and its launcher starts it again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// The peer's process or machine is gone.
    #[error("lost {peer} while {doing}: {reason}")]
    Lost {
        /// `rank 3 (node2)`.
        peer: String,
        /// What was under way, such as `summing 4096 values`.
        doing: String,
        /// What the system said.
        reason: String,
    },
    /// The peer is silent.
    #[error("{peer} did not answer within {waited_ms} ms while {doing}")]
    TimedOut {
        /// `rank 3 (node2)`.
        peer: String,
        /// What was under way.
        doing: String,
        /// How long it was waited for.
        waited_ms: u128,
    },
    /// The peer speaks out of turn: a bug, or a foreign process.
    #[error("{peer} sent what was not expected while {doing}: {reason}")]
    Protocol {
        /// `rank 3 (node2)`.
        peer: String,
        /// What was under way.
        doing: String,
        /// What is wrong with it.
        reason: String,
    },
}

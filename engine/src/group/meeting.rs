//! Where ranks meet: connections come in and go out, and each is proved, all at once and none blocking another.
//!
//! Invariant: whoever is among those met has proved the secret and is the rank that it says, once.

use std::collections::BTreeMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::handshake::{Claim, Failure, Handshake, Party, Step};
use super::{GroupError, socket};
use crate::collective::RankNames;

/// How long a connection may take to prove itself.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Unproved connections at most; the oldest makes room.
const UNPROVED_MAX: usize = 256;

/// Between two attempts to connect to a rank that isn't there yet.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// One round of connections, until all expected ranks are met.
#[derive(Debug)]
pub(super) struct Meeting<'a> {
    party: &'a Party,
    names: &'a RankNames,
    listener: &'a TcpListener,
    /// Who may connect to this rank.
    expected: Range<usize>,
    unproved: Vec<Handshake>,
    /// To whom this rank connects.
    calls: Vec<Call>,
    met: BTreeMap<usize, (TcpStream, String)>,
    /// A connection that must not end meanwhile: the leader's.
    watched: Option<&'a TcpStream>,
    handshake_timeout: Duration,
}

/// A connection to another rank.
#[derive(Debug)]
struct Call {
    rank: usize,
    address: String,
    handshake: Option<Handshake>,
    next_attempt: Instant,
    /// What went wrong last.
    trouble: Option<String>,
}

impl<'a> Meeting<'a> {
    pub(super) fn new(party: &'a Party, names: &'a RankNames, listener: &'a TcpListener) -> Self {
        Self {
            party,
            names,
            listener,
            expected: 0..0,
            unproved: Vec::new(),
            calls: Vec::new(),
            met: BTreeMap::new(),
            watched: None,
            handshake_timeout: HANDSHAKE_TIMEOUT,
        }
    }

    /// Lets these ranks come.
    pub(super) fn accept(&mut self, ranks: Range<usize>) {
        self.expected = ranks;
    }

    /// Goes to a rank.
    pub(super) fn connect(&mut self, rank: usize, address: String) {
        self.calls.push(Call {
            rank,
            address,
            handshake: None,
            next_attempt: Instant::now(),
            trouble: None,
        });
    }

    /// Ends the meeting when the leader goes.
    pub(super) fn watch(&mut self, leader: &'a TcpStream) {
        self.watched = Some(leader);
    }

    /// Another limit than the usual for unproved connections.
    #[cfg(test)]
    pub(super) fn with_handshake_timeout(mut self, timeout: Duration) -> Self {
        self.handshake_timeout = timeout;
        self
    }

    pub(super) fn is_complete(&self) -> bool {
        self.calls.is_empty()
            && self
                .expected
                .clone()
                .all(|rank| self.met.contains_key(&rank))
    }

    /// Who is not here yet.
    pub(super) fn missing(&self) -> Vec<usize> {
        let called = self.calls.iter().map(|call| call.rank);
        let expected = self.expected.clone();
        let absent = expected.filter(|rank| !self.met.contains_key(rank));
        called.chain(absent).collect()
    }

    /// What went wrong last with a rank that this one connects to.
    pub(super) fn trouble(&self) -> Option<&str> {
        self.calls.iter().find_map(|call| call.trouble.as_deref())
    }

    /// The connections by rank, and where all ranks listen, this one's own address first.
    pub(super) fn into_met(self) -> (BTreeMap<usize, TcpStream>, Vec<String>) {
        let mut addresses = vec![self.party.address.clone()];
        let mut streams = BTreeMap::new();
        for (rank, (stream, address)) in self.met {
            streams.insert(rank, stream);
            addresses.push(address);
        }
        (streams, addresses)
    }

    /// Waits for a short while, and goes on with all that happened.
    pub(super) fn turn(&mut self, slice: Duration) -> Result<(), GroupError> {
        self.dial();
        self.wait(slice);
        self.look_after_the_met()?;
        self.let_in()?;
        self.prove_incoming();
        self.prove_calls()
    }

    /// Starts the connections that are due.
    fn dial(&mut self) {
        let now = Instant::now();
        for call in &mut self.calls {
            if call.handshake.is_some() || now < call.next_attempt {
                continue;
            }
            let claim = Claim {
                identity: self.party.identity.clone(),
                from: self.party.rank,
                to: call.rank,
                size: self.party.size,
                address: self.party.address.clone(),
            };
            let opened = socket::connect(&call.address).and_then(|stream| {
                socket::tune(&stream, self.party.peer_timeout)?;
                Ok(stream)
            });
            match opened {
                Ok(stream) => {
                    // The other side may come to it late; the join's own limit holds.
                    let deadline = now + FAR_AWAY;
                    call.handshake = Some(Handshake::connect(stream, &claim, deadline));
                }
                Err(error) => call.retry(&error.to_string()),
            }
        }
    }

    fn wait(&self, slice: Duration) {
        let streams = self
            .calls
            .iter()
            .filter_map(|call| call.handshake.as_ref())
            .chain(&self.unproved)
            .map(|handshake| (handshake.stream().as_fd(), PollFlags::POLLIN));
        let met = self.met.values().map(|(stream, _)| stream);
        let met = met
            .chain(self.watched)
            .map(|stream| (stream.as_fd(), socket::closed()));
        let door = (self.listener.as_fd(), PollFlags::POLLIN);
        let door = (!self.expected.is_empty()).then_some(door);
        let retry = self.calls.iter().any(|call| call.handshake.is_none());
        let slice = if retry { slice.min(RETRY_AFTER) } else { slice };
        socket::wait(streams.chain(met).chain(door), slice);
    }

    /// A rank that had come and is gone ends the meeting: the group will never be whole.
    fn look_after_the_met(&self) -> Result<(), GroupError> {
        let met = self.met.iter().map(|(rank, (stream, _))| (*rank, stream));
        let leader = self.watched.map(|stream| (0, stream));
        let gone = met
            .chain(leader)
            .find(|(_, stream)| socket::is_closed(stream));
        match gone {
            None => Ok(()),
            Some((rank, _)) => Err(GroupError::Lost {
                peer: self.names.name(rank),
                doing: format!("waiting for {}", self.names.list(&self.missing())),
                reason: "it closed its connection".to_owned(),
            }),
        }
    }

    fn let_in(&mut self) -> Result<(), GroupError> {
        if self.expected.is_empty() {
            return Ok(());
        }
        loop {
            let (stream, from) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(GroupError::Bind {
                        host: self.party.address.clone(),
                        reason: format!("no connection can be accepted: {error}"),
                    });
                }
            };
            let deadline = Instant::now() + self.handshake_timeout;
            let greeted = socket::tune(&stream, self.party.peer_timeout)
                .and_then(|()| Handshake::accept(stream, deadline));
            match greeted {
                Ok(handshake) => {
                    if self.unproved.len() == UNPROVED_MAX {
                        self.unproved.remove(0);
                    }
                    self.unproved.push(handshake);
                }
                Err(error) => tracing::debug!(%from, %error, "a connection went away"),
            }
        }
    }

    /// Goes on with those who came, and turns away those who don't belong here.
    fn prove_incoming(&mut self) {
        for mut handshake in std::mem::take(&mut self.unproved) {
            let mut judge = |claim: &Claim| self.judge(claim);
            match handshake.step(&self.party.secret, &mut judge) {
                Step::Pending => self.unproved.push(handshake),
                Step::Done(claim) => {
                    let came = (handshake.into_stream(), claim.address);
                    self.met.insert(claim.from, came);
                }
                Step::Failed(failure) => {
                    let from = handshake.stream().peer_addr().ok();
                    turned_away(from.map(|from| from.to_string()), failure);
                }
            }
        }
    }

    fn judge(&self, claim: &Claim) -> Result<(), String> {
        let party = self.party;
        if claim.identity != party.identity {
            return Err(format!(
                "this is `{}`, not `{}`",
                party.identity, claim.identity
            ));
        }
        if claim.size != party.size {
            let (ours, theirs) = (party.size, claim.size);
            return Err(format!("this group has {ours} ranks, not {theirs}"));
        }
        if claim.to != party.rank || !self.expected.contains(&claim.from) {
            let (from, to, own) = (claim.from, claim.to, party.rank);
            return Err(format!(
                "rank {own} does not wait for rank {from} that looks for rank {to}"
            ));
        }
        if self.met.contains_key(&claim.from) {
            return Err(format!("rank {} is there already", claim.from));
        }
        Ok(())
    }

    /// Goes on with the connections that this rank made.
    fn prove_calls(&mut self) -> Result<(), GroupError> {
        let mut nobody = |_: &Claim| Err("this side connects".to_owned());
        for mut call in std::mem::take(&mut self.calls) {
            let Some(mut handshake) = call.handshake.take() else {
                self.calls.push(call);
                continue;
            };
            let peer = self.names.name(call.rank);
            match handshake.step(&self.party.secret, &mut nobody) {
                Step::Pending => {
                    call.handshake = Some(handshake);
                    self.calls.push(call);
                }
                Step::Done(_) => {
                    let met = (handshake.into_stream(), call.address);
                    self.met.insert(call.rank, met);
                }
                Step::Failed(Failure::Broken(reason)) => {
                    call.retry(&reason);
                    self.calls.push(call);
                }
                Step::Failed(Failure::Foreign(reason)) => {
                    return Err(GroupError::Foreign {
                        peer,
                        address: call.address,
                        reason,
                    });
                }
                Step::Failed(Failure::Refused(reason)) => {
                    return Err(GroupError::Refused {
                        peer,
                        address: call.address,
                        reason,
                    });
                }
            }
        }
        Ok(())
    }
}

/// Later than any join's limit.
const FAR_AWAY: Duration = Duration::from_secs(24 * 60 * 60);

impl Call {
    fn retry(&mut self, trouble: &str) {
        self.trouble = Some(trouble.to_owned());
        self.next_attempt = Instant::now() + RETRY_AFTER;
    }
}

/// A port scan is a fact of life; one that knows the secret and still doesn't fit is a mistake that someone must see.
fn turned_away(from: Option<String>, failure: Failure) {
    let from = from.unwrap_or_else(|| "a peer that is gone".to_owned());
    match failure {
        Failure::Broken(reason) => tracing::debug!(from, reason, "a connection proved nothing"),
        Failure::Foreign(reason) | Failure::Refused(reason) => {
            tracing::warn!(
                from,
                reason,
                "turned a connection away that is no rank of ours"
            );
        }
    }
}

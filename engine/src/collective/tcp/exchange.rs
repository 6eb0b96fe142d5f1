//! The one loop in which a rank waits for others: it writes and reads on every link that a call needs, all at once.
//!
//! Two ranks that send each other megabytes therefore never wait for each other, and what comes for a later call is
//! taken in meanwhile. A peer that moves nothing for `peer_timeout` ends the call, with its name.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::link::{Fault, Link, Receiving, Sending};
use crate::collective::doing::Doing;
use crate::collective::{CollectiveError, Lifeline, RankNames};

/// The links of a rank to all others.
#[derive(Debug)]
pub(super) struct Links {
    /// By rank; none to itself.
    links: Vec<Option<Link>>,
    names: RankNames,
    peer_timeout: Duration,
    /// Why nothing goes any more.
    over: Option<CollectiveError>,
}

/// Frames that one call sends and waits for; at most one each way per link.
struct Call<'a> {
    sends: Vec<(Sending<'a>, Instant)>,
    receives: Vec<(Receiving<'a>, Instant)>,
}

impl Links {
    pub(super) fn new(links: Vec<Option<Link>>, names: RankNames, peer_timeout: Duration) -> Self {
        Self {
            links,
            names,
            peer_timeout,
            over: None,
        }
    }

    pub(super) fn size(&self) -> usize {
        self.links.len()
    }

    pub(super) const fn peer_timeout(&self) -> Duration {
        self.peer_timeout
    }

    /// Every connection once more, to be looked at. One that cannot be had twice is missing.
    pub(super) fn lifelines(&self) -> Vec<Lifeline> {
        let links = self.links.iter().enumerate();
        let links = links.filter_map(|(rank, link)| {
            let stream = link.as_ref()?.stream().try_clone().ok()?;
            Some(Lifeline::new(self.names.name(rank), stream))
        });
        links.collect()
    }

    /// Sends and receives all of these frames.
    pub(super) fn exchange(
        &mut self,
        sends: Vec<Sending<'_>>,
        receives: Vec<Receiving<'_>>,
        doing: Doing,
    ) -> Result<(), CollectiveError> {
        if let Some(over) = &self.over {
            return Err(over.clone());
        }
        let start = Instant::now();
        let mut call = Call {
            sends: sends.into_iter().map(|send| (send, start)).collect(),
            receives: receives
                .into_iter()
                .map(|receive| (receive, start))
                .collect(),
        };
        loop {
            let moved = self
                .advance(&mut call)
                .map_err(|(rank, fault)| self.end(self.told(rank, fault, doing)))?;
            call.sends.retain(|(send, _)| !send.is_done());
            call.receives.retain(|(receive, _)| !receive.is_done());
            if call.sends.is_empty() && call.receives.is_empty() {
                return Ok(());
            }
            if !moved {
                self.wait(&call, doing).map_err(|error| self.end(error))?;
            }
        }
    }

    /// Does what can be done without waiting; says whether anything moved.
    fn advance(&mut self, call: &mut Call<'_>) -> Result<bool, (usize, Fault)> {
        let now = Instant::now();
        let mut moved = false;
        for (send, since) in &mut call.sends {
            let rank = send.to;
            if self.link(rank).write(send).map_err(|fault| (rank, fault))? {
                (*since, moved) = (now, true);
            }
        }
        for (receive, since) in &mut call.receives {
            let rank = receive.from;
            if self
                .link(rank)
                .read(receive)
                .map_err(|fault| (rank, fault))?
            {
                (*since, moved) = (now, true);
            }
        }
        Ok(moved)
    }

    fn link(&mut self, rank: usize) -> &mut Link {
        self.links[rank]
            .as_mut()
            .expect("a rank has links to all others and calls name another one")
    }

    /// Sleeps until something can move, or until the first silence is too long.
    fn wait(&mut self, call: &Call<'_>, doing: Doing) -> Result<(), CollectiveError> {
        let now = Instant::now();
        let sends = call.sends.iter().map(|(send, since)| (*since, send.to));
        let receives = call
            .receives
            .iter()
            .map(|(wait, since)| (*since, wait.from));
        let (since, rank) = sends
            .chain(receives)
            .min()
            .expect("a call that waits has something to wait for");
        let silence = now.saturating_duration_since(since);
        let Some(left) = self
            .peer_timeout
            .checked_sub(silence)
            .filter(|left| !left.is_zero())
        else {
            return Err(CollectiveError::TimedOut {
                peer: self.names.name(rank),
                doing: doing.to_string(),
                waited_ms: silence.as_millis(),
            });
        };
        let ready = self.poll(call, left).map_err(|errno| {
            let fault = Fault::Lost(format!("cannot wait: {errno}"));
            self.told(rank, fault, doing)
        })?;
        for (rank, events) in ready {
            let awaited = call.receives.iter().any(|(wait, _)| wait.from == rank);
            if !awaited && events.intersects(!PollFlags::POLLOUT) {
                // A fault shows when the link is needed.
                drop(self.link(rank).read_ahead());
            }
        }
        Ok(())
    }

    /// The links on which something happened, and what.
    fn poll(&self, call: &Call<'_>, left: Duration) -> Result<Vec<(usize, PollFlags)>, Errno> {
        let mut ranks = Vec::with_capacity(self.links.len());
        let mut waits = Vec::with_capacity(self.links.len());
        for (rank, link) in self.links.iter().enumerate() {
            let Some(link) = link else { continue };
            let mut events = PollFlags::empty();
            if call.sends.iter().any(|(send, _)| send.to == rank) {
                events |= PollFlags::POLLOUT;
            }
            if link.has_room() || call.receives.iter().any(|(wait, _)| wait.from == rank) {
                events |= PollFlags::POLLIN;
            }
            if !events.is_empty() {
                ranks.push(rank);
                waits.push(PollFd::new(link.stream().as_fd(), events));
            }
        }
        // Rounded up, so that the last fraction of a millisecond is no busy loop.
        let millis = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
        match poll(&mut waits, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        let ready = ranks
            .into_iter()
            .zip(&waits)
            .filter_map(|(rank, wait)| Some((rank, wait.revents()?)))
            .filter(|(_, events)| !events.is_empty());
        Ok(ready.collect())
    }

    fn told(&self, rank: usize, fault: Fault, doing: Doing) -> CollectiveError {
        let (peer, doing) = (self.names.name(rank), doing.to_string());
        match fault {
            Fault::Lost(reason) => CollectiveError::Lost {
                peer,
                doing,
                reason,
            },
            Fault::GaveUp(cause) => CollectiveError::Lost {
                peer,
                doing,
                reason: format!("{GAVE_UP}{cause}"),
            },
            Fault::Protocol(reason) => CollectiveError::Protocol {
                peer,
                doing,
                reason,
            },
        }
    }

    /// Ends the group and tells the others why, so that every rank reports the first cause.
    fn end(&mut self, error: CollectiveError) -> CollectiveError {
        let text = error.to_string();
        let cause = text
            .rfind(GAVE_UP)
            .map_or(text.as_str(), |at| &text[at + GAVE_UP.len()..]);
        for link in self.links.iter_mut().flatten() {
            link.say_farewell(cause);
        }
        self.over = Some(error.clone());
        error
    }
}

/// Marks the cause that a peer gave, so that it is passed on without what it was wrapped in.
const GAVE_UP: &str = "it gave up: ";

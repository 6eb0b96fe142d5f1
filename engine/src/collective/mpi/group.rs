//! A group of MPI ranks as a [`Collective`]: every call is started, asked about and given up at its deadline.
//!
//! Messages are sent from a copy of their own and move on by themselves, so no sender waits for its receiver.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::flight::{Flight, Patience};
use super::plugin::Group;
use super::watch::Watch;
use crate::collective::doing::Doing;
use crate::collective::sum::{Members, sum_in_order};
use crate::collective::{Collective, CollectiveError, RankNames};

// Tags: what a message is.
const SUM: i32 = 1;
const MESSAGE: i32 = 2;
const BROADCAST: i32 = 3;

/// A message's bytes at most.
const MESSAGE_BYTES_MAX: usize = 1 << 30;

/// One rank's end of a group over MPI.
#[derive(Debug)]
pub struct MpiGroup {
    watch: Arc<Watch>,
    group: Group,
    names: RankNames,
    peer_timeout: Duration,
    /// Memory for parts of sums, to be used again.
    spare: Vec<Vec<u8>>,
    /// The other ranks' values of a sum.
    theirs: Vec<f32>,
}

impl MpiGroup {
    pub(super) fn new(
        watch: Arc<Watch>,
        group: Group,
        names: RankNames,
        peer_timeout: Duration,
    ) -> Self {
        Self {
            watch,
            group,
            names,
            peer_timeout,
            spare: Vec::new(),
            theirs: Vec::new(),
        }
    }

    /// Sends a part of the values to each, and receives one from each; gives these in the same order.
    fn swap(
        &mut self,
        sends: &[(usize, &[f32])],
        receives: &[(usize, usize)],
        doing: Doing,
    ) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let mut incoming = Vec::with_capacity(receives.len());
        for &(from, count) in receives {
            let mut buffer = self.spare.pop().unwrap_or_default();
            buffer.resize(size_of::<f32>() * count, 0);
            incoming.push((from, self.start_receive(from, SUM, buffer, doing)?));
        }
        let mut outgoing = Vec::with_capacity(sends.len());
        for &(to, values) in sends {
            let mut buffer = self.spare.pop().unwrap_or_default();
            buffer.clear();
            buffer.extend_from_slice(bytemuck::cast_slice(values));
            outgoing.push((to, self.start_send(to, SUM, Arc::new(buffer), doing)?));
        }
        self.settle(incoming.iter_mut().chain(&mut outgoing), doing)?;
        for (_, flight) in outgoing {
            self.spare.push(flight.into_bytes());
        }
        let mut parts = Vec::with_capacity(incoming.len());
        for ((from, flight), (_, count)) in incoming.into_iter().zip(receives) {
            let (came, due) = (flight.received(), size_of::<f32>() * count);
            if came != due {
                let reason = format!("a part of a sum of {came} bytes where {due} were due");
                return Err(self.protocol(from, doing, reason));
            }
            parts.push(flight.into_bytes());
        }
        Ok(parts)
    }

    fn sum_whole(&mut self, members: &Members, values: &mut [f32]) -> Result<(), CollectiveError> {
        let (others, count) = (members.others(), values.len());
        let sends: Vec<_> = others.iter().map(|&to| (to, &values[..])).collect();
        let receives: Vec<_> = others.iter().map(|&from| (from, count)).collect();
        let parts = self.swap(&sends, &receives, Doing::Summing(count))?;
        self.add_up(members, values, parts);
        Ok(())
    }

    fn sum_in_parts(
        &mut self,
        members: &Members,
        values: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let (others, count) = (members.others(), values.len());
        let own = members.own_part(count);
        let sends: Vec<_> = others
            .iter()
            .map(|&to| (to, &values[members.part(to, count)]))
            .collect();
        let receives: Vec<_> = others.iter().map(|&from| (from, own.len())).collect();
        let parts = self.swap(&sends, &receives, Doing::Summing(count))?;
        self.add_up(members, &mut values[own.clone()], parts);

        let sends: Vec<_> = others
            .iter()
            .map(|&to| (to, &values[own.clone()]))
            .collect();
        let receives: Vec<_> = others
            .iter()
            .map(|&from| (from, members.part(from, count).len()))
            .collect();
        let parts = self.swap(&sends, &receives, Doing::Summing(count))?;
        for (&from, part) in others.iter().zip(parts) {
            bytemuck::cast_slice_mut(&mut values[members.part(from, count)]).copy_from_slice(&part);
            self.spare.push(part);
        }
        Ok(())
    }

    fn add_up(&mut self, members: &Members, values: &mut [f32], parts: Vec<Vec<u8>>) {
        self.theirs.resize(parts.len() * values.len(), 0.0);
        for (place, part) in self.theirs.chunks_exact_mut(values.len()).zip(parts) {
            bytemuck::cast_slice_mut(place).copy_from_slice(&part);
            self.spare.push(part);
        }
        sum_in_order(members.index(), values, &mut self.theirs);
    }

    fn start_send(
        &self,
        to: usize,
        tag: i32,
        bytes: Arc<Vec<u8>>,
        doing: Doing,
    ) -> Result<Flight, CollectiveError> {
        Flight::send(self.watch.plugin(), &self.group, to, tag, bytes)
            .map_err(|reason| self.lost(to, doing, reason))
    }

    fn start_receive(
        &self,
        from: usize,
        tag: i32,
        bytes: Vec<u8>,
        doing: Doing,
    ) -> Result<Flight, CollectiveError> {
        Flight::receive(self.watch.plugin(), &self.group, from, tag, bytes)
            .map_err(|reason| self.lost(from, doing, reason))
    }

    /// Waits until all of these are done.
    fn settle<'a>(
        &self,
        flights: impl Iterator<Item = &'a mut (usize, Flight)>,
        doing: Doing,
    ) -> Result<(), CollectiveError> {
        let guard = self.watch.guard(self.peer_timeout, doing);
        let mut open: Vec<&mut (usize, Flight)> = flights.collect();
        let mut patience = Patience::new();
        let mut since = Instant::now();
        loop {
            let before = open.len();
            let mut failed = None;
            open.retain_mut(|(rank, flight)| match flight.test() {
                Ok(done) => !done,
                Err(reason) => {
                    failed = Some((*rank, reason));
                    false
                }
            });
            if let Some((rank, reason)) = failed {
                return Err(self.lost(rank, doing, reason));
            }
            let Some((rank, _)) = open.first() else {
                return Ok(());
            };
            if open.len() < before {
                since = Instant::now();
                patience = Patience::new();
                guard.renew(self.peer_timeout);
            } else if since.elapsed() >= self.peer_timeout {
                return Err(self.timed_out(*rank, doing, since));
            }
            patience.pause();
        }
    }

    /// Waits for a message, and receives it.
    fn take(
        &mut self,
        from: usize,
        tag: i32,
        message: &mut Vec<u8>,
        doing: Doing,
    ) -> Result<(), CollectiveError> {
        self.watch.check()?;
        let guard = self.watch.guard(self.peer_timeout, doing);
        let since = Instant::now();
        let patience = Patience::new();
        let length = loop {
            let probed = self.watch.plugin().probe(&self.group, from, tag);
            match probed.map_err(|reason| self.lost(from, doing, reason))? {
                Some(length) => break length,
                None if since.elapsed() >= self.peer_timeout => {
                    return Err(self.timed_out(from, doing, since));
                }
                None => patience.pause(),
            }
        };
        drop(guard);
        let mut bytes = std::mem::take(message);
        bytes.clear();
        bytes.resize(length, 0);
        let mut flight = (from, self.start_receive(from, tag, bytes, doing)?);
        self.settle(std::iter::once(&mut flight), doing)?;
        *message = flight.1.into_bytes();
        Ok(())
    }

    /// Leaves a message to the watch, which sees to it that it goes.
    fn leave(
        &mut self,
        to: usize,
        tag: i32,
        bytes: &Arc<Vec<u8>>,
        doing: Doing,
    ) -> Result<(), CollectiveError> {
        self.watch.check()?;
        if bytes.len() > MESSAGE_BYTES_MAX {
            let reason = format!("{} bytes are over the limit", bytes.len());
            return Err(self.protocol(to, doing, reason));
        }
        let mut flight = self.start_send(to, tag, Arc::clone(bytes), doing)?;
        let done = flight
            .test()
            .map_err(|reason| self.lost(to, doing, reason))?;
        if done {
            return Ok(());
        }
        let deadline = Instant::now() + self.peer_timeout;
        let silent = self.timed_out_error(to, doing, self.peer_timeout);
        self.watch.leave(flight, bytes.len(), deadline, silent)
    }

    fn lost(&self, rank: usize, doing: Doing, reason: String) -> CollectiveError {
        self.watch.fail(CollectiveError::Lost {
            peer: self.names.name(rank),
            doing: doing.to_string(),
            reason,
        })
    }

    fn protocol(&self, rank: usize, doing: Doing, reason: String) -> CollectiveError {
        self.watch.fail(CollectiveError::Protocol {
            peer: self.names.name(rank),
            doing: doing.to_string(),
            reason,
        })
    }

    fn timed_out(&self, rank: usize, doing: Doing, since: Instant) -> CollectiveError {
        let error = self.timed_out_error(rank, doing, since.elapsed());
        self.watch.fail(error)
    }

    fn timed_out_error(&self, rank: usize, doing: Doing, waited: Duration) -> CollectiveError {
        CollectiveError::TimedOut {
            peer: self.names.name(rank),
            doing: doing.to_string(),
            waited_ms: waited.as_millis(),
        }
    }
}

impl Collective for MpiGroup {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn name(&self) -> &'static str {
        "mpi"
    }

    fn all_reduce_sum(
        &mut self,
        members: Range<usize>,
        values: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let Some(members) = Members::new(self.rank(), self.size(), members) else {
            return Ok(());
        };
        self.watch.check()?;
        for piece in values.chunks_mut(members.piece(values.len())) {
            if members.in_parts(piece.len()) {
                self.sum_in_parts(&members, piece)?;
            } else {
                self.sum_whole(&members, piece)?;
            }
        }
        Ok(())
    }

    fn peer_timeout(&self) -> Duration {
        self.peer_timeout
    }

    fn send(&mut self, to: usize, message: &[u8]) -> Result<(), CollectiveError> {
        let bytes = Arc::new(message.to_vec());
        self.leave(to, MESSAGE, &bytes, Doing::Sending(message.len()))
    }

    fn receive(&mut self, from: usize, message: &mut Vec<u8>) -> Result<(), CollectiveError> {
        self.take(from, MESSAGE, message, Doing::Receiving)
    }

    fn broadcast(&mut self, message: &mut Vec<u8>) -> Result<(), CollectiveError> {
        if self.rank() != 0 {
            return self.take(0, BROADCAST, message, Doing::Listening);
        }
        let bytes = Arc::new(message.clone());
        (1..self.size())
            .try_for_each(|to| self.leave(to, BROADCAST, &bytes, Doing::Telling(message.len())))
    }
}

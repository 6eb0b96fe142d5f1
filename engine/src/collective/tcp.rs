//! Ranks that talk over our own connections, one between each pair.
//!
//! One thread owns a group; there are no others. What a call needs moves on all its connections at once. Values travel as
//! the machine has them: all ranks are little endian.

use std::net::TcpStream;
use std::ops::Range;
use std::time::Duration;

use super::{Collective, CollectiveError, Lifeline, RankNames};
use crate::collective::doing::Doing;
use crate::collective::sum::{Members, sum_in_order};
use exchange::Links;
use frame::Kind;
use link::{Link, Place, Receiving, Sending};

mod exchange;
mod frame;
mod link;

#[cfg(test)]
mod tests;

const _: () = assert!(cfg!(target_endian = "little"), "values travel as they are");

/// One rank's end of a group over TCP.
#[derive(Debug)]
pub struct TcpGroup {
    rank: usize,
    links: Links,
    /// The other ranks' values of a sum.
    theirs: Vec<f32>,
}

impl TcpGroup {
    /// Takes over connections that don't block, by rank, none to itself.
    pub(crate) fn new(
        rank: usize,
        streams: Vec<Option<TcpStream>>,
        names: RankNames,
        peer_timeout: Duration,
    ) -> Self {
        let links = streams
            .into_iter()
            .map(|stream| stream.map(Link::new))
            .collect();
        Self {
            rank,
            links: Links::new(links, names, peer_timeout),
            theirs: Vec::new(),
        }
    }

    /// Everyone sends all to everyone, and sums.
    fn sum_whole(&mut self, members: &Members, values: &mut [f32]) -> Result<(), CollectiveError> {
        let (others, count) = (members.others(), values.len());
        self.theirs.resize(others.len() * count, 0.0);
        let sends = others
            .iter()
            .map(|&to| Sending::new(to, Kind::Sum, bytemuck::cast_slice(values)))
            .collect();
        let receives = others
            .iter()
            .zip(self.theirs.chunks_exact_mut(count))
            .map(|(&from, part)| into(from, part))
            .collect();
        self.links
            .exchange(sends, receives, Doing::Summing(count))?;
        sum_in_order(members.index(), values, &mut self.theirs);
        Ok(())
    }

    /// Each rank sums its part of the values, and gives the sum to everyone.
    fn sum_in_parts(
        &mut self,
        members: &Members,
        values: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let (others, count) = (members.others(), values.len());
        let own = members.own_part(count);
        self.theirs.resize(others.len() * own.len(), 0.0);
        let sends = others
            .iter()
            .map(|&to| {
                let part = &values[members.part(to, count)];
                Sending::new(to, Kind::Sum, bytemuck::cast_slice(part))
            })
            .collect();
        let receives = others
            .iter()
            .zip(self.theirs.chunks_exact_mut(own.len()))
            .map(|(&from, part)| into(from, part))
            .collect();
        self.links
            .exchange(sends, receives, Doing::Summing(count))?;
        sum_in_order(members.index(), &mut values[own], &mut self.theirs);

        let mut parts = Vec::with_capacity(members.count());
        let mut rest = values;
        for member in members.all() {
            let (part, tail) = rest.split_at_mut(members.part(member, count).len());
            parts.push(part);
            rest = tail;
        }
        let own = parts.remove(members.index());
        let sends = others
            .iter()
            .map(|&to| Sending::new(to, Kind::Sum, bytemuck::cast_slice(own)))
            .collect();
        let receives = others
            .iter()
            .zip(parts)
            .map(|(&from, part)| into(from, part))
            .collect();
        self.links.exchange(sends, receives, Doing::Summing(count))
    }
}

impl Collective for TcpGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.links.size()
    }

    fn name(&self) -> &'static str {
        "tcp"
    }

    fn all_reduce_sum(
        &mut self,
        members: Range<usize>,
        values: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let Some(members) = Members::new(self.rank, self.size(), members) else {
            return Ok(());
        };
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
        self.links.peer_timeout()
    }

    fn lifelines(&self) -> Vec<Lifeline> {
        self.links.lifelines()
    }

    fn send(&mut self, to: usize, message: &[u8]) -> Result<(), CollectiveError> {
        let sends = vec![Sending::new(to, Kind::Message, message)];
        self.links
            .exchange(sends, Vec::new(), Doing::Sending(message.len()))
    }

    fn receive(&mut self, from: usize, message: &mut Vec<u8>) -> Result<(), CollectiveError> {
        let receives = vec![Receiving::new(from, Kind::Message, Place::Any(message))];
        self.links.exchange(Vec::new(), receives, Doing::Receiving)
    }

    fn broadcast(&mut self, message: &mut Vec<u8>) -> Result<(), CollectiveError> {
        if self.rank == 0 {
            let sends = (1..self.size())
                .map(|to| Sending::new(to, Kind::Broadcast, message))
                .collect();
            self.links
                .exchange(sends, Vec::new(), Doing::Telling(message.len()))
        } else {
            let receives = vec![Receiving::new(0, Kind::Broadcast, Place::Any(message))];
            self.links.exchange(Vec::new(), receives, Doing::Listening)
        }
    }
}

fn into(from: usize, part: &mut [f32]) -> Receiving<'_> {
    Receiving::new(
        from,
        Kind::Sum,
        Place::Exact(bytemuck::cast_slice_mut(part)),
    )
}

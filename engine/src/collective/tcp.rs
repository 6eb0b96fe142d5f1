//! Ranks that talk over our own connections, one between each pair.
//!
//! A sum of few values is taken by everyone from everyone's values; of many, each rank sums one part and gives it to
//! all. Either way each element is summed once more in the order of the ranks, so the bits are the same.
//! Values travel as the machine has them: all ranks are little endian.

use std::net::TcpStream;
use std::ops::Range;
use std::time::Duration;

use super::{Collective, CollectiveError, RankNames};
use exchange::{Doing, Links};
use frame::Kind;
use link::{Link, Place, Receiving, Sending};

mod exchange;
mod frame;
mod link;

#[cfg(test)]
mod tests;

const _: () = assert!(cfg!(target_endian = "little"), "values travel as they are");

/// From so many values on, three and more ranks sum in parts.
const PARTS_FROM_VALUES: usize = 16 << 10;

/// What is summed at once; more is cut, which bounds the memory for the peers' values.
const SUM_VALUES_MAX: usize = 4 << 20;

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
    fn sum_whole(
        &mut self,
        members: &Range<usize>,
        values: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let others: Vec<usize> = others(members, self.rank).collect();
        let count = values.len();
        self.theirs.resize(others.len() * count, 0.0);
        let (sends, receives) = (
            others
                .iter()
                .map(|&to| Sending::new(to, Kind::Sum, bytemuck::cast_slice(values)))
                .collect(),
            others
                .iter()
                .zip(self.theirs.chunks_exact_mut(count))
                .map(|(&from, part)| into(from, part))
                .collect(),
        );
        self.links
            .exchange(sends, receives, Doing::Summing(count))?;
        sum_in_order(self.rank - members.start, values, &mut self.theirs);
        Ok(())
    }

    /// Each rank sums its part of the values, and gives the sum to everyone.
    fn sum_in_parts(
        &mut self,
        members: &Range<usize>,
        values: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let count = values.len();
        let doing = Doing::Summing(count);
        let part = |rank: usize| {
            let index = rank - members.start;
            count * index / members.len()..count * (index + 1) / members.len()
        };
        let own = part(self.rank);
        let others: Vec<usize> = others(members, self.rank).collect();
        self.theirs.resize(others.len() * own.len(), 0.0);
        let (sends, receives) = (
            others
                .iter()
                .map(|&to| {
                    let body = bytemuck::cast_slice(&values[part(to)]);
                    Sending::new(to, Kind::Sum, body)
                })
                .collect(),
            others
                .iter()
                .zip(self.theirs.chunks_exact_mut(own.len()))
                .map(|(&from, part)| into(from, part))
                .collect(),
        );
        self.links.exchange(sends, receives, doing)?;
        sum_in_order(
            self.rank - members.start,
            &mut values[own],
            &mut self.theirs,
        );

        let mut rest = values;
        let mut parts = Vec::with_capacity(members.len());
        for rank in members.clone() {
            let (head, tail) = rest.split_at_mut(part(rank).len());
            parts.push(head);
            rest = tail;
        }
        let own = parts.remove(self.rank - members.start);
        let sends = others
            .iter()
            .map(|&to| Sending::new(to, Kind::Sum, bytemuck::cast_slice(own)))
            .collect();
        let receives = others
            .iter()
            .zip(parts)
            .map(|(&from, part)| into(from, part))
            .collect();
        self.links.exchange(sends, receives, doing)
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
        assert!(
            members.contains(&self.rank) && members.end <= self.size(),
            "rank {} of {} cannot sum over {members:?}",
            self.rank,
            self.size()
        );
        if members.len() == 1 {
            return Ok(());
        }
        for values in values.chunks_mut(SUM_VALUES_MAX) {
            if members.len() > 2 && values.len() >= PARTS_FROM_VALUES {
                self.sum_in_parts(&members, values)?;
            } else {
                self.sum_whole(&members, values)?;
            }
        }
        Ok(())
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

fn others(members: &Range<usize>, rank: usize) -> impl Iterator<Item = usize> + use<> {
    members.clone().filter(move |member| *member != rank)
}

fn into(from: usize, part: &mut [f32]) -> Receiving<'_> {
    Receiving::new(
        from,
        Kind::Sum,
        Place::Exact(bytemuck::cast_slice_mut(part)),
    )
}

/// Adds up everyone's values in the order of the ranks: `theirs` holds the others' one after another, and is spoilt;
/// `index` is this rank's place among them.
fn sum_in_order(index: usize, values: &mut [f32], theirs: &mut [f32]) {
    let (before, after) = theirs.split_at_mut(index * values.len());
    let mut before = before.chunks_exact_mut(values.len());
    if let Some(sum) = before.next() {
        for part in before {
            add(sum, part);
        }
        for (value, sum) in values.iter_mut().zip(sum) {
            *value += *sum;
        }
    }
    for part in after.chunks_exact(values.len()) {
        add(values, part);
    }
}

fn add(sum: &mut [f32], part: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(part) {
        *sum += value;
    }
}

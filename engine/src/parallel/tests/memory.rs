//! Ranks that are threads of one process, joined by channels.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use bytemuck::{cast_slice, cast_slice_mut};

use crate::collective::{Collective, CollectiveError};

/// One rank's end.
#[derive(Debug)]
pub(crate) struct MemoryGroup {
    rank: usize,
    pub(crate) patience: Patience,
    /// To each rank; what goes to oneself is never used.
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Receiver<Vec<u8>>>,
    /// Messages that may still be sent before this end breaks, or falls silent.
    pub(crate) messages_left: Arc<AtomicUsize>,
    pub(crate) falls_silent: bool,
}

/// How long an end waits, in milliseconds; may be changed while it is in use.
pub(crate) type Patience = Arc<AtomicU64>;

/// The ends of a group, in the ranks' order.
pub(crate) fn group(size: usize, patience_ms: u64) -> Vec<MemoryGroup> {
    let mut ends: Vec<MemoryGroup> = (0..size)
        .map(|rank| MemoryGroup {
            rank,
            patience: Arc::new(AtomicU64::new(patience_ms)),
            to: Vec::new(),
            from: Vec::new(),
            messages_left: Arc::new(AtomicUsize::new(usize::MAX)),
            falls_silent: false,
        })
        .collect();
    for sender in 0..size {
        for receiver in 0..size {
            let (to, from) = channel();
            ends[sender].to.push(to);
            ends[receiver].from.push(from);
        }
    }
    ends
}

impl MemoryGroup {
    fn lost(peer: usize, doing: &str) -> CollectiveError {
        CollectiveError::Lost {
            peer: format!("rank {peer}"),
            doing: doing.to_owned(),
            reason: "it has ended".to_owned(),
        }
    }
}

impl Collective for MemoryGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn name(&self) -> &'static str {
        "memory"
    }

    fn all_reduce_sum(
        &mut self,
        members: Range<usize>,
        values: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let rank = self.rank;
        for peer in members.clone().filter(|&peer| peer != rank) {
            self.send(peer, cast_slice(values))?;
        }
        let own = values.to_vec();
        let (mut message, mut other) = (Vec::new(), vec![0.0; values.len()]);
        values.fill(0.0);
        for peer in members {
            if peer == self.rank {
                other.copy_from_slice(&own);
            } else {
                self.receive(peer, &mut message)?;
                let bytes: &mut [u8] = cast_slice_mut(&mut other);
                bytes.copy_from_slice(&message);
            }
            let sums = values.iter_mut().zip(&other);
            sums.for_each(|(sum, value)| *sum += value);
        }
        Ok(())
    }

    fn peer_timeout(&self) -> Duration {
        Duration::from_millis(self.patience.load(Ordering::Relaxed))
    }

    fn send(&mut self, to: usize, message: &[u8]) -> Result<(), CollectiveError> {
        let count = |left: usize| left.checked_sub(1);
        let left = &self.messages_left;
        if left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, count)
            .is_err()
        {
            return if self.falls_silent {
                Ok(())
            } else {
                Err(Self::lost(self.rank, "breaking on purpose"))
            };
        }
        self.to[to]
            .send(message.to_vec())
            .map_err(|_| Self::lost(to, "sending"))
    }

    fn receive(&mut self, from: usize, message: &mut Vec<u8>) -> Result<(), CollectiveError> {
        let patience = Duration::from_millis(self.patience.load(Ordering::Relaxed));
        *message = self.from[from]
            .recv_timeout(patience)
            .map_err(|error| match error {
                RecvTimeoutError::Timeout => CollectiveError::TimedOut {
                    peer: format!("rank {from}"),
                    doing: "receiving".to_owned(),
                    waited_ms: patience.as_millis(),
                },
                RecvTimeoutError::Disconnected => Self::lost(from, "receiving"),
            })?;
        Ok(())
    }

    fn broadcast(&mut self, message: &mut Vec<u8>) -> Result<(), CollectiveError> {
        if self.rank > 0 {
            return self.receive(0, message);
        }
        (1..self.size()).try_for_each(|peer| self.send(peer, message))
    }
}

#[test]
fn what_each_rank_says_is_told_to_all() {
    let ends = group(3, 10_000);
    let ranks = ends.into_iter().map(|mut end| {
        std::thread::spawn(move || {
            let own = vec![7; end.rank()];
            crate::collective::tell_all(&mut end, &own)
        })
    });
    let ranks: Vec<_> = ranks.collect();
    for rank in ranks {
        let said = rank.join().expect("no rank panics").expect("all are there");
        assert_eq!(said, [vec![], vec![7], vec![7, 7]]);
    }
}

//! What a shard says to the other ranks while it computes: sums over its stage, rows for the next stage, logits for
//! rank 0.
//!
//! Invariant: within a step, rows go from a stage to the next one only, and logits leave only when nothing more is to be
//! received; so nobody waits for a reader that waits for them, however little the sockets buffer.

use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};

use crate::collective::{Collective, CollectiveError};
use crate::model::shard::{Place, Shard};

/// Bytes of one message, at most: both sides keep a message in memory, and a bound lets them refuse nonsense.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// A rank among the others of its instance.
#[derive(Debug)]
pub(crate) struct Peers {
    pub(crate) collective: Box<dyn Collective>,
    place: Place,
    /// The rows of the vocabulary that each rank of the last stage holds.
    vocab: Vec<Range<usize>>,
    /// The last message.
    message: Vec<u8>,
}

impl Peers {
    /// `shards` are those of all ranks, in their order.
    pub(crate) fn new(collective: Box<dyn Collective>, shards: &[Shard]) -> Self {
        assert_eq!(collective.size(), shards.len(), "a rank for every shard");
        let place = shards[collective.rank()].place;
        let last = &shards[place.last_stage()];
        Self {
            collective,
            place,
            vocab: last.iter().map(|shard| shard.vocab.clone()).collect(),
            message: Vec::new(),
        }
    }

    /// Whether results are to be summed over the ranks of a stage.
    pub(crate) const fn sums(&self) -> bool {
        self.place.grid.tensor > 1
    }

    /// Sums over the ranks of this stage.
    pub(crate) fn sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.collective.all_reduce_sum(self.place.stage(), values)
    }

    /// Hands rows to the next stage.
    pub(crate) fn pass_on(&mut self, values: &[f32]) -> Result<(), CollectiveError> {
        self.send(self.place.rank() + self.place.grid.tensor, values)
    }

    /// Takes rows from the stage before.
    pub(crate) fn take_over(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.receive(self.place.rank() - self.place.grid.tensor, values)
    }

    /// Puts the last stage's logits together on rank 0; empty on the others. `part` are this rank's, `[R, V of this
    /// rank]`, where it has any.
    pub(crate) fn collect_logits(
        &mut self,
        part: Vec<f32>,
        rows: usize,
    ) -> Result<Vec<f32>, CollectiveError> {
        let rank = self.place.rank();
        if rows == 0 {
            return Ok(Vec::new());
        }
        if rank > 0 {
            if self.place.is_last_stage() {
                self.send(0, &part)?;
            }
            return Ok(Vec::new());
        }
        let vocab = self.vocab.last().map_or(0, |range| range.end);
        let mut whole = vec![0.0; rows * vocab];
        let mut received = part;
        for (index, from) in self.place.last_stage().enumerate() {
            let columns = self.vocab[index].clone();
            if from != rank {
                received.resize(rows * columns.len(), 0.0);
                self.receive(from, &mut received)?;
            }
            let parts = received.chunks_exact(columns.len());
            for (row, part) in whole.chunks_exact_mut(vocab).zip(parts) {
                row[columns.clone()].copy_from_slice(part);
            }
        }
        Ok(whole)
    }

    fn send(&mut self, to: usize, values: &[f32]) -> Result<(), CollectiveError> {
        send_bytes(self.collective.as_mut(), to, cast_slice(values))
    }

    fn receive(&mut self, from: usize, values: &mut [f32]) -> Result<(), CollectiveError> {
        let (collective, message) = (self.collective.as_mut(), &mut self.message);
        receive_bytes(collective, from, (cast_slice_mut(values), message))
    }
}

/// Sends bytes whose number the receiver knows.
pub(crate) fn send_bytes(
    collective: &mut dyn Collective,
    to: usize,
    bytes: &[u8],
) -> Result<(), CollectiveError> {
    bytes
        .chunks(MESSAGE_BYTES_MAX)
        .try_for_each(|bytes| collective.send(to, bytes))
}

/// Receives what [`send_bytes`] sends; `message` is a buffer.
pub(crate) fn receive_bytes(
    collective: &mut dyn Collective,
    from: usize,
    (bytes, message): (&mut [u8], &mut Vec<u8>),
) -> Result<(), CollectiveError> {
    for bytes in bytes.chunks_mut(MESSAGE_BYTES_MAX) {
        collective.receive(from, message)?;
        if message.len() != bytes.len() {
            return Err(CollectiveError::Protocol {
                peer: format!("rank {from}"),
                doing: format!("receiving {} bytes", bytes.len()),
                reason: format!("{} bytes came", message.len()),
            });
        }
        bytes.copy_from_slice(message);
    }
    Ok(())
}

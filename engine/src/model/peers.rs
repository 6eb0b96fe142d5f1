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
    /// Whether the devices have joined, so that rows and sums do not pass through the host.
    devices: bool,
    /// The rows of the vocabulary that each rank of the last stage holds.
    vocab: Vec<Range<usize>>,
    /// The last message.
    message: Vec<u8>,
}

impl Peers {
    /// `shards` are those of all ranks, in their order; `devices` says whether their devices have joined.
    pub(crate) fn new(collective: Box<dyn Collective>, shards: &[Shard], devices: bool) -> Self {
        assert_eq!(collective.size(), shards.len(), "a rank for every shard");
        let place = shards[collective.rank()].place;
        let last = &shards[place.last_stage()];
        Self {
            collective,
            place,
            devices,
            vocab: last.iter().map(|shard| shard.vocab.clone()).collect(),
            message: Vec::new(),
        }
    }

    /// Whether results are to be summed over the ranks of a stage.
    pub(crate) const fn sums(&self) -> bool {
        self.place.grid.tensor > 1
    }

    /// Whether the devices sum and hand over rows by themselves.
    pub(crate) const fn devices(&self) -> bool {
        self.devices
    }

    /// Whether a step needs no host but to be begun: the devices of one stage have joined.
    pub(crate) const fn step_by_themselves(&self) -> bool {
        self.devices && self.place.grid.pipeline == 1
    }

    /// `V`.
    pub(crate) fn vocab(&self) -> usize {
        self.vocab.last().map_or(0, |range| range.end)
    }

    /// The rank of the next stage that this one's rows go to.
    pub(crate) const fn next(&self) -> usize {
        self.place.rank() + self.place.grid.tensor
    }

    /// The rank of the stage before that this one's rows come from.
    pub(crate) const fn before(&self) -> usize {
        self.place.rank() - self.place.grid.tensor
    }

    /// Sums over the ranks of this stage.
    pub(crate) fn sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.collective.all_reduce_sum(self.place.stage(), values)
    }

    /// Hands rows to the next stage.
    pub(crate) fn pass_on(&mut self, values: &[f32]) -> Result<(), CollectiveError> {
        self.send(self.next(), values)
    }

    /// Takes rows from the stage before.
    pub(crate) fn take_over(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.receive(self.before(), values)
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
        let vocab = self.vocab();
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

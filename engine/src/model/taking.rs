//! Handing a shard's weights to its backend, one after the other, each in the way that costs the backend least: as a pattern that it
//! makes itself, as a place in a file that it reads itself, or as bytes. Every tensor is checked before the first is handed over.

use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Backend, WeightDtype};
use crate::model::checkpoint::Checkpoint;
use crate::model::error::{ModelError, ModelErrorKind};
use crate::model::load::LoadProgress;
use crate::model::weights::{DecoderWeights, Slot};

/// Tells how far loading is.
struct Teller<'a> {
    progress: &'a dyn Fn(LoadProgress<'_>),
    begun: Instant,
    bytes_done: u64,
    bytes_total: u64,
    bytes_read: u64,
}

impl Teller<'_> {
    /// So many bytes of a tensor have been read.
    fn read(&mut self, tensor: &str, bytes: u64) {
        self.bytes_read += bytes;
        self.done(tensor, bytes);
    }

    /// So many are there.
    fn done(&mut self, tensor: &str, bytes: u64) {
        self.bytes_done += bytes;
        (self.progress)(LoadProgress {
            tensor,
            bytes_done: self.bytes_done,
            bytes_total: self.bytes_total,
            bytes_read: self.bytes_read,
            elapsed: self.begun.elapsed(),
        });
    }
}

/// Hands over what a plan names. Returns the weights, and their bytes in the form that the checkpoint has.
pub(super) fn take_over<B: Backend>(
    plan: &DecoderWeights<Slot>,
    checkpoint: &Checkpoint<'_>,
    backend: &mut B,
    progress: &dyn Fn(LoadProgress<'_>),
) -> Result<(DecoderWeights<B::Weight>, u64), ModelError> {
    let (mut bytes_total, mut elements) = (0, 0);
    plan.try_map(|slot| {
        bytes_total += checkpoint.bytes(slot)?;
        let shape = slot.cut_shape();
        let count = shape.rows() * shape.cols();
        elements += match checkpoint.dtype(slot)? {
            WeightDtype::F8E4m3 => count.div_ceil(2),
            _ => count,
        };
        Ok::<_, ModelError>(())
    })?;
    let refused = |error| ModelErrorKind::Backend(error).of(checkpoint.subject());
    let mut teller = Teller {
        progress,
        begun: Instant::now(),
        bytes_done: 0,
        bytes_total,
        bytes_read: 0,
    };
    backend.expect_weights(elements).map_err(refused)?;
    let weights = plan.try_map(|slot| one(backend, checkpoint, slot, &mut teller))?;
    let ended = backend.end_loading(&mut |tensor, bytes| teller.read(tensor, bytes));
    ended.map_err(refused)?;
    Ok((weights, bytes_total))
}

/// Hands one weight over.
fn one<B: Backend>(
    backend: &mut B,
    checkpoint: &Checkpoint<'_>,
    slot: &Slot,
    teller: &mut Teller<'_>,
) -> Result<B::Weight, ModelError> {
    let refused = |error| ModelErrorKind::Backend(error).of(checkpoint.subject());
    if let Some(source) = checkpoint.in_file(slot)? {
        let mut arrived = |tensor: &str, bytes| teller.read(tensor, bytes);
        let begun = backend.load_file(&Arc::new(source), &mut arrived);
        if let Some(weight) = begun.map_err(refused)? {
            return Ok(weight);
        }
    }
    let bytes = checkpoint.bytes(slot)?;
    if let Some(pattern) = checkpoint.pattern(slot)
        && let Some(weight) = backend.load_pattern(&pattern).map_err(refused)?
    {
        teller.done(&pattern.name, bytes);
        return Ok(weight);
    }
    let source = checkpoint.source(slot)?;
    let tensor = source.name.clone();
    let weight = backend.load_weight(source).map_err(refused)?;
    teller.done(&tensor, bytes);
    Ok(weight)
}

//! Random weights of a model's shape (`load_format: dummy`), for benchmarks: cheap to make, equal on every machine.

use std::sync::Arc;

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xxhash_rust::xxh3::xxh3_64;

use crate::backend::{WeightBytes, WeightDtype};
use crate::model::checkpoint::RawTensor;
use crate::model::error::ModelErrorKind;
use crate::model::weights::{Part, Slot};

/// Seed of all dummy weights, so that two instances agree.
const DUMMY_SEED: u64 = 0x00ba_7014;
/// Random values made per tensor, then repeated: a prime, so that no two rows of a usual width are equal.
const DUMMY_PERIOD: usize = 65_521;
/// The spread with which models of this kind are initialised.
const DUMMY_SPREAD: f32 = 0.035;

/// The size of a slot's dummy tensor.
pub(super) fn bytes(slot: &Slot, dtype: WeightDtype) -> usize {
    slot.shape.rows() * slot.shape.cols() * float_bytes(dtype)
}

fn float_bytes(dtype: WeightDtype) -> usize {
    if dtype == WeightDtype::F32 { 4 } else { 2 }
}

/// A tensor of noise; norms are ones.
pub(super) fn tensor(
    name: &str,
    slot: &Slot,
    dtype: WeightDtype,
) -> Result<RawTensor, ModelErrorKind> {
    let norm = matches!(
        slot.part,
        Part::AttentionNorm | Part::FfnNorm | Part::FinalNorm | Part::QueryNorm | Part::KeyNorm
    );
    let elements = slot.shape.rows() * slot.shape.cols();
    let bytes = bytes(slot, dtype);
    let mut rng = ChaCha8Rng::seed_from_u64(DUMMY_SEED ^ xxh3_64(name.as_bytes()));
    let mut pattern = Vec::with_capacity(DUMMY_PERIOD * float_bytes(dtype));
    for _ in 0..elements.min(DUMMY_PERIOD) {
        let value = if norm {
            1.0
        } else {
            rng.random_range(-DUMMY_SPREAD..DUMMY_SPREAD)
        };
        match dtype {
            WeightDtype::F32 => pattern.extend_from_slice(&value.to_le_bytes()),
            WeightDtype::F16 => pattern.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
            _ => pattern.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
        }
    }
    let mut buffer: Vec<u8> = Vec::new();
    buffer
        .try_reserve_exact(bytes)
        .map_err(|_| ModelErrorKind::OutOfMemory {
            tensor: name.to_owned(),
            bytes,
        })?;
    while buffer.len() < bytes {
        buffer.extend_from_slice(&pattern[..pattern.len().min(bytes - buffer.len())]);
    }
    Ok(RawTensor {
        dims: slot.shape.dims(),
        dtype,
        bytes: WeightBytes::Shared {
            buffer: Arc::new(buffer),
            range: 0..bytes,
        },
    })
}

//! Random weights of a model's shape (`load_format: dummy`), for benchmarks: cheap to make, equal on every machine.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xxhash_rust::xxh3::xxh3_64;

use crate::backend::{PatternSource, WeightBytes, WeightDtype, e4m3};
use crate::model::checkpoint::RawTensor;
use crate::model::error::ModelErrorKind;
use crate::model::weights::{Cut, Part, Slot, SlotShape};

/// Seed of all dummy weights, so that two instances agree.
const DUMMY_SEED: u64 = 0x00ba_7014;
/// Random values made per tensor, then repeated: a prime, so that no two rows of a usual width are equal.
const DUMMY_PERIOD: usize = 65_521;
/// The spread with which models of this kind are initialised.
const DUMMY_SPREAD: f32 = 0.035;

/// The size of a slot's dummy tensor.
pub(super) fn bytes(slot: &Slot, dtype: WeightDtype) -> usize {
    let shape = slot.cut_shape();
    shape.rows() * shape.cols() * float_bytes(dtype)
}

fn float_bytes(dtype: WeightDtype) -> usize {
    dtype.block().1
}

/// A slot's part of a tensor of noise; norms are ones. A part equals the same part of the whole.
pub(super) fn tensor(
    name: &str,
    slot: &Slot,
    dtype: WeightDtype,
) -> Result<RawTensor, ModelErrorKind> {
    let bytes = bytes(slot, dtype);
    let pattern = Pattern::new(name, slot, dtype);
    let mut buffer: Vec<u8> = Vec::new();
    buffer
        .try_reserve_exact(bytes)
        .map_err(|_| ModelErrorKind::OutOfMemory {
            tensor: name.to_owned(),
            bytes,
        })?;
    let (rows, cols) = (slot.shape.rows(), slot.shape.cols());
    match (&slot.cut, slot.shape) {
        (Cut::Whole, _) => pattern.write(0..rows * cols, &mut buffer),
        (Cut::Rows(part), SlotShape::Matrix { .. }) => {
            pattern.write(part.start * cols..part.end * cols, &mut buffer);
        }
        (Cut::Rows(part) | Cut::Cols(part), _) => {
            for row in 0..rows {
                pattern.write(row * cols + part.start..row * cols + part.end, &mut buffer);
            }
        }
    }
    Ok(RawTensor {
        dims: slot.cut_shape().dims(),
        dtype,
        bytes: WeightBytes::Shared {
            buffer: Arc::new(buffer),
            range: 0..bytes,
        },
        place: None,
        scales: (dtype == WeightDtype::F8E4m3).then(|| Arc::from([scale(dtype)])),
    })
}

/// The same part as values that are repeated; see [`PatternSource`].
pub(super) fn pattern(name: String, slot: &Slot, dtype: WeightDtype) -> PatternSource {
    let (stride, part) = (slot.shape.cols(), slot.cut_shape());
    let first = match (&slot.cut, slot.shape) {
        (Cut::Whole, _) => 0,
        (Cut::Rows(rows), SlotShape::Matrix { .. }) => rows.start * stride,
        (Cut::Rows(range) | Cut::Cols(range), _) => range.start,
    };
    let values = values(&name, slot).collect();
    PatternSource {
        name,
        rows: part.rows(),
        cols: part.cols(),
        dtype,
        values,
        first,
        stride,
        scale: scale(dtype),
    }
}

/// What 8-bit values are multiplied with: the greatest of them is the spread.
fn scale(dtype: WeightDtype) -> f32 {
    match dtype {
        WeightDtype::F8E4m3 => DUMMY_SPREAD / e4m3::MAX,
        _ => 1.0,
    }
}

/// What is repeated throughout a tensor.
fn values(name: &str, slot: &Slot) -> impl Iterator<Item = f32> {
    let norm = matches!(
        slot.part,
        Part::AttentionNorm | Part::FfnNorm | Part::FinalNorm | Part::QueryNorm | Part::KeyNorm
    );
    let mut rng = ChaCha8Rng::seed_from_u64(DUMMY_SEED ^ xxh3_64(name.as_bytes()));
    let len = (slot.shape.rows() * slot.shape.cols()).min(DUMMY_PERIOD);
    (0..len).map(move |_| {
        if norm {
            1.0
        } else {
            rng.random_range(-DUMMY_SPREAD..DUMMY_SPREAD)
        }
    })
}

/// The values that are repeated throughout a tensor.
struct Pattern {
    bytes: Vec<u8>,
    element_bytes: usize,
}

impl Pattern {
    fn new(name: &str, slot: &Slot, dtype: WeightDtype) -> Self {
        let element_bytes = float_bytes(dtype);
        let mut bytes = Vec::new();
        for value in values(name, slot) {
            match dtype {
                WeightDtype::F32 => bytes.extend_from_slice(&value.to_le_bytes()),
                WeightDtype::F16 => bytes.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
                WeightDtype::F8E4m3 => bytes.push(e4m3::encode(value / scale(dtype))),
                _ => bytes.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
            }
        }
        Self {
            bytes,
            element_bytes,
        }
    }

    /// Appends some consecutive elements of the whole tensor.
    fn write(&self, elements: Range<usize>, out: &mut Vec<u8>) {
        let mut left = elements.len() * self.element_bytes;
        let mut at = elements.start * self.element_bytes % self.bytes.len();
        while left > 0 {
            let count = left.min(self.bytes.len() - at);
            out.extend_from_slice(&self.bytes[at..at + count]);
            left -= count;
            at = 0;
        }
    }
}

//! Where a decoder's weights come from: a GGUF file, safetensors shards, or random numbers. Whatever a file says
//! is held against the configuration here, before a backend sees it. What a rank does not hold is not read.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::backend::{PatternSource, WeightBytes, WeightDtype, WeightSource};
use crate::model::error::{ModelError, ModelErrorKind};
use crate::model::gguf::GgufFile;
use crate::model::safetensors::Shards;
use crate::model::weights::Slot;
use crate::model::{cut, dummy};

/// A tensor as a file holds it.
#[derive(Debug)]
pub(crate) struct RawTensor {
    /// Rows first.
    pub(crate) dims: Vec<usize>,
    pub(crate) dtype: WeightDtype,
    pub(crate) bytes: WeightBytes,
}

/// Where weights come from.
#[derive(Debug)]
pub(crate) enum Checkpoint<'a> {
    Gguf(&'a GgufFile),
    Safetensors(Shards),
    /// Random weights in this float type.
    Dummy(WeightDtype),
}

impl Checkpoint<'_> {
    /// What to blame when a backend refuses a weight.
    pub(crate) fn subject(&self) -> String {
        match self {
            Self::Gguf(file) => file.path().display().to_string(),
            Self::Safetensors(shards) => shards.directory().display().to_string(),
            Self::Dummy(_) => "dummy weights".to_owned(),
        }
    }

    /// The size of a slot's part. Everything that a file can be wrong about is found here.
    pub(crate) fn bytes(&self, slot: &Slot) -> Result<u64, ModelError> {
        let bytes = match self {
            Self::Gguf(file) => cut::bytes(slot, of_gguf(file, slot)?.dtype),
            Self::Safetensors(shards) => cut::bytes(slot, of_shards(shards, slot)?.dtype),
            Self::Dummy(dtype) => dummy::bytes(slot, *dtype),
        };
        Ok(bytes as u64)
    }

    /// A slot's part as repeated values, where it is that.
    pub(crate) fn pattern(&self, slot: &Slot) -> Option<PatternSource> {
        match self {
            Self::Dummy(dtype) => Some(dummy::pattern(slot.hugging_face_name(), slot, *dtype)),
            Self::Gguf(_) | Self::Safetensors(_) => None,
        }
    }

    /// A slot's part as a weight. Rows of a file are not copied.
    pub(crate) fn source(&self, slot: &Slot) -> Result<WeightSource, ModelError> {
        let name = match self {
            Self::Gguf(_) => slot.gguf_name(),
            Self::Safetensors(_) | Self::Dummy(_) => slot.hugging_face_name(),
        };
        let part = match self {
            Self::Gguf(file) => cut::cut(&name, slot, of_gguf(file, slot)?),
            Self::Safetensors(shards) => cut::cut(&name, slot, of_shards(shards, slot)?),
            Self::Dummy(dtype) => dummy::tensor(&name, slot, *dtype),
        };
        let part = part.map_err(|kind| kind.of(self.subject()))?;
        let shape = slot.cut_shape();
        Ok(WeightSource {
            name,
            rows: shape.rows(),
            cols: shape.cols(),
            dtype: part.dtype,
            bytes: part.bytes,
        })
    }

    /// What tells these weights from others: their files' sizes, headers and some of their bytes.
    pub(crate) fn identity(&self) -> WeightsIdentity {
        let mut identity = WeightsIdentity::default();
        match self {
            Self::Gguf(file) => identity.add(file.as_bytes()),
            Self::Safetensors(shards) => shards.files().for_each(|file| identity.add(file)),
            Self::Dummy(dtype) => identity.add(format!("{dtype:?} noise").as_bytes()),
        }
        identity
    }
}

/// The whole tensor that a slot is to be found in.
fn of_gguf(file: &GgufFile, slot: &Slot) -> Result<RawTensor, ModelError> {
    let name = slot.gguf_name();
    file.tensor(&name)
        .and_then(|tensor| check_dims(&name, slot, tensor))
        .map_err(|kind| kind.at(file.path()))
}

/// The same in safetensors files.
fn of_shards(shards: &Shards, slot: &Slot) -> Result<RawTensor, ModelError> {
    let name = slot.hugging_face_name();
    check_dims(&name, slot, shards.tensor(&name)?).map_err(|kind| kind.at(shards.directory()))
}

/// Two ranks whose weights have the same identity have, as far as can be told without reading them, the same weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct WeightsIdentity {
    /// Of all files.
    pub(crate) bytes: u64,
    /// Of samples.
    pub(crate) hash: u64,
}

impl WeightsIdentity {
    /// Samples of a file: its header, as far as it fits one, and places spread over the rest.
    const SAMPLES: usize = 16;
    const SAMPLE_BYTES: usize = 64 << 10;

    fn add(&mut self, file: &[u8]) {
        self.bytes += file.len() as u64;
        let last = file.len().saturating_sub(Self::SAMPLE_BYTES);
        for index in 0..=Self::SAMPLES {
            let at = last / Self::SAMPLES * index;
            let sample = &file[at..file.len().min(at + Self::SAMPLE_BYTES)];
            self.hash = xxh3_64_with_seed(sample, self.hash);
        }
    }
}

fn check_dims(name: &str, slot: &Slot, tensor: RawTensor) -> Result<RawTensor, ModelErrorKind> {
    let expected = slot.shape.dims();
    if tensor.dims == expected {
        Ok(tensor)
    } else {
        Err(ModelErrorKind::Shape {
            tensor: name.to_owned(),
            found: tensor.dims,
            expected,
        })
    }
}

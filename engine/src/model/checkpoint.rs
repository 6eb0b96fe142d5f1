//! Where a decoder's weights come from: a GGUF file, safetensors shards, or random numbers. Whatever a file says
//! is held against the configuration here, before a backend sees it. What a rank does not hold is not read.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::backend::{
    FileSource, PatternSource, WeightBytes, WeightDtype, WeightFile, WeightSource,
};
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
    /// Where the bytes begin in their file; `None` where they were made.
    pub(crate) place: Option<FilePlace>,
    /// See [`WeightSource::scales`].
    pub(crate) scales: Option<Arc<[f32]>>,
}

/// A place in a file.
#[derive(Debug, Clone)]
pub(crate) struct FilePlace {
    pub(crate) file: Arc<WeightFile>,
    pub(crate) offset: u64,
}

/// Where weights come from.
#[derive(Debug)]
pub(crate) enum Checkpoint<'a> {
    Gguf(&'a GgufFile),
    Safetensors(Shards),
    /// Random weights in this float type; projections in 8 bits where the checkpoint has them so.
    Dummy {
        dtype: WeightDtype,
        in_8_bits: bool,
    },
}

impl Checkpoint<'_> {
    /// What to blame when a backend refuses a weight.
    pub(crate) fn subject(&self) -> String {
        match self {
            Self::Gguf(file) => file.path().display().to_string(),
            Self::Safetensors(shards) => shards.directory().display().to_string(),
            Self::Dummy { .. } => "dummy weights".to_owned(),
        }
    }

    /// The size of a slot's part. Everything that a file can be wrong about is found here.
    pub(crate) fn bytes(&self, slot: &Slot) -> Result<u64, ModelError> {
        let dtype = self.dtype(slot)?;
        let bytes = match self {
            Self::Gguf(_) | Self::Safetensors(_) => cut::bytes(slot, dtype),
            Self::Dummy { .. } => dummy::bytes(slot, dtype),
        };
        Ok(bytes as u64)
    }

    /// The type of a slot's tensor.
    pub(crate) fn dtype(&self, slot: &Slot) -> Result<WeightDtype, ModelError> {
        match self {
            Self::Gguf(file) => Ok(of_gguf(file, slot)?.dtype),
            Self::Safetensors(shards) => Ok(of_shards(shards, slot)?.dtype),
            Self::Dummy { in_8_bits, .. } if *in_8_bits && slot.is_projection() => {
                Ok(WeightDtype::F8E4m3)
            }
            Self::Dummy { dtype, .. } => Ok(*dtype),
        }
    }

    /// A slot's part as repeated values, where it is that.
    pub(crate) fn pattern(&self, slot: &Slot) -> Option<PatternSource> {
        match self {
            Self::Dummy { .. } => {
                let dtype = self.dtype(slot).ok()?;
                Some(dummy::pattern(slot.hugging_face_name(), slot, dtype))
            }
            Self::Gguf(_) | Self::Safetensors(_) => None,
        }
    }

    /// Where a slot's part lies in its file, if it can be read from there as it is. Reads none of it.
    pub(crate) fn in_file(&self, slot: &Slot) -> Result<Option<FileSource>, ModelError> {
        let (name, tensor) = match self {
            Self::Gguf(file) => (slot.gguf_name(), of_gguf(file, slot)?),
            Self::Safetensors(shards) => (slot.hugging_face_name(), of_shards(shards, slot)?),
            Self::Dummy { .. } => return Ok(None),
        };
        let shape = slot.cut_shape();
        Ok(cut::in_file(slot, &tensor).map(|runs| FileSource {
            name,
            rows: shape.rows(),
            cols: shape.cols(),
            dtype: tensor.dtype,
            runs,
            scales: cut::scales(slot, tensor.scales),
        }))
    }

    /// A slot's part as a weight. Rows of a file are not copied.
    pub(crate) fn source(&self, slot: &Slot) -> Result<WeightSource, ModelError> {
        let name = match self {
            Self::Gguf(_) => slot.gguf_name(),
            Self::Safetensors(_) | Self::Dummy { .. } => slot.hugging_face_name(),
        };
        let part = match self {
            Self::Gguf(file) => cut::cut(&name, slot, of_gguf(file, slot)?),
            Self::Safetensors(shards) => cut::cut(&name, slot, of_shards(shards, slot)?),
            Self::Dummy { .. } => dummy::tensor(&name, slot, self.dtype(slot)?),
        };
        let part = part.map_err(|kind| kind.of(self.subject()))?;
        let shape = slot.cut_shape();
        Ok(WeightSource {
            name,
            rows: shape.rows(),
            cols: shape.cols(),
            dtype: part.dtype,
            bytes: part.bytes,
            scales: part.scales,
        })
    }

    /// What tells these weights from others: their files' sizes, headers and some of their bytes.
    pub(crate) fn identity(&self) -> Result<WeightsIdentity, ModelError> {
        let mut identity = WeightsIdentity::default();
        match self {
            Self::Gguf(file) => identity.add_file(file.file())?,
            Self::Safetensors(shards) => {
                for file in shards.files() {
                    identity.add_file(file)?;
                }
            }
            Self::Dummy { dtype, in_8_bits } => {
                let width = if *in_8_bits { "8-bit" } else { "whole" };
                let text = format!("{width} {dtype:?} noise");
                identity.bytes = text.len() as u64;
                identity.add(text.as_bytes());
            }
        }
        Ok(identity)
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
    let mut tensor = check_dims(&name, slot, shards.tensor(&name)?)
        .map_err(|kind| kind.at(shards.directory()))?;
    if tensor.dtype == WeightDtype::F8E4m3 {
        if !slot.is_projection() {
            let kind = ModelErrorKind::Dtype {
                tensor: name,
                dtype: "F8_E4M3".to_owned(),
                served: &["F32", "F16", "BF16"],
            };
            return Err(kind.at(shards.directory()));
        }
        tensor.scales = Some(shards.scales(&name, slot.shape.rows())?);
    }
    Ok(tensor)
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
    const SAMPLES: u64 = 16;
    const SAMPLE_BYTES: usize = 64 << 10;

    fn add_file(&mut self, file: &WeightFile) -> Result<(), ModelError> {
        let failed = |kind: ModelErrorKind| kind.at(file.path());
        let metadata = file.file().metadata();
        let len = metadata.map_err(|error| failed(error.into()))?.len();
        self.bytes += len;
        let last = len.saturating_sub(Self::SAMPLE_BYTES as u64);
        let mut sample = vec![0; Self::SAMPLE_BYTES];
        for index in 0..=Self::SAMPLES {
            let at = last / Self::SAMPLES * index;
            let count = usize::try_from(len - at).map_or(usize::MAX, |left| left.min(sample.len()));
            let read = file.read(at, &mut sample[..count]);
            read.map_err(|error| failed(error.into()))?;
            self.add(&sample[..count]);
        }
        Ok(())
    }

    fn add(&mut self, sample: &[u8]) {
        self.hash = xxh3_64_with_seed(sample, self.hash);
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

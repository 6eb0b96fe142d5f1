//! Where a decoder's weights come from: a GGUF file, safetensors shards, or random numbers. Whatever a file says
//! is held against the configuration here, before a backend sees it.

use crate::backend::{WeightBytes, WeightDtype, WeightSource};
use crate::model::dummy;
use crate::model::error::{ModelError, ModelErrorKind};
use crate::model::gguf::GgufFile;
use crate::model::safetensors::Shards;
use crate::model::weights::Slot;

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

    /// The size of a slot's tensor. Everything that a file can be wrong about is found here.
    pub(crate) fn bytes(&self, slot: &Slot) -> Result<u64, ModelError> {
        match self {
            Self::Dummy(dtype) => Ok(dummy::bytes(slot, *dtype) as u64),
            Self::Gguf(_) | Self::Safetensors(_) => {
                Ok(self.source(slot)?.bytes.as_slice().len() as u64)
            }
        }
    }

    /// A slot's weight. Bytes of a file are not copied.
    pub(crate) fn source(&self, slot: &Slot) -> Result<WeightSource, ModelError> {
        let (name, tensor) = match self {
            Self::Gguf(file) => {
                let name = slot.gguf_name();
                let tensor = file
                    .tensor(&name)
                    .and_then(|tensor| check_dims(&name, slot, tensor))
                    .map_err(|kind| kind.at(file.path()))?;
                (name, tensor)
            }
            Self::Safetensors(shards) => {
                let name = slot.hugging_face_name();
                let tensor = check_dims(&name, slot, shards.tensor(&name)?)
                    .map_err(|kind| kind.at(shards.directory()))?;
                (name, tensor)
            }
            Self::Dummy(dtype) => {
                let name = slot.hugging_face_name();
                let tensor =
                    dummy::tensor(&name, slot, *dtype).map_err(|kind| kind.of(self.subject()))?;
                (name, tensor)
            }
        };
        Ok(WeightSource {
            name,
            rows: slot.shape.rows(),
            cols: slot.shape.cols(),
            dtype: tensor.dtype,
            bytes: tensor.bytes,
        })
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

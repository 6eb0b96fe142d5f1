//! A GGUF file, mapped: its metadata, and its tensors as ranges of the map.
//!
//! candle's reader parses the header; `gguf/header.rs` stands between it and a hostile file. Every tensor's
//! extent is checked against the file when it is asked for, so a header alone is enough for dummy weights.

mod header;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use memmap2::Mmap;

use crate::backend::{WeightBytes, WeightDtype, WeightFile};
use crate::model::checkpoint::{FilePlace, RawTensor};
use crate::model::error::{ModelError, ModelErrorKind};
use crate::model::mmap;

const SERVED_DTYPES: &[&str] = &[
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K",
];

/// An opened GGUF file.
#[derive(Debug)]
pub(crate) struct GgufFile {
    file: Arc<WeightFile>,
    map: Arc<Mmap>,
    content: Content,
}

impl GgufFile {
    /// Maps the file and reads its header.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let failed = |error| ModelErrorKind::Io(error).at(path);
        let file = WeightFile::open(path).map_err(failed)?;
        let map = mmap::map(&file).map_err(failed)?;
        let content = header::read(&map).map_err(|kind| kind.at(path))?;
        Ok(Self {
            file: Arc::new(file),
            map: Arc::new(map),
            content,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    pub(crate) fn metadata(&self) -> &HashMap<String, Value> {
        &self.content.metadata
    }

    /// The metadata, for the tokenizer, which outlives the file.
    pub(crate) fn into_metadata(self) -> HashMap<String, Value> {
        self.content.metadata
    }

    /// The file itself.
    pub(crate) fn file(&self) -> &WeightFile {
        &self.file
    }

    /// A tensor's shape, rows first.
    pub(crate) fn dims(&self, name: &str) -> Option<&[usize]> {
        self.content
            .tensor_infos
            .get(name)
            .map(|info| info.shape.dims())
    }

    /// A tensor's shape, type and bytes.
    pub(crate) fn tensor(&self, name: &str) -> Result<RawTensor, ModelErrorKind> {
        let info = self
            .content
            .tensor_infos
            .get(name)
            .ok_or_else(|| ModelErrorKind::MissingTensor(name.to_owned()))?;
        let dtype = weight_dtype(info.ggml_dtype).ok_or_else(|| ModelErrorKind::Dtype {
            tensor: name.to_owned(),
            dtype: format!("{:?}", info.ggml_dtype),
            served: SERVED_DTYPES,
        })?;
        let bytes = size_bytes(info).ok_or_else(|| ModelErrorKind::Header {
            format: "GGUF",
            reason: format!(
                "tensor `{name}` of shape {:?} is not made of whole {:?} blocks",
                info.shape.dims(),
                info.ggml_dtype
            ),
        })?;
        let offset = self.content.tensor_data_offset.saturating_add(info.offset);
        let there = (self.map.len() as u64).saturating_sub(offset);
        if bytes > there {
            return Err(ModelErrorKind::Truncated {
                tensor: name.to_owned(),
                offset,
                needed: bytes,
                there,
            });
        }
        let start =
            usize::try_from(offset).expect("the tensor lies within the map, which usize measures");
        let len =
            usize::try_from(bytes).expect("the tensor lies within the map, which usize measures");
        Ok(RawTensor {
            scales: None,
            dims: info.shape.dims().to_vec(),
            dtype,
            bytes: WeightBytes::Shared {
                buffer: Arc::<Mmap>::clone(&self.map),
                range: start..start + len,
            },
            place: Some(FilePlace {
                file: Arc::clone(&self.file),
                offset,
            }),
        })
    }

    /// A small vector of 32-bit floats, where the file has one.
    pub(crate) fn vector_f32(
        &self,
        name: &str,
        len: usize,
    ) -> Result<Option<Vec<f32>>, ModelErrorKind> {
        if self.dims(name).is_none() {
            return Ok(None);
        }
        let tensor = self.tensor(name)?;
        if tensor.dims != [len] {
            return Err(ModelErrorKind::Shape {
                tensor: name.to_owned(),
                found: tensor.dims,
                expected: vec![len],
            });
        }
        if tensor.dtype != WeightDtype::F32 {
            return Err(ModelErrorKind::Dtype {
                tensor: name.to_owned(),
                dtype: format!("{:?}", tensor.dtype),
                served: &["F32"],
            });
        }
        let (words, _) = tensor.bytes.as_slice().as_chunks::<4>();
        Ok(Some(
            words.iter().map(|&word| f32::from_le_bytes(word)).collect(),
        ))
    }
}

/// The tensor's bytes; `None` when a row is not made of whole blocks or the size overflows.
fn size_bytes(info: &TensorInfo) -> Option<u64> {
    let dims = info.shape.dims();
    let block_len = info.ggml_dtype.block_size();
    if !dims.last().copied().unwrap_or(1).is_multiple_of(block_len) {
        return None;
    }
    let elements = dims
        .iter()
        .try_fold(1_usize, |product, &dim| product.checked_mul(dim))?;
    (elements / block_len)
        .checked_mul(info.ggml_dtype.type_size())
        .map(|bytes| bytes as u64)
}

fn weight_dtype(dtype: GgmlDType) -> Option<WeightDtype> {
    match dtype {
        GgmlDType::F32 => Some(WeightDtype::F32),
        GgmlDType::F16 => Some(WeightDtype::F16),
        GgmlDType::BF16 => Some(WeightDtype::Bf16),
        GgmlDType::Q4_0 => Some(WeightDtype::Q4_0),
        GgmlDType::Q4_1 => Some(WeightDtype::Q4_1),
        GgmlDType::Q5_0 => Some(WeightDtype::Q5_0),
        GgmlDType::Q5_1 => Some(WeightDtype::Q5_1),
        GgmlDType::Q8_0 => Some(WeightDtype::Q8_0),
        GgmlDType::Q2K => Some(WeightDtype::Q2_K),
        GgmlDType::Q3K => Some(WeightDtype::Q3_K),
        GgmlDType::Q4K => Some(WeightDtype::Q4_K),
        GgmlDType::Q5K => Some(WeightDtype::Q5_K),
        GgmlDType::Q6K => Some(WeightDtype::Q6_K),
        // Intermediate formats of dot products; no file of weights holds them.
        GgmlDType::Q8_1 | GgmlDType::Q8K => None,
    }
}

/// A text value.
pub(crate) fn text<'a>(metadata: &'a HashMap<String, Value>, key: &str) -> Option<&'a str> {
    match metadata.get(key) {
        Some(Value::String(text)) => Some(text),
        _ => None,
    }
}

/// A whole number of any width; writers do not agree on one. An array counts when all its values are equal.
pub(crate) fn integer(value: &Value) -> Option<u64> {
    match value {
        Value::U8(value) => Some((*value).into()),
        Value::U16(value) => Some((*value).into()),
        Value::U32(value) => Some((*value).into()),
        Value::U64(value) => Some(*value),
        Value::I8(value) => u64::try_from(*value).ok(),
        Value::I16(value) => u64::try_from(*value).ok(),
        Value::I32(value) => u64::try_from(*value).ok(),
        Value::I64(value) => u64::try_from(*value).ok(),
        Value::Array(values) => {
            let (first, rest) = values.split_first()?;
            if matches!(first, Value::Array(_)) {
                return None;
            }
            let first = integer(first)?;
            rest.iter()
                .all(|value| integer(value) == Some(first))
                .then_some(first)
        }
        Value::F32(_) | Value::F64(_) | Value::Bool(_) | Value::String(_) => None,
    }
}

/// A number as a float.
pub(crate) fn float(value: &Value) -> Option<f64> {
    match value {
        Value::F32(value) => Some((*value).into()),
        Value::F64(value) => Some(*value),
        other => integer(other).map(|value| value as f64),
    }
}

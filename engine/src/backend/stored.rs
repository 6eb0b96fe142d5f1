//! Weights as files hold them: element types, bytes, and where they are from; and what activations are. Nothing is decoded here.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;

/// Type of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivationDtype {
    /// 32-bit float.
    F32,
    /// bfloat16, with sums in 32 bits.
    Bf16,
    /// IEEE half precision, with sums in 32 bits.
    F16,
}

impl ActivationDtype {
    /// As users write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }
}

/// Element type of a stored weight: plain floats, floats of 8 bits with scales beside them, or one of GGML's block formats as
/// the GGUF file holds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are GGML's own")]
#[expect(non_camel_case_types, reason = "the names are GGML's own")]
pub enum WeightDtype {
    F32,
    F16,
    Bf16,
    F8E4m3,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl WeightDtype {
    /// Weights and bytes of the smallest unit: rows are made of whole ones.
    #[must_use]
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::F8E4m3 => (1, 1),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2_K => (256, 84),
            Self::Q3_K => (256, 110),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
        }
    }

    /// The same type by the name of the library whose decoders are the reference. It has none for 8-bit floats, which have no
    /// blocks to be decoded.
    pub(crate) const fn ggml(self) -> GgmlDType {
        match self {
            Self::F32 => GgmlDType::F32,
            Self::F16 => GgmlDType::F16,
            Self::Bf16 => GgmlDType::BF16,
            Self::F8E4m3 => unreachable!(),
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q2_K => GgmlDType::Q2K,
            Self::Q3_K => GgmlDType::Q3K,
            Self::Q4_K => GgmlDType::Q4K,
            Self::Q5_K => GgmlDType::Q5K,
            Self::Q6_K => GgmlDType::Q6K,
        }
    }
}

/// Bytes that stay where they are (a memory-mapped file) or are owned.
#[derive(Clone)]
pub enum WeightBytes {
    /// A range of a shared buffer, usually a memory-mapped file.
    Shared {
        /// The buffer.
        buffer: Arc<dyn AsRef<[u8]> + Send + Sync>,
        /// The weight's bytes within it.
        range: Range<usize>,
    },
    /// Bytes made in memory.
    Owned(Arc<[u8]>),
}

impl Debug for WeightBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WeightBytes({} bytes)", self.as_slice().len())
    }
}

impl WeightBytes {
    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Self::Shared { buffer, range } => &(**buffer).as_ref()[range.clone()],
            Self::Owned(bytes) => bytes,
        }
    }
}

/// A weight as a model file gives it. Row-major `[rows, cols]`; a vector has one row. `cols` is the input side.
#[derive(Debug, Clone)]
pub struct WeightSource {
    /// Name in the file, for messages.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// How the bytes are to be read.
    pub dtype: WeightDtype,
    /// `rows × cols` elements.
    pub bytes: WeightBytes,
    /// What 8-bit elements are multiplied with: one for all, or one a row. `None` for other types.
    pub scales: Option<Arc<[f32]>>,
}

//! A page: one block's KV for every layer, in host memory, contiguous.
//!
//! Layout `[L, 2, K, P, D]`: layer, key then value, KV head, token within the block, head dimension. A whole
//! block is one contiguous run, so a hand-off moves megabytes per piece instead of 64 KiB. Ownership is the
//! lease: a page that a transport holds cannot be written by the engine, because the engine does not have it.

use bytemuck::{cast_slice, cast_slice_mut};
use half::{bf16, f16};

/// Element type of cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

impl KvDtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name used in configs, logs and layout records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// Shape of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageShape {
    /// Layers held by this rank (`L`).
    pub layers: usize,
    /// KV heads held by this rank (`K`).
    pub kv_heads: usize,
    /// Tokens per block (`P`).
    pub tokens_per_block: usize,
    /// Head size (`D`).
    pub head_dim: usize,
    /// Element type.
    pub dtype: KvDtype,
}

impl PageShape {
    /// Elements of one `[K, P, D]` plane: one layer's keys, or its values.
    #[must_use]
    pub const fn plane_len(&self) -> usize {
        self.kv_heads * self.tokens_per_block * self.head_dim
    }

    /// Elements of a whole page.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.layers * 2 * self.plane_len()
    }

    /// Whether a page of this shape holds nothing.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of a whole page.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.len() * self.dtype.bytes()
    }
}

/// One block's KV in host memory. Zeroed when made; its memory is only touched, hence resident, once written.
#[derive(Debug)]
pub struct Page {
    words: Box<[u64]>,
    shape: PageShape,
}

impl Page {
    /// A page of zeros.
    #[must_use]
    pub fn zeroed(shape: PageShape) -> Self {
        Self {
            words: vec![0_u64; shape.bytes().div_ceil(8)].into_boxed_slice(),
            shape,
        }
    }

    /// Its shape.
    #[must_use]
    pub const fn shape(&self) -> &PageShape {
        &self.shape
    }

    /// All bytes, in layout order.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &cast_slice(&self.words)[..self.shape.bytes()]
    }

    /// All bytes, writable.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.shape.bytes();
        &mut cast_slice_mut(&mut self.words)[..bytes]
    }

    /// All elements as `f32`. Panics when the dtype is another one: that is a bug of the caller.
    #[must_use]
    pub fn as_f32(&self) -> &[f32] {
        assert_eq!(self.shape.dtype, KvDtype::F32);
        &cast_slice(&self.words)[..self.shape.len()]
    }

    /// All elements as `f32`, writable. Panics as [`Page::as_f32`].
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.shape.dtype, KvDtype::F32);
        let len = self.shape.len();
        &mut cast_slice_mut(&mut self.words)[..len]
    }

    /// All elements as half precision. Panics when the dtype is another one.
    #[must_use]
    pub fn as_f16(&self) -> &[f16] {
        assert_eq!(self.shape.dtype, KvDtype::F16);
        &cast_slice(&self.words)[..self.shape.len()]
    }

    /// All elements as half precision, writable. Panics as [`Page::as_f16`].
    pub fn as_f16_mut(&mut self) -> &mut [f16] {
        assert_eq!(self.shape.dtype, KvDtype::F16);
        let len = self.shape.len();
        &mut cast_slice_mut(&mut self.words)[..len]
    }

    /// All elements as bfloat16. Panics when the dtype is another one.
    #[must_use]
    pub fn as_bf16(&self) -> &[bf16] {
        assert_eq!(self.shape.dtype, KvDtype::Bf16);
        &cast_slice(&self.words)[..self.shape.len()]
    }

    /// All elements as bfloat16, writable. Panics as [`Page::as_bf16`].
    pub fn as_bf16_mut(&mut self) -> &mut [bf16] {
        assert_eq!(self.shape.dtype, KvDtype::Bf16);
        let len = self.shape.len();
        &mut cast_slice_mut(&mut self.words)[..len]
    }
}

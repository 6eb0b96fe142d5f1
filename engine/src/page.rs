//! A page: one block's KV for every layer, in host memory, contiguous.
//!
//! Layout `[L, 2, K, P, D]`: layer, key then value, KV head, token within the block, head dimension. A whole
//! block is one contiguous run, so a hand-off moves megabytes per piece instead of 64 KiB. Ownership is the
//! lease: a page that a transport holds cannot be written by the engine, because the engine does not have it.
//! Its memory is its own, or cut from an [`Arena`] that peers can be let into to read.

use std::io;
use std::sync::Arc;

use bytemuck::{cast_slice, cast_slice_mut};
use half::{bf16, f16};

use arena::{Arena, ForeignAllocator, Words};

pub mod arena;

/// Element type of cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// Floats of 8 bits: e4m3, as they are, without a scale.
    Fp8,
}

impl KvDtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }

    /// The name used in configs, logs and layout records.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::Fp8 => "fp8",
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

/// One block's KV in host memory. Zeroed when made; its memory is only touched, hence resident, once used.
#[derive(Debug)]
pub struct Page {
    words: Words,
    shape: PageShape,
}

impl Page {
    /// A page of zeros, in memory of its own.
    #[must_use]
    pub fn zeroed(shape: PageShape) -> Self {
        Self {
            words: Words::boxed(shape.bytes().div_ceil(8)),
            shape,
        }
    }

    /// Pages of zeros, cut from one new arena.
    ///
    /// # Errors
    /// When the system has no such memory to share; [`Page::zeroed`] may still work.
    pub fn pool(shape: PageShape, count: usize) -> io::Result<Vec<Self>> {
        let pieces = Arena::cut(shape.bytes().div_ceil(8), count)?;
        Ok(Self::of(pieces, shape))
    }

    /// As [`Page::pool`], of memory that a library allocates where there is one.
    pub(crate) fn pool_of(
        allocator: Option<ForeignAllocator>,
        shape: PageShape,
        count: usize,
    ) -> io::Result<Vec<Self>> {
        let pieces = Arena::cut_of(allocator, shape.bytes().div_ceil(8), count)?;
        Ok(Self::of(pieces, shape))
    }

    fn of(pieces: Vec<Words>, shape: PageShape) -> Vec<Self> {
        let page = |words| Self { words, shape };
        pieces.into_iter().map(page).collect()
    }

    /// The arena that it was cut from, and its offset in there in bytes; none where its memory is its own.
    #[must_use]
    pub fn arena(&self) -> Option<(&Arc<Arena>, usize)> {
        self.words.arena()
    }

    /// Its shape.
    #[must_use]
    pub const fn shape(&self) -> &PageShape {
        &self.shape
    }

    /// All bytes, in layout order.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &cast_slice(self.words.as_slice())[..self.shape.bytes()]
    }

    /// All bytes, writable.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.shape.bytes();
        &mut cast_slice_mut(self.words.as_mut_slice())[..bytes]
    }

    /// All elements as `f32`. Panics when the dtype is another one: that is a bug of the caller.
    #[must_use]
    pub fn as_f32(&self) -> &[f32] {
        assert_eq!(self.shape.dtype, KvDtype::F32);
        &cast_slice(self.words.as_slice())[..self.shape.len()]
    }

    /// All elements as `f32`, writable. Panics as [`Page::as_f32`].
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.shape.dtype, KvDtype::F32);
        let len = self.shape.len();
        &mut cast_slice_mut(self.words.as_mut_slice())[..len]
    }

    /// All elements as half precision. Panics when the dtype is another one.
    #[must_use]
    pub fn as_f16(&self) -> &[f16] {
        assert_eq!(self.shape.dtype, KvDtype::F16);
        &cast_slice(self.words.as_slice())[..self.shape.len()]
    }

    /// All elements as half precision, writable. Panics as [`Page::as_f16`].
    pub fn as_f16_mut(&mut self) -> &mut [f16] {
        assert_eq!(self.shape.dtype, KvDtype::F16);
        let len = self.shape.len();
        &mut cast_slice_mut(self.words.as_mut_slice())[..len]
    }

    /// All elements as bfloat16. Panics when the dtype is another one.
    #[must_use]
    pub fn as_bf16(&self) -> &[bf16] {
        assert_eq!(self.shape.dtype, KvDtype::Bf16);
        &cast_slice(self.words.as_slice())[..self.shape.len()]
    }

    /// All elements as bfloat16, writable. Panics as [`Page::as_bf16`].
    pub fn as_bf16_mut(&mut self) -> &mut [bf16] {
        assert_eq!(self.shape.dtype, KvDtype::Bf16);
        let len = self.shape.len();
        &mut cast_slice_mut(self.words.as_mut_slice())[..len]
    }
}

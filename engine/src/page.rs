//! A page: one block's KV for every layer, in host memory or a device's, contiguous.
//!
//! Layout `[L, 2, K, P, D]`: layer, key then value, KV head, token within the block, head dimension. A whole
//! block is one contiguous run, so a hand-off moves megabytes per piece instead of 64 KiB. Ownership is the
//! lease: a page that a transport holds cannot be written by the engine, because the engine does not have it.
//! Its memory is its own, or cut from an [`Arena`] that peers can be let into to read. A page of a device has no slices; what
//! has to work with either kind uses [`Page::read`], [`Page::write`] and [`Page::to_host`].

use std::borrow::Cow;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::{cast_slice, cast_slice_mut};
use half::{bf16, f16};

use arena::{Arena, ForeignAllocator, Words};
use device::DeviceArena;

pub mod arena;
pub mod device;
pub mod fold;
mod huge;
pub(crate) mod mapped;

/// Element type of cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// Floats of 8 bits: e4m3, with a [`KvScale`] for each layer where the model has them.
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

/// What a layer's stored keys and values are multiplied with to be what they mean: they are divided by it as they are written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KvScale {
    /// Of keys.
    pub key: f32,
    /// Of values.
    pub value: f32,
}

impl KvScale {
    /// Stored as they are.
    pub const ONE: Self = Self {
        key: 1.0,
        value: 1.0,
    };

    /// What is multiplied with before storing. Every backend rounds alike, so that pages are equal.
    #[must_use]
    pub fn inverse(self) -> Self {
        Self {
            key: self.key.recip(),
            value: self.value.recip(),
        }
    }
}

/// The scales of a pool's pages, by layer.
#[derive(Debug, Clone)]
pub(crate) struct KvScales(Vec<KvScale>);

impl KvScales {
    /// Of pages whose elements are stored as they are.
    pub(crate) fn ones(shape: &PageShape) -> Self {
        Self(vec![KvScale::ONE; shape.layers])
    }

    /// One for each layer of pages of 8-bit elements.
    pub(crate) fn new(shape: &PageShape, scales: &[KvScale]) -> Self {
        let whole = (shape.layers, KvDtype::Fp8);
        assert_eq!((scales.len(), shape.dtype), whole, "scales of pages");
        Self(scales.to_vec())
    }

    /// A layer's.
    pub(crate) fn of(&self, layer: usize) -> KvScale {
        self.0[layer]
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

/// One block's KV. Zeroed when made; host memory is only touched, hence resident, once used.
#[derive(Debug)]
pub struct Page {
    words: Words,
    /// One for all pages of a pool. Not interned for good: peers choose some of the sizes. None of a page of nothing.
    shape: Option<Arc<PageShape>>,
}

/// Of a page of nothing.
const NO_SHAPE: &PageShape = &PageShape {
    layers: 0,
    kv_heads: 0,
    tokens_per_block: 0,
    head_dim: 0,
    dtype: KvDtype::F32,
};

// A hand-off moves and reads thousands of pages on several cores, cold, and pays for each cache line: two pages take one.
// A place that may hold no page takes no more.
const _: () = assert!(size_of::<Page>() == 32 && size_of::<Option<Page>>() == 32);

impl Page {
    /// A page of zeros, in memory of its own.
    #[must_use]
    pub fn zeroed(shape: PageShape) -> Self {
        Self {
            words: Words::boxed(shape.bytes().div_ceil(8)),
            shape: Some(Arc::new(shape)),
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

    /// Pages of zeros, cut from zeroed memory of a device of at least [`Page::arena_bytes`].
    ///
    /// # Errors
    /// When it is smaller.
    pub fn pool_on(
        memory: Box<dyn DeviceArena>,
        shape: PageShape,
        count: usize,
    ) -> io::Result<Vec<Self>> {
        let pieces = Arena::cut_device(memory, shape.bytes().div_ceil(8), count)?;
        Ok(Self::of(pieces, shape))
    }

    /// Bytes of an arena of so many pages, and of the distance from one to the next when it is for one.
    ///
    /// # Errors
    /// When there is no such number.
    pub fn arena_bytes(shape: PageShape, count: usize) -> io::Result<usize> {
        arena::bytes_of(shape.bytes().div_ceil(8), count)
    }

    fn of(pieces: Vec<Words>, shape: PageShape) -> Vec<Self> {
        let shape = Arc::new(shape);
        let page = |words| Self {
            words,
            shape: Some(Arc::clone(&shape)),
        };
        pieces.into_iter().map(page).collect()
    }

    /// The arena that it was cut from, and its offset in there in bytes; none where its memory is its own.
    #[must_use]
    pub fn arena(&self) -> Option<(&Arc<Arena>, usize)> {
        self.words.arena()
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> &PageShape {
        self.shape.as_deref().unwrap_or(NO_SHAPE)
    }

    /// One of no bytes, in the place of a page that is elsewhere. It costs nothing to make, nor to drop.
    pub(crate) const fn of_nothing() -> Self {
        Self {
            words: Words::none(),
            shape: None,
        }
    }

    /// Its memory on a device, with its offset there; none where it is in the host's.
    fn place(&self) -> Option<(&dyn DeviceArena, usize)> {
        let (arena, offset) = self.words.arena().filter(|_| self.is_on_device())?;
        Some((arena.device()?, offset))
    }

    /// Whether it lies in a device's memory: then it has no slices.
    #[must_use]
    pub const fn is_on_device(&self) -> bool {
        self.words.is_on_device()
    }

    /// Copies bytes out, from `at` on. Panics beyond the page.
    ///
    /// # Errors
    /// When the device fails that it lies on.
    pub fn read(&self, at: usize, to: &mut [u8]) -> io::Result<()> {
        let range = self.checked(at, to.len());
        match self.place() {
            None => to.copy_from_slice(&self.as_bytes()[range]),
            Some((memory, offset)) => memory.read(offset + at, to)?,
        }
        Ok(())
    }

    /// Copies bytes in, from `at` on. Panics beyond the page.
    ///
    /// # Errors
    /// When the device fails that it lies on.
    pub fn write(&mut self, at: usize, from: &[u8]) -> io::Result<()> {
        let range = self.checked(at, from.len());
        if let Some((memory, offset)) = self.place() {
            return memory.write(offset + at, from);
        }
        self.as_bytes_mut()[range].copy_from_slice(from);
        Ok(())
    }

    fn checked(&self, at: usize, len: usize) -> Range<usize> {
        let end = at
            .checked_add(len)
            .filter(|end| *end <= self.shape().bytes());
        at..end.expect("bytes within the page")
    }

    /// All bytes, in layout order: those of the host as they are, a device's as a copy.
    ///
    /// # Errors
    /// When the device fails that it lies on.
    pub fn to_host(&self) -> io::Result<Cow<'_, [u8]>> {
        if !self.is_on_device() {
            return Ok(Cow::Borrowed(self.as_bytes()));
        }
        let mut bytes = vec![0; self.shape().bytes()];
        self.read(0, &mut bytes)?;
        Ok(Cow::Owned(bytes))
    }

    /// A page of the host's with the same bytes.
    ///
    /// # Errors
    /// When the device fails that it lies on.
    pub fn copied(&self) -> io::Result<Self> {
        let mut copy = Self::zeroed(*self.shape());
        self.read(0, copy.as_bytes_mut())?;
        Ok(copy)
    }

    /// All bytes, in layout order. Panics when it lies on a device: that is a bug of the caller.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &cast_slice(self.words.as_slice())[..self.shape().bytes()]
    }

    /// All bytes, writable. Panics as [`Page::as_bytes`].
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.shape().bytes();
        &mut cast_slice_mut(self.words.as_mut_slice())[..bytes]
    }

    /// All elements as `f32`. Panics when the dtype is another one: that is a bug of the caller.
    #[must_use]
    pub fn as_f32(&self) -> &[f32] {
        assert_eq!(self.shape().dtype, KvDtype::F32);
        &cast_slice(self.words.as_slice())[..self.shape().len()]
    }

    /// All elements as `f32`, writable. Panics as [`Page::as_f32`].
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.shape().dtype, KvDtype::F32);
        let len = self.shape().len();
        &mut cast_slice_mut(self.words.as_mut_slice())[..len]
    }

    /// All elements as half precision. Panics when the dtype is another one.
    #[must_use]
    pub fn as_f16(&self) -> &[f16] {
        assert_eq!(self.shape().dtype, KvDtype::F16);
        &cast_slice(self.words.as_slice())[..self.shape().len()]
    }

    /// All elements as half precision, writable. Panics as [`Page::as_f16`].
    pub fn as_f16_mut(&mut self) -> &mut [f16] {
        assert_eq!(self.shape().dtype, KvDtype::F16);
        let len = self.shape().len();
        &mut cast_slice_mut(self.words.as_mut_slice())[..len]
    }

    /// All elements as bfloat16. Panics when the dtype is another one.
    #[must_use]
    pub fn as_bf16(&self) -> &[bf16] {
        assert_eq!(self.shape().dtype, KvDtype::Bf16);
        &cast_slice(self.words.as_slice())[..self.shape().len()]
    }

    /// All elements as bfloat16, writable. Panics as [`Page::as_bf16`].
    pub fn as_bf16_mut(&mut self) -> &mut [bf16] {
        assert_eq!(self.shape().dtype, KvDtype::Bf16);
        let len = self.shape().len();
        &mut cast_slice_mut(self.words.as_mut_slice())[..len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: PageShape = PageShape {
        layers: 1,
        kv_heads: 1,
        tokens_per_block: 3,
        head_dim: 3,
        dtype: KvDtype::Bf16,
    };

    fn written(mut pages: Vec<Page>) -> Vec<Page> {
        for (value, page) in (1..).zip(&mut pages) {
            page.write(5, &[value; 7]).unwrap();
        }
        pages
    }

    #[test]
    fn a_page_of_a_device_holds_what_one_of_the_host_holds() {
        let host = written(Page::pool(SHAPE, 3).unwrap());
        let device = written(device::fake::pool(SHAPE, 3));
        for (host, device) in host.iter().zip(&device) {
            assert!(device.is_on_device() && !host.is_on_device());
            assert_eq!(host.to_host().unwrap(), device.to_host().unwrap());
            let mut few = [0; 4];
            device.read(3, &mut few).unwrap();
            assert_eq!(few, host.as_bytes()[3..7]);
        }
        let offsets: Vec<_> = device.iter().map(|p| p.arena().unwrap().1).collect();
        assert_eq!(offsets, [0, 64, 128]);
    }

    #[test]
    fn pages_of_a_pool_share_one_shape() {
        for pages in [Page::pool(SHAPE, 3).unwrap(), device::fake::pool(SHAPE, 3)] {
            assert!(pages.iter().all(|page| *page.shape() == SHAPE));
            let first = pages[0].shape();
            assert!(pages.iter().all(|page| std::ptr::eq(page.shape(), first)));
            let copy = pages[0].copied().unwrap();
            assert_eq!(copy.shape(), first);
        }
    }

    #[test]
    #[should_panic(expected = "a device's memory is read with its own calls")]
    fn a_page_of_a_device_has_no_slices() {
        let _ = device::fake::pool(SHAPE, 1)[0].as_bytes();
    }

    #[test]
    #[should_panic(expected = "bytes within the page")]
    fn no_page_is_written_beyond_its_end() {
        let _ = device::fake::pool(SHAPE, 2)[0].write(30, &[0; 7]);
    }
}

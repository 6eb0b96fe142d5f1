//! The pool of KV pages on the device: one allocation, `[N][L, 2, K, P, D]`, so that a page is one contiguous run.
//!
//! A page is in the pool, shared with readers, or lent out, as in the CPU's pool; what a hand-off sees is the page itself, in
//! the device's memory. What the stream has to have passed before a page is read or written from elsewhere is said when it is
//! shared or lent (`handoff.rs`). Invariant: a page that others read is not written, and one that others write is not used.

use std::sync::Arc;

use super::driver::{DeviceMemory, Gpu};
use super::error::CudaError;
use super::handoff::{CudaArena, cuda_arena};
use crate::backend::{BlockId, StepBatch};
use crate::page::arena::Arena;
use crate::page::{KvScale, KvScales, Page, PageShape};

/// The pages, by block.
#[derive(Debug)]
pub(super) struct Pages {
    shape: PageShape,
    scales: KvScales,
    arena: Arc<Arena>,
    /// From a page to the next, in bytes.
    stride: usize,
    /// `None` while lent.
    pages: Vec<Option<Arc<Page>>>,
}

impl Pages {
    /// Zeroed pages.
    pub(super) fn new(gpu: &Arc<Gpu>, shape: PageShape, count: usize) -> Result<Self, CudaError> {
        let too_many = |_| CudaError::OutOfMemory {
            bytes: shape.bytes().saturating_mul(count),
        };
        // An arena has a page at least.
        let count_made = count.max(1);
        let bytes = Page::arena_bytes(shape, count_made).map_err(too_many)?;
        let (free, _) = gpu.memory()?;
        if bytes > free {
            return Err(CudaError::OutOfMemory { bytes });
        }
        let memory = CudaArena::new(gpu, bytes)?;
        let pages = Page::pool_on(memory, shape, count_made).map_err(too_many)?;
        let arena = pages.first().and_then(Page::arena);
        let arena = Arc::clone(arena.expect("there is a page, cut from an arena").0);
        let pages = pages.into_iter().map(|page| Some(Arc::new(page)));
        Ok(Self {
            shape,
            scales: KvScales::ones(&shape),
            arena,
            stride: bytes / count_made,
            pages: pages.take(count).collect(),
        })
    }

    pub(super) const fn shape(&self) -> &PageShape {
        &self.shape
    }

    /// Scales of 8-bit elements, one for each layer. Recordings hold them.
    pub(super) fn set_scales(&mut self, scales: &[KvScale]) {
        self.scales = KvScales::new(&self.shape, scales);
    }

    pub(super) fn scale(&self, layer: usize) -> KvScale {
        self.scales.of(layer)
    }

    pub(super) fn memory(&self) -> &DeviceMemory {
        self.on_device().memory()
    }

    /// From a page to the next, in elements.
    pub(super) const fn stride_len(&self) -> usize {
        self.stride / self.shape.dtype.bytes()
    }

    fn on_device(&self) -> &CudaArena {
        cuda_arena(&self.arena).expect("the pool is on this device")
    }

    /// Another reader of a block's page, of all that has been put on the stream.
    pub(super) fn share(&self, block: BlockId) -> Result<Arc<Page>, CudaError> {
        let page = self.page(block).expect("a page in use is not lent");
        self.on_device().show()?;
        Ok(Arc::clone(page))
    }

    pub(super) fn is_unshared(&self, block: BlockId) -> bool {
        let page = self.page(block);
        page.is_some_and(|page| Arc::strong_count(page) == 1)
    }

    /// Takes a page out, to be written when all that has been put on the stream is done.
    pub(super) fn lend(&mut self, block: BlockId) -> Result<Page, CudaError> {
        self.on_device().show()?;
        let slot = &mut self.pages[block as usize];
        let page = slot.take().expect("a page to lend is not lent already");
        Ok(Arc::try_unwrap(page).expect("a page to lend has no reader"))
    }

    /// Takes a page back, and only the one that was lent.
    pub(super) fn give_back(&mut self, block: BlockId, page: Page) {
        assert_eq!(*page.shape(), self.shape, "shape of the returned page");
        let slot = &mut self.pages[block as usize];
        assert!(slot.is_none(), "block {block} already has its page");
        let place = page.arena().map(|(arena, offset)| (arena.id(), offset));
        let own = (self.arena.id(), block as usize * self.stride);
        assert_eq!(place, Some(own), "the page of block {block} is its own");
        *slot = Some(Arc::new(page));
    }

    /// Panics when a page that the batch writes is shared or lent.
    pub(super) fn check_writable(&self, batch: &StepBatch) {
        let per_block = self.shape.tokens_per_block;
        for span in &batch.sequences {
            let end = (span.past_len + span.rows.len()).div_ceil(per_block);
            for &block in &span.blocks[span.past_len / per_block..end] {
                let page = self.page(block).expect("a page to write is not lent");
                assert_eq!(Arc::strong_count(page), 1, "a page to write has no reader");
            }
        }
    }

    fn page(&self, block: BlockId) -> Option<&Arc<Page>> {
        self.pages[block as usize].as_ref()
    }
}

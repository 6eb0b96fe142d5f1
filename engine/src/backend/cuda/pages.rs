//! The pool of KV pages on the device: one allocation, `[N][L, 2, K, P, D]`, so that a page is one contiguous run.
//!
//! A page is in the pool, shared with readers, or lent out, as in the CPU's pool; what a hand-off sees is the page itself, in
//! the device's memory. What the stream has to have passed before a page is read or written from elsewhere is said when it is
//! shared or lent (`handoff.rs`). Invariant: a page that others read is not written, and one that others write is not used.

use std::sync::Arc;

use super::driver::{DeviceMemory, Gpu};
use super::error::CudaError;
use super::handoff::{CudaArena, cuda_arena};
use crate::backend::{BlockId, SequenceSpan, StepBatch};
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
    written: Written,
}

/// By block, the last step that writes it; 0 is none.
#[derive(Debug)]
struct Written(Vec<u64>);

impl Written {
    fn note(&mut self, batch: &StepBatch, per_block: usize, step: u64) {
        for blocks in batch
            .sequences
            .iter()
            .map(|span| written_by(span, per_block))
        {
            for &block in blocks {
                self.0[block as usize] = step;
            }
        }
    }

    /// Whether nothing writes a block any more, once this step is over.
    fn is_over(&self, block: BlockId, landed: u64) -> bool {
        self.0[block as usize] <= landed
    }
}

/// The blocks of a sequence that its rows of a step go to.
fn written_by(span: &SequenceSpan, per_block: usize) -> &[BlockId] {
    let end = (span.past_len + span.rows.len()).div_ceil(per_block);
    &span.blocks[span.past_len / per_block..end]
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
            written: Written(vec![0; count]),
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

    /// A step that writes these blocks is put on the stream.
    pub(super) fn note_writing(&mut self, batch: &StepBatch, step: u64) {
        self.written.note(batch, self.shape.tokens_per_block, step);
    }

    /// Another reader of a block's page. What was written by a step that has `landed` is there, whatever was put on the stream since;
    /// else it is what all that has been put there gives.
    pub(super) fn share(
        &self,
        block: BlockId,
        landed: Option<u64>,
    ) -> Result<Arc<Page>, CudaError> {
        let page = self.page(block).expect("a page in use is not lent");
        if !landed.is_some_and(|landed| self.written.is_over(block, landed)) {
            self.on_device().show()?;
        }
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
            for &block in written_by(span, per_block) {
                let page = self.page(block).expect("a page to write is not lent");
                assert_eq!(Arc::strong_count(page), 1, "a page to write has no reader");
            }
        }
    }

    fn page(&self, block: BlockId) -> Option<&Arc<Page>> {
        self.pages[block as usize].as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_as_it_stays_when_the_last_step_that_writes_it_is_over() {
        let batch = |past_len, rows, blocks: &[BlockId]| StepBatch {
            sequences: vec![SequenceSpan {
                rows: 0..rows,
                past_len,
                blocks: blocks.to_vec(),
            }],
            ..StepBatch::default()
        };
        let mut written = Written(vec![0; 4]);
        // Of four tokens a block: two and a half blocks of a prompt, then one row of another sequence.
        written.note(&batch(0, 10, &[3, 1, 0]), 4, 1);
        written.note(&batch(7, 1, &[0, 2]), 4, 2);
        assert!((0..4).all(|block| written.is_over(block, 2)));
        let over: Vec<_> = (0..4).filter(|block| written.is_over(*block, 1)).collect();
        assert_eq!(over, [0, 1, 3]);
        assert!((0..2).all(|block| !written.is_over(block, 0)));
    }
}

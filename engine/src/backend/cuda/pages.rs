//! The pool of KV pages on the device: one allocation, `[N][L, 2, K, P, D]`, so that a page is one contiguous run.
//!
//! A hand-off sees copies in host memory. A block whose copy somebody still reads counts as shared, and one whose page was
//! lent is out of the pool until what the transport wrote has been uploaded. Absent: peers that read or write device memory.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::driver::{DeviceMemory, Gpu};
use super::error::CudaError;
use crate::backend::{BlockId, StepBatch};
use crate::page::{Page, PageShape};

/// The pages, by block.
#[derive(Debug)]
pub(super) struct Pages {
    shape: PageShape,
    count: usize,
    memory: DeviceMemory,
    gpu: Arc<Gpu>,
    /// Copies that somebody may still read.
    shared: Mutex<HashMap<BlockId, Weak<Page>>>,
    lent: HashSet<BlockId>,
}

impl Pages {
    /// Zeroed pages.
    pub(super) fn new(gpu: &Arc<Gpu>, shape: PageShape, count: usize) -> Result<Self, CudaError> {
        let bytes = shape.bytes().saturating_mul(count);
        let (free, _) = gpu.memory()?;
        if bytes > free {
            return Err(CudaError::OutOfMemory { bytes });
        }
        let memory = DeviceMemory::new(gpu, bytes)?;
        gpu.zero(&memory)?;
        Ok(Self {
            shape,
            count,
            memory,
            gpu: Arc::clone(gpu),
            shared: Mutex::default(),
            lent: HashSet::new(),
        })
    }

    pub(super) const fn shape(&self) -> &PageShape {
        &self.shape
    }

    pub(super) const fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// A copy of a block's page, the same as long as somebody has it.
    pub(super) fn share(&self, block: BlockId) -> Result<Arc<Page>, CudaError> {
        assert!(!self.lent.contains(&block), "a page in use is not lent");
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.retain(|_, page| page.strong_count() > 0);
        if let Some(page) = shared.get(&block).and_then(Weak::upgrade) {
            return Ok(page);
        }
        let mut page = Page::zeroed(self.shape);
        self.gpu
            .download(&self.memory, self.offset(block), page.as_bytes_mut())?;
        let page = Arc::new(page);
        shared.insert(block, Arc::downgrade(&page));
        Ok(page)
    }

    pub(super) fn is_unshared(&self, block: BlockId) -> bool {
        !self.lent.contains(&block) && !self.is_read(block)
    }

    fn is_read(&self, block: BlockId) -> bool {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared
            .get(&block)
            .is_some_and(|page| page.strong_count() > 0)
    }

    pub(super) fn lend(&mut self, block: BlockId) -> Page {
        assert!(!self.is_read(block), "a page to lend has no reader");
        assert!(
            self.lent.insert(block),
            "a page to lend is not lent already"
        );
        Page::zeroed(self.shape)
    }

    pub(super) fn give_back(&mut self, block: BlockId, page: &Page) -> Result<(), CudaError> {
        assert_eq!(*page.shape(), self.shape, "shape of the returned page");
        assert!(
            self.lent.remove(&block),
            "block {block} already has its page"
        );
        let offset = self.offset(block);
        self.gpu.upload(&self.memory, offset, page.as_bytes())
    }

    /// Panics when a page that the batch writes is shared or lent.
    pub(super) fn check_writable(&self, batch: &StepBatch) {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.is_empty() && self.lent.is_empty() {
            return;
        }
        let per_block = self.shape.tokens_per_block;
        for span in &batch.sequences {
            let end = (span.past_len + span.rows.len()).div_ceil(per_block);
            for block in &span.blocks[span.past_len / per_block..end] {
                let read = shared
                    .get(block)
                    .is_some_and(|page| page.strong_count() > 0);
                assert!(!read, "a page to write has no reader");
                assert!(!self.lent.contains(block), "a page to write is not lent");
            }
        }
    }

    fn offset(&self, block: BlockId) -> usize {
        assert!(
            (block as usize) < self.count,
            "block {block} is in the pool"
        );
        block as usize * self.shape.bytes()
    }
}

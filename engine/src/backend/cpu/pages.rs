//! The pool of KV pages in host memory: one arena, so that transports register it once.
//!
//! A page is in the pool, shared with readers, or lent out; `Arc` knows which, so a page that a transport reads is
//! never written and one that it writes is never read.

use std::ops::Range;
use std::sync::Arc;

use half::slice::HalfFloatSliceExt;

use super::quant::{self, decode_blocks as decode_row};
use super::simd::Lanes;
use super::tensor::CpuTensor;
use crate::backend::{BackendError, BlockId, StepBatch, e4m3};
use crate::page::{KvDtype, KvScale, KvScales, Page, PageShape};

/// The pages, by block.
#[derive(Debug)]
pub(super) struct Pages {
    shape: PageShape,
    scales: KvScales,
    /// `None` while lent.
    pages: Vec<Option<Arc<Page>>>,
}

impl Pages {
    /// Zeroed pages.
    pub(super) fn new(shape: PageShape, count: usize) -> Result<Self, BackendError> {
        let bytes = shape.bytes().saturating_mul(count);
        // Pages become resident when they are written, so ask the allocator for the whole pool before promising it.
        let refused = Vec::<u8>::new().try_reserve_exact(bytes).is_err();
        if refused {
            return Err(BackendError::OutOfMemory {
                what: format!("a pool of {count} kv pages"),
                bytes,
            });
        }
        // The reservation promised nothing about shared memory, which some containers do not give.
        let pages = Page::pool(shape, count).unwrap_or_else(|error| {
            tracing::warn!(%error, bytes, "kv pages are in private memory: no shared memory for them");
            (0..count).map(|_| Page::zeroed(shape)).collect()
        });
        let pages = pages.into_iter().map(|page| Some(Arc::new(page)));
        Ok(Self {
            shape,
            scales: KvScales::ones(&shape),
            pages: pages.collect(),
        })
    }

    pub(super) const fn shape(&self) -> &PageShape {
        &self.shape
    }

    /// Scales of 8-bit elements, one for each layer.
    pub(super) fn set_scales(&mut self, scales: &[KvScale]) {
        self.scales = KvScales::new(&self.shape, scales);
    }

    pub(super) fn scale(&self, layer: usize) -> KvScale {
        self.scales.of(layer)
    }

    pub(super) fn share(&self, block: BlockId) -> Arc<Page> {
        Arc::clone(self.page(block))
    }

    /// A lent page is with a transport, so it counts as shared.
    pub(super) fn is_unshared(&self, block: BlockId) -> bool {
        self.pages[block as usize]
            .as_ref()
            .is_some_and(|page| Arc::strong_count(page) == 1)
    }

    pub(super) fn lend(&mut self, block: BlockId) -> Page {
        let slot = &mut self.pages[block as usize];
        let page = slot.take().expect("a page to lend is not lent already");
        Arc::try_unwrap(page).expect("a page to lend has no reader")
    }

    pub(super) fn give_back(&mut self, block: BlockId, page: Page) {
        assert_eq!(*page.shape(), self.shape, "shape of the returned page");
        let slot = &mut self.pages[block as usize];
        assert!(slot.is_none(), "block {block} already has its page");
        *slot = Some(Arc::new(page));
    }

    fn page(&self, block: BlockId) -> &Arc<Page> {
        self.pages[block as usize]
            .as_ref()
            .expect("a page in use is not lent")
    }

    /// Writes k and v `[T, K * D]` of one layer. Panics when a page is shared or lent.
    pub(super) fn write(&mut self, layer: usize, batch: &StepBatch, k: &CpuTensor, v: &CpuTensor) {
        let width = self.shape.kv_heads * self.shape.head_dim;
        let shape = (batch.tokens.len(), width);
        assert_eq!((k.rows(), k.cols()), shape, "shape of k");
        assert_eq!((v.rows(), v.cols()), shape, "shape of v");
        assert!(
            layer < self.shape.layers,
            "layer {layer} is not in the page"
        );
        let per_block = self.shape.tokens_per_block;
        let inverse = self.scale(layer).inverse();
        for span in &batch.sequences {
            let mut row = span.rows.start;
            while row < span.rows.end {
                let position = span.past_len + row - span.rows.start;
                let slot = position % per_block;
                let count = (per_block - slot).min(span.rows.end - row);
                let page = self.pages[span.blocks[position / per_block] as usize]
                    .as_mut()
                    .expect("a page to write is not lent");
                let page = Arc::get_mut(page).expect("a page to write has no reader");
                let sides = [(k, inverse.key), (v, inverse.value)];
                for (side, (from, inverse)) in sides.into_iter().enumerate() {
                    let from = &from.values()[row * width..(row + count) * width];
                    write_rows(page, (layer, side), slot, (from, inverse));
                }
                row += count;
            }
        }
    }

    /// Bytes of one KV head's rows from `position` to the end of its block, and how many rows these are.
    /// A plane is layer, side (0 keys, 1 values), KV head.
    pub(super) fn run(
        &self,
        blocks: &[BlockId],
        plane: (usize, usize, usize),
        position: usize,
    ) -> (&[u8], usize) {
        let per_block = self.shape.tokens_per_block;
        let page = self.page(blocks[position / per_block]);
        let elements = plane_rows(&self.shape, plane, position % per_block..per_block);
        let size = self.shape.dtype.bytes();
        let bytes = &page.as_bytes()[elements.start * size..elements.end * size];
        (bytes, per_block - position % per_block)
    }

    /// Decodes rows `[D]` to the beginnings of rows of `padded` elements.
    #[inline(always)]
    pub(super) fn decode<L: Lanes>(&self, lanes: L, bytes: &[u8], out: &mut [f32], padded: usize) {
        let row_bytes = self.shape.head_dim * self.shape.dtype.bytes();
        let rows = bytes
            .chunks_exact(row_bytes)
            .zip(out.chunks_exact_mut(padded));
        match self.shape.dtype {
            KvDtype::F32 => {
                for (from, to) in rows {
                    decode_row::<quant::F32, _, L>(lanes, from, to);
                }
            }
            KvDtype::F16 => {
                for (from, to) in rows {
                    decode_row::<quant::F16, _, L>(lanes, from, to);
                }
            }
            KvDtype::Bf16 => {
                for (from, to) in rows {
                    decode_row::<quant::Bf16, _, L>(lanes, from, to);
                }
            }
            KvDtype::Fp8 => {
                for (from, to) in rows {
                    for (value, &bits) in to.iter_mut().zip(from) {
                        *value = e4m3::decode(bits);
                    }
                    to[from.len()..].fill(0.0);
                }
            }
        }
    }
}

/// Elements of some tokens' rows in a page.
const fn plane_rows(
    shape: &PageShape,
    (layer, side, head): (usize, usize, usize),
    slots: Range<usize>,
) -> Range<usize> {
    let start =
        (layer * 2 + side) * shape.plane_len() + head * shape.tokens_per_block * shape.head_dim;
    start + slots.start * shape.head_dim..start + slots.end * shape.head_dim
}

/// Writes `[count, K, D]` as `[K, count, D]`, rounding to nearest even; elements of 8 bits are multiplied with `inverse` before.
fn write_rows(
    page: &mut Page,
    (layer, side): (usize, usize),
    slot: usize,
    (from, inverse): (&[f32], f32),
) {
    let shape = *page.shape();
    for (token, from) in from
        .chunks_exact(shape.kv_heads * shape.head_dim)
        .enumerate()
    {
        let slots = slot + token..slot + token + 1;
        for (head, from) in from.chunks_exact(shape.head_dim).enumerate() {
            let to = plane_rows(&shape, (layer, side, head), slots.clone());
            match shape.dtype {
                KvDtype::F32 => page.as_f32_mut()[to].copy_from_slice(from),
                KvDtype::F16 => page.as_f16_mut()[to].convert_from_f32_slice(from),
                KvDtype::Bf16 => page.as_bf16_mut()[to].convert_from_f32_slice(from),
                KvDtype::Fp8 => {
                    for (bits, &value) in page.as_bytes_mut()[to].iter_mut().zip(from) {
                        *bits = e4m3::encode(value * inverse);
                    }
                }
            }
        }
    }
}

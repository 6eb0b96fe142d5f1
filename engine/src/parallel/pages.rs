//! Hand-offs of an instance of several ranks, all of it: whole pages, gathered from the ranks' parts and divided among them.
//!
//! The whole page `[L, 2, K, P, D]` is what a hand-off moves, whatever the ranks of either side; a rank has the planes
//! of its layers and its KV heads. For each layer, keys and values apart, a rank's heads lie together in both. Invariant:
//! a whole page is rank 0's copy, which no rank computes with, so a transport that reads or writes one is in nobody's way.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};

use crate::backend::{Backend, BackendError, BlockId, StepBatch};
use crate::model::Model;
use crate::model::decoder::Decoder;
use crate::model::peers::{receive_bytes, send_bytes};
use crate::model::shard::Shard;
use crate::page::{Page, PageShape};

/// Rank 0's books of whole pages.
#[derive(Debug)]
pub(super) struct WholePages {
    pub(super) shape: PageShape,
    /// Blocks whose page a transport has.
    lent: HashSet<BlockId>,
    /// Pages that somebody may still read, as long as their blocks are not written.
    copies: HashMap<BlockId, Weak<Page>>,
}

impl WholePages {
    pub(super) fn new(shape: PageShape) -> Self {
        Self {
            shape,
            lent: HashSet::new(),
            copies: HashMap::new(),
        }
    }

    /// A page for a transport to write.
    pub(super) fn lend(&mut self, block: BlockId) -> Page {
        assert!(
            self.lent.insert(block),
            "a page to lend is not lent already"
        );
        self.copies.remove(&block);
        Page::zeroed(self.shape)
    }

    pub(super) fn is_lent(&self, block: BlockId) -> bool {
        self.lent.contains(&block)
    }

    /// Notes that lent pages are back.
    pub(super) fn take_back(&mut self, pages: &[(BlockId, Page)]) {
        for (block, page) in pages {
            assert_eq!(*page.shape(), self.shape, "shape of the returned page");
            assert!(
                self.lent.remove(block),
                "block {block} already has its page"
            );
        }
    }

    /// The copies that there are of some blocks' pages.
    pub(super) fn copies(&mut self, blocks: &[BlockId]) -> Vec<Option<Arc<Page>>> {
        self.copies.retain(|_, copy| copy.strong_count() > 0);
        let copies = blocks.iter().map(|block| self.copies.get(block));
        copies.map(|copy| copy.and_then(Weak::upgrade)).collect()
    }

    /// Notes a copy, which serves others as long as somebody reads it.
    pub(super) fn keep(&mut self, block: BlockId, copy: &Arc<Page>) {
        self.copies.insert(block, Arc::downgrade(copy));
    }

    /// Blocks that a step writes are no longer what their copies are.
    pub(super) fn forget_written(&mut self, batch: &StepBatch) {
        if self.copies.is_empty() {
            return;
        }
        let per_block = self.shape.tokens_per_block;
        for span in &batch.sequences {
            let end = (span.past_len + span.rows.len()).div_ceil(per_block);
            for block in &span.blocks[span.past_len / per_block..end] {
                self.copies.remove(block);
            }
        }
    }
}

// === rank 0's side ===

/// Puts whole pages together from the ranks' parts.
pub(super) fn gather<B: Backend>(
    decoder: &mut Decoder<B>,
    shards: &[Shard],
    whole: PageShape,
    blocks: &[BlockId],
) -> Result<Vec<Page>, BackendError> {
    let mut gathered: Vec<_> = blocks.iter().map(|_| Page::zeroed(whole)).collect();
    for (page, part) in gathered.iter_mut().zip(decoder.share_pages(blocks)?) {
        put(page, &shards[0], &part.to_host().map_err(of_device)?);
    }
    let mut message = Vec::new();
    for shard in shards[1..].iter().filter(|shard| shard.first_holder) {
        let (from, mut part) = (shard.place.rank(), vec![0; shard.page(whole).bytes()]);
        for page in &mut gathered {
            let target = (part.as_mut_slice(), &mut message);
            receive_bytes(decoder.collective(), from, target)?;
            put(page, shard, &part);
        }
    }
    Ok(gathered)
}

/// Divides whole pages among the ranks.
pub(super) fn scatter<B: Backend>(
    decoder: &mut Decoder<B>,
    shards: &[Shard],
    whole: &[(BlockId, Page)],
) -> Result<(), BackendError> {
    for shard in &shards[1..] {
        for (_, page) in whole {
            let part = take(page, shard);
            send_bytes(decoder.collective(), shard.place.rank(), part.as_bytes())?;
        }
    }
    let own = whole.iter().map(|(block, page)| {
        let part = take(page, &shards[0]);
        let mut own = decoder.lend_page(*block);
        own.write(0, part.as_bytes()).map_err(of_device)?;
        Ok((*block, own))
    });
    let own: Result<_, BackendError> = own.collect();
    decoder.return_pages(own?)
}

// === the other ranks' side ===

/// Sends rank 0 this rank's parts of some pages, unless a rank before this one holds the same.
pub(super) fn send_parts<B: Backend>(
    decoder: &mut Decoder<B>,
    shard: &Shard,
    blocks: &[BlockId],
) -> Result<(), BackendError> {
    if !shard.first_holder {
        return Ok(());
    }
    for page in decoder.share_pages(blocks)? {
        let bytes = page.to_host().map_err(of_device)?;
        send_bytes(decoder.collective(), 0, &bytes)?;
    }
    Ok(())
}

/// Receives this rank's parts of some pages from rank 0.
pub(super) fn receive_parts<B: Backend>(
    decoder: &mut Decoder<B>,
    blocks: &[BlockId],
) -> Result<(), BackendError> {
    let (mut part, mut message) = (Vec::new(), Vec::new());
    for &block in blocks {
        let mut page = decoder.lend_page(block);
        part.resize(page.shape().bytes(), 0);
        let target = (part.as_mut_slice(), &mut message);
        receive_bytes(decoder.collective(), 0, target)?;
        page.write(0, &part).map_err(of_device)?;
        decoder.return_pages(vec![(block, page)])?;
    }
    Ok(())
}

/// A page on a device that cannot be reached.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the shape that map_err wants"
)]
fn of_device(error: io::Error) -> BackendError {
    BackendError::Device {
        what: "a kv page".to_owned(),
        reason: error.to_string(),
    }
}

// === bytes ===

/// Copies a rank's part out of a whole page.
fn take(whole: &Page, shard: &Shard) -> Page {
    let mut part = Page::zeroed(shard.page(*whole.shape()));
    for (from, to) in runs(whole.shape(), shard) {
        part.as_bytes_mut()[to].copy_from_slice(&whole.as_bytes()[from]);
    }
    part
}

/// Copies the bytes of a rank's page into a whole page.
fn put(whole: &mut Page, shard: &Shard, part: &[u8]) {
    let shape = *whole.shape();
    for (to, from) in runs(&shape, shard) {
        whole.as_bytes_mut()[to].copy_from_slice(&part[from]);
    }
}

/// Bytes that belong together, in the whole page and in the rank's.
fn runs(whole: &PageShape, shard: &Shard) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let head_bytes = whole.tokens_per_block * whole.head_dim * whole.dtype.bytes();
    let (heads, held) = (whole.kv_heads, shard.kv_heads.clone());
    let run_bytes = held.len() * head_bytes;
    let planes = shard.layers.start * 2..shard.layers.end * 2;
    planes.enumerate().map(move |(index, plane)| {
        let start = (plane * heads + held.start) * head_bytes;
        let own = index * run_bytes;
        (start..start + run_bytes, own..own + run_bytes)
    })
}

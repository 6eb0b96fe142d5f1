//! Rank 0's view of all ranks: one model.
//!
//! Hand-offs see whole pages only. A page to hand over is put together from the ranks' parts when it is asked for, and
//! one that came is divided among them; in between it is a copy that no rank writes, so lending and sharing block nothing
//! but the blocks that the engine itself keeps.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::order::Order;
use super::pages;
use crate::backend::{Backend, BackendError, BlockId, StepBatch};
use crate::collective::{CollectiveError, RankNames};
use crate::model::decoder::Decoder;
use crate::model::peers::{receive_bytes, send_bytes};
use crate::model::shard::Shard;
use crate::model::{Logits, Model, ModelShape};
use crate::page::{Page, PageShape};

/// The longest that the ranks are left alone; a fourth of the time after which a silent one counts as lost, if that is
/// less.
const KEEP_ALIVE_MAX: Duration = Duration::from_secs(5);

/// What rank 0 knows of the others.
#[derive(Debug)]
pub(crate) struct Ranks {
    /// Every rank's part, rank 0's included.
    pub(crate) shards: Vec<Shard>,
    pub(crate) names: RankNames,
    /// Of all ranks.
    pub(crate) weight_bytes: usize,
    /// How long a rank may be silent.
    pub(crate) peer_timeout: Duration,
}

/// A model whose parts are on several ranks, on the rank that leads.
#[derive(Debug)]
pub(crate) struct ParallelModel<B: Backend> {
    /// Has joined the others.
    decoder: Decoder<B>,
    ranks: Ranks,
    description: String,
    /// The whole model's, once there is a pool.
    page: Option<PageShape>,
    /// Blocks whose page a transport has.
    lent: HashSet<BlockId>,
    /// Whole pages that somebody may still read, as long as their blocks are not written.
    copies: HashMap<BlockId, Weak<Page>>,
    /// Whether the others wait for an order. False for good once something failed on the way.
    in_touch: bool,
    /// When the last order was given.
    ordered: Instant,
}

impl<B: Backend> ParallelModel<B> {
    pub(crate) fn new(mut decoder: Decoder<B>, ranks: Ranks) -> Self {
        let grid = ranks.shards[0].place.grid;
        let description = format!(
            "{} ranks (tensor {}, pipeline {}; {}), rank 0 on {}",
            grid.size(),
            grid.tensor,
            grid.pipeline,
            decoder.collective().name(),
            decoder.backend_description()
        );
        Self {
            decoder,
            ranks,
            description,
            page: None,
            lent: HashSet::new(),
            copies: HashMap::new(),
            in_touch: true,
            ordered: Instant::now(),
        }
    }

    /// Gives an order to the other ranks and does rank 0's part. If that fails, nobody knows what the others are at.
    fn together<T>(
        &mut self,
        order: &Order<'_>,
        own: impl FnOnce(&mut Self) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        self.in_touch = false;
        self.decoder.collective().broadcast(&mut order.encode())?;
        let done = own(self)?;
        self.in_touch = true;
        self.ordered = Instant::now();
        Ok(done)
    }

    /// Every other rank's answer: nothing, or why it cannot.
    fn answers(&mut self) -> Result<(), BackendError> {
        let mut message = Vec::new();
        for rank in 1..self.ranks.shards.len() {
            self.decoder.collective().receive(rank, &mut message)?;
            if !message.is_empty() {
                return Err(BackendError::Rank {
                    rank: self.ranks.names.name(rank),
                    reason: String::from_utf8_lossy(&message).into_owned(),
                });
            }
        }
        Ok(())
    }

    fn whole_page(&self) -> PageShape {
        self.page.expect("pages are allocated before any is used")
    }

    /// Puts whole pages together from the ranks' parts.
    fn gather(&mut self, blocks: &[BlockId]) -> Result<Vec<Page>, BackendError> {
        let whole = self.whole_page();
        let mut gathered: Vec<Page> = blocks.iter().map(|_| Page::zeroed(whole)).collect();
        let own = self.decoder.share_pages(blocks)?;
        for (page, part) in gathered.iter_mut().zip(&own) {
            pages::put(page, &self.ranks.shards[0], part.as_bytes());
        }
        let mut message = Vec::new();
        for shard in self.ranks.shards[1..].iter().filter(|s| s.first_holder) {
            let (from, mut part) = (shard.place.rank(), vec![0; shard.page(whole).bytes()]);
            for page in &mut gathered {
                let target = (part.as_mut_slice(), &mut message);
                receive_bytes(self.decoder.collective(), from, target)?;
                pages::put(page, shard, &part);
            }
        }
        Ok(gathered)
    }

    /// Divides whole pages among the ranks.
    fn scatter(&mut self, whole: &[(BlockId, Page)]) -> Result<(), BackendError> {
        let (own, others) = self
            .ranks
            .shards
            .split_first()
            .expect("rank 0 is one of the ranks");
        for shard in others {
            for (_, page) in whole {
                let part = pages::take(page, shard);
                let to = shard.place.rank();
                send_bytes(self.decoder.collective(), to, part.as_bytes())?;
            }
        }
        let parts = whole.iter().map(|(block, page)| {
            drop(self.decoder.lend_page(*block));
            (*block, pages::take(page, own))
        });
        let parts = parts.collect();
        self.decoder.return_pages(parts)
    }

    /// Blocks that a step writes are no longer what their copies are.
    fn forget_written(&mut self, batch: &StepBatch) {
        if self.copies.is_empty() {
            return;
        }
        let per_block = self.whole_page().tokens_per_block;
        for span in &batch.sequences {
            let end = (span.past_len + span.rows.len()).div_ceil(per_block);
            for block in &span.blocks[span.past_len / per_block..end] {
                self.copies.remove(block);
            }
        }
    }
}

impl<B: Backend> Model for ParallelModel<B> {
    fn shape(&self) -> &ModelShape {
        self.decoder.shape()
    }

    fn backend_description(&self) -> String {
        self.description.clone()
    }

    fn weight_bytes(&self) -> usize {
        self.ranks.weight_bytes
    }

    fn allocate_pages(&mut self, shape: PageShape, block_count: usize) -> Result<(), BackendError> {
        self.page = Some(shape);
        let own = self.ranks.shards[0].page(shape);
        let order = Order::Allocate {
            page: shape,
            block_count,
        };
        self.together(&order, |model| {
            model.decoder.allocate_pages(own, block_count)?;
            model.answers()
        })
    }

    fn forward(&mut self, batch: &StepBatch) -> Result<Logits, BackendError> {
        self.forget_written(batch);
        self.together(&Order::Step(Cow::Borrowed(batch)), |model| {
            model.decoder.forward(batch)
        })
    }

    fn share_pages(&mut self, blocks: &[BlockId]) -> Result<Vec<Arc<Page>>, BackendError> {
        self.copies.retain(|_, copy| copy.strong_count() > 0);
        let held: Vec<_> = blocks
            .iter()
            .map(|block| self.copies.get(block).and_then(Weak::upgrade))
            .collect();
        let missing = blocks.iter().zip(&held).filter(|(_, held)| held.is_none());
        let missing: Vec<BlockId> = missing.map(|(&block, _)| block).collect();
        let mut gathered = Vec::new();
        if !missing.is_empty() {
            let order = Order::Gather(missing.clone());
            gathered = self.together(&order, |model| model.gather(&missing))?;
        }
        let mut gathered = gathered.into_iter().map(Arc::new);
        let pages = blocks.iter().zip(held).map(|(&block, held)| {
            let page = held
                .or_else(|| gathered.next())
                .expect("a page was gathered for each that was missing");
            self.copies.insert(block, Arc::downgrade(&page));
            page
        });
        Ok(pages.collect())
    }

    fn page_is_unshared(&self, block: BlockId) -> bool {
        !self.lent.contains(&block)
    }

    fn lend_page(&mut self, block: BlockId) -> Page {
        assert!(
            self.lent.insert(block),
            "a page to lend is not lent already"
        );
        self.copies.remove(&block);
        Page::zeroed(self.whole_page())
    }

    fn return_pages(&mut self, pages: Vec<(BlockId, Page)>) -> Result<(), BackendError> {
        for (block, page) in &pages {
            assert_eq!(
                *page.shape(),
                self.whole_page(),
                "shape of the returned page"
            );
            assert!(
                self.lent.remove(block),
                "block {block} already has its page"
            );
        }
        if pages.is_empty() {
            return Ok(());
        }
        let blocks = pages.iter().map(|&(block, _)| block).collect();
        self.together(&Order::Scatter(blocks), |model| model.scatter(&pages))
    }

    fn keep_alive_due(&self) -> Option<Duration> {
        let period = KEEP_ALIVE_MAX.min(self.ranks.peer_timeout / 4);
        Some(period.saturating_sub(self.ordered.elapsed()))
    }

    fn keep_alive(&mut self) -> Result<(), BackendError> {
        self.together(&Order::Ping, Self::answers)
    }
}

impl<B: Backend> Drop for ParallelModel<B> {
    fn drop(&mut self) {
        if !self.in_touch {
            return;
        }
        let mut goodbye = Order::Goodbye.encode();
        let said: Result<(), CollectiveError> = self.decoder.collective().broadcast(&mut goodbye);
        if let Err(error) = said {
            tracing::warn!(%error, "the other ranks were not told of the end");
        }
    }
}

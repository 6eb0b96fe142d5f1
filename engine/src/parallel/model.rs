//! Rank 0's view of all ranks: one model.
//!
//! Each call is an order to all ranks and rank 0's part of it. A hand-off is every rank's own, of its own pages.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::order::{Order, Step};
use crate::backend::{Backend, BackendError, BlockId, Carried, PrefillRows, RowWish, StepBatch};
use crate::collective::{CollectiveError, RankNames};
use crate::handoff::RankOrder;
use crate::model::decoder::Decoder;
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

    /// The order for a step. Only ranks that choose tokens by themselves need to know how.
    fn step<'a>(
        &self,
        batch: &'a StepBatch,
        wishes: &'a [RowWish],
        carried: &'a [Carried],
    ) -> Order<'a> {
        let wishes = if self.runs_by_itself() { wishes } else { &[] };
        Order::Step(Step {
            batch: Cow::Borrowed(batch),
            wishes: Cow::Borrowed(wishes),
            carried: Cow::Borrowed(carried),
        })
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

    /// Every other rank's answer to what may be refused.
    fn refusable_answers(&mut self) -> Result<Vec<Vec<u8>>, BackendError> {
        let mut answers = Vec::new();
        let mut message = Vec::new();
        for rank in 1..self.ranks.shards.len() {
            self.decoder.collective().receive(rank, &mut message)?;
            match message.split_first() {
                Some((&ACCEPTED, answer)) => answers.push(answer.to_vec()),
                _ => {
                    let reason = message.get(1..).unwrap_or_default();
                    return Err(BackendError::Rank {
                        rank: self.ranks.names.name(rank),
                        reason: String::from_utf8_lossy(reason).into_owned(),
                    });
                }
            }
        }
        Ok(answers)
    }
}

/// First byte of an answer that is not a refusal.
pub(super) const ACCEPTED: u8 = 1;

/// First byte of a refusal.
pub(super) const REFUSED: u8 = 0;

impl<B: Backend> Model for ParallelModel<B> {
    fn shape(&self) -> &ModelShape {
        self.decoder.shape()
    }

    fn page_device(&self) -> Option<usize> {
        self.decoder.page_device()
    }

    fn backend_description(&self) -> String {
        self.description.clone()
    }

    fn prefill_rows(&self) -> PrefillRows {
        self.decoder.prefill_rows()
    }

    fn weight_bytes(&self) -> usize {
        self.ranks.weight_bytes
    }

    fn allocate_pages(&mut self, shape: PageShape, block_count: usize) -> Result<(), BackendError> {
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
        self.forward_choosing(batch, &[])
    }

    fn forward_choosing(
        &mut self,
        batch: &StepBatch,
        wishes: &[RowWish],
    ) -> Result<Logits, BackendError> {
        self.together(&self.step(batch, wishes, &[]), |model| {
            model.decoder.forward_choosing(batch, wishes)
        })
    }

    fn warm_up(&mut self, sequences_max: usize) -> Result<(), BackendError> {
        if !self.runs_by_itself() {
            return Ok(());
        }
        self.together(&Order::WarmUp(sequences_max), |model| {
            model.decoder.warm_up(sequences_max)?;
            model.answers()
        })
    }

    fn runs_by_itself(&self) -> bool {
        self.decoder.runs_by_itself()
    }

    fn begin(
        &mut self,
        batch: &StepBatch,
        wishes: &[RowWish],
        carried: &[Carried],
    ) -> Result<Option<Logits>, BackendError> {
        self.together(&self.step(batch, wishes, carried), |model| {
            model.decoder.begin(batch, wishes, carried)
        })
    }

    fn finish(&mut self) -> Result<Logits, BackendError> {
        let in_touch = std::mem::replace(&mut self.in_touch, false);
        let logits = self.decoder.finish()?;
        self.in_touch = in_touch;
        Ok(logits)
    }

    fn share_pages(&mut self, blocks: &[BlockId]) -> Result<Vec<Arc<Page>>, BackendError> {
        self.decoder.share_pages(blocks)
    }

    fn page_is_unshared(&self, block: BlockId) -> bool {
        self.decoder.page_is_unshared(block)
    }

    fn lend_page(&mut self, block: BlockId) -> Page {
        self.decoder.lend_page(block)
    }

    fn return_pages(&mut self, pages: Vec<(BlockId, Page)>) -> Result<(), BackendError> {
        if pages.is_empty() {
            return Ok(());
        }
        let blocks = pages.iter().map(|&(block, _)| block).collect();
        self.together(&Order::TakeBack(blocks), |model| {
            model.decoder.return_pages(pages)
        })
    }

    fn join_handoff(
        &mut self,
        page: PageShape,
        terms: &[u8],
    ) -> Result<Vec<Vec<u8>>, BackendError> {
        let terms = Cow::Borrowed(terms);
        self.together(&Order::JoinHandoff { page, terms }, Self::refusable_answers)
    }

    fn hand_off(&mut self, order: &RankOrder) -> Result<(), BackendError> {
        // A ticket must not be out before every rank has the lease.
        let awaited = matches!(order, RankOrder::Offer { .. });
        self.together(&Order::HandOff(Cow::Borrowed(order)), |model| {
            if awaited { model.answers() } else { Ok(()) }
        })
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

//! A rank that follows: it does its part of each order, until rank 0 says goodbye or is lost.
//!
//! Its hand-offs are its transceiver's, over its own pages. Pages that come back wait here until rank 0, which hears of
//! them from the transceiver, says that every rank's are back.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_configs::transceiver::TransceiverConfig;

use super::ParallelError;
use super::model::{ACCEPTED, REFUSED};
use super::order::{Order, Step};
use crate::backend::{Backend, BackendError, BlockId, RowWish};
use crate::handoff::{
    Fetch, Handoff, HandoffEvent, HandoffSink, HandoffTicket, KvLayout, Offer, RankOrder,
    RanksEvent,
};
use crate::model::Model;
use crate::model::decoder::Decoder;
use crate::model::shard::Shard;
use crate::page::{Page, PageShape};
use crate::transceiver::{Transceiver, TransceiverParams};
use crate::transport::fault::FaultPlan;

/// What a rank that follows hands over with.
#[derive(Debug)]
pub(crate) struct Follower<'a> {
    pub(crate) shard: &'a Shard,
    /// `cache_transceiver_config`, where the instance has one.
    pub(crate) transceiver: Option<TransceiverConfig>,
    /// This rank's address.
    pub(crate) host: String,
    /// Looked at between orders.
    pub(crate) stop: &'a AtomicBool,
}

/// What a transceiver has said that rank 0 has not asked for yet.
#[derive(Debug, Default)]
struct Shelf {
    pages: HashMap<BlockId, Page>,
    /// Why rank 0's transceiver hears nothing from here any more.
    lost: Option<String>,
}

/// A transceiver with its pages.
#[derive(Debug)]
struct Hands {
    transceiver: Transceiver,
    shelf: Arc<Mutex<Shelf>>,
}

/// Follows rank 0 to the end.
///
/// # Errors
/// When rank 0 or another rank is lost or silent, or this rank's device or transceiver fails.
pub(crate) fn follow<B: Backend>(
    decoder: &mut Decoder<B>,
    own: &Follower<'_>,
) -> Result<(), ParallelError> {
    let mut message = Vec::new();
    let (mut hands, mut steps) = (None, Steps::default());
    loop {
        decoder.collective().broadcast(&mut message)?;
        if own.stop.load(Ordering::Relaxed) {
            return Err(ParallelError::Stopped);
        }
        let order = Order::decode(&message).map_err(|error| nonsense(error.to_string()))?;
        // Rank 0's transceiver may end before this rank has read its goodbye.
        if order != Order::Goodbye {
            hands.as_ref().map_or(Ok(()), Hands::check)?;
        }
        match order {
            Order::Step(step) => steps.take(decoder, &step)?,
            Order::WarmUp(sequences_max) => {
                let warm = decoder.warm_up(sequences_max);
                answer_for(decoder, warm)?;
            }
            Order::Ping => {
                steps.finish(decoder)?;
                answer(decoder, b"")?;
            }
            Order::Allocate { page, block_count } => {
                let made = decoder.allocate_pages(own.shard.page(page), block_count);
                answer_for(decoder, made)?;
            }
            Order::JoinHandoff { page, terms } => {
                hands = Some(join(decoder, own, page, &terms)?);
            }
            Order::HandOff(order) => {
                let hands = hands.as_mut().ok_or_else(no_hands)?;
                hands.do_part(decoder, order.into_owned())?;
            }
            Order::TakeBack(blocks) => {
                let hands = hands.as_mut().ok_or_else(no_hands)?;
                decoder.return_pages(hands.take(&blocks)?)?;
            }
            Order::Goodbye => return Ok(steps.finish(decoder)?),
        }
    }
}

fn nonsense(reason: String) -> ParallelError {
    ParallelError::Message { from: 0, reason }
}

fn no_hands() -> ParallelError {
    nonsense("a hand-off without a transceiver".to_owned())
}

/// Answers rank 0: nothing when all is well.
fn answer<B: Backend>(decoder: &mut Decoder<B>, bytes: &[u8]) -> Result<(), BackendError> {
    Ok(decoder.collective().send(0, bytes)?)
}

/// Tells rank 0 what came of something.
fn answer_for<B: Backend>(
    decoder: &mut Decoder<B>,
    outcome: Result<(), BackendError>,
) -> Result<(), ParallelError> {
    let text = outcome.as_ref().err().map(ToString::to_string);
    answer(decoder, text.unwrap_or_default().as_bytes())?;
    Ok(outcome?)
}

/// Steps that go on by themselves: the next order is heard meanwhile.
#[derive(Debug, Default)]
struct Steps {
    under_way: usize,
}

impl Steps {
    /// As many as rank 0 has under way.
    const MAX: usize = 2;

    /// Does this rank's part of a step, or begins it.
    fn take<B: Backend>(
        &mut self,
        decoder: &mut Decoder<B>,
        step: &Step<'_>,
    ) -> Result<(), BackendError> {
        if !decoder.runs_by_itself() {
            return decoder.forward(&step.batch).map(drop);
        }
        if self.under_way == Self::MAX {
            self.under_way -= 1;
            decoder.finish()?;
        }
        // Nobody reads logits here, but every rank chooses, and goes on with what it has chosen.
        let mut wishes = step.wishes.to_vec();
        wishes.resize(step.batch.logit_rows.len(), RowWish::BEST);
        for wish in &mut wishes {
            if *wish == RowWish::Logits {
                *wish = RowWish::BEST;
            }
        }
        let begun = decoder.begin(&step.batch, &wishes, &step.carried)?;
        self.under_way += usize::from(begun.is_none());
        Ok(())
    }

    /// Waits for all that is under way.
    fn finish<B: Backend>(&mut self, decoder: &mut Decoder<B>) -> Result<(), BackendError> {
        for _ in 0..std::mem::take(&mut self.under_way) {
            decoder.finish()?;
        }
        Ok(())
    }
}

/// Starts this rank's transceiver and tells rank 0 how it is reached, or why there is none.
fn join<B: Backend>(
    decoder: &mut Decoder<B>,
    own: &Follower<'_>,
    page: PageShape,
    terms: &[u8],
) -> Result<Hands, ParallelError> {
    let model = (decoder.shape().fingerprint, decoder.page_device());
    let joined = Hands::start(model, own, page, terms);
    let reply = match &joined {
        Ok((_, record)) => [&[ACCEPTED], &record[..]].concat(),
        Err(error) => [&[REFUSED], error.to_string().as_bytes()].concat(),
    };
    answer(decoder, &reply)?;
    joined.map(|(hands, _)| hands)
}

impl Hands {
    /// Starts a transceiver on rank 0's terms, for a model with this fingerprint whose pages lie on this device. Returns how it
    /// is reached.
    fn start(
        (model_fingerprint, device): (u64, Option<usize>),
        own: &Follower<'_>,
        page: PageShape,
        terms: &[u8],
    ) -> Result<(Self, Vec<u8>), ParallelError> {
        let config = own.transceiver.clone().ok_or_else(no_hands)?;
        let place = own.shard.place;
        let number = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
        let layout = KvLayout {
            model_fingerprint,
            page,
            tensor_parallel: number(place.grid.tensor),
            pipeline_parallel: number(place.grid.pipeline),
        };
        let mut params = TransceiverParams::new(config, layout, &own.host);
        params.rank = number(place.rank());
        params.device = device;
        params.faults = FaultPlan::from_environment()?;
        let shelf = Arc::new(Mutex::new(Shelf::default()));
        let sink: HandoffSink = {
            let shelf = Arc::clone(&shelf);
            Arc::new(move |event| lock(&shelf).put(event))
        };
        let (transceiver, record) = Transceiver::follow(params, terms, sink)?;
        Ok((Self { transceiver, shelf }, record))
    }

    /// Whether the transceiver is still in touch with rank 0's.
    fn check(&self) -> Result<(), ParallelError> {
        match lock(&self.shelf).lost.take() {
            None => Ok(()),
            Some(reason) => Err(ParallelError::Rank {
                rank: "kv transceiver of rank 0".to_owned(),
                reason,
            }),
        }
    }

    fn do_part<B: Backend>(
        &mut self,
        decoder: &mut Decoder<B>,
        order: RankOrder,
    ) -> Result<(), BackendError> {
        match order {
            RankOrder::Offer {
                ctx_request_id,
                token_count,
                blocks,
                state,
            } => {
                let offer = Offer {
                    ctx_request_id,
                    token_count,
                    pages: decoder.share_pages(&blocks)?,
                };
                self.transceiver.join_offer(offer, &state);
                answer(decoder, b"")?;
            }
            RankOrder::Extend {
                ctx_request_id,
                blocks,
            } => {
                let pages = decoder.share_pages(&blocks)?;
                self.transceiver.extend(ctx_request_id, pages);
            }
            RankOrder::Withdraw(ctx_request_id) => self.transceiver.withdraw(ctx_request_id),
            RankOrder::Fetch {
                request,
                ctx_request_id,
                state,
                token_count,
                first_token,
                blocks,
            } => {
                let pages = blocks.into_iter();
                self.transceiver.fetch(Fetch {
                    request,
                    ticket: HandoffTicket {
                        ctx_request_id,
                        disagg_request_id: None,
                        opaque_state: state,
                        first_tokens: Vec::new(),
                        first_logprobs: Vec::new(),
                    },
                    token_count,
                    first_token,
                    pages: pages
                        .map(|block| (block, decoder.lend_page(block)))
                        .collect(),
                });
            }
            RankOrder::CancelFetch(request) => self.transceiver.cancel_fetch(request),
            RankOrder::Meet(state) => {
                // What does not fit, rank 0 has said.
                drop(self.transceiver.meet(&state));
            }
        }
        Ok(())
    }

    /// Pages that rank 0 knows to be back.
    fn take(&mut self, blocks: &[BlockId]) -> Result<Vec<(BlockId, Page)>, ParallelError> {
        let mut shelf = lock(&self.shelf);
        let pages = blocks.iter().map(|block| {
            let page = shelf.pages.remove(block);
            page.map(|page| (*block, page))
                .ok_or_else(|| nonsense(format!("the page of block {block} is not back here")))
        });
        pages.collect()
    }
}

impl Shelf {
    fn put(&mut self, event: HandoffEvent) {
        match event {
            HandoffEvent::PagesReturned { pages } => self.pages.extend(pages),
            HandoffEvent::Ranks(RanksEvent::Lost { reason, .. }) => self.lost = Some(reason),
            // Ends are rank 0's to hear.
            HandoffEvent::LeaseEnded { .. }
            | HandoffEvent::FetchEnded { .. }
            | HandoffEvent::Ranks(_) => {}
        }
    }
}

fn lock(shelf: &Mutex<Shelf>) -> MutexGuard<'_, Shelf> {
    shelf.lock().unwrap_or_else(PoisonError::into_inner)
}

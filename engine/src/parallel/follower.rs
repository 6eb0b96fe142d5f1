//! A rank that follows: it does its part of each order, until rank 0 says goodbye or is lost.

use std::sync::atomic::{AtomicBool, Ordering};

use super::ParallelError;
use super::order::Order;
use crate::backend::{Backend, BackendError, BlockId};
use crate::model::Model;
use crate::model::decoder::Decoder;
use crate::model::peers::{receive_bytes, send_bytes};
use crate::model::shard::Shard;

/// Follows rank 0 to the end. `stop` is looked at between orders.
///
/// # Errors
/// When rank 0 or another rank is lost or silent, or this rank's device fails.
pub(crate) fn follow<B: Backend>(
    decoder: &mut Decoder<B>,
    shard: &Shard,
    stop: &AtomicBool,
) -> Result<(), ParallelError> {
    let mut message = Vec::new();
    loop {
        decoder.collective().broadcast(&mut message)?;
        if stop.load(Ordering::Relaxed) {
            return Err(ParallelError::Stopped);
        }
        let order = Order::decode(&message).map_err(|error| ParallelError::Message {
            from: 0,
            reason: error.to_string(),
        })?;
        match order {
            Order::Step(batch) => drop(decoder.forward(&batch)?),
            Order::Ping => answer(decoder, "")?,
            Order::Allocate { page, block_count } => {
                match decoder.allocate_pages(shard.page(page), block_count) {
                    Ok(()) => answer(decoder, "")?,
                    Err(error) => {
                        answer(decoder, &error.to_string())?;
                        return Err(error.into());
                    }
                }
            }
            Order::Gather(blocks) => send_pages(decoder, shard, &blocks)?,
            Order::Scatter(blocks) => receive_pages(decoder, &blocks)?,
            Order::Goodbye => return Ok(()),
        }
    }
}

/// Answers rank 0: nothing when all is well.
fn answer<B: Backend>(decoder: &mut Decoder<B>, text: &str) -> Result<(), BackendError> {
    Ok(decoder.collective().send(0, text.as_bytes())?)
}

/// This rank's parts of some pages, unless a rank before this one holds the same.
fn send_pages<B: Backend>(
    decoder: &mut Decoder<B>,
    shard: &Shard,
    blocks: &[BlockId],
) -> Result<(), BackendError> {
    if !shard.first_holder {
        return Ok(());
    }
    for page in decoder.share_pages(blocks)? {
        send_bytes(decoder.collective(), 0, page.as_bytes())?;
    }
    Ok(())
}

fn receive_pages<B: Backend>(
    decoder: &mut Decoder<B>,
    blocks: &[BlockId],
) -> Result<(), BackendError> {
    let mut message = Vec::new();
    for &block in blocks {
        let mut page = decoder.lend_page(block);
        let target = (page.as_bytes_mut(), &mut message);
        receive_bytes(decoder.collective(), 0, target)?;
        decoder.return_pages(vec![(block, page)])?;
    }
    Ok(())
}

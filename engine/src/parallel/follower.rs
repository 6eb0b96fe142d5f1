//! A rank that follows: it does its part of each order, until rank 0 says goodbye or is lost.

use std::sync::atomic::{AtomicBool, Ordering};

use super::order::Order;
use super::{ParallelError, pages};
use crate::backend::{Backend, BackendError};
use crate::model::Model;
use crate::model::decoder::Decoder;
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
            Order::Gather(blocks) => pages::send_parts(decoder, shard, &blocks)?,
            Order::Scatter(blocks) => pages::receive_parts(decoder, &blocks)?,
            Order::Goodbye => return Ok(()),
        }
    }
}

/// Answers rank 0: nothing when all is well.
fn answer<B: Backend>(decoder: &mut Decoder<B>, text: &str) -> Result<(), BackendError> {
    Ok(decoder.collective().send(0, text.as_bytes())?)
}

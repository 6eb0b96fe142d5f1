//! Steps under way: what each gives is on its way to memory of its own, so that reading one does not wait for the next.
//!
//! The tokens that a step chooses stay on the device as well, where the next step finds those that it carries on with.
//! Logits that the host wants are copied when they are asked for, so a step that has them may not be overtaken.

use std::collections::VecDeque;
use std::sync::Arc;

use super::driver::{Gpu, PinnedMemory};
use super::error::CudaError;
use super::event::Event;
use super::{CudaBackend, CudaTensor, NOT_FINITE, ROWS_MAX};
use crate::backend::{RowWish, StepOutput};

/// Where a step's tokens land.
#[derive(Debug)]
struct Slot {
    tokens: PinnedMemory,
    landed: Event,
}

#[derive(Debug)]
struct Flight {
    slot: Slot,
    /// Its wide result; `None` when nobody wants any.
    out: Option<CudaTensor>,
    /// Of the result's rows; the others are padding.
    rows: usize,
    wishes: Vec<RowWish>,
}

/// The steps, oldest first.
#[derive(Debug, Default)]
pub(super) struct Flights {
    under_way: VecDeque<Flight>,
    idle: Vec<Slot>,
}

impl Flights {
    pub(super) fn is_empty(&self) -> bool {
        self.under_way.is_empty()
    }

    fn slot(&mut self, gpu: &Arc<Gpu>) -> Result<Slot, CudaError> {
        if let Some(slot) = self.idle.pop() {
            return Ok(slot);
        }
        Ok(Slot {
            tokens: PinnedMemory::new(gpu, ROWS_MAX * 4)?,
            landed: Event::new(gpu)?,
        })
    }
}

fn is_for_token(wish: &RowWish) -> bool {
    *wish != RowWish::Logits
}

impl CudaBackend {
    /// Has the results of what was just put on the stream come to the host.
    pub(super) fn take_off(
        &mut self,
        out: Option<CudaTensor>,
        rows: usize,
        wishes: &[RowWish],
    ) -> Result<(), CudaError> {
        let overtaken = self.flights.under_way.iter();
        assert!(
            overtaken
                .clone()
                .all(|flight| flight.out.is_none() || flight.wishes.len() == flight.rows),
            "logits are read before the next step begins"
        );
        let mut slot = self.flights.slot(&self.gpu)?;
        if out.is_some() && wishes.iter().any(is_for_token) {
            let tokens = self.tokens.memory();
            self.gpu
                .download_later(tokens, &mut slot.tokens, rows * 4)?;
        }
        slot.landed.record()?;
        self.flights.under_way.push_back(Flight {
            slot,
            out,
            rows,
            wishes: wishes.to_vec(),
        });
        Ok(())
    }

    /// Waits for the oldest step and gives what is wanted of it.
    pub(super) fn land_step(&mut self) -> Result<StepOutput, CudaError> {
        let Some(flight) = self.flights.under_way.pop_front() else {
            return Err(CudaError::Call {
                call: "reading a step",
                status: "none is under way".to_owned(),
            });
        };
        flight.slot.landed.wait()?;
        let mut output = StepOutput::default();
        if let Some(out) = &flight.out {
            let tokens: &[u32] =
                bytemuck::cast_slice(&flight.slot.tokens.as_slice()[..flight.rows * 4]);
            if flight.wishes.iter().any(is_for_token) {
                let chosen = tokens.iter().zip(&flight.wishes).map(|(&token, wish)| {
                    (is_for_token(wish) && token != NOT_FINITE).then_some(token)
                });
                output.chosen = chosen.collect();
            }
            self.land_values(out, &flight, &mut output)?;
        }
        self.flights.idle.push(flight.slot);
        Ok(output)
    }

    /// The values of the rows that have no token.
    fn land_values(
        &self,
        out: &CudaTensor,
        flight: &Flight,
        output: &mut StepOutput,
    ) -> Result<(), CudaError> {
        let StepOutput { values, chosen } = output;
        let missing = |row: usize| chosen.get(row).is_none_or(Option::is_none);
        let mut row = 0;
        while row < flight.rows {
            let count = (row..flight.rows).take_while(|&row| missing(row)).count();
            if count > 0 && self.flights.is_empty() {
                self.land(out, row..row + count, |landed| {
                    values.extend_from_slice(landed);
                })?;
            } else if count > 0 {
                // A later step has written over them. They were not finite, else there would be tokens.
                values.resize(values.len() + count * out.cols, f32::NAN);
            }
            row += count.max(1);
        }
        Ok(())
    }
}

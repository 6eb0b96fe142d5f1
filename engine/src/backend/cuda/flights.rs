//! Steps under way: what each gives is on its way to memory of its own, so that reading one does not wait for the next.
//!
//! The tokens that a step chooses stay on the device as well, where the next step finds those that it carries on with.
//! What is told of a token comes with it. Logits that the host wants are copied when they are asked for, so a step that has them
//! may not be overtaken.

use std::collections::VecDeque;
use std::sync::Arc;

use super::driver::{DeviceMemory, Gpu, PinnedMemory};
use super::error::CudaError;
use super::event::Event;
use super::step::TOLD_WORDS;
use super::{CudaBackend, CudaTensor, NOT_FINITE, ROWS_MAX};
use crate::backend::{RowWish, StepOutput, TokenId};
use crate::request::{Logprob, TokenLogprobs};

/// Where a step's tokens land.
#[derive(Debug)]
struct Slot {
    tokens: PinnedMemory,
    /// Where what is told of them lands; `None` until something was.
    told: Option<PinnedMemory>,
    landed: Event,
}

#[derive(Debug)]
struct Flight {
    slot: Slot,
    /// Its wide result; `None` when nobody wants any.
    out: Option<CudaTensor>,
    /// Of the result's rows; the others are padding.
    rows: usize,
    wanted: Vec<Wanted>,
}

/// What is to come of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Logits,
    Token,
    /// The token, and so many alternatives.
    Told(u32),
}

impl Wanted {
    fn of(wish: &RowWish) -> Self {
        match (wish, wish.logprobs()) {
            (RowWish::Logits, _) => Self::Logits,
            (RowWish::Token(_), None) => Self::Token,
            (RowWish::Token(_), Some(top)) => Self::Told(top),
        }
    }
}

/// The steps, oldest first.
#[derive(Debug, Default)]
pub(super) struct Flights {
    /// All that were begun; steps count from 1.
    begun: u64,
    under_way: VecDeque<Flight>,
    idle: Vec<Slot>,
}

impl Flights {
    pub(super) fn is_empty(&self) -> bool {
        self.under_way.is_empty()
    }

    /// The number of the step that is begun next.
    pub(super) const fn next(&self) -> u64 {
        self.begun + 1
    }

    /// The number of the last step that was waited for.
    pub(super) fn landed(&self) -> u64 {
        self.begun - self.under_way.len() as u64
    }

    fn slot(&mut self, gpu: &Arc<Gpu>) -> Result<Slot, CudaError> {
        if let Some(slot) = self.idle.pop() {
            return Ok(slot);
        }
        Ok(Slot {
            tokens: PinnedMemory::new(gpu, ROWS_MAX * 4)?,
            told: None,
            landed: Event::new(gpu)?,
        })
    }
}

impl Slot {
    /// Has what is told of so many rows come here.
    fn download_told(
        &mut self,
        (gpu, source): (&Arc<Gpu>, &DeviceMemory),
        rows: usize,
    ) -> Result<(), CudaError> {
        let bytes = rows * TOLD_WORDS * 4;
        let held = self
            .told
            .take()
            .filter(|held| held.as_slice().len() >= bytes);
        let mut target = match held {
            Some(held) => held,
            None => PinnedMemory::new(gpu, bytes.next_power_of_two())?,
        };
        gpu.download_later(source, &mut target, bytes)?;
        self.told = Some(target);
        Ok(())
    }

    fn tokens(&self, rows: usize) -> &[u32] {
        bytemuck::cast_slice(&self.tokens.as_slice()[..rows * 4])
    }

    /// What is told of each row, in the order of those of which something is.
    fn told(&self) -> impl Iterator<Item = &[u32]> {
        let bytes = self.told.as_ref().map_or(&[][..], PinnedMemory::as_slice);
        bytemuck::cast_slice(bytes).chunks_exact(TOLD_WORDS)
    }
}

/// What `choose.cu` tells of a token.
fn read_told(words: &[u32], token: TokenId, top: usize) -> TokenLogprobs {
    let (of_token, of_others) = words.split_at(2);
    let of_others = of_others.chunks_exact(2).take(top);
    TokenLogprobs {
        chosen: Logprob {
            token,
            logprob: f32::from_bits(of_token[0]),
            rank: of_token[1],
        },
        top: of_others
            .zip(1..)
            .map(|(pair, rank)| Logprob {
                token: pair[0],
                logprob: f32::from_bits(pair[1]),
                rank,
            })
            .collect(),
    }
}

impl Flight {
    /// The tokens, and what is told of them.
    fn land_tokens(&self, vocab: usize, output: &mut StepOutput) {
        let is_told = |wanted: &Wanted| matches!(wanted, Wanted::Told(_));
        if self.wanted.iter().all(|wanted| *wanted == Wanted::Logits) {
            return;
        }
        let tokens = self.slot.tokens(self.rows).iter();
        let chosen = tokens.zip(&self.wanted).map(|(&token, wanted)| {
            (*wanted != Wanted::Logits && token != NOT_FINITE).then_some(token)
        });
        output.chosen = chosen.collect();
        if !self.wanted.iter().any(is_told) {
            return;
        }
        let mut told = self.slot.told();
        let rows = output.chosen.iter().zip(&self.wanted);
        let logprobs = rows.map(|(&token, wanted)| {
            let Wanted::Told(top) = *wanted else {
                return None;
            };
            // Of a row without a token nothing was told, but it has its place.
            let words = told.next();
            Some(read_told(words?, token?, vocab.min(top as usize)))
        });
        output.logprobs = logprobs.collect();
    }
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
                .all(|flight| flight.out.is_none() || flight.wanted.len() == flight.rows),
            "logits are read before the next step begins"
        );
        let mut slot = self.flights.slot(&self.gpu)?;
        let wanted: Vec<Wanted> = wishes.iter().map(Wanted::of).collect();
        if out.is_some() && wanted.iter().any(|wanted| *wanted != Wanted::Logits) {
            let tokens = self.tokens.memory();
            self.gpu
                .download_later(tokens, &mut slot.tokens, rows * 4)?;
        }
        let told = wanted
            .iter()
            .filter(|wanted| matches!(wanted, Wanted::Told(_)));
        let told = told.count();
        if let Some(memory) = self.tables.told().filter(|_| told > 0) {
            slot.download_told((&self.gpu, memory), told)?;
        }
        slot.landed.record()?;
        self.flights.begun += 1;
        self.flights.under_way.push_back(Flight {
            slot,
            out,
            rows,
            wanted,
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
            flight.land_tokens(out.cols, &mut output);
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
        let StepOutput { values, chosen, .. } = output;
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

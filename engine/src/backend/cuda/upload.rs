//! How a step's lists come to the device: in one copy from pinned memory before the step, or by themselves where an
//! operation is called outside of one.
//!
//! Within a step, operations are handed the very batch that was uploaded, so where a list is on the device is told by
//! its address on the host. Invariant: pinned memory is written only when the copy from it has passed.

use std::cell::RefCell;
use std::ptr;
use std::sync::Arc;

use super::driver::{DeviceMemory, DevicePtr, Gpu, PinnedMemory};
use super::error::CudaError;
use super::event::Event;
use super::memory::{Buffer, Pool};
use super::ops::StepAddresses;
use super::step::{Places, StepLayout, encode};
use crate::backend::{StepBatch, StepWish};

/// Room for a step's lists at first, in words.
const WORDS_MIN: usize = 1 << 20;

/// A step's lists on the device.
#[derive(Debug)]
pub(super) struct OnDevice {
    pub(super) addresses: StepAddresses,
    pub(super) layout: StepLayout,
    /// Kept until the call has put its kernels on the stream.
    _own: Option<Buffer>,
}

/// Words on the device.
#[derive(Debug)]
pub(super) struct Words {
    pub(super) address: DevicePtr,
    _own: Option<Buffer>,
}

/// The step that is under way.
#[derive(Debug, Clone, Copy)]
struct Current {
    /// Addresses on the host, to be compared and never followed.
    batch: usize,
    tokens: usize,
    positions: usize,
    logit_rows: usize,
    layout: StepLayout,
}

/// What the lists go through.
#[derive(Debug)]
pub(super) struct Staging {
    gpu: Arc<Gpu>,
    words: RefCell<Vec<u32>>,
    /// Used in turn: the copy of one may be under way while the other is written.
    pinned: [Pinned; 2],
    turn: usize,
    target: DeviceMemory,
    current: Option<Current>,
}

#[derive(Debug)]
struct Pinned {
    memory: PinnedMemory,
    /// Set behind the last copy from it.
    copied: Event,
}

impl Pinned {
    fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, CudaError> {
        Ok(Self {
            memory: PinnedMemory::new(gpu, bytes)?,
            copied: Event::new(gpu)?,
        })
    }
}

impl Staging {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        Ok(Self {
            gpu: Arc::clone(gpu),
            words: RefCell::default(),
            pinned: [
                Pinned::new(gpu, WORDS_MIN * 4)?,
                Pinned::new(gpu, WORDS_MIN * 4)?,
            ],
            turn: 0,
            target: DeviceMemory::new(gpu, WORDS_MIN * 4)?,
            current: None,
        })
    }

    /// Uploads a step's lists, which are the current ones until [`Self::end`]. True when they are at other addresses than before.
    pub(super) fn begin(
        &mut self,
        batch: &StepBatch,
        wish: (StepWish<'_>, Places<'_>),
        per_block: usize,
    ) -> Result<bool, CudaError> {
        let words = self.words.get_mut();
        let layout = encode(batch, wish, per_block, words);
        let bytes: &[u8] = bytemuck::cast_slice(words);
        let moved = bytes.len() > self.target.bytes();
        if moved {
            let more = bytes.len().next_power_of_two();
            self.pinned = [Pinned::new(&self.gpu, more)?, Pinned::new(&self.gpu, more)?];
            self.target = DeviceMemory::new(&self.gpu, more)?;
        }
        self.turn = 1 - self.turn;
        let pinned = &mut self.pinned[self.turn];
        // It was the step before the last one's.
        pinned.copied.wait()?;
        let staged = &mut pinned.memory.as_mut_slice()[..bytes.len()];
        staged.copy_from_slice(bytes);
        self.gpu.upload(&self.target, 0, staged)?;
        pinned.copied.record()?;
        self.current = Some(Current {
            batch: ptr::from_ref(batch).addr(),
            tokens: batch.tokens.as_ptr().addr(),
            positions: batch.positions.as_ptr().addr(),
            logit_rows: batch.logit_rows.as_ptr().addr(),
            layout,
        });
        Ok(moved)
    }

    /// No step is under way any more.
    pub(super) fn end(&mut self) {
        self.current = None;
    }

    /// Of the current step: which rows go on with a token of the step before, and where tokens are.
    pub(super) fn carried(&self) -> (DevicePtr, DevicePtr) {
        let current = self.current.expect("tokens are carried within a step");
        let place = |offset| at(self.target.address(), offset);
        (place(current.layout.carried), place(current.layout.tokens))
    }

    /// How to choose a token for each of the current step's rows of logits, the tokens that its rows compute, and which rows have
    /// logits.
    pub(super) fn wishes(&self) -> [DevicePtr; 3] {
        let current = self.current.expect("tokens are chosen within a step");
        let layout = current.layout;
        let places = [layout.wishes, layout.tokens, layout.logit_rows];
        places.map(|offset| at(self.target.address(), offset))
    }

    /// A batch's lists.
    pub(super) fn of_batch(
        &self,
        pool: &Arc<Pool>,
        batch: &StepBatch,
        per_block: usize,
    ) -> Result<OnDevice, CudaError> {
        let address = ptr::from_ref(batch).addr();
        if let Some(current) = self.current.filter(|current| current.batch == address) {
            return Ok(OnDevice {
                addresses: addresses(self.target.address(), &current.layout),
                layout: current.layout,
                _own: None,
            });
        }
        let mut words = self.words.borrow_mut();
        let layout = encode(batch, Default::default(), per_block, &mut words);
        let buffer = self.upload(pool, &words)?;
        Ok(OnDevice {
            addresses: addresses(buffer.address(), &layout),
            layout,
            _own: Some(buffer),
        })
    }

    /// Tokens or positions.
    pub(super) fn of_words(&self, pool: &Arc<Pool>, words: &[u32]) -> Result<Words, CudaError> {
        let address = words.as_ptr().addr();
        let known = self.current.and_then(|current| {
            if address == current.tokens {
                Some(current.layout.tokens)
            } else {
                (address == current.positions).then_some(current.layout.positions)
            }
        });
        match known {
            Some(offset) => Ok(self.known(offset)),
            None => self.own(pool, words),
        }
    }

    /// Rows that are selected.
    pub(super) fn of_rows(&self, pool: &Arc<Pool>, rows: &[usize]) -> Result<Words, CudaError> {
        let address = rows.as_ptr().addr();
        match self.current.filter(|current| current.logit_rows == address) {
            Some(current) => Ok(self.known(current.layout.logit_rows)),
            None => {
                let word = |&row| u32::try_from(row).expect("rows fit 32 bits");
                let words: Vec<u32> = rows.iter().map(word).collect();
                self.own(pool, &words)
            }
        }
    }

    fn known(&self, offset: usize) -> Words {
        Words {
            address: at(self.target.address(), offset),
            _own: None,
        }
    }

    fn own(&self, pool: &Arc<Pool>, words: &[u32]) -> Result<Words, CudaError> {
        let buffer = self.upload(pool, words)?;
        Ok(Words {
            address: buffer.address(),
            _own: Some(buffer),
        })
    }

    fn upload(&self, pool: &Arc<Pool>, words: &[u32]) -> Result<Buffer, CudaError> {
        let bytes = bytemuck::cast_slice(words);
        let buffer = pool.take(bytes.len())?;
        self.gpu.upload(buffer.memory(), 0, bytes)?;
        Ok(buffer)
    }
}

fn at(base: DevicePtr, words: usize) -> DevicePtr {
    base + 4 * words as u64
}

fn addresses(base: DevicePtr, layout: &StepLayout) -> StepAddresses {
    StepAddresses {
        positions: at(base, layout.positions),
        row_blocks: at(base, layout.row_blocks),
        first_rows: at(base, layout.first_rows),
        row_counts: at(base, layout.row_counts),
        past_lens: at(base, layout.past_lens),
        block_starts: at(base, layout.block_starts),
        blocks: at(base, layout.blocks),
        decodes: at(base, layout.decodes),
        tiles: at(base, layout.tiles),
    }
}

//! What rank 0 tells the others to do, as bytes. A step is one message, whatever its size: numbers are written seven
//! bits a byte, block numbers as differences, and positions not at all, because they follow from the sequences.

mod wishes;

use std::borrow::Cow;

use crate::backend::{BlockId, Carried, RowWish, SequenceSpan, StepBatch};
use crate::handoff::RankOrder;
use crate::page::{KvDtype, PageShape};
use crate::request::RequestId;

/// Something that all ranks of an instance do at the same time.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Order<'a> {
    /// One forward pass.
    Step(Step<'a>),
    /// Make ready what steps of up to so many sequences need. Answered.
    WarmUp(usize),
    /// Answer, so that rank 0 knows that you are there.
    Ping,
    /// Make your pool: as many pages as this, each your part of a page of this shape. Answered.
    Allocate { page: PageShape, block_count: usize },
    /// Start your transceiver, for the whole model's page and on these terms. Answered.
    JoinHandoff {
        page: PageShape,
        terms: Cow<'a, [u8]>,
    },
    /// Do your part of a hand-off. An offer is answered.
    HandOff(Cow<'a, RankOrder>),
    /// Take these pages back that your transceiver has returned.
    TakeBack(Vec<BlockId>),
    /// The instance ends as it should.
    Goodbye,
}

/// One forward pass, and what follows from it where devices go on by themselves: every rank chooses the same tokens.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Step<'a> {
    pub(crate) batch: Cow<'a, StepBatch>,
    /// As in [`crate::backend::StepWish`].
    pub(crate) wishes: Cow<'a, [RowWish]>,
    /// As in [`crate::backend::StepWish`].
    pub(crate) carried: Cow<'a, [Carried]>,
}

/// Bytes that are no order; says why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an order: {0}")]
pub(crate) struct OrderError(&'static str);

const STEP: u8 = 1;
const WARM_UP: u8 = 13;
const PING: u8 = 2;
const ALLOCATE: u8 = 3;
const JOIN_HANDOFF: u8 = 4;
const TAKE_BACK: u8 = 5;
const GOODBYE: u8 = 6;
const OFFER: u8 = 7;
const WITHDRAW: u8 = 8;
const FETCH: u8 = 9;
const CANCEL_FETCH: u8 = 10;
const EXTEND: u8 = 11;
const MEET: u8 = 12;

impl Order<'_> {
    /// The message.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        match self {
            Self::Step(step) => {
                out.byte(STEP);
                out.step(&step.batch);
                out.wishes(&step.wishes);
                out.carried(&step.carried);
            }
            Self::WarmUp(sequences_max) => {
                out.byte(WARM_UP);
                out.number(*sequences_max as u64);
            }
            Self::Ping => out.byte(PING),
            Self::Allocate { page, block_count } => {
                out.byte(ALLOCATE);
                out.number(*block_count as u64);
                out.page(page);
            }
            Self::JoinHandoff { page, terms } => {
                out.byte(JOIN_HANDOFF);
                out.page(page);
                out.bytes(terms);
            }
            Self::HandOff(order) => out.hand_off(order),
            Self::TakeBack(blocks) => {
                out.byte(TAKE_BACK);
                out.blocks(blocks);
            }
            Self::Goodbye => out.byte(GOODBYE),
        }
        out.0
    }

    /// Reads a message.
    pub(crate) fn decode(message: &[u8]) -> Result<Order<'static>, OrderError> {
        let mut from = Reader(message);
        let order = match from.byte()? {
            STEP => {
                let batch = from.step()?;
                Order::Step(Step {
                    wishes: Cow::Owned(from.wishes(&batch)?),
                    carried: Cow::Owned(from.carried(&batch)?),
                    batch: Cow::Owned(batch),
                })
            }
            WARM_UP => Order::WarmUp(from.size()?),
            PING => Order::Ping,
            ALLOCATE => Order::Allocate {
                block_count: from.size()?,
                page: from.page()?,
            },
            JOIN_HANDOFF => Order::JoinHandoff {
                page: from.page()?,
                terms: Cow::Owned(from.bytes()?),
            },
            TAKE_BACK => Order::TakeBack(from.blocks()?),
            GOODBYE => Order::Goodbye,
            kind @ (OFFER | EXTEND | WITHDRAW | FETCH | CANCEL_FETCH | MEET) => {
                Order::HandOff(Cow::Owned(from.hand_off(kind)?))
            }
            _ => return Err(OrderError("its kind is unknown")),
        };
        if from.0.is_empty() {
            Ok(order)
        } else {
            Err(OrderError("it is longer than its content"))
        }
    }
}

#[derive(Debug, Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }

    /// Seven bits a byte, lowest first; the eighth says that more follow.
    fn number(&mut self, mut value: u64) {
        loop {
            let [low, ..] = value.to_le_bytes();
            value >>= 7;
            if value == 0 {
                return self.byte(low & 0x7f);
            }
            self.byte(low | 0x80);
        }
    }

    fn numbers(&mut self, values: impl ExactSizeIterator<Item = u64>) {
        self.number(values.len() as u64);
        values.for_each(|value| self.number(value));
    }

    /// Differences, the sign in the lowest bit: blocks are often neighbours.
    fn blocks(&mut self, blocks: &[BlockId]) {
        let mut last = 0;
        self.numbers(blocks.iter().map(|&block| {
            let difference = i64::from(block) - last;
            last = i64::from(block);
            ((difference << 1) ^ (difference >> 63)).cast_unsigned()
        }));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn hand_off(&mut self, order: &RankOrder) {
        match order {
            RankOrder::Offer {
                ctx_request_id,
                token_count,
                blocks,
                state,
            } => {
                self.byte(OFFER);
                self.number(*ctx_request_id);
                self.number(*token_count as u64);
                self.blocks(blocks);
                self.bytes(state);
            }
            RankOrder::Extend {
                ctx_request_id,
                blocks,
            } => {
                self.byte(EXTEND);
                self.number(*ctx_request_id);
                self.blocks(blocks);
            }
            RankOrder::Withdraw(ctx_request_id) => {
                self.byte(WITHDRAW);
                self.number(*ctx_request_id);
            }
            RankOrder::Fetch {
                request,
                ctx_request_id,
                state,
                token_count,
                first_token,
                blocks,
            } => {
                self.byte(FETCH);
                self.number(request.0);
                self.number(*ctx_request_id);
                self.number(*token_count as u64);
                self.number(*first_token as u64);
                self.blocks(blocks);
                self.bytes(state);
            }
            RankOrder::CancelFetch(request) => {
                self.byte(CANCEL_FETCH);
                self.number(request.0);
            }
            RankOrder::Meet(state) => {
                self.byte(MEET);
                self.bytes(state);
            }
        }
    }

    fn step(&mut self, batch: &StepBatch) {
        self.numbers(batch.tokens.iter().map(|&token| u64::from(token)));
        self.number(batch.sequences.len() as u64);
        for span in &batch.sequences {
            debug_assert!(
                (span.past_len..)
                    .zip(&batch.positions[span.rows.clone()])
                    .all(|(expected, &position)| position as usize == expected),
                "positions follow from what is in the pool"
            );
            self.number(span.rows.len() as u64);
            self.number(span.past_len as u64);
            self.blocks(&span.blocks);
        }
        let mut last = 0;
        self.numbers(batch.logit_rows.iter().map(|&row| {
            let difference = row - last;
            last = row;
            difference as u64
        }));
    }

    fn carried(&mut self, carried: &[Carried]) {
        self.number(carried.len() as u64);
        for &Carried { row, from } in carried {
            self.number(row as u64);
            self.number(from as u64);
        }
    }

    fn page(&mut self, page: &PageShape) {
        for size in [
            page.layers,
            page.kv_heads,
            page.tokens_per_block,
            page.head_dim,
        ] {
            self.number(size as u64);
        }
        self.byte(match page.dtype {
            KvDtype::F32 => 0,
            KvDtype::F16 => 1,
            KvDtype::Bf16 => 2,
            KvDtype::Fp8 => 3,
        });
    }
}

const SHORT: OrderError = OrderError("it is cut short");
const RANGE: OrderError = OrderError("a number is out of range");

#[derive(Debug)]
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn byte(&mut self) -> Result<u8, OrderError> {
        let (&byte, rest) = self.0.split_first().ok_or(SHORT)?;
        self.0 = rest;
        Ok(byte)
    }

    fn number(&mut self) -> Result<u64, OrderError> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return Err(RANGE);
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(RANGE)
    }

    fn size(&mut self) -> Result<usize, OrderError> {
        // Far above any row, token or block count, and far below what overflows.
        const SIZE_MAX: u64 = 1 << 40;
        let value = self.number()?;
        usize::try_from(value)
            .ok()
            .filter(|_| value < SIZE_MAX)
            .ok_or(RANGE)
    }

    /// How many items follow, each of which takes a byte at least.
    fn count(&mut self) -> Result<usize, OrderError> {
        let count = self.size()?;
        if count > self.0.len() {
            return Err(SHORT);
        }
        Ok(count)
    }

    fn blocks(&mut self) -> Result<Vec<BlockId>, OrderError> {
        let count = self.count()?;
        let mut last = 0_i64;
        (0..count)
            .map(|_| {
                let coded = self.number()?;
                let difference = (coded >> 1).cast_signed() ^ -(coded & 1).cast_signed();
                last = last.checked_add(difference).ok_or(RANGE)?;
                BlockId::try_from(last).map_err(|_| RANGE)
            })
            .collect()
    }

    fn bytes(&mut self) -> Result<Vec<u8>, OrderError> {
        let count = self.count()?;
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(SHORT)?;
        self.0 = rest;
        Ok(bytes.to_vec())
    }

    fn hand_off(&mut self, kind: u8) -> Result<RankOrder, OrderError> {
        Ok(match kind {
            OFFER => RankOrder::Offer {
                ctx_request_id: self.number()?,
                token_count: self.size()?,
                blocks: self.blocks()?,
                state: self.bytes()?,
            },
            EXTEND => RankOrder::Extend {
                ctx_request_id: self.number()?,
                blocks: self.blocks()?,
            },
            WITHDRAW => RankOrder::Withdraw(self.number()?),
            FETCH => RankOrder::Fetch {
                request: RequestId(self.number()?),
                ctx_request_id: self.number()?,
                token_count: self.size()?,
                first_token: self.size()?,
                blocks: self.blocks()?,
                state: self.bytes()?,
            },
            MEET => RankOrder::Meet(self.bytes()?),
            _ => RankOrder::CancelFetch(RequestId(self.number()?)),
        })
    }

    fn step(&mut self) -> Result<StepBatch, OrderError> {
        let mut batch = StepBatch::default();
        for _ in 0..self.count()? {
            let token = self.number()?;
            batch.tokens.push(token.try_into().map_err(|_| RANGE)?);
        }
        for _ in 0..self.count()? {
            let (rows, past_len) = (self.size()?, self.size()?);
            let start = batch.positions.len();
            if rows > batch.tokens.len() - start {
                return Err(OrderError(
                    "its sequences have more rows than there are tokens",
                ));
            }
            for position in past_len..past_len + rows {
                batch
                    .positions
                    .push(position.try_into().map_err(|_| RANGE)?);
            }
            batch.sequences.push(SequenceSpan {
                rows: start..start + rows,
                past_len,
                blocks: self.blocks()?,
            });
        }
        if batch.positions.len() != batch.tokens.len() {
            return Err(OrderError(
                "its sequences have fewer rows than there are tokens",
            ));
        }
        let mut last = 0;
        for _ in 0..self.count()? {
            last += self.size()?;
            if last >= batch.tokens.len() {
                return Err(OrderError("logits are wanted of a row that is not there"));
            }
            batch.logit_rows.push(last);
        }
        Ok(batch)
    }

    fn carried(&mut self, batch: &StepBatch) -> Result<Vec<Carried>, OrderError> {
        let carried = |from: &mut Self| {
            let (row, from) = (from.size()?, from.size()?);
            if row >= batch.tokens.len() {
                return Err(OrderError("a token is carried to a row that is not there"));
            }
            Ok(Carried { row, from })
        };
        (0..self.count()?).map(|_| carried(self)).collect()
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], OrderError> {
        let (&bytes, rest) = self.0.split_first_chunk().ok_or(SHORT)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn page(&mut self) -> Result<PageShape, OrderError> {
        Ok(PageShape {
            layers: self.size()?,
            kv_heads: self.size()?,
            tokens_per_block: self.size()?,
            head_dim: self.size()?,
            dtype: match self.byte()? {
                0 => KvDtype::F32,
                1 => KvDtype::F16,
                2 => KvDtype::Bf16,
                3 => KvDtype::Fp8,
                _ => return Err(OrderError("its element type is unknown")),
            },
        })
    }
}

#[cfg(test)]
mod tests;

//! What is wanted of a step's rows, as bytes: ranks that choose tokens by themselves all do it the same way.

use std::sync::Arc;

use super::{OrderError, RANGE, Reader, Writer};
use crate::backend::{
    ALTERNATIVES_MAX, BIASES_MAX, Changes, Choice, Draw, Penalties, RowWish, Seen, StepBatch,
    TABLES_MAX, TokenId, TokenWish,
};

const LOGITS: u8 = 0;
const BEST: u8 = 1;
const DRAW: u8 = 2;
const GIVEN: u8 = 3;
/// Besides one of these: log-probabilities are told.
const TELLS: u8 = 0x10;
/// Logits are changed.
const CHANGES: u8 = 0x20;

/// Bits of a change.
const ANEW: u8 = 1;
const COUNTS_OWN: u8 = 2;
const BANS: u8 = 4;

impl Writer {
    pub(super) fn wishes(&mut self, wishes: &[RowWish]) {
        self.number(wishes.len() as u64);
        for wish in wishes {
            match wish {
                RowWish::Logits => self.byte(LOGITS),
                RowWish::Token(wish) => self.token_wish(wish),
            }
        }
    }

    fn token_wish(&mut self, wish: &TokenWish) {
        let kind = match wish.choice {
            Choice::Best => BEST,
            Choice::Draw(_) => DRAW,
            Choice::Given(_) => GIVEN,
        };
        let tells = if wish.logprobs.is_some() { TELLS } else { 0 };
        let changes = if wish.changes.is_some() { CHANGES } else { 0 };
        self.byte(kind | tells | changes);
        match wish.choice {
            Choice::Best => {}
            Choice::Draw(draw) => {
                self.floats(&[draw.temperature, draw.top_p, draw.min_p]);
                self.0.extend(draw.top_k.to_le_bytes());
                self.0.extend(draw.uniform.to_le_bytes());
            }
            Choice::Given(token) => self.number(token.into()),
        }
        if let Some(top) = wish.logprobs {
            self.number(top.into());
        }
        if let Some(changes) = &wish.changes {
            self.changes(changes);
        }
    }

    fn changes(&mut self, changes: &Changes) {
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        self.byte(
            bit(changes.anew.is_some(), ANEW)
                | bit(changes.counts_own, COUNTS_OWN)
                | bit(changes.bans, BANS),
        );
        self.number(changes.table.into());
        let Penalties {
            repetition,
            frequency,
            presence,
        } = changes.penalties;
        self.floats(&[repetition, frequency, presence]);
        let Some(seen) = &changes.anew else { return };
        self.number(seen.vocab as u64);
        for tokens in [&seen.prompt, &seen.answer, &seen.bannable] {
            self.numbers(tokens.iter().map(|&token| token.into()));
        }
        self.number(seen.biases.len() as u64);
        for &(token, bias) in &seen.biases {
            self.number(token.into());
            self.floats(&[bias]);
        }
    }

    fn floats(&mut self, values: &[f32]) {
        self.0
            .extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
}

impl Reader<'_> {
    pub(super) fn wishes(&mut self, batch: &StepBatch) -> Result<Vec<RowWish>, OrderError> {
        let count = self.count()?;
        if count != 0 && count != batch.logit_rows.len() {
            return Err(OrderError("its wishes are not one for each row of logits"));
        }
        (0..count).map(|_| self.wish()).collect()
    }

    fn wish(&mut self) -> Result<RowWish, OrderError> {
        let kind = self.byte()?;
        if kind == LOGITS {
            return Ok(RowWish::Logits);
        }
        let choice = match kind & !(TELLS | CHANGES) {
            BEST => Choice::Best,
            DRAW => Choice::Draw(Draw {
                temperature: self.float()?,
                top_p: self.float()?,
                min_p: self.float()?,
                top_k: u32::from_le_bytes(self.array()?),
                uniform: f64::from_le_bytes(self.array()?),
            }),
            GIVEN => Choice::Given(self.token()?),
            _ => return Err(OrderError("a wish is unknown")),
        };
        let logprobs = (kind & TELLS != 0).then(|| self.token()).transpose()?;
        if logprobs.is_some_and(|top| top as usize > ALTERNATIVES_MAX) {
            return Err(OrderError("more alternatives than a device tells"));
        }
        let changes = (kind & CHANGES != 0).then(|| self.changes()).transpose()?;
        Ok(RowWish::Token(TokenWish {
            choice,
            changes,
            logprobs,
        }))
    }

    fn changes(&mut self) -> Result<Changes, OrderError> {
        let bits = self.byte()?;
        let table = self.token()?;
        if table as usize >= TABLES_MAX {
            return Err(OrderError("a table is not there"));
        }
        let penalties = Penalties {
            repetition: self.float()?,
            frequency: self.float()?,
            presence: self.float()?,
        };
        let anew = (bits & ANEW != 0).then(|| self.seen()).transpose()?;
        Ok(Changes {
            table,
            anew: anew.map(Arc::new),
            counts_own: bits & COUNTS_OWN != 0,
            penalties,
            bans: bits & BANS != 0,
        })
    }

    fn seen(&mut self) -> Result<Seen, OrderError> {
        let vocab = self.size()?;
        let (prompt, answer, bannable) = (self.tokens()?, self.tokens()?, self.tokens()?);
        let count = self.count()?;
        if count > BIASES_MAX {
            return Err(OrderError("more biases than a table takes"));
        }
        let biases = (0..count).map(|_| Ok((self.token()?, self.float()?)));
        Ok(Seen {
            vocab,
            biases: biases.collect::<Result<_, _>>()?,
            prompt,
            answer,
            bannable,
        })
    }

    fn tokens(&mut self) -> Result<Vec<TokenId>, OrderError> {
        (0..self.count()?).map(|_| self.token()).collect()
    }

    fn token(&mut self) -> Result<TokenId, OrderError> {
        let number = self.number()?;
        TokenId::try_from(number).map_err(|_| RANGE)
    }

    fn float(&mut self) -> Result<f32, OrderError> {
        self.array().map(f32::from_le_bytes)
    }
}

//! What a device is asked for each row of a step, and which of its tables holds what which sequence has written.
//!
//! A device that runs by itself may be asked for more than a token by the logits as they are, so that the host need not see these and
//! the next step may begin. What it must know of a sequence for that is in one of its tables. They are kept like a cache: a row's
//! wish says either that its table goes on, or what it holds from now on. Invariant: a table goes on only where it holds exactly
//! the tokens before the row's own, so pre-emption, hand-off and whatever else happens cost a table made anew at most.

use std::collections::HashMap;
use std::sync::Arc;

use crate::backend::{
    ALTERNATIVES_MAX, BIASES_MAX, Changes, Choice, Penalties, RowWish, Seen, TABLES_MAX, TokenId,
    TokenWish,
};
use crate::request::RequestId;
use crate::sampler::{changes_logits, choice};
use crate::sequence::Sequence;

/// Makes the wishes of one engine's steps, in their order.
#[derive(Debug)]
pub(crate) struct Wishes {
    /// Whether the device does more than choose by the logits as they are.
    by_device: bool,
    vocab: usize,
    eos: Vec<TokenId>,
    tables: Tables,
}

impl Wishes {
    /// `rows_max` sequences have a row of a step at most.
    pub(crate) fn new(by_device: bool, vocab: usize, eos: &[TokenId], rows_max: usize) -> Self {
        Self {
            by_device,
            vocab,
            eos: eos.to_vec(),
            tables: Tables::new(TABLES_MAX.min(rows_max)),
        }
    }

    /// Another step is planned.
    pub(crate) fn next_step(&mut self) {
        self.tables.step += 1;
    }

    /// A sequence has ended.
    pub(crate) fn forget(&mut self, id: RequestId) {
        self.tables.forget(id);
    }

    /// For the row by which a sequence's next token is chosen.
    pub(crate) fn next_token(&mut self, sequence: &Sequence) -> RowWish {
        let params = &sequence.sampling;
        let answer_len = sequence.len_ahead() - sequence.prompt_len;
        let mut wish = TokenWish {
            choice: choice(params, answer_len),
            changes: None,
            logprobs: params.logprobs,
        };
        let changed = changes_logits(params, answer_len);
        let more = changed || wish.logprobs.is_some();
        if more && (!self.by_device || !tells(wish.logprobs)) {
            return RowWish::Logits;
        }
        if changed {
            let Some(changes) = self.changes(sequence) else {
                return RowWish::Logits;
            };
            wish.changes = Some(changes);
        }
        RowWish::Token(wish)
    }

    /// For a row of the prompt whose next token's log-probability is wanted.
    pub(crate) fn prompt_token(&self, sequence: &Sequence, position: usize) -> RowWish {
        let logprobs = sequence.sampling.prompt_logprobs;
        if !self.by_device || !tells(logprobs) {
            return RowWish::Logits;
        }
        RowWish::Token(TokenWish {
            choice: Choice::Given(sequence.tokens[position + 1]),
            changes: None,
            logprobs,
        })
    }

    /// `None` when no table can be had.
    fn changes(&mut self, sequence: &Sequence) -> Option<Changes> {
        let params = &sequence.sampling;
        if params.logit_bias.len() > BIASES_MAX {
            return None;
        }
        let (prompt_len, end) = (sequence.prompt_len, sequence.len_ahead());
        let counts_own = end > prompt_len;
        // The row's own token may be one that the device has chosen and nobody else knows.
        let before = end - usize::from(counts_own);
        let (table, goes_on) = self.tables.place(sequence.id, (before, end))?;
        let anew = (!goes_on).then(|| {
            let ignored = (params.prompt_ignore_length as usize).min(prompt_len);
            Arc::new(Seen {
                vocab: self.vocab,
                prompt: sequence.tokens[ignored..prompt_len].to_vec(),
                answer: sequence.tokens[prompt_len..before].to_vec(),
                biases: params.logit_bias.clone(),
                bannable: [&self.eos[..], &params.stop_token_ids].concat(),
            })
        });
        Some(Changes {
            table,
            anew,
            counts_own,
            penalties: Penalties {
                repetition: params.repetition_penalty,
                frequency: params.frequency_penalty,
                presence: params.presence_penalty,
            },
            bans: end - prompt_len < params.min_tokens as usize,
        })
    }
}

fn tells(logprobs: Option<u32>) -> bool {
    logprobs.is_none_or(|top| top as usize <= ALTERNATIVES_MAX)
}

/// Whose the tables are.
#[derive(Debug)]
struct Tables {
    max: usize,
    held: Vec<Held>,
    of: HashMap<RequestId, usize>,
    step: u64,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    /// `None` when it has ended.
    by: Option<RequestId>,
    /// Tokens of the sequence that are in the table once all planned steps have run.
    len: usize,
    /// The last step that uses it.
    step: u64,
}

impl Tables {
    fn new(max: usize) -> Self {
        Self {
            max,
            held: Vec::new(),
            of: HashMap::new(),
            step: 0,
        }
    }

    /// A sequence's table for this step, and whether it holds `before` tokens; it will hold `after`. `None` when others need
    /// them all.
    fn place(&mut self, id: RequestId, (before, after): (usize, usize)) -> Option<(u32, bool)> {
        let known = self.of.get(&id).copied();
        let index = known.or_else(|| self.take())?;
        let goes_on = known.is_some() && self.held[index].len == before;
        self.held[index] = Held {
            by: Some(id),
            len: after,
            step: self.step,
        };
        self.of.insert(id, index);
        Some((u32::try_from(index).expect("tables are few"), goes_on))
    }

    /// One that nobody has, or a new one, or that which was not used for longest. None is taken from who writes.
    fn take(&mut self) -> Option<usize> {
        if let Some(free) = self.held.iter().position(|held| held.by.is_none()) {
            return Some(free);
        }
        if self.held.len() < self.max {
            self.held.push(Held {
                by: None,
                len: 0,
                step: 0,
            });
            return Some(self.held.len() - 1);
        }
        let idle = self.held.iter().enumerate();
        // Those of the last step go on in this one, most likely.
        let idle = idle.filter(|(_, held)| held.step + 1 < self.step);
        let (index, held) = idle.min_by_key(|(_, held)| held.step)?;
        if let Some(id) = held.by {
            self.of.remove(&id);
        }
        Some(index)
    }

    fn forget(&mut self, id: RequestId) {
        if let Some(index) = self.of.remove(&id) {
            self.held[index].by = None;
        }
    }
}

#[cfg(test)]
mod tests;

//! What the device keeps so that it can choose as the host's sampler does: a table for each sequence whose logits are changed, of
//! what that holds, and room for what is told of tokens.
//!
//! Tables are made anew before a step, when its wishes say so, by a kernel outside of any recording; the step itself counts in them
//! (`choose.cu`). Where they are, each row is told with its wish, so recordings know nothing of them. Memory comes with
//! the first need and stays: it is what the pool of pages has left. Whose table is which is the engine's knowledge.

use super::CudaBackend;
use super::driver::{DeviceMemory, DevicePtr};
use super::error::CudaError;
use super::memory::{Buffer, Pool};
use super::step::{Places, TOLD_WORDS};
use crate::backend::{BIASES_MAX, Changes, RowWish, Seen, TABLES_MAX};
use std::sync::Arc;

/// Words of a `Job` in `seen.cu`.
const JOB_WORDS: usize = 8;

/// The tables, and where tokens are told of.
#[derive(Debug, Default)]
pub(super) struct Tables {
    buffers: Vec<Option<Buffer>>,
    /// Of the buffers; 0 for none.
    addresses: Vec<DevicePtr>,
    /// Tokens that each has a word for; 0 while there is none.
    vocab: usize,
    told: Option<Buffer>,
}

impl Tables {
    /// What wishes refer to.
    pub(super) fn places(&self) -> Places<'_> {
        Places {
            tables: &self.addresses,
            told: self.told.as_ref().map_or(0, Buffer::address),
        }
    }

    /// Where the last step's tokens are told of.
    pub(super) fn told(&self) -> Option<&DeviceMemory> {
        self.told.as_ref().map(Buffer::memory)
    }

    /// Asserts that logits of so many columns can be changed by the tables.
    pub(super) fn check(&self, cols: usize) {
        assert!(self.vocab == 0 || self.vocab == cols, "tokens of a table");
    }

    /// The table of that number, which there is from now on.
    fn table(
        &mut self,
        pool: &Arc<Pool>,
        number: usize,
        vocab: usize,
    ) -> Result<DevicePtr, CudaError> {
        assert!(number < TABLES_MAX, "tables are few");
        assert!(self.vocab == 0 || self.vocab == vocab, "one vocabulary");
        self.vocab = vocab;
        if self.buffers.len() <= number {
            self.buffers.resize_with(number + 1, || None);
            self.addresses.resize(number + 1, 0);
        }
        if self.buffers[number].is_none() {
            let buffer = pool.take((vocab + 1 + 2 * BIASES_MAX) * 4)?;
            self.addresses[number] = buffer.address();
            self.buffers[number] = Some(buffer);
        }
        Ok(self.addresses[number])
    }
}

impl CudaBackend {
    /// Makes ready what a step's wishes refer to.
    pub(super) fn ready_tables(&mut self, rows: &[RowWish]) -> Result<(), CudaError> {
        let told = rows.iter().filter(|row| row.logprobs().is_some()).count();
        let bytes = told * TOLD_WORDS * 4;
        let room = self.tables.told().map_or(0, DeviceMemory::bytes);
        if room < bytes {
            // Steps under way that tell to the former come before in the stream.
            self.tables.told = Some(self.pool.take(bytes.next_power_of_two())?);
        }
        let changes = rows.iter().filter_map(|row| match row {
            RowWish::Token(wish) => wish.changes.as_ref(),
            RowWish::Logits => None,
        });
        let mut jobs = Vec::new();
        for Changes { table, anew, .. } in changes {
            let Some(seen) = anew.as_deref() else {
                assert!(
                    self.tables
                        .addresses
                        .get(*table as usize)
                        .is_some_and(|&at| at > 0),
                    "a table that goes on was made"
                );
                continue;
            };
            let address = self.tables.table(&self.pool, *table as usize, seen.vocab)?;
            jobs.push((address, seen));
        }
        if jobs.is_empty() {
            return Ok(());
        }
        let words = job_words(&jobs);
        let bytes = bytemuck::cast_slice(&words);
        let buffer = self.pool.take(bytes.len())?;
        self.gpu.upload(buffer.memory(), 0, bytes)?;
        self.ops.get_mut().seen(buffer.address(), jobs.len())
    }
}

/// The jobs, then their lists, as `seen.cu` reads them.
fn job_words(jobs: &[(DevicePtr, &Seen)]) -> Vec<u32> {
    let word = |value: usize| u32::try_from(value).expect("lists of a step fit 32 bits");
    let mut words = Vec::new();
    let mut first = jobs.len() * JOB_WORDS;
    for (address, seen) in jobs {
        assert!(seen.biases.len() <= BIASES_MAX, "a table's biases");
        words.extend(bytemuck::cast::<_, [u32; 2]>(*address));
        words.extend([seen.vocab, first].map(word));
        let lists = [&seen.prompt, &seen.answer, &seen.bannable].map(Vec::len);
        words.extend(lists.map(word));
        words.push(word(seen.biases.len()));
        first += lists.iter().sum::<usize>() + 2 * seen.biases.len();
    }
    for (_, seen) in jobs {
        for tokens in [&seen.prompt, &seen.answer, &seen.bannable] {
            words.extend_from_slice(tokens);
        }
        let biases = seen.biases.iter();
        words.extend(biases.flat_map(|&(token, bias)| [token, bias.to_bits()]));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_laid_out_as_the_kernel_reads_them() {
        let one = Seen {
            vocab: 50,
            prompt: vec![1, 2, 3],
            answer: vec![4],
            biases: vec![(6, 1.5)],
            bannable: vec![5],
        };
        let other = Seen {
            vocab: 50,
            prompt: vec![7],
            ..Seen::default()
        };
        let words = job_words(&[(5 << 32 | 8, &one), (9, &other)]);
        let bits = 1.5_f32.to_bits();
        assert_eq!(words[..8], [8, 5, 50, 16, 3, 1, 1, 1]);
        assert_eq!(words[8..16], [9, 0, 50, 23, 1, 0, 0, 0]);
        assert_eq!(words[16..], [1, 2, 3, 4, 5, 6, bits, 7]);
    }
}

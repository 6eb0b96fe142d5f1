//! What the device keeps so that it can choose as the host's sampler does: a table for each sequence whose logits are changed, of
//! what that holds, and room for what is told of tokens.
//!
//! Tables are made anew before a step, when its wishes say so, by a kernel outside of any recording; the step itself counts in them
//! (`choose.cu`). Where they are, each row is told with its wish, so recordings know nothing of them. Memory comes with
//! the first need and stays: it is what the pages have left. Invariant: it is none of the pool of activations, in whose idle buffers
//! recorded steps write. Whose table is which is the engine's knowledge.

use super::CudaBackend;
use super::driver::{DeviceMemory, DevicePtr, Gpu};
use super::error::CudaError;
use super::step::{Places, TOLD_WORDS};
use crate::backend::{BIASES_MAX, Changes, RowWish, Seen, TABLES_MAX};
use std::sync::Arc;

/// Words of a `Job` in `seen.cu`.
const JOB_WORDS: usize = 8;
/// Tables that are made at once: the driver takes its time for each allocation.
const TABLES_EACH: usize = 16;

/// The tables, and where tokens are told of.
#[derive(Debug, Default)]
pub(super) struct Tables {
    memory: Vec<DeviceMemory>,
    /// Of the tables there are.
    addresses: Vec<DevicePtr>,
    /// Tokens that each has a word for; 0 while there is none.
    vocab: usize,
    told: Option<DeviceMemory>,
}

impl Tables {
    /// What wishes refer to.
    pub(super) fn places(&self) -> Places<'_> {
        Places {
            tables: &self.addresses,
            told: self.told().map_or(0, DeviceMemory::address),
        }
    }

    /// Where the last step's tokens are told of.
    pub(super) const fn told(&self) -> Option<&DeviceMemory> {
        self.told.as_ref()
    }

    /// Asserts that logits of so many columns can be changed by the tables.
    pub(super) fn check(&self, cols: usize) {
        assert!(self.vocab == 0 || self.vocab == cols, "tokens of a table");
    }

    /// The table of that number, which there is from now on.
    fn table(
        &mut self,
        gpu: &Arc<Gpu>,
        number: usize,
        vocab: usize,
    ) -> Result<DevicePtr, CudaError> {
        assert!(number < TABLES_MAX, "tables are few");
        assert!(self.vocab == 0 || self.vocab == vocab, "one vocabulary");
        self.vocab = vocab;
        while self.addresses.len() <= number {
            // A multiple of what addresses are aligned to.
            let each = ((vocab + 1 + 2 * BIASES_MAX) * 4).next_multiple_of(256);
            let memory = DeviceMemory::new(gpu, TABLES_EACH * each)?;
            let starts = (0..TABLES_EACH).map(|index| memory.address() + (index * each) as u64);
            self.addresses.extend(starts);
            self.memory.push(memory);
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
            // Giving the former back waits for the steps that tell there.
            let memory = DeviceMemory::new(&self.gpu, bytes.next_power_of_two())?;
            self.tables.told = Some(memory);
        }
        let changes = rows.iter().filter_map(|row| match row {
            RowWish::Token(wish) => wish.changes.as_ref(),
            RowWish::Logits => None,
        });
        let mut jobs = Vec::new();
        for Changes { table, anew, .. } in changes {
            let Some(seen) = anew.as_deref() else {
                let made = (*table as usize) < self.tables.addresses.len();
                assert!(made, "a table that goes on was made");
                continue;
            };
            let address = self.tables.table(&self.gpu, *table as usize, seen.vocab)?;
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

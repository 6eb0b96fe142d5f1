//! What the kernels need to know of a step, as one run of 32-bit words: written on the host, uploaded once.
//!
//! Sequences with one row are decoded, those with more are prefilled: two lists for two kernels. Prefill works in tiles of
//! rows, the heaviest first, so that no long one is left for the end. Rows behind those of the last sequence are padding:
//! each counts as a sequence of its own that has no block. Pure; the upload is the caller's.

use super::driver::DevicePtr;
use crate::backend::{ALTERNATIVES_MAX, Choice, Draw, RowWish, StepBatch, StepWish};

/// Rows of a prefill tile; `ROWS` in `attention_prefill.cu` and `attention_prefill_hopper.cu`.
pub(super) const TILE_ROWS: usize = 128;

/// Words of a wish.
const WISH_WORDS: usize = 16;
/// Words that are told of a row's token: log-probability, rank, and pairs of token and log-probability.
pub(super) const TOLD_WORDS: usize = 2 + 2 * ALTERNATIVES_MAX;
/// Bits of a wish; those of `choose.cu`.
const COUNTS_OWN: u32 = 1;
const BANS: u32 = 2;
const IS_GIVEN: u32 = 4;
/// A block or sequence that is none; negative in the kernels.
const NONE: u32 = u32::MAX;

/// Where the parts are, in words from the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct StepLayout {
    /// `[T]`.
    pub(super) tokens: usize,
    /// `[T]`.
    pub(super) positions: usize,
    /// `[T]`: the row of the step before's logits that chooses a row's token, where one does.
    pub(super) carried: usize,
    /// `[T]`: the block of a row's KV.
    pub(super) row_blocks: usize,
    /// `[R]`.
    pub(super) logit_rows: usize,
    /// `[R]` of [`WISH_WORDS`] each, at an even place.
    pub(super) wishes: usize,
    /// `[S]` each.
    pub(super) first_rows: usize,
    pub(super) row_counts: usize,
    pub(super) past_lens: usize,
    pub(super) block_starts: usize,
    /// Sequences with one row.
    pub(super) decodes: usize,
    /// Pairs of sequence and first row.
    pub(super) tiles: usize,
    /// All sequences' blocks.
    pub(super) blocks: usize,
    /// Of the lists.
    pub(super) decode_count: usize,
    pub(super) tile_count: usize,
    pub(super) sequence_count: usize,
    /// Of the sequence that has most.
    pub(super) rows_max: usize,
}

fn word(value: usize) -> u32 {
    u32::try_from(value).expect("rows, positions and blocks fit 32 bits")
}

/// What wishes refer to on the device.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Places<'a> {
    /// Of the tables, by their number.
    pub(super) tables: &'a [DevicePtr],
    /// Where the first row of which something is told has its [`TOLD_WORDS`]; the others follow.
    pub(super) told: DevicePtr,
}

/// Writes a step's words to `words`, which is cleared before. Rows without a wish get that for their best token. `per_block` is
/// `P`.
pub(super) fn encode(
    batch: &StepBatch,
    (wish, places): (StepWish<'_>, Places<'_>),
    per_block: usize,
    words: &mut Vec<u32>,
) -> StepLayout {
    words.clear();
    let covered = batch.sequences.last().map_or(0, |span| span.rows.end);
    let padding = batch.tokens.len() - covered;
    let mut layout = StepLayout {
        sequence_count: batch.sequences.len() + padding,
        rows_max: batch
            .sequences
            .iter()
            .map(|span| span.rows.len())
            .max()
            .unwrap_or(0)
            // A recording of padding alone launches what one of a sequence launches.
            .max(usize::from(padding > 0)),
        ..StepLayout::default()
    };
    words.extend_from_slice(&batch.tokens);
    layout.positions = words.len();
    words.extend_from_slice(&batch.positions);
    layout.carried = words.len();
    words.resize(words.len() + batch.tokens.len(), NONE);
    for carried in wish.carried {
        words[layout.carried + carried.row] = word(carried.from);
    }
    layout.row_blocks = words.len();
    for span in &batch.sequences {
        let positions = span.past_len..span.past_len + span.rows.len();
        words.extend(positions.map(|position| span.blocks[position / per_block]));
    }
    let pad = |words: &mut Vec<u32>, value| words.resize(words.len() + padding, value);
    pad(words, NONE);
    layout.logit_rows = words.len();
    words.extend(batch.logit_rows.iter().map(|&row| word(row)));
    words.resize(words.len().next_multiple_of(2), 0);
    layout.wishes = words.len();
    encode_wishes(wish.rows, places, words);
    words.resize(layout.wishes + batch.logit_rows.len() * WISH_WORDS, 0);
    layout.first_rows = words.len();
    words.extend(batch.sequences.iter().map(|span| word(span.rows.start)));
    pad(words, 0);
    layout.row_counts = words.len();
    words.extend(batch.sequences.iter().map(|span| word(span.rows.len())));
    pad(words, 0);
    layout.past_lens = words.len();
    words.extend(batch.sequences.iter().map(|span| word(span.past_len)));
    pad(words, 0);
    layout.block_starts = words.len();
    let mut start = 0;
    for span in &batch.sequences {
        words.push(word(start));
        start += used_blocks(span.past_len + span.rows.len(), per_block);
    }
    pad(words, 0);
    layout.decodes = words.len();
    let spans = batch.sequences.iter().enumerate();
    let decodes = spans.filter(|(_, span)| span.rows.len() == 1);
    words.extend(decodes.map(|(index, _)| word(index)));
    pad(words, NONE);
    layout.tiles = words.len();
    layout.decode_count = layout.tiles - layout.decodes;
    let tiles = tiles(batch);
    layout.tile_count = tiles.len();
    words.extend(tiles.iter().flat_map(|&(_, index, first)| [index, first]));
    layout.blocks = words.len();
    for span in &batch.sequences {
        let used = used_blocks(span.past_len + span.rows.len(), per_block);
        words.extend_from_slice(&span.blocks[..used]);
    }
    layout
}

fn encode_wishes(rows: &[RowWish], places: Places<'_>, words: &mut Vec<u32>) {
    let mut told = places.told;
    for row in rows {
        words.extend(wish_words(row, (places.tables, told)));
        let tells = row.logprobs().is_some();
        told += if tells { TOLD_WORDS as u64 * 4 } else { 0 };
    }
}

/// Of the sequences with several rows: what is seen before a tile, its sequence, its first row. The heaviest first.
fn tiles(batch: &StepBatch) -> Vec<(usize, u32, u32)> {
    let spans = batch.sequences.iter().enumerate();
    let mut tiles: Vec<(usize, u32, u32)> = spans
        .filter(|(_, span)| span.rows.len() > 1)
        .flat_map(|(index, span)| {
            let firsts = (0..span.rows.len()).step_by(TILE_ROWS);
            firsts.map(move |first| (span.past_len + first, word(index), word(first)))
        })
        .collect();
    tiles.sort_by_key(|&(seen, ..)| std::cmp::Reverse(seen));
    tiles
}

/// `Wish` in `choose.cu`.
fn wish_words(wish: &RowWish, (tables, told): (&[DevicePtr], DevicePtr)) -> [u32; WISH_WORDS] {
    let mut words = [0; WISH_WORDS];
    let RowWish::Token(wish) = wish else {
        return words;
    };
    match wish.choice {
        Choice::Best => {}
        Choice::Draw(draw) => words[..6].copy_from_slice(&draw_words(&draw)),
        Choice::Given(token) => {
            words[13] = IS_GIVEN;
            words[15] = token;
        }
    }
    if let Some(changes) = &wish.changes {
        let address = tables[changes.table as usize];
        words[6..8].copy_from_slice(&bytemuck::cast::<_, [u32; 2]>(address));
        words[10] = changes.penalties.repetition.to_bits();
        words[11] = changes.penalties.frequency.to_bits();
        words[12] = changes.penalties.presence.to_bits();
        words[13] |= if changes.counts_own { COUNTS_OWN } else { 0 };
        words[13] |= if changes.bans { BANS } else { 0 };
    }
    if let Some(top) = wish.logprobs {
        assert!(top as usize <= ALTERNATIVES_MAX, "room for what is told");
        words[8..10].copy_from_slice(&bytemuck::cast::<_, [u32; 2]>(told));
        words[14] = top;
    }
    words
}

fn draw_words(draw: &Draw) -> [u32; 6] {
    // A temperature so small that its inverse is infinite takes the best token.
    let inverse = draw.temperature.recip();
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    let [low, high] = bytemuck::cast(draw.uniform.to_bits());
    let (top_p, min_p) = (draw.top_p.to_bits(), draw.min_p.to_bits());
    [inverse.to_bits(), draw.top_k, top_p, min_p, low, high]
}

fn used_blocks(tokens: usize, per_block: usize) -> usize {
    tokens.div_ceil(per_block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Carried, Changes, Penalties, SequenceSpan, TokenWish};

    #[test]
    fn a_step_is_laid_out_as_the_kernels_read_it() {
        let span = |rows: std::ops::Range<usize>, past_len, blocks: &[u32]| SequenceSpan {
            rows,
            past_len,
            blocks: blocks.to_vec(),
        };
        let batch = StepBatch {
            tokens: (100..233).collect(),
            positions: [4].into_iter().chain(3..134).chain([0]).collect(),
            sequences: vec![
                span(0..1, 4, &[7, 8, 9]),
                span(1..132, 3, &(20..60).collect::<Vec<_>>()),
                span(132..133, 0, &[3]),
            ],
            logit_rows: vec![0, 131, 132],
        };
        let mut words = vec![1, 2, 3];
        let wish = StepWish {
            carried: &[Carried { row: 132, from: 2 }],
            ..StepWish::default()
        };
        let layout = encode(&batch, (wish, Places::default()), 4, &mut words);
        let at = |start: usize, len: usize| words[start..start + len].to_vec();
        assert_eq!(at(layout.tokens, 133), batch.tokens);
        assert_eq!(at(layout.positions, 133), batch.positions);
        assert_eq!(at(layout.carried + 131, 2), [NONE, 2]);
        assert_eq!(at(layout.row_blocks, 4), [8, 20, 21, 21]);
        assert_eq!(at(layout.row_blocks + 132, 1), [3]);
        assert_eq!(at(layout.logit_rows, 3), [0, 131, 132]);
        assert_eq!(at(layout.first_rows, 3), [0, 1, 132]);
        assert_eq!(at(layout.row_counts, 3), [1, 131, 1]);
        assert_eq!(at(layout.past_lens, 3), [4, 3, 0]);
        assert_eq!(at(layout.block_starts, 3), [0, 2, 36]);
        assert_eq!(
            (layout.decode_count, at(layout.decodes, 2)),
            (2, vec![0, 2])
        );
        assert_eq!(
            (layout.tile_count, at(layout.tiles, 4)),
            (2, vec![1, 128, 1, 0])
        );
        assert_eq!(at(layout.blocks, 3), [7, 8, 20]);
        assert_eq!(words.len(), layout.blocks + 37);
        assert_eq!(layout.rows_max, 131);
    }

    #[test]
    fn wishes_are_laid_out_as_the_kernel_reads_them() {
        let batch = StepBatch {
            tokens: vec![5, 6, 7],
            positions: vec![0, 0, 0],
            logit_rows: vec![0, 1, 2],
            ..StepBatch::default()
        };
        let changes = Changes {
            table: 1,
            anew: None,
            counts_own: true,
            penalties: Penalties {
                repetition: 1.5,
                frequency: 0.25,
                presence: 0.5,
            },
            bans: true,
        };
        let rows = [
            RowWish::Token(TokenWish {
                choice: Choice::Given(9),
                changes: None,
                logprobs: Some(3),
            }),
            RowWish::BEST,
            RowWish::Token(TokenWish {
                choice: Choice::Best,
                changes: Some(changes),
                logprobs: Some(0),
            }),
        ];
        let wish = StepWish {
            rows: &rows,
            ..StepWish::default()
        };
        let places = Places {
            tables: &[1 << 40, (1 << 40) + 512],
            told: 3 << 40,
        };
        let mut words = Vec::new();
        let layout = encode(&batch, (wish, places), 4, &mut words);
        assert!(layout.wishes.is_multiple_of(2));
        let row = |row: usize| &words[layout.wishes + row * WISH_WORDS..][..WISH_WORDS];
        assert_eq!(
            row(0),
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 768, 0, 0, 0, IS_GIVEN, 3, 9]
        );
        assert_eq!(row(1), [0; WISH_WORDS]);
        let penalties = [1.5, 0.25, 0.5].map(f32::to_bits);
        assert_eq!(
            row(2)[6..10],
            [512, 256, u32::try_from(TOLD_WORDS * 4).unwrap(), 768]
        );
        assert_eq!(row(2)[10..13], penalties);
        assert_eq!(row(2)[13..], [COUNTS_OWN | BANS, 0, 0]);
    }

    #[test]
    fn padding_writes_nothing_and_attends_to_nothing() {
        let batch = StepBatch {
            tokens: vec![5, 0, 0],
            positions: vec![9, 0, 0],
            sequences: vec![SequenceSpan {
                rows: 0..1,
                past_len: 9,
                blocks: vec![1, 2, 3],
            }],
            logit_rows: vec![0, 1, 2],
        };
        let mut words = Vec::new();
        let layout = encode(&batch, Default::default(), 4, &mut words);
        assert_eq!(words[layout.row_blocks..][..3], [3, NONE, NONE]);
        assert_eq!(words[layout.decodes..][..3], [0, NONE, NONE]);
        assert_eq!((layout.decode_count, layout.sequence_count), (3, 3));
        assert_eq!(words[layout.row_counts..][..3], [1, 0, 0]);
        assert_eq!(words[layout.blocks..], [1, 2, 3]);
        let nothing = StepBatch {
            sequences: Vec::new(),
            ..batch
        };
        let alone = encode(&nothing, Default::default(), 4, &mut words);
        let places = |layout: StepLayout| (layout.decodes, layout.tiles, layout.blocks);
        assert_eq!(places(alone), places(layout));
        assert_eq!((alone.decode_count, alone.rows_max), (3, 1));
    }
}

//! Cuts a step's batch into micro-batches, so that the stages of a pipeline work at the same time.
//!
//! Rows are independent of each other, and a later piece of a sequence finds the earlier one's KV in the pages, so a
//! cut changes no bit. All stages cut alike, because the cut depends on nothing but the batch and the stages' number.

use std::ops::Range;

use crate::backend::{SequenceSpan, StepBatch};

/// Rows of a micro-batch, at least. Weights are read once a micro-batch, and on two CPU cores eight rows cost about as
/// much to compute as the weights cost to read: smaller ones lose more than the overlap gains.
const ROWS_MIN: usize = 16;
/// Micro-batches per stage, at most: with four, an eighth of the time is spent filling and draining two stages.
const PER_STAGE_MAX: usize = 4;

/// The rows of each micro-batch, in order; at least one, all of about the same size.
pub(crate) fn cuts(rows: usize, stages: usize) -> impl Iterator<Item = Range<usize>> {
    let count = if stages == 1 {
        1
    } else {
        (rows / ROWS_MIN).clamp(1, PER_STAGE_MAX * stages)
    };
    (0..count).map(move |index| rows * index / count..rows * (index + 1) / count)
}

/// The part of a batch that consists of some of its rows.
pub(crate) fn piece(batch: &StepBatch, rows: Range<usize>) -> StepBatch {
    let shifted = |range: Range<usize>| range.start - rows.start..range.end - rows.start;
    let within = |range: &Range<usize>| range.start.max(rows.start)..range.end.min(rows.end);
    StepBatch {
        tokens: batch.tokens[rows.clone()].to_vec(),
        positions: batch.positions[rows.clone()].to_vec(),
        sequences: batch
            .sequences
            .iter()
            .map(|span| (span, within(&span.rows)))
            .filter(|(_, part)| !part.is_empty())
            .map(|(span, part)| SequenceSpan {
                past_len: span.past_len + part.start - span.rows.start,
                blocks: span.blocks.clone(),
                rows: shifted(part),
            })
            .collect(),
        logit_rows: batch
            .logit_rows
            .iter()
            .filter(|row| rows.contains(row))
            .map(|row| row - rows.start)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn batch(lens: &[usize]) -> StepBatch {
        let mut batch = StepBatch::default();
        for (index, &len) in lens.iter().enumerate() {
            let (start, past_len) = (batch.tokens.len(), 3 * index);
            let sizes = u32::try_from(past_len).unwrap()..;
            batch.positions.extend(sizes.take(len));
            batch.tokens.extend((100..).take(len));
            batch.sequences.push(SequenceSpan {
                rows: start..start + len,
                past_len,
                blocks: vec![u32::try_from(index).unwrap()],
            });
            batch.logit_rows.push(start + len - 1);
        }
        batch
    }

    #[test]
    fn few_rows_and_single_stages_are_not_cut() {
        let ends = |rows, stages| cuts(rows, stages).map(|cut| cut.end).collect::<Vec<_>>();
        assert_eq!(ends(31, 4), [31]);
        assert_eq!(ends(4096, 1), [4096]);
        assert_eq!(ends(32, 2), [16, 32]);
        assert_eq!(cuts(4096, 2).count(), 8);
    }

    proptest! {
        #[test]
        fn pieces_are_the_batch(lens in prop::collection::vec(1_usize..40, 1..6), stages in 1_usize..5) {
            let batch = batch(&lens);
            let (mut tokens, mut positions, mut logit_rows) = (vec![], vec![], vec![]);
            for rows in cuts(batch.tokens.len(), stages) {
                let piece = piece(&batch, rows.clone());
                prop_assert_eq!(piece.tokens.len(), rows.len());
                let mut next = 0;
                for span in &piece.sequences {
                    prop_assert_eq!(span.rows.start, next);
                    next = span.rows.end;
                    let position = piece.positions[span.rows.start] as usize;
                    prop_assert_eq!(position, span.past_len);
                }
                prop_assert_eq!(next, rows.len());
                tokens.extend(piece.tokens);
                positions.extend(piece.positions);
                logit_rows.extend(piece.logit_rows.iter().map(|row| row + rows.start));
            }
            prop_assert_eq!(tokens, batch.tokens);
            prop_assert_eq!(positions, batch.positions);
            prop_assert_eq!(logit_rows, batch.logit_rows);
        }
    }
}

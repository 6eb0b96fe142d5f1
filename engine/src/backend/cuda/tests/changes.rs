//! Logits are changed, and tokens told of, as the host's sampler does it: the same bits where a choice depends on them.

use super::choose::{begin, check, with_a_page};
use super::*;
use crate::backend::conformance::noise;
use crate::backend::{
    Carried, Changes, Choice, Draw, Penalties, RowWish, Seen, StepOutput, TokenWish,
};
use crate::request::{Logprob, TokenLogprobs};
use crate::sampler::{changed, sample_for};

/// Exponentials of 32 bits, summed exactly, against sums of 64 bits.
const LOGPROB_TOLERANCE: f32 = 1e-5;
/// Nothing, one, about a warp, no multiple of anything, large.
const VOCABULARIES: [usize; 9] = [1, 2, 31, 32, 33, 1000, 1025, 32_000, 128_256];

/// The same tokens and ranks, and log-probabilities within the tolerance.
pub(super) fn assert_told(found: Option<&TokenLogprobs>, expected: Option<&TokenLogprobs>) {
    let (Some(found), Some(expected)) = (found, expected) else {
        panic!("{found:?} instead of {expected:?}");
    };
    let close = |found: &Logprob, expected: &Logprob| {
        assert_eq!((found.token, found.rank), (expected.token, expected.rank));
        let difference = (found.logprob - expected.logprob).abs();
        let allowed = LOGPROB_TOLERANCE * (1.0 + expected.logprob.abs());
        assert!(difference <= allowed, "{found:?} instead of {expected:?}");
    };
    close(&found.chosen, &expected.chosen);
    assert_eq!(found.top.len(), expected.top.len());
    for (found, expected) in found.top.iter().zip(&expected.top) {
        close(found, expected);
    }
}

fn penalties(row: usize) -> Penalties {
    Penalties {
        repetition: [1.0, 1.3, 0.7][row % 3],
        frequency: [0.0, 0.37, -0.5][row / 2 % 3],
        presence: [0.11, 0.0][row % 2],
    }
}

/// What a row's sequence holds; some of it is outside the vocabulary.
fn seen(row: usize, vocab: usize) -> Seen {
    let token = |value: usize| small(value % (vocab + 2));
    Seen {
        vocab,
        prompt: (0..300).map(|n| token(n * 7 + row)).collect(),
        answer: (0..100).map(|n| token(n / 3 + row)).collect(),
        biases: vec![
            (token(3 + row), 2.5),
            (token(9), -4.0),
            (token(3 + row), 0.1),
        ],
        bannable: (0..row % 3).map(|n| token(n * 11 + row)).collect(),
    }
}

fn draw(row: usize) -> Draw {
    Draw {
        temperature: 0.8,
        top_k: [0, 40][row % 2],
        top_p: [1.0, 0.9][row / 2 % 2],
        min_p: 0.0,
        uniform: [0.1, 0.6, 0.95][row % 3],
    }
}

/// A wish of every kind, by the row's number; those with tables make them.
fn wish(row: usize, vocab: usize) -> TokenWish {
    let changes = Changes {
        table: small(row),
        anew: Some(Arc::new(seen(row, vocab))),
        counts_own: row.is_multiple_of(2),
        penalties: penalties(row),
        bans: row % 5 != 4 && vocab > 2,
    };
    TokenWish {
        choice: match row % 4 {
            0 | 1 => Choice::Best,
            2 => Choice::Draw(draw(row)),
            _ => Choice::Given(small(row % vocab)),
        },
        changes: (row % 4 != 3 && row != 5).then_some(changes),
        logprobs: [Some(0), None, Some(5), Some(20)][(row / 2) % 4],
    }
}

fn goes_on(wish: &TokenWish) -> TokenWish {
    let changes = wish.changes.as_ref().map(|changes| Changes {
        anew: None,
        counts_own: true,
        ..changes.clone()
    });
    TokenWish {
        changes,
        ..wish.clone()
    }
}

/// Judges a step's rows by what their sequences hold.
fn judge(logits: &[f32], vocab: usize, rows: &[(TokenWish, Seen)], output: &StepOutput) {
    assert!(output.values.is_empty(), "all rows have tokens");
    for (row, (wish, seen)) in rows.iter().enumerate() {
        let logits = &logits[row * vocab..(row + 1) * vocab];
        let token = output.chosen[row].unwrap();
        let expected = match wish.choice {
            Choice::Draw(draw) => {
                check(&changed(logits, wish, seen), &draw, token);
                let told = wish.logprobs;
                told.map(|top| crate::sampler::prompt_logprobs(logits, token, top).unwrap())
            }
            Choice::Best | Choice::Given(_) => {
                let expected = sample_for(logits, wish, seen).unwrap();
                assert_eq!(token, expected.token, "row {row} of {vocab}: {wish:?}");
                expected.logprobs
            }
        };
        let found = output.logprobs.get(row).and_then(Option::as_ref);
        if wish.logprobs.is_some() {
            assert_told(found, expected.as_ref());
        } else {
            assert_eq!(found, None);
        }
    }
}

/// Fine ones, coarse ones of which many are equal, and ones that are all equal.
fn logits(vocab: usize, rows: usize, kind: usize) -> Vec<f32> {
    let values = noise((vocab + kind) as u64, rows * vocab).into_iter();
    values
        .map(|value| match kind {
            0 => value * 6.0,
            1 => (value * 8.0).round() / 2.0,
            _ => 1.5,
        })
        .collect()
}

/// Runs a step of these rows, counts in what they hold what the device counts, judges, and has the rows go on.
fn step_and_judge(
    backend: &mut CudaBackend,
    held: &mut [(TokenWish, Seen)],
    (vocab, logits): (usize, &[f32]),
    tokens: &[TokenId],
) {
    for ((wish, seen), &token) in held.iter_mut().zip(tokens) {
        if wish.changes.as_ref().is_some_and(|it| it.counts_own) {
            seen.answer.push(token);
        }
    }
    let wishes = held.iter().map(|(wish, _)| RowWish::Token(wish.clone()));
    let wishes: Vec<_> = wishes.collect();
    begin(backend, logits, vocab, (&wishes, tokens), &[]);
    let output = backend.finish_step().unwrap();
    judge(logits, vocab, held, &output);
    for (wish, _) in held {
        *wish = goes_on(wish);
    }
}

#[test]
fn choices_by_changed_logits_are_the_samplers() {
    let Some(mut backend) = with_a_page() else {
        return;
    };
    let rows = 24;
    for vocab in VOCABULARIES {
        backend.tables = Tables::default();
        for kind in 0..3 {
            let mut held: Vec<_> = (0..rows)
                .map(|row| (wish(row, vocab), seen(row, vocab)))
                .collect();
            // The first step makes the tables, the others go on with them.
            for step in 0..3 {
                let logits = logits(vocab, rows, kind);
                let own = |row: usize| small((row * 5 + step) % vocab);
                let tokens: Vec<TokenId> = (0..rows).map(own).collect();
                step_and_judge(&mut backend, &mut held, (vocab, &logits), &tokens);
            }
        }
    }
}

#[test]
fn a_token_that_only_the_device_knows_is_counted() {
    let Some(mut backend) = with_a_page() else {
        return;
    };
    let (vocab, rows) = (1000, 3);
    let first = logits(vocab, rows, 0);
    let mut held: Vec<_> = (0..rows)
        .map(|row| {
            let mut wish = wish(2 * row, vocab);
            wish.choice = Choice::Best;
            if let Some(changes) = &mut wish.changes {
                changes.counts_own = false;
                // The same token again costs more than any other is behind.
                changes.penalties.frequency = 100.0;
            }
            (wish, seen(2 * row, vocab))
        })
        .collect();
    let of = |held: &[(TokenWish, Seen)]| -> Vec<RowWish> {
        held.iter()
            .map(|(wish, _)| RowWish::Token(wish.clone()))
            .collect()
    };
    begin(&mut backend, &first, vocab, (&of(&held), &[0; 3]), &[]);
    let before = held.clone();
    for (wish, _) in &mut held {
        *wish = goes_on(wish);
    }
    // Begun before the first is read, and rows in another order.
    let carried: Vec<_> = (0..rows)
        .map(|row| Carried {
            row,
            from: rows - 1 - row,
        })
        .collect();
    held.reverse();
    begin(&mut backend, &first, vocab, (&of(&held), &[0; 3]), &carried);
    let output = backend.finish_step().unwrap();
    judge(&first, vocab, &before, &output);
    for (row, (_, seen)) in held.iter_mut().enumerate() {
        seen.answer.push(output.chosen[rows - 1 - row].unwrap());
    }
    let output = backend.finish_step().unwrap();
    judge(&first, vocab, &held, &output);
}

#[test]
fn a_row_whose_tokens_are_all_banned_goes_to_the_host() {
    let Some(mut backend) = with_a_page() else {
        return;
    };
    let vocab = 40;
    let logits = logits(vocab, 1, 0);
    let mut wish = wish(0, vocab);
    let seen = Seen {
        vocab,
        bannable: (0..40).collect(),
        ..Seen::default()
    };
    if let Some(changes) = &mut wish.changes {
        changes.anew = Some(Arc::new(seen));
        changes.bans = true;
    }
    begin(
        &mut backend,
        &logits,
        vocab,
        (&[RowWish::Token(wish)], &[0]),
        &[],
    );
    let output = backend.finish_step().unwrap();
    assert_eq!((output.chosen, output.values), (vec![None], logits));
}

#[test]
fn recorded_steps_write_to_no_table() {
    let Some(mut backend) = with_a_page() else {
        return;
    };
    let vocab = 1000;
    // What a recording has used and given back is as large as a table, and as what is told of a row.
    let sizes = [(vocab + 1 + 2 * crate::backend::BIASES_MAX) * 4, 256];
    let idle = sizes.map(|bytes| backend.pool.take(bytes).unwrap().address());
    let wish = wish(0, vocab);
    let logits = logits(vocab, 1, 0);
    begin(
        &mut backend,
        &logits,
        vocab,
        (&[RowWish::Token(wish)], &[0]),
        &[],
    );
    backend.finish_step().unwrap();
    let places = backend.tables.places();
    assert!(!places.tables.is_empty() && places.told > 0);
    for place in places.tables.iter().chain([&places.told]) {
        assert!(!idle.contains(place), "{place:x}");
    }
}

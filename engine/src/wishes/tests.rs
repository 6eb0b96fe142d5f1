//! A table goes on only where it holds what it should.

use super::*;
use std::time::Instant;

use crate::request::{GenerateRequest, RequestKind, SamplingParams};

fn sequence(id: u64, prompt: &[TokenId], sampling: SamplingParams) -> Sequence {
    let request = GenerateRequest {
        prompt: prompt.to_vec(),
        sampling,
        kind: RequestKind::Aggregated,
        cache_salt: None,
    };
    Sequence::new(RequestId(id), request, 1000, Instant::now())
}

fn penalised() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        frequency_penalty: 0.5,
        min_tokens: 2,
        max_tokens: 100,
        stop_token_ids: vec![9],
        prompt_ignore_length: 1,
        ..SamplingParams::default()
    }
}

fn wishes() -> Wishes {
    Wishes::new(true, 50, &[0], 2)
}

fn changes(wishes: &mut Wishes, sequence: &Sequence) -> Option<Changes> {
    wishes.next_step();
    match wishes.next_token(sequence) {
        RowWish::Token(wish) => wish.changes,
        RowWish::Logits => None,
    }
}

#[test]
fn a_table_is_made_once_and_then_goes_on_with_tokens_that_only_the_device_knows() {
    let mut wishes = wishes();
    let mut one = sequence(1, &[4, 5, 6], penalised());
    let first = changes(&mut wishes, &one).expect("changed");
    let seen = first.anew.expect("it is new");
    assert_eq!((&seen.prompt[..], &seen.answer[..]), (&[5, 6][..], &[][..]));
    assert_eq!((seen.vocab, &seen.bannable[..]), (50, &[0, 9][..]));
    assert!(first.bans && !first.counts_own);
    one.ahead = 1;
    let second = changes(&mut wishes, &one).expect("changed");
    assert!(second.anew.is_none() && second.counts_own && second.bans);
    one.tokens.push(7);
    let third = changes(&mut wishes, &one).expect("changed");
    assert!(third.anew.is_none() && third.counts_own && !third.bans);
    assert_eq!(third.table, first.table);
}

#[test]
fn what_a_table_does_not_hold_is_told_anew() {
    let mut wishes = wishes();
    let mut one = sequence(1, &[4, 5, 6], penalised());
    changes(&mut wishes, &one).expect("changed");
    // Two tokens came from elsewhere: the last is the row's own.
    one.tokens.extend([7, 8]);
    let later = changes(&mut wishes, &one).expect("changed");
    assert_eq!(later.anew.expect("it is behind").answer, [7]);
    assert!(later.counts_own);
    // The same step again, after pre-emption: the table is ahead.
    let again = changes(&mut wishes, &one).expect("changed");
    assert_eq!(again.anew.expect("it is ahead").answer, [7]);
}

#[test]
fn tables_are_given_on_but_not_taken_from_who_writes() {
    let mut wishes = wishes();
    let sequences: Vec<_> = (1..4).map(|id| sequence(id, &[1], penalised())).collect();
    wishes.next_step();
    let of = |wishes: &mut Wishes, index: usize| match wishes.next_token(&sequences[index]) {
        RowWish::Token(wish) => wish.changes.map(|changes| changes.table),
        RowWish::Logits => None,
    };
    assert_eq!(
        [0, 1, 2].map(|index| of(&mut wishes, index)),
        [Some(0), Some(1), None]
    );
    wishes.next_step();
    assert_eq!([2, 0].map(|index| of(&mut wishes, index)), [None, Some(0)]);
    wishes.next_step();
    assert_eq!(
        [2, 0].map(|index| of(&mut wishes, index)),
        [Some(1), Some(0)]
    );
    wishes.forget(RequestId(1));
    assert_eq!(of(&mut wishes, 1), Some(0));
}

#[test]
fn what_a_device_cannot_do_is_the_hosts() {
    let plain = sequence(1, &[1], SamplingParams::default());
    let told = SamplingParams {
        logprobs: Some(5),
        ..SamplingParams::default()
    };
    let too_much = SamplingParams {
        logprobs: Some(21),
        ..SamplingParams::default()
    };
    let biased = SamplingParams {
        logit_bias: vec![(1, 1.0); BIASES_MAX + 1],
        ..SamplingParams::default()
    };
    let mut device = wishes();
    let mut host = Wishes::new(false, 50, &[0], 2);
    let is_logits = |wish: RowWish| wish == RowWish::Logits;
    assert!(!is_logits(device.next_token(&plain)) && !is_logits(host.next_token(&plain)));
    let told = sequence(2, &[1], told);
    assert!(!is_logits(device.next_token(&told)) && is_logits(host.next_token(&told)));
    for params in [too_much, biased] {
        assert!(is_logits(device.next_token(&sequence(3, &[1], params))));
    }
}

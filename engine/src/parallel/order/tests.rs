//! Orders survive their bytes; bytes that are no orders are refused; a step is small.

use proptest::prelude::*;

use super::*;
use crate::backend::{Changes, Choice, Draw, Penalties, Seen, TokenWish};
use std::sync::Arc;

fn batch(spans: &[(usize, usize, Vec<BlockId>)], seed: u32) -> StepBatch {
    let mut batch = StepBatch::default();
    for (rows, past_len, blocks) in spans {
        let start = batch.tokens.len();
        let number = |len: usize| u32::try_from(len).expect("short");
        let tokens = (1..=number(*rows)).map(|row| seed.wrapping_mul(row));
        batch.tokens.extend(tokens);
        let positions = number(*past_len)..number(past_len + rows);
        batch.positions.extend(positions);
        batch.sequences.push(SequenceSpan {
            rows: start..start + rows,
            past_len: *past_len,
            blocks: blocks.clone(),
        });
        if seed.is_multiple_of(2) {
            batch.logit_rows.push(start + rows - 1);
        }
    }
    batch
}

/// A step of which nothing is wished.
fn order(batch: StepBatch) -> Order<'static> {
    Order::Step(Step {
        batch: Cow::Owned(batch),
        wishes: Cow::Borrowed(&[]),
        carried: Cow::Borrowed(&[]),
    })
}

fn survives(order: &Order<'_>) {
    let message = order.encode();
    assert_eq!(Order::decode(&message).as_ref(), Ok(order));
    let longer = [&message[..], &[0]].concat();
    assert!(Order::decode(&longer).is_err());
    for len in 0..message.len() {
        assert!(Order::decode(&message[..len]).is_err(), "{len} bytes");
    }
}

#[test]
fn orders_survive_their_bytes() {
    for dtype in [KvDtype::F32, KvDtype::F16, KvDtype::Bf16] {
        survives(&Order::Allocate {
            page: PageShape {
                layers: 30,
                kv_heads: 3,
                tokens_per_block: 32,
                head_dim: 64,
                dtype,
            },
            block_count: 123_456,
        });
        survives(&Order::JoinHandoff {
            page: PageShape {
                layers: 1,
                kv_heads: 2,
                tokens_per_block: 3,
                head_dim: 4,
                dtype,
            },
            terms: Cow::Borrowed(b"terms"),
        });
    }
    survives(&Order::Ping);
    survives(&Order::WarmUp(256));
    survives(&Order::Goodbye);
    survives(&Order::TakeBack(vec![5, 4, 3, u32::MAX, 0]));
    let handoffs = [
        RankOrder::Offer {
            ctx_request_id: u64::MAX,
            token_count: 77,
            blocks: vec![9, 1],
            state: b"state".to_vec(),
        },
        RankOrder::Extend {
            ctx_request_id: 4,
            blocks: vec![8, 2],
        },
        RankOrder::Withdraw(3),
        RankOrder::Fetch {
            request: RequestId(5),
            ctx_request_id: 6,
            state: Vec::new(),
            token_count: 100,
            first_token: 64,
            blocks: vec![2],
        },
        RankOrder::CancelFetch(RequestId(1 << 40)),
        RankOrder::Meet(b"there".to_vec()),
    ];
    for handoff in handoffs {
        survives(&Order::HandOff(Cow::Owned(handoff)));
    }
    survives(&order(StepBatch::default()));
}

#[test]
fn what_contradicts_itself_is_refused() {
    let step = batch(&[(2, 5, vec![1]), (3, 0, vec![2])], 2);
    let message = order(step.clone()).encode();
    // The kind, how many tokens, five of one byte each, how many sequences, the first one's rows.
    assert_eq!((message[1], message[7], message[8]), (5, 2, 2));
    let change = |at: usize, value: u8| {
        let mut changed = message.clone();
        changed[at] = value;
        Order::decode(&changed).map(drop)
    };
    assert!(change(8, 3).is_err(), "too many rows");
    assert!(change(8, 1).is_err(), "too few rows");
    assert!(change(0, 99).is_err(), "an unknown kind");
    assert!(
        change(message.len() - 3, 99).is_err(),
        "a row that is not there"
    );
    assert!(change(1, 0xff).is_err(), "more tokens than bytes");
}

#[test]
fn what_devices_go_on_with_is_told() {
    let batch = batch(&[(1, 5, vec![1]), (1, 9, vec![2]), (1, 2, vec![3])], 2);
    let draw = Draw {
        temperature: 0.7,
        top_k: 40,
        top_p: 0.9,
        min_p: 0.05,
        uniform: 0.123_456_789,
    };
    let step = Step {
        batch: Cow::Owned(batch),
        wishes: Cow::Owned(vec![RowWish::Logits, RowWish::BEST, RowWish::draw(draw)]),
        carried: Cow::Owned(vec![Carried { row: 2, from: 0 }]),
    };
    let few = Step {
        wishes: Cow::Owned(vec![RowWish::BEST]),
        ..step.clone()
    };
    assert!(Order::decode(&Order::Step(few).encode()).is_err());
    let beyond = Step {
        carried: Cow::Owned(vec![Carried { row: 3, from: 0 }]),
        ..step.clone()
    };
    assert!(Order::decode(&Order::Step(beyond).encode()).is_err());
    survives(&Order::Step(step.clone()));

    let changes = |anew| Changes {
        table: 3,
        anew,
        counts_own: true,
        penalties: Penalties {
            repetition: 1.25,
            frequency: 0.1,
            presence: -0.2,
        },
        bans: false,
    };
    let seen = Seen {
        vocab: 128_256,
        prompt: vec![1, 70_000],
        answer: vec![5],
        biases: vec![(9, -100.0), (8, 3.5)],
        bannable: vec![2],
    };
    let token = |choice, changes, logprobs| {
        RowWish::Token(TokenWish {
            choice,
            changes,
            logprobs,
        })
    };
    let mut wishes = vec![
        token(Choice::Best, Some(changes(Some(Arc::new(seen)))), Some(5)),
        token(Choice::Draw(draw), Some(changes(None)), None),
        token(Choice::Given(77), None, Some(0)),
    ];
    let wished = |wishes: &[RowWish]| {
        Order::Step(Step {
            wishes: Cow::Owned(wishes.to_vec()),
            ..step.clone()
        })
    };
    survives(&wished(&wishes));
    wishes[2] = token(Choice::Best, None, Some(21));
    assert!(Order::decode(&wished(&wishes).encode()).is_err());
    let beyond = Changes {
        table: 256,
        ..changes(None)
    };
    wishes[2] = token(Choice::Best, Some(beyond), None);
    assert!(Order::decode(&wished(&wishes).encode()).is_err());
}

#[test]
fn a_step_of_many_long_sequences_takes_some_kilobytes() {
    // 64 sequences of 8,000 tokens, whose blocks were taken in turns, as they are when all grow at once.
    let spans: Vec<_> = (0..64)
        .map(|sequence| {
            (
                1,
                8000,
                (0..250).map(|block| block * 64 + sequence).collect(),
            )
        })
        .collect();
    let step = batch(&spans, 100_000);
    let bytes = order(step.clone()).encode().len();
    let plain = 64 * 250 * 4;
    assert!(bytes < plain / 2 + 1000, "{bytes} bytes");
    // Decoding of eight short sequences fits a packet.
    let spans: Vec<_> = (0..8)
        .map(|sequence| (1, 500, (sequence * 16..sequence * 16 + 16).collect()))
        .collect();
    let step = batch(&spans, 40_000);
    let bytes = order(step.clone()).encode().len();
    assert!(bytes < 300, "{bytes} bytes");
}

proptest! {
    #[test]
    fn steps_survive_their_bytes(
        spans in prop::collection::vec(
            (1_usize..20, 0_usize..5000, prop::collection::vec(any::<u32>(), 0..20)), 0..6),
        seed in any::<u32>(),
    ) {
        let step = batch(&spans, seed);
        let message = order(step.clone()).encode();
        prop_assert_eq!(Order::decode(&message), Ok(order(step)));
    }

    #[test]
    fn no_bytes_make_it_panic(message in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(order) = Order::decode(&message) {
            let again = order.encode();
            prop_assert_eq!(Order::decode(&again), Ok(order));
        }
    }
}

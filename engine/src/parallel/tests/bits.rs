//! A row's result depends on its own sequence only, on any grid: not on the rows beside it, the chunks it came in, or the
//! micro-batches it was cut into.

use super::*;
use crate::backend::{SequenceSpan, StepBatch, TokenId};
use crate::model::tests::Session;

fn session(tensor: u32, pipeline: u32) -> (Session, Followers) {
    let instance = Instance::tiny("qwen3", tensor, pipeline);
    let options = instance.options.clone();
    let (led, followers) = instance.start();
    let session = Session::new(led.expect("it loads").loaded, &options);
    (session, followers)
}

fn prompt(len: u32, salt: u32) -> Vec<TokenId> {
    (0..len).map(|at| (at * 37 + salt) % 250).collect()
}

#[test]
fn chunks_and_micro_batches_change_no_bit() {
    for (tensor, pipeline) in [(2, 1), (1, 2), (2, 2), (1, 4)] {
        let (mut session, followers) = session(tensor, pipeline);
        // Eight micro-batches on two stages; one where it comes in sevens.
        let tokens = prompt(200, 3);
        let whole = session.feed(&tokens, 0);
        session.restart();
        let pieces: Vec<_> = tokens
            .chunks(7)
            .flat_map(|piece| session.feed(piece, 0))
            .collect();
        assert_eq!(whole, pieces, "{tensor} x {pipeline}");
        session.restart();
        assert_eq!(session.feed(&tokens, 199), whole[199..]);
        session.restart();
        assert!(session.feed(&tokens, 200).is_empty());
        assert_eq!(session.feed(&[5], 0).len(), 1);
        drop(session);
        followers.join_well();
    }
}

#[test]
fn sequences_beside_each_other_change_no_bit() {
    for (tensor, pipeline) in [(2, 1), (2, 2), (4, 2)] {
        let (mut session, followers) = session(tensor, pipeline);
        let (first, second) = (prompt(50, 1), prompt(64, 2));
        let mut alone = |tokens: &[TokenId]| {
            session.restart();
            session.feed(tokens, tokens.len() - 1).remove(0)
        };
        let apart = [alone(&first), alone(&second)];
        let span = |rows, block: u32| SequenceSpan {
            rows,
            past_len: 0,
            blocks: vec![block, block + 1],
        };
        let batch = StepBatch {
            tokens: [&first[..], &second[..]].concat(),
            positions: (0..50).chain(0..64).collect(),
            sequences: vec![span(0..50, 6), span(50..114, 2)],
            logit_rows: vec![49, 113],
        };
        let together = session.model.forward(&batch).expect("it goes");
        assert_eq!(
            [together.row(0), together.row(1)],
            [&apart[0][..], &apart[1]]
        );
        let empty = session.model.forward(&StepBatch::default());
        assert!(empty.expect("it goes").values.is_empty());
        drop(session);
        followers.join_well();
    }
}

//! The way in: tokens to rows, from a table whose rows may be divided over the ranks of a stage.

use std::ops::Range;

use crate::backend::{Backend, BackendError, TokenId};
use crate::model::decoder::sum;
use crate::model::peers::Peers;

/// `out[t] = table[tokens[t]]`. A rank that has some rows of the table only (`held`, of `V`) gives zeros for the tokens
/// of the others, and the sum over the stage is what was asked for, to the bit.
pub(super) fn embed<B: Backend>(
    backend: &B,
    (table, held): (&B::Weight, Range<usize>),
    peers: &mut Option<Peers>,
    tokens: &[TokenId],
    out: &mut B::Tensor,
) -> Result<(), BackendError> {
    if !peers.as_ref().is_some_and(Peers::sums) {
        backend.embed(table, tokens, out);
        return Ok(());
    }
    let own = |token: TokenId| held.contains(&(token as usize));
    let first = TokenId::try_from(held.start).expect("the vocabulary is bounded");
    let local: Vec<TokenId> = tokens
        .iter()
        .map(|&token| if own(token) { token - first } else { 0 })
        .collect();
    backend.embed(table, &local, out);
    backend.on_host(out, &mut |values| {
        let cols = values.len() / tokens.len();
        let rows = values.chunks_exact_mut(cols).zip(tokens);
        rows.filter(|&(_, &token)| !own(token))
            .for_each(|(row, _)| row.fill(0.0));
    });
    sum(backend, peers, out)
}

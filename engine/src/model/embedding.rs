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
    backend.embed_part((table, held), tokens, out);
    sum(backend, peers, out)
}

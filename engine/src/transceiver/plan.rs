//! What a fetch needs, worked out by whoever asks for it, before anything happens: that thread is awake and has nothing to look up,
//! and the desk, which may sleep, has the less to do between the request and its first byte.

use super::Transceiver;
use super::reshard::{self, Side};
use super::state::OpaqueState;
use super::ways::{Way, Ways};
use crate::handoff::{BlockPages, Fetch, HandoffError};

/// See the module.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) state: OpaqueState,
    /// The pages of those who are asked.
    pub(super) there: Side,
    /// The first of the ways.
    pub(super) way: Way,
    pub(super) ways: Ways,
    /// The ranks that owe something.
    pub(super) senders: Vec<usize>,
}

impl Transceiver {
    /// Checks a fetch against its ticket's state and works out who owes something.
    pub(super) fn plan(&self, fetch: &Fetch, state: OpaqueState) -> Result<Plan, HandoffError> {
        let there = self.layout.convertible(&state.layout)?;
        let (own, rank) = (&self.layout.side, self.rank);
        if state.token_count != fetch.token_count as u64 {
            return Err(HandoffError::State(format!(
                "kv of {} tokens there, {} expected",
                state.token_count, fetch.token_count
            )));
        }
        let block = own.tokens_per_block();
        if fetch.first_token > fetch.token_count || !fetch.first_token.is_multiple_of(block) {
            return Err(HandoffError::State(format!(
                "kv wanted from token {} of {} on, in blocks of {block}",
                fetch.first_token, fetch.token_count
            )));
        }
        let first_page = fetch.first_token / block;
        let needed = own.pages_for(fetch.token_count) - first_page;
        if needed != fetch.pages.len() {
            return Err(HandoffError::State(format!(
                "{} tokens need {needed} pages, {} given",
                fetch.token_count - fetch.first_token,
                fetch.pages.len()
            )));
        }
        let shape = own.page(rank);
        // One tells for all of a pool's; and no page is written beyond its end.
        let BlockPages { blocks, pages } = &fetch.pages;
        let first = blocks.iter().zip(pages).next();
        if let Some((block, page)) = first.filter(|(_, page)| *page.shape() != shape) {
            return Err(HandoffError::Layout(format!(
                "page of block {block} is {:?}, {shape:?} expected",
                page.shape()
            )));
        }
        let senders = reshard::senders(own, rank, &there);
        let mut ways = Ways::to(&state.ranks, &senders)?;
        Ok(Plan {
            way: ways.expect(self.ground())?.clone(),
            ways,
            state,
            there,
            senders,
        })
    }
}

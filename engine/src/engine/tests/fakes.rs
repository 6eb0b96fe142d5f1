//! A model that remembers in its pages what it read, and a transceiver that does what the test says.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::backend::{
    BackendError, BlockId, Carried, RowWish, Seen, StepBatch, TABLES_MAX, TokenId, TokenWish,
};
use crate::handoff::{Fetch, Handoff, HandoffError, HandoffTicket, Offer};
use crate::model::{Logits, Model, ModelShape};
use crate::page::{Page, PageShape};
use crate::request::RequestId;
use crate::sampler::{SampleError, Sampled, choose, sample_for};

pub(super) const VOCAB: usize = 48;

/// Logits after a sequence: a pure function of all its tokens.
pub(super) fn logits_after(tokens: &[TokenId]) -> Vec<f32> {
    let hash = tokens.iter().fold(0x1234_5678_u64, |hash, &token| {
        mix(hash ^ u64::from(token).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    });
    (0..VOCAB as u64)
        .map(|token| {
            let bits = u16::try_from(mix(hash.wrapping_add(token)) >> 48).expect("16 bits");
            f32::from(bits) / 8192.0
        })
        .collect()
}

fn mix(mut v: u64) -> u64 {
    v = (v ^ (v >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    v = (v ^ (v >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    v ^ (v >> 31)
}

/// What goes wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mishap {
    /// The device reports an error.
    Error,
    /// The thread panics.
    Panic,
    /// The logits of sequences with this first token are not numbers.
    NanFor(TokenId),
    /// The rank that has a part of the pages is lost.
    Pages,
}

/// Keeps each token (keys) and its position (values) in its pages; answers from what it finds there.
#[derive(Debug)]
pub(super) struct FakeModel {
    shape: ModelShape,
    pages: Vec<Option<Arc<Page>>>,
    size: usize,
    pub(super) mishap: Option<Mishap>,
    /// Steps before the mishap.
    pub(super) steps_left: usize,
    /// Steps under way, where they run by themselves: each is computed as late as it can be.
    flights: Option<VecDeque<Flying>>,
    /// Whether it draws, too.
    chooses_all: bool,
    /// What sequences hold whose logits it changes.
    tables: HashMap<u32, Seen>,
    /// What the last computed step chose.
    chosen: Vec<TokenId>,
    pub(super) counts: Arc<Mutex<StepCounts>>,
}

/// What a model that runs by itself saw.
#[derive(Debug, Default)]
pub(super) struct StepCounts {
    pub(super) begun: usize,
    /// Steps that were finished while no other had begun: the device was idle afterwards.
    pub(super) alone: usize,
}

#[derive(Debug)]
struct Flying {
    batch: StepBatch,
    wishes: Vec<RowWish>,
    carried: Vec<Carried>,
    done: Option<Logits>,
}

impl FakeModel {
    pub(super) fn new() -> Self {
        Self {
            shape: ModelShape {
                architecture: "fake".to_owned(),
                layers: 1,
                heads: 1,
                kv_heads: 1,
                head_dim: 1,
                width: 1,
                vocab: VOCAB,
                max_seq_len: 1 << 20,
                fingerprint: 7,
            },
            pages: Vec::new(),
            size: 0,
            mishap: None,
            steps_left: 0,
            flights: None,
            chooses_all: false,
            tables: HashMap::new(),
            chosen: Vec::new(),
            counts: Arc::default(),
        }
    }

    /// One whose steps run by themselves, and which chooses every token that is wished.
    pub(super) fn by_itself() -> Self {
        Self {
            flights: Some(VecDeque::new()),
            chooses_all: true,
            ..Self::new()
        }
    }

    /// Computes the steps that are under way.
    fn catch_up(&mut self) -> Result<(), BackendError> {
        let mut flights = self.flights.take().unwrap_or_default();
        for flight in &mut flights {
            if flight.done.is_some() {
                continue;
            }
            for &Carried { row, from } in &flight.carried {
                flight.batch.tokens[row] = self.chosen[from];
            }
            let logits = self.forward_choosing(&flight.batch, &flight.wishes)?;
            self.chosen = logits
                .chosen
                .iter()
                .map(|token| token.unwrap_or(0))
                .collect();
            flight.done = Some(logits);
        }
        self.flights = Some(flights);
        Ok(())
    }

    /// Changes and chooses as a device does, by nothing but what wishes have said of its tables.
    fn sample(
        &mut self,
        row: &[f32],
        wish: &TokenWish,
        own: TokenId,
    ) -> Result<Sampled, SampleError> {
        let Some(changes) = &wish.changes else {
            return sample_for(row, wish, &Seen::default());
        };
        assert!((changes.table as usize) < TABLES_MAX, "tables are few");
        if let Some(seen) = &changes.anew {
            self.tables.insert(changes.table, Seen::clone(seen));
        }
        let seen = self.tables.get_mut(&changes.table);
        let seen = seen.expect("a table that goes on was made");
        if changes.counts_own {
            seen.answer.push(own);
        }
        sample_for(row, wish, seen)
    }

    fn write(&mut self, block: BlockId, at: usize, token: TokenId, position: u32) {
        let page = self.pages[block as usize]
            .as_mut()
            .expect("a page that is written is not lent");
        let page = Arc::get_mut(page).expect("a page that is written has no other reader");
        put(page, self.size, at, token, position);
    }

    fn read(&self, blocks: &[BlockId], len: usize) -> Vec<TokenId> {
        (0..len)
            .map(|position| {
                let block = blocks[position / self.size];
                let page = self.pages[block as usize]
                    .as_ref()
                    .expect("a page that is read is not lent");
                let (token, at) = get(page, self.size, position % self.size);
                assert_eq!(at, position, "block {block} holds another position");
                token
            })
            .collect()
    }

    fn check(&self, batch: &StepBatch) {
        let mut written = HashSet::new();
        let mut next = 0;
        for span in &batch.sequences {
            assert_eq!(span.rows.start, next);
            assert!(!span.rows.is_empty());
            next = span.rows.end;
            let end = span.past_len + span.rows.len();
            assert!(span.blocks.len() * self.size >= end);
            for block in span.past_len / self.size..end.div_ceil(self.size) {
                assert!(written.insert(span.blocks[block]), "written twice");
            }
        }
        assert_eq!(next, batch.tokens.len());
        assert_eq!(next, batch.positions.len());
        assert!(batch.logit_rows.is_sorted());
    }

    fn check_ranks(&self) -> Result<(), BackendError> {
        match self.mishap {
            Some(Mishap::Pages) => Err(BackendError::Rank {
                rank: "rank 1".to_owned(),
                reason: "lost on purpose".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn fails(&mut self) -> Option<Mishap> {
        let mishap = self.mishap?;
        self.steps_left = self.steps_left.saturating_sub(1);
        (self.steps_left == 0).then_some(mishap)
    }
}

fn put(page: &mut Page, size: usize, at: usize, token: TokenId, position: u32) {
    let values = page.as_f32_mut();
    values[at] = f32::from(u16::try_from(token).expect("small"));
    values[size + at] = f32::from(u16::try_from(position).expect("small"));
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "whole numbers were written"
)]
fn get(page: &Page, size: usize, at: usize) -> (TokenId, usize) {
    let values = page.as_f32();
    (values[at] as TokenId, values[size + at] as usize)
}

/// What a context server would have written for a prompt.
pub(super) fn fill_pages(pages: &mut [Page], prompt: &[TokenId], first: usize) {
    let size = pages[0].shape().tokens_per_block;
    for (page, tokens) in pages.iter_mut().zip(prompt[first..].chunks(size)) {
        for (at, &token) in tokens.iter().enumerate() {
            put(page, size, at, token, 0);
        }
    }
    for position in first..prompt.len() {
        let page = &mut pages[(position - first) / size];
        let value = f32::from(u16::try_from(position).expect("small"));
        page.as_f32_mut()[size + position % size] = value;
    }
}

impl Model for FakeModel {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn backend_description(&self) -> String {
        "fake".to_owned()
    }

    fn weight_bytes(&self) -> usize {
        0
    }

    fn allocate_pages(&mut self, shape: PageShape, block_count: usize) -> Result<(), BackendError> {
        self.size = shape.tokens_per_block;
        self.pages = (0..block_count)
            .map(|_| Some(Arc::new(Page::zeroed(shape))))
            .collect();
        Ok(())
    }

    fn forward(&mut self, batch: &StepBatch) -> Result<Logits, BackendError> {
        self.check(batch);
        let mishap = self.fails();
        assert_ne!(mishap, Some(Mishap::Panic), "on purpose");
        if mishap == Some(Mishap::Error) {
            return Err(BackendError::OutOfMemory {
                what: "a test".to_owned(),
                bytes: 1,
            });
        }
        let mut values = Vec::new();
        for span in &batch.sequences {
            for row in span.rows.clone() {
                let position = batch.positions[row];
                let at = span.past_len + row - span.rows.start;
                assert_eq!(position as usize, at);
                let block = span.blocks[at / self.size];
                self.write(block, at % self.size, batch.tokens[row], position);
            }
            let rows = batch.logit_rows.iter();
            for row in rows.filter(|row| span.rows.contains(row)) {
                let seen = self.read(&span.blocks, span.past_len + row - span.rows.start + 1);
                let mut logits = logits_after(&seen);
                if self.mishap == Some(Mishap::NanFor(seen[0])) {
                    logits[3] = f32::NAN;
                }
                values.extend(logits);
            }
        }
        Ok(Logits {
            values,
            vocab: VOCAB,
            chosen: Vec::new(),
            logprobs: Vec::new(),
        })
    }

    fn runs_by_itself(&self) -> bool {
        self.flights.is_some()
    }

    fn begin(
        &mut self,
        batch: &StepBatch,
        wishes: &[RowWish],
        carried: &[Carried],
    ) -> Result<Option<Logits>, BackendError> {
        let Some(flights) = &mut self.flights else {
            assert!(carried.is_empty(), "tokens are known");
            return self.forward_choosing(batch, wishes).map(Some);
        };
        assert!(flights.len() < 2, "two steps are under way at most");
        let overtaken = flights.iter().flat_map(|flight| &flight.wishes);
        assert!(
            overtaken.clone().all(|wish| *wish != RowWish::Logits),
            "logits that the host needs are not overtaken"
        );
        flights.push_back(Flying {
            batch: batch.clone(),
            wishes: wishes.to_vec(),
            carried: carried.to_vec(),
            done: None,
        });
        self.counts.lock().expect("no test panics with it").begun += 1;
        Ok(None)
    }

    fn finish(&mut self) -> Result<Logits, BackendError> {
        // Only the oldest, so that the others stay late.
        let mut later = self
            .flights
            .as_mut()
            .expect("steps run by themselves")
            .split_off(1);
        if later.is_empty() {
            self.counts.lock().expect("no test panics with it").alone += 1;
        }
        self.catch_up()?;
        let flights = self.flights.as_mut().expect("caught up");
        let first = flights.pop_front().expect("a step is under way");
        flights.append(&mut later);
        Ok(first.done.expect("computed"))
    }

    /// Chooses like a device; draws, and rows that are not finite, are left to the host, unless steps run by themselves.
    fn forward_choosing(
        &mut self,
        batch: &StepBatch,
        wishes: &[RowWish],
    ) -> Result<Logits, BackendError> {
        let whole = self.forward(batch)?;
        assert_eq!(wishes.len(), whole.rows(), "a wish for each row");
        let mut logits = Logits {
            values: Vec::new(),
            vocab: VOCAB,
            chosen: Vec::new(),
            logprobs: Vec::new(),
        };
        let mut tables = HashSet::new();
        for (index, (row, wish)) in whole.values.chunks_exact(VOCAB).zip(wishes).enumerate() {
            let sampled = match wish {
                RowWish::Token(wish) if self.chooses_all => {
                    if let Some(changes) = &wish.changes {
                        assert!(
                            tables.insert(changes.table),
                            "a table has one row of a step"
                        );
                    }
                    let own = batch.tokens[batch.logit_rows[index]];
                    self.sample(row, wish, own).ok()
                }
                RowWish::Token(TokenWish {
                    changes: Some(_), ..
                }) => panic!("only a device that runs by itself is asked for more"),
                wish if *wish == RowWish::BEST => {
                    let token = choose(row, wish).ok();
                    token.map(|token| Sampled {
                        token,
                        logprobs: None,
                    })
                }
                RowWish::Token(_) | RowWish::Logits => None,
            };
            if sampled.is_none() {
                logits.values.extend_from_slice(row);
            }
            logits
                .chosen
                .push(sampled.as_ref().map(|sampled| sampled.token));
            logits
                .logprobs
                .push(sampled.and_then(|sampled| sampled.logprobs));
        }
        Ok(logits)
    }

    fn share_pages(&mut self, blocks: &[BlockId]) -> Result<Vec<Arc<Page>>, BackendError> {
        self.check_ranks()?;
        if self.flights.is_some() {
            self.catch_up()?;
        }
        let pages = blocks
            .iter()
            .map(|&block| Arc::clone(self.pages[block as usize].as_ref().expect("not lent")));
        Ok(pages.collect())
    }

    fn page_is_unshared(&self, block: BlockId) -> bool {
        let page = self.pages[block as usize].as_ref().expect("not lent");
        Arc::strong_count(page) == 1
    }

    fn lend_page(&mut self, block: BlockId) -> Page {
        let late = self
            .flights
            .iter()
            .flatten()
            .filter(|flight| flight.done.is_none());
        for span in late.flat_map(|flight| &flight.batch.sequences) {
            assert!(
                !span.blocks.contains(&block),
                "a step may still write this page"
            );
        }
        let page = self.pages[block as usize].take().expect("not lent twice");
        Arc::into_inner(page).expect("a lent page has no reader")
    }

    fn return_pages(&mut self, pages: Vec<(BlockId, Page)>) -> Result<(), BackendError> {
        self.check_ranks()?;
        for (block, page) in pages {
            let before = self.pages[block as usize].replace(Arc::new(page));
            assert!(before.is_none(), "the page of block {block} was here");
        }
        Ok(())
    }
}

/// What the transceiver was asked for.
#[derive(Debug, Default)]
pub(super) struct WireState {
    pub(super) offers: HashMap<u64, Offer>,
    pub(super) withdrawn: Vec<u64>,
    pub(super) fetches: HashMap<RequestId, Fetch>,
    pub(super) cancelled: Vec<RequestId>,
    pub(super) refuse_offers: bool,
}

/// The test's end of the transceiver.
#[derive(Debug, Clone, Default)]
pub(super) struct Wire(Arc<Mutex<WireState>>);

impl Wire {
    pub(super) fn lock(&self) -> MutexGuard<'_, WireState> {
        self.0.lock().expect("no test panics with the lock")
    }

    pub(super) fn take_fetch(&self, id: RequestId) -> Option<Fetch> {
        self.lock().fetches.remove(&id)
    }
}

/// Opaque state of the fake: how many tokens it holds, or something not understood.
pub(super) fn state_for(token_count: usize) -> Vec<u8> {
    vec![u8::try_from(token_count).expect("small prompts")]
}

/// A transceiver that only takes notes.
#[derive(Debug)]
pub(super) struct FakeHandoff(pub(super) Wire);

impl Handoff for FakeHandoff {
    fn offer(&mut self, offer: Offer) -> Result<Vec<u8>, HandoffError> {
        let mut wire = self.0.lock();
        if wire.refuse_offers {
            return Err(HandoffError::Refused("2 of 2 leases held".to_owned()));
        }
        let state = state_for(offer.token_count);
        let before = wire.offers.insert(offer.ctx_request_id, offer);
        assert!(before.is_none(), "a lease's number was used twice");
        Ok(state)
    }

    fn extend(&mut self, ctx_request_id: u64, pages: Vec<Arc<Page>>) {
        if let Some(offer) = self.0.lock().offers.get_mut(&ctx_request_id) {
            offer.pages.extend(pages);
        }
    }

    fn withdraw(&mut self, ctx_request_id: u64) {
        self.0.lock().withdrawn.push(ctx_request_id);
    }

    fn check(&self, ticket: &HandoffTicket) -> Result<usize, HandoffError> {
        match ticket.opaque_state[..] {
            [count] => Ok(count.into()),
            [] => Err(HandoffError::State("0 bytes".to_owned())),
            _ => Err(HandoffError::Layout(
                "head_dim 64 here, 128 there".to_owned(),
            )),
        }
    }

    fn fetch(&mut self, fetch: Fetch) {
        let mut wire = self.0.lock();
        let before = wire.fetches.insert(fetch.request, fetch);
        assert!(before.is_none(), "a request is fetched twice");
    }

    fn cancel_fetch(&mut self, request: RequestId) {
        self.0.lock().cancelled.push(request);
    }

    fn meet(&mut self, state: &[u8]) -> Result<(), HandoffError> {
        match state {
            [] => Err(HandoffError::State("0 bytes".to_owned())),
            _ => Ok(()),
        }
    }
}

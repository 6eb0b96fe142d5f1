//! The border between the engine thread and the KV transceiver (DESIGN.md §7): plain values and one small set of calls.
//!
//! Context side: `offer` pins pages under a lease and gives a ticket; the lease ends with exactly one
//! [`HandoffEvent::LeaseEnded`], and only once no transport can read the pages any more. It may be offered before the prompt
//! is read to its end: then it is open, and `extend` adds the pages of each chunk when they are written. Generation side: `fetch` hands
//! pages over to be written; each page comes back exactly once in [`HandoffEvent::PagesReturned`], however
//! the fetch ends, and only once no transport can write it any more. Who holds a page is the whole protocol.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::backend::{BlockId, TokenId};
use crate::page::{Page, PageShape};
use crate::request::{Logprob, RequestId};

/// What a generation server needs to take over a request; crosses the wire inside `disaggregated_params`.
#[derive(Debug, Clone, PartialEq)]
pub struct HandoffTicket {
    /// Id of the lease on the context server.
    pub ctx_request_id: u64,
    /// The proxy's id, where there is one.
    pub disagg_request_id: Option<u64>,
    /// The context instance's state: versioned, with instance id, epoch, KV layout, endpoints and nonce.
    /// Opaque to everything but the transceiver; base64 on the wire. Empty when the answer needs no KV.
    pub opaque_state: Vec<u8>,
    /// Tokens sampled by the context server, at least one.
    pub first_tokens: Vec<TokenId>,
    /// Their log-probabilities, chosen first, when asked for; one list a token.
    pub first_logprobs: Vec<Vec<Logprob>>,
}

/// What an instance's KV looks like and how its ranks divide it; both sides of a hand-off compare it before anything is
/// allocated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvLayout {
    /// See [`crate::model::ModelShape::fingerprint`].
    pub model_fingerprint: u64,
    /// The whole model's page, however many ranks hold parts of it.
    pub page: PageShape,
    /// Tensor-parallel ranks.
    pub tensor_parallel: u32,
    /// Pipeline-parallel ranks.
    pub pipeline_parallel: u32,
}

/// What a finished hand-off moved.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct HandoffStats {
    /// Payload bytes.
    pub bytes: u64,
    /// From asking for the KV to the last verified byte.
    pub elapsed: Duration,
    /// What each rank took from each rank.
    pub moves: Vec<RankMove>,
}

/// KV that one rank took from one rank of another instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankMove {
    /// Who took it.
    pub rank: u32,
    /// Who gave it: the other instance.
    pub peer: String,
    /// Who gave it: its rank.
    pub peer_rank: u32,
    /// Name of the transport.
    pub transport: String,
    /// Payload bytes, verified.
    pub bytes: u64,
}

impl HandoffStats {
    /// Adds what another rank moved at the same time.
    pub(crate) fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.elapsed = self.elapsed.max(other.elapsed);
        self.moves.extend(other.moves);
    }

    /// Names of the transports, `+` between them: ranks of several machines may have several.
    #[must_use]
    pub fn transport(&self) -> String {
        let mut names: Vec<&str> = Vec::new();
        for moved in &self.moves {
            if !names.contains(&moved.transport.as_str()) {
                names.push(&moved.transport);
            }
        }
        names.join("+")
    }
}

/// Why a lease ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseEnd {
    /// The generation side acknowledged verified KV.
    Delivered,
    /// Nobody asked, or did not finish, within `kv_transfer_timeout_ms`.
    Expired,
    /// The generation side or the engine gave it up.
    Cancelled,
}

/// What the transceiver tells the engine thread.
#[derive(Debug)]
pub enum HandoffEvent {
    /// A lease is over and its pages have no reader left.
    LeaseEnded {
        /// The lease.
        ctx_request_id: u64,
        /// Why.
        end: LeaseEnd,
    },
    /// A fetch is decided. On success its pages have been returned before this event.
    FetchEnded {
        /// The request it was for.
        request: RequestId,
        /// Stats, or what failed.
        outcome: Result<HandoffStats, HandoffError>,
    },
    /// Pages that may be used again. After a failed fetch they may come late, when the transport is sure.
    PagesReturned {
        /// The pages with the blocks they belong to.
        pages: BlockPages,
    },
    /// Something that the ranks of this instance have to do together.
    Ranks(RanksEvent),
}

/// What one rank's transceiver cannot settle alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RanksEvent {
    /// A lease is over on some ranks, or delivered on all that anybody takes from: the others shall give it up.
    LeaseUnwanted {
        /// The lease.
        ctx_request_id: u64,
    },
    /// A fetch has failed on one rank: the others shall give it up.
    FetchDoomed {
        /// The request it was for.
        request: RequestId,
    },
    /// A rank's transceiver is gone, and with it the instance.
    Lost {
        /// Which.
        rank: usize,
        /// What was observed.
        reason: String,
    },
}

/// What the ranks that follow are told of a hand-off; each does it with its own pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RankOrder {
    /// As [`Handoff::offer`], under the state that the leading rank gave out.
    Offer {
        /// See [`Offer::ctx_request_id`].
        ctx_request_id: u64,
        /// See [`Offer::token_count`].
        token_count: usize,
        /// Whose pages.
        blocks: Vec<BlockId>,
        /// See [`HandoffTicket::opaque_state`].
        state: Vec<u8>,
    },
    /// As [`Handoff::extend`].
    Extend {
        /// See [`Offer::ctx_request_id`].
        ctx_request_id: u64,
        /// Whose pages.
        blocks: Vec<BlockId>,
    },
    /// As [`Handoff::withdraw`].
    Withdraw(u64),
    /// As [`Handoff::fetch`].
    Fetch {
        /// See [`Fetch::request`].
        request: RequestId,
        /// See [`HandoffTicket::ctx_request_id`].
        ctx_request_id: u64,
        /// See [`HandoffTicket::opaque_state`].
        state: Vec<u8>,
        /// See [`Fetch::token_count`].
        token_count: usize,
        /// See [`Fetch::first_token`].
        first_token: usize,
        /// Whose pages.
        blocks: Vec<BlockId>,
    },
    /// As [`Handoff::cancel_fetch`].
    CancelFetch(RequestId),
    /// As [`Handoff::meet`].
    Meet(Vec<u8>),
}

/// Why a hand-off failed or was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum HandoffError {
    /// The two layouts cannot be converted; the text names the field and both values.
    #[error("kv layouts differ: {0}")]
    Layout(String),
    /// The opaque state is not one of ours, or of another version.
    #[error("hand-off state not understood: {0}")]
    State(String),
    /// The context server no longer has it: lease over, other epoch, wrong nonce.
    #[error("context server refused: {0}")]
    Refused(String),
    /// Bytes arrived that do not match their checksum.
    #[error("kv checksum mismatch: {0}")]
    Checksum(String),
    /// The peer went away or could not be reached.
    #[error("{0}")]
    Transport(String),
    /// It took longer than allowed; the text says what was waited for, on whom, how long.
    #[error("timed out: {0}")]
    TimedOut(String),
    /// Given up by this side.
    #[error("cancelled")]
    Cancelled,
}

/// Pages to keep for a generation server.
#[derive(Debug)]
pub struct Offer {
    /// Lease id, unique within this engine process's life.
    pub ctx_request_id: u64,
    /// Tokens whose KV the pages hold, once all are there.
    pub token_count: usize,
    /// The sequence's pages in order. Where they are fewer than the tokens fill, the lease is open: the others follow.
    pub pages: Vec<Arc<Page>>,
}

/// Pages to fill from a context server.
#[derive(Debug)]
pub struct Fetch {
    /// The request they are for.
    pub request: RequestId,
    /// Where to get it.
    pub ticket: HandoffTicket,
    /// Tokens whose KV there is.
    pub token_count: usize,
    /// The KV of tokens before this one is here already; a multiple of the block size.
    pub first_token: usize,
    /// Pages to write, in order from the first token's on, with the blocks they belong to. All are of this side's pool.
    pub pages: BlockPages,
}

/// Pages, each with the block that it belongs to. Thousands come and go with a request, and whoever takes care of the one has no
/// use for the other: so they are two lists, of equal length.
#[derive(Debug, Default)]
pub struct BlockPages {
    /// For each page, its block.
    pub blocks: Vec<BlockId>,
    /// The pages.
    pub pages: Vec<Page>,
}

impl BlockPages {
    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

impl FromIterator<(BlockId, Page)> for BlockPages {
    fn from_iter<I: IntoIterator<Item = (BlockId, Page)>>(pages: I) -> Self {
        let (blocks, pages) = pages.into_iter().unzip();
        Self { blocks, pages }
    }
}

impl IntoIterator for BlockPages {
    type Item = (BlockId, Page);
    type IntoIter = std::iter::Zip<std::vec::IntoIter<BlockId>, std::vec::IntoIter<Page>>;

    fn into_iter(self) -> Self::IntoIter {
        self.blocks.into_iter().zip(self.pages)
    }
}

impl Extend<(BlockId, Page)> for BlockPages {
    fn extend<I: IntoIterator<Item = (BlockId, Page)>>(&mut self, pages: I) {
        for (block, page) in pages {
            self.blocks.push(block);
            self.pages.push(page);
        }
    }
}

/// The engine thread's view of the transceiver. No call waits on the network; results come as [`HandoffEvent`]s
/// through the callback that the transceiver was made with.
pub trait Handoff: Debug + Send {
    /// Starts a lease and returns the opaque state for the ticket.
    ///
    /// # Errors
    /// When too many leases are held.
    fn offer(&mut self, offer: Offer) -> Result<Vec<u8>, HandoffError>;

    /// Adds pages to an open lease, in order. One that is over takes none; its end is reported in any case.
    fn extend(&mut self, ctx_request_id: u64, pages: Vec<Arc<Page>>);

    /// Ends a lease early. `LeaseEnded` still comes.
    fn withdraw(&mut self, ctx_request_id: u64);

    /// Checks a ticket against this side's layout, before anything is allocated. Returns the tokens it holds.
    ///
    /// # Errors
    /// [`HandoffError::Layout`] or [`HandoffError::State`].
    fn check(&self, ticket: &HandoffTicket) -> Result<usize, HandoffError>;

    /// Starts fetching. The outcome comes as `FetchEnded`, the pages as `PagesReturned`.
    fn fetch(&mut self, fetch: Fetch);

    /// Gives a fetch up. `FetchEnded` with [`HandoffError::Cancelled`] still comes, unless it was decided already.
    fn cancel_fetch(&mut self, request: RequestId);

    /// Connects to a context instance before there is anything to fetch, by the state that it gives out for that. Both
    /// sides say in one line when its KV could not be taken here.
    ///
    /// # Errors
    /// [`HandoffError::Layout`] or [`HandoffError::State`].
    fn meet(&mut self, state: &[u8]) -> Result<(), HandoffError>;
}

/// Where the transceiver reports; made by the engine thread's inbox, called from any thread, never waits long.
pub type HandoffSink = Arc<dyn Fn(HandoffEvent) + Send + Sync>;

//! What the two transceivers say to each other, over any transport's messages and notes.
//!
//! Generation to context: hello, request, acknowledge, release, cancel. Context to generation: refuse, extended, done, abort. Messages
//! are JSON, bounded by the transport; the note of a row of pieces is 25 bytes and 8 a piece, as it comes with every row.

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::checksum::Algorithm;
use super::desk::RankEvent;
use super::info::RankTotals;
use super::regions::RemoteRegions;
use super::state::{LayoutRecord, Nonce};
use crate::transport::{Note, TransferId};

/// Proves that the sender holds a lease's ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Claim {
    pub(super) ctx_request_id: u64,
    pub(super) epoch: u64,
    pub(super) nonce: Nonce,
}

/// Who takes a lease's KV: the ranks of one generation instance, for one request. A lease is one taker's at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Taker {
    /// Of the generation instance.
    pub(super) epoch: u64,
    /// Its own number for the request.
    pub(super) request: u64,
}

/// Asks for a lease's KV: what the receiver's rank needs of what the sender's rank holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    /// Another version is refused by name.
    pub(super) version: u32,
    pub(super) claim: Claim,
    pub(super) taker: Taker,
    /// The generation instance, for messages.
    pub(super) instance: String,
    /// The receiver's rank within it.
    pub(super) rank: u32,
    pub(super) transfer: TransferId,
    pub(super) layout: LayoutRecord,
    /// Tokens before this one are there already; a multiple of the receiver's block.
    pub(super) first_token: u64,
    pub(super) token_count: u64,
    /// Where each page of the receiver goes, in order, from the first token's on.
    pub(super) regions: RemoteRegions,
}

/// A control message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    /// Generation: here I am, before there is anything to ask for.
    Hello {
        /// The generation instance, for messages.
        instance: String,
        layout: LayoutRecord,
    },
    /// Generation: send it here.
    Request(Request),
    /// Generation: everything came and is verified.
    Acknowledge { transfer: TransferId },
    /// Generation: not over this wire. The lease stays.
    Release { transfer: TransferId },
    /// Generation: not wanted any more.
    Cancel {
        transfer: TransferId,
        claim: Claim,
        taker: Taker,
        /// Why, where the context side should know.
        reason: Option<String>,
    },
    /// Context: not served.
    Refused {
        transfer: TransferId,
        reason: String,
    },
    /// Context: the prompt is still being read, and one more chunk of it is there. The time allowed starts anew.
    Extended { transfer: TransferId },
    /// Context: all pieces were handed to the transport.
    Done {
        transfer: TransferId,
        bytes: u64,
        pieces: u64,
    },
    /// A rank that follows, to the one that leads its instance.
    Rank {
        secret: Nonce,
        rank: u32,
        /// What happened since the last report, in order.
        events: Vec<RankEvent>,
        /// What it has counted so far.
        totals: RankTotals,
    },
    /// Context: given up on the way.
    Aborted {
        transfer: TransferId,
        reason: String,
    },
}

impl Message {
    pub(super) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("messages have string keys and no failing field")
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

/// What comes with each row of pieces. Whoever sends it has the sums elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RowNote<Sums = SmallVec<[u64; 1]>> {
    pub(super) ctx_request_id: u64,
    pub(super) epoch: u64,
    /// The sender's rank.
    pub(super) rank: u32,
    /// Of the first one, its index among the pieces that this sender has for this receiver; the others follow.
    pub(super) piece: u32,
    /// Of all sums.
    pub(super) algorithm: Algorithm,
    /// One for each piece.
    pub(super) sums: Sums,
}

impl RowNote {
    /// Where an encoded one has its sums, of eight bytes each.
    pub(super) const SUMS_AT: usize = 25;

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, sums) = bytes.split_first_chunk::<{ Self::SUMS_AT }>()?;
        let (words, algorithm) = head.as_chunks::<8>();
        let (halves, _) = words[2].as_chunks::<4>();
        let (sums, []) = sums.as_chunks::<8>() else {
            return None;
        };
        if sums.is_empty() {
            return None;
        }
        Some(Self {
            ctx_request_id: u64::from_le_bytes(words[0]),
            epoch: u64::from_le_bytes(words[1]),
            piece: u32::from_le_bytes(halves[0]),
            rank: u32::from_le_bytes(halves[1]),
            algorithm: Algorithm::numbered(algorithm[0])?,
            sums: sums.iter().map(|sum| u64::from_le_bytes(*sum)).collect(),
        })
    }
}

impl<Sums: AsRef<[u64]>> RowNote<Sums> {
    pub(super) fn encode(&self) -> Note {
        let sums = self.sums.as_ref();
        let mut out = Note::with_capacity(RowNote::SUMS_AT + 8 * sums.len());
        out.extend_from_slice(&self.ctx_request_id.to_le_bytes());
        out.extend_from_slice(&self.epoch.to_le_bytes());
        out.extend_from_slice(&self.piece.to_le_bytes());
        out.extend_from_slice(&self.rank.to_le_bytes());
        out.push(self.algorithm.number());
        let at = out.len();
        out.resize(at + 8 * sums.len(), 0);
        for (place, sum) in out[at..].chunks_exact_mut(8).zip(sums) {
            place.copy_from_slice(&sum.to_le_bytes());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{ROW_PAGES_MAX, link};
    use proptest::prelude::*;

    #[test]
    fn a_note_survives_the_wire() {
        for count in 1..=ROW_PAGES_MAX as u64 {
            let note = RowNote {
                ctx_request_id: 1,
                epoch: u64::MAX,
                rank: 3,
                piece: 7,
                algorithm: Algorithm::Fold,
                sums: (0..count).map(|index| 0xdead_beef << index).collect(),
            };
            let bytes = note.encode();
            assert!(bytes.len() <= link::NOTE_BYTES_MAX, "{}", bytes.len());
            let unknown = [&bytes[..24], &[9], &bytes[25..]].concat();
            assert_eq!(RowNote::decode(&unknown), None);
            assert_eq!(RowNote::decode(&bytes[1..]), None);
            assert_eq!(RowNote::decode(&bytes[..RowNote::SUMS_AT]), None);
            assert_eq!(RowNote::decode(&bytes), Some(note));
        }
    }

    #[test]
    fn a_message_survives_the_wire_and_a_truncated_one_does_not() {
        let message = Message::Cancel {
            transfer: TransferId(u64::MAX),
            claim: Claim {
                ctx_request_id: 3,
                epoch: 4,
                nonce: Nonce::random(),
            },
            taker: Taker {
                epoch: 5,
                request: 6,
            },
            reason: None,
        };
        let bytes = message.encode();
        assert_eq!(Message::decode(&bytes).unwrap(), message);
        for length in 0..bytes.len() {
            assert!(Message::decode(&bytes[..length]).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(Message::decode(&bytes).is_err());
            let known = bytes.get(24).is_some_and(|number| Algorithm::numbered(*number).is_some());
            let right = bytes.len() >= 33 && bytes.len() % 8 == 1 && known;
            prop_assert_eq!(RowNote::decode(&bytes).is_some(), right);
        }
    }
}

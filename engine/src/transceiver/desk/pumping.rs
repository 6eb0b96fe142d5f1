//! The context side's pieces on their way out: transfers to a peer take turns, and submit their pieces in rows.
//!
//! Invariant: what a transport has taken is counted in its serving until the transport has let go of it.

use std::collections::VecDeque;

use smallvec::SmallVec;

use super::Desk;
use super::lease::{Lease, NoTarget, Serving};
use crate::handoff::LeaseEnd;
use crate::transceiver::message::{Message, RowNote};
use crate::transport::{PeerId, Submission, TransferId, Write};

/// Bytes that a transfer submits in its turn, but for a longer piece: some rows of short ones, so that little is to be looked up, and
/// nobody woken, for each, and so few that all transfers to a peer advance together.
const TURN_BYTES: usize = 16 << 20;

/// What a transfer did with its turn.
enum Turn {
    Submitted,
    /// It cannot go on now: pages, checksums or its window are missing.
    Waits,
    Finished,
    PeerBusy,
    /// The transport will never take the next piece.
    Refused,
}

/// How many pieces each of some rows has: mostly of no more rows than this.
type Rows = SmallVec<[usize; 4]>;

/// Rows that the transport has taken, and the bytes of them.
type Submitted = (Rows, u64);

impl Desk {
    /// Submits pieces to all peers that may take some, once for all that has happened.
    pub(super) fn pump_ready(&mut self) {
        for peer in std::mem::take(&mut self.ready) {
            self.pump(peer);
        }
    }

    /// Submits pieces to a peer, its transfers in turn, until it takes no more.
    pub(super) fn pump(&mut self, peer: PeerId) {
        let Some(mut turns) = self.turns.remove(&peer) else {
            return;
        };
        let mut waits = VecDeque::new();
        while let Some(transfer) = turns.pop_front() {
            match self.take_turn(peer, transfer) {
                Turn::Submitted => turns.push_back(transfer),
                Turn::Waits => waits.push_back(transfer),
                Turn::Finished | Turn::Refused => {}
                Turn::PeerBusy => {
                    turns.push_front(transfer);
                    break;
                }
            }
        }
        turns.append(&mut waits);
        if !turns.is_empty() {
            self.turns.insert(peer, turns);
        }
    }

    fn take_turn(&mut self, peer: PeerId, transfer: TransferId) -> Turn {
        let Some(&id) = self.sending.get(&(peer, transfer)) else {
            return Turn::Finished;
        };
        let (turn, submitted) = self.submit(id, (peer, transfer));
        if !submitted.0.is_empty() {
            self.note_submitted(id, (peer, transfer), submitted);
        }
        if matches!(turn, Turn::Refused) {
            self.end_lease(id, LeaseEnd::Cancelled, "the transport refused a piece");
        }
        turn
    }

    /// Submits a transfer's next rows; how many pieces each had, and the bytes of all of them.
    fn submit(&mut self, id: u64, (peer, transfer): (PeerId, TransferId)) -> (Turn, Submitted) {
        let nothing = Submitted::default();
        let Some(lease) = self.leases.get(&id).filter(|lease| lease.end.is_none()) else {
            return (Turn::Finished, nothing);
        };
        let Some(serving) = lease.serving(peer, transfer).filter(|s| !s.released) else {
            return (Turn::Finished, nothing);
        };
        if serving.next == serving.pieces.len() {
            let done = Message::Done {
                transfer,
                bytes: serving.pieces.total_bytes(),
                pieces: serving.pieces.len() as u64,
            };
            self.tell_in_passing(peer, &done);
            return (Turn::Finished, nothing);
        }
        let (writes, turn) = self.next_writes(id, lease, serving);
        let sizes = writes
            .iter()
            .map(|write| (write.sources.len(), write.total_bytes() as u64));
        let sizes: SmallVec<[_; 4]> = sizes.collect();
        let (accepted, submission) = self.around.wires.write_all(peer, writes);
        let taken = &sizes[..accepted];
        let rows = taken.iter().map(|(pieces, _)| *pieces).collect();
        let bytes = taken.iter().map(|(_, bytes)| bytes).sum();
        let turn = match submission {
            Submission::Accepted => turn,
            // Gone: the loss of the peer is on its way and opens the lease again.
            Submission::Busy | Submission::Gone => Turn::PeerBusy,
            Submission::Invalid => Turn::Refused,
        };
        (turn, (rows, bytes))
    }

    /// What a transfer may submit in its turn, and what becomes of the turn when that is accepted.
    fn next_writes(&self, id: u64, lease: &Lease, serving: &Serving) -> (Vec<Write>, Turn) {
        let sums_writes = self.around.wires.sums_writes(serving.peer);
        let (mut writes, mut bytes) = (Vec::new(), 0);
        let mut next = serving.next;
        while next < serving.pieces.len() && bytes < TURN_BYTES {
            let in_flight = serving.in_flight.pieces() + next - serving.next;
            let room = self.terms.window.saturating_sub(in_flight);
            if room == 0 {
                return (writes, Turn::Waits);
            }
            let row = match lease.row(serving, (next, room), sums_writes) {
                Ok(Some(row)) => row,
                Ok(None) => return (writes, Turn::Waits),
                Err(NoTarget) => return (writes, Turn::Refused),
            };
            let note = RowNote {
                ctx_request_id: id,
                epoch: self.terms.epoch ^ u64::from(self.terms.stale_epoch),
                rank: u32::try_from(self.terms.rank).unwrap_or(u32::MAX),
                piece: u32::try_from(next).unwrap_or(u32::MAX),
                algorithm: row.algorithm,
                sums: row.sums,
            };
            let write = Write {
                peer: serving.peer,
                transfer: serving.transfer,
                sources: row.sources,
                target: row.target,
                runs: row.runs.clone(),
                note: note.encode(),
                sum_at: row.summed_on_the_way.then_some(RowNote::SUMS_AT),
            };
            next += write.sources.len();
            bytes += write.total_bytes();
            writes.push(write);
        }
        (writes, Turn::Submitted)
    }

    fn note_submitted(
        &mut self,
        id: u64,
        (peer, transfer): (PeerId, TransferId),
        (rows, bytes): Submitted,
    ) {
        let lease = self.leases.get_mut(&id);
        if let Some(serving) = lease.and_then(|lease| lease.serving_mut(peer, transfer)) {
            for pieces in rows {
                serving.next += pieces;
                serving.in_flight.add(pieces);
            }
        }
        let wire = self.around.wires.wire_of(peer);
        self.around.info.sent(wire, bytes);
    }
}

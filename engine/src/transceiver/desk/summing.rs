//! The sums of what is lent: a lease's own, of all that is held of each page, and those of transfers that take pages apart.
//!
//! They are made when pages come, most often before anybody asks for them; not where every transport makes them itself while it
//! sends, which takes no pass over memory of its own. Invariant: whoever holds pages to sum them is counted in the lease.

use std::sync::Arc;

use super::Desk;
use crate::transceiver::checksum::{Checksums, Summing};
use crate::transceiver::inbox::SumsOf;

impl Desk {
    /// Has what is not summed yet of a lease summed, and of its transfers.
    pub(super) fn sum(&mut self, id: u64) {
        let lease = self.leases.get_mut(&id);
        let Some(lease) = lease.filter(|lease| lease.end.is_none()) else {
            return;
        };
        if lease.pages.are_in_host() && self.around.wires.all_sum_writes() {
            // What waits for them waits for the pages alone.
            self.ready
                .extend(lease.servings.iter().map(|serving| serving.peer));
            return;
        }
        lease.note_unsummed();
        let mut jobs = Vec::new();
        if let Some(parts) = lease.unsummed.start() {
            let given_up = Arc::clone(&lease.given_up);
            jobs.push(Summing::new(SumsOf::Lease(id), parts, given_up));
        }
        for serving in &mut lease.servings {
            if let Some(parts) = serving.unsummed.start() {
                let of = SumsOf::Transfer(id, serving.peer, serving.transfer);
                jobs.push(Summing::new(of, parts, Arc::clone(&serving.given_up)));
            }
        }
        lease.hashing += jobs.len();
        for job in jobs {
            self.around.checksums.sum(job);
        }
    }

    pub(super) fn on_hashed(&mut self, of: SumsOf, checksums: &Checksums) {
        match of {
            SumsOf::Lease(id) => {
                let Some(lease) = self.leases.get_mut(&id) else {
                    return;
                };
                lease.checksums.append(checksums);
                self.ready
                    .extend(lease.servings.iter().map(|serving| serving.peer));
            }
            SumsOf::Transfer(id, peer, transfer) => {
                let lease = self.leases.get_mut(&id);
                if let Some(serving) = lease.and_then(|lease| lease.serving_mut(peer, transfer)) {
                    serving.own_sums.append(checksums);
                    self.ready.insert(peer);
                }
            }
        }
    }

    pub(super) fn on_hashing_ended(&mut self, of: SumsOf) {
        let (SumsOf::Lease(id) | SumsOf::Transfer(id, ..)) = of;
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.hashing -= 1;
            match of {
                SumsOf::Lease(_) => lease.unsummed.ended(),
                SumsOf::Transfer(_, peer, transfer) => {
                    if let Some(serving) = lease.serving_mut(peer, transfer) {
                        serving.unsummed.ended();
                    }
                }
            }
        }
        self.sum(id);
        self.finish_lease(id);
    }
}

//! Leases held for generation servers, and the numbers they are known by.

use std::collections::HashMap;

use crate::backend::BlockId;
use crate::request::RequestId;

/// Numbers stay exact in every JSON reader.
const ID_BITS: u32 = 53;
const ID_MASK: u64 = (1 << ID_BITS) - 1;

/// Blocks pinned for a generation server.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) request: RequestId,
    /// In order; while the prompt is read, those of the chunks that are.
    pub(super) blocks: Vec<BlockId>,
    /// For its ticket.
    pub(super) opaque_state: Vec<u8>,
}

/// All leases, by `ctx_request_id`.
#[derive(Debug)]
pub(super) struct Leases {
    held: HashMap<u64, Lease>,
    /// The last one of each request.
    by_request: HashMap<RequestId, u64>,
    next: u64,
    stride: u64,
}

impl Leases {
    /// Numbers start at a random place and go by a random odd stride, so that they are distinct for the life of the
    /// process and nobody can tell another request's from their own.
    pub(super) fn new() -> Self {
        let (start, stride) = uuid::Uuid::new_v4().as_u64_pair();
        Self {
            held: HashMap::new(),
            by_request: HashMap::new(),
            next: start & ID_MASK,
            stride: (stride & ID_MASK) | 1,
        }
    }

    pub(super) fn next_id(&mut self) -> u64 {
        loop {
            let id = self.next;
            self.next = self.next.wrapping_add(self.stride) & ID_MASK;
            if id != 0 {
                return id;
            }
        }
    }

    pub(super) fn insert(&mut self, ctx_request_id: u64, lease: Lease) {
        self.by_request.insert(lease.request, ctx_request_id);
        self.held.insert(ctx_request_id, lease);
    }

    pub(super) fn remove(&mut self, ctx_request_id: u64) -> Option<Lease> {
        let lease = self.held.remove(&ctx_request_id)?;
        if self.by_request.get(&lease.request) == Some(&ctx_request_id) {
            self.by_request.remove(&lease.request);
        }
        Some(lease)
    }

    /// The lease that a request's prompt is under.
    pub(super) fn of(&self, request: RequestId) -> Option<u64> {
        self.by_request.get(&request).copied()
    }

    pub(super) fn get(&self, ctx_request_id: u64) -> Option<&Lease> {
        self.held.get(&ctx_request_id)
    }

    pub(super) fn get_mut(&mut self, ctx_request_id: u64) -> Option<&mut Lease> {
        self.held.get_mut(&ctx_request_id)
    }

    pub(super) fn ids(&self) -> Vec<u64> {
        self.held.keys().copied().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn numbers_are_distinct_and_never_zero() {
        let mut leases = Leases {
            next: ID_MASK - 10,
            stride: 1,
            ..Leases::new()
        };
        let ids: HashSet<u64> = (0..100).map(|_| leases.next_id()).collect();
        assert_eq!(ids.len(), 100);
        assert!(ids.iter().all(|&id| id > 0 && id <= ID_MASK));
        assert_ne!(Leases::new().next_id(), Leases::new().next_id());
    }
}

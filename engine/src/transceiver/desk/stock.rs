//! The pages of a fetch: where each of them is, and those that are here.
//!
//! A request has thousands, which go to a transport together and come back together; so what is said of each is a byte, and
//! the pages themselves are mostly moved as one list. Those that come back one by one wait here by their index.
//!
//! Invariant: a page is here exactly where its place says so.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::backend::BlockId;
use crate::handoff::BlockPages;
use crate::page::Page;
use crate::transport::{Deregistered, RegionId, Registration, Transport};

/// Where a page of a fetch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Here,
    /// With the transport, to be written.
    Registered,
    /// With the transport, which lets nobody write it any more. It is what was sent.
    Sealed,
    /// With a checksum thread.
    Checking,
    /// Here, and what was sent.
    Verified,
    /// On its way back from a transport or a checksum thread.
    Leaving,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Stock {
    blocks: Vec<BlockId>,
    places: Vec<Place>,
    /// Every page, or none.
    all: Vec<Page>,
    /// Pages that are here without all others, by their index.
    some: BTreeMap<usize, Page>,
    registration: Option<Registration>,
    /// Pages that are what was sent.
    verified: usize,
    /// Pages that are on their way back.
    leaving: usize,
}

impl Stock {
    /// All of them are here.
    pub(super) fn new(pages: BlockPages) -> Self {
        let BlockPages { blocks, pages } = pages;
        Self {
            places: vec![Place::Here; pages.len()],
            all: pages,
            blocks,
            some: BTreeMap::new(),
            registration: None,
            verified: 0,
            leaving: 0,
        }
    }

    /// How many there are.
    pub(super) const fn len(&self) -> usize {
        self.places.len()
    }

    /// How many are known to be what was sent.
    pub(super) const fn verified(&self) -> usize {
        self.verified
    }

    /// Whether some are still to come back.
    pub(super) const fn waits(&self) -> bool {
        self.leaving > 0
    }

    /// Has a transport take all of them, which are here. When it takes none, they still are, and the reason is given.
    pub(super) fn register(&mut self, transport: &dyn Transport) -> Result<Registration, String> {
        match transport.register(self.take_all()) {
            Ok(registration) => {
                self.places.fill(Place::Registered);
                self.registration = Some(registration);
                Ok(registration)
            }
            Err(refused) => {
                self.all = refused.pages;
                Err(refused.reason)
            }
        }
    }

    /// The region of a page, if they were registered.
    pub(super) fn region(&self, index: usize) -> Option<RegionId> {
        Some(self.registration?.id(index))
    }

    /// Whether these are with the transport, to be written.
    pub(super) fn are_registered(&self, pages: Range<usize>) -> bool {
        let places = self.places.get(pages);
        places.is_some_and(|places| places.iter().all(|place| *place == Place::Registered))
    }

    /// Has the transport let nobody write these any more: they are what was sent. False when somebody does at this moment.
    pub(super) fn seal(&mut self, pages: Range<usize>, transport: &dyn Transport) -> bool {
        let first = self.region(pages.start);
        if !first.is_some_and(|first| transport.seal(first, pages.len())) {
            return false;
        }
        self.verified += pages.len();
        self.places[pages].fill(Place::Sealed);
        true
    }

    /// Takes a page back from the transport, to be checked; nothing when it does not come at once.
    pub(super) fn check(
        &mut self,
        index: usize,
        transport: &dyn Transport,
    ) -> Option<(RegionId, Page)> {
        let region = self.region(index)?;
        self.places[index] = Place::Checking;
        match transport.deregister(region) {
            Deregistered::Now(page) => Some((region, page)),
            Deregistered::Later | Deregistered::Unknown => None,
        }
    }

    /// A page is here, and what was sent.
    pub(super) fn put_verified(&mut self, index: usize, page: Page) {
        self.put(index, page);
        self.places[index] = Place::Verified;
        self.verified += 1;
    }

    /// A page is here.
    pub(super) fn put(&mut self, index: usize, page: Page) {
        if self.places[index] == Place::Leaving {
            self.leaving -= 1;
        }
        self.places[index] = Place::Here;
        self.some.insert(index, page);
    }

    /// Takes all of them back that come at once, whatever they hold. The others are on their way back, by their indexes.
    pub(super) fn recall(&mut self, transport: &dyn Transport) -> Vec<usize> {
        self.verified = 0;
        let registration = self.registration.filter(|_| self.none_is_here());
        if let Some(pages) = registration.and_then(|all| transport.reclaim(all.id(0))) {
            self.all = pages;
            self.places.fill(Place::Here);
            return Vec::new();
        }
        for index in 0..self.len() {
            let with_transport = matches!(self.places[index], Place::Registered | Place::Sealed);
            let back = match self.region(index).filter(|_| with_transport) {
                Some(region) => transport.deregister(region),
                None => Deregistered::Later,
            };
            match (self.places[index], back) {
                (_, Deregistered::Now(page)) => self.put(index, page),
                (Place::Here | Place::Verified, _) => self.places[index] = Place::Here,
                _ => self.places[index] = Place::Leaving,
            }
        }
        let away = (0..self.len()).filter(|&index| self.places[index] == Place::Leaving);
        let away: Vec<_> = away.collect();
        self.leaving = away.len();
        away
    }

    /// The block of a page.
    pub(super) fn block(&self, index: usize) -> BlockId {
        self.blocks[index]
    }

    /// Those that are here, in order.
    pub(super) fn into_pages(self) -> BlockPages {
        let Self {
            blocks, all, some, ..
        } = self;
        if some.is_empty() && all.len() == blocks.len() {
            return BlockPages { blocks, pages: all };
        }
        let some = some.into_iter();
        some.map(|(index, page)| (blocks[index], page)).collect()
    }

    fn none_is_here(&self) -> bool {
        self.all.is_empty() && self.some.is_empty()
    }

    fn take_all(&mut self) -> Vec<Page> {
        let some = std::mem::take(&mut self.some).into_values();
        let mut all = std::mem::take(&mut self.all);
        all.extend(some);
        all
    }
}

#[cfg(test)]
mod tests;

//! The pages that peers may write, and who writes each of them at the moment.
//!
//! A page is in its slot, or with the one reader thread that fills it, or gone: so a region that is given up
//! while it is being written comes back when that reader lets go, and never before.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use smallvec::SmallVec;

use super::super::{Deregistered, Region, RegionId, TransportEvent};
use crate::page::Page;
use crate::transport::numbered::NumberedMap;

#[derive(Debug)]
enum Holder {
    Slot(Page),
    Reader,
    ReaderOfClosedRegion,
}

#[derive(Debug)]
struct Slot {
    key: u64,
    bytes: u64,
    holder: Holder,
}

/// Regions whose numbers follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    /// The first one's.
    pub(super) first: u64,
    pub(super) count: usize,
}

impl Row {
    /// A peer that counts beyond the last number there is names regions that there are not.
    fn numbers(self) -> impl Iterator<Item = u64> {
        (0..self.count as u64).map(move |index| self.first.wrapping_add(index))
    }
}

/// The pages of a row: mostly one.
pub(super) type Pages = SmallVec<[Page; 1]>;

/// What a reader gets who wants to write a row of regions.
#[derive(Debug)]
pub(super) enum Taken {
    /// All of their pages; give them back with [`Regions::put_back`].
    Pages(Pages),
    /// One of them is none any more, or has another key: the bytes are to be thrown away.
    Stale,
    /// The runs are not within one of them: the peer is broken or hostile.
    OutOfRange {
        /// That region's size.
        bytes: u64,
    },
    /// Another peer has been writing one of them all the time that we waited.
    Occupied,
}

/// All regions of a transport.
#[derive(Debug, Default)]
pub(super) struct Regions {
    slots: Mutex<NumberedMap<u64, Slot>>,
    /// Whether any page of a device was ever registered.
    know_devices: AtomicBool,
    put_back: Condvar,
}

impl Regions {
    pub(super) fn register(&self, pages: Vec<Page>) -> Vec<Region> {
        if pages.iter().any(Page::is_on_device) {
            self.know_devices.store(true, Ordering::Release);
        }
        let (first, key) = (RegionId::fresh_row(pages.len()), fresh_key());
        let mut slots = self.lock();
        slots.reserve(pages.len());
        let register = |(id, page): (u64, Page)| {
            let bytes = page.shape().bytes() as u64;
            let holder = Holder::Slot(page);
            slots.insert(id, Slot { key, bytes, holder });
            Region::numbered(id, key, bytes)
        };
        (first.0..).zip(pages).map(register).collect()
    }

    pub(super) fn deregister(&self, region: RegionId) -> Deregistered {
        let mut slots = self.lock();
        let Some(slot) = slots.remove(&region.0) else {
            return Deregistered::Unknown;
        };
        match slot.holder {
            Holder::Slot(page) => Deregistered::Now(page),
            Holder::Reader => {
                let holder = Holder::ReaderOfClosedRegion;
                slots.insert(region.0, Slot { holder, ..slot });
                Deregistered::Later
            }
            Holder::ReaderOfClosedRegion => {
                slots.insert(region.0, slot);
                Deregistered::Unknown
            }
        }
    }

    /// Takes pages out to write each up to `end`; waits its turn for at most `patience`.
    pub(super) fn take(&self, row: Row, key: u64, end: usize, patience: Duration) -> Taken {
        let mut slots = self.lock();
        let mut deadline = None;
        loop {
            if let Some(taken) = take_at_once(&mut slots, row, key, end) {
                return taken;
            }
            let now = Instant::now();
            let deadline = *deadline.get_or_insert(now + patience);
            let left = deadline.saturating_duration_since(now);
            if left.is_zero() {
                return Taken::Occupied;
            }
            self.put_back.wait_for(&mut slots, left);
        }
    }

    /// Whether a region's page lies on a device, as far as it is in its slot.
    pub(super) fn is_on_device(&self, id: u64) -> bool {
        if !self.know_devices.load(Ordering::Acquire) {
            return false;
        }
        let slots = self.lock();
        let holder = slots.get(&id).map(|slot| &slot.holder);
        matches!(holder, Some(Holder::Slot(page)) if page.is_on_device())
    }

    /// Ends a reader's hold. Those pages come back, with their regions' numbers, whose regions were given up meanwhile.
    pub(super) fn put_back(&self, first: u64, pages: Pages) -> Vec<(u64, Page)> {
        let mut slots = self.lock();
        let mut released = Vec::new();
        let row = Row {
            first,
            count: pages.len(),
        };
        for (id, page) in row.numbers().zip(pages) {
            match slots.get_mut(&id) {
                Some(slot) if matches!(slot.holder, Holder::Reader) => {
                    slot.holder = Holder::Slot(page);
                }
                _ => {
                    slots.remove(&id);
                    released.push((id, page));
                }
            }
        }
        drop(slots);
        self.put_back.notify_all();
        released
    }

    /// Whether a reader has the page at this moment; for tests that wait for a write to begin.
    #[cfg(test)]
    pub(super) fn is_being_written(&self, region: RegionId) -> bool {
        self.lock()
            .get(&region.0)
            .is_some_and(|slot| !matches!(slot.holder, Holder::Slot(_)))
    }

    fn lock(&self) -> MutexGuard<'_, NumberedMap<u64, Slot>> {
        self.slots.lock()
    }
}

/// The pages of a row, or why not; nothing while one of them is being written. Then none of them is taken.
fn take_at_once(
    slots: &mut NumberedMap<u64, Slot>,
    row: Row,
    key: u64,
    end: usize,
) -> Option<Taken> {
    let mut pages = Pages::new();
    for id in row.numbers() {
        let refused = match slots.get_mut(&id).filter(|slot| slot.key == key) {
            None => Some(Taken::Stale),
            Some(slot) if end as u64 > slot.bytes => Some(Taken::OutOfRange { bytes: slot.bytes }),
            Some(slot) => match std::mem::replace(&mut slot.holder, Holder::Reader) {
                Holder::Slot(page) => {
                    pages.push(page);
                    continue;
                }
                Holder::Reader => None,
                Holder::ReaderOfClosedRegion => {
                    slot.holder = Holder::ReaderOfClosedRegion;
                    Some(Taken::Stale)
                }
            },
        };
        for (id, page) in row.numbers().zip(pages) {
            if let Some(slot) = slots.get_mut(&id) {
                slot.holder = Holder::Slot(page);
            }
        }
        return refused;
    }
    Some(Taken::Pages(pages))
}

/// What is told of pages that came back from [`Regions::put_back`].
pub(super) fn pages_released(released: Vec<(u64, Page)>) -> impl Iterator<Item = TransportEvent> {
    released.into_iter().map(|(id, page)| {
        let region = RegionId(id);
        TransportEvent::PageReleased { region, page }
    })
}

/// A number that nobody can guess.
fn fresh_key() -> u64 {
    getrandom::u64().expect("a system without random numbers starts no server")
}

//! The pages that peers may write, and who writes each of them at the moment.
//!
//! A page is in its slot, or with the one reader thread that fills it, or gone: so a region that is given up
//! while it is being written comes back when that reader lets go, and never before.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::super::{Deregistered, Region, RegionId};
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

/// What a reader gets who wants to write a region.
#[derive(Debug)]
pub(super) enum Taken {
    /// The page; give it back with [`Regions::put_back`].
    Page(Page),
    /// No such region any more, or another key: the bytes are to be thrown away.
    Stale,
    /// The runs are not within the region: the peer is broken or hostile.
    OutOfRange {
        /// The region's size.
        bytes: u64,
    },
    /// Another peer has been writing it all the time that we waited.
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

    /// Takes a page out to write it up to `end`; waits its turn for at most `patience`.
    pub(super) fn take(&self, id: u64, key: u64, end: usize, patience: Duration) -> Taken {
        let mut slots = self.lock();
        let mut deadline = None;
        loop {
            let Some(slot) = slots.get_mut(&id).filter(|slot| slot.key == key) else {
                return Taken::Stale;
            };
            if end as u64 > slot.bytes {
                return Taken::OutOfRange { bytes: slot.bytes };
            }
            match std::mem::replace(&mut slot.holder, Holder::Reader) {
                Holder::Slot(page) => return Taken::Page(page),
                Holder::Reader => {}
                Holder::ReaderOfClosedRegion => {
                    slot.holder = Holder::ReaderOfClosedRegion;
                    return Taken::Stale;
                }
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

    /// Ends a reader's hold. The page comes back when its region was given up meanwhile.
    pub(super) fn put_back(&self, id: u64, page: Page) -> Option<Page> {
        let mut slots = self.lock();
        let released = match slots.get_mut(&id) {
            Some(slot) if matches!(slot.holder, Holder::Reader) => {
                slot.holder = Holder::Slot(page);
                None
            }
            _ => {
                slots.remove(&id);
                Some(page)
            }
        };
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

/// A number that nobody can guess.
fn fresh_key() -> u64 {
    getrandom::u64().expect("a system without random numbers starts no server")
}

//! The pages that peers may write, and who writes each of them at the moment.
//!
//! A page is in its slot, or with the one reader thread that fills it, or gone: so a region that is given up
//! while it is being written comes back when that reader lets go, and never before.
//!
//! A request has thousands of pages. What is said of each is a byte, in a list of its own, so that looking at a row of them, and
//! taking all of them back, touches little memory.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use smallvec::SmallVec;

use super::super::{Deregistered, RegionId, Registration, RemoteRegion, TransportEvent};
use crate::page::Page;

/// Where a region's page is, and what may become of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// In its slot; it may be written.
    Slot,
    /// In its slot, and nobody writes it any more.
    Sealed,
    Reader,
    ReaderOfClosedRegion,
    /// With whoever gave the region up: there is no such region any more.
    Owner,
}

impl Holder {
    const fn is_slot(self) -> bool {
        matches!(self, Self::Slot | Self::Sealed)
    }
}

/// Regions that were registered together, by their numbers, which follow each other: a request's thousands of pages are looked up, and
/// lie in memory, as the row that they are written in.
#[derive(Debug)]
struct Registered {
    key: u64,
    /// Whether the first one lies on a device, and so most likely all of them.
    on_device: bool,
    holders: Vec<Holder>,
    /// Those that are in their slots; pages of nothing where they are not.
    pages: Vec<Page>,
    /// Holders that are not their owner.
    left: usize,
}

/// Takes a page out of its slot.
const fn out_of(slot: &mut Page) -> Page {
    std::mem::replace(slot, Page::of_nothing())
}

impl Registered {
    /// So many holders from this one on; none when there are fewer.
    fn row(&mut self, index: usize, count: usize) -> Option<&mut [Holder]> {
        self.holders.get_mut(index..index.checked_add(count)?)
    }
}

/// All of them, by the first one's number.
type Registrations = BTreeMap<u64, Registered>;

/// Regions whose numbers follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    /// The first one's.
    pub(super) first: u64,
    pub(super) count: usize,
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
    registrations: Mutex<Registrations>,
    /// Whether any page of a device was ever registered.
    know_devices: AtomicBool,
    put_back: Condvar,
}

impl Regions {
    pub(super) fn register(&self, pages: Vec<Page>) -> Registration {
        let (bytes, on_device) = match pages.first() {
            Some(page) => (page.shape().bytes() as u64, page.is_on_device()),
            None => (0, false),
        };
        if on_device {
            self.know_devices.store(true, Ordering::Release);
        }
        let count = pages.len();
        let (RegionId(id), key) = (RegionId::fresh_row(count), fresh_key());
        let registered = Registered {
            key,
            on_device,
            left: count,
            holders: vec![Holder::Slot; count],
            pages,
        };
        if count > 0 {
            self.lock().insert(id, registered);
        }
        let first = RemoteRegion { bytes, id, key };
        Registration { first, count }
    }

    pub(super) fn deregister(&self, region: RegionId) -> Deregistered {
        let mut registrations = self.lock();
        let Some((first, registered, index)) = find(&mut registrations, region.0) else {
            return Deregistered::Unknown;
        };
        let holder = &mut registered.holders[index];
        match *holder {
            Holder::Slot | Holder::Sealed => {
                *holder = Holder::Owner;
                let page = out_of(&mut registered.pages[index]);
                let_one_go(&mut registrations, first);
                Deregistered::Now(page)
            }
            Holder::Reader => {
                *holder = Holder::ReaderOfClosedRegion;
                Deregistered::Later
            }
            Holder::ReaderOfClosedRegion | Holder::Owner => Deregistered::Unknown,
        }
    }

    /// [`super::super::Transport::seal`].
    pub(super) fn seal(&self, first: RegionId, count: usize) -> bool {
        let mut registrations = self.lock();
        let found = find(&mut registrations, first.0);
        let row = found.and_then(|(_, registered, index)| registered.row(index, count));
        let Some(row) = row.filter(|row| row.iter().all(|holder| *holder == Holder::Slot)) else {
            return false;
        };
        row.fill(Holder::Sealed);
        true
    }

    /// [`super::super::Transport::reclaim`].
    pub(super) fn reclaim(&self, first: RegionId) -> Option<Vec<Page>> {
        let mut registrations = self.lock();
        let Entry::Occupied(registered) = registrations.entry(first.0) else {
            return None;
        };
        let holders = &registered.get().holders;
        if !holders.iter().all(|holder| holder.is_slot()) {
            return None;
        }
        Some(registered.remove().pages)
    }

    /// Takes pages out to write each up to `end`; waits its turn for at most `patience`.
    pub(super) fn take(&self, row: Row, key: u64, end: usize, patience: Duration) -> Taken {
        let mut registrations = self.lock();
        let mut deadline = None;
        loop {
            if let Some(taken) = take_at_once(&mut registrations, row, key, end) {
                return taken;
            }
            let now = Instant::now();
            let deadline = *deadline.get_or_insert(now + patience);
            let left = deadline.saturating_duration_since(now);
            if left.is_zero() {
                return Taken::Occupied;
            }
            self.put_back.wait_for(&mut registrations, left);
        }
    }

    /// Whether a region's page lies on a device, as far as it is in its slot.
    pub(super) fn is_on_device(&self, id: u64) -> bool {
        if !self.know_devices.load(Ordering::Acquire) {
            return false;
        }
        let mut registrations = self.lock();
        let found = find(&mut registrations, id);
        found.is_some_and(|(_, of, index)| of.on_device && of.holders[index].is_slot())
    }

    /// Ends a reader's hold of pages that were taken together. Those come back, with their regions' numbers, whose regions were given up
    /// meanwhile.
    pub(super) fn put_back(&self, first: u64, pages: Pages) -> Vec<(u64, Page)> {
        let mut registrations = self.lock();
        let mut released = Vec::new();
        if let Some((start, registered, index)) = find(&mut registrations, first) {
            let holders = registered.holders[index..].iter_mut();
            let slots = registered.pages[index..].iter_mut();
            for (((id, page), holder), slot) in (first..).zip(pages).zip(holders).zip(slots) {
                match holder {
                    Holder::Reader => {
                        *holder = Holder::Slot;
                        *slot = page;
                    }
                    _ => {
                        *holder = Holder::Owner;
                        released.push((id, page));
                    }
                }
            }
            for _ in &released {
                let_one_go(&mut registrations, start);
            }
        }
        drop(registrations);
        self.put_back.notify_all();
        released
    }

    /// Whether a reader has the page at this moment; for tests that wait for a write to begin.
    #[cfg(test)]
    pub(super) fn is_being_written(&self, region: RegionId) -> bool {
        let mut registrations = self.lock();
        let holder = find(&mut registrations, region.0).map(|(_, of, index)| &of.holders[index]);
        matches!(holder, Some(Holder::Reader | Holder::ReaderOfClosedRegion))
    }

    fn lock(&self) -> MutexGuard<'_, Registrations> {
        self.registrations.lock()
    }
}

/// The registration that a number is of, by its first one, and where in it.
fn find(registrations: &mut Registrations, id: u64) -> Option<(u64, &mut Registered, usize)> {
    let (first, registered) = registrations.range_mut(..=id).next_back()?;
    let index = usize::try_from(id - first).ok()?;
    (index < registered.holders.len()).then_some((*first, registered, index))
}

/// One more page has gone back to its owner; with the last one the registration ends.
fn let_one_go(registrations: &mut Registrations, first: u64) {
    if let Entry::Occupied(mut registered) = registrations.entry(first) {
        registered.get_mut().left -= 1;
        if registered.get().left == 0 {
            registered.remove();
        }
    }
}

/// The pages of a row, or why not; nothing while one of them is being written. Then none of them is taken.
fn take_at_once(
    registrations: &mut Registrations,
    row: Row,
    key: u64,
    end: usize,
) -> Option<Taken> {
    let found = find(registrations, row.first).filter(|(_, of, _)| of.key == key);
    let Some((_, registered, index)) = found else {
        return Some(Taken::Stale);
    };
    let Some(holders) = registered.row(index, row.count) else {
        return Some(Taken::Stale);
    };
    for holder in holders.iter() {
        match holder {
            Holder::Slot => {}
            Holder::Reader => return None,
            Holder::Sealed | Holder::ReaderOfClosedRegion | Holder::Owner => {
                return Some(Taken::Stale);
            }
        }
    }
    holders.fill(Holder::Reader);
    let slots = &mut registered.pages[index..][..row.count];
    let mut sizes = slots.iter().map(|page| page.shape().bytes());
    if let Some(bytes) = sizes.find(|bytes| end > *bytes) {
        registered.holders[index..][..row.count].fill(Holder::Slot);
        let bytes = bytes as u64;
        return Some(Taken::OutOfRange { bytes });
    }
    Some(Taken::Pages(slots.iter_mut().map(out_of).collect()))
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

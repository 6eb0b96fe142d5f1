//! The pages that peers may write, and who writes each of them at the moment.
//!
//! A page is in its slot, or with the one reader thread that fills it, or gone: so a region that is given up
//! while it is being written comes back when that reader lets go, and never before.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::super::{Deregistered, Region, RegionId, RemoteRegion};
use crate::page::Page;
use crate::transport::numbered::NumberedMap;

/// Random numbers that are asked for at once.
const KEYS_AT_ONCE: usize = 512;

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
    /// Random numbers that no region has yet.
    keys: Mutex<Vec<u64>>,
    put_back: Condvar,
}

impl Regions {
    pub(super) fn make_room(&self, regions: usize) {
        self.lock().reserve(regions);
    }

    pub(super) fn register(&self, page: Page) -> Region {
        let region = RegionId::fresh();
        let id = region.0;
        if page.is_on_device() {
            self.know_devices.store(true, Ordering::Release);
        }
        let key = self.fresh_key();
        let bytes = page.shape().bytes() as u64;
        let slot = Slot {
            key,
            bytes,
            holder: Holder::Slot(page),
        };
        self.lock().insert(id, slot);
        Region {
            id: region,
            remote: RemoteRegion {
                bytes,
                token: token(id, key),
            },
        }
    }

    /// A number that nobody can guess. The system is asked for many at once: a request registers thousands of pages.
    fn fresh_key(&self) -> u64 {
        let mut keys = self.keys.lock();
        if let Some(key) = keys.pop() {
            return key;
        }
        let mut bytes = [0; KEYS_AT_ONCE * 8];
        getrandom::fill(&mut bytes).expect("a system without random numbers starts no server");
        let (words, _) = bytes.as_chunks::<8>();
        keys.extend(words.iter().map(|word| u64::from_le_bytes(*word)));
        keys.pop().unwrap_or_default()
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
        let deadline = Instant::now() + patience;
        let mut slots = self.lock();
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
            let left = deadline.saturating_duration_since(Instant::now());
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

/// A region's token: 32 hexadecimal digits. By hand, for a request has thousands.
fn token(id: u64, key: u64) -> String {
    let digit = |byte: u8| char::from(b"0123456789abcdef"[usize::from(byte & 0xF)]);
    let bytes = [id.to_be_bytes(), key.to_be_bytes()];
    let mut token = String::with_capacity(2 * size_of_val(&bytes));
    for byte in bytes.as_flattened() {
        token.push(digit(byte >> 4));
        token.push(digit(*byte));
    }
    token
}

/// Reads a region's token.
pub(super) fn parse_token(token: &str) -> Option<(u64, u64)> {
    if token.len() != 32 || !token.is_ascii() {
        return None;
    }
    let (id, key) = token.split_at(16);
    Some((
        u64::from_str_radix(id, 16).ok()?,
        u64::from_str_radix(key, 16).ok()?,
    ))
}

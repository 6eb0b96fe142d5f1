//! Memory of a transport's own, in one arena, for bytes that do not lie as a fabric likes them: short stretches, or
//! pages that are in no arena. Writers gather into it, readers scatter from it.
//!
//! A fixed number of slots of one size, resident once used. Nobody waits here for another slot while holding one, so
//! it can't lock up. Invariant: a slot is free or with one [`Slot`], which gives it back however it ends.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::page::arena::{Arena, ForeignAllocator};
use crate::page::{KvDtype, Page, PageShape};

/// How much staging memory a transport has, for each direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StagingSize {
    /// Bytes of a slot; what is longer travels another way.
    pub slot_bytes: usize,
    /// How many slots there are.
    pub slots: usize,
}

impl Default for StagingSize {
    fn default() -> Self {
        Self {
            slot_bytes: 4 << 20,
            slots: 16,
        }
    }
}

/// Called once, from any thread, when a slot may be free.
type Waker = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    free: Vec<Page>,
    waiting: Vec<Waker>,
}

/// The slots of one transport and direction.
pub(crate) struct Staging {
    size: StagingSize,
    arena: Option<Arc<Arena>>,
    state: Mutex<State>,
    freed: Condvar,
}

impl std::fmt::Debug for Staging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Staging of {:?}", self.size)
    }
}

/// A page of so many bytes that holds anything but KV.
pub(crate) const fn plain_shape(bytes: usize) -> PageShape {
    PageShape {
        layers: 1,
        kv_heads: 1,
        tokens_per_block: 1,
        head_dim: bytes.div_ceil(2 * KvDtype::F16.bytes()),
        dtype: KvDtype::F16,
    }
}

impl Staging {
    /// Makes the slots, of memory of this library if one is given. Where the system has no shared memory there are none,
    /// and nothing fits.
    pub(crate) fn new(size: StagingSize, allocator: Option<ForeignAllocator>) -> Arc<Self> {
        let made = Page::pool_of(allocator, plain_shape(size.slot_bytes), size.slots);
        let free = made.unwrap_or_else(|error| {
            tracing::warn!(%error, "no staging memory for the kv transport: short runs go through its stream");
            Vec::new()
        });
        Self::of(size, free)
    }

    /// Of slots that are there already: pages of one arena, which may be a device's.
    pub(crate) fn of(size: StagingSize, free: Vec<Page>) -> Arc<Self> {
        let slots = free.len();
        let arena = free.first().and_then(Page::arena);
        Arc::new(Self {
            arena: arena.map(|(arena, _)| Arc::clone(arena)),
            size: StagingSize { slots, ..size },
            state: Mutex::new(State {
                free,
                waiting: Vec::new(),
            }),
            freed: Condvar::new(),
        })
    }

    /// What the slots are cut from.
    pub(crate) fn arena(&self) -> Option<Arc<Arena>> {
        self.arena.clone()
    }

    /// How many slots there are.
    pub(crate) const fn slots(&self) -> usize {
        self.size.slots
    }

    /// Bytes of a slot.
    pub(crate) const fn slot_bytes(&self) -> usize {
        self.size.slot_bytes
    }

    /// Whether so many bytes go into a slot at all.
    pub(crate) const fn fits(&self, bytes: usize) -> bool {
        self.size.slots > 0 && bytes <= self.size.slot_bytes
    }

    /// Slots that one peer may hold, so that one that is stuck does not stop all.
    pub(crate) const fn share_of_one(&self) -> usize {
        self.size.slots.div_ceil(2)
    }

    /// A slot at once, or `wake` is called as soon as one may be free.
    pub(crate) fn take_or_wake(
        self: &Arc<Self>,
        wake: impl FnOnce() + Send + 'static,
    ) -> Option<Slot> {
        let mut state = self.lock();
        let page = state.free.pop();
        if page.is_none() {
            state.waiting.push(Box::new(wake));
        }
        drop(state);
        self.slot(page)
    }

    /// A slot at once, or none.
    pub(crate) fn try_take(self: &Arc<Self>) -> Option<Slot> {
        let page = self.lock().free.pop();
        self.slot(page)
    }

    /// A slot by the deadline.
    pub(crate) fn take(self: &Arc<Self>, deadline: Instant) -> Option<Slot> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut state = self.lock();
        self.freed
            .wait_while_for(&mut state, |state| state.free.is_empty(), left);
        let page = state.free.pop();
        drop(state);
        self.slot(page)
    }

    fn slot(self: &Arc<Self>, page: Option<Page>) -> Option<Slot> {
        page.map(|page| Slot {
            page: Some(page),
            home: Arc::clone(self),
        })
    }

    fn put_back(&self, page: Page) {
        let mut state = self.lock();
        state.free.push(page);
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        self.freed.notify_one();
        waiting.into_iter().for_each(|wake| wake());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// A slot in use; dropping it frees it.
#[derive(Debug)]
pub(crate) struct Slot {
    /// `None` only while it is being dropped.
    page: Option<Page>,
    home: Arc<Staging>,
}

impl Slot {
    /// Its memory.
    pub(crate) fn page(&self) -> &Page {
        self.page
            .as_ref()
            .expect("a slot has its page until it is dropped")
    }

    /// Its memory, writable.
    pub(crate) fn page_mut(&mut self) -> &mut Page {
        self.page
            .as_mut()
            .expect("a slot has its page until it is dropped")
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(page) = self.page.take() {
            self.home.put_back(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    const SIZE: StagingSize = StagingSize {
        slot_bytes: 1000,
        slots: 2,
    };

    #[test]
    fn slots_are_of_one_arena_and_come_back() {
        let staging = Staging::new(SIZE, None);
        assert!(staging.fits(1000) && !staging.fits(1001));
        let (first, second) = (staging.try_take().unwrap(), staging.try_take().unwrap());
        let arena = |slot: &Slot| slot.page().arena().unwrap().0.id();
        assert_eq!(arena(&first), arena(&second));
        assert!(first.page().as_bytes().len() >= 1000);
        assert!(staging.try_take().is_none());
        drop(first);
        assert!(staging.try_take().is_some());
    }

    #[test]
    fn who_wants_a_slot_is_woken_when_one_is_free() {
        let staging = Staging::new(SIZE, None);
        let taken: Vec<_> = (0..2).map(|_| staging.try_take().unwrap()).collect();
        let (woken, wakes) = channel();
        let told = woken.clone();
        assert!(
            staging
                .take_or_wake(move || told.send(1).unwrap())
                .is_none()
        );
        assert!(
            staging
                .take_or_wake(move || woken.send(2).unwrap())
                .is_none()
        );
        assert!(wakes.try_recv().is_err());
        drop(taken);
        assert_eq!(wakes.iter().collect::<Vec<_>>(), [1, 2]);
        let unused = || panic!("a slot was free");
        assert!(staging.take_or_wake(unused).is_some());
    }

    #[test]
    fn waiting_for_a_slot_ends_with_it_or_with_the_deadline() {
        let staging = Staging::new(SIZE, None);
        let taken: Vec<_> = (0..2).map(|_| staging.try_take().unwrap()).collect();
        assert!(staging.take(Instant::now()).is_none());
        let waiter = std::thread::spawn({
            let staging = Arc::clone(&staging);
            move || {
                staging
                    .take(Instant::now() + Duration::from_secs(20))
                    .is_some()
            }
        });
        drop(taken);
        assert!(waiter.join().unwrap());
    }

    #[test]
    fn without_slots_nothing_fits() {
        let staging = Staging::new(StagingSize { slots: 0, ..SIZE }, None);
        assert!(!staging.fits(1));
        assert!(staging.try_take().is_none());
    }
}

//! The threads of a backend: the caller and its helpers, who share a list of tasks.
//!
//! A decode step has two hundred regions of some microseconds each, so helpers spin between them before they sleep,
//! and the caller works too. It waits for a helper only if that one has entered the region: a helper that sleeps or
//! has lost its core to another process costs nothing, the caller does its share. (With a thread pool's scope, which
//! waits until every helper has run, a region took a millisecond on two busy cores.)
//!
//! Invariant: which thread runs a task never changes its result. `run` returns only when nobody uses the tasks.
#![expect(
    unsafe_code,
    reason = "threads that outlive a region can't borrow from it in safe code; one lifetime is erased and guarded"
)]

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Spins before a helper sleeps or a waiting caller yields its core; some tens of microseconds.
const SPIN_COUNT_MAX: u32 = 2000;
/// Set in a region's state when no helper may enter any more; the rest counts those inside.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// A fixed number of threads.
pub(super) struct Team {
    board: Arc<Board>,
    helpers: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Team {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Team of {}", self.threads())
    }
}

impl Team {
    /// `threads` counts the caller. Should the system refuse some, the team is smaller.
    pub(super) fn new(threads: usize) -> Self {
        let board = Arc::<Board>::default();
        let mut helpers = Vec::new();
        for index in 1..threads {
            let board = Arc::clone(&board);
            let builder = std::thread::Builder::new().name(format!("cpu-{index}"));
            match builder.spawn(move || board.serve()) {
                Ok(helper) => helpers.push(helper),
                Err(error) => {
                    tracing::warn!(%error, threads, started = index, "can't start a helper thread");
                    break;
                }
            }
        }
        Self { board, helpers }
    }

    /// Threads that work, the caller included.
    pub(super) const fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Does every task, in any order, and returns when all are done. A task's panic is the caller's.
    pub(super) fn run<T: Send>(&self, tasks: Vec<T>, work: impl Fn(T) + Sync) {
        if self.helpers.is_empty() || tasks.len() < 2 {
            tasks.into_iter().for_each(work);
            return;
        }
        let queue = Mutex::new(tasks.into_iter());
        let take = || lock(&queue).next();
        let drain = || {
            while let Some(task) = take() {
                work(task);
            }
        };
        let opened = Region::open(&drain);
        self.board.post(Arc::clone(&opened.region));
        drain();
        opened.finish();
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.board.end();
        for helper in self.helpers.drain(..) {
            // A helper catches its tasks' panics and has none of its own.
            let _ = helper.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the caller posts a region and helpers look for one.
#[derive(Default)]
struct Board {
    /// Counts posts; helpers spin on it.
    posts: AtomicUsize,
    post: Mutex<Post>,
    posted: Condvar,
}

#[derive(Default)]
struct Post {
    region: Option<Arc<Region>>,
    sleeping: usize,
    ended: bool,
}

impl Board {
    fn post(&self, region: Arc<Region>) {
        self.change(|post| post.region = Some(region));
    }

    fn end(&self) {
        self.change(|post| post.ended = true);
    }

    fn change(&self, change: impl FnOnce(&mut Post)) {
        let mut post = lock(&self.post);
        change(&mut post);
        self.posts.fetch_add(1, Ordering::Release);
        // Asking the system to wake nobody costs as much as a small region.
        if post.sleeping > 0 {
            self.posted.notify_all();
        }
    }

    /// A helper's life.
    fn serve(&self) {
        let mut seen = 0;
        while let Some(region) = self.next(&mut seen) {
            region.help();
        }
    }

    /// Waits for the next post; `None` is the end.
    fn next(&self, seen: &mut usize) -> Option<Arc<Region>> {
        loop {
            for _ in 0..SPIN_COUNT_MAX {
                if self.posts.load(Ordering::Acquire) != *seen {
                    break;
                }
                std::hint::spin_loop();
            }
            let mut post = lock(&self.post);
            while self.posts.load(Ordering::Acquire) == *seen {
                post.sleeping += 1;
                post = self
                    .posted
                    .wait(post)
                    .unwrap_or_else(PoisonError::into_inner);
                post.sleeping -= 1;
            }
            *seen = self.posts.load(Ordering::Acquire);
            if post.ended {
                return None;
            }
            if let Some(region) = &post.region {
                return Some(Arc::clone(region));
            }
        }
    }
}

/// Work that helpers may join until the caller closes it.
struct Region {
    work: MaybeUninit<&'static (dyn Fn() + Sync)>,
    /// [`CLOSED`] and the number of helpers inside.
    state: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// The caller's end of a region: closes it even when the caller's own share panics.
struct Opened<'a> {
    region: Arc<Region>,
    borrow: PhantomData<&'a ()>,
}

impl Opened<'_> {
    /// Waits for the helpers, and passes on a panic of theirs.
    fn finish(self) {
        self.region.close();
        let panic = lock(&self.region.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.region.close();
    }
}

impl Region {
    fn open<'a>(work: &'a (dyn Fn() + Sync)) -> Opened<'a> {
        type Forever = MaybeUninit<&'static (dyn Fn() + Sync)>;
        // SAFETY: only the lifetime changes. `help` reads the reference only after it has entered, and `Opened`,
        // which is dropped before the borrow ends, then bars the entrance and waits until all have left.
        let work = unsafe { std::mem::transmute::<&'a (dyn Fn() + Sync), Forever>(work) };
        let region = Self {
            work,
            state: AtomicUsize::new(0),
            panic: Mutex::default(),
        };
        Opened {
            region: Arc::new(region),
            borrow: PhantomData,
        }
    }

    /// Works as long as there is some, unless the region is closed.
    fn help(&self) {
        let enter = |state| (state & CLOSED == 0).then_some(state + 1);
        if self
            .state
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, enter)
            .is_err()
        {
            return;
        }
        // SAFETY: `open` wrote it, and the borrow lives until this helper has left, see there.
        let work = unsafe { self.work.assume_init() };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            lock(&self.panic).get_or_insert(panic);
        }
        self.state.fetch_sub(1, Ordering::Release);
    }

    /// Lets nobody in and waits until all are out. Ends because each of them runs tasks of ours only.
    fn close(&self) {
        self.state.fetch_or(CLOSED, Ordering::Relaxed);
        let mut spins = 0;
        while self.state.load(Ordering::Acquire) != CLOSED {
            spins += 1;
            if spins < SPIN_COUNT_MAX {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

//! Checksums over pieces of pages, on threads of its own, so that neither the desk nor the wire waits for it.
//!
//! Landed pages whose transport did not sum them go first: a request waits for them. Offered pages are summed as soon as they are offered, most
//! often before anyone asks; that takes the sender's checksum off the path to the first token.
//! Where every transport sums what it sends, it costs least there, and nothing is summed here beforehand.
//!
//! Which checksum is the sender's choice, and named with it: [`crate::transport::checksum`] of pages in the host's memory, [`crate::page::fold`] of a device's,
//! which the device computes where the page lies, many pieces in one call. Whoever receives it computes the same one,
//! with what it has.

use std::collections::VecDeque;
use std::io;
use std::iter::repeat_n;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex, MutexGuard};
use smallvec::{SmallVec, smallvec};

use super::inbox::{Checked, Happening, Inbox, Mismatch, SumsOf};
use crate::page::Page;
use crate::page::arena::Arena;
use crate::page::device::FoldRow;
use crate::page::fold::Fold;
use crate::transport::checksum::{announce, sum_of};
use crate::transport::{RegionId, Runs, Sources, TransferId};
pub(super) use made::Checksums;

mod made;

/// Pieces that a device sums in one call at most: those of 64 KiB take 70 µs, half of which is the call's.
const DEVICE_PIECES_MAX: usize = 1024;

/// Bytes of those, if there are several: a tenth of a millisecond's work for the device.
const DEVICE_BYTES_MAX: usize = 256 << 20;

/// Bytes of pieces in the host's memory that are summed at once, if there are several: a fifth of a millisecond's work, so
/// that what waits for them need not wait long.
const HOST_BYTES_MAX: usize = 2 << 20;

/// The same of a long sequence, in the end: it doubles with each time, as what has been summed keeps the wire busy for as long.
const HOST_BYTES_GROWN_MAX: usize = 8 << 20;

/// Which function of the bytes a checksum is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    /// [`crate::transport::checksum`].
    Stripes,
    /// [`crate::page::fold`].
    Fold,
    /// None at all, where nobody wants one: for measuring what the others cost.
    Absent,
}

impl Algorithm {
    /// The one that suits a kind of memory best.
    pub(super) const fn in_memory(of_device: bool) -> Self {
        if of_device { Self::Fold } else { Self::Stripes }
    }

    /// Its number in notes. 1 was XXH3-64.
    pub(super) const fn number(self) -> u8 {
        match self {
            Self::Absent => 0,
            Self::Fold => 2,
            Self::Stripes => 3,
        }
    }

    /// The one with this number.
    pub(super) const fn numbered(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Absent),
            2 => Some(Self::Fold),
            3 => Some(Self::Stripes),
            _ => None,
        }
    }
}

/// A checksum with its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Checksum {
    pub(super) algorithm: Algorithm,
    pub(super) value: u64,
}

/// A piece in a page, whose transport did not sum it.
#[derive(Debug)]
pub(super) struct Unsummed {
    /// Index among the fetch's sources.
    pub(super) source: usize,
    /// Index among the source's pieces.
    pub(super) piece: usize,
    pub(super) runs: Runs,
    /// The checksum that it shall have.
    pub(super) expected: Checksum,
}

impl Unsummed {
    /// What is said of it where something else was found.
    const fn but(&self, found: u64) -> Mismatch {
        Mismatch {
            source: self.source,
            piece: self.piece,
            expected: self.expected.value,
            found,
        }
    }
}

/// A page whose pieces have all landed.
#[derive(Debug)]
pub(super) struct Landed {
    pub(super) transfer: TransferId,
    pub(super) region: RegionId,
    /// Index among the fetch's pages.
    pub(super) index: usize,
    pub(super) page: Page,
    pub(super) parts: Vec<Unsummed>,
}

/// The same stretches of each of some pages; at least one.
pub(super) type PageRow = (Sources, Runs);

/// Pieces to be sent; their pages are let go when the job is over or given up.
#[derive(Debug)]
pub(super) struct Summing {
    of: SumsOf,
    parts: VecDeque<PageRow>,
    given_up: Arc<AtomicBool>,
    /// Bytes that are summed next, of the host's memory.
    host_bytes_max: usize,
}

impl Summing {
    pub(super) const fn new(
        of: SumsOf,
        parts: VecDeque<PageRow>,
        given_up: Arc<AtomicBool>,
    ) -> Self {
        Self {
            of,
            parts,
            given_up,
            host_bytes_max: HOST_BYTES_MAX,
        }
    }

    /// The bytes of each piece.
    fn sizes(&self) -> impl Iterator<Item = usize> {
        let rows = self.parts.iter();
        rows.flat_map(|(pages, runs)| repeat_n(runs.total_bytes(), pages.len()))
    }

    /// Takes the first pieces out, so many at most.
    fn take(&mut self, mut count: usize) -> Vec<PageRow> {
        let mut taken = Vec::new();
        while count > 0
            && let Some((pages, runs)) = self.parts.front_mut()
        {
            let some = pages.take_first(count);
            count -= some.len();
            taken.push((some, runs.clone()));
            self.parts.pop_front_if(|(pages, _)| pages.is_empty());
        }
        taken
    }
}

/// What is to be summed: the same bytes of each of some pages, in the order of the stretches.
struct Row<'a> {
    pages: SmallVec<[&'a Page; 1]>,
    /// The arena that they lie in, and where each begins there, if they do.
    place: Option<(&'a Arena, SmallVec<[u64; 1]>)>,
    algorithm: Algorithm,
    stretches: Vec<Range<usize>>,
}

impl<'a> Row<'a> {
    /// What pieces are read from.
    fn sources((pages, runs): &'a PageRow) -> Self {
        let place = pages.place();
        Self {
            place: place.map(|(arena, offsets)| (&**arena, SmallVec::from_slice(offsets))),
            algorithm: Algorithm::in_memory(pages.is_on_device()),
            pages: pages.iter().map(|page| &**page).collect(),
            stretches: runs.stretches().map(|(source, _)| source).collect(),
        }
    }

    /// What a piece was written to.
    fn target(page: &'a Page, runs: &Runs, algorithm: Algorithm) -> Self {
        let place = page.arena();
        Self {
            pages: smallvec![page],
            place: place.map(|(arena, offset)| (&**arena, smallvec![offset as u64])),
            algorithm,
            stretches: runs.stretches().map(|(_, target)| target).collect(),
        }
    }

    /// What this device sums where it lies, if all of it lies there.
    fn on(&self, device: &Arena) -> Option<FoldRow<'_>> {
        let (arena, at) = self.place.as_ref()?;
        let is_its_own = self.algorithm == Algorithm::Fold && arena.id() == device.id();
        is_its_own.then(|| FoldRow {
            at,
            stretches: &self.stretches,
        })
    }

    /// Has a page's beginning fetched while another one is summed.
    fn announce(&self, page: &Page) {
        if !page.is_on_device()
            && let Some(first) = self.stretches.first()
        {
            let bytes = &page.as_bytes()[first.clone()];
            announce(bytes.as_ptr(), bytes.len());
        }
    }

    /// The sum of one of its pages, by this thread.
    fn sum(&self, page: &Page) -> io::Result<u64> {
        let bytes = page.to_host()?;
        Ok(match self.algorithm {
            Algorithm::Stripes => sum_of(&bytes, self.stretches.iter().cloned()),
            Algorithm::Fold => {
                let stretches = self.stretches.iter().map(|range| &bytes[range.clone()]);
                let mut fold = Fold::default();
                stretches.for_each(|stretch| fold.update(stretch));
                fold.digest()
            }
            Algorithm::Absent => 0,
        })
    }
}

/// The sum of each page of some rows, in order. Those of one device's memory are made by it, together.
fn sums(rows: &[Row<'_>]) -> io::Result<Vec<u64>> {
    let arena = rows.first().and_then(|row| row.place.as_ref());
    if let Some((arena, device)) = arena.and_then(|(arena, _)| Some((arena, arena.device()?))) {
        let on_device: Option<Vec<_>> = rows.iter().map(|row| row.on(arena)).collect();
        if let Some(on_device) = on_device {
            return device.fold(&on_device);
        }
    }
    let pieces = rows
        .iter()
        .flat_map(|row| row.pages.iter().map(move |page| (row, *page)));
    let mut pieces = pieces.peekable();
    let mut sums = Vec::new();
    while let Some((row, page)) = pieces.next() {
        if let Some((next, page)) = pieces.peek() {
            next.announce(page);
        }
        sums.push(row.sum(page)?);
    }
    Ok(sums)
}

impl Landed {
    fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        let parts = self.parts.iter();
        parts.map(|part| Row::target(&self.page, &part.runs, part.expected.algorithm))
    }

    /// The first piece that is not what was sent, by its sums.
    fn mismatch(&self, found: &[u64]) -> Option<Mismatch> {
        let parts = self.parts.iter().zip(found);
        parts
            .map(|(part, found)| part.but(*found))
            .find(|part| part.found != part.expected)
    }
}

/// Checks pages together. What a device cannot read back is as good as damaged.
fn check(batch: Vec<Landed>, inbox: &Inbox) {
    let rows: Vec<_> = batch.iter().flat_map(Landed::rows).collect();
    let found = sums(&rows).unwrap_or_else(|error| {
        tracing::error!(%error, "kv on a device cannot be summed");
        Vec::new()
    });
    drop(rows);
    let mut rest = &found[..];
    let mut checked = Vec::with_capacity(batch.len());
    for landed in batch {
        let (own, later) = rest.split_at(landed.parts.len().min(rest.len()));
        rest = later;
        let mismatch = if own.len() == landed.parts.len() {
            landed.mismatch(own)
        } else {
            let first = landed.parts.first();
            first.map(|part| part.but(!part.expected.value))
        };
        checked.push(Checked {
            transfer: landed.transfer,
            region: landed.region,
            index: landed.index,
            page: landed.page,
            mismatch,
        });
    }
    inbox.happened(Happening::Checked(checked));
}

#[derive(Debug, Default)]
struct Jobs {
    landed: VecDeque<Landed>,
    offered: VecDeque<Summing>,
    stopped: bool,
    /// Threads that sleep. The others look again by themselves, so nobody need be woken for them.
    idle: usize,
}

#[derive(Debug)]
struct Queue {
    /// Whether anything is summed; else everything is said to be.
    sums: bool,
    jobs: Mutex<Jobs>,
    wake: Condvar,
}

/// The threads. Queues are bounded by the pages that leases and fetches may hold.
#[derive(Debug)]
pub(super) struct ChecksumThreads {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

impl ChecksumThreads {
    /// Starts `count` threads that report to the inbox. Without `sums` what is to be sent gets absent ones.
    pub(super) fn start(count: usize, sums: bool, inbox: &Arc<Inbox>) -> io::Result<Self> {
        let queue = Arc::new(Queue {
            sums,
            jobs: Mutex::default(),
            wake: Condvar::new(),
        });
        let mut started = Self {
            queue,
            threads: Vec::new(),
        };
        for index in 0..count.max(1) {
            let queue = Arc::clone(&started.queue);
            let inbox = Arc::clone(inbox);
            let thread = std::thread::Builder::new()
                .name(format!("kv-checksum-{index}"))
                .spawn(move || queue.work(&inbox))?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    pub(super) fn check(&self, landed: Landed) {
        let mut jobs = self.queue.lock();
        jobs.landed.push_back(landed);
        let idle = jobs.idle;
        drop(jobs);
        if idle > 0 {
            self.queue.wake.notify_one();
        }
    }

    pub(super) fn sum(&self, offered: Summing) {
        self.queue.lock().offered.push_back(offered);
        self.queue.wake.notify_one();
    }
}

impl Drop for ChecksumThreads {
    fn drop(&mut self) {
        self.queue.lock().stopped = true;
        self.queue.wake.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a kv checksum thread panicked");
            }
        }
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock()
    }

    fn work(&self, inbox: &Inbox) {
        loop {
            let mut jobs = self.lock();
            jobs.idle += 1;
            self.wake.wait_while(&mut jobs, |jobs| {
                !jobs.stopped && jobs.landed.is_empty() && jobs.offered.is_empty()
            });
            jobs.idle -= 1;
            if jobs.stopped {
                return;
            }
            if let Some(landed) = jobs.landed.pop_front() {
                let batch = jobs.with_neighbours(landed);
                drop(jobs);
                check(batch, inbox);
            } else if let Some(offered) = jobs.offered.pop_front() {
                drop(jobs);
                self.sum_some(offered, inbox);
            }
        }
    }

    /// Sums some pieces, and puts the job back in front, so that a long sequence holds up no landed page.
    fn sum_some(&self, mut offered: Summing, inbox: &Inbox) {
        let of = offered.of;
        let given_up = offered.given_up.load(Ordering::Acquire);
        let count = match offered.parts.front() {
            Some((pages, _)) if pages.is_on_device() => {
                fitting(offered.sizes().take(DEVICE_PIECES_MAX), DEVICE_BYTES_MAX)
            }
            Some(_) => fitting(offered.sizes(), offered.host_bytes_max),
            None => 0,
        };
        offered.host_bytes_max = (2 * offered.host_bytes_max).min(HOST_BYTES_GROWN_MAX);
        if count == 0 || given_up {
            drop(offered);
            inbox.happened(Happening::HashingEnded { of });
            return;
        }
        if !self.sums {
            let count = offered.sizes().count();
            let checksums = Checksums::of_rows([(Algorithm::Absent, count)], vec![0; count]);
            drop(offered);
            inbox.happened(Happening::Hashed { of, checksums });
            inbox.happened(Happening::HashingEnded { of });
            return;
        }
        let some = offered.take(count);
        let rows: Vec<_> = some.iter().map(Row::sources).collect();
        let made = sums(&rows).map(|made| {
            let algorithms = rows.iter().map(|row| (row.algorithm, row.pages.len()));
            Checksums::of_rows(algorithms, made)
        });
        drop(rows);
        drop(some);
        match made {
            Ok(checksums) => {
                inbox.happened(Happening::Hashed { of, checksums });
                self.lock().offered.push_front(offered);
                self.wake.notify_one();
            }
            Err(error) => {
                // Nobody gets the lease's KV; it ends as one that nobody asked for.
                tracing::error!(%error, "kv on a device cannot be summed");
                drop(offered);
                inbox.happened(Happening::HashingEnded { of });
            }
        }
    }
}

/// How many of these sizes fit into so many bytes; one if there is one.
fn fitting(sizes: impl Iterator<Item = usize>, bytes_max: usize) -> usize {
    let mut total = 0_usize;
    let fitting = sizes.enumerate().take_while(|(index, bytes)| {
        total = total.saturating_add(*bytes);
        *index == 0 || total <= bytes_max
    });
    fitting.count()
}

impl Jobs {
    /// A landed page with those that are summed in the same call.
    fn with_neighbours(&mut self, first: Landed) -> Vec<Landed> {
        let arena = |landed: &Landed| {
            let (arena, _) = landed.page.arena()?;
            landed.page.is_on_device().then(|| arena.id())
        };
        let Some(of) = arena(&first) else {
            let sizes = std::iter::once(&first).chain(&self.landed);
            let sizes = sizes.map_while(|landed| match arena(landed) {
                None => Some(landed.page.shape().bytes()),
                Some(_) => None,
            });
            let more = fitting(sizes, HOST_BYTES_MAX) - 1;
            return std::iter::once(first)
                .chain(self.landed.drain(..more))
                .collect();
        };
        let mut pieces = first.parts.len();
        let mut bytes = first.page.shape().bytes();
        let mut batch = vec![first];
        while pieces < DEVICE_PIECES_MAX
            && bytes < DEVICE_BYTES_MAX
            && let Some(next) = self.landed.pop_front_if(|next| arena(next) == Some(of))
        {
            pieces += next.parts.len();
            bytes += next.page.shape().bytes();
            batch.push(next);
        }
        batch
    }
}

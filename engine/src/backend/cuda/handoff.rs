//! The hand-off's side of a GPU: arenas of its memory, and reading those of other processes of this host.
//!
//! *Streams.* The model's stream never waits for a hand-off, and no hand-off for the model but for one point: when a page is lent,
//! or shared before its own step has been waited for, an event is recorded on the model's stream, and every copy or sum of that
//! arena begins behind the last such event. What is copied into a page is done before the page comes back, as its mover waits for its own stream. So the model's
//! stream needs no event of theirs.
//!
//! Invariant: memory is only touched by whoever holds its page; this file checks ranges, not holders.

use std::any::Any;
use std::collections::btree_map::{BTreeMap, Entry};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::driver::{DeviceMemory, Gpu};
use super::error::CudaError;
use super::event::Event;
use super::peer::{
    Ground, HANDLE_BYTES, Held, Imported, Reach, Sums, copy_between, handle_of, let_reach, settle,
};
use crate::page::arena::Arena;
use crate::page::device::{Course, DeviceArena, Exchange, FoldRow};
use crate::page::fold::{Fold, finish};
use crate::page::{Page, PageShape};
use crate::transport::Runs;

/// Allocations are whole units of what the driver maps, so that a peer that maps one sees nothing else.
const UNIT_BYTES: usize = 2 << 20;

/// Multiprocessors that a read from a peer is given, of all: one of so many. A third of an H100's reads a gigabyte of another's at 374 GB/s,
/// as all of them do, and a half at 366. See `handoff.cu`.
const READ_SHARE: usize = 3;

impl From<CudaError> for io::Error {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::OutOfMemory { .. } => Self::new(io::ErrorKind::OutOfMemory, error),
            other => Self::other(other),
        }
    }
}

/// Memory of a GPU that pages lie in.
#[derive(Debug)]
pub(crate) struct CudaArena {
    memory: DeviceMemory,
    bytes: usize,
    ordinal: usize,
    /// Of the stream that the model runs on.
    shown: Event,
    /// For copies from and to the host, and for sums.
    reach: Mutex<Reach>,
    copies: Arc<Gpu>,
}

impl CudaArena {
    /// Zeroed memory on a device; `gpu` has the stream that writes it.
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Box<Self>, CudaError> {
        let memory = DeviceMemory::new(gpu, bytes.max(1).next_multiple_of(UNIT_BYTES))?;
        gpu.zero(&memory, memory.bytes())?;
        let shown = Event::new(gpu)?;
        shown.record()?;
        let reach = Reach::open(gpu.ordinal())?;
        Ok(Box::new(Self {
            copies: Arc::clone(reach.gpu()),
            reach: Mutex::new(reach),
            ordinal: gpu.ordinal(),
            memory,
            bytes,
            shown,
        }))
    }

    /// Whatever is put on the model's stream after this, no copy or sum waits for; until it is called again.
    pub(super) fn show(&self) -> Result<(), CudaError> {
        self.shown.record()
    }

    pub(super) const fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// What lets another process read it.
    pub(crate) fn handle(&self) -> Result<[u8; HANDLE_BYTES], CudaError> {
        handle_of(&self.copies, &self.memory)
    }
}

impl DeviceArena for CudaArena {
    fn address(&self) -> u64 {
        self.memory.address()
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn read(&self, at: usize, to: &mut [u8]) -> io::Result<()> {
        self.shown.hold_back(&self.copies)?;
        Ok(self.copies.download(&self.memory, at, to)?)
    }

    fn write(&self, at: usize, from: &[u8]) -> io::Result<()> {
        self.shown.hold_back(&self.copies)?;
        self.copies.upload(&self.memory, at, from)?;
        Ok(self.copies.synchronize()?)
    }

    fn fold(&self, rows: &[FoldRow<'_>]) -> io::Result<Vec<u64>> {
        let mut sums = Sums::default();
        let ground = Ground::from(&self.memory);
        if !rows.iter().all(|row| sums.add(ground, row)) {
            return fold_on_host(self, rows);
        }
        let mut reach = self.reach.lock().unwrap_or_else(PoisonError::into_inner);
        self.shown.hold_back(reach.gpu())?;
        let mut sums = reach.fold(&sums)?;
        let mut rest = &mut sums[..];
        for row in rows {
            let (own, later) = rest.split_at_mut(row.at.len());
            let bytes = row.piece_bytes() as u64;
            own.iter_mut().for_each(|sum| *sum = finish(*sum, bytes));
            rest = later;
        }
        Ok(sums)
    }

    fn exchange(&self, course: Course, exchanges: &[Exchange<'_>]) -> io::Result<Vec<Option<u64>>> {
        let mut reach = self.reach.lock().unwrap_or_else(PoisonError::into_inner);
        self.shown.hold_back(reach.gpu())?;
        let mut copies = reach.copies();
        // That of the piece before is mostly this one's too.
        let mut last: Option<(&dyn DeviceArena, &Self)> = None;
        for exchange in exchanges {
            let other = match last {
                Some((before, other)) if std::ptr::addr_eq(before, exchange.other) => other,
                _ => {
                    let other = (exchange.other as &dyn Any).downcast_ref::<Self>();
                    let other = other
                        .filter(|other| other.ordinal == self.ordinal)
                        .ok_or_else(|| io::Error::other("memory of another device"))?;
                    other.shown.hold_back(reach.gpu())?;
                    last = Some((exchange.other, other));
                    other
                }
            };
            let (here, there) = (Ground::from(&self.memory), Ground::from(&other.memory));
            copies.begin_piece();
            for span in &exchange.spans {
                let (here, there) = ((here, span.here), (there, span.there));
                match course {
                    Course::Gather => copies.add(there, here, span.bytes),
                    Course::Scatter => copies.add(here, there, span.bytes),
                }
            }
        }
        let blocks = reach.gpu().processors;
        reach.begin(copies, (blocks, course == Course::Scatter), None)?;
        let mut found = Vec::new();
        reach.finish(&mut found)?;
        Ok(found)
    }

    fn ordinal(&self) -> usize {
        self.ordinal
    }

    fn enter(&self) -> io::Result<()> {
        Ok(self.copies.bind()?)
    }

    fn settle(&self) -> io::Result<()> {
        Ok(settle(&self.copies)?)
    }

    fn another(&self, bytes: usize) -> io::Result<Box<dyn DeviceArena>> {
        Ok(Self::new(&Gpu::open_at(self.ordinal)?, bytes)?)
    }
}

/// The same of bytes that lie as no kernel takes them.
fn fold_on_host(arena: &CudaArena, rows: &[FoldRow<'_>]) -> io::Result<Vec<u64>> {
    let sum = |row: &FoldRow<'_>, at: usize| {
        let mut fold = Fold::default();
        for range in row.stretches {
            let mut bytes = vec![0; range.len()];
            arena.read(at + range.start, &mut bytes)?;
            fold.update(&bytes);
        }
        Ok(fold.digest())
    };
    let pieces = rows
        .iter()
        .flat_map(|row| row.places().map(move |at| (row, at)));
    pieces.map(|(row, at)| sum(row, at)).collect()
}

/// An arena as one of a GPU's, if it is.
pub(crate) fn cuda_arena(arena: &Arena) -> Option<&CudaArena> {
    let device: &dyn Any = arena.device()?;
    device.downcast_ref()
}

/// Zeroed pages in the memory of a device, by its number among those that this process sees.
///
/// # Errors
/// When there is no such device, or too little memory.
pub fn device_pages(ordinal: usize, shape: PageShape, count: usize) -> io::Result<Vec<Page>> {
    let bytes = Page::arena_bytes(shape, count)?;
    let gpu = Gpu::open_at(ordinal)?;
    Page::pool_on(CudaArena::new(&gpu, bytes)?, shape, count)
}

/// Keeps a device's context as long as this process lives: libraries that use it never let it go.
pub(crate) fn keep_device(ordinal: usize) -> Result<(), CudaError> {
    static KEPT: Mutex<BTreeMap<usize, Arc<Gpu>>> = Mutex::new(BTreeMap::new());
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Entry::Vacant(place) = kept.entry(ordinal) {
        place.insert(Gpu::open_at(ordinal)?);
    }
    Ok(())
}

/// How many devices this process sees.
///
/// # Errors
/// When there is no driver.
pub fn device_count() -> Result<usize, CudaError> {
    Gpu::count()
}

/// Times of so many copies, by the driver, from the first device's memory to the last one's: what a hand-off between them is to be
/// compared with.
///
/// # Errors
/// When there is no device, or too little memory.
pub fn peer_copies(bytes: usize, rounds: usize) -> Result<Vec<Duration>, CudaError> {
    let hold = |ordinal| {
        let gpu = Gpu::open_at(ordinal)?;
        let memory = DeviceMemory::new(&gpu, bytes)?;
        gpu.zero(&memory, memory.bytes())?;
        gpu.synchronize()?;
        Ok(Held { gpu, memory })
    };
    let (source, target) = (hold(0)?, hold(device_count()? - 1)?);
    if source.gpu.ordinal() != target.gpu.ordinal() {
        let_reach(&source.gpu, &target.gpu)?;
    }
    let copy = || {
        let began = Instant::now();
        copy_between(&source, &target)?;
        source.gpu.synchronize()?;
        Ok(began.elapsed())
    };
    copy()?;
    (0..rounds).map(|_| copy()).collect()
}

/// Memory that is read from.
#[derive(Debug)]
enum Lender {
    /// Of another process.
    Peer(Imported),
    /// Of this one.
    Own(Arc<Arena>),
}

impl Lender {
    fn ground(&self) -> Option<Ground<'_>> {
        Some(match self {
            Self::Peer(imported) => Ground::from(imported),
            Self::Own(arena) => Ground::from(&cuda_arena(arena)?.memory),
        })
    }
}

/// A stretch of runs, and the page that it goes to.
#[derive(Debug)]
pub(crate) struct Move<'a> {
    /// What [`Mover::import`] gave.
    pub(crate) from: usize,
    /// Where in that arena its source begins.
    pub(crate) offset: usize,
    /// Source offsets count from there.
    pub(crate) runs: &'a Runs,
    /// On this mover's device.
    pub(crate) page: &'a mut Page,
}

/// Reads of one [`Mover`] that may be under way.
pub(crate) const READS_AT_ONCE: usize = 2;

/// Reads memory of one peer into pages of this process, over whatever joins the two GPUs.
///
/// Two reads may be under way, each on a stream of its own: the list and the sums of one travel while the other copies. They copy one
/// after the other, though; at once they would end at once, and the link would wait for the next two.
#[derive(Debug)]
pub(crate) struct Mover {
    ordinal: usize,
    reaches: [Reach; READS_AT_ONCE],
    /// The one that comes next, and how many are in use.
    next: usize,
    begun: usize,
    blocks: usize,
    lenders: Vec<Lender>,
}

impl Mover {
    /// One with streams of its own.
    pub(crate) fn open(ordinal: usize) -> Result<Self, CudaError> {
        let reaches = [Reach::open(ordinal)?, Reach::open(ordinal)?];
        Ok(Self {
            ordinal,
            blocks: (reaches[0].gpu().processors / READ_SHARE).max(1),
            reaches,
            next: 0,
            begun: 0,
            lenders: Vec::new(),
        })
    }

    /// Maps a peer's arena. Returns its number here, and how long it is.
    pub(crate) fn import(
        &mut self,
        handle: [u8; HANDLE_BYTES],
    ) -> Result<(usize, usize), CudaError> {
        let imported = Imported::open(self.reaches[0].gpu(), handle)?;
        let bytes = imported.bytes();
        self.lenders.push(Lender::Peer(imported));
        Ok((self.lenders.len() - 1, bytes))
    }

    /// Takes an arena of this process, which needs no mapping.
    pub(crate) fn import_own(&mut self, arena: Arc<Arena>) -> (usize, usize) {
        let bytes = arena.bytes();
        self.lenders.push(Lender::Own(arena));
        (self.lenders.len() - 1, bytes)
    }

    /// Waits for the first of the reads that were begun; nothing writes its pages any more when it returns. Adds to `found` the
    /// checksum of each move, where it was summed; nothing of any where none were to be.
    ///
    /// # Errors
    /// When the device fails.
    pub(crate) fn finish(&mut self, found: &mut Vec<Option<u64>>) -> Result<(), CudaError> {
        let Some(left) = self.begun.checked_sub(1) else {
            return Ok(());
        };
        let count = self.reaches.len();
        let first = (self.next + count - self.begun) % count;
        self.begun = left;
        self.reaches[first].finish(found)
    }

    /// Begins to read all of it, and to sum it where that is `summed`; two reads may be under way.
    ///
    /// # Errors
    /// When a page is not on this device, an arena is none, or the device fails; then nothing of it is under way.
    pub(crate) fn begin<'a>(
        &mut self,
        moves: impl Iterator<Item = Move<'a>>,
        summed: bool,
    ) -> Result<(), CudaError> {
        assert!(
            self.begun < self.reaches.len(),
            "reads are finished before a third begins"
        );
        let [first, second] = &mut self.reaches;
        let (reach, other) = match self.next {
            0 => (first, second),
            _ => (second, first),
        };
        let mut copies = reach.copies();
        // Those of the piece before are mostly this one's too.
        let mut last_source: Option<(usize, Ground<'_>)> = None;
        let mut last_target: Option<(&'a Arc<Arena>, &'a CudaArena)> = None;
        for piece in moves {
            let elsewhere = || CudaError::NotServed("a page that is not on this device".to_owned());
            let page: &'a Page = piece.page;
            let (arena, offset) = page.arena().ok_or_else(elsewhere)?;
            let target = match last_target {
                Some((before, target)) if Arc::ptr_eq(before, arena) => target,
                _ => {
                    let target = cuda_arena(arena)
                        .filter(|arena| arena.ordinal == self.ordinal)
                        .ok_or_else(elsewhere)?;
                    target.shown.hold_back(reach.gpu())?;
                    last_target = Some((arena, target));
                    target
                }
            };
            let source = match last_source {
                Some((before, source)) if before == piece.from => source,
                _ => {
                    let lender = self.lenders.get(piece.from);
                    let unknown = || CudaError::NotServed(format!("arena {}", piece.from));
                    let source = lender.and_then(Lender::ground).ok_or_else(unknown)?;
                    last_source = Some((piece.from, source));
                    source
                }
            };
            let target = Ground::from(&target.memory);
            copies.begin_piece();
            for (from, to) in piece.runs.stretches() {
                let from = piece.offset.saturating_add(from.start);
                copies.add((source, from), (target, offset + to.start), to.len());
            }
        }
        reach.begin(copies, (self.blocks, summed), Some(other))?;
        self.begun += 1;
        self.next = (self.next + 1) % self.reaches.len();
        Ok(())
    }
}

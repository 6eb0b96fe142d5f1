//! The writer's side of a pulled write: how the peer may get at the bytes, and what has to stay put meanwhile.
//!
//! A source in an arena is read where it lies. Stretches that are too short for the fabric, and pages of private memory,
//! are gathered into staging memory first; so are pages of a device, where the fabric does not take its memory. Where fabric and
//! peer have windows of a device's memory, pages of a device are gathered into those, as many by one kernel as fit. What fits
//! no way goes through the stream: slower, never wrong.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::connection::{Connection, Kept};
use super::frame::{Descriptor, Offsets};
use crate::page::Page;
use crate::page::arena::Arena;
use crate::page::device::{Course, Exchange, Span};
use crate::transport::fabric::{ArenaKey, Fabric};
use crate::transport::numbered::NumberedMap;
use crate::transport::staging::{Slot, Staging, StagingSize, plain_shape};
use crate::transport::windowed::PIECE_ALIGN_BYTES;
use crate::transport::{MemoryKind, Write};

/// An arena that peers can read.
#[derive(Debug, Clone)]
pub(super) struct Exported {
    pub(super) number: u64,
    pub(super) key: Arc<ArenaKey>,
}

/// A write as the peer will pull it.
#[derive(Debug)]
pub(super) struct Lent {
    pub(super) arena: Exported,
    pub(super) descriptor: Descriptor,
    /// None where the peer reads the write's own sources.
    pub(super) kept: Option<Kept>,
}

/// How a write travels.
#[derive(Debug)]
pub(super) enum Way {
    /// Its bytes follow in the stream.
    Stream,
    /// The peer reads them.
    Pull(Lent),
    /// Not yet: staging memory is needed and none is free. The connection is woken when that changes.
    Later,
    /// Not at all: the device failed that the source lies on.
    Failed(io::Error),
}

/// How the first of some writes travel.
#[derive(Debug)]
pub(super) enum Together {
    /// Each by itself.
    Apart,
    /// The peer reads them: one or more, in order.
    Pull(Vec<Lent>),
    /// Not yet: as [`Way::Later`].
    Later,
    /// The first not at all: as [`Way::Failed`].
    Failed(io::Error),
}

/// See the module. One per transport.
#[derive(Debug)]
pub(super) struct Lender {
    fabric: Arc<dyn Fabric>,
    staging: Arc<Staging>,
    sequence: AtomicU64,
    /// By arena; nothing where the fabric refused it.
    exported: Mutex<NumberedMap<u64, Option<Arc<ArenaKey>>>>,
}

impl Lender {
    pub(super) fn new(fabric: Arc<dyn Fabric>, size: StagingSize) -> Self {
        let allocator = fabric.allocator();
        Self {
            fabric,
            staging: Staging::new(size, allocator),
            sequence: AtomicU64::new(1),
            exported: Mutex::default(),
        }
    }

    /// How much of a window a peer with this address reads at once; none when it reads no windows.
    pub(super) fn window_of(&self, address: &[u8]) -> Option<usize> {
        self.fabric.window_of(address)
    }

    /// Decides, and gathers where that is needed.
    pub(super) fn way(&self, write: &Write, connection: &Arc<Connection>) -> Way {
        let bytes = write.total_bytes();
        if bytes == 0 {
            return Way::Stream;
        }
        // What was too long for a window of a device goes as if the fabric did not take its memory.
        let where_it_lies = !(write.is_on_device() && self.fabric.windows().is_some());
        let place = write.sources.place().filter(|_| where_it_lies);
        let in_place = place.and_then(|(arena, offsets)| {
            Some(self.lent(self.export(arena)?, offsets.into(), None))
        });
        let coarse = write.runs.is_coarse(self.fabric.terms().stretch_bytes_min);
        match in_place {
            Some(lent) if coarse => Way::Pull(lent),
            _ if self.staging.fits(bytes) => match self.gathered(write, connection) {
                Way::Stream => in_place.map_or(Way::Stream, Way::Pull),
                way => way,
            },
            Some(lent) => Way::Pull(lent),
            None => Way::Stream,
        }
    }

    /// Through staging memory; `Stream` when the fabric does not take that.
    fn gathered(&self, write: &Write, connection: &Arc<Connection>) -> Way {
        connection.wait_for_slot();
        let held = (connection.slots_held(), self.staging.share_of_one());
        let Some(mut slot) = slot_of(&self.staging, held, connection) else {
            return Way::Later;
        };
        if let Err(error) = gather(write, slot.page_mut()) {
            return Way::Failed(error);
        }
        let placed = slot.page().arena().and_then(|(arena, offset)| {
            let exported = self.export(arena)?;
            Some((exported, offset))
        });
        match placed {
            Some((arena, offset)) => {
                let offsets = row(write, offset, write.runs.total_bytes());
                Way::Pull(self.lent(arena, offsets, Some(Kept::Slot(slot))))
            }
            None => Way::Stream,
        }
    }

    /// Gathers as many of these writes, from the first on, into a window of their device's memory as it takes.
    pub(super) fn gathered_together(
        &self,
        writes: &[Write],
        connection: &Arc<Connection>,
    ) -> Together {
        let windows = self.fabric.windows().zip(connection.window_bytes());
        let Some((windows, peers_bytes)) = windows else {
            return Together::Apart;
        };
        let places = places(writes, windows.slot_bytes().min(peers_bytes));
        if places.is_empty() {
            return Together::Apart;
        }
        // One is gathered into while the others are read.
        connection.wait_for_slot();
        let held = (connection.windows_held(), windows.slots().saturating_sub(1));
        let Some(slot) = slot_of(windows, held, connection) else {
            return Together::Later;
        };
        let window = slot.page().arena();
        let exported = window.and_then(|(arena, base)| Some((self.export(arena)?, arena, base)));
        let Some((exported, arena, base)) = exported else {
            return Together::Apart;
        };
        if let Err(error) = gather_into_window(writes, &places, (arena, base)) {
            return Together::Failed(error);
        }
        let slot = Arc::new(slot);
        let lent = writes.iter().zip(&places).map(|(write, at)| {
            let kept = Kept::Window(Arc::clone(&slot));
            let offsets = row(write, base + at, stride_of(write));
            self.lent(exported.clone(), offsets, Some(kept))
        });
        Together::Pull(lent.collect())
    }

    /// A copy with one wrong byte, for a test's fault plan: the peer really reads what is wrong.
    pub(super) fn spoilt(
        &self,
        write: &Write,
        at: usize,
        connection: &Connection,
    ) -> io::Result<Lent> {
        let bytes = write.total_bytes();
        let source = write.sources.place().map(|(arena, _)| arena);
        // Of the kind that the peer reads.
        let lies_as_read = !write.is_on_device()
            || self.fabric.windows().is_none()
            || connection.window_bytes().is_some();
        let source = source.filter(|arena| lies_as_read && self.takes(arena));
        let mut page = self.blank(source, bytes)?;
        gather(write, &mut page)?;
        let mut spoilt = [0];
        page.read(at, &mut spoilt)?;
        page.write(at, &[!spoilt[0]])?;
        let placed = page.arena().and_then(|(arena, offset)| {
            let exported = self.export(arena)?;
            Some((exported, offset))
        });
        let (arena, offset) = placed.ok_or(io::ErrorKind::Unsupported)?;
        let offsets = row(write, offset, write.runs.total_bytes());
        Ok(self.lent(arena, offsets, Some(Kept::Spoilt(page))))
    }

    /// A page for so many bytes in an arena of its own, of the same kind of memory as this one, or of what the fabric reads best:
    /// another transport's library may be where this process has its memory from.
    fn blank(&self, like: Option<&Arc<Arena>>, bytes: usize) -> io::Result<Page> {
        let shape = plain_shape(bytes);
        let mut pages = match like.and_then(|arena| arena.device()) {
            Some(device) => Page::pool_on(device.another(Page::arena_bytes(shape, 1)?)?, shape, 1)?,
            None => Page::pool_of(self.fabric.allocator(), shape, 1)?,
        };
        pages.pop().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// Whether the fabric takes memory of this kind.
    fn takes(&self, arena: &Arena) -> bool {
        let kind = match arena.device() {
            Some(_) => MemoryKind::Device,
            None => MemoryKind::Host,
        };
        self.fabric.capability().memory.contains(&kind)
    }

    /// Of the sources themselves where no copy is kept.
    fn lent(&self, arena: Exported, offsets: Offsets, kept: Option<Kept>) -> Lent {
        let descriptor = Descriptor {
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed),
            arena: arena.number,
            offsets,
            gathered: kept.is_some(),
        };
        Lent {
            arena,
            descriptor,
            kept,
        }
    }

    fn export(&self, arena: &Arc<Arena>) -> Option<Exported> {
        if !self.takes(arena) {
            return None;
        }
        let number = arena.id();
        let mut exported = self.exported.lock().unwrap_or_else(|e| e.into_inner());
        let key = exported.entry(number).or_insert_with(|| {
            let key = self.fabric.export(arena);
            key.map(Arc::new)
                .inspect_err(|error| {
                    tracing::warn!(%error, bytes = arena.bytes(), "kv memory goes through the stream");
                })
                .ok()
        });
        let key = Arc::clone(key.as_ref()?);
        Some(Exported { number, key })
    }
}

/// A slot, if one is free and the peer does not hold its `share`; else the connection is woken when that may have changed. It
/// waited for that from before its slots were counted.
fn slot_of(
    staging: &Arc<Staging>,
    (held, share): (usize, usize),
    connection: &Arc<Connection>,
) -> Option<Slot> {
    if held >= share {
        // The peer's next acknowledgement goes on with it.
        return None;
    }
    let waiting = Arc::downgrade(connection);
    let wake = move || {
        if let Some(connection) = waiting.upgrade() {
            connection.slot_may_be_free();
        }
    };
    let slot = staging.take_or_wake(wake)?;
    connection.slot_may_be_free();
    Some(slot)
}

/// So many bytes apart from each other.
fn row(write: &Write, first: usize, stride: usize) -> Offsets {
    let count = write.sources.len();
    (0..count)
        .map(|index| (first + index * stride) as u64)
        .collect()
}

/// From one piece of a write to the next, in a window.
fn stride_of(write: &Write) -> usize {
    write.runs.total_bytes().next_multiple_of(PIECE_ALIGN_BYTES)
}

/// Where in a window of so many bytes the first of these writes go: as many as fit, and are of a device's memory.
fn places(writes: &[Write], window_bytes: usize) -> Vec<usize> {
    let mut end = 0_usize;
    let places = writes.iter().map_while(|write| {
        let at = end.next_multiple_of(PIECE_ALIGN_BYTES);
        let bytes = stride_of(write).checked_mul(write.sources.len())?;
        end = at.checked_add(bytes)?;
        let fits = bytes > 0 && end <= window_bytes && write.is_on_device();
        fits.then_some(at)
    });
    places.collect()
}

/// Copies the stretches of writes into a window, each write's to its place, by their device.
fn gather_into_window(
    writes: &[Write],
    places: &[usize],
    (window, base): (&Arc<Arena>, usize),
) -> io::Result<()> {
    let none = || io::Error::other("a page that is on no device");
    let pieces = writes.iter().zip(places).flat_map(|(write, at)| {
        let places = (base + at..).step_by(stride_of(write));
        let sources = write.sources.places().zip(places);
        sources.map(|(source, at)| (&write.runs, source, at))
    });
    let exchanges = pieces.map(|(runs, source, at)| {
        let (arena, offset) = source.ok_or_else(none)?;
        let stretches = runs.stretches().map(|(source, _)| source);
        Ok(Exchange {
            spans: Span::packed(at, offset, stretches),
            other: arena.device().ok_or_else(none)?,
        })
    });
    let exchanges: Vec<_> = exchanges.collect::<io::Result<_>>()?;
    let window = window.device().ok_or_else(none)?;
    window.exchange(Course::Gather, &exchanges).map(drop)
}

/// Copies the stretches of a write one after the other.
fn gather(write: &Write, page: &mut Page) -> io::Result<()> {
    if page.is_on_device() {
        let mut bytes = vec![0; write.total_bytes()];
        gather_into(write, &mut bytes)?;
        return page.write(0, &bytes);
    }
    gather_into(write, page.as_bytes_mut())
}

/// The same, into memory of the host's that is as long at least.
pub(super) fn gather_into(write: &Write, mut rest: &mut [u8]) -> io::Result<()> {
    for (source, range) in write.stretches() {
        let (now, later) = rest.split_at_mut(range.len());
        source.read(range.start, now)?;
        rest = later;
    }
    Ok(())
}

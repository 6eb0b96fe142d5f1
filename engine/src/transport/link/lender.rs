//! The writer's side of a pulled write: how the peer may get at the bytes, and what has to stay put meanwhile.
//!
//! A source in an arena is read where it lies. Stretches that are too short for the fabric, and pages of private memory,
//! are gathered into staging memory first; so are pages of a device, where the fabric does not take its memory. What fits
//! neither way goes through the stream: slower, never wrong.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::connection::{Connection, Kept};
use super::frame::Descriptor;
use crate::page::Page;
use crate::page::arena::Arena;
use crate::transport::fabric::{ArenaKey, Fabric};
use crate::transport::numbered::NumberedMap;
use crate::transport::staging::{Staging, StagingSize, plain_shape};
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
    pub(super) kept: Kept,
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

    /// Decides, and gathers where that is needed.
    pub(super) fn way(&self, write: &Write, connection: &Arc<Connection>) -> Way {
        let bytes = write.runs.total_bytes();
        if bytes == 0 {
            return Way::Stream;
        }
        let in_place = write.source.arena().and_then(|(arena, offset)| {
            let kept = Kept::Source(Arc::clone(&write.source));
            Some(self.lent(self.export(arena)?, offset, false, kept))
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
        if connection.slots_held() >= self.staging.share_of_one() {
            // The peer's next acknowledgement goes on with it.
            return Way::Later;
        }
        let waiting = Arc::downgrade(connection);
        let wake = move || {
            if let Some(connection) = waiting.upgrade() {
                connection.slot_may_be_free();
            }
        };
        let Some(mut slot) = self.staging.take_or_wake(wake) else {
            return Way::Later;
        };
        connection.slot_may_be_free();
        if let Err(error) = gather(write, slot.page_mut()) {
            return Way::Failed(error);
        }
        let placed = slot.page().arena().and_then(|(arena, offset)| {
            let exported = self.export(arena)?;
            Some((exported, offset))
        });
        match placed {
            Some((arena, offset)) => Way::Pull(self.lent(arena, offset, true, Kept::Slot(slot))),
            None => Way::Stream,
        }
    }

    /// A copy with one wrong byte, for a test's fault plan: the peer really reads what is wrong.
    pub(super) fn spoilt(&self, write: &Write, at: usize) -> io::Result<Lent> {
        let bytes = write.runs.total_bytes();
        let source = write.source.arena().map(|(arena, _)| arena);
        let mut page = blank(source.filter(|arena| self.takes(arena)), bytes)?;
        gather(write, &mut page)?;
        let mut spoilt = [0];
        page.read(at, &mut spoilt)?;
        page.write(at, &[!spoilt[0]])?;
        let placed = page.arena().and_then(|(arena, offset)| {
            let exported = self.export(arena)?;
            Some((exported, offset))
        });
        let (arena, offset) = placed.ok_or(io::ErrorKind::Unsupported)?;
        Ok(self.lent(arena, offset, true, Kept::Spoilt(page)))
    }

    /// Whether the fabric takes memory of this kind.
    fn takes(&self, arena: &Arena) -> bool {
        let kind = match arena.device() {
            Some(_) => MemoryKind::Device,
            None => MemoryKind::Host,
        };
        self.fabric.capability().memory.contains(&kind)
    }

    fn lent(&self, arena: Exported, offset: usize, gathered: bool, kept: Kept) -> Lent {
        let descriptor = Descriptor {
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed),
            arena: arena.number,
            offset: offset as u64,
            gathered,
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

/// Copies the stretches of a write one after the other.
fn gather(write: &Write, page: &mut Page) -> io::Result<()> {
    if page.is_on_device() {
        let mut bytes = vec![0; write.runs.total_bytes()];
        gather_into(write, &mut bytes)?;
        return page.write(0, &bytes);
    }
    gather_into(write, page.as_bytes_mut())
}

fn gather_into(write: &Write, mut rest: &mut [u8]) -> io::Result<()> {
    for (range, _) in write.runs.stretches() {
        let (now, later) = rest.split_at_mut(range.len());
        write.source.read(range.start, now)?;
        rest = later;
    }
    Ok(())
}

/// A page for so many bytes in an arena of its own, of the same kind of memory as this one.
fn blank(like: Option<&Arc<Arena>>, bytes: usize) -> io::Result<Page> {
    let shape = plain_shape(bytes);
    let mut pages = match like.and_then(|arena| arena.device()) {
        Some(device) => Page::pool_on(device.another(Page::arena_bytes(shape, 1)?)?, shape, 1)?,
        None => Page::pool(shape, 1)?,
    };
    pages.pop().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

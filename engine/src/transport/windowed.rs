//! Memory of GPUs through fabrics that are quick with few long stretches and slow with many short ones: windows.
//!
//! A lender gathers a batch of pieces into a window of its device's memory by one kernel, and describes them there; that is the
//! control plane's work, with [`Fabric::windows`]. A reader, here, reads the batch in one piece into a window of its own, and one
//! kernel takes it to its pages and sums it on the way. The next batch is read meanwhile, and gathered into a third window.
//!
//! Both sides must do it: an address names the lender's windows and says how long the reader's are, and opening a peer reads from there,
//! so that a library that cannot is found out before the first piece. With a peer that has no such windows, pages of a device
//! go by way of the host's memory. A fabric reads windows of windows only: pages in the host's memory are as without this.
//!
//! Invariant: the fabric under this writes windows and never a page; a window is written by one read at a time, and given back when
//! nothing writes it any more.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::fabric::{ArenaKey, Fabric, FabricError, FabricPeer, FabricTerms, ReadJob, RemoteArena};
use super::link::PIECES_AT_ONCE_MAX;
use super::staging::{Slot, Staging, StagingSize, plain_shape};
use super::{Capability, MemoryKind, Run, Runs};
use crate::backend::cuda::{device_pages, keep_device};
use crate::page::Page;
use crate::page::arena::{Arena, ForeignAllocator};
use crate::page::device::{Course, DeviceArena, Exchange, Span, Spans};

/// Bytes of a window, if a page is no longer. A gigabyte between two H100 through NIXL: 230 GB/s in windows of 64 MiB, 180 of 32 MiB, 156
/// of 16 MiB.
pub(crate) const WINDOW_BYTES: usize = 64 << 20;

/// Windows of each direction: one that is gathered into, or taken from, while two are read and the word that one is free is on its way.
const WINDOWS: usize = 4;

/// Pieces begin at multiples of this in a window: the kernels take whole vectors.
pub(crate) const PIECE_ALIGN_BYTES: usize = 64;

/// What pieces of a batch may have between them.
const GAPS_BYTES: usize = PIECES_AT_ONCE_MAX * PIECE_ALIGN_BYTES;

/// What an address begins with that names windows.
const MAGIC: &[u8; 8] = b"BTNwind1";

/// Bytes that opening a peer reads.
const PROBE_BYTES: usize = 4096;

/// The windows of one device, for all transports that need some. Taken once, at the start.
#[derive(Debug, Clone)]
pub struct DeviceWindows {
    /// Of pieces that are read together; a window is a little longer, for what lies between them.
    batch_bytes: usize,
    lending: Arc<Staging>,
    reading: Arc<Staging>,
}

impl DeviceWindows {
    /// How long windows are for pages of so many bytes, where so many may be on their way at once.
    #[must_use]
    pub fn window_bytes(page_bytes: usize, buffer_bytes: Option<usize>) -> usize {
        let wanted = buffer_bytes.map_or(WINDOW_BYTES, |bytes| (bytes / 2).min(WINDOW_BYTES));
        wanted.max(page_bytes).next_multiple_of(PROBE_BYTES)
    }

    /// What all windows of a device take of its memory.
    #[must_use]
    pub fn bytes(window_bytes: usize) -> usize {
        2 * WINDOWS * (window_bytes + GAPS_BYTES)
    }

    /// Takes them from a device.
    ///
    /// # Errors
    /// When there is no such device, or too little memory.
    pub fn on(ordinal: usize, window_bytes: usize) -> io::Result<Self> {
        keep_device(ordinal)?;
        Self::of(window_bytes, |shape| device_pages(ordinal, shape, WINDOWS))
    }

    /// Makes the device the one that libraries use on this thread.
    fn enter(&self) -> io::Result<()> {
        let arena = self.reading.arena();
        let device = arena.as_ref().and_then(|arena| arena.device());
        device.map_or(Ok(()), DeviceArena::enter)
    }

    /// Of pages that somebody makes, for each direction.
    pub(crate) fn of(
        window_bytes: usize,
        pages: impl Fn(crate::page::PageShape) -> io::Result<Vec<Page>>,
    ) -> io::Result<Self> {
        let slot_bytes = window_bytes + GAPS_BYTES;
        let size = StagingSize {
            slot_bytes,
            slots: WINDOWS,
        };
        let made = || Ok::<_, io::Error>(Staging::of(size, pages(plain_shape(slot_bytes))?));
        Ok(Self {
            batch_bytes: window_bytes,
            lending: made()?,
            reading: made()?,
        })
    }
}

/// Windows that are made when the first transport asks that can use them, and shared by all.
#[derive(Debug, Clone, Default)]
pub struct WindowsOnce {
    /// The device, and bytes of a window; nothing where pages are in the host's memory.
    of: Option<(usize, usize)>,
    made: Arc<OnceLock<Option<DeviceWindows>>>,
}

impl WindowsOnce {
    /// Of this device, so long each.
    #[must_use]
    pub fn of(ordinal: usize, window_bytes: usize) -> Self {
        Self {
            of: Some((ordinal, window_bytes)),
            made: Arc::default(),
        }
    }

    /// The windows, if there are any; their device is then the one that libraries use on this thread.
    pub(crate) fn get(&self) -> Option<&DeviceWindows> {
        let (ordinal, window_bytes) = self.of?;
        let made = self.made.get_or_init(|| {
            let bytes = DeviceWindows::bytes(window_bytes);
            match DeviceWindows::on(ordinal, window_bytes) {
                Ok(windows) => {
                    tracing::info!(bytes, window_bytes, "gpu memory taken for windows that kv goes through");
                    Some(windows)
                }
                Err(error) => {
                    tracing::warn!(%error, bytes, "no gpu memory for windows: kv goes by way of the host's");
                    None
                }
            }
        });
        let windows = made.as_ref()?;
        match windows.enter() {
            Ok(()) => Some(windows),
            Err(error) => {
                tracing::warn!(%error, "the gpu fails: kv goes by way of the host's memory");
                None
            }
        }
    }
}

/// A fabric with windows. See the module.
#[derive(Debug)]
pub(crate) struct Windowed {
    inner: Arc<dyn Fabric>,
    capability: Capability,
    windows: Option<DeviceWindows>,
    address: Vec<u8>,
}

impl Windowed {
    /// A fabric whose pages are this device's, where it takes such memory; else, and without windows, it is as it was.
    pub(crate) fn over(inner: Arc<dyn Fabric>, windows: Option<&DeviceWindows>) -> Self {
        let mut capability = inner.capability().clone();
        let mut address = inner.address();
        let exported = windows.map(|windows| {
            let arena = windows.lending.arena();
            let none = || FabricError::Memory {
                fabric: capability.name,
                detail: "there are no windows".to_owned(),
            };
            let key = inner.export(&arena.ok_or_else(none)?)?;
            Ok::<_, FabricError>((windows.clone(), key))
        });
        let windows = match exported {
            None => None,
            Some(Ok((windows, key))) => {
                address = encode(&address, windows.batch_bytes, &key);
                capability.memory = &[MemoryKind::Host, MemoryKind::Device];
                capability.bandwidth_estimate =
                    capability.bandwidth_estimate.max(BANDWIDTH_ESTIMATE);
                Some(windows)
            }
            Some(Err(error)) => {
                tracing::warn!(transport = capability.name, %error, "kv of this gpu goes by way of the host's memory over this transport");
                None
            }
        };
        Self {
            inner,
            capability,
            windows,
            address,
        }
    }
}

/// Of two GPUs of one host; what ranks candidates of different hosts is their reach.
const BANDWIDTH_ESTIMATE: u64 = 200_000_000_000;

/// An address with windows, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Address<'a> {
    inner: &'a [u8],
    /// How long the process's own windows are, and what reads those that it lends.
    windows: Option<(usize, &'a [u8])>,
}

fn encode(inner: &[u8], window_bytes: usize, key: &ArenaKey) -> Vec<u8> {
    let words = [window_bytes as u64, inner.len() as u64].map(u64::to_le_bytes);
    [&MAGIC[..], words.as_flattened(), inner, &key.0].concat()
}

fn decode(address: &[u8]) -> Address<'_> {
    let plain = Address {
        inner: address,
        windows: None,
    };
    let parts = || {
        let rest = address.strip_prefix(MAGIC)?;
        let (words, rest) = rest.split_at_checked(16)?;
        let (words, _) = words.as_chunks::<8>();
        let number = |word: [u8; 8]| usize::try_from(u64::from_le_bytes(word)).ok();
        let (inner, key) = rest.split_at_checked(number(words[1])?)?;
        let windows = Some((number(words[0])?, key));
        Some(Address { inner, windows })
    };
    parts().unwrap_or(plain)
}

impl Fabric for Windowed {
    fn capability(&self) -> &Capability {
        &self.capability
    }

    fn terms(&self) -> FabricTerms {
        let terms = self.inner.terms();
        match &self.windows {
            None => terms,
            Some(windows) => FabricTerms {
                batch_bytes_max: windows.batch_bytes,
                tapers: false,
                reads_ahead: true,
                ..terms
            },
        }
    }

    fn wire(&self) -> Option<String> {
        let wire = self.inner.wire()?;
        Some(match self.windows {
            Some(_) => format!("{wire}, windows of GPU memory"),
            None => wire,
        })
    }

    fn windows(&self) -> Option<&Arc<Staging>> {
        self.windows.as_ref().map(|windows| &windows.lending)
    }

    fn window_of(&self, address: &[u8]) -> Option<usize> {
        let (bytes, _) = decode(address).windows?;
        self.windows.as_ref().map(|_| bytes)
    }

    fn allocator(&self) -> Option<ForeignAllocator> {
        self.inner.allocator()
    }

    fn address(&self) -> Vec<u8> {
        self.address.clone()
    }

    fn reaches(&self, address: &[u8]) -> bool {
        self.inner.reaches(decode(address).inner)
    }

    fn export(&self, arena: &Arc<Arena>) -> Result<ArenaKey, FabricError> {
        self.inner.export(arena)
    }

    fn open(&self, address: &[u8], deadline: Instant) -> Result<Box<dyn FabricPeer>, FabricError> {
        let address = decode(address);
        let entered = self.windows.as_ref().map(DeviceWindows::enter);
        entered
            .unwrap_or(Ok(()))
            .map_err(|error| FabricError::Unreachable {
                fabric: self.capability.name,
                detail: error.to_string(),
            })?;
        let peer = self.inner.open(address.inner, deadline)?;
        let (Some(windows), Some((_, key))) = (&self.windows, address.windows) else {
            return Ok(peer);
        };
        let mut peer = WindowedPeer {
            fabric: self.capability.name,
            inner: Some(peer),
            reading: Arc::clone(&windows.reading),
            flights: VecDeque::new(),
        };
        peer.probe(key, deadline)
            .map_err(|error| FabricError::Unreachable {
                fabric: self.capability.name,
                detail: format!("no memory of its GPU is read: {error}"),
            })?;
        Ok(Box::new(peer))
    }

    fn close(&self) {
        self.inner.close();
    }
}

/// Where the pieces of a batch go out of a window.
#[derive(Debug)]
struct Moves {
    /// With how many pieces go there, one after the other: mostly all.
    arenas: Vec<(Arc<Arena>, usize)>,
    /// Of each piece.
    spans: Vec<Spans>,
}

impl Moves {
    fn add(&mut self, arena: &Arc<Arena>, spans: Spans) {
        self.spans.push(spans);
        match self.arenas.last_mut() {
            Some((last, count)) if Arc::ptr_eq(last, arena) => *count += 1,
            _ => self.arenas.push((Arc::clone(arena), 1)),
        }
    }
}

/// A read that was begun.
#[derive(Debug)]
enum Flight {
    /// Of pages of the host's, as the fabric under this reads them.
    Plain,
    /// Of a window, in so many reads.
    Window {
        slot: Slot,
        reads: usize,
        moves: Moves,
        summed: bool,
    },
    /// Over, with its checksums.
    Over(Vec<Option<u64>>),
}

/// A peer whose windows are read.
#[derive(Debug)]
struct WindowedPeer {
    fabric: &'static str,
    /// None once a read has failed.
    inner: Option<Box<dyn FabricPeer>>,
    reading: Arc<Staging>,
    flights: VecDeque<Flight>,
}

impl WindowedPeer {
    fn failed(&self, detail: &impl ToString) -> FabricError {
        FabricError::Read {
            fabric: self.fabric,
            detail: detail.to_string(),
        }
    }

    fn inner(&mut self) -> Result<&mut dyn FabricPeer, FabricError> {
        let failed = FabricError::Read {
            fabric: self.fabric,
            detail: "an earlier read failed".to_owned(),
        };
        match &mut self.inner {
            Some(inner) => Ok(&mut **inner),
            None => Err(failed),
        }
    }

    /// Reads the beginning of the peer's windows.
    fn probe(&mut self, key: &[u8], deadline: Instant) -> Result<(), FabricError> {
        let from = self.inner()?.import(key)?;
        let mut slot = self.slot(deadline, &AtomicBool::new(false))?;
        let runs = Runs::whole(PROBE_BYTES);
        let mut job = [ReadJob::new(from, &runs, slot.page_mut())];
        let never = AtomicBool::new(false);
        let inner = self.inner()?;
        let begun = inner.begin(&mut job, deadline, &never);
        let read = begun.and_then(|()| inner.finish(&never, &mut Vec::new()));
        self.unless_failed(read, slot).map(drop)
    }

    /// A window of ours. Who holds one while it waits for another could wait for itself, so what is under way ends first.
    fn slot(&mut self, deadline: Instant, cancelled: &AtomicBool) -> Result<Slot, FabricError> {
        if let Some(slot) = self.reading.try_take() {
            return Ok(slot);
        }
        for index in 0..self.flights.len() {
            let flight = std::mem::replace(&mut self.flights[index], Flight::Plain);
            let mut sums = Vec::new();
            self.end(flight, cancelled, &mut sums)?;
            self.flights[index] = Flight::Over(sums);
        }
        let slot = self.reading.take(deadline);
        slot.ok_or(FabricError::TimedOut {
            fabric: self.fabric,
        })
    }

    /// Gives the window back to who goes on with it; after a failure, when nothing can write it any more.
    fn unless_failed(
        &mut self,
        read: Result<(), FabricError>,
        slot: Slot,
    ) -> Result<Slot, FabricError> {
        let Err(error) = read else { return Ok(slot) };
        // Ends all that this peer reads, as far as that has not left the library.
        self.inner = None;
        if let Some(device) = device_of(slot.page())
            && let Err(error) = device.settle()
        {
            tracing::error!(%error, "a gpu fails while the hand-off waits for it");
        }
        Err(error)
    }

    /// Waits for a read, and takes what it brought where it belongs; its checksums are added to `folds`.
    fn end(
        &mut self,
        flight: Flight,
        cancelled: &AtomicBool,
        folds: &mut Vec<Option<u64>>,
    ) -> Result<(), FabricError> {
        let (slot, reads, moves, summed) = match flight {
            Flight::Plain => return self.inner()?.finish(cancelled, folds),
            Flight::Over(sums) => {
                folds.extend(sums);
                return Ok(());
            }
            Flight::Window {
                slot,
                reads,
                moves,
                summed,
            } => (slot, reads, moves, summed),
        };
        let inner = self.inner()?;
        let mut none = Vec::new();
        let read = (0..reads).try_for_each(|_| inner.finish(cancelled, &mut none));
        let slot = self.unless_failed(read, slot)?;
        let device = device_of(slot.page()).ok_or_else(|| self.failed(&"no window"))?;
        let arenas = moves.arenas.iter();
        let arenas = arenas.flat_map(|(arena, count)| std::iter::repeat_n(arena, *count));
        let exchanges = moves.spans.into_iter().zip(arenas).map(|(spans, arena)| {
            Some(Exchange {
                other: arena.device()?,
                spans,
            })
        });
        let exchanges: Option<Vec<_>> = exchanges.collect();
        let exchanges = exchanges.ok_or_else(|| self.failed(&"a page that is on no device"))?;
        let sums = device.exchange(Course::Scatter, &exchanges);
        let sums = sums.map_err(|error| self.failed(&error))?;
        if summed {
            folds.extend(sums);
        }
        Ok(())
    }
}

fn device_of(page: &Page) -> Option<&dyn DeviceArena> {
    page.arena()?.0.device()
}

/// What is read of one arena in one piece, into a window.
#[derive(Debug)]
struct Part {
    from: RemoteArena,
    runs: Vec<Run>,
}

/// How a batch is laid out in a window that begins at `base` of its arena: what is read, and where each job's piece goes then.
/// `None` when it does not fit.
fn lay_out(jobs: &[ReadJob<'_>], base: usize, window_bytes: usize) -> Option<(Vec<Part>, Moves)> {
    let mut parts: Vec<Part> = Vec::new();
    let mut moves = Moves {
        arenas: Vec::new(),
        spans: Vec::with_capacity(jobs.len()),
    };
    let mut at = 0_usize;
    for job in jobs {
        let into = job.runs.packed_at(job.offset, at);
        match parts.last_mut().filter(|part| part.from == job.from) {
            Some(part) => part.runs.extend(into),
            None => parts.push(Part {
                from: job.from,
                runs: into.collect(),
            }),
        }
        let (arena, offset) = job.page.arena()?;
        let targets = job.runs.stretches().map(|(_, target)| target);
        moves.add(arena, Span::packed(base + at, offset, targets));
        let end = at.checked_add(job.runs.total_bytes())?;
        if end > window_bytes {
            return None;
        }
        at = end.checked_next_multiple_of(PIECE_ALIGN_BYTES)?;
    }
    Some((parts, moves))
}

impl FabricPeer for WindowedPeer {
    fn import(&mut self, key: &[u8]) -> Result<RemoteArena, FabricError> {
        self.inner()?.import(key)
    }

    fn read(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        self.begin(jobs, deadline, cancelled)?;
        self.finish(cancelled, &mut Vec::new())
    }

    fn begin(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        if !jobs.iter().any(|job| job.from.on_device) {
            self.inner()?.begin(jobs, deadline, cancelled)?;
            self.flights.push_back(Flight::Plain);
            return Ok(());
        }
        if !jobs
            .iter()
            .all(|job| job.from.on_device && job.page.is_on_device())
        {
            return Err(self.failed(&"memory of the host's among that of a device"));
        }
        let mut slot = self.slot(deadline, cancelled)?;
        let base = slot.page().arena().map_or(0, |(_, offset)| offset);
        let laid_out = lay_out(jobs, base, self.reading.slot_bytes());
        let (parts, moves) = laid_out.ok_or_else(|| self.failed(&"more than a window holds"))?;
        let mut reads = 0;
        let mut begun = Ok(());
        for part in parts {
            begun = Runs::new(part.runs)
                .map_err(|error| self.failed(&error))
                .and_then(|runs| {
                    let mut job = [ReadJob::new(part.from, &runs, slot.page_mut())];
                    self.inner()?.begin(&mut job, deadline, cancelled)
                });
            if begun.is_err() {
                break;
            }
            reads += 1;
        }
        let slot = self.unless_failed(begun, slot)?;
        let summed = jobs.iter().any(|job| job.sum);
        self.flights.push_back(Flight::Window {
            slot,
            reads,
            moves,
            summed,
        });
        Ok(())
    }

    fn finish(
        &mut self,
        cancelled: &AtomicBool,
        folds: &mut Vec<Option<u64>>,
    ) -> Result<(), FabricError> {
        match self.flights.pop_front() {
            Some(flight) => self.end(flight, cancelled, folds),
            None => Ok(()),
        }
    }
}

impl Drop for WindowedPeer {
    fn drop(&mut self) {
        let flights = std::mem::take(&mut self.flights);
        for flight in flights {
            if let Flight::Window { slot, .. } = flight {
                // Nobody waits for it any more; its window may be written until all of it has ended.
                let ended = self.unless_failed(Err(self.failed(&"given up")), slot);
                drop(ended);
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;

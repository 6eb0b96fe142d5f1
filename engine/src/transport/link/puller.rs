//! The reader's side of a pulled write: one thread a connection reads what the peer has described.
//!
//! A region's page is out of the regions while the fabric writes it, as it is with the thread that reads a stream; so
//! giving it up meanwhile is `Later`, and it comes back when this thread lets go. Everything that is queued is
//! read in one call, as much as suits the fabric; where it reads ahead, a batch is begun while the one before is under way, so that
//! the wire does not wait for what follows a read here. Stale regions are not read, but acknowledged. A page of a device is written
//! by the fabric where it takes such memory, else by way of the host's.
//!
//! Invariant: whatever the fabric says, each page that was taken is put back before anything else happens.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::LinkTuning;
use super::connection::Connection;
use super::pulls::{Batch, Pull, Share};
use super::regions::{Pages, Regions, Taken, pages_released};
use crate::page::Page;
use crate::transport::fabric::{
    Fabric, FabricError, FabricPeer, FabricTerms, ReadJob, RemoteArena,
};
use crate::transport::staging::{Slot, Staging, plain_shape};
use crate::transport::{
    Found, MemoryKind, RegionId, Runs, RunsError, TransportEvent, TransportSink,
};

/// Arenas of one peer at most.
const ARENAS_MAX: usize = 1024;

/// What a batch that tapers has at least, in shares of what one may have at most.
const SHORT_SHARE: usize = 8;

/// Why a connection's pulling ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum PullEnd {
    #[error("{0}")]
    Fabric(#[from] FabricError),
    #[error("descriptor of an arena {0} that was never described")]
    UnknownArena(u64),
    #[error("more than {ARENAS_MAX} arenas")]
    TooManyArenas,
    #[error("descriptor up to byte {end} of an arena of {bytes}")]
    OutOfArena { end: usize, bytes: u64 },
    #[error("write up to byte {end} of a region of {bytes}")]
    OutOfRange { end: usize, bytes: u64 },
    #[error("region still written by another peer after {0:?}")]
    Occupied(Duration),
    #[error("{0}")]
    Runs(#[from] RunsError),
    #[error("a page on a device cannot be written: {0}")]
    Device(#[from] io::Error),
}

/// What all pullers of a transport share.
#[derive(Debug)]
pub(super) struct PullerParts {
    pub(super) fabric: Arc<dyn Fabric>,
    /// Apart from the writers' staging memory, so that neither waits for the other.
    pub(super) staging: Arc<Staging>,
    /// Whether fabrics that can shall sum what they read.
    pub(super) sum: bool,
}

/// Pulls for one connection.
#[derive(Debug)]
pub(super) struct Puller<'a> {
    parts: &'a PullerParts,
    terms: FabricTerms,
    /// Whether the fabric takes no memory of devices.
    host_only: bool,
    tuning: &'a LinkTuning,
    connection: &'a Connection,
    regions: &'a Regions,
    /// Of the peer's fabric.
    address: &'a [u8],
    peer: Option<Box<dyn FabricPeer>>,
    arenas: HashMap<u64, RemoteArena>,
    /// Begun and not finished.
    flying: Option<Ready>,
    kept: Kept,
}

/// Memory of batches that are over, for those to come: a batch is thousands of pieces, and a fraction of a millisecond.
#[derive(Debug, Default)]
struct Kept {
    /// Emptied; as many as may be under way.
    batches: Vec<Ready>,
    /// Empty but while a batch is begun.
    jobs: Vec<ReadJob<'static>>,
    /// Of one batch after the other, as its devices made them.
    folds: Sums,
}

/// For each job of a batch, what was made of it; or nothing at all.
type Sums = Vec<Option<u64>>;

/// A pull whose pages were taken out.
#[derive(Debug)]
struct Landing {
    pull: Pull,
    from: RemoteArena,
    pages: Pages,
    /// Where the bytes go first, when their targets do not suit the fabric.
    by: Option<Detour>,
    /// What is read, where that is not what the pull says of each page: of gathered sources, or all to where they go first.
    runs: Option<Runs>,
}

/// Memory of the host's on the way to a page.
#[derive(Debug)]
enum Detour {
    /// Of the staging memory.
    Slot(Slot),
    /// Of its own, for what no slot takes and no fabric writes.
    Own(Page),
}

impl Landing {
    /// How many jobs it is.
    fn job_count(&self) -> usize {
        match self.by {
            Some(_) => 1,
            None => self.pages.len(),
        }
    }

    /// One for each of the pages, or one for where all go first.
    fn jobs(&mut self, sum: bool) -> impl Iterator<Item = ReadJob<'_>> {
        let (offsets, pages): (&[u64], _) = match &mut self.by {
            Some(Detour::Slot(slot)) => (&[0], std::slice::from_mut(slot.page_mut())),
            Some(Detour::Own(page)) => (&[0], std::slice::from_mut(page)),
            None => (&self.pull.descriptor.offsets, &mut self.pages[..]),
        };
        let (from, runs) = (self.from, self.runs.as_ref().unwrap_or(&self.pull.runs));
        let jobs = offsets.iter().zip(pages);
        jobs.map(move |(offset, page)| ReadJob {
            sum,
            ..ReadJob::new(from, runs, page).at(place(*offset))
        })
    }

    /// Moves what went by a detour to where it belongs.
    fn scatter(&mut self) -> io::Result<()> {
        let by = self.by.take();
        let mut rest = match &by {
            None => return Ok(()),
            Some(Detour::Slot(slot)) => slot.page().as_bytes(),
            Some(Detour::Own(page)) => page.as_bytes(),
        };
        for page in &mut self.pages {
            for (_, target) in self.pull.runs.stretches() {
                let (now, later) = rest.split_at(target.len());
                page.write(target.start, now)?;
                rest = later;
            }
        }
        Ok(())
    }
}

/// What was found of so many pieces, out of what was of a batch's jobs: of each piece by one of these jobs, or of all by a single one.
fn found_of_each(sums: &[Option<u64>], jobs: Range<usize>, count: usize) -> Found {
    let found = sums.get(jobs).unwrap_or_default();
    if found.len() == count && found.iter().any(Option::is_some) {
        Found::from_slice(found)
    } else {
        Found::new()
    }
}

/// What could be made of a batch at this moment.
#[derive(Debug, Default)]
struct Ready {
    landings: Vec<Landing>,
    /// Where the fabric made them as it read.
    checksums: Sums,
    /// Sequence numbers of all that are over with this batch, in order.
    over: Vec<u64>,
    /// Of all that is read.
    bytes: usize,
}

impl<'a> Puller<'a> {
    pub(super) fn new(
        parts: &'a PullerParts,
        tuning: &'a LinkTuning,
        (connection, regions): (&'a Connection, &'a Regions),
        address: &'a [u8],
    ) -> Self {
        Self {
            terms: parts.fabric.terms(),
            host_only: !parts
                .fabric
                .capability()
                .memory
                .contains(&MemoryKind::Device),
            parts,
            tuning,
            connection,
            regions,
            address,
            peer: None,
            arenas: HashMap::new(),
            flying: None,
            kept: Kept::default(),
        }
    }

    /// Prepares reading now rather than with the first piece.
    pub(super) fn open(&mut self) -> Result<(), PullEnd> {
        self.peer()?;
        Ok(())
    }

    /// Reads until the connection's end; what was begun is over then.
    pub(super) fn run(&mut self, sink: &TransportSink) -> Result<(), PullEnd> {
        let end = self.pull(sink);
        let settled = self.settle(sink);
        end.and(settled)
    }

    fn pull(&mut self, sink: &TransportSink) -> Result<(), PullEnd> {
        let pulls = &self.connection.pulls;
        loop {
            let share = self.share();
            let batch = match self.flying {
                Some(_) => pulls.try_next(share),
                None => pulls.next(share),
            };
            let batch = match batch {
                Some(batch) => batch,
                None if self.flying.is_some() => {
                    self.settle(sink)?;
                    continue;
                }
                None => return Ok(()),
            };
            match batch {
                Batch::Arena { number, key } => {
                    if self.arenas.len() >= ARENAS_MAX {
                        return Err(PullEnd::TooManyArenas);
                    }
                    let arena = self.peer()?.import(&key)?;
                    self.arenas.insert(number, arena);
                }
                Batch::Pulls(pulls) => self.read(pulls, sink)?,
                Batch::Rouse => self.rouse()?,
            }
        }
    }

    /// How much the next batch is. Where batches taper, one is no more than half as long again as the one that is under way: it is to
    /// be made ready while that is read, and nothing is read where that takes longer. The first is what there is, so that there is time
    /// for the second.
    fn share(&self) -> Share {
        let bytes_max = self.terms.batch_bytes_max;
        if !self.terms.tapers {
            let bytes_min = bytes_max;
            return Share {
                bytes_min,
                bytes_max,
            };
        }
        let bytes_min = bytes_max / SHORT_SHARE;
        let Some(flying) = &self.flying else {
            let first = bytes_max / 2;
            return Share {
                bytes_min: first,
                bytes_max: first,
            };
        };
        let grown = flying.bytes.saturating_add(flying.bytes / 2);
        Share {
            bytes_min,
            bytes_max: grown.clamp(bytes_min, bytes_max),
        }
    }

    /// Has what leads to the peer's memory wake up, where it has been used.
    fn rouse(&mut self) -> Result<(), PullEnd> {
        match &mut self.peer {
            Some(peer) => Ok(peer.rouse()?),
            None => Ok(()),
        }
    }

    fn peer(&mut self) -> Result<&mut Box<dyn FabricPeer>, FabricError> {
        let opened = match self.peer.take() {
            Some(peer) => peer,
            None => {
                let deadline = Instant::now() + self.tuning.handshake_timeout;
                self.parts.fabric.open(self.address, deadline)?
            }
        };
        Ok(self.peer.insert(opened))
    }

    /// Reads a batch, or begins to while the one before is under way. That one is over when this returns.
    fn read(&mut self, pulls: Vec<Pull>, sink: &TransportSink) -> Result<(), PullEnd> {
        let mut ready = self.kept.batches.pop().unwrap_or_default();
        let taken = self.take(pulls, &mut ready);
        let begun = taken.and_then(|()| self.begin(&mut ready));
        let settled = self.settle(sink);
        if let Err(end) = begun {
            let mut events = Vec::new();
            for landing in ready.landings {
                self.let_go(landing, None, &mut events)?;
            }
            report(events, sink);
            return Err(end);
        }
        // Nothing is in flight where all had to wait for what was: then the next turn may wait.
        if ready.over.is_empty() {
            self.kept.batches.push(ready);
        } else {
            self.flying = Some(ready);
        }
        settled?;
        if self.terms.reads_ahead {
            return Ok(());
        }
        self.settle(sink)
    }

    /// Waits for what was begun and lets it go.
    fn settle(&mut self, sink: &TransportSink) -> Result<(), PullEnd> {
        let Some(mut ready) = self.flying.take() else {
            return Ok(());
        };
        let mut folds = std::mem::take(&mut self.kept.folds);
        folds.clear();
        let finished = match &mut self.peer {
            Some(peer) if !ready.landings.is_empty() => {
                peer.finish(&self.connection.ended, &mut folds)
            }
            Some(_) | None => Ok(()),
        };
        let mut read = finished.map_err(PullEnd::from);
        let mut events = Vec::with_capacity(ready.landings.len());
        let mut at = 0;
        for landing in ready.landings.drain(..) {
            let jobs = at..at + landing.job_count();
            at = jobs.end;
            let found = |of: &Sums| found_of_each(of, jobs.clone(), landing.pull.count());
            let found = read
                .is_ok()
                .then(|| [found(&ready.checksums), found(&folds)]);
            let scattered = self.let_go(landing, found, &mut events);
            read = read.and(scattered);
        }
        self.kept.folds = folds;
        report(events, sink);
        read?;
        self.connection.acknowledge(&ready.over);
        ready.checksums.clear();
        ready.over.clear();
        ready.bytes = 0;
        self.kept.batches.push(ready);
        Ok(())
    }

    fn begin(&mut self, ready: &mut Ready) -> Result<(), PullEnd> {
        if ready.landings.is_empty() {
            return Ok(());
        }
        let deadline = Instant::now() + self.tuning.pull_timeout;
        let (connection, sum) = (self.connection, self.parts.sum);
        let mut jobs: Vec<ReadJob<'_>> = std::mem::take(&mut self.kept.jobs);
        jobs.extend(
            ready
                .landings
                .iter_mut()
                .flat_map(|landing| landing.jobs(sum)),
        );
        self.peer()?.begin(&mut jobs, deadline, &connection.ended)?;
        if jobs.iter().any(|job| job.checksum.is_some()) {
            ready.checksums.extend(jobs.iter().map(|job| job.checksum));
        }
        self.kept.jobs = emptied(jobs);
        Ok(())
    }

    /// Gives a landing's pages back, and tells of it with the checksums and the folds of its pieces; nothing where it was not read.
    fn let_go(
        &self,
        mut landing: Landing,
        mut found: Option<[Found; 2]>,
        events: &mut Vec<TransportEvent>,
    ) -> Result<(), PullEnd> {
        let scattered = match found {
            Some(_) => landing.scatter(),
            None => Ok(()),
        };
        found = found.filter(|_| scattered.is_ok());
        let Landing { pull, pages, .. } = landing;
        let released = self.regions.put_back(pull.region, pages);
        if !released.is_empty() {
            events.extend(pages_released(released));
        } else if let Some([checksums, folds]) = found {
            let count = pull.count();
            events.push(TransportEvent::Landed {
                peer: self.connection.id,
                region: RegionId(pull.region),
                runs: pull.runs,
                transfer: pull.transfer,
                note: pull.note,
                count,
                checksums,
                folds,
            });
        }
        Ok(scattered?)
    }

    /// Takes the pages of as many pulls as can be read at once; the others wait for the next turn.
    fn take(&self, pulls: Vec<Pull>, ready: &mut Ready) -> Result<(), PullEnd> {
        let mut pulls = pulls.into_iter();
        while let Some(pull) = pulls.next() {
            if let Some(back) = self.take_one(pull, ready)? {
                let later = std::iter::once(back).chain(pulls).collect();
                self.connection.pulls.put_back(later);
                break;
            }
        }
        Ok(())
    }

    /// Takes the pages of one pull; gives it back when it has to wait for those before it.
    fn take_one(&self, pull: Pull, ready: &mut Ready) -> Result<Option<Pull>, PullEnd> {
        let sequence = pull.descriptor.sequence;
        // Only who holds nothing may wait.
        let first = ready.landings.is_empty() && self.flying.is_none();
        let (from, gathered) = self.source(&pull)?;
        let runs = gathered.as_ref().unwrap_or(&pull.runs);
        // Between devices the fabric takes any stretches.
        let between = from.on_device;
        let stretch_bytes_min = self.terms.stretch_bytes_min;
        let fine = !between && !runs.is_coarse(stretch_bytes_min);
        let patience = if first {
            self.tuning.stall_timeout
        } else {
            Duration::ZERO
        };
        // Where the fabric writes the host's memory only, at least from the host's.
        let host_only = self.host_only || !between;
        let abroad = host_only && self.regions.is_on_device(pull.region);
        let may_need_slot = fine || abroad || (self.terms.target_in_arena && !between);
        let mut slot = None;
        if may_need_slot && self.parts.staging.fits(pull.total_bytes()) {
            slot = self.slot(first.then_some(patience));
            if slot.is_none() && !first {
                return Ok(Some(pull));
            }
        }
        let end = pull.runs.target_end();
        let pages = match self.regions.take(pull.row(), pull.key, end, patience) {
            Taken::Pages(pages) => pages,
            Taken::Stale => {
                ready.over.push(sequence);
                return Ok(None);
            }
            Taken::Occupied if first => return Err(PullEnd::Occupied(patience)),
            // By an earlier one of this batch, perhaps.
            Taken::Occupied => return Ok(Some(pull)),
            Taken::OutOfRange { bytes } => return Err(PullEnd::OutOfRange { end, bytes }),
        };
        let abroad = host_only && pages.iter().any(Page::is_on_device);
        if !fine && !abroad && pages.iter().all(|page| page.arena().is_some()) {
            slot = None;
        }
        let by = match slot {
            Some(slot) => Some(Detour::Slot(slot)),
            None if abroad => {
                let shape = plain_shape(pull.total_bytes());
                Some(Detour::Own(Page::zeroed(shape)))
            }
            None => None,
        };
        let runs = match &by {
            None => Ok(gathered),
            Some(_) => packed(runs, &pull.descriptor.offsets).map(Some),
        };
        let (runs, refused) = match runs {
            Ok(runs) => (runs, None),
            Err(error) => (None, Some(error)),
        };
        ready.bytes = ready.bytes.saturating_add(pull.total_bytes());
        ready.landings.push(Landing {
            pull,
            from,
            pages,
            by,
            runs,
        });
        if let Some(error) = refused {
            // The pages come back with those of the others when the connection ends.
            return Err(error.into());
        }
        ready.over.push(sequence);
        Ok(None)
    }

    /// Staging memory, at once or within so long.
    fn slot(&self, patience: Option<Duration>) -> Option<Slot> {
        match patience {
            Some(patience) => self.parts.staging.take(Instant::now() + patience),
            None => self.parts.staging.try_take(),
        }
    }

    /// Where the bytes of all pages lie: each page's from its offset on, as the pull's runs say or as these.
    fn source(&self, pull: &Pull) -> Result<(RemoteArena, Option<Runs>), PullEnd> {
        let number = pull.descriptor.arena;
        let arena = self.arenas.get(&number).copied();
        let arena = arena.ok_or(PullEnd::UnknownArena(number))?;
        let gathered = pull.descriptor.gathered.then(|| pull.runs.gathered());
        let runs = gathered.as_ref().unwrap_or(&pull.runs);
        for offset in &pull.descriptor.offsets {
            let end = runs.source_end_from(place(*offset))?;
            if end as u64 > arena.bytes {
                let bytes = arena.bytes;
                return Err(PullEnd::OutOfArena { end, bytes });
            }
        }
        Ok((arena, gathered))
    }
}

/// An offset as this machine counts; what it cannot count is in no arena.
fn place(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// The same stretches of sources that begin here, one source behind the other, into a target in which all of them lie one after
/// the other.
fn packed(runs: &Runs, offsets: &[u64]) -> Result<Runs, RunsError> {
    let at = (0..).step_by(runs.total_bytes().max(1));
    let sources = offsets.iter().zip(at);
    Runs::new(sources.flat_map(|(offset, at)| runs.packed_at(place(*offset), at)))
}

/// The memory of jobs that nobody has any more; collecting nothing in its place keeps it.
fn emptied(mut jobs: Vec<ReadJob<'_>>) -> Vec<ReadJob<'static>> {
    jobs.clear();
    jobs.into_iter().map_while(|_| None).collect()
}

fn report(events: Vec<TransportEvent>, sink: &TransportSink) {
    if !events.is_empty() {
        sink(events);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emptied_jobs_keep_their_memory() {
        let from = RemoteArena {
            handle: 0,
            bytes: 8,
            on_device: false,
        };
        let (runs, mut page) = (Runs::whole(8), Page::zeroed(plain_shape(8)));
        let mut jobs = Vec::with_capacity(100);
        jobs.push(ReadJob::new(from, &runs, &mut page));
        let memory = jobs.as_ptr().addr();
        let kept = emptied(jobs);
        assert_eq!((kept.len(), kept.capacity()), (0, 100));
        assert_eq!(kept.as_ptr().addr(), memory);
    }

    #[test]
    fn what_was_found_of_jobs_is_told_of_pieces_where_they_are_these() {
        let sums = [Some(1), None, Some(3), None, None];
        assert_eq!(found_of_each(&sums, 0..3, 3)[..], sums[..3]);
        // A single job for several pieces; nothing of any; and no sums at all.
        for (sums, jobs, count) in [(&sums[..], 0..1, 2), (&sums, 3..5, 2), (&[], 0..2, 2)] {
            assert!(found_of_each(sums, jobs, count).is_empty());
        }
    }
}

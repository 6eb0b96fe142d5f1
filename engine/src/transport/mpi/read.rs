//! The reader's side: asks for ranges, receives them in order, copies them to where they belong.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::serve::{Drain, STATUS_BYTES_MAX};
use super::wire::{self, RANGES_MAX, Request};
use super::{BATCH_BYTES_MAX, CAPABILITY, CHUNK_BYTES, CHUNKS_AHEAD, REQUEST, Shared, failed};
use crate::collective::mpi::{Flight, Patience};
use crate::transport::fabric::{FabricError, FabricPeer, ReadJob, RemoteArena};

/// Another rank of the world.
#[derive(Debug)]
pub(super) struct MpiPeer {
    shared: Arc<Shared>,
    /// Whether the fabric that opened it is.
    closed: Arc<AtomicBool>,
    rank: usize,
}

/// A stretch of a job: where it comes from, and whose bytes it is.
struct Stretch {
    arena: u64,
    source: Range<u64>,
    job: usize,
    target: Range<usize>,
}

/// Where what comes belongs.
struct Place {
    job: usize,
    target: Range<usize>,
}

/// One request and its answer.
struct Exchange<'a> {
    shared: &'a Shared,
    from: usize,
    tag: i32,
    /// The request, until MPI has taken it.
    asked: Option<Flight>,
    /// Whether the status has come and was good.
    begun: bool,
    flights: VecDeque<Flight>,
    /// Bytes that are not expected yet.
    left: usize,
    places: VecDeque<Place>,
}

/// When to give up.
struct Limits<'a> {
    deadline: Instant,
    cancelled: &'a AtomicBool,
    closed: &'a AtomicBool,
}

impl Limits<'_> {
    fn check(&self, shared: &Shared) -> Result<(), FabricError> {
        let fabric = CAPABILITY.name;
        if self.cancelled.load(Ordering::Acquire) || self.closed.load(Ordering::Acquire) {
            return Err(FabricError::Cancelled { fabric });
        }
        if Instant::now() >= self.deadline {
            return Err(FabricError::TimedOut { fabric });
        }
        shared.mail.check().map_err(failed)
    }
}

impl MpiPeer {
    pub(super) fn new(shared: Arc<Shared>, closed: Arc<AtomicBool>, rank: usize) -> Self {
        Self {
            shared,
            closed,
            rank,
        }
    }

    /// Asks for as many of the stretches as go into one request; they are of one arena.
    fn ask(&self, stretches: &mut VecDeque<Stretch>) -> Result<Option<Exchange<'_>>, FabricError> {
        let Some(arena) = stretches.front().map(|stretch| stretch.arena) else {
            return Ok(None);
        };
        let (mut ranges, mut places, mut total) = (Vec::new(), VecDeque::new(), 0);
        while ranges.len() < RANGES_MAX
            && total < BATCH_BYTES_MAX
            && let Some(next) = stretches.front_mut().filter(|next| next.arena == arena)
        {
            let length = next.target.len().min(BATCH_BYTES_MAX - total);
            let (source_end, target_end) = (
                next.source.start + length as u64,
                next.target.start + length,
            );
            ranges.push(next.source.start..source_end);
            places.push_back(Place {
                job: next.job,
                target: next.target.start..target_end,
            });
            total += length;
            next.source.start = source_end;
            next.target.start = target_end;
            if next.target.is_empty() {
                stretches.pop_front();
            }
        }
        let shared = &*self.shared;
        let tag = shared
            .take_tag()
            .ok_or_else(|| failed("every MPI tag is in use".to_owned()))?;
        let request = Request { arena, tag, ranges };
        let mut exchange = Exchange {
            shared,
            from: self.rank,
            tag,
            asked: None,
            begun: false,
            flights: VecDeque::new(),
            left: total,
            places,
        };
        let status = shared
            .mail
            .expect(self.rank, tag, vec![0; STATUS_BYTES_MAX]);
        exchange.flights.push_back(status.map_err(failed)?);
        let asked = shared
            .mail
            .post(self.rank, REQUEST, Arc::new(request.encode()));
        exchange.asked = Some(asked.map_err(failed)?);
        Ok(Some(exchange))
    }
}

impl FabricPeer for MpiPeer {
    fn import(&mut self, key: &[u8]) -> Result<RemoteArena, FabricError> {
        let (handle, bytes) = wire::read_key(key).ok_or_else(|| FabricError::Malformed {
            fabric: CAPABILITY.name,
            what: "arena key",
            detail: format!("{} bytes", key.len()),
        })?;
        Ok(RemoteArena {
            handle,
            bytes,
            on_device: false,
        })
    }

    fn read(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), FabricError> {
        let limits = Limits {
            deadline,
            cancelled,
            closed: &self.closed,
        };
        let mut stretches: VecDeque<Stretch> = jobs
            .iter()
            .enumerate()
            .flat_map(|(job, read)| {
                let arena = read.from.handle;
                read.stretches().map(move |(source, target)| Stretch {
                    arena,
                    source: source.start as u64..source.end as u64,
                    job,
                    target,
                })
            })
            .collect();
        while let Some(exchange) = self.ask(&mut stretches)? {
            exchange.run(jobs, &limits)?;
        }
        Ok(())
    }
}

impl Exchange<'_> {
    fn run(mut self, jobs: &mut [ReadJob<'_>], limits: &Limits<'_>) -> Result<(), FabricError> {
        let mut patience = Patience::new();
        while !self.flights.is_empty() || self.left > 0 {
            limits.check(self.shared)?;
            if let Some(asked) = &mut self.asked
                && asked.test().map_err(failed)?
            {
                self.asked = None;
            }
            self.expect_more()?;
            let came = match self.flights.front_mut() {
                Some(first) => first.test().map_err(failed)?,
                None => false,
            };
            if !came {
                patience.pause();
                continue;
            }
            patience = Patience::new();
            if let Some(flight) = self.flights.pop_front() {
                self.take(flight, jobs)?;
            }
        }
        Ok(())
    }

    fn expect_more(&mut self) -> Result<(), FabricError> {
        while self.begun && self.left > 0 && self.flights.len() < CHUNKS_AHEAD {
            let next = self.left.min(CHUNK_BYTES);
            let flight = self.shared.mail.expect(self.from, self.tag, vec![0; next]);
            self.flights.push_back(flight.map_err(failed)?);
            self.left -= next;
        }
        Ok(())
    }

    /// The status, or the next bytes.
    fn take(&mut self, flight: Flight, jobs: &mut [ReadJob<'_>]) -> Result<(), FabricError> {
        let received = flight.received();
        let mut bytes = flight.into_bytes();
        if !self.begun {
            self.begun = true;
            if received > 0 {
                self.left = 0;
                bytes.truncate(received);
                let reason = String::from_utf8_lossy(&bytes).into_owned();
                return Err(failed(format!("the peer refused: {reason}")));
            }
            return Ok(());
        }
        if received != bytes.len() {
            let due = bytes.len();
            return Err(failed(format!(
                "{received} bytes came where {due} were due"
            )));
        }
        let mut rest = &bytes[..];
        while !rest.is_empty()
            && let Some(place) = self.places.front_mut()
        {
            let (now, later) = rest.split_at(place.target.len().min(rest.len()));
            let end = place.target.start + now.len();
            jobs[place.job].page.as_bytes_mut()[place.target.start..end].copy_from_slice(now);
            place.target.start = end;
            if place.target.is_empty() {
                self.places.pop_front();
            }
            rest = later;
        }
        Ok(())
    }
}

impl Drop for Exchange<'_> {
    /// What is still to come goes to the thread that serves; the tag is free once it has come.
    fn drop(&mut self) {
        if self.flights.is_empty() && self.left == 0 {
            self.shared.give_tag_back(self.tag);
            return;
        }
        self.shared.drains().push(Drain {
            from: self.from,
            tag: self.tag,
            begun: self.begun,
            flights: std::mem::take(&mut self.flights),
            left: self.left,
        });
    }
}

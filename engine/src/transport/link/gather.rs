//! How pieces of the host's memory leave by the stream: gathered into few system calls, and summed while a cache has them.
//!
//! Frames are put together out of slices of pages; nothing is copied here. What is summed leaves before it has left the cache.

use std::io::IoSlice;

use smallvec::SmallVec;

use super::frame::Trailer;
use super::writer::{SLICES_MAX, WriteEnd, Writer, head, kind_of};
use crate::page::Page;
use crate::transport::checksum::{Summing, announce};
use crate::transport::{Runs, Write};

/// Bytes that are summed, and then sent in one system call, but for a longer write: what a core's second cache still holds when
/// the kernel copies it.
const SUMMED_BYTES_AT_ONCE_MAX: usize = 256 << 10;

impl Writer<'_> {
    /// Pieces of pages in the host's memory, in as few system calls as they take; what is summed here leaves before it has left
    /// the cache.
    pub(super) fn pieces(&self, writes: &[Write]) -> Result<(), WriteEnd> {
        let mut heads = Vec::new();
        let heads_end = writes.iter().enumerate().map(|(index, write)| {
            let more = index + 1 < writes.len();
            head(
                &mut heads,
                (kind_of(write), more),
                write,
                write.total_bytes(),
            );
            heads.len()
        });
        let ends: Vec<usize> = heads_end.collect();
        let starts = std::iter::once(0).chain(ends.iter().copied());
        let heads = starts.zip(&ends).map(|(start, end)| &heads[start..*end]);
        let mut trailers = vec![0; writes.iter().map(trailer_bytes).sum()];
        let mut rest = &mut trailers[..];
        let mut gathered = Gathered::default();
        for (index, head) in heads.enumerate() {
            let write = &writes[index];
            let (trailer, later) = rest.split_at_mut(trailer_bytes(write));
            rest = later;
            gathered.add(self, head)?;
            self.payload((write, writes.get(index + 1)), trailer, &mut gathered)?;
        }
        gathered.leave(self)
    }

    /// The stretches of pages in the host's memory, and the trailer where there is one. What is summed next is fetched meanwhile.
    fn payload<'b>(
        &self,
        (write, next): (&'b Write, Option<&Write>),
        trailer: &'b mut [u8],
        gathered: &mut Gathered<'b>,
    ) -> Result<(), WriteEnd> {
        let Some(at) = write.sum_at else {
            let mut stretches = write.stretches();
            return stretches
                .try_for_each(|(page, range)| gathered.add(self, &page.as_bytes()[range]));
        };
        let mut sums = SmallVec::new();
        for (index, source) in write.sources.iter().enumerate() {
            let following = write.sources.get(index + 1).map(|page| (page, &write.runs));
            let of_next = || next.and_then(|next| Some((next.sources.first()?, &next.runs)));
            if let Some((page, runs)) = following.or_else(of_next) {
                announce_source(page, runs);
            }
            let source = source.as_bytes();
            let stretches = write.runs.stretches().map(|(range, _)| &source[range]);
            let mut summing = Summing::default();
            for part in stretches.flat_map(|stretch| stretch.chunks(SUMMED_BYTES_AT_ONCE_MAX)) {
                gathered.make_room(self, part.len())?;
                summing.update(part);
                gathered.add(self, part)?;
            }
            sums.push(summing.finish());
        }
        Trailer::of(at, sums).encode_to(trailer);
        gathered.add(self, trailer)
    }
}

/// Slices that leave in the next system call.
#[derive(Debug, Default)]
struct Gathered<'b> {
    slices: Vec<IoSlice<'b>>,
    /// Bytes of them that were summed.
    summed: usize,
}

impl<'b> Gathered<'b> {
    fn add(&mut self, to: &Writer<'_>, slice: &'b [u8]) -> Result<(), WriteEnd> {
        if self.slices.len() == SLICES_MAX {
            self.leave(to)?;
        }
        if !slice.is_empty() {
            self.slices.push(IoSlice::new(slice));
        }
        Ok(())
    }

    /// Has what was summed leave, where so many bytes more would be too many for the cache.
    fn make_room(&mut self, to: &Writer<'_>, bytes: usize) -> Result<(), WriteEnd> {
        if self.summed > 0 && self.summed + bytes > SUMMED_BYTES_AT_ONCE_MAX {
            self.leave(to)?;
        }
        self.summed += bytes;
        Ok(())
    }

    fn leave(&mut self, to: &Writer<'_>) -> Result<(), WriteEnd> {
        to.send_some(&mut self.slices)?;
        self.slices.clear();
        self.summed = 0;
        Ok(())
    }
}

/// Of the trailer behind a write's payload.
pub(super) fn trailer_bytes(write: &Write) -> usize {
    write
        .sum_at
        .map_or(0, |_| Trailer::bytes(write.sources.len()))
}

/// Has the beginning of what is summed next fetched.
fn announce_source(page: &Page, runs: &Runs) {
    if let Some((first, _)) = runs.stretches().next() {
        let bytes = &page.as_bytes()[first];
        announce(bytes.as_ptr(), bytes.len());
    }
}

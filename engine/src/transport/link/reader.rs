//! The receiving half of a connection: frames in, bytes straight into registered pages, events out.
//!
//! Frames that came together are handled together: what their order allows is reported once.
//!
//! Nothing a peer says is believed before it is checked: a length buys no memory until the bytes are there, and a
//! write whose region is gone is read into a scratch buffer and forgotten. Every read has a deadline.

use std::io::{ErrorKind, IoSliceMut, Read};
use std::net::TcpStream;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::connection::{Connection, Rousing};
use super::frame::{
    DESCRIPTOR_BYTES_MAX, Descriptor, FrameError, HEADER_BYTES, Header, Kind, Trailer,
};
use super::pulls::{Order, Pull};
use super::regions::{Regions, Row, Taken, pages_released};
use super::{LinkTuning, TransportEvent, socket};
use crate::page::Page;
use crate::transport::checksum::{Summing, WARM_BYTES};
use crate::transport::runs::RUN_BYTES;
use crate::transport::vigil::Vigil;
use crate::transport::{
    Found, Note, ROW_PAGES_MAX, RegionId, Runs, RunsError, TransportSink, WriteOutcome,
};

/// Most that is read, or allocated, before the bytes before it have come.
const CHUNK_BYTES: usize = 64 << 10;

/// Stretches of this length are worth a system call each.
const COARSE_BYTES: usize = 16 << 10;

/// Events and orders that wait for frames of their batch at most.
const TOGETHER_MAX: usize = 64;

/// Room for what is read ahead; where only small frames come, as much as that.
pub(super) const AHEAD_BYTES: usize = 16 << 10;

/// Read ahead where bytes for pages follow, until it is known what precedes them: those are better read into the pages.
const AHEAD_BYTES_BEFORE_PAGES: usize = 256;

/// Bytes that are copied to a device at once.
const ABROAD_BYTES: usize = 1 << 20;

/// Why a connection's reading ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadEnd {
    #[error("closed by the peer")]
    ByPeer,
    #[error("closed by the peer within a frame")]
    Truncated,
    #[error("no byte for {0:?} within a frame")]
    Stalled(Duration),
    #[error("silent for {0:?}")]
    Silent(Duration),
    #[error("no greeting within {0:?}")]
    NoGreeting(Duration),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("{0:?} frame where a greeting was expected")]
    NotGreeted(Kind),
    #[error("second greeting")]
    GreetedTwice,
    #[error("greets as `{there}` transport, this is `{here}`")]
    OtherTransport { there: String, here: &'static str },
    #[error("{0:?} frame though bytes come with the stream here")]
    NothingToPull(Kind),
    #[error("more descriptors than writes may be open")]
    TooManyPulls,
    #[error("malformed descriptor")]
    Descriptor,
    #[error("{0} bytes of numbers, eight each expected")]
    Acknowledgement(usize),
    #[error("end of a write {0} that was not described")]
    NotDescribed(u64),
    #[error("write up to byte {end} of a region of {bytes}")]
    OutOfRange { end: usize, bytes: u64 },
    #[error("{0}")]
    Runs(#[from] RunsError),
    #[error("runs of {runs} bytes in a frame of {payload}")]
    Payload { runs: usize, payload: u64 },
    #[error("a sum outside of its note")]
    Trailer,
    #[error("region still written by another peer after {0:?}")]
    Occupied(Duration),
    #[error("a page on a device cannot be written: {0}")]
    Device(std::io::Error),
    #[error("{0}")]
    Io(std::io::Error),
}

/// When a read gives up.
#[derive(Debug, Clone, Copy)]
enum Patience {
    /// Between frames: pings are due.
    Idle,
    /// Within a frame: bytes are due.
    Frame,
    /// The greeting as a whole is due.
    Greeting(Instant),
}

/// What a peer says first.
#[derive(Debug)]
pub(super) struct Greeting {
    /// Where it listens, for people.
    pub(super) address: String,
    /// Its fabric's address; empty where there is no fabric.
    pub(super) fabric: Vec<u8>,
}

/// Whom a reader works for.
#[derive(Clone, Copy)]
pub(super) struct Receiving<'a> {
    pub(super) connection: &'a Connection,
    pub(super) regions: &'a Regions,
    pub(super) sink: &'a TransportSink,
    /// Whether somebody pulls what the peer describes.
    pub(super) pulls: bool,
    /// Whether pieces are summed.
    pub(super) sum: bool,
}

/// What frames of one batch have brought so far.
#[derive(Debug, Default)]
struct Together {
    events: Vec<TransportEvent>,
    orders: Vec<Order>,
}

impl Together {
    /// Hands it over.
    fn deliver(&mut self, to: &Receiving<'_>) -> Result<(), ReadEnd> {
        if !self.events.is_empty() {
            (to.sink)(std::mem::take(&mut self.events));
        }
        let orders = std::mem::take(&mut self.orders);
        if orders.is_empty() || to.connection.pulls.push(orders) {
            Ok(())
        } else {
            Err(ReadEnd::TooManyPulls)
        }
    }
}

/// Reads one connection.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    stream: &'a TcpStream,
    tuning: &'a LinkTuning,
    /// Bytes that came with others.
    ahead: Box<[u8]>,
    /// How many of these are asked for: where bytes for pages follow, as many as preceded the last of those. So the
    /// pieces of a hand-off, which are alike, go where they belong from their first byte on.
    ahead_bytes: usize,
    /// Which of them nobody has had yet.
    unread: Range<usize>,
    vigil: Vigil,
}

impl<'a> Reader<'a> {
    /// Takes the socket's receiving half.
    pub(super) fn new(stream: &'a TcpStream, tuning: &'a LinkTuning) -> Result<Self, ReadEnd> {
        stream
            .set_read_timeout(Some(tuning.tick()))
            .map_err(ReadEnd::Io)?;
        Ok(Self {
            stream,
            tuning,
            ahead: Box::default(),
            ahead_bytes: 0,
            unread: 0..0,
            vigil: Vigil::of(tuning.vigil),
        })
    }

    /// The peer's greeting; it has to be of the same kind of transport. What follows it stays unread.
    pub(super) fn greeting(&mut self, here: &'static str) -> Result<Greeting, ReadEnd> {
        let patience = Patience::Greeting(Instant::now() + self.tuning.handshake_timeout);
        let header = self.header(patience)?;
        if header.kind != Kind::Hello {
            return Err(ReadEnd::NotGreeted(header.kind));
        }
        let there = printable(&self.payload(u64::from(header.note_bytes), patience)?);
        if there != here {
            return Err(ReadEnd::OtherTransport { there, here });
        }
        let fabric = self.payload(header.extra_bytes, patience)?;
        let address = printable(&self.payload(header.payload_bytes, patience)?);
        Ok(Greeting { address, fabric })
    }

    /// Carries frames until the end.
    pub(super) fn run(&mut self, to: &Receiving<'_>) -> Result<(), ReadEnd> {
        self.ahead = vec![0; AHEAD_BYTES].into_boxed_slice();
        self.ahead_bytes = if to.pulls {
            AHEAD_BYTES
        } else {
            AHEAD_BYTES_BEFORE_PAGES
        };
        let mut together = Together::default();
        let end = self.carry(to, &mut together);
        // What came before the end counts.
        let delivered = together.deliver(to);
        end.and(delivered)
    }

    fn carry(&mut self, to: &Receiving<'_>, together: &mut Together) -> Result<(), ReadEnd> {
        loop {
            let header = self.header(Patience::Idle)?;
            let kind = header.kind;
            match kind {
                Kind::Ping => {}
                Kind::Rouse => roused(to),
                Kind::Hello => return Err(ReadEnd::GreetedTwice),
                Kind::Message => {
                    let message = self.payload(header.payload_bytes, Patience::Frame)?;
                    together.events.push(TransportEvent::Message {
                        peer: to.connection.id,
                        message,
                    });
                }
                Kind::Write | Kind::Summed => self.write(&header, to, &mut together.events)?,
                Kind::Arena | Kind::Pull if !to.pulls => {
                    return Err(ReadEnd::NothingToPull(kind));
                }
                Kind::Arena => {
                    let key = self.payload(header.payload_bytes, Patience::Frame)?;
                    let number = header.region;
                    together.orders.push(Order::Arena { number, key });
                }
                Kind::Pull => together.orders.push(Order::Pull(self.pull(&header)?)),
                Kind::Pulled => {
                    let numbers = self.payload(header.payload_bytes, Patience::Frame)?;
                    pulled(&numbers, to, &mut together.events)?;
                }
            }
            let count = together.events.len() + together.orders.len();
            if !header.more || count >= TOGETHER_MAX {
                together.deliver(to)?;
            }
        }
    }

    fn pull(&mut self, header: &Header) -> Result<Pull, ReadEnd> {
        let note = self.note(header)?;
        let runs = self.runs(header)?;
        let mut descriptor = [0; DESCRIPTOR_BYTES_MAX];
        let length = usize::try_from(header.payload_bytes).unwrap_or(usize::MAX);
        let descriptor = descriptor.get_mut(..length).ok_or(ReadEnd::Descriptor)?;
        self.fill(descriptor, Patience::Frame)?;
        Ok(Pull {
            transfer: header.transfer,
            region: header.region,
            key: header.key,
            note,
            runs,
            descriptor: Descriptor::decode(descriptor).ok_or(ReadEnd::Descriptor)?,
        })
    }

    fn note(&mut self, header: &Header) -> Result<Note, ReadEnd> {
        let mut note = Note::from_elem(0, usize::from(header.note_bytes));
        self.fill(&mut note, Patience::Frame)?;
        Ok(note)
    }

    /// The runs of a write: mostly one, which takes no memory.
    fn runs(&mut self, header: &Header) -> Result<Runs, ReadEnd> {
        let mut one = [0; RUN_BYTES];
        if header.extra_bytes == one.len() as u64 {
            self.fill(&mut one, Patience::Frame)?;
            return Ok(Runs::decode(&one)?);
        }
        Ok(Runs::decode(
            &self.payload(header.extra_bytes, Patience::Frame)?,
        )?)
    }

    fn write(
        &mut self,
        header: &Header,
        to: &Receiving<'_>,
        events: &mut Vec<TransportEvent>,
    ) -> Result<(), ReadEnd> {
        let regions = to.regions;
        let mut note = self.note(header)?;
        let runs = self.runs(header)?;
        let row = row_of(header, &runs)?;
        let trailer_bytes = match header.kind {
            Kind::Summed => Trailer::bytes(row.count),
            _ => 0,
        };
        if !to.pulls {
            let before = trailer_bytes + HEADER_BYTES + note.len() + runs.encoded_bytes();
            self.ahead_bytes = before.min(AHEAD_BYTES);
        }
        let patience = self.tuning.stall_timeout;
        let end = runs.target_end();
        let mut pages = match regions.take(row, header.key, end, patience) {
            Taken::Pages(pages) => pages,
            Taken::Stale => {
                let bytes = header.payload_bytes.saturating_add(trailer_bytes as u64);
                return self.discard(bytes);
            }
            Taken::Occupied => return Err(ReadEnd::Occupied(patience)),
            Taken::OutOfRange { bytes } => return Err(ReadEnd::OutOfRange { end, bytes }),
        };
        let last = pages.len() - 1;
        let scattered = pages.iter_mut().enumerate().map(|(index, page)| {
            let ahead_bytes = if index == last { self.ahead_bytes } else { 0 };
            self.scatter((&runs, ahead_bytes), page, Summing::wanted(to.sum))
        });
        let checksums: Result<Found, _> = scattered.collect();
        let filled =
            checksums.and_then(|sums| self.complete(&mut note, trailer_bytes).map(|()| sums));
        let released = regions.put_back(header.region, pages);
        if !released.is_empty() {
            events.extend(pages_released(released));
            return filled.map(drop);
        }
        events.push(TransportEvent::Landed {
            peer: to.connection.id,
            region: RegionId(header.region),
            count: row.count,
            runs,
            transfer: header.transfer,
            note,
            folds: Found::new(),
            checksums: filled?,
        });
        Ok(())
    }

    /// Reads a payload into the stretches of a page: each by itself where they are long, else through a buffer. Returns
    /// the payload's checksum.
    fn scatter(
        &mut self,
        (runs, ahead_bytes): (&Runs, usize),
        page: &mut Page,
        mut summing: Summing,
    ) -> Result<Option<u64>, ReadEnd> {
        if page.is_on_device() {
            return self.scatter_abroad(runs, page, summing);
        }
        let bytes = page.as_bytes_mut();
        if runs.is_coarse(COARSE_BYTES) {
            return self.scatter_coarse((runs, ahead_bytes), bytes, summing);
        }
        let mut buffer = vec![0; CHUNK_BYTES.min(runs.total_bytes())];
        let mut unread = runs.total_bytes();
        let mut ready = 0..0;
        for (_, target) in runs.stretches() {
            let mut target = &mut bytes[target];
            while !target.is_empty() {
                if ready.is_empty() {
                    ready = 0..buffer.len().min(unread);
                    unread -= ready.len();
                    self.fill(&mut buffer[ready.clone()], Patience::Frame)?;
                    summing.update(&buffer[ready.clone()]);
                }
                let count = ready.len().min(target.len());
                let (now, later) = target.split_at_mut(count);
                now.copy_from_slice(&buffer[ready.start..ready.start + count]);
                ready.start += count;
                target = later;
            }
        }
        Ok(summing.made())
    }

    /// Each stretch by itself; with the end of the last one may come as much of what follows.
    fn scatter_coarse(
        &mut self,
        (runs, ahead_bytes): (&Runs, usize),
        page: &mut [u8],
        mut summing: Summing,
    ) -> Result<Option<u64>, ReadEnd> {
        let mut left = runs.total_bytes();
        for (_, target) in runs.stretches() {
            for part in page[target].chunks_mut(WARM_BYTES) {
                left -= part.len();
                let beyond = if left == 0 { ahead_bytes } else { 0 };
                self.fill_and_beyond(part, beyond, Patience::Frame)?;
                summing.update(part);
            }
        }
        Ok(summing.made())
    }

    /// As [`Self::scatter`], into a page of a device: through a buffer of the host's.
    fn scatter_abroad(
        &mut self,
        runs: &Runs,
        page: &mut Page,
        mut summing: Summing,
    ) -> Result<Option<u64>, ReadEnd> {
        let longest = runs.as_slice().iter().map(|run| run.bytes).max();
        let mut buffer = vec![0; ABROAD_BYTES.min(longest.unwrap_or(0))];
        for (_, target) in runs.stretches() {
            for start in target.clone().step_by(ABROAD_BYTES) {
                let part = &mut buffer[..ABROAD_BYTES.min(target.end - start)];
                self.fill(part, Patience::Frame)?;
                summing.update(part);
                page.write(start, part).map_err(ReadEnd::Device)?;
            }
        }
        Ok(summing.made())
    }

    /// Puts what a trailer brings into a note, where one comes.
    fn complete(&mut self, note: &mut [u8], trailer_bytes: usize) -> Result<(), ReadEnd> {
        if trailer_bytes == 0 {
            return Ok(());
        }
        let mut trailer = [0; Trailer::bytes(ROW_PAGES_MAX)];
        let trailer = &mut trailer[..trailer_bytes];
        self.fill(trailer, Patience::Frame)?;
        let complete = Trailer::complete(trailer, note);
        complete.then_some(()).ok_or(ReadEnd::Trailer)
    }

    fn header(&mut self, patience: Patience) -> Result<Header, ReadEnd> {
        let mut bytes = [0; HEADER_BYTES];
        self.fill(&mut bytes[..1], patience)
            .map_err(|end| match end {
                ReadEnd::Truncated => ReadEnd::ByPeer,
                other => other,
            })?;
        let rest = match patience {
            Patience::Idle => Patience::Frame,
            other => other,
        };
        self.fill(&mut bytes[1..], rest)?;
        Ok(Header::decode(&bytes)?)
    }

    /// A payload for us: memory grows only as bytes come.
    fn payload(&mut self, bytes: u64, patience: Patience) -> Result<Vec<u8>, ReadEnd> {
        let mut left = bytes;
        let mut payload = Vec::new();
        while left > 0 {
            let chunk = usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
            let start = payload.len();
            payload.resize(start + chunk, 0);
            self.fill(&mut payload[start..], patience)?;
            left -= chunk as u64;
        }
        Ok(payload)
    }

    fn discard(&mut self, bytes: u64) -> Result<(), ReadEnd> {
        let mut scratch = vec![0; CHUNK_BYTES];
        let mut left = bytes;
        while left > 0 {
            let chunk = usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
            self.fill(&mut scratch[..chunk], Patience::Frame)?;
            left -= chunk as u64;
        }
        Ok(())
    }

    /// Fills a buffer from what was read ahead and then from the stream: small ones with what follows them.
    fn fill(&mut self, buffer: &mut [u8], patience: Patience) -> Result<(), ReadEnd> {
        self.fill_and_beyond(buffer, 0, patience)
    }

    /// The same, with up to `beyond` bytes more where they have come already.
    fn fill_and_beyond(
        &mut self,
        mut buffer: &mut [u8],
        beyond: usize,
        patience: Patience,
    ) -> Result<(), ReadEnd> {
        let mut last_byte = None;
        loop {
            let count = buffer.len().min(self.unread.len());
            let (now, later) = buffer.split_at_mut(count);
            now.copy_from_slice(&self.ahead[self.unread.start..][..count]);
            self.unread.start += count;
            buffer = later;
            if buffer.is_empty() {
                return Ok(());
            }
            let waited_since = *last_byte.get_or_insert_with(|| {
                self.vigil.look(|| socket::has_bytes(self.stream));
                Instant::now()
            });
            match self.read(buffer, beyond) {
                Ok(0) => return Err(ReadEnd::Truncated),
                Ok(count) => {
                    buffer = &mut buffer[count..];
                    last_byte = None;
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                        self.check_silence(waited_since, patience)?;
                    }
                    _ => return Err(ReadEnd::Io(error)),
                },
            }
            if let Patience::Greeting(deadline) = patience
                && Instant::now() >= deadline
            {
                return Err(ReadEnd::NoGreeting(self.tuning.handshake_timeout));
            }
        }
    }

    /// One read, when nothing is left of what was read ahead. Returns how much of the buffer it has filled, which is nothing at
    /// the end of the stream only.
    fn read(&mut self, buffer: &mut [u8], beyond: usize) -> std::io::Result<usize> {
        let direct = buffer.len() >= self.ahead_bytes;
        let beyond = if direct {
            beyond
        } else {
            self.ahead_bytes - buffer.len()
        };
        let wanted = buffer.len();
        let mut stream = self.stream;
        let count = if beyond == 0 {
            stream.read(buffer)?
        } else {
            let ahead = IoSliceMut::new(&mut self.ahead[..beyond]);
            stream.read_vectored(&mut [IoSliceMut::new(buffer), ahead])?
        };
        self.unread = 0..count.saturating_sub(wanted);
        Ok(count.min(wanted))
    }

    fn check_silence(&self, last_byte: Instant, patience: Patience) -> Result<(), ReadEnd> {
        let silence = last_byte.elapsed();
        match patience {
            Patience::Idle if silence >= self.tuning.silence_limit => {
                Err(ReadEnd::Silent(self.tuning.silence_limit))
            }
            Patience::Frame if silence >= self.tuning.stall_timeout => {
                Err(ReadEnd::Stalled(self.tuning.stall_timeout))
            }
            _ => Ok(()),
        }
    }
}

/// The regions that a write is for: as many as its payload has the runs' bytes.
fn row_of(header: &Header, runs: &Runs) -> Result<Row, ReadEnd> {
    let (runs, payload) = (runs.total_bytes(), header.payload_bytes);
    let count = match payload.checked_div(runs as u64) {
        None => 1,
        Some(count) => usize::try_from(count).unwrap_or(usize::MAX),
    };
    let whole = runs
        .checked_mul(count)
        .is_some_and(|bytes| bytes as u64 == payload);
    if !whole || !(1..=ROW_PAGES_MAX).contains(&count) {
        return Err(ReadEnd::Payload { runs, payload });
    }
    let first = header.region;
    Ok(Row { first, count })
}

/// Something comes soon: whoever will have to do with it may wake up already.
fn roused(to: &Receiving<'_>) {
    if to.connection.vigil.is_held() {
        (to.sink)(Vec::new());
        to.connection.rouse(Rousing::Back);
    }
}

/// The peer has read what we described, or does not want it.
fn pulled(
    numbers: &[u8],
    to: &Receiving<'_>,
    events: &mut Vec<TransportEvent>,
) -> Result<(), ReadEnd> {
    let (numbers, []) = numbers.as_chunks::<8>() else {
        return Err(ReadEnd::Acknowledgement(numbers.len()));
    };
    let sequences: Vec<u64> = numbers.iter().map(|n| u64::from_le_bytes(*n)).collect();
    let (landed, unknown) = to.connection.land(&sequences);
    events.extend(landed.iter().map(|flying| TransportEvent::WriteDone {
        peer: to.connection.id,
        transfer: flying.transfer,
        outcome: WriteOutcome::Sent,
    }));
    // The sources are let go before that is reported.
    drop(landed);
    unknown.map_or(Ok(()), |sequence| Err(ReadEnd::NotDescribed(sequence)))
}

/// A peer's text for our messages.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().filter(|c| !c.is_control()).collect()
}

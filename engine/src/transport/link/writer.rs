//! The sending half of a connection: the queue out, bytes straight from shared pages, completions in.
//!
//! What a checksum is wanted of is summed here, a cache's worth at a time before the kernel copies it; the sum follows it.
//!
//! Header and payload leave in one system call, and so do short writes that wait together. A peer that takes no byte for the stall time-out ends the
//! connection. Faults of a test's plan happen here, where the wire would make them: in the bytes of a stream; and for
//! bytes that the peer pulls, in a copy that it pulls instead (flip), or within the frame that describes them (cut, stall).
//!
//! Pages are copied into the socket. `sendfile` from an arena's memory file would leave that to the receiver, which is the
//! busier side (measured on loopback: 273 + 298 ms of processor time a gigabyte so, 231 + 363 with `sendfile`); and a page
//! would be in doubt until the peer said that it has read it.

use std::io::{ErrorKind, IoSlice, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection::{Connection, InFlight, Kept, Outgoing};
use super::frame::{Header, Kind, PULLED_AT_ONCE_MAX, Trailer, make_last};
use super::gather::trailer_bytes;
use super::lender::{Lender, Lent, Together, Way, gather_into};
use super::reader::AHEAD_BYTES;
use super::{LinkTuning, TransportEvent, Write};
use crate::transport::checksum::sum;
use crate::transport::fault::{Fault, Faults};
use crate::transport::numbered::NumberedSet;
use crate::transport::{TransferId, TransportSink, WriteOutcome};

/// Slices that one system call takes at most (`IOV_MAX` of Linux).
pub(super) const SLICES_MAX: usize = 1024;

/// Writes that are described to the peer, or sent, in one go at most.
const AT_ONCE_MAX: usize = 64;

/// Bytes that are sent in one go at most, but for a longer write: a cancel reaches what is still queued, so what takes its
/// time on the wire must not leave the queue early.
const STREAM_BYTES_AT_ONCE_MAX: usize = 2 << 20;

/// Bytes that are copied from a device at once.
const ABROAD_BYTES: usize = 1 << 20;

/// Why a connection's writing ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteEnd {
    #[error("no byte taken for {0:?}")]
    Stalled(Duration),
    #[error("cut by a test's fault plan")]
    Cut,
    #[error("stalled by a test's fault plan")]
    StalledByPlan,
    #[error("no spoilt copy for a test's fault plan: {0}")]
    NoCopy(std::io::Error),
    #[error("a page on a device cannot be read: {0}")]
    Device(std::io::Error),
    #[error("{0}")]
    Io(std::io::Error),
}

/// Reports that writes are over. Their sources were let go.
fn complete(
    connection: &Connection,
    sink: &TransportSink,
    transfers: Vec<TransferId>,
    outcome: WriteOutcome,
) {
    if transfers.is_empty() {
        return;
    }
    let peer = connection.id;
    let events = transfers
        .into_iter()
        .map(|transfer| TransportEvent::WriteDone {
            peer,
            transfer,
            outcome,
        });
    sink(events.collect());
}

/// Writes one connection.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    stream: &'a TcpStream,
    tuning: &'a LinkTuning,
    faults: &'a Faults,
    lender: Option<&'a Lender>,
    /// Arenas that the peer knows.
    told: NumberedSet<u64>,
    /// Writes of the frames that go out together, by sequence number.
    booked: Vec<(u64, InFlight)>,
    /// Frames that go out together.
    frames: Vec<u8>,
    /// Where the last of them begins that says that more comes.
    last_frame: Option<usize>,
}

impl<'a> Writer<'a> {
    /// Takes the socket's sending half.
    pub(super) fn new(
        stream: &'a TcpStream,
        tuning: &'a LinkTuning,
        faults: &'a Faults,
        lender: Option<&'a Lender>,
    ) -> Result<Self, WriteEnd> {
        stream
            .set_write_timeout(Some(tuning.tick()))
            .map_err(WriteEnd::Io)?;
        Ok(Self {
            stream,
            tuning,
            faults,
            lender,
            told: NumberedSet::default(),
            booked: Vec::new(),
            frames: Vec::new(),
            last_frame: None,
        })
    }

    /// Sends our greeting.
    pub(super) fn greet(&self, name: &str, address: &str, fabric: &[u8]) -> Result<(), WriteEnd> {
        let header = Header {
            note_bytes: length_of(name.as_bytes()),
            extra_bytes: fabric.len() as u64,
            ..Header::plain(Kind::Hello, address.len() as u64)
        };
        self.send([
            &header.encode()[..],
            name.as_bytes(),
            fabric,
            address.as_bytes(),
        ])
    }

    /// Carries the queue until the end; every write that it took gets its completion, sent or not.
    pub(super) fn run(&mut self, connection: &Arc<Connection>, sink: &TransportSink) {
        let bytes_max = self.lender.map_or(STREAM_BYTES_AT_ONCE_MAX, |_| usize::MAX);
        let at_once = (AT_ONCE_MAX, bytes_max);
        loop {
            let outgoing = connection.next(self.tuning.ping_interval(), at_once);
            // Kept until a connection is closed whose last frame is torn: nobody sends behind that.
            let _writing = connection.outlet.writing();
            let sent = match outgoing {
                Outgoing::Closed => break,
                Outgoing::Roused => Ok(()),
                Outgoing::Idle => self.send([&Header::plain(Kind::Ping, 0).encode()[..]]),
                Outgoing::Message(message) => {
                    let header = Header::plain(Kind::Message, message.len() as u64);
                    self.send([&header.encode()[..], &message])
                }
                Outgoing::Cancelled(transfers) => {
                    complete(connection, sink, transfers, WriteOutcome::Cancelled);
                    Ok(())
                }
                Outgoing::Pulled(sequences) => self.acknowledge(&sequences),
                Outgoing::Writes(writes) => match self.lender {
                    Some(lender) => self.lend_all(lender, writes, connection, sink),
                    None => self.stream_all(writes, connection, sink),
                },
            };
            if let Err(end) = sent {
                connection.close(&end.to_string());
                break;
            }
        }
    }

    fn acknowledge(&self, sequences: &[u64]) -> Result<(), WriteEnd> {
        sequences.chunks(PULLED_AT_ONCE_MAX).try_for_each(|some| {
            let numbers: Vec<u8> = some
                .iter()
                .flat_map(|number| number.to_le_bytes())
                .collect();
            let header = Header::plain(Kind::Pulled, numbers.len() as u64);
            self.send([&header.encode()[..], &numbers])
        })
    }

    /// Starts writes, in order; what cannot start goes back into the queue.
    fn lend_all(
        &mut self,
        lender: &Lender,
        writes: Vec<Write>,
        connection: &Arc<Connection>,
        sink: &TransportSink,
    ) -> Result<(), WriteEnd> {
        let mut writes = writes.into_iter();
        let mut sent = Ok(());
        while sent.is_ok() {
            match lender.gathered_together(writes.as_slice(), connection) {
                Together::Apart => {}
                Together::Pull(lent) => {
                    let mut some = writes.by_ref().take(lent.len()).zip(lent);
                    sent = some
                        .try_for_each(|(write, lent)| self.describe(write, lent, connection))
                        // The peer reads one window while the next is gathered.
                        .and_then(|()| self.flush(connection));
                    continue;
                }
                Together::Later => {
                    connection.put_back(writes.collect());
                    return self.flush(connection);
                }
                Together::Failed(error) => {
                    sent = Err(WriteEnd::Device(error));
                    continue;
                }
            }
            let Some(write) = writes.next() else {
                break;
            };
            match lender.way(&write, connection) {
                Way::Later => {
                    connection.put_back(std::iter::once(write).chain(writes).collect());
                    return self.flush(connection);
                }
                Way::Failed(error) => {
                    // Its completion comes with the end.
                    connection.put_back(vec![write]);
                    sent = Err(WriteEnd::Device(error));
                }
                Way::Pull(lent) => {
                    sent = self.describe(write, lent, connection);
                    // The peer reads no more at once, and begins with the first while the others are described.
                    if sent.is_ok() && self.frames.len() >= AHEAD_BYTES {
                        sent = self.flush(connection);
                    }
                }
                Way::Stream => {
                    let described = self.flush(connection);
                    sent = described.and_then(|()| self.stream_all(vec![write], connection, sink));
                }
            }
        }
        let sent = sent.and_then(|()| self.flush(connection));
        // What was described and not sent ends with the connection.
        connection.take_off(&mut self.booked);
        if writes.len() > 0 {
            connection.put_back(writes.collect());
        }
        sent
    }

    /// Sends writes whose bytes follow in the stream, in order; what was not begun when that fails goes back into the queue.
    fn stream_all(
        &self,
        writes: Vec<Write>,
        connection: &Connection,
        sink: &TransportSink,
    ) -> Result<(), WriteEnd> {
        let mut plain = Vec::with_capacity(writes.len());
        let mut writes = writes.into_iter();
        let mut sent = Ok(());
        while sent.is_ok() {
            let Some(write) = writes.next() else {
                return self.stream(plain, Self::pieces, connection, sink);
            };
            let fault = self.faults.next(write.transfer, write.total_bytes());
            if fault.is_none() && !write.is_on_device() {
                plain.push(write);
                continue;
            }
            let before = std::mem::take(&mut plain);
            sent = self.stream(before, Self::pieces, connection, sink);
            let piece = |writer: &Self, some: &[Write]| {
                some.iter()
                    .try_for_each(|write| writer.piece(write, fault, connection))
            };
            sent = sent.and_then(|()| self.stream(vec![write], piece, connection, sink));
        }
        connection.put_back(writes.collect());
        sent
    }

    /// Sends some writes and completes them, sent or not.
    fn stream(
        &self,
        writes: Vec<Write>,
        send: impl FnOnce(&Self, &[Write]) -> Result<(), WriteEnd>,
        connection: &Connection,
        sink: &TransportSink,
    ) -> Result<(), WriteEnd> {
        let sent = send(self, &writes);
        let transfers = writes.iter().map(|write| write.transfer).collect();
        drop(writes);
        let outcome = match sent {
            Ok(()) => WriteOutcome::Sent,
            Err(_) => WriteOutcome::Lost,
        };
        complete(connection, sink, transfers, outcome);
        sent
    }

    /// Sends the frames that were put together. What they describe is booked first, as the peer may be quick.
    fn flush(&mut self, connection: &Connection) -> Result<(), WriteEnd> {
        connection.take_off(&mut self.booked);
        if let Some(start) = self.last_frame.take() {
            make_last(&mut self.frames[start..]);
        }
        let sent = self.send([&self.frames[..]]);
        self.frames.clear();
        sent
    }

    /// Completes the writes that a closed connection never started.
    pub(super) fn finish(connection: &Connection, sink: &TransportSink) {
        let left = connection.leftovers();
        complete(connection, sink, left.cancelled, WriteOutcome::Cancelled);
        complete(connection, sink, left.lost, WriteOutcome::Lost);
    }

    /// Describes a write that the peer will pull, with the next [`Writer::flush`].
    fn describe(
        &mut self,
        write: Write,
        mut lent: Lent,
        connection: &Connection,
    ) -> Result<(), WriteEnd> {
        let (transfer, bytes) = (write.transfer, write.total_bytes());
        let fault = self.faults.next(transfer, bytes);
        if let Some((at, fault)) = fault {
            tracing::warn!(%transfer, ?fault, "transport fault of a test plan");
            if let (Fault::Flip, Some(lender)) = (fault, self.lender) {
                lent = match lender.spoilt(&write, at, connection) {
                    Ok(spoilt) => spoilt,
                    Err(error) => {
                        connection.put_back(vec![write]);
                        return Err(WriteEnd::NoCopy(error));
                    }
                };
            }
        }
        if let Some((_, Fault::Cut | Fault::Stall)) = fault {
            // What comes before it arrives, as it does from a stream.
            self.flush(connection)?;
            connection.wait_pulled(self.tuning.stall_timeout);
        }
        if self.told.insert(lent.arena.number) {
            let key = &lent.arena.key.0;
            let arena = Header::numbered(Kind::Arena, lent.arena.number, key.len() as u64);
            self.frames.extend_from_slice(&arena.encode());
            self.frames.extend_from_slice(key);
        }
        self.last_frame = Some(self.frames.len());
        let kind = (Kind::Pull, true);
        let Lent {
            descriptor, kept, ..
        } = lent;
        head(&mut self.frames, kind, &write, descriptor.encoded_bytes());
        let kept = kept.unwrap_or(Kept::Sources(write.sources));
        let flying = InFlight { transfer, kept };
        self.booked.push((descriptor.sequence, flying));
        match fault {
            Some((_, Fault::Cut)) => {
                self.flush(connection)?;
                Err(WriteEnd::Cut)
            }
            Some((_, Fault::Stall)) => {
                self.flush(connection)?;
                connection.wait_closed();
                Err(WriteEnd::StalledByPlan)
            }
            Some((_, Fault::Flip)) | None => {
                descriptor.encode_to(&mut self.frames);
                Ok(())
            }
        }
    }

    /// Pieces of pages of a device, or some with a fault at a byte of them.
    fn piece(
        &self,
        write: &Write,
        fault: Option<(usize, Fault)>,
        connection: &Connection,
    ) -> Result<(), WriteEnd> {
        let mut frame = Vec::new();
        head(
            &mut frame,
            (kind_of(write), false),
            write,
            write.total_bytes(),
        );
        let Some((offset, fault)) = fault else {
            self.send([&frame[..]])?;
            return self.send_from_abroad(write);
        };
        // Rare and only in tests: the payload in one piece is simplest to spoil.
        let mut payload = vec![0; write.total_bytes()];
        gather_into(write, &mut payload).map_err(WriteEnd::Device)?;
        let (before, after) = payload.split_at(offset);
        self.send([&frame[..], before])?;
        self.fault(fault, write.transfer, after, connection)?;
        let mut trailer = vec![0; trailer_bytes(write)];
        if let Some(at) = write.sum_at {
            let sums = payload.chunks(write.runs.total_bytes()).map(sum);
            Trailer::of(at, sums.collect()).encode_to(&mut trailer);
        }
        self.send([&trailer[..]])
    }

    /// The stretches of pages that lie on a device, through a buffer of the host's.
    fn send_from_abroad(&self, write: &Write) -> Result<(), WriteEnd> {
        let longest = write.runs.as_slice().iter().map(|run| run.bytes).max();
        let mut buffer = vec![0; ABROAD_BYTES.min(longest.unwrap_or(0))];
        for (source, range) in write.stretches() {
            for start in range.clone().step_by(ABROAD_BYTES) {
                let part = &mut buffer[..ABROAD_BYTES.min(range.end - start)];
                source.read(start, part).map_err(WriteEnd::Device)?;
                self.send([&part[..]])?;
            }
        }
        Ok(())
    }

    fn fault(
        &self,
        fault: Fault,
        transfer: TransferId,
        after: &[u8],
        connection: &Connection,
    ) -> Result<(), WriteEnd> {
        tracing::warn!(%transfer, ?fault, "transport fault of a test plan");
        match fault {
            Fault::Flip => self.send([&[!after[0]], &after[1..]]),
            Fault::Cut => Err(WriteEnd::Cut),
            Fault::Stall => {
                connection.wait_closed();
                Err(WriteEnd::StalledByPlan)
            }
        }
    }

    /// Sends slices one after the other, as many in one system call as it takes.
    fn send<'b>(&self, slices: impl IntoIterator<Item = &'b [u8]>) -> Result<(), WriteEnd> {
        let mut slices = slices
            .into_iter()
            .filter(|slice| !slice.is_empty())
            .map(IoSlice::new)
            .peekable();
        let mut some = Vec::new();
        while slices.peek().is_some() {
            some.clear();
            some.extend(slices.by_ref().take(SLICES_MAX));
            self.send_some(&mut some)?;
        }
        Ok(())
    }

    pub(super) fn send_some(&self, mut left: &mut [IoSlice<'_>]) -> Result<(), WriteEnd> {
        let mut last_byte = Instant::now();
        while !left.is_empty() {
            let mut stream = self.stream;
            match stream.write_vectored(left) {
                Ok(0) => return Err(WriteEnd::Io(ErrorKind::WriteZero.into())),
                Ok(count) => {
                    IoSlice::advance_slices(&mut left, count);
                    last_byte = Instant::now();
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                        if last_byte.elapsed() >= self.tuning.stall_timeout {
                            return Err(WriteEnd::Stalled(self.tuning.stall_timeout));
                        }
                    }
                    _ => return Err(WriteEnd::Io(error)),
                },
            }
        }
        Ok(())
    }
}

/// What the frame is whose payload follows in the stream.
pub(super) const fn kind_of(write: &Write) -> Kind {
    match write.sum_at {
        Some(_) => Kind::Summed,
        None => Kind::Write,
    }
}

/// All of a write's frame but its payload, behind what is there.
pub(super) fn head(
    out: &mut Vec<u8>,
    (kind, more): (Kind, bool),
    write: &Write,
    payload_bytes: usize,
) {
    let header = Header {
        kind,
        more,
        note_bytes: length_of(&write.note),
        payload_bytes: payload_bytes as u64,
        transfer: write.transfer,
        region: write.target.id,
        key: write.target.key,
        extra_bytes: write.runs.encoded_bytes() as u64,
    };
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(&write.note);
    write.runs.encode_to(out);
}

/// Of a note; what is too long was refused when it was submitted.
fn length_of(note: &[u8]) -> u16 {
    u16::try_from(note.len()).unwrap_or(u16::MAX)
}

//! The sending half of a connection: the queue out, bytes straight from shared pages, completions in.
//!
//! Header and payload leave in one system call. A peer that takes no byte for the stall time-out ends the
//! connection. Faults of a test's plan happen here, where the wire would make them: in the bytes of a stream; and for
//! bytes that the peer pulls, in a copy that it pulls instead (flip), or within the frame that describes them (cut, stall).

use std::collections::HashSet;
use std::io::{ErrorKind, IoSlice, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection::{Connection, InFlight, Outgoing};
use super::frame::{DESCRIPTOR_BYTES, Header, Kind};
use super::lender::{Lender, Lent, Way};
use super::regions::parse_token;
use super::{LinkTuning, TransportEvent, Write};
use crate::transport::fault::{Fault, Faults};
use crate::transport::{TransferId, TransportSink, WriteOutcome};

/// Slices that one system call takes at most (`IOV_MAX` of Linux).
const SLICES_MAX: usize = 1024;

/// Writes that are described to the peer in one go at most.
const DESCRIBED_AT_ONCE_MAX: usize = 32;

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

fn complete(
    connection: &Connection,
    sink: &TransportSink,
    transfer: TransferId,
    outcome: WriteOutcome,
) {
    let peer = connection.id;
    sink(TransportEvent::WriteDone {
        peer,
        transfer,
        outcome,
    });
}

/// Writes one connection.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    stream: &'a TcpStream,
    tuning: &'a LinkTuning,
    faults: &'a Faults,
    lender: Option<&'a Lender>,
    /// Arenas that the peer knows.
    told: HashSet<u64>,
    /// Frames that go out together.
    frames: Vec<u8>,
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
            told: HashSet::new(),
            frames: Vec::new(),
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
        let done = |transfer, outcome| complete(connection, sink, transfer, outcome);
        // A cancel reaches what is still queued, so what takes its time on the wire is taken one by one.
        let writes_max = self.lender.map_or(1, |_| DESCRIBED_AT_ONCE_MAX);
        loop {
            let sent = match connection.next(self.tuning.ping_interval(), writes_max) {
                Outgoing::Closed => break,
                Outgoing::Idle => self.send([&Header::plain(Kind::Ping, 0).encode()[..]]),
                Outgoing::Message(message) => {
                    let header = Header::plain(Kind::Message, message.len() as u64);
                    self.send([&header.encode()[..], &message])
                }
                Outgoing::Cancelled(transfers) => {
                    for transfer in transfers {
                        done(transfer, WriteOutcome::Cancelled);
                    }
                    Ok(())
                }
                Outgoing::Pulled(sequences) => {
                    let frames: Vec<_> = sequences
                        .into_iter()
                        .map(|sequence| Header::numbered(Kind::Pulled, sequence, 0).encode())
                        .collect();
                    self.send(frames.iter().map(|frame| &frame[..]))
                }
                Outgoing::Writes(writes) => self.write_all(writes, connection, sink),
            };
            if let Err(end) = sent {
                connection.close(&end.to_string());
                break;
            }
        }
    }

    /// Starts writes, in order; what cannot start goes back into the queue.
    fn write_all(
        &mut self,
        writes: Vec<Write>,
        connection: &Arc<Connection>,
        sink: &TransportSink,
    ) -> Result<(), WriteEnd> {
        let mut writes = writes.into_iter();
        let mut sent = Ok(());
        while sent.is_ok() {
            let Some(write) = writes.next() else {
                break;
            };
            let way = self.lender.map(|lender| lender.way(&write, connection));
            match way.unwrap_or(Way::Stream) {
                Way::Later => {
                    connection.put_back(std::iter::once(write).chain(writes).collect());
                    return self.flush();
                }
                Way::Failed(error) => {
                    // Its completion comes with the end.
                    connection.put_back(vec![write]);
                    sent = Err(WriteEnd::Device(error));
                }
                Way::Pull(lent) => sent = self.describe(write, lent, connection),
                Way::Stream => sent = self.stream_one(write, connection, sink),
            }
        }
        let sent = sent.and_then(|()| self.flush());
        if writes.len() > 0 {
            connection.put_back(writes.collect());
        }
        sent
    }

    fn stream_one(
        &mut self,
        write: Write,
        connection: &Arc<Connection>,
        sink: &TransportSink,
    ) -> Result<(), WriteEnd> {
        let sent = self.flush().and_then(|()| self.piece(&write, connection));
        let transfer = write.transfer;
        drop(write);
        let outcome = match sent {
            Ok(()) => WriteOutcome::Sent,
            Err(_) => WriteOutcome::Lost,
        };
        complete(connection, sink, transfer, outcome);
        sent
    }

    /// Sends the frames that were put together.
    fn flush(&mut self) -> Result<(), WriteEnd> {
        let frames = std::mem::take(&mut self.frames);
        let sent = self.send([&frames[..]]);
        self.frames = frames;
        self.frames.clear();
        sent
    }

    /// Completes the writes that a closed connection never started.
    pub(super) fn finish(connection: &Connection, sink: &TransportSink) {
        let left = connection.leftovers();
        for transfer in left.cancelled {
            complete(connection, sink, transfer, WriteOutcome::Cancelled);
        }
        for transfer in left.lost {
            complete(connection, sink, transfer, WriteOutcome::Lost);
        }
    }

    /// Describes a write that the peer will pull, with the next [`Writer::flush`]. It is booked first, as the peer may be
    /// quick; once it is, its end is the acknowledgement or the connection's.
    fn describe(
        &mut self,
        write: Write,
        mut lent: Lent,
        connection: &Connection,
    ) -> Result<(), WriteEnd> {
        let (transfer, bytes) = (write.transfer, write.runs.total_bytes());
        let fault = self.faults.next(transfer, bytes);
        if let Some((at, fault)) = fault {
            tracing::warn!(%transfer, ?fault, "transport fault of a test plan");
            if let (Fault::Flip, Some(lender)) = (fault, self.lender) {
                lent = match lender.spoilt(&write, at) {
                    Ok(spoilt) => spoilt,
                    Err(error) => {
                        connection.put_back(vec![write]);
                        return Err(WriteEnd::NoCopy(error));
                    }
                };
            }
        }
        if let Some((_, Fault::Cut)) = fault {
            // What comes before a cut arrives, as it does from a stream.
            self.flush()?;
            connection.wait_pulled(self.tuning.stall_timeout);
        }
        let head = head(Kind::Pull, &write, DESCRIPTOR_BYTES);
        drop(write);
        let descriptor = lent.descriptor.encode();
        let kept = lent.kept;
        connection.take_off(lent.descriptor.sequence, InFlight { transfer, kept });
        if self.told.insert(lent.arena.number) {
            let key = &lent.arena.key.0;
            let arena = Header::numbered(Kind::Arena, lent.arena.number, key.len() as u64);
            self.frames.extend_from_slice(&arena.encode());
            self.frames.extend_from_slice(key);
        }
        self.frames.extend_from_slice(&head);
        match fault {
            Some((_, Fault::Cut)) => {
                self.flush()?;
                Err(WriteEnd::Cut)
            }
            Some((_, Fault::Stall)) => {
                self.flush()?;
                connection.wait_closed();
                Err(WriteEnd::StalledByPlan)
            }
            Some((_, Fault::Flip)) | None => {
                self.frames.extend_from_slice(&descriptor);
                Ok(())
            }
        }
    }

    fn piece(&self, write: &Write, connection: &Connection) -> Result<(), WriteEnd> {
        let payload_bytes = write.runs.total_bytes();
        let head = head(Kind::Write, write, payload_bytes);
        let fault = self.faults.next(write.transfer, payload_bytes);
        if fault.is_none() && write.source.is_on_device() {
            self.send([&head[..]])?;
            return self.send_from_abroad(write);
        }
        let source = write.source.to_host().map_err(WriteEnd::Device)?;
        let payload = write.runs.stretches().map(|(range, _)| &source[range]);
        match fault {
            None => self.send(std::iter::once(&head[..]).chain(payload)),
            Some((offset, fault)) => {
                // Rare and only in tests: the payload in one piece is simplest to spoil.
                let payload: Vec<u8> = payload.flatten().copied().collect();
                let (before, after) = payload.split_at(offset);
                self.send([&head[..], before])?;
                self.fault(fault, write.transfer, after, connection)
            }
        }
    }

    /// The stretches of a page that lies on a device, through a buffer of the host's.
    fn send_from_abroad(&self, write: &Write) -> Result<(), WriteEnd> {
        let longest = write.runs.as_slice().iter().map(|run| run.bytes).max();
        let mut buffer = vec![0; ABROAD_BYTES.min(longest.unwrap_or(0))];
        for (range, _) in write.runs.stretches() {
            for start in range.clone().step_by(ABROAD_BYTES) {
                let part = &mut buffer[..ABROAD_BYTES.min(range.end - start)];
                let read = write.source.read(start, part);
                read.map_err(WriteEnd::Device)?;
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

    fn send_some(&self, mut left: &mut [IoSlice<'_>]) -> Result<(), WriteEnd> {
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

/// All of a write's frame but its payload.
fn head(kind: Kind, write: &Write, payload_bytes: usize) -> Vec<u8> {
    // A token that is not ours names no region of the peer either; it throws the bytes away.
    let (region, key) = parse_token(&write.target.token).unwrap_or((u64::MAX, 0));
    let runs = write.runs.encode();
    let header = Header {
        kind,
        note_bytes: length_of(&write.note),
        payload_bytes: payload_bytes as u64,
        transfer: write.transfer,
        region,
        key,
        extra_bytes: runs.len() as u64,
    };
    [&header.encode()[..], &write.note, &runs].concat()
}

/// Of a note; what is too long was refused when it was submitted.
fn length_of(note: &[u8]) -> u16 {
    u16::try_from(note.len()).unwrap_or(u16::MAX)
}

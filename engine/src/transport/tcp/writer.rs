//! The sending half of a connection: the queue out, bytes straight from shared pages, completions in.
//!
//! Header and payload leave in one system call. A peer that takes no byte for the stall time-out ends the
//! connection. Faults of a test's plan happen here, where the wire would make them.

use std::io::{ErrorKind, IoSlice, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::connection::{Connection, Outgoing};
use super::frame::{Header, Kind};
use super::regions::parse_token;
use super::{TcpTuning, TransportEvent, Write};
use crate::transport::fault::{Fault, Faults};
use crate::transport::{TransferId, TransportSink, WriteOutcome};

/// Slices that one system call takes at most (`IOV_MAX` of Linux).
const SLICES_MAX: usize = 1024;

/// Why a connection's writing ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteEnd {
    #[error("no byte taken for {0:?}")]
    Stalled(Duration),
    #[error("cut by a test's fault plan")]
    Cut,
    #[error("stalled by a test's fault plan")]
    StalledByPlan,
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
    tuning: &'a TcpTuning,
    faults: &'a Faults,
}

impl<'a> Writer<'a> {
    /// Takes the socket's sending half.
    pub(super) fn new(
        stream: &'a TcpStream,
        tuning: &'a TcpTuning,
        faults: &'a Faults,
    ) -> Result<Self, WriteEnd> {
        stream
            .set_write_timeout(Some(tuning.tick()))
            .map_err(WriteEnd::Io)?;
        Ok(Self {
            stream,
            tuning,
            faults,
        })
    }

    /// Sends our greeting.
    pub(super) fn greet(&self, address: &str) -> Result<(), WriteEnd> {
        let header = Header::plain(Kind::Hello, address.len() as u64).encode();
        self.send([&header[..], address.as_bytes()])
    }

    /// Carries the queue until the end; every write that it took gets its completion, sent or not.
    pub(super) fn run(&self, connection: &Connection, sink: &TransportSink) {
        let done = |transfer, outcome| complete(connection, sink, transfer, outcome);
        loop {
            let sent = match connection.next(self.tuning.ping_interval()) {
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
                Outgoing::Write(write) => {
                    let sent = self.piece(&write, connection);
                    let transfer = write.transfer;
                    drop(write);
                    match sent {
                        Ok(()) => done(transfer, WriteOutcome::Sent),
                        Err(_) => done(transfer, WriteOutcome::Lost),
                    }
                    sent
                }
            };
            if let Err(end) = sent {
                connection.close(&end.to_string());
                break;
            }
        }
    }

    /// Completes the writes that a closed connection never started.
    pub(super) fn finish(connection: &Connection, sink: &TransportSink) {
        let (lost, cancelled) = connection.leftovers();
        for transfer in cancelled {
            complete(connection, sink, transfer, WriteOutcome::Cancelled);
        }
        for transfer in lost {
            complete(connection, sink, transfer, WriteOutcome::Lost);
        }
    }

    fn piece(&self, write: &Write, connection: &Connection) -> Result<(), WriteEnd> {
        // A token that is not ours names no region of the peer either; it throws the bytes away.
        let (region, key) = parse_token(&write.target.token).unwrap_or((u64::MAX, 0));
        let runs = write.runs.encode();
        let payload_bytes = write.runs.total_bytes();
        let header = Header {
            kind: Kind::Write,
            note_bytes: u16::try_from(write.note.len()).unwrap_or(u16::MAX),
            payload_bytes: payload_bytes as u64,
            transfer: write.transfer,
            region,
            key,
            runs_bytes: runs.len() as u64,
        };
        let mut head = header.encode().to_vec();
        head.extend_from_slice(&write.note);
        head.extend_from_slice(&runs);
        let source = write.source.as_bytes();
        let payload = write.runs.stretches().map(|(range, _)| &source[range]);
        match self.faults.next(write.transfer, payload_bytes) {
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

//! One connection between two ranks: frames out, frames in, never blocking.
//!
//! What arrives before it is asked for waits in the inbox, up to a bound; the rest stays in the kernel, and the
//! peer waits. A large body is read straight into its place. Invariant: after a fault the link is of no more use.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;

use super::frame::{FAREWELL_BYTES_MAX, HEADER_BYTES, Header, Kind, MESSAGE_BYTES_MAX};

/// One read's size.
const READ_BYTES: usize = 64 << 10;

/// What an empty inbox keeps of the room that it once needed.
const INBOX_BYTES_KEPT: usize = 1 << 20;

/// What may wait in one link's inbox for a call that asks for it.
const INBOX_BYTES_MAX: usize = 64 << 20;

/// What ended a link.
#[derive(Debug)]
pub(super) enum Fault {
    /// The peer closed the connection, or the system did.
    Lost(String),
    /// The peer said why it ended.
    GaveUp(String),
    /// The peer sent what was not due.
    Protocol(String),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Lost(error.to_string())
    }
}

/// A frame on its way out.
#[derive(Debug)]
pub(super) struct Sending<'a> {
    pub(super) to: usize,
    pub(super) kind: Kind,
    pub(super) body: &'a [u8],
    /// Header bytes and body bytes that the kernel has.
    written: usize,
    header: Option<[u8; HEADER_BYTES]>,
}

impl<'a> Sending<'a> {
    pub(super) fn new(to: usize, kind: Kind, body: &'a [u8]) -> Self {
        Self {
            to,
            kind,
            body,
            written: 0,
            header: None,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.written == HEADER_BYTES + self.body.len()
    }
}

/// Where an awaited frame goes.
#[derive(Debug)]
pub(super) enum Place<'a> {
    /// A body of just this length.
    Exact(&'a mut [u8]),
    /// A body of any length, which replaces what is there.
    Any(&'a mut Vec<u8>),
    /// A farewell came instead.
    Farewell(Vec<u8>),
}

impl Place<'_> {
    fn bytes(&mut self) -> &mut [u8] {
        match self {
            Self::Exact(body) => body,
            Self::Any(body) => body,
            Self::Farewell(body) => body,
        }
    }
}

/// A frame that is waited for.
#[derive(Debug)]
pub(super) struct Receiving<'a> {
    pub(super) from: usize,
    kind: Kind,
    place: Place<'a>,
    /// Body bytes that are in place; `None` before the header came.
    filled: Option<usize>,
    done: bool,
}

impl<'a> Receiving<'a> {
    pub(super) fn new(from: usize, kind: Kind, place: Place<'a>) -> Self {
        Self {
            from,
            kind,
            place,
            filled: None,
            done: false,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.done
    }
}

/// A connection to one rank.
#[derive(Debug)]
pub(super) struct Link {
    stream: TcpStream,
    inbox: Inbox,
    frames_out: u32,
    frames_in: u32,
    /// A frame is partly written: nothing else may be sent.
    mid_frame: bool,
    /// The peer sends no more. What it sent before still counts.
    ended: Option<String>,
}

impl Link {
    /// Takes over a connection that doesn't block.
    pub(super) fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            inbox: Inbox::new(),
            frames_out: 0,
            frames_in: 0,
            mid_frame: false,
            ended: None,
        }
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Whether more can be read now, be it for a later call.
    pub(super) fn has_room(&self) -> bool {
        self.ended.is_none() && self.inbox.len() < INBOX_BYTES_MAX
    }

    /// Writes what the kernel takes. True where something moved.
    pub(super) fn write(&mut self, sending: &mut Sending<'_>) -> Result<bool, Fault> {
        if sending.is_done() {
            return Ok(false);
        }
        let header = match sending.header {
            Some(header) => header,
            None => *sending.header.insert(self.next_header(sending)?),
        };
        let parts = [
            IoSlice::new(header.get(sending.written..).unwrap_or_default()),
            IoSlice::new(&sending.body[sending.written.saturating_sub(HEADER_BYTES)..]),
        ];
        let Some(bytes) = nothing_yet((&self.stream).write_vectored(&parts))? else {
            return Ok(false);
        };
        sending.written += bytes;
        self.mid_frame = !sending.is_done();
        Ok(bytes > 0)
    }

    fn next_header(&mut self, sending: &Sending<'_>) -> Result<[u8; HEADER_BYTES], Fault> {
        let bytes = sending.body.len();
        if bytes > MESSAGE_BYTES_MAX {
            return Err(Fault::Protocol(format!(
                "a {} of {bytes} bytes is over the limit of {MESSAGE_BYTES_MAX}",
                sending.kind.name()
            )));
        }
        let header = Header {
            kind: sending.kind,
            sequence: self.frames_out,
            body_bytes: u32::try_from(bytes).expect("the limit of a message fits"),
        };
        self.frames_out = self.frames_out.wrapping_add(1);
        Ok(header.encode())
    }

    /// Reads what has come of an awaited frame. True where something moved.
    pub(super) fn read(&mut self, receiving: &mut Receiving<'_>) -> Result<bool, Fault> {
        if receiving.done {
            return Ok(false);
        }
        let mut moved = false;
        let mut filled = match receiving.filled {
            Some(filled) => filled,
            None => {
                if self.inbox.len() < HEADER_BYTES && !self.read_ahead()? {
                    return self.unless_ended(false);
                }
                let Some(header) = self.inbox.take_header() else {
                    return self.unless_ended(true);
                };
                self.accept(header, receiving)?;
                moved = true;
                0
            }
        };
        filled += self.inbox.take(&mut receiving.place.bytes()[filled..]);
        receiving.filled = Some(filled);
        let rest = &mut receiving.place.bytes()[filled..];
        if !rest.is_empty() {
            if let Some(reason) = &self.ended {
                return Err(Fault::Lost(reason.clone()));
            }
            // What follows the body may come along.
            let mut parts = [IoSliceMut::new(rest), IoSliceMut::new(self.inbox.room())];
            let wanted = parts[0].len();
            match nothing_yet((&self.stream).read_vectored(&mut parts))? {
                None => return Ok(moved),
                Some(0) => return Err(Fault::Lost("the connection was closed".to_owned())),
                Some(bytes) => {
                    receiving.filled = Some(filled + bytes.min(wanted));
                    self.inbox.came(bytes.saturating_sub(wanted));
                }
            }
        }
        let complete = receiving.filled == Some(receiving.place.bytes().len());
        if complete {
            receiving.done = true;
            if let Place::Farewell(text) = &receiving.place {
                return Err(Fault::GaveUp(String::from_utf8_lossy(text).into_owned()));
            }
        }
        Ok(true)
    }

    /// Reads into the inbox, for this call or a later one. True where something came; the peer's end is kept for the
    /// call that needs more than it sent.
    pub(super) fn read_ahead(&mut self) -> Result<bool, Fault> {
        if !self.has_room() {
            return Ok(false);
        }
        match nothing_yet((&self.stream).read(self.inbox.room())) {
            Ok(None) => Ok(false),
            Ok(Some(0)) => {
                self.ended = Some("the connection was closed".to_owned());
                Ok(false)
            }
            Ok(Some(bytes)) => {
                self.inbox.came(bytes);
                Ok(true)
            }
            Err(error) => {
                self.ended = Some(error.to_string());
                Ok(false)
            }
        }
    }

    fn unless_ended(&self, moved: bool) -> Result<bool, Fault> {
        match &self.ended {
            Some(reason) => Err(Fault::Lost(reason.clone())),
            None => Ok(moved),
        }
    }

    /// Checks a header against what is due and makes room for its body.
    fn accept(
        &mut self,
        header: [u8; HEADER_BYTES],
        receiving: &mut Receiving<'_>,
    ) -> Result<(), Fault> {
        let kind = receiving.kind;
        let due = kind.name();
        let header = Header::decode(header).ok_or_else(|| {
            Fault::Protocol(format!("{header:02x?} is no header; a {due} was due"))
        })?;
        let bytes = usize::try_from(header.body_bytes).expect("u32 fits");
        if header.kind == Kind::Farewell && bytes <= FAREWELL_BYTES_MAX {
            receiving.place = Place::Farewell(vec![0; bytes]);
            return Ok(());
        }
        if header.kind != kind {
            let came = header.kind.name();
            return Err(Fault::Protocol(format!("a {came} where a {due} was due")));
        }
        if header.sequence != self.frames_in {
            return Err(Fault::Protocol(format!(
                "{due} {} where {} was due",
                header.sequence, self.frames_in
            )));
        }
        match &mut receiving.place {
            Place::Exact(place) if place.len() != bytes => {
                return Err(Fault::Protocol(format!(
                    "a {due} of {bytes} bytes where {} were due",
                    place.len()
                )));
            }
            Place::Any(_) if bytes > MESSAGE_BYTES_MAX => {
                return Err(Fault::Protocol(format!(
                    "a {due} of {bytes} bytes is over the limit of {MESSAGE_BYTES_MAX}"
                )));
            }
            Place::Any(place) => {
                place.clear();
                place.resize(bytes, 0);
            }
            Place::Exact(_) | Place::Farewell(_) => {}
        }
        self.frames_in = self.frames_in.wrapping_add(1);
        Ok(())
    }

    /// Tells the peer why nothing more will come, if the connection takes it at once.
    pub(super) fn say_farewell(&mut self, cause: &str) {
        if self.mid_frame {
            return;
        }
        let end = cause.floor_char_boundary(FAREWELL_BYTES_MAX);
        let mut farewell = Sending::new(0, Kind::Farewell, &cause.as_bytes()[..end]);
        // The group is over; a peer that can't be told finds out by itself.
        drop(self.write(&mut farewell));
    }
}

/// Bytes that came before they were asked for.
#[derive(Debug)]
struct Inbox {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Inbox {
    fn new() -> Self {
        Self {
            bytes: vec![0; READ_BYTES],
            start: 0,
            end: 0,
        }
    }

    fn len(&self) -> usize {
        self.end - self.start
    }

    /// Room for at least one read.
    fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.bytes.len() > INBOX_BYTES_KEPT {
                self.bytes = vec![0; READ_BYTES];
            }
        }
        if self.bytes.len() - self.end < READ_BYTES {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.len());
            // Doubling, so that a long read-ahead is copied once on average.
            let wanted = (self.end * 2).max(self.end + READ_BYTES);
            if self.bytes.len() - self.end < READ_BYTES {
                self.bytes.resize(wanted, 0);
            }
        }
        &mut self.bytes[self.end..]
    }

    /// So many bytes were put into the room.
    fn came(&mut self, bytes: usize) {
        self.end += bytes;
    }

    /// Moves what there is to the front of `target`.
    fn take(&mut self, target: &mut [u8]) -> usize {
        let bytes = target.len().min(self.len());
        target[..bytes].copy_from_slice(&self.bytes[self.start..self.start + bytes]);
        self.start += bytes;
        bytes
    }

    fn take_header(&mut self) -> Option<[u8; HEADER_BYTES]> {
        let mut header = [0; HEADER_BYTES];
        (self.len() >= HEADER_BYTES).then(|| {
            self.take(&mut header);
            header
        })
    }
}

/// `None` where the connection would have blocked.
fn nothing_yet(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

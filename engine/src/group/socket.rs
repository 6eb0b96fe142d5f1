//! Sockets for ranks: where to listen, what a connection must have, and short messages with a deadline.

use std::fmt::Display;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Backlog, setsockopt, sockopt};

use super::GroupError;
use super::waiting::Waiting;

/// A message's bytes at most: a roster of 10,000 ranks.
const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// How long one attempt to connect may block; a lost packet costs another attempt.
const ATTEMPT: Duration = Duration::from_millis(200);

/// Listens on a port that the kernel chooses; gives `host:port` for the others.
pub(super) fn listen(host: &str) -> Result<(TcpListener, String), GroupError> {
    let failed = |reason: &dyn Display| GroupError::Bind {
        host: host.to_owned(),
        reason: reason.to_string(),
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let listener = TcpListener::bind((bare, 0)).map_err(|error| failed(&error))?;
    listener
        .set_nonblocking(true)
        .map_err(|error| failed(&error))?;
    // The usual 128 would have the ranks of a large instance try again.
    nix::sys::socket::listen(&listener, Backlog::MAXCONN).map_err(|error| failed(&error))?;
    let local = listener.local_addr().map_err(|error| failed(&error))?;
    if local.ip().is_unspecified() {
        return Err(failed(&"other machines cannot connect to a wildcard"));
    }
    let address = if bare.contains(':') {
        format!("[{bare}]:{}", local.port())
    } else {
        format!("{bare}:{}", local.port())
    };
    Ok((listener, address))
}

/// One attempt to connect.
pub(super) fn connect(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::other("the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, ATTEMPT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// What every connection between ranks has: no delay, no blocking, and an end within `peer_timeout` when the other
/// machine is cut off, be the connection idle or not. A shorter cut is survived.
pub(super) fn tune(stream: &TcpStream, peer_timeout: Duration) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    // The kernel looks at the limit when it probes, hence one interval less.
    let seconds = u32::try_from(peer_timeout.as_secs()).unwrap_or(u32::MAX);
    let interval = (seconds / 12).clamp(1, 10);
    let limit = u32::try_from(peer_timeout.as_millis()).unwrap_or(u32::MAX);
    let limit = limit.saturating_sub(interval * 1000).max(1000);
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &interval)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &interval)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &limit)?;
    Ok(())
}

/// What ended a message.
#[derive(Debug)]
pub(super) enum Trouble {
    Group(GroupError),
    Lost(String),
}

impl Trouble {
    pub(super) fn lost(self, peer: String, doing: String) -> GroupError {
        match self {
            Self::Group(error) => error,
            Self::Lost(reason) => GroupError::Lost {
                peer,
                doing,
                reason,
            },
        }
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Lost(error.to_string())
    }
}

/// Sends a list of texts.
pub(super) fn write_message(
    stream: &mut TcpStream,
    texts: &[String],
    waiting: &Waiting<'_>,
    doing: impl Fn() -> String,
) -> Result<(), Trouble> {
    let body = serde_json::to_vec(texts).expect("texts are JSON");
    let length = u32::try_from(body.len())
        .ok()
        .filter(|_| body.len() <= MESSAGE_BYTES_MAX)
        .ok_or_else(|| Trouble::Lost(format!("{} bytes are too many", body.len())))?;
    let bytes = [&length.to_le_bytes()[..], &body].concat();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        match stream.write(rest) {
            Ok(written) => rest = &rest[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let slice = waiting.slice(&doing).map_err(Trouble::Group)?;
                ready([stream.as_fd()], PollFlags::POLLOUT, slice);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The counterpart of [`write_message`]; reads nothing beyond it.
pub(super) fn read_message(
    stream: &mut TcpStream,
    waiting: &Waiting<'_>,
    doing: impl Fn() -> String,
) -> Result<Vec<String>, Trouble> {
    let mut length = [0; 4];
    read_exactly(stream, &mut length, waiting, &doing)?;
    let bytes = usize::try_from(u32::from_le_bytes(length)).expect("u32 fits");
    if bytes > MESSAGE_BYTES_MAX {
        return Err(Trouble::Lost(format!("it announced {bytes} bytes")));
    }
    let mut body = vec![0; bytes];
    read_exactly(stream, &mut body, waiting, &doing)?;
    serde_json::from_slice(&body).map_err(|error| Trouble::Lost(error.to_string()))
}

fn read_exactly(
    stream: &mut TcpStream,
    mut target: &mut [u8],
    waiting: &Waiting<'_>,
    doing: &impl Fn() -> String,
) -> Result<(), Trouble> {
    while !target.is_empty() {
        match stream.read(target) {
            Ok(0) => return Err(Trouble::Lost("the connection was closed".to_owned())),
            Ok(bytes) => target = &mut target[bytes..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let slice = waiting.slice(doing).map_err(Trouble::Group)?;
                ready([stream.as_fd()], PollFlags::POLLIN, slice);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Waits until there is something to read, an end included.
pub(super) fn readable(stream: &TcpStream, slice: Duration) -> bool {
    ready([stream.as_fd()], PollFlags::POLLIN, slice)[0]
}

/// Which of the streams have something to read, an end included, after waiting for the first.
pub(super) fn readable_ones<'a>(
    streams: impl Iterator<Item = (&'a usize, &'a TcpStream)>,
    slice: Duration,
) -> Vec<usize> {
    let (ranks, fds): (Vec<usize>, Vec<_>) = streams
        .map(|(rank, stream)| (*rank, stream.as_fd()))
        .unzip();
    let ready = ready(fds, PollFlags::POLLIN, slice);
    let pairs = ranks.into_iter().zip(ready);
    pairs.filter_map(|(rank, is)| is.then_some(rank)).collect()
}

/// Whether the other side has closed the stream, be there still bytes to read or not.
pub(super) fn is_closed(stream: &TcpStream) -> bool {
    ready([stream.as_fd()], closed(), Duration::ZERO)[0]
}

/// The event of the other side's end.
pub(super) fn closed() -> PollFlags {
    PollFlags::from_bits_retain(libc::POLLRDHUP)
}

/// Waits for the first event; says for each whether it had one.
pub(super) fn ready<'a>(
    fds: impl IntoIterator<Item = BorrowedFd<'a>>,
    events: PollFlags,
    slice: Duration,
) -> Vec<bool> {
    wait(fds.into_iter().map(|fd| (fd, events)), slice)
}

/// As [`ready`], with the events of each.
pub(super) fn wait<'a>(
    fds: impl IntoIterator<Item = (BorrowedFd<'a>, PollFlags)>,
    slice: Duration,
) -> Vec<bool> {
    let mut fds: Vec<PollFd<'_>> = fds
        .into_iter()
        .map(|(fd, events)| PollFd::new(fd, events))
        .collect();
    // Rounded up, so that the last fraction of a millisecond is no busy loop.
    let millis = slice.as_millis() + u128::from(!slice.is_zero());
    let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
    // An interrupted wait is one in which nothing happened: every caller looks again.
    let happened = poll(&mut fds, timeout).unwrap_or(0) > 0;
    fds.iter()
        // `None` is an event that the crate has no name for, such as the other side's end.
        .map(|fd| happened && fd.revents().is_none_or(|events| !events.is_empty()))
        .collect()
}

//! How a connection's socket is set. Sizes of its buffers are the kernel's business, see [`super`].

use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

/// Always there and open to everybody; sends as soon as the window allows.
const WITHIN_A_HOST: &str = "reno";

/// Frames leave at once. Between two sockets of one host there is nothing to probe and no queue to spare, so what paces a network
/// (BBR wakes a timer for every 64 KiB) only costs: there the plainest congestion control is chosen.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    if is_within_a_host(stream)? {
        let plainest = WITHIN_A_HOST.into();
        if let Err(error) = setsockopt(stream, sockopt::TcpCongestion, &plainest) {
            // It works with any.
            tracing::debug!(%error, "a kv connection keeps the system's congestion control");
        }
    }
    Ok(())
}

/// What comes from an address of this host to that very address has not left it.
fn is_within_a_host(stream: &TcpStream) -> io::Result<bool> {
    let (here, there) = (stream.local_addr()?.ip(), stream.peer_addr()?.ip());
    Ok(here == there || (here.is_loopback() && there.is_loopback()))
}

/// Whether a read would not wait.
pub(super) fn has_bytes(stream: &TcpStream) -> bool {
    is_ready(stream, PollFlags::POLLIN)
}

/// Whether a short write would not wait.
pub(super) fn has_room(stream: &TcpStream) -> bool {
    is_ready(stream, PollFlags::POLLOUT)
}

fn is_ready(stream: &TcpStream, what: PollFlags) -> bool {
    let mut asked = [PollFd::new(stream.as_fd(), what)];
    // An error, too, is for the read or the write to find.
    !matches!(poll(&mut asked, PollTimeout::ZERO), Ok(0))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use nix::sys::socket::getsockopt;

    use super::*;

    #[test]
    fn a_connection_within_a_host_is_not_paced_and_waits_for_no_more_bytes() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(is_within_a_host(&stream).unwrap());
        prepare(&stream).unwrap();
        assert!(stream.nodelay().unwrap());
        let chosen = getsockopt(&stream, sockopt::TcpCongestion).unwrap();
        let chosen = chosen.to_string_lossy();
        assert_eq!(chosen.trim_end_matches('\0'), WITHIN_A_HOST);
    }
}

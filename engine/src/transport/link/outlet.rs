//! Who sends on a connection: the writer, frame after frame; and between two of them whoever only has the peer wake up.
//!
//! That must not wait for a writer that sleeps itself: waking a thread takes some 50 to 100 µs, and three of them one after the other
//! were a tenth of a gigabyte's hand-off between two GPUs. Who finds the writer sending leaves it: then the peer hears something anyway.
//!
//! Invariant: no frame is torn, and none is within another.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, send};
use parking_lot::{Mutex, MutexGuard};

use super::socket;

/// Whoever has it sends. Nothing before the greetings, which are the first that is said.
type Turn = Option<Arc<TcpStream>>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Outlet(Mutex<Turn>);

impl Outlet {
    /// The greetings are done.
    pub(super) fn open(&self, stream: Arc<TcpStream>) {
        *self.0.lock() = Some(stream);
    }

    /// For the writer: nobody else sends as long as it has this. It closes a connection whose frame it could not end before it lets go.
    pub(super) fn writing(&self) -> MutexGuard<'_, Turn> {
        self.0.lock()
    }

    /// Sends a short frame, if nobody is sending and it goes at once.
    ///
    /// # Errors
    /// When a part of the frame was sent: nothing can follow that.
    pub(super) fn send_in_passing(&self, frame: &[u8]) -> io::Result<()> {
        let turn = self.0.try_lock();
        let Some(stream) = turn.as_deref().and_then(Option::as_deref) else {
            return Ok(());
        };
        // A socket that takes something has a third of its buffer free, which is some hundred times what a frame without a payload is.
        if !socket::has_room(stream) {
            return Ok(());
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(stream.as_raw_fd(), frame, flags) {
            Ok(count) if count < frame.len() => Err(io::ErrorKind::WriteZero.into()),
            // One that is gone is for the writer and the reader to find.
            Ok(_) | Err(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use super::*;

    /// The other end of an outlet that is open, and its socket.
    fn open(outlet: &Outlet) -> (Arc<TcpStream>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (here, (there, _)) = (Arc::new(here), listener.accept().unwrap());
        outlet.open(Arc::clone(&here));
        (here, there)
    }

    /// What has come until the end.
    fn received(mut there: TcpStream) -> Vec<u8> {
        let mut all = Vec::new();
        there.read_to_end(&mut all).unwrap();
        all
    }

    #[test]
    fn nothing_goes_before_the_greetings_or_within_a_frame_of_the_writers() {
        let outlet = Outlet::default();
        outlet.send_in_passing(b"early").unwrap();
        let (here, there) = open(&outlet);
        let writing = outlet.writing();
        (&*here).write_all(b"fra").unwrap();
        outlet.send_in_passing(b"within").unwrap();
        (&*here).write_all(b"me").unwrap();
        drop(writing);
        outlet.send_in_passing(b" passed").unwrap();
        drop((here, outlet));
        assert_eq!(received(there), b"frame passed");
    }

    #[test]
    fn what_a_full_socket_has_no_room_for_is_left() {
        let outlet = Outlet::default();
        let (here, mut there) = open(&outlet);
        here.set_nonblocking(true).unwrap();
        let mut filled = 0;
        while let Ok(count) = (&*here).write(&[1; 4096]) {
            filled += count;
        }
        outlet.send_in_passing(&[2; 32]).unwrap();
        let mut all = vec![0; filled];
        there.read_exact(&mut all).unwrap();
        assert!(all.iter().all(|byte| *byte == 1));
        // With everything read there is room again.
        outlet.send_in_passing(&[3; 32]).unwrap();
        drop((here, outlet));
        assert_eq!(received(there), [3; 32]);
    }
}

//! What one TCP connection within this host carries where both ends sum the bytes, and nothing else is done: the most that the
//! transport `tcp` can reach here with checksums. A measurement of TCP alone is above it by what the sums cost.

use std::hint::black_box;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use baton_engine::transport::checksum::sum;

/// Summed and sent, or received and summed, in one go: what a core's second cache holds.
const PART_BYTES: usize = 256 << 10;

/// An end that waits so long for the other has lost it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection of this process with itself.
pub(super) struct Loopback {
    here: TcpStream,
    there: TcpStream,
}

impl Loopback {
    /// Connects.
    ///
    /// # Errors
    /// When the host has no loopback address, or no room for a connection.
    pub(super) fn open() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let here = TcpStream::connect(listener.local_addr()?)?;
        let own = here.local_addr()?;
        // Whoever else connects meanwhile is not ours.
        let there = loop {
            let (stream, from) = listener.accept()?;
            if from == own {
                break stream;
            }
        };
        here.set_write_timeout(Some(PATIENCE))?;
        there.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { here, there })
    }

    /// Carries `source` to `target`, of the same length; each end sums what it has at hand.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(super) fn carry(&mut self, source: &[u8], target: &mut [u8]) -> io::Result<()> {
        let (here, there) = (&mut self.here, &mut self.there);
        std::thread::scope(|scope| {
            let sender = scope.spawn(move || {
                source.chunks(PART_BYTES).try_for_each(|part| {
                    black_box(sum(part));
                    here.write_all(part)
                })
            });
            let received = target.chunks_mut(PART_BYTES).try_for_each(|part| {
                there.read_exact(part)?;
                black_box(sum(part));
                Ok(())
            });
            let sent = sender
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the sender panicked")));
            sent.and(received)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_arrives() {
        let mut loopback = Loopback::open().unwrap();
        for length in [0, 1, PART_BYTES, 3 * PART_BYTES + 5] {
            let source: Vec<u8> = (0..length).map(|at| (at * 7).to_le_bytes()[0]).collect();
            let mut target = vec![0; length];
            loopback.carry(&source, &mut target).unwrap();
            assert!(source == target, "{length}");
        }
    }
}

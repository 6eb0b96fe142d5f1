//! One connection as its two threads and the callers share it: the outgoing queue and the end.
//!
//! Messages go before writes, so that a cancel is not stuck behind the megabytes that it cancels. The first
//! reason to close is the one that is reported.

use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::super::{PeerId, Submission, TransferId, Write};
use super::frame::{MESSAGE_BYTES_MAX, NOTE_BYTES_MAX};

/// Writes that wait for the wire at most; more is [`Submission::Busy`].
const WRITES_QUEUED_MAX: usize = 64;
/// Bytes of these; the first write is always taken.
const WRITE_BYTES_QUEUED_MAX: usize = 16 << 20;
/// Messages that wait for the wire at most.
const MESSAGES_QUEUED_MAX: usize = 1024;
/// Bytes of these.
const MESSAGE_BYTES_QUEUED_MAX: usize = 2 * MESSAGE_BYTES_MAX;

/// How long a connection that is closed in good order waits for the peer to close too.
const LINGER: Duration = Duration::from_secs(1);

/// What the writer thread does next.
#[derive(Debug)]
pub(super) enum Outgoing {
    Message(Vec<u8>),
    Write(Write),
    /// These writes were dropped before they started.
    Cancelled(Vec<TransferId>),
    /// Nothing to say for the whole interval.
    Idle,
    Closed,
}

#[derive(Debug, Default)]
struct Queue {
    messages: VecDeque<Vec<u8>>,
    message_bytes: usize,
    writes: VecDeque<Write>,
    write_bytes: usize,
    cancelled: Vec<TransferId>,
    stream: Option<TcpStream>,
    /// Takes nothing more; closes with this reason once its messages are out.
    finishing: Option<String>,
    closed: Option<String>,
}

impl Queue {
    const fn takes_more(&self) -> bool {
        self.closed.is_none() && self.finishing.is_none()
    }

    /// Ends the connection; the first reason stays.
    fn close(&mut self, reason: &str) {
        if self.closed.is_none() {
            self.closed = Some(reason.to_owned());
        }
        if let Some(stream) = self.stream.take() {
            // Wakes both threads; a socket that is gone already needs no waking.
            drop(stream.shutdown(Shutdown::Both));
        }
    }
}

/// The shared part of a connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) id: PeerId,
    /// The other end, for people.
    pub(super) address: String,
    queue: Mutex<Queue>,
    wake: Condvar,
}

impl Connection {
    pub(super) fn new(id: PeerId, address: String) -> Self {
        Self {
            id,
            address,
            queue: Mutex::default(),
            wake: Condvar::new(),
        }
    }

    /// Gives the connection its socket, for closing. False when it was closed before.
    pub(super) fn attach(&self, stream: TcpStream) -> bool {
        let mut queue = self.lock();
        let open = queue.closed.is_none();
        if open {
            queue.stream = Some(stream);
        }
        open
    }

    pub(super) fn submit_message(&self, message: Vec<u8>) -> Submission {
        if message.len() > MESSAGE_BYTES_MAX {
            return Submission::Invalid;
        }
        let mut queue = self.lock();
        if !queue.takes_more() {
            return Submission::Gone;
        }
        let bytes = queue.message_bytes + message.len();
        if queue.messages.len() >= MESSAGES_QUEUED_MAX || bytes > MESSAGE_BYTES_QUEUED_MAX {
            return Submission::Busy;
        }
        queue.message_bytes = bytes;
        queue.messages.push_back(message);
        drop(queue);
        self.wake.notify_all();
        Submission::Accepted
    }

    pub(super) fn submit_write(&self, write: Write) -> Submission {
        let page_bytes = write.source.as_bytes().len();
        // How long the target is, the peer says.
        if !write.runs.fits(page_bytes, usize::MAX) || write.note.len() > NOTE_BYTES_MAX {
            return Submission::Invalid;
        }
        let mut queue = self.lock();
        if !queue.takes_more() {
            return Submission::Gone;
        }
        let bytes = queue.write_bytes + write.runs.total_bytes();
        let full = queue.writes.len() >= WRITES_QUEUED_MAX || bytes > WRITE_BYTES_QUEUED_MAX;
        if full && !queue.writes.is_empty() {
            return Submission::Busy;
        }
        queue.write_bytes = bytes;
        queue.writes.push_back(write);
        drop(queue);
        self.wake.notify_all();
        Submission::Accepted
    }

    /// Drops a transfer's writes that have not started.
    pub(super) fn cancel(&self, transfer: TransferId) {
        let mut queue = self.lock();
        let before = queue.writes.len();
        queue.writes.retain(|write| write.transfer != transfer);
        let dropped = before - queue.writes.len();
        queue.write_bytes = queue.writes.iter().map(|w| w.runs.total_bytes()).sum();
        queue
            .cancelled
            .extend(std::iter::repeat_n(transfer, dropped));
        drop(queue);
        self.wake.notify_all();
    }

    /// Waits for something to send.
    pub(super) fn next(&self, interval: Duration) -> Outgoing {
        let queue = self.lock();
        let waited = self.wake.wait_timeout_while(queue, interval, |queue| {
            queue.takes_more()
                && queue.messages.is_empty()
                && queue.writes.is_empty()
                && queue.cancelled.is_empty()
        });
        let mut queue = match waited {
            Ok((guard, _)) => guard,
            Err(poisoned) => poisoned.into_inner().0,
        };
        if queue.closed.is_some() {
            return Outgoing::Closed;
        }
        if !queue.cancelled.is_empty() {
            return Outgoing::Cancelled(std::mem::take(&mut queue.cancelled));
        }
        if let Some(message) = queue.messages.pop_front() {
            queue.message_bytes -= message.len();
            return Outgoing::Message(message);
        }
        if let Some(write) = queue.writes.pop_front() {
            queue.write_bytes -= write.runs.total_bytes();
            return Outgoing::Write(write);
        }
        if let Some(reason) = queue.finishing.clone() {
            self.linger(queue, &reason);
            return Outgoing::Closed;
        }
        Outgoing::Idle
    }

    /// Ends the connection now; the first reason stays.
    pub(super) fn close(&self, reason: &str) {
        self.lock().close(reason);
        self.wake.notify_all();
    }

    /// Ends the connection as soon as its messages are out; writes that wait are lost.
    pub(super) fn finish(&self, reason: &str) {
        let mut queue = self.lock();
        if queue.finishing.is_none() {
            queue.finishing = Some(reason.to_owned());
        }
        let unsent: Vec<_> = queue.writes.drain(..).map(|w| w.transfer).collect();
        queue.write_bytes = 0;
        queue.cancelled.extend(unsent);
        drop(queue);
        self.wake.notify_all();
    }

    /// Says that nothing more comes and lets the peer close first: closing with its bytes unread would reset the
    /// connection, and a reset may overtake our last messages.
    fn linger(&self, queue: MutexGuard<'_, Queue>, reason: &str) {
        if let Some(stream) = &queue.stream {
            // A socket that is gone already has nothing left to say.
            drop(stream.shutdown(Shutdown::Write));
        }
        let waited = self
            .wake
            .wait_timeout_while(queue, LINGER, |queue| queue.closed.is_none());
        let mut queue = match waited {
            Ok((guard, _)) => guard,
            Err(poisoned) => poisoned.into_inner().0,
        };
        queue.close(reason);
    }

    /// After the end: the transfers of all writes that were never sent (lost), and of those cancelled.
    pub(super) fn leftovers(&self) -> (Vec<TransferId>, Vec<TransferId>) {
        let mut queue = self.lock();
        let lost = queue.writes.drain(..).map(|w| w.transfer).collect();
        queue.write_bytes = 0;
        queue.messages.clear();
        queue.message_bytes = 0;
        (lost, std::mem::take(&mut queue.cancelled))
    }

    /// Waits until the connection is closed: what a stalled peer does.
    pub(super) fn wait_closed(&self) {
        let queue = self.lock();
        drop(self.wake.wait_while(queue, |queue| queue.closed.is_none()));
    }

    /// Why it was closed.
    pub(super) fn reason(&self) -> String {
        let queue = self.lock();
        queue.closed.clone().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|e| e.into_inner())
    }
}

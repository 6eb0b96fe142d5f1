//! One connection as its threads and the callers share it: the outgoing queue, what a peer is pulling, and the end.
//!
//! Acknowledgements and messages go before writes, so that a cancel is not stuck behind the megabytes that it
//! cancels. The first reason to close is the one that is reported.
//!
//! Invariant: a write is in the queue, with the writer thread, or in flight until the peer has pulled it; it leaves
//! with exactly one completion.

use std::collections::{HashSet, VecDeque};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::super::numbered::NumberedMap;
use super::super::staging::Slot;
use super::super::{PeerId, Sources, Submission, TransferId, Write};
use super::frame::{Header, Kind, MESSAGE_BYTES_MAX, NOTE_BYTES_MAX};
use super::outlet::Outlet;
use super::pulls::Pulls;
use crate::page::Page;
use crate::transport::vigil::{Bell, Vigil};

/// Writes that wait for the wire, or for the peer to pull them, at most; more is [`Submission::Busy`]. Of an 8B model's
/// pages a quarter of it is a gigabyte, which one device reads from another in 3 ms, and so are as many rows of pieces of 64 KiB.
pub(super) const WRITES_OPEN_MAX: usize = 1024;
/// Bytes of those that wait for the wire where they follow in the stream; the first write is always taken. What is only
/// described takes no room.
pub(super) const STREAM_BYTES_QUEUED_MAX: usize = 16 << 20;
/// Messages that wait for the wire at most.
const MESSAGES_QUEUED_MAX: usize = 1024;
/// Bytes of these.
const MESSAGE_BYTES_QUEUED_MAX: usize = 2 * MESSAGE_BYTES_MAX;

/// How long a connection that is closed in good order waits for the peer to close too.
const LINGER: Duration = Duration::from_secs(1);

/// What the writer thread does next.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// Nothing yet, but soon.
    Roused,
    /// Descriptors that this side has pulled.
    Pulled(Vec<u64>),
    Message(Vec<u8>),
    /// At least one.
    Writes(Vec<Write>),
    /// These writes were dropped before they started.
    Cancelled(Vec<TransferId>),
    /// Nothing to say for the whole interval.
    Idle,
    Closed,
}

/// Whose threads shall wake up because something comes soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rousing {
    /// The peer's, and with its answer those here that listen.
    There,
    /// Ours have; the peer's that listens shall.
    Back,
}

impl Rousing {
    /// What the peer is told.
    const fn kind(self) -> Kind {
        match self {
            Self::There => Kind::Rouse,
            Self::Back => Kind::Ping,
        }
    }
}

/// What the peer reads while it pulls a write.
#[expect(dead_code, reason = "held until the peer is done, never looked at")]
#[derive(Debug)]
pub(super) enum Kept {
    /// The sources themselves.
    Sources(Sources),
    /// A gathered copy.
    Slot(Slot),
    /// A window of a device's memory, with the copies of other writes.
    Window(Arc<Slot>),
    /// A copy that a test's fault plan has spoilt.
    Spoilt(Page),
}

/// A write whose descriptor was sent.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) transfer: TransferId,
    pub(super) kept: Kept,
}

/// The transfers of writes that a connection's end has overtaken.
#[derive(Debug, Default)]
pub(super) struct Leftovers {
    pub(super) lost: Vec<TransferId>,
    pub(super) cancelled: Vec<TransferId>,
}

#[derive(Debug, Default)]
struct Queue {
    /// Something comes soon, and the writer has not heard so.
    roused: bool,
    pulled: Vec<u64>,
    messages: VecDeque<Vec<u8>>,
    message_bytes: usize,
    writes: VecDeque<Write>,
    write_bytes: usize,
    /// The first write waits for staging memory.
    waits_for_slot: bool,
    in_flight: NumberedMap<u64, InFlight>,
    cancelled: Vec<TransferId>,
    stream: Option<Arc<TcpStream>>,
    /// Takes nothing more; closes with this reason once its messages are out.
    finishing: Option<String>,
    closed: Option<String>,
}

impl Queue {
    const fn takes_more(&self) -> bool {
        self.closed.is_none() && self.finishing.is_none()
    }

    fn has_work(&self) -> bool {
        !self.takes_more()
            || self.roused
            || !self.pulled.is_empty()
            || !self.messages.is_empty()
            || !self.cancelled.is_empty()
            || (!self.writes.is_empty() && !self.waits_for_slot)
    }

    fn submit(&mut self, write: Write, bytes_max: usize) -> Submission {
        if !write.is_sound() || write.note.len() > NOTE_BYTES_MAX {
            return Submission::Invalid;
        }
        if !self.takes_more() {
            return Submission::Gone;
        }
        let bytes = self.write_bytes.saturating_add(write.total_bytes());
        let open = self.writes.len() + self.in_flight.len();
        let full = open >= WRITES_OPEN_MAX || bytes > bytes_max;
        if full && open > 0 {
            return Submission::Busy;
        }
        self.write_bytes = bytes;
        self.writes.push_back(write);
        Submission::Accepted
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
    /// What the peer asks us to read.
    pub(super) pulls: Pulls,
    /// Set with the end; a fabric's read looks at it.
    pub(super) ended: AtomicBool,
    /// Bytes of writes that may wait for the wire.
    write_bytes_max: usize,
    /// How much of a window of a device's memory the peer reads at once, if it does.
    window_bytes: OnceLock<usize>,
    /// Where it is sent from.
    pub(super) outlet: Outlet,
    queue: Mutex<Queue>,
    wake: Condvar,
    pub(super) vigil: Vigil,
    bell: Bell,
}

impl Connection {
    pub(super) fn new(
        id: PeerId,
        address: String,
        (write_bytes_max, vigil): (usize, Vigil),
    ) -> Self {
        Self {
            id,
            write_bytes_max,
            address,
            pulls: Pulls::new(vigil),
            vigil,
            bell: Bell::default(),
            ended: AtomicBool::new(false),
            window_bytes: OnceLock::new(),
            outlet: Outlet::default(),
            queue: Mutex::default(),
            wake: Condvar::new(),
        }
    }

    /// Gives the connection its socket, for closing. False when it was closed before.
    pub(super) fn attach(&self, stream: Arc<TcpStream>) -> bool {
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
        self.say();
        Submission::Accepted
    }

    /// Queues writes, in order, until one is not accepted. The writer is woken once.
    pub(super) fn submit_writes(&self, writes: Vec<Write>) -> (usize, Submission) {
        let mut queue = self.lock();
        let mut accepted = 0;
        let mut submission = Submission::Accepted;
        for write in writes {
            submission = queue.submit(write, self.write_bytes_max);
            if submission != Submission::Accepted {
                break;
            }
            accepted += 1;
        }
        drop(queue);
        if accepted > 0 {
            self.say();
        }
        (accepted, submission)
    }

    /// Drops a transfer's writes that have not started.
    pub(super) fn cancel(&self, transfer: TransferId) {
        let mut queue = self.lock();
        let before = queue.writes.len();
        queue.writes.retain(|write| write.transfer != transfer);
        let dropped = before - queue.writes.len();
        queue.write_bytes = bytes_of(&queue.writes);
        queue
            .cancelled
            .extend(std::iter::repeat_n(transfer, dropped));
        drop(queue);
        self.say();
    }

    /// Waits for something to send; of writes so many, or so many bytes, but one if there is one.
    pub(super) fn next(
        &self,
        interval: Duration,
        (writes_max, bytes_max): (usize, usize),
    ) -> Outgoing {
        let mut queue = self.lock();
        let vigil = self.vigil;
        vigil.watch(&mut queue, &self.bell, |queue| queue.has_work());
        self.wake
            .wait_while_for(&mut queue, |queue| !queue.has_work(), interval);
        if queue.closed.is_some() {
            return Outgoing::Closed;
        }
        if !queue.cancelled.is_empty() {
            return Outgoing::Cancelled(std::mem::take(&mut queue.cancelled));
        }
        let roused = std::mem::take(&mut queue.roused);
        if !queue.pulled.is_empty() {
            return Outgoing::Pulled(std::mem::take(&mut queue.pulled));
        }
        if let Some(message) = queue.messages.pop_front() {
            queue.message_bytes -= message.len();
            return Outgoing::Message(message);
        }
        if !queue.waits_for_slot && !queue.writes.is_empty() {
            let mut bytes = 0_usize;
            let fitting = queue.writes.iter().take(writes_max).take_while(|write| {
                bytes = bytes.saturating_add(write.total_bytes());
                bytes <= bytes_max
            });
            let count = fitting.count().max(1);
            let writes: Vec<_> = queue.writes.drain(..count).collect();
            queue.write_bytes -= bytes_of(&writes);
            return Outgoing::Writes(writes);
        }
        if roused {
            return Outgoing::Roused;
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
        self.has_ended();
    }

    fn has_ended(&self) {
        self.ended.store(true, Ordering::Release);
        self.pulls.close();
        self.say();
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
        self.say();
    }

    /// Says that nothing more comes and lets the peer close first: closing with its bytes unread would reset the
    /// connection, and a reset may overtake our last messages.
    fn linger(&self, mut queue: MutexGuard<'_, Queue>, reason: &str) {
        if let Some(stream) = &queue.stream {
            // A socket that is gone already has nothing left to say.
            drop(stream.shutdown(Shutdown::Write));
        }
        self.wake
            .wait_while_for(&mut queue, |queue| queue.closed.is_none(), LINGER);
        queue.close(reason);
        drop(queue);
        self.has_ended();
    }

    /// After the end: all writes that were never sent or never pulled (lost), and those cancelled.
    pub(super) fn leftovers(&self) -> Leftovers {
        let mut queue = self.lock();
        let in_flight = std::mem::take(&mut queue.in_flight);
        let mut lost: Vec<_> = in_flight.values().map(|flying| flying.transfer).collect();
        lost.extend(queue.writes.drain(..).map(|w| w.transfer));
        queue.write_bytes = 0;
        queue.messages.clear();
        queue.message_bytes = 0;
        let cancelled = std::mem::take(&mut queue.cancelled);
        drop(queue);
        // Outside of the lock: a slot that comes back wakes connections, this one perhaps.
        drop(in_flight);
        Leftovers { lost, cancelled }
    }

    /// Waits until the connection is closed: what a stalled peer does.
    pub(super) fn wait_closed(&self) {
        self.wake
            .wait_while(&mut self.lock(), |queue| queue.closed.is_none());
    }

    /// Waits until the peer has pulled all that was described, or for the end, or as long as `patience`.
    pub(super) fn wait_pulled(&self, patience: Duration) {
        let open = |queue: &mut Queue| queue.closed.is_none() && !queue.in_flight.is_empty();
        self.wake.wait_while_for(&mut self.lock(), open, patience);
    }

    /// Why it was closed.
    pub(super) fn reason(&self) -> String {
        let queue = self.lock();
        queue.closed.clone().unwrap_or_default()
    }

    /// Wakes whoever waits for something of the queue, which was put there before.
    fn say(&self) {
        self.bell.ring();
        self.wake.notify_all();
    }

    /// The greetings are done: the peer can be told something.
    pub(super) fn greeted(&self) {
        // The writer locks the queue while it has the outlet, so nobody does the reverse.
        let stream = self.lock().stream.clone();
        if let Some(stream) = stream {
            self.outlet.open(stream);
        }
    }

    /// Has those wake up who will have to do with what comes soon; who asks the peer will read. Whose way is the longest comes first.
    pub(super) fn rouse(&self, rousing: Rousing) {
        let frame = Header::plain(rousing.kind(), 0).encode();
        if let Err(torn) = self.outlet.send_in_passing(&frame) {
            self.close(&torn.to_string());
        }
        if rousing == Rousing::There {
            self.pulls.rouse();
        }
        self.lock().roused = true;
        self.say();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock()
    }
}

// === what the peer pulls from us, and we from it ===

impl Connection {
    /// Has the peer told that its descriptors are not needed any more.
    pub(super) fn acknowledge(&self, sequences: &[u64]) {
        self.lock().pulled.extend_from_slice(sequences);
        self.say();
    }

    /// Books writes, by sequence number, before their descriptors are sent.
    pub(super) fn take_off(&self, writes: &mut Vec<(u64, InFlight)>) {
        if !writes.is_empty() {
            self.lock().in_flight.extend(writes.drain(..));
        }
    }

    /// Ends writes that the peer has pulled; they end before the first that there is not, which comes with them.
    pub(super) fn land(&self, sequences: &[u64]) -> (Vec<InFlight>, Option<u64>) {
        let mut queue = self.lock();
        let mut landed = Vec::with_capacity(sequences.len());
        let mut unknown = None;
        for sequence in sequences {
            match queue.in_flight.remove(sequence) {
                Some(flying) => landed.push(flying),
                None => {
                    unknown = Some(*sequence);
                    break;
                }
            }
        }
        queue.waits_for_slot = false;
        drop(queue);
        self.say();
        (landed, unknown)
    }

    /// Writes that the peer has not pulled yet; for tests that wait for it to know of them.
    #[cfg(test)]
    pub(super) fn in_flight(&self) -> usize {
        self.lock().in_flight.len()
    }

    /// Slots of the staging memory that the peer is reading.
    pub(super) fn slots_held(&self) -> usize {
        let queue = self.lock();
        let kept = queue.in_flight.values().map(|flying| &flying.kept);
        kept.filter(|kept| matches!(kept, Kept::Slot(_))).count()
    }

    /// Windows of a device's memory that the peer is reading.
    pub(super) fn windows_held(&self) -> usize {
        let queue = self.lock();
        let kept = queue.in_flight.values().map(|flying| &flying.kept);
        let windows = kept.filter_map(|kept| match kept {
            Kept::Window(slot) => Some(Arc::as_ptr(slot)),
            Kept::Sources(_) | Kept::Slot(_) | Kept::Spoilt(_) => None,
        });
        windows.collect::<HashSet<_>>().len()
    }

    /// What the peer has told of its windows, before anything is written to it.
    pub(super) fn has_windows(&self, bytes: usize) {
        self.window_bytes.get_or_init(|| bytes);
    }

    /// How much of a window of a device's memory the peer reads at once; none when it reads no windows.
    pub(super) fn window_bytes(&self) -> Option<usize> {
        self.window_bytes.get().copied()
    }

    /// From now on writes wait until [`Connection::slot_may_be_free`]. Said before a slot is asked for, so that no
    /// wake-up is lost.
    pub(super) fn wait_for_slot(&self) {
        self.lock().waits_for_slot = true;
    }

    /// Writes go on.
    pub(super) fn slot_may_be_free(&self) {
        self.lock().waits_for_slot = false;
        self.say();
    }

    /// Takes writes back that could not start yet; they stay the first.
    pub(super) fn put_back(&self, writes: Vec<Write>) {
        let mut queue = self.lock();
        if queue.finishing.is_some() || queue.closed.is_some() {
            let transfers = writes.iter().map(|write| write.transfer);
            queue.cancelled.extend(transfers);
            return;
        }
        queue.write_bytes += bytes_of(&writes);
        for write in writes.into_iter().rev() {
            queue.writes.push_front(write);
        }
    }
}

fn bytes_of<'a>(writes: impl IntoIterator<Item = &'a Write>) -> usize {
    let bytes = writes.into_iter().map(Write::total_bytes);
    bytes.sum()
}

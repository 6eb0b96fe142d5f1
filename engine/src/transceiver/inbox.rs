//! The one queue into the desk: commands from the engine thread, events from transports and checksum threads.
//!
//! Commands never wait; the caller's permits bound them. Events wait for room, so that a peer that floods us is
//! slowed by its own connection. Commands go first: a lease is known before anyone can ask for it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::handoff::{Fetch, HandoffError, Offer};
use crate::page::Page;
use crate::request::RequestId;
use crate::transport::vigil::{Bell, Vigil};
use crate::transport::{PeerId, RegionId, TransferId, TransportEvent};

use super::checksum::Checksums;
use super::plan::Plan;
use super::state::{Nonce, OpaqueState, RankRecord};

/// Happenings that wait for the desk at most; of each as much as one thread does at once.
const EVENTS_MAX: usize = 4096;

/// What the engine thread asks for.
#[derive(Debug)]
pub(super) enum Command {
    Offer {
        offer: Offer,
        nonce: Nonce,
    },
    Extend {
        ctx_request_id: u64,
        pages: Vec<Arc<Page>>,
    },
    Withdraw(u64),
    Fetch {
        fetch: Fetch,
        plan: Result<Box<Plan>, HandoffError>,
    },
    CancelFetch(RequestId),
    /// One fetch too many.
    Unfetched {
        fetch: Fetch,
        error: HandoffError,
    },
    /// A lease too many, on a rank that follows.
    Unoffered(u64),
    /// This rank leads so many, itself included.
    Lead {
        ranks: usize,
        secret: Nonce,
    },
    /// This rank reports to that one.
    Follow {
        leader: RankRecord,
        secret: Nonce,
    },
    /// A ticket that this side cannot use: the context server shall hear why, and need not keep its lease.
    Reject {
        ctx_request_id: u64,
        state: Box<OpaqueState>,
        reason: String,
    },
    /// Connect to the instance of this state.
    Meet(Box<OpaqueState>),
    Stop,
}

/// A page whose pieces have all landed, checked.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) transfer: TransferId,
    pub(super) region: RegionId,
    /// Index among the fetch's pages.
    pub(super) index: usize,
    pub(super) page: Page,
    /// The first piece that is not what was sent.
    pub(super) mismatch: Option<Mismatch>,
}

/// A piece that is not what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mismatch {
    /// Index among the fetch's sources.
    pub(super) source: usize,
    /// Index among the source's pieces.
    pub(super) piece: usize,
    pub(super) expected: u64,
    pub(super) found: u64,
}

/// Whose checksums are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SumsOf {
    /// Of a lease's pages, each as far as it is held.
    Lease(u64),
    /// Of the pieces that a lease's transfer has to itself.
    Transfer(u64, PeerId, TransferId),
}

/// What happens elsewhere.
#[derive(Debug)]
pub(super) enum Happening {
    Transport {
        /// Which transport.
        wire: usize,
        /// In order.
        events: Vec<TransportEvent>,
    },
    /// The next checksums.
    Hashed {
        of: SumsOf,
        checksums: Checksums,
    },
    /// The checksum threads hold no page for these any more.
    HashingEnded {
        of: SumsOf,
    },
    Checked(Vec<Checked>),
}

/// What the desk does next.
#[derive(Debug)]
pub(super) enum Input {
    Command(Command),
    /// All that has happened meanwhile, in order; at least one thing.
    Happenings(VecDeque<Happening>),
}

#[derive(Debug, Default)]
struct Lanes {
    commands: VecDeque<Command>,
    happenings: VecDeque<Happening>,
    closed: bool,
}

impl Lanes {
    fn has_some(&mut self) -> bool {
        !self.commands.is_empty() || !self.happenings.is_empty()
    }
}

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    lanes: Mutex<Lanes>,
    filled: Condvar,
    room: Condvar,
    vigil: Vigil,
    bell: Bell,
}

impl Inbox {
    /// One whose desk stays awake for so long.
    pub(super) fn new(vigil: Vigil) -> Self {
        Self {
            vigil,
            ..Self::default()
        }
    }

    /// Hands a command over; it comes back when the desk is gone.
    pub(super) fn command(&self, command: Command) -> Result<(), Box<Command>> {
        let mut lanes = self.lock();
        if lanes.closed {
            return Err(Box::new(command));
        }
        lanes.commands.push_back(command);
        drop(lanes);
        self.say();
        Ok(())
    }

    /// Reports something; waits for room, and forgets it when the desk is gone.
    pub(super) fn happened(&self, happening: Happening) {
        let mut lanes = self.lock();
        self.room.wait_while(&mut lanes, |lanes| {
            !lanes.closed && lanes.happenings.len() >= EVENTS_MAX
        });
        if lanes.closed {
            return;
        }
        lanes.happenings.push_back(happening);
        drop(lanes);
        self.say();
    }

    /// The next thing to do, or nothing by the deadline.
    pub(super) fn next(&self, deadline: Option<Instant>) -> Option<Input> {
        let mut lanes = self.lock();
        self.vigil.watch(&mut lanes, &self.bell, Lanes::has_some);
        loop {
            if let Some(command) = lanes.commands.pop_front() {
                return Some(Input::Command(command));
            }
            if !lanes.happenings.is_empty() {
                let happenings = std::mem::take(&mut lanes.happenings);
                drop(lanes);
                self.room.notify_all();
                return Some(Input::Happenings(happenings));
            }
            let Some(deadline) = deadline else {
                self.filled.wait(&mut lanes);
                continue;
            };
            if Instant::now() >= deadline {
                return None;
            }
            self.filled.wait_until(&mut lanes, deadline);
        }
    }

    /// Takes nothing more; returns the commands that nobody will carry out.
    pub(super) fn close(&self) -> Vec<Command> {
        let mut lanes = self.lock();
        lanes.closed = true;
        let left = lanes.commands.drain(..).collect();
        lanes.happenings.clear();
        drop(lanes);
        self.room.notify_all();
        left
    }

    /// Closes it when dropped: nobody waits for a desk that is gone.
    pub(super) const fn closing(self: Arc<Self>) -> ClosingInbox {
        ClosingInbox(self)
    }

    fn say(&self) {
        self.bell.ring();
        self.filled.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock()
    }
}

/// See [`Inbox::closing`].
#[derive(Debug)]
pub(super) struct ClosingInbox(Arc<Inbox>);

impl Drop for ClosingInbox {
    fn drop(&mut self) {
        self.0.close();
    }
}

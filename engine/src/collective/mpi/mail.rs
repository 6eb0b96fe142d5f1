//! Messages between any two ranks of the world, whichever instances they belong to: what moves KV between instances over
//! MPI.
//!
//! The mail has a communicator of its own, so that no message of an instance's group is taken for one of these. Nothing
//! here waits but [`open`]. Invariant: every rank of the world opens it, for opening it is a step that all take together.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::flight::{Flight, Patience};
use super::plugin::Group;
use super::watch::Watch;
use crate::collective::doing::Doing;

/// The tag under which rank 0 tells which world it is.
const IDENTITY: i32 = 1;

/// The first tag that is free for others.
pub(crate) const FIRST_TAG: i32 = 16;

/// Every MPI has tags up to here (MPI_TAG_UB is at least 32,767).
pub(crate) const LAST_TAG: i32 = 32_767;

/// Once in a process, as MPI is.
static MAIL: Mutex<Option<Arc<Mail>>> = Mutex::new(None);

/// This process's end of the mail.
#[derive(Debug)]
pub(crate) struct Mail {
    watch: Arc<Watch>,
    group: Group,
    world: [u8; 16],
}

/// The mail, where this process is a rank of an MPI world.
pub(crate) fn mail() -> Option<Arc<Mail>> {
    MAIL.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Whoever still holds it may end what is under way.
pub(super) fn close() {
    MAIL.lock().unwrap_or_else(PoisonError::into_inner).take();
}

/// Learns which world this is, so that others are told from it.
pub(super) fn open(watch: Arc<Watch>, group: Group, limit: Duration) -> Result<(), String> {
    let mut mail = Mail {
        watch,
        group,
        world: *uuid::Uuid::new_v4().as_bytes(),
    };
    let mut flights = Vec::new();
    if mail.rank() == 0 {
        let word = Arc::new(mail.world.to_vec());
        for rank in 1..mail.size() {
            flights.push(mail.post(rank, IDENTITY, Arc::clone(&word))?);
        }
    } else {
        flights.push(mail.expect(0, IDENTITY, vec![0; mail.world.len()])?);
    }
    let (deadline, patience) = (Instant::now() + limit, Patience::new());
    for flight in &mut flights {
        while !flight.test()? {
            if Instant::now() >= deadline {
                return Err(format!("{} took longer than {limit:?}", Doing::Meeting));
            }
            mail.check()?;
            patience.pause();
        }
    }
    if mail.rank() != 0
        && let Some(flight) = flights.pop()
    {
        let word = flight.into_bytes();
        mail.world = <[u8; 16]>::try_from(&word[..])
            .map_err(|_| format!("rank 0 named the world with {} bytes", word.len()))?;
    }
    *MAIL.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(mail));
    Ok(())
}

impl Mail {
    /// This process's number in the world.
    pub(crate) fn rank(&self) -> usize {
        self.group.rank()
    }

    /// Ranks of the world.
    pub(crate) fn size(&self) -> usize {
        self.group.size()
    }

    /// Tells this world from every other.
    pub(crate) fn world(&self) -> &[u8; 16] {
        &self.world
    }

    /// Starts to send.
    pub(crate) fn post(&self, to: usize, tag: i32, bytes: Arc<Vec<u8>>) -> Result<Flight, String> {
        Flight::send(self.watch.plugin(), &self.group, to, tag, bytes)
    }

    /// Starts to receive at most as many bytes as there are.
    pub(crate) fn expect(&self, from: usize, tag: i32, bytes: Vec<u8>) -> Result<Flight, String> {
        Flight::receive(self.watch.plugin(), &self.group, from, tag, bytes)
    }

    /// Sender and length of the next message with this tag that nobody expects yet, if there is one.
    pub(crate) fn arrived(&self, tag: i32) -> Result<Option<(usize, usize)>, String> {
        self.watch.plugin().probe_any(&self.group, tag)
    }

    /// Whether the world is as it should be; otherwise what ends it.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.watch.check().map_err(|error| error.to_string())
    }
}

//! The engine thread's only channel: requests, cancels and hand-off events, in the order they came.
//!
//! The channel itself has no bound, so that neither a sink nor a dropped stream ever waits for a step to end.
//! What can be in it is bounded: requests by the queue's capacity, cancels by open requests, hand-off events
//! by open leases and fetches.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use crate::handoff::{HandoffError, HandoffEvent, HandoffSink};
use crate::request::{Event, GenerateRequest, RequestId};

use super::handle::QueuePlace;

/// A request with its way back.
#[derive(Debug)]
pub(super) struct Submission {
    pub(super) id: RequestId,
    pub(super) request: GenerateRequest,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) place: QueuePlace,
    pub(super) submitted: Instant,
}

/// All that the engine thread can be told.
#[derive(Debug)]
pub(super) enum Command {
    Submit(Box<Submission>),
    Cancel(RequestId),
    Handoff(HandoffEvent),
    /// Connect to the context instance of this state, and say whether its KV can be taken.
    Meet {
        state: Vec<u8>,
        met: oneshot::Sender<Result<(), HandoffError>>,
    },
    /// Finish what runs until then; take nothing new.
    Shutdown(Instant),
}

/// Made before the engine, so that the transceiver can be made before it too.
#[derive(Debug)]
pub struct Inbox {
    pub(super) sender: Sender<Command>,
    pub(super) receiver: Receiver<Command>,
    pub(super) capacity: usize,
}

impl Inbox {
    /// An inbox in which at most `capacity` requests wait.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let (sender, receiver) = channel();
        Self {
            sender,
            receiver,
            capacity,
        }
    }

    /// Where the transceiver reports. Events that come after the engine has ended are dropped, pages included.
    #[must_use]
    pub fn handoff_sink(&self) -> HandoffSink {
        let sender = self.sender.clone();
        Arc::new(move |event| {
            if sender.send(Command::Handoff(event)).is_err() {
                tracing::debug!("a hand-off event came after the engine had ended");
            }
        })
    }
}

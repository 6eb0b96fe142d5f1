//! The HTTP side's view of the engine: submit, read, look, stop. Nothing here waits for the engine thread.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use crate::handoff::HandoffError;
use crate::metrics::{EngineStats, IterationStats};
use crate::prefix::KvEvent;
use crate::request::{Event, GenerateRequest, RequestFailure, RequestId, SubmitError};

use super::inbox::{Command, Inbox, Submission};
use super::{EngineConfig, door};

/// What a request must fit into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Most tokens of a prompt and its answer together: the configured length or the pool's size.
    pub max_seq_len: usize,
    /// Whether it is the pool that bounds `max_seq_len`.
    pub bounded_by_pool: bool,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Blocks in the pool.
    pub block_count: usize,
    /// Tokens per block.
    pub tokens_per_block: usize,
    /// Whether context-only and generation-only requests can be served.
    pub has_handoff: bool,
}

impl EngineLimits {
    pub(super) fn new(config: &EngineConfig, vocab: usize, has_handoff: bool) -> Self {
        let pool = config.block_count.saturating_mul(config.tokens_per_block);
        Self {
            max_seq_len: config.max_seq_len.min(pool),
            bounded_by_pool: pool < config.max_seq_len,
            vocab,
            block_count: config.block_count,
            tokens_per_block: config.tokens_per_block,
            has_handoff,
        }
    }
}

/// A ring that forgets the oldest; of size 0, everything.
#[derive(Debug)]
struct Ring<T> {
    items: Mutex<VecDeque<T>>,
    capacity: usize,
}

impl<T> Ring<T> {
    fn new(capacity: usize) -> Self {
        Self {
            items: Mutex::new(VecDeque::new()),
            capacity,
        }
    }

    fn push(&self, item: T) {
        if self.capacity == 0 {
            return;
        }
        let mut items = lock(&self.items);
        if items.len() == self.capacity {
            items.pop_front();
        }
        items.push_back(item);
    }

    fn take(&self) -> Vec<T> {
        lock(&self.items).drain(..).collect()
    }
}

/// What both sides see.
#[derive(Debug)]
pub(super) struct Shared {
    commands: Sender<Command>,
    queue_capacity: usize,
    queued: AtomicUsize,
    next_id: AtomicU64,
    alive: AtomicBool,
    accepting: AtomicBool,
    limits: EngineLimits,
    stats: Mutex<EngineStats>,
    iterations: Ring<IterationStats>,
    kv_events: Ring<KvEvent>,
}

impl Shared {
    pub(super) fn new(
        inbox: Inbox,
        limits: EngineLimits,
        config: &EngineConfig,
    ) -> (Self, Receiver<Command>) {
        let shared = Self {
            commands: inbox.sender,
            queue_capacity: inbox.capacity,
            queued: AtomicUsize::new(0),
            next_id: AtomicU64::new(1),
            alive: AtomicBool::new(true),
            accepting: AtomicBool::new(true),
            limits,
            stats: Mutex::new(EngineStats::default()),
            iterations: Ring::new(config.iteration_stats_max),
            kv_events: Ring::new(config.event_buffer_max_size),
        };
        (shared, inbox.receiver)
    }

    pub(super) fn limits(&self) -> EngineLimits {
        self.limits
    }

    pub(super) fn set_stats(&self, stats: &EngineStats) {
        lock(&self.stats).clone_from(stats);
    }

    pub(super) fn push_iteration(&self, stats: IterationStats) {
        self.iterations.push(stats);
    }

    pub(super) fn push_kv_events(&self, events: Vec<KvEvent>) {
        for event in events {
            self.kv_events.push(event);
        }
    }

    pub(super) fn stop_accepting(&self) {
        self.accepting.store(false, Ordering::SeqCst);
    }

    pub(super) fn set_dead(&self) {
        self.stop_accepting();
        self.alive.store(false, Ordering::SeqCst);
    }

    /// Tells the engine thread something; false when it is gone.
    pub(super) fn tell(&self, command: Command) -> bool {
        self.commands.send(command).is_ok()
    }
}

/// A place in the bounded queue, held until the request's first step or its end.
#[derive(Debug)]
pub(super) struct QueuePlace(Arc<Shared>);

impl QueuePlace {
    /// `None` when the queue is full.
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let capacity = shared.queue_capacity;
        shared
            .queued
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |queued| {
                (queued < capacity).then_some(queued + 1)
            })
            .ok()
            .map(|_| Self(Arc::clone(shared)))
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.0.queued.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The way to the engine thread, as many as needed.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

impl EngineHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Hands a request in. Does not wait.
    ///
    /// # Errors
    /// [`SubmitError::Busy`] when the queue is full, [`SubmitError::Unservable`] when the request can never be
    /// served here, [`SubmitError::Stopped`] when the engine is going down or gone.
    pub fn submit(&self, request: GenerateRequest) -> Result<RequestStream, SubmitError> {
        let shared = &self.shared;
        if !shared.accepting.load(Ordering::SeqCst) {
            return Err(SubmitError::Stopped);
        }
        door::check(&request, &shared.limits).map_err(SubmitError::Unservable)?;
        let place = QueuePlace::take(shared).ok_or(SubmitError::Busy {
            queued: shared.queue_capacity,
        })?;
        let id = RequestId(shared.next_id.fetch_add(1, Ordering::SeqCst));
        let (events, receiver) = mpsc::channel(door::events_max(&request, &shared.limits));
        let submission = Submission {
            id,
            request,
            events,
            place,
            submitted: Instant::now(),
        };
        if !shared.tell(Command::Submit(Box::new(submission))) {
            return Err(SubmitError::Stopped);
        }
        Ok(RequestStream {
            id,
            events: receiver,
            ended: false,
            shared: Arc::clone(shared),
        })
    }

    /// Gives a request up. One that is still open ends with [`crate::request::FinishReason::Cancelled`]; of a
    /// context-only one that has its ticket, the lease is withdrawn. Unknown numbers do nothing.
    pub fn cancel(&self, id: RequestId) {
        self.shared.tell(Command::Cancel(id));
    }

    /// Has every rank connect to the context instance of a state, before there is anything to fetch. The answer comes when
    /// it is known whether its KV can be taken; none when the engine ends before.
    #[must_use]
    pub fn meet(&self, state: Vec<u8>) -> oneshot::Receiver<Result<(), HandoffError>> {
        let (met, answer) = oneshot::channel();
        self.shared.tell(Command::Meet { state, met });
        answer
    }

    /// The engine as of its last step.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        lock(&self.shared.stats).clone()
    }

    /// Requests that wait for their first step, those included that the engine thread has not seen yet.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.shared.queued.load(Ordering::SeqCst)
    }

    /// What requests must fit into.
    #[must_use]
    pub fn limits(&self) -> EngineLimits {
        self.shared.limits
    }

    /// Iterations since the last call, oldest first, as far as the ring kept them.
    #[must_use]
    pub fn take_iterations(&self) -> Vec<IterationStats> {
        self.shared.iterations.take()
    }

    /// KV cache events since the last call, oldest first, as far as the ring kept them.
    #[must_use]
    pub fn take_kv_events(&self) -> Vec<KvEvent> {
        self.shared.kv_events.take()
    }

    /// Whether the engine thread runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.shared.alive.load(Ordering::SeqCst)
    }

    /// Begins to stop: nothing new is taken, queued requests fail, running ones and leases may finish until the
    /// deadline. Does not wait; [`super::EngineThread::join`] does. A second call may only bring the deadline forward.
    pub fn shutdown(&self, deadline: Instant) {
        self.shared.stop_accepting();
        self.shared.tell(Command::Shutdown(deadline));
    }
}

/// The events of one request. Dropping it before the last event cancels the request.
#[derive(Debug)]
pub struct RequestStream {
    id: RequestId,
    events: mpsc::Receiver<Event>,
    ended: bool,
    shared: Arc<Shared>,
}

impl RequestStream {
    /// The request's number.
    #[must_use]
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The next event; `None` after [`Event::Finished`] or [`Event::Failed`]. Cancel-safe.
    pub async fn next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = self.events.recv().await;
        self.note(event)
    }

    /// As [`Self::next`], for hand-written bodies and streams.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.events.poll_recv(context).map(|event| self.note(event))
    }

    /// As [`Self::next`], for threads that are not part of an async runtime.
    #[must_use]
    pub fn blocking_next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = self.events.blocking_recv();
        self.note(event)
    }

    fn note(&mut self, event: Option<Event>) -> Option<Event> {
        // The channel closes without a last event only when the engine thread ended between two of its own lines.
        let event = event.unwrap_or_else(|| {
            Event::Failed(RequestFailure::Engine("the engine has ended".to_owned()))
        });
        self.ended = matches!(event, Event::Finished { .. } | Event::Failed(_));
        Some(event)
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        if !self.ended {
            self.shared.tell(Command::Cancel(self.id));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

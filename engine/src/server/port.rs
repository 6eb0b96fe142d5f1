//! What the HTTP side needs of the engine thread. Two implementers: the engine's handle, and the scripted
//! engine of the tests.

use std::fmt::Debug;
use std::task::{Context, Poll};

use serde_json::Value;
use tokio::sync::oneshot;

use crate::handoff::HandoffError;
use crate::metrics::{EngineStats, IterationStats};
use crate::request::{Event, GenerateRequest, SubmitError};

/// The events of one request. Dropping it cancels the request.
pub(crate) trait EventSource: Debug + Send {
    /// The next event; `None` after the last one, or when the engine thread is gone.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>>;

    /// Gives the request up. The engine still reports its end, with what it cost; of a context-only request that
    /// has ended already, the lease is withdrawn.
    fn cancel(&mut self);
}

/// A running engine.
pub(crate) trait EnginePort: Debug + Send + Sync {
    /// Hands a request over.
    fn submit(&self, request: GenerateRequest) -> Result<Box<dyn EventSource>, SubmitError>;

    /// As [`crate::engine::EngineHandle::meet`].
    fn meet(&self, state: Vec<u8>) -> oneshot::Receiver<Result<(), HandoffError>>;

    /// Whether the engine thread runs.
    fn is_alive(&self) -> bool;

    /// Requests that wait for their first step, those included that the engine has not seen yet.
    fn queued(&self) -> usize;

    /// Its counters as of its last step.
    fn stats(&self) -> EngineStats;

    /// Statistics of the steps since the last call, oldest first.
    fn take_iterations(&self) -> Vec<IterationStats>;

    /// KV cache events since the last call, oldest first.
    fn take_kv_events(&self) -> Vec<Value>;
}

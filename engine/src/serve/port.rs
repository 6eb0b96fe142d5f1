//! The engine's handle as the HTTP side's [`EnginePort`].

use std::task::{Context, Poll};

use serde_json::Value;
use tokio::sync::oneshot;

use crate::engine::{EngineHandle, RequestStream};
use crate::handoff::HandoffError;
use crate::metrics::{EngineStats, IterationStats};
use crate::request::{Event, GenerateRequest, SubmitError};
use crate::server::port::{EnginePort, EventSource};

/// A request's events with the way to give it up.
#[derive(Debug)]
struct Answer {
    stream: RequestStream,
    engine: EngineHandle,
}

impl EventSource for Answer {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.stream.poll_next(cx)
    }

    fn cancel(&mut self) {
        self.engine.cancel(self.stream.id());
    }
}

impl EnginePort for EngineHandle {
    fn submit(&self, request: GenerateRequest) -> Result<Box<dyn EventSource>, SubmitError> {
        let stream = Self::submit(self, request)?;
        Ok(Box::new(Answer {
            stream,
            engine: self.clone(),
        }))
    }

    fn meet(&self, state: Vec<u8>) -> oneshot::Receiver<Result<(), HandoffError>> {
        Self::meet(self, state)
    }

    fn is_alive(&self) -> bool {
        Self::is_alive(self)
    }

    fn queued(&self) -> usize {
        Self::queued(self)
    }

    fn stats(&self) -> EngineStats {
        Self::stats(self)
    }

    fn take_iterations(&self) -> Vec<IterationStats> {
        Self::take_iterations(self)
    }

    fn take_kv_events(&self) -> Vec<Value> {
        let events = Self::take_kv_events(self);
        // Plain data always serialises; an event that did not would not be worth the others.
        events
            .iter()
            .filter_map(|event| serde_json::to_value(event).ok())
            .collect()
    }
}

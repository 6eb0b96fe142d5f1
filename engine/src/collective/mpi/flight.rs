//! Bytes that MPI is sending or receiving, with their memory, and how to wait for them.
//!
//! Invariant: MPI may touch the memory until the request is done, so a flight that is given up keeps it for ever. That
//! happens only when the world ends.

use std::fmt::{self, Debug};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::plugin::{Group, Plugin, Request};

/// For so long a wait only gives way to other threads: most answers come sooner.
const YIELD_FOR: Duration = Duration::from_micros(200);

/// The longest sleep of a wait.
const SLEEP_MAX: Duration = Duration::from_micros(500);

/// The memory of a flight.
enum Bytes {
    Received(Vec<u8>),
    Sent(Arc<Vec<u8>>),
}

/// Something on its way.
pub(crate) struct Flight {
    plugin: Arc<Plugin>,
    /// `None` once it is done.
    request: Option<Request>,
    bytes: Option<Bytes>,
    received: usize,
}

impl Debug for Flight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flight")
            .field("open", &self.request.is_some())
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}

impl Flight {
    pub(super) fn send(
        plugin: &Arc<Plugin>,
        group: &Group,
        to: usize,
        tag: i32,
        bytes: Arc<Vec<u8>>,
    ) -> Result<Self, String> {
        let request = plugin.start_send(group, to, tag, &bytes)?;
        Ok(Self::new(plugin, request, Bytes::Sent(bytes)))
    }

    /// Receives at most as many bytes as there are.
    pub(super) fn receive(
        plugin: &Arc<Plugin>,
        group: &Group,
        from: usize,
        tag: i32,
        mut bytes: Vec<u8>,
    ) -> Result<Self, String> {
        let request = plugin.start_receive(group, from, tag, &mut bytes)?;
        Ok(Self::new(plugin, request, Bytes::Received(bytes)))
    }

    fn new(plugin: &Arc<Plugin>, request: Request, bytes: Bytes) -> Self {
        Self {
            plugin: Arc::clone(plugin),
            request: Some(request),
            bytes: Some(bytes),
            received: 0,
        }
    }

    /// Whether it is done.
    pub(crate) fn test(&mut self) -> Result<bool, String> {
        let Some(request) = self.request.take() else {
            return Ok(true);
        };
        match self.plugin.test(request) {
            Ok(Ok(received)) => {
                self.received = received;
                Ok(true)
            }
            Ok(Err(open)) => {
                self.request = Some(open);
                Ok(false)
            }
            Err(reason) => {
                // What MPI still does with the memory after an error is not known.
                std::mem::forget(self.bytes.take());
                Err(reason)
            }
        }
    }

    /// Bytes that came, once it is done.
    pub(crate) fn received(&self) -> usize {
        self.received
    }

    /// The memory of one that is done; empty where it is shared.
    pub(crate) fn into_bytes(mut self) -> Vec<u8> {
        assert!(self.request.is_none(), "MPI still has the memory");
        match self.bytes.take() {
            Some(Bytes::Received(bytes)) => bytes,
            Some(Bytes::Sent(bytes)) => Arc::try_unwrap(bytes).unwrap_or_default(),
            None => Vec::new(),
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if self.request.is_some() {
            std::mem::forget(self.bytes.take());
        }
    }
}

/// A wait for MPI, which has nothing that a thread could sleep on: it is asked again and again, ever more rarely, so that
/// an answer is seen late by an eighth of what it took at most.
#[derive(Debug)]
pub(crate) struct Patience {
    since: Instant,
}

impl Patience {
    pub(crate) fn new() -> Self {
        Self {
            since: Instant::now(),
        }
    }

    pub(crate) fn pause(&self) {
        let waited = self.since.elapsed();
        if waited < YIELD_FOR {
            std::thread::yield_now();
        } else {
            std::thread::park_timeout((waited / 8).min(SLEEP_MAX));
        }
    }
}

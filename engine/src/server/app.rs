//! The server's state from bind to end: loading, serving, draining. One value, read by every request.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::server::body::Bodies;
use crate::server::error::ApiError;
use crate::server::perf::SteadyClock;
use crate::server::service::Service;

/// What the server is and can do now.
#[derive(Debug)]
pub(crate) struct App {
    /// What start-up is doing, for people: `loading the model, 43 %`.
    stage: Mutex<String>,
    service: OnceLock<Arc<Service>>,
    draining: AtomicBool,
    pub(crate) clock: SteadyClock,
    pub(crate) bodies: Bodies,
}

impl App {
    /// A server that has just been bound.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            stage: Mutex::new("starting".to_owned()),
            service: OnceLock::new(),
            draining: AtomicBool::new(false),
            clock: SteadyClock::new(),
            bodies: Bodies::new(),
        })
    }

    /// Says what start-up is doing.
    pub(crate) fn set_stage(&self, stage: String) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
    }

    /// Begins to serve. Only the first call counts.
    pub(crate) fn open(&self, service: Arc<Service>) {
        if self.service.set(service).is_err() {
            tracing::error!("the server was opened twice; the first model stays");
        }
    }

    /// Stops taking generation requests; those that run go on.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// The loaded model, or why there is none.
    pub(crate) fn loaded(&self) -> Result<&Arc<Service>, ApiError> {
        self.service.get().ok_or_else(|| {
            let stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
            ApiError::unavailable(stage.clone())
        })
    }

    /// The loaded model, if it takes requests now.
    pub(crate) fn ready(&self) -> Result<&Arc<Service>, ApiError> {
        let service = self.loaded()?;
        if self.draining.load(Ordering::Acquire) {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        if !service.engine.is_alive() {
            return Err(ApiError::unavailable("the engine is not running"));
        }
        Ok(service)
    }
}

//! A place in a stream that can be waited for without waiting for what was put there later, by the host or by another stream.

#![expect(unsafe_code, reason = "the driver is a C library")]

use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Gpu, check};
use super::error::CudaError;

/// A mark in a stream.
#[derive(Debug)]
pub(super) struct Event {
    event: sys::CUevent,
    gpu: Arc<Gpu>,
}

// SAFETY: a handle with one owner, which the driver guards.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// One that is in no stream yet: waiting for it does not wait.
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        gpu.bind()?;
        let mut event = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the context is current; the event is destroyed when self is dropped.
        check("cuEventCreate", unsafe {
            sys::cuEventCreate(&raw mut event, flags)
        })?;
        Ok(Self {
            event,
            gpu: Arc::clone(gpu),
        })
    }

    /// Puts it behind everything that was put on the stream so far.
    pub(super) fn record(&self) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: event and stream are alive and of one context.
        check("cuEventRecord", unsafe {
            sys::cuEventRecord(self.event, self.gpu.stream())
        })
    }

    /// Waits until the stream has passed it.
    pub(super) fn wait(&self) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: the event is alive.
        check("cuEventSynchronize", unsafe {
            sys::cuEventSynchronize(self.event)
        })
    }

    /// What is put on another stream after this waits until the point has passed.
    pub(super) fn hold_back(&self, other: &Gpu) -> Result<(), CudaError> {
        other.bind()?;
        // SAFETY: event and stream are of the same device's context and alive.
        check("cuStreamWaitEvent", unsafe {
            sys::cuStreamWaitEvent(other.stream(), self.event, 0)
        })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        drop(self.gpu.bind());
        // SAFETY: made in new, destroyed nowhere else; the driver keeps it until the stream has passed it.
        drop(check("cuEventDestroy", unsafe {
            sys::cuEventDestroy_v2(self.event)
        }));
    }
}

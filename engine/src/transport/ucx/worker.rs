//! The door to libucp, second part: a worker, which drives what is under way on behalf of whoever owns it.
//!
//! Invariant: a worker is used by one thread at a time, which holds it exclusively; it was made for that.
#![expect(
    unsafe_code,
    reason = "libucp is a C library; workers are handles of it"
)]

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::time::{Duration, Instant};

use baton_ucx_sys as sys;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sys::{Status, status_of_pointer};

use super::context::{CallError, Context};

/// How long a worker that ends may take to bring its own messages out.
const SETTLE: Duration = Duration::from_secs(1);

/// Longest sleep meanwhile.
const SETTLE_LOOK: Duration = Duration::from_millis(20);

/// What drives transfers: of the peers that read from us, or of ours from one peer.
pub(super) struct Worker {
    context: &'static Context,
    raw: NonNull<sys::Worker>,
    event: std::os::fd::RawFd,
}

// SAFETY: the worker was made for many threads, one at a time; whoever calls it holds it exclusively or only reads what
// does not change.
unsafe impl Send for Worker {}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "worker of {:?}", self.context)
    }
}

impl Worker {
    pub(super) fn new(context: &'static Context) -> Result<Self, CallError> {
        let mut params = sys::WorkerParams::zeroed();
        params.field_mask = sys::UCP_WORKER_PARAM_FIELD_THREAD_MODE;
        params.thread_mode = sys::UCS_THREAD_MODE_SERIALIZED;
        let functions = &context.library.functions;
        let mut raw = ptr::null_mut();
        // SAFETY: the context stays, the parameters are whole, and the call stores a worker of ours.
        let status = unsafe { (functions.ucp_worker_create)(context.as_ptr(), &params, &mut raw) };
        context.checked("ucp_worker_create", status)?;
        let raw = NonNull::new(raw).ok_or_else(|| context.nothing("ucp_worker_create"))?;
        let mut worker = Self {
            context,
            raw,
            event: -1,
        };
        // SAFETY: the worker is alive and of a context with wake-ups; the number is ours.
        let status = unsafe { (functions.ucp_worker_get_efd)(raw.as_ptr(), &mut worker.event) };
        context.checked("ucp_worker_get_efd", status)?;
        Ok(worker)
    }

    pub(super) fn context(&self) -> &'static Context {
        self.context
    }

    pub(super) fn as_ptr(&self) -> *mut sys::Worker {
        self.raw.as_ptr()
    }

    /// Where peers connect to.
    pub(super) fn address(&self) -> Result<Vec<u8>, CallError> {
        let functions = &self.context.library.functions;
        let (mut raw, mut bytes) = (ptr::null_mut(), 0);
        // SAFETY: the worker is alive; the call stores an address that is ours to release, and its length.
        let status =
            unsafe { (functions.ucp_worker_get_address)(self.as_ptr(), &mut raw, &mut bytes) };
        self.context.checked("ucp_worker_get_address", status)?;
        // SAFETY: the call succeeded, so the address has this length and nobody changes it.
        let address = unsafe { std::slice::from_raw_parts(raw.cast::<u8>(), bytes) }.to_vec();
        // SAFETY: it came from this worker and is released once.
        unsafe { (functions.ucp_worker_release_address)(self.as_ptr(), raw) };
        Ok(address)
    }

    /// Does what can be done now; whether that was anything.
    pub(super) fn progress(&mut self) -> bool {
        // SAFETY: the worker is alive and held exclusively.
        unsafe { (self.context.library.functions.ucp_worker_progress)(self.as_ptr()) != 0 }
    }

    /// Whether the worker's descriptor will tell of the next thing to do; not so when there is something already.
    fn arm(&mut self) -> bool {
        // SAFETY: the worker is alive and held exclusively.
        let status = unsafe { (self.context.library.functions.ucp_worker_arm)(self.as_ptr()) };
        status == Status::OK
    }

    /// Waits until there is something to do, the other descriptor can be read or is hung up, or the time is over.
    /// Whether it was the other descriptor.
    pub(super) fn wait(&mut self, other: Option<BorrowedFd<'_>>, at_most: Duration) -> bool {
        // A descriptor that is not armed stays silent, so there must be no sleep; the other one is looked at all the same.
        let at_most = if self.arm() { at_most } else { Duration::ZERO };
        let event = self.as_fd();
        let mut polled = vec![PollFd::new(event, PollFlags::POLLIN)];
        polled.extend(other.map(|other| PollFd::new(other, PollFlags::POLLIN)));
        let timeout = PollTimeout::try_from(at_most).unwrap_or(PollTimeout::MAX);
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            // Not with these arguments; and if it were, the caller's loop would only be a busy one.
            Err(error) => tracing::debug!(%error, "cannot wait for UCX"),
        }
        let hung_up = |polled: &PollFd<'_>| polled.any() == Some(true);
        polled.get(1).is_some_and(hung_up)
    }
}

impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the worker's, and open as long as the worker is alive.
        unsafe { BorrowedFd::borrow_raw(self.event) }
    }
}

impl Worker {
    /// Waits a bounded time until no message of UCX's own is under way; whether none is.
    fn settle(&mut self) -> bool {
        let functions = &self.context.library.functions;
        let params = sys::RequestParams::zeroed();
        // SAFETY: the worker is alive and held exclusively.
        let pointer = unsafe { (functions.ucp_worker_flush_nbx)(self.as_ptr(), &params) };
        // A flush that cannot even begin has nothing to wait for.
        let Ok(Some(request)) = status_of_pointer(pointer) else {
            return true;
        };
        let deadline = Instant::now() + SETTLE;
        loop {
            let idle = !self.progress();
            // SAFETY: the request is the flush, which is freed below only.
            let status = unsafe { (functions.ucp_request_check_status)(request.as_ptr()) };
            let over = status != Status::IN_PROGRESS;
            if over || Instant::now() >= deadline {
                // SAFETY: nobody asks for it again; one that is under way is freed when it is over.
                unsafe { (functions.ucp_request_free)(request.as_ptr()) };
                return over;
            }
            if idle {
                self.wait(None, SETTLE_LOOK);
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Version 1.13 ends the process if its own messages are still under way when a worker ends. A peer that is stopped
        // can keep them there for ever; then the worker stays, and since nobody drives it, it does nothing more.
        if !self.settle() {
            tracing::warn!(
                "UCX has messages to a peer that does not take them; their worker is left as it is"
            );
            return;
        }
        // SAFETY: the worker is alive and this is its only owner's end. UCX ends its endpoints and requests with it.
        unsafe { (self.context.library.functions.ucp_worker_destroy)(self.as_ptr()) };
    }
}

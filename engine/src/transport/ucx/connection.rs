//! The door to libucp, third part: an endpoint to one peer, the keys of its memory, and reads that are under way.
//!
//! A read either copies from memory of the peer that UCX has mapped here (then nothing is ever under way), or submits
//! gets, a bounded number at a time. Invariant: when [`Connection::read`] returns, no get is under way. To be sure of
//! that after a failure, the endpoint is closed by force and its worker ended, whatever the peer does; so a connection
//! that failed once is of no more use.
#![expect(
    unsafe_code,
    reason = "libucp is a C library; it writes memory of ours until it says that it is done"
)]

use std::ffi::c_void;
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use baton_ucx_sys as sys;
use sys::{Status, status_of_pointer};

use super::context::{CallError, Context};
use super::mapped;
use super::text::CText;
use super::worker::Worker;
use crate::transport::checksum::Summing;
use crate::transport::fabric::ReadJob;

/// Gets under way at once.
const GETS_MAX: usize = 128;

/// Longest get. Longer stretches are cut, so that a cancelled read ends soon.
const GET_BYTES_MAX: usize = 1 << 20;

/// Bytes copied from mapped memory between two looks at the clock.
const COPY_BYTES_MAX: usize = 4 << 20;

/// Rounds without any progress before waiting for an event.
const SPINS: u32 = 200;

/// Longest wait for an event, after which clock and flag are looked at.
const WAIT: Duration = Duration::from_millis(20);

/// How long a forced close may take; then the worker is ended, whatever is under way.
const CLOSE: Duration = Duration::from_secs(1);

/// How a read or a connection attempt ended, if not well.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("not done in time")]
    TimedOut,
    #[error("given up")]
    Cancelled,
    #[error("another process answers at its address")]
    Stranger,
    #[error("the connection failed before")]
    Failed,
    #[error("{0} bytes at {1} are not within the memory")]
    Outside(usize, usize),
}

/// Until when, and unless what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits<'a> {
    pub(super) deadline: Instant,
    /// The caller's flag.
    pub(super) cancelled: &'a AtomicBool,
    /// The fabric's flag.
    pub(super) closed: &'a AtomicBool,
}

impl Limits<'_> {
    fn check(&self) -> Result<(), ConnectionError> {
        let given_up = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        if given_up(self.cancelled) || given_up(self.closed) {
            return Err(ConnectionError::Cancelled);
        }
        if Instant::now() >= self.deadline {
            return Err(ConnectionError::TimedOut);
        }
        Ok(())
    }
}

/// A peer's memory, as this connection reaches it.
#[derive(Debug)]
struct RemoteMemory {
    key: NonNull<sys::RemoteKey>,
    /// Where it begins in the peer.
    base: u64,
    bytes: usize,
    /// Where it begins here, if UCX has mapped it.
    mapped: Option<NonNull<u8>>,
    /// Whether it is memory of a GPU.
    on_gpu: bool,
}

/// What is alive of a connection until it fails.
struct Live {
    worker: Worker,
    endpoint: NonNull<sys::Endpoint>,
    memories: Vec<RemoteMemory>,
    /// Requests that are not over, with the batch that each is of.
    under_way: Vec<(u64, NonNull<c_void>)>,
    /// Of what is submitted now.
    batch: u64,
    /// Bytes copied since the clock was looked at.
    copied_bytes: usize,
}

/// A way to one peer's memory.
pub(super) struct Connection {
    context: &'static Context,
    /// None once failed.
    live: Option<Live>,
    /// What the endpoint's handler was told. UCX has a pointer to it as long as the worker lives, which ends before.
    failure: Box<AtomicI32>,
}

// SAFETY: everything in it belongs to the worker, which may go from thread to thread; mapped memory is only read.
unsafe impl Send for Connection {}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let memories = self.live.as_ref().map(|live| &live.memories);
        f.debug_struct("Connection")
            .field("context", &self.context)
            .field("memories", &memories)
            .finish_non_exhaustive()
    }
}

unsafe extern "C" fn failed(failure: *mut c_void, _endpoint: *mut sys::Endpoint, status: Status) {
    // SAFETY: the argument is the connection's `failure`, which outlives the worker that calls this.
    let failure = unsafe { &*failure.cast::<AtomicI32>() };
    failure.store(status.0, Ordering::Relaxed);
}

impl Connection {
    /// Connects to the worker with this address, and waits until that has answered, where the wire is one that asks.
    pub(super) fn open(
        context: &'static Context,
        address: &[u8],
        limits: Limits<'_>,
    ) -> Result<Self, ConnectionError> {
        let worker = Worker::new(context)?;
        let failure = Box::<AtomicI32>::default();
        let mut params = sys::EndpointParams::zeroed();
        params.field_mask = sys::UCP_EP_PARAM_FIELD_REMOTE_ADDRESS
            | sys::UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
            | sys::UCP_EP_PARAM_FIELD_ERR_HANDLER;
        params.address = address.as_ptr().cast();
        params.err_mode = sys::UCP_ERR_HANDLING_MODE_PEER;
        params.err_handler.cb = Some(failed);
        params.err_handler.arg = ptr::from_ref(&*failure).cast_mut().cast();
        let mut raw = ptr::null_mut();
        // SAFETY: the worker is alive; the address is one that UCX made, as its record's checksum says, and is copied;
        // the handler's argument outlives the worker.
        let status = unsafe {
            (context.library.functions.ucp_ep_create)(worker.as_ptr(), &params, &mut raw)
        };
        context.checked("ucp_ep_create", status)?;
        let endpoint = NonNull::new(raw).ok_or_else(|| context.nothing("ucp_ep_create"))?;
        let live = Live {
            worker,
            endpoint,
            memories: Vec::new(),
            under_way: Vec::new(),
            batch: 0,
            copied_bytes: 0,
        };
        let mut connection = Self {
            context,
            live: Some(live),
            failure,
        };
        connection.carry_out(limits, |live| live.flush())?;
        Ok(connection)
    }

    /// Makes memory of the peer known here; its number for [`Self::read`].
    pub(super) fn add(
        &mut self,
        range: (u64, usize),
        on_gpu: bool,
        key: &[u8],
    ) -> Result<usize, ConnectionError> {
        let live = self.live.as_mut().ok_or(ConnectionError::Failed)?;
        Ok(live.add(range, on_gpu, key)?)
    }

    /// Whether this memory is mapped here, and is read by copying.
    pub(super) fn is_mapped(&self, memory: usize) -> bool {
        let memories = self.live.as_ref().map(|live| &live.memories);
        memories
            .and_then(|memories| memories.get(memory))
            .is_some_and(|memory| memory.mapped.is_some())
    }

    /// What UCX says of the endpoint, for people.
    pub(super) fn description(&self) -> Option<String> {
        let live = self.live.as_ref()?;
        let mut text = CText::new()?;
        let print = self.context.library.functions.ucp_ep_print_info;
        // SAFETY: the endpoint is open, and the stream is one of the C library's that is closed after.
        unsafe { print(live.endpoint.as_ptr(), text.stream().cast()) };
        text.finish()
    }

    /// Reads all jobs; see the module. The jobs' handles are the numbers that [`Self::add`] gave.
    pub(super) fn read(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        limits: Limits<'_>,
    ) -> Result<(), ConnectionError> {
        self.carry_out(limits, |live| live.submit_all(jobs, limits))
    }

    /// Begins to read jobs from memory of GPUs into pages of GPUs; the batch's number for [`Self::finish`]. Their memory is
    /// written until that has returned, or the connection ended.
    pub(super) fn begin(
        &mut self,
        jobs: &[ReadJob<'_>],
        limits: Limits<'_>,
    ) -> Result<u64, ConnectionError> {
        let mut batch = 0;
        self.carry(limits, |live| {
            live.batch += 1;
            batch = live.batch;
            live.submit_on_gpu(jobs)
        })?;
        Ok(batch)
    }

    /// Waits for a batch and those before it.
    pub(super) fn finish(&mut self, batch: u64, limits: Limits<'_>) -> Result<(), ConnectionError> {
        self.carry(limits, |live| {
            live.wait_while(limits, |live| {
                live.under_way.iter().any(|(of, _)| *of <= batch)
            })
        })
    }

    /// Submits, waits for all of it, and ends the connection if any of that fails.
    fn carry_out(
        &mut self,
        limits: Limits<'_>,
        submit: impl FnOnce(&mut Live) -> Result<(), ConnectionError>,
    ) -> Result<(), ConnectionError> {
        self.carry(limits, |live| {
            submit(live)?;
            live.wait_until(0, limits)
        })
    }

    /// Does something with the connection, and ends it if that fails.
    fn carry(
        &mut self,
        limits: Limits<'_>,
        act: impl FnOnce(&mut Live) -> Result<(), ConnectionError>,
    ) -> Result<(), ConnectionError> {
        let live = self.live.as_mut().ok_or(ConnectionError::Failed)?;
        let mut done = limits.check().and_then(|()| act(live));
        if done.is_ok() {
            // An endpoint that failed fails its requests, unless it had none under way.
            let failure = Status(self.failure.load(Ordering::Relaxed));
            done = self
                .context
                .checked("the endpoint", failure)
                .map_err(Into::into);
        }
        if done.is_err() {
            self.end();
        }
        done
    }

    fn end(&mut self) {
        if let Some(live) = self.live.take() {
            live.end();
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end();
    }
}

impl Live {
    fn context(&self) -> &'static Context {
        self.worker.context()
    }

    /// Asks for a sign that the peer has all that was submitted; from a new one, that it is there.
    fn flush(&mut self) -> Result<(), ConnectionError> {
        let params = sys::RequestParams::zeroed();
        let flush = self.context().library.functions.ucp_ep_flush_nbx;
        // SAFETY: the endpoint is open and its worker held exclusively.
        let pointer = unsafe { flush(self.endpoint.as_ptr(), &params) };
        Ok(self.submitted("ucp_ep_flush_nbx", pointer)?)
    }

    fn add(
        &mut self,
        (base, bytes): (u64, usize),
        on_gpu: bool,
        key: &[u8],
    ) -> Result<usize, CallError> {
        let context = self.context();
        let (functions, endpoint) = (&context.library.functions, self.endpoint.as_ptr());
        let (packed, mut raw) = (key.as_ptr().cast(), ptr::null_mut());
        // SAFETY: the endpoint is open; the key is one that UCX packed, as its record's checksum says.
        let status = unsafe { (functions.ucp_ep_rkey_unpack)(endpoint, packed, &mut raw) };
        context.checked("ucp_ep_rkey_unpack", status)?;
        let key = NonNull::new(raw).ok_or_else(|| context.nothing("ucp_ep_rkey_unpack"))?;
        let mut local = ptr::null_mut();
        // SAFETY: the key is alive; where the memory is not mapped the call says so and stores nothing.
        let status = unsafe { (functions.ucp_rkey_ptr)(key.as_ptr(), base, &mut local) };
        let mapped = match status {
            Status::OK if !on_gpu => mapped::whole(local.cast(), bytes),
            _ => None,
        };
        self.memories.push(RemoteMemory {
            key,
            base,
            bytes,
            mapped,
            on_gpu,
        });
        Ok(self.memories.len() - 1)
    }

    fn submit_all(
        &mut self,
        jobs: &mut [ReadJob<'_>],
        limits: Limits<'_>,
    ) -> Result<(), ConnectionError> {
        for job in jobs {
            let number = usize::try_from(job.from.handle).unwrap_or(usize::MAX);
            let stretches = job.stretches();
            let page = job.page.as_bytes_mut();
            let mut summing = Summing::wanted(job.sum);
            for (source, target) in stretches {
                let outside = |bytes: usize, at| ConnectionError::Outside(bytes, at);
                let memory = self.memories.get(number);
                if memory.is_none_or(|memory| source.end > memory.bytes || memory.on_gpu) {
                    return Err(outside(source.len(), source.start));
                }
                let (bytes, at) = (target.len(), target.start);
                let target = page.get_mut(target).ok_or_else(|| outside(bytes, at))?;
                self.stretch((number, source.start), target, &mut summing, limits)?;
            }
            // Gets are under way still.
            let copied = self.memories.get(number).and_then(|memory| memory.mapped);
            job.checksum = copied.and_then(|_| summing.made());
        }
        Ok(())
    }

    /// The same between memories of GPUs, without waiting: a get for each stretch, which is long.
    fn submit_on_gpu(&mut self, jobs: &[ReadJob<'_>]) -> Result<(), ConnectionError> {
        for job in jobs {
            let number = usize::try_from(job.from.handle).unwrap_or(usize::MAX);
            let outside = |at| ConnectionError::Outside(job.runs.total_bytes(), at);
            let memory = self.memories.get(number).filter(|memory| memory.on_gpu);
            let (base, key) = memory
                .filter(|memory| job.fits(memory.bytes, job.page.shape().bytes()))
                .map(|memory| (memory.base, memory.key))
                .ok_or_else(|| outside(job.offset.saturating_add(job.runs.source_end())))?;
            let page = job.page.arena().filter(|_| job.page.is_on_device());
            let (arena, offset) = page.ok_or_else(|| outside(0))?;
            for (source, target) in job.stretches() {
                let start = arena.base().wrapping_add(offset + target.start);
                let from = (base.wrapping_add(source.start as u64), key);
                self.submit_get((start.cast(), target.len()), from, true)?;
            }
        }
        Ok(())
    }

    /// One stretch, which is within the memory; summed where it is copied.
    fn stretch(
        &mut self,
        (memory, mut offset): (usize, usize),
        target: &mut [u8],
        summing: &mut Summing,
        limits: Limits<'_>,
    ) -> Result<(), ConnectionError> {
        let mapped = self.memories[memory].mapped;
        let most = mapped.map_or(GET_BYTES_MAX, |_| COPY_BYTES_MAX);
        for piece in target.chunks_mut(most) {
            match mapped {
                Some(start) => self.copy((start, offset), piece, summing, limits)?,
                None => self.get(memory, offset, piece, limits)?,
            }
            offset += piece.len();
        }
        Ok(())
    }

    fn copy(
        &mut self,
        (start, offset): (NonNull<u8>, usize),
        target: &mut [u8],
        summing: &mut Summing,
        limits: Limits<'_>,
    ) -> Result<(), ConnectionError> {
        // SAFETY: `submit_all` has seen that the stretch is within the memory, all of which is mapped from `start` on.
        let source = unsafe { start.add(offset) };
        // SAFETY: as above; the target is ours alone. The peer may write the source meanwhile, if its lease has ended;
        // then the bytes are in doubt, which the checksum finds out, but they are bytes.
        unsafe { summing.copy(source.as_ptr(), target) };
        self.copied_bytes += target.len();
        if self.copied_bytes >= COPY_BYTES_MAX {
            self.copied_bytes = 0;
            limits.check()?;
        }
        Ok(())
    }

    /// Submits one get, once there is room for it.
    fn get(
        &mut self,
        memory: usize,
        offset: usize,
        target: &mut [u8],
        limits: Limits<'_>,
    ) -> Result<(), ConnectionError> {
        self.wait_until(GETS_MAX - 1, limits)?;
        let from = &self.memories[memory];
        let from = (from.base.wrapping_add(offset as u64), from.key);
        let target = (target.as_mut_ptr().cast(), target.len());
        Ok(self.submit_get(target, from, false)?)
    }

    /// A get, into memory of ours that nobody else has until it is over, or its worker has ended: a page is borrowed as long as
    /// [`Connection::read`] takes, and kept until [`Connection::finish`].
    fn submit_get(
        &mut self,
        (start, bytes): (*mut c_void, usize),
        (address, key): (u64, NonNull<sys::RemoteKey>),
        on_gpu: bool,
    ) -> Result<(), CallError> {
        let mut params = sys::RequestParams::zeroed();
        if on_gpu {
            params.op_attr_mask = sys::UCP_OP_ATTR_FIELD_MEMORY_TYPE;
            params.memory_type = sys::UCS_MEMORY_TYPE_CUDA;
        }
        let get = self.context().library.functions.ucp_get_nbx;
        let (endpoint, key) = (self.endpoint.as_ptr(), key.as_ptr());
        // SAFETY: endpoint and key are alive. The target stays as said above.
        let pointer = unsafe { get(endpoint, start, bytes, address, key, &params) };
        self.submitted("ucp_get_nbx", pointer)
    }

    fn submitted(&mut self, call: &'static str, pointer: *mut c_void) -> Result<(), CallError> {
        match status_of_pointer(pointer) {
            Ok(request) => {
                let batch = self.batch;
                self.under_way
                    .extend(request.map(|request| (batch, request)));
            }
            Err(status) => self.context().checked(call, status)?,
        }
        Ok(())
    }

    /// Drives the worker until at most so many requests are under way.
    fn wait_until(&mut self, at_most: usize, limits: Limits<'_>) -> Result<(), ConnectionError> {
        self.wait_while(limits, |live| live.under_way.len() > at_most)
    }

    /// Drives the worker as long as that is so.
    fn wait_while(
        &mut self,
        limits: Limits<'_>,
        is_so: impl Fn(&Self) -> bool,
    ) -> Result<(), ConnectionError> {
        let mut idle = 0;
        while is_so(self) {
            idle = if self.worker.progress() { 0 } else { idle + 1 };
            self.collect()?;
            if idle > SPINS {
                self.worker.wait(None, WAIT);
            }
            limits.check()?;
        }
        Ok(())
    }

    /// Frees the requests that are over; the first error of one.
    fn collect(&mut self) -> Result<(), CallError> {
        let context = self.context();
        let functions = &context.library.functions;
        let mut first = Status::OK;
        self.under_way.retain(|(_, request)| {
            // SAFETY: the request is not freed, for those that are leave the list.
            let status = unsafe { (functions.ucp_request_check_status)(request.as_ptr()) };
            if status == Status::IN_PROGRESS {
                return true;
            }
            if first == Status::OK {
                first = status;
            }
            // SAFETY: it is over, and leaves the list here.
            unsafe { (functions.ucp_request_free)(request.as_ptr()) };
            false
        });
        context.checked("the transfer", first)
    }

    /// Closes by force, and waits a bounded time until nothing is under way. What still is ends with the worker.
    fn end(mut self) {
        let functions = &self.context().library.functions;
        let mut params = sys::RequestParams::zeroed();
        params.op_attr_mask = sys::UCP_OP_ATTR_FIELD_FLAGS;
        params.flags = sys::UCP_EP_CLOSE_FLAG_FORCE;
        // SAFETY: the endpoint is open and `self` ends here, so nobody names it again.
        let pointer = unsafe { (functions.ucp_ep_close_nbx)(self.endpoint.as_ptr(), &params) };
        // An endpoint that could not be closed ends with the worker too.
        drop(self.submitted("ucp_ep_close_nbx", pointer));
        let deadline = Instant::now() + CLOSE;
        while !self.under_way.is_empty() && Instant::now() < deadline {
            let idle = !self.worker.progress();
            // Requests that end with an error are what is expected here.
            drop(self.collect());
            if idle && !self.under_way.is_empty() {
                self.worker.wait(None, WAIT);
            }
        }
        for memory in &self.memories {
            // SAFETY: the key is alive, and nothing names it after this.
            unsafe { (functions.ucp_rkey_destroy)(memory.key.as_ptr()) };
        }
        let left = self.under_way.len();
        if left > 0 {
            tracing::warn!(
                left,
                "UCX did not cancel all requests; their worker is ended"
            );
        }
    }
}

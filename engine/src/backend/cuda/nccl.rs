//! NCCL, opened at run time: sums and rows between the GPUs of an instance's ranks, put on the model's one stream.
//!
//! `BATON_NCCL` may name the library's file, where it is in no folder that the loader searches (a Python package, say).
//! Invariant: a communicator is used by one thread; another one may end it, after which it is not used any more. Absent: groups of
//! calls, reductions other than sums, several GPUs in one process.

#![expect(unsafe_code, reason = "NCCL is a C library")]

use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use libloading::Library;
use parking_lot::Mutex;

use super::driver::{DevicePtr, Gpu};
use super::error::CudaError;

/// Names NCCL's file.
const FILE_VARIABLE: &str = "BATON_NCCL";

/// Where the loader looks by itself; packages that are made to run programs have the first name only.
const FILES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// Bytes of what names a communicator that is to be made.
pub(super) const ID_BYTES: usize = 128;

/// How long a communicator is waited for that another thread uses, before it is ended nevertheless.
const IN_USE_MAX: Duration = Duration::from_secs(1);

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Id(pub(super) [u8; ID_BYTES]);

/// `ncclComm_t`.
type Comm = *mut c_void;
/// `ncclResult_t`: 0 for success.
type Status = c_int;
/// `ncclRedOp_t`.
const SUM: c_int = 0;

/// `ncclDataType_t` of what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Element {
    F16 = 6,
    F32 = 7,
    Bf16 = 9,
}

type Reduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    Comm,
    *mut c_void,
) -> Status;
type Send = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, *mut c_void) -> Status;
type Receive = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> Status;

/// The functions that are used.
struct Functions {
    get_version: unsafe extern "C" fn(*mut c_int) -> Status,
    get_unique_id: unsafe extern "C" fn(*mut Id) -> Status,
    init_rank: unsafe extern "C" fn(*mut Comm, c_int, Id, c_int) -> Status,
    abort: unsafe extern "C" fn(Comm) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    all_reduce: Reduce,
    send: Send,
    receive: Receive,
    /// Never closed: its functions are used as long as the process lives.
    _library: Library,
}

impl fmt::Debug for Functions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Functions")
    }
}

/// The library.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nccl(&'static Functions);

impl Nccl {
    /// Opens the library, once a process.
    pub(super) fn open() -> Result<Self, CudaError> {
        static OPEN: OnceLock<Result<Functions, CudaError>> = OnceLock::new();
        let opened = OPEN.get_or_init(|| Functions::load(std::env::var_os(FILE_VARIABLE)));
        opened.as_ref().map(Self).map_err(Clone::clone)
    }

    /// `2.27.3`.
    pub(super) fn version(self) -> Result<String, CudaError> {
        let mut version = 0;
        // SAFETY: the target is a valid integer.
        self.check("ncclGetVersion", unsafe {
            (self.0.get_version)(&raw mut version)
        })?;
        Ok(format!(
            "{}.{}.{}",
            version / 10_000,
            version / 100 % 100,
            version % 100
        ))
    }

    /// Names a communicator that is to be made, and begins to wait for its ranks.
    pub(super) fn new_id(self) -> Result<Id, CudaError> {
        let mut id = Id([0; ID_BYTES]);
        // SAFETY: the target is a valid id.
        self.check("ncclGetUniqueId", unsafe {
            (self.0.get_unique_id)(&raw mut id)
        })?;
        Ok(id)
    }

    fn check(self, call: &'static str, status: Status) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the function gives a text for every number.
        let text = unsafe { (self.0.error_string)(status) };
        let status = if text.is_null() {
            format!("status {status}")
        } else {
            // SAFETY: the text is a constant of the library's and ends with a zero.
            let text = unsafe { CStr::from_ptr(text) };
            format!(
                "{} ({status}); NCCL_DEBUG=WARN says more",
                text.to_string_lossy()
            )
        };
        Err(CudaError::Call { call, status })
    }
}

impl Functions {
    /// Opens the named file, or else what the loader finds.
    fn load(named: Option<OsString>) -> Result<Self, CudaError> {
        let missing = CudaError::Missing {
            library: "libnccl.so.2",
            gives: "sums between the GPUs of several ranks",
            hint: "install NVIDIA's libnccl2, or the Python package nvidia-nccl-cu13 and set BATON_NCCL to its libnccl.so.2; or run on one GPU",
        };
        let files: Vec<OsString> = match named {
            Some(file) => vec![file],
            None => FILES.iter().map(OsString::from).collect(),
        };
        for file in files {
            // SAFETY: NCCL's initialisers have no requirements.
            match unsafe { Library::new(&file) } {
                Ok(library) => return Self::of(library).ok_or(missing),
                Err(error) => {
                    tracing::debug!(file = %file.display(), %error, "cannot open NCCL");
                }
            }
        }
        Err(missing)
    }

    fn of(library: Library) -> Option<Self> {
        macro_rules! find {
            ($name:literal) => {{
                // SAFETY: the type is that of the function in every version since 2.7.
                let symbol = unsafe { library.get($name) }.ok()?;
                *symbol
            }};
        }
        Some(Self {
            get_version: find!(b"ncclGetVersion\0"),
            get_unique_id: find!(b"ncclGetUniqueId\0"),
            init_rank: find!(b"ncclCommInitRank\0"),
            abort: find!(b"ncclCommAbort\0"),
            error_string: find!(b"ncclGetErrorString\0"),
            all_reduce: find!(b"ncclAllReduce\0"),
            send: find!(b"ncclSend\0"),
            receive: find!(b"ncclRecv\0"),
            _library: library,
        })
    }
}

/// A communicator's handle on its way between threads.
struct Handle(Comm);

// SAFETY: it may be used from any thread, one at a time, as its owner's lock sees to.
unsafe impl std::marker::Send for Handle {}

/// A communicator of several ranks' GPUs, on one stream.
pub(super) struct Communicator {
    nccl: Nccl,
    /// Held while a call is made.
    comm: Mutex<Handle>,
    /// Set before the communicator is ended: nobody uses it any more.
    ended: AtomicBool,
    gpu: Arc<Gpu>,
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Communicator")
    }
}

impl Communicator {
    /// Meets the other ranks, `rank` of `size`. All of them call it at the same time.
    ///
    /// NCCL cannot be told to give up waiting for them, so it waits on a thread of its own. Where the time is over, that thread
    /// is left behind: the instance ends, and the process with it.
    pub(super) fn join(
        (nccl, gpu): (Nccl, &Arc<Gpu>),
        id: Id,
        (rank, size): (usize, usize),
        timeout: Duration,
    ) -> Result<Self, CudaError> {
        let number = |value: usize| c_int::try_from(value).expect("ranks are few");
        let (rank, size) = (number(rank), number(size));
        let (tell, told) = sync_channel(1);
        let own = Arc::clone(gpu);
        let waiting = thread::Builder::new().name("nccl-join".to_owned());
        let spawned = waiting.spawn(move || {
            let joined = own.bind().and_then(|()| {
                let mut comm = ptr::null_mut();
                // SAFETY: the target is a valid handle, the id was made by the library, and the device's context is current.
                let status = unsafe { (nccl.0.init_rank)(&raw mut comm, size, id, rank) };
                nccl.check("ncclCommInitRank", status)
                    .map(|()| Handle(comm))
            });
            // Nobody listens when the time is over.
            drop(tell.send(joined));
        });
        let failed = |status: String| CudaError::Call {
            call: "ncclCommInitRank",
            status,
        };
        spawned.map_err(|error| failed(error.to_string()))?;
        let handle = match told.recv_timeout(timeout) {
            Ok(joined) => joined?,
            Err(RecvTimeoutError::Timeout) => {
                return Err(failed(format!(
                    "the other ranks' GPUs did not answer within {} s",
                    timeout.as_secs()
                )));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(failed("its thread has ended".to_owned()));
            }
        };
        Ok(Self {
            nccl,
            comm: Mutex::new(handle),
            ended: AtomicBool::new(false),
            gpu: Arc::clone(gpu),
        })
    }

    /// Puts the sum of all ranks' elements in the place of each one's own.
    pub(super) fn sum(
        &self,
        address: DevicePtr,
        count: usize,
        element: Element,
    ) -> Result<(), CudaError> {
        self.call("ncclAllReduce", |functions, comm, stream| {
            // SAFETY: the range is a live tensor of this stream, and all ranks sum as many elements.
            unsafe {
                (functions.all_reduce)(
                    address as *const c_void,
                    address as *mut c_void,
                    count,
                    element as c_int,
                    SUM,
                    comm,
                    stream,
                )
            }
        })
    }

    /// Puts the sending of elements on the stream.
    pub(super) fn send(
        &self,
        address: DevicePtr,
        (count, element): (usize, Element),
        to: usize,
    ) -> Result<(), CudaError> {
        let to = c_int::try_from(to).expect("ranks are few");
        self.call("ncclSend", |functions, comm, stream| {
            // SAFETY: the range is a live tensor of this stream, which the other rank receives into one of the same size.
            unsafe {
                let from = address as *const c_void;
                (functions.send)(from, count, element as c_int, to, comm, stream)
            }
        })
    }

    /// The reverse.
    pub(super) fn receive(
        &self,
        address: DevicePtr,
        (count, element): (usize, Element),
        from: usize,
    ) -> Result<(), CudaError> {
        let from = c_int::try_from(from).expect("ranks are few");
        self.call("ncclRecv", |functions, comm, stream| {
            // SAFETY: as for sending.
            unsafe {
                let to = address as *mut c_void;
                (functions.receive)(to, count, element as c_int, from, comm, stream)
            }
        })
    }

    fn call(
        &self,
        name: &'static str,
        act: impl FnOnce(&Functions, Comm, *mut c_void) -> Status,
    ) -> Result<(), CudaError> {
        self.gpu.bind()?;
        let comm = self.comm.lock();
        if self.ended.load(Ordering::Acquire) {
            return Err(CudaError::Call {
                call: name,
                status: "the ranks have parted".to_owned(),
            });
        }
        let status = act(self.nccl.0, comm.0, self.gpu.stream().cast());
        self.nccl.check(name, status)
    }

    /// Ends it, whatever it is doing: work on the stream that waits for other ranks gives up. Waits for recordings that use it
    /// to be dropped.
    pub(super) fn end(&self) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        // Whoever is in a call leaves it, or is stuck in it and released by this.
        let held = self.comm.try_lock_for(IN_USE_MAX).map(|held| held.0);
        let comm = held.unwrap_or_else(|| {
            // SAFETY: the handle is written when it is made and never again.
            unsafe { (*self.comm.data_ptr()).0 }
        });
        if self.gpu.bind().is_err() {
            return;
        }
        // SAFETY: it is ended once, no call begins after `ended` is set, and a call under way is what this is made to be called
        // beside.
        let status = unsafe { (self.nccl.0.abort)(comm) };
        if let Err(error) = self.nccl.check("ncclCommAbort", status) {
            tracing::debug!(%error, "a communicator ended badly");
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_said_with_its_remedy() {
        let error = Functions::load(Some("/nowhere/libnccl.so.2".into())).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("libnccl.so.2 cannot be opened") && text.contains("hint: "),
            "{text}"
        );
        assert!(text.contains(FILE_VARIABLE), "{text}");
        assert!(!error.is_absence());
    }

    #[test]
    fn a_library_without_the_functions_is_none() {
        let library = Library::from(libloading::os::unix::Library::this());
        assert!(Functions::of(library).is_none());
    }
}

//! The plug-in's C interface, as calls that cannot be misused but for the life of the memory, which `flight` keeps.
//!
//! Invariant: the library stays open for the life of the process, for MPI's own threads and exit handlers live in it.
//! Its numbers and names are those of `engine/mpi/src/lib.rs`.
#![expect(
    unsafe_code,
    reason = "the MPI plug-in is opened at run time and called through its C interface"
)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::Path;
use std::ptr::{self, NonNull};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::{MpiError, find};

/// The interface that this side speaks.
const ABI: u32 = 2;

/// Room for a text.
const TEXT_BYTES: usize = 1024;

/// What the plug-in knows as a group or as something under way.
#[repr(C)]
struct Opaque {
    _private: [u8; 0],
}

type Abi = unsafe extern "C" fn() -> u32;
type Error = unsafe extern "C" fn(*mut c_char, usize);
type Init = unsafe extern "C" fn(*mut c_int, *mut c_int, *mut c_char, usize) -> c_int;
type Finalize = unsafe extern "C" fn() -> c_int;
type Abort = unsafe extern "C" fn(c_int) -> c_int;
type Split = unsafe extern "C" fn(c_int, c_int, *mut *mut Opaque, *mut c_int, *mut c_int) -> c_int;
type Host = unsafe extern "C" fn(*const Opaque, c_int, *mut c_char, usize) -> c_int;
type StartSend = unsafe extern "C" fn(
    *const Opaque,
    c_int,
    c_int,
    *const c_void,
    usize,
    *mut *mut Opaque,
) -> c_int;
type StartReceive = unsafe extern "C" fn(
    *const Opaque,
    c_int,
    c_int,
    *mut c_void,
    usize,
    *mut *mut Opaque,
) -> c_int;
type Probe = unsafe extern "C" fn(*const Opaque, c_int, c_int, *mut c_int, *mut usize) -> c_int;
type ProbeAny =
    unsafe extern "C" fn(*const Opaque, c_int, *mut c_int, *mut c_int, *mut usize) -> c_int;
type Test = unsafe extern "C" fn(*mut Opaque, *mut c_int, *mut usize) -> c_int;

/// The open plug-in.
#[derive(Debug)]
pub(super) struct Plugin {
    error: Error,
    init: Init,
    finalize: Finalize,
    abort: Abort,
    split: Split,
    host: Host,
    start_send: StartSend,
    start_receive: StartReceive,
    probe: Probe,
    probe_any: ProbeAny,
    test: Test,
    _stays_open: ManuallyDrop<Library>,
}

/// What MPI says of the world.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) rank: usize,
    pub(super) size: usize,
    pub(super) library: String,
}

/// A group of ranks.
#[derive(Debug)]
pub(super) struct Group {
    raw: NonNull<Opaque>,
    rank: usize,
    size: usize,
}

// SAFETY: MPI was started for many threads, and a group is only named to it; it is never freed.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

impl Group {
    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }
}

/// Something under way.
#[derive(Debug)]
pub(super) struct Request(NonNull<Opaque>);

// SAFETY: MPI was started for many threads; a request has one owner, who alone names it.
unsafe impl Send for Request {}

impl Plugin {
    /// Opens the first that is there.
    pub(super) fn open() -> Result<Self, MpiError> {
        let mut tried = Vec::new();
        for path in find::places() {
            match open_library(&path) {
                Ok(library) => return Self::bind(library, &path),
                Err(reason) if path.is_file() => {
                    let path = path.display().to_string();
                    return Err(MpiError::Unusable { path, reason });
                }
                Err(reason) => tried.push(reason),
            }
        }
        Err(MpiError::NoPlugin {
            tried: tried.join("; "),
        })
    }

    fn bind(library: Library, path: &Path) -> Result<Self, MpiError> {
        let unusable = |reason: String| MpiError::Unusable {
            path: path.display().to_string(),
            reason,
        };
        let abi = symbol::<Abi>(&library, c"baton_mpi_abi").map_err(unusable)?;
        // SAFETY: it takes nothing and gives a number.
        let abi = unsafe { abi() };
        if abi != ABI {
            return Err(unusable(format!("its interface is {abi}, not {ABI}")));
        }
        let found = || -> Result<Self, String> {
            Ok(Self {
                error: symbol(&library, c"baton_mpi_error")?,
                init: symbol(&library, c"baton_mpi_init")?,
                finalize: symbol(&library, c"baton_mpi_finalize")?,
                abort: symbol(&library, c"baton_mpi_abort")?,
                split: symbol(&library, c"baton_mpi_split")?,
                host: symbol(&library, c"baton_mpi_host")?,
                start_send: symbol(&library, c"baton_mpi_start_send")?,
                start_receive: symbol(&library, c"baton_mpi_start_receive")?,
                probe: symbol(&library, c"baton_mpi_probe")?,
                probe_any: symbol(&library, c"baton_mpi_probe_any")?,
                test: symbol(&library, c"baton_mpi_test")?,
                _stays_open: ManuallyDrop::new(library),
            })
        };
        found().map_err(unusable)
    }

    /// Starts MPI.
    pub(super) fn init(&self) -> Result<Facts, String> {
        let (mut rank, mut size, mut library) = (0, 0, [0; TEXT_BYTES]);
        // SAFETY: the answers are this function's own, and the text has the room that is named.
        let status =
            unsafe { (self.init)(&mut rank, &mut size, library.as_mut_ptr(), library.len()) };
        self.checked(status)?;
        Ok(Facts {
            rank: number(rank)?,
            size: number(size)?,
            library: text(&library),
        })
    }

    /// Ends MPI, when nothing is under way.
    pub(super) fn finalize(&self) -> Result<(), String> {
        // SAFETY: it takes nothing.
        self.checked(unsafe { (self.finalize)() })
    }

    /// Ends the world.
    pub(super) fn abort(&self, code: c_int) -> Result<(), String> {
        // SAFETY: it takes a number.
        self.checked(unsafe { (self.abort)(code) })
    }

    pub(super) fn split(&self, colour: c_int, key: c_int) -> Result<Option<Group>, String> {
        let (mut raw, mut rank, mut size) = (ptr::null_mut(), 0, 0);
        // SAFETY: the answers are this function's own.
        let status = unsafe { (self.split)(colour, key, &mut raw, &mut rank, &mut size) };
        self.checked(status)?;
        let Some(raw) = NonNull::new(raw) else {
            return Ok(None);
        };
        Ok(Some(Group {
            raw,
            rank: number(rank)?,
            size: number(size)?,
        }))
    }

    pub(super) fn host(&self, group: &Group, rank: usize) -> Result<String, String> {
        let (rank, mut host) = (c_number(rank)?, [0; TEXT_BYTES]);
        // SAFETY: the group is the plug-in's own and the text has the room that is named.
        let status =
            unsafe { (self.host)(group.raw.as_ptr(), rank, host.as_mut_ptr(), host.len()) };
        self.checked(status)?;
        Ok(text(&host))
    }

    /// Starts to send; the bytes must stay until the request is done.
    pub(super) fn start_send(
        &self,
        group: &Group,
        to: usize,
        tag: c_int,
        bytes: &[u8],
    ) -> Result<Request, String> {
        let (to, mut request) = (c_number(to)?, ptr::null_mut());
        let (start, length) = (bytes.as_ptr().cast(), bytes.len());
        // SAFETY: the group is the plug-in's own; `Flight` keeps the bytes as they are until the request is done.
        let status =
            unsafe { (self.start_send)(group.raw.as_ptr(), to, tag, start, length, &mut request) };
        self.started(status, request)
    }

    /// Starts to receive; the bytes must stay, untouched, until the request is done.
    pub(super) fn start_receive(
        &self,
        group: &Group,
        from: usize,
        tag: c_int,
        bytes: &mut [u8],
    ) -> Result<Request, String> {
        let (from, mut request) = (c_number(from)?, ptr::null_mut());
        let (start, length) = (bytes.as_mut_ptr().cast(), bytes.len());
        // SAFETY: the group is the plug-in's own; `Flight` keeps the bytes to itself until the request is done.
        let status = unsafe {
            (self.start_receive)(group.raw.as_ptr(), from, tag, start, length, &mut request)
        };
        self.started(status, request)
    }

    /// The length of the next message, if it has come.
    pub(super) fn probe(
        &self,
        group: &Group,
        from: usize,
        tag: c_int,
    ) -> Result<Option<usize>, String> {
        let (from, mut found, mut length) = (c_number(from)?, 0, 0);
        // SAFETY: the group is the plug-in's own, the answers this function's.
        let status =
            unsafe { (self.probe)(group.raw.as_ptr(), from, tag, &mut found, &mut length) };
        self.checked(status)?;
        Ok((found != 0).then_some(length))
    }

    /// Sender and length of the next message of any rank, if it has come.
    pub(super) fn probe_any(
        &self,
        group: &Group,
        tag: c_int,
    ) -> Result<Option<(usize, usize)>, String> {
        let (mut found, mut from, mut length) = (0, 0, 0);
        // SAFETY: the group is the plug-in's own, the answers this function's.
        let status = unsafe {
            (self.probe_any)(group.raw.as_ptr(), tag, &mut found, &mut from, &mut length)
        };
        self.checked(status)?;
        if found == 0 {
            return Ok(None);
        }
        Ok(Some((number(from)?, length)))
    }

    /// Bytes received, once a request is done, else the request. After an error it is gone.
    pub(super) fn test(&self, request: Request) -> Result<Result<usize, Request>, String> {
        let (mut done, mut length) = (0, 0);
        // SAFETY: the request is open, for one that is done or failed is not given back; the answers are this
        // function's own.
        let status = unsafe { (self.test)(request.0.as_ptr(), &mut done, &mut length) };
        self.checked(status)?;
        Ok(if done == 0 { Err(request) } else { Ok(length) })
    }

    fn started(&self, status: c_int, request: *mut Opaque) -> Result<Request, String> {
        self.checked(status)?;
        NonNull::new(request)
            .map(Request)
            .ok_or_else(|| "the MPI plug-in gave no request".to_owned())
    }

    fn checked(&self, status: c_int) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        let mut words = [0; TEXT_BYTES];
        // SAFETY: the text has the room that is named.
        unsafe { (self.error)(words.as_mut_ptr(), words.len()) };
        Err(text(&words))
    }
}

/// With its symbols for all, which the parts that MPI opens by itself look for.
fn open_library(path: &Path) -> Result<Library, String> {
    // SAFETY: the plug-in and the MPI library under it do nothing when they are opened but register themselves.
    let opened = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    opened.map_err(|error| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })
}

fn symbol<T: Copy>(library: &Library, name: &CStr) -> Result<T, String> {
    // SAFETY: each caller names the type that the plug-in's interface of this number gives to the symbol.
    let found = unsafe { library.get::<T>(name.to_bytes_with_nul()) };
    found
        .map(|symbol| *symbol)
        .map_err(|error| error.to_string())
}

fn text(bytes: &[c_char]) -> String {
    let bytes = bytes.iter().map(|byte| byte.to_ne_bytes()[0]);
    let bytes: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn number(value: c_int) -> Result<usize, String> {
    usize::try_from(value).map_err(|_| format!("the MPI plug-in said {value}"))
}

fn c_number(value: usize) -> Result<c_int, String> {
    c_int::try_from(value).map_err(|_| format!("{value} is no rank"))
}

//! The door to libpmix: opened at run time, called by the PMIx standard's C interface (version 3 and later).
//!
//! Below: layouts and function pointers. Above: nothing but `Result`s and owned values. Invariant: once open, the library
//! stays in the process, because it runs threads of its own.
#![expect(
    unsafe_code,
    reason = "libpmix is a C library that is opened at run time"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::ptr;

use nix::libc;

/// What the loader is asked for.
pub(super) const NAME: &str = "libpmix.so.2";

const NAMESPACE_BYTES: usize = 256;
const KEY_BYTES: usize = 512;

/// All ranks of a namespace: where facts of the whole job are kept.
pub(super) const RANK_WILDCARD: u32 = u32::MAX - 1;

const TYPE_STRING: u16 = 3;
const TYPE_INT: u16 = 6;
const TYPE_UINT32: u16 = 14;

const SCOPE_GLOBAL: u8 = 3;

/// `pmix_status_t` other than success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Status(pub(super) c_int);

impl Status {
    pub(super) const TIMEOUT: Self = Self(-24);
    pub(super) const UNREACHABLE: Self = Self(-25);
    pub(super) const NOT_FOUND: Self = Self(-46);
}

fn check(code: c_int) -> Result<(), Status> {
    if code == 0 { Ok(()) } else { Err(Status(code)) }
}

/// `pmix_proc_t`: a rank of a namespace.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    namespace: [c_char; NAMESPACE_BYTES],
    pub(super) rank: u32,
}

impl Process {
    /// The same namespace's other rank.
    pub(super) fn with_rank(mut self, rank: u32) -> Self {
        self.rank = rank;
        self
    }
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Process")
            .field("rank", &self.rank)
            .finish_non_exhaustive()
    }
}

#[repr(C)]
union Data {
    string: *mut c_char,
    integer: c_int,
    uint32: u32,
    /// The largest member, `pmix_envar_t`, has three words.
    words: [u64; 3],
}

/// `pmix_value_t`.
#[repr(C)]
struct Value {
    kind: u16,
    data: Data,
}

/// `pmix_info_t`.
#[repr(C)]
struct Info {
    key: [c_char; KEY_BYTES],
    flags: u32,
    value: Value,
}

const _: () = {
    assert!(size_of::<Process>() == 260);
    assert!(size_of::<Value>() == 32);
    assert!(size_of::<Info>() == 552);
    assert!(std::mem::offset_of!(Value, data) == 8);
    assert!(std::mem::offset_of!(Info, value) == 520);
};

/// What a key holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fetched {
    Text(String),
    Number(u32),
    /// Another of PMIx's types, by its number.
    Other(u16),
}

type Init = unsafe extern "C" fn(*mut Process, *mut Info, usize) -> c_int;
type Finalize = unsafe extern "C" fn(*const Info, usize) -> c_int;
type Put = unsafe extern "C" fn(u8, *const c_char, *mut Value) -> c_int;
type Commit = unsafe extern "C" fn() -> c_int;
type Get = unsafe extern "C" fn(
    *const Process,
    *const c_char,
    *const Info,
    usize,
    *mut *mut Value,
) -> c_int;
type Text = unsafe extern "C" fn(c_int) -> *const c_char;
type Version = unsafe extern "C" fn() -> *const c_char;

/// The open library.
#[derive(Debug)]
pub(super) struct Library {
    init: Init,
    finalize: Finalize,
    put: Put,
    commit: Commit,
    get: Get,
    error_text: Text,
    version: Version,
    _stays_open: ManuallyDrop<libloading::Library>,
}

impl Library {
    /// Opens libpmix and finds what is called of it.
    pub(super) fn open() -> Result<Self, libloading::Error> {
        // SAFETY: libpmix's initialisers only register its components; it is a library that is meant to be loaded
        // into any process.
        let opened = unsafe { libloading::Library::new(NAME) };
        let library = ManuallyDrop::new(opened?);
        Ok(Self {
            init: symbol::<Init>(&library, c"PMIx_Init")?,
            finalize: symbol::<Finalize>(&library, c"PMIx_Finalize")?,
            put: symbol::<Put>(&library, c"PMIx_Put")?,
            commit: symbol::<Commit>(&library, c"PMIx_Commit")?,
            get: symbol::<Get>(&library, c"PMIx_Get")?,
            error_text: symbol::<Text>(&library, c"PMIx_Error_string")?,
            version: symbol::<Version>(&library, c"PMIx_Get_version")?,
            _stays_open: library,
        })
    }

    /// Connects to the local server; says who this process is.
    pub(super) fn init(&self) -> Result<Process, Status> {
        let mut own = Process {
            namespace: [0; NAMESPACE_BYTES],
            rank: u32::MAX,
        };
        // SAFETY: `own` is a whole pmix_proc_t for the library to fill; no info is passed.
        check(unsafe { (self.init)(&raw mut own, ptr::null_mut(), 0) })?;
        Ok(own)
    }

    /// Takes leave of the local server.
    pub(super) fn finalize(&self) -> Result<(), Status> {
        // SAFETY: no info is passed; the owner calls this once for its `init`, after its last other call.
        check(unsafe { (self.finalize)(ptr::null(), 0) })
    }

    /// Keeps a text for all ranks to fetch, from the next commit on.
    pub(super) fn put(&self, key: &CStr, text: &CStr) -> Result<(), Status> {
        let mut value = Value {
            kind: TYPE_STRING,
            data: Data {
                string: text.as_ptr().cast_mut(),
            },
        };
        // SAFETY: key and text are NUL-terminated and live through the call, which copies both and writes to neither.
        check(unsafe { (self.put)(SCOPE_GLOBAL, key.as_ptr(), &raw mut value) })
    }

    /// Hands what was put to the local server.
    pub(super) fn commit(&self) -> Result<(), Status> {
        // SAFETY: takes nothing and is called between `init` and `finalize`.
        check(unsafe { (self.commit)() })
    }

    /// Waits for a rank's value of a key, for ever where the server ignores the time-out.
    pub(super) fn get(&self, of: &Process, key: &CStr, timeout_s: u32) -> Result<Fetched, Status> {
        let limit = timeout(timeout_s);
        let mut value: *mut Value = ptr::null_mut();
        // SAFETY: process, key and the one info are whole and live through the call; on success the library stores a
        // pointer to a value that it has allocated for us.
        check(unsafe { (self.get)(of, key.as_ptr(), &raw const limit, 1, &raw mut value) })?;
        Ok(take(value))
    }

    /// PMIx's words for a status.
    pub(super) fn text_of(&self, status: Status) -> String {
        // SAFETY: any number is allowed; the answer is a static string.
        let text = unsafe { (self.error_text)(status.0) };
        static_text(text).unwrap_or_else(|| "unknown".to_owned())
    }

    /// The library's own words for its version.
    pub(super) fn version(&self) -> String {
        // SAFETY: takes nothing; the answer is a static string.
        let text = unsafe { (self.version)() };
        static_text(text).unwrap_or_else(|| "unknown".to_owned())
    }
}

fn symbol<T: Copy>(library: &libloading::Library, name: &CStr) -> Result<T, libloading::Error> {
    // SAFETY: each caller names the function type that the PMIx standard gives to this symbol.
    let found = unsafe { library.get::<T>(name) };
    found.map(|symbol| *symbol)
}

fn timeout(seconds: u32) -> Info {
    let mut key = [0; KEY_BYTES];
    for (to, from) in key.iter_mut().zip(c"pmix.timeout".to_bytes()) {
        *to = c_char::from_ne_bytes([*from]);
    }
    let integer = c_int::try_from(seconds).unwrap_or(c_int::MAX);
    let mut data = Data { words: [0; 3] };
    data.integer = integer;
    Info {
        key,
        flags: 0,
        value: Value {
            kind: TYPE_INT,
            data,
        },
    }
}

/// Copies a value out of what the library has allocated, and frees that.
fn take(value: *mut Value) -> Fetched {
    if value.is_null() {
        return Fetched::Other(0);
    }
    // SAFETY: not null, hence a whole pmix_value_t that is ours until freed below.
    let kind = unsafe { (*value).kind };
    let fetched = match kind {
        TYPE_STRING => Fetched::Text(take_text(value)),
        TYPE_UINT32 => {
            // SAFETY: not null, hence a whole pmix_value_t, which nobody else has.
            let data = unsafe { &(*value).data };
            // SAFETY: the type says that this member was written.
            Fetched::Number(unsafe { data.uint32 })
        }
        other => Fetched::Other(other),
    };
    // SAFETY: the library allocates values with malloc for their receivers to free.
    unsafe { libc::free(value.cast::<c_void>()) };
    fetched
}

fn take_text(value: *mut Value) -> String {
    // SAFETY: the caller has seen that it is not null, hence a whole pmix_value_t, which nobody else has.
    let data = unsafe { &(*value).data };
    // SAFETY: the caller has read the type, which says that this member was written.
    let string = unsafe { data.string };
    let text = static_text(string).unwrap_or_default();
    // SAFETY: the string was allocated with malloc along with its value; free takes null too.
    unsafe { libc::free(string.cast::<c_void>()) };
    text
}

fn static_text(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not null, hence NUL-terminated text of the library, which nobody changes while it is copied.
    let text: CString = unsafe { CStr::from_ptr(text) }.to_owned();
    Some(text.to_string_lossy().into_owned())
}

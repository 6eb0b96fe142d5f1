//! The door to libucp, first part: the process's one context, and memory that it registers or allocates.
//!
//! Above the functions of `baton-ucx-sys`, which take pointers, stand owned values whose calls answer with a `Result`.
//! The context is made once and stays, as the library does; UCX was told that many threads use it. Invariant: memory is
//! given up exactly once, when the last that reads or hands out its key has let it go.
#![expect(
    unsafe_code,
    reason = "libucp is a C library; memory is registered and allocated by pointers"
)]

use std::ffi::{CString, c_void};
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::{Arc, OnceLock};

use baton_ucx_sys as sys;
use sys::{Library, LoadError, Status};

use super::log;
use crate::page::arena::{Arena, ForeignMemory};

/// Names the network interface, where UCX's own `UCX_NET_DEVICES` does not.
const INTERFACE_VARIABLE: &str = "TRTLLM_UCX_INTERFACE";

/// What we would rather have, if the user does not say otherwise by `UCX_…`.
const PREFERRED: &[(&str, &str)] = &[
    // Else shared memory is not used at all between processes that want to know of each other's end.
    ("MM_ERROR_HANDLING", "y"),
    // POSIX shared memory is found by process and descriptor number. A message that comes late, for a worker that has
    // ended, would go to whatever has that number now; that of System V has numbers of its own.
    // Over TCP, UCX reads memory by messages, and ends the whole process of the side that answers when its reader leaves
    // meanwhile (seen in 1.13 and 1.22). Where there is no better wire, our own streams carry the KV.
    ("TLS", "^posix,tcp"),
];

/// Where UCX takes memory from that it allocates: what other processes can map first, and always fresh from the
/// kernel, hence zeroed.
const ALLOCATORS: (&str, &str) = ("ALLOC_PRIO", "md:sysv,md:posix,mmap");

/// Why UCX is not used here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// No library.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The library does not start: settings, no device that it may use.
    #[error("{library} {version} does not start: {reason}")]
    Start {
        /// Which file.
        library: String,
        /// Its version.
        version: String,
        /// UCX's words.
        reason: String,
    },
    /// The library was built for one thread.
    #[error("{library} {version} was built without support for threads")]
    Threads {
        /// Which file.
        library: String,
        /// Its version.
        version: String,
    },
}

/// A call of UCX that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {words}")]
pub(super) struct CallError {
    pub(super) call: &'static str,
    pub(super) words: String,
    pub(super) status: Status,
}

/// What everything else is made from.
pub(super) struct Context {
    pub(super) library: &'static Library,
    raw: NonNull<sys::Context>,
}

// SAFETY: UCX was asked for a context that several threads use, and said that it is one.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UCX {}", self.version())
    }
}

impl Context {
    /// The process's context; made at the first call, whose answer stands.
    pub(super) fn shared() -> Result<&'static Self, StartError> {
        static SHARED: OnceLock<Result<Context, StartError>> = OnceLock::new();
        let shared = SHARED.get_or_init(|| Self::start(Library::open()?));
        shared.as_ref().map_err(Clone::clone)
    }

    fn start(library: &'static Library) -> Result<Self, StartError> {
        log::redirect(library);
        let (name, version) = (library.name.clone(), version_text(library));
        let refused = |status| StartError::Start {
            library: library.name.clone(),
            version: version_text(library),
            reason: library.text_of(status),
        };
        let config = Config::read(library).map_err(refused)?;
        config.prefer().map_err(refused)?;
        let mut params = sys::ContextParams::zeroed();
        params.field_mask = sys::UCP_PARAM_FIELD_FEATURES | sys::UCP_PARAM_FIELD_MT_WORKERS_SHARED;
        params.features = sys::UCP_FEATURE_RMA | sys::UCP_FEATURE_WAKEUP;
        params.mt_workers_shared = 1;
        let mut raw = ptr::null_mut();
        let (major, minor) = sys::API;
        // SAFETY: parameters and settings are whole and live through the call, which stores a context of ours.
        let status = unsafe {
            (library.functions.ucp_init_version)(major, minor, &params, config.raw, &mut raw)
        };
        status.check().map_err(refused)?;
        let raw = NonNull::new(raw).ok_or_else(|| refused(Status::LAST))?;
        let context = Self { library, raw };
        if context.is_for_many_threads() {
            return Ok(context);
        }
        Err(StartError::Threads {
            library: name,
            version,
        })
    }

    fn is_for_many_threads(&self) -> bool {
        let attributes = self.attributes(sys::UCP_ATTR_FIELD_THREAD_MODE);
        attributes.is_some_and(|a| a.thread_mode == sys::UCS_THREAD_MODE_MULTI)
    }

    /// Whether UCX has what it takes to read memory of GPUs.
    pub(super) fn takes_gpus(&self) -> bool {
        let attributes = self.attributes(sys::UCP_ATTR_FIELD_MEMORY_TYPES);
        attributes.is_some_and(|a| a.memory_types & (1 << sys::UCS_MEMORY_TYPE_CUDA) != 0)
    }

    fn attributes(&self, fields: u64) -> Option<sys::ContextAttributes> {
        let mut attributes = sys::ContextAttributes::zeroed();
        attributes.field_mask = fields;
        // SAFETY: the context is alive, and the attributes are this function's own.
        let status = unsafe {
            (self.library.functions.ucp_context_query)(self.raw.as_ptr(), &mut attributes)
        };
        (status == Status::OK).then_some(attributes)
    }

    /// Major, minor and patch.
    pub(super) fn version(&self) -> String {
        version_text(self.library)
    }

    pub(super) fn as_ptr(&self) -> *mut sys::Context {
        self.raw.as_ptr()
    }

    /// Success, or an error that names the call.
    pub(super) fn checked(&self, call: &'static str, status: Status) -> Result<(), CallError> {
        status.check().map_err(|status| CallError {
            call,
            words: self.library.text_of(status),
            status,
        })
    }

    /// Registers an arena, which stays as long as its registration.
    pub(super) fn register(&'static self, arena: &Arc<Arena>) -> Result<Memory, CallError> {
        let mut params = sys::MemoryMapParams::zeroed();
        params.field_mask =
            sys::UCP_MEM_MAP_PARAM_FIELD_ADDRESS | sys::UCP_MEM_MAP_PARAM_FIELD_LENGTH;
        params.address = arena.base().cast();
        params.length = arena.bytes();
        if arena.device().is_some() {
            params.field_mask |= sys::UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
            params.memory_type = sys::UCS_MEMORY_TYPE_CUDA;
        }
        let raw = self.map(&params)?;
        Ok(Memory {
            context: self,
            raw,
            base: arena.base(),
            bytes: arena.bytes(),
            _arena: Some(Arc::clone(arena)),
        })
    }

    /// Allocates memory that UCX likes best. It is resident where it was touched, but for what the system wants at once.
    pub(super) fn allocate(&'static self, bytes: usize) -> Result<Memory, CallError> {
        let mut params = sys::MemoryMapParams::zeroed();
        params.field_mask = sys::UCP_MEM_MAP_PARAM_FIELD_ADDRESS
            | sys::UCP_MEM_MAP_PARAM_FIELD_LENGTH
            | sys::UCP_MEM_MAP_PARAM_FIELD_FLAGS;
        params.length = bytes;
        params.flags = sys::UCP_MEM_MAP_ALLOCATE;
        let raw = self.map(&params)?;
        let mut memory = Memory {
            context: self,
            raw,
            base: ptr::null_mut(),
            bytes: 0,
            _arena: None,
        };
        let mut attributes = sys::MemoryAttributes::zeroed();
        attributes.field_mask = sys::UCP_MEM_ATTR_FIELD_ADDRESS | sys::UCP_MEM_ATTR_FIELD_LENGTH;
        // SAFETY: the memory is alive, and the attributes are this function's own.
        let status =
            unsafe { (self.library.functions.ucp_mem_query)(raw.as_ptr(), &mut attributes) };
        self.checked("ucp_mem_query", status)?;
        memory.base = attributes.address.cast();
        memory.bytes = attributes.length;
        Ok(memory)
    }

    fn map(&self, params: &sys::MemoryMapParams) -> Result<NonNull<sys::Memory>, CallError> {
        let mut raw = ptr::null_mut();
        // SAFETY: the parameters are whole; memory that they name is an arena's, which the caller keeps for as long.
        let status =
            unsafe { (self.library.functions.ucp_mem_map)(self.as_ptr(), params, &mut raw) };
        self.checked("ucp_mem_map", status)?;
        NonNull::new(raw).ok_or_else(|| self.nothing("ucp_mem_map"))
    }

    /// A call that succeeded and gave nothing.
    pub(super) fn nothing(&self, call: &'static str) -> CallError {
        CallError {
            call,
            words: "it gave nothing".to_owned(),
            status: Status::LAST,
        }
    }
}

/// Major, minor and patch.
pub(super) fn version_text(library: &Library) -> String {
    let (major, minor, patch) = library.version;
    format!("{major}.{minor}.{patch}")
}

/// Settings, between reading and use.
struct Config {
    library: &'static Library,
    raw: *mut sys::Config,
}

impl Config {
    /// Reads the environment.
    fn read(library: &'static Library) -> Result<Self, Status> {
        let mut raw = ptr::null_mut();
        // SAFETY: no prefix and no file are allowed; the call stores settings of ours.
        let status =
            unsafe { (library.functions.ucp_config_read)(ptr::null(), ptr::null(), &mut raw) };
        status.check()?;
        Ok(Self { library, raw })
    }

    /// Sets what is ours to say.
    fn prefer(&self) -> Result<(), Status> {
        self.set(ALLOCATORS.0, ALLOCATORS.1)?;
        for (name, value) in PREFERRED {
            if std::env::var_os(format!("UCX_{name}")).is_none() {
                self.set(name, value)?;
            }
        }
        let interface = std::env::var(INTERFACE_VARIABLE).unwrap_or_default();
        if !interface.is_empty() && std::env::var_os("UCX_NET_DEVICES").is_none() {
            self.set("NET_DEVICES", &interface)?;
        }
        Ok(())
    }

    fn set(&self, name: &str, value: &str) -> Result<(), Status> {
        // Neither our names nor what came from the environment can have a NUL within.
        let (Ok(name), Ok(value)) = (CString::new(name), CString::new(value)) else {
            return Err(Status::LAST);
        };
        // SAFETY: the settings are ours, and both texts are NUL-terminated and copied.
        let status = unsafe {
            (self.library.functions.ucp_config_modify)(self.raw, name.as_ptr(), value.as_ptr())
        };
        status.check()
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        // SAFETY: `read` made them, and this is the only owner's end.
        unsafe { (self.library.functions.ucp_config_release)(self.raw) };
    }
}

/// Registered memory.
pub(super) struct Memory {
    context: &'static Context,
    raw: NonNull<sys::Memory>,
    base: *mut u8,
    bytes: usize,
    /// Keeps memory that is not UCX's own.
    _arena: Option<Arc<Arena>>,
}

// SAFETY: a registration is only named to UCX, which takes calls for it from any thread; its memory is the arena's.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes registered with {:?}", self.bytes, self.context)
    }
}

// SAFETY: `allocate` is the only way to memory without an arena, and UCX takes it from the kernel, zeroed and in whole
// pages (see `ALLOCATORS`), to keep it until it is unmapped; peers are only ever given what reads it.
unsafe impl ForeignMemory for Memory {
    fn base(&self) -> NonNull<u8> {
        NonNull::new(self.base).unwrap_or(NonNull::dangling())
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Memory {
    /// Where it begins in this process.
    pub(super) fn address(&self) -> u64 {
        self.base.addr() as u64
    }

    /// What a peer needs to reach it, in UCX's own form.
    pub(super) fn key(&self) -> Result<Vec<u8>, CallError> {
        let functions = &self.context.library.functions;
        let (mut buffer, mut bytes) = (ptr::null_mut::<c_void>(), 0);
        let context = self.context.as_ptr();
        // SAFETY: context and memory are alive; the call stores a buffer that is ours to release, and its length.
        let status = unsafe {
            (functions.ucp_rkey_pack)(context, self.raw.as_ptr(), &mut buffer, &mut bytes)
        };
        self.context.checked("ucp_rkey_pack", status)?;
        // SAFETY: the call succeeded, so the buffer has this length and nobody else has it.
        let key = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), bytes) }.to_vec();
        // SAFETY: it came from `ucp_rkey_pack` and is released once.
        unsafe { (functions.ucp_rkey_buffer_release)(buffer) };
        Ok(key)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let context = self.context.as_ptr();
        // SAFETY: context and registration are alive, and this is the only owner's end. Peers that still read fail or
        // read what they have mapped; nobody here hands the key out any more.
        let status =
            unsafe { (self.context.library.functions.ucp_mem_unmap)(context, self.raw.as_ptr()) };
        if let Err(error) = self.context.checked("ucp_mem_unmap", status) {
            tracing::warn!(%error, "UCX did not give memory up");
        }
    }
}

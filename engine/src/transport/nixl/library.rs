//! NIXL's C interface (libnixl_capi), opened at run time: the functions that the fabric needs, and an agent that owns
//! what it makes.
//!
//! Written by hand: the bindings of the crate nixl-sys need libclang and a C++ compiler wherever Baton is built. Opened
//! by its path, the library finds what it needs beside itself; nothing has to be set before the process starts.
//!
//! Invariant: the library stays open for the life of the process, for it leaves threads and handlers behind. Memory that
//! is registered or being read into is kept by the callers, [`super::peer`] and [`super::NixlFabric`].
#![expect(
    unsafe_code,
    reason = "NIXL is opened at run time and called through its C interface"
)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Once, OnceLock};

use libloading::os::unix::{Library as Opened, RTLD_LOCAL, RTLD_NOW};
use nix::libc;

use super::NixlMissing;
use super::find;

pub(super) use agent::{Agent, Place, Progress, Request, Stretch};

mod agent;

/// What NIXL knows as an agent, a list or a request.
#[repr(C)]
struct Opaque {
    _private: [u8; 0],
}

type Handle = *mut Opaque;

/// NIXL's `nixl_capi_agent_config_t`.
#[repr(C)]
struct AgentConfig {
    progress_thread: bool,
    listen_thread: bool,
    listen_port: c_int,
    thread_sync: c_int,
    workers: c_uint,
    progress_delay_us: u64,
    listen_delay_us: u64,
    telemetry: bool,
}

type CreateAgent = unsafe extern "C" fn(*const c_char, *const AgentConfig, *mut Handle) -> c_int;
type OfHandle = unsafe extern "C" fn(Handle) -> c_int;
type OfTwo = unsafe extern "C" fn(Handle, Handle) -> c_int;
type OfThree = unsafe extern "C" fn(Handle, Handle, Handle) -> c_int;
type PluginParams = unsafe extern "C" fn(Handle, *const c_char, *mut Handle, *mut Handle) -> c_int;
type CreateBackend = unsafe extern "C" fn(Handle, *const c_char, Handle, *mut Handle) -> c_int;
type CreateList = unsafe extern "C" fn(c_int, *mut Handle) -> c_int;
type AddMemory = unsafe extern "C" fn(Handle, usize, usize, u64, *const c_void, usize) -> c_int;
type AddStretch = unsafe extern "C" fn(Handle, usize, usize, u64) -> c_int;
type LocalMetadata =
    unsafe extern "C" fn(Handle, Handle, *mut *mut c_void, *mut usize, Handle) -> c_int;
type LoadMetadata = unsafe extern "C" fn(Handle, *const c_void, usize, *mut *mut c_char) -> c_int;
type CreateRequest = unsafe extern "C" fn(
    Handle,
    c_int,
    Handle,
    Handle,
    *const c_char,
    *mut Handle,
    Handle,
) -> c_int;
type IsStub = unsafe extern "C" fn() -> bool;
type Leave = extern "C" fn(c_int, *mut c_void);
type OnExit = unsafe extern "C" fn(Leave, *mut c_void) -> c_int;

/// The open library.
#[derive(Debug)]
pub(super) struct Library {
    path: PathBuf,
    create_agent: CreateAgent,
    destroy_agent: OfHandle,
    plugin_params: PluginParams,
    destroy_memories: OfHandle,
    destroy_params: OfHandle,
    create_backend: CreateBackend,
    destroy_backend: OfHandle,
    create_memory_list: CreateList,
    add_memory: AddMemory,
    destroy_memory_list: OfHandle,
    register: OfThree,
    deregister: OfThree,
    local_metadata: LocalMetadata,
    load_metadata: LoadMetadata,
    create_stretch_list: CreateList,
    add_stretch: AddStretch,
    destroy_stretch_list: OfHandle,
    create_request: CreateRequest,
    post: OfThree,
    status: OfTwo,
    release: OfTwo,
    destroy_request: OfHandle,
    _stays_open: ManuallyDrop<Opened>,
}

impl Library {
    /// The library of this process: opened by the first call, the same answer for all.
    pub(super) fn get() -> Result<&'static Self, NixlMissing> {
        static LIBRARY: OnceLock<Result<Library, NixlMissing>> = OnceLock::new();
        let opened = LIBRARY.get_or_init(|| Self::open(&find::library()));
        opened.as_ref().map_err(Clone::clone)
    }

    pub(super) fn open(path: &Path) -> Result<Self, NixlMissing> {
        let opened = open(path).map_err(|reason| NixlMissing::Library {
            tried: path.display().to_string(),
            reason,
        })?;
        Self::bind(opened, path).map_err(|reason| NixlMissing::Unusable {
            path: path.display().to_string(),
            reason,
        })
    }

    fn bind(opened: Opened, path: &Path) -> Result<Self, String> {
        let is_stub: IsStub = symbol(&opened, c"nixl_capi_is_stub")?;
        // SAFETY: it takes nothing and says whether the library can do anything.
        if unsafe { is_stub() } {
            return Err("it is a stub without NIXL behind it".to_owned());
        }
        Ok(Self {
            path: path.to_owned(),
            create_agent: symbol(&opened, c"nixl_capi_create_configured_agent")?,
            destroy_agent: symbol(&opened, c"nixl_capi_destroy_agent")?,
            plugin_params: symbol(&opened, c"nixl_capi_get_plugin_params")?,
            destroy_memories: symbol(&opened, c"nixl_capi_destroy_mem_list")?,
            destroy_params: symbol(&opened, c"nixl_capi_destroy_params")?,
            create_backend: symbol(&opened, c"nixl_capi_create_backend")?,
            destroy_backend: symbol(&opened, c"nixl_capi_destroy_backend")?,
            create_memory_list: symbol(&opened, c"nixl_capi_create_reg_dlist")?,
            add_memory: symbol(&opened, c"nixl_capi_reg_dlist_add_desc")?,
            destroy_memory_list: symbol(&opened, c"nixl_capi_destroy_reg_dlist")?,
            register: symbol(&opened, c"nixl_capi_register_mem")?,
            deregister: symbol(&opened, c"nixl_capi_deregister_mem")?,
            local_metadata: symbol(&opened, c"nixl_capi_get_local_partial_md")?,
            load_metadata: symbol(&opened, c"nixl_capi_load_remote_md")?,
            create_stretch_list: symbol(&opened, c"nixl_capi_create_xfer_dlist")?,
            add_stretch: symbol(&opened, c"nixl_capi_xfer_dlist_add_desc")?,
            destroy_stretch_list: symbol(&opened, c"nixl_capi_destroy_xfer_dlist")?,
            create_request: symbol(&opened, c"nixl_capi_create_xfer_req")?,
            post: symbol(&opened, c"nixl_capi_post_xfer_req")?,
            status: symbol(&opened, c"nixl_capi_get_xfer_status")?,
            release: symbol(&opened, c"nixl_capi_release_xfer_req")?,
            destroy_request: symbol(&opened, c"nixl_capi_destroy_xfer_req")?,
            _stays_open: ManuallyDrop::new(opened),
        })
    }

    /// Where it was opened.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Why a file does not open as a library, in the system's words; `None` when it does, and then it stays open.
pub(super) fn refusal(path: &Path) -> Option<String> {
    match open(path) {
        Ok(opened) => {
            let _stays_open = ManuallyDrop::new(opened);
            None
        }
        Err(reason) => Some(reason),
    }
}

fn open(path: &Path) -> Result<Opened, String> {
    // SAFETY: NIXL's libraries and plug-ins do nothing when they are opened but register themselves.
    let opened = unsafe { Opened::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
    opened.map_err(|error| match std::error::Error::source(&error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    })
}

fn symbol<T: Copy>(library: &Opened, name: &CStr) -> Result<T, String> {
    // SAFETY: each caller names the type that NIXL's header gives to the symbol.
    let found = unsafe { library.get::<T>(name.to_bytes_with_nul()) };
    found
        .map(|symbol| *symbol)
        .map_err(|error| error.to_string())
}

/// From now on the process ends without the exit handlers of the libraries under NIXL. The wheel brings a libnl of its
/// own beside the system's; where both are loaded (RDMA libraries installed), the handlers of the one free what the
/// other has, and every process that used UCX would end with a segmentation fault instead of its own status.
fn leave_without_handlers() {
    static SET: Once = Once::new();
    SET.call_once(|| {
        let this = Opened::this();
        // A C library without it has no such handlers order to rely on; then the process ends as it did.
        if let Ok(on_exit) = symbol::<OnExit>(&this, c"on_exit") {
            // SAFETY: `leave` is a function of this program, which stays, and takes no argument.
            let _registered = unsafe { on_exit(leave, ptr::null_mut()) };
        }
    });
}

extern "C" fn leave(status: c_int, _argument: *mut c_void) {
    // SAFETY: no stream is named: all of them are flushed, as the skipped handlers would have done.
    unsafe { libc::fflush(ptr::null_mut()) };
    // SAFETY: it ends the process; what Rust does at the end has been done before exit handlers run.
    unsafe { libc::_exit(status) }
}

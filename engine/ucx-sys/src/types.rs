//! UCX's structures and constants, as its public headers (`ucp/api`, BSD 3-clause) lay them out.
//!
//! A structure is made with `zeroed()` and given only the fields whose bits are set in its mask; UCX looks at no other.
//! Invariant: `tests/layout.rs` compares every one of them with UCX's headers, by the tables that are made here.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::MaybeUninit;

use crate::Status;

macro_rules! opaque {
    ($($(#[$words:meta])* $name:ident;)*) => {$(
        $(#[$words])*
        #[repr(C)]
        #[derive(Debug)]
        pub struct $name {
            _private: [u8; 0],
        }
    )*};
}

opaque! {
    /// `ucp_config_t`: settings read from the environment.
    Config;
    /// What `ucp_context_h` points to.
    Context;
    /// What `ucp_worker_h` points to.
    Worker;
    /// What `ucp_ep_h` points to.
    Endpoint;
    /// `ucp_address_t`: a worker's address, a string of bytes.
    Address;
    /// What `ucp_mem_h` points to.
    Memory;
    /// What `ucp_rkey_h` points to.
    RemoteKey;
    /// `FILE` of the C library.
    File;
}

macro_rules! constants {
    ($($(#[$words:meta])* $name:ident: $type:ty = $value:expr;)*) => {
        $($(#[$words])* pub const $name: $type = $value;)*

        /// Every constant by name, for the comparison with UCX's headers.
        pub const CONSTANTS: &[(&str, u64)] = &[$((stringify!($name), $name as u64),)*];
    };
}

constants! {
    /// `UCP_FEATURE_RMA`.
    UCP_FEATURE_RMA: u64 = 1 << 1;
    /// `UCP_FEATURE_WAKEUP`.
    UCP_FEATURE_WAKEUP: u64 = 1 << 4;
    /// `UCP_PARAM_FIELD_FEATURES`.
    UCP_PARAM_FIELD_FEATURES: u64 = 1 << 0;
    /// `UCP_PARAM_FIELD_MT_WORKERS_SHARED`.
    UCP_PARAM_FIELD_MT_WORKERS_SHARED: u64 = 1 << 5;
    /// `UCP_ATTR_FIELD_THREAD_MODE`.
    UCP_ATTR_FIELD_THREAD_MODE: u64 = 1 << 1;
    /// `UCP_ATTR_FIELD_MEMORY_TYPES`.
    UCP_ATTR_FIELD_MEMORY_TYPES: u64 = 1 << 2;
    /// `UCP_WORKER_PARAM_FIELD_THREAD_MODE`.
    UCP_WORKER_PARAM_FIELD_THREAD_MODE: u64 = 1 << 0;
    /// `UCS_THREAD_MODE_SERIALIZED`: many threads, one at a time.
    UCS_THREAD_MODE_SERIALIZED: c_uint = 1;
    /// `UCS_THREAD_MODE_MULTI`: many threads at once.
    UCS_THREAD_MODE_MULTI: c_uint = 2;
    /// `UCP_MEM_MAP_PARAM_FIELD_ADDRESS`.
    UCP_MEM_MAP_PARAM_FIELD_ADDRESS: u64 = 1 << 0;
    /// `UCP_MEM_MAP_PARAM_FIELD_LENGTH`.
    UCP_MEM_MAP_PARAM_FIELD_LENGTH: u64 = 1 << 1;
    /// `UCP_MEM_MAP_PARAM_FIELD_FLAGS`.
    UCP_MEM_MAP_PARAM_FIELD_FLAGS: u64 = 1 << 2;
    /// `UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE`.
    UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE: u64 = 1 << 4;
    /// `UCS_MEMORY_TYPE_CUDA`: memory of an NVIDIA GPU; in a set of types, the bit of this number.
    UCS_MEMORY_TYPE_CUDA: c_uint = 1;
    /// `UCP_MEM_MAP_NONBLOCK`: memory need not be resident at once.
    UCP_MEM_MAP_NONBLOCK: c_uint = 1 << 0;
    /// `UCP_MEM_MAP_ALLOCATE`: UCX finds the memory itself.
    UCP_MEM_MAP_ALLOCATE: c_uint = 1 << 1;
    /// `UCP_MEM_ATTR_FIELD_ADDRESS`.
    UCP_MEM_ATTR_FIELD_ADDRESS: u64 = 1 << 0;
    /// `UCP_MEM_ATTR_FIELD_LENGTH`.
    UCP_MEM_ATTR_FIELD_LENGTH: u64 = 1 << 1;
    /// `UCP_EP_PARAM_FIELD_REMOTE_ADDRESS`.
    UCP_EP_PARAM_FIELD_REMOTE_ADDRESS: u64 = 1 << 0;
    /// `UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE`.
    UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE: u64 = 1 << 1;
    /// `UCP_EP_PARAM_FIELD_ERR_HANDLER`.
    UCP_EP_PARAM_FIELD_ERR_HANDLER: u64 = 1 << 2;
    /// `UCP_ERR_HANDLING_MODE_PEER`: a lost peer fails what is under way, and calls the handler.
    UCP_ERR_HANDLING_MODE_PEER: c_uint = 1;
    /// `UCP_OP_ATTR_FIELD_FLAGS`.
    UCP_OP_ATTR_FIELD_FLAGS: u32 = 1 << 4;
    /// `UCP_OP_ATTR_FIELD_MEMORY_TYPE`.
    UCP_OP_ATTR_FIELD_MEMORY_TYPE: u32 = 1 << 6;
    /// `UCP_OP_ATTR_FIELD_MEMH`: the local memory's registration is given.
    UCP_OP_ATTR_FIELD_MEMH: u32 = 1 << 8;
    /// `UCP_EP_CLOSE_FLAG_FORCE`: what is under way is cancelled.
    UCP_EP_CLOSE_FLAG_FORCE: u32 = 1 << 0;
    /// `UCS_LOG_LEVEL_ERROR`; fatal is below it.
    UCS_LOG_LEVEL_ERROR: c_uint = 1;
    /// `UCS_LOG_LEVEL_WARN`; everything above it is for those who look for a fault.
    UCS_LOG_LEVEL_WARN: c_uint = 2;
    /// `UCS_LOG_LEVEL_INFO`.
    UCS_LOG_LEVEL_INFO: c_uint = 4;
    /// `UCS_LOG_FUNC_RC_STOP`: no other handler is asked.
    UCS_LOG_FUNC_RC_STOP: c_uint = 0;
}

/// A handler of UCX's messages, `ucs_log_func_t`: file, line, function, level, component, format and arguments. The
/// arguments are a `va_list`, which the C calling conventions of Linux pass as a pointer.
pub type LogHandler = unsafe extern "C" fn(
    *const c_char,
    c_uint,
    *const c_char,
    c_uint,
    *const c_void,
    *const c_char,
    *mut c_void,
) -> c_uint;

/// `ucp_err_handler_cb_t`: called from progress when an endpoint fails, with the handler's argument.
pub type ErrorCallback = unsafe extern "C" fn(*mut c_void, *mut Endpoint, Status);

/// How a structure lies in memory.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// UCX's name for it.
    pub name: &'static str,
    /// Its size here, without what later versions append.
    pub bytes: usize,
    /// Names and offsets of its fields, in bytes.
    pub fields: &'static [(&'static str, usize)],
}

macro_rules! plain {
    ($($(#[$words:meta])* $name:ident = $in_c:literal { $($(#[$of:meta])* $field:ident: $type:ty,)* })*) => {
        $(
        #[doc = concat!("`", $in_c, "`:")]
        $(#[$words])*
        #[repr(C)]
        #[derive(Debug)]
        pub struct $name {
            $($(#[$of])* pub $field: $type,)*
        }

        impl $name {
            /// All bits zero: no field is set.
            #[must_use]
            pub const fn zeroed() -> Self {
                // SAFETY: every field is a number, an array of them, a pointer that may be null or an optional function.
                unsafe { MaybeUninit::zeroed().assume_init() }
            }
        }
        )*

        /// Every structure by UCX's name: its size, and where its fields begin; for the comparison with UCX's headers.
        pub const LAYOUTS: &[Layout] = &[$(
            Layout {
                name: $in_c,
                bytes: size_of::<$name>(),
                fields: &[$((stringify!($field), std::mem::offset_of!($name, $field)),)*],
            },
        )*];
    };
}

plain! {
    /// What a context is made from.
    ContextParams = "ucp_params_t" {
        /// `UCP_PARAM_FIELD_…`.
        field_mask: u64,
        /// `UCP_FEATURE_…`.
        features: u64,
        /// Bytes of the caller's own in each request.
        request_size: usize,
        /// Not used here.
        request_init: Option<unsafe extern "C" fn(*mut c_void)>,
        /// Not used here.
        request_cleanup: Option<unsafe extern "C" fn(*mut c_void)>,
        /// Not used here.
        tag_sender_mask: u64,
        /// Whether workers of this context are used by several threads at once.
        mt_workers_shared: c_int,
        /// Not used here.
        estimated_num_eps: usize,
        /// Not used here.
        estimated_num_ppn: usize,
        /// Not used here.
        name: *const c_char,
    }
    /// What a context tells.
    ContextAttributes = "ucp_context_attr_t" {
        /// `UCP_ATTR_FIELD_…`.
        field_mask: u64,
        /// Bytes of UCX's own in each request.
        request_size: usize,
        /// `UCS_THREAD_MODE_…`.
        thread_mode: c_uint,
        /// A bit a memory type.
        memory_types: u64,
        /// The context's name.
        name: [c_char; 32],
    }
    /// What a worker is made from.
    WorkerParams = "ucp_worker_params_t" {
        /// `UCP_WORKER_PARAM_FIELD_…`.
        field_mask: u64,
        /// `UCS_THREAD_MODE_…`.
        thread_mode: c_uint,
        /// Not used here.
        cpu_mask: [u64; 16],
        /// Not used here.
        events: c_uint,
        /// Not used here.
        user_data: *mut c_void,
        /// Not used here.
        event_fd: c_int,
        /// Not used here.
        flags: u64,
        /// Not used here.
        name: *const c_char,
        /// Not used here.
        am_alignment: usize,
        /// Not used here.
        client_id: u64,
    }
    /// What memory is registered or allocated.
    MemoryMapParams = "ucp_mem_map_params_t" {
        /// `UCP_MEM_MAP_PARAM_FIELD_…`.
        field_mask: u64,
        /// Where it begins.
        address: *mut c_void,
        /// Its length.
        length: usize,
        /// `UCP_MEM_MAP_…`.
        flags: c_uint,
        /// Not used here.
        prot: c_uint,
        /// `UCS_MEMORY_TYPE_…`.
        memory_type: c_uint,
    }
    /// What registered memory tells.
    MemoryAttributes = "ucp_mem_attr_t" {
        /// `UCP_MEM_ATTR_FIELD_…`.
        field_mask: u64,
        /// Where it begins.
        address: *mut c_void,
        /// Its length.
        length: usize,
        /// Not used here.
        mem_type: c_uint,
    }
    /// Who hears of failures.
    ErrorHandler = "ucp_err_handler_t" {
        /// What is called.
        cb: Option<ErrorCallback>,
        /// With what.
        arg: *mut c_void,
    }
    /// A socket address.
    SocketAddress = "ucs_sock_addr_t" {
        /// `struct sockaddr`.
        addr: *const c_void,
        /// Its length.
        addrlen: u32,
    }
    /// What an endpoint is made from.
    EndpointParams = "ucp_ep_params_t" {
        /// `UCP_EP_PARAM_FIELD_…`.
        field_mask: u64,
        /// The remote worker's.
        address: *const Address,
        /// `UCP_ERR_HANDLING_MODE_…`.
        err_mode: c_uint,
        /// Who hears of failures.
        err_handler: ErrorHandler,
        /// Not used here.
        user_data: *mut c_void,
        /// Not used here.
        flags: c_uint,
        /// Not used here.
        sockaddr: SocketAddress,
        /// Not used here.
        conn_request: *mut c_void,
        /// Not used here.
        name: *const c_char,
        /// Not used here.
        local_sockaddr: SocketAddress,
    }
    /// What an operation is submitted with.
    RequestParams = "ucp_request_param_t" {
        /// `UCP_OP_ATTR_…`.
        op_attr_mask: u32,
        /// Flags of the operation.
        flags: u32,
        /// Not used here.
        request: *mut c_void,
        /// Not used here: requests are polled.
        cb: Option<unsafe extern "C" fn()>,
        /// Not used here: bytes, one after the other.
        datatype: u64,
        /// Not used here.
        user_data: *mut c_void,
        /// Not used here.
        reply_buffer: *mut c_void,
        /// `UCS_MEMORY_TYPE_…` of the local memory.
        memory_type: c_uint,
        /// Not used here.
        recv_info: *mut c_void,
        /// The registration of the local memory.
        memh: *mut Memory,
    }
}

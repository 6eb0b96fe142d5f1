//! The functions of libucp, and of the libucs below it, that are called; with their types, by their names.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::Status;
use crate::types::*;

macro_rules! functions {
    ($($(#[$words:meta])* fn $name:ident($($type:ty),*) $(-> $answer:ty)?;)*) => {
        /// Function pointers into the library, which stays open.
        #[derive(Debug, Clone, Copy)]
        pub struct Functions {
            $($(#[$words])* pub $name: unsafe extern "C" fn($($type),*) $(-> $answer)?,)*
        }

        impl Functions {
            /// Finds all of them, or names the first that is not there.
            pub(crate) fn find(library: &libloading::Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $($name: {
                        let name = stringify!($name);
                        // SAFETY: the type is the one that UCX's headers give to this function.
                        let found = unsafe { library.get(name) };
                        *found.map_err(|_| name)?
                    },)*
                })
            }
        }
    };
}

functions! {
    /// Major, minor, patch.
    fn ucp_get_version(*mut c_uint, *mut c_uint, *mut c_uint);
    /// Words for a status, kept by the library.
    fn ucs_status_string(c_int) -> *const c_char;
    /// Puts a handler before those that UCX's messages go to.
    fn ucs_log_push_handler(LogHandler);
    /// Settings from the environment (prefix, file name, both may be null).
    fn ucp_config_read(*const c_char, *const c_char, *mut *mut Config) -> Status;
    /// Changes a setting by name.
    fn ucp_config_modify(*mut Config, *const c_char, *const c_char) -> Status;
    /// Frees settings.
    fn ucp_config_release(*mut Config);
    /// Makes a context: API major and minor, parameters, settings. (`ucp_init` in C is this, inlined.)
    fn ucp_init_version(c_uint, c_uint, *const ContextParams, *const Config, *mut *mut Context) -> Status;
    /// Tells of a context.
    fn ucp_context_query(*mut Context, *mut ContextAttributes) -> Status;
    /// Ends a context that has no workers and no memory any more.
    fn ucp_cleanup(*mut Context);
    /// Makes a worker.
    fn ucp_worker_create(*mut Context, *const WorkerParams, *mut *mut Worker) -> Status;
    /// Ends a worker with all its endpoints and requests.
    fn ucp_worker_destroy(*mut Worker);
    /// The worker's address and its length.
    fn ucp_worker_get_address(*mut Worker, *mut *mut Address, *mut usize) -> Status;
    /// Frees an address.
    fn ucp_worker_release_address(*mut Worker, *mut Address);
    /// Drives what is under way; 0 when nothing was done.
    fn ucp_worker_progress(*mut Worker) -> c_uint;
    /// Waits for what was submitted on all endpoints; gives a status pointer.
    fn ucp_worker_flush_nbx(*mut Worker, *const RequestParams) -> *mut c_void;
    /// A descriptor that becomes readable when there is something to drive.
    fn ucp_worker_get_efd(*mut Worker, *mut c_int) -> Status;
    /// Arms that descriptor; busy when there is something to drive already.
    fn ucp_worker_arm(*mut Worker) -> Status;
    /// Makes that descriptor readable, from any thread.
    fn ucp_worker_signal(*mut Worker) -> Status;
    /// Registers or allocates memory.
    fn ucp_mem_map(*mut Context, *const MemoryMapParams, *mut *mut Memory) -> Status;
    /// Tells of registered memory.
    fn ucp_mem_query(*mut Memory, *mut MemoryAttributes) -> Status;
    /// Gives memory up.
    fn ucp_mem_unmap(*mut Context, *mut Memory) -> Status;
    /// Packs what a peer needs to reach memory: buffer and length.
    fn ucp_rkey_pack(*mut Context, *mut Memory, *mut *mut c_void, *mut usize) -> Status;
    /// Frees that buffer.
    fn ucp_rkey_buffer_release(*mut c_void);
    /// Makes a key of what a peer packed.
    fn ucp_ep_rkey_unpack(*mut Endpoint, *const c_void, *mut *mut RemoteKey) -> Status;
    /// Where remote memory is mapped into this process, if it is.
    fn ucp_rkey_ptr(*mut RemoteKey, u64, *mut *mut c_void) -> Status;
    /// Frees a key.
    fn ucp_rkey_destroy(*mut RemoteKey);
    /// Makes an endpoint: a connection to another worker.
    fn ucp_ep_create(*mut Worker, *const EndpointParams, *mut *mut Endpoint) -> Status;
    /// Closes an endpoint; gives a status pointer.
    fn ucp_ep_close_nbx(*mut Endpoint, *const RequestParams) -> *mut c_void;
    /// Waits for what was submitted; gives a status pointer.
    fn ucp_ep_flush_nbx(*mut Endpoint, *const RequestParams) -> *mut c_void;
    /// Writes an endpoint's lanes, as text for people.
    fn ucp_ep_print_info(*mut Endpoint, *mut File);
    /// Reads remote memory: local buffer, length, remote address, key; gives a status pointer.
    fn ucp_get_nbx(*mut Endpoint, *mut c_void, usize, u64, *mut RemoteKey, *const RequestParams) -> *mut c_void;
    /// What became of a request.
    fn ucp_request_check_status(*mut c_void) -> Status;
    /// Gives a request back.
    fn ucp_request_free(*mut c_void);
}

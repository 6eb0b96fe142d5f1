//! UCX's own messages, into our log. UCX writes them to the standard output, which is for data.
#![expect(
    unsafe_code,
    reason = "UCX calls a handler of ours with C strings and C's variable arguments"
)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Once;

use baton_ucx_sys as sys;

/// `UCS_LOG_FUNC_RC_CONTINUE`: UCX's own handler comes next.
const CONTINUE: c_uint = 1;

/// Longer messages are cut.
const TEXT_BYTES: usize = 1024;

unsafe extern "C" {
    /// C's own. The arguments are a `va_list`, which is passed as a pointer on the 64-bit Linux machines that we run on.
    fn vsnprintf(
        text: *mut c_char,
        bytes: usize,
        format: *const c_char,
        arguments: *mut c_void,
    ) -> c_int;
}

/// Puts our handler before UCX's, once a process.
pub(super) fn redirect(library: &'static sys::Library) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler is a function of this program, which is there as long as the process.
        unsafe { (library.functions.ucs_log_push_handler)(handle) };
    });
}

unsafe extern "C" fn handle(
    _file: *const c_char,
    _line: c_uint,
    _function: *const c_char,
    level: c_uint,
    _component: *const c_void,
    format: *const c_char,
    arguments: *mut c_void,
) -> c_uint {
    if level < sys::UCS_LOG_LEVEL_ERROR {
        // The process is about to end, perhaps within a signal handler: the shortest way to the terminal.
        return CONTINUE;
    }
    let mut text = [0; TEXT_BYTES];
    // SAFETY: the text has the room that is named; format and arguments are those that UCX gave for each other.
    unsafe { vsnprintf(text.as_mut_ptr(), text.len(), format, arguments) };
    // SAFETY: `vsnprintf` ends what it wrote, and the array was zeroed before.
    let text = unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy();
    // What concerns a request comes as an error of it too; this is for those who look closer.
    if level <= sys::UCS_LOG_LEVEL_WARN {
        tracing::info!(target: "ucx", "{text}");
    } else {
        tracing::debug!(target: "ucx", "{text}");
    }
    sys::UCS_LOG_FUNC_RC_STOP
}

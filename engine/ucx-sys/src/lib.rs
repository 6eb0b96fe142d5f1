//! Run-time-loaded bindings to libucp, the protocol layer of UCX: the part that reads a peer's memory.
//!
//! Types, constants and functions carry UCX's own names. They are written down here rather than generated, because
//! Baton builds without UCX's headers and they are few; `tests/layout.rs` holds each against the headers that are
//! installed. UCX only appends to its structures and marks with `field_mask` what the caller knows of them, so these of
//! version 1.13 serve every later library of the same binary interface. Nothing here is safe, waits or allocates;
//! what makes it safe is `baton-engine`'s `transport::ucx`.
//!
//! Invariant: an open library stays open for the life of the process, for it starts threads and changes signal handlers.
#![expect(
    unsafe_code,
    reason = "libucp is a C library that is opened at run time"
)]

mod functions;
mod status;
mod types;

use std::ffi::{CStr, c_uint};
use std::path::PathBuf;
use std::sync::OnceLock;

pub use functions::Functions;
pub use status::{Status, status_of_pointer};
pub use types::*;

/// What the loader is asked for, unless [`LIBRARY_VARIABLE`] names a file.
pub const LIBRARY: &str = "libucp.so.0";

/// Names the file of libucp where the loader does not find it, or finds the wrong one.
pub const LIBRARY_VARIABLE: &str = "BATON_UCX_LIBRARY";

/// The interface that is asked of the library: the first that has all that is called.
pub const API: (c_uint, c_uint) = (1, 10);

/// Why there is no UCX.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The loader did not find it, or could not load it.
    #[error(
        "cannot open {library}: {reason}\nhint: UCX gives one-sided reads over InfiniBand, RoCE and shared memory; Debian and \
         Ubuntu have it as the package libucx0; {LIBRARY_VARIABLE} names a file elsewhere"
    )]
    Missing {
        /// What was asked for.
        library: String,
        /// The loader's words.
        reason: String,
    },
    /// It lacks a function, hence is older than [`API`] or another library.
    #[error("{library} has no {symbol}; UCX {}.{} or later is needed", API.0, API.1)]
    Incomplete {
        /// Which file.
        library: String,
        /// The first function that was not found.
        symbol: String,
    },
}

/// The open library: its functions, and what it says of itself.
#[derive(Debug)]
pub struct Library {
    /// What may be called.
    pub functions: Functions,
    /// Major, minor and patch of the library that was found.
    pub version: (c_uint, c_uint, c_uint),
    /// The file or name under which it was found.
    pub name: String,
}

impl Library {
    /// Opens libucp, once a process; later calls give the same answer.
    ///
    /// # Errors
    /// When it is missing, cannot be loaded or lacks a function; the first answer stands.
    pub fn open() -> Result<&'static Self, LoadError> {
        static OPENED: OnceLock<Result<Library, LoadError>> = OnceLock::new();
        let opened = OPENED.get_or_init(|| {
            let named = std::env::var_os(LIBRARY_VARIABLE).filter(|name| !name.is_empty());
            Self::open_file(&named.map_or_else(|| PathBuf::from(LIBRARY), PathBuf::from))
        });
        opened.as_ref().map_err(Clone::clone)
    }

    fn open_file(file: &std::path::Path) -> Result<Self, LoadError> {
        let name = file.display().to_string();
        // SAFETY: libucp's initialisers read its settings from the environment and set up its own state; it is a
        // library that is meant to be loaded into any process.
        let opened = unsafe { libloading::Library::new(file) };
        let library = opened.map_err(|error| LoadError::Missing {
            library: name.clone(),
            reason: described(&error),
        })?;
        let library = std::mem::ManuallyDrop::new(library);
        let functions = Functions::find(&library).map_err(|symbol| LoadError::Incomplete {
            library: name.clone(),
            symbol: symbol.to_owned(),
        })?;
        let (mut major, mut minor, mut patch) = (0, 0, 0);
        // SAFETY: the three numbers are this function's own.
        unsafe { (functions.ucp_get_version)(&mut major, &mut minor, &mut patch) };
        Ok(Self {
            functions,
            version: (major, minor, patch),
            name,
        })
    }

    /// UCX's words for a status.
    #[must_use]
    pub fn text_of(&self, status: Status) -> String {
        // SAFETY: any number is allowed; the answer is a string that the library keeps.
        let text = unsafe { (self.functions.ucs_status_string)(status.0) };
        if text.is_null() {
            return format!("status {}", status.0);
        }
        // SAFETY: not null, hence NUL-terminated text that nobody changes while it is copied.
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned()
    }
}

fn described(error: &libloading::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_installed_library_is_opened_once_and_tells_its_version() {
        let library = Library::open()
            .expect("libucp is installed: apt-get install libucx0, or scripts/test --yes");
        assert!(library.version >= (API.0, API.1, 0), "{library:?}");
        assert!(std::ptr::eq(library, Library::open().expect("as before")));
    }

    #[test]
    fn statuses_have_words() {
        let library = Library::open().expect("as above");
        assert_eq!(library.text_of(Status::OK), "Success");
        assert!(library.text_of(Status::UNREACHABLE).contains("unreachable"));
    }

    #[test]
    fn a_missing_library_says_what_it_would_give_and_how_to_get_it() {
        let error = Library::open_file("/nonexistent/libucp.so.0".as_ref()).expect_err("missing");
        let text = error.to_string();
        assert!(text.contains("/nonexistent/libucp.so.0"), "{text}");
        assert!(text.contains("libucx0"), "{text}");
        assert!(text.contains("one-sided reads"), "{text}");
    }

    #[test]
    fn another_library_is_not_taken_for_it() {
        let error = Library::open_file("libc.so.6".as_ref()).expect_err("not UCX");
        assert!(
            matches!(&error, LoadError::Incomplete { symbol, .. } if symbol == "ucp_get_version"),
            "{error}"
        );
    }
}

//! The door to libraries that are only asked for their version: opened as those who use them open them, and left open.
//!
//! Nothing is initialised. Invariant: each function is called by the C prototype that its library documents.
#![expect(
    unsafe_code,
    reason = "libraries are opened at run time and asked for their version"
)]

use std::ffi::{CStr, c_char, c_int};
use std::mem::ManuallyDrop;

use libloading::Library;

/// How a library tells its version.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ask {
    /// `int f(int *version)`, 0 when it went well.
    OneNumber(&'static CStr),
    /// `int f(int *major, int *minor)`, 0 when it went well.
    TwoNumbers(&'static CStr),
    /// `size_t f(void)`.
    Size(&'static CStr),
    /// `const char *f(void)`.
    Text(&'static CStr),
}

/// What it told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Told {
    /// One number, digits packed in the library's own way.
    Number(u64),
    /// Major and minor.
    Pair(u64, u64),
    /// Words.
    Text(String),
}

/// Opens the first of several names and asks it; the name that was opened comes along.
///
/// # Errors
/// The loader's words for the first name, or what is wrong with the library.
pub(super) fn ask(names: &[&'static str], ask: Ask) -> Result<(&'static str, Told), String> {
    let mut first = None;
    for name in names {
        // SAFETY: running the library's initialisers is what those who use it do too; it is never closed.
        match unsafe { Library::new(*name) } {
            Ok(library) => return told(&ManuallyDrop::new(library), ask).map(|told| (*name, told)),
            Err(error) => first = first.or_else(|| Some(words(&error))),
        }
    }
    Err(first.unwrap_or_else(|| "it has no name".to_owned()))
}

/// The loader's own words, which the error keeps behind it.
fn words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn told(library: &Library, ask: Ask) -> Result<Told, String> {
    match ask {
        Ask::OneNumber(name) => {
            let function: unsafe extern "C" fn(*mut c_int) -> c_int = symbol(library, name)?;
            let mut version = 0;
            // SAFETY: the function writes one int, which there is room for.
            let status = unsafe { function(&raw mut version) };
            number(status, version).map(Told::Number)
        }
        Ask::TwoNumbers(name) => {
            let function: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int =
                symbol(library, name)?;
            let (mut major, mut minor) = (0, 0);
            // SAFETY: the function writes two ints, which there is room for.
            let status = unsafe { function(&raw mut major, &raw mut minor) };
            Ok(Told::Pair(number(status, major)?, number(status, minor)?))
        }
        Ask::Size(name) => {
            let function: unsafe extern "C" fn() -> usize = symbol(library, name)?;
            // SAFETY: the function takes nothing and gives a number.
            let version = unsafe { function() };
            Ok(Told::Number(version as u64))
        }
        Ask::Text(name) => {
            let function: unsafe extern "C" fn() -> *const c_char = symbol(library, name)?;
            // SAFETY: the function takes nothing and gives a text of the library's own.
            let text = unsafe { function() };
            if text.is_null() {
                return Err("it tells no version".to_owned());
            }
            // SAFETY: it is not null, ends with a zero, and stays as long as the library, which is never closed.
            let text = unsafe { CStr::from_ptr(text) };
            Ok(Told::Text(text.to_string_lossy().into_owned()))
        }
    }
}

fn number(status: c_int, value: c_int) -> Result<u64, String> {
    match (status, u64::try_from(value)) {
        (0, Ok(value)) => Ok(value),
        _ => Err(format!("asked for its version it answers {status}")),
    }
}

fn symbol<T: Copy>(library: &Library, name: &CStr) -> Result<T, String> {
    // SAFETY: the caller's type is the C prototype that the library documents for this name.
    let found = unsafe { library.get::<T>(name.to_bytes_with_nul()) };
    found.map(|symbol| *symbol).map_err(|error| words(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_there_tells_and_one_that_is_not_has_a_reason() {
        let names = ["libno-such-thing.so.9", "libc.so.6"];
        let (name, told) = ask(&names, Ask::Text(c"gnu_get_libc_version")).unwrap();
        assert_eq!(name, "libc.so.6");
        assert!(matches!(told, Told::Text(text) if text.starts_with("2.")));
        let error = ask(&names[..1], Ask::Size(c"x")).unwrap_err();
        assert!(error.contains("libno-such-thing.so.9"), "{error}");
        let error = ask(&names[1..], Ask::Size(c"no_such_function")).unwrap_err();
        assert!(error.contains("no_such_function"), "{error}");
    }
}

//! Text that a C library prints to a stream, taken into memory.
#![expect(unsafe_code, reason = "the C library's streams are pointers")]

use std::ptr;

use nix::libc;

/// A stream of the C library that writes to memory.
pub(super) struct CText {
    /// Null once closed.
    stream: *mut libc::FILE,
    /// The C library writes these two at every flush, so they stay where they are.
    written: Box<Written>,
}

struct Written {
    text: *mut libc::c_char,
    bytes: libc::size_t,
}

impl CText {
    /// None where there is no memory for one.
    pub(super) fn new() -> Option<Self> {
        let mut written = Box::new(Written {
            text: ptr::null_mut(),
            bytes: 0,
        });
        let Written { text, bytes } = &mut *written;
        // SAFETY: both answers stay where they are until the stream is closed.
        let stream = unsafe { libc::open_memstream(text, bytes) };
        (!stream.is_null()).then_some(Self { stream, written })
    }

    /// For the library that prints.
    pub(super) fn stream(&mut self) -> *mut libc::FILE {
        self.stream
    }

    /// What was printed.
    pub(super) fn finish(mut self) -> Option<String> {
        self.close();
        let Written { text, bytes } = *self.written;
        if text.is_null() {
            return None;
        }
        // SAFETY: the stream is closed, so the text has this length and nobody changes it.
        let printed = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), bytes) };
        Some(String::from_utf8_lossy(printed).into_owned())
    }

    fn close(&mut self) {
        let stream = std::mem::replace(&mut self.stream, ptr::null_mut());
        if !stream.is_null() {
            // SAFETY: the stream is open, and named nowhere else any more.
            unsafe { libc::fclose(stream) };
        }
    }
}

impl Drop for CText {
    fn drop(&mut self) {
        self.close();
        // SAFETY: the C library allocated the text with malloc for whoever opened the stream; null is allowed.
        unsafe { libc::free(self.written.text.cast()) };
    }
}

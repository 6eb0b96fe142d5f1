//! The one place that maps model files. Weights are used where they lie, so a model is not copied to be loaded;
//! a device with memory of its own reads them from the file instead (`backend/stored/file.rs`).
//!
//! Truncating or rewriting a model file while a server runs from it is the operator's fault: the server may
//! then die of SIGBUS or compute nonsense. Replace a file by renaming a new one over it.
#![expect(unsafe_code, reason = "a mapping is only as constant as its file")]

use std::io;

use memmap2::Mmap;

use crate::backend::WeightFile;

/// Maps a file for reading.
pub(crate) fn map(file: &WeightFile) -> io::Result<Mmap> {
    // SAFETY: the file is opened for reading only and nothing in this process writes model files; that no other
    // process changes it while it is mapped is the documented duty of the operator (see the top of this file).
    unsafe { Mmap::map(file.file()) }
}

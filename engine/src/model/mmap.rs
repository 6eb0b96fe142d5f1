//! The one place that maps model files. Weights are used where they lie, so a model is not copied to be loaded.
//!
//! Truncating or rewriting a model file while a server runs from it is the operator's fault: the server may
//! then die of SIGBUS or compute nonsense. Replace a file by renaming a new one over it.
#![expect(unsafe_code, reason = "a mapping is only as constant as its file")]

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

/// Maps a regular file for reading. A fifo or a device is refused before it is opened, because opening may block.
pub(crate) fn map(path: &Path) -> io::Result<Mmap> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    let file = File::open(path)?;
    // SAFETY: the file is opened for reading only and nothing in this process writes model files; that no other
    // process changes it while it is mapped is the documented duty of the operator (see the top of this file).
    unsafe { Mmap::map(&file) }
}

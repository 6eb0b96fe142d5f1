//! Mappings of memory files that can consist of huge pages.
//!
//! A huge page of a file is seen as one only by mappings that begin at a multiple of its size; the kernel gives such
//! addresses of its own accord only where an administrator has huge pages for shared memory switched on. So a mapping
//! takes its place within a reservation. Whether it is written is for its owner: this hands out an address, no slices.
//!
//! Invariant: the reservation is this mapping's alone until it is dropped, and then it is given back whole.
#![expect(unsafe_code, reason = "a place in memory is chosen and mapped over")]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;

use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// Bytes of a huge page: what one entry of the last table but one maps.
pub(crate) const HUGE_BYTES: usize = 2 << 20;

/// Fetched by the kernel so that a huge page has something to be made of.
const SEED_BYTES: usize = 4096;

/// What a mapping is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Reading alone.
    Read,
    /// Reading and writing.
    Write,
}

/// A whole memory file, from the beginning, at a multiple of [`HUGE_BYTES`].
#[derive(Debug)]
pub(crate) struct Mapped {
    reserved: NonNull<libc::c_void>,
    reserved_bytes: usize,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it is an address and a length; what lies there is reached by those who answer for it.
unsafe impl Send for Mapped {}

// SAFETY: as above; advice to the kernel may be given by several threads at once.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps the first `bytes` of a file, which other processes see as well.
    ///
    /// # Errors
    /// When there is no room for it, or the file does not allow it.
    pub(crate) fn shared(file: &File, bytes: usize, access: Access) -> io::Result<Self> {
        let none = || io::Error::from(io::ErrorKind::OutOfMemory);
        let length = NonZeroUsize::new(bytes.max(1)).ok_or_else(none)?;
        let reserved_bytes = length.checked_add(HUGE_BYTES).ok_or_else(none)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that is there.
        let reserved =
            unsafe { mmap_anonymous(None, reserved_bytes, ProtFlags::PROT_NONE, flags) }?;
        let place = reserved.addr().checked_add(HUGE_BYTES - 1);
        let place = place.and_then(|end| NonZeroUsize::new(end.get() & !(HUGE_BYTES - 1)));
        let mut mapped = Self {
            reserved,
            reserved_bytes: reserved_bytes.get(),
            start: reserved.cast(),
            bytes,
        };
        let place = place.ok_or_else(none)?;
        let protection = match access {
            Access::Read => ProtFlags::PROT_READ,
            Access::Write => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: `place` and the whole length are within the reservation, which is nobody else's and holds nothing.
        let start = unsafe { mmap(Some(place), length, protection, flags, file, 0) }?;
        mapped.start = start.cast();
        // Enough where an administrator lets memory files have huge pages on advice: they have them from the first touch on.
        drop(mapped.advise(0..bytes, MmapAdvise::MADV_HUGEPAGE));
        Ok(mapped)
    }

    /// Where it begins.
    pub(crate) const fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Its length.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Has a range, of whole huge pages, consist of huge pages; it becomes resident. What it holds stays as it is, also
    /// for those who write it meanwhile.
    ///
    /// # Errors
    /// When the kernel cannot: it is older than 6.1, has too few huge pages left, or something pins the small ones. Some
    /// may have come about then.
    pub(crate) fn make_huge(&self, range: Range<usize>) -> io::Result<()> {
        let whole = |at: usize| at.is_multiple_of(HUGE_BYTES);
        assert!(
            whole(range.start) && whole(range.end) && range.end <= self.bytes,
            "whole huge pages of the mapping"
        );
        for at in range.clone().step_by(HUGE_BYTES) {
            // Where a file has nothing at all yet, the kernel finds nothing to make a huge page of.
            self.advise(at..at + SEED_BYTES, MmapAdvise::MADV_POPULATE_READ)?;
        }
        let start = self.start.as_ptr().wrapping_add(range.start).cast();
        // SAFETY: the range is within this mapping, and the advice changes no byte of it.
        let refused = unsafe { libc::madvise(start, range.len(), libc::MADV_COLLAPSE) };
        if refused == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Advice that changes no byte.
    fn advise(&self, range: Range<usize>, advice: MmapAdvise) -> io::Result<()> {
        let start = self
            .start
            .map_addr(|start| start.saturating_add(range.start));
        // SAFETY: the range is within this mapping, whose bytes are not changed by such advice.
        unsafe { madvise(start.cast(), range.len(), advice) }?;
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the reservation and the mapping over it are this value's alone, and nobody has addresses of them any more:
        // who took them has borrowed or owns this value.
        let unmapped = unsafe { munmap(self.reserved, self.reserved_bytes) };
        if let Err(error) = unmapped {
            tracing::error!(%error, bytes = self.reserved_bytes, "memory stays mapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::os::unix::fs::FileExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn file(bytes: usize) -> File {
        let file = File::from(memfd_create(c"baton-test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(bytes as u64).unwrap();
        file
    }

    #[test]
    fn mappings_begin_at_huge_pages_and_show_the_file() {
        let file = file(3 * SEED_BYTES);
        file.write_all_at(b"hand-off", 5000).unwrap();
        let mappings: Vec<_> = [Access::Read, Access::Write, Access::Read]
            .into_iter()
            .map(|access| Mapped::shared(&file, 3 * SEED_BYTES, access).unwrap())
            .collect();
        for mapped in &mappings {
            assert!(mapped.start().addr().get().is_multiple_of(HUGE_BYTES));
            assert_eq!(mapped.bytes(), 3 * SEED_BYTES);
            let at = mapped.start().as_ptr().wrapping_add(5000);
            // SAFETY: within the mapping and the file, and nobody writes the file now.
            let seen = unsafe { std::slice::from_raw_parts(at, 8) };
            assert_eq!(seen, b"hand-off");
        }
    }

    #[test]
    fn what_has_no_place_is_an_error() {
        let file = file(1);
        assert!(Mapped::shared(&file, usize::MAX, Access::Read).is_err());
        assert!(Mapped::shared(&file, 1 << 60, Access::Read).is_err());
        let empty = Mapped::shared(&file, 0, Access::Write).unwrap();
        assert_eq!(empty.bytes(), 0);
    }

    #[test]
    fn huge_pages_keep_the_content_or_are_refused() {
        let file = file(3 * HUGE_BYTES);
        file.write_all_at(b"kept", HUGE_BYTES as u64 + 7).unwrap();
        let mapped = Mapped::shared(&file, 3 * HUGE_BYTES, Access::Write).unwrap();
        let made = mapped.make_huge(HUGE_BYTES..3 * HUGE_BYTES);
        let mut seen = [0; 4];
        file.read_exact_at(&mut seen, HUGE_BYTES as u64 + 7)
            .unwrap();
        assert_eq!(&seen, b"kept");
        let resident = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
        match made {
            Ok(()) => assert_eq!(resident, 2 * HUGE_BYTES as u64, "these two and no more"),
            // Of an older kernel, or of one that has no huge pages left.
            Err(error) => assert_ne!(error.kind(), ErrorKind::NotFound, "{error}"),
        }
    }

    #[test]
    #[should_panic(expected = "whole huge pages")]
    fn parts_of_huge_pages_are_a_bug() {
        let mapped = Mapped::shared(&file(HUGE_BYTES), HUGE_BYTES, Access::Write).unwrap();
        drop(mapped.make_huge(0..SEED_BYTES));
    }
}

//! Memory that other processes can be let into: one mapping of an anonymous file, cut once into pieces that never
//! overlap.
//!
//! Transports register an arena, not pages: one key a peer, one mapping, one pinned range. It is resident only around
//! where it was touched ([`super::huge`]), has a fixed size (sealed, so that a peer that maps it can't be hurt by its shrinking), and lives as long
//! as any piece of it. A library that peers are read through may allocate it instead, in its own way. A piece that is dropped gives nothing back: pools keep theirs for ever.
//!
//! Invariant: a piece is cut once, from its own range; so holding it exclusively is holding its bytes exclusively, as
//! far as this process is concerned. Peers may be let in to read, and read only.
#![expect(
    unsafe_code,
    reason = "pieces of one mapping are owned separately, which slices of one allocation can't be"
)]

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::device::DeviceArena;
use super::huge::HugeStretches;
use super::mapped::{Access, Mapped};

/// Pieces begin at multiples of a cache line, so that no two share one.
const PIECE_ALIGN_BYTES: usize = 64;

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// Memory that a library allocated in its own way.
///
/// # Safety
/// It is readable, writable, zeroed when it is handed over, aligned for every type, and stays where it is, of the same
/// size, until it is dropped. Nothing in this process refers to it but through this value, and nobody elsewhere writes it.
pub unsafe trait ForeignMemory: Any + fmt::Debug + Send + Sync {
    /// Where it begins.
    fn base(&self) -> NonNull<u8>;

    /// Its length: at least what was asked for.
    fn bytes(&self) -> usize;
}

/// Allocates foreign memory of at least so many bytes.
pub type ForeignAllocator = fn(usize) -> io::Result<Box<dyn ForeignMemory>>;

/// Where arenas of this process come from, if not from memory files.
static ALLOCATOR: Mutex<Option<ForeignAllocator>> = Mutex::new(None);

/// Says where the arenas come from that are made after this: what peers will read soon is best made by the library
/// through which they read it.
pub(crate) fn allocate_with(allocator: Option<ForeignAllocator>) {
    *ALLOCATOR.lock().unwrap_or_else(|e| e.into_inner()) = allocator;
}

/// What an arena is made of.
enum Backing {
    File {
        file: File,
        map: Mapped,
        huge: HugeStretches,
    },
    Foreign(Box<dyn ForeignMemory>),
    Device(Box<dyn DeviceArena>),
}

/// One shared mapping. See the module.
pub struct Arena {
    id: u64,
    backing: Backing,
    bytes: usize,
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena {} of {} bytes", self.id, self.bytes())
    }
}

impl Arena {
    /// Makes an arena and cuts it into `count` pieces of at least `words` words, zeroed.
    pub(super) fn cut(words: usize, count: usize) -> io::Result<Vec<Words>> {
        let allocator = *ALLOCATOR.lock().unwrap_or_else(|e| e.into_inner());
        Self::cut_of(allocator, words, count)
    }

    /// As [`Self::cut`], of this allocator's memory. Where that has none, of a memory file.
    pub(super) fn cut_of(
        allocator: Option<ForeignAllocator>,
        words: usize,
        count: usize,
    ) -> io::Result<Vec<Words>> {
        let bytes = bytes_of(words, count)?;
        let foreign = allocator
            .filter(|_| bytes > 0)
            .map(|allocate| allocate(bytes));
        let arena = match foreign {
            Some(Ok(memory)) => Self::of(memory, bytes)?,
            Some(Err(error)) => {
                tracing::warn!(%error, bytes, "this memory will be read less fast by peers of this host");
                Self::create(bytes)?
            }
            None => Self::create(bytes)?,
        };
        arena.pieces(words, count)
    }

    /// Cuts memory of a device, which is zeroed, into as many pieces.
    pub(super) fn cut_device(
        memory: Box<dyn DeviceArena>,
        words: usize,
        count: usize,
    ) -> io::Result<Vec<Words>> {
        let bytes = bytes_of(words, count)?;
        let is_aligned = memory.address().is_multiple_of(PIECE_ALIGN_BYTES as u64);
        if memory.bytes() < bytes || !is_aligned {
            return Err(io::Error::other(
                "the device's memory is too small or not aligned",
            ));
        }
        let arena = Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            backing: Backing::Device(memory),
            bytes,
        };
        arena.pieces(words, count)
    }

    /// Hands all of it out; each byte once.
    fn pieces(self, words: usize, count: usize) -> io::Result<Vec<Words>> {
        let stride = stride_of(words)?;
        let arena = Arc::new(self);
        let null = || io::Error::from(io::ErrorKind::OutOfMemory);
        let base = NonNull::new(arena.base()).ok_or_else(null)?;
        let extent = Extent::new(words).on_device(arena.device().is_some());
        let pieces = (0..count).map(|index| Words {
            // Plain arithmetic: for a device's memory these are addresses that mean nothing here.
            start: base
                .map_addr(|base| base.saturating_add(index * stride))
                .cast(),
            extent,
            owner: Owner::Arena(Arc::clone(&arena)),
        });
        Ok(pieces.collect())
    }

    fn create(bytes: usize) -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"baton-kv", flags)?);
        file.set_len(bytes as u64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let map = Mapped::shared(&file, bytes, Access::Write)?;
        let huge = HugeStretches::new(bytes);
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            backing: Backing::File { file, map, huge },
            bytes,
        })
    }

    fn of(memory: Box<dyn ForeignMemory>, bytes: usize) -> io::Result<Self> {
        if memory.bytes() < bytes || !memory.base().addr().get().is_multiple_of(PIECE_ALIGN_BYTES) {
            return Err(io::Error::other(
                "the library's memory is too small or not aligned",
            ));
        }
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            backing: Backing::Foreign(memory),
            bytes,
        })
    }

    /// Unique within this process's life.
    #[must_use]
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// Where it begins, for libraries that register address ranges; of a device, in its own addresses. Reading and writing
    /// is for its pieces' owners.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        match &self.backing {
            Backing::File { map, .. } => map.start().as_ptr(),
            Backing::Foreign(memory) => memory.base().as_ptr(),
            Backing::Device(memory) => std::ptr::without_provenance_mut(
                usize::try_from(memory.address()).unwrap_or_default(),
            ),
        }
    }

    /// The device's memory, where it is one's.
    #[must_use]
    pub fn device(&self) -> Option<&dyn DeviceArena> {
        match &self.backing {
            Backing::File { .. } | Backing::Foreign(_) => None,
            Backing::Device(memory) => Some(&**memory),
        }
    }

    /// Its length.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Has the memory of a range come in huge pages, where that can be and was not tried before: whoever is about to touch
    /// it calls this, or registers it with a library that will.
    pub(crate) fn prepare(&self, range: Range<usize>) {
        if let Backing::File { map, huge, .. } = &self.backing {
            huge.prepare(range, |stretch| map.make_huge(stretch));
        }
    }

    /// Bytes of it that are known to be in huge pages.
    #[must_use]
    pub fn huge_bytes(&self) -> usize {
        match &self.backing {
            Backing::File { huge, .. } => huge.made_bytes(),
            Backing::Foreign(_) | Backing::Device(_) => 0,
        }
    }

    /// The file behind it: anonymous, in memory, of a size that can't change. None where a library allocated it.
    #[must_use]
    pub const fn file(&self) -> Option<&File> {
        match &self.backing {
            Backing::File { file, .. } => Some(file),
            Backing::Foreign(_) | Backing::Device(_) => None,
        }
    }

    /// The memory that a library allocated, if it is of this type.
    pub(crate) fn foreign<T: ForeignMemory>(&self) -> Option<&T> {
        match &self.backing {
            Backing::File { .. } | Backing::Device(_) => None,
            Backing::Foreign(memory) => (&**memory as &dyn Any).downcast_ref(),
        }
    }
}

/// Who frees a piece's memory.
#[derive(Debug)]
enum Owner {
    /// The piece is a boxed slice taken apart.
    Heap,
    Arena(Arc<Arena>),
}

/// A number of words with two facts about them in the low bits, so that both take one word of a piece.
#[derive(Debug, Clone, Copy)]
struct Extent(usize);

impl Extent {
    /// Bits below the count.
    const FACTS: u32 = 2;
    const ON_DEVICE: usize = 1 << 0;
    const PREPARED: usize = 1 << 1;

    /// Of so many words of this host, not prepared. Panics at more than memory can hold, whose count would lose its top bits.
    const fn new(count: usize) -> Self {
        assert!(count <= usize::MAX >> Self::FACTS, "words of one piece");
        Self(count << Self::FACTS)
    }

    /// The same, where they are a device's: their addresses are nothing to dereference.
    const fn on_device(self, is_so: bool) -> Self {
        Self(self.0 | if is_so { Self::ON_DEVICE } else { 0 })
    }

    /// The same, once their arena has heard that they are about to be written, or where there is none to hear it.
    const fn prepared(self) -> Self {
        Self(self.0 | Self::PREPARED)
    }

    const fn count(self) -> usize {
        self.0 >> Self::FACTS
    }

    const fn is_on_device(self) -> bool {
        self.0 & Self::ON_DEVICE != 0
    }

    const fn is_prepared(self) -> bool {
        self.0 & Self::PREPARED != 0
    }
}

/// Exclusively owned words, on the heap or cut from an arena. Either way reading them is a pointer and a length.
#[derive(Debug)]
pub(super) struct Words {
    start: NonNull<u64>,
    extent: Extent,
    owner: Owner,
}

/// From a piece to the next.
fn stride_of(words: usize) -> io::Result<usize> {
    let bytes = words.checked_mul(size_of::<u64>());
    bytes
        .and_then(|bytes| bytes.checked_next_multiple_of(PIECE_ALIGN_BYTES))
        .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// Bytes of an arena of so many pieces.
pub(super) fn bytes_of(words: usize, count: usize) -> io::Result<usize> {
    let bytes = stride_of(words)?.checked_mul(count);
    bytes.ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

// SAFETY: the words are owned exclusively, as a box would own them; an arena's pieces do not overlap.
unsafe impl Send for Words {}

// SAFETY: a shared reference only reads, and nobody writes without an exclusive one.
unsafe impl Sync for Words {}

impl Words {
    /// No words at all.
    pub(super) const fn none() -> Self {
        Self {
            start: NonNull::dangling(),
            extent: Extent::new(0).prepared(),
            owner: Owner::Heap,
        }
    }

    /// Zeroed words on the heap.
    pub(super) fn boxed(count: usize) -> Self {
        let extent = Extent::new(count).prepared();
        let words = Box::leak(vec![0_u64; count].into_boxed_slice());
        Self {
            start: NonNull::from(words).cast(),
            extent,
            owner: Owner::Heap,
        }
    }

    pub(super) const fn is_on_device(&self) -> bool {
        self.extent.is_on_device()
    }

    /// Panics when they are a device's: that is a bug of the caller.
    pub(super) const fn as_slice(&self) -> &[u64] {
        assert!(
            !self.is_on_device(),
            "a device's memory is read with its own calls"
        );
        // SAFETY: `start` and the count in `extent`, which is as it was made, are those of a leaked box or of a piece of a
        // mapping that `owner` keeps, both zeroed when made and aligned for u64, and none of a device; they are borrowed
        // as `self` is.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.extent.count()) }
    }

    /// Panics as [`Words::as_slice`].
    pub(super) fn as_mut_slice(&mut self) -> &mut [u64] {
        assert!(
            !self.is_on_device(),
            "a device's memory is written with its own calls"
        );
        if !self.extent.is_prepared() {
            self.prepare();
        }
        // SAFETY: as in `as_slice`; `self` is borrowed exclusively and no other piece has these words.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.extent.count()) }
    }

    #[cold]
    fn prepare(&mut self) {
        self.extent = self.extent.prepared();
        if let Some((arena, offset)) = self.arena() {
            arena.prepare(offset..offset + self.extent.count() * size_of::<u64>());
        }
    }

    /// The arena and the offset in it, in bytes.
    pub(super) fn arena(&self) -> Option<(&Arc<Arena>, usize)> {
        match &self.owner {
            Owner::Heap => None,
            Owner::Arena(arena) => {
                let offset = self.start.as_ptr().addr() - arena.base().addr();
                Some((arena, offset))
            }
        }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        if matches!(self.owner, Owner::Heap) {
            let words =
                std::ptr::slice_from_raw_parts_mut(self.start.as_ptr(), self.extent.count());
            // SAFETY: exactly this slice was leaked from a box in `boxed`, and nobody else has freed it; or it is empty, as `none` makes
            // it, which is a box wherever it lies.
            drop(unsafe { Box::from_raw(words) });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;
    use crate::page::mapped::HUGE_BYTES;

    #[test]
    fn pieces_are_zeroed_apart_and_of_one_arena() {
        let mut pieces = Arena::cut(10, 3).unwrap();
        for (index, piece) in (1_u64..).zip(&mut pieces) {
            assert_eq!(piece.as_slice(), [0; 10]);
            piece.as_mut_slice().fill(index);
        }
        let offsets: Vec<_> = pieces.iter().map(|p| p.arena().unwrap().1).collect();
        assert_eq!(offsets, [0, 128, 256]);
        for (index, piece) in (1_u64..).zip(&pieces) {
            assert_eq!(piece.as_slice(), [index; 10]);
        }
        let (arena, _) = pieces[0].arena().unwrap();
        assert!(
            pieces
                .iter()
                .all(|p| p.arena().unwrap().0.id() == arena.id())
        );
        let other = Arena::cut(1, 1).unwrap();
        assert_ne!(other[0].arena().unwrap().0.id(), arena.id());
    }

    #[test]
    fn the_file_shows_what_a_piece_holds_and_keeps_its_size() {
        let mut pieces = Arena::cut(8, 2).unwrap();
        pieces[1].as_mut_slice()[0] = u64::from_ne_bytes(*b"hand-off");
        let (arena, offset) = pieces[1].arena().unwrap();
        let file = arena.file().unwrap();
        let mut seen = [0; 8];
        file.read_exact_at(&mut seen, offset as u64).unwrap();
        assert_eq!(&seen, b"hand-off");
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(1 << 20).is_err());
        assert_eq!(arena.bytes(), 128);
    }

    #[test]
    fn an_arena_lives_as_long_as_its_last_piece() {
        let mut pieces = Arena::cut(8, 2).unwrap();
        let arena = Arc::downgrade(pieces[0].arena().unwrap().0);
        let mut last = pieces.pop().unwrap();
        drop(pieces);
        last.as_mut_slice()[7] = 7;
        assert!(arena.upgrade().is_some());
        let moved = std::thread::spawn(move || last.as_slice()[7]);
        assert_eq!(moved.join().unwrap(), 7);
        assert!(arena.upgrade().is_none());
    }

    #[test]
    fn what_is_written_is_in_huge_pages_where_there_are_any_and_the_rest_is_not_touched() {
        let resident = |arena: &Arena| arena.file().unwrap().metadata().unwrap().blocks() * 512;
        let words = (64 << 20) / size_of::<u64>();
        let mut pieces = Arena::cut(words, 2).unwrap();
        let arena = Arc::clone(pieces[0].arena().unwrap().0);
        assert_eq!((arena.huge_bytes(), resident(&arena)), (0, 0));
        pieces[1].as_mut_slice()[0] = 5;
        let one = (words * size_of::<u64>()) as u64;
        let touched = resident(&arena);
        assert!((1..=one).contains(&touched), "the first piece is not");
        assert!(arena.huge_bytes() as u64 <= touched);
        assert_eq!(pieces[1].as_slice()[..2], [5, 0]);
        assert!(arena.base().addr().is_multiple_of(HUGE_BYTES));
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error() {
        assert!(Arena::cut(usize::MAX / 2, 1).is_err());
        assert!(Arena::cut(1 << 40, 1 << 30).is_err());
        assert!(Arena::cut(1, 0).unwrap().is_empty());
    }

    #[derive(Debug)]
    struct Leaked(&'static [u64]);

    // SAFETY: leaked zeroed words that nobody refers to but by this value.
    unsafe impl ForeignMemory for Leaked {
        fn base(&self) -> NonNull<u8> {
            NonNull::from(self.0).cast()
        }

        fn bytes(&self) -> usize {
            size_of_val(self.0)
        }
    }

    #[test]
    fn memory_of_a_library_is_cut_too_and_a_file_takes_its_place_where_there_is_none() {
        let refuse: ForeignAllocator = |_| Err(io::Error::other("none"));
        let pieces = Arena::cut_of(Some(refuse), 8, 2).unwrap();
        assert!(pieces[0].arena().unwrap().0.file().is_some());
        let small: ForeignAllocator = |_| Ok(Box::new(Leaked(&[])));
        let error = Arena::cut_of(Some(small), 8, 2).unwrap_err().to_string();
        assert!(error.contains("too small"), "{error}");
    }

    #[test]
    fn an_extent_keeps_its_count_beside_what_is_known_of_it() {
        for count in [0, 1, 7, usize::MAX >> 2] {
            for on_device in [false, true] {
                let extent = Extent::new(count).on_device(on_device);
                let prepared = extent.prepared();
                assert_eq!((extent.count(), prepared.count()), (count, count));
                assert_eq!(
                    (extent.is_on_device(), prepared.is_on_device()),
                    (on_device, on_device)
                );
                assert!(!extent.is_prepared() && prepared.is_prepared());
            }
        }
    }

    #[test]
    #[should_panic(expected = "words of one piece")]
    fn no_count_loses_its_top_bits() {
        let _ = Words::boxed((usize::MAX >> 2) + 1);
    }

    #[test]
    fn words_on_the_heap_are_in_no_arena() {
        let mut words = Words::boxed(3);
        words.as_mut_slice()[2] = 5;
        assert_eq!(words.as_slice(), [0, 0, 5]);
        assert!(words.arena().is_none());
        assert!(Words::boxed(0).as_slice().is_empty());
    }
}

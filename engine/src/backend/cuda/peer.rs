//! What the hand-off needs of the driver beyond one stream: memory of other processes, and the two kernels that reach over stretches of memory.
//!
//! Each mover has a stream of its own, which is a [`Gpu`] of its own on the same device. Invariant: an [`Imported`] is closed
//! only when its mover has finished, because a mover waits for its stream before it returns.

#![expect(unsafe_code, reason = "the driver is a C library")]

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use bytemuck::NoUninit;
use cudarc::driver::sys;

use super::driver::{
    Args, DeviceMemory, DevicePtr, Function, Gpu, LaunchShape, PinnedMemory, check,
};
use super::error::CudaError;
use super::event::Event;
use super::kernels::{Kernel, Kernels, Source, Variant};
use crate::page::device::FoldRow;
use crate::page::fold::{self, VECTOR_BYTES};

/// Bytes of a handle that lets another process in.
pub(crate) const HANDLE_BYTES: usize = 64;

/// Threads of a block; `THREADS` in `handoff.cu`.
const THREADS: u32 = 512;

/// Room for lists and sums to begin with.
const LIST_BYTES_MIN: usize = 256 << 10;
const SUMS_BYTES_MIN: usize = 4 << 10;

/// Blocks of a sum, per multiprocessor.
const SUM_BLOCKS: usize = 2;

/// What lets another process into an allocation.
pub(super) fn handle_of(gpu: &Gpu, memory: &DeviceMemory) -> Result<[u8; HANDLE_BYTES], CudaError> {
    gpu.bind()?;
    let mut handle = sys::CUipcMemHandle {
        reserved: [0; HANDLE_BYTES],
    };
    // SAFETY: the address begins an allocation, and the target is a valid handle.
    check("cuIpcGetMemHandle", unsafe {
        sys::cuIpcGetMemHandle(&raw mut handle, memory.address())
    })?;
    Ok(handle.reserved.map(|byte| byte.cast_unsigned()))
}

/// An allocation of another process, mapped.
#[derive(Debug)]
pub(super) struct Imported {
    address: DevicePtr,
    bytes: usize,
    gpu: Arc<Gpu>,
}

impl Imported {
    /// Maps what a handle names, whichever GPU of this host it is on.
    pub(super) fn open(gpu: &Arc<Gpu>, handle: [u8; HANDLE_BYTES]) -> Result<Self, CudaError> {
        gpu.bind()?;
        let handle = sys::CUipcMemHandle {
            reserved: handle.map(u8::cast_signed),
        };
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: the driver refuses what is no handle; what it maps is closed when self is dropped.
        check("cuIpcOpenMemHandle", unsafe {
            sys::cuIpcOpenMemHandle_v2(&raw mut address, handle, flags)
        })?;
        let mut opened = Self {
            address,
            bytes: 0,
            gpu: Arc::clone(gpu),
        };
        // SAFETY: the address was just mapped; of the targets one is a valid integer and the other is not wanted.
        check("cuMemGetAddressRange", unsafe {
            sys::cuMemGetAddressRange_v2(ptr::null_mut(), &raw mut opened.bytes, address)
        })?;
        Ok(opened)
    }

    pub(super) const fn address(&self) -> DevicePtr {
        self.address
    }

    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        drop(self.gpu.bind());
        // SAFETY: opened once in open, and no mover uses it any more (see the module).
        drop(check("cuIpcCloseMemHandle", unsafe {
            sys::cuIpcCloseMemHandle(self.address)
        }));
    }
}

/// Waits until everything is done that anybody in this process has put on the device.
pub(super) fn settle(gpu: &Gpu) -> Result<(), CudaError> {
    gpu.bind()?;
    // SAFETY: the context is current.
    check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
}

/// Lets a device reach the other's memory, so that copies need not pass through the host. It may be allowed already.
pub(super) fn let_reach(from: &Gpu, to: &Gpu) -> Result<(), CudaError> {
    from.bind()?;
    // SAFETY: both contexts are alive.
    let status = unsafe { sys::cuCtxEnablePeerAccess(to.context(), 0) };
    match status {
        sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
        status => check("cuCtxEnablePeerAccess", status),
    }
}

/// Puts a copy between two devices' memories on the first one's stream.
pub(super) fn copy_between(source: &Held, target: &Held) -> Result<(), CudaError> {
    let bytes = source.memory.bytes().min(target.memory.bytes());
    let (from, to) = (source.gpu.context(), target.gpu.context());
    source.gpu.bind()?;
    // SAFETY: both ranges are whole allocations of these contexts, and whoever calls waits for the stream before he drops them.
    check("cuMemcpyPeerAsync", unsafe {
        let (source, stream) = (source.memory.address(), source.gpu.stream());
        sys::cuMemcpyPeerAsync(target.memory.address(), to, source, from, bytes, stream)
    })
}

/// Memory with the device that it is on.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) gpu: Arc<Gpu>,
    pub(super) memory: DeviceMemory,
}

/// Bytes of a stretch at most: what a block has in flight at once.
pub(super) const STRETCH_BYTES: usize = 64 << 10;

/// `Stretch` in `handoff.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
struct Stretch {
    source: DevicePtr,
    /// Of a copy.
    target: DevicePtr,
    /// Index of its first vector within the piece.
    first: u64,
    /// Of 16 bytes.
    vectors: u32,
    /// Of a sum.
    piece: u32,
}

/// Device memory that is there for as long as it is borrowed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ground<'a> {
    address: DevicePtr,
    bytes: usize,
    of: PhantomData<&'a ()>,
}

impl<'a> From<&'a DeviceMemory> for Ground<'a> {
    fn from(memory: &'a DeviceMemory) -> Self {
        Self {
            address: memory.address(),
            bytes: memory.bytes(),
            of: PhantomData,
        }
    }
}

impl<'a> From<&'a Imported> for Ground<'a> {
    fn from(memory: &'a Imported) -> Self {
        Self {
            address: memory.address,
            bytes: memory.bytes,
            of: PhantomData,
        }
    }
}

impl Ground<'_> {
    /// The address of bytes within it. Panics beyond it: that is a bug of the caller.
    fn at(&self, start: usize, bytes: usize) -> DevicePtr {
        let end = start.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.bytes),
            "bytes within the memory"
        );
        self.address + start as u64
    }
}

/// In place of its length, of a piece that no kernel sums, because something of it is odd. None is so long.
const UNSUMMED: u64 = u64::MAX;

/// What copies are made of. Their memory is kept from one read to the next: thousands of pieces are read in a third of a millisecond,
/// in which fresh memory would have to be faulted in.
#[derive(Debug, Default)]
struct Lists {
    stretches: Vec<Stretch>,
    /// Source, target and bytes of what no kernel takes because it is of no whole, aligned vectors.
    odd: Vec<(DevicePtr, DevicePtr, usize)>,
    /// How long each piece is, or [`UNSUMMED`].
    pieces: Vec<u64>,
}

impl Lists {
    fn clear(&mut self) {
        self.stretches.clear();
        self.odd.clear();
        self.pieces.clear();
    }
}

/// Copies to be made together, in pieces that are summed each for itself. [`Reach::copies`] makes some.
#[derive(Debug)]
pub(super) struct Copies<'a> {
    lists: Lists,
    of: PhantomData<&'a ()>,
}

impl<'a> Copies<'a> {
    /// What is added from now on is another piece.
    pub(super) fn begin_piece(&mut self) {
        self.lists.pieces.push(0);
    }

    /// More of the last piece: bytes of `source` from `from` on, to `target` from `to` on.
    pub(super) fn add(
        &mut self,
        (source, from): (Ground<'a>, usize),
        (target, to): (Ground<'a>, usize),
        bytes: usize,
    ) {
        let (source, target) = (source.at(from, bytes), target.at(to, bytes));
        let Lists {
            stretches,
            odd,
            pieces,
        } = &mut self.lists;
        let piece = pieces.len().saturating_sub(1);
        let piece = u32::try_from(piece).expect("as many pieces as a list in memory has");
        let length = pieces.last_mut().expect("a piece was begun");
        let vector = VECTOR_BYTES as u64;
        if [source, target, bytes as u64]
            .iter()
            .any(|n| !n.is_multiple_of(vector))
        {
            *length = UNSUMMED;
            odd.push((source, target, bytes));
            return;
        }
        let mut first = 0;
        if *length != UNSUMMED {
            first = *length / vector;
            *length += bytes as u64;
        }
        for start in (0..bytes).step_by(STRETCH_BYTES) {
            stretches.push(Stretch {
                source: source + start as u64,
                target: target + start as u64,
                first: first + start as u64 / vector,
                vectors: vectors(STRETCH_BYTES.min(bytes - start)),
                piece,
            });
        }
    }
}

/// Sums to be made together.
#[derive(Debug, Default)]
pub(super) struct Sums<'a> {
    stretches: Vec<Stretch>,
    pieces: u32,
    of: PhantomData<&'a ()>,
}

impl<'a> Sums<'a> {
    /// More pieces. False when something of them is of no whole, aligned vectors.
    pub(super) fn add(&mut self, source: Ground<'a>, row: &FoldRow<'_>) -> bool {
        let aligned = |at: usize| at.is_multiple_of(VECTOR_BYTES);
        let fit = |range: &Range<usize>| aligned(range.start) && aligned(range.len());
        if !row.stretches.iter().all(fit) || !row.places().all(aligned) {
            return false;
        }
        for at in row.places() {
            let mut first = 0;
            for range in row.stretches {
                let address = source.at(at.saturating_add(range.start), range.len());
                for start in (0..range.len()).step_by(STRETCH_BYTES) {
                    let vectors = vectors(STRETCH_BYTES.min(range.len() - start));
                    self.stretches.push(Stretch {
                        source: address + start as u64,
                        target: 0,
                        first,
                        vectors,
                        piece: self.pieces,
                    });
                    first += u64::from(vectors);
                }
            }
            self.pieces += 1;
        }
        true
    }
}

fn vectors(bytes: usize) -> u32 {
    u32::try_from(bytes / VECTOR_BYTES).expect("a stretch is short")
}

/// Puts the kernels of the hand-off on a stream of its own, and waits for them.
#[derive(Debug)]
pub(super) struct Reach {
    gpu: Arc<Gpu>,
    copy: Function,
    copy_fold: Function,
    fold: Function,
    /// The kernel's.
    list: Option<Both>,
    /// Of each piece's terms.
    sums: Option<Both>,
    /// When the last kernel that copies has ended; its sums may be on their way.
    copied: Event,
    /// When no kernel uses list and sums any more.
    done: Event,
    /// Nothing has been added to them since they were zeroed, or will be before they are.
    sums_are_zero: bool,
    /// Of the copies that are under way, or were last; with no pieces where those are not summed.
    lists: Lists,
    /// Whether copies are under way.
    begun: bool,
}

/// Memory here and there that is copied from one to the other. It grows to the longest so far.
#[derive(Debug)]
struct Both {
    pinned: PinnedMemory,
    on_device: DeviceMemory,
}

impl Both {
    /// What is there, if it is long enough; else as much and some more, which is new. Allocating waits for all that the device does.
    fn fit<'a>(
        held: &'a mut Option<Self>,
        gpu: &Arc<Gpu>,
        (bytes, bytes_min): (usize, usize),
    ) -> Result<(&'a mut Self, bool), CudaError> {
        match held.take().filter(|held| held.on_device.bytes() >= bytes) {
            Some(fitting) => Ok((held.insert(fitting), false)),
            None => {
                let room = bytes.next_power_of_two().max(bytes_min);
                let made = Self {
                    pinned: PinnedMemory::new(gpu, room)?,
                    on_device: DeviceMemory::new(gpu, room)?,
                };
                Ok((held.insert(made), true))
            }
        }
    }
}

impl Reach {
    /// On a device; compiles the kernels where nobody did yet.
    pub(super) fn open(ordinal: usize) -> Result<Self, CudaError> {
        let gpu = Gpu::open_at(ordinal)?;
        let mut kernels = Kernels::new(&gpu);
        let mut kernel = |name| {
            kernels.get(&Kernel {
                source: Source::Handoff,
                variant: Variant::default(),
                name,
                shared_bytes: 0,
            })
        };
        Ok(Self {
            copy: kernel("copy_stretches")?,
            copy_fold: kernel("copy_fold_stretches")?,
            fold: kernel("fold_stretches")?,
            list: None,
            sums: None,
            copied: Event::new(&gpu)?,
            done: Event::new(&gpu)?,
            sums_are_zero: false,
            lists: Lists::default(),
            begun: false,
            gpu,
        })
    }

    pub(super) const fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// None yet: to be added to, and to be begun here. Copies that are under way have ended.
    pub(super) fn copies<'a>(&mut self) -> Copies<'a> {
        assert!(!self.begun, "copies are finished before others are made");
        let mut lists = std::mem::take(&mut self.lists);
        lists.clear();
        Copies {
            lists,
            of: PhantomData,
        }
    }

    /// Begins copies by so many blocks, and sums them where that is `summed`; whoever calls holds the targets and keeps the sources
    /// until [`Reach::finish`] has returned, before which no others begin. They wait until all that was begun of `behind` is copied.
    /// After an error none of these is under way.
    pub(super) fn begin(
        &mut self,
        mut copies: Copies<'_>,
        (blocks, summed): (usize, bool),
        behind: Option<&Self>,
    ) -> Result<(), CudaError> {
        assert!(!self.begun, "copies are finished before others begin");
        let put = self.put(&copies.lists, (blocks, summed), behind);
        if put.is_err() {
            drop(self.gpu.synchronize());
            return put;
        }
        if !summed {
            copies.lists.pieces.clear();
        }
        (self.lists, self.begun) = (copies.lists, true);
        Ok(())
    }

    /// Waits for the copies that were begun. Adds to `found` the checksum of each piece, where it was summed; nothing of any where
    /// none were to be.
    pub(super) fn finish(&mut self, found: &mut Vec<Option<u64>>) -> Result<(), CudaError> {
        if !std::mem::take(&mut self.begun) {
            return Ok(());
        }
        self.done.wait()?;
        let sums = self.sums.as_ref().map(|sums| sums.pinned.as_slice());
        let (words, _) = sums.unwrap_or_default().as_chunks::<8>();
        let pieces = self.lists.pieces.iter().enumerate();
        found.extend(pieces.map(|(index, &bytes)| {
            let word = words.get(index).filter(|_| bytes != UNSUMMED)?;
            // A piece without a byte has no stretch either.
            Some(fold::finish(u64::from_le_bytes(*word), bytes))
        }));
        Ok(())
    }

    fn put(
        &mut self,
        copies: &Lists,
        (blocks, summed): (usize, bool),
        behind: Option<&Self>,
    ) -> Result<(), CudaError> {
        self.gpu.bind()?;
        for &(source, target, bytes) in &copies.odd {
            // SAFETY: both ranges were checked, and the caller keeps their memory until it has been waited for.
            check("cuMemcpyDtoDAsync", unsafe {
                sys::cuMemcpyDtoDAsync_v2(target, source, bytes, self.gpu.stream())
            })?;
        }
        let list = self.upload(&copies.stretches)?;
        let sums_bytes = copies.pieces.len() * size_of::<u64>();
        let sums = match summed {
            true => Some(self.zeroed_sums(sums_bytes)?),
            false => None,
        };
        if let Some(before) = behind {
            before.copied.hold_back(&self.gpu)?;
        }
        if let Some(list) = list {
            let args = Args::default().with(list).with(count(&copies.stretches));
            let (kernel, mut args) = match sums {
                Some(sums) => (self.copy_fold, args.with(sums)),
                None => (self.copy, args),
            };
            let shape = spread(&copies.stretches, blocks);
            // SAFETY: the list holds what the kernel expects, ranges that were checked, of memory that the caller keeps until it
            // has been waited for, and there is a sum for each piece where it sums.
            unsafe { self.gpu.launch(kernel, shape, &mut args) }?;
        }
        self.copied.record()?;
        if let Some(sums) = self.sums.as_mut().filter(|_| summed) {
            self.gpu
                .download_later(&sums.on_device, &mut sums.pinned, sums_bytes)?;
        }
        self.done.record()?;
        match summed {
            true => self.zero_sums(sums_bytes),
            false => Ok(()),
        }
    }

    /// Adds up the terms of each piece.
    pub(super) fn fold(&mut self, sums: &Sums<'_>) -> Result<Vec<u64>, CudaError> {
        let mut found = vec![0_u64; sums.pieces as usize];
        let Some(list) = self.upload(&sums.stretches)? else {
            return Ok(found);
        };
        let target = self.zeroed_sums(size_of_val(&found[..]))?;
        let mut args = Args::default()
            .with(list)
            .with(count(&sums.stretches))
            .with(target);
        let shape = spread(&sums.stretches, self.gpu.processors * SUM_BLOCKS);
        // SAFETY: the list holds what the kernel expects, ranges that were checked, of memory that is borrowed until the wait
        // within the download, and there is a sum for each piece.
        unsafe { self.gpu.launch(self.fold, shape, &mut args) }?;
        if let Some(sums) = &self.sums {
            self.gpu
                .download(&sums.on_device, 0, bytemuck::cast_slice_mut(&mut found))?;
        }
        self.zero_sums(size_of_val(&found[..]))?;
        Ok(found)
    }

    /// Room for sums of so many bytes, which are zero; what adds to them is to have them zeroed again.
    fn zeroed_sums(&mut self, bytes: usize) -> Result<DevicePtr, CudaError> {
        let (sums, is_new) = Both::fit(&mut self.sums, &self.gpu, (bytes, SUMS_BYTES_MIN))?;
        let is_zero = std::mem::take(&mut self.sums_are_zero);
        if is_new || !is_zero {
            self.gpu.zero(&sums.on_device, sums.on_device.bytes())?;
        }
        Ok(sums.on_device.address())
    }

    /// Zeroes the sums that have been read, for the next ones, which so need not wait for it.
    fn zero_sums(&mut self, bytes: usize) -> Result<(), CudaError> {
        if let Some(sums) = &self.sums {
            self.gpu.zero(&sums.on_device, bytes)?;
            self.sums_are_zero = true;
        }
        Ok(())
    }

    /// Puts a list where kernels find it, which no kernel uses; none where it is empty.
    fn upload(&mut self, stretches: &[Stretch]) -> Result<Option<DevicePtr>, CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(stretches);
        if bytes.is_empty() {
            return Ok(None);
        }
        let (list, _) = Both::fit(&mut self.list, &self.gpu, (bytes.len(), LIST_BYTES_MIN))?;
        let pinned = &mut list.pinned.as_mut_slice()[..bytes.len()];
        pinned.copy_from_slice(bytes);
        self.gpu.upload(&list.on_device, 0, pinned)?;
        Ok(Some(list.on_device.address()))
    }
}

fn count(stretches: &[Stretch]) -> i32 {
    i32::try_from(stretches.len()).expect("as many stretches as a list in memory has")
}

/// A block a stretch, as far as there are blocks.
fn spread(stretches: &[Stretch], blocks: usize) -> LaunchShape {
    let blocks = stretches.len().min(blocks.max(1));
    LaunchShape {
        grid: [u32::try_from(blocks).unwrap_or(u32::MAX), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
    }
}

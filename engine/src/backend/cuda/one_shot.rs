//! Sums of short messages over the GPUs of one host, in one kernel: each writes its part into a box in every other one's memory
//! and adds up what lies in its own (`sum_over_ranks.cu`). A decode step has two a layer, and NCCL's would take longer than what
//! is summed takes to compute.
//!
//! Invariant: all ranks launch the same sums in the same order, each on one stream. A rank whose others are gone stops waiting when
//! it is told to; what its tensors hold then means nothing.

#![expect(unsafe_code, reason = "launching a kernel hands it addresses")]

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::driver::{Args, DeviceMemory, DevicePtr, Function, Gpu, LaunchShape, PinnedMemory};
use super::error::CudaError;
use super::kernels::{Kernel, Kernels, Source, Variant};
use super::peer::{HANDLE_BYTES, Imported, handle_of};
use crate::backend::ActivationDtype;

/// Threads of a block; `THREADS` in `sum_over_ranks.cu`.
const THREADS: u32 = 512;
/// Blocks at most. All wait for others, so all have to run at the same time.
const BLOCKS_MAX: usize = 64;
/// Elements and bytes of a packet.
const PACKET_ELEMENTS: usize = 4;
const PACKET_BYTES: usize = 16;
/// Packets of one rank in one epoch.
const PACKETS: usize = THREADS as usize * BLOCKS_MAX;
/// Ranks at most: each writes to every other one.
pub(super) const RANKS_MAX: usize = 8;
/// The driver gives allocations of this size a mapping of their own, which another process can have.
const ALONE_BYTES: usize = 2 << 20;

/// Tells the kernels of a device to stop waiting.
pub(super) struct Stop(PinnedMemory);

// SAFETY: its only use is an atomic store.
unsafe impl Sync for Stop {}

impl fmt::Debug for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stop")
    }
}

impl Stop {
    pub(super) fn tell(&self) {
        let word = self.0.address() as *mut u32;
        // SAFETY: the word is pinned memory of this object, aligned, and written by nobody but this.
        let word = unsafe { AtomicU32::from_ptr(word) };
        word.store(1, Ordering::Release);
    }
}

/// A rank's box, before the others' are known.
#[derive(Debug)]
pub(super) struct Mailbox {
    memory: DeviceMemory,
    ranks: usize,
    gpu: Arc<Gpu>,
}

impl Mailbox {
    /// An empty one, for so many ranks.
    pub(super) fn new(gpu: &Arc<Gpu>, ranks: usize) -> Result<Self, CudaError> {
        let bytes = 2 * ranks * PACKETS * PACKET_BYTES;
        let memory = DeviceMemory::new(gpu, bytes.next_multiple_of(ALONE_BYTES))?;
        gpu.zero(&memory, memory.bytes())?;
        // It must be empty before another rank may write to it.
        gpu.synchronize()?;
        Ok(Self {
            memory,
            ranks,
            gpu: Arc::clone(gpu),
        })
    }

    /// What lets the other ranks' processes in.
    pub(super) fn handle(&self) -> Result<[u8; HANDLE_BYTES], CudaError> {
        handle_of(&self.gpu, &self.memory)
    }

    /// Opens the others' boxes, whose handles are given in the order of the ranks; the one at `rank` is this one's own. What is
    /// summed is of the activations' type.
    pub(super) fn meet(
        self,
        activations: ActivationDtype,
        rank: usize,
        handles: &[[u8; HANDLE_BYTES]],
    ) -> Result<OneShot, CudaError> {
        assert_eq!(handles.len(), self.ranks, "a handle a rank");
        let Self { memory, ranks, gpu } = self;
        let mut others = Vec::new();
        let mut addresses = Vec::new();
        for (index, handle) in handles.iter().enumerate() {
            if index == rank {
                addresses.push(memory.address());
                continue;
            }
            let opened = Imported::open(&gpu, *handle)?;
            if opened.bytes() < memory.bytes() {
                return Err(CudaError::NotServed(format!(
                    "a box of {} bytes instead of {}",
                    opened.bytes(),
                    memory.bytes()
                )));
            }
            addresses.push(opened.address());
            others.push(opened);
        }
        let kernel = Kernels::of(&gpu, activations).get(&Kernel {
            source: Source::SumOverRanks,
            variant: Variant::default(),
            name: "sum_over_ranks",
            shared_bytes: 0,
        })?;
        let table = DeviceMemory::new(&gpu, RANKS_MAX * size_of::<DevicePtr>())?;
        gpu.upload(&table, 0, bytemuck::cast_slice(&addresses))?;
        let epochs = DeviceMemory::new(&gpu, BLOCKS_MAX * 4)?;
        gpu.zero(&epochs, epochs.bytes())?;
        gpu.synchronize()?;
        Ok(OneShot {
            kernel,
            table,
            epochs,
            stop: Arc::new(Stop(PinnedMemory::new(&gpu, 4)?)),
            rank,
            ranks,
            _others: others,
            _own: memory,
            gpu,
        })
    }
}

/// The boxes of all ranks.
#[derive(Debug)]
pub(super) struct OneShot {
    kernel: Function,
    /// Addresses of the boxes.
    table: DeviceMemory,
    /// How many sums each block has been in.
    epochs: DeviceMemory,
    stop: Arc<Stop>,
    rank: usize,
    ranks: usize,
    _others: Vec<Imported>,
    _own: DeviceMemory,
    gpu: Arc<Gpu>,
}

impl OneShot {
    /// For whoever notices that a rank is gone.
    pub(super) fn stop(&self) -> Arc<Stop> {
        Arc::clone(&self.stop)
    }

    /// Whether a sum of so many elements at this address can be taken; the answer is the same on all ranks.
    pub(super) const fn takes(address: DevicePtr, count: usize) -> bool {
        count <= PACKETS * PACKET_ELEMENTS
            && count.is_multiple_of(PACKET_ELEMENTS)
            && address.is_multiple_of(8)
    }

    /// Puts the sum of all ranks' elements, in the activations' type, in the place of each one's own.
    pub(super) fn sum(&self, address: DevicePtr, count: usize) -> Result<(), CudaError> {
        assert!(Self::takes(address, count), "a short, aligned message");
        let int = |value: usize| i32::try_from(value).expect("a short message");
        let mut args = Args::default()
            .with(address)
            .with(self.table.address())
            .with(self.epochs.address())
            .with(self.stop.0.address())
            .with(int(self.rank))
            .with(int(self.ranks))
            .with(int(PACKETS))
            .with(int(count));
        let blocks = (count / PACKET_ELEMENTS).div_ceil(THREADS as usize);
        let shape = LaunchShape {
            grid: [u32::try_from(blocks).expect("few blocks"), 1, 1],
            threads: THREADS,
            shared_bytes: 0,
        };
        // SAFETY: the elements are a live tensor of this stream; blocks and threads are no more than the boxes and epochs have
        // room for, and every rank's box is mapped as long as self is.
        unsafe { self.gpu.launch(self.kernel, shape, &mut args) }
    }
}

impl Drop for OneShot {
    fn drop(&mut self) {
        // A kernel may still write to the others' boxes.
        drop(self.gpu.synchronize());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_aligned_messages_are_taken() {
        assert!(OneShot::takes(512, 4096));
        assert!(OneShot::takes(512, 32 * 4096));
        assert!(!OneShot::takes(512, 32 * 4096 + 4));
        assert!(!OneShot::takes(512, 4094));
        assert!(!OneShot::takes(508, 4096));
    }
}

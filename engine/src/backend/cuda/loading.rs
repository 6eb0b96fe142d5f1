//! Weights on their way from files to the device: read by some threads into pinned buffers, of which there are a few more than
//! readers, so that files are read while what was read before is copied.
//!
//! All copies are put on the backend's one stream by its own thread. Invariant: a buffer is written only when the copy from it has
//! passed. Memory is bounded whatever the model's size, and made as it is needed.

use std::collections::VecDeque;
use std::num::NonZero;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::driver::{DeviceMemory, Gpu, PinnedMemory};
use super::error::CudaError;
use super::event::Event;
use super::reading::{Form, Read, Readers, pieces};
use crate::backend::{Arrived, BackendError, FileSource};

/// Of a buffer: copies of less do not fill the bus.
pub(super) const BUFFER_BYTES: usize = 4 << 20;
/// One gives some 3 GB/s of what the system has in memory, and the bus takes 50.
const READERS_MAX: usize = 16;
/// Buffers that are copied from, or wait to be, while all readers read.
const SPARE_BUFFERS: usize = 4;
/// How long nothing may come of all that is being read.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// A pinned buffer.
#[derive(Debug)]
struct Buffer {
    memory: PinnedMemory,
    /// Set behind the last copy from it.
    copied: Event,
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut_slice()
    }
}

/// Where a weight goes.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) memory: Arc<DeviceMemory>,
    pub(super) offset: usize,
}

/// What is under way.
#[derive(Debug)]
pub(super) struct Loading {
    gpu: Arc<Gpu>,
    readers: Readers<Buffer, Target>,
    free: Vec<Buffer>,
    /// In the order of their copies.
    copying: VecDeque<Buffer>,
    /// Buffers that may still be made.
    to_make: usize,
}

impl Loading {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self, BackendError> {
        let readers = thread::available_parallelism().map_or(1, NonZero::get);
        let readers = readers.min(READERS_MAX);
        Ok(Self {
            gpu: Arc::clone(gpu),
            readers: Readers::start(readers)?,
            free: Vec::new(),
            copying: VecDeque::new(),
            to_make: readers + SPARE_BUFFERS,
        })
    }

    /// Has a weight read and copied in a form in which its rows fit buffers. Returns when its last piece is with a reader.
    pub(super) fn load(
        &mut self,
        source: &Arc<FileSource>,
        form: Form,
        target: &Target,
        arrived: Arrived<'_>,
    ) -> Result<(), BackendError> {
        let pieces = pieces(source, form, BUFFER_BYTES).expect("rows fit buffers");
        for piece in pieces {
            let buffer = self.buffer(source, arrived)?;
            self.readers.read(Read {
                buffer,
                source: Arc::clone(source),
                piece,
                target: target.clone(),
            });
        }
        Ok(())
    }

    /// Waits until everything is on the device.
    pub(super) fn end(mut self, arrived: Arrived<'_>) -> Result<(), BackendError> {
        while let Some(read) = self.readers.next(SILENCE_MAX)? {
            self.copy(read, arrived)?;
        }
        let passed = self.gpu.synchronize();
        passed.map_err(|error| error.of("copying weights to the device"))
    }

    /// A buffer that may be written. Whatever has been read meanwhile is copied.
    fn buffer(
        &mut self,
        source: &FileSource,
        arrived: Arrived<'_>,
    ) -> Result<Buffer, BackendError> {
        while let Some(read) = self.readers.ready()? {
            self.copy(read, arrived)?;
        }
        if let Some(free) = self.free.pop() {
            return Ok(free);
        }
        let failed = |error: CudaError| error.of(format!("weight `{}`", source.name));
        if self.to_make > 0 {
            self.to_make -= 1;
            let memory = PinnedMemory::new(&self.gpu, BUFFER_BYTES).map_err(failed)?;
            let copied = Event::new(&self.gpu).map_err(failed)?;
            return Ok(Buffer { memory, copied });
        }
        if self.copying.is_empty()
            && let Some(read) = self.readers.next(SILENCE_MAX)?
        {
            self.copy(read, arrived)?;
        }
        let buffer = self.copying.pop_front();
        let buffer = buffer.expect("a buffer is free, with a reader or copied from");
        buffer.copied.wait().map_err(failed)?;
        Ok(buffer)
    }

    /// Puts the copy of what was read on the stream.
    fn copy(
        &mut self,
        read: Read<Buffer, Target>,
        arrived: Arrived<'_>,
    ) -> Result<(), BackendError> {
        let Read {
            buffer,
            source,
            piece,
            target,
        } = read;
        let place = piece.target(&source);
        let bytes = &buffer.memory.as_slice()[..place.len()];
        let offset = target.offset + place.start;
        let copied = self.gpu.upload(&target.memory, offset, bytes);
        let marked = copied.and_then(|()| buffer.copied.record());
        marked.map_err(|error| error.of(format!("weight `{}`", source.name)))?;
        self.copying.push_back(buffer);
        arrived(&source.name, piece.file_bytes(&source) as u64);
        Ok(())
    }
}

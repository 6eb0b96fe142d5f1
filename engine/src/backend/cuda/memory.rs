//! Device memory that is handed out again and again: activations, scratch, what a call uploads.
//!
//! One stream orders all use, so a buffer that is given back is free at once. Sizes are rounded up to few classes, hence a
//! step that is like the last one finds the same buffers. Invariant: the pool gives nothing back to the driver, because recorded
//! graphs hold its addresses.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{DeviceMemory, DevicePtr, Gpu};
use super::error::CudaError;

/// Smallest class.
const CLASS_BYTES_MIN: usize = 512;
/// Classes between a power of two and the next: an eighth of a buffer is wasted at most.
const CLASSES_PER_DOUBLING: usize = 8;

/// Idle buffers, by class.
pub(super) struct Pool {
    gpu: Arc<Gpu>,
    idle: Mutex<HashMap<usize, Vec<DeviceMemory>>>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pool")
    }
}

impl Pool {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Arc<Self> {
        Arc::new(Self {
            gpu: Arc::clone(gpu),
            idle: Mutex::default(),
        })
    }

    /// A buffer of at least so many bytes; its content is unspecified.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Buffer, CudaError> {
        let class = class_bytes(bytes);
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = idle.get_mut(&class).and_then(Vec::pop);
        drop(idle);
        let memory = match memory {
            Some(memory) => memory,
            None => DeviceMemory::new(&self.gpu, class)?,
        };
        Ok(Buffer {
            memory: Some(memory),
            pool: Arc::clone(self),
        })
    }
}

fn class_bytes(bytes: usize) -> usize {
    let bytes = bytes.max(CLASS_BYTES_MIN);
    bytes.next_multiple_of(bytes.next_power_of_two() / 2 / CLASSES_PER_DOUBLING)
}

/// Memory of the pool, until it is dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    /// `None` only while it is dropped.
    memory: Option<DeviceMemory>,
    pool: Arc<Pool>,
}

impl Buffer {
    pub(super) const fn memory(&self) -> &DeviceMemory {
        self.memory
            .as_ref()
            .expect("a buffer that is used is not dropped")
    }

    pub(super) const fn address(&self) -> DevicePtr {
        self.memory().address()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            let mut idle = self
                .pool
                .idle
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            idle.entry(memory.bytes()).or_default().push(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_waste_little_and_are_few() {
        for bytes in [
            0,
            1,
            511,
            512,
            513,
            1000,
            4097,
            1 << 20,
            (1 << 20) + 1,
            3 << 29,
        ] {
            let class = class_bytes(bytes);
            assert!(class >= bytes && class >= CLASS_BYTES_MIN);
            assert!(
                class <= (bytes + bytes / 7).max(CLASS_BYTES_MIN + 64),
                "{bytes}: {class}"
            );
            assert_eq!(class_bytes(class), class);
            assert_eq!(class % 16, 0);
        }
        let classes: std::collections::HashSet<_> = (1 << 20..2 << 20).map(class_bytes).collect();
        assert!(classes.len() <= CLASSES_PER_DOUBLING + 1);
    }
}

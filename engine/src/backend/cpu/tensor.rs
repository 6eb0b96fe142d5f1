//! Activations in host memory, and the buffers they leave behind for the next step.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of idle buffers that are kept, at most.
const IDLE_BYTES_MAX: usize = 64 << 20;
/// Idle buffers that are kept, at most.
const IDLE_COUNT_MAX: usize = 64;

/// Activations `[rows, cols]`, row-major, in host memory.
pub struct CpuTensor {
    rows: usize,
    cols: usize,
    /// At least `rows * cols` long.
    buffer: Vec<f32>,
    origin: Arc<Buffers>,
}

impl CpuTensor {
    /// Number of rows.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// All elements.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.buffer[..self.rows * self.cols]
    }

    /// All elements, writable.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.rows * self.cols]
    }
}

impl fmt::Debug for CpuTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuTensor[{}, {}]", self.rows, self.cols)
    }
}

impl Drop for CpuTensor {
    fn drop(&mut self) {
        self.origin.put(std::mem::take(&mut self.buffer));
    }
}

/// Idle buffers of dropped tensors.
#[derive(Default)]
pub(super) struct Buffers {
    idle: Mutex<Vec<Vec<f32>>>,
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Buffers")
    }
}

impl Buffers {
    /// A tensor whose content is unspecified.
    pub(super) fn tensor(self: &Arc<Self>, rows: usize, cols: usize) -> CpuTensor {
        CpuTensor {
            rows,
            cols,
            buffer: self.take(rows * cols),
            origin: Arc::clone(self),
        }
    }

    /// The smallest idle buffer that is long enough, unless it would waste more than it holds.
    fn take(&self, len: usize) -> Vec<f32> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = (0..idle.len())
            .filter(|&index| (len..=2 * len).contains(&idle[index].len()))
            .min_by_key(|&index| idle[index].len());
        fitting.map_or_else(|| vec![0.0; len], |index| idle.swap_remove(index))
    }

    fn put(&self, buffer: Vec<f32>) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let idle_bytes: usize = idle.iter().map(|buffer| buffer.len() * 4).sum();
        if idle.len() < IDLE_COUNT_MAX && idle_bytes + buffer.len() * 4 <= IDLE_BYTES_MAX {
            idle.push(buffer);
        }
    }
}

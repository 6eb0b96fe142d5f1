//! Activations on the device.

use std::fmt;
use std::sync::Arc;

use super::driver::DevicePtr;
use super::memory::Buffer;

/// Activations `[rows, cols]` on the device, row-major, rows `ld` elements apart: several may lie side by side in one
/// buffer. Elements are of the backend's activations' type, or f32 where the tensor is wide.
pub struct CudaTensor {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) ld: usize,
    pub(super) wide: bool,
    /// Elements before the first.
    pub(super) offset: usize,
    /// `None` when there was no memory for it: then the backend has failed and uses no tensor any more.
    pub(super) buffer: Option<Arc<Buffer>>,
    /// Where norms and `silu_mul` write instead, and products read, while the tensor is dedicated to weights in 8 bits.
    pub(super) rounded: Option<Arc<Rounded>>,
}

/// Activations in 8 bits.
#[derive(Debug)]
pub(super) struct Rounded {
    /// `[rows, cols]` e4m3, dense.
    pub(super) values: Buffer,
    /// `[rows]` f32: what a row's values are multiples of.
    pub(super) scales: Buffer,
}

impl CudaTensor {
    /// Address of the first element.
    pub(super) fn address(&self) -> DevicePtr {
        let buffer = self.buffer.as_ref();
        let base = buffer.map_or(0, |buffer| buffer.address());
        base + (self.offset * self.element_bytes()) as u64
    }

    pub(super) const fn element_bytes(&self) -> usize {
        if self.wide { 4 } else { 2 }
    }

    /// The same elements once more.
    pub(super) fn again(&self) -> Self {
        Self {
            buffer: self.buffer.clone(),
            rounded: self.rounded.clone(),
            ..*self
        }
    }

    /// Whether the other's first column follows this one's last in the same rows.
    pub(super) fn is_left_of(&self, other: &Self) -> bool {
        let same = match (&self.buffer, &other.buffer) {
            (Some(own), Some(others)) => Arc::ptr_eq(own, others),
            _ => false,
        };
        same && self.wide == other.wide
            && (self.rows, self.ld) == (other.rows, other.ld)
            && self.offset + self.cols == other.offset
    }
}

impl fmt::Debug for CudaTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaTensor[{}, {}]", self.rows, self.cols)
    }
}

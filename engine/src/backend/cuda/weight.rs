//! Weights on the device, in bf16 whatever the file has.
//!
//! Matrices lie one after the other in the order in which they are loaded, and so do vectors in a place of their own. Hence
//! those that a step multiplies with the same activations are one matrix, and one product. Decoding uses the CPU backend's
//! decoders, on all cores.

use std::fmt;
use std::num::NonZero;
use std::sync::Arc;
use std::thread;

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::driver::{DeviceMemory, DevicePtr, Gpu};
use super::error::CudaError;
use crate::backend::cpu::CpuWeight;
use crate::backend::{BackendError, WeightBytes, WeightDtype, WeightSource};

/// What cuBLASLt's fastest kernels like, in bytes.
const ALIGNMENT: usize = 256;
/// Elements that are decoded and uploaded at a time.
const CHUNK_ELEMENTS: usize = 16 << 20;
/// Memory set aside for vectors: norms and biases.
const VECTOR_BYTES: usize = 16 << 20;

/// A weight `[rows, cols]` in bf16, dense.
pub struct CudaWeight {
    pub(super) rows: usize,
    pub(super) cols: usize,
    offset: usize,
    memory: Arc<DeviceMemory>,
}

impl CudaWeight {
    pub(super) fn address(&self) -> DevicePtr {
        self.memory.address() + self.offset as u64
    }

    const fn bytes(&self) -> usize {
        self.rows * self.cols * 2
    }

    /// Whether the other begins where this one ends.
    pub(super) fn is_before(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.memory, &other.memory) && self.offset + self.bytes() == other.offset
    }
}

impl fmt::Debug for CudaWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaWeight[{}, {}]", self.rows, self.cols)
    }
}

/// Memory that weights are put into one after the other.
#[derive(Debug)]
struct Slab {
    memory: Arc<DeviceMemory>,
    used: usize,
}

impl Slab {
    fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, CudaError> {
        Ok(Self {
            memory: Arc::new(DeviceMemory::new(gpu, bytes)?),
            used: 0,
        })
    }
}

/// Where weights are put.
#[derive(Debug, Default)]
pub(super) struct WeightStore {
    matrices: Option<Slab>,
    vectors: Option<Slab>,
}

impl WeightStore {
    /// Sets memory aside for matrices of so many elements in all.
    pub(super) fn expect(&mut self, gpu: &Arc<Gpu>, elements: usize) -> Result<(), CudaError> {
        // Each may leave a gap behind it.
        let bytes = elements.saturating_mul(2).saturating_add(1 << 20);
        self.matrices = Some(Slab::new(gpu, bytes)?);
        self.vectors = Some(Slab::new(gpu, VECTOR_BYTES)?);
        Ok(())
    }

    /// Room for a weight of this shape: in its slab, or by itself.
    pub(super) fn place(
        &mut self,
        gpu: &Arc<Gpu>,
        rows: usize,
        cols: usize,
    ) -> Result<CudaWeight, CudaError> {
        let slab = if rows == 1 {
            &mut self.vectors
        } else {
            &mut self.matrices
        };
        let bytes = rows * cols * 2;
        if let Some(slab) = slab {
            let offset = slab.used.next_multiple_of(ALIGNMENT);
            if offset + bytes <= slab.memory.bytes() {
                slab.used = offset + bytes;
                return Ok(CudaWeight {
                    rows,
                    cols,
                    offset,
                    memory: Arc::clone(&slab.memory),
                });
            }
        }
        Ok(CudaWeight {
            rows,
            cols,
            offset: 0,
            memory: Arc::new(DeviceMemory::new(gpu, bytes)?),
        })
    }

    /// Takes a weight over.
    pub(super) fn load(
        &mut self,
        gpu: &Arc<Gpu>,
        source: WeightSource,
    ) -> Result<CudaWeight, BackendError> {
        let (name, dtype, bytes) = (source.name.clone(), source.dtype, source.bytes.clone());
        let checked = CpuWeight::decodable(source)?;
        let (rows, cols) = checked.shape();
        let failed = |error: CudaError| error.of(format!("weight `{name}`"));
        let weight = self.place(gpu, rows, cols).map_err(failed)?;
        if dtype == WeightDtype::Bf16 {
            upload_as_is(gpu, &weight, &bytes).map_err(failed)?;
        } else {
            upload_decoded(gpu, &weight, &checked).map_err(failed)?;
        }
        Ok(weight)
    }
}

fn upload_as_is(gpu: &Gpu, weight: &CudaWeight, bytes: &WeightBytes) -> Result<(), CudaError> {
    gpu.upload(&weight.memory, weight.offset, bytes.as_slice())
}

fn upload_decoded(gpu: &Gpu, weight: &CudaWeight, stored: &CpuWeight) -> Result<(), CudaError> {
    if weight.cols == 0 {
        return Ok(());
    }
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let rows_at_once = (CHUNK_ELEMENTS / weight.cols).clamp(1, weight.rows.max(1));
    let mut chunk = vec![bf16::ZERO; rows_at_once * weight.cols];
    for first in (0..weight.rows).step_by(rows_at_once) {
        let count = rows_at_once.min(weight.rows - first);
        let part = &mut chunk[..count * weight.cols];
        let rows_each = count.div_ceil(threads);
        thread::scope(|scope| {
            for (index, part) in part.chunks_mut(rows_each * weight.cols).enumerate() {
                let mut decode =
                    move || decode(stored, first + index * rows_each, part, weight.cols);
                if rows_each == count {
                    decode();
                } else {
                    scope.spawn(decode);
                }
            }
        });
        let bytes = bytemuck::cast_slice(part);
        gpu.upload(
            &weight.memory,
            weight.offset + first * weight.cols * 2,
            bytes,
        )?;
    }
    Ok(())
}

/// Decodes rows from `first` on, rounding to nearest even.
fn decode(stored: &CpuWeight, first: usize, out: &mut [bf16], cols: usize) {
    let mut row = Vec::new();
    for (index, out) in out.chunks_exact_mut(cols).enumerate() {
        stored.row_values(first + index, &mut row);
        out.convert_from_f32_slice(&row[..cols]);
    }
}

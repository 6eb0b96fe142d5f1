//! Weights on the device: in the type of activations whatever the file has, but for matrices in 8 bits on a device that multiplies such.
//!
//! Matrices lie one after the other in the order in which they are loaded, and so do vectors in a place of their own. Hence
//! those that a step multiplies with the same activations are one matrix, and one product. Decoding uses the CPU backend's
//! decoders, on all cores.

use std::fmt;
use std::num::NonZero;
use std::sync::Arc;
use std::thread;

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::driver::{DeviceMemory, DevicePtr, Gpu};
use super::error::CudaError;
use super::loading::{BUFFER_BYTES, Loading, Target};
use super::reading::{Form, pieces};
use crate::backend::cpu::CpuWeight;
use crate::backend::{
    ActivationDtype, Arrived, BackendError, FileSource, PatternSource, WeightBytes, WeightDtype,
    WeightSource, e4m3,
};

/// What cuBLASLt's fastest kernels like, in bytes.
const ALIGNMENT: usize = 256;
/// Elements that are decoded and uploaded at a time.
const CHUNK_ELEMENTS: usize = 16 << 20;
/// Memory set aside for vectors: norms, biases, and scales of rows.
const VECTOR_BYTES: usize = 32 << 20;
/// What scales of the rows of one matrix and the next are aligned to, in bytes: no more, so that they may be one list.
const SCALE_ALIGNMENT: usize = 16;

/// A weight `[rows, cols]`, dense: in 16 bits, or in e4m3 with a scale a row.
pub struct CudaWeight {
    pub(super) rows: usize,
    pub(super) cols: usize,
    place: Range,
    /// `[rows]` f32, of a weight in 8 bits.
    scales: Option<Range>,
}

/// Bytes of an allocation.
#[derive(Debug, Clone)]
struct Range {
    memory: Arc<DeviceMemory>,
    offset: usize,
    bytes: usize,
}

impl Range {
    fn address(&self) -> DevicePtr {
        self.memory.address() + self.offset as u64
    }

    fn is_before(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.memory, &other.memory) && self.offset + self.bytes == other.offset
    }
}

impl CudaWeight {
    pub(super) fn address(&self) -> DevicePtr {
        self.place.address()
    }

    /// Where the scales of its rows are, if it is in 8 bits.
    pub(super) fn scales(&self) -> Option<DevicePtr> {
        self.scales.as_ref().map(Range::address)
    }

    /// Whether the other begins where this one ends, scales included.
    pub(super) fn is_before(&self, other: &Self) -> bool {
        let scales = match (&self.scales, &other.scales) {
            (None, None) => true,
            (Some(own), Some(others)) => own.is_before(others),
            _ => false,
        };
        scales && self.place.is_before(&other.place)
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

    fn take(&mut self, bytes: usize, alignment: usize) -> Option<Range> {
        let offset = self.used.next_multiple_of(alignment);
        if offset + bytes > self.memory.bytes() {
            return None;
        }
        self.used = offset + bytes;
        Some(Range {
            memory: Arc::clone(&self.memory),
            offset,
            bytes,
        })
    }
}

/// Where weights are put.
#[derive(Debug)]
pub(super) struct WeightStore {
    activations: ActivationDtype,
    matrices: Option<Slab>,
    vectors: Option<Slab>,
    scales: Option<Slab>,
    /// What is being read from files.
    loading: Option<Loading>,
}

impl WeightStore {
    /// For weights in the type of activations, where they are not in 8 bits.
    pub(super) const fn new(activations: ActivationDtype) -> Self {
        Self {
            activations,
            matrices: None,
            vectors: None,
            scales: None,
            loading: None,
        }
    }

    /// Sets memory aside for matrices of so many elements in all.
    pub(super) fn expect(&mut self, gpu: &Arc<Gpu>, elements: usize) -> Result<(), CudaError> {
        // Each may leave a gap behind it.
        let bytes = elements.saturating_mul(2).saturating_add(1 << 20);
        self.matrices = Some(Slab::new(gpu, bytes)?);
        self.vectors = Some(Slab::new(gpu, VECTOR_BYTES)?);
        self.scales = Some(Slab::new(gpu, VECTOR_BYTES)?);
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
        Ok(CudaWeight {
            rows,
            cols,
            place: room(gpu, slab.as_mut(), (rows * cols * 2, ALIGNMENT))?,
            scales: None,
        })
    }

    /// Room for one in 8 bits, and its scales, which are put there: one for all rows, or one for each.
    pub(super) fn place_8_bit(
        &mut self,
        gpu: &Arc<Gpu>,
        (rows, cols): (usize, usize),
        scales: &[f32],
    ) -> Result<CudaWeight, CudaError> {
        let place = room(gpu, self.matrices.as_mut(), (rows * cols, ALIGNMENT))?;
        let row_scales = room(gpu, self.scales.as_mut(), (rows * 4, SCALE_ALIGNMENT))?;
        let each: Vec<f32> = match scales {
            [scale] => vec![*scale; rows],
            scales => scales.to_vec(),
        };
        assert_eq!(each.len(), rows, "a scale a row");
        let bytes = bytemuck::cast_slice(&each);
        gpu.upload(&row_scales.memory, row_scales.offset, bytes)?;
        Ok(CudaWeight {
            rows,
            cols,
            place,
            scales: Some(row_scales),
        })
    }

    /// Takes a weight over.
    pub(super) fn load(
        &mut self,
        gpu: &Arc<Gpu>,
        source: WeightSource,
    ) -> Result<CudaWeight, BackendError> {
        let (name, dtype, bytes) = (source.name.clone(), source.dtype, source.bytes.clone());
        if dtype == WeightDtype::F8E4m3 && is_in_8_bits(gpu, (source.rows, source.cols)) {
            return self.load_8_bit(gpu, &source);
        }
        let checked = CpuWeight::decodable(source)?;
        let (rows, cols) = checked.shape();
        let failed = |error: CudaError| error.of(format!("weight `{name}`"));
        let weight = self.place(gpu, rows, cols).map_err(failed)?;
        let made = match (self.activations, dtype) {
            (ActivationDtype::Bf16, WeightDtype::Bf16)
            | (ActivationDtype::F16, WeightDtype::F16) => upload_as_is(gpu, &weight, &bytes),
            (ActivationDtype::F16, _) => upload_decoded::<f16>(gpu, &weight, &checked),
            _ => upload_decoded::<bf16>(gpu, &weight, &checked),
        };
        made.map_err(failed)?;
        Ok(weight)
    }

    /// Begins to take over a weight that is still in its file, unless its rows are too long for that.
    pub(super) fn read(
        &mut self,
        gpu: &Arc<Gpu>,
        source: &Arc<FileSource>,
        arrived: Arrived<'_>,
    ) -> Result<Option<CudaWeight>, BackendError> {
        let (shape, dtype) = ((source.rows, source.cols), source.dtype);
        let narrow = dtype == WeightDtype::F8E4m3 && is_in_8_bits(gpu, shape);
        let form = match (self.activations, dtype) {
            _ if narrow => Form::AsIs,
            (ActivationDtype::Bf16, WeightDtype::Bf16)
            | (ActivationDtype::F16, WeightDtype::F16) => Form::AsIs,
            (ActivationDtype::F16, _) => Form::F16,
            _ => Form::Bf16,
        };
        if pieces(source, form, BUFFER_BYTES).is_none() {
            return Ok(None);
        }
        let (block_len, block_bytes) = dtype.block();
        let bytes = source.cols / block_len * block_bytes * source.rows;
        let scales = source.scales.as_deref().unwrap_or(&[]);
        if bytes != source.runs.bytes() || (narrow && !are_scales(scales, source.rows)) {
            return Err(misfit(&source.name, shape, (source.runs.bytes(), scales)));
        }
        let placed = if narrow {
            self.place_8_bit(gpu, shape, scales)
        } else {
            self.place(gpu, source.rows, source.cols)
        };
        let weight = placed.map_err(|error| error.of(format!("weight `{}`", source.name)))?;
        let target = Target {
            memory: Arc::clone(&weight.place.memory),
            offset: weight.place.offset,
        };
        let loading = match &mut self.loading {
            Some(loading) => loading,
            none => none.insert(Loading::new(gpu)?),
        };
        loading.load(source, form, &target, arrived)?;
        Ok(Some(weight))
    }

    /// Waits until all that is being read is on the device.
    pub(super) fn end_reading(&mut self, arrived: Arrived<'_>) -> Result<(), BackendError> {
        self.loading
            .take()
            .map_or(Ok(()), |loading| loading.end(arrived))
    }

    fn load_8_bit(
        &mut self,
        gpu: &Arc<Gpu>,
        source: &WeightSource,
    ) -> Result<CudaWeight, BackendError> {
        let scales = source.scales.as_deref().unwrap_or(&[]);
        let shape = (source.rows, source.cols);
        let fits = source.rows.checked_mul(source.cols) == Some(source.bytes.len());
        if !fits || !are_scales(scales, source.rows) {
            return Err(misfit(&source.name, shape, (source.bytes.len(), scales)));
        }
        let made = self.place_8_bit(gpu, shape, scales).and_then(|weight| {
            upload_as_is(gpu, &weight, &source.bytes)?;
            Ok(weight)
        });
        made.map_err(|error| error.of(format!("weight `{}`", source.name)))
    }
}

/// Whether a matrix in 8 bits stays so: kernels take its rows 16 bytes at a time, and the library's products of this kind
/// with a scale a row are for Hopper. Elsewhere it is kept in 16.
pub(super) fn takes_8_bits(gpu: &Gpu, cols: usize) -> bool {
    gpu.capability == (9, 0) && cols.is_multiple_of(16)
}

fn is_in_8_bits(gpu: &Gpu, (rows, cols): (usize, usize)) -> bool {
    rows > 1 && takes_8_bits(gpu, cols)
}

/// One for all rows, or one for each.
fn are_scales(scales: &[f32], rows: usize) -> bool {
    scales.len() == 1 || scales.len() == rows
}

fn misfit(name: &str, shape: (usize, usize), (bytes, scales): (usize, &[f32])) -> BackendError {
    BackendError::Weight {
        name: name.to_owned(),
        reason: format!("{shape:?} has {bytes} bytes and {} scales", scales.len()),
    }
}

/// What a weight repeats, as the device keeps it: first as a file would hold it, then in 8 bits, or in the type of activations.
pub(super) fn repeated(
    source: &PatternSource,
    activations: ActivationDtype,
    in_8_bits: bool,
) -> Vec<u8> {
    let values = source.values.iter();
    if in_8_bits {
        return values
            .map(|&value| e4m3::encode(value / source.scale))
            .collect();
    }
    let held = values.map(|&value| match source.dtype {
        WeightDtype::F16 => f16::from_f32(value).to_f32(),
        WeightDtype::Bf16 => bf16::from_f32(value).to_f32(),
        _ => value,
    });
    let bits = held.map(|value| match activations {
        ActivationDtype::F16 => f16::from_f32(value).to_bits(),
        _ => bf16::from_f32(value).to_bits(),
    });
    bits.flat_map(u16::to_ne_bytes).collect()
}

fn room(
    gpu: &Arc<Gpu>,
    slab: Option<&mut Slab>,
    (bytes, alignment): (usize, usize),
) -> Result<Range, CudaError> {
    if let Some(range) = slab.and_then(|slab| slab.take(bytes, alignment)) {
        return Ok(range);
    }
    Ok(Range {
        memory: Arc::new(DeviceMemory::new(gpu, bytes)?),
        offset: 0,
        bytes,
    })
}

fn upload_as_is(gpu: &Gpu, weight: &CudaWeight, bytes: &WeightBytes) -> Result<(), CudaError> {
    gpu.upload(&weight.place.memory, weight.place.offset, bytes.as_slice())
}

fn upload_decoded<H: Pod + Send>(
    gpu: &Gpu,
    weight: &CudaWeight,
    stored: &CpuWeight,
) -> Result<(), CudaError>
where
    [H]: HalfFloatSliceExt,
{
    if weight.cols == 0 {
        return Ok(());
    }
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let rows_at_once = (CHUNK_ELEMENTS / weight.cols).clamp(1, weight.rows.max(1));
    let mut chunk = vec![H::zeroed(); rows_at_once * weight.cols];
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
            &weight.place.memory,
            weight.place.offset + first * weight.cols * 2,
            bytes,
        )?;
    }
    Ok(())
}

/// Decodes rows from `first` on, rounding to nearest even.
fn decode<H>(stored: &CpuWeight, first: usize, out: &mut [H], cols: usize)
where
    [H]: HalfFloatSliceExt,
{
    let mut row = Vec::new();
    for (index, out) in out.chunks_exact_mut(cols).enumerate() {
        stored.row_values(first + index, &mut row);
        out.convert_from_f32_slice(&row[..cols]);
    }
}

//! Cuts a shard's part out of a tensor as the file holds it.
//!
//! Rows stay where the file is mapped. Columns are copied, a run a row, as long as the cut goes between the blocks of
//! the stored format; within a block it cannot, so then the rows' blocks around the cut are decoded to `f32`.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Device;
use candle_core::quantized::ggml_file::qtensor_from_ggml;

use crate::backend::{FileRuns, WeightBytes, WeightDtype};
use crate::model::checkpoint::RawTensor;
use crate::model::error::ModelErrorKind;
use crate::model::weights::{Cut, Slot, SlotShape};

const F32_BYTES: usize = size_of::<f32>();

/// Bytes of a slot's part, where the whole tensor is stored as `dtype`.
pub(crate) fn bytes(slot: &Slot, dtype: WeightDtype) -> usize {
    let shape = slot.cut_shape();
    let (block_len, block_bytes) = dtype.block();
    let elements = shape.rows() * shape.cols();
    match run(slot) {
        Some(columns) if !is_between_blocks(&columns, dtype) => elements * F32_BYTES,
        _ => elements / block_len * block_bytes,
    }
}

/// A slot's part of its tensor, whose dimensions are those of the slot.
pub(crate) fn cut(name: &str, slot: &Slot, tensor: RawTensor) -> Result<RawTensor, ModelErrorKind> {
    let (block_len, block_bytes) = tensor.dtype.block();
    let row_bytes = slot.shape.cols() / block_len * block_bytes;
    let dims = slot.cut_shape().dims();
    let Some(columns) = run(slot) else {
        let Cut::Rows(rows) = &slot.cut else {
            return Ok(tensor);
        };
        return Ok(RawTensor {
            dims,
            bytes: narrowed(tensor.bytes, rows.start * row_bytes..rows.end * row_bytes),
            place: None,
            scales: scales(slot, tensor.scales),
            ..tensor
        });
    };
    let covering = columns.start / block_len..columns.end.div_ceil(block_len);
    let mut taken = Vec::with_capacity(slot.shape.rows() * covering.len() * block_bytes);
    for row in tensor.bytes.as_slice().chunks_exact(row_bytes) {
        taken.extend_from_slice(&row[covering.start * block_bytes..covering.end * block_bytes]);
    }
    if is_between_blocks(&columns, tensor.dtype) {
        return Ok(RawTensor {
            dims,
            dtype: tensor.dtype,
            bytes: WeightBytes::Owned(taken.into()),
            place: None,
            scales: tensor.scales,
        });
    }
    tracing::debug!(
        tensor = name,
        dtype = ?tensor.dtype,
        first_column = columns.start,
        columns = columns.len(),
        "the cut is within a block, so this rank's part is kept as f32"
    );
    let offset = columns.start - covering.start * block_len;
    let covered = [slot.shape.rows(), covering.len() * block_len];
    let values = decoded(name, tensor.dtype, &taken, covered)?;
    let kept = values
        .chunks_exact(covered[1])
        .flat_map(|row| &row[offset..offset + columns.len()])
        .flat_map(|value| value.to_le_bytes());
    Ok(RawTensor {
        dims,
        dtype: WeightDtype::F32,
        bytes: WeightBytes::Owned(kept.collect()),
        place: None,
        scales: None,
    })
}

/// The scales of a slot's part, where its tensor's are `whole`: one for all rows, or one for each.
pub(crate) fn scales(slot: &Slot, whole: Option<Arc<[f32]>>) -> Option<Arc<[f32]>> {
    match (&slot.cut, whole) {
        (Cut::Rows(rows), Some(each)) if each.len() != 1 => Some(each[rows.clone()].into()),
        (_, whole) => whole,
    }
}

/// Where a slot's part of a tensor lies in its file, a run a row; `None` where it does not lie there as it is kept.
pub(crate) fn in_file(slot: &Slot, tensor: &RawTensor) -> Option<FileRuns> {
    let place = tensor.place.as_ref()?;
    let (block_len, block_bytes) = tensor.dtype.block();
    let bytes_of = |elements: usize| elements / block_len * block_bytes;
    let (all_rows, all_columns) = (0..slot.shape.rows(), 0..slot.shape.cols());
    let (rows, columns) = match (run(slot), &slot.cut) {
        (Some(columns), _) if is_between_blocks(&columns, tensor.dtype) => (all_rows, columns),
        (Some(_), _) => return None,
        (None, Cut::Rows(rows)) => (rows.clone(), all_columns),
        (None, Cut::Whole | Cut::Cols(_)) => (all_rows, all_columns),
    };
    let stride_bytes = bytes_of(slot.shape.cols());
    let first = rows.start * stride_bytes + bytes_of(columns.start);
    Some(FileRuns {
        file: Arc::clone(&place.file),
        offset: place.offset + first as u64,
        run_bytes: bytes_of(columns.len()),
        stride_bytes,
        count: rows.len(),
    })
}

/// The columns of each row, or the elements of a vector, that are needed; `None` where whole rows are.
fn run(slot: &Slot) -> Option<Range<usize>> {
    match (slot.shape, &slot.cut) {
        (_, Cut::Cols(range)) | (SlotShape::Vector(_), Cut::Rows(range)) => Some(range.clone()),
        (_, Cut::Whole) | (SlotShape::Matrix { .. }, Cut::Rows(_)) => None,
    }
}

fn is_between_blocks(columns: &Range<usize>, dtype: WeightDtype) -> bool {
    let (block_len, _) = dtype.block();
    columns.start.is_multiple_of(block_len) && columns.end.is_multiple_of(block_len)
}

fn narrowed(bytes: WeightBytes, part: Range<usize>) -> WeightBytes {
    match bytes {
        WeightBytes::Shared { buffer, range } => WeightBytes::Shared {
            buffer,
            range: range.start + part.start..range.start + part.end,
        },
        WeightBytes::Owned(bytes) => WeightBytes::Owned(bytes[part].into()),
    }
}

/// The values of a stored matrix; the CPU backend decodes to the same.
fn decoded(
    name: &str,
    dtype: WeightDtype,
    bytes: &[u8],
    shape: [usize; 2],
) -> Result<Vec<f32>, ModelErrorKind> {
    let stored = dtype.ggml().ok_or_else(|| ModelErrorKind::Dtype {
        tensor: name.to_owned(),
        dtype: format!("{dtype:?}"),
        served: &["GGML's own"],
    })?;
    qtensor_from_ggml(stored, bytes, shape.to_vec(), &Device::Cpu)
        .and_then(|stored| stored.dequantize(&Device::Cpu))
        .and_then(|values| values.flatten_all()?.to_vec1())
        .map_err(|error| ModelErrorKind::Header {
            format: "GGUF",
            reason: format!("tensor `{name}` cannot be decoded: {error}"),
        })
}

#[cfg(test)]
mod tests;

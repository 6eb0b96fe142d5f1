//! A weight on the CPU: the bytes as the file holds them, decoded row by row when they are used. Those of 8-bit floats with
//! their scales are decoded when they are loaded: here they are a specification, not a saving.

use super::quant::{DecodeRow, PART};
use super::simd::Isa;
use crate::backend::{BackendError, WeightBytes, WeightDtype, WeightSource, e4m3};

/// A weight `[rows, cols]` as the file holds it. Vectors (one row) are also kept as `f32`.
#[derive(Debug)]
pub struct CpuWeight {
    name: String,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) dtype: WeightDtype,
    bytes: WeightBytes,
    row_bytes: usize,
    vector: Option<Box<[f32]>>,
}

impl CpuWeight {
    /// Checks that the bytes are exactly `rows × cols` elements.
    pub(super) fn new(source: WeightSource, isa: Isa) -> Result<Self, BackendError> {
        let source = if source.dtype == WeightDtype::F8E4m3 {
            of_8_bits(source)?
        } else {
            source
        };
        let refuse = |reason: String| BackendError::Weight {
            name: source.name.clone(),
            reason,
        };
        let (rows, cols) = (source.rows, source.cols);
        let (block_weights, block_bytes) = source.dtype.block();
        if cols % block_weights != 0 {
            return Err(refuse(format!(
                "{cols} columns are not a multiple of the {block_weights} weights of a {:?} block",
                source.dtype
            )));
        }
        let row_bytes = (cols / block_weights).checked_mul(block_bytes);
        let expected = row_bytes.and_then(|bytes| bytes.checked_mul(rows));
        let (Some(row_bytes), Some(expected)) = (row_bytes, expected) else {
            return Err(refuse(format!("[{rows}, {cols}] is too large")));
        };
        if let WeightBytes::Shared { buffer, range } = &source.bytes {
            let len = (**buffer).as_ref().len();
            if range.start > range.end || range.end > len {
                return Err(refuse(format!(
                    "bytes {}..{} are outside the {len} bytes of the file",
                    range.start, range.end
                )));
            }
        }
        let found = source.bytes.as_slice().len();
        if found != expected {
            return Err(refuse(format!(
                "[{rows}, {cols}] of {:?} takes {expected} bytes, but {found} are there",
                source.dtype
            )));
        }
        let mut weight = Self {
            name: source.name,
            rows,
            cols,
            dtype: source.dtype,
            bytes: source.bytes,
            row_bytes,
            vector: None,
        };
        if rows == 1 {
            let mut values = vec![0.0; cols.next_multiple_of(PART)];
            weight.decode_row(isa, 0, &mut values);
            values.truncate(cols);
            weight.vector = Some(values.into_boxed_slice());
        }
        Ok(weight)
    }

    /// A weight for a backend that takes its values over in another form; checked as [`Self::new`].
    pub(in crate::backend) fn decodable(source: WeightSource) -> Result<Self, BackendError> {
        Self::new(source, Isa::detected()[0])
    }

    /// Rows and columns.
    pub(in crate::backend) const fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Writes one row's values to `out`, which becomes at least `cols` long.
    pub(in crate::backend) fn row_values(&self, index: usize, out: &mut Vec<f32>) {
        out.resize(self.cols.next_multiple_of(PART), 0.0);
        self.decode_row(Isa::detected()[0], index, out);
    }

    /// Bytes of a row.
    pub(super) const fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// The bytes of `count` rows from `first` on.
    #[inline]
    pub(super) fn rows_from(&self, first: usize, count: usize) -> &[u8] {
        &self.bytes.as_slice()[first * self.row_bytes..][..count * self.row_bytes]
    }

    /// Writes one row to `out`, of `cols` rounded up to [`PART`] elements.
    pub(super) fn decode_row(&self, isa: Isa, index: usize, out: &mut [f32]) {
        isa.run(DecodeRow {
            dtype: self.dtype,
            row: self.rows_from(index, 1),
            out,
        });
    }

    /// A norm's or bias's values. Panics when the weight is a matrix: that is a bug of the model.
    pub(super) fn vector(&self) -> &[f32] {
        assert_eq!(self.rows, 1, "`{}` is used as a vector", self.name);
        self.vector.as_deref().unwrap_or_default()
    }
}

/// The same weight in `f32`.
fn of_8_bits(source: WeightSource) -> Result<WeightSource, BackendError> {
    let (rows, bytes) = (source.rows, source.bytes.as_slice());
    let scales = source.scales.as_deref().unwrap_or(&[]);
    let fits = rows.checked_mul(source.cols) == Some(bytes.len());
    if !fits || (scales.len() != 1 && scales.len() != rows) {
        return Err(BackendError::Weight {
            name: source.name.clone(),
            reason: format!(
                "[{rows}, {}] in 8 bits has {} bytes and {} scales",
                source.cols,
                bytes.len(),
                scales.len()
            ),
        });
    }
    let values = e4m3::decode_rows(bytes, rows, scales);
    let bytes: &[u8] = bytemuck::cast_slice(&values);
    Ok(WeightSource {
        dtype: WeightDtype::F32,
        bytes: WeightBytes::Owned(bytes.into()),
        scales: None,
        ..source
    })
}

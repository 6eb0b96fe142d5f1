//! The slow and obvious backend: plain loops over `f32` values, sums in `f64`, weights dequantised when loaded.
//!
//! It exists so that the model is tested without a fast backend, and a fast backend against something that can
//! be read in one sitting. No SIMD, no blocking, no reuse of buffers.

use std::sync::Arc;

use candle_core::Device;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use half::{bf16, f16};

use crate::backend::e4m3;
use crate::backend::{
    ActivationDtype, AttentionSpec, Backend, BackendCapability, BackendError, BlockId, PrefillRows,
    RopePairing, RopeTable, SequenceSpan, StepBatch, TokenId, WeightSource,
};
use crate::page::{KvDtype, Page, PageShape};

/// Row-major values; both a weight and a tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..(row + 1) * self.cols]
    }

    fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.values[row * self.cols..(row + 1) * self.cols]
    }
}

/// See the top of this file.
#[derive(Debug, Default)]
pub(crate) struct ReferenceBackend {
    pages: Vec<Option<Arc<Page>>>,
}

impl ReferenceBackend {
    fn page(&self, block: BlockId) -> &Arc<Page> {
        self.pages[block as usize]
            .as_ref()
            .expect("the page is not lent")
    }
}

/// A weight's values as `f32`.
fn dequantize(source: &WeightSource) -> Result<Vec<f32>, String> {
    let dtype = source.dtype.ggml().expect("GGML has it");
    let elements = source.rows * source.cols;
    let bytes = elements / dtype.block_size() * dtype.type_size();
    if source.bytes.as_slice().len() != bytes {
        return Err(format!(
            "{} bytes, not {bytes}",
            source.bytes.as_slice().len()
        ));
    }
    let shape = vec![source.rows, source.cols];
    qtensor_from_ggml(dtype, source.bytes.as_slice(), shape, &Device::Cpu)
        .and_then(|quantized| quantized.dequantize(&Device::Cpu))
        .and_then(|tensor| tensor.flatten_all()?.to_vec1())
        .map_err(|error| error.to_string())
}

fn normalize(row: &mut [f32], weight: &[f32], epsilon: f32) {
    let squares: f64 = row
        .iter()
        .map(|&value| f64::from(value) * f64::from(value))
        .sum();
    let scale = 1.0 / (squares / row.len() as f64 + f64::from(epsilon)).sqrt();
    for (value, &weight) in row.iter_mut().zip(weight) {
        *value = narrow(f64::from(*value) * scale * f64::from(weight));
    }
}

/// Eight sums at once, only so that the tests of a real model take seconds.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0; 8];
    let (a_lanes, a_rest) = a.as_chunks::<8>();
    let (b_lanes, b_rest) = b.as_chunks::<8>();
    for (a, b) in a_lanes.iter().zip(b_lanes) {
        for lane in 0..8 {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    let rest = a_rest.iter().zip(b_rest);
    let rest: f64 = rest.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    sums.iter().sum::<f64>() + rest
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "activations are kept as f32"
)]
pub(crate) fn narrow(value: f64) -> f32 {
    value as f32
}

/// Where one head's vector of one token starts in a page: `[L, 2, K, P, D]`.
fn offset(shape: &PageShape, layer: usize, plane: usize, head: usize, token: usize) -> usize {
    (((layer * 2 + plane) * shape.kv_heads + head) * shape.tokens_per_block + token)
        * shape.head_dim
}

fn read(page: &Page, at: usize, len: usize) -> Vec<f32> {
    match page.shape().dtype {
        KvDtype::F32 => page.as_f32()[at..at + len].to_vec(),
        KvDtype::F16 => page.as_f16()[at..at + len]
            .iter()
            .map(|value| value.to_f32())
            .collect(),
        KvDtype::Bf16 => page.as_bf16()[at..at + len]
            .iter()
            .map(|value| value.to_f32())
            .collect(),
        KvDtype::Fp8 => page.as_bytes()[at..at + len]
            .iter()
            .map(|&bits| e4m3::decode(bits))
            .collect(),
    }
}

fn write(page: &mut Page, at: usize, values: &[f32]) {
    for (index, &value) in values.iter().enumerate() {
        match page.shape().dtype {
            KvDtype::F32 => page.as_f32_mut()[at + index] = value,
            KvDtype::F16 => page.as_f16_mut()[at + index] = f16::from_f32(value),
            KvDtype::Bf16 => page.as_bf16_mut()[at + index] = bf16::from_f32(value),
            KvDtype::Fp8 => page.as_bytes_mut()[at + index] = e4m3::encode(value),
        }
    }
}

/// One token's cached vectors of one KV head.
fn cached(
    backend: &ReferenceBackend,
    span: &SequenceSpan,
    layer: usize,
    head: usize,
    position: usize,
) -> (Vec<f32>, Vec<f32>) {
    let shape = *backend.page(span.blocks[0]).shape();
    let page = backend.page(span.blocks[position / shape.tokens_per_block]);
    let token = position % shape.tokens_per_block;
    let vector = |plane| {
        read(
            page,
            offset(&shape, layer, plane, head, token),
            shape.head_dim,
        )
    };
    (vector(0), vector(1))
}

impl Backend for ReferenceBackend {
    type Weight = Matrix;
    type Tensor = Matrix;

    fn capability(&self) -> BackendCapability {
        BackendCapability {
            description: "reference".to_owned(),
            host_pages: true,
            batch_invariant: true,
            runs_by_itself: false,
            activations: ActivationDtype::F32,
            prefill_rows: PrefillRows::default(),
        }
    }

    fn load_weight(&mut self, source: WeightSource) -> Result<Matrix, BackendError> {
        match dequantize(&source) {
            Ok(values) => Ok(Matrix {
                rows: source.rows,
                cols: source.cols,
                values,
            }),
            Err(reason) => Err(BackendError::Weight {
                name: source.name,
                reason,
            }),
        }
    }

    fn tensor(&self, rows: usize, cols: usize) -> Matrix {
        Matrix {
            rows,
            cols,
            // Unspecified content: whoever reads before writing shall notice.
            values: vec![f32::NAN; rows * cols],
        }
    }

    fn embed(&self, table: &Matrix, tokens: &[TokenId], out: &mut Matrix) {
        for (row, &token) in tokens.iter().enumerate() {
            out.row_mut(row).copy_from_slice(table.row(token as usize));
        }
    }

    fn rms_norm(&self, x: &Matrix, weight: &Matrix, epsilon: f32, out: &mut Matrix) {
        out.values.copy_from_slice(&x.values);
        for row in out.values.chunks_exact_mut(out.cols) {
            normalize(row, &weight.values, epsilon);
        }
    }

    fn head_norm(&self, x: &mut Matrix, weight: &Matrix, epsilon: f32) {
        for head in x.values.chunks_exact_mut(weight.cols) {
            normalize(head, &weight.values, epsilon);
        }
    }

    fn linear(&self, x: &Matrix, weight: &Matrix, bias: Option<&Matrix>, out: &mut Matrix) {
        assert_eq!(
            (x.cols, x.rows, weight.rows),
            (weight.cols, out.rows, out.cols)
        );
        for row in 0..x.rows {
            for feature in 0..weight.rows {
                let offset = bias.map_or(0.0, |bias| f64::from(bias.values[feature]));
                out.row_mut(row)[feature] = narrow(dot(x.row(row), weight.row(feature)) + offset);
            }
        }
    }

    fn add(&self, x: &mut Matrix, y: &Matrix) {
        assert_eq!((x.rows, x.cols), (y.rows, y.cols));
        x.values
            .iter_mut()
            .zip(&y.values)
            .for_each(|(x, y)| *x += y);
    }

    fn silu_mul(&self, gate: &mut Matrix, up: &Matrix) {
        assert_eq!((gate.rows, gate.cols), (up.rows, up.cols));
        for (gate, &up) in gate.values.iter_mut().zip(&up.values) {
            let value = f64::from(*gate);
            *gate = narrow(value / (1.0 + (-value).exp()) * f64::from(up));
        }
    }

    fn rope(&self, x: &mut Matrix, positions: &[u32], table: &RopeTable) {
        let half = table.inverse_frequencies.len();
        for (row, &position) in positions.iter().enumerate() {
            for head in x.row_mut(row).chunks_exact_mut(2 * half) {
                for (index, &frequency) in table.inverse_frequencies.iter().enumerate() {
                    let (a, b) = match table.pairing {
                        RopePairing::Halves => (index, index + half),
                        RopePairing::Adjacent => (2 * index, 2 * index + 1),
                    };
                    let (sin, cos) = (f64::from(position) * f64::from(frequency)).sin_cos();
                    let (sin, cos) = (
                        sin * f64::from(table.magnitude),
                        cos * f64::from(table.magnitude),
                    );
                    let (x, y) = (f64::from(head[a]), f64::from(head[b]));
                    head[a] = narrow(x * cos - y * sin);
                    head[b] = narrow(x * sin + y * cos);
                }
            }
        }
    }

    fn write_kv(&mut self, layer: usize, batch: &StepBatch, k: &Matrix, v: &Matrix) {
        for span in &batch.sequences {
            for row in span.rows.clone() {
                let position = span.past_len + (row - span.rows.start);
                let shape = *self.page(span.blocks[0]).shape();
                let block = span.blocks[position / shape.tokens_per_block];
                let page = self.pages[block as usize]
                    .as_mut()
                    .expect("the page is not lent");
                let page = Arc::get_mut(page).expect("the page is not shared");
                for head in 0..shape.kv_heads {
                    let part = head * shape.head_dim..(head + 1) * shape.head_dim;
                    let token = position % shape.tokens_per_block;
                    write(
                        page,
                        offset(&shape, layer, 0, head, token),
                        &k.row(row)[part.clone()],
                    );
                    write(
                        page,
                        offset(&shape, layer, 1, head, token),
                        &v.row(row)[part],
                    );
                }
            }
        }
    }

    fn attention(&self, spec: &AttentionSpec, batch: &StepBatch, q: &Matrix, out: &mut Matrix) {
        for span in &batch.sequences {
            let shape = *self.page(span.blocks[0]).shape();
            let group = spec.heads / shape.kv_heads;
            for head in 0..spec.heads {
                let seen = span.past_len + span.rows.len();
                let cache: Vec<_> = (0..seen)
                    .map(|position| cached(self, span, spec.layer, head / group, position))
                    .collect();
                let part = head * shape.head_dim..(head + 1) * shape.head_dim;
                for row in span.rows.clone() {
                    let position = span.past_len + (row - span.rows.start);
                    let first = spec
                        .window
                        .map_or(0, |window| (position + 1).saturating_sub(window));
                    let visible = &cache[first..=position];
                    let query = &q.row(row)[part.clone()];
                    let mixed = mix(query, visible, spec.scale);
                    out.row_mut(row)[part.clone()].copy_from_slice(&mixed);
                }
            }
        }
    }

    fn select_rows(&self, x: &Matrix, rows: &[usize], out: &mut Matrix) {
        for (index, &row) in rows.iter().enumerate() {
            out.row_mut(index).copy_from_slice(x.row(row));
        }
    }

    fn to_host(&self, x: &Matrix) -> Vec<f32> {
        x.values.clone()
    }

    fn on_host(&self, x: &mut Matrix, edit: &mut dyn FnMut(&mut [f32])) {
        edit(&mut x.values);
    }

    fn allocate_pages(&mut self, shape: PageShape, block_count: usize) -> Result<(), BackendError> {
        self.pages = (0..block_count)
            .map(|_| Some(Arc::new(Page::zeroed(shape))))
            .collect();
        Ok(())
    }

    fn share_page(&self, block: BlockId) -> Arc<Page> {
        Arc::clone(self.page(block))
    }

    fn page_is_unshared(&self, block: BlockId) -> bool {
        Arc::strong_count(self.page(block)) == 1
    }

    fn lend_page(&mut self, block: BlockId) -> Page {
        let page = self.pages[block as usize]
            .take()
            .expect("the page is not lent");
        Arc::try_unwrap(page).expect("the page is not shared")
    }

    fn return_page(&mut self, block: BlockId, page: Page) {
        let before = self.pages[block as usize].replace(Arc::new(page));
        assert!(before.is_none(), "the block's page was lent");
    }
}

/// The softmax-weighted mean of the visible values.
fn mix(query: &[f32], visible: &[(Vec<f32>, Vec<f32>)], scale: f32) -> Vec<f32> {
    let scores: Vec<f64> = visible
        .iter()
        .map(|(key, _)| dot(query, key) * f64::from(scale))
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    (0..query.len())
        .map(|index| {
            let sum: f64 = weights
                .iter()
                .zip(visible)
                .map(|(weight, (_, value))| weight * f64::from(value[index]))
                .sum();
            narrow(sum / total)
        })
        .collect()
}

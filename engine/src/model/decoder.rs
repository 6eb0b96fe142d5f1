//! The Llama-shaped decoder: one forward pass over a batch of sequence pieces, written against [`Backend`] alone.
//!
//! Dimension letters are those of `backend.rs`. A residual stream `x [T, E]` passes through the layers; each adds
//! attention over the paged KV and a gated feed-forward. Only rows whose logits are wanted go on after the last
//! attention, because nothing reads the others any more. It keeps no state between steps but the pages.

use std::fmt::Debug;
use std::sync::Arc;

use crate::backend::{AttentionSpec, Backend, BackendError, BlockId, StepBatch};
use crate::model::checkpoint::Checkpoint;
use crate::model::config::DecoderConfig;
use crate::model::error::{ModelError, ModelErrorKind};
use crate::model::load::LoadProgress;
use crate::model::weights::{DecoderWeights, LayerWeights, Linear};
use crate::model::{Logits, Model, ModelShape};
use crate::page::{Page, PageShape};

/// A decoder on its backend.
#[derive(Debug)]
pub(crate) struct Decoder<B: Backend> {
    backend: B,
    config: DecoderConfig,
    shape: ModelShape,
    weights: DecoderWeights<B::Weight>,
    weight_bytes: usize,
}

impl<B: Backend> Decoder<B> {
    /// Checks every tensor of the checkpoint first, then hands one after the other to the backend.
    pub(crate) fn load(
        config: DecoderConfig,
        checkpoint: &Checkpoint<'_>,
        mut backend: B,
        progress: &dyn Fn(LoadProgress<'_>),
    ) -> Result<Self, ModelError> {
        let plan = DecoderWeights::plan(&config);
        let mut bytes_total = 0;
        plan.try_map(|slot| {
            bytes_total += checkpoint.bytes(slot)?;
            Ok::<_, ModelError>(())
        })?;
        let mut bytes_done = 0;
        let weights = plan.try_map(|slot| {
            let source = checkpoint.source(slot)?;
            let tensor = source.name.clone();
            bytes_done += source.bytes.as_slice().len() as u64;
            let weight = backend
                .load_weight(source)
                .map_err(|error| ModelErrorKind::Backend(error).of(checkpoint.subject()))?;
            progress(LoadProgress {
                tensor: &tensor,
                bytes_done,
                bytes_total,
            });
            Ok::<_, ModelError>(weight)
        })?;
        Ok(Self {
            shape: config.shape(),
            backend,
            config,
            weights,
            weight_bytes: usize::try_from(bytes_total).expect("the weights' bytes are addressable"),
        })
    }

    /// Logits `[R, V]` of the final hidden state `x [R, E]`.
    fn logits(&self, x: &B::Tensor, rows: usize) -> Vec<f32> {
        let Self {
            backend,
            config,
            weights,
            ..
        } = self;
        let mut normed = backend.tensor(rows, config.width);
        backend.rms_norm(x, &weights.final_norm, config.rms_epsilon, &mut normed);
        let head = weights.lm_head.as_ref().unwrap_or(&weights.embedding);
        let mut logits = backend.tensor(rows, config.vocab);
        backend.linear(&normed, head, None, &mut logits);
        backend.to_host(&logits)
    }
}

/// The activations of a layer's first half, reused from layer to layer.
#[derive(Debug)]
struct Pass<B: Backend> {
    /// `[T, E]`.
    normed: B::Tensor,
    /// `[T, H * D]`.
    q: B::Tensor,
    /// `[T, K * D]`.
    k: B::Tensor,
    /// `[T, K * D]`.
    v: B::Tensor,
    /// `[T, H * D]`.
    mixed: B::Tensor,
}

impl<B: Backend> Pass<B> {
    fn new(backend: &B, config: &DecoderConfig, rows: usize) -> Self {
        let (q_width, kv_width) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        Self {
            normed: backend.tensor(rows, config.width),
            q: backend.tensor(rows, q_width),
            k: backend.tensor(rows, kv_width),
            v: backend.tensor(rows, kv_width),
            mixed: backend.tensor(rows, q_width),
        }
    }

    /// `mixed = attention(norm(x))`, before the output projection; writes this layer's KV.
    fn attend(
        &mut self,
        backend: &mut B,
        config: &DecoderConfig,
        (index, layer): (usize, &LayerWeights<B::Weight>),
        batch: &StepBatch,
        x: &B::Tensor,
    ) {
        let Self {
            normed,
            q,
            k,
            v,
            mixed,
        } = self;
        backend.rms_norm(x, &layer.attention_norm, config.rms_epsilon, normed);
        linear(backend, normed, &layer.query, q);
        linear(backend, normed, &layer.key, k);
        linear(backend, normed, &layer.value, v);
        if let Some(norm) = &layer.query_norm {
            backend.head_norm(q, norm, config.rms_epsilon);
        }
        if let Some(norm) = &layer.key_norm {
            backend.head_norm(k, norm, config.rms_epsilon);
        }
        backend.rope(q, &batch.positions, &config.rope);
        backend.rope(k, &batch.positions, &config.rope);
        backend.write_kv(index, batch, k, v);
        let spec = AttentionSpec {
            layer: index,
            heads: config.heads,
            scale: (config.head_dim as f32).sqrt().recip(),
            window: config.windows[index],
        };
        backend.attention(&spec, batch, q, mixed);
    }
}

/// The activations of a layer's second half.
#[derive(Debug)]
struct Tail<B: Backend> {
    /// `[T, E]`.
    normed: B::Tensor,
    /// `[T, E]`.
    projected: B::Tensor,
    /// `[T, F]`.
    gate: B::Tensor,
    /// `[T, F]`.
    up: B::Tensor,
}

impl<B: Backend> Tail<B> {
    fn new(backend: &B, config: &DecoderConfig, rows: usize) -> Self {
        Self {
            normed: backend.tensor(rows, config.width),
            projected: backend.tensor(rows, config.width),
            gate: backend.tensor(rows, config.ffn_width),
            up: backend.tensor(rows, config.ffn_width),
        }
    }

    /// `x += mixed · Wo`, then `x += down(silu(gate(norm(x))) * up(norm(x)))`.
    fn finish(
        &mut self,
        backend: &B,
        config: &DecoderConfig,
        layer: &LayerWeights<B::Weight>,
        mixed: &B::Tensor,
        x: &mut B::Tensor,
    ) {
        let Self {
            normed,
            projected,
            gate,
            up,
        } = self;
        linear(backend, mixed, &layer.output, projected);
        backend.add(x, projected);
        backend.rms_norm(x, &layer.ffn_norm, config.rms_epsilon, normed);
        linear(backend, normed, &layer.gate, gate);
        linear(backend, normed, &layer.up, up);
        backend.silu_mul(gate, up);
        linear(backend, gate, &layer.down, projected);
        backend.add(x, projected);
    }
}

fn linear<B: Backend>(backend: &B, x: &B::Tensor, linear: &Linear<B::Weight>, out: &mut B::Tensor) {
    backend.linear(x, &linear.weight, linear.bias.as_ref(), out);
}

/// `[rows.len(), cols]` of the given rows.
fn selected<B: Backend>(backend: &B, x: &B::Tensor, rows: &[usize], cols: usize) -> B::Tensor {
    let mut out = backend.tensor(rows.len(), cols);
    backend.select_rows(x, rows, &mut out);
    out
}

impl<B: Backend> Model for Decoder<B> {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn backend_description(&self) -> String {
        self.backend.capability().description
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    fn allocate_pages(&mut self, shape: PageShape, block_count: usize) -> Result<(), BackendError> {
        let ours = (
            self.config.layers(),
            self.config.kv_heads,
            self.config.head_dim,
        );
        assert_eq!(
            (shape.layers, shape.kv_heads, shape.head_dim),
            ours,
            "pages fit the model"
        );
        self.backend.allocate_pages(shape, block_count)
    }

    fn forward(&mut self, batch: &StepBatch) -> Result<Logits, BackendError> {
        let (rows, wanted) = (batch.tokens.len(), batch.logit_rows.as_slice());
        let mut logits = Logits {
            values: Vec::new(),
            vocab: self.config.vocab,
        };
        if rows == 0 {
            return Ok(logits);
        }
        let Self {
            backend,
            config,
            weights,
            ..
        } = self;
        let mut x = backend.tensor(rows, config.width);
        backend.embed(&weights.embedding, &batch.tokens, &mut x);
        let (last, layers) = weights
            .layers
            .split_last()
            .expect("a configuration has layers");
        let mut pass = Pass::new(backend, config, rows);
        let mut tail = Tail::new(backend, config, rows);
        for (index, layer) in layers.iter().enumerate() {
            pass.attend(backend, config, (index, layer), batch, &x);
            tail.finish(backend, config, layer, &pass.mixed, &mut x);
        }
        pass.attend(backend, config, (layers.len(), last), batch, &x);
        if wanted.is_empty() {
            return Ok(logits);
        }
        if wanted.len() < rows {
            x = selected(backend, &x, wanted, config.width);
            pass.mixed = selected(backend, &pass.mixed, wanted, config.heads * config.head_dim);
            tail = Tail::new(backend, config, wanted.len());
        }
        tail.finish(backend, config, last, &pass.mixed, &mut x);
        logits.values = self.logits(&x, wanted.len());
        Ok(logits)
    }

    fn share_page(&self, block: BlockId) -> Arc<Page> {
        self.backend.share_page(block)
    }

    fn page_is_unshared(&self, block: BlockId) -> bool {
        self.backend.page_is_unshared(block)
    }

    fn lend_page(&mut self, block: BlockId) -> Page {
        self.backend.lend_page(block)
    }

    fn return_page(&mut self, block: BlockId, page: Page) {
        self.backend.return_page(block, page);
    }
}

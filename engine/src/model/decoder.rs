//! The Llama-shaped decoder: one forward pass over a batch of sequence pieces, written against [`Backend`] alone.
//!
//! Dimension letters are those of `backend.rs`; in a shard they are the rank's own. A residual stream `x [T, E]` passes
//! through the layers; each adds attention over the paged KV and a gated feed-forward. Only rows whose logits are wanted
//! go on after the last attention, because nothing reads the others any more. It keeps no state between steps but the
//! pages. A rank of several sums what it adds to `x` over its stage, and passes `x` on to the next stage; one that is
//! alone does neither.

use std::fmt::Debug;
use std::sync::Arc;

use baton_configs::llm::LlmOptions;

use crate::backend::{
    AttentionSpec, Backend, BackendError, BlockId, Carried, PrefillRows, RankGroup, RowWish,
    StepBatch, StepOutput, StepWish,
};
use crate::collective::{Collective, CollectiveError};
use crate::model::checkpoint::Checkpoint;
use crate::model::config::DecoderConfig;
use crate::model::embedding::embed;
use crate::model::error::ModelError;
use crate::model::load::LoadProgress;
use crate::model::micro;
use crate::model::peers::Peers;
use crate::model::shard::{Grid, Shard};
use crate::model::taking;
use crate::model::weights::{DecoderWeights, LayerWeights, Linear};
use crate::model::{Logits, Model, ModelShape};
use crate::page::{Page, PageShape};

/// What a device's library takes to reach those of other ranks, once they have joined; generous.
const JOINING_BYTES: u64 = 1 << 30;

/// A decoder on its backend, or the part of one that a rank holds.
#[derive(Debug)]
pub(crate) struct Decoder<B: Backend> {
    backend: B,
    part: DecoderPart<B>,
    /// The whole model's.
    shape: ModelShape,
    weight_bytes: usize,
}

/// All of a decoder but its device.
#[derive(Debug)]
struct DecoderPart<B: Backend> {
    /// This rank's.
    config: DecoderConfig,
    shard: Shard,
    weights: DecoderWeights<B::Weight>,
    /// `None` when this rank is alone.
    peers: Option<Peers>,
}

impl<B: Backend> Decoder<B> {
    /// Checks every tensor of the shard first, then hands one after the other to the backend. `config` is the whole
    /// model's.
    pub(crate) fn load(
        config: &DecoderConfig,
        shard: Shard,
        checkpoint: &Checkpoint<'_>,
        mut backend: B,
        progress: &dyn Fn(LoadProgress<'_>),
    ) -> Result<Self, ModelError> {
        let plan = DecoderWeights::plan(config, &shard);
        let (weights, bytes) = taking::take_over(&plan, checkpoint, &mut backend, progress)?;
        Ok(Self {
            shape: config.shape(),
            backend,
            part: DecoderPart {
                config: shard.config(config),
                shard,
                weights,
                peers: None,
            },
            weight_bytes: usize::try_from(bytes).expect("the weights' bytes are addressable"),
        })
    }

    /// Bytes that are left for pages on the device, where it has memory of its own: what a step's activations take at most
    /// is not.
    pub(crate) fn free_device_bytes(&self, options: &LlmOptions) -> Option<u64> {
        let free = self.backend.free_bytes()?;
        let config = &self.part.config;
        let heads = config.heads + 2 * config.kv_heads;
        let per_token = 2 * config.ffn_width + 4 * config.width + 2 * heads * config.head_dim;
        let (tokens, sequences) = (options.max_num_tokens, options.max_batch_size);
        // Every rank of a stage may have whole logits.
        let per_sequence = 4 * (self.shape.vocab + config.width);
        let activations = 2 * per_token as u64 * u64::from(tokens);
        let results = per_sequence as u64 * u64::from(sequences.min(tokens));
        let alone = self.part.shard.place.grid == Grid::ALONE;
        let joining = if alone { 0 } else { JOINING_BYTES };
        Some(free.saturating_sub(activations + results + joining))
    }

    /// Joins the other ranks, whose shards these are. From now on all of them make each step together.
    pub(crate) fn join(
        &mut self,
        mut collective: Box<dyn Collective>,
        shards: &[Shard],
    ) -> Result<(), BackendError> {
        let devices = self.backend.join_ranks(RankGroup {
            collective: collective.as_mut(),
            tensor: self.part.shard.place.grid.tensor,
        })?;
        self.part.peers = Some(Peers::new(collective, shards, devices));
        Ok(())
    }

    /// Whether a step needs nothing of other hosts once all have begun it. Then every rank gets its whole logits.
    fn steps_alone(&self) -> bool {
        let peers = self.part.peers.as_ref();
        peers.is_none_or(Peers::step_by_themselves)
    }

    /// The ranks that were joined.
    pub(crate) fn collective(&mut self) -> &mut dyn Collective {
        let peers = self.part.peers.as_mut();
        peers
            .expect("only a rank that has joined others is asked for them")
            .collective
            .as_mut()
    }

    /// What is wanted of a batch that is not empty, where this rank has it.
    fn step(&mut self, batch: &StepBatch, rows: &[RowWish]) -> Result<StepOutput, BackendError> {
        let wish = StepWish {
            // Talk with other hosts is not the same from step to step.
            repeatable: self.steps_alone(),
            rows,
            carried: &[],
        };
        let Self { backend, part, .. } = self;
        backend.step(batch, wish, &mut |backend, batch| part.pass(backend, batch))
    }

    /// What a step gave on a rank that has all of it.
    fn whole_logits(&self, out: StepOutput) -> Logits {
        Logits {
            values: out.values,
            vocab: self.shape.vocab,
            chosen: out.chosen,
            logprobs: out.logprobs,
        }
    }
}

impl<B: Backend> DecoderPart<B> {
    /// The wanted logits `[R, V of this rank]` of a batch that is not empty, where this rank has them.
    fn pass(
        &mut self,
        backend: &mut B,
        batch: &StepBatch,
    ) -> Result<Option<B::Tensor>, BackendError> {
        let (rows, wanted) = (batch.tokens.len(), batch.logit_rows.as_slice());
        let place = self.shard.place;
        let mut x = self.enter(backend, batch)?;
        let Self {
            config,
            weights,
            peers,
            ..
        } = self;
        let (last, layers) = weights
            .layers
            .split_last()
            .expect("a configuration has layers");
        let mut pass = Pass::new(backend, config, rows);
        let mut tail = Tail::new(backend, config, rows);
        for (index, layer) in layers.iter().enumerate() {
            let before = (index > 0).then_some(&tail.projected);
            pass.attend((backend, config), (index, layer), batch, (&mut x, before));
            tail.finish((backend, config, peers), layer, &pass.mixed, &mut x)?;
        }
        let before = (!layers.is_empty()).then_some(&tail.projected);
        let place_of_last = (layers.len(), last);
        pass.attend((backend, config), place_of_last, batch, (&mut x, before));
        if !place.is_last_stage() {
            tail.finish((backend, config, peers), last, &pass.mixed, &mut x)?;
            backend.add(&mut x, &tail.projected);
            self.leave(backend, &x)?;
            return Ok(None);
        }
        if wanted.is_empty() {
            return Ok(None);
        }
        if wanted.len() < rows {
            x = selected(backend, &x, wanted, config.width);
            pass.mixed = selected(backend, &pass.mixed, wanted, config.heads * config.head_dim);
            tail = Tail::new(backend, config, wanted.len());
        }
        tail.finish((backend, config, peers), last, &pass.mixed, &mut x)?;
        Ok(Some(self.logits(
            backend,
            (&mut x, &tail.projected),
            wanted.len(),
        )))
    }

    /// The residual stream as it comes to this stage: from the embedding, or from the stage before.
    fn enter(&mut self, backend: &B, batch: &StepBatch) -> Result<B::Tensor, BackendError> {
        let Self {
            config,
            weights,
            peers,
            ..
        } = self;
        let mut x = backend.tensor(batch.tokens.len(), config.width);
        match (&weights.embedding, peers) {
            (Some(table), peers) => {
                let rows = self.shard.vocab.clone();
                embed(backend, (table, rows), peers, &batch.tokens, &mut x)?;
            }
            (None, Some(peers)) if peers.devices() => backend.receive_rows(&mut x, peers.before()),
            (None, Some(peers)) => on_host(backend, &mut x, |values| peers.take_over(values))?,
            (None, None) => unreachable!("a rank that is alone has the embedding"),
        }
        Ok(x)
    }

    /// The residual stream goes on to the next stage.
    fn leave(&mut self, backend: &B, x: &B::Tensor) -> Result<(), BackendError> {
        match &mut self.peers {
            Some(peers) if peers.devices() => backend.send_rows(x, peers.next()),
            Some(peers) => peers.pass_on(&backend.to_host(x))?,
            None => unreachable!("a rank that is alone is the last stage"),
        }
        Ok(())
    }

    /// Logits `[R, V]` of the final hidden state `x [R, E]`, to which the last layer's result is still to be added.
    fn logits(
        &self,
        backend: &B,
        (x, last): (&mut B::Tensor, &B::Tensor),
        rows: usize,
    ) -> B::Tensor {
        let Self {
            config, weights, ..
        } = self;
        let norm = weights.final_norm.as_ref();
        let norm = norm.expect("the last stage has the final norm");
        let mut normed = backend.tensor(rows, config.width);
        backend.add_rms_norm((x, last), norm, config.rms_epsilon, &mut normed);
        let head = weights.lm_head.as_ref().or(weights.embedding.as_ref());
        let head = head.expect("the last stage has an output projection");
        let whole = self
            .peers
            .as_ref()
            .filter(|peers| peers.step_by_themselves());
        let mut logits = backend.wide_tensor(rows, whole.map_or(config.vocab, Peers::vocab));
        match whole {
            Some(_) => {
                let columns = self.shard.vocab.clone();
                backend.linear_over_ranks(&normed, head, columns, &mut logits);
            }
            None => backend.linear(&normed, head, None, &mut logits),
        }
        logits
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
        let [q, k, v] = backend.tensors(rows, [q_width, kv_width, kv_width]);
        Self {
            normed: backend.tensor(rows, config.width),
            q,
            k,
            v,
            mixed: backend.tensor(rows, q_width),
        }
    }

    /// `mixed = attention(norm(x))`, before the output projection; writes this layer's KV. `before` is the result of the layer
    /// before, which is still to be added to x.
    fn attend(
        &mut self,
        (backend, config): (&mut B, &DecoderConfig),
        (index, layer): (usize, &LayerWeights<B::Weight>),
        batch: &StepBatch,
        (x, before): (&mut B::Tensor, Option<&B::Tensor>),
    ) {
        let Self {
            normed,
            q,
            k,
            v,
            mixed,
        } = self;
        let (norm, epsilon) = (&layer.attention_norm, config.rms_epsilon);
        let projections = [&layer.query, &layer.key, &layer.value];
        backend.dedicate(normed, &projections.map(|projection| &projection.weight));
        match before {
            Some(before) => backend.add_rms_norm((x, before), norm, epsilon, normed),
            None => backend.rms_norm(x, norm, epsilon, normed),
        }
        backend.linears(normed, projections.map(Linear::both), [q, k, v]);
        if let Some(norm) = &layer.query_norm {
            backend.head_norm(q, norm, config.rms_epsilon);
        }
        if let Some(norm) = &layer.key_norm {
            backend.head_norm(k, norm, config.rms_epsilon);
        }
        backend.rope_write_kv(index, batch, &config.rope, (q, k, v));
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
        let [gate, up] = backend.tensors(rows, [config.ffn_width; 2]);
        Self {
            normed: backend.tensor(rows, config.width),
            projected: backend.tensor(rows, config.width),
            gate,
            up,
        }
    }

    /// `x += mixed · Wo`, then `projected = down(silu(gate(norm(x))) * up(norm(x)))`, which is left to be added to x.
    fn finish(
        &mut self,
        (backend, config, peers): (&B, &DecoderConfig, &mut Option<Peers>),
        layer: &LayerWeights<B::Weight>,
        mixed: &B::Tensor,
        x: &mut B::Tensor,
    ) -> Result<(), BackendError> {
        let Self {
            normed,
            projected,
            gate,
            up,
        } = self;
        linear(backend, mixed, &layer.output, projected);
        sum(backend, peers, projected)?;
        let epsilon = config.rms_epsilon;
        let widening = [&layer.gate, &layer.up];
        backend.dedicate(normed, &widening.map(|projection| &projection.weight));
        backend.add_rms_norm((x, projected), &layer.ffn_norm, epsilon, normed);
        backend.linears(normed, widening.map(Linear::both), [&mut *gate, &mut *up]);
        backend.dedicate(gate, &[&layer.down.weight]);
        backend.silu_mul(gate, up);
        linear(backend, gate, &layer.down, projected);
        sum(backend, peers, projected)
    }
}

fn linear<B: Backend>(backend: &B, x: &B::Tensor, linear: &Linear<B::Weight>, out: &mut B::Tensor) {
    backend.linear(x, &linear.weight, linear.bias.as_ref(), out);
}

/// Adds the other ranks' parts of a stage's result.
pub(super) fn sum<B: Backend>(
    backend: &B,
    peers: &mut Option<Peers>,
    x: &mut B::Tensor,
) -> Result<(), BackendError> {
    match peers {
        Some(peers) if peers.sums() && peers.devices() => {
            backend.sum_over_ranks(x);
            Ok(())
        }
        Some(peers) if peers.sums() => on_host(backend, x, |values| peers.sum(values)),
        _ => Ok(()),
    }
}

/// What may fail, done with activations in host memory.
fn on_host<B: Backend>(
    backend: &B,
    x: &mut B::Tensor,
    mut act: impl FnMut(&mut [f32]) -> Result<(), CollectiveError>,
) -> Result<(), BackendError> {
    let mut outcome = Ok(());
    backend.on_host(x, &mut |values| outcome = act(values));
    Ok(outcome?)
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

    fn page_device(&self) -> Option<usize> {
        self.backend.page_device()
    }

    fn backend_description(&self) -> String {
        self.backend.capability().description
    }

    fn prefill_rows(&self) -> PrefillRows {
        self.backend.capability().prefill_rows
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    fn allocate_pages(&mut self, shape: PageShape, block_count: usize) -> Result<(), BackendError> {
        let ours = (
            self.part.config.layers(),
            self.part.config.kv_heads,
            self.part.config.head_dim,
        );
        assert_eq!(
            (shape.layers, shape.kv_heads, shape.head_dim),
            ours,
            "pages fit the model"
        );
        self.backend.allocate_pages(shape, block_count)?;
        if !self.part.config.kv_scales.is_empty() {
            self.backend.scale_pages(&self.part.config.kv_scales);
        }
        Ok(())
    }

    fn forward(&mut self, batch: &StepBatch) -> Result<Logits, BackendError> {
        self.forward_choosing(batch, &[])
    }

    fn forward_choosing(
        &mut self,
        batch: &StepBatch,
        wishes: &[RowWish],
    ) -> Result<Logits, BackendError> {
        let rows = batch.tokens.len();
        let mut out = StepOutput::default();
        // A part of a row does not tell its token.
        let alone = self.steps_alone();
        let wishes = if alone { wishes } else { &[] };
        if rows > 0 {
            for cut in micro::cuts(rows, self.part.shard.place.grid.pipeline) {
                if cut.len() == rows {
                    out = self.step(batch, wishes)?;
                } else {
                    let piece = self.step(&micro::piece(batch, cut), &[])?;
                    out.values.extend(piece.values);
                }
            }
        }
        if let (Some(peers), false) = (&mut self.part.peers, alone) {
            out.values = peers.collect_logits(out.values, batch.logit_rows.len())?;
        }
        Ok(self.whole_logits(out))
    }

    fn warm_up(&mut self, sequences_max: usize) -> Result<(), BackendError> {
        if !self.steps_alone() {
            return Ok(());
        }
        let Self { backend, part, .. } = self;
        let pass = &mut |backend: &mut B, batch: &StepBatch| part.pass(backend, batch);
        backend.warm_up(sequences_max, pass)
    }

    fn runs_by_itself(&self) -> bool {
        self.steps_alone() && self.backend.capability().runs_by_itself
    }

    fn begin(
        &mut self,
        batch: &StepBatch,
        wishes: &[RowWish],
        carried: &[Carried],
    ) -> Result<Option<Logits>, BackendError> {
        if !self.steps_alone() || batch.tokens.is_empty() {
            return self.forward_choosing(batch, wishes).map(Some);
        }
        let Self { backend, part, .. } = self;
        let wish = StepWish {
            repeatable: true,
            rows: wishes,
            carried,
        };
        let pass = &mut |backend: &mut B, batch: &StepBatch| part.pass(backend, batch);
        let done = backend.begin_step(batch, wish, pass)?;
        Ok(done.map(|out| self.whole_logits(out)))
    }

    fn finish(&mut self) -> Result<Logits, BackendError> {
        let out = self.backend.finish_step()?;
        Ok(self.whole_logits(out))
    }

    fn share_pages(&mut self, blocks: &[BlockId]) -> Result<Vec<Arc<Page>>, BackendError> {
        let pages = blocks.iter().map(|&block| self.backend.share_page(block));
        let pages = pages.collect();
        self.backend.check()?;
        Ok(pages)
    }

    fn page_is_unshared(&self, block: BlockId) -> bool {
        self.backend.page_is_unshared(block)
    }

    fn lend_page(&mut self, block: BlockId) -> Page {
        self.backend.lend_page(block)
    }

    fn return_pages(&mut self, pages: Vec<(BlockId, Page)>) -> Result<(), BackendError> {
        for (block, page) in pages {
            self.backend.return_page(block, page);
        }
        self.backend.check()
    }
}

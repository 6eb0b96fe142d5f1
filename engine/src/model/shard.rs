//! Which part of a model each rank of an instance holds. Pure numbers: no weights, no sockets.
//!
//! Ranks are numbered `pp * TP + tp`. Tensor parallelism divides heads, feed-forward width and vocabulary; where there
//! are fewer KV heads than ranks, neighbours hold the same one. Pipeline parallelism divides the layers into contiguous
//! stages, as even as they go. Invariant: a [`Shard`] is only made of a configuration that [`check`] lets pass.

use std::ops::Range;

use baton_configs::llm::LlmOptions;

use crate::model::config::DecoderConfig;
use crate::model::error::ModelErrorKind;
use crate::page::PageShape;

/// How many ranks an instance has, and how they are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Tensor-parallel ranks of a stage (`TP`).
    pub(crate) tensor: usize,
    /// Pipeline stages (`PP`).
    pub(crate) pipeline: usize,
}

impl Grid {
    /// One rank that holds everything.
    pub(crate) const ALONE: Self = Self {
        tensor: 1,
        pipeline: 1,
    };

    /// What the options ask for.
    pub(crate) fn of(options: &LlmOptions) -> Self {
        Self {
            tensor: options.tensor_parallel_size as usize,
            pipeline: options.pipeline_parallel_size as usize,
        }
    }

    /// Ranks in all.
    pub(crate) const fn size(self) -> usize {
        self.tensor * self.pipeline
    }

    /// Where a rank stands.
    pub(crate) fn place(self, rank: usize) -> Place {
        assert!(rank < self.size(), "rank {rank} is one of {}", self.size());
        Place {
            grid: self,
            tp: rank % self.tensor,
            pp: rank / self.tensor,
        }
    }

    /// The places of all ranks, in their order.
    pub(crate) fn places(self) -> impl Iterator<Item = Place> {
        (0..self.size()).map(move |rank| self.place(rank))
    }
}

/// Where a rank stands in its instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) grid: Grid,
    /// Index within the stage.
    pub(crate) tp: usize,
    /// Index of the stage.
    pub(crate) pp: usize,
}

impl Place {
    /// The rank that holds everything.
    pub(crate) const ALONE: Self = Self {
        grid: Grid::ALONE,
        tp: 0,
        pp: 0,
    };

    pub(crate) const fn rank(self) -> usize {
        self.pp * self.grid.tensor + self.tp
    }

    pub(crate) const fn is_first_stage(self) -> bool {
        self.pp == 0
    }

    pub(crate) const fn is_last_stage(self) -> bool {
        self.pp + 1 == self.grid.pipeline
    }

    /// The ranks of this rank's stage.
    pub(crate) const fn stage(self) -> Range<usize> {
        let first = self.pp * self.grid.tensor;
        first..first + self.grid.tensor
    }

    /// The ranks of the last stage.
    pub(crate) const fn last_stage(self) -> Range<usize> {
        self.grid.size() - self.grid.tensor..self.grid.size()
    }
}

/// The keys and values that one rank holds; the hand-off's geometry as well as the decoder's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KvPart {
    /// Of `L`.
    pub(crate) layers: Range<usize>,
    /// Of `K`.
    pub(crate) heads: Range<usize>,
    /// How many ranks hold just these.
    pub(crate) copies: usize,
    /// Which of them this one is, in their order.
    pub(crate) copy: usize,
}

impl KvPart {
    /// The part of the rank at `place`. The sizes have passed [`kv_obstacle`].
    pub(crate) fn new(layers: usize, kv_heads: usize, place: Place) -> Self {
        let (size, tp) = (place.grid.tensor, place.tp);
        // Ranks that share a KV head, when there are more ranks than KV heads.
        let copies = (size / kv_heads).max(1);
        Self {
            layers: part(layers, place.grid.pipeline, place.pp),
            heads: part(kv_heads, size / copies, tp / copies),
            copies,
            copy: tp % copies,
        }
    }

    /// This rank's page, where the whole model's is `whole`.
    pub(crate) fn page(&self, whole: PageShape) -> PageShape {
        PageShape {
            layers: self.layers.len(),
            kv_heads: self.heads.len(),
            ..whole
        }
    }
}

/// One rank's part of a decoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shard {
    pub(crate) place: Place,
    /// Of `L`.
    pub(crate) layers: Range<usize>,
    /// Of `H`.
    pub(crate) heads: Range<usize>,
    /// Of `K`.
    pub(crate) kv_heads: Range<usize>,
    /// Columns of the feed-forward, of `F`.
    pub(crate) ffn: Range<usize>,
    /// Rows of embedding and output projection, of `V`.
    pub(crate) vocab: Range<usize>,
}

impl Shard {
    /// The part of the rank at `place`. The sizes have passed [`check`].
    pub(crate) fn new(config: &DecoderConfig, place: Place) -> Self {
        let (size, tp) = (place.grid.tensor, place.tp);
        let kv = KvPart::new(config.layers(), config.kv_heads, place);
        Self {
            place,
            layers: kv.layers,
            heads: part(config.heads, size, tp),
            kv_heads: kv.heads,
            ffn: part(config.ffn_width, size, tp),
            vocab: part(config.vocab, size, tp),
        }
    }

    /// The parts of all ranks, in their order.
    pub(crate) fn all(config: &DecoderConfig, grid: Grid) -> Vec<Self> {
        grid.places()
            .map(|place| Self::new(config, place))
            .collect()
    }

    /// The configuration that this rank computes with. Its vocabulary is this rank's rows of it.
    pub(crate) fn config(&self, whole: &DecoderConfig) -> DecoderConfig {
        DecoderConfig {
            heads: self.heads.len(),
            kv_heads: self.kv_heads.len(),
            ffn_width: self.ffn.len(),
            vocab: self.vocab.len(),
            windows: whole.windows[self.layers.clone()].to_vec(),
            kv_scales: match whole.kv_scales.as_slice() {
                [] => Vec::new(),
                scales => scales[self.layers.clone()].to_vec(),
            },
            ..whole.clone()
        }
    }

    /// This rank's page, where the whole model's is `whole`.
    pub(crate) fn page(&self, whole: PageShape) -> PageShape {
        PageShape {
            layers: self.layers.len(),
            kv_heads: self.kv_heads.len(),
            ..whole
        }
    }
}

/// The `index`th of `parts` contiguous parts of `0..len`; the first ones are longer by one where it does not divide.
fn part(len: usize, parts: usize, index: usize) -> Range<usize> {
    let (each, more) = (len / parts, len % parts);
    let start = index * each + index.min(more);
    start..start + each + usize::from(index < more)
}

/// Whether a model can be divided like this; otherwise what is in the way, and which sizes go.
pub(crate) fn check(config: &DecoderConfig, grid: Grid) -> Result<(), ModelErrorKind> {
    let reason = tensor_obstacle(config, grid.tensor)
        .or_else(|| pipeline_obstacle(config.layers(), grid.pipeline));
    match reason {
        None => Ok(()),
        Some(reason) => Err(ModelErrorKind::Parallelism {
            reason,
            hint: sizes_that_go(config),
        }),
    }
}

fn tensor_obstacle(config: &DecoderConfig, size: usize) -> Option<String> {
    let (heads, kv_heads) = (config.heads, config.kv_heads);
    let what = if size == 0 {
        "must be at least 1".to_owned()
    } else if !heads.is_multiple_of(size) {
        format!("does not divide {heads} attention heads")
    } else if let Some(what) = kv_heads_obstacle(kv_heads, size) {
        what
    } else if !config.ffn_width.is_multiple_of(size) {
        format!("does not divide the feed-forward size {}", config.ffn_width)
    } else if config.vocab < size {
        format!("is more than the {} rows of the vocabulary", config.vocab)
    } else {
        return None;
    };
    Some(format!("tensor_parallel_size {size} {what}"))
}

fn kv_heads_obstacle(kv_heads: usize, size: usize) -> Option<String> {
    (!kv_heads.is_multiple_of(size) && !size.is_multiple_of(kv_heads))
        .then(|| format!("neither divides {kv_heads} key/value heads nor is a multiple of them"))
}

/// What is in the way of dividing so many layers and KV heads like this, if anything is.
pub(crate) fn kv_obstacle(layers: usize, kv_heads: usize, grid: Grid) -> Option<String> {
    let size = grid.tensor;
    let what = match (size, kv_heads) {
        (0, _) => Some("must be at least 1".to_owned()),
        (_, 0) => Some("divides a model without key/value heads".to_owned()),
        _ => kv_heads_obstacle(kv_heads, size),
    };
    what.map(|what| format!("tensor_parallel_size {size} {what}"))
        .or_else(|| pipeline_obstacle(layers, grid.pipeline))
}

fn pipeline_obstacle(layers: usize, size: usize) -> Option<String> {
    match size {
        0 => Some("pipeline_parallel_size 0 must be at least 1".to_owned()),
        size if size > layers => Some(format!(
            "pipeline_parallel_size {size} is more than the model's {layers} layers"
        )),
        _ => None,
    }
}

fn sizes_that_go(config: &DecoderConfig) -> String {
    let sizes: Vec<_> = (1..=config.heads)
        .filter(|&size| tensor_obstacle(config, size).is_none())
        .map(|size| size.to_string())
        .collect();
    format!(
        "this model goes with tensor_parallel_size {} and pipeline_parallel_size 1 to {}",
        sizes.join(", "),
        config.layers()
    )
}

#[cfg(test)]
mod tests;

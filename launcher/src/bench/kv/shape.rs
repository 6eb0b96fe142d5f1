//! How much KV a request has and in which pieces it lies. Pure.

use anyhow::anyhow;
use baton_configs::error::nearest;
use baton_engine::page::{KvDtype, PageShape};
use serde::{Deserialize, Serialize};

use crate::cli::{DtypeArg, ShapeArgs};
use crate::exit::{Outcome, WithOutcome};

/// A model's KV by name: layers, KV heads, head size, and the type that its weights come in.
pub(super) const SHAPES: &[(&str, Shape)] = &[
    ("llama-3.1-8b", Shape::new(32, 8, 128, KvDtype::Bf16)),
    ("llama-3.1-70b", Shape::new(80, 8, 128, KvDtype::Bf16)),
    ("llama-3.1-405b", Shape::new(126, 8, 128, KvDtype::Bf16)),
    ("llama-3.2-1b", Shape::new(16, 8, 64, KvDtype::Bf16)),
    ("llama-3.2-3b", Shape::new(28, 8, 128, KvDtype::Bf16)),
    ("llama-2-7b", Shape::new(32, 32, 128, KvDtype::F16)),
    ("mistral-7b", Shape::new(32, 8, 128, KvDtype::Bf16)),
    ("qwen2.5-7b", Shape::new(28, 4, 128, KvDtype::Bf16)),
    ("qwen2.5-72b", Shape::new(80, 8, 128, KvDtype::Bf16)),
    ("qwen3-0.6b", Shape::new(28, 8, 128, KvDtype::Bf16)),
    ("qwen3-8b", Shape::new(36, 8, 128, KvDtype::Bf16)),
    ("qwen3-32b", Shape::new(64, 8, 128, KvDtype::Bf16)),
    ("tinyllama-1.1b", Shape::new(22, 4, 64, KvDtype::Bf16)),
    ("smollm2-135m", Shape::new(30, 3, 64, KvDtype::Bf16)),
];

/// Bytes that a piece has a multiple of: two planes of two-byte elements.
const PIECE_STEP: usize = 4;

/// The heads of a piece: so many at most, of a size with so many bits. The engine takes no longer ones.
const HEADS_MAX: usize = 4096;
const HEAD_DIM_BITS_MAX: u32 = 10;

/// What one token's KV looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    dtype: KvDtype,
}

impl Shape {
    const fn new(layers: usize, kv_heads: usize, head_dim: usize, dtype: KvDtype) -> Self {
        Self {
            layers,
            kv_heads,
            head_dim,
            dtype,
        }
    }

    /// Bytes of one token's keys and values.
    fn token_bytes(&self) -> Option<usize> {
        [self.kv_heads, self.head_dim, 2, self.dtype.bytes()]
            .iter()
            .try_fold(self.layers, |bytes, factor| bytes.checked_mul(*factor))
            .filter(|bytes| *bytes > 0)
    }

    /// The named model with what replaces its numbers.
    ///
    /// # Errors
    /// When no model has the name, or a number is 0 or beyond any memory.
    pub(super) fn resolve(args: &ShapeArgs) -> anyhow::Result<(ShapeRecord, Self)> {
        let named = SHAPES
            .iter()
            .find(|(name, _)| *name == args.shape.to_lowercase());
        let (name, shape) = named
            .ok_or_else(|| unknown(&args.shape))
            .outcome(Outcome::Usage)?;
        let own = Self {
            layers: args.layers.unwrap_or(shape.layers),
            kv_heads: args.kv_heads.unwrap_or(shape.kv_heads),
            head_dim: args.head_dim.unwrap_or(shape.head_dim),
            dtype: args.dtype.map_or(shape.dtype, |dtype| match dtype {
                DtypeArg::Float32 => KvDtype::F32,
                DtypeArg::Float16 => KvDtype::F16,
                DtypeArg::Bfloat16 => KvDtype::Bf16,
            }),
        };
        if own.token_bytes().is_none() {
            return Err(anyhow!(
                "layers {}, kv-heads {} and head-dim {} make no kv",
                own.layers,
                own.kv_heads,
                own.head_dim
            ))
            .outcome(Outcome::Usage);
        }
        let record = ShapeRecord {
            name: if own == *shape { name } else { "custom" }.to_owned(),
            layers: own.layers,
            kv_heads: own.kv_heads,
            head_dim: own.head_dim,
            dtype: own.dtype.name().to_owned(),
        };
        Ok((record, own))
    }
}

fn unknown(name: &str) -> anyhow::Error {
    let known: Vec<&str> = SHAPES.iter().map(|(name, _)| *name).collect();
    // The nearest name is looked for among names that are written as configurations write theirs.
    let written: Vec<String> = known.iter().map(|name| name.replace('-', "_")).collect();
    let near = nearest(name, written.iter().map(String::as_str)).map(|near| near.replace('_', "-"));
    let guess = near.map_or_else(String::new, |near| format!("did you mean `{near}`? "));
    anyhow!(
        "no shape is called `{name}`\nhint: {guess}known are {}; or give --layers, --kv-heads, --head-dim and --dtype",
        known.join(", ")
    )
}

/// The shape in a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ShapeRecord {
    /// The model, or `custom`.
    pub(crate) name: String,
    /// Layers.
    pub(crate) layers: usize,
    /// KV heads.
    pub(crate) kv_heads: usize,
    /// Size of a head.
    pub(crate) head_dim: usize,
    /// Element type.
    pub(crate) dtype: String,
}

/// In which pieces a request's KV lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// Blocks of so many tokens, all layers together.
    Blocks {
        /// Tokens of a block.
        tokens: usize,
    },
    /// Scattered pieces of one size.
    Pieces {
        /// Bytes of a piece.
        bytes: usize,
    },
}

/// One request's KV as pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Geometry {
    /// `L` of a page.
    pub(crate) layers: usize,
    /// `K` of a page.
    pub(crate) kv_heads: usize,
    /// `P` of a page.
    pub(crate) tokens_per_block: usize,
    /// `D` of a page.
    pub(crate) head_dim: usize,
    /// Bytes of an element, 2 or 4.
    pub(crate) element_bytes: usize,
    /// Pages of a request.
    pub(crate) pages: usize,
}

impl Geometry {
    /// A request of so many tokens, in whole pages.
    ///
    /// # Errors
    /// When there is nothing to move, or more than any memory holds.
    pub(super) fn new(shape: &Shape, tokens: usize, cut: Cut) -> anyhow::Result<Self> {
        let wrong = |text: String| Err(anyhow!(text)).outcome(Outcome::Usage);
        let bytes = shape
            .token_bytes()
            .and_then(|bytes| bytes.checked_mul(tokens))
            .filter(|bytes| *bytes > 0 && *bytes <= isize::MAX.unsigned_abs());
        let Some(bytes) = bytes else {
            return wrong(format!("a request of {tokens} tokens has no kv to move"));
        };
        match cut {
            Cut::Blocks { tokens: 0 } => wrong("a block of 0 tokens holds no kv".to_owned()),
            Cut::Blocks { tokens: block } => Ok(Self {
                layers: shape.layers,
                kv_heads: shape.kv_heads,
                tokens_per_block: block,
                head_dim: shape.head_dim,
                element_bytes: shape.dtype.bytes(),
                pages: tokens.div_ceil(block),
            }),
            Cut::Pieces { bytes: piece } => Self::of_pieces(piece, bytes),
        }
    }

    /// A page's planes are of no interest here, so that it may have any size that can be multiplied together.
    fn of_pieces(piece: usize, bytes: usize) -> anyhow::Result<Self> {
        let elements = piece / PIECE_STEP;
        let head_dim = 1 << elements.trailing_zeros().min(HEAD_DIM_BITS_MAX);
        let kv_heads = elements / head_dim;
        if piece == 0 || !piece.is_multiple_of(PIECE_STEP) || kv_heads > HEADS_MAX {
            return Err(anyhow!(
                "a piece of {piece} bytes cannot be made\nhint: a multiple of {PIECE_STEP}; of {} above {} bytes",
                PIECE_STEP << HEAD_DIM_BITS_MAX,
                PIECE_STEP * HEADS_MAX
            ))
            .outcome(Outcome::Usage);
        }
        Ok(Self {
            layers: 1,
            kv_heads,
            tokens_per_block: 1,
            head_dim,
            element_bytes: 2,
            pages: bytes.div_ceil(piece),
        })
    }

    /// Shape of a page; `None` when the numbers, which may come from a peer, are nonsense.
    pub(super) fn page(&self) -> Option<PageShape> {
        let dtype = match self.element_bytes {
            2 => KvDtype::Bf16,
            4 => KvDtype::F32,
            _ => return None,
        };
        let factors = [
            self.kv_heads,
            self.tokens_per_block,
            self.head_dim,
            2,
            self.element_bytes,
            self.pages,
        ];
        factors
            .iter()
            .try_fold(self.layers, |bytes, factor| bytes.checked_mul(*factor))
            .filter(|bytes| *bytes > 0)?;
        Some(PageShape {
            layers: self.layers,
            kv_heads: self.kv_heads,
            tokens_per_block: self.tokens_per_block,
            head_dim: self.head_dim,
            dtype,
        })
    }

    /// Tokens that the hand-off is told of.
    pub(super) const fn token_count(&self) -> usize {
        self.pages * self.tokens_per_block
    }

    /// Bytes of one page.
    pub(crate) const fn page_bytes(&self) -> usize {
        self.layers * self.kv_heads * self.tokens_per_block * self.head_dim * 2 * self.element_bytes
    }

    /// Bytes of one request.
    pub(crate) const fn request_bytes(&self) -> usize {
        self.pages * self.page_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(name: &str) -> ShapeArgs {
        ShapeArgs::named(name)
    }

    #[test]
    fn eight_thousand_tokens_of_the_8b_model_are_a_gibibyte() {
        let (record, shape) = Shape::resolve(&args("Llama-3.1-8B")).unwrap();
        assert_eq!(record.name, "llama-3.1-8b");
        let blocks = Geometry::new(&shape, 8192, Cut::Blocks { tokens: 32 }).unwrap();
        assert_eq!(blocks.request_bytes(), 1 << 30);
        assert_eq!((blocks.pages, blocks.page_bytes()), (256, 4 << 20));
        let pieces = Geometry::new(&shape, 8192, Cut::Pieces { bytes: 65_536 }).unwrap();
        assert_eq!(pieces.request_bytes(), 1 << 30);
        assert_eq!((pieces.pages, pieces.page_bytes()), (16_384, 65_536));
        let page = pieces.page().unwrap();
        assert_eq!(page.bytes(), 65_536);
        for bytes in [4, 4092, 65_536, 1 << 20, 16 << 20] {
            let pieces = Geometry::new(&shape, 8192, Cut::Pieces { bytes }).unwrap();
            assert_eq!(pieces.page_bytes(), bytes);
        }
        assert_eq!(pieces.token_count(), 16_384 * page.tokens_per_block);
        assert_eq!(blocks.page().unwrap().bytes(), blocks.page_bytes());
    }

    #[test]
    fn numbers_replace_the_models() {
        let (record, shape) = Shape::resolve(&ShapeArgs {
            layers: Some(2),
            dtype: Some(DtypeArg::Float32),
            ..args("qwen3-8b")
        })
        .unwrap();
        assert_eq!((record.name.as_str(), record.layers), ("custom", 2));
        let odd = Geometry::new(&shape, 33, Cut::Blocks { tokens: 32 }).unwrap();
        assert_eq!(odd.pages, 2);
        assert_eq!(odd.page_bytes(), 2 * 2 * 8 * 32 * 128 * 4);
    }

    #[test]
    fn an_unknown_name_tells_the_nearest_and_all() {
        let error = Shape::resolve(&args("lama-3.1-8b"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("no shape is called `lama-3.1-8b`"),
            "{error}"
        );
        assert!(error.contains("did you mean `llama-3.1-8b`?"), "{error}");
        assert!(error.contains("qwen3-32b"), "{error}");
        let error = Shape::resolve(&args("zzz")).unwrap_err().to_string();
        assert!(!error.contains("did you mean"), "{error}");
    }

    #[test]
    fn what_makes_no_kv_is_refused() {
        let (_, shape) = Shape::resolve(&args("qwen3-8b")).unwrap();
        for (tokens, cut) in [
            (0, Cut::Blocks { tokens: 32 }),
            (usize::MAX, Cut::Blocks { tokens: 32 }),
            (1, Cut::Blocks { tokens: 0 }),
            (1, Cut::Pieces { bytes: 0 }),
            (1, Cut::Pieces { bytes: 65_537 }),
            (
                1,
                Cut::Pieces {
                    bytes: (64 << 10) + 4,
                },
            ),
        ] {
            assert!(
                Geometry::new(&shape, tokens, cut).is_err(),
                "{tokens} {cut:?}"
            );
        }
        let none = ShapeArgs {
            layers: Some(0),
            ..args("qwen3-8b")
        };
        assert!(Shape::resolve(&none).is_err());
        let nonsense = Geometry {
            layers: usize::MAX,
            kv_heads: 2,
            tokens_per_block: 1,
            head_dim: 1,
            element_bytes: 2,
            pages: 1,
        };
        assert_eq!(nonsense.page(), None);
    }
}

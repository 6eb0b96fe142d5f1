//! Launchers of attention: for single rows, for many, and for what neither of these kernels takes.

use super::{AttentionCall, Kernel, Ops, Parts, THREADS, WARP, grid, int, of_pages};
use crate::backend::cuda::driver::Args;
use crate::backend::cuda::error::CudaError;
use crate::backend::cuda::kernels::Source;
use crate::backend::cuda::step::TILE_ROWS;

/// Query heads of a decode block; `HEADS` in `attention_decode.cu`.
const DECODE_HEADS: usize = 8;
/// Rows and tokens of shared memory in a prefill block; `ROWS` and `TOKENS` in `attention_prefill.cu`.
const PREFILL_SHARED_ROWS: usize = TILE_ROWS + 2 * 64;
/// `D` of `attention_prefill_hopper.cu`.
const HOPPER_HEAD_DIM: usize = 128;
/// What its block has of shared memory: queries, two stages of keys and of values, each 128 rows, and as much as it takes to begin
/// at a multiple of 1,024 bytes.
const HOPPER_SHARED_BYTES: usize = 5 * TILE_ROWS * HOPPER_HEAD_DIM * 2 + 1024;

impl Ops {
    /// Attention of any kind, for all sequences of the step.
    pub(in super::super) fn attention_any(
        &mut self,
        call: &AttentionCall<'_>,
        sequences: usize,
        rows_max: usize,
    ) -> Result<(), CudaError> {
        let args = Args::default()
            .with(call.args())
            .with(int(call.heads))
            .with(int(sequences));
        let kernel = of_pages(Source::AttentionAny, "attention_any", call.pages.shape());
        let blocks = (rows_max * call.heads).div_ceil((THREADS / WARP) as usize);
        self.launch(&kernel, ([grid(blocks), grid(sequences), 1], THREADS), args)
    }

    /// Attention for sequences with many rows.
    pub(in super::super) fn attention_prefill(
        &mut self,
        call: &AttentionCall<'_>,
        tiles: usize,
    ) -> Result<(), CudaError> {
        let shape = call.pages.shape();
        assert!(call.is_fast(), "head size, type and alignment");
        let hopper = self.gpu.capability == (9, 0) && shape.head_dim == HOPPER_HEAD_DIM;
        // Heads whose blocks are neighbours: those of two kv heads, or of one.
        let span = match call.heads / shape.kv_heads {
            group if hopper && shape.kv_heads.is_multiple_of(2) => 2 * group,
            group if hopper => group,
            _ => 1,
        };
        let (source, name, threads, shared_bytes) = if hopper {
            (
                Source::AttentionPrefillHopper,
                "attention_prefill_hopper",
                12 * WARP,
                HOPPER_SHARED_BYTES,
            )
        } else {
            (
                Source::AttentionPrefill,
                "attention_prefill",
                4 * WARP,
                PREFILL_SHARED_ROWS * (shape.head_dim + 8) * 2,
            )
        };
        let kernel = Kernel {
            shared_bytes: grid(shared_bytes),
            ..of_pages(source, name, shape)
        };
        let args = Args::default().with(call.args()).with(call.step.tiles);
        let blocks = [grid(tiles * span), grid(call.heads / span), 1];
        self.launch(&kernel, (blocks, threads), args)
    }

    /// Attention for sequences with one row; `parts` has room for all splits.
    pub(in super::super) fn attention_decode(
        &mut self,
        call: &AttentionCall<'_>,
        parts: Parts,
        (sequences, splits): (usize, usize),
    ) -> Result<(), CudaError> {
        let shape = call.pages.shape();
        assert!(call.is_fast(), "head size, type and alignment");
        let tiles = (call.heads / shape.kv_heads).div_ceil(DECODE_HEADS);
        let kernel = of_pages(Source::AttentionDecode, "attention_decode", shape);
        let args = Args::default().with(call.args()).with(parts);
        let blocks = [grid(shape.kv_heads * tiles), grid(splits), grid(sequences)];
        self.launch(&kernel, (blocks, 4 * WARP), args)?;
        if splits == 1 {
            return Ok(());
        }
        let kernel = of_pages(Source::AttentionDecode, "attention_combine", shape);
        let args = Args::default()
            .with(call.args())
            .with(parts)
            .with(int(splits));
        let blocks = [grid(call.heads), grid(sequences), 1];
        self.launch(&kernel, (blocks, grid(shape.head_dim)), args)
    }
}

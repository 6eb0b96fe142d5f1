//! What the kernels are given, in the form in which they declare it, and what a call of attention is.

use super::{WINDOW_NONE, int, long};
use crate::backend::cuda::driver::DevicePtr;
use crate::backend::cuda::pages::Pages;
use crate::backend::cuda::tensor::CudaTensor;
use crate::page::KvDtype;

/// Where a step's lists are on the device.
#[derive(Debug, Clone, Copy, Default)]
pub(in super::super) struct StepAddresses {
    pub(in super::super) positions: DevicePtr,
    pub(in super::super) row_blocks: DevicePtr,
    pub(in super::super) first_rows: DevicePtr,
    pub(in super::super) row_counts: DevicePtr,
    pub(in super::super) past_lens: DevicePtr,
    pub(in super::super) block_starts: DevicePtr,
    pub(in super::super) blocks: DevicePtr,
    pub(in super::super) decodes: DevicePtr,
    pub(in super::super) tiles: DevicePtr,
}

/// Rotation of a model's heads.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Rotation {
    /// `[D / 2]` f32.
    pub(in super::super) inverse: DevicePtr,
    pub(in super::super) half: usize,
    pub(in super::super) magnitude: f32,
    pub(in super::super) adjacent: bool,
}

/// What the attention kernels share: `Attention` in `attention.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
pub(in super::super) struct AttentionArgs {
    q: DevicePtr,
    ld_q: i32,
    padding_q: i32,
    out: DevicePtr,
    ld_out: i32,
    padding_out: i32,
    pages: DevicePtr,
    page_len: i64,
    first_rows: DevicePtr,
    row_counts: DevicePtr,
    past_lens: DevicePtr,
    block_starts: DevicePtr,
    blocks: DevicePtr,
    layer: i32,
    kv_heads: i32,
    group: i32,
    scale: f32,
    window: i32,
    value_scale: f32,
}

/// `KvTarget` in `rope.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
pub(super) struct KvTarget {
    pub(super) pages: DevicePtr,
    pub(super) page_len: i64,
    pub(super) row_blocks: DevicePtr,
    pub(super) positions: DevicePtr,
    pub(super) layer: i32,
    pub(super) kv_heads: i32,
    pub(super) key_inverse: f32,
    pub(super) value_inverse: f32,
}

/// `Parts` in `attention_decode.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
pub(in super::super) struct Parts {
    /// `[S, H, splits, D]` f32, unless there is one split.
    pub(in super::super) sums: DevicePtr,
    /// `[S, H, splits, 2]` f32, likewise.
    pub(in super::super) stats: DevicePtr,
    /// Sequences to decode.
    pub(in super::super) sequences: DevicePtr,
}

/// One layer's attention.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct AttentionCall<'a> {
    pub(in super::super) q: &'a CudaTensor,
    pub(in super::super) out: &'a CudaTensor,
    pub(in super::super) pages: &'a Pages,
    pub(in super::super) step: &'a StepAddresses,
    pub(in super::super) layer: usize,
    pub(in super::super) heads: usize,
    pub(in super::super) scale: f32,
    pub(in super::super) window: Option<usize>,
}

impl AttentionCall<'_> {
    pub(super) fn args(&self) -> AttentionArgs {
        let shape = self.pages.shape();
        let width = self.heads * shape.head_dim;
        assert_eq!(self.q.cols, width, "columns of q");
        assert_eq!(
            (self.out.rows, self.out.cols),
            (self.q.rows, width),
            "shape of out"
        );
        assert!(self.heads.is_multiple_of(shape.kv_heads), "heads in groups");
        assert!(
            self.layer < shape.layers,
            "layer {} is in the page",
            self.layer
        );
        let (step, scale) = (self.step, self.pages.scale(self.layer));
        AttentionArgs {
            q: self.q.address(),
            ld_q: int(self.q.ld),
            padding_q: 0,
            out: self.out.address(),
            ld_out: int(self.out.ld),
            padding_out: 0,
            pages: self.pages.memory().address(),
            page_len: long(self.pages.stride_len()),
            first_rows: step.first_rows,
            row_counts: step.row_counts,
            past_lens: step.past_lens,
            block_starts: step.block_starts,
            blocks: step.blocks,
            layer: int(self.layer),
            kv_heads: int(shape.kv_heads),
            group: int(self.heads / shape.kv_heads),
            scale: self.scale * scale.key * std::f32::consts::LOG2_E,
            window: self
                .window
                .map_or(WINDOW_NONE, |window| int(window).min(WINDOW_NONE)),
            value_scale: scale.value,
        }
    }

    pub(super) fn is_aligned(&self) -> bool {
        let aligned = |tensor: &CudaTensor| {
            tensor.ld.is_multiple_of(8) && tensor.address().is_multiple_of(16)
        };
        aligned(self.q) && aligned(self.out)
    }

    /// Whether the tensor cores' kernels take this: one for many rows, one for single ones.
    pub(in super::super) fn is_fast(&self) -> bool {
        let shape = self.pages.shape();
        matches!(shape.head_dim, 64 | 128) && shape.dtype != KvDtype::F32 && self.is_aligned()
    }
}

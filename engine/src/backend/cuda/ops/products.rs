//! Launchers of our own products, and of rounding for those in 8 bits.

use super::{Ops, THREADS, WARP, grid, int, plain, row_threads};
use crate::backend::cuda::driver::{Args, DevicePtr};
use crate::backend::cuda::error::CudaError;
use crate::backend::cuda::kernels::Source;
use crate::backend::cuda::linear::Product;
use crate::backend::cuda::tensor::CudaTensor;

/// Output features of a warp and tokens of a block; `ROWS` and `TOKENS` in `linear.cu` and `linear_e4m3.cu`.
const LINEAR_ROWS: usize = 2;
const LINEAR_TOKENS: usize = 4;

impl Ops {
    /// `to = x / scales`, a scale a row: what the library multiplies with weights in 8 bits. `to` and `scales` have room for all.
    pub(in super::super) fn quantize(
        &mut self,
        x: &CudaTensor,
        to: DevicePtr,
        scales: DevicePtr,
    ) -> Result<(), CudaError> {
        assert!(
            x.cols.is_multiple_of(16) && x.ld.is_multiple_of(8),
            "alignment of x"
        );
        assert!(x.address().is_multiple_of(16), "alignment of x");
        let args = Args::default()
            .with(x.address())
            .with(int(x.ld))
            .with(to)
            .with(scales)
            .with(int(x.cols));
        let kernel = plain(Source::Quantize, "quantize_e4m3");
        let shape = ([grid(x.rows), 1, 1], row_threads(x.cols));
        self.launch(&kernel, shape, args)
    }

    /// A product for few tokens, or of a shape that the library does not take. With scales, of its rows, the weight is in 8 bits; x
    /// is not.
    pub(in super::super) fn linear(
        &mut self,
        product: &Product,
        scales: Option<DevicePtr>,
    ) -> Result<(), CudaError> {
        let shape = &product.shape;
        let (source, name) = match (scales, shape.wide) {
            (None, false) => (Source::Linear, "linear_bf16"),
            (None, true) => (Source::Linear, "linear_f32"),
            (Some(_), false) => (Source::LinearE4m3, "linear_e4m3_bf16"),
            (Some(_), true) => (Source::LinearE4m3, "linear_e4m3_f32"),
        };
        let mut args = Args::default()
            .with(product.x)
            .with(int(shape.ld_x))
            .with(product.weight);
        if let Some(scales) = scales {
            assert!(
                shape.cols.is_multiple_of(16)
                    && shape.ld_x.is_multiple_of(8)
                    && product.x.is_multiple_of(16),
                "alignment of x"
            );
            args = args.with(scales);
        }
        let args = args
            .with(product.bias.unwrap_or(0))
            .with(product.out)
            .with(int(shape.ld_out))
            .with(int(shape.tokens))
            .with(int(shape.rows))
            .with(int(shape.cols));
        let warps = shape.rows.div_ceil(LINEAR_ROWS);
        let blocks = warps.div_ceil((THREADS / WARP) as usize);
        let grid = [grid(blocks), grid(shape.tokens.div_ceil(LINEAR_TOKENS)), 1];
        self.launch(&plain(source, name), (grid, THREADS), args)
    }
}

//! Launchers of our own products, and of rounding for those in 8 bits.

use super::{Ops, THREADS, WARP, grid, int, plain, row_threads};
use crate::backend::cuda::ROUNDED_COLS_MAX;
use crate::backend::cuda::driver::{Args, DevicePtr};
use crate::backend::cuda::error::CudaError;
use crate::backend::cuda::kernels::Source;
use crate::backend::cuda::linear::Product;
use crate::backend::cuda::tensor::{CudaTensor, Rounded};
use crate::backend::cuda::weight::CudaWeight;

/// Output features of a warp and tokens of a block; `ROWS` and `TOKENS` in `linear.cu` and `linear_e4m3.cu`.
const LINEAR_ROWS: usize = 2;
const LINEAR_TOKENS: usize = 4;
/// Output features of a block, and what columns are a multiple of; `FEATURES` and `SPAN` in `linear_rows_e4m3.cu`.
const FEW_FEATURES: usize = 16;
const FEW_SPAN: usize = 128;

impl Ops {
    /// `to = x / scales`, a scale a row: what products with weights in 8 bits take.
    pub(in super::super) fn quantize(
        &mut self,
        x: &CudaTensor,
        to: &Rounded,
    ) -> Result<(), CudaError> {
        check_rounded(x, to);
        let args = Args::default()
            .with(x.address())
            .with(int(x.ld))
            .with(to.values.address())
            .with(to.scales.address())
            .with(int(x.cols));
        let kernel = plain(Source::Quantize, "quantize_e4m3");
        let shape = ([grid(x.rows), 1, 1], row_threads(x.cols));
        self.launch(&kernel, shape, args)
    }

    /// As `rms_norm`, or `add_rms_norm` where there is a y, with a result in 8 bits.
    pub(in super::super) fn norm_rounding(
        &mut self,
        (x, y): (&CudaTensor, Option<&CudaTensor>),
        weight: &CudaWeight,
        epsilon: f32,
        to: &Rounded,
    ) -> Result<(), CudaError> {
        assert_eq!((weight.rows, weight.cols), (1, x.cols), "shape of weight");
        assert!(x.cols <= ROUNDED_COLS_MAX, "a row that a block holds");
        check_rounded(x, to);
        if let Some(y) = y {
            assert_eq!((y.rows, y.cols), (x.rows, x.cols), "shape of y");
            check_rounded(y, to);
        }
        let args = Args::default()
            .with(x.address())
            .with(int(x.ld))
            .with(y.map_or(0, CudaTensor::address))
            .with(int(y.map_or(0, |y| y.ld)))
            .with(weight.address())
            .with(to.values.address())
            .with(to.scales.address())
            .with(int(x.cols))
            .with(epsilon);
        let kernel = plain(Source::RmsNorm, "norm_e4m3");
        let shape = ([grid(x.rows), 1, 1], row_threads(x.cols));
        self.launch(&kernel, shape, args)
    }

    /// `to = silu(gate) * up` in 8 bits.
    pub(in super::super) fn silu_mul_rounding(
        &mut self,
        gate: &CudaTensor,
        up: &CudaTensor,
        to: &Rounded,
    ) -> Result<(), CudaError> {
        assert_eq!((gate.rows, gate.cols), (up.rows, up.cols), "shapes of both");
        assert!(gate.cols <= ROUNDED_COLS_MAX, "a row that a block holds");
        check_rounded(gate, to);
        check_rounded(up, to);
        let args = Args::default()
            .with(gate.address())
            .with(int(gate.ld))
            .with(up.address())
            .with(int(up.ld))
            .with(to.values.address())
            .with(to.scales.address())
            .with(int(gate.cols));
        let kernel = plain(Source::Elementwise, "silu_mul_e4m3");
        let shape = ([grid(gate.rows), 1, 1], row_threads(gate.cols));
        self.launch(&kernel, shape, args)
    }

    /// A product of few tokens, both sides in 8 bits. False where the library's is as fast, or the kernel does not take it.
    pub(in super::super) fn linear_rows(&mut self, product: &Product) -> Result<bool, CudaError> {
        let shape = &product.shape;
        let Some([scales, x_scales]) = product.scales else {
            return Ok(false);
        };
        let takes = !shape.wide
            && shape.ld_x == shape.cols
            && shape.cols.is_multiple_of(FEW_SPAN)
            && shape.rows.is_multiple_of(FEW_FEATURES);
        let blocks = shape.rows / FEW_FEATURES;
        // x is read by every block: beyond 16 tokens that costs more than it gains, unless all blocks run at once.
        let name = match shape.tokens {
            ..=8 => "linear_rows_e4m3_8",
            9..=16 => "linear_rows_e4m3_16",
            17..=32 if blocks <= 2 * self.gpu.processors => "linear_rows_e4m3_32",
            _ => return Ok(false),
        };
        if !takes {
            return Ok(false);
        }
        let args = Args::default()
            .with(product.x)
            .with(x_scales)
            .with(product.weight)
            .with(scales)
            .with(product.bias.unwrap_or(0))
            .with(product.out)
            .with(int(shape.ld_out))
            .with(int(shape.tokens))
            .with(int(shape.cols));
        let kernel = plain(Source::LinearRowsE4m3, name);
        self.launch(&kernel, ([grid(blocks), 1, 1], 8 * WARP), args)?;
        Ok(true)
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
            (None, false) => (Source::Linear, "linear_act"),
            (None, true) => (Source::Linear, "linear_f32"),
            (Some(_), false) => (Source::LinearE4m3, "linear_e4m3_act"),
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

/// What the kernels that round rely on.
fn check_rounded(x: &CudaTensor, to: &Rounded) {
    assert!(
        x.cols.is_multiple_of(16) && x.ld.is_multiple_of(8) && x.address().is_multiple_of(16),
        "alignment of x"
    );
    assert!(x.rows * x.cols <= to.values.memory().bytes(), "room for x");
    assert!(x.rows * 4 <= to.scales.memory().bytes(), "room for scales");
}

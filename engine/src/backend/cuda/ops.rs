//! One launcher for each kernel: it checks what the kernel relies on, then puts it on the stream.

#![expect(unsafe_code, reason = "launching a kernel hands it addresses")]

mod arguments;
mod attention;
mod products;

use std::sync::Arc;

use arguments::KvTarget;
pub(super) use arguments::{AttentionCall, Parts, Rotation, StepAddresses};

use super::driver::{Args, DevicePtr, Gpu, LaunchShape};
use super::error::CudaError;
use super::kernels::{Kernel, Kernels, Source, Variant};
use super::pages::Pages;
use super::tensor::CudaTensor;
use super::weight::CudaWeight;
use crate::backend::{ActivationDtype, TokenId};
use crate::page::PageShape;

/// Threads of a block where nothing asks for another number.
const THREADS: u32 = 256;
/// Threads of a warp.
const WARP: u32 = 32;
/// Blocks of a grid-stride loop, per multiprocessor.
const BLOCKS_PER_PROCESSOR: usize = 16;
/// Most blocks along a grid's second dimension; a loop does the rest.
const ROW_BLOCKS_MAX: usize = 65_535;
/// Windows beyond every position: no window.
const WINDOW_NONE: i32 = 1 << 30;

fn int(value: usize) -> i32 {
    i32::try_from(value).expect("sizes of one call fit 31 bits")
}

fn long(value: usize) -> i64 {
    i64::try_from(value).expect("sizes fit 63 bits")
}

fn grid(value: usize) -> u32 {
    u32::try_from(value).expect("grids fit 32 bits")
}

const fn plain(source: Source, name: &'static str) -> Kernel {
    Kernel {
        source,
        variant: Variant {
            head_dim: 0,
            pages: None,
        },
        name,
        shared_bytes: 0,
    }
}

/// The launchers.
#[derive(Debug)]
pub(super) struct Ops {
    gpu: Arc<Gpu>,
    kernels: Kernels,
}

impl Ops {
    pub(super) fn new(gpu: &Arc<Gpu>, activations: ActivationDtype) -> Result<Self, CudaError> {
        let kernels = Kernels::of(gpu, activations);
        kernels.check()?;
        Ok(Self {
            gpu: Arc::clone(gpu),
            kernels,
        })
    }

    fn launch(
        &mut self,
        kernel: &Kernel,
        (grid, threads): ([u32; 3], u32),
        mut args: Args,
    ) -> Result<(), CudaError> {
        let function = self.kernels.get(kernel)?;
        let shape = LaunchShape {
            grid,
            threads,
            shared_bytes: kernel.shared_bytes,
        };
        // SAFETY: every launcher below checks the shapes of what it passes, so that the kernel stays within tensors, weights and
        // pages, which live until the stream has passed because they are given back to pools of the same stream.
        unsafe { self.gpu.launch(function, shape, &mut args) }
    }

    /// The grid of a loop over so many elements.
    fn stride_grid(&self, elements: usize) -> [u32; 3] {
        let blocks = elements.div_ceil(THREADS as usize);
        let most = self.gpu.processors * BLOCKS_PER_PROCESSOR;
        [grid(blocks.min(most)), 1, 1]
    }

    /// `out[t] = table[tokens[t] - first]`, zeros where the table has no such row.
    pub(super) fn embed(
        &mut self,
        (table, first): (&CudaWeight, TokenId),
        tokens: DevicePtr,
        out: &CudaTensor,
    ) -> Result<(), CudaError> {
        assert_eq!(out.cols, table.cols, "columns of out and table");
        let args = Args::default()
            .with(table.address())
            .with(tokens)
            .with(out.address())
            .with(int(out.cols))
            .with(int(out.ld))
            .with(first)
            .with(int(table.rows));
        let kernel = plain(Source::Embed, "embed");
        self.launch(&kernel, ([grid(out.rows), 1, 1], THREADS), args)
    }

    /// `out[i] = x[rows[i]]`; the rows have been checked.
    pub(super) fn select_rows(
        &mut self,
        x: &CudaTensor,
        rows: DevicePtr,
        out: &CudaTensor,
    ) -> Result<(), CudaError> {
        assert_eq!(out.cols, x.cols, "columns of out and x");
        let args = Args::default()
            .with(x.address())
            .with(int(x.ld))
            .with(rows)
            .with(out.address())
            .with(int(out.ld))
            .with(int(out.cols));
        let kernel = plain(Source::SelectRows, "select_rows");
        self.launch(&kernel, ([grid(out.rows), 1, 1], THREADS), args)
    }

    /// A token for each row of a wide tensor: there are as many draws, and `tokens` has room for as many.
    pub(super) fn choose(
        &mut self,
        x: &CudaTensor,
        draws: DevicePtr,
        tokens: DevicePtr,
    ) -> Result<(), CudaError> {
        assert!(draws.is_multiple_of(8), "draws are aligned");
        assert!(x.wide && x.cols > 0, "logits are wide");
        let args = Args::default()
            .with(x.address())
            .with(int(x.ld))
            .with(draws)
            .with(tokens)
            .with(int(x.cols));
        let kernel = plain(Source::Choose, "choose_f32");
        self.launch(&kernel, ([grid(x.rows), 1, 1], 1024), args)
    }

    /// Tokens that the step before chose, in the places of those rows that go on with them; lists of `rows` each.
    pub(super) fn carry(
        &mut self,
        carried: DevicePtr,
        chosen: DevicePtr,
        tokens: DevicePtr,
        rows: usize,
    ) -> Result<(), CudaError> {
        let args = Args::default()
            .with(carried)
            .with(chosen)
            .with(tokens)
            .with(int(rows));
        let blocks = [grid(rows.div_ceil(THREADS as usize)), 1, 1];
        self.launch(&plain(Source::Carry, "carry_u32"), (blocks, THREADS), args)
    }

    /// Activations as dense f32; `values` has room for all.
    pub(super) fn widen(&mut self, x: &CudaTensor, values: DevicePtr) -> Result<(), CudaError> {
        let count = x.rows * x.cols;
        let args = Args::default()
            .with(x.address())
            .with(int(x.ld))
            .with(values)
            .with(int(x.cols))
            .with(long(count));
        let kernel = plain(Source::Convert, "act_to_f32");
        let grid = self.stride_grid(count);
        self.launch(&kernel, (grid, THREADS), args)
    }

    /// The reverse.
    pub(super) fn narrow(&mut self, values: DevicePtr, x: &CudaTensor) -> Result<(), CudaError> {
        let count = x.rows * x.cols;
        let args = Args::default()
            .with(values)
            .with(x.address())
            .with(int(x.ld))
            .with(int(x.cols))
            .with(long(count));
        let kernel = plain(Source::Convert, "f32_to_act");
        let grid = self.stride_grid(count);
        self.launch(&kernel, (grid, THREADS), args)
    }

    /// `weight[r, c] = pattern[(first + r * stride + c) mod period]`.
    pub(super) fn pattern(
        &mut self,
        (pattern, period): (DevicePtr, usize),
        weight: &CudaWeight,
        (first, stride): (usize, usize),
    ) -> Result<(), CudaError> {
        assert!(period > 0, "a pattern has elements");
        let count = weight.rows * weight.cols;
        let args = Args::default()
            .with(pattern)
            .with(int(period))
            .with(weight.address())
            .with(long(first))
            .with(long(stride))
            .with(int(weight.cols))
            .with(long(count));
        let name = match weight.scales() {
            Some(_) => "pattern_e4m3",
            None => "pattern_act",
        };
        let kernel = plain(Source::Pattern, name);
        let grid = self.stride_grid(count);
        self.launch(&kernel, (grid, THREADS), args)
    }

    /// `out = norm(x)`.
    pub(super) fn rms_norm(
        &mut self,
        x: &CudaTensor,
        weight: &CudaWeight,
        epsilon: f32,
        out: &CudaTensor,
    ) -> Result<(), CudaError> {
        assert_eq!((weight.rows, weight.cols), (1, x.cols), "shape of weight");
        assert_eq!((out.rows, out.cols), (x.rows, x.cols), "shape of out");
        let args = Args::default()
            .with(x.address())
            .with(int(x.ld))
            .with(weight.address())
            .with(out.address())
            .with(int(out.ld))
            .with(int(x.cols))
            .with(epsilon);
        let kernel = plain(Source::RmsNorm, "rms_norm");
        let shape = ([grid(x.rows), 1, 1], row_threads(x.cols));
        self.launch(&kernel, shape, args)
    }

    /// `x += y`, `out = norm(x)`.
    pub(super) fn add_rms_norm(
        &mut self,
        (x, y): (&CudaTensor, &CudaTensor),
        weight: &CudaWeight,
        epsilon: f32,
        out: &CudaTensor,
    ) -> Result<(), CudaError> {
        assert_eq!((weight.rows, weight.cols), (1, x.cols), "shape of weight");
        assert_eq!((y.rows, y.cols), (x.rows, x.cols), "shape of y");
        assert_eq!((out.rows, out.cols), (x.rows, x.cols), "shape of out");
        let args = Args::default()
            .with(x.address())
            .with(int(x.ld))
            .with(y.address())
            .with(int(y.ld))
            .with(weight.address())
            .with(out.address())
            .with(int(out.ld))
            .with(int(x.cols))
            .with(epsilon);
        let kernel = plain(Source::RmsNorm, "add_rms_norm");
        let shape = ([grid(x.rows), 1, 1], row_threads(x.cols));
        self.launch(&kernel, shape, args)
    }

    /// Norm of each head in place.
    pub(super) fn head_norm(
        &mut self,
        x: &CudaTensor,
        weight: &CudaWeight,
        epsilon: f32,
    ) -> Result<(), CudaError> {
        assert_eq!(weight.rows, 1, "weight is a vector");
        assert!(x.cols.is_multiple_of(weight.cols), "columns of x in heads");
        let heads = x.cols / weight.cols;
        let args = Args::default()
            .with(x.address())
            .with(int(x.ld))
            .with(weight.address())
            .with(int(heads))
            .with(int(weight.cols))
            .with(int(x.rows))
            .with(epsilon);
        let kernel = plain(Source::RmsNorm, "head_norm");
        let blocks = (x.rows * heads).div_ceil((THREADS / WARP) as usize);
        self.launch(&kernel, ([grid(blocks), 1, 1], THREADS), args)
    }

    /// `x += y`, or `x = silu(x) * y`.
    pub(super) fn elementwise(
        &mut self,
        name: &'static str,
        x: &CudaTensor,
        y: &CudaTensor,
    ) -> Result<(), CudaError> {
        assert_eq!((x.rows, x.cols), (y.rows, y.cols), "shapes of both");
        let args = Args::default()
            .with(x.address())
            .with(int(x.ld))
            .with(y.address())
            .with(int(y.ld))
            .with(int(x.cols))
            .with(int(x.rows));
        let each = if x.cols.is_multiple_of(8) { 8 } else { 1 };
        let blocks = (x.cols / each).div_ceil(THREADS as usize);
        let shape = [grid(blocks), grid(x.rows.min(ROW_BLOCKS_MAX)), 1];
        self.launch(&plain(Source::Elementwise, name), (shape, THREADS), args)
    }

    /// Rotates heads in place.
    pub(super) fn rope(
        &mut self,
        x: &CudaTensor,
        positions: DevicePtr,
        rotation: &Rotation,
    ) -> Result<(), CudaError> {
        let dim = 2 * rotation.half;
        assert!(x.cols.is_multiple_of(dim), "columns of x in heads");
        let args = Args::default()
            .with(x.address())
            .with(int(x.ld))
            .with(int(x.cols / dim))
            .with(positions)
            .with(rotation.inverse)
            .with(rotation.magnitude)
            .with(i32::from(rotation.adjacent));
        let kernel = Kernel {
            variant: Variant::of_heads(dim),
            ..plain(Source::Rope, "rope")
        };
        self.launch(&kernel, ([grid(x.rows), 1, 1], THREADS), args)
    }

    /// Writes keys and values to their pages.
    pub(super) fn write_kv(
        &mut self,
        (pages, layer): (&Pages, usize),
        step: &StepAddresses,
        (k, v): (&CudaTensor, &CudaTensor),
    ) -> Result<(), CudaError> {
        let target = kv_target(pages, layer, step, k, v);
        let args = Args::default()
            .with(target)
            .with(k.address())
            .with(int(k.ld))
            .with(v.address())
            .with(int(v.ld));
        let kernel = of_pages(Source::Rope, "write_kv", pages.shape());
        self.launch(&kernel, ([grid(k.rows), 1, 1], THREADS), args)
    }

    /// Rotates queries in place, and keys on their way to the pages.
    pub(super) fn rope_write_kv(
        &mut self,
        (pages, layer): (&Pages, usize),
        step: &StepAddresses,
        (q, k, v): (&CudaTensor, &CudaTensor, &CudaTensor),
        rotation: &Rotation,
    ) -> Result<(), CudaError> {
        let target = kv_target(pages, layer, step, k, v);
        let dim = pages.shape().head_dim;
        assert_eq!(2 * rotation.half, dim, "angles of a head");
        assert_eq!((q.rows, q.cols % dim), (k.rows, 0), "shape of q");
        let args = Args::default()
            .with(target)
            .with(q.address())
            .with(int(q.ld))
            .with(int(q.cols / dim))
            .with(k.address())
            .with(int(k.ld))
            .with(v.address())
            .with(int(v.ld))
            .with(rotation.inverse)
            .with(rotation.magnitude)
            .with(i32::from(rotation.adjacent));
        let kernel = of_pages(Source::Rope, "rope_write_kv", pages.shape());
        self.launch(&kernel, ([grid(k.rows), 1, 1], THREADS), args)
    }
}

const fn of_pages(source: Source, name: &'static str, shape: &PageShape) -> Kernel {
    Kernel {
        source,
        variant: Variant::of_pages(shape),
        name,
        shared_bytes: 0,
    }
}

/// Threads of a block that has one row.
fn row_threads(cols: usize) -> u32 {
    grid(
        cols.div_ceil(8)
            .next_multiple_of(WARP as usize)
            .clamp(64, 1024),
    )
}

fn kv_target(
    pages: &Pages,
    layer: usize,
    step: &StepAddresses,
    k: &CudaTensor,
    v: &CudaTensor,
) -> KvTarget {
    let shape = pages.shape();
    let width = shape.kv_heads * shape.head_dim;
    assert_eq!(k.cols, width, "columns of k");
    assert_eq!((v.rows, v.cols), (k.rows, width), "shape of v");
    assert!(layer < shape.layers, "layer {layer} is not in the page");
    KvTarget {
        pages: pages.memory().address(),
        page_len: long(pages.stride_len()),
        row_blocks: step.row_blocks,
        positions: step.positions,
        layer: int(layer),
        kv_heads: int(shape.kv_heads),
    }
}

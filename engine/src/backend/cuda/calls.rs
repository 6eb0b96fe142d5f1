//! What several of the backend's operations share: remembering failures, memory for results, products, choosing, attention.
//!
//! Invariant: after the first failure nothing more is put on the stream, and the step says what it was.

use super::*;

impl CudaBackend {
    /// Opens the first device that this process may see, and the libraries.
    ///
    /// # Errors
    /// When there is none, it is too old, or a library is missing; each says what to do.
    pub fn open() -> Result<Self, CudaError> {
        let gpu = Gpu::open()?;
        let pool = Pool::new(&gpu);
        let activations = ActivationDtype::Bf16;
        Ok(Self {
            failure: RefCell::default(),
            graphs: Graphs::default(),
            ranks: None,
            activations,
            ops: RefCell::new(Ops::new(&gpu, activations)?),
            linear: RefCell::new(Linear::open(&gpu, activations)?),
            store: WeightStore::new(activations),
            pages: None,
            frequencies: RefCell::default(),
            staging: Staging::new(&gpu)?,
            tokens: pool.take(ROWS_MAX * 4)?,
            flights: Flights::default(),
            wide: RefCell::default(),
            landing: RefCell::default(),
            pool,
            gpu,
        })
    }

    /// Does something unless something has failed before, and remembers if it fails.
    pub(super) fn attempt(&self, what: &'static str, act: impl FnOnce() -> Result<(), CudaError>) {
        if self.failure.borrow().is_some() {
            return;
        }
        if let Err(error) = act() {
            self.failure.replace(Some(error.of(what)));
        }
    }

    /// A dense tensor in what `take` gives.
    pub(super) fn new_tensor(
        &self,
        (rows, cols, wide): (usize, usize, bool),
        take: impl FnOnce(usize) -> Result<Arc<Buffer>, CudaError>,
    ) -> CudaTensor {
        let mut tensor = CudaTensor {
            rows,
            cols,
            ld: cols,
            wide,
            offset: 0,
            buffer: None,
            rounded: None,
        };
        self.attempt("activations", || {
            tensor.buffer = Some(take(rows * cols * tensor.element_bytes())?);
            Ok(())
        });
        tensor
    }

    /// The buffer of wide tensors, made larger where it is too small. Recordings keep the one that they were made with.
    pub(super) fn wide_buffer(&self, bytes: usize) -> Result<Arc<Buffer>, CudaError> {
        let mut wide = self.wide.borrow_mut();
        let fitting = wide.as_ref().filter(|held| held.memory().bytes() >= bytes);
        let buffer = match fitting {
            Some(held) => Arc::clone(held),
            None => Arc::new(self.pool.take(bytes.next_power_of_two())?),
        };
        *wide = Some(Arc::clone(&buffer));
        Ok(buffer)
    }

    pub(super) const fn pages(&self) -> &Pages {
        self.pages
            .as_ref()
            .expect("pages are allocated before the first step")
    }

    pub(super) const fn pages_mut(&mut self) -> &mut Pages {
        self.pages
            .as_mut()
            .expect("pages are allocated before the first step")
    }

    /// A step's lists on the device: those of the step that is under way, or uploaded for this call.
    pub(super) fn on_device(&self, batch: &StepBatch) -> Result<OnDevice, CudaError> {
        let per_block = self.pages().shape().tokens_per_block;
        self.staging.of_batch(&self.pool, batch, per_block)
    }

    pub(super) fn rotation(&self, table: &RopeTable) -> Result<Rotation, CudaError> {
        let mut last = self.frequencies.borrow_mut();
        let same = last.as_ref().filter(|(held, _)| held == table);
        let buffer = match same {
            Some((_, buffer)) => Arc::clone(buffer),
            None => {
                let bytes = bytemuck::cast_slice(&table.inverse_frequencies);
                let buffer = Arc::new(self.pool.take(bytes.len())?);
                self.gpu.upload(buffer.memory(), 0, bytes)?;
                *last = Some((table.clone(), Arc::clone(&buffer)));
                buffer
            }
        };
        Ok(Rotation {
            inverse: buffer.address(),
            half: table.inverse_frequencies.len(),
            magnitude: table.magnitude,
            adjacent: table.pairing == RopePairing::Adjacent,
        })
    }

    /// `out = x · weightᵀ + bias`, where `rows` features of `out` follow each other from `out`'s first column on.
    pub(super) fn product(
        &self,
        x: &CudaTensor,
        (weight, bias): (&CudaWeight, Option<&CudaWeight>),
        (out, rows): (&CudaTensor, usize),
    ) -> Result<(), CudaError> {
        assert_eq!(x.cols, weight.cols, "columns of x and weight");
        assert_eq!(x.rows, out.rows, "rows of x and out");
        assert!(!x.wide, "x has the activations' type");
        let in_8_bits = weight.scales().is_some();
        assert!(x.rounded.is_none() || in_8_bits, "x is for other weights");
        if x.rows == 0 || rows == 0 {
            return Ok(());
        }
        let product = Product {
            x: x.address(),
            weight: weight.address(),
            bias: bias.map(CudaWeight::address),
            out: out.address(),
            scales: None,
            shape: ProductShape {
                tokens: x.rows,
                cols: x.cols,
                rows,
                ld_x: x.ld,
                ld_out: out.ld,
                wide: out.wide,
            },
        };
        if let Some(scales) = weight.scales() {
            return self.product_8_bit(x, product, scales);
        }
        let few = x.rows <= FEW_TOKENS_MAX;
        if !few && self.linear.borrow_mut().run(&product)? {
            return Ok(());
        }
        self.ops.borrow_mut().linear(&product, None)
    }

    /// The same with a weight in 8 bits. All but the fewest rows of x are multiplied in 8 bits as well.
    fn product_8_bit(
        &self,
        x: &CudaTensor,
        product: Product,
        scales: DevicePtr,
    ) -> Result<(), CudaError> {
        if x.rows > FEW_TOKENS_MAX_8_BIT {
            let rounded = match &x.rounded {
                Some(rounded) => Arc::clone(rounded),
                None => {
                    let rounded = self.rounded(x)?;
                    self.ops.borrow_mut().quantize(x, &rounded)?;
                    Arc::new(rounded)
                }
            };
            let narrow = Product {
                x: rounded.values.address(),
                scales: Some([scales, rounded.scales.address()]),
                shape: ProductShape {
                    ld_x: x.cols,
                    ..product.shape
                },
                ..product
            };
            let own = self.ops.borrow_mut().linear_rows(&narrow)?;
            if own || self.linear.borrow_mut().run(&narrow)? {
                return Ok(());
            }
            if x.rounded.is_some() {
                return Err(CudaError::Call {
                    call: "cublasLtMatmulAlgoGetHeuristic",
                    status: format!("nothing multiplies 8 bits of {:?}", narrow.shape),
                });
            }
        }
        self.ops.borrow_mut().linear(&product, Some(scales))
    }

    /// Room for x in 8 bits.
    pub(super) fn rounded(&self, x: &CudaTensor) -> Result<Rounded, CudaError> {
        Ok(Rounded {
            values: self.pool.take(x.rows * x.cols)?,
            scales: self.pool.take(x.rows * 4)?,
        })
    }

    /// Puts the tokens that the step before chose where this step's rows go on with them.
    pub(super) fn carry(&self, rows: usize) {
        self.attempt("carrying tokens", || {
            let (carried, tokens) = self.staging.carried();
            let mut ops = self.ops.borrow_mut();
            ops.carry(carried, self.tokens.address(), tokens, rows)
        });
    }

    /// Chooses a token for each row of a step's result, as its wishes were uploaded.
    pub(super) fn choose(&self, out: &CudaTensor) {
        self.attempt("choosing tokens", || {
            let bytes = self.tokens.memory().bytes();
            assert!(out.rows * 4 <= bytes, "rows of a step");
            let draws = self.staging.draws();
            let mut ops = self.ops.borrow_mut();
            ops.choose(out, draws, self.tokens.address())
        });
    }

    /// Some rows of a tensor, as f32, in pinned memory; calls `read` with them.
    pub(super) fn land(
        &self,
        x: &CudaTensor,
        rows: Range<usize>,
        read: impl FnOnce(&[f32]),
    ) -> Result<(), CudaError> {
        let count = rows.len() * x.cols;
        if count == 0 {
            read(&[]);
            return Ok(());
        }
        let buffer = match &x.buffer {
            Some(buffer) if x.wide => Arc::clone(buffer),
            _ => {
                let converted = self.pool.take(x.rows * x.cols * 4)?;
                self.ops.borrow_mut().widen(x, converted.address())?;
                Arc::new(converted)
            }
        };
        let mut landing = self.landing.borrow_mut();
        if landing
            .as_mut()
            .is_none_or(|held| held.as_slice().len() < count * 4)
        {
            *landing = Some(PinnedMemory::new(
                &self.gpu,
                (count * 4).next_power_of_two(),
            )?);
        }
        let landing = landing.as_mut().expect("it was just made");
        let bytes = &mut landing.as_mut_slice()[..count * 4];
        self.gpu
            .download(buffer.memory(), rows.start * x.cols * 4, bytes)?;
        read(bytemuck::cast_slice(bytes));
        Ok(())
    }

    /// Attention of the step's sequences by the kernels that take them.
    pub(super) fn attend(
        &self,
        call: &AttentionCall<'_>,
        on_device: &OnDevice,
    ) -> Result<(), CudaError> {
        let (layout, mut ops) = (&on_device.layout, self.ops.borrow_mut());
        if !call.is_fast() {
            return ops.attention_any(call, layout.sequence_count, layout.rows_max);
        }
        ops.attention_prefill(call, layout.tile_count)?;
        let sequences = layout.decode_count;
        if sequences == 0 {
            return Ok(());
        }
        let shape = self.pages().shape();
        let wanted = self.gpu.processors * DECODE_BLOCKS_PER_PROCESSOR;
        let splits = (wanted / (sequences * shape.kv_heads)).clamp(1, SPLITS_MAX);
        let parts_count = if splits == 1 {
            0
        } else {
            sequences * call.heads * splits
        };
        let sums = self.pool.take(parts_count * shape.head_dim * 4)?;
        let stats = self.pool.take(parts_count * 2 * 4)?;
        let parts = Parts {
            sums: sums.address(),
            stats: stats.address(),
            sequences: call.step.decodes,
        };
        ops.attention_decode(call, parts, (sequences, splits))
    }
}

/// Whether x is better computed in 8 bits when it is for these weights and nothing else: products with all of them are made so.
pub(super) fn rounds(x: &CudaTensor, weights: &[&CudaWeight]) -> bool {
    let aligned = x.cols.is_multiple_of(16) && x.ld.is_multiple_of(8);
    // The library takes no other numbers of output features.
    let taken = |weight: &&CudaWeight| weight.scales().is_some() && weight.rows.is_multiple_of(16);
    x.rows > FEW_TOKENS_MAX_8_BIT
        && x.cols <= ROUNDED_COLS_MAX
        && aligned
        && x.address().is_multiple_of(16)
        && !weights.is_empty()
        && weights.iter().all(taken)
}

/// Whether weights with their biases, each the next one's neighbour, are one weight.
pub(super) fn are_one<const N: usize>(
    weights: &[(&CudaWeight, Option<&CudaWeight>); N],
    outs: &[&mut CudaTensor; N],
) -> bool {
    let biased = weights[0].1.is_some();
    let weights_adjoin = weights.windows(2).all(|pair| {
        let [(weight, bias), (next, next_bias)] = [pair[0], pair[1]];
        let biases_adjoin = match (bias, next_bias) {
            (None, None) => true,
            (Some(bias), Some(next)) => bias.is_before(next),
            _ => false,
        };
        weight.cols == next.cols && weight.is_before(next) && biases_adjoin
    });
    weights_adjoin
        && weights.iter().all(|(_, bias)| bias.is_some() == biased)
        && outs.windows(2).all(|pair| pair[0].is_left_of(pair[1]))
}

//! Matrix products by cuBLASLt, opened at run time. The algorithm for a shape is chosen once and kept.

#![expect(unsafe_code, reason = "cuBLASLt is a C library")]

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::ptr;
use std::sync::Arc;

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::{result, sys};

use super::driver::{DeviceMemory, DevicePtr, Gpu};
use super::error::CudaError;
use crate::backend::ActivationDtype;

/// What NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// `out = x · weightᵀ + bias`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    pub(super) x: DevicePtr,
    pub(super) weight: DevicePtr,
    pub(super) bias: Option<DevicePtr>,
    pub(super) out: DevicePtr,
    /// Of the weight's rows and of x's, `[rows]` and `[tokens]` f32, where both are in 8 bits.
    pub(super) scales: Option<[DevicePtr; 2]>,
    pub(super) shape: ProductShape,
}

/// Sizes of a product, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ProductShape {
    pub(super) tokens: usize,
    /// Input features.
    pub(super) cols: usize,
    /// Output features.
    pub(super) rows: usize,
    pub(super) ld_x: usize,
    pub(super) ld_out: usize,
    /// Whether the result is f32 and not of the activations' type.
    pub(super) wide: bool,
}

/// What an algorithm is chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    shape: ProductShape,
    biased: bool,
    in_8_bits: bool,
    /// Of x, weight and out, in bytes.
    alignments: [u32; 3],
}

/// The library on one device.
pub(super) struct Linear {
    handle: sys::cublasLtHandle_t,
    workspace: DeviceMemory,
    gpu: Arc<Gpu>,
    /// Of activations and of weights in 16 bits.
    half: sys::cudaDataType,
    /// `None` for a shape that the library does not take.
    plans: HashMap<Key, Option<Plan>>,
}

// SAFETY: the handle may be used from any thread, one at a time, as the owner's exclusive borrow sees to.
unsafe impl Send for Linear {}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Linear({} shapes)", self.plans.len())
    }
}

fn failed(call: &'static str) -> impl FnOnce(CublasError) -> CudaError {
    move |error| CudaError::Call {
        call,
        status: error.to_string(),
    }
}

impl Linear {
    /// For activations of this type.
    pub(super) fn open(gpu: &Arc<Gpu>, activations: ActivationDtype) -> Result<Self, CudaError> {
        // SAFETY: it opens the library and looks for nothing in it.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::Missing {
                library: "libcublasLt.so",
                gives: "matrix products on the GPU",
                hint: "install cuBLAS of the CUDA toolkit, or put the Python package nvidia-cublas on LD_LIBRARY_PATH",
            });
        }
        gpu.bind()?;
        let handle = result::create_handle().map_err(failed("cublasLtCreate"))?;
        Ok(Self {
            handle,
            workspace: DeviceMemory::new(gpu, WORKSPACE_BYTES)?,
            gpu: Arc::clone(gpu),
            half: match activations {
                ActivationDtype::F16 => sys::cudaDataType::CUDA_R_16F,
                _ => sys::cudaDataType::CUDA_R_16BF,
            },
            plans: HashMap::new(),
        })
    }

    /// Puts a product on the stream; false when the library has no algorithm for this shape.
    pub(super) fn run(&mut self, product: &Product) -> Result<bool, CudaError> {
        self.gpu.bind()?;
        let key = Key::of(product);
        if !self.plans.contains_key(&key) {
            let plan = Plan::new((self.handle, self.half), &key, product)?;
            self.plans.insert(key, plan);
        }
        let Some(Some(plan)) = self.plans.get(&key) else {
            return Ok(false);
        };
        plan.describe_scales(product)?;
        if let Some(bias) = product.bias {
            plan.describe(
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                &bias,
            )?;
        }
        let (one, zero) = (1.0_f32, 0.0_f32);
        let pointer = |address: DevicePtr| address as *mut c_void;
        // SAFETY: the plan's descriptors are alive and describe operands of this shape, which the caller has checked to be
        // within live tensors and weights; the workspace is this object's own and one stream orders its uses.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                pointer(product.weight),
                plan.layouts[0],
                pointer(product.x),
                plan.layouts[1],
                pointer(product.out),
                plan.layouts[2],
                pointer(product.out),
                plan.layouts[2],
                &raw const plan.algorithm,
                pointer(self.workspace.address()),
                self.workspace.bytes(),
                self.gpu.stream().cast(),
            )
        }
        .map_err(failed("cublasLtMatmul"))?;
        Ok(true)
    }
}

impl Drop for Linear {
    fn drop(&mut self) {
        drop(self.gpu.synchronize());
        self.plans.clear();
        // SAFETY: made in open, destroyed nowhere else, and nothing runs any more.
        // A failure has nobody to be told to.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Key {
    fn of(product: &Product) -> Self {
        let alignment = |address: DevicePtr| 1_u32 << address.trailing_zeros().min(8);
        Self {
            shape: product.shape,
            biased: product.bias.is_some(),
            in_8_bits: product.scales.is_some(),
            alignments: [product.x, product.weight, product.out].map(alignment),
        }
    }
}

/// How a shape is computed. The library is column-major: its A is the weight, transposed, its B is x.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    /// Of weight, x and out.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(
        (handle, half): (sys::cublasLtHandle_t, sys::cudaDataType),
        key: &Key,
        product: &Product,
    ) -> Result<Option<Self>, CudaError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cudaDataType::{CUDA_R_8F_E4M3, CUDA_R_32F};
        let shape = &key.shape;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = result::create_matmul_desc(compute, CUDA_R_32F)
            .map_err(failed("cublasLtMatmulDescCreate"))?;
        let out_type = if shape.wide { CUDA_R_32F } else { half };
        let in_type = if key.in_8_bits { CUDA_R_8F_E4M3 } else { half };
        let layout = |kind, rows: usize, cols: usize, ld: usize| {
            let ld = i64::try_from(ld).expect("rows are shorter than 2^63");
            result::create_matrix_layout(kind, rows as u64, cols as u64, ld)
                .map_err(failed("cublasLtMatrixLayoutCreate"))
        };
        let mut plan = Self {
            operation,
            layouts: [
                layout(in_type, shape.cols, shape.rows, shape.cols)?,
                layout(in_type, shape.cols, shape.tokens, shape.ld_x)?,
                layout(out_type, shape.rows, shape.tokens, shape.ld_out)?,
            ],
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        let transposed = 1_i32;
        plan.describe(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
        plan.describe_scales(product)?;
        if key.biased {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            plan.describe(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            let kind = half as u32;
            plan.describe(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &kind)?;
        }
        match plan.choose(handle, key)? {
            None => Ok(None),
            Some(algorithm) => {
                plan.algorithm = algorithm;
                Ok(Some(plan))
            }
        }
    }

    /// Says where the scales are, if there are any.
    fn describe_scales(&self, product: &Product) -> Result<(), CudaError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let Some([weight, x]) = product.scales else {
            return Ok(());
        };
        // One for each row of a and each column of b: `CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F` of version 12.9.
        let outer = 3_i32;
        self.describe(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &outer)?;
        self.describe(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &outer)?;
        self.describe(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &weight)?;
        self.describe(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x)?;
        // Sums of 128 products are added up in f32, and within these with fewer bits: what others do as well.
        self.describe(Attribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &1_i8)
    }

    /// Sets an attribute of the operation.
    fn describe<T: bytemuck::NoUninit>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> Result<(), CudaError> {
        // SAFETY: the operation is alive, and the value is as long as it is said to be.
        unsafe {
            result::set_matmul_desc_attribute(
                self.operation,
                attribute,
                ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        }
        .map_err(failed("cublasLtMatmulDescSetAttribute"))
    }

    /// The library's first choice; `None` when it has none. For 8 bits with a scale a row it knows no other (13.1 on an H100); for
    /// bf16 the best of its eight was 2 to 3 % of a step faster for 16 to 256 rows, which is not worth timing them at every start.
    fn choose(
        &self,
        handle: sys::cublasLtHandle_t,
        key: &Key,
    ) -> Result<Option<sys::cublasLtMatmulAlgo_t>, CudaError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Preference::new()?;
        preference.set(
            Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            &(WORKSPACE_BYTES as u64),
        )?;
        let [x, weight, out] = key.alignments;
        for (attribute, bytes) in [
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                weight,
            ),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
        ] {
            preference.set(attribute, &bytes)?;
        }
        let [a, b, c] = self.layouts;
        // SAFETY: all descriptors are alive.
        let found = unsafe {
            result::get_matmul_algo_heuristic(handle, self.operation, a, b, c, c, preference.0)
        };
        match found {
            Ok(found) => Ok(Some(found.algo)),
            Err(CublasError(
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED
                | sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE,
            )) => Ok(None),
            Err(error) => Err(failed("cublasLtMatmulAlgoGetHeuristic")(error)),
        }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        for layout in self.layouts {
            // SAFETY: made in new, destroyed nowhere else.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        // SAFETY: as above.
        let _ = unsafe { result::destroy_matmul_desc(self.operation) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, CudaError> {
        let made = result::create_matmul_pref();
        Ok(Self(
            made.map_err(failed("cublasLtMatmulPreferenceCreate"))?,
        ))
    }

    fn set<T: bytemuck::NoUninit>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<(), CudaError> {
        // SAFETY: the preference is alive, and the value is as long as it is said to be.
        unsafe {
            result::set_matmul_pref_attribute(
                self.0,
                attribute,
                ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        }
        .map_err(failed("cublasLtMatmulPreferenceSetAttribute"))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made in new, destroyed nowhere else.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

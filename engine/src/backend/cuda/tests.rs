//! The conformance suite on a GPU, where there is one; the reason is printed where there is none. And a whole model: the
//! same weights on the GPU and on the CPU, prefilled, decoded, recorded and replayed.

mod changes;
mod choose;
mod gguf;
mod logits;
mod model;
mod speed;

use super::*;
use crate::backend::conformance::conformance_tests;

/// The device. A machine that is said to have one (`BATON_TEST_GPU=1`) must have it.
fn gpu() -> Option<CudaBackend> {
    match CudaBackend::open() {
        Ok(backend) => Some(backend),
        Err(error) => {
            assert!(std::env::var_os("BATON_TEST_GPU").is_none(), "{error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// A position or a block of a small test.
fn small(value: usize) -> u32 {
    u32::try_from(value).expect("a small number")
}

/// The device, computing in half precision.
fn gpu_in_f16() -> Option<CudaBackend> {
    let mut backend = gpu()?;
    backend.compute_in(ActivationDtype::F16).expect("it can");
    Some(backend)
}

mod conformance {
    use super::*;
    conformance_tests!(if let gpu());
}

mod conformance_in_f16 {
    use super::*;
    conformance_tests!(if let gpu_in_f16());
}

#[test]
fn a_missing_device_is_said_in_words() {
    if let Err(error) = CudaBackend::open() {
        assert!(!error.to_string().is_empty());
    }
}

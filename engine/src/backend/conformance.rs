//! One suite for every backend: each operation against a naive reference, and the bit-equality that
//! [`super::Backend`] promises.
//!
//! A backend runs it by naming a constructor: `conformance_tests!(MyBackend::new())`, or `conformance_tests!(if let found())`
//! where the device may not be there. References are written in `f64` from the definitions and share no code with any
//! backend; stored formats are compared with candle's decoder. What a backend is held to follows from its capability:
//! inputs are what its activations can hold, errors are measured against their precision.

mod attention;
mod dense;
mod pages;
mod rows;

pub(crate) use attention::*;
pub(crate) use dense::*;
pub(crate) use pages::*;
pub(crate) use rows::*;

use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{ActivationDtype, Backend, WeightBytes, WeightDtype, WeightSource};
use crate::page::KvDtype;

/// Numbers of rows or columns around vector and tile widths.
pub(crate) const SIZES: [usize; 9] = [1, 2, 3, 7, 15, 16, 17, 33, 70];

pub(crate) const DTYPES: [WeightDtype; 13] = [
    WeightDtype::F32,
    WeightDtype::F16,
    WeightDtype::Bf16,
    WeightDtype::Q4_0,
    WeightDtype::Q4_1,
    WeightDtype::Q5_0,
    WeightDtype::Q5_1,
    WeightDtype::Q8_0,
    WeightDtype::Q2_K,
    WeightDtype::Q3_K,
    WeightDtype::Q4_K,
    WeightDtype::Q5_K,
    WeightDtype::Q6_K,
];

/// Makes a test of every function of the suite.
macro_rules! conformance_tests {
    (if let $found:expr) => {
        $crate::backend::conformance::conformance_tests!(@names ($found) optional);
    };
    ($make:expr) => {
        $crate::backend::conformance::conformance_tests!(@names ($make) always);
    };
    (@names ($make:expr) $kind:ident) => {
        $crate::backend::conformance::conformance_tests!(@$kind ($make)
            embed_decodes_every_dtype_exactly,
            linear_matches_the_reference,
            linear_of_stored_formats_matches_the_reference,
            linear_of_8_bit_weights_matches_the_reference,
            dedicated_rows_give_the_same_products,
            linear_rows_are_bit_equal_in_any_batch,
            weights_of_the_wrong_size_are_refused,
            eight_bit_weights_of_the_wrong_size_are_refused,
            rms_norm_matches_the_reference,
            head_norm_matches_the_reference,
            add_and_silu_mul_match_the_reference,
            fused_operations_match_their_parts,
            rope_matches_the_reference,
            rows_are_selected_and_copied,
            rows_are_edited_on_the_host,
            large_heads_match_the_reference,
            attention_matches_the_reference,
            attention_is_bit_equal_alone_batched_and_chunked,
            attention_ignores_what_it_must_not_see,
            attention_ignores_what_pages_held_before,
            written_kv_is_rounded_to_nearest_even,
            pages_are_shared_lent_and_returned,
            misused_pages_panic,
            a_pool_that_cannot_fit_is_refused,
        );
    };
    (@always ($make:expr) $($name:ident,)*) => {
        $(
            #[test]
            fn $name() {
                $crate::backend::conformance::$name(&mut $make);
            }
        )*
    };
    (@optional ($found:expr) $($name:ident,)*) => {
        $(
            #[test]
            fn $name() {
                if let Some(mut backend) = $found {
                    $crate::backend::conformance::$name(&mut backend);
                    crate::backend::Backend::check(&backend).expect("the device works");
                }
            }
        )*
    };
}
pub(crate) use conformance_tests;

/// Results in bf16 are off by half a unit in their last place, 2⁻⁹ of their size; where something between is bf16 too
/// (attention's weights, a fused sum), by as much again. The rest is room for sums in another order.
const BF16_TOLERANCE: f64 = 1.0 / 200.0;
/// Half precision has three bits more, and sums in another order are off by as much as ever.
const F16_TOLERANCE: f64 = 1.0 / 1000.0;

/// The error that is allowed where `f32` arithmetic would be off by `exact`.
pub(crate) fn tolerance<B: Backend>(backend: &B, exact: f64) -> f64 {
    match backend.capability().activations {
        ActivationDtype::F32 => exact,
        ActivationDtype::Bf16 => BF16_TOLERANCE,
        ActivationDtype::F16 => F16_TOLERANCE,
    }
}

/// The same of attention over KV of a type, which queries are rounded to as well where both have 16 bits.
pub(crate) fn attention_tolerance<B: Backend>(backend: &B, kv: KvDtype, exact: f64) -> f64 {
    match (backend.capability().activations, kv) {
        (ActivationDtype::F16, KvDtype::Bf16) => 2.0 * BF16_TOLERANCE,
        _ => tolerance(backend, exact),
    }
}

/// Half of the smallest value that activations can have: what is less than that becomes 0.
pub(crate) fn vanishing<B: Backend>(backend: &B) -> f64 {
    match backend.capability().activations {
        ActivationDtype::F32 | ActivationDtype::Bf16 => 1e-30,
        ActivationDtype::F16 => 2.0_f64.powi(-25),
    }
}

/// Values as the backend's activations and weights hold them.
pub(crate) fn held<B: Backend>(backend: &B, mut values: Vec<f32>) -> Vec<f32> {
    let rounded: fn(f32) -> f32 = match backend.capability().activations {
        ActivationDtype::F32 => return values,
        ActivationDtype::Bf16 => |value| bf16::from_f32(value).to_f32(),
        ActivationDtype::F16 => |value| f16::from_f32(value).to_f32(),
    };
    for value in &mut values {
        *value = rounded(*value);
    }
    values
}

/// Numbers in `-1..1` that the backend can hold.
pub(crate) fn noise_of<B: Backend>(backend: &B, seed: u64, len: usize) -> Vec<f32> {
    held(backend, noise(seed, len))
}

/// Asserts that two ways of computing the same agree: to the last bit where the backend promises it.
#[track_caller]
pub(crate) fn assert_agree<B: Backend>(backend: &B, found: &[f32], expected: &[f32], what: &str) {
    let allowed = tolerance(backend, 0.0);
    assert_agree_within(backend, allowed, (found, expected), what);
}

/// The same where the backend that promises nothing may be off by `allowed`.
#[track_caller]
pub(crate) fn assert_agree_within<B: Backend>(
    backend: &B,
    allowed: f64,
    (found, expected): (&[f32], &[f32]),
    what: &str,
) {
    if backend.capability().batch_invariant {
        assert_same_bits(found, expected, what);
    } else {
        let expected: Vec<f64> = expected.iter().map(|&value| f64::from(value)).collect();
        assert_close(found, &expected, allowed, what);
    }
}

/// Numbers in `-1..1`, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A weight of `f32`.
pub(crate) fn plain<B: Backend>(backend: &mut B, cols: usize, values: &[f32]) -> B::Weight {
    let rows = values.len().checked_div(cols).unwrap_or(1);
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let source = WeightSource {
        name: "plain".to_owned(),
        rows,
        cols,
        dtype: WeightDtype::F32,
        bytes: WeightBytes::Owned(bytes.into()),
        scales: None,
    };
    backend.load_weight(source).expect("sizes fit")
}

/// Activations, by way of an embedding: the trait has no other entrance.
pub(crate) fn upload<B: Backend>(backend: &mut B, cols: usize, values: &[f32]) -> B::Tensor {
    let rows = values.len() / cols;
    let mut out = backend.tensor(rows, cols);
    if rows > 0 {
        let table = plain(backend, cols, values);
        let tokens: Vec<u32> = (0..).take(rows).collect();
        backend.embed(&table, &tokens, &mut out);
    }
    out
}

/// Noise stored as `dtype`, and what candle reads from it.
pub(crate) fn stored(
    dtype: WeightDtype,
    rows: usize,
    cols: usize,
    seed: u64,
) -> (WeightSource, Vec<f32>) {
    let values = Tensor::from_vec(noise(seed, rows * cols), (rows, cols), &Device::Cpu);
    let stored = QTensor::quantize(&values.expect("shape fits"), dtype.ggml()).expect("it fits");
    let source = WeightSource {
        name: format!("{dtype:?}"),
        rows,
        cols,
        dtype,
        bytes: WeightBytes::Owned(stored.data().expect("data is on the host").to_vec().into()),
        scales: None,
    };
    (source, decoded(&stored))
}

/// Candle's reading of a stored tensor.
pub(crate) fn decoded(stored: &QTensor) -> Vec<f32> {
    let values = stored
        .dequantize(&Device::Cpu)
        .and_then(|tensor| tensor.flatten_all());
    values
        .and_then(|tensor| tensor.to_vec1())
        .expect("a decoder for every format")
}

/// Columns of the smallest row of a dtype: a block, or something odd where any length goes.
pub(crate) const fn columns(dtype: WeightDtype) -> usize {
    match dtype {
        WeightDtype::F32 | WeightDtype::F16 | WeightDtype::Bf16 => 37,
        WeightDtype::F8E4m3 => 16,
        WeightDtype::Q4_0
        | WeightDtype::Q4_1
        | WeightDtype::Q5_0
        | WeightDtype::Q5_1
        | WeightDtype::Q8_0 => 32,
        WeightDtype::Q2_K
        | WeightDtype::Q3_K
        | WeightDtype::Q4_K
        | WeightDtype::Q5_K
        | WeightDtype::Q6_K => 256,
    }
}

/// Asserts that each pair differs by at most `tolerance` times the second's scale.
#[track_caller]
pub(crate) fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let scale = expected
        .iter()
        .fold(1.0_f64, |scale, value| scale.max(value.abs()));
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(
            error <= tolerance * scale,
            "{what}: element {index} is {found}, not {expected}"
        );
    }
}

/// Asserts equality to the last bit.
#[track_caller]
pub(crate) fn assert_same_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(
            found.to_bits(),
            expected.to_bits(),
            "{what}: element {index} is {found}, not {expected}"
        );
    }
}

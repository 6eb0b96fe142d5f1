//! Every format against candle's decoder, on blocks of arbitrary bytes: all scales, all integers, all signs.

use std::borrow::Cow;

use candle_core::Device;
use candle_core::quantized::{QStorage, QTensor};
use proptest::prelude::*;

use super::super::simd::Isa;
use super::*;
use crate::backend::conformance::{DTYPES, assert_same_bits, decoded};

/// Where a block keeps its half-precision numbers.
fn halves(dtype: WeightDtype) -> &'static [usize] {
    match dtype {
        WeightDtype::F32 | WeightDtype::F16 | WeightDtype::Bf16 | WeightDtype::F8E4m3 => &[],
        WeightDtype::Q4_0 | WeightDtype::Q5_0 | WeightDtype::Q8_0 => &[0],
        WeightDtype::Q4_1 | WeightDtype::Q5_1 | WeightDtype::Q4_K | WeightDtype::Q5_K => &[0, 2],
        WeightDtype::Q2_K => &[80, 82],
        WeightDtype::Q3_K => &[108],
        WeightDtype::Q6_K => &[208],
    }
}

/// Makes every number finite: infinities have no use as scales, and NaN's bits are nobody's promise.
fn tame(dtype: WeightDtype, bytes: &mut [u8]) {
    let (_, size) = dtype.block();
    for block in bytes.chunks_exact_mut(size) {
        for at in halves(dtype) {
            block[at + 1] &= 0xbf;
        }
        if matches!(
            dtype,
            WeightDtype::F32 | WeightDtype::F16 | WeightDtype::Bf16
        ) {
            block[size - 1] &= 0xbf;
        }
    }
}

fn check(dtype: WeightDtype, mut bytes: Vec<u8>) {
    let (weights, size) = dtype.block();
    let per_row = if weights == 1 { 45 } else { 2 };
    bytes.truncate(per_row * size);
    tame(dtype, &mut bytes);
    let cols = per_row * weights;
    let storage = QStorage::from_data(
        Cow::Owned(bytes.clone()),
        &Device::Cpu,
        dtype.ggml().expect("GGML has it"),
    );
    let tensor = QTensor::new(storage.expect("on the host"), (1, cols)).expect("shape fits");
    let expected = decoded(&tensor);
    for isa in Isa::detected() {
        let mut found = vec![f32::NAN; cols.next_multiple_of(PART)];
        isa.run(DecodeRow {
            dtype,
            row: &bytes,
            out: &mut found,
        });
        let what = format!("{dtype:?} on {}", isa.name());
        assert_same_bits(&found[..cols], &expected, &what);
        assert!(
            found[cols..].iter().all(|padding| *padding == 0.0),
            "{what}: padding"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn arbitrary_blocks_decode_as_in_candle(bytes in proptest::collection::vec(any::<u8>(), 420)) {
        for dtype in DTYPES {
            check(dtype, bytes.clone());
        }
    }
}

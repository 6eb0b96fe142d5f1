//! Parts of stored tensors, put together again.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::backend::conformance::DTYPES;
use crate::model::dummy;
use crate::model::weights::Part;

fn slot(rows: usize, cols: usize, cut: Cut) -> Slot {
    Slot {
        part: Part::Down,
        layer: Some(0),
        is_bias: rows == 1,
        shape: if rows == 1 {
            SlotShape::Vector(cols)
        } else {
            SlotShape::Matrix { rows, cols }
        },
        cut,
    }
}

/// Blocks of bytes that decode to finite numbers.
fn stored(dtype: WeightDtype, elements: usize, seed: u8) -> Vec<u8> {
    let (block_len, block_bytes) = dtype.block();
    let count = elements / block_len * block_bytes;
    // Small bytes are small exponents, in whatever place a scale is.
    (0..count)
        .map(|at| {
            let mixed = (at as u64 + u64::from(seed)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            mixed.to_be_bytes()[0] & 0x3b
        })
        .collect()
}

fn tensor(dtype: WeightDtype, dims: Vec<usize>, bytes: Vec<u8>) -> RawTensor {
    let len = bytes.len();
    // Not at the buffer's beginning, as in a file.
    let buffer = [vec![0xff; 7], bytes, vec![0xff; 9]].concat();
    RawTensor {
        dims,
        dtype,
        bytes: WeightBytes::Shared {
            buffer: Arc::new(buffer),
            range: 7..7 + len,
        },
        place: None,
        scales: None,
    }
}

/// The part's values, by way of a decoder.
fn values(part: &RawTensor) -> Vec<f32> {
    let cols = *part.dims.last().expect("a dimension");
    let rows = part.dims.iter().product::<usize>() / cols.max(1);
    if rows * cols == 0 {
        return Vec::new();
    }
    decoded("t", part.dtype, part.bytes.as_slice(), [rows, cols]).expect("it decodes")
}

fn ranges(len: usize, cuts: &[usize]) -> Vec<Range<usize>> {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (len + 1)).collect();
    ends.extend([0, len]);
    ends.sort_unstable();
    ends.dedup();
    ends.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn parts_put_together_are_the_tensor(
        dtype in prop::sample::select(&DTYPES[..]),
        rows in 1_usize..6,
        blocks in 1_usize..4,
        cuts in prop::collection::vec(any::<usize>(), 0..4),
        between_blocks in any::<bool>(),
        seed in any::<u8>(),
    ) {
        let (block_len, _) = dtype.block();
        let cols = blocks * block_len.max(8);
        let bytes = stored(dtype, rows * cols, seed);
        let dims = slot(rows, cols, Cut::Whole).shape.dims();
        let make = || tensor(dtype, dims.clone(), bytes.clone());
        let whole = values(&make());
        let part = |wanted: Cut| -> Result<_, TestCaseError> {
            let slot = slot(rows, cols, wanted);
            let part = cut("t", &slot, make()).expect("it can be cut");
            prop_assert_eq!(part.bytes.as_slice().len(), super::bytes(&slot, dtype));
            prop_assert_eq!(&part.dims, &slot.cut_shape().dims());
            Ok(part)
        };
        prop_assert_eq!(values(&part(Cut::Whole)?), whole.clone());
        if rows > 1 {
            let mut together = Vec::new();
            for range in ranges(rows, &cuts) {
                let part = part(Cut::Rows(range))?;
                // Rows stay where they are, as they are.
                prop_assert_eq!(part.dtype, dtype);
                let mapped = matches!(part.bytes, WeightBytes::Shared { .. });
                prop_assert!(mapped);
                together.extend(values(&part));
            }
            prop_assert_eq!(&together, &whole);
        }
        let step = if between_blocks { block_len } else { 1 };
        let mut together = vec![0.0; rows * cols];
        for range in ranges(cols / step, &cuts) {
            let range = range.start * step..range.end * step;
            let part = part(if rows == 1 { Cut::Rows(range.clone()) } else { Cut::Cols(range.clone()) })?;
            prop_assert!(!between_blocks || part.dtype == dtype, "columns between blocks stay stored");
            let part_rows = values(&part);
            for (to, from) in together.chunks_mut(cols).zip(part_rows.chunks(range.len())) {
                to[range.clone()].copy_from_slice(from);
            }
        }
        prop_assert_eq!(together, whole);
    }

    #[test]
    fn parts_of_dummies_are_parts_of_the_dummy(
        rows in 1_usize..400,
        cols in 1_usize..400,
        from in any::<prop::sample::Index>(),
        to in any::<prop::sample::Index>(),
        f32 in any::<bool>(),
    ) {
        let dtype = if f32 { WeightDtype::F32 } else { WeightDtype::Bf16 };
        let range = |len: usize| {
            let (from, to) = (from.index(len), to.index(len));
            from.min(to)..from.max(to) + 1
        };
        let whole = dummy::tensor("t", &slot(rows, cols, Cut::Whole), dtype).expect("memory");
        let mut wanted = vec![Cut::Rows(range(if rows == 1 { cols } else { rows }))];
        if rows > 1 {
            wanted.push(Cut::Cols(range(cols)));
        }
        for wanted in wanted {
            let slot = slot(rows, cols, wanted);
            let part = dummy::tensor("t", &slot, dtype).expect("memory");
            let same = RawTensor {
                dims: whole.dims.clone(),
                dtype,
                bytes: whole.bytes.clone(),
                place: None,
                scales: whole.scales.clone(),
            };
            let expected = cut("t", &slot, same).expect("it can be cut");
            prop_assert_eq!(&part.dims, &expected.dims);
            prop_assert!(part.bytes.as_slice() == expected.bytes.as_slice());
        }
    }
}

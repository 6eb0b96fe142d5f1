//! Floats of 8 bits: a sign, 4 bits of exponent, 3 of fraction; the greatest is 448, and there is no infinity.

/// The greatest value.
pub(crate) const MAX: f32 = 448.0;
/// The least normal one.
const NORMAL_MIN: f32 = 1.0 / 64.0;
/// Units of the values below that.
const UNITS: f32 = 512.0;

/// The nearest, ties to even; what is greater than the greatest becomes that. NaN stays NaN.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the values have been brought into range"
)]
pub(crate) fn encode(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return sign | 0x7f;
    }
    let size = value.abs().min(MAX);
    if size < NORMAL_MIN {
        return sign | (size * UNITS).round_ties_even() as u8;
    }
    // Half a unit in the last place, less one where the last place is even already; then the exponent's bias is changed.
    let bits = size.to_bits();
    let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
    sign | ((rounded >> 20) - (120 << 3)) as u8
}

/// The value.
pub(crate) fn decode(bits: u8) -> f32 {
    let (exponent, fraction) = (bits >> 3 & 0xf, f32::from(bits & 7));
    let size = match (exponent, bits & 7) {
        (0xf, 7) => f32::NAN,
        (0, _) => fraction / UNITS,
        _ => (1.0 + fraction / 8.0) * f32::from_bits((u32::from(exponent) + 120) << 23),
    };
    if bits & 0x80 == 0 { size } else { -size }
}

/// Rows of weights: `scales` has one for all, or one a row.
pub(crate) fn decode_rows(bytes: &[u8], rows: usize, scales: &[f32]) -> Vec<f32> {
    let cols = bytes.len() / rows.max(1);
    let row_scale = |row: usize| scales[if scales.len() == 1 { 0 } else { row }];
    let table: Vec<f32> = (0..=u8::MAX).map(decode).collect();
    let mut values = Vec::with_capacity(bytes.len());
    for (row, bytes) in bytes.chunks_exact(cols.max(1)).enumerate() {
        let scale = row_scale(row);
        values.extend(bytes.iter().map(|&bits| table[usize::from(bits)] * scale));
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_comes_back() {
        for bits in 0..=u8::MAX {
            let value = decode(bits);
            if !value.is_nan() {
                assert_eq!(encode(value), bits, "{value}");
            }
        }
        assert_eq!((decode(0x7e), decode(0x01)), (MAX, 1.0 / 512.0));
        assert!(decode(encode(f32::NAN)).is_nan());
    }

    #[test]
    fn between_two_the_nearer_is_taken_and_the_even_one_of_equals() {
        for bits in 0..0x7e_u8 {
            let (low, high) = (decode(bits), decode(bits + 1));
            let (step, middle) = (high - low, f32::midpoint(low, high));
            assert_eq!(encode(low + step * 0.4), bits);
            assert_eq!(encode(low + step * 0.6), bits + 1);
            assert_eq!(encode(middle), bits + (bits & 1));
            assert_eq!(encode(-middle), encode(middle) | 0x80);
        }
        assert_eq!(encode(1e9), 0x7e);
        assert_eq!(encode(f32::NEG_INFINITY), 0xfe);
        assert_eq!(encode(1e-9), 0);
    }

    #[test]
    fn rows_have_their_scales() {
        let bytes = [encode(1.0), encode(2.0), encode(-4.0), encode(0.5)];
        assert_eq!(decode_rows(&bytes, 2, &[0.5]), [0.5, 1.0, -2.0, 0.25]);
        assert_eq!(decode_rows(&bytes, 2, &[1.0, 2.0]), [1.0, 2.0, -8.0, 1.0]);
    }
}

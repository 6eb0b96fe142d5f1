//! The exponential function, sixteen at a time.

use super::simd::Lanes;

/// Below this the result is zero: `e^-87.3` is the last that is not subnormal.
const LOWEST: f32 = -87.3;
/// Above this the argument is cut: `e^88.3` is just below the largest number.
const HIGHEST: f32 = 88.3;
/// `ln 2` in two pieces, the first with few enough bits that its multiples are exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Taylor's coefficients from `r^7` down to 1; on `|r| <= ln 2 / 2` the rest is below `5e-9`.
const COEFFICIENTS: [f32; 8] = [
    1.0 / 5040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// `e^x` per lane, within two units in the last place; 0 below -87.3, NaN for NaN.
#[inline(always)]
pub(super) fn exp<L: Lanes>(lanes: L, x: L::V) -> L::V {
    let lowest = lanes.splat(LOWEST);
    let cut = lanes.min(lanes.splat(HIGHEST), lanes.max(lowest, x));
    let n = lanes.round(lanes.mul(cut, lanes.splat(std::f32::consts::LOG2_E)));
    let r = lanes.fma(n, lanes.splat(-LN2_HIGH), cut);
    let r = lanes.fma(n, lanes.splat(-LN2_LOW), r);
    let mut sum = lanes.splat(COEFFICIENTS[0]);
    for coefficient in &COEFFICIENTS[1..] {
        sum = lanes.fma(sum, r, lanes.splat(*coefficient));
    }
    lanes.zero_below(lanes.mul(sum, lanes.pow2(n)), x, lowest)
}

/// `x / (1 + e^-x)` per lane.
#[inline(always)]
pub(super) fn silu<L: Lanes>(lanes: L, x: L::V) -> L::V {
    let one = lanes.splat(1.0);
    let denominator = lanes.add(one, exp(lanes, lanes.sub(lanes.splat(0.0), x)));
    lanes.div(x, denominator)
}

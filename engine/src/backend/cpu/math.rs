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

#[cfg(test)]
mod tests {
    use super::super::simd::{Isa, Kernel};
    use super::*;

    struct Exp([f32; 16]);

    impl Kernel for Exp {
        type Output = [f32; 16];

        fn run<L: Lanes>(self, lanes: L) -> [f32; 16] {
            lanes.array(exp(lanes, lanes.load(&self.0)))
        }
    }

    #[test]
    fn exp_is_accurate_to_two_units_in_the_last_place() {
        for isa in Isa::detected() {
            let mut x = -87.29_f32;
            while x < 88.2 {
                let found = isa.run(Exp([x; 16]))[7];
                let expected = f64::from(x).exp();
                let error = (f64::from(found) / expected - 1.0).abs();
                assert!(
                    error < 2.4e-7,
                    "{}: exp({x}) is {expected}, not {found}",
                    isa.name()
                );
                x += 0.003_7;
            }
        }
    }

    #[test]
    fn exp_at_the_edges() {
        for isa in Isa::detected() {
            let edges = [
                0.0,
                -0.0,
                f32::NEG_INFINITY,
                -88.0,
                f32::MIN,
                f32::INFINITY,
                f32::NAN,
                1000.0,
            ];
            let mut x = [0.0; 16];
            x[..8].copy_from_slice(&edges);
            let found = isa.run(Exp(x));
            assert_eq!(found[..5], [1.0, 1.0, 0.0, 0.0, 0.0], "{}", isa.name());
            assert!(
                found[5] > 1e38 && found[7] > 1e38,
                "{}: {found:?}",
                isa.name()
            );
            assert!(found[6].is_nan(), "{}: {found:?}", isa.name());
        }
    }
}

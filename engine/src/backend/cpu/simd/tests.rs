//! Every operation of every ISA, lane by lane, against plain Rust.

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

/// What each operation gives, flattened.
struct Everything {
    a: [f32; 16],
    b: [f32; 16],
    c: [f32; 16],
    bytes: [u8; 32],
}

impl Kernel for Everything {
    type Output = Vec<f32>;

    fn run<L: Lanes>(self, lanes: L) -> Vec<f32> {
        let [a, b, c] = [&self.a, &self.b, &self.c].map(|values| lanes.load(values));
        let half = *self.bytes.first_chunk().expect("32 bytes");
        let small = self.a.map(|a| (a * 100.0).round());
        let mut out: Vec<f32> = [
            lanes.splat(self.a[3]),
            lanes.add(a, b),
            lanes.sub(a, b),
            lanes.mul(a, b),
            lanes.div(a, b),
            lanes.max(a, b),
            lanes.min(a, b),
            lanes.round(lanes.mul(a, lanes.splat(10.0))),
            lanes.pow2(lanes.load(&small)),
            lanes.zero_below(a, b, c),
            lanes.u8s(half),
            lanes.i8s(bytemuck::cast(half)),
            lanes.f16s(self.bytes),
            lanes.bf16s(self.bytes),
            lanes.f16_splat([self.bytes[0], self.bytes[1]]),
            lanes.lookup_low(half, a),
            lanes.lookup_high(half, a),
            lanes.bits(half, 0, 15),
            lanes.bits(half, 6, 3),
            lanes.bits(half, 7, 255),
        ]
        .into_iter()
        .flat_map(|v| lanes.array(v))
        .collect();
        out.extend([lanes.sum(a), lanes.max_lane(a), lanes.max_lane(b)]);
        out.extend(lanes.sum4([a, b, c, lanes.mul(a, c)]));
        out
    }
}

fn everything(seed: u64) -> Everything {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut value = || std::array::from_fn(|_| rng.random_range(-1.0..1.0));
    let (a, b, c) = (value(), value(), value());
    // Bit patterns of finite halves: the highest exponent bit stays clear.
    let mut bytes: [u8; 32] = rng.random();
    for high in bytes.iter_mut().skip(1).step_by(2) {
        *high &= 0xbf;
    }
    Everything { a, b, c, bytes }
}

#[test]
fn all_isas_agree_to_the_last_bit() {
    for seed in 0..50 {
        let expected = Isa::Portable(Portable).run(everything(seed));
        for isa in Isa::detected() {
            let found = isa.run(everything(seed));
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(
                bits(&found),
                bits(&expected),
                "{} with seed {seed}",
                isa.name()
            );
        }
    }
}

struct Fma([f32; 16], [f32; 16], [f32; 16]);

impl Kernel for Fma {
    type Output = [f32; 16];

    fn run<L: Lanes>(self, lanes: L) -> [f32; 16] {
        let Self(a, b, c) = self;
        lanes.array(lanes.fma(lanes.load(&a), lanes.load(&b), lanes.load(&c)))
    }
}

#[test]
fn fma_rounds_as_often_as_it_says() {
    // (1 + e)² - 1 - 2e = e², which vanishes when the square is rounded first.
    let (a, c) = (1.0 + f32::EPSILON, -1.0 - 2.0 * f32::EPSILON);
    for isa in Isa::detected() {
        let expected = if isa.rounds_once() {
            f32::EPSILON * f32::EPSILON
        } else {
            0.0
        };
        let found = isa.run(Fma([a; 16], [a; 16], [c; 16]));
        assert_eq!(found, [expected; 16], "{}", isa.name());
    }
}

#[test]
fn lanes_mean_what_they_say() {
    let everything = everything(7);
    let (a, bytes) = (everything.a, everything.bytes);
    let found = Isa::Portable(Portable).run(everything);
    let part = |index: usize| &found[16 * index..16 * (index + 1)];
    for i in 0..16 {
        assert_eq!(part(7)[i], (a[i] * 10.0).round_ties_even());
        assert_eq!(part(8)[i], ((a[i] * 100.0).round()).exp2());
        let pair = [bytes[2 * i], bytes[2 * i + 1]];
        assert_eq!(
            part(12)[i].to_bits(),
            f16::from_le_bytes(pair).to_f32().to_bits()
        );
        assert_eq!(
            part(13)[i].to_bits(),
            bf16::from_le_bytes(pair).to_f32().to_bits()
        );
        assert_eq!(part(15)[i], a[usize::from(bytes[i] & 15)]);
        assert_eq!(part(16)[i], a[usize::from(bytes[i] >> 4)]);
        assert_eq!(part(18)[i], f32::from((bytes[i] >> 6) & 3));
    }
    let halves = |v: &[f32], n: usize| (0..n).map(|i| v[i] + v[i + n]).collect::<Vec<f32>>();
    let sum = halves(&halves(&halves(&halves(&a, 8), 4), 2), 1);
    assert_eq!(found[16 * 20], sum[0]);
}

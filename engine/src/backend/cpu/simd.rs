//! The one door to vector instructions: sixteen `f32` lanes, whatever the processor offers.
//!
//! Kernels are written once, generically over [`Lanes`], and run through [`Isa::run`], which compiles them for
//! AVX-512, for AVX2 (each vector is two halves) and for plain Rust. A token such as [`Avx512`] is proof that the
//! instructions exist, so everything outside this file is safe code.
//!
//! Invariant: every method does the same arithmetic, lane by lane, on every ISA, so results are bit-equal. The
//! exception is `fma` on processors without it: [`Portable`] on x86 rounds twice.
#![cfg_attr(
    target_arch = "x86_64",
    expect(
        unsafe_code,
        reason = "instructions chosen at run time can't be called from safe code; tokens made after detection are the proof"
    )
)]

mod portable;
pub(super) use portable::Portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

/// Sixteen lanes of `f32` and the few operations that kernels need.
pub(super) trait Lanes: Copy {
    /// A vector of sixteen lanes.
    type V: Copy;
    /// Whether 32 vectors fit the registers, which decides how large a tile pays.
    const WIDE: bool;

    /// All lanes equal.
    fn splat(self, value: f32) -> Self::V;
    fn load(self, values: &[f32; 16]) -> Self::V;
    fn array(self, v: Self::V) -> [f32; 16];
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger one; `b` when either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller one; `b` when either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `2^n` for integral `n` in `-126..=127`.
    fn pow2(self, n: Self::V) -> Self::V;
    /// `v` where `x` is not below `bound`, else 0.
    fn zero_below(self, v: Self::V, x: Self::V, bound: Self::V) -> Self::V;
    /// Sum by halving: lanes `i` and `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
    fn sum(self, v: Self::V) -> f32;
    /// Four sums, each as [`Lanes::sum`].
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4];
    fn max_lane(self, v: Self::V) -> f32;
    fn u8s(self, bytes: [u8; 16]) -> Self::V;
    /// `(byte >> shift) & mask` of each byte, as numbers.
    fn bits(self, bytes: [u8; 16], shift: u8, mask: u8) -> Self::V;
    fn i8s(self, bytes: [i8; 16]) -> Self::V;
    fn f16s(self, bytes: [u8; 32]) -> Self::V;
    fn bf16s(self, bytes: [u8; 32]) -> Self::V;
    /// A half-precision number in all lanes.
    fn f16_splat(self, bytes: [u8; 2]) -> Self::V;
    /// `table[low nibble]` of each byte.
    fn lookup_low(self, bytes: [u8; 16], table: Self::V) -> Self::V;
    /// `table[high nibble]` of each byte.
    fn lookup_high(self, bytes: [u8; 16], table: Self::V) -> Self::V;
}

/// A computation that runs on any ISA.
pub(super) trait Kernel {
    /// What it computes.
    type Output;
    /// Runs it; implementations are `#[inline(always)]`, so that they are compiled for the ISA.
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// Proof that AVX-512 F, BW, DQ and VL, AVX2, FMA and F16C are there.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Avx512(());

/// Proof that AVX2, FMA and F16C are there.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Avx2(());

/// The instructions in use, chosen once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Portable(Portable),
}

impl Isa {
    /// All that this processor can run, best first.
    pub(super) fn detected() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                found.push(Self::Avx512(Avx512(())));
            }
            if avx2 {
                found.push(Self::Avx2(Avx2(())));
            }
        }
        found.push(Self::Portable(Portable));
        found
    }

    /// For people.
    pub(super) const fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            Self::Portable(_) if cfg!(target_arch = "aarch64") => "neon",
            Self::Portable(_) => "portable",
        }
    }

    /// Whether `fma` rounds once.
    #[cfg(test)]
    pub(super) const fn rounds_once(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) | Self::Avx2(_) => true,
            Self::Portable(_) => cfg!(any(target_arch = "aarch64", target_feature = "fma")),
        }
    }

    /// Runs a kernel compiled for these instructions.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(lanes) => {
                // SAFETY: an `Avx512` is made by `Isa::detected` only, after each feature was detected.
                unsafe { enter_avx512(lanes, kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(lanes) => {
                // SAFETY: an `Avx2` is made by `Isa::detected` only, after each feature was detected.
                unsafe { enter_avx2(lanes, kernel) }
            }
            Self::Portable(lanes) => kernel.run(lanes),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn enter_avx512<K: Kernel>(lanes: Avx512, kernel: K) -> K::Output {
    kernel.run(lanes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn enter_avx2<K: Kernel>(lanes: Avx2, kernel: K) -> K::Output {
    kernel.run(lanes)
}

#[cfg(target_arch = "x86_64")]
macro_rules! through_token {
    ($token:ty, $module:ident, $wide:literal; $($name:ident($($arg:ident: $ty:ty),*) -> $out:ty;)*) => {
        impl Lanes for $token {
            type V = $module::V;
            const WIDE: bool = $wide;
            $(
                #[inline(always)]
                fn $name(self, $($arg: $ty),*) -> $out {
                    // SAFETY: the token `self` is made by `Isa::detected` only, after the features of the
                    // module's functions were detected.
                    unsafe { $module::$name($($arg),*) }
                }
            )*
        }
    };
    ($token:ty, $module:ident, $wide:literal) => {
        through_token! { $token, $module, $wide;
            splat(value: f32) -> Self::V;
            load(values: &[f32; 16]) -> Self::V;
            array(v: Self::V) -> [f32; 16];
            add(a: Self::V, b: Self::V) -> Self::V;
            sub(a: Self::V, b: Self::V) -> Self::V;
            mul(a: Self::V, b: Self::V) -> Self::V;
            div(a: Self::V, b: Self::V) -> Self::V;
            fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
            max(a: Self::V, b: Self::V) -> Self::V;
            min(a: Self::V, b: Self::V) -> Self::V;
            round(a: Self::V) -> Self::V;
            pow2(n: Self::V) -> Self::V;
            zero_below(v: Self::V, x: Self::V, bound: Self::V) -> Self::V;
            sum(v: Self::V) -> f32;
            sum4(v: [Self::V; 4]) -> [f32; 4];
            max_lane(v: Self::V) -> f32;
            u8s(bytes: [u8; 16]) -> Self::V;
            bits(bytes: [u8; 16], shift: u8, mask: u8) -> Self::V;
            i8s(bytes: [i8; 16]) -> Self::V;
            f16s(bytes: [u8; 32]) -> Self::V;
            bf16s(bytes: [u8; 32]) -> Self::V;
            f16_splat(bytes: [u8; 2]) -> Self::V;
            lookup_low(bytes: [u8; 16], table: Self::V) -> Self::V;
            lookup_high(bytes: [u8; 16], table: Self::V) -> Self::V;
        }
    };
}

#[cfg(target_arch = "x86_64")]
through_token!(Avx512, avx512, true);
#[cfg(target_arch = "x86_64")]
through_token!(Avx2, avx2, false);

/// Sixteen floats as a register.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
const fn to_m512(values: [f32; 16]) -> std::arch::x86_64::__m512 {
    // SAFETY: both types are 64 bytes of `f32` in lane order, and every bit pattern is valid.
    unsafe { std::mem::transmute(values) }
}

/// A register as sixteen floats.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
const fn from_m512(v: std::arch::x86_64::__m512) -> [f32; 16] {
    // SAFETY: both types are 64 bytes of `f32` in lane order, and every bit pattern is valid.
    unsafe { std::mem::transmute(v) }
}

/// Asks for the cache line that is `offset` bytes after the beginning of `bytes`, which may be past their end.
#[inline(always)]
pub(super) fn prefetch(bytes: &[u8], offset: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let line = bytes.as_ptr().wrapping_add(offset);
        // SAFETY: SSE is part of x86-64, and a prefetch is a hint that accesses nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, offset);
}

#[cfg(test)]
mod tests;

//! Eight f32 lanes, on the widest instructions that the machine has.
//!
//! A CPU kernel is written once, generic over [`Lanes`], as the `run` of a [`Kernel`]; [`dispatch`] picks the
//! instruction set when it is called. Every set has the same eight lanes and adds them up in the same order, so
//! results differ between machines only by whether multiply and add are fused.
//!
//! What is generic over [`Lanes`] must be `#[inline(always)]` and must not touch lanes inside a closure: only
//! what is inlined into [`dispatch`] is compiled for its instructions.

use half::{bf16, f16};

pub(crate) use self::portable::Portable;
use crate::cpu::Element;

#[cfg(any(test, target_arch = "x86_64"))]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod portable;

pub(crate) const LANES: usize = 8;
/// Of a [`Lanes::Pair`].
pub(crate) const PAIR: usize = 2 * LANES;

/// Added and subtracted, it leaves the nearest integer; added alone, in the lower bits: 1.5 * 2^23.
const ROUND: f32 = 12_582_912.0;

/// A computation over lanes, with its operands.
pub(crate) trait Kernel {
    type Output;
    fn run<V: Lanes>(self) -> Self::Output;
}

/// Instruction sets that kernels are written for, beyond the one that every machine of the architecture has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Instructions {
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Also AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX2, FMA and F16C, and AVX-512 F, BW and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// NEON's dot products of bytes.
    #[cfg(target_arch = "aarch64")]
    DotProduct,
}

/// The widest instructions that the machine has.
pub(crate) fn instructions() -> Instructions {
    #[cfg(test)]
    if let Some(instructions) = tests::INSTRUCTIONS.get() {
        return instructions;
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni");
        return match is_x86_feature_detected!("avxvnni") {
            _ if avx512 => Instructions::Avx512,
            true => Instructions::AvxVnni,
            false => Instructions::Avx2,
        };
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("dotprod") {
        return Instructions::DotProduct;
    }
    Instructions::Portable
}

/// Runs `kernel` on the widest instructions that the machine has.
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    match instructions() {
        // SAFETY: the three features were just found.
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 | Instructions::AvxVnni => unsafe { avx2::run(kernel) },
        // SAFETY: and AVX-512 F as well.
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 => unsafe { avx2::run_wide(kernel) },
        _ => kernel.run::<Portable>(),
    }
}

/// As [`dispatch`], with the machine's own [`Vector::dot`] if it has one.
pub(crate) fn dispatch_dots<K: Kernel>(kernel: K) -> K::Output {
    match instructions() {
        // SAFETY: the features were just found.
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 if has_dots() => unsafe { avx2::run_dots(kernel) },
        _ => dispatch(kernel),
    }
}

#[cfg(target_arch = "x86_64")]
fn has_dots() -> bool {
    is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vl")
}

/// Whether [`Vector::dot`] takes less time than two multiply-adds: on AMD's cores half of it, on Intel's twice as much.
pub(crate) fn dots_are_fast() -> bool {
    #[cfg(test)]
    if let Some(are_fast) = tests::DOTS_ARE_FAST.get() {
        return are_fast;
    }
    #[cfg(target_arch = "x86_64")]
    return instructions() == Instructions::Avx512 && has_dots() && is_amd();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// f32 values that are all treated alike: nothing is added across them.
pub(crate) trait Vector: Copy {
    /// How many.
    const WIDTH: usize;

    /// The first of `source`.
    fn read(source: &[f32]) -> Self;
    /// To the first of `target`.
    fn write(self, target: &mut [f32]);
    fn splat(value: f32) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self * factor + sum`, with one rounding where the instructions have it.
    fn mul_add(self, factor: Self, sum: Self) -> Self;
    /// `other` where either is NaN.
    fn max(self, other: Self) -> Self;
    /// `other` where either is NaN.
    fn min(self, other: Self) -> Self;
    /// `self * 2^exponent` for integral exponents within -252..=254.
    fn scale(self, exponent: Self) -> Self;
    /// The bf16 values that are the upper halves of these, widened.
    fn upper(self) -> Self;
    /// The bf16 values that are the lower halves of these, widened.
    fn lower(self) -> Self;

    /// Rounds to bf16, to nearest, ties to even.
    fn round_to_bf16(self) -> Self;

    /// `sum` plus, in each place, the dot product of the two bf16 values that stand there in `self` and in `other`: the
    /// product of the upper ones first, with one rounding for each where the instructions have it. Subnormal values
    /// count as zero or as what they are.
    #[inline(always)]
    fn dot(self, other: Self, sum: Self) -> Self {
        dot(self, other, sum)
    }

    /// The nearest integers, ties to even, of values within -2^22..=2^22.
    #[inline(always)]
    fn nearest(self) -> Self {
        self.add(Self::splat(ROUND)).sub(Self::splat(ROUND))
    }

    /// `e^self` within 2 ulp: 0 from -104 down, infinity from 89 up, subnormal between -104 and -87, NaN stays.
    ///
    /// The remainder of the series is below 6e-9.
    #[inline(always)]
    fn exp(self) -> Self {
        self.exp_by([1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0])
    }

    /// As [`Vector::exp`], with a remainder below 3e-6, a thousandth of what rounding to bf16 adds.
    #[inline(always)]
    fn exp_for_bf16(self) -> Self {
        self.exp_by([1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0])
    }

    /// `e^x = 2^n e^r` with `|r| <= ln 2 / 2`, and a Taylor series of `e^r`, its highest coefficient first.
    #[inline(always)]
    fn exp_by<const N: usize>(self, coefficients: [f32; N]) -> Self {
        // ln 2 in two parts, the first short enough for `n * LN_2_HIGH` to be exact.
        const LN_2_HIGH: f32 = 355.0 / 512.0;
        const LN_2_LOW: f32 = -2.121_944_4e-4;
        let x = Self::splat(-105.0).max(Self::splat(89.5).min(self));
        let round = Self::splat(ROUND);
        let n = x.mul_add(Self::splat(std::f32::consts::LOG2_E), round).sub(round);
        let r = n.mul_add(Self::splat(-LN_2_HIGH), x);
        let r = n.mul_add(Self::splat(-LN_2_LOW), r);
        let mut series = Self::splat(coefficients[0]);
        for &coefficient in &coefficients[1..] {
            series = series.mul_add(r, Self::splat(coefficient));
        }
        series.scale(n)
    }

    /// `1 / (1 + e^-self)`: within 4 ulp, and no overflow at either end.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let one = Self::splat(1.0);
        one.div(one.add(Self::splat(0.0).sub(self).exp()))
    }
}

/// Eight f32 values.
pub(crate) trait Lanes: Vector {
    /// Sixteen, in one register where there is one so wide.
    type Pair: Vector;

    fn pair(self, next: Self) -> Self::Pair;
    fn halves(pair: Self::Pair) -> [Self; 2];

    fn load_f16(source: &[f16; LANES]) -> Self;
    fn load_bf16(source: &[bf16; LANES]) -> Self;
    /// Rounds to nearest, ties to even.
    fn store_f16(self, target: &mut [f16; LANES]);
    /// Cuts the lower half off.
    fn store_upper(self, target: &mut [bf16; LANES]);

    /// The nearest integers of values within -128..=127, ties to even, those of the first lanes first.
    fn bytes(values: [Self::Pair; 4]) -> [i8; 4 * PAIR];
    /// Two bf16 values in each place: the upper halves of `upper` and those of `lower` below.
    fn join(upper: Self, lower: Self) -> Self;
    /// Rounds to bf16, to nearest, ties to even: values `2 i` and `2 i + 1` to the lower and upper half of place `i`.
    #[inline(always)]
    fn narrow(pair: Self::Pair) -> Self {
        narrow(pair)
    }
    /// Lane `i` of result `j` is lane `j` of `rows[i]`.
    fn transpose(rows: [Self; LANES]) -> [Self; LANES];
    /// The sum of the lanes of each, as `((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))`.
    fn sums(four: [Self; 4]) -> [f32; 4];

    /// The sums of the lanes of the four first halves and of the four second ones, as [`Lanes::sums`].
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn sums_of_halves(four: [Self::Pair; 4]) -> Self {
        sums_of_halves(four)
    }
    /// Lane `i` in all of the first half of result `i`, lane `i + 4` in all of its second half.
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn spread(self) -> [Self::Pair; 4] {
        spread(self)
    }

    #[inline(always)]
    fn load(source: &[f32; LANES]) -> Self {
        Self::read(source)
    }
    #[inline(always)]
    fn store(self, target: &mut [f32; LANES]) {
        self.write(target)
    }

    /// The sum of the lanes.
    #[inline(always)]
    fn sum(self) -> f32 {
        Self::sums([self; 4])[0]
    }

    /// The greatest lane.
    #[inline(always)]
    fn greatest(self) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes);
        let pair = |i: usize| lanes[i].max(lanes[i + 4]);
        pair(0).max(pair(1)).max(pair(2).max(pair(3)))
    }
}

/// [`Vector::dot`] in multiply-adds.
#[inline(always)]
fn dot<V: Vector>(a: V, b: V, sum: V) -> V {
    a.lower().mul_add(b.lower(), a.upper().mul_add(b.upper(), sum))
}

/// [`Lanes::narrow`] by way of memory.
#[inline(always)]
fn narrow<V: Lanes>(pair: V::Pair) -> V {
    let mut rounded = [bf16::ZERO; PAIR];
    store_pair::<V, bf16>(pair, &mut rounded);
    load_dots(&rounded)
}

/// Two vectors as one, where no register holds both.
#[derive(Clone, Copy)]
pub(crate) struct Two<V>(V, V);

impl<V: Vector> Vector for Two<V> {
    const WIDTH: usize = 2 * V::WIDTH;

    #[inline(always)]
    fn read(source: &[f32]) -> Self {
        Self(V::read(source), V::read(&source[V::WIDTH..]))
    }
    #[inline(always)]
    fn write(self, target: &mut [f32]) {
        self.0.write(target);
        self.1.write(&mut target[V::WIDTH..]);
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(V::splat(value), V::splat(value))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(self.0.add(other.0), self.1.add(other.1))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(self.0.sub(other.0), self.1.sub(other.1))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(self.0.mul(other.0), self.1.mul(other.1))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(self.0.div(other.0), self.1.div(other.1))
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, sum: Self) -> Self {
        Self(self.0.mul_add(factor.0, sum.0), self.1.mul_add(factor.1, sum.1))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(self.0.max(other.0), self.1.max(other.1))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(self.0.min(other.0), self.1.min(other.1))
    }
    #[inline(always)]
    fn scale(self, exponent: Self) -> Self {
        Self(self.0.scale(exponent.0), self.1.scale(exponent.1))
    }
    #[inline(always)]
    fn upper(self) -> Self {
        Self(self.0.upper(), self.1.upper())
    }
    #[inline(always)]
    fn lower(self) -> Self {
        Self(self.0.lower(), self.1.lower())
    }
    #[inline(always)]
    fn round_to_bf16(self) -> Self {
        Self(self.0.round_to_bf16(), self.1.round_to_bf16())
    }
}

/// [`Lanes::sums_of_halves`] of halves in registers of their own.
#[cfg(any(test, target_arch = "x86_64"))]
#[inline(always)]
fn sums_of_halves<V: Lanes>([a, b, c, d]: [V::Pair; 4]) -> V {
    let ([a, e], [b, f], [c, g], [d, h]) = (V::halves(a), V::halves(b), V::halves(c), V::halves(d));
    let mut sums = [0.0; LANES];
    sums[..4].copy_from_slice(&V::sums([a, b, c, d]));
    sums[4..].copy_from_slice(&V::sums([e, f, g, h]));
    V::load(&sums)
}

/// [`Lanes::spread`] to halves in registers of their own.
#[cfg(any(test, target_arch = "x86_64"))]
#[inline(always)]
fn spread<V: Lanes>(lanes: V) -> [V::Pair; 4] {
    let mut values = [0.0; LANES];
    lanes.store(&mut values);
    let [a, b, c, d, e, f, g, h] = values;
    [
        V::splat(a).pair(V::splat(e)),
        V::splat(b).pair(V::splat(f)),
        V::splat(c).pair(V::splat(g)),
        V::splat(d).pair(V::splat(h)),
    ]
}

/// An element type that lanes are loaded from and rounded to.
pub(crate) trait Stored: Element {
    /// How many bf16 values add up to one of these, at most.
    const PARTS: usize;
    const IS_BF16: bool = Self::PARTS == 1;

    /// The values, if they are bf16.
    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
    fn load<V: Lanes>(source: &[Self; LANES]) -> V;
    fn store<V: Lanes>(lanes: V, target: &mut [Self; LANES]);
}

impl Stored for f32 {
    const PARTS: usize = 3;

    #[inline(always)]
    fn load<V: Lanes>(source: &[Self; LANES]) -> V {
        V::load(source)
    }
    #[inline(always)]
    fn store<V: Lanes>(lanes: V, target: &mut [Self; LANES]) {
        lanes.store(target)
    }
}

impl Stored for f16 {
    const PARTS: usize = 2;

    #[inline(always)]
    fn load<V: Lanes>(source: &[Self; LANES]) -> V {
        V::load_f16(source)
    }
    #[inline(always)]
    fn store<V: Lanes>(lanes: V, target: &mut [Self; LANES]) {
        lanes.store_f16(target)
    }
}

impl Stored for bf16 {
    const PARTS: usize = 1;

    #[inline(always)]
    fn as_bf16(values: &[Self]) -> Option<&[bf16]> {
        Some(values)
    }
    #[inline(always)]
    fn load<V: Lanes>(source: &[Self; LANES]) -> V {
        V::load_bf16(source)
    }
    #[inline(always)]
    fn store<V: Lanes>(lanes: V, target: &mut [Self; LANES]) {
        lanes.round_to_bf16().store_upper(target)
    }
}

/// Up to eight values, widened; lanes past the end of `source` are zero.
#[inline(always)]
pub(crate) fn load<V: Lanes, T: Stored>(source: &[T]) -> V {
    match source.first_chunk() {
        Some(source) => T::load(source),
        None => {
            let mut padded = [T::round(0.0); LANES];
            padded[..source.len()].copy_from_slice(source);
            T::load(&padded)
        }
    }
}

/// The leading lanes, rounded, as many as `target` holds and at most eight.
#[inline(always)]
pub(crate) fn store<V: Lanes, T: Stored>(lanes: V, target: &mut [T]) {
    match target.first_chunk_mut() {
        Some(target) => T::store(lanes, target),
        None => {
            let mut padded = [T::round(0.0); LANES];
            T::store(lanes, &mut padded);
            target.copy_from_slice(&padded[..target.len()]);
        }
    }
}

/// Up to sixteen values, rounded to bf16 if they are not, two in each place as [`Lanes::narrow`] puts them.
#[inline(always)]
pub(crate) fn load_dots<V: Lanes, T: Stored>(source: &[T]) -> V {
    match T::as_bf16(source).and_then(|source| source.first_chunk::<PAIR>()) {
        // SAFETY: that many bytes; any bits are an f32.
        Some(source) => V::load(&unsafe { std::ptr::from_ref(source).cast::<[f32; LANES]>().read_unaligned() }),
        None => V::narrow(load_pair::<V, T>(&source[..source.len().min(PAIR)])),
    }
}

/// As [`load`], up to sixteen.
#[inline(always)]
pub(crate) fn load_pair<V: Lanes, T: Stored>(source: &[T]) -> V::Pair {
    let (first, second) = source.split_at(source.len().min(LANES));
    load::<V, T>(first).pair(load(second))
}

/// As [`store`], at most sixteen.
#[inline(always)]
pub(crate) fn store_pair<V: Lanes, T: Stored>(pair: V::Pair, target: &mut [T]) {
    let (first, second) = target.split_at_mut(target.len().min(LANES));
    let [a, b] = V::halves(pair);
    store(a, first);
    store(b, second);
}

/// Asks for `data` to be brought near, where the machine can be asked.
#[inline(always)]
pub(crate) fn prefetch<T>(data: &[T]) {
    prefetch_at(data.as_ptr(), data.len());
}

/// As [`prefetch`], of `count` values from `start` on, wherever that is.
#[inline(always)]
pub(crate) fn prefetch_at<T>(start: *const T, count: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..count * size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no effect but speed.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.cast::<i8>().wrapping_add(line)) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, count);
}

/// As [`prefetch`], into the second-level cache.
#[inline(always)]
pub(crate) fn prefetch_far<T>(data: &[T]) {
    prefetch_far_at(data.as_ptr(), data.len());
}

/// As [`prefetch_far`], of `count` values from `start` on, wherever that is.
#[inline(always)]
pub(crate) fn prefetch_far_at<T>(start: *const T, count: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..count * size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch has no effect but speed.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(start.cast::<i8>().wrapping_add(line)) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, count);
}

/// Whether the hardware is best left to read ahead by itself of one who goes through memory from end to end, shown the
/// way now and then. AMD's cores have little room for requests, and what they read ahead by themselves has its own;
/// Intel's take a request for every line, and read less without.
#[inline(always)]
pub(crate) fn reads_ahead() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_amd();
    #[cfg(not(target_arch = "x86_64"))]
    true
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    static IS_AMD: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let std::arch::x86_64::CpuidResult { ebx, ecx, edx, .. } = std::arch::x86_64::__cpuid(0);
        [ebx, edx, ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
    });
    *IS_AMD
}

/// The sum of squares of `x`, in f32.
#[inline(always)]
pub(crate) fn sum_of_squares<V: Lanes, T: Stored>(x: &[T]) -> f32 {
    let (quads, rest) = x.as_chunks::<{ 4 * LANES }>();
    let mut sums = [V::splat(0.0); 4];
    for quad in quads {
        for (sum, x) in sums.iter_mut().zip(quad.as_chunks::<LANES>().0) {
            let x: V = T::load(x);
            *sum = x.mul_add(x, *sum);
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest.chunks(LANES)) {
        let x: V = load(x);
        *sum = x.mul_add(x, *sum);
    }
    let [a, b, c, d] = V::sums(sums);
    (a + b) + (c + d)
}

#[cfg(test)]
pub(crate) mod tests;

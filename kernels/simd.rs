//! Eight f32 lanes, on the widest instructions that the machine has.
//!
//! A CPU kernel is written once, generic over [`Lanes`], as the `run` of a [`Kernel`]; [`dispatch`] picks the
//! instruction set when it is called. Every set has the same eight lanes and adds them up in the same order, so
//! results differ between machines only by whether multiply and add are fused.
//!
//! What is generic over [`Lanes`] must be `#[inline(always)]` and must not touch lanes inside a closure: only
//! what is inlined into [`dispatch`] is compiled for its instructions.

use half::{bf16, f16};

use crate::cpu::Element;

#[cfg(any(test, target_arch = "x86_64"))]
pub(crate) mod amx;

pub(crate) const LANES: usize = 8;

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
        Instructions::Avx2 | Instructions::AvxVnni | Instructions::Avx512 => unsafe { avx2::run(kernel) },
        _ => kernel.run::<Portable>(),
    }
}

/// Eight f32 values.
pub(crate) trait Lanes: Copy {
    fn splat(value: f32) -> Self;
    fn load(source: &[f32; LANES]) -> Self;
    fn load_f16(source: &[f16; LANES]) -> Self;
    fn load_bf16(source: &[bf16; LANES]) -> Self;
    fn store(self, target: &mut [f32; LANES]);
    /// Rounds to nearest, ties to even.
    fn store_f16(self, target: &mut [f16; LANES]);
    /// Rounds to nearest, ties to even.
    fn store_bf16(self, target: &mut [bf16; LANES]);
    /// Cuts the lower half off.
    #[cfg(any(test, target_arch = "x86_64"))]
    fn store_upper(self, target: &mut [bf16; LANES]);

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
    /// The nearest integers of values within -128..=127, ties to even, those of the first lanes first.
    fn bytes(values: [Self; LANES]) -> [i8; LANES * LANES];
    /// Lane `i` of result `j` is lane `j` of `rows[i]`.
    fn transpose(rows: [Self; LANES]) -> [Self; LANES];
    /// The sum of the lanes of each, as `((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))`.
    fn sums(four: [Self; 4]) -> [f32; 4];

    /// The nearest integers, ties to even, of values within -2^22..=2^22.
    #[inline(always)]
    fn nearest(self) -> Self {
        self.add(Self::splat(ROUND)).sub(Self::splat(ROUND))
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

    /// `e^self` within 2 ulp: 0 from -104 down, infinity from 89 up, subnormal between -104 and -87, NaN stays.
    ///
    /// `e^x = 2^n e^r` with `|r| <= ln 2 / 2`, and the Taylor series of `e^r` up to `r^7 / 7!`, whose remainder
    /// is below 6e-9.
    #[inline(always)]
    fn exp(self) -> Self {
        // ln 2 in two parts, the first short enough for `n * LN_2_HIGH` to be exact.
        const LN_2_HIGH: f32 = 355.0 / 512.0;
        const LN_2_LOW: f32 = -2.121_944_4e-4;
        let x = Self::splat(-105.0).max(Self::splat(89.5).min(self));
        let round = Self::splat(ROUND);
        let n = x.mul_add(Self::splat(std::f32::consts::LOG2_E), round).sub(round);
        let r = n.mul_add(Self::splat(-LN_2_HIGH), x);
        let r = n.mul_add(Self::splat(-LN_2_LOW), r);
        let mut series = Self::splat(1.0 / 5040.0);
        for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
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

/// An element type that lanes are loaded from and rounded to.
pub(crate) trait Stored: Element {
    /// How many bf16 values add up to one of these, at most.
    #[cfg_attr(not(any(test, target_arch = "x86_64")), expect(dead_code, reason = "for AMX"))]
    const PARTS: usize;

    /// The values, if they are bf16.
    #[cfg_attr(not(any(test, target_arch = "x86_64")), expect(dead_code, reason = "for AMX"))]
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
        lanes.store_bf16(target)
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

/// Lanes of the baseline instruction set, in a form that compilers turn into vectors.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for Portable {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }
    #[inline(always)]
    fn load(source: &[f32; LANES]) -> Self {
        Self(*source)
    }
    #[inline(always)]
    fn load_f16(source: &[f16; LANES]) -> Self {
        Self(source.map(f16::widen))
    }
    #[inline(always)]
    fn load_bf16(source: &[bf16; LANES]) -> Self {
        Self(source.map(bf16::widen))
    }
    #[inline(always)]
    fn store(self, target: &mut [f32; LANES]) {
        *target = self.0
    }
    #[inline(always)]
    fn store_f16(self, target: &mut [f16; LANES]) {
        *target = self.0.map(f16::round)
    }
    #[inline(always)]
    fn store_bf16(self, target: &mut [bf16; LANES]) {
        *target = self.0.map(bf16::round)
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn store_upper(self, target: &mut [bf16; LANES]) {
        *target = self.0.map(|x| bf16::from_bits((x.to_bits() >> 16) as u16))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, sum: Self) -> Self {
        // Without the instruction `f32::mul_add` is a call.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            Self(std::array::from_fn(|i| self.0[i].mul_add(factor.0[i], sum.0[i])))
        } else {
            self.mul(factor).add(sum)
        }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn scale(self, exponent: Self) -> Self {
        let power = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
        self.zip(exponent, |x, e| {
            let e = e as i32;
            x * power(e >> 1) * power(e - (e >> 1))
        })
    }
    #[inline(always)]
    fn bytes(values: [Self; LANES]) -> [i8; LANES * LANES] {
        let mut bytes = [0; LANES * LANES];
        for (value, byte) in values.iter().flat_map(|value| value.0).zip(&mut bytes) {
            *byte = (value + ROUND).to_bits() as i8;
        }
        bytes
    }
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        std::array::from_fn(|j| Self(std::array::from_fn(|i| rows[i].0[j])))
    }
    #[inline(always)]
    fn sums(four: [Self; 4]) -> [f32; 4] {
        four.map(|Self(x)| ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])))
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::{Kernel, LANES, Lanes, ROUND};

    /// # Safety
    ///
    /// The machine has AVX2, FMA and F16C.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<Avx2>()
    }

    /// Lanes in one register. Only [`run`] names this type, so wherever a method is called the features are there.
    #[derive(Clone, Copy)]
    pub(super) struct Avx2(__m256);

    impl Avx2 {
        /// Transposes the lower and the upper four columns of four rows, side by side.
        #[inline(always)]
        fn transpose_quarters([a, b, c, d]: [Self; 4]) -> [__m256; 4] {
            // SAFETY: the features are there.
            unsafe {
                let (ab, ab_high) = (_mm256_unpacklo_ps(a.0, b.0), _mm256_unpackhi_ps(a.0, b.0));
                let (cd, cd_high) = (_mm256_unpacklo_ps(c.0, d.0), _mm256_unpackhi_ps(c.0, d.0));
                [
                    _mm256_shuffle_ps::<0x44>(ab, cd),
                    _mm256_shuffle_ps::<0xee>(ab, cd),
                    _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
                    _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
                ]
            }
        }
    }

    // SAFETY of every block below: the features are there, and loads and stores cover exactly the borrowed array.
    impl Lanes for Avx2 {
        #[inline(always)]
        fn splat(value: f32) -> Self {
            Self(unsafe { _mm256_set1_ps(value) })
        }
        #[inline(always)]
        fn load(source: &[f32; LANES]) -> Self {
            Self(unsafe { _mm256_loadu_ps(source.as_ptr()) })
        }
        #[inline(always)]
        fn load_f16(source: &[f16; LANES]) -> Self {
            Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(source.as_ptr().cast())) })
        }
        #[inline(always)]
        fn load_bf16(source: &[bf16; LANES]) -> Self {
            // A bf16 is the upper half of an f32.
            Self(unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(source.as_ptr().cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            })
        }
        #[inline(always)]
        fn store(self, target: &mut [f32; LANES]) {
            unsafe { _mm256_storeu_ps(target.as_mut_ptr(), self.0) }
        }
        #[inline(always)]
        fn store_f16(self, target: &mut [f16; LANES]) {
            unsafe {
                let rounded = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
                _mm_storeu_si128(target.as_mut_ptr().cast(), rounded)
            }
        }
        #[inline(always)]
        fn store_bf16(self, target: &mut [bf16; LANES]) {
            unsafe {
                let bits = _mm256_castps_si256(self.0);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                // Rounding could carry a NaN into infinity: NaN is cut instead, and made quiet.
                let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
                let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
                let upper = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, is_nan));
                let packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256::<1>(upper));
                _mm_storeu_si128(target.as_mut_ptr().cast(), packed)
            }
        }
        #[inline(always)]
        fn store_upper(self, target: &mut [bf16; LANES]) {
            unsafe {
                let upper = _mm256_srli_epi32::<16>(_mm256_castps_si256(self.0));
                let packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256::<1>(upper));
                _mm_storeu_si128(target.as_mut_ptr().cast(), packed)
            }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            Self(unsafe { _mm256_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            Self(unsafe { _mm256_sub_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            Self(unsafe { _mm256_mul_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn div(self, other: Self) -> Self {
            Self(unsafe { _mm256_div_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul_add(self, factor: Self, sum: Self) -> Self {
            Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, sum.0) })
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            Self(unsafe { _mm256_max_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn min(self, other: Self) -> Self {
            Self(unsafe { _mm256_min_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn scale(self, exponent: Self) -> Self {
            unsafe {
                let exponent = _mm256_cvtps_epi32(exponent.0);
                let half = _mm256_srai_epi32::<1>(exponent);
                let rest = _mm256_sub_epi32(exponent, half);
                let bias = _mm256_set1_epi32(127);
                let low = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias)));
                let high = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias)));
                Self(_mm256_mul_ps(_mm256_mul_ps(self.0, low), high))
            }
        }
        #[inline(always)]
        fn bytes(values: [Self; LANES]) -> [i8; LANES * LANES] {
            let mut bytes = [0; LANES * LANES];
            for (values, bytes) in values.as_chunks::<4>().0.iter().zip(bytes.as_chunks_mut::<32>().0) {
                unsafe {
                    let mut lowest = [_mm256_setzero_si256(); 4];
                    for i in 0..4 {
                        let bits = _mm256_castps_si256(_mm256_add_ps(values[i].0, _mm256_set1_ps(ROUND)));
                        lowest[i] = _mm256_and_si256(bits, _mm256_set1_epi32(0xff));
                    }
                    let [a, b, c, d] = lowest;
                    // Either half of a register gets four bytes of each value.
                    let mixed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
                    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
                    _mm256_storeu_si256(bytes.as_mut_ptr().cast(), _mm256_permutevar8x32_epi32(mixed, order))
                }
            }
            bytes
        }
        #[inline(always)]
        fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
            let [a, b, c, d, e, f, g, h] = rows;
            let upper = Self::transpose_quarters([a, b, c, d]);
            let lower = Self::transpose_quarters([e, f, g, h]);
            let mut columns = rows;
            for j in 0..4 {
                unsafe {
                    columns[j] = Self(_mm256_permute2f128_ps::<0x20>(upper[j], lower[j]));
                    columns[j + 4] = Self(_mm256_permute2f128_ps::<0x31>(upper[j], lower[j]));
                }
            }
            columns
        }
        #[inline(always)]
        fn sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
            unsafe {
                let quarters = _mm256_hadd_ps(_mm256_hadd_ps(a.0, b.0), _mm256_hadd_ps(c.0, d.0));
                let sums = _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps::<1>(quarters));
                let mut out = [0.0; 4];
                _mm_storeu_ps(out.as_mut_ptr(), sums);
                out
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;

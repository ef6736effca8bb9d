use std::arch::asm;
use std::arch::x86_64::*;

use super::{Affine, Dot, Four, HALF, Kernel, Row, word};
use crate::quantized::{Codes, OUTS};

/// # Safety
///
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run::<Avx2>()
}

/// Only [`run`] and [`super::avx_vnni`] name this type, so wherever a method is called the features are there.
pub(super) struct Avx2;

/// Registers that hold one i32 for each output of a part.
pub(super) const REGISTERS: usize = 2;

#[inline(always)]
pub(super) fn repeat(x: Four) -> __m256i {
    // SAFETY: the features are there.
    unsafe { _mm256_set1_epi32(word(x)) }
}

// In assembly, or the compiler would regroup the additions, which takes more registers than there are.

/// Adds the products of codes up to 15 with signed bytes.
///
/// # Safety
///
/// The machine has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn multiply_add_small(mut sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
    // SAFETY: the instructions touch nothing but these registers.
    unsafe {
        asm!(
            "vpmaddubsw {pairs}, {codes}, {x}",
            "vpaddw {sums}, {sums}, {pairs}",
            pairs = out(ymm_reg) _, codes = in(ymm_reg) codes, x = in(ymm_reg) x, sums = inout(ymm_reg) sums,
            options(nomem, nostack, preserves_flags)
        )
    }
    sums
}

/// Adds the products of signed bytes, `size` being `x` without signs.
///
/// # Safety
///
/// The machine has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn multiply_add(mut sums: __m256i, codes: __m256i, x: __m256i, size: __m256i) -> __m256i {
    // The instruction takes the bytes of one side as unsigned, so that side's signs move to the other. No pair exceeds
    // 2 * 127 * 127, which fits i16.
    // SAFETY: the instructions touch nothing but these registers.
    unsafe {
        asm!(
            "vpsignb {pairs}, {codes}, {x}",
            "vpmaddubsw {pairs}, {size}, {pairs}",
            "vpmaddwd {pairs}, {pairs}, {ones}",
            "vpaddd {sums}, {sums}, {pairs}",
            pairs = out(ymm_reg) _, codes = in(ymm_reg) codes, x = in(ymm_reg) x, size = in(ymm_reg) size,
            ones = in(ymm_reg) _mm256_set1_epi16(1), sums = inout(ymm_reg) sums,
            options(nomem, nostack, preserves_flags)
        )
    }
    sums
}

/// Registers of a part among those of a panel.
#[inline(always)]
fn part<T>(panel: &[T; OUTS], part: usize) -> &[[T; 8]; REGISTERS] {
    &panel.as_chunks().0.as_chunks().0[part]
}

#[inline(always)]
fn part_mut<T>(panel: &mut [T; OUTS], part: usize) -> &mut [[T; 8]; REGISTERS] {
    &mut panel.as_chunks_mut().0.as_chunks_mut().0[part]
}

#[inline(always)]
fn load(values: &[f32; 8]) -> __m256 {
    // SAFETY: the array has the register's size.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

// SAFETY of every block below: the features are there, and loads and stores cover exactly the borrowed array.
impl Dot for Avx2 {
    const WIDTH: usize = 8 * REGISTERS;
    const ROWS: usize = 4;

    type Bytes = [__m256i; REGISTERS];
    type Sums = [__m256i; REGISTERS];
    /// Two i16 for each output. Sixteen products of no more than 15 * 127 fit.
    type Small = [__m256i; REGISTERS];

    #[inline(always)]
    fn load(codes: &Codes, p: usize) -> Self::Bytes {
        let codes = part(codes, p);
        unsafe { [_mm256_loadu_si256(codes[0].as_ptr().cast()), _mm256_loadu_si256(codes[1].as_ptr().cast())] }
    }
    #[inline(always)]
    fn store(bytes: Self::Bytes, p: usize, codes: &mut Codes) {
        for (bytes, codes) in bytes.into_iter().zip(part_mut(codes, p)) {
            unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), bytes) }
        }
    }
    #[inline(always)]
    fn signed(bytes: Self::Bytes) -> Self::Bytes {
        bytes
    }
    #[inline(always)]
    fn nibbles([a, b]: Self::Bytes) -> [Self::Bytes; 2] {
        unsafe {
            let low = _mm256_set1_epi8(15);
            let (upper_a, upper_b) = (_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b));
            [
                [_mm256_and_si256(a, low), _mm256_and_si256(b, low)],
                [_mm256_and_si256(upper_a, low), _mm256_and_si256(upper_b, low)],
            ]
        }
    }
    #[inline(always)]
    fn unbiased(_: i32) -> Self::Sums {
        Self::small()
    }
    #[inline(always)]
    fn add<const R: usize>(sums: &mut [Self::Sums; R], codes: Self::Bytes, x: &[Row; R], step: usize) {
        for r in 0..R {
            let x = repeat(x[r][step]);
            for i in 0..REGISTERS {
                sums[r][i] = unsafe { multiply_add(sums[r][i], codes[i], x, _mm256_abs_epi8(x)) };
            }
        }
    }
    #[inline(always)]
    fn small() -> Self::Small {
        [unsafe { _mm256_setzero_si256() }; REGISTERS]
    }
    #[inline(always)]
    fn add_small<const R: usize>(sums: &mut [Self::Small; R], codes: Self::Bytes, x: &[Row; R], step: usize) {
        for r in 0..R {
            let x = repeat(x[r][step]);
            for i in 0..REGISTERS {
                sums[r][i] = unsafe { multiply_add_small(sums[r][i], codes[i], x) };
            }
        }
    }
    #[inline(always)]
    fn second(_: Self::Small) -> Self::Small {
        Self::small()
    }
    #[inline(always)]
    fn total([first, second]: [Self::Small; 2]) -> Self::Sums {
        let mut sums = first;
        for i in 0..REGISTERS {
            unsafe {
                let ones = _mm256_set1_epi16(1);
                sums[i] = _mm256_add_epi32(_mm256_madd_epi16(first[i], ones), _mm256_madd_epi16(second[i], ones));
            }
        }
        sums
    }
    #[inline(always)]
    fn add_scaled(sums: Self::Sums, factor: f32, scales: &[f32; OUTS], p: usize, totals: &mut [f32; OUTS]) {
        let (scales, totals) = (part(scales, p), part_mut(totals, p));
        for i in 0..REGISTERS {
            unsafe {
                let sums = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i]), _mm256_set1_ps(factor));
                let total = _mm256_fmadd_ps(sums, load(&scales[i]), load(&totals[i]));
                _mm256_storeu_ps(totals[i].as_mut_ptr(), total);
            }
        }
    }
    #[inline(always)]
    fn add_affine(sums: Self::Sums, affine: Affine, p: usize, totals: &mut [f32; OUTS]) {
        let (scales, minima, totals) = (part(affine.scales, p), part(affine.minima, p), part_mut(totals, p));
        for i in 0..REGISTERS {
            unsafe {
                let sums = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i]), _mm256_set1_ps(affine.factor));
                let total = _mm256_fmadd_ps(sums, load(&scales[i]), load(&totals[i]));
                let total = _mm256_fmadd_ps(_mm256_set1_ps(affine.sum), load(&minima[i]), total);
                _mm256_storeu_ps(totals[i].as_mut_ptr(), total);
            }
        }
    }

    #[cfg(any(test, target_arch = "x86_64"))]
    type Half = [__m256; 2];

    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn load_half(values: &[f32; HALF]) -> Self::Half {
        let halves = values.as_chunks().0;
        [load(&halves[0]), load(&halves[1])]
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn store_half(half: Self::Half, values: &mut [f32; HALF]) {
        for (half, values) in half.into_iter().zip(values.as_chunks_mut::<8>().0) {
            unsafe { _mm256_storeu_ps(values.as_mut_ptr(), half) }
        }
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn half_scaled(sums: &[i32; HALF], factor: f32, scales: Self::Half, totals: Self::Half) -> Self::Half {
        let mut new = totals;
        for i in 0..2 {
            unsafe {
                let sums = _mm256_cvtepi32_ps(_mm256_loadu_si256(sums.as_chunks::<8>().0[i].as_ptr().cast()));
                new[i] = _mm256_fmadd_ps(_mm256_mul_ps(sums, _mm256_set1_ps(factor)), scales[i], totals[i]);
            }
        }
        new
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn half_shifted(sum: f32, minima: Self::Half, totals: Self::Half) -> Self::Half {
        let mut new = totals;
        for i in 0..2 {
            new[i] = unsafe { _mm256_fmadd_ps(_mm256_set1_ps(sum), minima[i], totals[i]) };
        }
        new
    }
}

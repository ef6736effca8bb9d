use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::atomic::{Ordering, compiler_fence};

use half::bf16;

use super::{Affine, Codes, Dot, Four, Kernel, word};
use crate::quantized::OUTS;

/// # Safety
///
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run::<Avx2>()
}

/// Only [`run`] names this type, so wherever a method is called the features are there.
struct Avx2;

/// Registers that hold one i32 for each output.
const PARTS: usize = OUTS / 8;

#[inline(always)]
fn part(codes: &Codes, part: usize) -> __m256i {
    let (parts, _) = codes.as_chunks::<8>();
    // SAFETY: the array has the register's size.
    unsafe { _mm256_loadu_si256(parts[part].as_ptr().cast()) }
}

/// Keeps the compiler from loading much before the first of it is used: with the sums in registers, few are left.
#[inline(always)]
fn in_order() {
    compiler_fence(Ordering::SeqCst)
}

#[inline(always)]
fn repeat(x: Four) -> __m256i {
    // SAFETY: the features are there.
    unsafe { _mm256_set1_epi32(word(x)) }
}

/// The upper halves of the f32.
#[inline(always)]
fn widen(values: &[bf16; OUTS], part: usize) -> __m256 {
    let (parts, _) = values.as_chunks::<8>();
    // SAFETY: the array has half the register's size.
    unsafe {
        let halves = _mm_loadu_si128(parts[part].as_ptr().cast());
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
    }
}

#[inline(always)]
fn add_part<const R: usize>(words: &mut [[__m256i; PARTS]; R], part: usize, codes: __m256i, x: [Four; R]) {
    for (words, x) in words.iter_mut().zip(x) {
        // SAFETY: the features are there.
        words[part] = unsafe { multiply_add_small(words[part], codes, repeat(x)) };
    }
}

// In assembly, or the compiler would regroup the additions, which takes more registers than there are.

/// Adds the products of codes up to 15 with signed bytes.
///
/// # Safety
///
/// The machine has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn multiply_add_small(mut words: __m256i, codes: __m256i, x: __m256i) -> __m256i {
    // SAFETY: the instructions touch nothing but these registers.
    unsafe {
        asm!(
            "vpmaddubsw {pairs}, {codes}, {x}",
            "vpaddw {words}, {words}, {pairs}",
            pairs = out(ymm_reg) _, codes = in(ymm_reg) codes, x = in(ymm_reg) x, words = inout(ymm_reg) words,
            options(nomem, nostack, preserves_flags)
        )
    }
    words
}

/// Adds the products of signed bytes, `size` being `x` without signs.
///
/// # Safety
///
/// The machine has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn multiply_add(mut sum: __m256i, codes: __m256i, x: __m256i, size: __m256i) -> __m256i {
    // The instruction takes the bytes of one side as unsigned, so that side's signs move to the other. No pair exceeds
    // 2 * 127 * 127, which fits i16.
    // SAFETY: the instructions touch nothing but these registers.
    unsafe {
        asm!(
            "vpsignb {pairs}, {codes}, {x}",
            "vpmaddubsw {pairs}, {size}, {pairs}",
            "vpmaddwd {pairs}, {pairs}, {ones}",
            "vpaddd {sum}, {sum}, {pairs}",
            pairs = out(ymm_reg) _, codes = in(ymm_reg) codes, x = in(ymm_reg) x, size = in(ymm_reg) size,
            ones = in(ymm_reg) _mm256_set1_epi16(1), sum = inout(ymm_reg) sum,
            options(nomem, nostack, preserves_flags)
        )
    }
    sum
}

// SAFETY of every block below: the features are there, and loads and stores cover exactly the borrowed array.
impl Dot for Avx2 {
    type Sums = [__m256i; PARTS];
    /// Two i16 for each output. Sixteen products of no more than 15 * 127 fit.
    type Words = [__m256i; PARTS];

    #[inline(always)]
    fn no_sums(_: i32) -> Self::Sums {
        [unsafe { _mm256_setzero_si256() }; PARTS]
    }
    #[inline(always)]
    fn add_signed<const R: usize>(sums: &mut [Self::Sums; R], codes: &Codes, x: [Four; R]) {
        for (sums, x) in sums.iter_mut().zip(x) {
            let x = repeat(x);
            for (p, sum) in sums.iter_mut().enumerate() {
                *sum = unsafe { multiply_add(*sum, part(codes, p), x, _mm256_abs_epi8(x)) };
            }
        }
    }
    #[inline(always)]
    fn no_words() -> Self::Words {
        Self::no_sums(0)
    }
    #[inline(always)]
    fn add_nibbles<const R: usize>(words: &mut [Self::Words; R], codes: &Codes, low: [Four; R], high: [Four; R]) {
        for p in 0..PARTS {
            in_order();
            let lower = unsafe { _mm256_and_si256(part(codes, p), _mm256_set1_epi8(15)) };
            add_part(words, p, lower, low);
        }
        for p in 0..PARTS {
            in_order();
            let upper = unsafe { _mm256_srli_epi16::<4>(part(codes, p)) };
            add_part(words, p, unsafe { _mm256_and_si256(upper, _mm256_set1_epi8(15)) }, high);
        }
    }
    #[inline(always)]
    fn total(words: Self::Words) -> Self::Sums {
        words.map(|words| unsafe { _mm256_madd_epi16(words, _mm256_set1_epi16(1)) })
    }
    #[inline(always)]
    fn add_scaled(sums: Self::Sums, factor: f32, scales: &[bf16; OUTS], totals: &mut [f32; OUTS]) {
        for (p, totals) in totals.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            unsafe {
                let sums = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[p]), _mm256_set1_ps(factor));
                let total = _mm256_fmadd_ps(sums, widen(scales, p), _mm256_loadu_ps(totals.as_ptr()));
                _mm256_storeu_ps(totals.as_mut_ptr(), total);
            }
        }
    }
    #[inline(always)]
    fn add_affine(sums: [Self::Sums; 2], affine: Affine, totals: &mut [f32; OUTS]) {
        let Affine { factors, sum, scales, minima } = affine;
        for (p, totals) in totals.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            unsafe {
                let first = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[0][p]), _mm256_set1_ps(factors[0]));
                let parts = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[1][p]), _mm256_set1_ps(factors[1]), first);
                let total = _mm256_fmadd_ps(parts, widen(scales, p), _mm256_loadu_ps(totals.as_ptr()));
                let total = _mm256_fmadd_ps(_mm256_set1_ps(sum), widen(minima, p), total);
                _mm256_storeu_ps(totals.as_mut_ptr(), total);
            }
        }
    }
}

use std::arch::x86_64::*;

use half::bf16;

use super::{Affine, Codes, Dot, Four, Kernel, word};
use crate::quantized::OUTS;

/// # Safety
///
/// The machine has AVX-512 F, BW and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run::<Avx512>()
}

/// Only [`run`] names this type, so wherever a method is called the features are there.
struct Avx512;

/// Registers that hold one i32 for each output.
const PARTS: usize = OUTS / 16;

#[inline(always)]
fn part(codes: &Codes, part: usize) -> __m512i {
    let (parts, _) = codes.as_chunks::<16>();
    // SAFETY: the array has the register's size.
    unsafe { _mm512_loadu_si512(parts[part].as_ptr().cast()) }
}

#[inline(always)]
fn repeat(x: Four) -> __m512i {
    // SAFETY: the features are there.
    unsafe { _mm512_set1_epi32(word(x)) }
}

/// The upper halves of the f32.
#[inline(always)]
fn widen(values: &[bf16; OUTS], part: usize) -> __m512 {
    let (parts, _) = values.as_chunks::<16>();
    // SAFETY: the array has half the register's size.
    unsafe {
        let halves = _mm256_loadu_si256(parts[part].as_ptr().cast());
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
    }
}

// SAFETY of every block below: the features are there, and loads and stores cover exactly the borrowed array.
impl Dot for Avx512 {
    type Sums = [__m512i; PARTS];
    type Words = [__m512i; PARTS];

    /// The instruction takes the codes as unsigned, so they come 128 too large.
    #[inline(always)]
    fn no_sums(sum: i32) -> Self::Sums {
        [unsafe { _mm512_set1_epi32(-128 * sum) }; PARTS]
    }
    #[inline(always)]
    fn add_signed<const R: usize>(sums: &mut [Self::Sums; R], codes: &Codes, x: [Four; R]) {
        for p in 0..PARTS {
            let codes = unsafe { _mm512_xor_si512(part(codes, p), _mm512_set1_epi8(-128)) };
            for (sums, x) in sums.iter_mut().zip(x) {
                sums[p] = unsafe { _mm512_dpbusd_epi32(sums[p], codes, repeat(x)) };
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
            let codes = part(codes, p);
            unsafe {
                let lower = _mm512_and_si512(codes, _mm512_set1_epi8(15));
                let upper = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), _mm512_set1_epi8(15));
                for (words, (low, high)) in words.iter_mut().zip(low.into_iter().zip(high)) {
                    words[p] = _mm512_dpbusd_epi32(words[p], lower, repeat(low));
                    words[p] = _mm512_dpbusd_epi32(words[p], upper, repeat(high));
                }
            }
        }
    }
    #[inline(always)]
    fn total(words: Self::Words) -> Self::Sums {
        words
    }
    #[inline(always)]
    fn add_scaled(sums: Self::Sums, factor: f32, scales: &[bf16; OUTS], totals: &mut [f32; OUTS]) {
        for (p, totals) in totals.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            unsafe {
                let sums = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[p]), _mm512_set1_ps(factor));
                let total = _mm512_fmadd_ps(sums, widen(scales, p), _mm512_loadu_ps(totals.as_ptr()));
                _mm512_storeu_ps(totals.as_mut_ptr(), total);
            }
        }
    }
    #[inline(always)]
    fn add_affine(sums: [Self::Sums; 2], affine: Affine, totals: &mut [f32; OUTS]) {
        let Affine { factors, sum, scales, minima } = affine;
        for (p, totals) in totals.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            unsafe {
                let first = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[0][p]), _mm512_set1_ps(factors[0]));
                let parts = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[1][p]), _mm512_set1_ps(factors[1]), first);
                let total = _mm512_fmadd_ps(parts, widen(scales, p), _mm512_loadu_ps(totals.as_ptr()));
                let total = _mm512_fmadd_ps(_mm512_set1_ps(sum), widen(minima, p), total);
                _mm512_storeu_ps(totals.as_mut_ptr(), total);
            }
        }
    }
}

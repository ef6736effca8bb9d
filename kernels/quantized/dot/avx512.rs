use std::arch::x86_64::*;

use super::{Affine, Dot, HALF, Kernel, Row, word};
use crate::quantized::{Codes, OUTS};

/// # Safety
///
/// The machine has AVX-512 F, BW and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run::<Avx512>()
}

/// Only [`run`] names this type, so wherever a method is called the features are there.
struct Avx512;

/// Registers that hold one i32 for each output of a part, which is the whole panel.
const REGISTERS: usize = OUTS / 16;

/// A register of a panel's values.
#[inline(always)]
fn load(values: &[f32; OUTS], i: usize) -> __m512 {
    // SAFETY: the array has the register's size.
    unsafe { _mm512_loadu_ps(values.as_chunks::<16>().0[i].as_ptr()) }
}

// SAFETY of every block below: the features are there, and loads and stores cover exactly the borrowed array.
impl Dot for Avx512 {
    const WIDTH: usize = OUTS;
    const ROWS: usize = 12;

    type Bytes = [__m512i; REGISTERS];
    type Sums = [__m512i; REGISTERS];
    type Small = [__m512i; REGISTERS];

    #[inline(always)]
    fn load(codes: &Codes, _: usize) -> Self::Bytes {
        let halves = codes.as_chunks::<16>().0;
        unsafe { [_mm512_loadu_si512(halves[0].as_ptr().cast()), _mm512_loadu_si512(halves[1].as_ptr().cast())] }
    }
    #[inline(always)]
    fn store(bytes: Self::Bytes, _: usize, codes: &mut Codes) {
        for (bytes, codes) in bytes.into_iter().zip(codes.as_chunks_mut::<16>().0) {
            unsafe { _mm512_storeu_si512(codes.as_mut_ptr().cast(), bytes) }
        }
    }
    /// The instruction takes them as unsigned: 128 is added.
    #[inline(always)]
    fn signed([a, b]: Self::Bytes) -> Self::Bytes {
        unsafe {
            let sign = _mm512_set1_epi8(-128);
            [_mm512_xor_si512(a, sign), _mm512_xor_si512(b, sign)]
        }
    }
    #[inline(always)]
    fn nibbles([a, b]: Self::Bytes) -> [Self::Bytes; 2] {
        unsafe {
            let low = _mm512_set1_epi8(15);
            let (upper_a, upper_b) = (_mm512_srli_epi16::<4>(a), _mm512_srli_epi16::<4>(b));
            [
                [_mm512_and_si512(a, low), _mm512_and_si512(b, low)],
                [_mm512_and_si512(upper_a, low), _mm512_and_si512(upper_b, low)],
            ]
        }
    }
    #[inline(always)]
    fn unbiased(offset: i32) -> Self::Sums {
        [unsafe { _mm512_set1_epi32(offset) }; REGISTERS]
    }
    #[inline(always)]
    fn add<const R: usize>(sums: &mut [Self::Sums; R], codes: Self::Bytes, x: &[Row; R], step: usize) {
        for r in 0..R {
            let x = unsafe { _mm512_set1_epi32(word(x[r][step])) };
            for i in 0..REGISTERS {
                sums[r][i] = unsafe { _mm512_dpbusd_epi32(sums[r][i], codes[i], x) };
            }
        }
    }
    #[inline(always)]
    fn small() -> Self::Small {
        [unsafe { _mm512_setzero_si512() }; REGISTERS]
    }
    #[inline(always)]
    fn add_small<const R: usize>(sums: &mut [Self::Small; R], codes: Self::Bytes, x: &[Row; R], step: usize) {
        Self::add(sums, codes, x, step)
    }
    #[inline(always)]
    fn second(first: Self::Small) -> Self::Small {
        first
    }
    #[inline(always)]
    fn total([_, both]: [Self::Small; 2]) -> Self::Sums {
        both
    }
    #[inline(always)]
    fn add_scaled(sums: Self::Sums, factor: f32, scales: &[f32; OUTS], _: usize, totals: &mut [f32; OUTS]) {
        for i in 0..REGISTERS {
            unsafe {
                let sums = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i]), _mm512_set1_ps(factor));
                let total = _mm512_fmadd_ps(sums, load(scales, i), load(totals, i));
                _mm512_storeu_ps(totals.as_chunks_mut::<16>().0[i].as_mut_ptr(), total);
            }
        }
    }
    #[inline(always)]
    fn add_affine(sums: Self::Sums, affine: Affine, _: usize, totals: &mut [f32; OUTS]) {
        for i in 0..REGISTERS {
            unsafe {
                let sums = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i]), _mm512_set1_ps(affine.factor));
                let total = _mm512_fmadd_ps(sums, load(affine.scales, i), load(totals, i));
                let total = _mm512_fmadd_ps(_mm512_set1_ps(affine.sum), load(affine.minima, i), total);
                _mm512_storeu_ps(totals.as_chunks_mut::<16>().0[i].as_mut_ptr(), total);
            }
        }
    }

    #[cfg(any(test, target_arch = "x86_64"))]
    type Half = __m512;

    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn load_half(values: &[f32; HALF]) -> Self::Half {
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn store_half(half: Self::Half, values: &mut [f32; HALF]) {
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), half) }
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn half_scaled(sums: &[i32; HALF], factor: f32, scales: Self::Half, totals: Self::Half) -> Self::Half {
        unsafe {
            let sums = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums.as_ptr().cast()));
            _mm512_fmadd_ps(_mm512_mul_ps(sums, _mm512_set1_ps(factor)), scales, totals)
        }
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn half_shifted(sum: f32, minima: Self::Half, totals: Self::Half) -> Self::Half {
        unsafe { _mm512_fmadd_ps(_mm512_set1_ps(sum), minima, totals) }
    }
}

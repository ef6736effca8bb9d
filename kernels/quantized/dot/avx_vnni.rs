use std::arch::x86_64::*;

use super::avx2::{Avx2, REGISTERS, repeat};
use super::{Affine, Dot, HALF, Kernel, Row};
use crate::quantized::{Codes, OUTS};

/// # Safety
///
/// The machine has AVX2, FMA, F16C and AVX-VNNI.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run::<AvxVnni>()
}

/// AVX2 with one instruction for four products of bytes. Only [`run`] names this type, so wherever a method is called
/// the features are there.
struct AvxVnni;

// SAFETY of every block below: the features are there.
impl Dot for AvxVnni {
    const WIDTH: usize = Avx2::WIDTH;
    const ROWS: usize = 6;

    type Bytes = [__m256i; REGISTERS];
    type Sums = [__m256i; REGISTERS];
    type Small = [__m256i; REGISTERS];

    #[inline(always)]
    fn load(codes: &Codes, p: usize) -> Self::Bytes {
        Avx2::load(codes, p)
    }
    #[inline(always)]
    fn store(bytes: Self::Bytes, p: usize, codes: &mut Codes) {
        Avx2::store(bytes, p, codes)
    }
    /// The instruction takes them as unsigned: 128 is added.
    #[inline(always)]
    fn signed([a, b]: Self::Bytes) -> Self::Bytes {
        unsafe {
            let sign = _mm256_set1_epi8(-128);
            [_mm256_xor_si256(a, sign), _mm256_xor_si256(b, sign)]
        }
    }
    #[inline(always)]
    fn nibbles(bytes: Self::Bytes) -> [Self::Bytes; 2] {
        Avx2::nibbles(bytes)
    }
    #[inline(always)]
    fn unbiased(offset: i32) -> Self::Sums {
        [unsafe { _mm256_set1_epi32(offset) }; REGISTERS]
    }
    #[inline(always)]
    fn add<const R: usize>(sums: &mut [Self::Sums; R], codes: Self::Bytes, x: &[Row; R], step: usize) {
        for r in 0..R {
            let x = repeat(x[r][step]);
            for i in 0..REGISTERS {
                sums[r][i] = unsafe { _mm256_dpbusd_avx_epi32(sums[r][i], codes[i], x) };
            }
        }
    }
    #[inline(always)]
    fn small() -> Self::Small {
        Self::unbiased(0)
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
    fn add_scaled(sums: Self::Sums, factor: f32, scales: &[f32; OUTS], p: usize, totals: &mut [f32; OUTS]) {
        Avx2::add_scaled(sums, factor, scales, p, totals)
    }
    #[inline(always)]
    fn add_affine(sums: Self::Sums, affine: Affine, p: usize, totals: &mut [f32; OUTS]) {
        Avx2::add_affine(sums, affine, p, totals)
    }

    type Half = <Avx2 as Dot>::Half;

    #[inline(always)]
    fn load_half(values: &[f32; HALF]) -> Self::Half {
        Avx2::load_half(values)
    }
    #[inline(always)]
    fn store_half(half: Self::Half, values: &mut [f32; HALF]) {
        Avx2::store_half(half, values)
    }
    #[inline(always)]
    fn half_scaled(sums: &[i32; HALF], factor: f32, scales: Self::Half, totals: Self::Half) -> Self::Half {
        Avx2::half_scaled(sums, factor, scales, totals)
    }
    #[inline(always)]
    fn half_shifted(sum: f32, minima: Self::Half, totals: Self::Half) -> Self::Half {
        Avx2::half_shifted(sum, minima, totals)
    }
}

use std::arch::aarch64::*;
use std::arch::asm;

#[cfg(any(test, target_arch = "x86_64"))]
use super::HALF;
use super::{Affine, Dot, Kernel, Row, word};
use crate::quantized::{Codes, OUTS};

/// # Safety
///
/// The machine has NEON and its dot products.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run::<Neon>()
}

/// Only [`run`] names this type, so wherever a method is called the features are there.
struct Neon;

/// Registers that hold one i32 for each output of a part.
const REGISTERS: usize = 4;

/// Registers of a part among those of a panel.
#[inline(always)]
fn part<T>(panel: &[T; OUTS], part: usize) -> &[[T; 4]; REGISTERS] {
    &panel.as_chunks().0.as_chunks().0[part]
}

#[inline(always)]
fn part_mut<T>(panel: &mut [T; OUTS], part: usize) -> &mut [[T; 4]; REGISTERS] {
    &mut panel.as_chunks_mut().0.as_chunks_mut().0[part]
}

/// The bytes of four outputs.
#[inline(always)]
fn load(codes: &[[u8; 4]; 4]) -> int8x16_t {
    // SAFETY: the array has the register's size.
    unsafe { vld1q_s8(codes.as_ptr().cast()) }
}

/// Adds four products to each sum. The intrinsic for it is not stable.
#[inline(always)]
fn dot(mut sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the features are there, and the instruction touches nothing but its registers.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {codes:v}.16b, {x:v}.16b",
            sums = inout(vreg) sums, codes = in(vreg) codes, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        )
    }
    sums
}

// SAFETY of every block below: the features are there, and loads and stores cover exactly the borrowed array.
impl Dot for Neon {
    const WIDTH: usize = 4 * REGISTERS;
    const ROWS: usize = 6;

    type Bytes = [int8x16_t; REGISTERS];
    type Sums = [int32x4_t; REGISTERS];
    type Small = [int32x4_t; REGISTERS];

    #[inline(always)]
    fn load(codes: &Codes, p: usize) -> Self::Bytes {
        let codes = part(codes, p);
        [load(&codes[0]), load(&codes[1]), load(&codes[2]), load(&codes[3])]
    }
    #[inline(always)]
    fn store(bytes: Self::Bytes, p: usize, codes: &mut Codes) {
        for (bytes, codes) in bytes.into_iter().zip(part_mut(codes, p)) {
            unsafe { vst1q_s8(codes.as_mut_ptr().cast(), bytes) }
        }
    }
    #[inline(always)]
    fn signed(bytes: Self::Bytes) -> Self::Bytes {
        bytes
    }
    #[inline(always)]
    fn nibbles(bytes: Self::Bytes) -> [Self::Bytes; 2] {
        let [mut lower, mut upper] = [bytes; 2];
        for i in 0..REGISTERS {
            unsafe {
                lower[i] = vandq_s8(bytes[i], vdupq_n_s8(15));
                upper[i] = vreinterpretq_s8_u8(vshrq_n_u8::<4>(vreinterpretq_u8_s8(bytes[i])));
            }
        }
        [lower, upper]
    }
    #[inline(always)]
    fn unbiased(_: i32) -> Self::Sums {
        Self::small()
    }
    #[inline(always)]
    fn add<const R: usize>(sums: &mut [Self::Sums; R], codes: Self::Bytes, x: &[Row; R], step: usize) {
        for r in 0..R {
            let x = unsafe { vreinterpretq_s8_s32(vdupq_n_s32(word(x[r][step]))) };
            for i in 0..REGISTERS {
                sums[r][i] = dot(sums[r][i], codes[i], x);
            }
        }
    }
    #[inline(always)]
    fn small() -> Self::Small {
        [unsafe { vdupq_n_s32(0) }; REGISTERS]
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
        let scales = part(scales, p);
        for (i, totals) in part_mut(totals, p).iter_mut().enumerate() {
            unsafe {
                let sums = vmulq_n_f32(vcvtq_f32_s32(sums[i]), factor);
                vst1q_f32(
                    totals.as_mut_ptr(),
                    vfmaq_f32(vld1q_f32(totals.as_ptr()), sums, vld1q_f32(scales[i].as_ptr())),
                );
            }
        }
    }
    #[inline(always)]
    fn add_affine(sums: Self::Sums, affine: Affine, p: usize, totals: &mut [f32; OUTS]) {
        let (scales, minima) = (part(affine.scales, p), part(affine.minima, p));
        for (i, totals) in part_mut(totals, p).iter_mut().enumerate() {
            unsafe {
                let sums = vmulq_n_f32(vcvtq_f32_s32(sums[i]), affine.factor);
                let total = vfmaq_f32(vld1q_f32(totals.as_ptr()), sums, vld1q_f32(scales[i].as_ptr()));
                vst1q_f32(totals.as_mut_ptr(), vfmaq_n_f32(total, vld1q_f32(minima[i].as_ptr()), affine.sum));
            }
        }
    }

    #[cfg(any(test, target_arch = "x86_64"))]
    type Half = [float32x4_t; 4];

    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn load_half(values: &[f32; HALF]) -> Self::Half {
        let mut half = [unsafe { vdupq_n_f32(0.0) }; 4];
        for (half, values) in half.iter_mut().zip(values.as_chunks::<4>().0) {
            *half = unsafe { vld1q_f32(values.as_ptr()) };
        }
        half
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn store_half(half: Self::Half, values: &mut [f32; HALF]) {
        for (half, values) in half.into_iter().zip(values.as_chunks_mut::<4>().0) {
            unsafe { vst1q_f32(values.as_mut_ptr(), half) }
        }
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn half_scaled(sums: &[i32; HALF], factor: f32, scales: Self::Half, totals: Self::Half) -> Self::Half {
        let mut new = totals;
        for i in 0..4 {
            unsafe {
                let sums = vcvtq_f32_s32(vld1q_s32(sums.as_chunks::<4>().0[i].as_ptr()));
                new[i] = vfmaq_f32(totals[i], vmulq_n_f32(sums, factor), scales[i]);
            }
        }
        new
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn half_shifted(sum: f32, minima: Self::Half, totals: Self::Half) -> Self::Half {
        let mut new = totals;
        for i in 0..4 {
            new[i] = unsafe { vfmaq_n_f32(totals[i], minima[i], sum) };
        }
        new
    }
}

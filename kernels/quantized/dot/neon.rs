use std::arch::aarch64::*;
use std::arch::asm;

use half::bf16;

use super::{Affine, Codes, Dot, Four, Kernel, word};
use crate::quantized::OUTS;

/// # Safety
///
/// The machine has NEON and its dot products.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run::<Neon>()
}

/// Only [`run`] names this type, so wherever a method is called the features are there.
struct Neon;

/// Registers that hold one i32 for each output.
const PARTS: usize = OUTS / 4;

#[inline(always)]
fn part(codes: &Codes, part: usize) -> int8x16_t {
    let (parts, _) = codes.as_chunks::<4>();
    // SAFETY: the array has the register's size.
    unsafe { vld1q_s8(parts[part].as_ptr().cast()) }
}

#[inline(always)]
fn repeat(x: Four) -> int8x16_t {
    // SAFETY: the features are there.
    unsafe { vreinterpretq_s8_s32(vdupq_n_s32(word(x))) }
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

/// The upper halves of the f32.
#[inline(always)]
fn widen(values: &[bf16; OUTS], part: usize) -> float32x4_t {
    let (parts, _) = values.as_chunks::<4>();
    // SAFETY: the array has half the register's size.
    unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(parts[part].as_ptr().cast())))) }
}

// SAFETY of every block below: the features are there, and loads and stores cover exactly the borrowed array.
impl Dot for Neon {
    type Sums = [int32x4_t; PARTS];
    type Words = [int32x4_t; PARTS];

    #[inline(always)]
    fn no_sums(_: i32) -> Self::Sums {
        [unsafe { vdupq_n_s32(0) }; PARTS]
    }
    #[inline(always)]
    fn add_signed<const R: usize>(sums: &mut [Self::Sums; R], codes: &Codes, x: [Four; R]) {
        for p in 0..PARTS {
            let codes = part(codes, p);
            for (sums, x) in sums.iter_mut().zip(x) {
                sums[p] = dot(sums[p], codes, repeat(x));
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
            let codes = unsafe { vreinterpretq_u8_s8(part(codes, p)) };
            let lower = unsafe { vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(15))) };
            let upper = unsafe { vreinterpretq_s8_u8(vshrq_n_u8::<4>(codes)) };
            for (words, (low, high)) in words.iter_mut().zip(low.into_iter().zip(high)) {
                words[p] = dot(dot(words[p], lower, repeat(low)), upper, repeat(high));
            }
        }
    }
    #[inline(always)]
    fn total(words: Self::Words) -> Self::Sums {
        words
    }
    #[inline(always)]
    fn add_scaled(sums: Self::Sums, factor: f32, scales: &[bf16; OUTS], totals: &mut [f32; OUTS]) {
        for (p, totals) in totals.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            unsafe {
                let sums = vmulq_n_f32(vcvtq_f32_s32(sums[p]), factor);
                vst1q_f32(totals.as_mut_ptr(), vfmaq_f32(vld1q_f32(totals.as_ptr()), sums, widen(scales, p)));
            }
        }
    }
    #[inline(always)]
    fn add_affine(sums: [Self::Sums; 2], affine: Affine, totals: &mut [f32; OUTS]) {
        let Affine { factors, sum, scales, minima } = affine;
        for (p, totals) in totals.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            unsafe {
                let first = vmulq_n_f32(vcvtq_f32_s32(sums[0][p]), factors[0]);
                let parts = vfmaq_n_f32(first, vcvtq_f32_s32(sums[1][p]), factors[1]);
                let total = vfmaq_f32(vld1q_f32(totals.as_ptr()), parts, widen(scales, p));
                vst1q_f32(totals.as_mut_ptr(), vfmaq_n_f32(total, widen(minima, p), sum));
            }
        }
    }
}

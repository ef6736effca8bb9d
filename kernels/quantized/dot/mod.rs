//! Products of packed weights with rows of rounded `x`, on the widest instructions that the machine has.
//!
//! A kernel is written once, generic over [`Dot`], as the `run` of a [`Kernel`]. Sums of products are integers and
//! exact; the f32 operations that follow are the same for every output in every instruction set. So results differ
//! between machines only by whether multiply and add are fused, as those of [`crate::simd`] do.
//!
//! Rows lie innermost everywhere: codes that were loaded, and unpacked, serve all rows before the next are.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use half::bf16;

use super::OUTS;
use crate::simd::Instructions;

/// Codes as one step of a kernel takes them: four bytes of each output, side by side.
pub(super) type Codes = [[u8; 4]; OUTS];

/// The four values of `x` that meet one step's codes, none of them -128.
pub(super) type Four = [i8; 4];

/// The four values as the one word that a register repeats.
#[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), expect(dead_code))]
#[inline(always)]
fn word(x: Four) -> i32 {
    i32::from_ne_bytes(x.map(|x| x as u8))
}

/// A computation over [`Dot`], with its operands.
pub(super) trait Kernel {
    fn run<D: Dot>(self);
}

/// Integer sums of a panel's outputs.
pub(super) trait Dot {
    /// An i32 for each output.
    type Sums: Copy;
    /// Products with 4-bit codes, of 32 inputs at most before they are summed.
    type Words: Copy;

    /// Nothing yet; the `x` that will come add up to `sum`.
    fn no_sums(sum: i32) -> Self::Sums;
    /// Adds the products of signed codes above -128 with each row of `x`.
    fn add_signed<const R: usize>(sums: &mut [Self::Sums; R], codes: &Codes, x: [Four; R]);

    fn no_words() -> Self::Words;
    /// Adds the products of the lower halves of the codes with each row of `low`, and of the upper halves with `high`.
    fn add_nibbles<const R: usize>(words: &mut [Self::Words; R], codes: &Codes, low: [Four; R], high: [Four; R]);
    fn total(words: Self::Words) -> Self::Sums;

    /// `totals += sums * factor * scales`, the last product fused with the sum.
    fn add_scaled(sums: Self::Sums, factor: f32, scales: &[bf16; OUTS], totals: &mut [f32; OUTS]);
    /// `totals += (sums[0] * factors[0] + sums[1] * factors[1]) * scales + sum * minima`, in that order, every product
    /// but the first fused with its sum.
    fn add_affine(sums: [Self::Sums; 2], affine: Affine, totals: &mut [f32; OUTS]);
}

/// The factors of a block of 4-bit weights and a row.
#[derive(Clone, Copy)]
pub(super) struct Affine<'a> {
    /// Of the two groups of `x`.
    pub factors: [f32; 2],
    /// What both groups of `x` add up to.
    pub sum: f32,
    pub scales: &'a [bf16; OUTS],
    pub minima: &'a [bf16; OUTS],
}

/// Runs `kernel` on `instructions`, which the machine has.
pub(super) fn dispatch<K: Kernel>(instructions: Instructions, kernel: K) {
    match instructions {
        Instructions::Portable => kernel.run::<portable::Portable>(),
        // SAFETY of the arms below: nobody makes the value on a machine without the features.
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => unsafe { avx2::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 => unsafe { avx512::run(kernel) },
        #[cfg(target_arch = "aarch64")]
        Instructions::DotProduct => unsafe { neon::run(kernel) },
    }
}

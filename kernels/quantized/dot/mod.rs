//! Products of packed weights with rows of rounded `x`, on the widest instructions that the machine has.
//!
//! A kernel is written once, generic over [`Dot`], as the `run` of a [`Kernel`]. Sums of products are integers and
//! exact; the f32 operations that follow are the same for every output in every instruction set. So results differ
//! between machines only by whether multiply and add are fused, as those of [`crate::simd`] do.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use super::{Codes, OUTS, STEPS};
use crate::simd::Instructions;

/// The four values of `x` that meet one step's codes, none of them -128.
pub(super) type Four = [i8; 4];

/// The values of `x` of a group.
pub(super) type Row = [Four; STEPS];

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

/// Products of part of a panel's outputs with some rows, as many as the registers hold sums for.
pub(super) trait Dot {
    /// Outputs of a part, which divide those of a panel.
    const WIDTH: usize;
    /// Rows at most.
    const ROWS: usize;

    /// A step's bytes of a part.
    type Bytes: Copy;
    /// An i32 for each output.
    type Sums: Copy;
    /// Sums of products with codes up to 15, for half a group.
    type Small: Copy;

    fn load(codes: &Codes, part: usize) -> Self::Bytes;
    fn store(bytes: Self::Bytes, part: usize, codes: &mut Codes);
    /// Signed codes above -128 as `add` takes them.
    fn signed(bytes: Self::Bytes) -> Self::Bytes;
    /// The lower and the upper halves.
    fn nibbles(bytes: Self::Bytes) -> [Self::Bytes; 2];

    /// Nothing yet; codes that were 128 too large would have added `-offset`.
    fn unbiased(offset: i32) -> Self::Sums;
    /// Adds the products of signed codes with each row.
    fn add<const R: usize>(sums: &mut [Self::Sums; R], codes: Self::Bytes, x: &[Row; R], step: usize);
    fn small() -> Self::Small;
    /// What the sums of the second half of a group start from.
    fn second(first: Self::Small) -> Self::Small;
    /// Adds the products of codes up to 15 with each row.
    fn add_small<const R: usize>(sums: &mut [Self::Small; R], codes: Self::Bytes, x: &[Row; R], step: usize);
    fn total(halves: [Self::Small; 2]) -> Self::Sums;

    /// `totals += sums * factor * scales`, the last product fused with the sum.
    fn add_scaled(sums: Self::Sums, factor: f32, scales: &[f32; OUTS], part: usize, totals: &mut [f32; OUTS]);
    /// The same, and then `totals += sum * minima`, fused.
    fn add_affine(sums: Self::Sums, affine: Affine, part: usize, totals: &mut [f32; OUTS]);

    /// An f32 for each output of half a panel.
    #[cfg(any(test, target_arch = "x86_64"))]
    type Half: Copy;

    #[cfg(any(test, target_arch = "x86_64"))]
    fn load_half(values: &[f32; HALF]) -> Self::Half;
    #[cfg(any(test, target_arch = "x86_64"))]
    fn store_half(half: Self::Half, values: &mut [f32; HALF]);
    /// As `add_scaled`.
    #[cfg(any(test, target_arch = "x86_64"))]
    fn half_scaled(sums: &[i32; HALF], factor: f32, scales: Self::Half, totals: Self::Half) -> Self::Half;
    /// `totals + sum * minima`, fused.
    #[cfg(any(test, target_arch = "x86_64"))]
    fn half_shifted(sum: f32, minima: Self::Half, totals: Self::Half) -> Self::Half;
}

/// Outputs of half a panel.
#[cfg(any(test, target_arch = "x86_64"))]
pub(super) const HALF: usize = OUTS / 2;

/// The factors of a block of 4-bit weights and a row.
#[derive(Clone, Copy)]
pub(super) struct Affine<'a> {
    /// Of the group of `x`.
    pub factor: f32,
    /// What the group of `x` adds up to.
    pub sum: f32,
    pub scales: &'a [f32; OUTS],
    pub minima: &'a [f32; OUTS],
}

/// Runs `kernel` on `instructions`, which the machine has.
pub(super) fn dispatch<K: Kernel>(instructions: Instructions, kernel: K) {
    match instructions {
        Instructions::Portable => kernel.run::<portable::Portable>(),
        // SAFETY of the arms below: nobody makes the value on a machine without the features.
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => unsafe { avx2::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        Instructions::AvxVnni => unsafe { avx_vnni::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 => unsafe { avx512::run(kernel) },
        #[cfg(target_arch = "aarch64")]
        Instructions::DotProduct => unsafe { neon::run(kernel) },
    }
}

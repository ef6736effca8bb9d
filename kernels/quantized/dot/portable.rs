#[cfg(any(test, target_arch = "x86_64"))]
use super::HALF;
use super::{Affine, Dot, Four, Row};
use crate::quantized::{Codes, OUTS};
use crate::simd::{LANES, Lanes, Portable as Eight, Vector};

pub(in crate::quantized) struct Portable;

#[inline(always)]
fn dot(codes: [u8; 4], x: Four, code: impl Fn(u8) -> i32) -> i32 {
    (0..4).map(|i| code(codes[i]) * i32::from(x[i])).sum()
}

impl Dot for Portable {
    const WIDTH: usize = OUTS;
    const ROWS: usize = 2;

    type Bytes = Codes;
    type Sums = [i32; OUTS];
    type Small = [i32; OUTS];

    #[inline(always)]
    fn load(codes: &Codes, _: usize) -> Codes {
        *codes
    }
    #[inline(always)]
    fn store(bytes: Codes, _: usize, codes: &mut Codes) {
        *codes = bytes
    }
    #[inline(always)]
    fn signed(bytes: Codes) -> Codes {
        bytes
    }
    #[inline(always)]
    fn nibbles(bytes: Codes) -> [Codes; 2] {
        [bytes.map(|four| four.map(|code| code & 15)), bytes.map(|four| four.map(|code| code >> 4))]
    }
    #[inline(always)]
    fn unbiased(_: i32) -> Self::Sums {
        [0; OUTS]
    }
    #[inline(always)]
    fn add<const R: usize>(sums: &mut [Self::Sums; R], codes: Codes, x: &[Row; R], step: usize) {
        for (sums, x) in sums.iter_mut().zip(x) {
            for (sum, codes) in sums.iter_mut().zip(codes) {
                *sum += dot(codes, x[step], |code| i32::from(code as i8));
            }
        }
    }
    #[inline(always)]
    fn small() -> Self::Small {
        [0; OUTS]
    }
    #[inline(always)]
    fn add_small<const R: usize>(sums: &mut [Self::Small; R], codes: Codes, x: &[Row; R], step: usize) {
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
        let parts = sums.as_chunks::<LANES>().0.iter().zip(scales.as_chunks::<LANES>().0);
        for (totals, (sums, scales)) in totals.as_chunks_mut::<LANES>().0.iter_mut().zip(parts) {
            let sums = Eight::load(&sums.map(|sum| sum as f32)).mul(Eight::splat(factor));
            sums.mul_add(Eight::load(scales), Eight::load(totals)).store(totals);
        }
    }
    #[inline(always)]
    fn add_affine(sums: Self::Sums, affine: Affine, part: usize, totals: &mut [f32; OUTS]) {
        Self::add_scaled(sums, affine.factor, affine.scales, part, totals);
        for (totals, minima) in totals.as_chunks_mut().0.iter_mut().zip(affine.minima.as_chunks::<LANES>().0) {
            Eight::splat(affine.sum).mul_add(Eight::load(minima), Eight::load(totals)).store(totals);
        }
    }

    #[cfg(any(test, target_arch = "x86_64"))]
    type Half = [f32; HALF];

    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn load_half(values: &[f32; HALF]) -> Self::Half {
        *values
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn store_half(half: Self::Half, values: &mut [f32; HALF]) {
        *values = half
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn half_scaled(sums: &[i32; HALF], factor: f32, scales: Self::Half, totals: Self::Half) -> Self::Half {
        let mut new = totals;
        for (i, new) in new.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let sums = sums.as_chunks::<LANES>().0[i].map(|sum| sum as f32);
            let scales = Eight::load(&scales.as_chunks().0[i]);
            Eight::load(&sums).mul(Eight::splat(factor)).mul_add(scales, Eight::load(new)).store(new);
        }
        new
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn half_shifted(sum: f32, minima: Self::Half, totals: Self::Half) -> Self::Half {
        let mut new = totals;
        for (new, minima) in new.as_chunks_mut().0.iter_mut().zip(minima.as_chunks::<LANES>().0) {
            Eight::splat(sum).mul_add(Eight::load(minima), Eight::load(new)).store(new);
        }
        new
    }
}

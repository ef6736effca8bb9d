use half::bf16;

use super::{Affine, Codes, Dot, Four};
use crate::quantized::OUTS;
use crate::simd::{LANES, Lanes, Portable as Eight};

pub(in crate::quantized) struct Portable;

#[inline(always)]
fn dot(codes: &[u8; 4], x: Four, code: impl Fn(u8) -> i32) -> i32 {
    (0..4).map(|i| code(codes[i]) * i32::from(x[i])).sum()
}

impl Dot for Portable {
    type Sums = [i32; OUTS];
    type Words = [i32; OUTS];

    #[inline(always)]
    fn no_sums(_: i32) -> Self::Sums {
        [0; OUTS]
    }
    #[inline(always)]
    fn add_signed<const R: usize>(sums: &mut [Self::Sums; R], codes: &Codes, x: [Four; R]) {
        for (sums, x) in sums.iter_mut().zip(x) {
            for (sum, codes) in sums.iter_mut().zip(codes) {
                *sum += dot(codes, x, |code| i32::from(code as i8));
            }
        }
    }
    #[inline(always)]
    fn no_words() -> Self::Words {
        [0; OUTS]
    }
    #[inline(always)]
    fn add_nibbles<const R: usize>(words: &mut [Self::Words; R], codes: &Codes, low: [Four; R], high: [Four; R]) {
        for (words, (low, high)) in words.iter_mut().zip(low.into_iter().zip(high)) {
            for (word, codes) in words.iter_mut().zip(codes) {
                *word += dot(codes, low, |code| i32::from(code & 15)) + dot(codes, high, |code| i32::from(code >> 4));
            }
        }
    }
    #[inline(always)]
    fn total(words: Self::Words) -> Self::Sums {
        words
    }
    #[inline(always)]
    fn add_scaled(sums: Self::Sums, factor: f32, scales: &[bf16; OUTS], totals: &mut [f32; OUTS]) {
        let parts = sums.as_chunks::<LANES>().0.iter().zip(scales.as_chunks::<LANES>().0);
        for (totals, (sums, scales)) in totals.as_chunks_mut::<LANES>().0.iter_mut().zip(parts) {
            let sums = lanes(sums).mul(Eight::splat(factor));
            sums.mul_add(Eight::load_bf16(scales), Eight::load(totals)).store(totals);
        }
    }
    #[inline(always)]
    fn add_affine(sums: [Self::Sums; 2], affine: Affine, totals: &mut [f32; OUTS]) {
        let factors = affine.factors.map(Eight::splat);
        for (i, totals) in totals.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let [first, second] = sums.map(|sums| lanes(&sums.as_chunks::<LANES>().0[i]));
            let parts = second.mul_add(factors[1], first.mul(factors[0]));
            let scale = Eight::load_bf16(&affine.scales.as_chunks().0[i]);
            let minimum = Eight::load_bf16(&affine.minima.as_chunks().0[i]);
            let total = parts.mul_add(scale, Eight::load(totals));
            Eight::splat(affine.sum).mul_add(minimum, total).store(totals);
        }
    }
}

#[inline(always)]
fn lanes(sums: &[i32; LANES]) -> Eight {
    Eight::load(&sums.map(|sum| sum as f32))
}

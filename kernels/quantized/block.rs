//! What the formats' blocks do with rounded rows. Lanes are outputs, so nothing is ever added across them.

use std::ops::Range;

use half::bf16;

use super::cpu::Totals;
#[cfg(any(test, target_arch = "x86_64"))]
use super::dot::HALF;
use super::dot::{Affine, Dot, Row};
use super::rounded::Factors;
use super::{Codes, OUTS, Q4Block, Q8Block, STEPS};
use crate::simd::prefetch_far;

/// Parts of a panel that registers hold, at most.
const MOST_PARTS: usize = 2;

/// A block of a packed weight.
pub trait Block: Sync {
    /// Adds its products with one row. What lies at `ahead` is asked for meanwhile, line by line: all at once, lines would
    /// wait for each other.
    fn add<D: Dot>(&self, x: &[Row; 1], factors: Factors, totals: &mut [f32; OUTS], ahead: &Self);
    /// Adds the sums of a row's products, scaled, for half a panel, the one that the factors of the block are of.
    #[cfg(any(test, target_arch = "x86_64"))]
    fn add_half<D: Dot>(
        scales_and_minima: [D::Half; 2],
        sums: &[i32; HALF],
        factors: &Factors,
        totals: D::Half,
    ) -> D::Half;
    /// Unpacks what [`Block::bytes`] and [`Block::add_half`] need.
    #[cfg(any(test, target_arch = "x86_64"))]
    fn prepare<D: Dot>(&self, target: &mut Unpacked);
    /// The codes as signed bytes, once they are prepared: `[STEPS, OUTS, 4]`.
    #[cfg(any(test, target_arch = "x86_64"))]
    fn bytes<'a>(&'a self, unpacked: &'a Unpacked) -> &'a [u8];
    fn unpack<D: Dot>(&self, target: &mut Unpacked);
    /// The codes of two steps as [`Dot`] adds them, and what lies at `ahead` asked for as by [`Block::add`].
    fn pair<D: Dot>(&self, pair: usize, part: usize, ahead: &Self) -> [D::Bytes; 2];
    /// The scales and the minima, undefined where the format has none.
    fn factors(&self) -> [[f32; OUTS]; 2];
    /// Adds the products with `R` rows.
    fn add_rows<D: Dot, const R: usize>(
        source: &impl Source,
        x: &[Row; R],
        factors: &[Factors; R],
        totals: &mut [Totals; R],
    );
}

impl Block for Q8Block {
    #[inline(always)]
    fn add<D: Dot>(&self, x: &[Row; 1], factors: Factors, totals: &mut [f32; OUTS], ahead: &Self) {
        prefetch_far(&ahead.scales);
        let scales = widen(&self.scales);
        let mut sums = [[D::unbiased(factors.offset)]; MOST_PARTS];
        for step in 0..STEPS {
            prefetch_far(&ahead.codes[step]);
            for (part, sums) in sums[..OUTS / D::WIDTH].iter_mut().enumerate() {
                D::add(sums, D::signed(D::load(&self.codes[step], part)), x, step);
            }
        }
        for (part, sums) in sums[..OUTS / D::WIDTH].iter().enumerate() {
            D::add_scaled(sums[0], factors.scale, &scales, part, totals);
        }
    }
    #[inline(always)]
    fn unpack<D: Dot>(&self, target: &mut Unpacked) {
        for part in 0..OUTS / D::WIDTH {
            for step in 0..STEPS {
                D::store(D::signed(D::load(&self.codes[step], part)), part, &mut target.codes[step]);
            }
        }
        target.scales = widen(&self.scales);
    }
    #[inline(always)]
    fn pair<D: Dot>(&self, pair: usize, part: usize, ahead: &Self) -> [D::Bytes; 2] {
        let steps = [2 * pair, 2 * pair + 1];
        if part == 0 {
            prefetch_far(&ahead.codes[steps[0]]);
            prefetch_far(&ahead.codes[steps[1]]);
        }
        [D::signed(D::load(&self.codes[steps[0]], part)), D::signed(D::load(&self.codes[steps[1]], part))]
    }
    #[inline(always)]
    fn factors(&self) -> [[f32; OUTS]; 2] {
        [widen(&self.scales), [0.0; OUTS]]
    }
    #[inline(always)]
    fn add_rows<D: Dot, const R: usize>(
        source: &impl Source,
        x: &[Row; R],
        factors: &[Factors; R],
        totals: &mut [Totals; R],
    ) {
        let [scales, _] = source.factors();
        for part in 0..OUTS / D::WIDTH {
            let mut sums = [D::unbiased(0); R];
            for r in 0..R {
                sums[r] = D::unbiased(factors[r].offset);
            }
            for pair in 0..STEPS / 2 {
                let codes = source.pair::<D>(pair, part);
                D::add(&mut sums, codes[0], x, 2 * pair);
                D::add(&mut sums, codes[1], x, 2 * pair + 1);
            }
            for r in 0..R {
                D::add_scaled(sums[r], factors[r].scale, &scales, part, &mut totals[r].0);
            }
        }
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn add_half<D: Dot>([scales, _]: [D::Half; 2], sums: &[i32; HALF], factors: &Factors, totals: D::Half) -> D::Half {
        D::half_scaled(sums, factors.scale, scales, totals)
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn prepare<D: Dot>(&self, target: &mut Unpacked) {
        target.scales = widen(&self.scales);
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn bytes<'a>(&'a self, _: &'a Unpacked) -> &'a [u8] {
        self.codes.as_flattened().as_flattened()
    }
}

impl Block for Q4Block {
    #[inline(always)]
    fn add<D: Dot>(&self, x: &[Row; 1], factors: Factors, totals: &mut [f32; OUTS], ahead: &Self) {
        prefetch_far(&ahead.scales);
        prefetch_far(&ahead.minima);
        let (scales, minima) = (&widen(&self.scales), &widen(&self.minima));
        let affine = Affine { factor: factors.scale, sum: factors.sum, scales, minima };
        const HALF: usize = STEPS / 4;
        let mut first = [[D::small()]; MOST_PARTS];
        self.add_pairs::<D>(0..HALF, x, &mut first, ahead);
        let mut second = first.map(|[first]| [D::second(first)]);
        self.add_pairs::<D>(HALF..2 * HALF, x, &mut second, ahead);
        for part in 0..OUTS / D::WIDTH {
            D::add_affine(D::total([first[part][0], second[part][0]]), affine, part, totals);
        }
    }
    #[inline(always)]
    fn unpack<D: Dot>(&self, target: &mut Unpacked) {
        for part in 0..OUTS / D::WIDTH {
            for pair in 0..STEPS / 2 {
                let [lower, upper] = D::nibbles(D::load(&self.codes[pair], part));
                D::store(lower, part, &mut target.codes[2 * pair]);
                D::store(upper, part, &mut target.codes[2 * pair + 1]);
            }
        }
        (target.scales, target.minima) = (widen(&self.scales), widen(&self.minima));
    }
    #[inline(always)]
    fn pair<D: Dot>(&self, pair: usize, part: usize, ahead: &Self) -> [D::Bytes; 2] {
        if part == 0 {
            prefetch_far(&ahead.codes[pair]);
        }
        D::nibbles(D::load(&self.codes[pair], part))
    }
    #[inline(always)]
    fn factors(&self) -> [[f32; OUTS]; 2] {
        [widen(&self.scales), widen(&self.minima)]
    }
    #[inline(always)]
    fn add_rows<D: Dot, const R: usize>(
        source: &impl Source,
        x: &[Row; R],
        factors: &[Factors; R],
        totals: &mut [Totals; R],
    ) {
        let [scales, minima] = source.factors();
        for part in 0..OUTS / D::WIDTH {
            let mut first = [D::small(); R];
            for pair in 0..STEPS / 4 {
                let codes = source.pair::<D>(pair, part);
                D::add_small(&mut first, codes[0], x, 2 * pair);
                D::add_small(&mut first, codes[1], x, 2 * pair + 1);
            }
            let mut second = first;
            for r in 0..R {
                second[r] = D::second(first[r]);
            }
            for pair in STEPS / 4..STEPS / 2 {
                let codes = source.pair::<D>(pair, part);
                D::add_small(&mut second, codes[0], x, 2 * pair);
                D::add_small(&mut second, codes[1], x, 2 * pair + 1);
            }
            for r in 0..R {
                let sums = D::total([first[r], second[r]]);
                let Factors { scale: factor, sum, .. } = factors[r];
                let affine = Affine { factor, sum, scales: &scales, minima: &minima };
                D::add_affine(sums, affine, part, &mut totals[r].0);
            }
        }
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn add_half<D: Dot>(
        [scales, minima]: [D::Half; 2],
        sums: &[i32; HALF],
        factors: &Factors,
        totals: D::Half,
    ) -> D::Half {
        D::half_shifted(factors.sum, minima, D::half_scaled(sums, factors.scale, scales, totals))
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn prepare<D: Dot>(&self, target: &mut Unpacked) {
        self.unpack::<D>(target);
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn bytes<'a>(&'a self, unpacked: &'a Unpacked) -> &'a [u8] {
        unpacked.codes.as_flattened().as_flattened()
    }
}

impl Q4Block {
    /// Adds the products of some pairs of steps with a row, for [`Block::add`].
    #[inline(always)]
    fn add_pairs<D: Dot>(
        &self,
        pairs: Range<usize>,
        x: &[Row; 1],
        sums: &mut [[D::Small; 1]; MOST_PARTS],
        ahead: &Self,
    ) {
        for pair in pairs {
            prefetch_far(&ahead.codes[pair]);
            for (part, sums) in sums[..OUTS / D::WIDTH].iter_mut().enumerate() {
                let [lower, upper] = D::nibbles(D::load(&self.codes[pair], part));
                D::add_small(sums, lower, x, 2 * pair);
                D::add_small(sums, upper, x, 2 * pair + 1);
            }
        }
    }
}

#[inline(always)]
fn widen(values: &[bf16; OUTS]) -> [f32; OUTS] {
    let mut wide = [0.0; OUTS];
    for (value, wide) in values.iter().zip(&mut wide) {
        // Not a NaN, which `to_f32` would look for.
        *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
    }
    wide
}

/// A block as several rows meet it.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Unpacked {
    codes: [Codes; STEPS],
    pub scales: [f32; OUTS],
    /// Undefined where the format has none.
    pub minima: [f32; OUTS],
}

impl Unpacked {
    pub const ZERO: Self = Self { codes: [[[0; 4]; OUTS]; STEPS], scales: [0.0; OUTS], minima: [0.0; OUTS] };
}

/// Where several rows find a block.
pub trait Source {
    /// The codes of two steps as [`Dot`] adds them.
    fn pair<D: Dot>(&self, pair: usize, part: usize) -> [D::Bytes; 2];
    /// As [`Block::factors`].
    fn factors(&self) -> [[f32; OUTS]; 2];
}

impl Source for Unpacked {
    #[inline(always)]
    fn pair<D: Dot>(&self, pair: usize, part: usize) -> [D::Bytes; 2] {
        [D::load(&self.codes[2 * pair], part), D::load(&self.codes[2 * pair + 1], part)]
    }
    #[inline(always)]
    fn factors(&self) -> [[f32; OUTS]; 2] {
        [self.scales, self.minima]
    }
}

/// A block as it is packed, and what is asked for meanwhile.
pub struct Streamed<'a, B> {
    pub block: &'a B,
    pub ahead: &'a B,
}

impl<B: Block> Source for Streamed<'_, B> {
    #[inline(always)]
    fn pair<D: Dot>(&self, pair: usize, part: usize) -> [D::Bytes; 2] {
        self.block.pair::<D>(pair, part, self.ahead)
    }
    #[inline(always)]
    fn factors(&self) -> [[f32; OUTS]; 2] {
        self.block.factors()
    }
}

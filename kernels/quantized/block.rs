//! What the formats' blocks do with rounded rows. Lanes are outputs, so nothing is ever added across them.

use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

use half::bf16;

use super::cpu::Totals;
#[cfg(any(test, target_arch = "x86_64"))]
use super::dot::HALF;
use super::dot::{Affine, Dot, Row};
use super::rounded::Factors;
use super::{Codes, OUTS, Q4Block, Q8Block, STEPS};
use crate::simd::{prefetch_far, reads_ahead};

/// Parts of a panel that registers hold, at most.
const MOST_PARTS: usize = 2;

/// A block of a packed weight.
pub trait Block: Sync + Sized {
    /// Products of a byte of codes with a row.
    const PRODUCTS: usize;

    /// Whether [`Ahead`] is of `ALL` lines for so many rows: few, in one pass, go through memory as fast as it answers.
    #[inline(always)]
    fn asks_for_all<D: Dot>(rows: usize) -> bool {
        const FEW: usize = 4;
        let are_few = rows == 1 || rows * Self::PRODUCTS <= FEW && is_one_pass::<D>();
        !are_few || !reads_ahead()
    }
    /// Adds its products with one row, and asks for what lies ahead.
    fn add<D: Dot, const ALL: bool>(
        &self,
        x: &[Row; 1],
        factors: Factors,
        totals: &mut [f32; OUTS],
        ahead: Ahead<Self, ALL>,
    );
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
    /// The codes of two steps as [`Dot`] adds them, and those ahead asked for.
    fn pair<D: Dot, const ALL: bool>(&self, pair: usize, part: usize, ahead: Ahead<Self, ALL>) -> [D::Bytes; 2];
    /// The scales and the minima, undefined where the format has none. They lie behind the codes and are read behind them.
    fn factors(&self) -> [[f32; OUTS]; 2];
    /// Asks for the lines of the scales and the minima.
    fn fetch_factors(&self);
    /// Adds the products with `R` rows.
    fn add_rows<D: Dot, const R: usize>(
        source: &impl Source,
        x: &[Row; R],
        factors: &[Factors; R],
        totals: &mut [Totals; R],
    );
}

impl Block for Q8Block {
    const PRODUCTS: usize = 1;

    #[inline(always)]
    fn add<D: Dot, const ALL: bool>(
        &self,
        x: &[Row; 1],
        factors: Factors,
        totals: &mut [f32; OUTS],
        ahead: Ahead<Self, ALL>,
    ) {
        let mut sums = [[D::unbiased(factors.offset)]; MOST_PARTS];
        for step in 0..STEPS {
            ahead.fetch(&ahead.0.codes[step]);
            for (part, sums) in sums[..OUTS / D::WIDTH].iter_mut().enumerate() {
                D::add(sums, D::signed(D::load(&self.codes[step], part)), x, step);
            }
        }
        let [scales, _] = self.factors();
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
    fn pair<D: Dot, const ALL: bool>(&self, pair: usize, part: usize, ahead: Ahead<Self, ALL>) -> [D::Bytes; 2] {
        let steps = [2 * pair, 2 * pair + 1];
        if part == 0 {
            ahead.fetch(&ahead.0.codes[steps[0]]);
            ahead.fetch(&ahead.0.codes[steps[1]]);
        }
        [D::signed(D::load(&self.codes[steps[0]], part)), D::signed(D::load(&self.codes[steps[1]], part))]
    }
    #[inline(always)]
    fn factors(&self) -> [[f32; OUTS]; 2] {
        in_order();
        [widen(&self.scales), [0.0; OUTS]]
    }
    #[inline(always)]
    fn fetch_factors(&self) {
        prefetch_far(&self.scales);
    }
    #[inline(always)]
    fn add_rows<D: Dot, const R: usize>(
        source: &impl Source,
        x: &[Row; R],
        factors: &[Factors; R],
        totals: &mut [Totals; R],
    ) {
        let mut of_block = if is_one_pass::<D>() { UNREAD } else { source.factors() };
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
            if is_one_pass::<D>() {
                of_block = source.factors();
            }
            for r in 0..R {
                D::add_scaled(sums[r], factors[r].scale, &of_block[0], part, &mut totals[r].0);
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
    const PRODUCTS: usize = 2;

    #[inline(always)]
    fn add<D: Dot, const ALL: bool>(
        &self,
        x: &[Row; 1],
        factors: Factors,
        totals: &mut [f32; OUTS],
        ahead: Ahead<Self, ALL>,
    ) {
        const HALF: usize = STEPS / 4;
        let mut first = [[D::small()]; MOST_PARTS];
        self.add_pairs::<D, ALL>(0..HALF, x, &mut first, ahead);
        let mut second = first.map(|[first]| [D::second(first)]);
        self.add_pairs::<D, ALL>(HALF..2 * HALF, x, &mut second, ahead);
        let [scales, minima] = &self.factors();
        let affine = Affine { factor: factors.scale, sum: factors.sum, scales, minima };
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
    fn pair<D: Dot, const ALL: bool>(&self, pair: usize, part: usize, ahead: Ahead<Self, ALL>) -> [D::Bytes; 2] {
        if part == 0 {
            ahead.fetch(&ahead.0.codes[pair]);
        }
        D::nibbles(D::load(&self.codes[pair], part))
    }
    #[inline(always)]
    fn factors(&self) -> [[f32; OUTS]; 2] {
        in_order();
        [widen(&self.scales), widen(&self.minima)]
    }
    #[inline(always)]
    fn fetch_factors(&self) {
        prefetch_far(&self.scales);
        prefetch_far(&self.minima);
    }
    #[inline(always)]
    fn add_rows<D: Dot, const R: usize>(
        source: &impl Source,
        x: &[Row; R],
        factors: &[Factors; R],
        totals: &mut [Totals; R],
    ) {
        let mut of_block = if is_one_pass::<D>() { UNREAD } else { source.factors() };
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
            if is_one_pass::<D>() {
                of_block = source.factors();
            }
            let [scales, minima] = &of_block;
            for r in 0..R {
                let sums = D::total([first[r], second[r]]);
                let Factors { scale: factor, sum, .. } = factors[r];
                let affine = Affine { factor, sum, scales, minima };
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
    fn add_pairs<D: Dot, const ALL: bool>(
        &self,
        pairs: Range<usize>,
        x: &[Row; 1],
        sums: &mut [[D::Small; 1]; MOST_PARTS],
        ahead: Ahead<Self, ALL>,
    ) {
        for pair in pairs {
            ahead.fetch(&ahead.0.codes[pair]);
            for (part, sums) in sums[..OUTS / D::WIDTH].iter_mut().enumerate() {
                let [lower, upper] = D::nibbles(D::load(&self.codes[pair], part));
                D::add_small(sums, lower, x, 2 * pair);
                D::add_small(sums, upper, x, 2 * pair + 1);
            }
        }
    }
}

/// Whether several rows go over a block once, from end to end, and not once for each part of the panel.
#[inline(always)]
fn is_one_pass<D: Dot>() -> bool {
    D::WIDTH == OUTS
}

/// In the place of [`Block::factors`] until they are read.
const UNREAD: [[f32; OUTS]; 2] = [[0.0; OUTS]; 2];

/// Keeps what is read after it behind what is read before. The compiler likes to begin a block with the factors at its
/// end, and of who goes back and forth the hardware does not read ahead.
#[inline(always)]
fn in_order() {
    compiler_fence(Ordering::SeqCst);
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
pub struct Streamed<'a, B, const ALL: bool> {
    pub block: &'a B,
    pub ahead: Ahead<'a, B, ALL>,
}

/// The block that is asked for while another is at work, line by line: all at once, lines would wait for each other. Of
/// a step it is one line, or `ALL`.
pub struct Ahead<'a, B, const ALL: bool>(pub &'a B);

impl<B, const ALL: bool> Clone for Ahead<'_, B, ALL> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B, const ALL: bool> Copy for Ahead<'_, B, ALL> {}

impl<B, const ALL: bool> Ahead<'_, B, ALL> {
    /// Asks for a step of the block.
    #[inline(always)]
    fn fetch(self, codes: &Codes) {
        prefetch_far(if ALL { codes } else { &codes[..1] });
    }
}

impl<B: Block, const ALL: bool> Source for Streamed<'_, B, ALL> {
    #[inline(always)]
    fn pair<D: Dot>(&self, pair: usize, part: usize) -> [D::Bytes; 2] {
        self.block.pair::<D, ALL>(pair, part, self.ahead)
    }
    #[inline(always)]
    fn factors(&self) -> [[f32; OUTS]; 2] {
        if ALL {
            self.ahead.0.fetch_factors();
        }
        self.block.factors()
    }
}

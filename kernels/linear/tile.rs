//! The register tile of the product: `R` rows of `x` times `Q` outputs, eight steps of the inner dimension at once.
//!
//! One output is one accumulator of eight lanes: lane `l` sums the products at `i = l, l + 8, l + 16, ..` in that
//! order, an inner dimension that is no multiple of eight is padded with zeros, and the lanes are added in one fixed
//! tree. Whatever tile an output is computed in, it sees the same operations, so its bits do not depend on its
//! neighbours. They do depend on whether the machine fuses multiply and add.

use std::ops::Range;

use crate::simd::{Kernel, LANES, Lanes, Stored, load, prefetch};

/// Eight values along the inner dimension.
pub type Group<T> = [T; LANES];

/// What a tile sums: `R * Q` accumulators.
pub type Accumulators<const R: usize, const Q: usize> = [[Group<f32>; Q]; R];

/// `R` rows at a time, the groups of one column side by side; rows missing from the last tile are zero.
pub struct Interleave<'a, T, const R: usize> {
    /// `[.., inner]`
    pub source: &'a [T],
    pub inner: usize,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    /// `[tiles, groups]`
    pub target: &'a mut [[Group<f32>; R]],
}

impl<T: Stored, const R: usize> Kernel for Interleave<'_, T, R> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let groups = self.columns.len().div_ceil(LANES);
        for (tile, target) in pieces(self.rows, R).zip(self.target.chunks_exact_mut(groups)) {
            for r in 0..tile.len() {
                let source = &self.source[(tile.start + r) * self.inner..][self.columns.clone()];
                for (source, target) in source.chunks(LANES).zip(target.iter_mut()) {
                    load::<V, T>(source).store(&mut target[r]);
                }
            }
            for r in tile.len()..R {
                target.iter_mut().for_each(|target| target[r] = [0.0; LANES]);
            }
        }
    }
}

/// Few rows: tiles of interleaved `x` times `Q` rows of the weight as they are stored, widened on the way.
pub struct Streamed<'a, W, const R: usize, const Q: usize> {
    /// `[tiles, groups]`
    pub x: &'a [[Group<f32>; R]],
    pub weights: [&'a [W]; Q],
    /// What will be wanted next: hardware loses the thread where rows are short.
    pub next: &'a [W],
    /// `[tiles]`
    pub sums: &'a mut [[[f32; Q]; R]],
}

impl<W: Stored, const R: usize, const Q: usize> Kernel for Streamed<'_, W, R, Q> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let whole = self.weights[0].len() / LANES;
        let groups = self.weights[0].len().div_ceil(LANES);
        let weights = self.weights.map(|weights| &weights.as_chunks().0[..whole]);
        let tails = self.weights.map(|weights| {
            let mut tail = [W::round(0.0); LANES];
            tail[..weights.len() % LANES].copy_from_slice(&weights[whole * LANES..]);
            tail
        });
        let next = self.next.as_chunks::<LANES>().0.as_chunks::<Q>().0;
        for (x, sums) in self.x.chunks_exact(groups).zip(self.sums) {
            let (body, tail) = x.split_at(whole);
            let mut accumulators = [[V::splat(0.0); Q]; R];
            for (k, x) in body.iter().enumerate() {
                if let Some(next) = next.get(k) {
                    prefetch(next.as_flattened());
                }
                step(&mut accumulators, x, std::array::from_fn(|q| &weights[q][k]));
            }
            for x in tail {
                step(&mut accumulators, x, tails.each_ref());
            }
            total(&accumulators, sums);
        }
    }
}

/// Many rows: tiles of interleaved `x` times a panel of interleaved weights.
pub struct Blocked<'a, const R: usize, const Q: usize> {
    /// `[tiles, groups]`
    pub x: &'a [[Group<f32>; R]],
    /// Stretch by stretch, and in each `[tiles of weights, groups of the stretch]`.
    pub panel: &'a [[Group<f32>; Q]],
    pub groups: usize,
    /// `[tiles of weights, tiles]`, of any content.
    pub accumulators: &'a mut [Accumulators<R, Q>],
    /// `[tiles of weights, tiles]`
    pub sums: &'a mut [[[f32; Q]; R]],
}

/// Groups after which the next tile has its turn, so that the tiles of `x` stay in the first-level cache.
pub const STRETCH: usize = 48;

impl<const R: usize, const Q: usize> Kernel for Blocked<'_, R, Q> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let tiles = self.x.len() / self.groups;
        let panels = self.panel.len() / self.groups;
        for stretch in pieces(0..self.groups, STRETCH) {
            let mut panel = &self.panel[stretch.start * panels..stretch.end * panels];
            for accumulators in self.accumulators.chunks_exact_mut(tiles) {
                let (weights, rest) = panel.split_at(stretch.len());
                panel = rest;
                let next = rest.as_flattened();
                for (t, (x, stored)) in self.x.chunks_exact(self.groups).zip(accumulators).enumerate() {
                    let mut accumulators = [[V::splat(0.0); Q]; R];
                    if stretch.start > 0 {
                        load_all(&mut accumulators, stored);
                    }
                    for (k, (x, weights)) in x[stretch.clone()].iter().zip(weights).enumerate() {
                        // Every tile of `x` asks for its share of the next weights.
                        if let Some(next) = next.get(t * stretch.len() + k) {
                            prefetch(next);
                        }
                        step(&mut accumulators, x, weights.each_ref());
                    }
                    store_all(&accumulators, stored);
                }
            }
        }
        for (accumulators, sums) in self.accumulators.iter().zip(self.sums) {
            let mut lanes = [[V::splat(0.0); Q]; R];
            load_all(&mut lanes, accumulators);
            total(&lanes, sums);
        }
    }
}

/// Adds the products of one column. Whichever of rows and outputs is fewer stays in registers while the other is
/// loaded one by one: with the accumulators at most sixteen registers, all that AVX2 has.
#[inline(always)]
fn step<V: Lanes, W: Stored, const R: usize, const Q: usize>(
    accumulators: &mut [[V; Q]; R],
    x: &[Group<f32>; R],
    weights: [&Group<W>; Q],
) {
    if R <= Q {
        let mut column = [V::splat(0.0); R];
        for r in 0..R {
            column[r] = V::load(&x[r]);
        }
        for q in 0..Q {
            let weight: V = W::load(weights[q]);
            for r in 0..R {
                accumulators[r][q] = column[r].mul_add(weight, accumulators[r][q]);
            }
        }
    } else {
        let mut column = [V::splat(0.0); Q];
        for q in 0..Q {
            column[q] = W::load(weights[q]);
        }
        for r in 0..R {
            let x = V::load(&x[r]);
            for q in 0..Q {
                accumulators[r][q] = x.mul_add(column[q], accumulators[r][q]);
            }
        }
    }
}

// Element by element: a copy of whole arrays of lanes would go through memory.

#[inline(always)]
fn load_all<V: Lanes, const R: usize, const Q: usize>(lanes: &mut [[V; Q]; R], stored: &Accumulators<R, Q>) {
    for r in 0..R {
        for q in 0..Q {
            lanes[r][q] = V::load(&stored[r][q]);
        }
    }
}

#[inline(always)]
fn store_all<V: Lanes, const R: usize, const Q: usize>(lanes: &[[V; Q]; R], stored: &mut Accumulators<R, Q>) {
    for r in 0..R {
        for q in 0..Q {
            lanes[r][q].store(&mut stored[r][q]);
        }
    }
}

/// The sum of the lanes of each accumulator.
#[inline(always)]
fn total<V: Lanes, const R: usize, const Q: usize>(lanes: &[[V; Q]; R], sums: &mut [[f32; Q]; R]) {
    for first in 0..(R * Q).div_ceil(4) {
        let mut four = [V::splat(0.0); 4];
        for i in 4 * first..(R * Q).min(4 * first + 4) {
            four[i % 4] = lanes[i / Q][i % Q];
        }
        let four = V::sums(four);
        for i in 4 * first..(R * Q).min(4 * first + 4) {
            sums[i / Q][i % Q] = four[i % 4];
        }
    }
}

/// `range` in pieces of `len`, the last one shorter.
pub fn pieces(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(len).map(move |start| start..range.end.min(start + len))
}

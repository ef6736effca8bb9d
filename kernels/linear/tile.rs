//! The register tiles of the product.
//!
//! One output is a dot product in eight lanes: lane `l` sums the products at `i = l, l + 8, l + 16, ..` in that order, an
//! inner dimension that is no multiple of eight is padded with zeros, and the lanes are added in one fixed tree. With
//! few rows the lanes stand side by side in a register, as weights are stored. With many, a register holds one lane of
//! eight outputs, and lanes come one after the other: then a weight serves six rows and a value of `x` sixteen outputs
//! once they are in registers. Either way an output sees the same operations, so its bits depend neither on its
//! neighbours nor on how many rows there are. They do depend on whether the machine fuses multiply and add.

use std::marker::PhantomData;
use std::ops::Range;

use crate::simd::{Kernel, LANES, Lanes, Stored, Vector, load, prefetch_far, prefetch_far_at};

mod registers;

/// Eight values along the inner dimension.
pub type Group<T> = [T; LANES];

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
                    prefetch_far(next.as_flattened());
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

/// Many rows: `R` rows of `x` or outputs of the weight, turned so that the values that meet the same accumulator lane lie
/// one after the other: `[LANES, groups, R]`. Missing ones are zero.
pub struct Turn<'a, T, const R: usize> {
    /// `[.., inner]`
    pub source: &'a [T],
    pub inner: usize,
    /// `R` at most.
    pub rows: Range<usize>,
    pub target: &'a mut [[f32; R]],
}

impl<T: Stored, const R: usize> Kernel for Turn<'_, T, R> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        const LINE: usize = 64;
        /// Bytes of each row that are asked for ahead of use.
        const AHEAD: usize = 1 << 10;
        let groups = self.inner.div_ceil(LANES);
        for part in 0..R.div_ceil(LANES) {
            let lanes = part * LANES..R.min((part + 1) * LANES);
            let mut sources = [&self.source[..0]; LANES];
            for (source, row) in sources.iter_mut().zip(self.rows.clone().skip(lanes.start)) {
                *source = &self.source[row * self.inner..][..self.inner];
            }
            for group in 0..groups {
                if (group * LANES * size_of::<T>()).is_multiple_of(LINE) {
                    // Behind these rows lie those that follow.
                    let ahead = group * LANES + AHEAD / size_of::<T>();
                    let ahead = if ahead < self.inner { ahead } else { ahead + (LANES - 1) * self.inner };
                    for source in &sources {
                        prefetch_far_at(source.as_ptr().wrapping_add(ahead), 1);
                    }
                }
                let mut rows = [V::splat(0.0); LANES];
                for i in 0..LANES {
                    let source = sources[i];
                    rows[i] = load(&source[source.len().min(group * LANES)..source.len().min((group + 1) * LANES)]);
                }
                let turned = V::transpose(rows);
                for (lane, turned) in turned.into_iter().enumerate() {
                    let target = &mut self.target[lane * groups + group][lanes.clone()];
                    match target.first_chunk_mut() {
                        Some(target) => turned.store(target),
                        None => {
                            let mut values = [0.0; LANES];
                            turned.store(&mut values);
                            target.iter_mut().zip(values).for_each(|(target, value)| *target = value);
                        }
                    }
                }
            }
        }
    }
}

/// What a register tile holds: `R` rows times `O` outputs.
pub type Sums<const R: usize, const O: usize> = [[f32; O]; R];

/// The sums of a tile's lanes, those that wait for others to be added to and the one at work.
pub type Pending<const R: usize, const O: usize> = [Sums<R, O>; LANES.ilog2() as usize + 1];

/// The values of `R` rows that meet the outputs' weights, step by step.
pub trait Steps<const R: usize>: Copy {
    fn value(self, step: usize, row: usize) -> f32;
}

/// Turned.
impl<const R: usize> Steps<R> for &[[f32; R]] {
    #[inline(always)]
    fn value(self, step: usize, row: usize) -> f32 {
        self[step][row]
    }
}

/// Rows of which all steps lie one after the other.
#[derive(Clone, Copy)]
pub struct AsRows<'a, const R: usize, const L: usize> {
    pub rows: &'a [[f32; L]; R],
    /// The step of every row at which they start.
    pub first: usize,
}

impl<const R: usize, const L: usize> Steps<R> for AsRows<'_, R, L> {
    #[inline(always)]
    fn value(self, step: usize, row: usize) -> f32 {
        self.rows[row][self.first + step]
    }
}

/// What a tile adds for each of its steps.
pub(crate) trait Products {
    fn add<V: Vector>(x: V, weights: V, sum: V) -> V;
}

/// The product of two values.
pub(crate) struct MulAdd;

impl Products for MulAdd {
    #[inline(always)]
    fn add<V: Vector>(x: V, weights: V, sum: V) -> V {
        x.mul_add(weights, sum)
    }
}

/// The products of two bf16 values each: a place holds two of them.
pub(crate) struct Dot;

impl Products for Dot {
    #[inline(always)]
    fn add<V: Vector>(x: V, weights: V, sum: V) -> V {
        x.dot(weights, sum)
    }
}

/// A register tile for many rows: `R` of them times `O` outputs.
pub(crate) trait Tile<const R: usize, const O: usize> {
    /// Groups after which the next tile has its turn, so that the weights of a lane stay in the first-level cache for all
    /// tiles.
    const STRETCH: usize;
    /// Two of them hold a row.
    type Register<V: Lanes>: Vector;

    /// Adds the products of all `weights` to the last of `sums`, which is zero if `fresh`, and then the `folded` before it,
    /// the last one first. The result takes the place of the first of them.
    #[inline(always)]
    fn multiply<V: Lanes, P: Products>(
        x: impl Steps<R>,
        weights: &[[f32; O]],
        fresh: bool,
        folded: usize,
        sums: &mut [Sums<R, O>],
    ) {
        registers::multiply::<Self::Register<V>, P, R, O>(x, weights, fresh, folded, sums)
    }

    /// Whole sums of products times `scale`, to `target` from `first` on. `x` and `weights` are turned: `[LANES, groups]`.
    fn dots<V: Lanes, P: Products, const L: usize>(
        x: &[[f32; R]],
        weights: &[[f32; O]],
        scale: f32,
        target: &mut [[f32; L]; R],
        first: usize,
    );
}

/// On cache lines, so that no register's values straddle two.
#[repr(C, align(64))]
pub struct OnLines<T>(pub T);

/// How many sums wait when a lane has its turn, and how many of them are added to its own: lanes are added as a tree,
/// `((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))`.
#[inline(always)]
fn fold(lane: usize) -> (usize, usize) {
    (lane.count_ones() as usize, lane.trailing_ones() as usize)
}

/// Many rows: tiles of turned `x` times tiles of turned weights.
pub struct Blocked<'a, T, const R: usize, const O: usize> {
    pub tile: PhantomData<T>,
    /// `[tiles, LANES, groups]`
    pub x: &'a [[f32; R]],
    /// `[panel, LANES, groups]`
    pub weights: &'a [[f32; O]],
    pub groups: usize,
    /// `[tiles, panel]`, of any content; the first of each becomes the product.
    pub pending: &'a mut [Pending<R, O>],
}

impl<T: Tile<R, O>, const R: usize, const O: usize> Kernel for Blocked<'_, T, R, O> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let whole = LANES * self.groups;
        let panel = self.weights.len() / whole;
        for lane in 0..LANES {
            let (waiting, all) = fold(lane);
            for stretch in pieces(0..self.groups, T::STRETCH) {
                let fresh = stretch.start == 0;
                let folded = if stretch.end == self.groups { all } else { 0 };
                let part = lane * self.groups + stretch.start..lane * self.groups + stretch.end;
                for (t, weights) in self.weights.chunks_exact(whole).enumerate() {
                    for (x, pending) in self.x.chunks_exact(whole).zip(self.pending.chunks_exact_mut(panel)) {
                        let (x, sums) = (&x[part.clone()], &mut pending[t][..=waiting]);
                        T::multiply::<V, MulAdd>(x, &weights[part.clone()], fresh, folded, sums);
                    }
                }
            }
        }
    }
}

/// In [`Lanes`]: twelve accumulators, two loads of weights and a broadcast of `x` fill the sixteen registers of AVX2.
pub(crate) struct Narrow;

impl Tile<6, 16> for Narrow {
    const STRETCH: usize = 192;
    type Register<V: Lanes> = V;

    #[inline(always)]
    fn dots<V: Lanes, P: Products, const L: usize>(
        x: &[[f32; 6]],
        weights: &[[f32; 16]],
        scale: f32,
        target: &mut [[f32; L]; 6],
        first: usize,
    ) {
        registers::dots::<Self::Register<V>, P, 6, 3, 16, L>(x, weights, scale, target, first)
    }
}

/// In pairs of them, for AVX-512: twenty-four accumulators of its thirty-two registers.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Wide;

#[cfg(target_arch = "x86_64")]
impl Tile<12, 32> for Wide {
    const STRETCH: usize = 128;
    type Register<V: Lanes> = V::Pair;

    #[inline(always)]
    fn dots<V: Lanes, P: Products, const L: usize>(
        x: &[[f32; 12]],
        weights: &[[f32; 32]],
        scale: f32,
        target: &mut [[f32; L]; 12],
        first: usize,
    ) {
        registers::dots::<Self::Register<V>, P, 12, 6, 32, L>(x, weights, scale, target, first)
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

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

use crate::simd::{Kernel, LANES, Lanes, Stored, load, prefetch_far};

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
        let groups = self.inner.div_ceil(LANES);
        for part in 0..R.div_ceil(LANES) {
            let lanes = part * LANES..R.min((part + 1) * LANES);
            let mut sources = [&self.source[..0]; LANES];
            for (source, row) in sources.iter_mut().zip(self.rows.clone().skip(lanes.start)) {
                *source = &self.source[row * self.inner..][..self.inner];
            }
            for group in 0..groups {
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

/// A register tile for many rows: `R` of them times `O` outputs.
pub trait Tile<const R: usize, const O: usize> {
    /// Groups after which the next lane has its turn, so that the weights of a lane stay in the first-level cache for all
    /// tiles, and the stretch of all operands in the second.
    const STRETCH: usize;

    /// Adds the products of one lane of a dot product to `stored`, which is zero if `fresh`.
    fn multiply<V: Lanes>(x: &[[f32; R]], weights: &[[f32; O]], fresh: bool, stored: &mut [[f32; O]; R]);
}

/// The accumulators of a tile: each lane of a dot product is summed on its own.
pub type Accumulators<const R: usize, const O: usize> = [[[f32; O]; R]; LANES];

/// Many rows: tiles of turned `x` times tiles of turned weights.
pub struct Blocked<'a, T, const R: usize, const O: usize> {
    pub tile: PhantomData<T>,
    /// `[tiles, LANES, groups]`
    pub x: &'a [[f32; R]],
    /// `[panel, LANES, groups]`
    pub weights: &'a [[f32; O]],
    pub groups: usize,
    /// `[tiles, panel]`, of any content.
    pub accumulators: &'a mut [Accumulators<R, O>],
    /// `[tiles, panel]`
    pub sums: &'a mut [[[f32; O]; R]],
}

impl<T: Tile<R, O>, const R: usize, const O: usize> Kernel for Blocked<'_, T, R, O> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let whole = LANES * self.groups;
        let panel = self.weights.len() / whole;
        for stretch in pieces(0..self.groups, T::STRETCH) {
            let fresh = stretch.start == 0;
            for lane in 0..LANES {
                let part = lane * self.groups + stretch.start..lane * self.groups + stretch.end;
                for (t, weights) in self.weights.chunks_exact(whole).enumerate() {
                    let tiles = self.x.chunks_exact(whole).zip(self.accumulators.chunks_exact_mut(panel));
                    for (x, accumulators) in tiles {
                        T::multiply::<V>(&x[part.clone()], &weights[part.clone()], fresh, &mut accumulators[t][lane]);
                    }
                }
            }
        }
        for (accumulators, sums) in self.accumulators.iter().zip(self.sums) {
            for row in 0..R {
                for (eight, sums) in sums[row].as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                    let mut lanes = [V::splat(0.0); LANES];
                    for lane in 0..LANES {
                        lanes[lane] = V::load(&accumulators[lane][row].as_chunks().0[eight]);
                    }
                    let [a, b, c, d, e, f, g, h] = lanes;
                    let upper = a.add(b).add(c.add(d));
                    upper.add(e.add(f).add(g.add(h))).store(sums);
                }
            }
        }
    }
}

/// On [`Lanes`]: twelve accumulators, two loads of weights and a broadcast of `x` fill the sixteen registers of AVX2.
pub struct Narrow;

impl Tile<6, 16> for Narrow {
    const STRETCH: usize = 192;

    #[inline(always)]
    fn multiply<V: Lanes>(x: &[[f32; 6]], weights: &[[f32; 16]], fresh: bool, stored: &mut [[f32; 16]; 6]) {
        let mut sums = [[V::splat(0.0); 2]; 6];
        if !fresh {
            for row in 0..6 {
                for (half, stored) in stored[row].as_chunks().0.iter().enumerate() {
                    sums[row][half] = V::load(stored);
                }
            }
        }
        for (x, weights) in x.iter().zip(weights) {
            let halves = weights.as_chunks::<LANES>().0;
            let (first, second) = (V::load(&halves[0]), V::load(&halves[1]));
            for row in 0..6 {
                let x = V::splat(x[row]);
                sums[row][0] = x.mul_add(first, sums[row][0]);
                sums[row][1] = x.mul_add(second, sums[row][1]);
            }
        }
        for row in 0..6 {
            for (half, stored) in stored[row].as_chunks_mut().0.iter_mut().enumerate() {
                sums[row][half].store(stored);
            }
        }
    }
}

/// On AVX-512: twenty-four accumulators of its thirty-two registers. Only where the machine has it.
#[cfg(target_arch = "x86_64")]
pub struct Wide;

#[cfg(target_arch = "x86_64")]
impl Tile<12, 32> for Wide {
    const STRETCH: usize = 128;

    #[inline(always)]
    fn multiply<V: Lanes>(x: &[[f32; 12]], weights: &[[f32; 32]], fresh: bool, stored: &mut [[f32; 32]; 12]) {
        // SAFETY: whoever names the type has found the feature.
        unsafe { multiply_avx512(x, weights, fresh, stored) }
    }
}

/// # Safety
///
/// The machine has AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn multiply_avx512(x: &[[f32; 12]], weights: &[[f32; 32]], fresh: bool, stored: &mut [[f32; 32]; 12]) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm512_setzero_ps(); 2]; 12];
    // SAFETY of the blocks below: loads and stores cover exactly half of a borrowed array of 32.
    if !fresh {
        for row in 0..12 {
            let source = stored[row].as_ptr();
            sums[row] = unsafe { [_mm512_loadu_ps(source), _mm512_loadu_ps(source.add(16))] };
        }
    }
    for (x, weights) in x.iter().zip(weights) {
        let source = weights.as_ptr();
        let (first, second) = unsafe { (_mm512_loadu_ps(source), _mm512_loadu_ps(source.add(16))) };
        for row in 0..12 {
            let x = _mm512_set1_ps(x[row]);
            sums[row][0] = _mm512_fmadd_ps(x, first, sums[row][0]);
            sums[row][1] = _mm512_fmadd_ps(x, second, sums[row][1]);
        }
    }
    for row in 0..12 {
        let target = stored[row].as_mut_ptr();
        unsafe {
            _mm512_storeu_ps(target, sums[row][0]);
            _mm512_storeu_ps(target.add(16), sums[row][1]);
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

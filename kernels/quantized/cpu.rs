//! The product on the CPU: tiles of weights as they are packed, times rows of `x` rounded to bytes. Lanes are outputs,
//! so nothing is ever added across them.

use half::bf16;
use rayon::prelude::*;

use super::{OUTS, Quantization, QuantizedMatrix, Tile};
use crate::cpu::Shared;
use crate::simd::{Bytes, Kernel, LANES, Lanes, Stored, dispatch, load};

/// `x` `[n, inner]`; returns `[n, outer]`.
pub fn linear<X: Stored>(x: &[X], weight: &QuantizedMatrix) -> Vec<X> {
    let QuantizedMatrix { outer, inner, .. } = *weight;
    if inner == 0 {
        return vec![X::round(0.0); x.len()];
    }
    let n = x.len() / inner;
    let mut out = vec![X::round(0.0); n * outer];
    let x = Rounded::new(x, inner, weight.format.group() / GROUP);
    let product = Product { x: &x, weight, n, out: Shared::new(&mut out) };
    match n {
        1 => product.run::<1, 4>(),
        2 | 3 => product.run::<2, 3>(),
        _ => product.run::<4, 2>(),
    }
    out
}

/// Values of `x` that share a scale.
const GROUP: usize = 32;

/// Products of which a thread should have at least so many, or waking it costs more than it does.
const MIN_TASK: usize = 1 << 17;

/// A group as the kernels take it: the four bytes that meet a load of weights, eight times.
type Fours = [[i8; 4]; GROUP / 4];

/// Rows of `x` rounded to bytes.
struct Rounded {
    /// `[n, groups]`; a multiple of the weight's groups, the rest zero.
    codes: Vec<Fours>,
    /// `[n, groups]`
    scales: Vec<f32>,
    /// `[n, groups]`: what the rounded values of each group add up to.
    sums: Vec<f32>,
    groups: usize,
}

impl Rounded {
    fn new<X: Stored>(x: &[X], inner: usize, multiple: usize) -> Self {
        let groups = inner.div_ceil(GROUP).next_multiple_of(multiple);
        let count = x.len() / inner * groups;
        let mut rounded =
            Self { codes: vec![[[0; 4]; GROUP / 4]; count], scales: vec![0.0; count], sums: vec![0.0; count], groups };
        let Self { codes, scales, sums, .. } = &mut rounded;
        let rows = (MIN_TASK / 16 / inner).max(1);
        x.par_chunks(rows * inner)
            .zip(codes.par_chunks_mut(rows * groups))
            .zip(scales.par_chunks_mut(rows * groups))
            .zip(sums.par_chunks_mut(rows * groups))
            .for_each(|(((x, codes), scales), sums)| dispatch(Round { x, inner, groups, codes, scales, sums }));
        rounded
    }
}

struct Round<'a, X> {
    x: &'a [X],
    inner: usize,
    groups: usize,
    codes: &'a mut [Fours],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
}

impl<X: Stored> Kernel for Round<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        for (row, x) in self.x.chunks_exact(self.inner).enumerate() {
            for (group, x) in x.chunks(GROUP).enumerate() {
                let index = row * self.groups + group;
                let mut values = [0.0; GROUP];
                let mut largest = V::splat(0.0);
                for (x, values) in x.chunks(LANES).zip(values.as_chunks_mut::<LANES>().0) {
                    let x: V = load(x);
                    largest = x.max(V::splat(0.0).sub(x)).max(largest);
                    x.store(values);
                }
                let scale = largest.greatest() / 127.0;
                let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
                let mut sum = 0;
                for (value, code) in values.iter().zip(self.codes[index].as_flattened_mut()) {
                    *code = (value * inverse).round_ties_even() as i8;
                    sum += i32::from(*code);
                }
                self.scales[index] = scale;
                self.sums[index] = sum as f32 * scale;
            }
        }
    }
}

struct Product<'a, X> {
    x: &'a Rounded,
    weight: &'a QuantizedMatrix,
    n: usize,
    out: Shared<'a, X>,
}

impl<X: Stored> Product<'_, X> {
    /// Tiles of `R` rows and `P` times eight outputs.
    fn run<const R: usize, const P: usize>(&self) {
        let (outer, groups) = (self.weight.outer, self.weight.groups());
        let tile_rows = outer.div_ceil(OUTS);
        let panels = tile_rows.div_ceil(P);
        let products = self.n * self.weight.inner * P * OUTS;
        let panels_of_task = panels.div_ceil(8 * rayon::current_num_threads()).max(MIN_TASK / products.max(1)).max(1);
        (0..panels.div_ceil(panels_of_task)).into_par_iter().for_each(|task| {
            for panel in task * panels_of_task..panels.min((task + 1) * panels_of_task) {
                // Beyond the last output the tile computes it again.
                let tile_row = |p: usize| (panel * P + p).min(tile_rows - 1) * groups;
                let weights = Panel::<P> {
                    tiles: std::array::from_fn(|p| &self.weight.tiles[tile_row(p)..][..groups]),
                    scales: std::array::from_fn(|p| &self.weight.scales[tile_row(p)..][..groups]),
                    minima: std::array::from_fn(|p| match self.weight.format {
                        Quantization::Q8 => &[][..],
                        Quantization::Q4 => &self.weight.minima[tile_row(p)..][..groups],
                    }),
                };
                let mut row = 0;
                while row + R <= self.n {
                    self.tile::<R, P>(row, panel, &weights);
                    row += R;
                }
                while row < self.n {
                    self.tile::<1, P>(row, panel, &weights);
                    row += 1;
                }
            }
        });
    }

    fn tile<const R: usize, const P: usize>(&self, row: usize, panel: usize, weights: &Panel<P>) {
        let outer = self.weight.outer;
        let groups = self.x.groups;
        let mut out = [[[0.0; OUTS]; P]; R];
        let rows = Rows::<R> {
            codes: std::array::from_fn(|r| &self.x.codes[(row + r) * groups..][..groups]),
            scales: std::array::from_fn(|r| &self.x.scales[(row + r) * groups..][..groups]),
            sums: std::array::from_fn(|r| &self.x.sums[(row + r) * groups..][..groups]),
        };
        match self.weight.format {
            Quantization::Q8 => dispatch(Q8Tile { rows, weights, out: &mut out }),
            Quantization::Q4 => dispatch(Q4Tile { rows, weights, out: &mut out }),
        }
        let first = panel * P * OUTS;
        let len = (P * OUTS).min(outer - first);
        for (r, values) in out.iter().enumerate() {
            // SAFETY: every task has outputs of its own.
            let target = unsafe { self.out.part((row + r) * outer + first, len) };
            target.iter_mut().zip(values.as_flattened()).for_each(|(target, &value)| *target = X::round(value));
        }
    }
}

/// `P` tile rows of a weight, by group.
struct Panel<'a, const P: usize> {
    tiles: [&'a [Tile]; P],
    scales: [&'a [[bf16; OUTS]]; P],
    minima: [&'a [[bf16; OUTS]]; P],
}

/// `R` rows of `x`, by group.
struct Rows<'a, const R: usize> {
    codes: [&'a [Fours]; R],
    scales: [&'a [f32]; R],
    sums: [&'a [f32]; R],
}

struct Q8Tile<'a, const R: usize, const P: usize> {
    rows: Rows<'a, R>,
    weights: &'a Panel<'a, P>,
    out: &'a mut [[[f32; OUTS]; P]; R],
}

impl<const R: usize, const P: usize> Kernel for Q8Tile<'_, R, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { rows, weights, out } = self;
        let mut totals = [[V::splat(0.0); P]; R];
        for g in 0..rows.codes[0].len() {
            let mut sums = [[V::Bytes::no_sums(); P]; R];
            for i in 0..GROUP / 4 {
                let mut codes = [V::Bytes::repeat([0; 4]); P];
                for (codes, tiles) in codes.iter_mut().zip(&weights.tiles) {
                    *codes = V::Bytes::load(&tiles[g].0[i]);
                }
                for (sums, row) in sums.iter_mut().zip(&rows.codes) {
                    let x = V::Bytes::repeat(row[g][i]);
                    for (sum, codes) in sums.iter_mut().zip(codes) {
                        *sum = V::Bytes::add_products(*sum, codes, x);
                    }
                }
            }
            for p in 0..P {
                let scale = V::load_bf16(&weights.scales[p][g]);
                for r in 0..R {
                    let sum = V::Bytes::to_lanes(sums[r][p]).mul(V::splat(rows.scales[r][g]));
                    totals[r][p] = sum.mul_add(scale, totals[r][p]);
                }
            }
        }
        store(&totals, out);
    }
}

struct Q4Tile<'a, const R: usize, const P: usize> {
    rows: Rows<'a, R>,
    weights: &'a Panel<'a, P>,
    out: &'a mut [[[f32; OUTS]; P]; R],
}

impl<const R: usize, const P: usize> Kernel for Q4Tile<'_, R, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { rows, weights, out } = self;
        let mut totals = [[V::splat(0.0); P]; R];
        for g in 0..weights.tiles[0].len() {
            let mut parts = [[V::splat(0.0); P]; R];
            for half in 0..2 {
                let mut words = [[V::Bytes::no_words(); P]; R];
                for i in 0..4 {
                    let mut codes = [[V::Bytes::repeat([0; 4]); 2]; P];
                    for (codes, tiles) in codes.iter_mut().zip(&weights.tiles) {
                        *codes = V::Bytes::load(&tiles[g].0[4 * half + i]).nibbles();
                    }
                    for (words, row) in words.iter_mut().zip(&rows.codes) {
                        let x = &row[2 * g + half];
                        let (first, second) = (V::Bytes::repeat(x[2 * i]), V::Bytes::repeat(x[2 * i + 1]));
                        for (words, [low, high]) in words.iter_mut().zip(codes) {
                            *words = V::Bytes::add_small_products(*words, low, first);
                            *words = V::Bytes::add_small_products(*words, high, second);
                        }
                    }
                }
                for r in 0..R {
                    let scale = V::splat(rows.scales[r][2 * g + half]);
                    for p in 0..P {
                        let sums = V::Bytes::add_words(V::Bytes::no_sums(), words[r][p]);
                        parts[r][p] = V::Bytes::to_lanes(sums).mul_add(scale, parts[r][p]);
                    }
                }
            }
            for p in 0..P {
                let scale = V::load_bf16(&weights.scales[p][g]);
                let minimum = V::load_bf16(&weights.minima[p][g]);
                for r in 0..R {
                    let sum = V::splat(rows.sums[r][2 * g] + rows.sums[r][2 * g + 1]);
                    totals[r][p] = sum.mul_add(minimum, parts[r][p].mul_add(scale, totals[r][p]));
                }
            }
        }
        store(&totals, out);
    }
}

#[inline(always)]
fn store<V: Lanes, const R: usize, const P: usize>(totals: &[[V; P]; R], out: &mut [[[f32; OUTS]; P]; R]) {
    for r in 0..R {
        for p in 0..P {
            totals[r][p].store(&mut out[r][p]);
        }
    }
}

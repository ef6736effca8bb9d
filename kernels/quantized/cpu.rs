//! The product on the CPU: panels of weights as they are packed, times rows of `x` rounded to bytes. Lanes are outputs,
//! so nothing is ever added across them.

use rayon::prelude::*;

use super::dot::{self, Affine, Dot, Four};
use super::{Blocks, OUTS, Q4Block, Q8Block, QuantizedMatrix};
use crate::cpu::Shared;
use crate::simd::{Instructions, Kernel, LANES, Lanes, Stored, dispatch, instructions, load, prefetch};

/// `x` `[n, inner]`; returns `[n, outer]`.
pub fn linear<X: Stored>(x: &[X], weight: &QuantizedMatrix) -> Vec<X> {
    let QuantizedMatrix { outer, inner, ref blocks } = *weight;
    if inner == 0 {
        return vec![X::round(0.0); x.len()];
    }
    let n = x.len() / inner;
    let mut out = vec![X::round(0.0); n * outer];
    let x = Rounded::new(x, inner, weight.format().group() / GROUP);
    let product = Product { x: &x, n, inner, outer, instructions: instructions(), out: Shared::new(&mut out) };
    match blocks {
        Blocks::Q8(blocks) => product.run(blocks),
        Blocks::Q4(blocks) => product.run(blocks),
        Blocks::OnDevice(..) => unreachable!("refused by the public function"),
    }
    out
}

/// Values of `x` that share a scale.
const GROUP: usize = 32;

/// Products of which a thread should have at least so many, or waking it costs more than it does.
const MIN_TASK: usize = 1 << 17;

/// A group as the kernels take it: the four bytes that meet a step's codes, eight times.
type Fours = [Four; GROUP / 4];

/// Rows of `x` rounded to bytes.
struct Rounded {
    /// `[n, groups]`; a multiple of the weight's groups, the rest zero.
    codes: Vec<Fours>,
    /// `[n, groups]`
    scales: Vec<f32>,
    /// `[n, groups]`: what the codes of each group add up to.
    sums: Vec<i32>,
    groups: usize,
}

impl Rounded {
    fn new<X: Stored>(x: &[X], inner: usize, multiple: usize) -> Self {
        let groups = inner.div_ceil(GROUP).next_multiple_of(multiple);
        let count = x.len() / inner * groups;
        let mut rounded =
            Self { codes: vec![[[0; 4]; GROUP / 4]; count], scales: vec![0.0; count], sums: vec![0; count], groups };
        let Self { codes, scales, sums, .. } = &mut rounded;
        let rows = (MIN_TASK / 16 / inner).max(1);
        let tasks = x.par_chunks(rows * inner).zip(codes.par_chunks_mut(rows * groups));
        tasks
            .zip(scales.par_chunks_mut(rows * groups))
            .zip(sums.par_chunks_mut(rows * groups))
            .for_each(|(((x, codes), scales), sums)| dispatch(Round { x, inner, groups, codes, scales, sums }));
        rounded
    }

    fn row(&self, row: usize) -> Row<'_> {
        let groups = row * self.groups..(row + 1) * self.groups;
        Row { codes: &self.codes[groups.clone()], scales: &self.scales[groups.clone()], sums: &self.sums[groups] }
    }
}

struct Round<'a, X> {
    x: &'a [X],
    inner: usize,
    groups: usize,
    codes: &'a mut [Fours],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
}

impl<X: Stored> Kernel for Round<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        // Adding 1.5 * 2^23 leaves the nearest integer in the lower bits.
        const ROUND: f32 = 12_582_912.0;
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
                for values in values.as_chunks_mut::<LANES>().0 {
                    V::load(values).mul(V::splat(inverse)).add(V::splat(ROUND)).store(values);
                }
                let codes = values.map(|value| value.to_bits() as i8);
                self.codes[index].as_flattened_mut().copy_from_slice(&codes);
                self.scales[index] = scale;
                self.sums[index] = codes.into_iter().map(i32::from).sum();
            }
        }
    }
}

/// A row of `x`, by group.
#[derive(Clone, Copy)]
struct Row<'a> {
    codes: &'a [Fours],
    scales: &'a [f32],
    sums: &'a [i32],
}

struct Product<'a, X> {
    x: &'a Rounded,
    n: usize,
    inner: usize,
    outer: usize,
    instructions: Instructions,
    out: Shared<'a, X>,
}

impl<X: Stored> Product<'_, X> {
    /// Rows that share the loads of a panel are as many as the registers hold sums for.
    fn run<B: Block>(&self, blocks: &[B]) {
        match self.instructions {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => self.run_by::<B, 6>(blocks),
            _ => self.run_by::<B, 2>(blocks),
        }
    }

    fn run_by<B: Block, const ROWS: usize>(&self, blocks: &[B]) {
        let panels = self.outer.div_ceil(OUTS);
        let threads = rayon::current_num_threads();
        // A narrow weight has too few panels for all threads: then they share its rows as well.
        let parts = (4 * threads).div_ceil(panels).min(self.n.div_ceil(ROWS)).max(1);
        let rows = self.n.div_ceil(parts).next_multiple_of(ROWS);
        let task = panels.div_ceil(8 * threads).max(MIN_TASK / (rows.min(self.n).max(1) * self.inner * OUTS)).max(1);
        (0..self.n.div_ceil(rows.max(1)) * panels.div_ceil(task)).into_par_iter().for_each(|index| {
            let (part, first) = (index / panels.div_ceil(task), index % panels.div_ceil(task) * task);
            for panel in first..panels.min(first + task) {
                let groups = blocks.len() / panels;
                let (ahead, blocks) = (&blocks[panel * groups..], &blocks[panel * groups..(panel + 1) * groups]);
                let mut row = part * rows;
                let end = self.n.min(row + rows);
                while row + ROWS <= end {
                    self.tile::<B, ROWS>(blocks, &[], panel, row);
                    row += ROWS;
                }
                while row < end {
                    self.tile::<B, 1>(blocks, ahead, panel, row);
                    row += 1;
                }
            }
        });
    }

    fn tile<B: Block, const R: usize>(&self, blocks: &[B], ahead: &[B], panel: usize, row: usize) {
        let mut totals = [[0.0; OUTS]; R];
        let rows: [Row; R] = std::array::from_fn(|r| self.x.row(row + r));
        dot::dispatch(self.instructions, Sweep { blocks, ahead, rows, totals: &mut totals });
        let first = panel * OUTS;
        for (r, totals) in totals.iter().enumerate() {
            // SAFETY: every task has outputs and rows of its own.
            let out = unsafe { self.out.part((row + r) * self.outer + first, OUTS.min(self.outer - first)) };
            out.iter_mut().zip(totals).for_each(|(out, &total)| *out = X::round(total));
        }
    }
}

/// Blocks that are asked for ahead of use: about as many bytes as memory delivers within its latency.
const AHEAD: usize = 4;

/// A panel from its first group to its last, for `R` rows.
struct Sweep<'a, B, const R: usize> {
    blocks: &'a [B],
    /// The blocks and what lies behind them, to be brought near in time.
    ahead: &'a [B],
    rows: [Row<'a>; R],
    totals: &'a mut [[f32; OUTS]; R],
}

impl<B: Block, const R: usize> dot::Kernel for Sweep<'_, B, R> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        for (group, block) in self.blocks.iter().enumerate() {
            if let Some(ahead) = self.ahead.get(group + AHEAD) {
                prefetch(std::slice::from_ref(ahead));
            }
            block.add::<D, R>(group, &self.rows, self.totals);
        }
    }
}

/// The codes of `group` in each row.
#[inline(always)]
fn each<'a, const R: usize>(rows: &[Row<'a>; R], group: usize) -> [&'a Fours; R] {
    let mut codes = [&rows[0].codes[group]; R];
    for r in 1..R {
        codes[r] = &rows[r].codes[group];
    }
    codes
}

/// The four codes of step `i` in each row.
#[inline(always)]
fn step<const R: usize>(x: [&Fours; R], i: usize) -> [Four; R] {
    let mut fours = [[0; 4]; R];
    for r in 0..R {
        fours[r] = x[r][i];
    }
    fours
}

/// A block of a packed weight.
trait Block: Sync {
    /// Adds its products with `group` of the rows.
    fn add<D: Dot, const R: usize>(&self, group: usize, rows: &[Row; R], totals: &mut [[f32; OUTS]; R]);
}

impl Block for Q8Block {
    #[inline(always)]
    fn add<D: Dot, const R: usize>(&self, group: usize, rows: &[Row; R], totals: &mut [[f32; OUTS]; R]) {
        let mut sums = [D::no_sums(0); R];
        for r in 0..R {
            sums[r] = D::no_sums(rows[r].sums[group]);
        }
        let x = each(rows, group);
        for (i, codes) in self.codes.iter().enumerate() {
            D::add_signed(&mut sums, codes, step(x, i));
        }
        for r in 0..R {
            D::add_scaled(sums[r], rows[r].scales[group], &self.scales, &mut totals[r]);
        }
    }
}

impl Block for Q4Block {
    #[inline(always)]
    fn add<D: Dot, const R: usize>(&self, group: usize, rows: &[Row; R], totals: &mut [[f32; OUTS]; R]) {
        let mut sums = [[D::no_sums(0); 2]; R];
        for (half, codes) in self.codes.as_chunks::<4>().0.iter().enumerate() {
            let mut words = [D::no_words(); R];
            let x = each(rows, 2 * group + half);
            for (i, codes) in codes.iter().enumerate() {
                D::add_nibbles(&mut words, codes, step(x, 2 * i), step(x, 2 * i + 1));
            }
            for r in 0..R {
                sums[r][half] = D::total(words[r]);
            }
        }
        for r in 0..R {
            let factors = [rows[r].scales[2 * group], rows[r].scales[2 * group + 1]];
            let part = |half: usize| rows[r].sums[2 * group + half] as f32 * factors[half];
            let affine = Affine { factors, sum: part(0) + part(1), scales: &self.scales, minima: &self.minima };
            D::add_affine(sums[r], affine, &mut totals[r]);
        }
    }
}

//! Products on AMX, of bf16 in f32.
//!
//! A value is the sum of up to three bf16 values, and a product the sum of the products of its parts but the smallest,
//! which lie below what f32 keeps. Weights are the registers' rows as they are stored, `x` is turned once. The sums of
//! an output see the steps of the inner dimension in their order, within a step the products of small parts first, and
//! nothing of other rows and outputs: its bits depend neither on how many rows there are nor on threads.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::cpu::{aligned, parallel_pieces, write_rounded};
use super::tile::pieces;
use crate::cpu::Shared;
use crate::simd::amx::{self, ROWS, Tiles, WIDTH};
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, load, prefetch_far};

/// Inputs of one step: a register's row of bf16.
const STEP: usize = WIDTH / 2;
/// Outputs of a block, in four registers.
const OUTS: usize = 4 * ROWS;
/// Rows of `x` that meet a weight at once.
const COLUMNS: usize = 16;
/// Steps after which other rows meet the same weights, so that those stay in the first-level cache.
const STRETCH: usize = 6;
/// Rows of `x` whose parts in a stretch stay in the second-level cache.
const MAX_ROWS: usize = 512;
/// Blocks of a task of many rows: all meet a stretch of `x` before the next, and their sums stay in the second-level cache.
const TASK_BLOCKS: usize = 4;
/// Products of which a thread should have at least so many, or waking it costs more than it does.
const MIN_TASK: usize = 1 << 16;

/// Whether products with weights `W` run here.
pub fn takes<W: Stored>() -> bool {
    W::PARTS == 1 && amx::is_used()
}

/// As [`super::cpu::linear`].
pub fn linear<X: Stored, W: Stored>(
    x: &[X],
    weight: &[W],
    bias: Option<&[f32]>,
    (n, inner, outer): (usize, usize, usize),
) -> Vec<X> {
    let mut out = Vec::with_capacity(n * outer);
    let shared = Shared::new(&mut out.spare_capacity_mut()[..n * outer]);
    let steps = inner.div_ceil(STEP);
    let mut scratch = TURNED.take();
    for rows in pieces(0..n, MAX_ROWS) {
        let columns = rows.len().min(COLUMNS);
        let turn = steps * X::PARTS * STEP / 2 * columns;
        let turned = aligned(&mut scratch, rows.len().div_ceil(columns) * turn);
        turned
            .par_chunks_mut(turn)
            .zip(parallel_pieces(rows.clone(), columns))
            .for_each(|(target, rows)| dispatch(Turn { x, inner, rows, columns, target }));
        let product = Product { x: &*turned, weight, bias, rows, columns, inner, outer, out: &shared };
        product.run();
    }
    TURNED.set(scratch);
    // SAFETY: every output of every row was written.
    unsafe { out.set_len(n * outer) };
    out
}

/// Some rows of `x` as registers take them: `[steps, PARTS, STEP / 2, columns]` pairs of inputs. What is missing is zero.
struct Turn<'a, X> {
    /// `[.., inner]`
    x: &'a [X],
    inner: usize,
    rows: Range<usize>,
    columns: usize,
    target: &'a mut [u32],
}

impl<X: Stored> Kernel for Turn<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { x, inner, rows, columns, target } = self;
        if rows.len() < columns {
            target.fill(0);
        }
        for (step, target) in target.chunks_exact_mut(X::PARTS * STEP / 2 * columns).enumerate() {
            for (column, row) in rows.clone().enumerate() {
                let source = &x[row * inner + step * STEP..(row + 1) * inner];
                let parts = parts::<V, X>(&source[..source.len().min(STEP)]);
                for (part, target) in parts.iter().zip(target.chunks_exact_mut(STEP / 2 * columns)) {
                    for (pair, target) in part.as_chunks::<2>().0.iter().zip(target.chunks_exact_mut(columns)) {
                        target[column] = u32::from(pair[0].to_bits()) | u32::from(pair[1].to_bits()) << 16;
                    }
                }
            }
        }
    }
}

/// The bf16 values that add up to those of a step, the largest first; what is missing from `source` is zero.
#[inline(always)]
fn parts<V: Lanes, T: Stored>(source: &[T]) -> [[bf16; STEP]; 3] {
    let mut parts = [[bf16::ZERO; STEP]; 3];
    for i in 0..STEP / LANES {
        let mut rest: V = load(&source[source.len().min(i * LANES)..source.len().min((i + 1) * LANES)]);
        for (left, part) in (0..T::PARTS).rev().zip(&mut parts) {
            let part = &mut part.as_chunks_mut::<LANES>().0[i];
            if left == 0 {
                rest.store_bf16(part);
            } else {
                // The upper 8 of 24 bits (Dekker, 1971).
                let shifted = rest.mul(V::splat(65537.0));
                let upper = shifted.sub(shifted.sub(rest));
                upper.store_bf16(part);
                rest = rest.sub(upper);
            }
        }
    }
    parts
}

/// At most [`MAX_ROWS`] rows.
struct Product<'a, X, W> {
    /// Of each [`Turn`].
    x: &'a [u32],
    weight: &'a [W],
    bias: Option<&'a [f32]>,
    rows: Range<usize>,
    /// Rows of a turn.
    columns: usize,
    inner: usize,
    outer: usize,
    out: &'a Shared<'a, MaybeUninit<X>>,
}

impl<X: Stored, W: Stored> Product<'_, X, W> {
    fn run(&self) {
        let &Self { ref rows, columns, inner, outer, .. } = self;
        let threads = rayon::current_num_threads();
        let (turns, blocks) = (rows.len().div_ceil(columns), outer.div_ceil(OUTS));
        // A narrow weight has too few blocks for all threads: then they share its rows as well.
        let parts = (2 * threads).div_ceil(blocks.max(1)).min(turns);
        let task = match turns {
            1 => blocks.div_ceil(4 * threads),
            _ => blocks.div_ceil(2 * threads).min(TASK_BLOCKS),
        };
        let task = task.max(MIN_TASK / (rows.len() * inner * OUTS)).max(1);
        let mut widths = [4 * columns; 8];
        widths[7] = WIDTH;
        parallel_pieces(0..outer, task * OUTS).for_each(|outs| {
            parallel_pieces(0..turns, turns.div_ceil(parts)).for_each(|turns| {
                let mut scratch = SCRATCH.take();
                amx::dispatch(widths, Part { product: self, outs: outs.clone(), turns, scratch: &mut scratch });
                SCRATCH.set(scratch);
            })
        });
    }

    /// The weights themselves, if they can be the registers' rows as they lie. Worth it where few rows of `x` meet them.
    fn stored(&self) -> Option<&[bf16]> {
        if self.rows.len() <= COLUMNS && self.inner.is_multiple_of(STEP) { W::as_bf16(self.weight) } else { None }
    }

    /// Rounds the sums of a block and a turn, and their bias if there is one.
    fn write(&self, sums: &[f32], outs: Range<usize>, turn: usize) {
        let mut values = [[0.0; OUTS]; COLUMNS];
        dispatch(TurnBack { sums, columns: self.columns, target: &mut values });
        let first = self.rows.start + turn * self.columns;
        for (values, row) in values.iter().zip(first..self.rows.end.min(first + self.columns)) {
            // SAFETY: every task has outputs and rows of its own.
            let out = unsafe { self.out.part(row * self.outer + outs.start, outs.len()) };
            write_rounded(out, values, self.bias.map(|bias| &bias[outs.start..]));
        }
    }
}

/// What a thread needs for its part.
#[derive(Default)]
struct Scratch {
    /// Of [`Pack`].
    weights: Vec<bf16>,
    /// `[blocks, turns, OUTS, columns]`
    sums: Vec<f32>,
}

thread_local! {
    /// A thread's turned rows, kept between calls.
    static TURNED: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch { weights: Vec::new(), sums: Vec::new() }) };
}

/// Some outputs of some turns.
struct Part<'a, X, W> {
    product: &'a Product<'a, X, W>,
    outs: Range<usize>,
    turns: Range<usize>,
    scratch: &'a mut Scratch,
}

impl<X: Stored, W: Stored> amx::Kernel for Part<'_, X, W> {
    #[inline(always)]
    fn run<T: Tiles>(self, tiles: &mut T) {
        let Self { product, outs, turns, scratch: Scratch { weights, sums } } = self;
        let Product { weight, columns, inner, .. } = *product;
        let stored = product.stored();
        let steps = inner.div_ceil(STEP);
        let (group, stretch) = if stored.is_some() { (OUTS, steps) } else { (outs.len(), STRETCH) };
        let x = |turn: usize, step: usize| &product.x[(turn * steps + step) * X::PARTS * STEP / 2 * columns..];
        let sums = aligned(sums, group.div_ceil(OUTS) * turns.len() * OUTS * columns);
        let weights = aligned(weights, stretch * OUTS * W::PARTS * STEP);
        for outs in pieces(outs, group) {
            for steps in pieces(0..steps, stretch) {
                let sums = sums.chunks_exact_mut(OUTS * columns * turns.len());
                for (outs, sums) in pieces(outs.clone(), OUTS).zip(sums) {
                    let rows = match stored {
                        Some(stored) if outs.len() == OUTS => Rows {
                            weights: &stored[outs.start * inner..],
                            stride: inner,
                            register: ROWS * inner,
                            step: STEP,
                        },
                        _ => {
                            dispatch(Pack { weight, inner, outs: outs.clone(), steps: steps.clone(), target: weights });
                            let register = W::PARTS * ROWS * STEP;
                            Rows { weights, stride: STEP, register, step: 4 * register }
                        }
                    };
                    for (turn, sums) in turns.clone().zip(sums.chunks_exact_mut(OUTS * columns)) {
                        match steps.start {
                            0 => zero(tiles),
                            _ => load_sums(tiles, sums, columns),
                        }
                        for (step, at) in steps.clone().zip(0..) {
                            if let Some(stored) = stored {
                                let next = outs.end * inner + step * OUTS * STEP;
                                prefetch_far(&stored[next.min(stored.len())..stored.len().min(next + OUTS * STEP)]);
                            }
                            multiply::<T, X, W>(tiles, x(turn, step), columns, &rows, at);
                        }
                        store_sums(tiles, sums, columns);
                    }
                }
            }
            let blocks = sums.chunks_exact(OUTS * columns * turns.len());
            for (outs, sums) in pieces(outs, OUTS).zip(blocks) {
                for (turn, sums) in turns.clone().zip(sums.chunks_exact(OUTS * columns)) {
                    product.write(sums, outs.clone(), turn);
                }
            }
        }
    }
}

/// Where the weights of a block lie.
struct Rows<'a> {
    weights: &'a [bf16],
    /// Elements from one row of a register to the next, from one register to the next, from one step to the next. The
    /// parts of a register follow each other.
    stride: usize,
    register: usize,
    step: usize,
}

/// Adds the products of a step to the registers 0 to 3. Those of `x` are 4 to 6, those of weights take turns in 7.
#[inline(always)]
fn multiply<T: Tiles, X: Stored, W: Stored>(tiles: &mut T, x: &[u32], columns: usize, rows: &Rows, step: usize) {
    let part = STEP / 2 * columns;
    tiles.load::<4, _>(x, columns);
    if X::PARTS > 1 {
        tiles.load::<5, _>(&x[part..], columns);
    }
    if X::PARTS > 2 {
        tiles.load::<6, _>(&x[2 * part..], columns);
    }
    let weights = &rows.weights[step * rows.step..];
    multiply_register::<T, X, W, 0>(tiles, weights, rows.stride);
    multiply_register::<T, X, W, 1>(tiles, &weights[rows.register..], rows.stride);
    multiply_register::<T, X, W, 2>(tiles, &weights[2 * rows.register..], rows.stride);
    multiply_register::<T, X, W, 3>(tiles, &weights[3 * rows.register..], rows.stride);
}

#[inline(always)]
fn multiply_register<T: Tiles, X: Stored, W: Stored, const SUMS: usize>(
    tiles: &mut T,
    weights: &[bf16],
    stride: usize,
) {
    for part in (0..W::PARTS).rev() {
        tiles.load::<7, _>(&weights[part * ROWS * STEP..], stride);
        if X::PARTS > 2 && part == 0 {
            tiles.multiply_bf16::<SUMS, 7, 6>();
        }
        if X::PARTS > 1 && part <= 1 {
            tiles.multiply_bf16::<SUMS, 7, 5>();
        }
        tiles.multiply_bf16::<SUMS, 7, 4>();
    }
}

#[inline(always)]
fn zero<T: Tiles>(tiles: &mut T) {
    tiles.zero::<0>();
    tiles.zero::<1>();
    tiles.zero::<2>();
    tiles.zero::<3>();
}

#[inline(always)]
fn load_sums<T: Tiles>(tiles: &mut T, sums: &[f32], columns: usize) {
    tiles.load::<0, _>(sums, columns);
    tiles.load::<1, _>(&sums[ROWS * columns..], columns);
    tiles.load::<2, _>(&sums[2 * ROWS * columns..], columns);
    tiles.load::<3, _>(&sums[3 * ROWS * columns..], columns);
}

#[inline(always)]
fn store_sums<T: Tiles>(tiles: &mut T, sums: &mut [f32], columns: usize) {
    tiles.store::<0, _>(sums, columns);
    tiles.store::<1, _>(&mut sums[ROWS * columns..], columns);
    tiles.store::<2, _>(&mut sums[2 * ROWS * columns..], columns);
    tiles.store::<3, _>(&mut sums[3 * ROWS * columns..], columns);
}

/// The parts of some weights, register by register: `[steps, 4, PARTS, ROWS, STEP]`. What is missing is zero.
struct Pack<'a, W> {
    /// `[.., inner]`
    weight: &'a [W],
    inner: usize,
    /// [`OUTS`] at most.
    outs: Range<usize>,
    steps: Range<usize>,
    target: &'a mut [bf16],
}

impl<W: Stored> Kernel for Pack<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { weight, inner, outs, steps, target } = self;
        if outs.len() < OUTS {
            target.fill(bf16::ZERO);
        }
        for (row, out) in outs.enumerate() {
            let source = &weight[out * inner..(out + 1) * inner];
            let source = source[steps.start * STEP..inner.min(steps.end * STEP)].chunks(STEP);
            let step = OUTS * W::PARTS * STEP;
            for (source, target) in source.zip(target.chunks_exact_mut(step)) {
                let target = &mut target[(row / ROWS * W::PARTS * ROWS + row % ROWS) * STEP..];
                if let Some(source) = W::as_bf16(source)
                    && let (Some(source), Some(target)) = (source.first_chunk::<STEP>(), target.first_chunk_mut())
                {
                    *target = *source;
                    continue;
                }
                for (part, target) in parts::<V, W>(source).iter().zip(target.chunks_mut(ROWS * STEP)) {
                    target[..STEP].copy_from_slice(part);
                }
            }
        }
    }
}

/// `[OUTS, columns]` to `[columns, OUTS]`.
struct TurnBack<'a> {
    sums: &'a [f32],
    columns: usize,
    target: &'a mut [[f32; OUTS]; COLUMNS],
}

impl Kernel for TurnBack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { sums, columns, target } = self;
        let whole = columns / LANES * LANES;
        for first in (0..OUTS).step_by(LANES) {
            for column in (0..whole).step_by(LANES) {
                let mut rows = [V::splat(0.0); LANES];
                for i in 0..LANES {
                    rows[i] = load(&sums[(first + i) * columns + column..][..LANES]);
                }
                let turned = V::transpose(rows);
                for i in 0..LANES {
                    turned[i].store(&mut target[column + i].as_chunks_mut().0[first / LANES]);
                }
            }
            for column in whole..columns {
                for out in first..first + LANES {
                    target[column][out] = sums[out * columns + column];
                }
            }
        }
    }
}

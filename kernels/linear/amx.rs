//! Products on AMX.
//!
//! A value is the sum of up to three bf16 values, and a product the sum of the products of its parts but the smallest,
//! which lie below what f32 keeps. Weights in bf16 are the registers' rows as they are stored, `x` is turned once. The
//! sum of an output sees the steps of the inner dimension in their order, within a step the products of small parts
//! first, and nothing of other rows and outputs: its bits depend neither on how many rows there are nor on threads.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::cpu::{MIN_TASK, aligned, parallel_pieces, write_rounded};
use super::tile::pieces;
use crate::cpu::Shared;
use crate::simd::amx::{self, ROWS, Tiles, WIDTH};
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, load, prefetch_far};

/// Inputs of one step: a register's row of bf16.
const STEP: usize = WIDTH / 2;
/// Rows of `x` in a register.
const COLUMNS: usize = 16;
/// Registers of sums: products of a step that do not wait for each other, about as many as the machine works on at once.
const SUMS: usize = 4;
/// Steps after which other rows and outputs have their turn: of so many, two turns of `x` and the weights of a block stay
/// in the first-level cache.
const STRETCH: usize = 4;
/// Rows of `x` whose parts in a stretch stay in the second-level cache.
const MAX_ROWS: usize = 512;
/// Outputs of a task of many rows, whose sums stay in the second-level cache.
const TASK_OUTS: usize = 256;

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
        let turns = match rows.len().div_ceil(columns) {
            1 => 1,
            turns => turns.next_multiple_of(2),
        };
        let turn = steps * X::PARTS * STEP / 2 * columns;
        let turned = aligned(&mut scratch, turns * turn);
        turned.par_chunks_mut(turn).enumerate().for_each(|(turn, target)| {
            let rows = rows.end.min(rows.start + turn * columns)..rows.end.min(rows.start + (turn + 1) * columns);
            dispatch(Turn { x, inner, rows, columns, target })
        });
        let product = Product { x: &*turned, weight, bias, rows, columns, turns, inner, outer, out: &shared };
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
            let mut upper = rest;
            if left > 0 {
                // The upper 8 of 24 bits (Dekker, 1971).
                let shifted = rest.mul(V::splat(65537.0));
                upper = shifted.sub(shifted.sub(rest));
            }
            upper.store_upper(part);
            rest = rest.sub(upper);
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
    /// One, or an even number, the last of which may have no rows.
    turns: usize,
    inner: usize,
    outer: usize,
    out: &'a Shared<'a, MaybeUninit<X>>,
}

impl<X: Stored, W: Stored> Product<'_, X, W> {
    fn run(&self) {
        let &Self { ref rows, columns, turns, inner, outer, .. } = self;
        let threads = rayon::current_num_threads();
        let outs = match turns {
            1 => outer.div_ceil(4 * threads),
            _ => outer.div_ceil(2 * threads).min(TASK_OUTS),
        };
        let outs = outs.max(MIN_TASK / (rows.len() * inner)).max(1).next_multiple_of(SUMS * ROWS);
        // A narrow weight has too few blocks for all threads: then they share its rows as well.
        let parts = (2 * threads).div_ceil(outer.div_ceil(outs).max(1));
        let turns_each = turns.div_ceil(parts).next_multiple_of(2);
        let mut widths = [4 * columns; 8];
        (widths[6], widths[7]) = (WIDTH, WIDTH);
        parallel_pieces(0..outer, outs).for_each(|outs| {
            parallel_pieces(0..turns, turns_each).for_each(|turns| {
                let mut scratch = SCRATCH.take();
                amx::dispatch(widths, Part { product: self, outs: outs.clone(), turns, scratch: &mut scratch });
                SCRATCH.set(scratch);
            })
        });
    }

    /// The parts of a turn in a step.
    #[inline(always)]
    fn x(&self, turn: usize, step: usize) -> &[u32] {
        &self.x[(turn * self.inner.div_ceil(STEP) + step) * X::PARTS * STEP / 2 * self.columns..]
    }

    /// The weights of the outputs `outs` in the steps `steps`: themselves if they can be the registers' rows as they lie,
    /// which is worth it where few rows of `x` meet them, or packed.
    fn weights<'a>(&'a self, outs: Range<usize>, steps: Range<usize>, scratch: &'a mut Vec<bf16>) -> Weights<'a> {
        let inner = self.inner;
        if self.turns == 1
            && inner.is_multiple_of(STEP)
            && outs.len().is_multiple_of(SUMS * ROWS)
            && let Some(weight) = W::as_bf16(self.weight)
        {
            let weights = &weight[outs.start * inner + steps.start * STEP..];
            return Weights { weights, stride: inner, register: ROWS * inner, step: STEP };
        }
        let registers = outs.len().div_ceil(SUMS * ROWS) * SUMS;
        let register = W::PARTS * ROWS * STEP;
        let weights = aligned(scratch, registers * steps.len() * register);
        dispatch(Pack { weight: self.weight, inner, outs, steps: steps.clone(), target: weights });
        Weights { weights, stride: STEP, register: steps.len() * register, step: register }
    }
}

/// Where weights lie.
#[derive(Clone, Copy)]
struct Weights<'a> {
    weights: &'a [bf16],
    /// Elements from one row of a register to the next, from one register to the next, from one step to the next. The
    /// parts of a register follow each other.
    stride: usize,
    register: usize,
    step: usize,
}

impl Weights<'_> {
    #[inline(always)]
    fn load<T: Tiles, const TILE: usize>(&self, tiles: &mut T, register: usize, step: usize, part: usize) {
        let start = register * self.register + step * self.step + part * ROWS * STEP;
        tiles.load::<TILE, _>(&self.weights[start..], self.stride);
    }
}

/// What a thread needs for its part.
#[derive(Default)]
struct Scratch {
    /// Of [`Pack`].
    weights: Vec<bf16>,
    /// `[pairs of turns, blocks, SUMS, ROWS, columns]`
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
        if self.product.turns == 1 { self.one_turn(tiles) } else { self.pairs_of_turns(tiles) }
    }
}

impl<X: Stored, W: Stored> Part<'_, X, W> {
    /// Blocks of four registers of outputs. Weights come from memory: they are asked for in the order in which they lie
    /// there, while the block before is at work.
    #[inline(always)]
    fn one_turn<T: Tiles>(self, tiles: &mut T) {
        let Self { product, outs, scratch: Scratch { weights, sums }, .. } = self;
        let Product { weight, columns, inner, .. } = *product;
        let steps = inner.div_ceil(STEP);
        let sums = aligned(sums, SUMS * ROWS * columns);
        for outs in pieces(outs, SUMS * ROWS) {
            let weights = product.weights(outs.clone(), 0..steps, weights);
            zero(tiles);
            for step in 0..steps {
                let next = (outs.end * inner + step * SUMS * ROWS * STEP).min(weight.len());
                prefetch_far(&weight[next..weight.len().min(next + SUMS * ROWS * STEP)]);
                multiply_turn::<T, X, W>(tiles, product.x(0, step), columns, &weights, step);
            }
            store_sums(tiles, sums, columns);
            let Product { bias, ref rows, outer, out, .. } = *product;
            let write = Write { sums, registers: [0, 1, 2, 3], columns, rows: rows.clone(), outs, outer, bias, out };
            dispatch(write);
        }
    }

    /// Blocks of two registers of outputs with two turns.
    #[inline(always)]
    fn pairs_of_turns<T: Tiles>(self, tiles: &mut T) {
        const OUTS: usize = 2 * ROWS;
        const BLOCK: usize = SUMS * ROWS * COLUMNS;
        let Self { product, outs, turns, scratch: Scratch { weights, sums } } = self;
        let (steps, blocks) = (product.inner.div_ceil(STEP), outs.len().div_ceil(OUTS));
        let sums = aligned(sums, turns.len() / 2 * blocks * BLOCK);
        for steps in pieces(0..steps, STRETCH) {
            let weights = product.weights(outs.clone(), steps.clone(), weights);
            for (pair, sums) in turns.clone().step_by(2).zip(sums.chunks_exact_mut(blocks * BLOCK)) {
                for (block, sums) in sums.chunks_exact_mut(BLOCK).enumerate() {
                    match steps.start {
                        0 => zero(tiles),
                        _ => load_sums(tiles, sums, COLUMNS),
                    }
                    for (at, step) in steps.clone().enumerate() {
                        let x = [product.x(pair, step), product.x(pair + 1, step)];
                        multiply_pair::<T, X, W>(tiles, x, &weights, 2 * block, at);
                    }
                    store_sums(tiles, sums, COLUMNS);
                }
            }
        }
        let Product { bias, ref rows, columns, outer, out, .. } = *product;
        for (pair, sums) in turns.step_by(2).zip(sums.chunks_exact(blocks * BLOCK)) {
            for (outs, sums) in pieces(outs.clone(), OUTS).zip(sums.chunks_exact(BLOCK)) {
                for turn in 0..2 {
                    let first = rows.start + (pair + turn) * columns;
                    let rows = rows.end.min(first)..rows.end.min(first + columns);
                    let registers = [turn, 2 + turn];
                    dispatch(Write { sums, registers, columns, rows, outs: outs.clone(), outer, bias, out });
                }
            }
        }
    }
}

/// Adds the products of a step, one turn with four registers of weights. Those that follow each other are of different
/// sums; the weights are loaded anew for each part of `x`, from the first-level cache.
#[inline(always)]
fn multiply_turn<T: Tiles, X: Stored, W: Stored>(
    tiles: &mut T,
    x: &[u32],
    columns: usize,
    weights: &Weights,
    step: usize,
) {
    for w in (0..W::PARTS).rev() {
        for part in (0..X::PARTS.min(3 - w)).rev() {
            tiles.load::<4, _>(&x[part * STEP / 2 * columns..], columns);
            weights.load::<T, 6>(tiles, 0, step, w);
            tiles.multiply_bf16::<0, 6, 4>();
            weights.load::<T, 7>(tiles, 1, step, w);
            tiles.multiply_bf16::<1, 7, 4>();
            weights.load::<T, 6>(tiles, 2, step, w);
            tiles.multiply_bf16::<2, 6, 4>();
            weights.load::<T, 7>(tiles, 3, step, w);
            tiles.multiply_bf16::<3, 7, 4>();
        }
    }
}

/// Adds the products of a step, two turns with two registers of weights, the first of which is `register`.
#[inline(always)]
fn multiply_pair<T: Tiles, X: Stored, W: Stored>(
    tiles: &mut T,
    x: [&[u32]; 2],
    weights: &Weights,
    register: usize,
    step: usize,
) {
    for w in (0..W::PARTS).rev() {
        weights.load::<T, 6>(tiles, register, step, w);
        weights.load::<T, 7>(tiles, register + 1, step, w);
        for part in (0..X::PARTS.min(3 - w)).rev() {
            tiles.load::<4, _>(&x[0][part * STEP / 2 * COLUMNS..], COLUMNS);
            tiles.load::<5, _>(&x[1][part * STEP / 2 * COLUMNS..], COLUMNS);
            tiles.multiply_bf16::<0, 6, 4>();
            tiles.multiply_bf16::<1, 6, 5>();
            tiles.multiply_bf16::<2, 7, 4>();
            tiles.multiply_bf16::<3, 7, 5>();
        }
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

/// The parts of some weights, register by register: `[registers, steps, PARTS, ROWS, STEP]`. What is missing is zero.
struct Pack<'a, W> {
    /// `[.., inner]`
    weight: &'a [W],
    inner: usize,
    outs: Range<usize>,
    steps: Range<usize>,
    target: &'a mut [bf16],
}

impl<W: Stored> Kernel for Pack<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { weight, inner, outs, steps, target } = self;
        let register = W::PARTS * ROWS * STEP;
        if outs.len() * steps.len() * W::PARTS * STEP < target.len() {
            target.fill(bf16::ZERO);
        }
        for (row, out) in outs.enumerate() {
            let source = &weight[out * inner..(out + 1) * inner];
            let source = source[steps.start * STEP..inner.min(steps.end * STEP)].chunks(STEP);
            let target = &mut target[row / ROWS * steps.len() * register..];
            for (source, target) in source.zip(target.chunks_exact_mut(register)) {
                let target = &mut target[row % ROWS * STEP..];
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

/// Rounds the sums of `N` registers of outputs and a turn of rows, and their bias if there is one.
struct Write<'a, X, const N: usize> {
    /// `[SUMS, ROWS, columns]`
    sums: &'a [f32],
    registers: [usize; N],
    columns: usize,
    rows: Range<usize>,
    outs: Range<usize>,
    outer: usize,
    bias: Option<&'a [f32]>,
    out: &'a Shared<'a, MaybeUninit<X>>,
}

impl<X: Stored, const N: usize> Kernel for Write<'_, X, N> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { sums, registers, columns, rows, outs, outer, bias, out } = self;
        let bias = bias.map(|bias| &bias[outs.start..]);
        for column in (0..rows.len()).step_by(LANES) {
            let mut values = [[[0.0; ROWS]; N]; LANES];
            for (i, register) in registers.into_iter().enumerate() {
                let sums = &sums[register * ROWS * columns..][..ROWS * columns];
                for half in 0..ROWS / LANES {
                    let mut outputs = [V::splat(0.0); LANES];
                    for o in 0..LANES {
                        let row = &sums[(half * LANES + o) * columns..][..columns];
                        outputs[o] = load(&row[column..columns.min(column + LANES)]);
                    }
                    let turned = V::transpose(outputs);
                    for r in 0..LANES {
                        turned[r].store(&mut values[r][i].as_chunks_mut().0[half]);
                    }
                }
            }
            for (row, values) in rows.clone().skip(column).zip(&values) {
                // SAFETY: every task has outputs and rows of its own.
                let out = unsafe { out.part(row * outer + outs.start, outs.len()) };
                write_rounded(out, values.as_flattened(), bias);
            }
        }
    }
}

//! Products with weights in bf16 on AMX.
//!
//! A value of `x` is the sum of up to three bf16 values, and a product the sum of the products of these parts. The inputs
//! of one step of the registers lie 32 apart: the pair `l` of each run of 32 in a block of 512. So a row that runs alone
//! needs no registers: in vectors of 16 pairs, as weights are stored, each lane does what a step does, in the same order.
//! The sum of an output sees blocks, steps and parts in their order, small parts first, and nothing of other rows and
//! outputs: its bits depend neither on how many rows there are nor on threads. (AMX takes what lies below 2^-126 for zero.)

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;

use super::cpu::{MIN_TASK, aligned, write_rounded};
use super::tile::pieces;
use crate::cpu::{Shared, share};
use crate::simd::amx::{self, ROWS, Tiles, WIDTH};
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, load, prefetch_far};

mod few;

/// Inputs that lie side by side, in pairs: a vector's, one pair for each step of a block.
const RUN: usize = WIDTH / 2;
/// Runs of a block, a pair of each for a step.
const RUNS: usize = RUN / 2;
const BLOCK: usize = RUNS * RUN;
/// Rows of `x` in a register.
const COLUMNS: usize = 16;
/// Pairs of a register of weights, or of a full register of `x`.
const REGISTER: usize = ROWS * RUNS;
/// Registers of sums: products of a step that do not wait for each other, about as many as the machine works on at once.
const SUMS: usize = 4;
/// Steps after which other rows and outputs have their turn, so that what they need stays near.
const STRETCH: usize = 8;
/// Rows of `x` whose parts in a stretch stay in the second-level cache.
const MAX_ROWS: usize = 512;
/// Outputs of a task of many rows, whose weights of a block and sums stay in the second-level cache.
const TASK_OUTS: usize = 256;
/// As [`super::cpu::linear`].
pub fn linear<X: Stored>(
    x: &[X],
    weight: &[bf16],
    bias: Option<&[f32]>,
    (n, inner, outer): (usize, usize, usize),
) -> Vec<X> {
    let mut out = Vec::with_capacity(n * outer);
    let shared = Shared::new(&mut out.spare_capacity_mut()[..n * outer]);
    let product = Product { x, weight, bias, inner, outer, out: shared };
    if n <= few::MOST {
        product.few(n);
    } else {
        pieces(0..n, MAX_ROWS).for_each(|rows| product.many(rows));
    }
    // SAFETY: every output of every row was written.
    unsafe { out.set_len(n * outer) };
    out
}

struct Product<'a, X> {
    x: &'a [X],
    weight: &'a [bf16],
    bias: Option<&'a [f32]>,
    inner: usize,
    outer: usize,
    out: Shared<'a, MaybeUninit<X>>,
}

impl<X: Stored> Product<'_, X> {
    fn many(&self, rows: Range<usize>) {
        let &Self { inner, outer, .. } = self;
        let columns = rows.len().min(COLUMNS);
        let turns = match rows.len().div_ceil(columns) {
            1 => 1,
            turns => turns.next_multiple_of(2),
        };
        let turn = inner.div_ceil(BLOCK) * RUNS * X::PARTS * RUNS * columns;
        let mut scratch = TURNED.take();
        let turned = aligned(&mut scratch, turns * turn);
        let targets = Shared::new(&mut *turned);
        share(turns, |index| {
            let rows = rows.end.min(rows.start + index * columns)..rows.end.min(rows.start + (index + 1) * columns);
            // SAFETY: every turn has a part of its own.
            let target = unsafe { targets.part(index * turn, turn) };
            dispatch(Turn { x: self.x, inner, rows, columns, target })
        });
        let threads = rayon::current_num_threads();
        let outs = match turns {
            1 => outer.div_ceil(4 * threads),
            _ => outer.div_ceil(2 * threads).min(TASK_OUTS),
        };
        let outs = outs.max(MIN_TASK / (rows.len() * inner)).max(1).next_multiple_of(SUMS * ROWS);
        // A narrow weight has too few blocks for all threads: then they share its rows as well.
        let parts = (2 * threads).div_ceil(outer.div_ceil(outs).max(1));
        let turns_each = turns.div_ceil(parts).next_multiple_of(2);
        let parts = turns.div_ceil(turns_each);
        let mut widths = [4 * columns; 8];
        (widths[6], widths[7]) = (WIDTH, WIDTH);
        let product = Turned { product: self, x: &*turned, rows, columns, turns };
        share(outer.div_ceil(outs) * parts, |task| {
            let (first, turn) = (task / parts * outs, task % parts * turns_each);
            let (outs, turns) = (first..outer.min(first + outs), turn..turns.min(turn + turns_each));
            let mut scratch = SCRATCH.take();
            amx::dispatch(widths, Part { product: &product, outs, turns, scratch: &mut scratch });
            SCRATCH.set(scratch);
        });
        TURNED.set(scratch);
    }
}

/// Some rows of `x` as registers take them: `[blocks, steps, PARTS, RUNS, columns]` pairs of inputs. What is missing is
/// zero.
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
        if rows.len() < columns || !inner.is_multiple_of(BLOCK) {
            target.fill(0);
        }
        // From one step to the next, and from one part to the next.
        let (step, part) = (X::PARTS * RUNS * columns, RUNS * columns);
        for run in 0..inner.div_ceil(RUN) {
            let target = &mut target[run / RUNS * RUNS * step + run % RUNS * columns..];
            let mut words = [[[0; RUNS]; COLUMNS]; 3];
            for (column, row) in rows.clone().enumerate() {
                let source = &x[row * inner + run * RUN..(row + 1) * inner];
                let parts = parts::<V, X>(&source[..source.len().min(RUN)]);
                for i in 0..X::PARTS {
                    words[i][column] = pairs(&parts[i]);
                }
            }
            for i in 0..X::PARTS {
                if columns == COLUMNS {
                    turn::<V>(&words[i], &mut target[i * part..], step);
                    continue;
                }
                for (column, words) in words[i][..columns].iter().enumerate() {
                    for (index, &word) in words.iter().enumerate() {
                        target[i * part + index * step + column] = word;
                    }
                }
            }
        }
    }
}

/// The bf16 values that add up to those of a run, the largest first; what is missing from `source` is zero.
#[inline(always)]
fn parts<V: Lanes, T: Stored>(source: &[T]) -> [[bf16; RUN]; 3] {
    let mut parts = [[bf16::ZERO; RUN]; 3];
    for i in 0..RUN / LANES {
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

/// Pairs of values as words.
#[inline(always)]
fn pairs(values: &[bf16; RUN]) -> [u32; RUNS] {
    // SAFETY: both are 64 bytes, of which any are words.
    unsafe { std::ptr::from_ref(values).cast::<[u32; RUNS]>().read_unaligned() }
}

/// Writes column `i` of a square to `target[i * stride..]`.
#[inline(always)]
fn turn<V: Lanes>(words: &[[u32; RUNS]; RUNS], target: &mut [u32], stride: usize) {
    // SAFETY: lanes are only moved, so any bits will do; both are of one size.
    let words = unsafe { &*std::ptr::from_ref(words).cast::<[[f32; RUNS]; RUNS]>() };
    for half in 0..RUNS / LANES {
        for column in 0..RUNS / LANES {
            let mut rows = [V::splat(0.0); LANES];
            for i in 0..LANES {
                rows[i] = V::load(&words[half * LANES + i].as_chunks().0[column]);
            }
            let turned = V::transpose(rows);
            for i in 0..LANES {
                let target = &mut target[(column * LANES + i) * stride + half * LANES..][..LANES];
                // SAFETY: as above.
                turned[i].store(unsafe { &mut *target.as_mut_ptr().cast::<[f32; LANES]>() });
            }
        }
    }
}

/// At most [`MAX_ROWS`] rows.
struct Turned<'a, X> {
    product: &'a Product<'a, X>,
    /// Of each [`Turn`].
    x: &'a [u32],
    rows: Range<usize>,
    /// Rows of a turn.
    columns: usize,
    /// One, or an even number, the last of which may have no rows.
    turns: usize,
}

impl<X: Stored> Turned<'_, X> {
    /// The parts of a turn in a step.
    #[inline(always)]
    fn x(&self, turn: usize, step: usize) -> &[u32] {
        let steps = self.product.inner.div_ceil(BLOCK) * RUNS;
        &self.x[(turn * steps + step) * X::PARTS * RUNS * self.columns..]
    }

    /// The weights of the outputs `outs` in a block, for [`multiply_turn`] and [`multiply_pair`].
    fn weights<'a>(&self, outs: Range<usize>, block: usize, scratch: &'a mut Vec<u32>) -> &'a [u32] {
        let Product { weight, inner, .. } = *self.product;
        let registers = outs.len().div_ceil(SUMS * ROWS) * SUMS;
        let target = aligned(scratch, registers * RUNS * REGISTER);
        let inputs = block * BLOCK..inner.min((block + 1) * BLOCK);
        dispatch(Pack { weight, inner, outs, inputs, target: &mut *target });
        target
    }
}

/// What a thread needs for its part.
#[derive(Default)]
struct Scratch {
    /// Of [`Pack`].
    weights: Vec<u32>,
    /// `[pairs of turns, blocks, SUMS, ROWS, columns]`
    sums: Vec<f32>,
}

thread_local! {
    /// A thread's turned rows, kept between calls.
    static TURNED: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch { weights: Vec::new(), sums: Vec::new() }) };
}

/// Some outputs of some turns.
struct Part<'a, X> {
    product: &'a Turned<'a, X>,
    outs: Range<usize>,
    turns: Range<usize>,
    scratch: &'a mut Scratch,
}

impl<X: Stored> amx::Kernel for Part<'_, X> {
    #[inline(always)]
    fn run<T: Tiles>(self, tiles: &mut T) {
        if self.product.turns == 1 { self.one_turn(tiles) } else { self.pairs_of_turns(tiles) }
    }
}

impl<X: Stored> Part<'_, X> {
    /// Four registers of outputs at a time. Weights come from memory: they are asked for in the order in which they lie
    /// there, while those before are at work.
    #[inline(always)]
    fn one_turn<T: Tiles>(self, tiles: &mut T) {
        let Self { product, outs, scratch: Scratch { weights, sums }, .. } = self;
        let Turned { product: &Product { weight, bias, inner, outer, ref out, .. }, ref rows, columns, .. } = *product;
        let sums = aligned(sums, SUMS * ROWS * columns);
        for outs in pieces(outs, SUMS * ROWS) {
            zero(tiles);
            let mut next = weight[outs.end * inner..].chunks(SUMS * ROWS * RUN);
            for block in 0..inner.div_ceil(BLOCK) {
                let weights = product.weights(outs.clone(), block, weights);
                for step in 0..RUNS {
                    prefetch_far(next.next().unwrap_or_default());
                    multiply_turn::<T, X>(tiles, product.x(0, block * RUNS + step), columns, weights, step);
                }
            }
            store_sums(tiles, sums, columns);
            let write = Write { sums, registers: [0, 1, 2, 3], columns, rows: rows.clone(), outs, outer, bias, out };
            dispatch(write);
        }
    }

    /// Two registers of outputs with two turns at a time.
    #[inline(always)]
    fn pairs_of_turns<T: Tiles>(self, tiles: &mut T) {
        const OUTS: usize = 2 * ROWS;
        const SQUARE: usize = SUMS * ROWS * COLUMNS;
        let Self { product, outs, turns, scratch: Scratch { weights, sums } } = self;
        let Turned { product: &Product { bias, inner, outer, ref out, .. }, ref rows, columns, .. } = *product;
        let squares = outs.len().div_ceil(OUTS);
        let sums = aligned(sums, turns.len() / 2 * squares * SQUARE);
        for block in 0..inner.div_ceil(BLOCK) {
            let weights = product.weights(outs.clone(), block, weights);
            for steps in pieces(0..RUNS, STRETCH) {
                for (pair, sums) in turns.clone().step_by(2).zip(sums.chunks_exact_mut(squares * SQUARE)) {
                    for (square, sums) in sums.chunks_exact_mut(SQUARE).enumerate() {
                        match block + steps.start {
                            0 => zero(tiles),
                            _ => load_sums(tiles, sums, COLUMNS),
                        }
                        for step in steps.clone() {
                            let x = [pair, pair + 1].map(|turn| product.x(turn, block * RUNS + step));
                            multiply_pair::<T, X>(tiles, x, weights, 2 * square, step);
                        }
                        store_sums(tiles, sums, COLUMNS);
                    }
                }
            }
        }
        for (pair, sums) in turns.step_by(2).zip(sums.chunks_exact(squares * SQUARE)) {
            for (outs, sums) in pieces(outs.clone(), OUTS).zip(sums.chunks_exact(SQUARE)) {
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
fn multiply_turn<T: Tiles, X: Stored>(tiles: &mut T, x: &[u32], columns: usize, weights: &[u32], step: usize) {
    for part in (0..X::PARTS).rev() {
        tiles.load::<4, _>(&x[part * RUNS * columns..], columns);
        tiles.load::<6, _>(&weights[step * REGISTER..], RUNS);
        tiles.multiply_bf16::<0, 6, 4>();
        tiles.load::<7, _>(&weights[(RUNS + step) * REGISTER..], RUNS);
        tiles.multiply_bf16::<1, 7, 4>();
        tiles.load::<6, _>(&weights[(2 * RUNS + step) * REGISTER..], RUNS);
        tiles.multiply_bf16::<2, 6, 4>();
        tiles.load::<7, _>(&weights[(3 * RUNS + step) * REGISTER..], RUNS);
        tiles.multiply_bf16::<3, 7, 4>();
    }
}

/// Adds the products of a step, two turns with two registers of weights, the first of which is `register`.
#[inline(always)]
fn multiply_pair<T: Tiles, X: Stored>(tiles: &mut T, x: [&[u32]; 2], weights: &[u32], register: usize, step: usize) {
    tiles.load::<6, _>(&weights[(register * RUNS + step) * REGISTER..], RUNS);
    tiles.load::<7, _>(&weights[((register + 1) * RUNS + step) * REGISTER..], RUNS);
    for part in (0..X::PARTS).rev() {
        tiles.load::<4, _>(&x[0][part * REGISTER..], COLUMNS);
        tiles.load::<5, _>(&x[1][part * REGISTER..], COLUMNS);
        tiles.multiply_bf16::<0, 6, 4>();
        tiles.multiply_bf16::<1, 6, 5>();
        tiles.multiply_bf16::<2, 7, 4>();
        tiles.multiply_bf16::<3, 7, 5>();
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

/// Some weights, register by register: `[registers, steps, ROWS, RUNS]` pairs. What is missing is zero.
struct Pack<'a> {
    /// `[.., inner]`
    weight: &'a [bf16],
    inner: usize,
    outs: Range<usize>,
    /// Of a block.
    inputs: Range<usize>,
    target: &'a mut [u32],
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { weight, inner, outs, inputs, target } = self;
        if outs.len() * RUNS * RUNS < target.len() {
            target.fill(0);
        }
        for (row, out) in outs.enumerate() {
            let source = &weight[out * inner..][inputs.clone()];
            let mut words = [[0; RUNS]; RUNS];
            let (runs, rest) = source.as_chunks::<RUN>();
            for (words, run) in words.iter_mut().zip(runs) {
                *words = pairs(run);
            }
            if !rest.is_empty() {
                let mut padded = [bf16::ZERO; RUN];
                padded[..rest.len()].copy_from_slice(rest);
                words[runs.len()] = pairs(&padded);
            }
            turn::<V>(&words, &mut target[(row / ROWS * RUNS * ROWS + row % ROWS) * RUNS..], REGISTER);
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
                // What is written next.
                out.fetch(row * outer + outs.end..row * outer + outer.min(outs.end + outs.len()));
                // SAFETY: every task has outputs and rows of its own.
                let out = unsafe { out.part(row * outer + outs.start, outs.len()) };
                write_rounded(out, values.as_flattened(), bias);
            }
        }
    }
}

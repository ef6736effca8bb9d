//! The product on the CPU. Few rows: every thread streams its share of the weights once, at memory speed.
//! Many rows: panels of weights and blocks of `x` are widened and turned for the register tile.

use std::cell::Cell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

#[cfg(any(test, target_arch = "x86_64"))]
use super::amx;
#[cfg(target_arch = "x86_64")]
use super::tile::Wide;
use super::tile::{Blocked, Group, Interleave, Narrow, Pending, Streamed, Sums, Tile, Turn, pieces};
use crate::cpu::{Shared, reads, share, share_pieces};
#[cfg(target_arch = "x86_64")]
use crate::simd::Instructions;
use crate::simd::{LANES, Stored, dispatch, instructions};

/// `x` `[n, inner]`, `weight` `[outer, inner]`, `bias` `[outer]`; returns `[n, outer]`.
pub fn linear<X: Stored, W: Stored>(
    x: &[X],
    weight: &[W],
    bias: Option<&[f32]>,
    (n, inner, outer): (usize, usize, usize),
) -> Vec<X> {
    if inner == 0 {
        return vec![X::round(0.0); n * outer];
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    if let Some(weight) = W::as_bf16(weight)
        && n > 0
        && crate::simd::amx::is_used()
    {
        return amx::linear(x, weight, bias, (n, inner, outer));
    }
    let mut out = Vec::with_capacity(n * outer);
    let shared = Shared::new(&mut out.spare_capacity_mut()[..n * outer]);
    let product = Product { x, weight, bias, n, inner, outer, out: shared };
    match n {
        0 => {}
        1 => product.stream::<1, 4>(),
        2 => product.stream::<2, 6>(),
        3 | 5 | 6 | 9 => product.stream::<3, 3>(),
        4..=STREAMED_ROWS => product.stream::<4, 3>(),
        _ => match instructions() {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => product.block::<Wide, 12, 32>(),
            _ => product.block::<Narrow, 6, 16>(),
        },
    }
    // SAFETY: every output of every row was written.
    unsafe { out.set_len(n * outer) };
    out
}

/// Up to this many rows, widening weights again for each tile costs less than turning them.
pub(crate) const STREAMED_ROWS: usize = 16;

/// Weights of a stretch that stay in the second-level cache.
const PANEL: usize = 1 << 16;
/// Rows that meet a stretch of a panel before the next stretch.
const BLOCK_ROWS: usize = 48;
/// Rows that are turned at once and share one turn of each panel, or more if they have no more elements than this.
pub(super) const MAX_ROWS: usize = 11 * BLOCK_ROWS;
pub(super) const MAX_ELEMENTS: usize = 1 << 21;

/// Products of which a thread should have at least so many, or waking it costs more than it does.
pub(super) const MIN_TASK: usize = 1 << 16;

struct Product<'a, X, W> {
    x: &'a [X],
    weight: &'a [W],
    bias: Option<&'a [f32]>,
    n: usize,
    inner: usize,
    outer: usize,
    out: Shared<'a, MaybeUninit<X>>,
}

impl<X: Stored, W: Stored> Product<'_, X, W> {
    fn stream<const R: usize, const Q: usize>(&self) {
        let &Self { n, inner, outer, .. } = self;
        let tiles = n.div_ceil(R);
        let mut scratch = SCRATCH.take();
        let x = tiles_of(aligned(&mut scratch, tiles * inner.div_ceil(LANES) * R * LANES));
        dispatch(Interleave { source: self.x, inner, rows: 0..n, columns: 0..inner, target: x });
        let x = &*x;
        reads(self.weight);
        let task = outer.div_ceil(4 * rayon::current_num_threads()).max(MIN_TASK / (n * inner));
        share_pieces(0..outer, task.next_multiple_of(Q), |outs| {
            let mut sums = [[[0.0; Q]; R]; STREAMED_ROWS];
            let sums = &mut sums[..tiles];
            for outs in pieces(outs, Q) {
                // Beyond the last output the tile computes it again.
                let row = |o: usize| &self.weight[o.min(outs.end - 1) * inner..][..inner];
                let weights = std::array::from_fn(|q| row(outs.start + q));
                let next = &self.weight[outs.end * inner..outer.min(outs.end + Q) * inner];
                dispatch(Streamed { x, weights, next, sums });
                for (row, sums) in sums.as_flattened().iter().enumerate().take(n) {
                    self.write(row, outs.start, &sums[..outs.len()]);
                }
            }
        });
        SCRATCH.set(scratch);
    }

    fn block<T: Tile<R, O>, const R: usize, const O: usize>(&self) {
        let &Self { n, inner, outer, .. } = self;
        let columns = inner.div_ceil(LANES) * LANES;
        let panel_outs = O * (PANEL / (O * columns.min(T::STRETCH * LANES))).clamp(1, 8);
        let mut scratch = SCRATCH.take();
        for rows in pieces(0..n, MAX_ROWS.max(MAX_ELEMENTS / columns / BLOCK_ROWS * BLOCK_ROWS)) {
            let x = aligned(&mut scratch, rows.len().next_multiple_of(R) * columns).as_chunks_mut().0;
            let turned = Shared::new(x);
            share_pieces(rows.clone(), R, |piece| {
                // SAFETY: every tile has a part of its own.
                let target = unsafe { turned.part((piece.start - rows.start) / R * columns, columns) };
                dispatch(Turn { source: self.x, inner, rows: piece, target })
            });
            let x = &*x;
            // A narrow weight has too few panels for all threads: then they share its rows as well.
            let parts = (2 * rayon::current_num_threads()).div_ceil(outer.div_ceil(panel_outs).max(1));
            let part = rows.len().div_ceil(parts).next_multiple_of(R);
            let parts = rows.len().div_ceil(part);
            share(outer.div_ceil(panel_outs) * parts, |task| {
                let (outs, first) = (task / parts * panel_outs, rows.start + task % parts * part);
                let x = &x[(first - rows.start) / R * columns..];
                let mut scratch = SCRATCH.take();
                let (outs, part) = (outs..outer.min(outs + panel_outs), first..rows.end.min(first + part));
                self.panel::<T, R, O>(x, part, outs, &mut scratch);
                SCRATCH.set(scratch);
            });
        }
        SCRATCH.set(scratch);
    }

    /// The outputs `outs` of the rows `rows`, which `x` holds turned.
    fn panel<T: Tile<R, O>, const R: usize, const O: usize>(
        &self,
        x: &[[f32; R]],
        rows: Range<usize>,
        outs: Range<usize>,
        scratch: &mut Vec<f32>,
    ) {
        let groups = self.inner.div_ceil(LANES);
        let (columns, tiles) = (groups * LANES, outs.len().div_ceil(O));
        let pending = BLOCK_ROWS * size_of::<Pending<R, O>>() / size_of::<Sums<R, O>>();
        let scratch = aligned(scratch, tiles * O * (columns + pending));
        let (weights, pending) = scratch.split_at_mut(tiles * O * columns);
        let weights = weights.as_chunks_mut().0;
        let pending: &mut [Pending<R, O>] = pending.as_chunks_mut().0.as_chunks_mut().0.as_chunks_mut().0;
        for (target, rows) in weights.chunks_exact_mut(columns).zip(pieces(outs.clone(), O)) {
            dispatch(Turn { source: self.weight, inner: self.inner, rows, target });
        }
        for (rows, x) in pieces(rows, BLOCK_ROWS).zip(x.chunks(BLOCK_ROWS / R * columns)) {
            let count = rows.len().div_ceil(R);
            let x = &x[..count * columns];
            let pending = &mut pending[..count * tiles];
            for row in rows.clone() {
                self.out.fetch(row * self.outer + outs.start..row * self.outer + outs.end);
            }
            dispatch(Blocked { tile: PhantomData::<T>, x, weights, groups, pending: &mut *pending });
            for (row, at) in rows.zip(0..) {
                for (sums, outs) in pending[at / R * tiles..].iter().zip(pieces(outs.clone(), O)) {
                    self.write(row, outs.start, &sums[0][at % R][..outs.len()]);
                }
            }
        }
    }

    /// Rounds `values`, and their bias if there is one, to the outputs from `first` on of `row`.
    fn write(&self, row: usize, first: usize, values: &[f32]) {
        // SAFETY: every task has outputs of its own.
        let out = unsafe { self.out.part(row * self.outer + first, values.len()) };
        write_rounded(out, values, self.bias.map(|bias| &bias[first..]));
    }
}

/// Rounds `values`, and their bias if there is one.
#[inline(always)]
pub(crate) fn write_rounded<X: Stored>(out: &mut [MaybeUninit<X>], values: &[f32], bias: Option<&[f32]>) {
    match bias {
        Some(bias) => {
            for (out, (value, bias)) in out.iter_mut().zip(values.iter().zip(bias)) {
                out.write(X::round(value + bias));
            }
        }
        None => {
            for (out, &value) in out.iter_mut().zip(values) {
                out.write(X::round(value));
            }
        }
    }
}

/// Floats as groups of `R` rows side by side.
fn tiles_of<const R: usize>(floats: &mut [f32]) -> &mut [[Group<f32>; R]] {
    floats.as_chunks_mut().0.as_chunks_mut().0
}

/// The first `len` values of `scratch` on a cache line, so that no load of a group straddles two.
pub(crate) fn aligned<T: Copy + Default>(scratch: &mut Vec<T>, len: usize) -> &mut [T] {
    const LINE: usize = 64;
    let line = LINE / size_of::<T>();
    if scratch.len() < len + line {
        scratch.resize(len + line, T::default());
    }
    let skip = scratch.as_ptr().align_offset(LINE) % line;
    &mut scratch[skip..][..len]
}

thread_local! {
    /// A thread's interleaved operands, kept between calls.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

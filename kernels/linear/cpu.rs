//! The product on the CPU. Few rows: every thread streams its share of the weights once, at memory speed.
//! Many rows: panels of weights and blocks of `x` are widened and interleaved for the register tile.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use super::simd::{Isa, LANES, MAX_OUTS, MAX_TILE, Run, Stored, Tile};

/// `x` `[n, inner]`, `weight` `[outer, inner]`; returns `[n, outer]`.
pub fn linear<X: Stored, W: Stored>(
    isa: Isa,
    x: &[X],
    weight: &[W],
    (n, inner, outer): (usize, usize, usize),
) -> Vec<X> {
    assert!(x.len() == n * inner && weight.len() == outer * inner, "operands shorter than their shape");
    if inner == 0 || n == 0 {
        return vec![X::round(0.0); n * outer];
    }
    let mut out = Vec::with_capacity(n * outer);
    let product = Product { isa, x, weight, n, inner, outer, out: Output(out.spare_capacity_mut().as_mut_ptr()) };
    if n <= STREAMED_ROWS {
        product.stream();
    } else {
        product.panels();
    }
    // SAFETY: both forms write each of the `n * outer` elements.
    unsafe { out.set_len(n * outer) };
    out
}

/// Up to this many rows, widening weights again for each tile of rows costs less than writing them to a panel.
const STREAMED_ROWS: usize = 8;
/// The most rows of a tile of them, and with that the most tiles.
const STREAMED_TILE_ROWS: usize = 4;
const MAX_TILES: usize = STREAMED_ROWS / STREAMED_TILE_ROWS;

/// Outputs of a panel of weights, which stays in the second-level cache.
const PANEL_OUTS: usize = 48;
/// Rows that are widened at once and share one widening of each panel.
const PANEL_ROWS: usize = 528;
/// Tiles of rows and groups of eight along the inner dimension that stay in the first-level cache.
const BLOCK_TILES: usize = 6;
const BLOCK_GROUPS: usize = 48;
/// Rows of the register tile of a panel.
const TILE_ROWS: usize = 2;

/// Products of which a thread should have at least so many, or waking it costs more than it does.
const MIN_TASK: usize = 1 << 16;

struct Product<'a, X, W> {
    isa: Isa,
    x: &'a [X],
    weight: &'a [W],
    n: usize,
    inner: usize,
    outer: usize,
    out: Output<X>,
}

/// Where threads write disjoint elements of the result.
struct Output<X>(*mut MaybeUninit<X>);

// SAFETY: every element is written by one thread, and read by none before all are done.
unsafe impl<X: Send> Sync for Output<X> {}

impl<X: Stored, W: Stored> Product<'_, X, W> {
    fn stream(&self) {
        let tiles = self.n.div_ceil(STREAMED_TILE_ROWS);
        let tile = self.isa.tile::<W>(self.n.div_ceil(tiles));
        let (groups, whole) = (self.inner.div_ceil(LANES), self.inner / LANES);
        let (x_group, x_stride) = (tile.rows * LANES, groups * tile.rows * LANES);
        let mut scratch = Vec::new();
        let x = aligned(&mut scratch, tiles * x_stride);
        interleave(self.isa, self.x, self.inner, 0..self.n, 0..self.inner, tile.rows, x);
        let x = &*x;
        let chunk = self.outer.div_ceil(4 * rayon::current_num_threads()).max(MIN_TASK / (self.n * self.inner));
        for_each_chunk(self.outer, chunk.next_multiple_of(tile.outs), |outs| {
            let (mut accumulators, mut sums) = ([0.0; MAX_TILES * MAX_TILE * LANES], [0.0; MAX_TILE]);
            for outs in pieces(outs, tile.outs) {
                // Beyond the last output the tile computes it again.
                let weights: [&[W]; MAX_OUTS] = std::array::from_fn(|q| {
                    &self.weight[(outs.end - 1).min(outs.start + q) * self.inner..][..self.inner]
                });
                let run = Run { x, x_stride, tiles, groups: whole, weights, w_stride: LANES, first: true };
                tile.accumulate(&run, &mut accumulators);
                if whole < groups {
                    let mut tails = [[W::round(0.0); LANES]; MAX_OUTS];
                    for (tail, weights) in tails.iter_mut().zip(weights) {
                        tail[..self.inner - whole * LANES].copy_from_slice(&weights[whole * LANES..]);
                    }
                    let (x, weights) = (&x[whole * x_group..], tails.each_ref().map(|tail| &tail[..]));
                    let run = Run { x, groups: 1, weights, first: whole == 0, ..run };
                    tile.accumulate(&run, &mut accumulators);
                }
                for (t, rows) in pieces(0..self.n, tile.rows).enumerate() {
                    tile.sums(&accumulators[t * tile.len()..], &mut sums, tile.outs);
                    for (row, sums) in rows.zip(sums.chunks_exact(tile.outs)) {
                        self.write(row, outs.start, &sums[..outs.len()]);
                    }
                }
            }
        });
    }

    fn panels(&self) {
        let tile = self.isa.tile::<f32>(TILE_ROWS);
        let groups = self.inner.div_ceil(LANES);
        let tile_len = groups * tile.rows * LANES;
        let mut scratch = SCRATCH.take();
        for rows in pieces(0..self.n, PANEL_ROWS) {
            let tiles = rows.len().div_ceil(tile.rows);
            let x = aligned(&mut scratch, tiles * tile_len);
            x.par_chunks_mut(tile_len).enumerate().for_each(|(t, x)| {
                let first = rows.start + t * tile.rows;
                interleave(
                    self.isa,
                    self.x,
                    self.inner,
                    first..rows.end.min(first + tile.rows),
                    0..self.inner,
                    tile.rows,
                    x,
                );
            });
            // A narrow weight has too few panels for all threads: then they share its rows as well.
            let panels = self.outer.div_ceil(PANEL_OUTS);
            let parts = (2 * rayon::current_num_threads()).div_ceil(panels);
            let part = rows.len().div_ceil(parts).next_multiple_of(BLOCK_TILES * tile.rows);
            let tasks: Vec<_> = pieces(0..self.outer, PANEL_OUTS)
                .flat_map(|outs| pieces(rows.clone(), part).map(move |rows| (outs.clone(), rows)))
                .collect();
            tasks.into_par_iter().for_each(|(outs, part)| {
                let mut scratch = SCRATCH.take();
                let x = &x[(part.start - rows.start) / tile.rows * tile_len..];
                self.panel(&tile, x, outs, part, &mut scratch);
                SCRATCH.set(scratch);
            });
        }
        SCRATCH.set(scratch);
    }

    /// The outputs `outs` of the rows `rows`, which `x` holds interleaved.
    fn panel(&self, tile: &Tile<f32>, x: &[f32], outs: Range<usize>, rows: Range<usize>, scratch: &mut Vec<f32>) {
        let groups = self.inner.div_ceil(LANES);
        let (x_group, w_group) = (tile.rows * LANES, tile.outs * LANES);
        let x_stride = groups * x_group;
        let w_tiles = outs.len().div_ceil(tile.outs);
        let sizes = [groups * w_tiles * w_group, w_tiles * BLOCK_TILES * tile.len(), w_tiles * tile.outs * tile.rows];
        let (panel, rest) = aligned(scratch, sizes.iter().sum()).split_at_mut(sizes[0]);
        let (accumulators, rest) = rest.split_at_mut(sizes[1]);
        let results = &mut rest[..sizes[2]];

        // Along the inner dimension block by block, so that a block of the panel is read from end to end.
        for k in pieces(0..groups, BLOCK_GROUPS) {
            let panel = &mut panel[k.start * w_tiles * w_group..];
            let columns = k.start * LANES..self.inner.min(k.end * LANES);
            interleave(self.isa, self.weight, self.inner, outs.clone(), columns, tile.outs, panel);
        }
        for (b, block_rows) in pieces(rows, BLOCK_TILES * tile.rows).enumerate() {
            let x = &x[b * BLOCK_TILES * x_stride..];
            let tiles = block_rows.len().div_ceil(tile.rows);
            for k in pieces(0..groups, BLOCK_GROUPS) {
                let panel = &panel[k.start * w_tiles * w_group..k.end * w_tiles * w_group];
                let tiles_of_weights = panel.chunks_exact(k.len() * w_group);
                for (weights, acc) in tiles_of_weights.zip(accumulators.chunks_exact_mut(BLOCK_TILES * tile.len())) {
                    let run = Run {
                        x: &x[k.start * x_group..],
                        x_stride,
                        tiles,
                        groups: k.len(),
                        weights: std::array::from_fn(|q| &weights[q.min(tile.outs - 1) * LANES..]),
                        w_stride: w_group,
                        first: k.start == 0,
                    };
                    tile.accumulate(&run, acc);
                }
            }
            for (t, tile_rows) in pieces(block_rows, tile.rows).enumerate() {
                for (q, acc) in accumulators.chunks_exact(BLOCK_TILES * tile.len()).enumerate() {
                    tile.sums(&acc[t * tile.len()..], &mut results[q * tile.outs..], w_tiles * tile.outs);
                }
                for (row, results) in tile_rows.zip(results.chunks_exact(w_tiles * tile.outs)) {
                    self.write(row, outs.start, &results[..outs.len()]);
                }
            }
        }
    }

    /// Rounds `values` to the outputs from `first` on of `row`.
    fn write(&self, row: usize, first: usize, values: &[f32]) {
        assert!(row < self.n && first + values.len() <= self.outer, "outputs outside the result");
        for (o, &value) in values.iter().enumerate() {
            // SAFETY: within the `n * outer` elements by the assertion.
            unsafe { (*self.out.0.add(row * self.outer + first + o)).write(X::round(value)) };
        }
    }
}

/// Widens `columns` of the `rows` of `source` `[.., inner]` into tiles of `tile` rows: `[tiles, groups, tile, 8]`.
/// Rows missing from the last tile are zero.
fn interleave<T: Stored>(
    isa: Isa,
    source: &[T],
    inner: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    tile: usize,
    target: &mut [f32],
) {
    let tile_len = columns.len().div_ceil(LANES) * tile * LANES;
    if !rows.len().is_multiple_of(tile) {
        target[rows.len() / tile * tile_len..][..tile_len].fill(0.0);
    }
    for (r, row) in rows.enumerate() {
        let target = &mut target[r / tile * tile_len + r % tile * LANES..];
        isa.widen(&source[row * inner..][columns.clone()], target, tile * LANES);
    }
}

/// `range` in pieces of `len`, the last one shorter.
fn pieces(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(len).map(move |start| start..range.end.min(start + len))
}

/// `body` over `0..len` in ranges of `chunk`, on all threads if there is more than one range.
fn for_each_chunk(len: usize, chunk: usize, body: impl Fn(Range<usize>) + Sync) {
    if len <= chunk {
        return body(0..len);
    }
    (0..len.div_ceil(chunk)).into_par_iter().for_each(|i| body(i * chunk..len.min((i + 1) * chunk)));
}

/// The first `len` floats of `scratch` on a cache line, so that no register load straddles two.
fn aligned(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    const LINE: usize = 16;
    if scratch.len() < len + LINE {
        scratch.resize(len + LINE, 0.0);
    }
    let skip = scratch.as_ptr().align_offset(LINE * size_of::<f32>()) % LINE;
    &mut scratch[skip..][..len]
}

thread_local! {
    /// A thread's panel and block buffers, kept between calls.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

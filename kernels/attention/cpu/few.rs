//! Few queries: keys and values stream through registers as they lie, in pages from end to end, all heads of a
//! position after one another. Lanes lie along the head.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use super::form::Form;
use super::{Attention, CHUNK, Mix, Operand, Part, greatest_score, to_weights};
use crate::linear::tile::Products;
use crate::simd::{Kernel, LANES, Lanes, Stored, load, prefetch_far_at};

/// Keys that one head is at before the next.
const TILE: usize = LANES;

/// Most rows that one register tile takes.
const ROWS: usize = 4;

/// Bytes that are asked for ahead of use, into the second-level cache: about as many as memory delivers within its
/// latency.
const AHEAD: usize = 8 << 10;

/// The mix of `[heads, rows]`.
pub(super) struct Few<'a, T, P, F> {
    part: &'a Part<'a, T, P>,
    form: PhantomData<F>,
}

impl<'a, T, P, F> Few<'a, T, P, F> {
    pub fn new(part: &'a Part<'a, T, P>) -> Self {
        Self { part, form: PhantomData }
    }
}

impl<T: Stored, P: Stored, F: Form> Kernel for Few<'_, T, P, F> {
    type Output = Mix;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Mix {
        let part = self.part;
        let Attention { ref keys, ref values, d, params, .. } = *part.attention;
        let (rows, lanes, groups) = (part.rows(), d / LANES, d.div_ceil(F::GROUP));
        let all = part.block.heads.len() * rows;
        let mut scratch = SCRATCH.take();
        let Scratch { queries, scores, mix, bounds, seen } = &mut scratch;
        queries.resize(all * groups, [0.0; LANES]);
        scores.resize(all, [0.0; CHUNK]);
        mix.resize(all, lanes);
        for (row, query) in queries.chunks_exact_mut(groups).enumerate() {
            let source = part.query(part.block.heads.start + row / rows, row % rows);
            for (group, query) in query.iter_mut().enumerate() {
                F::load::<V, T>(source, group).store(query);
            }
        }
        let mut total = Mix::new(all, lanes);
        let (mut key_copies, mut value_copies) = (Vec::new(), Vec::new());
        for chunk in part.chunks.clone() {
            bounds.clear();
            bounds.extend((0..rows).map(|row| part.bounds(chunk, row)));
            let range = bounds[0].start..bounds[rows - 1].end;
            let stream = Stream { part, chunk, range };
            for (index, at) in stream.tiles().enumerate() {
                seen.clear();
                seen.extend(bounds.iter().map(|bounds| within(bounds, at)));
                let tile = stream.tile(keys, at, &mut key_copies);
                let mut ahead = stream.ahead(index);
                for (head, scores) in scores.chunks_exact_mut(rows).enumerate() {
                    let queries = &queries[head * rows * groups..][..rows * groups];
                    let tile = tile.head(head * keys.strides[1], d);
                    score_rows::<V, F, P>(queries, &tile, seen, scores, at, params.scale, &mut ahead);
                }
            }
            mix.values.fill([0.0; LANES]);
            for (row, scores) in scores.iter_mut().enumerate() {
                let bounds = &bounds[row % rows];
                (mix.max[row], mix.sum[row]) = (f32::NEG_INFINITY, 0.0);
                if !bounds.is_empty() {
                    mix.max[row] = greatest_score::<V>(scores, bounds, params.softcap);
                    mix.sum[row] = to_weights::<V, F>(scores, bounds, mix.max[row]);
                }
            }
            for (index, at) in stream.tiles().enumerate() {
                seen.clear();
                seen.extend(bounds.iter().map(|bounds| within(bounds, at)));
                let tile = stream.tile(values, at, &mut value_copies);
                let mut ahead = stream.ahead(stream.tiles().len() + index);
                let mixes = mix.values.chunks_exact_mut(rows * lanes);
                for (head, (weights, mix)) in scores.chunks_exact(rows).zip(mixes).enumerate() {
                    let tile = tile.head(head * values.strides[1], d);
                    weigh_rows::<V, F, P>(weights, &tile, seen, mix, at, &mut ahead);
                }
            }
            total.merge(mix, 0);
        }
        SCRATCH.set(scratch);
        total
    }
}

/// What a thread needs for its part.
#[derive(Default)]
struct Scratch {
    /// `[heads, rows, groups]`
    queries: Vec<[f32; LANES]>,
    /// `[heads, rows]`
    scores: Vec<[f32; CHUNK]>,
    /// Of a chunk.
    mix: Mix,
    /// The keys of a chunk that each row sees.
    bounds: Vec<Range<usize>>,
    /// Those of a tile, within it.
    seen: Vec<Range<usize>>,
}

thread_local! {
    /// A thread's, kept between calls.
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch::NEW) };
}

impl Scratch {
    const NEW: Self = Self {
        queries: Vec::new(),
        scores: Vec::new(),
        mix: Mix { max: Vec::new(), sum: Vec::new(), values: Vec::new() },
        bounds: Vec::new(),
        seen: Vec::new(),
    };
}

/// A tile of keys or values.
#[derive(Clone, Copy)]
struct Tile<'a, P> {
    /// From the first one on.
    data: &'a [P],
    /// Elements from one to the next.
    stride: usize,
    /// Elements of each.
    len: usize,
}

impl<'a, P> Tile<'a, P> {
    #[inline(always)]
    fn new(data: &'a [P], stride: usize, len: usize) -> Self {
        assert!((TILE - 1) * stride + len <= data.len());
        Self { data, stride, len }
    }

    /// The `d` elements from `offset` on.
    #[inline(always)]
    fn head(&self, offset: usize, d: usize) -> Self {
        assert!(offset + d <= self.len);
        Self::new(&self.data[offset..], self.stride, d)
    }

    /// # Safety
    ///
    /// There are more than `key` keys, and `count` elements in each from `first` on.
    #[inline(always)]
    unsafe fn elements(&self, key: usize, first: usize, count: usize) -> &'a [P] {
        debug_assert!(key < TILE && first + count <= self.len);
        // SAFETY: `new` has seen that the data reach so far.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().add(key * self.stride + first), count) }
    }
}

/// What a chunk reads: its keys, and then its values.
struct Stream<'a, T, P> {
    part: &'a Part<'a, T, P>,
    chunk: usize,
    /// The keys that any row sees.
    range: Range<usize>,
}

impl<'a, T: Stored, P: Stored> Stream<'a, T, P> {
    /// The row of an operand that holds `key` of the chunk.
    fn row(&self, key: usize) -> usize {
        let (sequence, position) = (self.part.block.sequence, self.chunk * CHUNK + key);
        match self.part.attention.block_size {
            None => sequence.tokens.start + position,
            Some(size) => sequence.blocks[position / size] as usize * size + position % size,
        }
    }

    /// Where the heads of the block begin in a row, and how many elements that they have.
    fn heads(&self, operand: &Operand<'a, P>) -> (usize, usize) {
        let (heads, [_, stride]) = (&self.part.block.heads, operand.strides);
        (heads.start * stride, (heads.len() - 1) * stride + self.part.attention.d)
    }

    /// Where the tiles begin that hold the range.
    fn tiles(&self) -> impl ExactSizeIterator<Item = usize> {
        (self.range.start / TILE * TILE..self.range.end).step_by(TILE)
    }

    /// The tile at `at`, if it lies in rows one after the other. Whatever stands there in the place of keys that nobody
    /// sees is not used.
    fn place(&self, operand: &Operand<'a, P>, at: usize) -> Option<Tile<'a, P>> {
        if !self.part.attention.block_size.is_none_or(|size| size.is_multiple_of(TILE)) {
            return None;
        }
        let (first, len) = self.heads(operand);
        let [stride, _] = operand.strides;
        let start = self.row(at) * stride + first;
        Some(Tile::new(operand.data.get(start..start + (TILE - 1) * stride + len)?, stride, len))
    }

    /// The tile at `at`, if need be as a copy; in the place of keys that nobody sees then stands one that somebody does.
    fn tile<'b>(&self, operand: &Operand<'a, P>, at: usize, copies: &'b mut Vec<P>) -> Tile<'b, P>
    where
        'a: 'b,
    {
        if let Some(tile) = self.place(operand, at) {
            return tile;
        }
        let (start, len) = self.heads(operand);
        copies.clear();
        for key in at..at + TILE {
            let row = self.row(key.clamp(self.range.start, self.range.end - 1));
            copies.extend_from_slice(&operand.data[row * operand.strides[0] + start..][..len]);
        }
        Tile::new(copies, len, len)
    }

    /// What to ask for while the tile `index` is at work, counted through those of the keys and then of the values.
    fn ahead(&self, index: usize) -> Lines<P> {
        let Attention { ref keys, ref values, .. } = *self.part.attention;
        let ahead = index + AHEAD.div_ceil(TILE * self.heads(keys).1 * size_of::<P>());
        let tile = match ahead.checked_sub(self.tiles().len()) {
            None => self.tiles().nth(ahead).and_then(|at| self.place(keys, at)),
            Some(ahead) => self.tiles().nth(ahead).and_then(|at| self.place(values, at)),
        };
        match tile {
            Some(Tile { data, stride, len }) => Lines { start: data.as_ptr(), stride, len, offset: 0, left: TILE },
            None => Lines { start: keys.data.as_ptr(), stride: 0, len: 0, offset: 0, left: 0 },
        }
    }
}

/// What is asked for ahead of use, a line now and then: asked for all at once, lines wait for each other, and what is to
/// be computed meanwhile waits for them.
struct Lines<P> {
    start: *const P,
    stride: usize,
    /// Elements from the start on, and then from each stride on.
    len: usize,
    /// What comes next.
    offset: usize,
    /// Rows that are not yet asked for.
    left: usize,
}

impl<P> Lines<P> {
    /// Of a line; elements of four bytes take two.
    const ELEMENTS: usize = 32;

    /// Where the next `count` lines begin, for [`Lines::fetch`]. Once all were asked for, the last ones again.
    #[inline(always)]
    fn next(&mut self, count: usize) -> *const P {
        let start = self.start.wrapping_add(self.offset);
        if self.left > 0 {
            self.offset += count * Self::ELEMENTS;
            while self.offset >= self.len {
                (self.offset, self.left) = (self.offset - self.len, self.left - 1);
                self.start = self.start.wrapping_add(self.stride);
            }
        }
        start
    }

    #[inline(always)]
    fn fetch(start: *const P, line: usize) {
        prefetch_far_at(start.wrapping_add(line * Self::ELEMENTS), Self::ELEMENTS);
    }
}

/// The part of `bounds` within the tile at `at`, from there.
#[inline(always)]
fn within(bounds: &Range<usize>, at: usize) -> Range<usize> {
    bounds.start.saturating_sub(at)..bounds.end.saturating_sub(at).min(TILE)
}

/// Scores the tile at `at`, of which rows see `seen`.
#[inline(always)]
fn score_rows<V: Lanes, F: Form, P: Stored>(
    queries: &[[f32; LANES]],
    tile: &Tile<P>,
    seen: &[Range<usize>],
    scores: &mut [[f32; CHUNK]],
    at: usize,
    scale: f32,
    ahead: &mut Lines<P>,
) {
    let groups = tile.len.div_ceil(F::GROUP);
    for row in (0..seen.len()).step_by(ROWS) {
        let block = ROWS.min(seen.len() - row);
        if seen[row..row + block].iter().any(|seen| !seen.is_empty()) {
            let (queries, scores) = (&queries[row * groups..], &mut scores[row..]);
            match block {
                1 => score::<V, F, P, 1, 4>(queries, tile, scores, at, scale, ahead),
                2 => score::<V, F, P, 2, 4>(queries, tile, scores, at, scale, ahead),
                3 => score::<V, F, P, 3, 4>(queries, tile, scores, at, scale, ahead),
                _ => score::<V, F, P, ROWS, 2>(queries, tile, scores, at, scale, ahead),
            }
        }
    }
}

/// Mixes in the values of the tile at `at`, of which rows see `seen`. A value that a row does not see has no weight in
/// it, not even zero: it may be NaN.
#[inline(always)]
fn weigh_rows<V: Lanes, F: Form, P: Stored>(
    weights: &[[f32; CHUNK]],
    tile: &Tile<P>,
    seen: &[Range<usize>],
    mix: &mut [[f32; LANES]],
    at: usize,
    ahead: &mut Lines<P>,
) {
    let lanes = tile.len / LANES;
    let mut row = 0;
    while row < seen.len() {
        let keys = &seen[row];
        let alike = seen[row..].iter().take(ROWS).take_while(|seen| *seen == keys).count();
        let (weights, mix) = (&weights[row..], &mut mix[row * lanes..]);
        match alike {
            _ if keys.is_empty() => {}
            1 => weigh::<V, F, P, 1, 4>(weights, tile, mix, at, keys, ahead),
            2 => weigh::<V, F, P, 2, 4>(weights, tile, mix, at, keys, ahead),
            3 => weigh::<V, F, P, 3, 4>(weights, tile, mix, at, keys, ahead),
            _ => weigh::<V, F, P, ROWS, 2>(weights, tile, mix, at, keys, ahead),
        }
        row += alike;
    }
}

/// The scores of `R` rows with a tile of keys, `K` at a time: the sums, the queries and a key fill at most the sixteen
/// registers of AVX2.
#[expect(clippy::needless_range_loop, reason = "it indexes registers")]
#[inline(always)]
fn score<V: Lanes, F: Form, P: Stored, const R: usize, const K: usize>(
    queries: &[[f32; LANES]],
    tile: &Tile<P>,
    scores: &mut [[f32; CHUNK]],
    at: usize,
    scale: f32,
    ahead: &mut Lines<P>,
) {
    let (lanes, groups) = (tile.len / LANES, tile.len.div_ceil(F::GROUP));
    let mut rows = [&queries[..groups]; R];
    for row in 1..R {
        rows[row] = &queries[row * groups..][..groups];
    }
    let mut all = [[0.0; TILE]; R];
    for first in (0..TILE).step_by(K) {
        let mut sums = [[V::splat(0.0); 4]; R];
        let line = ahead.next(lanes * K / 4);
        for group in 0..groups {
            for lanes in group * (F::GROUP / LANES)..(group + 1) * (F::GROUP / LANES) {
                if lanes.is_multiple_of(4 / K) {
                    Lines::fetch(line, lanes * K / 4);
                }
            }
            let mut query = [V::splat(0.0); R];
            for row in 0..R {
                query[row] = V::load(&rows[row][group]);
            }
            for k in 0..K {
                // SAFETY: there are that many of both.
                let key: V = F::load(unsafe { tile.elements(first + k, group * F::GROUP, F::GROUP) }, 0);
                for row in 0..R {
                    sums[row][k] = F::Products::add(query[row], key, sums[row][k]);
                }
            }
        }
        for row in 0..R {
            all[row][first..first + K].copy_from_slice(&V::sums(sums[row])[..K]);
        }
    }
    for (all, scores) in all.iter().zip(scores) {
        V::load(all).mul(V::splat(scale)).store(&mut scores.as_chunks_mut().0[at / TILE]);
    }
}

/// Adds the weighted values of `keys` to `R` rows, `C` columns at a time.
#[inline(always)]
fn weigh<V: Lanes, F: Form, P: Stored, const R: usize, const C: usize>(
    weights: &[[f32; CHUNK]],
    tile: &Tile<P>,
    mix: &mut [[f32; LANES]],
    at: usize,
    keys: &Range<usize>,
    ahead: &mut Lines<P>,
) {
    let lanes = tile.len / LANES;
    let mut rows = [&[0.0; TILE]; R];
    for row in 0..R {
        rows[row] = &weights[row].as_chunks().0[at / TILE];
    }
    let mut column = 0;
    while column + C <= lanes {
        weigh_columns::<V, F, P, R, C>(&rows, tile, mix, keys, column, ahead);
        column += C;
    }
    while column < lanes {
        weigh_columns::<V, F, P, R, 1>(&rows, tile, mix, keys, column, ahead);
        column += 1;
    }
}

#[inline(always)]
fn weigh_columns<V: Lanes, F: Form, P: Stored, const R: usize, const C: usize>(
    weights: &[&[f32; TILE]; R],
    tile: &Tile<P>,
    mix: &mut [[f32; LANES]],
    keys: &Range<usize>,
    column: usize,
    ahead: &mut Lines<P>,
) {
    let lanes = tile.len / LANES;
    let mut sums = [[V::splat(0.0); C]; R];
    for row in 0..R {
        let mix = &mix[row * lanes + column..][..C];
        for c in 0..C {
            sums[row][c] = V::load(&mix[c]);
        }
    }
    assert!(column + C <= lanes && keys.end <= TILE);
    let line = ahead.next(TILE * C / 4);
    if F::IS_PAIRED {
        if keys.start % 2 == 1 {
            add_value(weights, tile, keys.start, column, line, &mut sums);
        }
        for pair in keys.start.div_ceil(2)..keys.end / 2 {
            add_value(weights, tile, 2 * pair + 1, column, line, &mut sums);
            add_value(weights, tile, 2 * pair, column, line, &mut sums);
        }
        if keys.end % 2 == 1 {
            add_value(weights, tile, keys.end - 1, column, line, &mut sums);
        }
    } else {
        for key in keys.clone() {
            add_value(weights, tile, key, column, line, &mut sums);
        }
    }
    for row in 0..R {
        let mix = &mut mix[row * lanes + column..][..C];
        for c in 0..C {
            sums[row][c].store(&mut mix[c]);
        }
    }
}

/// Adds the weighted columns of `key`.
#[expect(clippy::needless_range_loop, reason = "it indexes registers")]
#[inline(always)]
fn add_value<V: Lanes, P: Stored, const R: usize, const C: usize>(
    weights: &[&[f32; TILE]; R],
    tile: &Tile<P>,
    key: usize,
    column: usize,
    line: *const P,
    sums: &mut [[V; C]; R],
) {
    if key.is_multiple_of(4 / C) {
        Lines::fetch(line, key * C / 4);
    }
    for c in 0..C {
        // SAFETY: whoever calls has seen that there are that many of both.
        let value: V = load(unsafe { tile.elements(key, (column + c) * LANES, LANES) });
        for row in 0..R {
            sums[row][c] = V::splat(weights[row][key]).mul_add(value, sums[row][c]);
        }
    }
}

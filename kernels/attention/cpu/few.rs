//! Few queries: keys and values stream through registers as they lie, in pages from end to end, all heads of a
//! position after one another. Lanes lie along the head.

use std::cell::Cell;
use std::ops::Range;
use std::ptr;

use super::{Attention, CHUNK, Mix, Operand, Part, softmax};
use crate::simd::{Kernel, LANES, Lanes, Stored, load, prefetch_at};

/// Keys that one head is at before the next.
const TILE: usize = LANES;

/// Most rows that one register tile takes.
const ROWS: usize = 3;

/// Keys that are fetched ahead of use: about as many bytes as memory delivers within its latency.
const AHEAD: usize = 16;

/// The mix of `[heads, rows]`.
pub(super) struct Few<'a, T, P>(pub(super) &'a Part<'a, T, P>);

impl<T: Stored, P: Stored> Kernel for Few<'_, T, P> {
    type Output = Mix;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Mix {
        let part = self.0;
        let Attention { ref keys, ref values, d, params, .. } = *part.attention;
        let (rows, lanes) = (part.rows(), d / LANES);
        let all = part.block.heads.len() * rows;
        let mut scratch = SCRATCH.take();
        let Scratch { queries, scores, mix, bounds, places } = &mut scratch;
        queries.resize(all * lanes, [0.0; LANES]);
        scores.resize(all, [0.0; CHUNK]);
        mix.resize(all, lanes);
        for (row, query) in queries.chunks_exact_mut(lanes).enumerate() {
            let source = part.query(part.block.heads.start + row / rows, row % rows);
            for (query, source) in query.iter_mut().zip(source.chunks_exact(LANES)) {
                load::<V, T>(source).store(query);
            }
        }
        let mut total = Mix::new(all, lanes);
        for chunk in part.chunks.clone() {
            bounds.clear();
            bounds.extend((0..rows).map(|row| part.bounds(chunk, row)));
            let range = part.find(chunk, places);
            let rows_of = Rows { keys, values, heads: part.block.heads.clone(), d, places };
            let tiles = || (range.start / TILE * TILE..range.end).step_by(TILE);
            for at in tiles() {
                for (i, head) in part.block.heads.clone().enumerate() {
                    let mut ahead = rows_of.ahead(at.saturating_sub(range.start), i);
                    let tile = sources(keys, places, &range, at, head, d);
                    let (queries, scores) = (&queries[i * rows * lanes..], &mut scores[i * rows..][..rows]);
                    score_rows::<V, P>(queries, &tile, bounds, scores, at, params.scale, &mut ahead);
                }
            }
            mix.values.fill([0.0; LANES]);
            for (row, scores) in scores.iter_mut().enumerate() {
                let bounds = &bounds[row % rows];
                (mix.max[row], mix.sum[row]) = match bounds.is_empty() {
                    true => (f32::NEG_INFINITY, 0.0),
                    false => softmax::<V>(scores, bounds, params.softcap),
                };
            }
            for at in tiles() {
                for (i, head) in part.block.heads.clone().enumerate() {
                    let mut ahead = rows_of.ahead(places.len() + at.saturating_sub(range.start), i);
                    let tile = sources(values, places, &range, at, head, d);
                    let mix = &mut mix.values[i * rows * lanes..][..rows * lanes];
                    weigh_rows::<V, P>(&scores[i * rows..], &tile, bounds, mix, at, &mut ahead);
                }
            }
            total.merge(mix);
        }
        SCRATCH.set(scratch);
        total
    }
}

/// What a thread needs for its part.
#[derive(Default)]
struct Scratch {
    /// `[heads, rows, lanes]`
    queries: Vec<[f32; LANES]>,
    /// `[heads, rows]`
    scores: Vec<[f32; CHUNK]>,
    /// Of a chunk.
    mix: Mix,
    /// The keys of a chunk that each row sees.
    bounds: Vec<Range<usize>>,
    /// Where they are.
    places: Vec<usize>,
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
        places: Vec::new(),
    };
}

/// Some keys or values of one head.
type Sources<'a, P> = [&'a [[P; LANES]]; TILE];

/// The tile at `at`; in the place of keys that nobody sees stands one that somebody does.
#[inline(always)]
fn sources<'a, P>(
    operand: &Operand<'a, P>,
    places: &[usize],
    range: &Range<usize>,
    at: usize,
    head: usize,
    d: usize,
) -> Sources<'a, P> {
    let mut sources = [&[][..]; TILE];
    for key in 0..TILE {
        let place = places[(at + key).clamp(range.start, range.end - 1) - range.start];
        sources[key] = operand.head(place, head, d).as_chunks().0;
    }
    sources
}

/// What a chunk reads: its keys, and then its values.
struct Rows<'a, P> {
    keys: &'a Operand<'a, P>,
    values: &'a Operand<'a, P>,
    heads: Range<usize>,
    d: usize,
    places: &'a [usize],
}

impl<P> Rows<'_, P> {
    /// All heads of the positions ahead of a tile, a part of them with each head.
    #[inline(always)]
    fn ahead(&self, at: usize, head: usize) -> Lines<P> {
        let len = (self.heads.len() - 1) * self.keys.strides[1] + self.d;
        let mut lines = Lines { starts: [ptr::null(); TILE], count: 0, len, at: 0, offset: 0 };
        let share = |head: usize| at + AHEAD + head * TILE / self.heads.len();
        for index in share(head)..share(head + 1) {
            let (operand, index) = match index.checked_sub(self.places.len()) {
                None => (self.keys, index),
                Some(index) => (self.values, index),
            };
            if let Some(&place) = self.places.get(index) {
                lines.starts[lines.count] = operand.head(place, self.heads.start, self.d).as_ptr();
                lines.count += 1;
            }
        }
        lines
    }
}

/// What is asked for ahead of use, a line now and then: asked for all at once, lines wait for each other, and what is to
/// be computed meanwhile waits for them.
struct Lines<P> {
    starts: [*const P; TILE],
    count: usize,
    /// Elements from each start on.
    len: usize,
    /// The next one: its start, and the elements from there.
    at: usize,
    offset: usize,
}

impl<P> Lines<P> {
    /// Asks for 64 bytes, of elements of four bytes for 128: as many as are used in one turn of [`score`] or [`weigh`].
    #[inline(always)]
    fn next(&mut self) {
        const ELEMENTS: usize = 32;
        if self.at < self.count {
            prefetch_at(self.starts[self.at].wrapping_add(self.offset), ELEMENTS);
            self.offset += ELEMENTS;
            if self.offset >= self.len {
                (self.at, self.offset) = (self.at + 1, 0);
            }
        }
    }
}

/// The part of `bounds` within the tile at `at`.
fn within(bounds: &Range<usize>, at: usize) -> Range<usize> {
    bounds.start.max(at)..bounds.end.min(at + TILE)
}

/// Scores the tile at `at`.
#[inline(always)]
fn score_rows<V: Lanes, P: Stored>(
    queries: &[[f32; LANES]],
    tile: &Sources<P>,
    bounds: &[Range<usize>],
    scores: &mut [[f32; CHUNK]],
    at: usize,
    scale: f32,
    ahead: &mut Lines<P>,
) {
    let lanes = tile[0].len();
    for row in (0..bounds.len()).step_by(ROWS) {
        let block = ROWS.min(bounds.len() - row);
        if bounds[row..row + block].iter().any(|bounds| !within(bounds, at).is_empty()) {
            let (queries, scores) = (&queries[row * lanes..], &mut scores[row..]);
            match block {
                1 => score::<V, P, 1>(queries, tile, scores, at, scale, ahead),
                2 => score::<V, P, 2>(queries, tile, scores, at, scale, ahead),
                _ => score::<V, P, ROWS>(queries, tile, scores, at, scale, ahead),
            }
        }
    }
}

/// Mixes in the values of the tile at `at`. A value that a row does not see has no weight in it, not even zero: it may
/// be NaN.
#[inline(always)]
fn weigh_rows<V: Lanes, P: Stored>(
    weights: &[[f32; CHUNK]],
    tile: &Sources<P>,
    bounds: &[Range<usize>],
    mix: &mut [[f32; LANES]],
    at: usize,
    ahead: &mut Lines<P>,
) {
    let lanes = tile[0].len();
    let mut row = 0;
    while row < bounds.len() {
        let keys = within(&bounds[row], at);
        let alike = bounds[row..].iter().take(ROWS).take_while(|bounds| within(bounds, at) == keys).count();
        let (weights, mix) = (&weights[row..], &mut mix[row * lanes..]);
        match alike {
            1 => weigh::<V, P, 1>(weights, tile, mix, at, keys, ahead),
            2 => weigh::<V, P, 2>(weights, tile, mix, at, keys, ahead),
            _ => weigh::<V, P, ROWS>(weights, tile, mix, at, keys, ahead),
        }
        row += alike;
    }
}

/// The scores of `R` rows with a tile of keys.
#[inline(always)]
fn score<V: Lanes, P: Stored, const R: usize>(
    queries: &[[f32; LANES]],
    tile: &Sources<P>,
    scores: &mut [[f32; CHUNK]],
    at: usize,
    scale: f32,
    ahead: &mut Lines<P>,
) {
    // With three rows twelve sums, three queries and a key fill the sixteen registers of AVX2.
    const KEYS: usize = 4;
    let lanes = tile[0].len();
    let mut rows = [&queries[..lanes]; R];
    for row in 1..R {
        rows[row] = &queries[row * lanes..][..lanes];
    }
    for half in [0, KEYS] {
        let mut keys = [&tile[half][..lanes]; KEYS];
        for key in 1..KEYS {
            keys[key] = &tile[half + key][..lanes];
        }
        let mut sums = [[V::splat(0.0); KEYS]; R];
        for i in 0..lanes {
            ahead.next();
            let mut query = [V::splat(0.0); R];
            for row in 0..R {
                query[row] = V::load(&rows[row][i]);
            }
            for k in 0..KEYS {
                let key: V = P::load(&keys[k][i]);
                for row in 0..R {
                    sums[row][k] = query[row].mul_add(key, sums[row][k]);
                }
            }
        }
        for row in 0..R {
            let target = &mut scores[row][at + half..][..KEYS];
            for (target, score) in target.iter_mut().zip(V::sums(sums[row])) {
                *target = score * scale;
            }
        }
    }
}

/// Adds the weighted values of `keys` to `R` rows.
#[inline(always)]
fn weigh<V: Lanes, P: Stored, const R: usize>(
    weights: &[[f32; CHUNK]],
    tile: &Sources<P>,
    mix: &mut [[f32; LANES]],
    at: usize,
    keys: Range<usize>,
    ahead: &mut Lines<P>,
) {
    const COLUMNS: usize = 4;
    let lanes = tile[0].len();
    let mut column = 0;
    while column + COLUMNS <= lanes {
        weigh_columns::<V, P, R, COLUMNS>(weights, tile, mix, at, keys.clone(), column, ahead);
        column += COLUMNS;
    }
    while column < lanes {
        weigh_columns::<V, P, R, 1>(weights, tile, mix, at, keys.clone(), column, ahead);
        column += 1;
    }
}

#[inline(always)]
fn weigh_columns<V: Lanes, P: Stored, const R: usize, const C: usize>(
    weights: &[[f32; CHUNK]],
    tile: &Sources<P>,
    mix: &mut [[f32; LANES]],
    at: usize,
    keys: Range<usize>,
    column: usize,
    ahead: &mut Lines<P>,
) {
    let lanes = tile[0].len();
    let mut sums = [[V::splat(0.0); C]; R];
    for row in 0..R {
        let mix = &mix[row * lanes + column..][..C];
        for c in 0..C {
            sums[row][c] = V::load(&mix[c]);
        }
    }
    for key in keys {
        ahead.next();
        let value = &tile[key - at][column..][..C];
        let mut weight = [V::splat(0.0); R];
        for row in 0..R {
            weight[row] = V::splat(weights[row][key]);
        }
        for c in 0..C {
            let value: V = P::load(&value[c]);
            for row in 0..R {
                sums[row][c] = weight[row].mul_add(value, sums[row][c]);
            }
        }
    }
    for row in 0..R {
        let mix = &mut mix[row * lanes + column..][..C];
        for c in 0..C {
            sums[row][c].store(&mut mix[c]);
        }
    }
}

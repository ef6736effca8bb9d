//! Few queries: keys and values stream through registers as they lie, in pages from end to end, all heads of a
//! position after one another. Lanes lie along the head.

use std::ops::Range;

use super::{Attention, CHUNK, Mix, Operand, Part, softmax};
use crate::simd::{Kernel, LANES, Lanes, Stored, load, prefetch};

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
        let all = part.heads.len() * rows;
        let mut queries = vec![[0.0; LANES]; all * lanes];
        for (row, query) in queries.chunks_exact_mut(lanes).enumerate() {
            let source = part.query(part.heads.start + row / rows, row % rows);
            for (query, source) in query.iter_mut().zip(source.chunks_exact(LANES)) {
                load::<V, T>(source).store(query);
            }
        }
        let mut scores = vec![[0.0; CHUNK]; all];
        let mut mix = Mix::new(all, lanes);
        let mut total = Mix::new(all, lanes);
        for chunk in part.chunks.clone() {
            let bounds: Vec<Range<usize>> = (0..rows).map(|row| part.bounds(chunk, row)).collect();
            let (range, places) = part.places(chunk);
            let rows_of = Rows { keys, values, heads: part.heads.clone(), d, places: &places };
            rows_of.fetch(0..AHEAD);
            let tiles = || (range.start / TILE * TILE..range.end).step_by(TILE);
            for at in tiles() {
                for (i, head) in part.heads.clone().enumerate() {
                    rows_of.fetch_share(at.saturating_sub(range.start), i);
                    let tile = sources(keys, &places, &range, at, head, d);
                    let (queries, scores) = (&queries[i * rows * lanes..], &mut scores[i * rows..][..rows]);
                    score_rows::<V, P>(queries, &tile, &bounds, scores, at, params.scale);
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
                for (i, head) in part.heads.clone().enumerate() {
                    rows_of.fetch_share(places.len() + at.saturating_sub(range.start), i);
                    let tile = sources(values, &places, &range, at, head, d);
                    let mix = &mut mix.values[i * rows * lanes..][..rows * lanes];
                    weigh_rows::<V, P>(&scores[i * rows..], &tile, &bounds, mix, at);
                }
            }
            total.merge(&mix);
        }
        total
    }
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
    /// Asks for all heads of some positions.
    #[inline(always)]
    fn fetch(&self, positions: Range<usize>) {
        for index in positions {
            let (operand, index) = match index.checked_sub(self.places.len()) {
                None => (self.keys, index),
                Some(index) => (self.values, index),
            };
            if let Some(&place) = self.places.get(index) {
                for head in self.heads.clone() {
                    prefetch(operand.head(place, head, self.d));
                }
            }
        }
    }

    /// Asks for the positions ahead of a tile, a part of them with each head.
    #[inline(always)]
    fn fetch_share(&self, at: usize, head: usize) {
        let share = |head: usize| at + AHEAD + head * TILE / self.heads.len();
        self.fetch(share(head)..share(head + 1));
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
) {
    let lanes = tile[0].len();
    for row in (0..bounds.len()).step_by(ROWS) {
        let block = ROWS.min(bounds.len() - row);
        if bounds[row..row + block].iter().any(|bounds| !within(bounds, at).is_empty()) {
            let (queries, scores) = (&queries[row * lanes..], &mut scores[row..]);
            match block {
                1 => score::<V, P, 1>(queries, tile, scores, at, scale),
                2 => score::<V, P, 2>(queries, tile, scores, at, scale),
                _ => score::<V, P, ROWS>(queries, tile, scores, at, scale),
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
) {
    let lanes = tile[0].len();
    let mut row = 0;
    while row < bounds.len() {
        let keys = within(&bounds[row], at);
        let alike = bounds[row..].iter().take(ROWS).take_while(|bounds| within(bounds, at) == keys).count();
        let (weights, mix) = (&weights[row..], &mut mix[row * lanes..]);
        match alike {
            1 => weigh::<V, P, 1>(weights, tile, mix, at, keys),
            2 => weigh::<V, P, 2>(weights, tile, mix, at, keys),
            _ => weigh::<V, P, ROWS>(weights, tile, mix, at, keys),
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
) {
    const COLUMNS: usize = 4;
    let lanes = tile[0].len();
    let mut column = 0;
    while column + COLUMNS <= lanes {
        weigh_columns::<V, P, R, COLUMNS>(weights, tile, mix, at, keys.clone(), column);
        column += COLUMNS;
    }
    while column < lanes {
        weigh_columns::<V, P, R, 1>(weights, tile, mix, at, keys.clone(), column);
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

//! Attention on the CPU: threads over blocks of queries, lanes along heads and keys.
//!
//! A block is some tokens of one sequence and the query heads that share one key head, so that keys and values
//! are read once for all of them. Keys come in chunks of [`CHUNK`] positions, on a grid from position 0. Each
//! chunk is attended to on its own, which gives a maximum, a sum and a mix of values for every query, and these
//! are merged in the order of the chunks, as in Flash-Decoding (Dao et al., 2023). What a query gets therefore
//! depends on its own position alone: not on the queries beside it in the block, and not on whether one thread
//! ran the chunks of its block or several.

use std::ops::Range;

use rayon::prelude::*;

use super::AttentionParams;
use crate::Batch;
use crate::batch::Sequence;
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, load, prefetch, store};

/// Key positions of one chunk.
const CHUNK: usize = 128;

/// Keys widened at a time: they stay in the first-level cache while all rows of a block use them.
const TILE: usize = LANES;

/// Most rows that one register tile takes.
const ROWS: usize = 3;

/// Keys that are fetched ahead of use: about as many bytes as memory delivers within its latency.
const AHEAD: usize = 16;

/// Rows that a block aims at; a row is one query head of one token.
const BLOCK_ROWS: usize = 48;

/// Multiplications below which waking threads does not pay.
const SERIAL: usize = 1 << 18;

/// `[rows, heads, d]` with the last dimension contiguous.
pub struct Operand<'a, T> {
    pub data: &'a [T],
    /// Elements from one row to the next, and from one head to the next.
    pub strides: [usize; 2],
}

impl<'a, T> Operand<'a, T> {
    #[inline(always)]
    fn head(&self, row: usize, head: usize, d: usize) -> &'a [T] {
        &self.data[row * self.strides[0] + head * self.strides[1]..][..d]
    }
}

/// Attention of the batch's queries `T`, rows of which are tokens, over keys and values `P`.
pub struct Attention<'a, T, P> {
    pub q: Operand<'a, T>,
    /// Rows are tokens, or with `block_size` the positions of all pages.
    pub keys: Operand<'a, P>,
    pub values: Operand<'a, P>,
    pub block_size: Option<usize>,
    pub hq: usize,
    pub hk: usize,
    pub d: usize,
    pub batch: &'a Batch,
    pub params: AttentionParams,
}

/// Consecutive tokens of a sequence, the query heads of one key head, and where their results go.
struct Block<'a, T> {
    sequence: &'a Sequence,
    head: usize,
    tokens: Range<usize>,
    out: Vec<&'a mut [T]>,
}

impl<T: Stored, P: Stored> Attention<'_, T, P> {
    /// `[N, hq, d]`
    pub fn run(&self) -> Vec<T> {
        let mut out = vec![T::round(0.0); self.batch.num_tokens() * self.hq * self.d];
        let blocks = self.blocks(&mut out);
        let work: usize = self.batch.host.iter().map(|sequence| sequence.tokens.len() * sequence.context_len).sum();
        if work * self.hq * self.d < SERIAL {
            blocks.into_iter().for_each(|block| self.block(block, false))
        } else {
            let few = blocks.len() < 4 * rayon::current_num_threads();
            blocks.into_par_iter().for_each(|block| self.block(block, few))
        }
        out
    }

    fn blocks<'a>(&'a self, out: &'a mut [T]) -> Vec<Block<'a, T>> {
        let group = self.hq / self.hk;
        let mut out = out.chunks_exact_mut(group * self.d);
        let mut blocks: Vec<Block<T>> = Vec::new();
        for sequence in &self.batch.host {
            for start in sequence.tokens.clone().step_by(BLOCK_ROWS.div_ceil(group)) {
                let tokens = start..sequence.tokens.end.min(start + BLOCK_ROWS.div_ceil(group));
                let first = blocks.len();
                for head in 0..self.hk {
                    blocks.push(Block { sequence, head, tokens: tokens.clone(), out: Vec::new() });
                }
                for _ in tokens {
                    for (block, out) in blocks[first..].iter_mut().zip(&mut out) {
                        block.out.push(out);
                    }
                }
            }
        }
        blocks
    }

    fn block(&self, block: Block<T>, split: bool) {
        let Block { sequence, head, tokens, out } = block;
        let seen: Vec<Range<usize>> =
            tokens.clone().map(|token| self.params.visible(sequence.position(token), sequence.context_len)).collect();
        // Both ends of what is seen move forward from token to token.
        let chunks = seen[0].start / CHUNK..seen[seen.len() - 1].end.div_ceil(CHUNK);
        let attend =
            |chunks| dispatch(Attend { attention: self, sequence, head, tokens: &tokens, seen: &seen, chunks });
        let mix = if split {
            let parts: Vec<Mix> = chunks.into_par_iter().map(|chunk| attend(chunk..chunk + 1)).collect();
            let mut parts = parts.into_iter();
            let mut mix = parts.next().expect("a query sees at least itself");
            parts.for_each(|part| mix.merge(&part));
            mix
        } else {
            attend(chunks)
        };
        dispatch(Write { mix, out, d: self.d });
    }
}

/// What the rows of a block make of some keys.
struct Mix {
    /// Of the scores.
    max: Vec<f32>,
    /// Of `exp(score - max)`.
    sum: Vec<f32>,
    /// `[rows, d]` values weighted by `exp(score - max)`, `d` in lanes.
    values: Vec<[f32; LANES]>,
}

impl Mix {
    /// Of no keys.
    fn new(rows: usize, lanes: usize) -> Self {
        Self { max: vec![f32::NEG_INFINITY; rows], sum: vec![0.0; rows], values: vec![[0.0; LANES]; rows * lanes] }
    }

    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.values.fill([0.0; LANES]);
    }

    /// Adds what the same rows make of later keys.
    #[inline(always)]
    fn merge(&mut self, later: &Self) {
        let lanes = self.values.len() / self.sum.len();
        let values = self.values.chunks_exact_mut(lanes).zip(later.values.chunks_exact(lanes));
        for (row, (values, later_values)) in values.enumerate() {
            if later.sum[row] == 0.0 {
                continue;
            }
            let max = self.max[row].max(later.max[row]);
            let (a, b) = ((self.max[row] - max).exp(), (later.max[row] - max).exp());
            self.max[row] = max;
            self.sum[row] = self.sum[row] * a + later.sum[row] * b;
            for (x, y) in values.as_flattened_mut().iter_mut().zip(later_values.as_flattened()) {
                *x = *x * a + y * b;
            }
        }
    }
}

/// One block over some chunks of keys.
struct Attend<'a, T, P> {
    attention: &'a Attention<'a, T, P>,
    sequence: &'a Sequence,
    head: usize,
    tokens: &'a Range<usize>,
    /// Positions that each token sees.
    seen: &'a [Range<usize>],
    chunks: Range<usize>,
}

impl<T: Stored, P: Stored> Kernel for Attend<'_, T, P> {
    type Output = Mix;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Mix {
        let Attention { ref q, hq, hk, d, params, .. } = *self.attention;
        let (group, lanes) = (hq / hk, d.div_ceil(LANES));
        let rows = self.tokens.len() * group;
        let mut queries = vec![[0.0; LANES]; rows * lanes];
        for (row, query) in queries.chunks_exact_mut(lanes).enumerate() {
            widen::<V, T>(q.head(self.tokens.start + row / group, self.head * group + row % group, d), query);
        }
        let mut rows = Rows {
            queries,
            lanes,
            bounds: vec![0..0; rows],
            scores: vec![[0.0; CHUNK]; rows],
            mix: Mix::new(rows, lanes),
        };
        // Widening a tile pays if several tiles of rows then use it.
        let in_place = rows.bounds.len() <= ROWS && d.is_multiple_of(LANES);
        let mut wide = vec![[0.0; LANES]; if in_place { 0 } else { TILE * lanes }];
        let mut total = Mix::new(rows.bounds.len(), lanes);
        for start in self.chunks.clone().map(|chunk| chunk * CHUNK) {
            let clip = |position: usize| position.clamp(start, start + CHUNK) - start;
            for (row, bounds) in rows.bounds.iter_mut().enumerate() {
                let seen = &self.seen[row / group];
                *bounds = clip(seen.start)..clip(seen.end);
            }
            let keys = Keys::new(&self, start, rows.bounds[0].start..rows.bounds[rows.bounds.len() - 1].end);
            for at in keys.tiles() {
                let sources = keys.tile(at, Part::Keys);
                if in_place {
                    rows.score::<V, P>(&sources.map(|source| source.as_chunks().0), at, params.scale);
                } else {
                    rows.score::<V, f32>(&widen_tile::<V, P>(&sources, &mut wide), at, params.scale);
                }
            }
            rows.softmax::<V>(params.softcap);
            for at in keys.tiles() {
                let sources = keys.tile(at, Part::Values);
                if in_place {
                    rows.weigh::<V, P>(&sources.map(|source| source.as_chunks().0), at);
                } else {
                    rows.weigh::<V, f32>(&widen_tile::<V, P>(&sources, &mut wide), at);
                }
            }
            total.merge(&rows.mix);
        }
        total
    }
}

/// The keys and values of one chunk that a block sees.
struct Keys<'a, P> {
    keys: &'a Operand<'a, P>,
    values: &'a Operand<'a, P>,
    d: usize,
    head: usize,
    /// Within the chunk.
    range: Range<usize>,
    /// Rows of the operands that hold them.
    places: Vec<usize>,
}

#[derive(Clone, Copy, PartialEq)]
enum Part {
    Keys,
    Values,
}

impl<'a, P> Keys<'a, P> {
    fn new<T>(block: &Attend<'a, T, P>, start: usize, range: Range<usize>) -> Self {
        let Attention { ref keys, ref values, d, .. } = *block.attention;
        let sequence = block.sequence;
        let positions = start + range.start..start + range.end;
        let places = match block.attention.block_size {
            None => positions.map(|position| sequence.tokens.start + position).collect(),
            Some(size) => {
                positions.map(|position| sequence.blocks[position / size] as usize * size + position % size).collect()
            }
        };
        let keys = Self { keys, values, d, head: block.head, range, places };
        keys.prefetch(0..AHEAD);
        keys
    }

    /// Where the tiles begin, on a grid over the chunk.
    fn tiles(&self) -> impl Iterator<Item = usize> + use<P> {
        (self.range.start / TILE * TILE..self.range.end).step_by(TILE)
    }

    /// The tile at `at`; in the place of keys that nobody sees stands one that somebody does.
    #[inline(always)]
    fn tile(&self, at: usize, part: Part) -> [&'a [P]; TILE] {
        let (operand, fetched) = match part {
            Part::Keys => (self.keys, 0),
            Part::Values => (self.values, self.places.len()),
        };
        let ahead = fetched + at.saturating_sub(self.range.start) + AHEAD;
        self.prefetch(ahead..ahead + TILE);
        std::array::from_fn(|key| {
            let key = (at + key).clamp(self.range.start, self.range.end - 1) - self.range.start;
            operand.head(self.places[key], self.head, self.d)
        })
    }

    /// Prefetches by index into the keys with the values behind them.
    #[inline(always)]
    fn prefetch(&self, indices: Range<usize>) {
        for index in indices {
            let (operand, index) = match index.checked_sub(self.places.len()) {
                None => (self.keys, index),
                Some(index) => (self.values, index),
            };
            if let Some(&place) = self.places.get(index) {
                prefetch(operand.head(place, self.head, self.d));
            }
        }
    }
}

#[inline(always)]
fn widen<V: Lanes, T: Stored>(source: &[T], target: &mut [[f32; LANES]]) {
    let (whole, rest) = source.as_chunks();
    for (target, source) in target.iter_mut().zip(whole) {
        T::load::<V>(source).store(target);
    }
    if !rest.is_empty() {
        load::<V, T>(rest).store(&mut target[whole.len()]);
    }
}

#[inline(always)]
fn widen_tile<'a, V: Lanes, T: Stored>(source: &[&[T]; TILE], wide: &'a mut [[f32; LANES]]) -> Tile<'a, f32> {
    let lanes = wide.len() / TILE;
    for (source, target) in source.iter().zip(wide.chunks_exact_mut(lanes)) {
        widen::<V, T>(source, target);
    }
    std::array::from_fn(|key| &wide[key * lanes..][..lanes])
}

/// Some keys or values of one head.
type Tile<'a, E> = [&'a [[E; LANES]]; TILE];

/// The rows of a block at work on a chunk.
struct Rows {
    /// `[rows, lanes]`
    queries: Vec<[f32; LANES]>,
    lanes: usize,
    /// Keys of the chunk that each row sees.
    bounds: Vec<Range<usize>>,
    /// Defined within `bounds`.
    scores: Vec<[f32; CHUNK]>,
    mix: Mix,
}

impl Rows {
    /// Scores the tile at `at`.
    #[inline(always)]
    fn score<V: Lanes, E: Stored>(&mut self, tile: &Tile<E>, at: usize, scale: f32) {
        let mut row = 0;
        while row < self.bounds.len() {
            let block = ROWS.min(self.bounds.len() - row);
            if self.bounds[row..row + block].iter().any(|bounds| !within(bounds, at).is_empty()) {
                let (queries, scores) = (&self.queries[row * self.lanes..], &mut self.scores[row..]);
                match block {
                    1 => score::<V, E, 1>(queries, tile, scores, at, scale),
                    2 => score::<V, E, 2>(queries, tile, scores, at, scale),
                    _ => score::<V, E, ROWS>(queries, tile, scores, at, scale),
                }
            }
            row += block;
        }
    }

    /// From scores to weights; forgets the mix of the chunk before.
    #[inline(always)]
    fn softmax<V: Lanes>(&mut self, softcap: Option<f32>) {
        self.mix.clear();
        for (row, bounds) in self.bounds.iter().enumerate() {
            if !bounds.is_empty() {
                (self.mix.max[row], self.mix.sum[row]) = softmax::<V>(&mut self.scores[row], bounds, softcap);
            }
        }
    }

    /// Mixes in the values of the tile at `at`. A value that a row does not see has no weight in it, not even
    /// zero: it may be NaN.
    #[inline(always)]
    fn weigh<V: Lanes, E: Stored>(&mut self, tile: &Tile<E>, at: usize) {
        let mut row = 0;
        while row < self.bounds.len() {
            let keys = within(&self.bounds[row], at);
            let alike = self.bounds[row..].iter().take(ROWS).take_while(|bounds| within(bounds, at) == keys).count();
            let (weights, values) = (&self.scores[row..], &mut self.mix.values[row * self.lanes..]);
            match alike {
                1 => weigh::<V, E, 1>(weights, tile, values, at, keys),
                2 => weigh::<V, E, 2>(weights, tile, values, at, keys),
                _ => weigh::<V, E, ROWS>(weights, tile, values, at, keys),
            }
            row += alike;
        }
    }
}

/// The part of `bounds` within the tile at `at`.
fn within(bounds: &Range<usize>, at: usize) -> Range<usize> {
    bounds.start.max(at)..bounds.end.min(at + TILE)
}

/// The scores of `R` rows with a tile of keys.
#[inline(always)]
fn score<V: Lanes, E: Stored, const R: usize>(
    queries: &[[f32; LANES]],
    tile: &Tile<E>,
    scores: &mut [[f32; CHUNK]],
    at: usize,
    scale: f32,
) {
    // With three rows twelve sums, three queries and a key fill the sixteen registers of AVX2.
    const KEYS: usize = 4;
    let lanes = tile[0].len();
    let queries: [&[_]; R] = std::array::from_fn(|row| &queries[row * lanes..][..lanes]);
    for half in [0, KEYS] {
        let keys: [&[_]; KEYS] = std::array::from_fn(|key| &tile[half + key][..lanes]);
        let mut sums = [[V::splat(0.0); KEYS]; R];
        for i in 0..lanes {
            let mut query = [V::splat(0.0); R];
            for row in 0..R {
                query[row] = V::load(&queries[row][i]);
            }
            for k in 0..KEYS {
                let key: V = E::load(&keys[k][i]);
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

/// Replaces the scores within `bounds` by `exp(score - max)`; returns the greatest and the sum.
#[inline(always)]
fn softmax<V: Lanes>(scores: &mut [f32; CHUNK], bounds: &Range<usize>, softcap: Option<f32>) -> (f32, f32) {
    let all = bounds.start / LANES * LANES..bounds.end.next_multiple_of(LANES);
    if let Some(cap) = softcap {
        // tanh(x) = 2 sigmoid(2 x) - 1
        for lanes in scores[all.clone()].as_chunks_mut::<LANES>().0 {
            let sigmoid = V::load(lanes).mul(V::splat(2.0 / cap)).sigmoid();
            sigmoid.mul_add(V::splat(2.0 * cap), V::splat(-cap)).store(lanes);
        }
    }
    scores[all.start..bounds.start].fill(f32::NEG_INFINITY);
    scores[bounds.end..all.end].fill(f32::NEG_INFINITY);
    let (scores, _) = scores[all].as_chunks_mut::<LANES>();
    let mut max = V::splat(f32::NEG_INFINITY);
    for lanes in scores.iter() {
        max = V::load(lanes).max(max);
    }
    let max = max.greatest();
    let mut sum = V::splat(0.0);
    for lanes in scores.iter_mut() {
        let weights = V::load(lanes).sub(V::splat(max)).exp();
        weights.store(lanes);
        sum = sum.add(weights);
    }
    (max, sum.sum())
}

/// Adds the weighted values of `keys` to `R` rows.
#[inline(always)]
fn weigh<V: Lanes, E: Stored, const R: usize>(
    weights: &[[f32; CHUNK]],
    tile: &Tile<E>,
    mix: &mut [[f32; LANES]],
    at: usize,
    keys: Range<usize>,
) {
    const COLUMNS: usize = 4;
    let lanes = tile[0].len();
    let mut column = 0;
    while column + COLUMNS <= lanes {
        weigh_columns::<V, E, R, COLUMNS>(weights, tile, mix, at, keys.clone(), column);
        column += COLUMNS;
    }
    while column < lanes {
        weigh_columns::<V, E, R, 1>(weights, tile, mix, at, keys.clone(), column);
        column += 1;
    }
}

#[inline(always)]
fn weigh_columns<V: Lanes, E: Stored, const R: usize, const C: usize>(
    weights: &[[f32; CHUNK]],
    tile: &Tile<E>,
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
            let value: V = E::load(&value[c]);
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

/// Divides by the sums and rounds, `out` in pieces of whole rows.
struct Write<'a, T> {
    mix: Mix,
    out: Vec<&'a mut [T]>,
    d: usize,
}

impl<T: Stored> Kernel for Write<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let lanes = self.d.div_ceil(LANES);
        let rows = self.mix.values.chunks_exact(lanes).zip(&self.mix.sum);
        let out = self.out.into_iter().flat_map(|out| out.chunks_exact_mut(self.d));
        for ((values, &sum), out) in rows.zip(out) {
            let factor = V::splat(1.0 / sum);
            for (values, out) in values.iter().zip(out.chunks_mut(LANES)) {
                store(V::load(values).mul(factor), out);
            }
        }
    }
}

/// Copies row `n` of `rows`, `[heads, d]`, to row `slots[n]` of `pages`, rounded if pages are of another dtype.
pub struct WriteRows<'a, T, P> {
    pub pages: &'a mut [P],
    pub rows: Operand<'a, T>,
    pub heads: usize,
    pub d: usize,
    pub slots: &'a [u32],
}

impl<T: Stored, P: Stored> Kernel for WriteRows<'_, T, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { pages, rows, heads, d, slots } = self;
        for (row, &slot) in slots.iter().enumerate() {
            let page = &mut pages[slot as usize * heads * d..][..heads * d];
            for (head, page) in page.chunks_exact_mut(d).enumerate() {
                for (source, target) in rows.head(row, head, d).chunks(LANES).zip(page.chunks_mut(LANES)) {
                    store(load::<V, T>(source), target);
                }
            }
        }
    }
}

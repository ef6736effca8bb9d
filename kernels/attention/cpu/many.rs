//! Many queries: a block of them meets the keys and values of a chunk in the register tiles of the products.
//!
//! Keys are widened and turned, values widened, once for the block. A register then holds one lane of the scores of
//! eight keys, or eight values; see `linear::tile`, whose order of additions the scores have.

use std::marker::PhantomData;
use std::ops::Range;

use super::{Attention, CHUNK, Mix, Part, greatest_score, merge_sums, to_weights};
use crate::linear::cpu::aligned;
use crate::linear::tile::{AsRows, OnLines, Sums, Tile};
use crate::simd::{Kernel, LANES, Lanes, Stored, load, prefetch_far};

/// The scores of a tile by row and then by key, and then the weights.
type Scores<const R: usize> = [[f32; CHUNK]; R];

/// The mix of a block with one key head, in register tiles `M` of `R` rows times `O` keys or columns of values.
pub(super) struct Many<'a, T, P, M, const R: usize, const O: usize> {
    part: &'a Part<'a, T, P>,
    /// `[tiles, LANES, groups]` queries, turned; in the place of missing rows stand others.
    queries: &'a mut [[f32; R]],
    /// `[LANES, groups]` keys, turned, likewise.
    keys: &'a mut [[f32; O]],
    /// Columns of the values; beyond the last one anything.
    values: &'a mut [[f32; O]; CHUNK],
    /// `[tiles]`, defined where a row sees the key.
    scores: &'a mut [Scores<R>],
    tile: PhantomData<M>,
}

impl<'a, T: Stored, P: Stored, M: Tile<R, O>, const R: usize, const O: usize> Many<'a, T, P, M, R, O> {
    pub fn new(part: &'a Part<'a, T, P>, scratch: &'a mut Vec<f32>) -> Self {
        let d = part.attention.d;
        let (rows, columns) = (part.rows().next_multiple_of(R), d.next_multiple_of(LANES));
        let lens = [columns * O, CHUNK * O, rows * CHUNK, rows * columns];
        let (keys, scratch) = aligned(scratch, lens.iter().sum()).split_at_mut(lens[0]);
        let (values, scratch) = scratch.split_at_mut(lens[1]);
        let (scores, queries) = scratch.split_at_mut(lens[2]);
        Self {
            part,
            queries: queries.as_chunks_mut().0,
            keys: keys.as_chunks_mut().0,
            values: &mut values.as_chunks_mut().0.as_chunks_mut().0[0],
            scores: scores.as_chunks_mut().0.as_chunks_mut().0,
            tile: PhantomData,
        }
    }
}

impl<T: Stored, P: Stored, M: Tile<R, O>, const R: usize, const O: usize> Kernel for Many<'_, T, P, M, R, O> {
    type Output = Mix;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Mix {
        let Self { part, queries, keys, values, scores, .. } = self;
        let Attention { keys: ref key_rows, values: ref value_rows, d, params, .. } = *part.attention;
        let (rows, groups, head) = (part.rows(), d.div_ceil(LANES), part.block.heads.start);
        let tile_rows = |tile: usize| tile * R..rows.min((tile + 1) * R);
        for (tile, target) in queries.chunks_exact_mut(LANES * groups).enumerate() {
            let mut sources = [&[][..]; R];
            for (source, row) in sources.iter_mut().zip(tile * R..) {
                *source = part.query(head, row.min(rows - 1));
            }
            turn::<V, T, R>(&sources, target);
        }
        let mut total = Mix::new(rows, groups);
        let mut factors = vec![[0.0; 2]; rows];
        let mut max = vec![0.0; rows];
        let mut places = Vec::new();
        for chunk in part.chunks.clone() {
            let bounds: Vec<Range<usize>> = (0..rows).map(|row| part.bounds(chunk, row)).collect();
            let range = part.find(chunk, &mut places);
            let place = |key: usize| places[key - range.start];

            for first in (range.start / O * O..range.end).step_by(O) {
                let mut sources = [&[][..]; O];
                for (source, key) in sources.iter_mut().zip(first..) {
                    let place = place(key.clamp(range.start, range.end - 1));
                    *source = key_rows.head(place, head, d);
                    prefetch_far(value_rows.head(place, head, d));
                }
                turn::<V, P, O>(&sources, keys);
                for key in first + O..(first + 2 * O).min(range.end) {
                    prefetch_far(key_rows.head(place(key), head, d));
                }
                for (tile, queries) in queries.chunks_exact(LANES * groups).enumerate() {
                    let rows = tile_rows(tile);
                    if bounds[rows.start].start < first + O && first < bounds[rows.end - 1].end {
                        M::dots::<V, CHUNK>(queries, keys, params.scale, &mut scores[tile], first);
                    }
                }
            }

            for (tile, scores) in scores.iter_mut().enumerate() {
                // All of the greatest first: weights of one row after the other would wait for each.
                for (row, scores) in tile_rows(tile).zip(scores.iter_mut()) {
                    if !bounds[row].is_empty() {
                        max[row] = greatest_score::<V>(scores, &bounds[row], params.softcap);
                    }
                }
                for (row, scores) in tile_rows(tile).zip(scores.iter_mut()) {
                    if !bounds[row].is_empty() {
                        let sum = to_weights::<V>(scores, &bounds[row], max[row]);
                        factors[row] = merge_sums(&mut total.max[row], &mut total.sum[row], max[row], sum);
                    }
                }
            }

            for column in 0..d.div_ceil(O) {
                for key in range.clone() {
                    let source = value_rows.head(place(key), head, d)[column * O..].chunks(LANES);
                    for (source, target) in source.zip(values[key].as_chunks_mut().0) {
                        load::<V, P>(source).store(target);
                    }
                }
                for (tile, scores) in scores.iter().enumerate() {
                    let rows = tile_rows(tile);
                    let OnLines(mixed) = weigh::<V, M, R, O>(scores, values, &bounds[rows.clone()]);
                    for (row, mixed) in rows.zip(&mixed) {
                        if bounds[row].is_empty() {
                            continue;
                        }
                        let [a, b] = factors[row];
                        let totals = total.values[row * groups..][..groups][column * O / LANES..].iter_mut();
                        for (total, mixed) in totals.zip(mixed.as_chunks().0) {
                            V::load(total).mul(V::splat(a)).add(V::load(mixed).mul(V::splat(b))).store(total);
                        }
                    }
                }
            }
        }
        total
    }
}

/// The keys that all rows of a tile see, beyond the chunk if there are none.
fn common(bounds: &[Range<usize>]) -> Range<usize> {
    // Both ends move forward from row to row.
    let common = bounds[bounds.len() - 1].start..bounds[0].end;
    if common.is_empty() { CHUNK..CHUNK } else { common }
}

/// `R` rows of one length to `[LANES, groups]`, so that the values of a lane lie one after the other.
#[inline(always)]
fn turn<V: Lanes, T: Stored, const R: usize>(sources: &[&[T]; R], target: &mut [[f32; R]]) {
    let (groups, whole) = (target.len() / LANES, sources[0].len() / LANES);
    for first in (0..R).step_by(LANES) {
        let mut rows = [&sources[first].as_chunks::<LANES>().0[..whole]; LANES];
        for i in 1..LANES.min(R - first) {
            rows[i] = &sources[first + i].as_chunks().0[..whole];
        }
        for group in 0..groups {
            let mut eight = [V::splat(0.0); LANES];
            for i in 0..LANES {
                eight[i] = match group < whole {
                    true => T::load(&rows[i][group]),
                    false => load(&sources[(first + i).min(R - 1)][whole * LANES..]),
                };
            }
            let turned = V::transpose(eight);
            for lane in 0..LANES {
                let target = &mut target[lane * groups + group][first..];
                match target.first_chunk_mut() {
                    Some(target) => turned[lane].store(target),
                    None => {
                        let mut values = [0.0; LANES];
                        turned[lane].store(&mut values);
                        target.iter_mut().zip(values).for_each(|(target, value)| *target = value);
                    }
                }
            }
        }
    }
}

/// The sums of `O` columns of the values, weighted for the rows of a tile, in the order of the keys. A value that a row
/// does not see has no weight in it, not even zero: it may be NaN.
#[inline(always)]
fn weigh<V: Lanes, M: Tile<R, O>, const R: usize, const O: usize>(
    weights: &Scores<R>,
    values: &[[f32; O]; CHUNK],
    bounds: &[Range<usize>],
) -> OnLines<Sums<R, O>> {
    let mut sums = OnLines([[0.0; O]; R]);
    let common = common(bounds);
    for ((keys, weights), sums) in bounds.iter().zip(weights).zip(&mut sums.0) {
        weigh_row::<V, O>(weights, values, keys.start..keys.end.min(common.start), sums);
    }
    let steps = AsRows { rows: weights, first: common.start };
    M::multiply::<V>(steps, &values[common.clone()], false, 0, std::slice::from_mut(&mut sums.0));
    for ((keys, weights), sums) in bounds.iter().zip(weights).zip(&mut sums.0) {
        weigh_row::<V, O>(weights, values, keys.start.max(common.end)..keys.end, sums);
    }
    sums
}

#[inline(always)]
fn weigh_row<V: Lanes, const O: usize>(
    weights: &[f32; CHUNK],
    values: &[[f32; O]; CHUNK],
    keys: Range<usize>,
    sums: &mut [f32; O],
) {
    if keys.is_empty() {
        return;
    }
    for (column, sums) in sums.as_chunks_mut().0.iter_mut().enumerate() {
        let mut sum = V::load(sums);
        for key in keys.clone() {
            sum = V::splat(weights[key]).mul_add(V::load(&values[key].as_chunks().0[column]), sum);
        }
        sum.store(sums);
    }
}

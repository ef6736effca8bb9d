//! Many queries: a block of them meets the keys and values of a chunk in the register tiles of the products.
//!
//! Keys are widened and turned, values widened, once for the block. A register then holds one lane of the scores of
//! eight keys, or eight values; see `linear::tile`, whose order of additions the scores have.

use std::marker::PhantomData;
use std::ops::Range;

use super::form::Form;
use super::{Attention, CHUNK, Mix, Part, greatest_score, merge_sums, to_weights};
use crate::linear::cpu::aligned;
use crate::linear::tile::{AsRows, OnLines, Sums, Tile};
use crate::simd::{Kernel, LANES, Lanes, PAIR, Stored, Vector, prefetch_far};

/// The scores of a tile by row and then by key, and then the weights.
type Scores<const R: usize> = [[f32; CHUNK]; R];

/// The mix of a block with one key head, in register tiles `M` of `R` rows times `O` keys or columns of values.
pub(super) struct Many<'a, T, P, F, M, const R: usize, const O: usize> {
    part: &'a Part<'a, T, P>,
    /// `[tiles, LANES, groups]` queries, turned; in the place of missing rows stand others.
    queries: &'a mut [[f32; R]],
    /// `[LANES, groups]` keys, turned, likewise.
    keys: &'a mut [[f32; O]],
    /// Columns of the values; beyond the last one anything.
    values: &'a mut [[f32; O]; CHUNK],
    /// `[tiles]`, defined where a row sees the key.
    scores: &'a mut [Scores<R>],
    form: PhantomData<(F, M)>,
}

impl<'a, T: Stored, P: Stored, F: Form, M: Tile<R, O>, const R: usize, const O: usize> Many<'a, T, P, F, M, R, O> {
    pub fn new(part: &'a Part<'a, T, P>, scratch: &'a mut Vec<f32>) -> Self {
        let (rows, groups) = (part.rows().next_multiple_of(R), part.attention.d.div_ceil(F::GROUP));
        let lens = [LANES * groups * O, CHUNK * O, rows * CHUNK, rows * LANES * groups];
        let (keys, scratch) = aligned(scratch, lens.iter().sum()).split_at_mut(lens[0]);
        let (values, scratch) = scratch.split_at_mut(lens[1]);
        let (scores, queries) = scratch.split_at_mut(lens[2]);
        Self {
            part,
            queries: queries.as_chunks_mut().0,
            keys: keys.as_chunks_mut().0,
            values: &mut values.as_chunks_mut().0.as_chunks_mut().0[0],
            scores: scores.as_chunks_mut().0.as_chunks_mut().0,
            form: PhantomData,
        }
    }
}

impl<T, P, F, M, const R: usize, const O: usize> Kernel for Many<'_, T, P, F, M, R, O>
where
    T: Stored,
    P: Stored,
    F: Form,
    M: Tile<R, O>,
{
    type Output = Mix;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Mix {
        let Self { part, queries, keys, values, scores, .. } = self;
        let Attention { keys: ref key_rows, values: ref value_rows, d, params, .. } = *part.attention;
        let (rows, head) = (part.rows(), part.block.heads.start);
        let (groups, lanes) = (d.div_ceil(F::GROUP), d.div_ceil(LANES));
        let tile_rows = |tile: usize| tile * R..rows.min((tile + 1) * R);
        for (tile, target) in queries.chunks_exact_mut(LANES * groups).enumerate() {
            let mut sources = [&[][..]; R];
            for (source, row) in sources.iter_mut().zip(tile * R..) {
                *source = part.query(head, row.min(rows - 1));
                prefetch_far(part.query(head, (row + R).min(rows - 1)));
            }
            turn::<V, F, T, R>(&sources, target);
        }
        let mut total = Mix::new(rows, lanes);
        let mut factors = vec![[0.0; 2]; rows];
        let mut max = vec![0.0; rows];
        let mut places = Vec::new();
        let mixed = &mut OnLines([[0.0; O]; R]);
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
                turn::<V, F, P, O>(&sources, keys);
                for key in first + O..(first + 2 * O).min(range.end) {
                    prefetch_far(key_rows.head(place(key), head, d));
                }
                for (tile, queries) in queries.chunks_exact(LANES * groups).enumerate() {
                    let rows = tile_rows(tile);
                    if bounds[rows.start].start < first + O && first < bounds[rows.end - 1].end {
                        M::dots::<V, F::Products, CHUNK>(queries, keys, params.scale, &mut scores[tile], first);
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
                        let sum = to_weights::<V, F>(scores, &bounds[row], max[row]);
                        F::arrange::<V>(scores);
                        factors[row] = merge_sums(&mut total.max[row], &mut total.sum[row], max[row], sum);
                    }
                }
            }

            for column in 0..d.div_ceil(O) {
                for pair in range.start / 2..range.end.div_ceil(2) {
                    let mut both = [&[][..]; 2];
                    for (value, key) in both.iter_mut().zip(2 * pair..) {
                        let place = place(key.clamp(range.start, range.end - 1));
                        *value = &value_rows.head(place, head, d)[column * O..];
                    }
                    F::lay::<V, P, O>(pair, both, values);
                }
                for (tile, scores) in scores.iter().enumerate() {
                    let rows = tile_rows(tile);
                    if bounds[rows.clone()].iter().all(Range::is_empty) {
                        continue;
                    }
                    weigh::<V, F, M, R, O>(scores, values, &bounds[rows.clone()], &mut mixed.0);
                    for (row, mixed) in rows.zip(&mixed.0) {
                        if bounds[row].is_empty() {
                            continue;
                        }
                        let [a, b] = factors[row];
                        let totals = total.values[row * lanes..][..lanes][column * O / LANES..].iter_mut();
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

/// The pairs of keys that all rows of a tile see, beyond the chunk if there are none.
fn common(bounds: &[Range<usize>]) -> Range<usize> {
    // Both ends move forward from row to row.
    let common = bounds[bounds.len() - 1].start.next_multiple_of(2)..bounds[0].end / 2 * 2;
    if common.is_empty() { CHUNK..CHUNK } else { common }
}

/// `R` rows of one length to `[LANES, groups]`, so that the values of a lane lie one after the other.
#[inline(always)]
fn turn<V: Lanes, F: Form, T: Stored, const R: usize>(sources: &[&[T]; R], target: &mut [[f32; R]]) {
    let groups = target.len() / LANES;
    for first in (0..R).step_by(LANES) {
        for group in 0..groups {
            let mut eight = [V::splat(0.0); LANES];
            for i in 0..LANES {
                eight[i] = F::load(sources[(first + i).min(R - 1)], group);
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

/// Makes `sums` those of `O` columns of the values, weighted for the rows of a tile, in the order of the keys. A value
/// that a row does not see has no weight in it, not even zero: it may be NaN.
#[inline(always)]
fn weigh<V: Lanes, F: Form, M: Tile<R, O>, const R: usize, const O: usize>(
    weights: &Scores<R>,
    values: &[[f32; O]; CHUNK],
    bounds: &[Range<usize>],
    sums: &mut Sums<R, O>,
) {
    let common = common(bounds);
    let starts_there = bounds.iter().all(|keys| keys.start >= common.start);
    if !starts_there {
        sums.as_flattened_mut().fill(0.0);
        for ((keys, weights), sums) in bounds.iter().zip(weights).zip(&mut *sums) {
            weigh_row::<V, F, O>(weights, values, keys.start..keys.end.min(common.start), sums);
        }
    }
    let places = F::places(common.clone());
    let steps = AsRows { rows: weights, first: places.start };
    M::multiply::<V, F::Products>(steps, &values[places], starts_there, 0, std::slice::from_mut(sums));
    for ((keys, weights), sums) in bounds.iter().zip(weights).zip(sums) {
        weigh_row::<V, F, O>(weights, values, keys.start.max(common.end)..keys.end, sums);
    }
}

#[inline(always)]
fn weigh_row<V: Lanes, F: Form, const O: usize>(
    weights: &[f32; CHUNK],
    values: &[[f32; O]; CHUNK],
    keys: Range<usize>,
    sums: &mut [f32; O],
) {
    if keys.is_empty() {
        return;
    }
    for (columns, sums) in sums.as_chunks_mut::<PAIR>().0.iter_mut().enumerate() {
        let mut sum = V::Pair::read(sums);
        for pair in keys.start / 2..keys.end.div_ceil(2) {
            for key in if F::IS_PAIRED { [2 * pair + 1, 2 * pair] } else { [2 * pair, 2 * pair + 1] } {
                if keys.contains(&key) {
                    let value = F::value::<V::Pair, O>(values, key, columns * PAIR);
                    sum = F::weight::<V::Pair>(weights, key).mul_add(value, sum);
                }
            }
        }
        sum.write(sums);
    }
}

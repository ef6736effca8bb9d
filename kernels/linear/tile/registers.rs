//! The arithmetic of a tile, for registers of any width: two of them hold a row of its outputs.

use super::{OnLines, Products, Steps, Sums, fold};
use crate::simd::{LANES, Vector};

/// As [`super::Tile::multiply`].
#[inline(always)]
pub fn multiply<V: Vector, P: Products, const R: usize, const O: usize>(
    x: impl Steps<R>,
    weights: &[[f32; O]],
    fresh: bool,
    folded: usize,
    sums: &mut [Sums<R, O>],
) {
    let Some((last, earlier)) = sums.split_last() else { return };
    let mut total = [[V::splat(0.0); 2]; R];
    if !fresh {
        for (total, last) in total.iter_mut().zip(last) {
            *total = load(last);
        }
    }
    for (step, weights) in weights.iter().enumerate() {
        let weights = load(weights);
        for (row, total) in total.iter_mut().enumerate() {
            *total = add_products::<V, P>(x.value(step, row), weights, *total);
        }
    }
    let kept = earlier.len() - folded;
    for earlier in earlier[kept..].iter().rev() {
        for (total, earlier) in total.iter_mut().zip(earlier) {
            *total = add(load(earlier), *total);
        }
    }
    for (total, target) in total.into_iter().zip(&mut sums[kept]) {
        store(total, target);
    }
}

/// As [`super::Tile::dots`], two lanes at a time with `HALF` of the rows: the first of a tree's additions are between
/// registers. With few steps a tile's sums leave the registers too often otherwise.
#[inline(always)]
pub fn dots<V: Vector, P: Products, const R: usize, const HALF: usize, const O: usize, const L: usize>(
    x: &[[f32; R]],
    weights: &[[f32; O]],
    scale: f32,
    target: &mut [[f32; L]; R],
    first: usize,
) {
    const PAIRS: usize = LANES / 2;
    let groups = weights.len() / LANES;
    for (half, target) in target.as_chunks_mut::<HALF>().0.iter_mut().enumerate() {
        let OnLines(pending) = &mut OnLines([[[0.0; O]; HALF]; PAIRS.ilog2() as usize]);
        for pair in 0..PAIRS {
            let lanes = 2 * pair * groups..2 * (pair + 1) * groups;
            let (even_x, odd_x) = x[lanes.clone()].split_at(groups);
            let (even_weights, odd_weights) = weights[lanes].split_at(groups);
            let mut even = [[V::splat(0.0); 2]; HALF];
            let mut odd = even;
            let evens = even_x.iter().zip(even_weights);
            for ((even_x, even_weights), (odd_x, odd_weights)) in evens.zip(odd_x.iter().zip(odd_weights)) {
                let (even_x, odd_x) = (&even_x.as_chunks::<HALF>().0[half], &odd_x.as_chunks::<HALF>().0[half]);
                let weights = load(even_weights);
                for row in 0..HALF {
                    even[row] = add_products::<V, P>(even_x[row], weights, even[row]);
                }
                let weights = load(odd_weights);
                for row in 0..HALF {
                    odd[row] = add_products::<V, P>(odd_x[row], weights, odd[row]);
                }
            }
            for (even, odd) in even.iter_mut().zip(odd) {
                *even = add(*even, odd);
            }
            let (waiting, folded) = fold(pair);
            for earlier in pending[waiting - folded..waiting].iter().rev() {
                for (even, earlier) in even.iter_mut().zip(earlier) {
                    *even = add(load(earlier), *even);
                }
            }
            if pair + 1 < PAIRS {
                for (even, pending) in even.into_iter().zip(&mut pending[waiting - folded]) {
                    store(even, pending);
                }
                continue;
            }
            let scale = V::splat(scale);
            for ([left, right], target) in even.into_iter().zip(&mut *target) {
                store([left.mul(scale), right.mul(scale)], &mut target[first..][..O]);
            }
        }
    }
}

#[inline(always)]
fn add_products<V: Vector, P: Products>(x: f32, [left, right]: [V; 2], sums: [V; 2]) -> [V; 2] {
    let x = V::splat(x);
    [P::add(x, left, sums[0]), P::add(x, right, sums[1])]
}

#[inline(always)]
fn add<V: Vector>(a: [V; 2], b: [V; 2]) -> [V; 2] {
    [a[0].add(b[0]), a[1].add(b[1])]
}

#[inline(always)]
fn load<V: Vector>(values: &[f32]) -> [V; 2] {
    let (left, right) = values.split_at(V::WIDTH);
    [V::read(left), V::read(right)]
}

#[inline(always)]
fn store<V: Vector>(row: [V; 2], target: &mut [f32]) {
    let (left, right) = target.split_at_mut(V::WIDTH);
    row[0].write(left);
    row[1].write(right);
}

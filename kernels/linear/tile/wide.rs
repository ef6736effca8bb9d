//! The register tile of AVX-512.

use std::arch::x86_64::*;

use super::{OnLines, Steps, Sums, Tile, fold};
use crate::simd::{LANES, Lanes};

/// Twenty-four accumulators of thirty-two registers. Only where the machine has AVX-512 F.
pub struct Wide;

const ROWS: usize = 12;
const OUTS: usize = 32;

/// A row of a tile.
type Row = [__m512; OUTS / 16];

impl Tile<ROWS, OUTS> for Wide {
    const STRETCH: usize = 128;

    #[inline(always)]
    fn multiply<V: Lanes>(
        x: impl Steps<ROWS>,
        weights: &[[f32; OUTS]],
        fresh: bool,
        folded: usize,
        sums: &mut [Sums<ROWS, OUTS>],
    ) {
        // SAFETY: whoever names the type has found the feature.
        unsafe { multiply(x, weights, fresh, folded, sums) }
    }

    #[inline(always)]
    fn dots<V: Lanes, const L: usize>(
        x: &[[f32; ROWS]],
        weights: &[[f32; OUTS]],
        scale: f32,
        target: &mut [[f32; L]; ROWS],
        first: usize,
    ) {
        // SAFETY: as above.
        unsafe { dots(x, weights, scale, target, first) }
    }
}

#[target_feature(enable = "avx512f")]
fn multiply(x: impl Steps<ROWS>, weights: &[[f32; OUTS]], fresh: bool, folded: usize, sums: &mut [Sums<ROWS, OUTS>]) {
    let Some((last, earlier)) = sums.split_last() else { return };
    let mut total = [[_mm512_setzero_ps(); 2]; ROWS];
    if !fresh {
        for (total, last) in total.iter_mut().zip(last) {
            *total = load(last);
        }
    }
    for (step, weights) in weights.iter().enumerate() {
        let weights = load(weights);
        for (row, total) in total.iter_mut().enumerate() {
            *total = add_products(x.value(step, row), weights, *total);
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

/// Two lanes at a time with half of the rows: the first of a tree's additions are between registers. With few steps a
/// tile's sums leave the registers too often otherwise.
#[target_feature(enable = "avx512f")]
fn dots<const L: usize>(
    x: &[[f32; ROWS]],
    weights: &[[f32; OUTS]],
    scale: f32,
    target: &mut [[f32; L]; ROWS],
    first: usize,
) {
    const HALF: usize = ROWS / 2;
    const PAIRS: usize = LANES / 2;
    let groups = weights.len() / LANES;
    for (half, target) in target.as_chunks_mut::<HALF>().0.iter_mut().enumerate() {
        let OnLines(pending) = &mut OnLines([[[0.0; OUTS]; HALF]; PAIRS.ilog2() as usize]);
        for pair in 0..PAIRS {
            let lanes = 2 * pair * groups..2 * (pair + 1) * groups;
            let (even_x, odd_x) = x[lanes.clone()].split_at(groups);
            let (even_weights, odd_weights) = weights[lanes].split_at(groups);
            let mut even = [[_mm512_setzero_ps(); 2]; HALF];
            let mut odd = even;
            let evens = even_x.iter().zip(even_weights);
            for ((even_x, even_weights), (odd_x, odd_weights)) in evens.zip(odd_x.iter().zip(odd_weights)) {
                let (even_x, odd_x) = (&even_x.as_chunks::<HALF>().0[half], &odd_x.as_chunks::<HALF>().0[half]);
                let (even_weights, odd_weights) = (load(even_weights), load(odd_weights));
                for row in 0..HALF {
                    even[row] = add_products(even_x[row], even_weights, even[row]);
                    odd[row] = add_products(odd_x[row], odd_weights, odd[row]);
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
            let scale = _mm512_set1_ps(scale);
            for ([first_half, second_half], target) in even.into_iter().zip(&mut *target) {
                if let Some(target) = target[first..].first_chunk_mut() {
                    store([_mm512_mul_ps(first_half, scale), _mm512_mul_ps(second_half, scale)], target);
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn add_products(x: f32, [first, second]: Row, sums: Row) -> Row {
    let x = _mm512_set1_ps(x);
    [_mm512_fmadd_ps(x, first, sums[0]), _mm512_fmadd_ps(x, second, sums[1])]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn add(a: Row, b: Row) -> Row {
    [_mm512_add_ps(a[0], b[0]), _mm512_add_ps(a[1], b[1])]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32; OUTS]) -> Row {
    let halves = values.as_chunks::<16>().0;
    // SAFETY: a register covers exactly half of the array.
    unsafe { [_mm512_loadu_ps(halves[0].as_ptr()), _mm512_loadu_ps(halves[1].as_ptr())] }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(row: Row, target: &mut [f32; OUTS]) {
    for (row, target) in row.into_iter().zip(target.as_chunks_mut::<16>().0) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(target.as_mut_ptr(), row) }
    }
}

//! The form in which keys and values meet queries and weights.

use std::ops::Range;

use super::CHUNK;
use crate::linear::tile::{Dot, MulAdd, Products};
use crate::simd::{Kernel, LANES, Lanes, PAIR, Stored, Vector, dispatch, dispatch_dots, load, load_dots, load_pair};

pub(super) trait Form {
    /// Whether weights are rounded to bf16, and those of odd positions come before those of even ones.
    const IS_PAIRED: bool;
    /// Elements of a head in a group of lanes.
    const GROUP: usize;
    /// Of what is in a place.
    type Products: Products;

    fn dispatch<K: Kernel>(kernel: K) -> K::Output {
        dispatch(kernel)
    }

    /// A group of a head, with zeros beyond its end.
    fn load<V: Lanes, T: Stored>(head: &[T], group: usize) -> V;

    /// Puts values at positions `2 pair` and `2 pair + 1`, of which there are up to `O` columns, in their places.
    fn lay<V: Lanes, P: Stored, const O: usize>(pair: usize, values: [&[P]; 2], target: &mut [[f32; O]; CHUNK]);

    /// The places of values, and of weights, at positions of whole pairs.
    fn places(keys: Range<usize>) -> Range<usize>;

    /// Columns of the value at `key`, from `column` on.
    fn value<V: Vector, const O: usize>(values: &[[f32; O]; CHUNK], key: usize, column: usize) -> V;

    /// Puts weights in their places.
    fn arrange<V: Lanes>(weights: &mut [f32; CHUNK]);

    /// The weight of `key`.
    fn weight<V: Vector>(weights: &[f32; CHUNK], key: usize) -> V;
}

/// As they are.
pub(super) struct Plain;

impl Form for Plain {
    const IS_PAIRED: bool = false;
    const GROUP: usize = LANES;
    type Products = MulAdd;

    #[inline(always)]
    fn load<V: Lanes, T: Stored>(head: &[T], group: usize) -> V {
        load(&head[group * LANES..head.len().min((group + 1) * LANES)])
    }
    #[inline(always)]
    fn lay<V: Lanes, P: Stored, const O: usize>(pair: usize, values: [&[P]; 2], target: &mut [[f32; O]; CHUNK]) {
        for (values, target) in values.into_iter().zip(&mut target[2 * pair..]) {
            for (values, target) in values.chunks(LANES).zip(target.as_chunks_mut().0) {
                load::<V, P>(values).store(target);
            }
        }
    }
    #[inline(always)]
    fn places(keys: Range<usize>) -> Range<usize> {
        keys
    }
    #[inline(always)]
    fn value<V: Vector, const O: usize>(values: &[[f32; O]; CHUNK], key: usize, column: usize) -> V {
        V::read(&values[key][column..])
    }
    #[inline(always)]
    fn arrange<V: Lanes>(_: &mut [f32; CHUNK]) {}
    #[inline(always)]
    fn weight<V: Vector>(weights: &[f32; CHUNK], key: usize) -> V {
        V::splat(weights[key])
    }
}

/// For keys and values in bf16, where a product of two of them takes less time than two products: queries and weights are
/// rounded to bf16 as well, and two values share a place, elements `2 i` and `2 i + 1` of a head or the values at
/// positions `2 i` and `2 i + 1`, the odd one above. Its product is added first.
pub(super) struct Dots;

impl Form for Dots {
    const IS_PAIRED: bool = true;
    const GROUP: usize = PAIR;
    type Products = Dot;

    fn dispatch<K: Kernel>(kernel: K) -> K::Output {
        dispatch_dots(kernel)
    }

    #[inline(always)]
    fn load<V: Lanes, T: Stored>(head: &[T], group: usize) -> V {
        load_dots(&head[group * PAIR..])
    }
    #[inline(always)]
    fn lay<V: Lanes, P: Stored, const O: usize>(pair: usize, [even, odd]: [&[P]; 2], target: &mut [[f32; O]; CHUNK]) {
        let values = even.chunks(LANES).zip(odd.chunks(LANES));
        for ((even, odd), target) in values.zip(target[pair].as_chunks_mut().0) {
            V::join(load(odd), load(even)).store(target);
        }
    }
    #[inline(always)]
    fn places(keys: Range<usize>) -> Range<usize> {
        keys.start / 2..keys.end / 2
    }
    #[inline(always)]
    fn value<V: Vector, const O: usize>(values: &[[f32; O]; CHUNK], key: usize, column: usize) -> V {
        let both: V = Plain::value(values, key / 2, column);
        if key.is_multiple_of(2) { both.lower() } else { both.upper() }
    }
    #[inline(always)]
    fn arrange<V: Lanes>(weights: &mut [f32; CHUNK]) {
        for pairs in 0..CHUNK / PAIR {
            let both = V::narrow(load_pair::<V, f32>(&weights[pairs * PAIR..][..PAIR]));
            both.store(&mut weights.as_chunks_mut().0[pairs]);
        }
    }
    #[inline(always)]
    fn weight<V: Vector>(weights: &[f32; CHUNK], key: usize) -> V {
        let both: V = Plain::weight(weights, key / 2);
        if key.is_multiple_of(2) { both.lower() } else { both.upper() }
    }
}

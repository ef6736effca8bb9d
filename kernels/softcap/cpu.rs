//! The softcap on the CPU: threads over pieces of the tensor, lanes along it.

use candle_core::{Layout, Result};

use crate::cpu::{fill_rows, view};
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, load, store};

/// `x` contiguous.
pub fn softcap<T: Stored>(x: &[T], layout: &Layout, cap: f32) -> Result<Vec<T>> {
    let x = view(x, layout)?;
    let out = fill_rows(x.len(), LANES, |first, out| dispatch(Piece { x: &x[first * LANES..][..out.len()], cap, out }));
    Ok(out)
}

struct Piece<'a, T> {
    x: &'a [T],
    cap: f32,
    out: &'a mut [T],
}

impl<T: Stored> Kernel for Piece<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let (inner, outer, shift) = (V::splat(2.0 / self.cap), V::splat(2.0 * self.cap), V::splat(-self.cap));
        for (x, out) in self.x.chunks(LANES).zip(self.out.chunks_mut(LANES)) {
            // tanh(x) = 2 sigmoid(2 x) - 1
            store(load::<V, T>(x).mul(inner).sigmoid().mul_add(outer, shift), out);
        }
    }
}

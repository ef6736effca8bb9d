//! The sum on the CPU: threads over pieces of the tensors, lanes along them.

use crate::cpu::fill_rows;
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, load, store};

/// `x` and `y` of one length.
pub fn add<T: Stored>(x: &[T], y: &[T]) -> Vec<T> {
    fill_rows(x.len(), LANES, |first, out| {
        let piece = first * LANES..first * LANES + out.len();
        dispatch(Piece { x: &x[piece.clone()], y: &y[piece], out })
    })
}

struct Piece<'a, T> {
    x: &'a [T],
    y: &'a [T],
    out: &'a mut [T],
}

impl<T: Stored> Kernel for Piece<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        for ((x, y), out) in self.x.chunks(LANES).zip(self.y.chunks(LANES)).zip(self.out.chunks_mut(LANES)) {
            store(load::<V, T>(x).add(load::<V, T>(y)), out);
        }
    }
}

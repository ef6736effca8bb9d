//! The rotation on the CPU: threads over heads, lanes along a head.

use candle_core::{Layout, Result};

use crate::cpu::{RowStarts, fill_rows};
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, load, store};

/// `x` `[N, heads, d]`; `cos`, `sin` `[N, half]`.
pub fn rope<T: Stored>(x: &[T], layout: &Layout, cos: &[f32], sin: &[f32], half: usize) -> Result<Vec<T>> {
    let (_, heads, d) = layout.shape().dims3()?;
    let rows = RowStarts::new(layout)?;
    let out = fill_rows(layout.shape().elem_count(), d, |first, out| {
        for (row, out) in (first..).zip(out.chunks_exact_mut(d)) {
            let angles = row / heads * half;
            let (cos, sin) = (&cos[angles..][..half], &sin[angles..][..half]);
            dispatch(Head { x: &x[rows.start(row)..][..d], cos, sin, out });
        }
    });
    Ok(out)
}

/// A head of a token, whose result is rounded to `Y`.
pub struct Head<'a, T, Y> {
    pub x: &'a [T],
    /// `[half]`
    pub cos: &'a [f32],
    /// `[half]`
    pub sin: &'a [f32],
    pub out: &'a mut [Y],
}

impl<T: Stored, Y: Stored> Kernel for Head<'_, T, Y> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let half = self.cos.len();
        let (a, b) = self.x.split_at(half);
        let (b, kept) = b.split_at(half);
        let (y, z) = self.out.split_at_mut(half);
        let (z, out) = z.split_at_mut(half);
        for (kept, out) in kept.chunks(LANES).zip(out.chunks_mut(LANES)) {
            store(load::<V, T>(kept), out);
        }
        let pairs = a.chunks(LANES).zip(b.chunks(LANES));
        let angles = self.cos.chunks(LANES).zip(self.sin.chunks(LANES));
        let rotated = y.chunks_mut(LANES).zip(z.chunks_mut(LANES));
        for (((a, b), (cos, sin)), (y, z)) in pairs.zip(angles).zip(rotated) {
            let (a, b): (V, V) = (load(a), load(b));
            let (cos, sin): (V, V) = (load(cos), load(sin));
            store(a.mul(cos).sub(b.mul(sin)), y);
            store(b.mul(cos).add(a.mul(sin)), z);
        }
    }
}

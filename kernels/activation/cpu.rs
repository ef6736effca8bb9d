//! The gated activation on the CPU: threads over rows, lanes along a row.

use candle_core::{Layout, Result};

use super::Activation;
use crate::cpu::{RowStarts, fill_rows};
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, load, store};

/// `gate_up` `[N, 2 * width]`.
pub fn gated_activation<T: Stored>(gate_up: &[T], layout: &Layout, activation: Activation) -> Result<Vec<T>> {
    let (n, width) = layout.shape().dims2()?;
    let width = width / 2;
    let rows = RowStarts::new(layout)?;
    let mut out = vec![T::round(0.0); n * width];
    fill_rows(&mut out, width, |first, out| {
        for (row, out) in (first..).zip(out.chunks_exact_mut(width.max(1))) {
            let (gate, up) = gate_up[rows.start(row)..][..2 * width].split_at(width);
            dispatch(Row { gate, up, activation, out });
        }
    });
    Ok(out)
}

struct Row<'a, T> {
    gate: &'a [T],
    up: &'a [T],
    activation: Activation,
    out: &'a mut [T],
}

impl<T: Stored> Kernel for Row<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let operands = self.gate.chunks(LANES).zip(self.up.chunks(LANES));
        for ((gate, up), out) in operands.zip(self.out.chunks_mut(LANES)) {
            let gate: V = load(gate);
            let logit = match self.activation {
                Activation::Silu => gate,
                // 0.5 (1 + tanh(z)) = sigmoid(2 z), which loses nothing where tanh is near -1.
                Activation::GeluTanh => {
                    let cubic = gate.mul(gate).mul_add(V::splat(0.044715), V::splat(1.0));
                    gate.mul(V::splat(2.0 * (2.0 / std::f32::consts::PI).sqrt())).mul(cubic)
                }
            };
            store(gate.mul(logit.sigmoid()).mul(load(up)), out);
        }
    }
}

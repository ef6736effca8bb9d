//! The activations on the CPU: threads over rows, lanes along a row.

use candle_core::{Layout, Result};

use super::Activation;
use crate::cpu::{RowStarts, fill_rows};
use crate::simd::{Kernel, Lanes, PAIR, Stored, Vector, dispatch, load_pair, store_pair};

/// `gate_up` `[N, 2 * width]`.
pub fn gated_activation<T: Stored>(gate_up: &[T], layout: &Layout, activation: Activation) -> Result<Vec<T>> {
    let (n, width) = layout.shape().dims2()?;
    let width = width / 2;
    let rows = RowStarts::new(layout)?;
    let out = fill_rows(n * width, width, |first, out| {
        for (row, out) in (first..).zip(out.chunks_exact_mut(width.max(1))) {
            let (gate, up) = gate_up[rows.start(row)..][..2 * width].split_at(width);
            dispatch(Row { gate, up, activation, out });
        }
    });
    Ok(out)
}

/// `x` `[.., d]`.
pub fn gelu<T: Stored>(x: &[T], layout: &Layout) -> Result<Vec<T>> {
    let d = layout.dims().last().copied().unwrap_or(0);
    let rows = RowStarts::new(layout)?;
    let out = fill_rows(layout.shape().elem_count(), d, |first, out| {
        for (row, out) in (first..).zip(out.chunks_exact_mut(d.max(1))) {
            dispatch(Gelu { x: &x[rows.start(row)..][..d], out });
        }
    });
    Ok(out)
}

/// `x` and `gate` `[.., d]`.
pub fn sigmoid_gated<T: Stored>((x, xl): (&[T], &Layout), (gate, gl): (&[T], &Layout)) -> Result<Vec<T>> {
    let d = xl.dims().last().copied().unwrap_or(0);
    let (x_rows, gate_rows) = (RowStarts::new(xl)?, RowStarts::new(gl)?);
    let out = fill_rows(xl.shape().elem_count(), d, |first, out| {
        for (row, out) in (first..).zip(out.chunks_exact_mut(d.max(1))) {
            let (x, gate) = (&x[x_rows.start(row)..][..d], &gate[gate_rows.start(row)..][..d]);
            dispatch(SigmoidGated { x, gate, out });
        }
    });
    Ok(out)
}

struct SigmoidGated<'a, T> {
    x: &'a [T],
    gate: &'a [T],
    out: &'a mut [T],
}

impl<T: Stored> Kernel for SigmoidGated<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let operands = self.x.chunks(PAIR).zip(self.gate.chunks(PAIR));
        for ((x, gate), out) in operands.zip(self.out.chunks_mut(PAIR)) {
            let gate = load_pair::<V, T>(gate).sigmoid();
            store_pair::<V, T>(gate.mul(load_pair::<V, T>(x)), out);
        }
    }
}

struct Gelu<'a, T> {
    x: &'a [T],
    out: &'a mut [T],
}

impl<T: Stored> Kernel for Gelu<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let zero = V::Pair::splat(0.0);
        for (x, out) in self.x.chunks(PAIR).zip(self.out.chunks_mut(PAIR)) {
            let x = load_pair::<V, T>(x);
            let distance = zero.sub(x).max(x);
            // What the unit keeps back, from 0 on the left and from x on the right: in this form neither end loses
            // digits.
            let tail = distance.mul(V::Pair::splat(0.5)).mul(erfc_of_root(distance));
            store_pair::<V, T>(zero.max(x).sub(tail), out);
        }
    }
}

/// `1 - erf(x / sqrt(2))` for `x` from 0 up, within 4e-7 of itself and 1e-7 more for each unit of the exponent, `x^2`.
///
/// Source: the Chebyshev fit of Press et al., "Numerical Recipes", 2nd edition, section 6.2, whose own error is 1.2e-7.
#[inline(always)]
fn erfc_of_root<V: Vector>(x: V) -> V {
    const FIT: [f32; 9] = [
        -0.822_152_23,
        1.488_515_9,
        -1.135_204,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_7,
        -1.265_512_2,
    ];
    let one = V::splat(1.0);
    let t = one.div(x.mul_add(V::splat(0.5 * std::f32::consts::FRAC_1_SQRT_2), one));
    let mut exponent = V::splat(0.170_872_77);
    for coefficient in FIT {
        exponent = exponent.mul_add(t, V::splat(coefficient));
    }
    t.mul(x.mul(V::splat(-0.5)).mul_add(x, exponent).exp())
}

/// A row of a gate and of what it multiplies.
pub struct Row<'a, T> {
    pub gate: &'a [T],
    pub up: &'a [T],
    pub activation: Activation,
    pub out: &'a mut [T],
}

impl<T: Stored> Kernel for Row<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let operands = self.gate.chunks(PAIR).zip(self.up.chunks(PAIR));
        for ((gate, up), out) in operands.zip(self.out.chunks_mut(PAIR)) {
            let gate = load_pair::<V, T>(gate);
            let logit = match self.activation {
                Activation::Silu => gate,
                // 0.5 (1 + tanh(z)) = sigmoid(2 z), which loses nothing where tanh is near -1.
                Activation::GeluTanh => {
                    let cubic = gate.mul(gate).mul_add(V::Pair::splat(0.044715), V::Pair::splat(1.0));
                    gate.mul(V::Pair::splat(2.0 * (2.0 / std::f32::consts::PI).sqrt())).mul(cubic)
                }
            };
            store_pair::<V, T>(gate.mul(logit.sigmoid()).mul(load_pair::<V, T>(up)), out);
        }
    }
}

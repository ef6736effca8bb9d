//! The norms on the CPU: threads over rows, lanes along a row.

use candle_core::{CpuStorage, Error, Layout, Result};

use crate::cpu::{RowStarts, fill_rows, read_f32};
use crate::simd::{
    Kernel, LANES, Lanes, PAIR, Stored, Vector, dispatch, load, load_pair, store, store_pair, sum_of_squares,
};

/// `x` of elements `T` in rows as long as `weight`, normalised, and gated where there is a gate.
pub fn rms_norm<T: Stored>(
    x: (&CpuStorage, &Layout),
    gate: Option<(&CpuStorage, &Layout)>,
    weight: (&CpuStorage, &Layout),
    eps: f32,
) -> Result<CpuStorage> {
    let weight = &*read_f32(weight.0, weight.1)?;
    let d = weight.len();
    let (x, rows, len) = (x.0.as_slice::<T>()?, RowStarts::new(x.1)?, x.1.shape().elem_count());
    let gate =
        gate.map(|(gate, layout)| Ok::<_, Error>((gate.as_slice::<T>()?, RowStarts::new(layout)?))).transpose()?;
    let out = fill_rows(len, d, |first, out| {
        for (row, out) in (first..).zip(out.chunks_exact_mut(d.max(1))) {
            let x = &x[rows.start(row)..][..d];
            let gate = gate.as_ref().map(|(gate, rows)| &gate[rows.start(row)..][..d]);
            dispatch(Row { x, gate, weight, eps, out });
        }
    });
    Ok(T::to_cpu_storage_owned(out))
}

/// The sum of `x` and `residual`, of elements `T` in rows as long as `weight` and `bias`, layer-normalised.
pub fn add_layer_norm<T: Stored>(
    x: (&CpuStorage, &Layout),
    residual: (&CpuStorage, &Layout),
    weight: (&CpuStorage, &Layout),
    bias: &[f32],
    eps: f32,
) -> Result<CpuStorage> {
    let weight = &*read_f32(weight.0, weight.1)?;
    let d = weight.len();
    let (x, rows, len) = (x.0.as_slice::<T>()?, RowStarts::new(x.1)?, x.1.shape().elem_count());
    let (residual, residual_rows) = (residual.0.as_slice::<T>()?, RowStarts::new(residual.1)?);
    let out = fill_rows(len, d, |first, out| {
        let mut sum = vec![0.0; d];
        for (row, out) in (first..).zip(out.chunks_exact_mut(d.max(1))) {
            let x = &x[rows.start(row)..][..d];
            let residual = &residual[residual_rows.start(row)..][..d];
            dispatch(LayerNormRow { x, residual, weight, bias, eps, sum: &mut sum, out });
        }
    });
    Ok(T::to_cpu_storage_owned(out))
}

struct LayerNormRow<'a, T> {
    x: &'a [T],
    residual: &'a [T],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    /// Of any content.
    sum: &'a mut [f32],
    out: &'a mut [T],
}

impl<T: Stored> Kernel for LayerNormRow<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let d = self.x.len() as f32;
        let mut total = V::splat(0.0);
        for ((x, residual), sum) in
            self.x.chunks(LANES).zip(self.residual.chunks(LANES)).zip(self.sum.chunks_mut(LANES))
        {
            let s = load::<V, T>(x).add(load::<V, T>(residual));
            total = total.add(s);
            store(s, sum);
        }
        let mean = V::splat(total.sum() / d);
        for sum in self.sum.chunks_mut(LANES) {
            let centred = load::<V, f32>(sum).sub(mean);
            store(centred, sum);
        }
        let variance = sum_of_squares::<V, f32>(self.sum) / d;
        let scale = V::splat(1.0 / (variance + self.eps).sqrt());
        let operands = self.sum.chunks(LANES).zip(self.weight.chunks(LANES)).zip(self.bias.chunks(LANES));
        for (((centred, weight), bias), out) in operands.zip(self.out.chunks_mut(LANES)) {
            let y = load::<V, f32>(centred).mul(scale).mul_add(load(weight), load(bias));
            store(y, out);
        }
    }
}

/// A row of the RMS norm.
pub struct Row<'a, T> {
    pub x: &'a [T],
    pub gate: Option<&'a [T]>,
    pub weight: &'a [f32],
    pub eps: f32,
    pub out: &'a mut [T],
}

impl<T: Stored> Kernel for Row<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let mean = sum_of_squares::<V, T>(self.x) / self.x.len() as f32;
        let scale = V::Pair::splat(1.0 / (mean + self.eps).sqrt());
        let operands = self.x.chunks(PAIR).zip(self.weight.chunks(PAIR));
        for (i, ((x, weight), out)) in operands.zip(self.out.chunks_mut(PAIR)).enumerate() {
            let mut y = load_pair::<V, T>(x).mul(scale).mul(load_pair::<V, f32>(weight));
            if let Some(gate) = self.gate {
                let gate = load_pair::<V, T>(&gate[i * PAIR..][..x.len()]);
                y = y.mul(gate.mul(gate.sigmoid()));
            }
            store_pair::<V, T>(y, out);
        }
    }
}

//! The norms on the CPU: threads over rows, lanes along a row.

use candle_core::{CpuStorage, Error, Layout, Result};

use crate::cpu::{RowStarts, fill_rows, read_f32};
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, load, store, sum_of_squares};

/// `x` of elements `T` in rows as long as `weight`, normalised, and gated where there is a gate.
pub fn rms_norm<T: Stored>(
    x: (&CpuStorage, &Layout),
    gate: Option<(&CpuStorage, &Layout)>,
    weight: (&CpuStorage, &Layout),
    eps: f32,
) -> Result<CpuStorage> {
    let weight = &*read_f32(weight.0, weight.1)?;
    let d = weight.len();
    let mut out = vec![T::round(0.0); x.1.shape().elem_count()];
    let (x, rows) = (x.0.as_slice::<T>()?, RowStarts::new(x.1)?);
    let gate =
        gate.map(|(gate, layout)| Ok::<_, Error>((gate.as_slice::<T>()?, RowStarts::new(layout)?))).transpose()?;
    fill_rows(&mut out, d, |first, out| {
        for (row, out) in (first..).zip(out.chunks_exact_mut(d.max(1))) {
            let x = &x[rows.start(row)..][..d];
            let gate = gate.as_ref().map(|(gate, rows)| &gate[rows.start(row)..][..d]);
            dispatch(Row { x, gate, weight, eps, out });
        }
    });
    Ok(T::to_cpu_storage_owned(out))
}

struct Row<'a, T> {
    x: &'a [T],
    gate: Option<&'a [T]>,
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [T],
}

impl<T: Stored> Kernel for Row<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let mean = sum_of_squares::<V, T>(self.x) / self.x.len() as f32;
        let scale = V::splat(1.0 / (mean + self.eps).sqrt());
        let operands = self.x.chunks(LANES).zip(self.weight.chunks(LANES));
        for (i, ((x, weight), out)) in operands.zip(self.out.chunks_mut(LANES)).enumerate() {
            let mut y = load::<V, T>(x).mul(scale).mul(load(weight));
            if let Some(gate) = self.gate {
                let gate: V = load(&gate[i * LANES..][..x.len()]);
                y = y.mul(gate.mul(gate.sigmoid()));
            }
            store(y, out);
        }
    }
}

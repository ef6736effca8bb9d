//! Products with weight matrices.

mod cpu;
#[cfg(test)]
mod reference;
mod simd;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use crate::cpu::{dtype_of, view};
use simd::{Isa, Stored};

/// A linear layer:
///
/// ```text
/// y[n, o] = sum_i x[n, i] * weight[o, i]
/// ```
///
/// `x` `[N, I]` in f32, f16 or bf16; `weight` `[O, I]` as the checkpoint stores it. On the CPU the weight may
/// be of another float dtype than `x`: its elements are widened on the way, so bf16 weights under f32
/// activations lose nothing and take no second copy. Elsewhere the dtypes must agree. Returns `[N, O]` in `x`'s
/// dtype; accumulation in f32, and on the CPU in an order that does not depend on `N`.
///
/// # Errors
///
/// The inner dimensions differ, or the dtypes do on a device other than the CPU.
///
/// Devices: CPU; CUDA and Metal through candle's matmul.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (_, inner) = x.dims2()?;
    if weight.dims2()?.1 != inner {
        bail!("linear: weight is {:?}, expected [O, {inner}] for x {:?}", weight.dims(), x.dims())
    }
    if x.device().is_cpu() {
        return x.contiguous()?.apply_op2_no_bwd(&weight.contiguous()?, &Linear);
    }
    x.matmul(&weight.t()?)
}

struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((n, inner), (outer, _)) = (xl.shape().dims2()?, wl.shape().dims2()?);
        let shape = (n, inner, outer);
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(product(view(x, xl)?, w, wl, shape)?),
            CpuStorage::F16(x) => CpuStorage::F16(product(view(x, xl)?, w, wl, shape)?),
            CpuStorage::BF16(x) => CpuStorage::BF16(product(view(x, xl)?, w, wl, shape)?),
            other => bail!("linear: x is {:?}, expected f32, f16 or bf16", dtype_of(other)),
        };
        Ok((out, (n, outer).into()))
    }
}

fn product<X: Stored>(x: &[X], w: &CpuStorage, wl: &Layout, shape: (usize, usize, usize)) -> Result<Vec<X>> {
    let isa = Isa::detect();
    Ok(match w {
        CpuStorage::F32(w) => cpu::linear(isa, x, view(w, wl)?, shape),
        CpuStorage::F16(w) => cpu::linear(isa, x, view(w, wl)?, shape),
        CpuStorage::BF16(w) => cpu::linear(isa, x, view(w, wl)?, shape),
        other => bail!("linear: weight is {:?}, expected f32, f16 or bf16", dtype_of(other)),
    })
}

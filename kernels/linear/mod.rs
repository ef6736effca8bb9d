//! Products with weight matrices.

pub(crate) mod cpu;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
mod tile;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use crate::cpu::{Operand, view};
use crate::simd::Stored;

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
    check(x, weight)?;
    if x.device().is_cpu() {
        return x.contiguous()?.apply_op2_no_bwd(&weight.contiguous()?, &Linear { bias: None });
    }
    x.matmul(&weight.t()?)
}

/// As [`linear`], plus `bias` `[O]` of `x`'s dtype, added before the one rounding of the CPU.
///
/// # Errors
///
/// As [`linear`]; also if `bias` has another length or dtype.
pub fn linear_with_bias(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    check(x, weight)?;
    if bias.dims() != [weight.dim(0)?] || bias.dtype() != x.dtype() {
        bail!("linear: bias is {:?} {:?}, expected {:?} [{}]", bias.dims(), bias.dtype(), x.dtype(), weight.dim(0)?)
    }
    if x.device().is_cpu() {
        let bias = Some(&bias.contiguous()?);
        return x.contiguous()?.apply_op2_no_bwd(&weight.contiguous()?, &Linear { bias });
    }
    x.matmul(&weight.t()?)?.broadcast_add(bias)
}

fn check(x: &Tensor, weight: &Tensor) -> Result<()> {
    let (_, inner) = x.dims2()?;
    if weight.dims2()?.1 != inner {
        bail!("linear: weight is {:?}, expected [O, {inner}] for x {:?}", weight.dims(), x.dims())
    }
    Ok(())
}

struct Linear<'a> {
    bias: Option<&'a Tensor>,
}

impl CustomOp2 for Linear<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = (xl.shape().dims2()?.0, wl.shape().dims2()?.0).into();
        let bias = self.bias.map(Operand::new);
        let bias = bias.as_ref().map(Operand::f32).transpose()?;
        let bias = bias.as_deref();
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(product(x, xl, w, wl, bias)?),
            CpuStorage::F16(x) => CpuStorage::F16(product(x, xl, w, wl, bias)?),
            CpuStorage::BF16(x) => CpuStorage::BF16(product(x, xl, w, wl, bias)?),
            _ => bail!("linear: x is of another dtype than f32, f16 and bf16"),
        };
        Ok((out, shape))
    }
}

fn product<X: Stored>(x: &[X], xl: &Layout, w: &CpuStorage, wl: &Layout, bias: Option<&[f32]>) -> Result<Vec<X>> {
    let ((n, inner), (outer, _)) = (xl.shape().dims2()?, wl.shape().dims2()?);
    let (x, shape) = (view(x, xl)?, (n, inner, outer));
    Ok(match w {
        CpuStorage::F32(w) => cpu::linear(x, view(w, wl)?, bias, shape),
        CpuStorage::F16(w) => cpu::linear(x, view(w, wl)?, bias, shape),
        CpuStorage::BF16(w) => cpu::linear(x, view(w, wl)?, bias, shape),
        _ => bail!("linear: weight is of another dtype than f32, f16 and bf16"),
    })
}

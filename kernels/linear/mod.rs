//! Products with weight matrices.

#[cfg(any(test, target_arch = "x86_64"))]
mod amx;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
mod cublas;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
pub(crate) mod metal;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
pub(crate) mod tile;
#[cfg(feature = "cuda")]
mod wgmma;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use crate::activation::{Activation, gated_activation, gelu};
use crate::cpu::{Operand, view};
use crate::norm::Norm;
use crate::residual::add;
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
/// dtype; accumulation in f32, and on the CPU in an order that does not depend on `N`. A CPU with AMX takes f16 and f32
/// apart into bf16 values, where what lies below 2^-126 is lost and f32 from 2^112 on, or infinite, becomes NaN.
///
/// # Errors
///
/// The inner dimensions differ, or the dtypes do on a device other than the CPU.
///
/// Devices: CPU; CUDA, of more than 8 rows (16 of a small weight) through cuBLASLt; Metal, of more than 8 rows through
/// candle's matmul.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    linear_around(x, weight, None, Around::default())
}

/// As [`linear`], plus `bias` `[O]` of `x`'s dtype, added before the one rounding of the CPU.
///
/// # Errors
///
/// As [`linear`]; also if `bias` has another length or dtype.
pub fn linear_with_bias(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    linear_around(x, weight, Some(bias), Around::default())
}

/// What surrounds a product in a model. Done with it in one pass where a device can.
#[derive(Clone, Copy, Debug, Default)]
pub struct Around<'a> {
    /// Normalises `x` first.
    pub norm: Option<Norm<'a>>,
    /// Takes the halves of a row of the product as a gate and what it multiplies: [`gated_activation`].
    pub gate: Option<Activation>,
    /// Is added at the end: the residual stream, of the result's shape and dtype.
    pub onto: Option<&'a Tensor>,
}

impl Around<'_> {
    /// Goes step by step around `product`.
    ///
    /// # Errors
    ///
    /// As the norm, the product, the activation and the sum.
    pub fn apply(&self, x: &Tensor, product: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        self.behind(match self.norm {
            Some(norm) => product(&norm.apply(x)?)?,
            None => product(x)?,
        })
    }

    /// Goes step by step behind a product.
    pub(crate) fn behind(&self, y: Tensor) -> Result<Tensor> {
        let y = match self.gate {
            Some(activation) => gated_activation(&y, activation)?,
            None => y,
        };
        match self.onto {
            Some(residual) => add(residual, &y),
            None => Ok(y),
        }
    }

    /// Goes step by step behind a `product` that adds the residual itself, which it is given unless a gate stands between.
    /// `None` if there is no such product. The norm has been applied.
    #[cfg(feature = "cuda")]
    pub(crate) fn behind_sum(
        &self,
        product: impl FnOnce(Option<&Tensor>) -> Result<Option<Tensor>>,
    ) -> Result<Option<Tensor>> {
        match self.gate {
            Some(_) => product(None)?.map(|y| self.behind(y)).transpose(),
            None => product(self.onto),
        }
    }
}

/// As [`linear`], or [`linear_with_bias`], with what surrounds it. On CUDA one kernel does it all, of a few rows in f16
/// and bf16 and one in f32; the norm has a kernel of its own from the second row on, and so has the gate beyond that. On
/// Metal likewise, of up to 8 rows, with a kernel of its own for the norm. It rounds after the norm, before a gate with a
/// kernel of its own, and at the end.
///
/// # Errors
///
/// As [`linear_with_bias`] and [`Around::apply`].
pub fn linear_around(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, around: Around) -> Result<Tensor> {
    check(x, weight, bias)?;
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = x.device()
        && let Some(y) = cuda::linear(device, x, weight, bias, around)?
    {
        return Ok(y);
    }
    #[cfg(any(test, feature = "emulator"))]
    if let Some(emulator) = crate::metal::emulator::emulator()
        && let Some(y) = metal::linear(&emulator, x, weight, bias, around)?
    {
        return Ok(y);
    }
    #[cfg(feature = "metal")]
    if let candle_core::Device::Metal(device) = x.device()
        && let Some(y) = metal::linear(device, x, weight, bias, around)?
    {
        return Ok(y);
    }
    around.apply(x, |x| match bias {
        bias if x.device().is_cpu() => {
            let bias = bias.map(Tensor::contiguous).transpose()?;
            x.contiguous()?.apply_op2_no_bwd(&weight.contiguous()?, &Linear { bias: bias.as_ref() })
        }
        bias => by_candle(x, weight, bias),
    })
}

/// The GELU of [`linear_with_bias`], or of [`linear`]: `[N, O]`. On CUDA of compute capability 9.0 one kernel does both,
/// of many rows in f16 and bf16. It rounds between the two.
///
/// # Errors
///
/// As [`linear_with_bias`].
pub fn linear_gelu(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = x.device() {
        check(x, weight, bias)?;
        if let Some(y) = cuda::linear_gelu(device, x, weight, bias)? {
            return Ok(y);
        }
    }
    gelu(&linear_around(x, weight, bias, Around::default())?)
}

fn check(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let (_, inner) = x.dims2()?;
    let (outer, _) = weight.dims2()?;
    if weight.dim(1)? != inner {
        bail!("linear: weight is {:?}, expected [O, {inner}] for x {:?}", weight.dims(), x.dims())
    }
    if let Some(bias) = bias
        && (bias.dims() != [outer] || bias.dtype() != x.dtype())
    {
        bail!("linear: bias is {:?} {:?}, expected {:?} [{outer}]", bias.dims(), bias.dtype(), x.dtype())
    }
    Ok(())
}

/// The product alone through candle's ops.
pub(crate) fn by_candle(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.contiguous()?.matmul(&weight.t()?)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
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

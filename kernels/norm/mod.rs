//! RMS normalisation, plain and gated, and layer normalisation of a residual sum.
//!
//! Weights are f32 and hold the factor itself: a family whose checkpoint stores `w` for `1 + w` adds the one
//! when it loads, so there is one RMS norm here.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
mod metal;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

#[cfg(feature = "metal")]
use candle_core::MetalStorage;
#[cfg(feature = "metal")]
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

use half::{bf16, f16};

use crate::cpu::{as_rows, with_heads};
use crate::residual::add;

/// The weight `[D]` in f32 and the epsilon of an RMS norm, for ops that do one on the way.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    pub weight: &'a Tensor,
    pub eps: f64,
}

impl Norm<'_> {
    /// [`rms_norm`] by itself.
    ///
    /// # Errors
    ///
    /// As [`rms_norm`].
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, self.weight, self.eps)
    }
}

/// RMS normalisation over the last dimension:
///
/// ```text
/// y = cast(x * rsqrt(mean(x^2) + eps) * weight)        statistics and product in f32, one rounding
/// ```
///
/// `x` `[.., D]` in f32, f16 or bf16; `weight` `[D]` in f32. Returns `x`'s shape and dtype.
///
/// # Errors
///
/// `weight` is not f32 or not as long as the last dimension of `x`.
///
/// Devices: CPU, CUDA, Metal.
///
/// Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    check_weight("rms_norm", x, weight)?;
    let (x, weight) = (as_rows(x)?, weight.contiguous()?);
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = x.device() {
        return cuda::rms_norm(device, &x, &weight, eps as f32, cuda::Then::Nothing);
    }
    x.apply_op2_no_bwd(&weight, &RmsNorm { eps: eps as f32 })
}

/// RMS normalisation followed by a SiLU gate:
///
/// ```text
/// y = cast(x * rsqrt(mean(x^2) + eps) * weight * silu(gate))        in f32, one rounding
/// ```
///
/// `x` and `gate` `[.., D]` of one dtype, of an `x` `[N, H, D]` also a `gate` `[N, H D]`; `weight` `[D]` in f32. Returns
/// `x`'s shape and dtype.
///
/// # Errors
///
/// `gate` differs from `x` in shape or dtype, or `weight` is not f32 `[D]`.
///
/// Devices: CPU, CUDA, Metal.
///
/// Source: the output norm of Gated DeltaNet, <https://arxiv.org/abs/2412.06464>.
pub fn rms_norm_gated(x: &Tensor, gate: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    check_weight("rms_norm_gated", x, weight)?;
    let (x, gate) = (as_rows(x)?, as_rows(gate)?);
    if with_heads(gate.layout(), x.shape()).shape() != x.shape() || gate.dtype() != x.dtype() {
        bail!(
            "rms_norm_gated: gate is {:?} {:?}, expected {:?} {:?} like x",
            gate.dims(),
            gate.dtype(),
            x.dims(),
            x.dtype()
        )
    }
    let weight = weight.contiguous()?;
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = x.device() {
        return cuda::rms_norm(device, &x, &weight, eps as f32, cuda::Then::Gate(&gate));
    }
    x.apply_op3_no_bwd(&gate, &weight, &RmsNormGated { eps: eps as f32 })
}

/// The residual stream behind a block that has its norm behind it:
///
/// ```text
/// y = cast(cast(x + rms_norm(update)) * factor)
/// ```
///
/// `x` and `update` `[.., D]` of one dtype, f32, f16 or bf16. Returns `x`'s shape and dtype.
///
/// # Errors
///
/// `update` differs from `x` in shape or dtype, or the norm's weight is not f32 `[D]`.
///
/// Devices: CUDA; elsewhere the norm, the sum and the product by themselves, with the same roundings.
pub fn add_rms_norm(x: &Tensor, update: &Tensor, norm: Norm, factor: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = x.device() {
        check_weight("add_rms_norm", x, norm.weight)?;
        if update.shape() != x.shape() || update.dtype() != x.dtype() {
            bail!("add_rms_norm: {:?} {:?} is not like x {:?} {:?}", update.dims(), update.dtype(), x.dims(), x.dtype())
        }
        let (x, update, weight) = (as_rows(x)?, as_rows(update)?, norm.weight.contiguous()?);
        return cuda::rms_norm(device, &update, &weight, norm.eps as f32, cuda::Then::Add(&x, factor as f32));
    }
    let sum = add(x, &norm.apply(update)?)?;
    if factor == 1.0 { Ok(sum) } else { sum * factor }
}

/// Layer normalisation of a sum, as a block with its norm behind it needs it:
///
/// ```text
/// s = x + residual
/// y = cast((s - mean(s)) / sqrt(mean((s - mean(s))^2) + eps) * weight + bias)        in f32, one rounding
/// ```
///
/// `x` and `residual` `[.., D]` of one dtype, f32, f16 or bf16; `weight` and `bias` `[D]` in f32. Returns `x`'s shape
/// and dtype.
///
/// # Errors
///
/// `residual` differs from `x` in shape or dtype, or `weight` or `bias` is not f32 `[D]`.
///
/// Devices: CPU, CUDA, Metal.
///
/// Source: Ba et al., "Layer Normalization", 2016.
pub fn add_layer_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    check_weight("add_layer_norm", x, weight)?;
    check_weight("add_layer_norm", x, bias)?;
    if residual.shape() != x.shape() || residual.dtype() != x.dtype() {
        bail!(
            "add_layer_norm: residual is {:?} {:?}, expected {:?} {:?} like x",
            residual.dims(),
            residual.dtype(),
            x.dims(),
            x.dtype()
        )
    }
    let (x, residual, weight, bias) = (as_rows(x)?, as_rows(residual)?, weight.contiguous()?, bias.contiguous()?);
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = x.device() {
        return cuda::add_layer_norm(device, &x, &residual, &weight, &bias, eps as f32);
    }
    on_metal!(x, backend => metal::add_layer_norm(backend, [&x, &residual], [&weight, &bias], eps as f32));
    x.apply_op3_no_bwd(&residual, &weight, &AddLayerNorm { bias: &bias, eps: eps as f32 })
}

fn check_weight(op: &str, x: &Tensor, weight: &Tensor) -> Result<()> {
    if weight.dtype() != DType::F32 || x.dims().last() != Some(&weight.elem_count()) || weight.rank() != 1 {
        bail!("{op}: weight is {:?} {:?}, expected f32 [D] for x {:?}", weight.dims(), weight.dtype(), x.dims())
    }
    Ok(())
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((run("rms_norm", (x, xl), None, (w, wl), self.eps)?, xl.shape().clone()))
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(&self, x: &MetalStorage, xl: &Layout, w: &MetalStorage, wl: &Layout) -> Result<(MetalStorage, Shape)> {
        let out = metal::rms_norm(x.device(), (x, xl), None, (w, wl), self.eps)?;
        Ok((out, xl.shape().clone()))
    }
}

struct RmsNormGated {
    eps: f32,
}

impl CustomOp3 for RmsNormGated {
    fn name(&self) -> &'static str {
        "rms-norm-gated"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        gate: &CpuStorage,
        gl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let gl = &with_heads(gl, xl.shape());
        Ok((run("rms_norm_gated", (x, xl), Some((gate, gl)), (w, wl), self.eps)?, xl.shape().clone()))
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        x: &MetalStorage,
        xl: &Layout,
        gate: &MetalStorage,
        gl: &Layout,
        w: &MetalStorage,
        wl: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let gl = &with_heads(gl, xl.shape());
        let out = metal::rms_norm(x.device(), (x, xl), Some((gate, gl)), (w, wl), self.eps)?;
        Ok((out, xl.shape().clone()))
    }
}

struct AddLayerNorm<'a> {
    bias: &'a Tensor,
    eps: f32,
}

impl CustomOp3 for AddLayerNorm<'_> {
    fn name(&self) -> &'static str {
        "add-layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        residual: &CpuStorage,
        rl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let bias = crate::cpu::Operand::new(self.bias);
        let (residual, weight, bias) = ((residual, rl), (w, wl), &*bias.f32()?);
        let out = match x {
            CpuStorage::F32(_) => cpu::add_layer_norm::<f32>((x, xl), residual, weight, bias, self.eps),
            CpuStorage::F16(_) => cpu::add_layer_norm::<f16>((x, xl), residual, weight, bias, self.eps),
            CpuStorage::BF16(_) => cpu::add_layer_norm::<bf16>((x, xl), residual, weight, bias, self.eps),
            other => bail!("add_layer_norm: x is {:?}, expected f32, f16 or bf16", crate::cpu::dtype_of(other)),
        };
        Ok((out?, xl.shape().clone()))
    }
}

type Operand<'a> = (&'a CpuStorage, &'a Layout);

fn run(op: &str, x: Operand, gate: Option<Operand>, weight: Operand, eps: f32) -> Result<CpuStorage> {
    #[cfg(any(test, feature = "emulator"))]
    if let Some(emulator) = crate::metal::emulator::emulator() {
        return metal::rms_norm(&emulator, x, gate, weight, eps);
    }
    match x.0 {
        CpuStorage::F32(_) => cpu::rms_norm::<f32>(x, gate, weight, eps),
        CpuStorage::F16(_) => cpu::rms_norm::<f16>(x, gate, weight, eps),
        CpuStorage::BF16(_) => cpu::rms_norm::<bf16>(x, gate, weight, eps),
        other => bail!("{op}: x is {:?}, expected f32, f16 or bf16", crate::cpu::dtype_of(other)),
    }
}

//! RMS normalisation, plain and gated, and layer normalisation of a residual sum.
//!
//! Weights are f32 and hold the factor itself: a family whose checkpoint stores `w` for `1 + w` adds the one
//! when it loads, so there is one RMS norm here.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
mod metal;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

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

    /// The weight in one piece, if `op` can normalise `x` with it.
    pub(crate) fn weight_for(&self, op: &str, x: &Tensor) -> Result<Tensor> {
        check_weight(op, x, self.weight)?;
        self.weight.contiguous()
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
    run(&as_rows(x)?, weight, eps, Then::Nothing)
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
    run(&x, weight, eps, Then::Gate(&gate))
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
/// Devices: CUDA, Metal; on the CPU the norm, the sum and the product by themselves, with the same roundings.
pub fn add_rms_norm(x: &Tensor, update: &Tensor, norm: Norm, factor: f64) -> Result<Tensor> {
    check_weight("add_rms_norm", x, norm.weight)?;
    if update.shape() != x.shape() || update.dtype() != x.dtype() {
        bail!("add_rms_norm: {:?} {:?} is not like x {:?} {:?}", update.dims(), update.dtype(), x.dims(), x.dtype())
    }
    run(&as_rows(update)?, norm.weight, norm.eps, Then::Add(&as_rows(x)?, factor as f32))
}

/// What is done with a norm on the way.
enum Then<'a> {
    Nothing,
    /// Multiplies by SiLU of `[.., D]`, or of `[N, H D]`, in rows.
    Gate(&'a Tensor),
    /// Adds `[.., D]` in rows, and multiplies the sum.
    Add(&'a Tensor, f32),
}

/// `x` in rows.
fn run(x: &Tensor, weight: &Tensor, eps: f64, then: Then) -> Result<Tensor> {
    let (weight, eps) = (weight.contiguous()?, eps as f32);
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = x.device() {
        return cuda::rms_norm(device, x, &weight, eps, then);
    }
    on_metal!(x, backend => metal::rms_norm(backend, x, &weight, eps, then));
    let plain = || x.apply_op2_no_bwd(&weight, &RmsNorm { eps });
    match then {
        Then::Nothing => plain(),
        Then::Gate(gate) => x.apply_op3_no_bwd(gate, &weight, &RmsNormGated { eps }),
        Then::Add(to, 1.0) => add(to, &plain()?),
        Then::Add(to, factor) => add(to, &plain()?)? * f64::from(factor),
    }
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
        Ok((on_cpu("rms_norm", (x, xl), None, (w, wl), self.eps)?, xl.shape().clone()))
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
        Ok((on_cpu("rms_norm_gated", (x, xl), Some((gate, gl)), (w, wl), self.eps)?, xl.shape().clone()))
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

fn on_cpu(op: &str, x: Operand, gate: Option<Operand>, weight: Operand, eps: f32) -> Result<CpuStorage> {
    match x.0 {
        CpuStorage::F32(_) => cpu::rms_norm::<f32>(x, gate, weight, eps),
        CpuStorage::F16(_) => cpu::rms_norm::<f16>(x, gate, weight, eps),
        CpuStorage::BF16(_) => cpu::rms_norm::<bf16>(x, gate, weight, eps),
        other => bail!("{op}: x is {:?}, expected f32, f16 or bf16", crate::cpu::dtype_of(other)),
    }
}

//! The activations of MLPs: gated, and GELU by itself.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
pub(crate) mod metal;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

use crate::cpu::{as_rows, dtype_of};

/// What is applied to the gate half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`
    GeluTanh,
}

/// Applies the activation to the first half of each row and multiplies by the second:
///
/// ```text
/// y = cast(act(gate_up[.., 0..I]) * gate_up[.., I..2I])        in f32, one rounding
/// ```
///
/// `gate_up` `[N, 2 I]` in f32, f16 or bf16. Returns `[N, I]` of the same dtype.
///
/// # Errors
///
/// The last dimension is odd.
///
/// Devices: CPU, CUDA, Metal.
///
/// Source: Shazeer, "GLU Variants Improve Transformer", 2020.
pub fn gated_activation(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    let (_, width) = gate_up.dims2()?;
    if width % 2 != 0 {
        bail!("gated_activation: gate_up is {:?}, expected [N, 2 I]", gate_up.dims())
    }
    let gate_up = as_rows(gate_up)?;
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = gate_up.device() {
        return cuda::gated_activation(device, &gate_up, activation);
    }
    on_metal!(gate_up, backend => metal::gated_activation(backend, &gate_up, activation));
    gate_up.apply_op1_no_bwd(&GatedActivation(activation))
}

/// As [`gated_activation`], of a `gate` and an `up` `[N, I]` that do not lie side by side.
///
/// # Errors
///
/// `up` differs from `gate` in shape or dtype.
///
/// Devices: CUDA, Metal; on the CPU both are first laid side by side.
pub fn gated_by(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    if up.shape() != gate.shape() || up.dtype() != gate.dtype() {
        bail!("gated_by: up is {:?} {:?}, gate {:?} {:?}", up.dims(), up.dtype(), gate.dims(), gate.dtype())
    }
    on_metal!(gate, backend => metal::gated_by(backend, &as_rows(gate)?, &as_rows(up)?, activation));
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = gate.device() {
        return cuda::gated_by(device, &as_rows(gate)?, &as_rows(up)?, activation);
    }
    gated_activation(&Tensor::cat(&[gate, up], 1)?, activation)
}

/// The Gaussian error linear unit, by the error function itself and not its usual approximation:
///
/// ```text
/// y = cast(x / 2 * (1 + erf(x / sqrt(2))))        in f32, one rounding
/// ```
///
/// `x` `[.., D]` in f32, f16 or bf16. Returns its shape and dtype.
///
/// # Errors
///
/// `x` is of another dtype.
///
/// Devices: CPU, CUDA, Metal.
///
/// Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    on_metal!(x, backend => metal::gelu(backend, &x.contiguous()?));
    let x = if x.device().is_cpu() { as_rows(x)? } else { x.contiguous()? };
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = x.device() {
        return cuda::gelu(device, &x);
    }
    x.apply_op1_no_bwd(&Gelu)
}

/// Multiplies by the sigmoid of a gate:
///
/// ```text
/// y = cast(x * sigmoid(gate))        in f32, one rounding
/// ```
///
/// `x` and `gate` `[.., D]` of one dtype, f32, f16 or bf16. Returns `x`'s shape and dtype.
///
/// # Errors
///
/// `gate` differs from `x` in shape or dtype.
///
/// Devices: CPU, CUDA, Metal.
///
/// Source: Qiu et al., "Gated Attention for Large Language Models", 2025.
pub fn sigmoid_gated(x: &Tensor, gate: &Tensor) -> Result<Tensor> {
    if gate.shape() != x.shape() || gate.dtype() != x.dtype() {
        bail!(
            "sigmoid_gated: gate is {:?} {:?}, expected {:?} {:?} like x",
            gate.dims(),
            gate.dtype(),
            x.dims(),
            x.dtype()
        )
    }
    on_metal!(x, backend => metal::sigmoid_gated(backend, &as_rows(x)?, &as_rows(gate)?));
    let (x, gate) = (as_rows(x)?, as_rows(gate)?);
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = x.device() {
        return cuda::sigmoid_gated(device, &x, &gate);
    }
    x.apply_op2_no_bwd(&gate, &SigmoidGated)
}

struct SigmoidGated;

impl CustomOp2 for SigmoidGated {
    fn name(&self) -> &'static str {
        "sigmoid-gated"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, gate: &CpuStorage, gl: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = match (x, gate) {
            (CpuStorage::F32(x), CpuStorage::F32(gate)) => CpuStorage::F32(cpu::sigmoid_gated((x, xl), (gate, gl))?),
            (CpuStorage::F16(x), CpuStorage::F16(gate)) => CpuStorage::F16(cpu::sigmoid_gated((x, xl), (gate, gl))?),
            (CpuStorage::BF16(x), CpuStorage::BF16(gate)) => CpuStorage::BF16(cpu::sigmoid_gated((x, xl), (gate, gl))?),
            (other, _) => bail!("sigmoid_gated: x is {:?}, expected f32, f16 or bf16", dtype_of(other)),
        };
        Ok((out, xl.shape().clone()))
    }
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(cpu::gelu(x, xl)?),
            CpuStorage::F16(x) => CpuStorage::F16(cpu::gelu(x, xl)?),
            CpuStorage::BF16(x) => CpuStorage::BF16(cpu::gelu(x, xl)?),
            other => bail!("gelu: x is {:?}, expected f32, f16 or bf16", dtype_of(other)),
        };
        Ok((out, xl.shape().clone()))
    }
}

struct GatedActivation(Activation);

impl CustomOp1 for GatedActivation {
    fn name(&self) -> &'static str {
        "gated-activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, width) = xl.shape().dims2()?;
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(cpu::gated_activation(x, xl, self.0)?),
            CpuStorage::F16(x) => CpuStorage::F16(cpu::gated_activation(x, xl, self.0)?),
            CpuStorage::BF16(x) => CpuStorage::BF16(cpu::gated_activation(x, xl, self.0)?),
            other => bail!("gated_activation: gate_up is {:?}, expected f32, f16 or bf16", dtype_of(other)),
        };
        Ok((out, (n, width / 2).into()))
    }
}

//! The gated activation of an MLP.

mod reference;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use crate::cpu;

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
/// Devices: CPU.
///
/// Source: Shazeer, "GLU Variants Improve Transformer", 2020.
pub fn gated_activation(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    let (_, width) = gate_up.dims2()?;
    if width % 2 != 0 {
        bail!("gated_activation: gate_up is {:?}, expected [N, 2 I]", gate_up.dims())
    }
    gate_up.contiguous()?.apply_op1_no_bwd(&GatedActivation(activation))
}

struct GatedActivation(Activation);

impl CustomOp1 for GatedActivation {
    fn name(&self) -> &'static str {
        "gated-activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, width) = xl.shape().dims2()?;
        let out = reference::gated_activation(&cpu::read_f32(x, xl)?, width / 2, self.0);
        Ok((cpu::to_storage(out, cpu::dtype_of(x))?, (n, width / 2).into()))
    }
}

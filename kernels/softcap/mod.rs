//! The softcap of final logits.

mod cpu;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use crate::cpu::dtype_of;

/// Bounds each element smoothly:
///
/// ```text
/// y = cast(cap * tanh(x / cap))        in f32, one rounding
/// ```
///
/// `x` of any shape in f32, f16 or bf16. Returns the same shape and dtype.
///
/// # Errors
///
/// `x` has another dtype, or `cap` is not a positive number.
///
/// Devices: CPU, CUDA, Metal.
///
/// Source: Gemma 2, <https://arxiv.org/abs/2408.00118>, section 2.
pub fn softcap(x: &Tensor, cap: f32) -> Result<Tensor> {
    if !(cap > 0.0 && cap.is_finite()) {
        bail!("softcap: cap is {cap}, expected a positive number")
    }
    let x = x.contiguous()?;
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = x.device() {
        return crate::activation::cuda::softcap(device, &x, cap);
    }
    on_metal!(x, backend => crate::activation::metal::softcap(backend, &x, cap));
    x.apply_op1_no_bwd(&Softcap(cap))
}

struct Softcap(f32);

impl CustomOp1 for Softcap {
    fn name(&self) -> &'static str {
        "softcap"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(cpu::softcap(x, layout, self.0)?),
            CpuStorage::F16(x) => CpuStorage::F16(cpu::softcap(x, layout, self.0)?),
            CpuStorage::BF16(x) => CpuStorage::BF16(cpu::softcap(x, layout, self.0)?),
            other => bail!("softcap: x is {:?}, expected f32, f16 or bf16", dtype_of(other)),
        };
        Ok((out, layout.shape().clone()))
    }
}

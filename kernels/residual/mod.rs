//! The sum that carries a model from layer to layer.

mod cpu;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use crate::cpu::view;
use crate::simd::Stored;

/// `x + y` of one shape and dtype: f32, f16 or bf16. On the CPU on the threads that all ops share. Candle's own sum has
/// others, which wait for work in a loop and so take turns with these on the same cores.
///
/// # Errors
///
/// Shapes or dtypes differ.
///
/// Devices: CPU; others through candle's sum.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.dims() != y.dims() || x.dtype() != y.dtype() {
        bail!("add: {:?} {:?} and {:?} {:?} are not alike", x.dims(), x.dtype(), y.dims(), y.dtype())
    }
    if x.device().is_cpu() { x.contiguous()?.apply_op2_no_bwd(&y.contiguous()?, &Add) } else { x + y }
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, y: &CpuStorage, yl: &Layout) -> Result<(CpuStorage, Shape)> {
        fn sum<T: Stored>(x: (&[T], &Layout), y: (&[T], &Layout)) -> Result<CpuStorage> {
            Ok(T::to_cpu_storage_owned(cpu::add(view(x.0, x.1)?, view(y.0, y.1)?)))
        }
        let out = match (x, y) {
            (CpuStorage::F32(x), CpuStorage::F32(y)) => sum((x, xl), (y, yl))?,
            (CpuStorage::F16(x), CpuStorage::F16(y)) => sum((x, xl), (y, yl))?,
            (CpuStorage::BF16(x), CpuStorage::BF16(y)) => sum((x, xl), (y, yl))?,
            _ => bail!("add: of another dtype than f32, f16 and bf16"),
        };
        Ok((out, xl.shape().clone()))
    }
}

//! Rotary position embedding over a leading part of the head.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
mod metal;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
#[cfg(feature = "metal")]
use candle_core::MetalStorage;
#[cfg(feature = "metal")]
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

use crate::cpu::{as_rows, dtype_of, read_f32};

/// Rotates the first `R` of `D` components of every head, in half-split pairs `(i, i + R/2)`:
///
/// ```text
/// y[i]       = x[i] * cos[i] - x[i + R/2] * sin[i]          i in 0..R/2
/// y[i + R/2] = x[i + R/2] * cos[i] + x[i] * sin[i]
/// y[j]       = x[j]                                          j in R..D
/// ```
///
/// `x` `[N, heads, D]` in f32, f16 or bf16; `cos` and `sin` `[N, R/2]` in f32, a row for each token.
/// "Proportional" frequencies are the same op with `R = D` and zero frequency (cos 1, sin 0) for the pairs
/// that do not rotate. Returns `x`'s shape and dtype; arithmetic in f32.
///
/// # Errors
///
/// The tables are not f32 `[N, R/2]` alike, or `R > D`.
///
/// Devices: CPU, CUDA, Metal.
///
/// Source: Su et al., "RoFormer", 2021, in the half-split form of GPT-NeoX.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (n, _, d) = x.dims3()?;
    let (rows, half) = cos.dims2()?;
    if rows != n || 2 * half > d || sin.dims() != cos.dims() || cos.dtype() != DType::F32 || sin.dtype() != DType::F32 {
        bail!(
            "rope: cos is {:?} {:?} and sin {:?} {:?}, expected f32 [{n}, R/2] with R at most {d} for x {:?}",
            cos.dims(),
            cos.dtype(),
            sin.dims(),
            sin.dtype(),
            x.dims()
        )
    }
    as_rows(x)?.apply_op3_no_bwd(&cos.contiguous()?, &sin.contiguous()?, &Rope)
}

/// The rotations of a step: cosines and sines `[N, R/2]` in f32 of `position * frequency`.
///
/// `positions` `[N]` in u32, `inv_freq` `[R/2]` in f32, radians per position.
///
/// # Errors
///
/// Other dtypes or ranks.
///
/// Devices: CUDA, Metal; on the CPU through candle's ops.
pub fn rotations(positions: &Tensor, inv_freq: &Tensor) -> Result<(Tensor, Tensor)> {
    let (n, half) = (positions.dims1()?, inv_freq.dims1()?);
    if positions.dtype() != DType::U32 || inv_freq.dtype() != DType::F32 {
        bail!("rotations: {:?} and {:?}, expected u32 and f32", positions.dtype(), inv_freq.dtype())
    }
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = positions.device() {
        let both = cuda::rotations(device, positions, inv_freq)?;
        return Ok((both.get(0)?, both.get(1)?));
    }
    on_metal!(positions, backend => {
        let both = metal::rotations(backend, &positions.contiguous()?, &inv_freq.contiguous()?)?;
        Ok((both.get(0)?, both.get(1)?))
    });
    let angles = positions.to_dtype(DType::F32)?.reshape((n, 1))?.broadcast_mul(&inv_freq.reshape((1, half))?)?;
    Ok((angles.cos()?, angles.sin()?))
}

struct Rope;

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        cos: &CpuStorage,
        cl: &Layout,
        sin: &CpuStorage,
        sl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        #[cfg(any(test, feature = "emulator"))]
        if let Some(emulator) = crate::metal::emulator::emulator() {
            return Ok((metal::rope(&emulator, (x, xl), (cos, cl), (sin, sl))?, xl.shape().clone()));
        }
        let (_, half) = cl.shape().dims2()?;
        let (cos, sin) = (&read_f32(cos, cl)?, &read_f32(sin, sl)?);
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(cpu::rope(x, xl, cos, sin, half)?),
            CpuStorage::F16(x) => CpuStorage::F16(cpu::rope(x, xl, cos, sin, half)?),
            CpuStorage::BF16(x) => CpuStorage::BF16(cpu::rope(x, xl, cos, sin, half)?),
            other => bail!("rope: x is {:?}, expected f32, f16 or bf16", dtype_of(other)),
        };
        Ok((out, xl.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        cos: &CudaStorage,
        cl: &Layout,
        sin: &CudaStorage,
        sl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((cuda::rope((x, xl), (cos, cl), (sin, sl))?, xl.shape().clone()))
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        x: &MetalStorage,
        xl: &Layout,
        cos: &MetalStorage,
        cl: &Layout,
        sin: &MetalStorage,
        sl: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        Ok((metal::rope(x.device(), (x, xl), (cos, cl), (sin, sl))?, xl.shape().clone()))
    }
}

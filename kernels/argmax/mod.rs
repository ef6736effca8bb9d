//! The most likely token.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "metal"))]
mod metal;
#[cfg(test)]
mod tests;

use candle_core::{DType, Result, Tensor, bail};

/// Stands for a row that leaves nothing to choose from.
pub const NOTHING: u32 = u32::MAX;

/// The index of the largest of the first `limit` values of each row, the lowest of equal ones; [`NOTHING`] for a row with
/// NaN or +inf among them, or with nothing finite.
///
/// `x` `[n, V]` in f32, f16 or bf16. Returns `[n]` in u32. On CUDA and Metal nothing waits for the result.
///
/// # Errors
///
/// `x` has another rank or dtype, or `limit` is not from 1 to `V`.
///
/// Devices: CUDA, Metal; elsewhere on the host.
pub fn argmax(x: &Tensor, limit: usize) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    if limit == 0 || limit > width || !matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        bail!("argmax: {limit} values of x {:?} {:?}, expected 1 to {width} floats", x.dims(), x.dtype())
    }
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = x.device() {
        return cuda::argmax(device, &x.contiguous()?, limit);
    }
    on_metal!(x, backend => metal::argmax(backend, &x.contiguous()?, limit));
    let rows = x.narrow(1, 0, limit)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let indices: Vec<u32> = rows.iter().map(|row| largest(row)).collect();
    Tensor::from_vec(indices, n, x.device())
}

fn largest(row: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, NOTHING);
    for (index, &value) in (0..).zip(row) {
        if value.is_nan() || value == f32::INFINITY {
            return NOTHING;
        }
        if value > best.0 {
            best = (value, index);
        }
    }
    best.1
}
